"""Find the better and the worse of several answers to one prompt, for extras.convert.

    several answers   UltraFeedback (completions), Nectar (answers, by rank), NeMo (completions, by
                      rank), distilabel (generations, ratings), candidates or responses with scores
    two answers       PKU-SafeRLHF (response_0, response_1), HelpSteer2 and 3 (response_1, response1,
                      ...), SHP (human_ref_A, human_ref_B), Arena (conversation_a, conversation_b)
    annotations       records of Argilla: text fields, and votes that name the better one
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from parts.rows import DataError

Row = dict[str, Any]
LISTS = ("generations", "completions", "answers", "responses", "candidates", "outputs")
TEXTS = ("response", "answer", "completion", "generation", "text", "content")
SCORES = ("fine-grained_score", "overall_score", "score", "rating", "reward")
SCORE_LISTS = ("ratings", "rating", "scores", "rewards")
RANK_LISTS = ("ranks", "rank", "ranking")

# Two answers, the key of the verdict, and the verdicts for the first and the second.
DUELS = (
    ("response_0", "response_1", "better_response_id", (0, 1)),
    ("response_0", "response_1", "safer_response_id", (0, 1)),
    ("human_ref_A", "human_ref_B", "labels", (1, 0)),
    ("conversation_a", "conversation_b", "winner", ("model_a", "model_b")),
)
STRENGTHS = (  # below 0 for the first, above for the second
    ("response1", "response2", "overall_preference"),
    ("response_1", "response_2", "preference_strength"),
)


class Rated(NamedTuple):
    """An answer, how good it is, and whether that is a score of the row (rather than a rank)."""

    value: float
    answer: Any
    is_score: bool


class Found(NamedTuple):
    """Two answers to one prompt, with their scores where the row has some."""

    chosen: Any
    rejected: Any
    scores: Row


def pairs_of(row: Row, every: bool) -> Iterator[Found] | None:
    """Find the pairs of a row with several answers: the best with the worst, or `every` pair.

    None where the row is in no such form. Raises DataError where nothing says which is better.
    """
    if isinstance(row.get("fields"), dict):
        return iter([from_record(row)])
    duel = from_duel(row)
    if duel is not None:
        return iter([duel])
    name = next((n for n in LISTS if isinstance(row.get(n), list)), None)
    return None if name is None else from_ranking(row, name, every)


# Several answers


def from_ranking(row: Row, name: str, every: bool) -> Iterator[Found]:
    rated = sorted(rate(row, name), key=lambda one: one.value, reverse=True)
    if len({one.value for one in rated}) < 2:
        what = "scores or ranks" if name != "generations" else "ratings"
        if rated:
            raise DataError(f"its {len(rated)} rated {name} do not differ in rating")
        raise DataError(
            f'"{name}" has {len(row[name])} answers without {what}: nothing says which is better')
    pairs = combinations(rated, 2) if every else [(rated[0], rated[-1])]
    return (found(a, b) for a, b in pairs if a.value > b.value)


def found(better: Rated, worse: Rated) -> Found:
    scores = {"chosen_score": better.value, "rejected_score": worse.value}
    return Found(better.answer, worse.answer, scores if better.is_score else {})


def rate(row: Row, name: str) -> list[Rated]:
    """List the answers that have a score or a rank, each with a value that is higher for better."""
    out = []
    lists = [(key, row[key]) for key in SCORE_LISTS + RANK_LISTS if isinstance(row.get(key), list)]
    for index, one in enumerate(row[name]):
        answer = one
        values = [(key, given[index]) for key, given in lists if index < len(given)]
        if isinstance(one, dict) and "role" not in one:
            answer = next((one[key] for key in TEXTS if one.get(key)), None)
            values = [(key, one[key]) for key in SCORES + ("rank",) if key in one] + values
        values = [(key, number(value)) for key, value in values if number(value) is not None]
        if answer and values:
            key, value = values[0]
            is_rank = key in RANK_LISTS
            out.append(Rated(-value if is_rank else value, answer, not is_rank))
    return out


def number(value: Any) -> float | int | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


# Two answers


def from_duel(row: Row) -> Found | None:
    for a, b, verdict in STRENGTHS:
        if a in row and b in row and verdict in row:
            strength = number(row[verdict])
            if not strength:
                raise DataError(f'neither is better: "{verdict}" is {row[verdict]!r}')
            a, b = (a, b) if strength < 0 else (b, a)
            return Found(row[a], row[b], {})
    for a, b, verdict, (first, second) in DUELS:
        if a in row and b in row and row.get(verdict) is not None:
            if row[verdict] not in (first, second):
                raise DataError(f'neither is better: "{verdict}" is {row[verdict]!r}')
            a, b = (a, b) if row[verdict] == first else (b, a)
            return Found(row[a], row[b], {})
    return None


# Annotations


def from_record(row: Row) -> Found:
    """Take an annotated Argilla record: two text fields, and votes that name the better one."""
    fields = row["fields"]
    responses = (row.get("responses") or {}).values()
    named = [one.get("value") for answers in responses for one in answers]
    votes = Counter(name for name in named if name in fields)
    if not votes:
        named = [one.get("value") for one in (row.get("suggestions") or {}).values()]
        votes = Counter(name for name in named if name in fields)
    ranked = votes.most_common(2)
    if not ranked or len({count for _, count in ranked}) < len(ranked):
        raise DataError(f"its annotators name no better answer ({dict(votes) or 'no votes'})")
    better = ranked[0][0]
    stem = lambda name: re.sub(r"\W*\d+$", "", name)
    others = [name for name in fields if name != better and stem(name) == stem(better)]
    if len(others) != 1:
        raise DataError(f"it has {len(others)} answers beside {better!r}; expected one")
    return Found(fields[better], fields[others[0]], {})
