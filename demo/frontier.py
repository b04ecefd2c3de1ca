"""Draw the DPO paper's reward-KL frontier (arXiv:2305.18290, figure 2, left) for the demo.

    python -m demo.frontier    prints a table, writes docs/frontier.svg and .json; minutes

Every run starts from demo/model and learns from demo/train.jsonl; four times during it, it answers
held-out prompts. Reward is the demo's rule (`net_praise`), which no run sees: only which of two
answers was preferred. KL(pi || ref) is in nats per answer, the mean over answers y ~ pi of
sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t)): it has the expectation of log pi(y|x) - log ref(y|x),
with far less noise.

Two curves to compare with need only the base model's answers: best of n, whose KL is at most
log n - (n-1)/n, and the optimum of max E[r] - beta KL, which is ref(y|x) exp(r(x, y)/beta)/Z(x)
(eq. 4): no policy lies above it.
"""

import argparse
import io
import json
import math
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dpo
import model as models
from data import Tokenizer
from extras.decoder.generate import Sampling, complete
from extras.watch.chart import COLOURS, Line, legend, panel, picture
from extras.watch.demo import net_praise
from parts.screen import escape_unknown

DEMO = Path(__file__).resolve().parent
DOCS = DEMO.parent / "docs"
PROMPTS = 100  # held-out ones, behind every point of a run
ANSWERS = 4  # to each prompt
BASE_ANSWERS = 64  # of the base model to each, behind best of n and the optimum
MARKS = (0.125, 0.25, 0.5, 1.0)  # shares of a run at which it is measured
N = (2, 4, 8, 16)
OPTIMA = (8.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.85)  # beta; below, 64 answers are too few

# (label, loss, beta, options). The betas of hinge and ipo mean other things: their ranges differ.
RUNS = [("DPO", "sigmoid", beta, {}) for beta in (0.1, 0.5, 1.0, 2.0, 5.0)]
RUNS += [("IPO", "ipo", beta, {"ipo_average": "sum"}) for beta in (0.05, 0.2)]
RUNS += [("hinge (SLiC)", "hinge", beta, {}) for beta in (0.5, 2.0)]
RUNS += [("APO-zero", "apo_zero", beta, {}) for beta in (0.5, 2.0)]
RUNS += [("SFT on chosen", "sft", 0.1, {"num_train_epochs": 3.0})]  # longer: it moves least
STYLE = {
    "DPO": COLOURS[0],
    "IPO": COLOURS[2],
    "hinge (SLiC)": COLOURS[4],
    "APO-zero": COLOURS[3],
    "SFT on chosen": COLOURS[1],
}


class Point(NamedTuple):
    """A policy: KL to the reference, nats per answer, and mean reward, with standard errors."""

    method: str
    beta: float
    step: int
    kl: float
    reward: float
    kl_error: float
    reward_error: float


def held_out(count: int) -> list[str]:
    lines = (DEMO / "eval.jsonl").read_text("utf-8").splitlines()[:count]
    return [json.loads(line)["prompt"] for line in lines]


# Measuring a policy


@torch.no_grad()
def answer_logits(
    model: models.Decoder, prompt: list[int], answer: list[int]
) -> Tensor:  # (len(answer), V)
    ids = torch.tensor(prompt + answer)
    n = len(ids)
    rows = torch.arange(len(prompt) - 1, n - 1)
    return model.logits(ids, torch.arange(n), torch.tensor([[0, n, 0, 0]], dtype=torch.int32), rows)


def answer_kl(
    model: models.Decoder, ref: models.Decoder, prompt: list[int], answer: list[int]
) -> float:
    """Compute sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t)) along one answer, nats."""
    pi, base = (answer_logits(m, prompt, answer).log_softmax(-1) for m in (model, ref))
    return float((pi.exp() * (pi - base)).sum())


def sampled(
    model: models.Decoder, tokenizer: Tokenizer, prompts: list[str], samples: int, seed: int
) -> tuple[list, list]:
    """Sample answers; return token ids of the (prompts) and of the (prompts x samples) answers."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    o = Sampling(seed=seed, max_new_tokens=96, stop_ids=frozenset({tokenizer.eos_token_id}))
    found = []
    together = max(1, 256 // samples)  # prompts in one call
    for at in range(0, len(ids), together):
        found += complete(model, ids[at : at + together], o, samples, first=at * samples)
    return ids, found


def rewards(tokenizer: Tokenizer, answers: list[list[int]]) -> list[float]:
    return [net_praise(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Compute the mean and its standard error over prompts: answers to one are not independent."""
    groups = torch.tensor(values, dtype=torch.float64).view(-1, ANSWERS).mean(1)
    return float(groups.mean()), float(groups.std() / len(groups) ** 0.5)


