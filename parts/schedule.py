"""How many steps a run has, what happens at which of them, the learning rate of each, and which
optimizer takes them."""

import inspect
import math
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from parts.config import BY_RULE, EIGHT_BIT, DPOConfig
from parts.rates import Moment, learning_rate


class Schedule(NamedTuple):
    """The steps of a run, and what happens at which of them."""

    global_batch: int  # pairs in one step
    steps_per_epoch: int
    total_steps: int
    log_every: int
    eval_every: int  # 0: at the end only
    save_every: int  # 0: never; beyond total_steps: only the best evaluations
    warmup: int  # steps

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def logs_at(self, step: int, logs_first: bool) -> bool:
        is_end = step == self.total_steps
        return is_end or step % self.log_every == 0 or (step == 1 and logs_first)

    def evaluates_at(self, step: int) -> bool:
        return step == self.total_steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def learning_rate(self, c: DPOConfig, step: int) -> float:
        """Return the learning rate of a step; parts/rates.py has the shapes."""
        at = Moment(step, self.warmup, self.total_steps, c.learning_rate)
        return learning_rate(c.lr_scheduler_type, c.lr_scheduler_kwargs, at)


def make_schedule(
    c: DPOConfig, pairs: int, world: int, global_batch: int | None = None,
) -> Schedule:
    """Count the steps over `pairs` pairs on `world` ranks; `global_batch` overrides the flags'.

    Options that count steps are shares of all steps where they are below 1.
    """
    if global_batch is None:
        global_batch = c.per_device_train_batch_size * c.gradient_accumulation_steps * world
    per_epoch = math.ceil(pairs / global_batch)
    total = c.max_steps if c.max_steps > 0 else math.ceil(c.num_train_epochs * per_epoch)

    def every(steps: float) -> int:
        return int(steps) if steps >= 1 else max(1, math.ceil(steps * total))

    def by_strategy(strategy: str, steps: float) -> int:
        steps_of = {"no": 0, "epoch": per_epoch, "steps": every(steps), "best": total + 1}
        return steps_of[strategy]

    warmup = c.warmup_steps or c.warmup_ratio
    return Schedule(
        global_batch=global_batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        log_every=every(c.logging_steps),
        eval_every=by_strategy(c.eval_strategy, c.eval_steps or c.logging_steps),
        save_every=by_strategy(c.save_strategy, c.save_steps),
        warmup=math.ceil(warmup * total) if warmup < 1 else int(warmup))


def rounds_at_random(c: DPOConfig) -> bool:
    """Tell whether bfloat16 weights are rounded stochastically: by default, yes."""
    return c.dtype == "bfloat16" and c.stochastic_rounding is not False


def small_kind(c: DPOConfig, lora: dict) -> str | None:
    """Return which optimizer in fewer bytes it is, see extras/run/small_adamw.py; None for torch's
    AdamW."""
    found = ["8 bits"] if c.optim in EIGHT_BIT else []
    if c.optim in BY_RULE:
        found.append(BY_RULE[c.optim])
    if rounds_at_random(c) and not lora:  # adapters are float32
        found.append("stochastic rounding")
    return ", ".join(found) or None


def optimizer_kind(trainer: Any) -> str | None:
    """Return "of a function" for the user's own, or what `small_kind` says."""
    if trainer.make_other is not None:
        return "of a function"
    return small_kind(trainer.args, trainer.lora)


def groups_of(c: DPOConfig, named: list[tuple[str, nn.Parameter]]) -> list[dict]:
    """Return AdamW's groups of parameters: weight decay is on matrices only.

    LoRA+ (arXiv:2402.12354) gives B its own learning rate: each group has a `ratio`, by which its
    learning rate is multiplied.
    """

    def ratio_of(name: str) -> float:
        is_b = "lora_B" in name or "lora_embedding_B" in name
        return c.loraplus_lr_ratio or 1.0 if is_b else 1.0

    groups = []
    for is_matrix in (True, False):
        for ratio in sorted({ratio_of(name) for name, _ in named}):
            members = [p for n, p in named if (p.dim() >= 2) == is_matrix and ratio_of(n) == ratio]
            decay = c.weight_decay if is_matrix else 0.0
            if members:
                groups.append({"params": members, "ratio": ratio, "weight_decay": decay})
    return groups


def make_optimizer(c: DPOConfig, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Make AdamW; for others see parts/custom_optimizer.py."""
    compiles = "torch._dynamo" in sys.modules
    if not compiles:
        leave_compiler_out()
    optimizer = torch.optim.AdamW(
        groups_of(c, named), lr=c.learning_rate, eps=c.adam_epsilon,
        betas=(c.adam_beta1, c.adam_beta2), fused=c.dtype != "float64")
    if not compiles:
        optimizer.step = plain_step(optimizer)
    return optimizer


def leave_compiler_out() -> None:
    """Spare the import of PyTorch's compiler, one or two seconds of CPU time.

    Optimizer's methods import it when first called, only to be left alone by it. Unless
    --torch_compile has imported it, nothing compiles them, and they are called as they are.
    """
    for method in vars(torch.optim.Optimizer).values():
        if plain := getattr(method, "__wrapped__", None):
            plain.__dynamo_disable = plain  # where torch looks for its wrapped form


def plain_step(optimizer: torch.optim.Optimizer) -> Callable:
    """Return optimizer.step without what PyTorch wraps around it for its compiler and profiler."""
    return MethodType(torch.no_grad()(inspect.unwrap(type(optimizer).step)), optimizer)
