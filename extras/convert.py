"""Convert preference rows of other formats to ours: python -m extras.convert IN OUT

    LLaMA-Factory   conversations (or messages), or instruction, input, history, system; with
                    chosen, rejected; chosen_messages, rejected_messages
    ms-swift        messages with rejected_response or rejected_messages; query, response
    torchtune       chosen_conversations, rejected_conversations
    OpenAI          input, preferred_output, non_preferred_output
    HH-RLHF         chosen and rejected are whole dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ..."
    Argilla         instruction (or input, prompt) with chosen_response, rejected_response and
                    their ratings; full conversations; annotated records (the majority)
    NeMo            prompt, chosen_response, rejected_response; context, completions with ranks
    rankings        of answers with scores or ranks: UltraFeedback (completions), Nectar (answers),
                    distilabel (generations), candidates; the best with the worst, or --every_pair
    two answers     and which is better: PKU-SafeRLHF (better_response_id), HelpSteer2 and 3, SHP,
                    Arena
    any             instruction, question, query, problem, input or context for prompt

IN is what dpo.py reads: a file (.jsonl, .json, .csv, gzipped; .parquet), a glob, a directory or a
name on the hub, of which --split is taken. OUT is JSON Lines of conversations, gzipped where its
name ends in .gz; --plain writes text, for models without a chat template. Each row's format is
known by its keys. Images go along: their paths are written as they lead from OUT. A row without a
preference (equal answers, ratings or votes) is bad, and stops the conversion unless --on_bad_row
skip.
"""

import argparse
import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extras.hub.client import local_dataset
from extras.rows.ranked import number, pairs_of
from extras.rows.written import mover, to_json, with_paths
from parts.forms import PROMPT_NAMES, renamed
from parts.rows import DataError, read_rows, user_path
from parts.screen import escape_unknown
from parts.turns import with_role

Row = dict[str, Any]
TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
# Kept as they are: the trainer reads the first five, and refuses videos.
KEPT = ("images", "image", "tools", "chat_template_kwargs", "videos", "video")
WHOLE = ("{}_messages", "{}_conversations")  # names of answers that are full conversations


def convert(row: Row) -> Row:
    """Convert a row of any format to prompt, chosen, rejected as messages, with scores.

    Of several answers, the best and the worst. Raises DataError.
    """
    return next(convert_all(row, every=False))


def convert_all(row: Row, every: bool) -> Iterator[Row]:
    """Convert a row to one of ours; of several answers, to `every` pair of a better and a worse."""
    row = renamed(row)
    has_pair = row.get("chosen") is not None and row.get("rejected") is not None
    ranked = None if has_pair else pairs_of(row, every)
    if ranked is None:
        yield finished(row, from_pair(row))
        return
    for better, worse, rated in ranked:
        yield finished(row, alike(asked_in(row), better, worse) | rated)


def finished(row: Row, out: Row) -> Row:
    if out["chosen"] == out["rejected"]:
        raise DataError("chosen and rejected are the same")
    return out | scores(row, out) | {key: row[key] for key in KEPT if row.get(key)}


def asked_in(row: Row) -> Row:
    """Return the row with the prompt of an Argilla record beside its fields."""
    fields = row.get("fields")
    if not isinstance(fields, dict):
        return row
    asked = next((fields[name] for name in ("prompt", *PROMPT_NAMES) if name in fields), None)
    return {"prompt": asked}


def from_pair(row: Row) -> Row:
    """Convert a row that says which answer is chosen. Raises DataError where none does."""
    for chosen, rejected in [(w.format("chosen"), w.format("rejected")) for w in WHOLE]:
        if chosen in row:
            return alike(row, row[chosen], row.get(rejected))
    if "chosen_response" in row:
        return alike(row, row["chosen_response"], row.get("rejected_response"))
    if row.get("rejected_response") and row.get("response"):  # ms-swift's older form
        return alike(row, row["response"], row["rejected_response"])
    if "chosen" not in row:
        raise DataError(unknown(row))
    if "conversations" in row or "messages" in row:
        asked = row.get("conversations", row.get("messages"))
        return alike(row | {"prompt": asked}, row["chosen"], row.get("rejected"))
    is_dialogue = isinstance(row["chosen"], str) and TURN.match(row["chosen"])
    if is_dialogue and question(row) is None:
        return from_dialogues(row)
    return alike(row, row["chosen"], row.get("rejected"))