def measure(
    model: models.Decoder,
    ref: models.Decoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    label: str,
    beta: float,
    step: int,
) -> Point:
    ids, answers = sampled(model, tokenizer, prompts, ANSWERS, seed=2)
    kl, kl_error = mean_and_error(
        [answer_kl(model, ref, ids[i // ANSWERS], a) for i, a in enumerate(answers)]
    )
    reward, reward_error = mean_and_error(rewards(tokenizer, answers))
    return Point(label, beta, step, kl, reward, kl_error, reward_error)


# The runs


def run(
    label: str,
    loss: str,
    beta: float,
    options: dict,
    ref: models.Decoder,
    prompts: list[str],
    scratch: Path,
    max_steps: int,
) -> list[Point]:
    """Train one epoch of the demo with this loss and measure it at MARKS; else demo settings."""
    settings = (
        vars(dpo.parse_config([]))
        | {
            "loss_type": [loss],
            "beta": beta,
            "num_train_epochs": 1.0,
            "max_steps": max_steps,
            "eval_dataset_name": None,
            "eval_strategy": "no",
            "output_dir": str(scratch / "out"),
            "cache_dir": str(scratch),
            "use_cpu": True,
        }
        | options
    )
    with redirect_stdout(io.StringIO()):  # else each run prints the same report on the same pairs
        trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**settings))
    trainer.reference.prepare()
    trainer.make_optimizer()
    total = trainer.schedule.total_steps
    marks = {max(1, round(share * total)) for share in MARKS}
    points = []
    while trainer.position.step < total:
        trainer.train_step()
        if trainer.position.step in marks:
            points.append(
                measure(
                    trainer.model,
                    ref,
                    trainer.tokenizer,
                    prompts,
                    label,
                    beta,
                    trainer.position.step,
                )
            )
    return points


# What the base model alone can reach


def best_of(n: int, scores: Tensor) -> Point:
    """Compute the expected best of n draws, without replacement, from (P, K) rewards.

    The KL is the upper bound log n - (n-1)/n.
    """
    K = scores.shape[1]
    ascending = scores.sort(1).values
    chance = torch.tensor(
        [math.comb(i, n - 1) / math.comb(K, n) for i in range(K)], dtype=torch.float64
    )
    means = ascending @ chance
    return Point(
        f"best of {n}",
        n,
        0,
        math.log(n) - (n - 1) / n,
        float(means.mean()),
        0.0,
        float(means.std() / len(means) ** 0.5),
    )


def optimum(beta: float, scores: Tensor) -> Point:
    """Compute the optimum ref(y|x) exp(r/beta) / Z(x), eq. 4, by weighing the base's answers.

    r is the demo's rule; KL = E[r]/beta - log Z.
    """
    weights = (scores / beta).softmax(1)
    means = (weights * scores).sum(1)
    kl = means / beta - ((scores / beta).logsumexp(1) - math.log(scores.shape[1]))
    return Point(
        "optimum",
        beta,
        0,
        float(kl.mean()),
        float(means.mean()),
        float(kl.std() / len(kl) ** 0.5),
        float(means.std() / len(means) ** 0.5),
    )


def base_points(ref: models.Decoder, tokenizer: Tokenizer, prompts: list[str]) -> list[Point]:
    _, answers = sampled(ref, tokenizer, prompts, BASE_ANSWERS, seed=1)
    scores = torch.tensor(rewards(tokenizer, answers), dtype=torch.float64).view(
        len(prompts), BASE_ANSWERS
    )
    start = Point(
        "base",
        0.0,
        0,
        0.0,
        float(scores.mean()),
        0.0,
        float(scores.mean(1).std() / len(prompts) ** 0.5),
    )
    return [start, *(best_of(n, scores) for n in N), *(optimum(beta, scores) for beta in OPTIMA)]


# Table and picture


def table(points: list[Point]) -> str:
    rows = ["| method | beta or n | steps | KL, nats | reward |", "|---|---|---|---|---|"]
    rows += [
        f"| {p.method} | {p.beta:g} | {p.step} | {p.kl:.2f} ± {p.kl_error:.2f} | "
        f"{p.reward:+.2f} ± {p.reward_error:.2f} |"
        for p in points
    ]
    return "\n".join(rows)


def draw(points: list[Point]) -> str:
    """Draw reward over the square root of KL, in which it first rises linearly; a dot a policy."""
    of = lambda name: sorted((p.kl**0.5, p.reward) for p in points if p.method.startswith(name))
    start = of("base")
    lines = [
        Line("the optimum, eq. 4", start + of("optimum"), "#999999"),
        Line("best of 2, 4, 8, 16", start + of("best of"), "#999999", "4 3", marks=True),
    ]
    lines += [
        Line(name, of(name), colour, marks=True, joined=name == "SFT on chosen")
        for name, colour in STYLE.items()
    ]
    lines.append(Line("the base model", start, "#000000", marks=True, joined=False))
    across = [(kl**0.5, f"{kl:g}") for kl in (0, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7)]
    parts = panel(
        "Reward against KL to the reference, held-out prompts",
        lines,
        "KL(policy || reference), nats per answer (drawn at its square root)",
        760,
        460,
        "mean reward (praise minus blame)",
        x_ticks=across,
    )
    return picture(
        760, 460, "The reward-KL frontier of the demo", [*parts, *legend(lines, 560, 290)]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", default=str(DOCS), help="folder for frontier.svg and frontier.json [docs]"
    )
    parser.add_argument(
        "--max_steps", type=int, default=-1, help="of each run; -1 is one epoch [-1]"
    )
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help=f"held-out prompts [{PROMPTS}]"
    )
    args = parser.parse_args(argv)
    escape_unknown()
    prompts = held_out(args.prompts)
    started = time.perf_counter()
    ref = models.load_model(DEMO / "model").eval()
    tokenizer = Tokenizer.load(DEMO / "model")
    points = base_points(ref, tokenizer, prompts)
    with tempfile.TemporaryDirectory() as scratch:
        for label, loss, beta, options in RUNS:
            points += run(label, loss, beta, options, ref, prompts, Path(scratch), args.max_steps)
            print(
                f"{time.perf_counter() - started:5.0f} s  {table(points[-1:]).splitlines()[-1]}",
                flush=True,
            )
    print(table(points))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "frontier.svg").write_text(draw(points) + "\n", encoding="utf-8")
    (output / "frontier.json").write_text(
        json.dumps([p._asdict() for p in points], indent=1) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
