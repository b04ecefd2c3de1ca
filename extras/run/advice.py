"""What to turn on where a run needs more memory than its device has: --dry_run, extras.plan, and after
an out-of-memory error.

The options stand in one order, those that change least first. Each is tried on top of those before
it until the predicted memory fits, and then those that were not needed are left out again.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from extras.run.context import divides_heads, why_not
from extras.run.forecast import Run, count, describe, gib, memory, run_of
from model import ModelConfig
from parts.config import BY_RULE

# Of a device's memory, what a prediction may fill: the allocator wastes some of the rest.
USABLE = 0.9
EXACT = "no number changes"


class Option(NamedTuple):
    """Something to turn on, what it changes, and the run with it."""

    flags: str
    changes: str
    run: Run
    instead_of: str = ""  # flags that these replace


def options(config: ModelConfig, run: Run, longest: int, may_precompute: bool) -> Iterator[Callable]:
    """Yield functions of a run, each returning an Option; those that change least first.

    `longest` are the tokens of the longest pair, of which no forward has fewer.
    """
    for tokens in smaller(run.tokens, longest):
        yield lambda r, n=tokens: Option(
            f"--max_tokens_per_forward {n}", EXACT,
            r._replace(tokens=n, scored=r.scored * n // r.tokens, forwards=max(2, r.forwards)),
            "--max_tokens_per_forward")
    if run.live_ref and may_precompute:
        yield lambda r: Option(
            "--precompute_ref_log_probs", EXACT, r._replace(live_ref=False))
    if not run.checkpointing:
        yield lambda r: Option(
            "--gradient_checkpointing selective", EXACT, r._replace(checkpointing="selective"))
    if run.checkpointing is not True:
        yield lambda r: Option(
            "--gradient_checkpointing", f"{EXACT}, a third slower", r._replace(checkpointing=True),
            "--gradient_checkpointing")
    if run.device == "cuda" and not run.offloading:
        yield lambda r: Option("--activation_offloading", EXACT, r._replace(offloading=True))
    if run.world > 1 and not run.fsdp:
        yield lambda r: Option("--fsdp", f"{EXACT} but by rounding", r._replace(fsdp=True))
    for size in range(2, run.world + 1):
        fits = run.world % size == 0 and divides_heads(config, size)
        if fits and not why_not(config):
            yield lambda r, n=size: Option(
                f"--context_parallel_size {n}", f"{EXACT} but by rounding",
                r._replace(tokens=-(-r.tokens // n), scored=-(-r.scored // n)))
            break
    yield from options_that_change_numbers(run)


def options_that_change_numbers(run: Run) -> Iterator[Callable]:
    """Yield the options that train with other numbers, or other weights."""
    if not run.rank:
        if not any(word in str(run.optimizer) for word in ("8 bits", *BY_RULE.values())):
            yield lambda r: Option(
                "--optim adamw_8bit", "moments in 8 bits",
                r._replace(optimizer=with_words(r.optimizer, "8 bits")))
        if run.weights != "bfloat16":
            yield lambda r: Option(
                "--dtype bfloat16", "weights and gradients in bfloat16, rounded stochastically",
                r._replace(
                    weights="bfloat16", bf16=False,
                    optimizer=with_words("stochastic", r.optimizer)))
        yield lambda r: Option(
            "--use_peft --lora_target_modules all-linear", "trains adapters of rank 16 alone",
            r._replace(rank=16, targets=("all-linear",), optimizer=None, live_ref=False),
            "--optim")
    if run.four_bit is None:
        yield lambda r: Option(
            "--load_in_4bit", "the frozen weights in 4 bits", r._replace(four_bit="plain"))


def with_words(*words: str | None) -> str:
    return " ".join(filter(None, words))


def smaller(tokens: int, longest: int) -> list[int]:
    """Return halves of `tokens`, down to the longest pair's."""
    found = []
    while tokens // 2 > longest:
        tokens //= 2
        found.append(tokens)
    return [*found, longest] if tokens > longest else found


