"""Everything a run reports: lines on the screen, metrics.jsonl, loggers, a panel at a terminal.

Only rank 0 reports.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from parts.config import DPOConfig
from parts.output import claim, explained_writing, write_atomically
from parts.position import Position
from parts.schedule import Schedule
from parts.screen import escape_unknown

Logger = Callable[[dict], None]  # takes a line of metrics
SILENCE = 30.0  # seconds that a pass over the pairs may take without a line


class Waiting:
    """How far a long pass is: a bar at a terminal, else a line every half minute."""

    def __init__(self, log: "Log", label: str, total: int):
        self.log = log
        self.label = label
        self.total = max(1, total)
        self.bar = log.progress(None, label, total=total, unit="pair")
        self.done = 0
        self.said_at = time.monotonic()

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, pairs: int) -> None:
        self.bar.update(pairs)
        self.done += pairs
        if self.bar.disable and time.monotonic() - self.said_at >= SILENCE:
            self.said_at = time.monotonic()
            self.log.say(f"{self.label}: {min(1.0, self.done / self.total):.0%}")


class Speed:
    """Pairs and tokens per second since training began."""

    def __init__(self, position: Position):
        self.began = time.perf_counter()
        self.first_step = position.step
        self.pairs = position.pairs_done
        self.tokens = position.num_tokens

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def rates(self, position: Position) -> tuple[float, float]:
        """Return (pairs, tokens) per second."""
        seconds = self.seconds()
        pairs = position.pairs_done - self.pairs
        tokens = position.num_tokens - self.tokens
        return pairs / seconds, tokens / seconds

    def seconds_left(self, position: Position, total: int) -> float:
        done = max(1, position.step - self.first_step)
        return (total - position.step) * self.seconds() / done


class Log:
    """Report a run. `loggers` get every line of metrics; `make_panel` draws at a terminal."""

    def __init__(
        self, c: DPOConfig, first: bool, make_panel: Callable[..., Any] | None = None,
        on_log: Logger | None = None,
    ):
        escape_unknown()
        self.directory = Path(c.output_dir)
        self.first = first
        hidden = not sys.stderr.isatty() if c.disable_tqdm is None else c.disable_tqdm
        self.hide_bars = hidden or not first
        self.loggers: list[Logger] = [] if on_log is None else [on_log]
        self.history: list[dict] = []  # the lines of metrics.jsonl
        self.make_panel = make_panel
        self.panel: Any = None  # drawn once training has begun
        self.bar: Any = None
        self.speed: Any = None
        self.lock: Any = None  # on the output directory, while this object lives

    # Files

    def claim(self) -> None:
        """Lock the output directory; see parts/output.py."""
        self.lock = claim(self.directory)

    def begin(self, c: DPOConfig, earlier: bytes = b"") -> None:
        """Write dpo_config.json (for report, score and --config), and begin metrics.jsonl.

        `earlier` are the lines of the run that is resumed.
        """
        self.history += [json.loads(line) for line in earlier.splitlines()]
        if not self.first:
            return
        write_atomically(self.directory / "metrics.jsonl", earlier)
        settings = {k: v for k, v in vars(c).items() if k != "hub_token"}
        text = json.dumps(settings, indent=1, default=str)
        write_atomically(self.directory / "dpo_config.json", text.encode())

    def write(self, metrics: dict) -> None:
        """Append a line to metrics.jsonl and hand it to the loggers."""
        metrics = dict(metrics)  # the caller adds to its own
        self.history.append(metrics)
        if not self.first:
            return
        path = self.directory / "metrics.jsonl"
        with explained_writing(path), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(metrics) + "\n")
        for logger in self.loggers:
            logger(metrics)

    # The screen

    def say(self, line: str) -> None:
        if self.first:
            write = tqdm.write if self.panel is None else self.panel.write
            sys.stderr.flush()  # so that the line comes after a bar that has ended
            write(line, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, items: Any, label: str, **more: Any) -> tqdm:
        """Show a progress bar over `items`, by rank 0 at a terminal."""
        return tqdm(
            items, desc=label, disable=self.hide_bars, dynamic_ncols=True, leave=False, **more)

    def start(self, position: Position, total: int) -> None:
        """Start the bar and the clock of the training loop."""
        self.speed = Speed(position)
        self.bar = self.progress(None, "training", initial=position.step, total=total)

    def stop(self) -> None:
        self.bar.close()
        self.panel = None

    def step(self, position: Position, schedule: Schedule) -> dict:
        """Write and show the mean of each metric since the last log; return that line."""
        pending = position.pending
        mean = {name: sum(m[name] for m in pending) / len(pending) for name in pending[0]}
        for name in ("learning_rate", "grad_norm"):
            mean[name] = pending[-1][name]  # of the last step
        if position.skipped:
            mean["skipped_steps"] = position.skipped
        metrics = {"step": position.step, "epoch": schedule.epoch(position.step)}
        metrics |= mean | {"num_tokens": position.num_tokens}
        position.pending = []
        self.write(metrics)
        self.show(metrics, position, schedule.total_steps)
        return metrics

    def evaluation(
        self, metrics: dict, prefix: str, position: Position, schedule: Schedule,
    ) -> None:
        """Write and show the metrics of an evaluation, whose names begin with `prefix`."""
        step = position.step
        self.write({"step": step, "epoch": schedule.epoch(step)} | metrics)
        self.say(
            f"step {step}: {prefix.replace('_', ' ')} loss {metrics[f'{prefix}_loss']:.4f}  "
            f"accuracy {metrics[f'{prefix}_rewards/accuracies']:.3f}  "
            f"margin {metrics[f'{prefix}_rewards/margins']:.4f}")

    def show(self, metrics: dict, position: Position, total: int) -> None:
        """Show metrics on the panel at a terminal, else as a line."""
        if self.bar.disable or self.make_panel is None:
            pairs, tokens = self.speed.rates(position)
            self.say(
                f"step {position.step}/{total}: loss {metrics['loss']:.4f}  "
                f"accuracy {metrics['rewards/accuracies']:.3f}  "
                f"margin {metrics['rewards/margins']:.4f}  "
                f"{pairs:.1f} pairs/s  {tokens:,.0f} tokens/s")
        elif not sys.stderr.isatty():  # a bar was asked for, but nothing can be drawn above it
            self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
        else:
            self.panel = self.panel or self.make_panel(self.bar)
            self.panel.show(metrics, position, total, self.speed)
            if position.step == total:
                self.panel.close()
                self.panel = None


class State(NamedTuple):
    """What transformers' trainer.state tells of a run."""

    log_history: list[dict]  # the lines of metrics.jsonl
    global_step: int
    max_steps: int
    epoch: float
    best_metric: float | None
    best_global_step: int | None


def state_of(trainer: Any) -> State:
    """Return the state of a trainer, in transformers' names."""
    now = trainer.position
    return State(
        log_history=trainer.log.history, global_step=now.step,
        max_steps=trainer.schedule.total_steps, epoch=trainer.schedule.epoch(now.step),
        best_metric=now.best["value"], best_global_step=now.best["step"] or None)
