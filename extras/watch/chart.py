"""Draw line charts and histograms as SVG text, without a package or a script.

A browser, a model card and a README show the same picture.

Line("sigmoid", [(0, 0.69), (10, 0.41)])          one curve; points that are not finite break it
chart("loss", [Line(...), Line(...)], "step")     -> "<svg ...>"
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 40  # pixels around the plot
# Okabe and Ito's colours, distinct to the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
FONT = "Helvetica, Arial, sans-serif"


class Line(NamedTuple):
    """A curve of (x, y) points: `joined` draws the line, `marks` the points; `group`: CSS class."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = COLOURS[0]
    dash: str = ""
    marks: bool = False
    joined: bool = True
    group: str = ""


class Axes(NamedTuple):
    """The ranges of x and y, and the picture's size in pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int
    height: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Convert a point to pixels."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (self.width - LEFT - RIGHT), self.height - BOTTOM - up * (
            self.height - TOP - BOTTOM
        )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """List round numbers between low and high: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def number(value: float) -> str:
    """Format an axis' number, short: 0.5, 1e-6, 12,000."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


def span(values: Sequence[float]) -> tuple[float, float]:
    """Compute the range to draw: a little more than the values', never empty."""
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def text(
    x: float,
    y: float,
    words: str,
    size: int = 11,
    anchor: str = "start",
    colour: str = "#333333",
    more: str = "",
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}"{more}>{escape(words)}</text>'


def grid(axes: Axes, x_label: str, x_ticks: list[tuple[float, str]] | None = None) -> list[str]:
    """Draw lines and ticks at round numbers or at `x_ticks` (place, label); 0 is darker."""
    out = []
    left = LEFT
    right = axes.width - RIGHT
    for value in ticks(*axes.y):
        _, y = axes.at(axes.x[0], value)
        stroke = "#999" if value == 0 else "#e4e4e4"
        place = f'x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"'
        out.append(f'<line {place} stroke="{stroke}"/>')
        out.append(text(left - 6, y + 4, number(value), 10, "end", "#666"))
    if x_ticks is None:
        x_ticks = [(value, number(value)) for value in ticks(*axes.x, about=6)]
    for value, label in x_ticks:
        if axes.x[0] <= value <= axes.x[1]:
            x, y = axes.at(value, axes.y[0])
            out.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}" stroke="#999"/>'
            )
            out.append(text(x, y + 16, label, 10, "middle", "#666"))
    return [*out, text((left + right) / 2, axes.height - 6, x_label, 11, "middle", "#666")]


def curve(axes: Axes, line: Line) -> list[str]:
    """Draw a line, in pieces where values are missing, and its marks, which show their numbers."""
    out = []
    pieces = [[]]
    for x, y in line.points:
        if math.isfinite(x) and math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    for piece in filter(None, pieces):
        places = [axes.at(*point) for point in piece]
        if line.joined:
            drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            out.append(
                f'<polyline points="{drawn}" fill="none" stroke="{line.colour}" stroke-width="1.8" '
                f'stroke-linejoin="round"{dash}/>'
            )
        if line.marks or len(piece) == 1:
            for (x, y), (a, b) in zip(places, piece):
                title = f"{escape(line.name)}: {number(a)}, {number(b)}"
                circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{line.colour}">'
                out.append(f"{circle}<title>{title}</title></circle>")
    return [f'<g class="{line.group}">', *out, "</g>"] if line.group else out


def legend(lines: Sequence[Line], x: float, y: float) -> list[str]:
    """Draw names with their strokes, one below the other, from (x, y) down."""
    out = []
    for i, line in enumerate(lines):
        at = y + 16 * i
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        if line.joined:
            place = f'x1="{x}" x2="{x + 20}" y1="{at}" y2="{at}"'
            out.append(f'<line {place} stroke="{line.colour}" stroke-width="2"{dash}/>')
        if line.marks:
            out.append(f'<circle cx="{x + 10}" cy="{at}" r="3.2" fill="{line.colour}"/>')
        out.append(text(x + 26, at + 4, line.name))
    return out


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Wrap drawn parts as one SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" '
        f'font-family="{FONT}" role="img"><title>{escape(title)}</title>'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"])


def panel(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    width: int = WIDTH,
    height: int = HEIGHT,
    y_label: str = "",
    x_ticks: list[tuple[float, str]] | None = None,
) -> list[str]:
    """Draw a chart's parts: a heading, axes that fit all lines, the lines."""
    finite = [
        (a, b) for line in lines for a, b in line.points if math.isfinite(a) and math.isfinite(b)
    ]
    axes = Axes(span([a for a, _ in finite]), span([b for _, b in finite]), width, height)
    parts = [text(LEFT, 20, title, 13, more=' font-weight="bold"'), *grid(axes, x_label, x_ticks)]
    if y_label:
        middle = (TOP + height - BOTTOM) / 2
        turned = f' transform="rotate(-90 14 {middle:.1f})"'
        parts.append(text(14, middle, y_label, 11, "middle", "#666", turned))
    if not finite:
        middle = (LEFT + width - RIGHT) / 2
        parts.append(text(middle, height / 2, "not recorded", 11, "middle", "#999"))
    for line in lines:
        parts += curve(axes, line)
    return parts


def chart(title: str, lines: Sequence[Line], x_label: str, **more: Any) -> str:
    """Draw one line chart as an SVG of its own; `more`: panel's options."""
    return picture(
        more.get("width", WIDTH),
        more.get("height", HEIGHT),
        title,
        panel(title, lines, x_label, **more),
    )


def histogram(
    title: str,
    values: Sequence[float],
    x_label: str,
    bins: int = 40,
    width: int = 700,
    height: int = 260,
) -> str:
    """Draw counts of values; those below 0 in another colour, since a margin below 0 is wrong."""
    low, high = span(values)
    step = (high - low) / bins
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / step), bins - 1)] += 1
    axes = Axes((low, high), (0, max(counts) * 1.05), width, height)
    parts = [text(LEFT, 20, title, 13, more=' font-weight="bold"'), *grid(axes, x_label)]
    for i, count in enumerate(counts):
        left, top = axes.at(low + i * step, count)
        right, bottom = axes.at(low + (i + 1) * step, 0)
        colour = COLOURS[1] if low + (i + 0.5) * step < 0 else COLOURS[0]
        size = f'width="{right - left - 1:.1f}" height="{bottom - top:.1f}"'
        rect = f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour}">'
        range_of_bin = f"{number(low + i * step)} to {number(low + (i + 1) * step)}"
        parts.append(f"{rect}<title>{range_of_bin}: {count}</title></rect>")
    return picture(width, height, title, parts)
