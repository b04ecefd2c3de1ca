"""Make preference pairs of a model's own answers: the best and the worst of each prompt.

    python -m extras.chat OUT --prompts FILE --num_samples 4 --output answers.jsonl
    python -m extras.judge answers.jsonl --command "python judge.py" --output pairs.jsonl
    python -m extras.judge answers.jsonl --reward OUT --output pairs.jsonl

The judge is any command: it reads rows of answers.jsonl, one a line, on standard input (those with
an answer that is finished and not empty; paths of images absolute), and prints one number for
each, higher for better. --reward judges by the implicit reward of a trained policy instead
(extras.score). Pairs have both scores, as chosen_score and rejected_score.

Left out are answers that were cut off by their length, empty ones, and those whose score is nan;
then prompts of which no two answers have different scores. docs/rounds.md trains in rounds.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from extras import score
from extras.rows.written import absolute, mover, prompt_fields, with_paths
from parts.output import check_apart, write_atomically
from parts.ranks import ending_ranks
from parts.rows import DataError, find_files, read_rows
from parts.screen import escape_unknown


class Answer(NamedTuple):
    """A row of extras.chat's output."""

    place: str  # file and line
    row: dict[str, Any]

    @property
    def prompt(self) -> str:  # of text or of messages, and what belongs to it
        return json.dumps([self.row["prompt"], prompt_fields(self.row)], sort_keys=True)

    @property
    def text(self) -> str:
        """Return what the model wrote: the completion, or its last message."""
        completion = self.row["completion"]
        return completion if isinstance(completion, str) else completion[-1]["content"]

    @property
    def is_usable(self) -> bool:
        return bool(self.text.strip()) and self.row.get("finished", True)


def read_answers(path: str) -> list[Answer]:
    """Return the rows of a file. Raises DataError for one that extras.chat would not write."""
    found = []
    for place, row in read_rows(find_files(path)):
        if isinstance(row, DataError):
            raise DataError(f"{place}: {row}")
        missing = [name for name in ("prompt", "completion") if name not in row]
        if missing:
            raise DataError(
                f"{place}: no {missing[0]!r}; give the --output of extras.chat --prompts")
        folder = Path(place.rpartition(":")[0]).parent
        answer = Answer(place, with_paths(row, partial(absolute, folder=folder)))
        try:
            is_text = isinstance(answer.text, str)
        except (KeyError, IndexError, TypeError):
            is_text = False
        if not is_text:
            raise DataError(f"{place}: \"completion\" is neither text nor messages")
        found.append(answer)
    if not found:
        raise DataError(f"{path}: no answers")
    return found


# Judges: each returns a score for every answer, nan for none


