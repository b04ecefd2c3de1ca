"""Show a run at a terminal: curves of loss, accuracy and margin, speed, memory, time left.

The panel is above the progress bar and is redrawn at each log. The cursor always rests below it,
so an interrupted run leaves the terminal usable. Without a terminal, parts/log.py prints lines.
"""

import os
import resource
import sys
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from tqdm import tqdm

from parts.log import Speed
from parts.position import Position

# name: (metric, ANSI colour)
CURVES = {
    "loss": ("loss", 34),
    "accuracy": ("rewards/accuracies", 32),
    "margin": ("rewards/margins", 33),
}
BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN = " .:-=+*#@"  # for a terminal without Unicode
WIDE = 150  # columns; from this width on, the curves are side by side
ROWS = 5  # height of each curve then


@dataclass
class Panel:
    """The curves, and how many lines of them are on the screen above the bar."""

    bar: Any
    points: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {name: [] for name in CURVES}
    )
    lines: list[str] = field(default_factory=list)
    drawn: int = 0

    def write(self, line: str, file: TextIO) -> None:
        """Print a line above the panel."""
        erase(self)
        print(line, file=file, flush=True)
        draw(self)

    def show(self, metrics: dict, position: Position, total: int, speed: Speed) -> None:
        """Add the metrics of a log to the curves, and draw."""
        for name, (key, _) in CURVES.items():
            self.points[name].append((position.step / total, metrics[key]))
        left = tqdm.format_interval(speed.seconds_left(position, total))
        pairs, tokens = speed.rates(position)
        facts = [
            f"{pairs:.1f} pairs/s",
            f"{tokens:,.0f} tokens/s",
            memory(),
            f"{left} left",
            f"epoch {metrics['epoch']:.2f}",
            f"lr {metrics['learning_rate']:.2g}",
            f"grad norm {metrics['grad_norm']:.3g}",
        ]
        size = os.get_terminal_size(sys.stderr.fileno())
        self.lines = layout(self, facts, *size, unicode=speaks_unicode())
        erase(self)
        draw(self)

    def close(self) -> None:
        """Remove the bar and leave the curves on the screen."""
        clear(self.bar)
        self.bar.disable = True


def speaks_unicode() -> bool:
    return "utf" in (sys.stderr.encoding or "").lower()


def memory() -> str:
    """Format the peak memory so far: of the GPU if one is used, else of the process."""
    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB GPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):,.0f} MiB"


def clear(bar: Any) -> None:
    """Remove the bar, so that standard output may write at the start of its line."""
    bar.clear()
    sys.stderr.flush()


def erase(panel: Panel) -> None:
    """Remove the panel and the bar from the screen: move up over the lines drawn, clear below."""
    clear(panel.bar)
    if panel.drawn:
        sys.stderr.write(f"\x1b[{panel.drawn}A\x1b[J")
        sys.stderr.flush()
        panel.drawn = 0


def draw(panel: Panel) -> None:
    sys.stderr.write("".join(line + "\n" for line in panel.lines))
    sys.stderr.flush()
    panel.drawn = len(panel.lines)
    panel.bar.refresh()


# What the panel shows


def layout(panel: Panel, facts: list[str], width: int, height: int, unicode: bool) -> list[str]:
    """Lay out the curves, below one another or on a wide screen side by side, and the facts.

    Facts that do not fit the width are left out; a screen below 8 lines shows nothing.
    """
    signs = BLOCKS if unicode else PLAIN
    stacked = width < WIDE
    width -= 1  # a full line would wrap in some terminals
    while len("  ".join(facts)) > width:
        facts = facts[:-1]
    if height < 8:
        return []
    if stacked:
        return [*(row(name, panel.points[name], width, signs) for name in CURVES), "  ".join(facts)]
    each = (width - 4) // len(CURVES)
    columns = [block(name, panel.points[name], each, signs) for name in CURVES]
    return ["  ".join(cells) for cells in zip(*columns)] + ["  ".join(facts)]


def colour(name: str, text: str) -> str:
    return f"\x1b[{CURVES[name][1]}m{text}\x1b[0m"


def row(name: str, points: list, width: int, signs: str) -> str:
    """Draw a curve in one line: `accuracy  0.812  ▁▂▃▅▆▇▇         0.5 to 0.9`."""
    values = [v for _, v in points]
    head = f"{name:<8} {values[-1]:>8.4f}  "
    tail = f"  {min(values):.4g} to {max(values):.4g}"
    room = max(1, width - len(head) - 24)
    return head + colour(name, sparkline(points, room, 1, signs)[0]) + tail


def block(name: str, points: list, width: int, signs: str) -> list[str]:
    """Draw a curve in ROWS lines below a title with its last value and range."""
    values = [v for _, v in points]
    title = f"{name} {values[-1]:.4f}  ({min(values):.4g} to {max(values):.4g})"
    curve = sparkline(points, width, ROWS, signs)
    return [title.ljust(width), *(colour(name, line) for line in curve)]


def sparkline(points: list[tuple[float, float]], width: int, rows: int, signs: str) -> list[str]:
    """Draw bars, `rows` characters high, over the whole run, finished or not.

    A column shows the mean of its logs; one without a log repeats the column before.
    """
    values = [v for _, v in points]
    low = min(values)
    high = max(values)
    seen = values[0]
    cells = [[] for _ in range(width)]
    for share, value in points:
        cells[min(int(share * width), width - 1)].append(value)
    step = len(signs) - 1
    levels = []
    last = max(i for i, cell in enumerate(cells) if cell)
    for cell in cells[: last + 1]:
        seen = sum(cell) / len(cell) if cell else seen
        levels.append(1 + round((seen - low) / (high - low or 1) * (step * rows - 1)))
    levels += [0] * (width - len(levels))
    sign = lambda level, r: signs[min(max(level - step * r, 0), step)]
    return ["".join(sign(level, r) for level in levels) for r in reversed(range(rows))]
