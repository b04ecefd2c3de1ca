"""Preference rows in the forms of others -> prompt, chosen, rejected: python -m extras.convert IN OUT

    LLaMA-Factory   conversations (or messages), or instruction, input, history, system; with chosen, rejected
    HH-RLHF         chosen and rejected are whole dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ..."
    Argilla         instruction (or input, prompt) with chosen_response, rejected_response and their ratings; whole
                    conversations; generations with ratings (best against worst); annotated records
                    (the majority)

IN is any file that dpo.py reads: .jsonl, .json, gzipped, .parquet. OUT is JSON Lines of
conversations, gzipped where its name ends in .gz; --plain writes text, for models without a chat
template. Each row's form is known by its keys. What says nothing (equal answers, ratings or votes)
is bad, and stops the conversion unless --on_bad_row skip.
"""

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from parts.rows import DataError, find_files, read_rows
from parts.turns import from_value_message

Row = dict[str, Any]
TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
KEPT = ("images", "tools", "chat_template_kwargs")  # that the trainer reads too
KNOWN = "LLaMA-Factory's (conversations, instruction), HH's dialogues, Argilla's (chosen_response, generations, fields)"


def convert(row: Row) -> Row:
    """prompt, chosen, rejected as messages, with scores, of a row in any form. Raises DataError."""
    if isinstance(row.get("fields"), dict):
        out = from_record(row)
    elif isinstance(row.get("generations"), list) and row.get("chosen") is None:
        out = from_generations(row)
    elif "chosen_response" in row:
        out = alike(row, row["chosen_response"], row.get("rejected_response"))
    elif "conversations" in row or "messages" in row:
        asked = row.get("conversations", row.get("messages"))
        out = alike(row | {"prompt": asked}, row.get("chosen"), row.get("rejected"))
    elif isinstance(row.get("chosen"), str) and TURN.match(row["chosen"]) and question(row) is None:
        out = from_dialogues(row)
    elif "chosen" in row:
        out = alike(row, row["chosen"], row.get("rejected"))
    else:
        raise DataError(f"its keys ({', '.join(row)}) are of no form that is known: {KNOWN}")
    if out["chosen"] == out["rejected"]:
        raise DataError("chosen and rejected are the same")
    return out | scores(row, out) | {key: row[key] for key in KEPT if row.get(key)}


def message(value: Any, role: str) -> Row:
    """A turn as role and content, from text, from/value or role/content."""
    if isinstance(value, str):
        return {"role": role, "content": value}
    if isinstance(value, dict) and "from" in value:
        return from_value_message(value, "a turn")
    if isinstance(value, dict) and "role" in value:
        return {key: part for key, part in value.items() if part is not None}
    raise DataError(
        f"found {json.dumps(value)[:60]} for the turn of the {role}; give text, from/value or role/content"
    )


def turns(value: Any, role: str) -> list[Row]:
    return (
        [message(one, role) for one in value] if isinstance(value, list) else [message(value, role)]
    )


def question(row: Row) -> Any:
    """What is asked: under one of four names; `input` goes below an instruction, as in Alpaca."""
    if row.get("prompt") is not None:
        return row["prompt"]
    asked = row.get("instruction") or row.get("question")
    return f"{asked}\n{row['input']}" if asked and row.get("input") else asked or row.get("input")


def alike(row: Row, chosen: Any, rejected: Any) -> Row:
    """Prompt and two answers. Answers that begin with the prompt (whole conversations) lose it."""
    if not chosen or not rejected:
        raise DataError(f'"{"rejected" if chosen else "chosen"}" is missing or empty')
    answers = [turns(chosen, "assistant"), turns(rejected, "assistant")]
    shared = next((i for i, (a, b) in enumerate(zip(*answers)) if a != b), min(map(len, answers)))
    if answers[0][0]["role"] != "assistant" and shared:  # whole conversations
        return {
            "prompt": answers[0][:shared],
            "chosen": answers[0][shared:],
            "rejected": answers[1][shared:],
        }
    asked = question(row)
    if not asked:
        raise DataError("no prompt, instruction, question or input")
    prompt = turns(asked, "user")
    for user, assistant in reversed(row.get("history") or []):
        prompt = [message(user, "user"), message(assistant, "assistant"), *prompt]
    if row.get("system") and prompt[0]["role"] != "system":
        prompt = [message(row["system"], "system"), *prompt]
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def from_dialogues(row: Row) -> Row:
    """HH: the turns that both dialogues begin with are the prompt."""
    chosen, rejected = (dialogue(name, row.get(name)) for name in ("chosen", "rejected"))
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
        min(len(chosen), len(rejected)),
    )
    for name, turn in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if not shared or not turn or turn[0]["role"] != "assistant":
            raise DataError(
                f"{name} and the other dialogue do not part at an answer of the assistant"
            )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def dialogue(name: str, text: Any) -> list[Row]:
    if not isinstance(text, str) or not TURN.match(text):
        raise DataError(f'"{name}" is no dialogue that begins with "\\n\\nHuman:"')
    pieces = TURN.split(text)[1:]
    found = [
        {"role": HH_ROLES[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2])
    ]
    if found[-1]["role"] != "assistant" or not found[-1]["content"]:
        raise DataError(f'"{name}" does not end with an answer of the assistant')
    return found


