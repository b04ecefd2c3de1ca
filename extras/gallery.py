"""Draw docs/losses.svg: every loss and its slope against the margin.

    python -m extras.gallery            # from the repository's root; writes docs/losses.svg

The margin h = r_w - r_l moves both completions: log pi(y_w|x) rises h/2 above the reference,
log pi(y_l|x) falls by h/2. Both completions have 8 tokens and -40 nats under the reference, and the
row's ratings differ by 2. Flags are at their defaults, except beta for losses made for another one
(`BETA`). Divergences that grow like e^-h are drawn over a smaller range.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dpo
import losses

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "losses.svg"
BETA = {"sigmoid_norm": 5.0, "simpo": 2.5, "alphapo": 2.5}
ORDER = [name for name in losses.LOSSES if name != "aot_pair"]  # the other name of aot_unpaired
# How far to draw, nats.
DIVERGENCES = {"forward_kl": 12, "js_divergence": 60, "alpha_divergence": 12}
POINTS = 120  # to the left and right of 0 together
TOKENS = 8.0  # of each completion
NATS = -40.0  # its log-prob under the reference
GAP = 2.0  # between the ratings

COLUMNS = 5  # of the grid
WIDTH = 200  # pixels of a cell
HEIGHT = 168
TOP = 78  # pixels above the grid
LEFT = 44  # x and y inside a cell, pixels
MIDDLE = 118
RIGHT = 192
LOSS_BAND = (26, 96)
SLOPE_BAND = (106, 142)
BLUE = "#0072B2"  # distinct from orange to the colour-blind too, and by the dash
ORANGE = "#D55E00"
GREY = "#767676"


class Curve(NamedTuple):
    title: str
    note: str
    reach: int  # the margins are POINTS + 1 equal steps from -reach to reach, nats
    loss: Tensor  # (POINTS + 1,)
    slope: Tensor  # (POINTS + 1,) d loss / d margin


def pair_at(margin: Tensor, divergence: str = "reverse_kl") -> losses.PairLogps:
    """Make one pair whose log-ratios are margin / 2 and -margin / 2."""
    one = torch.ones(1, dtype=torch.float64)
    score = losses.F_DIVERGENCES[divergence]
    if divergence == "alpha_divergence":
        score = lambda r: losses.alpha_divergence(r, 0.5)
    return losses.PairLogps(
        policy_chosen_logps=NATS + margin / 2,
        policy_rejected_logps=NATS - margin / 2,
        ref_chosen_logps=NATS * one,
        ref_rejected_logps=NATS * one,
        chosen_lengths=TOKENS * one,
        rejected_lengths=TOKENS * one,
        chosen_ratings=GAP * one,
        rejected_ratings=0 * one,
        score=score,
    )


def make_curve(name: str, divergence: str = "reverse_kl") -> Curve:
    """Compute one cell's loss and slope over the margins."""
    beta = BETA.get(name, 0.1)
    reach = DIVERGENCES.get(divergence, 60)
    options = vars(dpo.DPOConfig(loss_type=[name], beta=beta)) | {"delta": 0.0}
    margins = torch.linspace(-reach, reach, POINTS + 1, dtype=torch.float64, requires_grad=True)
    loss = torch.cat([losses.pair_losses(pair_at(h[None], divergence), options) for h in margins])
    (slope,) = torch.autograd.grad(loss.sum(), margins)
    note = divergence if divergence != "reverse_kl" else f"beta {beta:g}" if name in BETA else ""
    return Curve(name, note, reach, loss.detach(), slope)


def curves() -> list[Curve]:
    found = [make_curve(name) for name in ORDER]
    return found + [make_curve("sigmoid", kind) for kind in DIVERGENCES]


# Drawing


