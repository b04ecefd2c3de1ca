"""A run as one picture: its metrics.jsonl read back, and loss, rewards, margin and accuracy drawn beside a model card."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from extras.watch.chart import COLOURS, Line, legend, panel, picture

PICTURE = "training.svg"  # beside a model card
MOST = 400  # points of a curve; of longer ones, means of neighbours

CHARTS = (  # heading, metrics, what it tells
    (
        "Loss",
        ("loss",),
        "What is minimised. It begins at the loss's start value: ln 2 for sigmoid.",
    ),
    (
        "Rewards of chosen and rejected",
        ("rewards/chosen", "rewards/rejected"),
        "beta times the log-ratio to the reference. Both may fall, as long as rejected falls faster.",
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
        "lie. The KL itself would be a mean over the policy's own answers (demo/frontier.py measures that).",
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
    """What an output directory tells."""

    name: str
    train: list[dict]  # rows of metrics.jsonl
    evals: list[dict]  # its rows of evaluations, without the eval_
    settings: dict


# Reading


def read_run(directory: str | Path) -> Run:
    """Raises ValueError where there is no run, or nothing of it was logged yet."""
    directory = Path(directory)
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory}: no metrics.jsonl there; give the --output_dir of a run")
    rows = [
        row for line in path.read_text("utf-8", "replace").splitlines() if (row := parsed(line))
    ]
    evals = [
        {k.removeprefix("eval_"): v for k, v in row.items()} for row in rows if "eval_loss" in row
    ]
    train = [row for row in rows if "loss" in row]
    if not train and not evals:
        raise ValueError(f"{path}: no line of metrics in it yet")
    settings = directory / "dpo_config.json"
    return Run(
        directory.resolve().name,
        train,
        evals,
        parsed(settings.read_text("utf-8")) if settings.is_file() else {},
    )


def parsed(text: str) -> dict:
    """A JSON object; {} for a line that is still being written."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# Curves


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST points: means of neighbours."""
    size = max(1, -(-len(points) // MOST))
    mean = lambda values: sum(values) / len(values)
    return [tuple(map(mean, zip(*points[i : i + size]))) for i in range(0, len(points), size)]


def points_of(rows: list[dict], key: str) -> list[tuple[float, float]]:
    number = lambda v: isinstance(v, (int, float)) and math.isfinite(v)
    return thinned(
        [
            (row["step"], row[key])
            for row in rows
            if number(row.get(key)) and number(row.get("step"))
        ]
    )


def lines_of(runs: list[Run], keys: tuple[str, ...]) -> list[Line]:
    """A run's training as a line, its evaluations as one with marks. One run: a colour for each metric; several: a
    colour for each run, and dashes for the second metric."""
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
    """Loss, rewards, margin and accuracy in one picture, for the model card."""
    parts, wide, high = [], 460, 260
    for at, (heading, keys, _) in enumerate(CHARTS[:4]):
        lines = lines_of([run], keys)
        corner = (
            (wide - 170, 18) if len(lines) < 3 else (70, high - 50 - 16 * len(lines))
        )  # where there is room
        inside = panel(heading, lines, "step", wide, high) + (
            legend(lines, *corner) if len(lines) > 1 else []
        )
        parts += [f'<g transform="translate({at % 2 * wide},{at // 2 * high})">', *inside, "</g>"]
    return picture(2 * wide, 2 * high, title, parts)


def write_picture(directory: str | Path) -> Path | None:
    """training.svg of an output directory; None where nothing was logged."""
    try:
        run = read_run(directory)
    except ValueError:
        return None
    path = Path(directory) / PICTURE
    path.write_text(summary(run, "Training") + "\n", encoding="utf-8")
    return path
