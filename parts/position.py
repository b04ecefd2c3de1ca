"""Where a run stands: everything that changes in training except weights and AdamW's moments."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


def no_best() -> dict[str, Any]:
    return {"step": 0, "value": None, "directory": None, "waited": 0}


def no_scaling() -> dict[str, float]:
    return {"scale": 1.0, "since": 0}


@dataclass
class Position:
    """Everything that changes during training. A checkpoint saves and loads all of it."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # seen, counted as TRL does: a prompt twice, padding never
    pairs_done: int = 0
    pending: list[dict] = field(default_factory=list)  # metrics of the steps since the last log
    delta_sum: float = 0.0  # BCO: sum over pairs of 1/2 (beta r_w + beta r_l)
    delta_count: int = 0  # BCO: pairs in that sum
    best: dict[str, Any] = field(default_factory=no_best)  # evaluation, and how many came since
    scaling: dict[str, float] = field(default_factory=no_scaling)  # float16: see precision.Scaler
    skipped: int = 0  # steps that were not finite and not applied

    @property
    def delta(self) -> float:
        """Return BCO's delta: the mean reward of all pairs seen so far; 0 before the first."""
        return self.delta_sum / self.delta_count if self.delta_count else 0.0

    def saved(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Set everything to what `saved` returned."""
        for one in fields(self):
            setattr(self, one.name, saved[one.name])
