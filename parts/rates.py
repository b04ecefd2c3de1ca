"""The shapes of the learning rate over a run: transformers' names, arguments and numbers.

Each function takes where the step stands, then what --lr_scheduler_kwargs may set, and returns the
share of the peak learning rate. They depend on the step alone, so a resume needs no state.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """Where a step stands in its run."""

    step: int  # from 0
    warmup: int  # steps
    total: int  # steps
    peak: float  # learning rate

    @property
    def done(self) -> float:
        """Return the share done of the steps after warm-up."""
        return (self.step - self.warmup) / max(1, self.total - self.warmup)


def constant(at: Moment) -> float:
    return 1.0


def linear(at: Moment) -> float:
    return max(0.0, 1 - at.done)


def cosine(at: Moment, num_cycles: float = 0.5) -> float:
    """Fall along `num_cycles` waves of a cosine; a half wave ends at 0."""
    return max(0.0, wave(min(1.0, at.done), num_cycles))


def wave(done: float, num_cycles: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * num_cycles * 2.0 * done))


def cosine_with_restarts(at: Moment, num_cycles: int = 1) -> float:
    """Fall along half a wave of a cosine, `num_cycles` times, each time from the peak."""
    return 0.0 if at.done >= 1 else wave(num_cycles * at.done % 1.0, 0.5)


def cosine_with_min_lr(
    at: Moment, num_cycles: float = 0.5, min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> float:
    """Fall along a cosine to `min_lr`, or to the share `min_lr_rate` of the peak."""
    floor = floor_of(at, min_lr, min_lr_rate)
    return max(0.0, wave(at.done, num_cycles) * (1 - floor) + floor)


def cosine_warmup_with_min_lr(
    at: Moment, num_cycles: float = 0.5, min_lr: float | None = None,
    min_lr_rate: float | None = None, warmup_lr_rate: float | None = None,
) -> float:
    """As `cosine_with_min_lr`, one step ahead, with a warm-up that begins at `warmup_lr_rate`."""
    floor = floor_of(at, min_lr, min_lr_rate)
    if at.step < at.warmup and warmup_lr_rate is None:
        return (at.step + 1) / at.warmup
    if at.step < at.warmup:
        return warmup_lr_rate + (1 - warmup_lr_rate) * at.step / max(1, at.warmup - 1)
    done = at._replace(step=at.step + 1).done
    return max(0.0, wave(done, num_cycles) * (1 - floor) + floor)


def floor_of(at: Moment, min_lr: float | None, min_lr_rate: float | None) -> float:
    """Return the share of the peak where the fall ends. Raises ValueError unless one is given."""
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("give one of min_lr and min_lr_rate")
    return min_lr_rate if min_lr is None else min_lr / at.peak


def polynomial(at: Moment, lr_end: float = 1e-7, power: float = 1.0) -> float:
    """Fall as (1 - done)^power to the learning rate `lr_end`."""
    if not at.peak > lr_end:
        raise ValueError(f"lr_end {lr_end:g} must be below --learning_rate {at.peak:g}")
    left = max(0.0, 1 - at.done)
    return ((at.peak - lr_end) * left**power + lr_end) / at.peak


def inverse_sqrt(at: Moment, timescale: int | None = None) -> float:
    """Fall as 1 / sqrt(steps / timescale); unset is the steps of warm-up, else 10000."""
    scale = timescale or at.warmup or 10_000
    return 1 / math.sqrt((at.step + scale - at.warmup) / scale)


def warmup_stable_decay(
    at: Moment, num_decay_steps: int, num_stable_steps: int | None = None,
    warmup_type: str = "linear", decay_type: str = "cosine", min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """Stay at the peak until the last `num_decay_steps`, then fall to `min_lr_ratio` of it."""
    for name, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in ("linear", "cosine", "1-sqrt"):
            raise ValueError(f"{name} {value}: expected linear, cosine or 1-sqrt")
    falls = at.total - num_decay_steps
    if num_stable_steps is not None:
        falls = at.warmup + num_stable_steps
    share = lambda high: max(0.0, high * (1 - min_lr_ratio) + min_lr_ratio)
    if at.step < at.warmup:
        return share(risen(warmup_type, at.step / at.warmup))
    if at.step < falls:
        return 1.0
    if at.step >= falls + num_decay_steps:
        return min_lr_ratio
    done = (at.step - falls) / max(1, num_decay_steps)
    fallen = {"linear": 1 - done, "cosine": wave(done, num_cycles), "1-sqrt": 1 - math.sqrt(done)}
    return share(fallen[decay_type])


def risen(kind: str, done: float) -> float:
    """Return the height of a warm-up of which a share is done."""
    return {
        "linear": done, "cosine": 0.5 * (1 - math.cos(math.pi * done)),
        "1-sqrt": 1 - math.sqrt(1 - done)}[kind]


ALL = (
    constant, linear, cosine, cosine_with_restarts, cosine_with_min_lr, cosine_warmup_with_min_lr,
    polynomial, inverse_sqrt, warmup_stable_decay)
SHAPES: dict[str, Callable[..., float]] = {shape.__name__: shape for shape in ALL}
SHAPES["constant_with_warmup"] = constant
OWN_WARMUP = {"constant", "cosine_warmup_with_min_lr", "warmup_stable_decay"}  # or none


def learning_rate(kind: str, options: dict | None, at: Moment) -> float:
    """Return the learning rate of a step: linear warm-up, then the shape."""
    if at.step < at.warmup and kind not in OWN_WARMUP:
        return at.peak * at.step / at.warmup
    return at.peak * SHAPES[kind](at, **options or {})


def check_rates(kind: str, options: dict | None, peak: float) -> None:
    """Raise ValueError for --lr_scheduler_kwargs that the shape does not take, or lacks."""
    given: dict[str, Any] = options or {}
    takes = list(inspect.signature(SHAPES[kind]).parameters.values())[1:]
    types = {option.name: str(option.annotation) for option in takes}
    where = f"--lr_scheduler_kwargs of {kind}"
    for name, value in given.items():
        if name not in types:
            known = f"it takes {', '.join(types)}" if types else "it takes none"
            raise ValueError(f"{where}: {name}: no such option; {known}")
        wanted = str if "str" in types[name] else (int, float, type(None))
        if isinstance(value, bool) or not isinstance(value, wanted):
            expected = "text" if wanted is str else "a number"
            raise ValueError(f"{where}: {name} {value!r}: expected {expected}")
    for option in takes:
        if option.default is option.empty and option.name not in given:
            raise ValueError(f"{where}: {option.name} is missing")
    try:
        for step in range(4):
            SHAPES[kind](Moment(step, 2, 4, peak or 1.0), **given)
    except (ValueError, ArithmeticError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