def unknown(row: Row) -> str:
    """Say what a row is that cannot be converted."""
    keys = ", ".join(row)
    if "label" in row or "labels" in row:
        return (
            f"its keys ({keys}) are an answer with a label of its own: DPO compares two answers "
            "to one prompt, so write the good and the bad ones of a prompt as chosen and rejected")
    several = next((name for name in row if isinstance(row[name], list) and len(row[name]) > 1), "")
    if several:
        return (
            f"its keys ({keys}) are of no form that is known; if \"{several}\" are answers, "
            "nothing says which is better: give them scores or ranks")
    return f"its keys ({keys}) are of no form that is known: see python -m extras.convert --help"


def message(value: Any, role: str) -> Row:
    """Convert a turn (text, from/value or role/content) to role and content."""
    if isinstance(value, str):
        return {"role": role, "content": value}
    found = None
    if isinstance(value, dict) and "from" in value:
        found = with_role(value, "a turn")
    elif isinstance(value, dict) and "role" in value:
        found = {key: part for key, part in value.items() if part is not None}
    if found and (found.get("content") is not None or found.get("tool_calls")):
        return found
    raise DataError(
        f"found {to_json({role: value})[:60]} for the turn of the {role}; "
        "give text, from/value or role/content"
    )


def turns(value: Any, role: str) -> list[Row]:
    values = value if isinstance(value, list) else [value]
    return [message(one, role) for one in values]


def question(row: Row) -> Any:
    """Find the prompt under its names; `input` follows an instruction, as in Alpaca.

    Raises DataError where two other names are there: which belongs where is not known.
    """
    if row.get("prompt") is not None:
        return row["prompt"]
    asked = [name for name in PROMPT_NAMES if row.get(name)]
    if isinstance(row.get("history"), str):  # SHP's
        asked.append("history")
    if asked in (["instruction", "input"], ["question", "input"], ["query", "input"]):
        return f"{row[asked[0]]}\n{row['input']}"
    if len(asked) > 1:
        raise DataError(f"it has {' and '.join(asked)}; write them as one prompt")
    return row[asked[0]] if asked else None


def prompt_turns(row: Row) -> list[Row]:
    """Make the prompt's messages, with history and system before them. Raises DataError."""
    asked = question(row)
    if not asked:
        raise DataError("no prompt, instruction, question or input")
    if isinstance(asked, str) and TURN.match(asked):  # Nectar's, which ends "\n\nAssistant: "
        prompt = dialogue_turns(asked)
        if not prompt[-1]["content"]:
            prompt.pop()
    else:
        prompt = turns(asked, "user")
    pairs = row.get("history") if isinstance(row.get("history"), list) else []
    for user, assistant in reversed(pairs):
        prompt = [message(user, "user"), message(assistant, "assistant"), *prompt]
    return with_system(row, prompt)


def with_system(row: Row, prompt: list[Row]) -> list[Row]:
    if row.get("system") and prompt[0]["role"] != "system":
        return [message(row["system"], "system"), *prompt]
    return prompt


def alike(row: Row, chosen: Any, rejected: Any) -> Row:
    """Make prompt and two answers; the prompt is cut off answers that are full conversations."""
    if not chosen or not rejected:
        raise DataError(f'"{"rejected" if chosen else "chosen"}" is missing or empty')
    answers = [turns(chosen, "assistant"), turns(rejected, "assistant")]
    shared = next((i for i, (a, b) in enumerate(zip(*answers)) if a != b), min(map(len, answers)))
    if answers[0][0]["role"] != "assistant" and shared:  # full conversations
        prompt = with_system(row, answers[0][:shared])
        return {"prompt": prompt, "chosen": answers[0][shared:], "rejected": answers[1][shared:]}
    prompt = prompt_turns(row)
    if prompt[-1]["role"] == "assistant":
        if prompt[-1:] != answers[0]:
            raise DataError("the prompt ends with an answer of the assistant; take that off it")
        prompt = prompt[:-1]  # the chosen answer, once more
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


