"""Write one page about one run or several: curves, answers before and after, settings.

    python -m extras.report OUT                        writes OUT/report.html
    python -m extras.report OUT-1 OUT-2 --output both.html
    python -m extras.report OUT --png FOLDER           the curves as pictures too; needs matplotlib

It reads metrics.jsonl and dpo_config.json of output directories, finished or still running. The
page is one file without scripts or links to other files; the curves are SVG, drawn by
extras/watch/chart.py.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from html import escape
from pathlib import Path
from typing import Any

from extras.watch.chart import COLOURS, Line, chart
from extras.watch.picture import CHARTS, Run, lines_of, read_run, summary
from parts.config import DPOConfig
from parts.screen import escape_unknown

SAMPLES = 8  # answers shown for a run

STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; margin: 2rem auto; \
max-width: 1500px;
padding: 0 1.5rem }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); \
gap: 1.2rem }
figure { margin: 0 } \
figure svg { width: 100%; height: auto; border: 1px solid #e4e4e4; border-radius: 6px }
figcaption { color: #666; font-size: .85rem; padding: .2rem .3rem }
table { border-collapse: collapse; font-size: .9rem } \
td, th { border-bottom: 1px solid #e4e4e4; padding: .35rem .7rem;
text-align: left; vertical-align: top } \
td.number { text-align: right; font-variant-numeric: tabular-nums }
.answers td { width: 33%; white-space: pre-wrap; overflow-wrap: anywhere } \
.answers { width: 100%; table-layout: fixed }
.differs td { background: #fff6e0 } \
label { margin-right: 1.2rem; cursor: pointer } .wide { overflow-x: auto }
.key { display: inline-block; width: 1.6em; height: 0; border-top: 3px solid; \
vertical-align: middle; margin: 0 .3em }
footer { color: #888; font-size: .85rem; margin-top: 3rem }
"""


# Reading


def read_runs(directories: list[str]) -> list[Run]:
    """Read runs; those of equal names get a number."""
    runs = [read_run(d) for d in directories]
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        if names.count(run.name) > 1:
            runs[i] = run._replace(name=f"{run.name} ({i + 1})")
    return runs


# Curves


def figures(runs: list[Run]) -> list[str]:
    out = []
    for title, keys, note in CHARTS:
        if lines := lines_of(runs, keys):
            caption = f"{key_of(lines, len(runs))}{escape(note)}"
            svg = chart(title, lines, "step")
            out.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return out


def key_of(lines: list[Line], runs: int) -> str:
    """Draw a chart's key, if it has several lines; that of several runs is at the page's top."""
    if len(lines) < 2 or runs > 1:
        return ""
    out = ""
    for line in lines:
        stroke = "dotted" if line.marks else "solid"
        style = f"border-color:{line.colour};border-top-style:{stroke}"
        out += f'<span class="key" style="{style}"></span>{escape(line.name)} '
    return out + "<br>"


# Tables


def cells(values: list, tag: str = "td", kind: str = "") -> str:
    return "".join(f"<{tag}{kind}>{escape(str(v))}</{tag}>" for v in values)


def results(runs: list[Run]) -> str:
    """Tabulate the last evaluation of each run, or else its last training step."""
    keys = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "kl",
        "length_bias",
    )
    shown = lambda v: f"{v:.4f}" if isinstance(v, (int, float)) else "–"
    rows = []
    for run in runs:
        kind = "evaluation" if run.evals else "training"
        last = (run.evals or run.train)[-1]
        at = cells([run.name, f"{kind}, step {last.get('step')}"])
        numbers = cells([shown(last.get(k)) for k in keys], kind=" class=number")
        rows.append(f"<tr>{at}{numbers}</tr>")
    head = cells(["run", "", *keys], "th")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def answers(runs: list[Run]) -> str:
    """Tabulate each run's answers to the same prompts, at its first and last evaluation."""
    out = []
    for run in runs:
        has_samples = lambda row: isinstance(row.get("samples"), list) and row["samples"]
        sampled = [row for row in run.evals if has_samples(row)]
        if not sampled:
            continue
        first = sampled[0]
        last = sampled[-1]
        both = list(zip(first["samples"], last["samples"]))[:SAMPLES]
        rows = [cells([a["prompt"], a["completion"], b["completion"]]) for a, b in both]
        head = cells(["prompt", f"step {first['step']}", f"step {last['step']}"], "th")
        out.append(
            f"<h3>{escape(run.name)}</h3><table class=answers><tr>{head}</tr>"
            + "".join(f"<tr>{row}</tr>" for row in rows)
            + "</table>"
        )
    return "".join(out) or "<p>None: no run had --generate_during_eval.</p>"