def needed(
    config: ModelConfig, run: Run, longest: int, have: float, may_precompute: bool = True,
) -> tuple[list[Option], bool]:
    """Return the options that bring a run's memory under `have` bytes, and whether they do."""
    makers = list(options(config, run, longest, may_precompute))

    counts: dict[tuple, dict] = {}  # counting takes a model on the meta device

    def size(chosen: list[Callable]) -> int:
        if not chosen:
            return sys.maxsize
        r = applied(chosen, run)[-1].run
        key = (r.rank, r.targets, r.weights, r.four_bit, r.optimizer)
        if key not in counts:
            counts[key] = count(config, r)
        return memory(config, r, counts[key])["total"]

    def both_ways(chosen: list[Callable]) -> tuple[list[Callable], ...]:
        """Without smaller forwards too: of one forward in a step the gradients come as the
        activations go, of several both are there."""
        return chosen, [m for m in chosen if "--max_tokens" not in m(run).flags]

    for last in range(len(makers)):
        for chosen in both_ways(makers[: last + 1]):
            if size(chosen) <= have:
                return applied(without_idle(chosen, size, have), run), True
    chosen = min(both_ways(makers), key=size)
    return applied(without_idle(chosen, size, 1.01 * size(chosen)), run), False


def without_idle(chosen: list[Callable], size: Callable, most: float) -> list[Callable]:
    """Leave out options that are not needed to stay under `most`, what changes most first."""
    for maker in reversed(chosen):
        fewer = [one for one in chosen if one is not maker]
        if size(fewer) <= most:
            return without_idle(fewer, size, most)
    return chosen


def applied(makers: list[Callable], run: Run) -> list[Option]:
    """Return the options one after another, each on the run of those before it."""
    found: list[Option] = []
    for maker in makers:
        option = maker(run)
        found = [o for o in found if not option.instead_of or not o.flags.startswith(option.instead_of)]
        found.append(option)
        run = option.run
    return found


def lines_of(
    config: ModelConfig, run: Run, longest: int, device_bytes: float, may_precompute: bool = True,
) -> list[str]:
    """Return what to turn on, a line each with the memory after it; one line if the run fits."""
    total = memory(config, run)["total"]
    have = USABLE * device_bytes
    if total <= have:
        return [f"a rank has {gib(device_bytes)}: enough"]
    found, fits = needed(config, run, longest, have, may_precompute)
    lines = [f"a rank has {gib(device_bytes)}, too little for {gib(total)}; what helps, least change first:"]
    for option in found:
        after = memory(config, option.run)["total"]
        lines.append(f"  {option.flags}: {gib(after)} ({option.changes})")
    if not fits:
        lines.append(
            "  and that is still too much: more ranks with --fsdp, a lower --max_length, or a "
            "smaller model")
    return lines


# What a trainer is told


def device_bytes(device: torch.device) -> float:
    """Return the memory of a rank's device; on a CPU its share of what this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.exists() and limit.read_text().strip().isdigit():
        here = min(here, int(limit.read_text()))
    here /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's ranks on this machine
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return here if own == resource.RLIM_INFINITY else min(here, own)


def facts(trainer: Any) -> tuple[ModelConfig, Run, int, bool]:
    """Return the model's configuration, the run, its longest pair's tokens on a rank, and whether
    its reference may be precomputed."""
    longest = int(trainer.train_store.tokens[trainer.train_pairs].max())
    longest = -(-longest // trainer.ranks.context)
    return trainer.model.config, run_of(trainer), longest, not trainer.args.sync_ref_model


def tell(trainer: Any) -> None:
    """Print the forecast of a run, and what to turn on if it does not fit."""
    config, run, longest, may_precompute = facts(trainer)
    have = device_bytes(trainer.ranks.device)
    for line in describe(trainer) + lines_of(config, run, longest, have, may_precompute):
        trainer.log.say(line)


def after_out_of_memory(trainer: Any) -> str:
    """Return what to turn on after a run had too little memory, whatever was predicted for it."""
    config, run, longest, may_precompute = facts(trainer)
    total = memory(config, run)["total"]
    have = min(USABLE * device_bytes(trainer.ranks.device), 0.8 * total)
    found, _ = needed(config, run, longest, have, may_precompute)
    helps = "; ".join(
        f"{o.flags} ({gib(memory(config, o.run)['total'])}, {o.changes})" for o in found)
    return (
        f"{gib(total)} were predicted. What helps, least change first, with what is predicted then: "
        f"{helps or 'nothing more that is known here'}; a lower --max_length helps too")
