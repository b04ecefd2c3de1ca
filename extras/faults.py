"""Runs that go wrong: numbers that are not finite, memory that is not enough, ranks that are gone. Each ends in words.

Also the loss scaling of --fp16 (arXiv:1710.03740), in which steps that overflow are part of the method.
"""

import math

import torch
import torch.distributed as dist

PATIENCE = 2000  # steps without overflow before the scale is doubled, as in torch's GradScaler


def unscale(trainer) -> None:
    """--fp16: divide the gradients by the scale that the loss was multiplied by, lest small ones vanish."""
    for p in trainer.trainable:
        if p.grad is not None:
            p.grad.mul_(1 / trainer.scaling["scale"])


def rescale(trainer, finite: bool) -> None:
    """Halve the scale where a gradient overflowed; double it after 2000 steps in which none did."""
    s = trainer.scaling
    s["since"] = s["since"] + 1 if finite else 0
    if not finite or s["since"] == PATIENCE:
        s["scale"], s["since"] = s["scale"] * (2.0 if finite else 0.5), 0


def skip(trainer, metrics: dict, pairs) -> None:
    """A step whose loss or gradient is not finite: skipped where --fp16's scale or --skip_nonfinite allow it.

    Raises FloatingPointError with the step, the pairs and what to try.
    """
    c, overflow = trainer.args, trainer.args.fp16 and math.isfinite(metrics["loss"])
    if overflow and trainer.scaling["scale"] > 1:
        rescale(trainer, finite=False)
        trainer.say(f"step {trainer.step + 1}: overflow in float16, skipped; the loss is now scaled by "
                    f"{trainer.scaling['scale']:g}")
        return
    trainer.skipped += 1
    bad = nonfinite_pairs(trainer, pairs)
    told = bad or [int(i) for i in pairs]
    named = ", ".join(map(trainer.train_store.where, told[:8])) + (" ..." if len(told) > 8 else "")
    found = (f"step {trainer.step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; "
             f"{'not finite are the' if bad else 'of the'} pairs {named}; nothing of it was applied")
    if trainer.skipped > c.skip_nonfinite:
        raise FloatingPointError(f"{found}. Try a lower --learning_rate, a lower --max_grad_norm, --no_bf16, "
                                 f"--skip_nonfinite N, or look at these pairs{last_checkpoint(trainer)}")
    trainer.say(f"{found}, {trainer.skipped} of at most {c.skip_nonfinite} such steps")


def nonfinite_pairs(trainer, pairs) -> list[int]:
    """Those whose own loss is not finite, by one more forward."""
    rows = trainer.forwards(trainer.train_store, pairs, trainer.args.per_device_train_batch_size)
    x, scored = trainer.score_all(trainer.train_store, pairs, [trainer.batch(trainer.train_store, r) for r in rows])
    return [int(i) for i, value in zip(pairs, trainer.pair_losses(x, scored).tolist()) if not math.isfinite(value)]


def last_checkpoint(trainer) -> str:
    from extras.checkpoints import in_directory

    found = in_directory(trainer.output_dir)
    return f". {found[-1].name} is whole: --resume_from_checkpoint true goes on from there" if found else ""


def explained(error: Exception, trainer) -> str:
    """What to say of an error that ended the training. Raises it again where there is nothing to say."""
    text = str(error)
    if isinstance(error, (FloatingPointError, OSError)):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return out_of_memory(error, trainer)
    lost = isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "closed by peer"))
    if trainer.ranks.world > 1 and lost:
        return (f"rank {trainer.ranks.rank} has lost the others at step {trainer.step + 1} "
                f"({text.splitlines()[0][:200]}): one died, or was silent for --ddp_timeout {trainer.args.ddp_timeout} "
                f"seconds{last_checkpoint(trainer)}")
    raise error


def out_of_memory(error: Exception, trainer) -> str:
    """Which forward it was, found in the frames that the error came through, and the flags that help."""
    c, found, trace = trainer.args, {}, error.__traceback__
    while trace is not None:
        found |= {k: v for k, v in trace.tb_frame.f_locals.items() if k in ("batch", "batches", "i")}
        trace = trace.tb_next
    what = "the model"
    if hasattr(found.get("batch"), "input_ids"):
        batch, count = found["batch"], len(found["batches"]) if isinstance(found.get("batches"), list) else 0
        which = f"micro-batch {found['i'] + 1} of {count}, " if count and isinstance(found.get("i"), int) else ""
        what = f"{which}{len(batch.pair_ids)} pairs, {len(batch.input_ids):,} tokens"
    smaller = "--per_device_train_batch_size 1 with more --gradient_accumulation_steps"
    flags = {"--max_tokens_per_forward": True, smaller: c.per_device_train_batch_size > 1,
             "--gradient_checkpointing": not c.gradient_checkpointing,
             "--precompute_ref_log_probs": not trainer.precompute and trainer.needs_ref and not c.sync_ref_model,
             "--fsdp": trainer.ranks.world > 1 and not c.fsdp}
    first_line = str(error).partition("\n")[0][:150]
    return (f"rank {trainer.ranks.rank} is out of memory at step {trainer.step + 1} ({what}; {first_line}). These help and "
            f"change no result: {', '.join(f for f, helps in flags.items() if helps)}; --use_peft and a lower "
            f"--max_length help too"
            f"{last_checkpoint(trainer)}")
