"""Runs that go wrong: numbers that are not finite, too little memory, ranks that are gone.

Each ends in a sentence that says what to do.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from parts.checkpoints import last_checkpoint
from parts.rooms import missing_room
from parts.rows import DataError


def refuse(error: Exception | str, status: int) -> int:
    """Print an error once on each machine, and return the exit status."""
    is_own = str(error).startswith("rank ")  # of one rank, which alone knows of it
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or is_own:
        print(f"error: {error}", file=sys.stderr)
        return status
    time.sleep(10)  # torchrun ends all ranks as soon as one has left, the first if it fails as well
    print(f"error: rank {os.environ['RANK']} alone: {error}", file=sys.stderr)
    return status


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is about memory: CUDA's, Python's, or that of torch on a CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextmanager
def naming(batch: Any, number: int = 0, count: int = 0) -> Iterator[None]:
    """Add a note to an error inside that says which forward it was (PEP 678)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        which = f"micro-batch {number} of {count}, " if count else ""
        error.add_note(f"{which}{len(batch.pair_ids)} pairs, {len(batch.input_ids):,} tokens")
        raise


def nonfinite_step(trainer: Any, metrics: dict, pairs: Any, bad: list[int]) -> None:
    """Say which pairs a skipped step was about, or raise FloatingPointError if it is one too many.

    `bad` are the pairs whose own loss is not finite; there are none if only a gradient is not.
    """
    c = trainer.args
    skipped = trainer.position.skipped
    check_weights(trainer, f"step {trainer.position.step + 1}")
    told = bad or [int(i) for i in pairs]
    names = ", ".join(map(trainer.train_store.where, told[:8])) + (" ..." if len(told) > 8 else "")
    found = (
        f"step {trainer.position.step + 1}: loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}; {'not finite are the' if bad else 'of the'} pairs {names}; "
        "nothing of it was applied")
    if skipped > c.skip_nonfinite:
        raise FloatingPointError(
            f"{found}. Try a lower --learning_rate, a lower --max_grad_norm, --no_bf16, "
            f"--skip_nonfinite N, or look at these pairs{last_checkpoint(trainer.log.directory)}")
    trainer.log.say(f"{found}, {skipped} of at most {c.skip_nonfinite} such steps")


def check_weights(trainer: Any, when: str) -> None:
    """Raise FloatingPointError that names weights which are not finite; every rank calls this.

    Pairs, rates and precision have no part in that, and no step with such weights is worth taking.
    """
    models = {"the model": trainer.model, "the reference": trainer.reference.model}
    named = {
        f"{whose}'s {name}": p for whose, model in models.items() if model is not None
        for name, p in model.named_parameters()}
    local = (getattr(p, "to_local", lambda p=p: p)() for p in named.values())
    counts = torch.stack([(~t.isfinite()).sum() for t in local]).to(trainer.ranks.exact)
    bad = [name for name, count in zip(named, trainer.ranks.sum(counts).tolist()) if count]
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        why = (
            f"the files are damaged, or overflow in --dtype {trainer.args.dtype}: download them "
            "again, or use another --dtype")
        if trainer.position.step:
            why = "an update has overflowed; try a lower --learning_rate or --max_grad_norm"
        raise FloatingPointError(
            f"{when}: values that are not finite in {', '.join(bad[:4])}{more}: {why}"
            f"{last_checkpoint(trainer.log.directory)}")


def before_training(error: Exception) -> tuple[Exception | str, int]:
    """Return (what ended a run before its first step, the exit status).

    Raises the error again if there is nothing to say of it.
    """
    if is_out_of_memory(error):
        first_line = str(error).partition("\n")[0][:150]
        return (
            f"rank {os.environ.get('RANK', 0)} is out of memory before the first step "
            f"({first_line}). --dtype bfloat16, --load_in_4bit with --use_peft, and --fsdp on "
            "several GPUs need less; python -m extras.plan says how much", 1)
    if isinstance(error, ModuleNotFoundError):
        return missing_room(error), 2
    if isinstance(error, (ValueError, OSError)):
        return error, 2
    raise error


def explained(error: Exception, trainer: Any, helps: str = "") -> str:
    """Say what ended the training; `helps` is what helps where it was too little memory.

    Raises the error again if there is nothing to say of it.
    """
    text = str(error)
    if isinstance(error, FloatingPointError):
        return text
    if isinstance(error, (OSError, DataError)):
        whose = f"rank {trainer.ranks.rank}: " if trainer.ranks.rank else ""  # it alone may know
        return whose + text + last_checkpoint(trainer.log.directory)
    if isinstance(error, ModuleNotFoundError):
        return missing_room(error)  # of an option that is first needed in a step
    if is_out_of_memory(error):
        return out_of_memory(error, trainer, helps)
    words = ("gloo", "NCCL", "closed by peer")
    is_lost = isinstance(error, dist.DistError) or any(word in text for word in words)
    if trainer.ranks.world > 1 and is_lost:
        return (
            f"rank {trainer.ranks.rank} has lost the others at step {trainer.position.step + 1} "
            f"({text.splitlines()[0][:200]}): one died, or was silent for --ddp_timeout "
            f"{trainer.args.ddp_timeout} seconds{last_checkpoint(trainer.log.directory)}")
    raise error


def out_of_memory(error: Exception, trainer: Any, helps: str) -> str:
    """Say which forward it was, and what helps: by default, the flags that change no result."""
    c = trainer.args
    notes = getattr(error, "__notes__", ["the model"])
    smaller = "--per_device_train_batch_size 1 with more --gradient_accumulation_steps"
    exact = {
        "--max_tokens_per_forward": True,
        smaller: c.per_device_train_batch_size > 1,
        "--gradient_checkpointing": not c.gradient_checkpointing,
        "--precompute_ref_log_probs": trainer.reference.is_live and not c.sync_ref_model,
        "--fsdp": trainer.ranks.world > 1 and not c.fsdp}
    flags = ", ".join(flag for flag, does in exact.items() if does)
    helps = helps or (
        f"These help and change no result: {flags}; --use_peft and a lower --max_length help too")
    first_line = str(error).partition("\n")[0][:150]
    return (
        f"rank {trainer.ranks.rank} is out of memory at step {trainer.position.step + 1} "
        f"({notes[0]}; {first_line}). {helps}{last_checkpoint(trainer.log.directory)}")