def text(
    x: float, y: float, words: str, size: int = 10, anchor: str = "start", colour: str = "#222222"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="1"{dash}/>'


def scale(values: Tensor, band: tuple[int, int], low: float, high: float) -> list[float]:
    """Convert values to pixels, `low` at the bottom of the band and `high` at its top."""
    top, bottom = band
    return [bottom - (v - low) / (high - low) * (bottom - top) for v in values.tolist()]


def padded_range(values: Tensor) -> tuple[float, float]:
    low = values.min().item()
    high = values.max().item()
    pad = 0.04 * (high - low) or 1.0
    return low - pad, high + pad


def path(ys: list[float], colour: str, dash: str) -> str:
    points = " ".join(f"{LEFT + i / POINTS * (RIGHT - LEFT):.1f},{y:.1f}" for i, y in enumerate(ys))
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'


def short(value: float, span: float) -> str:
    """Format an axis' number; 0 for one too small to see on it."""
    if abs(value) < 0.005 * span:
        return "0"
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.2g}"
        if abs(value) >= 0.01
        else f"{value:.1g}"
    )


def graph(values: Tensor, band: tuple[int, int], colour: str, dash: str) -> list[str]:
    """Draw a curve in its band with the ends of its range, and a line at 0 if that is inside."""
    low, high = padded_range(values)
    top, bottom = band
    out = [
        line(LEFT, bottom, RIGHT, bottom, "#DDDDDD"),
        line(MIDDLE, top, MIDDLE, bottom, "#DDDDDD"),
    ]
    if low < 0 < high:
        zero = scale(torch.zeros(1), band, low, high)[0]
        out.append(line(LEFT, zero, RIGHT, zero, "#999999", "1 3"))
    out.append(path(scale(values, band, low, high), colour, dash))
    most = values.max().item()
    least = values.min().item()
    ends = [(top + 7, most), (bottom, least)] if most > least else [((top + bottom) / 2 + 3, most)]
    return out + [text(LEFT - 4, y, short(value, high - low), 9, "end", GREY) for y, value in ends]


def panel(curve: Curve, column: int, row: int) -> str:
    """Draw one cell: name, loss with a dot at its start, slope below."""
    start = curve.loss[POINTS // 2 : POINTS // 2 + 1]
    (y,) = scale(start, LOSS_BAND, *padded_range(curve.loss))
    ticks = ((LEFT, -curve.reach), (MIDDLE, 0), (RIGHT, curve.reach))
    value = f"{start.item():.3f}".rstrip("0").rstrip(".")
    parts = [
        text(LEFT, 18, f'<tspan font-weight="bold">{curve.title}</tspan>', 12),
        text(RIGHT, 18, curve.note, 10, "end", GREY),
        *graph(curve.loss, LOSS_BAND, BLUE, ""),
        *graph(curve.slope, SLOPE_BAND, ORANGE, "5 2"),
        f'<circle cx="{MIDDLE}" cy="{y:.1f}" r="3" fill="{BLUE}"/>',
        text(MIDDLE + 6, min(max(y - 5, 33), 94), value, 9, colour=BLUE),
        *(text(x, 153, str(margin), 9, "middle", GREY) for x, margin in ticks),
    ]
    corner = f"{column * WIDTH},{TOP + row * HEIGHT}"
    return f'<g transform="translate({corner})">' + "\n".join(parts) + "</g>"


def legend() -> str:
    words = (
        "Against the margin h = r_w - r_l in nats. "
        "The dot is the start, where policy equals reference.",
        "Both completions have 8 tokens and -40 nats under the reference; "
        "beta is 0.1 where none is given.",
    )
    return "\n".join(
        [
            line(LEFT, 22, LEFT + 28, 22, BLUE),
            text(LEFT + 34, 26, "loss", 13, colour=BLUE),
            line(LEFT + 84, 22, LEFT + 112, 22, ORANGE, "5 2"),
            text(LEFT + 118, 26, "its slope, d loss / d h", 13, colour=ORANGE),
            *(
                text(LEFT, 48 + 17 * i, sentence, 12, colour=GREY)
                for i, sentence in enumerate(words)
            ),
        ]
    )


def draw(found: list[Curve]) -> str:
    rows = -(-len(found) // COLUMNS)
    wide = COLUMNS * WIDTH
    high = TOP + rows * HEIGHT
    size = f'width="{wide}" height="{high}" viewBox="0 0 {wide} {high}"'
    cells = [panel(curve, i % COLUMNS, i // COLUMNS) for i, curve in enumerate(found)]
    font = 'font-family="Helvetica, Arial, sans-serif"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        "<title>Preference losses and their slopes against the margin</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        legend(),
        *cells,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(curves()), encoding="utf-8")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
