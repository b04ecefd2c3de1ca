"""Check which loss options have a meaning; what has none is refused by name, with the reason."""

from losses import (
    F_DIVERGENCES,
    LOSSES,
    NO_REFERENCE,
    PER_TOKEN,
    SORTS_THE_BATCH,
    TAKES_F_DIVERGENCE,
    flags_of,
)


def check_losses(options: dict, defaults: dict) -> None:
    """Refuse loss options without a meaning.

    These are unknown losses, flags that no chosen loss reads, values out of range, and options that
    the losses cannot be combined with. `defaults` are the flags' default values. Raises ValueError.
    """
    names = options["loss_type"]
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"--loss_type {name}: unknown; one of {' '.join(sorted(LOSSES))}")
    weights = options["loss_weights"]
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"--loss_weights: {len(weights)} weights for {len(names)} loss types")
    changed = {flag for flag in defaults if options.get(flag) != defaults[flag]}
    check_readers(options, changed)
    check_ranges(options)
    check_combinations(options, changed)


def check_readers(options: dict, changed: set[str]) -> None:
    """Raise ValueError for a flag in `changed` that losses read, but none of the chosen ones."""
    readers = {}
    for name, loss in LOSSES.items():
        for flag in flags_of(loss):
            readers.setdefault(flag, set()).add(name)
    readers.pop("beta")  # metrics read it too: rewards are beta r, whatever the loss
    names = options["loss_type"]
    for flag in sorted(readers.keys() & changed):
        if not readers[flag] & set(names):
            raise ValueError(
                f"--{flag} {options[flag]}: --loss_type {' '.join(names)} does not read it; "
                f"{' '.join(sorted(readers[flag]))} do")


def check_ranges(options: dict) -> None:
    """Raise ValueError for a value outside the range on which the losses are defined."""
    epsilon = options["label_smoothing"]
    ld_alpha = options["ld_alpha"]
    ranges = {
        "label_smoothing": (
            0 <= epsilon < 0.5 or epsilon == 0.5 and "robust" not in options["loss_type"],
            "a probability of flipped labels, 0 <= eps < 0.5 (robust divides by 1 - 2 eps)"),
        "beta": (options["beta"] > 0, "it must be above 0"),
        "ld_alpha": (ld_alpha is None or 0 <= ld_alpha <= 1, "it must be between 0 and 1"),
        "discopop_tau": (options["discopop_tau"] > 0, "it must be above 0"),
        "f_divergence_type": (
            options["f_divergence_type"] in F_DIVERGENCES, f"one of {' '.join(F_DIVERGENCES)}"),
    }
    for flag, (allowed, why) in ranges.items():
        if not allowed:
            raise ValueError(f"--{flag} {options[flag]}: {why}")


def check_combinations(options: dict, changed: set[str]) -> None:
    """Raise ValueError for flags in `changed` that the chosen losses cannot be combined with."""
    for flag, (names, why) in find_clashes(set(options["loss_type"])).items():
        if flag in changed and names:
            raise ValueError(f"--{flag} with --loss_type {' '.join(sorted(names))}: {why}")
    if options["bco_delta"] == "first" and options["exact_global_loss"] is False:
        raise ValueError(
            "--exact_global_loss false with --bco_delta first: delta is this step's own mean "
            "reward, which takes the whole global batch")
    needs = {  # flag: (whether it is read, with which other)
        "f_alpha_divergence_coef": (
            options["f_divergence_type"] == "alpha_divergence",
            "f_divergence_type alpha_divergence"),
        "wpo_clamp": (options["use_weighting"], "use_weighting"),
        "ld_apply_to_ref": (options["ld_alpha"] is not None, "ld_alpha"),
        "rpo_average": (bool(options["rpo_alpha"]), "rpo_alpha"),
    }
    for flag, (read, reader) in needs.items():
        if flag in changed and not read:
            raise ValueError(f"--{flag} {options[flag]}: read only with --{reader}")


def find_clashes(names: set[str]) -> dict[str, tuple[set[str], str]]:
    """Tell, for each flag, which of the chosen losses it cannot go with, and why."""
    takers = " ".join(sorted(TAKES_F_DIVERGENCE))
    return {
        "f_divergence_type": (
            names - {"sft"} - TAKES_F_DIVERGENCE,
            f"it replaces the scores that only {takers} compare; the others have no such form"),
        "use_weighting": (
            names & SORTS_THE_BATCH or if_all(names, {"sft"}),
            "WPO weighs single pairs; sorted values belong to no one pair, "
            "and sft is never weighed"),
        "ld_alpha": (if_all(names, PER_TOKEN), "these divide by the length already"),
        "reference_free": (if_all(names, NO_REFERENCE), "these read no reference anyway"),
        "rpo_alpha": (if_all(names, {"sft"}), "it adds the same term again"),
    }


def if_all(names: set[str], group: set[str]) -> set[str]:
    """Return `names` if all are of the group, else none: one other loss is enough to use a flag."""
    return names if names <= group else set()
