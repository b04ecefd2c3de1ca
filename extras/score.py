"""A trained policy as the reward model that it is: implicit rewards, accuracy, and the pairs it is most wrong about.

    python -m extras.score OUT pairs.jsonl                             against the reference that OUT was trained with
    python -m extras.score MODEL pairs.jsonl --ref BASE --beta 0.1
    python -m extras.score OUT pairs.jsonl --output scores.jsonl --html scores.html

The reward of an answer is beta log(pi(y|x) / ref(y|x)) (arXiv:2305.18290, eq. 5, without its term of x alone, which no
comparison of two answers sees). A pair is right where chosen has the higher one; a tie counts one half.
"""

import argparse
import json
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

import dpo
from extras.watch.chart import histogram
from extras.watch.samples import shown
from parts.metrics import length_bias

FROM_RUN = ("max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "dtype")
BARS = 16  # of the histogram at a terminal
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,"><style>
body {{ font: 15px/1.5 Helvetica, Arial, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
color: #222 }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed }} td, th {{ border-bottom: 1px solid #ddd;
padding: .4rem; text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }}
td:first-child, th:first-child {{ width: 6em }} svg {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem }}
</style></head><body><h1>{title}</h1><pre>{summary}</pre>{histogram}<h2>Most wrong</h2>
<table><tr><th>margin</th><th>prompt</th><th>chosen</th><th>rejected</th></tr>{rows}</table></body></html>
"""


class Scores(NamedTuple):
    """Of P pairs, in the file's order; rewards are beta times nats."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    longer: Tensor  # (P,) tokens that chosen has more
    length_bias: float

    @property
    def margins(self) -> Tensor:  # (P,)
        return self.chosen - self.rejected


def settings_of(args: argparse.Namespace) -> dict:
    """What the run in the directory was told, under the command line. Raises ValueError where no reference is known."""
    path = Path(args.model) / "dpo_config.json"
    run = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    ref = args.ref or run.get("ref_model_name_or_path") or run.get("model_name_or_path")
    if ref is None and (Path(args.model) / "adapter_config.json").is_file():
        from extras.lora.peft_files import read_settings

        ref = read_settings(Path(args.model))["base_model_name_or_path"]
    if ref is None:
        raise ValueError(
            f"{args.model}: neither a dpo_config.json nor an adapter that names its base; give --ref, the model "
            "it was trained from"
        )
    given = {"beta": args.beta, "max_length": args.max_length}
    return (
        {k: run[k] for k in FROM_RUN if k in run}
        | {"beta": run.get("beta", 0.1)}
        | {k: v for k, v in given.items() if v is not None}
        | {"ref_model_name_or_path": ref}
    )


def open_trainer(args: argparse.Namespace, scratch: str) -> dpo.DPOTrainer:
    """The trainer, to measure with: it never takes a step."""
    return dpo.DPOTrainer(
        args=dpo.DPOConfig(
            **settings_of(args),
            model_name_or_path=args.model,
            dataset_name=args.pairs,
            output_dir=scratch,
            cache_dir=args.cache_dir,
            use_cpu=args.use_cpu,
            on_bad_row=args.on_bad_row,
            per_device_eval_batch_size=args.batch_size,
        )
    )


def score_pairs(trainer: dpo.DPOTrainer) -> Scores:
    """Both models over every pair; the reference's part is kept in the cache, as in training."""
    store, pairs = trainer.train_store, trainer.train_pairs
    trainer.reference.prepare()
    rows = trainer.forwards(store, pairs, trainer.args.per_device_eval_batch_size)
    x, _ = trainer.score_all(
        store, pairs, (trainer.batch(store, r) for r in trainer.log.progress(rows, "scoring"))
    )
    beta = trainer.args.beta
    return Scores(
        beta * x.chosen_logratios,
        beta * x.rejected_logratios,
        x.chosen_lengths - x.rejected_lengths,
        length_bias(x),
    )


# What is told


def accuracy(margins: Tensor) -> str:
    return (
        f"{float((margins.sign() + 1).mean() / 2):.3f} of {len(margins):,}"
        if len(margins)
        else "no such pairs"
    )


def summarize(s: Scores, beta: float, ref: str) -> list[str]:
    spread = lambda t: f"{float(t.mean()):+.4f} ± {float(t.std(correction=0)):.4f}"
    return [
        f"reference         {ref}, beta {beta:g}",
        f"accuracy          {accuracy(s.margins)} pairs",
        f"  chosen longer   {accuracy(s.margins[s.longer > 0])}",
        f"  chosen shorter  {accuracy(s.margins[s.longer < 0])}",
        f"margin            {spread(s.margins)} (mean, standard deviation)",
        f"reward, chosen    {spread(s.chosen)}",
        f"reward, rejected  {spread(s.rejected)}",
        f"length bias       {s.length_bias:+.3f} (correlation of margin and length difference)",
    ]