def dialogue_turns(text: str) -> list[Row]:
    pieces = TURN.split(text)[1:]
    said = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": HH_ROLES[who], "content": words.strip()} for who, words in said]


def dialogue(name: str, text: Any) -> list[Row]:
    if not isinstance(text, str) or not TURN.match(text):
        raise DataError(f'"{name}" is no dialogue that begins with "\\n\\nHuman:"')
    found = dialogue_turns(text)
    if found[-1]["role"] != "assistant" or not found[-1]["content"]:
        raise DataError(f'"{name}" does not end with an answer of the assistant')
    return found


def scores(row: Row, out: Row) -> Row:
    """Find chosen_score and rejected_score under the names in use; {} where there are none.

    In Argilla's Orca pairs, `rating` holds both.
    """
    for pattern in ("{}_score", "score_{}", "{}-rating", "{}_rating", "{}_avg_rating", "{}_reward"):
        named = {f"{name}_score": row.get(pattern.format(name)) for name in ("chosen", "rejected")}
        if all(number(score) is not None for score in named.values()):
            return {key: number(score) for key, score in named.items()}
    rating = row.get("rating")
    is_orca = isinstance(rating, list) and len(rating) == 2 and "generations" in row
    if is_orca and "chosen_score" not in out:
        if all(number(score) is not None for score in rating):
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
        prog="python -m extras.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="file, glob, directory or name on the hub")
    parser.add_argument("output", help=".jsonl or .jsonl.gz")
    parser.add_argument("--split", default="train", help="of a directory or a name on the hub")
    parser.add_argument("--config", help="of a directory or a name on the hub")
    parser.add_argument("--plain", action="store_true", help="text instead of conversations")
    parser.add_argument(
        "--every_pair", action="store_true", help="of several answers, not only best and worst"
    )
    parser.add_argument(
        "--on_bad_row", choices=["stop", "skip"], default="stop", help="skip counts and lists them"
    )
    args = parser.parse_args(argv)
    escape_unknown()
    try:
        files = local_dataset(args.input, args.config, args.split)
        written, bad = write(files, user_path(args.output), args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {written:,} rows, {len(bad):,} skipped")
    for one in bad[:100]:
        print(f"skipped {one}")
    return 0


def write(files: list[Path], output: Path, args: argparse.Namespace) -> tuple[int, list[str]]:
    """Convert files into one; return how many rows were written, and what was wrong with others.

    Raises DataError: for the first bad row, unless args.on_bad_row is "skip", and where none is
    left. The output appears only once complete.
    """
    if output.resolve() in [file.resolve() for file in files]:
        raise DataError(f"{output}: the input would be overwritten; give another name")
    written = 0
    bad = []
    scratch = output.with_name(f".{output.name}.part")
    opened = gzip.open if output.suffix == ".gz" else open
    try:
        with opened(scratch, "wt", encoding="utf-8") as stream:
            for place, row in read_rows(files):
                try:
                    lines = list(written_lines(place, row, output, args))
                except DataError as error:
                    bad.append(f"{place}: {error}")
                    if args.on_bad_row == "stop":
                        raise DataError(
                            f"{bad[0]}; --on_bad_row skip leaves such rows out") from None
                    continue
                stream.writelines(lines)
                written += len(lines)
        if not written:
            raise DataError(f"no row could be converted; the first is {(bad or ['missing'])[0]}")
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)
    return written, bad


def written_lines(
    place: str, row: Row | DataError, output: Path, args: argparse.Namespace
) -> Iterator[str]:
    """Yield the lines that a row becomes. Raises DataError."""
    if isinstance(row, DataError):
        raise row
    moved = mover(Path(place.rpartition(":")[0]).parent, output.parent)
    for done in convert_all(row, args.every_pair):
        done = with_paths(plain(done) if args.plain else done, moved)
        yield to_json(done) + "\n"


if __name__ == "__main__":
    sys.exit(main())
