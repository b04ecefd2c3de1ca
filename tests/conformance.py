"""Run the golden loss cases of tests/golden against an implementation and print where it agrees and where it differs.

    python tests/conformance.py --impl ours
    python tests/conformance.py --impl trl                              # TRL 1.x, as installed
    python tests/conformance.py --impl trl018 --path DIR                # pip install --no-deps --target DIR trl==0.18.2
    python tests/conformance.py --impl torchtune --path DIR             # pip install --no-deps --target DIR torchtune
    python tests/conformance.py --impl package.module --only sigmoid    # anything that offers losses(case)

`losses(case)` takes a case as golden/schema.json describes it and returns (per_pair, grads): per_pair is a list of one
loss per pair, or one number, the batch loss, where the implementation has no more; grads maps each policy input's name
to a list (of lists) in the input's shape. It raises `LookupError(reason)` where it does not offer what the case asks.

A difference is |got - expected| / max(|expected|, 1e-6), the largest of a case's losses and gradients; float64 agrees
within 1e-9, what a peer can only compute in float32 within 1e-5 of max(|expected|, 1e-2).
Exit status: 0 all agree, 1 some differ, 2 nothing was run: the implementation cannot be imported, or --only names no loss.
"""

import argparse
import ast
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

SUM_SQ_INPUTS = ["policy_chosen_log_sum_sq_probs", "policy_rejected_log_sum_sq_probs"]
REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"
POLICY_INPUTS = [f"policy_{side}_{kind}" for kind in ("logps", "token_logps") for side in ("chosen", "rejected")]


class Missing(Exception):
    """The implementation is not installed; the message says what to install."""


# Cases and comparison.


def load_cases(only: str | None = None) -> list[dict]:
    """All golden cases, or those in which the loss `only` takes part (`aot_unpaired` means `aot_pair`)."""
    only = "aot_pair" if only == "aot_unpaired" else only
    files = sorted((GOLDEN / "losses").glob("*.json"))
    cases = [case for file in files for case in json.loads(file.read_text())["cases"]]
    return [case for case in cases if only is None or only in loss_names(case)]


def loss_names(case: dict) -> list[str]:
    return case["loss_type"] if isinstance(case["loss_type"], list) else [case["loss_type"]]


def flat(value) -> list[float]:
    """The numbers of nested lists, in order."""
    return [x for v in value for x in flat(v)] if isinstance(value, (list, tuple)) else [float(value)]


def difference(got, expected, floor: float) -> float:
    """Largest |got - expected| / max(|expected|, floor); infinite where got is not finite or has another shape."""
    got, expected = flat(got), flat(expected)
    if len(got) != len(expected) or not all(map(math.isfinite, got)):
        return math.inf
    return max(abs(a - b) / max(abs(b), floor) for a, b in zip(got, expected))


def case_difference(case: dict, per_pair, grads: dict, floor: float = 1e-6) -> float:
    """Largest difference over the case's losses (the batch loss, if per_pair is one number) and gradients."""
    want = case["expected"]
    losses = want["losses"] if isinstance(per_pair, list) else want["loss"]
    worst = [difference(per_pair, losses, floor)]
    return max(worst + [difference(grads.get(name, []), rows, floor) for name, rows in want["grad"].items()])


# What the adapters share: inputs as tensors, gradients by autograd.


def tensors(case: dict, dtype: torch.dtype = torch.float64) -> dict:
    """Inputs as (B,) tensors, or as lists of (n,) tensors at token level; policy log-probs require a gradient.

    Log-probs take `dtype`; lengths, ratings and sums of squares are never narrower than float32.
    """

    def tensor(name, values):
        kind = dtype if name.endswith("logps") else torch.promote_types(dtype, torch.float32)
        wanted = name in POLICY_INPUTS
        if isinstance(values[0], list):
            return [torch.tensor(row, dtype=kind, requires_grad=wanted) for row in values]
        return torch.tensor(values, dtype=kind, requires_grad=wanted)

    return {name: tensor(name, values) for name, values in case["inputs"].items()}