def bars(margins: Tensor, width: int = 50) -> list[str]:
    """The histogram of margins in lines of text; 0 is the edge of two bars."""
    low, high = min(float(margins.min()), 0.0), max(float(margins.max()), 0.0)
    step = (high - low) / BARS or 1.0
    edges = np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step
    counts, _ = np.histogram(
        margins.numpy(), np.append(edges, edges[-1] + step) if len(edges) < 2 else edges
    )
    return [
        f"{left:+9.3f}  {'█' * round(width * count / max(counts.max(), 1)):<{width}} {count}"
        for left, count in zip(edges, counts)
    ]


def texts(trainer: dpo.DPOTrainer, index: int) -> tuple[str, str, str]:
    pair, decode = trainer.train_store[index], trainer.tokenizer.decode
    return decode(pair.prompt_ids), decode(pair.chosen_ids), decode(pair.rejected_ids)


def worst(s: Scores, count: int) -> list[int]:
    """The pairs with the lowest margins, those below 0 alone."""
    order = s.margins.argsort()[:count].tolist()
    return [i for i in order if s.margins[i] < 0]


def told(trainer: dpo.DPOTrainer, s: Scores, count: int) -> list[str]:
    lines = [
        *summarize(s, trainer.args.beta, trainer.args.ref_model_name_or_path),
        "",
        "margins",
        *bars(s.margins),
        "",
    ]
    found = worst(s, count)
    lines.append(
        f"most wrong ({int((s.margins < 0).sum())} pairs are below 0)"
        if found
        else "no pair is below 0"
    )
    for i in found:
        prompt, chosen, rejected = texts(trainer, i)
        lines += [
            f"\n{s.margins[i]:+.4f}  {trainer.train_store.where(i)}",
            f"  prompt    {shown(prompt, 160)}",
            f"  chosen    {s.chosen[i]:+.4f}  {shown(chosen, 160)}",
            f"  rejected  {s.rejected[i]:+.4f}  {shown(rejected, 160)}",
        ]
    return lines


def write_scores(trainer: dpo.DPOTrainer, s: Scores, path: str) -> None:
    """A row for each pair: where it stands, and both rewards."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(len(s.margins)):
            file.write(
                json.dumps(
                    {
                        "where": trainer.train_store.where(i),
                        "chosen_reward": float(s.chosen[i]),
                        "rejected_reward": float(s.rejected[i]),
                        "margin": float(s.margins[i]),
                    }
                )
                + "\n"
            )


def page(trainer: dpo.DPOTrainer, s: Scores, count: int, title: str) -> str:
    row = lambda i: "".join(
        f"<td>{escape(t)}</td>" for t in (f"{s.margins[i]:+.4f}", *texts(trainer, i))
    )
    return PAGE.format(
        title=escape(title),
        rows="".join(f"<tr>{row(i)}</tr>" for i in worst(s, count)),
        summary=escape(
            "\n".join(summarize(s, trainer.args.beta, trainer.args.ref_model_name_or_path))
        ),
        histogram=histogram(
            "Margins of the pairs", s.margins.tolist(), "chosen reward - rejected reward"
        ),
    )


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m extras.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="output directory of a run, or a model or adapter")
    parser.add_argument("pairs", help="preference pairs, as dpo.py reads them")
    parser.add_argument("--ref", help="the reference [the one of the run; an adapter's base]")
    parser.add_argument("--beta", type=float, help="scale of the rewards [the run's, else 0.1]")
    parser.add_argument(
        "--max_length", type=int, help="longest sequence, in tokens [the run's, else 1024]"
    )
    parser.add_argument(
        "--worst", type=int, default=5, help="how many of the most wrong pairs are shown [5]"
    )
    parser.add_argument("--output", help="JSONL file for the rewards of every pair")
    parser.add_argument(
        "--html", help="file for a page with the histogram and the most wrong pairs"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pairs in one forward [8]")
    parser.add_argument(
        "--on_bad_row", choices=["stop", "skip"], default="stop", help="unusable rows [stop]"
    )
    parser.add_argument(
        "--cache_dir", help="where tokenized pairs and reference log-probs are kept [~/.cache/dpo]"
    )
    parser.add_argument("--use_cpu", action="store_true", help="though there is a GPU")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Optional[list[str]] = None) -> int:
    """Exit status 2, with one message, for what cannot be read or run."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch, dpo.ending_ranks():
        try:
            trainer = open_trainer(args, scratch)
            scores = Scores(
                *(t.cpu().double() if isinstance(t, Tensor) else t for t in score_pairs(trainer))
            )
            print("\n".join(told(trainer, scores, args.worst)))
            if args.output:
                write_scores(trainer, scores, args.output)
            if args.html:
                title = f"{Path(args.model).name} on {Path(args.pairs).name}"
                Path(args.html).write_text(
                    page(trainer, scores, args.worst, title), encoding="utf-8"
                )
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
