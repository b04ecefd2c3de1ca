"""Convert preference rows of other formats to ours: python -m extras.convert IN OUT

    LLaMA-Factory   conversations (or messages), or instruction, input, history, system;
                    with chosen, rejected
    HH-RLHF         chosen and rejected are whole dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ..."
    Argilla         instruction (or input, prompt) with chosen_response, rejected_response and
                    their ratings; full conversations; generations with ratings (best against
                    worst); annotated records (the majority)

IN is any file that dpo.py reads: .jsonl, .json, gzipped, .parquet. OUT is JSON Lines of
conversations, gzipped where its name ends in .gz; --plain writes text, for models without a chat
template. Each row's format is known by its keys. A row without a preference (equal answers, ratings
or votes) is bad, and stops the conversion unless --on_bad_row skip.
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
from parts.screen import escape_unknown
from parts.turns import from_value_message

Row = dict[str, Any]
TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
KEPT = ("images", "tools", "chat_template_kwargs")  # as they are: the trainer reads them
KNOWN = (
    "LLaMA-Factory's (conversations, instruction), HH's dialogues, "
    "Argilla's (chosen_response, generations, fields)"
)


def convert(row: Row) -> Row:
    """Convert a row of any format to prompt, chosen, rejected as messages, with scores.

    Raises DataError.
    """
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
    """Convert a turn (text, from/value or role/content) to role and content."""
    if isinstance(value, str):
        return {"role": role, "content": value}
    if isinstance(value, dict) and "from" in value:
        return from_value_message(value, "a turn")
    if isinstance(value, dict) and "role" in value:
        return {key: part for key, part in value.items() if part is not None}
    raise DataError(
        f"found {json.dumps(value)[:60]} for the turn of the {role}; "
        "give text, from/value or role/content"
    )


def turns(value: Any, role: str) -> list[Row]:
    values = value if isinstance(value, list) else [value]
    return [message(one, role) for one in values]


def question(row: Row) -> Any:
    """Find the question under one of four names; `input` follows an instruction, as in Alpaca."""
    if row.get("prompt") is not None:
        return row["prompt"]
    asked = row.get("instruction") or row.get("question")
    return f"{asked}\n{row['input']}" if asked and row.get("input") else asked or row.get("input")


def alike(row: Row, chosen: Any, rejected: Any) -> Row:
    """Make prompt and two answers; the prompt is cut off answers that are full conversations."""
    if not chosen or not rejected:
        raise DataError(f'"{"rejected" if chosen else "chosen"}" is missing or empty')
    answers = [turns(chosen, "assistant"), turns(rejected, "assistant")]
    shared = next((i for i, (a, b) in enumerate(zip(*answers)) if a != b), min(map(len, answers)))
    if answers[0][0]["role"] != "assistant" and shared:  # full conversations
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
    """Convert HH: the turns that both dialogues begin with are the prompt."""
    chosen, rejected = (dialogue(name, row.get(name)) for name in ("chosen", "rejected"))
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), shortest)
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
    """Convert distilabel: the best rated of several answers against the worst."""
    ratings = row.get("ratings") or row.get("rating") or []
    pairs = zip(ratings, row["generations"])
    rated = [(r, text) for r, text in pairs if isinstance(r, (int, float)) and text]
    best = max(rated, key=lambda r: r[0], default=None)
    worst = min(rated, key=lambda r: r[0], default=None)
    if best is None or worst is None or best[0] == worst[0]:
        raise DataError(f"its {len(rated)} rated generations do not differ in rating")
    return alike(row, best[1], worst[1]) | {"chosen_score": best[0], "rejected_score": worst[0]}


def from_record(row: Row) -> Row:
    """Convert an annotated Argilla record: two text fields, and votes that name the better one."""
    fields = row["fields"]
    names = ("prompt", "instruction", "question")
    asked = next((fields[name] for name in names if name in fields), None)
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
    return alike({"prompt": asked}, fields[better], fields[others[0]])


def scores(row: Row, out: Row) -> Row:
    """Find chosen_score and rejected_score under the names in use; {} where there are none.

    In Argilla's Orca pairs, `rating` holds both.
    """
    for pattern in ("{}_score", "score_{}", "{}-rating", "{}_rating", "{}_avg_rating"):
        found = {f"{name}_score": row.get(pattern.format(name)) for name in ("chosen", "rejected")}
        if all(isinstance(score, (int, float)) for score in found.values()):
            return found
    rating = row.get("rating")
    is_orca = isinstance(rating, list) and len(rating) == 2 and "generations" in row
    if is_orca and "chosen_score" not in out:
        if all(isinstance(score, (int, float)) for score in rating):
            return {"chosen_score": max(rating), "rejected_score": min(rating)}
    return {}


def plain(row: Row) -> Row:
    """Write a converted row as text, as HH does: a prompt ends with "\\n\\nAssistant:"."""
    speaker = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    head = lambda role: speaker.get(role, f"\n\n{role}: ")
    text = lambda said: "".join(head(t["role"]) + str(t["content"]) for t in said)
    answer = lambda name: text(row[name]).removeprefix("\n\nAssistant:")
    return row | {
        "prompt": text(row["prompt"]) + "\n\nAssistant:",
        "chosen": answer("chosen"),
        "rejected": answer("rejected"),
    }


def main(argv: list[str] | None = None) -> int:
    """Return exit status 2, with one message, for rows that cannot be converted."""
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
    escape_unknown()
    try:
        written, bad = write(
            find_files(args.input), Path(args.output), args.plain, args.on_bad_row == "stop"
        )
    except (DataError, OSError) as error:
        print(f"extras.convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {written:,} rows, {len(bad):,} skipped")
    for one in bad[:100]:
        print(f"skipped {one}")
    return 0


def write(files: list[Path], output: Path, as_text: bool, stop: bool) -> tuple[int, list[str]]:
    """Convert files into one; return how many rows were written, and what was wrong with others.

    With `stop`, raise DataError for the first bad row. The output appears only once complete.
    """
    if output.resolve() in [file.resolve() for file in files]:
        raise DataError(f"{output}: the input would be overwritten; give another name")
    written = 0
    bad = []
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