def defaults() -> dict:
    made = lambda f: f.default if f.default is not MISSING else f.default_factory()
    return {f.name: made(f) for f in fields(DPOConfig)}


def configuration(runs: list[Run]) -> str:
    """Tabulate options that are not at their default, marked where runs differ; then all."""
    usual = defaults()
    names = sorted({name for run in runs for name in run.settings})
    if not names:
        return "<p>Not recorded (dpo_config.json is missing).</p>"

    def table(chosen: list[str]) -> str:
        body = ""
        for name in chosen:
            values = [run.settings.get(name, "–") for run in runs]
            differs = ' class="differs"' if any(v != values[0] for v in values) else ""
            texts = [text_of(v) for v in [*values, usual.get(name, "–")]]
            body += f"<tr{differs}>{cells([name, *texts])}</tr>"
        head = cells(["option", *(run.name for run in runs), "default"], "th")
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'

    special = [n for n in names if any(run.settings.get(n) != usual.get(n) for run in runs)]
    return (
        table(special)
        + f"<details><summary>all {len(names)} options</summary>{table(names)}</details>"
    )


def text_of(value: Any) -> str:
    """Format an option's value."""
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else "unset"
        if value is None
        else str(value)
    )


# The page


def page(runs: list[Run]) -> str:
    title = "DPO: " + ", ".join(run.name for run in runs)
    hide = ""  # CSS: an unchecked box hides its run, without a script
    switches = ""
    for i, run in enumerate(runs):
        hide += f"body:has(#run{i}:not(:checked)) .run{i} {{ display: none }}\n"
        key = f'<span class="key" style="border-color:{COLOURS[i % len(COLOURS)]}"></span>'
        box = f'<input type="checkbox" id="run{i}" checked>'
        switches += f"<label>{box}{key}{escape(run.name)}</label>"
    if len(runs) > 1:
        switches += (
            "<br>Dotted lines with marks are evaluations; where a chart has two metrics, "
            "the second is dashed."
        )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><link rel="icon" href="data:,">
<style>{STYLE}{hide if len(runs) > 1 else ""}</style></head><body>
<h1>{escape(title)}</h1><p>{switches if len(runs) > 1 else ""}</p>
{results(runs)}
<h2>Curves</h2><div class="charts">{"".join(figures(runs))}</div>
<h2>Answers, before and after</h2>{answers(runs)}
<h2>Configuration</h2>{configuration(runs)}
<footer>Rewards are DPO's implicit ones: beta log(pi/ref), summed over an answer, in nats times \
beta. \
Made by
python -m extras.report.</footer></body></html>
"""


def write_pngs(runs: list[Run], folder: Path) -> list[Path]:
    """Write a PNG for each chart. Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png: matplotlib is not installed; pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, keys, _ in CHARTS:
        if lines := lines_of(runs, keys):
            figure, axes = pyplot.subplots(figsize=(6.4, 4), dpi=120)
            for line in lines:
                axes.plot(
                    *zip(*line.points),
                    label=line.name,
                    color=line.colour,
                    marker="o" if line.marks else None,
                    linestyle=":" if line.marks else "--" if line.dash else "-",
                )
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend()
            written.append(folder / f"{'-'.join(title.lower().split())}.png")
            figure.savefig(written[-1], bbox_inches="tight")
            pyplot.close(figure)
    return written


def main(argv: list[str] | None = None, say: Callable = print) -> int:
    """Return exit status 2, with one message, where a directory holds no run."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="+", help="output directories of runs")
    parser.add_argument("--output", help="the page [report.html in the only directory, or here]")
    parser.add_argument("--png", help="folder for the curves as PNG")
    parser.add_argument(
        "--svg", help="file for the first run's loss, rewards, margin and accuracy as one picture"
    )
    args = parser.parse_args(argv)
    escape_unknown()
    try:
        runs = read_runs(args.directory)
        alone = Path(args.directory[0]) if len(runs) == 1 else Path(".")
        path = Path(args.output) if args.output else alone / "report.html"
        path.write_text(page(runs), encoding="utf-8")
        if args.svg:
            Path(args.svg).write_text(summary(runs[0], "Training") + "\n", encoding="utf-8")
        svgs = [args.svg] if args.svg else []
        pngs = write_pngs(runs, Path(args.png)) if args.png else []
        for file in [path, *svgs, *pngs]:
            say(file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