def gradients(loss: Tensor, inputs: dict) -> dict:
    """d loss / d policy input, as lists in the input's shape."""
    grads = {}
    for name in (n for n in POLICY_INPUTS if n in inputs):
        leaves = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        grads[name] = [g.tolist() for g in found] if isinstance(inputs[name], list) else found[0].tolist()
    return grads


def at_token_level(case: dict) -> bool:
    return "policy_chosen_token_logps" in case["inputs"]


# Ours.

OPTIONS = {"rpo_alpha": None, "rpo_average": "sequence"}


def ours(case: dict, dtype: torch.dtype = torch.float64):
    """losses.py of this repository, in any floating dtype of the inputs; it computes in float32 at least."""
    if str(REPO) not in sys.path:
        sys.path.insert(0, str(REPO))
    import losses

    params, inputs = case["params"], tensors(case, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    options = OPTIONS | params | {"loss_type": loss_names(case), "loss_weights": case["loss_weights"]}
    x, weights = (our_token_pairs if at_token_level(case) else our_pairs)(losses, inputs, params, wide)
    per_pair = losses.pair_losses(x._replace(score=our_score(losses, params)), options, weights)
    return per_pair.tolist(), gradients(per_pair.mean(), inputs)


def our_score(losses, params: dict) -> Callable:
    kind = params.get("f_divergence_type", "reverse_kl")
    if kind != "alpha_divergence":
        return losses.F_DIVERGENCES[kind]
    return lambda r: losses.alpha_divergence(r, params["f_alpha_divergence_coef"])


def our_pairs(losses, inputs: dict, params: dict, wide: torch.dtype):
    x = {name: value.to(wide) for name, value in inputs.items()}
    zeros = torch.zeros_like(x["policy_chosen_logps"]).detach()
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        x[name] = zeros if params.get("reference_free") else x.get(name, zeros)
    return losses.PairLogps(**x), None


def our_token_pairs(losses, inputs: dict, params: dict, wide: torch.dtype):
    """Completions laid end to end in stream order: chosen 0, rejected 0, chosen 1 ..."""

    def stream(kind):
        pairs = zip(inputs[kind.replace("*", "chosen")], inputs[kind.replace("*", "rejected")])
        return torch.cat([row for pair in pairs for row in pair]).to(wide)

    policy, ref = stream("policy_*_token_logps"), stream("ref_*_token_logps")
    sides = inputs["policy_chosen_token_logps"], inputs["policy_rejected_token_logps"]
    lengths = torch.tensor([[len(w), len(row_l)] for w, row_l in zip(*sides)])  # (B, 2)
    ld_alpha, ld_ref = params.get("ld_alpha"), params.get("ld_apply_to_ref", True)
    policy_sums = losses.completion_sums(policy, lengths, ld_alpha)
    ref_sums = losses.completion_sums(ref, lengths, ld_alpha if ld_ref else None)
    nll = -losses.completion_sums(policy, lengths)[:, 0]
    columns = policy_sums.unbind(1) + ref_sums.unbind(1) + lengths.to(wide).unbind(1)
    weights = None
    if params.get("use_weighting"):
        weights = losses.wpo_weights(policy, stream("policy_*_log_sum_sq_probs"), lengths, params["wpo_clamp"])
    return losses.PairLogps(*columns, chosen_nll=nll), weights


# TRL 1.x: its _compute_loss, unbound, with a model that answers with the case's log-probs.

TRL018_LOSSES = {"sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"}
TRL018_LOSSES |= {"aot", "aot_pair", "apo_zero", "apo_down", "discopop"}
TRL_LOSSES = TRL018_LOSSES | {"sft", "sigmoid_norm"}


def trl(case: dict):
    """The batch loss of TRL 1.x, in float64 (the alpha divergence in float32); exo_pair's smoothing 0 runs as 1e-3."""
    check_trl_offers(case)
    exo_default = 1e-3 if "exo_pair" in loss_names(case) else 0.0
    smoothing = case["params"].get("label_smoothing") or exo_default
    inputs = tensors(case, torch.float32 if trl_needs_float32(case) else torch.float64)
    loss, _ = run_trl(case["params"] | {"label_smoothing": smoothing}, loss_names(case), case["loss_weights"], inputs)
    return loss.item(), gradients(loss, inputs)


def run_trl(params: dict, names: list[str], loss_weights: list[float], inputs: dict) -> tuple[Tensor, dict]:
    """DPOTrainer._compute_loss on the inputs, and the metrics it logs; `params` are taken as they are."""
    policy, mask = padded(inputs, "policy")
    ref, _ = padded(inputs, "ref")
    extra = {"entropy": torch.zeros_like(policy), "mean_logits": torch.zeros_like(policy), "is_top1": mask[:, 1:] > 0}
    if params.get("use_weighting"):
        extra["log_sum_sq_probs"] = pad([row for side in SUM_SQ_INPUTS for row in inputs[side]])
    model = FakeModel(SimpleNamespace(log_probs=policy, **extra))
    fake = trl_self(params, names, loss_weights, model, FakeModel(SimpleNamespace(log_probs=ref)))
    rows = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trl_trainer()._compute_loss(fake, model, rows, return_outputs=False)
    return loss, {name: values[-1] for name, values in fake._metrics["train"].items()}


def trl_trainer():
    if version_of("trl").split(".")[0] != "1":
        raise Missing(f"--impl trl needs TRL 1.x, found {version_of('trl')}: pip install trl==1.16.0 transformers")
    return importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed: pip install {package}") from None


def check_trl_offers(case: dict) -> None:
    params = case["params"]
    if set(loss_names(case)) - TRL_LOSSES:
        raise LookupError("no such loss")
    if params.get("ipo_average") == "sum" or params.get("sft_average") == "sequence":
        raise LookupError("no such average")
    for flag in ("reference_free", "rpo_alpha"):
        if flag in params:
            raise LookupError(f"no {flag}")
    if params.get("ld_apply_to_ref") is False:
        raise LookupError("ld_alpha always applies to the reference")


def trl_needs_float32(case: dict) -> bool:
    """Its clamp of the alpha divergence looks the dtype up in a table that lacks float64."""
    return case["params"].get("f_divergence_type") == "alpha_divergence"


class FakeModel(torch.nn.Module):
    """Answers every call with the same output."""

    is_gradient_checkpointing = False

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, **_):
        return self.output


