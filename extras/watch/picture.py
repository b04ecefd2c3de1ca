"""Read a run's metrics.jsonl back, and draw it as one picture beside the model card."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from extras.watch.chart import COLOURS, Line, legend, panel, picture

PICTURE = "training.svg"  # beside a model card
MOST = 400  # points of a curve; a longer one shows means of neighbours

CHARTS = (  # heading, metrics, caption
    (
        "Loss",
        ("loss",),
        "What is minimised. It begins at the loss's start value: ln 2 for sigmoid.",
    ),
    (
        "Rewards of chosen and rejected",
        ("rewards/chosen", "rewards/rejected"),
        "beta times the log-ratio to the reference. Both may fall, "
        "as long as rejected falls faster.",
    ),
    ("Margin", ("rewards/margins",), "Chosen reward minus rejected reward."),
    (
        "Accuracy",
        ("rewards/accuracies",),
        "Share of pairs whose chosen answer has the higher reward; a tie counts one half.",
    ),
    (
        "KL: log-ratio on the pairs",
        ("kl",),
        "Mean log pi/ref of both answers, nats: how far the policy has moved where the data "
        "lie. The KL itself would be a mean over the policy's own answers "
        "(demo/frontier.py measures that).",
    ),
    (
        "Log-probabilities",
        ("logps/chosen", "logps/rejected"),
        "Of a whole answer under the policy, nats.",
    ),
    (
        "Entropy",
        ("entropy",),
        "Of the next token, nats; a fall towards 0 is a policy that has become sure of itself.",
    ),
    ("Gradient norm", ("grad_norm",), "Before clipping."),
    ("Learning rate", ("learning_rate",), ""),
    (
        "Length bias",
        ("length_bias",),
        "Correlation of margin and length difference over the evaluation pairs: at 1 the reward "
        "asks for nothing but length.",
    ),
    (
        "Length of sampled answers",
        ("completions/mean_length",),
        "Tokens, with --generate_during_eval.",
    ),
)


class Run(NamedTuple):
    """What an output directory holds."""

    name: str
    train: list[dict]  # rows of metrics.jsonl
    evals: list[dict]  # its rows of evaluations, without the eval_
    settings: dict


# Reading


def read_run(directory: str | Path) -> Run:
    """Read a run. Raises ValueError where there is none, or nothing of it was logged yet."""
    directory = Path(directory)
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory}: no metrics.jsonl there; give the --output_dir of a run")
    lines = path.read_text("utf-8", "replace").splitlines()
    rows = [row for line in lines if (row := parsed(line))]
    without_prefix = lambda row: {k.removeprefix("eval_"): v for k, v in row.items()}
    evals = [without_prefix(row) for row in rows if "eval_loss" in row]
    train = [row for row in rows if "loss" in row]
    if not train and not evals:
        raise ValueError(f"{path}: no line of metrics in it yet")
    settings = directory / "dpo_config.json"
    return Run(
        name=directory.resolve().name,
        train=train,
        evals=evals,
        settings=parsed(settings.read_text("utf-8")) if settings.is_file() else {},
    )


def parsed(text: str) -> dict:
    """Parse a JSON object; {} for a line that is still being written."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# Curves


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce a curve to at most MOST points, each a mean of neighbours."""
    size = max(1, -(-len(points) // MOST))
    mean = lambda values: sum(values) / len(values)
    return [tuple(map(mean, zip(*points[i : i + size]))) for i in range(0, len(points), size)]


def points_of(rows: list[dict], key: str) -> list[tuple[float, float]]:
    number = lambda v: isinstance(v, (int, float)) and math.isfinite(v)
    usable = [row for row in rows if number(row.get(key)) and number(row.get("step"))]
    return thinned([(row["step"], row[key]) for row in usable])


def lines_of(runs: list[Run], keys: tuple[str, ...]) -> list[Line]:
    """Make a line of each run's training, and one with marks of its evaluations.

    One run has a colour for each metric. Of several, each has its own colour, and the second
    metric is dashed.
    """
    lines = []
    for i, run in enumerate(runs):
        for j, key in enumerate(keys):
            colour = COLOURS[(j if len(runs) == 1 else i) % len(COLOURS)]
            dash = "6 3" if j and len(runs) > 1 else ""
            name = " ".join(filter(None, (run.name if len(runs) > 1 else "", key.split("/")[-1])))
            for rows, what, more in (
                (run.train, "", {}),
                (run.evals, "evaluation", {"marks": True, "dash": "2 3"}),
            ):
                if points := points_of(rows, key):
                    style = dict(colour=colour, dash=dash, group=f"run{i}") | more
                    lines.append(Line(f"{name} {what}".strip(), points, **style))
    return lines


def summary(run: Run, title: str) -> str:
    """Draw loss, rewards, margin and accuracy in one picture, for the model card."""
    parts = []
    wide = 460  # pixels of one chart, as is high
    high = 260
    for at, (heading, keys, _) in enumerate(CHARTS[:4]):
        lines = lines_of([run], keys)
        # A long legend does not fit above the plot, so it goes to the bottom left.
        corner = (wide - 170, 18) if len(lines) < 3 else (70, high - 50 - 16 * len(lines))
        inside = panel(heading, lines, "step", wide, high)
        inside += legend(lines, *corner) if len(lines) > 1 else []
        parts += [f'<g transform="translate({at % 2 * wide},{at // 2 * high})">', *inside, "</g>"]
    return picture(2 * wide, 2 * high, title, parts)


def write_picture(directory: str | Path) -> Path | None:
    """Write training.svg of an output directory; return None where nothing was logged."""
    try:
        run = read_run(directory)
    except ValueError:
        return None
    path = Path(directory) / PICTURE
    path.write_text(summary(run, "Training") + "\n", encoding="utf-8")
    return path