def from_generations(row: Row) -> Row:
    """distilabel: the best rated of several answers against the worst."""
    ratings = row.get("ratings") or row.get("rating") or []
    rated = [
        (r, text)
        for r, text in zip(ratings, row["generations"])
        if isinstance(r, (int, float)) and text
    ]
    best, worst = (
        (max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])) if rated else (None, None)
    )
    if best is None or worst is None or best[0] == worst[0]:
        raise DataError(f"its {len(rated)} rated generations do not differ in rating")
    return alike(row, best[1], worst[1]) | {"chosen_score": best[0], "rejected_score": worst[0]}


def from_record(row: Row) -> Row:
    """An annotated Argilla record: two text fields and a question whose answer is the name of the better one."""
    fields = row["fields"]
    asked = next(
        (fields[name] for name in ("prompt", "instruction", "question") if name in fields), None
    )
    votes = Counter(
        one.get("value")
        for answers in (row.get("responses") or {}).values()
        for one in answers
        if one.get("value") in fields
    )
    if not votes:
        votes = Counter(
            one.get("value")
            for one in (row.get("suggestions") or {}).values()
            if one.get("value") in fields
        )
    ranked = votes.most_common(2)
    if not ranked or len({count for _, count in ranked}) < len(ranked):
        raise DataError(f"its annotators name no better answer ({dict(votes) or 'no votes'})")
    better = ranked[0][0]
    stem = lambda name: re.sub(r"\W*\d+$", "", name)
    others = [name for name in fields if name != better and stem(name) == stem(better)]
    if len(others) != 1:
        raise DataError(f"it has {len(others)} answers beside {better!r}; one is expected")
    return alike({"prompt": asked}, fields[better], fields[others[0]])


def scores(row: Row, out: Row) -> Row:
    """chosen_score and rejected_score, under the names that are in use; `rating` of Argilla's Orca pairs is both."""
    for pattern in ("{}_score", "score_{}", "{}-rating", "{}_rating", "{}_avg_rating"):
        found = {f"{name}_score": row.get(pattern.format(name)) for name in ("chosen", "rejected")}
        if all(isinstance(score, (int, float)) for score in found.values()):
            return found
    rating = row.get("rating")
    if (
        isinstance(rating, list)
        and len(rating) == 2
        and "generations" in row
        and "chosen_score" not in out
    ):
        if all(isinstance(score, (int, float)) for score in rating):
            return {"chosen_score": max(rating), "rejected_score": min(rating)}
    return {}


def plain(row: Row) -> Row:
    """A converted row as text: HH's form, in which a prompt ends with "\\n\\nAssistant:"."""
    speaker = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    text = lambda said: "".join(
        speaker.get(t["role"], f"\n\n{t['role']}: ") + str(t["content"]) for t in said
    )
    answers = {
        name: text(row[name]).removeprefix("\n\nAssistant:") for name in ("chosen", "rejected")
    }
    return row | {"prompt": text(row["prompt"]) + "\n\nAssistant:", **answers}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 2, with one message, on rows that cannot be converted."""
    parser = argparse.ArgumentParser(
        prog="extras.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="file, glob or directory")
    parser.add_argument("output", help=".jsonl or .jsonl.gz")
    parser.add_argument("--plain", action="store_true", help="text instead of conversations")
    parser.add_argument(
        "--on_bad_row", choices=["stop", "skip"], default="stop", help="skip counts and lists them"
    )
    args = parser.parse_args(argv)
    try:
        written, bad = write(
            find_files(args.input), Path(args.output), args.plain, args.on_bad_row == "stop"
        )
    except (DataError, OSError) as error:
        print(f"extras.convert: {error}", file=sys.stderr)
        return 2
    print(
        "\n".join(
            [
                f"{args.output}: {written:,} rows, {len(bad):,} skipped",
                *(f"skipped {one}" for one in bad[:100]),
            ]
        )
    )
    return 0


def write(files: list[Path], output: Path, as_text: bool, stop: bool) -> tuple[int, list[str]]:
    """Convert files into one; how many rows were written, and what was wrong with the others, or DataError if `stop`."""
    if output.resolve() in [file.resolve() for file in files]:
        raise DataError(f"{output}: the input would be overwritten; give another name")
    written, bad = 0, []
    scratch = output.with_name(f".{output.name}.part")
    try:
        with (gzip.open if output.suffix == ".gz" else open)(
            scratch, "wt", encoding="utf-8"
        ) as stream:
            for place, row in read_rows(files):
                try:
                    if isinstance(row, DataError):
                        raise row
                    done = convert(row)
                    stream.write(
                        json.dumps(plain(done) if as_text else done, ensure_ascii=False) + "\n"
                    )
                    written += 1
                except DataError as error:
                    if stop:
                        raise DataError(
                            f"{place}: {error}; --on_bad_row skip leaves such rows out"
                        ) from None
                    bad.append(f"{place}: {error}")
        if not written:
            raise DataError(f"no row could be converted; the first is {(bad or ['missing'])[0]}")
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)
    return written, bad


if __name__ == "__main__":
    sys.exit(main())