def by_command(command: str, answers: Sequence[Answer]) -> list[float]:
    """Run a command of the user's. Raises ValueError if it fails, or does not print the scores."""
    lines = "".join(json.dumps(answer.row, ensure_ascii=False) + "\n" for answer in answers)
    words = shlex.split(command)
    if not words:
        raise ValueError("--command is empty; name a program")
    done = subprocess.run(
        words, input=lines.encode(), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ValueError(f"--command {command}: exit status {done.returncode}")
    printed = done.stdout.decode(errors="replace").split()
    if len(printed) != len(answers):
        raise ValueError(
            f"--command {command}: it printed {len(printed)} words for {len(answers)} answers; "
            "print one number for each")
    scores = []
    for answer, word in zip(answers, printed):
        try:
            scores.append(float(word))
        except ValueError:
            raise ValueError(
                f"--command {command}: {word!r} for {answer.place}: expected a number") from None
    return scores


def by_reward(args: argparse.Namespace, answers: Sequence[Answer]) -> list[float]:
    """Return beta log(pi(y|x) / ref(y|x)) of each answer, as extras.score computes it.

    It scores pairs, so answers of a prompt are scored two by two.
    """
    wanted = two_by_two(answers)
    scores = [math.nan] * len(answers)
    if not wanted:
        return scores
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        rows = [pair_of(answers[a], answers[b]) for a, b in wanted]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        words = [args.reward, str(pairs), "--on_bad_row", "skip"]
        words += ["--batch_size", str(args.batch_size)]
        words += ["--ref", args.ref] if args.ref else []
        words += ["--use_cpu"] if args.use_cpu else []
        words += ["--cache_dir", f"{scratch}/cache"]
        trainer = score.open_trainer(score.parse(words), f"{scratch}/out")
        rewards = score.reward_pairs(trainer)
    for i, values in enumerate(zip(rewards.chosen.tolist(), rewards.rejected.tolist())):
        line = int(trainer.train_store.where(i).rpartition(":")[2])
        for answer, value in zip(wanted[line - 1], values):
            scores[answer] = value
    return scores


def two_by_two(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """Pair the answers of each prompt, so that each is in a pair; none that has no other."""
    groups: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        groups.setdefault(answer.prompt, []).append(i)
    found = []
    for members in groups.values():
        texts = {answers[i].text: i for i in members}
        distinct = list(texts.values())
        if len(distinct) > 1:
            distinct += distinct[:1] if len(distinct) % 2 else []
            found += zip(distinct[::2], distinct[1::2])
    return found


# Pairs


def pair_of(chosen: Answer, rejected: Answer) -> dict[str, Any]:
    return {
        **prompt_fields(chosen.row),
        "prompt": chosen.row["prompt"],
        "chosen": chosen.row["completion"],
        "rejected": rejected.row["completion"]}


def best_and_worst(answers: Sequence[Answer], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return a pair of each prompt, in the order of the prompts; none where all scores are one."""
    groups: dict[str, list[tuple[float, Answer]]] = {}
    for answer, value in zip(answers, scores):
        members = groups.setdefault(answer.prompt, [])
        if not math.isnan(value):
            members.append((value, answer))
    pairs = []
    for members in groups.values():
        ordered = sorted(members, key=lambda member: member[0])
        if ordered and ordered[0][0] < ordered[-1][0]:
            (low, worst), (high, best) = ordered[0], ordered[-1]
            more = {"chosen_score": high, "rejected_score": low}
            pairs.append(pair_of(best, worst) | more)
    return pairs


# The command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extras.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("answers", help="what extras.chat --prompts wrote: a file, glob or directory")
    add("--output", required=True, help="JSONL file for the pairs")
    add("--command", help="a program that reads rows and prints a number for each")
    add("--reward", help="output directory of a run, or a model, whose implicit reward judges")
    add("--ref", help="the reference of that reward [the one of the run; an adapter's base]")
    add("--batch_size", type=int, default=8, help="pairs in one forward of --reward [8]")
    add("--use_cpu", action="store_true", help="even if there is a GPU")
    return parser


def judge(args: argparse.Namespace) -> None:
    """Read answers, have them judged, write pairs, and say how many."""
    if bool(args.command) == bool(args.reward):
        raise ValueError("give --command or --reward: one judge")
    check_apart("--output", args.output, find_files(args.answers))
    found = read_answers(args.answers)
    answers = [answer for answer in found if answer.is_usable]
    if args.command:
        scores = by_command(args.command, answers)
    else:
        scores = by_reward(args, answers)
    pairs = best_and_worst(answers, scores)
    if not pairs:
        raise ValueError(
            f"{args.answers}: no prompt has two finished answers with different scores; give "
            "extras.chat a larger --num_samples, --max_new_tokens or --temperature")
    moved = mover(Path("/"), Path(args.output).parent)
    rows = [with_paths(pair, moved) for pair in pairs]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(Path(args.output), lines.encode())
    judged = [value for value in scores if not math.isnan(value)]
    prompts = len({answer.prompt for answer in found})
    print(
        f"{args.output}: {len(pairs):,} pairs of {prompts:,} prompts; {len(judged):,} answers "
        f"judged, mean {sum(judged) / len(judged):+.3f}, of {len(found):,}")


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Return exit status 2, with one message, for what cannot be read, run or judged."""
    args = make_parser().parse_args(argv)
    escape_unknown()
    with ending_ranks():
        try:
            judge(args)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
