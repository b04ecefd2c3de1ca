"""Use a trained policy as a reward model: implicit rewards, accuracy, the most wrong pairs.

    python -m extras.score OUT pairs.jsonl            against the reference of OUT's training
    python -m extras.score MODEL pairs.jsonl --ref BASE --beta 0.1
    python -m extras.score OUT pairs.jsonl --output scores.jsonl --html scores.html

The reward of an answer is beta log(pi(y|x) / ref(y|x)) (arXiv:2305.18290, eq. 5, without the term
that depends on x alone: it cancels between two answers). A pair is right if chosen has the higher
reward; a tie counts one half.
"""

import argparse
import json
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dpo
from extras.lora.peft_files import read_settings
from extras.models.opening import is_adapter, run_options
from extras.watch.chart import histogram
from extras.watch.samples import shown
from parts.metrics import length_bias
from parts.output import check_apart
from parts.ranks import ending_ranks
from parts.rows import find_files, names_in, on_hub
from parts.screen import can_show

FROM_RUN = (
    "max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "dtype", "bf16",
    "fp16")
FOUR_BIT = ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_compute_dtype")
BARS = 16  # of the histogram at a terminal
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\
<link rel="icon" href="data:,"><style>
body {{ font: 15px/1.5 Helvetica, Arial, sans-serif; max-width: 1100px; margin: 2rem auto; \
padding: 0 1rem;
color: #222 }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed }} \
td, th {{ border-bottom: 1px solid #ddd;
padding: .4rem; text-align: left; vertical-align: top; white-space: pre-wrap; \
overflow-wrap: anywhere }}
td:first-child, th:first-child {{ width: 6em }} svg {{ max-width: 100% }} \
pre {{ background: #f6f6f6; padding: 1rem }}
</style></head><body><h1>{title}</h1><pre>{summary}</pre>{histogram}<h2>Most wrong</h2>
<table><tr><th>margin</th><th>prompt</th><th>chosen</th><th>rejected</th></tr>\
{rows}</table></body></html>
"""


class Rewards(NamedTuple):
    """The rewards of P pairs, in the file's order; beta times nats."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    longer: Tensor  # (P,) chosen minus rejected, tokens
    length_bias: float

    @property
    def margins(self) -> Tensor:  # (P,)
        return self.chosen - self.rejected


def settings_of(args: argparse.Namespace) -> dict:
    """Take the options of the run in the directory; those of the command line win.

    Raises ValueError where no reference is known.
    """
    run = run_options(args.model)
    ref = args.ref or run.get("ref_model_name_or_path") or run.get("model_name_or_path")
    if ref is None and is_adapter(args.model):
        ref = read_settings(Path(args.model))["base_model_name_or_path"]
    if ref is None:
        raise ValueError(
            f"{args.model}: neither a dpo_config.json nor an adapter that names its base; "
            "give --ref, the model it was trained from"
        )
    # what was merged is in 4 bits no longer
    kept = (*FROM_RUN, *FOUR_BIT) if is_adapter(args.model) else FROM_RUN
    given = {"beta": args.beta, "max_length": args.max_length}
    return (
        {k: run[k] for k in kept if k in run}
        | {"beta": run.get("beta", 0.1)}
        | {k: v for k, v in given.items() if v is not None}
        | {"ref_model_name_or_path": ref}
    )


def files_of(pairs: str) -> list[Path]:
    """Return the files that are read; of the hub's none is here."""
    return [] if on_hub(pairs) else find_files(names_in(pairs))


def open_trainer(args: argparse.Namespace, scratch: str) -> dpo.DPOTrainer:
    """Open a trainer, only to measure with: it never takes a step."""
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


def reward_pairs(trainer: dpo.DPOTrainer) -> Rewards:
    """Run both models over every pair; the reference's log-probs are cached, as in training."""
    store = trainer.train_store
    pairs = trainer.train_pairs
    trainer.reference.prepare()
    rows = trainer.forwards(store, pairs, trainer.args.per_device_eval_batch_size)
    batches = (trainer.batch(store, r) for r in trainer.log.progress(rows, "scoring"))
    x, _ = trainer.score_all(store, pairs, batches)
    beta = trainer.args.beta
    return Rewards(
        chosen=beta * x.chosen_logratios,
        rejected=beta * x.rejected_logratios,
        longer=x.chosen_lengths - x.rejected_lengths,
        length_bias=length_bias(x),
    )


# Report


def accuracy(margins: Tensor) -> str:
    """Format the share of margins above 0; a tie counts one half."""
    if not len(margins):
        return "no such pairs"
    share = float((margins.sign() + 1).mean() / 2)
    return f"{share:.3f} of {len(margins):,}"


def summarize(s: Rewards, beta: float, ref: str) -> list[str]:
    between = "±" if can_show("±") else "+-"
    spread = lambda t: f"{float(t.mean()):+.4f} {between} {float(t.std(correction=0)):.4f}"
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
    """Draw the histogram of margins in lines of text; 0 is the edge of two bars."""
    low = min(float(margins.min()), 0.0)
    high = max(float(margins.max()), 0.0)
    step = (high - low) / BARS or 1.0
    edges = np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step
    bounds = np.append(edges, edges[-1] + step) if len(edges) < 2 else edges
    counts, _ = np.histogram(margins.numpy(), bounds)
    most = max(counts.max(), 1)
    block = "█" if can_show("█") else "#"
    bar = lambda count: block * round(width * count / most)
    return [f"{left:+9.3f}  {bar(n):<{width}} {n}" for left, n in zip(edges, counts)]


def texts(trainer: dpo.DPOTrainer, index: int) -> tuple[str, str, str]:
    """Decode a pair: prompt, chosen, rejected."""
    pair = trainer.train_store[index]
    decode = trainer.tokenizer.decode
    return decode(pair.prompt_ids), decode(pair.chosen_ids), decode(pair.rejected_ids)


def worst(s: Rewards, count: int) -> list[int]:
    """Find the pairs with the lowest margins, only those below 0."""
    order = s.margins.argsort()[:count].tolist()
    return [i for i in order if s.margins[i] < 0]


def told(trainer: dpo.DPOTrainer, s: Rewards, count: int) -> list[str]:
    """Write what the terminal shows: summary, histogram, the `count` most wrong pairs."""
    lines = [
        *summarize(s, trainer.args.beta, trainer.args.ref_model_name_or_path),
        "",
        "margins",
        *bars(s.margins),
        "",
    ]
    found = worst(s, count)
    below = int((s.margins < 0).sum())
    lines.append(f"most wrong ({below} pairs are below 0)" if found else "no pair is below 0")
    for i in found:
        prompt, chosen, rejected = texts(trainer, i)
        lines += [
            f"\n{s.margins[i]:+.4f}  {trainer.train_store.where(i)}",
            f"  prompt    {shown(prompt, 160)}",
            f"  chosen    {s.chosen[i]:+.4f}  {shown(chosen, 160)}",
            f"  rejected  {s.rejected[i]:+.4f}  {shown(rejected, 160)}",
        ]
    return lines


def write_rewards(trainer: dpo.DPOTrainer, s: Rewards, path: str) -> None:
    """Write a JSONL row for each pair: its file and line, and both rewards."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(len(s.margins)):
            row = {
                "where": trainer.train_store.where(i),
                "chosen_reward": float(s.chosen[i]),
                "rejected_reward": float(s.rejected[i]),
                "margin": float(s.margins[i]),
            }
            file.write(json.dumps(row) + "\n")


def page(trainer: dpo.DPOTrainer, s: Rewards, count: int, title: str) -> str:
    """Write the HTML page: summary, histogram, the `count` most wrong pairs."""
    cells = lambda i: [f"{s.margins[i]:+.4f}", *texts(trainer, i)]
    row = lambda i: "".join(f"<td>{escape(text)}</td>" for text in cells(i))
    margins = s.margins.tolist()
    summary = summarize(s, trainer.args.beta, trainer.args.ref_model_name_or_path)
    return PAGE.format(
        title=escape(title),
        rows="".join(f"<tr>{row(i)}</tr>" for i in worst(s, count)),
        summary=escape("\n".join(summary)),
        histogram=histogram("Margins of the pairs", margins, "chosen reward - rejected reward"),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
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
    parser.add_argument("--worst", type=int, default=5, help="number of most wrong pairs shown [5]")
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
    parser.add_argument("--use_cpu", action="store_true", help="even if there is a GPU")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Return exit status 2, with one message, for what cannot be read or run."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch, ending_ranks():
        try:
            for flag, path in (("--output", args.output), ("--html", args.html)):
                if path:
                    check_apart(flag, path, files_of(args.pairs))
            trainer = open_trainer(args, scratch)
            scores = Rewards(
                *(t.cpu().double() if isinstance(t, Tensor) else t for t in reward_pairs(trainer))
            )
            print("\n".join(told(trainer, scores, args.worst)))
            if args.output:
                write_rewards(trainer, scores, args.output)
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