def trl_self(params: dict, names: list[str], loss_weights: list[float], model, ref_model) -> SimpleNamespace:
    """What _compute_loss reads from its trainer. TRL's alpha coefficient is 1 - alpha."""
    same = lambda x: x
    return SimpleNamespace(
        model=model, ref_model=ref_model, precompute_ref_logps=False, aux_loss_enabled=False,
        loss_types=["aot_unpaired" if name == "aot_pair" else name for name in names],
        loss_weights=loss_weights, beta=params.get("beta", 0.1), ld_alpha=params.get("ld_alpha"),
        label_smoothing=params.get("label_smoothing", 0.0), use_weighting=params.get("use_weighting", False),
        f_divergence_type=params.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=1 - params.get("f_alpha_divergence_coef", 0.5),
        args=SimpleNamespace(discopop_tau=params.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip


def pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def padded(inputs: dict, model: str) -> tuple[Tensor, Tensor]:
    """Per-token log-probs (2B, L), chosen rows first, and a completion mask (2B, 1 + L) with one prompt token.

    A sequence-level case has its whole log-prob on the first of its tokens.
    """
    if f"{model}_chosen_token_logps" in inputs:
        rows = inputs[f"{model}_chosen_token_logps"] + inputs[f"{model}_rejected_token_logps"]
        return pad(rows), pad([torch.tensor([0] + [1] * len(row)) for row in rows])
    sums = torch.cat([inputs[f"{model}_chosen_logps"], inputs[f"{model}_rejected_logps"]])
    lengths = torch.cat([inputs["chosen_lengths"], inputs["rejected_lengths"]]).long()
    mask = pad([torch.tensor([0] + [1] * n) for n in lengths.tolist()])
    return F.pad(sums[:, None], (0, mask.shape[1] - 2)), mask


# TRL 0.18: its dpo_loss and the helpers it calls, read out of the installed source, since the package itself does not
# import beside a recent transformers.

TRL018_OPTIONS = ("use_weighting", "rpo_alpha", "ld_alpha")


def trl018(case: dict):
    """TRL 0.18 DPOTrainer.dpo_loss on a fresh trainer; for ipo on averaged log-probs, as its forward returns them."""
    code, params = trl018_source(), case["params"]
    name = loss_names(case)[0]
    if len(loss_names(case)) > 1 or name not in TRL018_LOSSES:
        raise LookupError("no such loss")
    if at_token_level(case) and any(flag in params for flag in TRL018_OPTIONS) or "rpo_alpha" in params:
        raise LookupError("this option is not part of dpo_loss")
    inputs = tensors(case)
    columns = summed(inputs)
    if params.get("ipo_average") == "token":
        columns = [c / n for c, n in zip(columns, lengths_of(case, columns[0].dtype) * 2)]
    per_pair = code["dpo_loss"](trl018_self(name, params, code), *columns)[0] * case["loss_weights"][0]
    return per_pair.tolist(), gradients(per_pair.mean(), inputs)


def summed(inputs: dict) -> list[Tensor]:
    """policy chosen, policy rejected, ref chosen, ref rejected, each (B,)."""
    names = [f"{model}_{side}" for model in ("policy", "ref") for side in ("chosen", "rejected")]
    if "policy_chosen_token_logps" not in inputs:
        return [inputs[f"{name}_logps"] for name in names]
    return [torch.stack([row.sum() for row in inputs[f"{name}_token_logps"]]) for name in names]


def lengths_of(case: dict, dtype: torch.dtype) -> list[Tensor]:
    """chosen, rejected, each (B,) tokens."""
    columns = case["inputs"]
    if at_token_level(case):
        rows = [columns[f"policy_{side}_token_logps"] for side in ("chosen", "rejected")]
        return [torch.tensor([len(row) for row in side], dtype=dtype) for side in rows]
    return [torch.tensor(columns[name], dtype=dtype) for name in ("chosen_lengths", "rejected_lengths")]


def trl018_self(name: str, params: dict, code: dict) -> SimpleNamespace:
    """What dpo_loss reads from its trainer; forward KL is its alpha divergence at 1."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), use_distributed=False)
    kind, alpha = params.get("f_divergence_type", "reverse_kl"), params.get("f_alpha_divergence_coef", 1.0)
    return SimpleNamespace(
        accelerator=accelerator, loss_type=name, beta=params["beta"],
        label_smoothing=params.get("label_smoothing", 0.0),
        reference_free=params.get("reference_free", False), running=code["RunningMoments"](accelerator),
        f_divergence_type="alpha_divergence" if kind == "forward_kl" else kind,
        f_divergence_params={"alpha_divergence_coef": alpha},
        args=SimpleNamespace(discopop_tau=params.get("discopop_tau", 0.05)),
    )  # fmt: skip


@functools.cache
def trl018_source() -> dict:
    """Namespace with dpo_loss, cap_exp, RunningMoments and the constants of TRL 0.18, executed as they are written."""
    if not version_of("trl").startswith("0.18."):
        raise Missing(f"TRL {version_of('trl')} found: pip install --no-deps --target DIR trl==0.18.2, then --path DIR")
    trainer = Path(importlib.util.find_spec("trl").origin).parent / "trainer"
    wanted = {
        "utils.py": {"cap_exp", "get_exp_cap", "RunningMoments"},
        "dpo_config.py": {"FDivergenceType", "FDivergenceConstants"},
        "dpo_trainer.py": {"dpo_loss"},
    }
    names = {"torch": torch, "F": F, "Union": Union, "Enum": enum.Enum, "dataclass": dataclasses.dataclass}
    names |= {"Accelerator": object}
    for file, found in wanted.items():
        nodes = [n for n in ast.walk(ast.parse((trainer / file).read_text())) if getattr(n, "name", None) in found]
        exec(compile(ast.Module(nodes, []), str(trainer / file), "exec"), names)
    return names


# torchtune: the file of its losses alone, since the package needs torchao to import.


def torchtune(case: dict):
    """torchtune.rlhf.loss: DPOLoss (sigmoid) and RSOLoss (hinge)."""
    module, params, name = torchtune_module(), case["params"], case["loss_type"]
    if name not in ("sigmoid", "hinge"):
        raise LookupError("no such loss")
    if set(params) - {"beta", "label_smoothing"}:
        raise LookupError("no such option")
    beta = params["beta"]
    loss = module.DPOLoss(beta, params["label_smoothing"]) if name == "sigmoid" else module.RSOLoss(beta)
    inputs = tensors(case)
    per_pair = loss(*summed(inputs))[0] * case["loss_weights"][0]
    return per_pair.tolist(), gradients(per_pair.mean(), inputs)


def torchtune_module():
    spec = importlib.util.find_spec("torchtune")
    if spec is None:
        raise Missing("torchtune is not installed: pip install --no-deps --target DIR torchtune, then --path DIR")
    file = Path(spec.origin).parent / "rlhf" / "loss" / "dpo.py"
    found = importlib.util.spec_from_file_location("torchtune_dpo_losses", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


# Known reasons, tried in order on a case that differs or raises.


def has(**params) -> Callable[[dict], bool]:
    return lambda case: all(case["params"].get(key) == value for key, value in params.items())


def smoothed_sigmoid(case: dict) -> bool:
    return "sigmoid" in loss_names(case) and case["params"].get("label_smoothing", 0) > 0


def weighted(case: dict) -> bool:
    return bool(case["params"].get("use_weighting"))


def far_out(case: dict) -> bool:
    return "/extreme" in case["name"]


def takes(*names: str) -> Callable[[dict], bool]:
    return lambda case: bool(set(names) & set(loss_names(case)))


def both(*conditions: Callable) -> Callable[[dict], bool]:
    return lambda case: all(condition(case) for condition in conditions)


REASONS = {
    "trl": [
        (both(weighted, takes("sft")), "use_weighting with sft raises: the expanded loss is multiplied in place"),
        (both(weighted, takes("hinge")), "use_weighting with hinge raises in backward: relu's output changes in place"),
        (smoothed_sigmoid, "label_smoothing is ignored for sigmoid"),
        (both(takes("exo_pair"), far_out, has(f_divergence_type="forward_kl")), "1/u is not held at e^80"),
        (both(takes("exo_pair"), has(label_smoothing=0.0)), "smoothing 0 is refused; run as 1e-3, rounded to float32"),
        (both(takes("bco_pair"), lambda c: c["params"]["delta"] != 0), "no delta"),
        (both(weighted, has(wpo_clamp=True)), "the product of WPO weights is not clamped at 1"),
        (both(takes("discopop"), far_out), "exp(-z) overflows where its weight is 0: nan"),
        (both(far_out, has(f_divergence_type="forward_kl")), "1/u is not held at e^80"),
        (takes("exo_pair"), "eps is rounded to float32"),
    ],
    "trl018": [
        (takes("bco_pair"), "delta is updated with the batch before it is used"),
        (has(f_alpha_divergence_coef=0.0), "alpha = 0 divides by 0"),
        (has(f_alpha_divergence_coef=1e-9), "1 - u^-alpha without expm1 loses its digits"),
        (both(takes("discopop"), lambda c: "f_divergence_type" in c["params"]), "discopop ignores f_divergence_type"),
        (both(takes("ipo"), lambda c: "f_divergence_type" in c["params"]), "ipo: the divergence of r/n, not that of r over n"),
        (far_out, "u^-alpha is held at the largest float, not at e^80"),
    ],
}


# The table.


class Result(NamedTuple):
    case: str
    loss: str
    outcome: str  # agrees, differs, absent
    difference: float
    reason: str


IMPLEMENTATIONS = {"ours": ours, "trl": trl, "trl018": trl018, "torchtune": torchtune}


def judge(case: dict, impl: str, losses: Callable) -> Result:
    """Run one case; an exception other than LookupError and Missing counts as a difference, named."""
    loss = case["loss_type"] if isinstance(case["loss_type"], str) else "several"
    float32 = impl == "trl" and trl_needs_float32(case)
    known = next((why for applies, why in REASONS.get(impl, []) if applies(case)), "")
    try:
        size = case_difference(case, *losses(case), floor=1e-2 if float32 else 1e-6)
    except LookupError as why:
        return Result(case["name"], loss, "absent", math.nan, str(why))
    except Missing:
        raise
    except Exception as error:
        return Result(case["name"], loss, "differs", math.inf, f"{known or error} ({type(error).__name__})")
    if size <= (1e-5 if float32 else 1e-9):
        return Result(case["name"], loss, "agrees", size, "")
    return Result(case["name"], loss, "differs", size, known or "not explained")


def table(results: list[Result]) -> list[str]:
    """One row per loss; below it one line per reason with its number of cases."""
    lines = [f"{'loss':<14}{'cases':>6}{'agree':>7}{'differ':>8}{'absent':>8}{'largest':>10}"]
    for loss in sorted({r.loss for r in results}):
        rows = [r for r in results if r.loss == loss]
        counts = Counter(r.outcome for r in rows)
        largest = max((r.difference for r in rows if r.outcome != "absent"), default=math.nan)
        numbers = f"{len(rows):>6}{counts['agrees']:>7}{counts['differs']:>8}{counts['absent']:>8}{largest:>10.1e}"
        lines.append(f"{loss:<14}{numbers}")
        for (outcome, reason), count in Counter((r.outcome, r.reason) for r in rows if r.reason).items():
            lines.append(f"{'':<14}{count:>6} {outcome}: {reason}")
    return lines


def find(impl: str) -> Callable:
    """The adapter, or `losses` of the named module; raises Missing."""
    if impl in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[impl]
    try:
        return importlib.import_module(impl).losses
    except (ImportError, AttributeError) as error:
        raise Missing(f"{impl}: {error}; it must be importable (see --path) and offer losses(case)") from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--impl", required=True, help="ours, trl, trl018, torchtune, or a module with losses(case)")
    parser.add_argument("--only", metavar="LOSS", help="only the cases of this loss")
    parser.add_argument("--path", metavar="DIR", help="look for the implementation here first")
    parser.add_argument("--json", metavar="FILE", help="write every case's result here too")
    parser.add_argument("--verbose", action="store_true", help="list the cases that differ")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    sys.path[:0] = [args.path] if args.path else []
    try:
        if args.only and not load_cases(args.only):
            known = sorted({name for case in load_cases() for name in loss_names(case)})
            raise Missing(f"--only {args.only}: no case has this loss; one of {' '.join(known)}")
        losses = find(args.impl)
        results = [judge(case, args.impl, losses) for case in load_cases(args.only)]
    except (Missing, ImportError) as error:
        print(f"nothing was run: {error}")
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps([r._asdict() for r in results], indent=1))
    print("\n".join(table(results)))
    differing = [r for r in results if r.outcome == "differs"]
    if args.verbose:
        print("\n".join(f"{r.difference:9.1e}  {r.case}  {r.reason}" for r in differing))
    print(f"{len(results)} cases: {len(differing)} differ, {sum(r.outcome == 'absent' for r in results)} absent")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
