"""Find a row's prompt, chosen and rejected under their names, check them, and tell them apart.

    text            {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    conversations   lists of {"role": ..., "content": ...}, or of {"from": ..., "value": ...}
    implicit        chosen and rejected begin alike: what they share is the prompt
"""

import json
import math
from decimal import Decimal
from typing import Any

from parts.forms import HINT, convert_hint, lost_prompt
from parts.rows import NEEDS, DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
FROM_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}
FROM_ROLES |= {role: role for role in ROLES}
REASONING = ("reasoning_content", "thinking", "reasoning")
RATINGS = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
)


# Messages


def parse_message(message: Any, where: str) -> dict:
    """Return a message in role/content form. Raises DataError naming what was found."""
    if not isinstance(message, dict):
        what = f"{where} is a {type(message).__name__}"
        raise DataError(f'{what}; a message is {{"role": ..., "content": ...}}')
    message = with_role(message, where)
    role = message.get("role")
    content = message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    is_text = isinstance(content, str)
    is_parts = isinstance(content, list) and all(isinstance(part, dict | str) for part in content)
    only_calls = content is None and message.get("tool_calls")
    if not (is_text or is_parts or only_calls):
        kind = type(content).__name__
        raise DataError(f"{where} has a content of type {kind}; give text or a list of parts")
    return message


def with_role(message: dict, where: str) -> dict:
    """Turn {"from": "human", "value": ...} into {"role": "user", "content": ...}; leave others."""
    if "from" not in message or "role" in message:
        return message
    sender = message["from"]
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if sender == "function_call":
        calls = parse_tool_calls(message.get("value"), where)
        return {"role": "assistant", "tool_calls": calls, **rest}
    if not isinstance(sender, str) or sender not in FROM_ROLES:
        known = ", ".join([*FROM_ROLES, "function_call"])
        raise DataError(f"{where} is from {sender!r}; known are {known}")
    return {"role": FROM_ROLES[sender], "content": message.get("value"), **rest}


def parse_tool_calls(value: Any, where: str) -> list[dict]:
    """Parse a "function_call" turn: JSON of one {"name", "arguments"} or of a list of them."""
    try:
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, TypeError, KeyError):
        form = '{"name": ..., "arguments": ...}'
        raise DataError(f"{where} is no function call; it must be JSON {form}") from None
    return [{"type": "function", "function": function} for function in functions]


def parse_turns(row: dict, key: str) -> str | list[dict]:
    """Return row[key] as text or as a list of messages (a single message is a list of one)."""
    if key not in row:
        raise DataError(f'"{key}" is missing; {NEEDS}{convert_hint(row)}')
    value = row[key]
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f'"{key}" is {kind}; it must be text or a list of messages')
    return [parse_message(message, f'"{key}"[{i}]') for i, message in enumerate(messages)]


# Prompt and completions


def common_prefix_length(left: Any, right: Any) -> int:
    """Count the first tokens, characters or messages that are equal."""
    shortest = min(len(left), len(right))
    if left[:shortest] == right[:shortest]:  # the usual case, at C's speed
        return shortest
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split texts or conversations that begin alike into (prompt, chosen, rejected): TRL's rule.

    The completions begin at the first character (or message) that differs, or at the space before
    it, since tokens carry the space in front of a word. Where one begins the other, its last
    character (message) is its completion.
    """
    at = common_prefix_length(chosen, rejected)
    shortest = min(len(chosen), len(rejected))
    if at > 0 and (at == shortest or chosen[at - 1] == " "):
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def split_row(row: dict, need_rejected: bool) -> tuple[Any, Any, Any]:
    """Return (prompt, chosen, rejected) as texts or lists of messages.

    rejected is None where it is neither there nor needed. Raises DataError for what does not fit
    together.
    """
    key = next((key for key in ("prompt", "conversations") if key in row), None)
    optional = not need_rejected and key and "rejected" not in row
    chosen = parse_turns(row, "chosen")
    rejected = None if optional else parse_turns(row, "rejected")
    if rejected is not None and type(chosen) is not type(rejected):
        what = "one of chosen and rejected is text, the other a conversation"
        raise DataError(f"{what}; make them alike: {HINT}")
    if chosen == rejected:
        what = "chosen and rejected are the same"
        raise DataError(f"{what}; there is no preference to learn, remove the row")
    if key is None:
        return implicit_prompt(row, chosen, rejected)
    prompt = parse_turns(row, key)
    if type(prompt) is type(chosen):
        return prompt, chosen, rejected
    # A text prompt beside complete conversations repeats their start, which is then the prompt.
    are_complete = isinstance(chosen, list) and rejected is not None and chosen[:1] == rejected[:1]
    if not (isinstance(prompt, str) and are_complete):
        what = "one of prompt and chosen is text, the other a conversation"
        raise DataError(f"{what}; make them alike: {HINT}")
    return extract_prompt(chosen, rejected)


def implicit_prompt(row: dict, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return what chosen and rejected share as the prompt, and the rest of each.

    Raises DataError where they share nothing, or the prompt stands under another name: it would
    be left out of the pair.
    """
    name = lost_prompt(row)
    if name is not None:
        raise DataError(f'"prompt" is missing, but "{name}" is there; {HINT}')
    prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if not prompt:
        what = "the prompt is empty: \"prompt\" is missing, and chosen and rejected share no beginning"
        raise DataError(f"{what}; {NEEDS}{convert_hint(row)}")
    return prompt, chosen, rejected


def is_empty(completion: str | list[dict]) -> bool:
    """Tell whether there is no text, no message, or a last message that says and calls nothing."""
    if isinstance(completion, str) or not completion:
        return not completion
    return not any(completion[-1].get(key) for key in ("content", "tool_calls", *REASONING))


def find_ratings(row: dict) -> dict[str, Any]:
    """Return the row's scores as they stand, by their keys; {} where it has none."""
    named = (keys for keys in RATINGS if keys[0] in row or keys[1] in row)
    return {key: row.get(key) for key in next(named, ())}


def parse_rating(score: Any) -> float:
    """Return a score as a float, nan for anything but a finite number in float32's range."""
    if isinstance(score, bool) or not isinstance(score, int | float | Decimal):
        return math.nan
    try:
        number = float(score)
    except OverflowError:
        return math.nan
    return number if abs(number) < 1e38 else math.nan


def parse_ratings(row: dict) -> tuple[float, float]:
    """Return the row's (chosen, rejected) scores, nan where a loss could not read them."""
    chosen, rejected = map(parse_rating, find_ratings(row).values() or (None, None))
    return chosen, rejected


def describe_ratings(row: Any) -> str:
    """Say what a row has in place of the two scores that a loss reads."""
    found = find_ratings(row) if isinstance(row, dict) else {}
    missing = [key for key, score in found.items() if score is None]
    for key, score in found.items():
        if score is not None and math.isnan(parse_rating(score)):
            return f'"{key}" is {repr(score)[:40]}; a score is a finite number'
    if len(missing) == 1:
        return f'"{missing[0]}" is missing'
    return "no chosen_score and rejected_score"
