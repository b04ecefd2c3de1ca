"""Other forms of preference data: JSON arrays, parquet, and from/value messages."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data import LONGEST_ROW, NEEDS, ROLES, DataError

FROM_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"} | {r: r for r in ROLES}
# What stands before an element, and what ends the array: at its beginning, and after an element.
BEFORE = {True: re.compile(r"\s*\[\s*"), False: re.compile(r"\s*,\s*")}
ENDING = {True: re.compile(r"\s*\[\s*\]\s*"), False: re.compile(r"\s*\]\s*")}


def array_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Elements of one JSON array as (line where it begins, row), read piece by piece. Broken JSON ends the file."""
    decode, decoder = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder()
    buffer, at, line, first, size, final = "", 0, 1, True, 1 << 16, False
    while not (final and ENDING[first].fullmatch(buffer, at)):
        gap = BEFORE[first].match(buffer, at)
        begin = gap.end() if gap else at
        here = line + buffer.count("\n", at, begin)
        try:
            row, end = decoder.raw_decode(buffer, begin) if gap else (None, None)
            if end is None or (end == len(buffer) and not final):
                raise ValueError("a comma or ] is missing")
            at, line, first, size = end, here + buffer.count("\n", begin, end), False, 1 << 16
            yield here, row if isinstance(row, dict) else DataError(f"found a JSON {type(row).__name__}; {NEEDS}")
        except (ValueError, RecursionError) as error:
            if final or isinstance(error, RecursionError) or size > 2 * LONGEST_ROW:
                yield here, DataError(f"broken JSON in the array ({error}); nothing after it can be read")
                return
            try:  # perhaps the element only goes on in the next piece
                piece = stream.read(size)
                size *= 2  # so that an element longer than a piece is parsed again only log(n) times
                buffer, at, final = buffer[at:] + decode(piece, not piece), 0, not piece
            except UnicodeDecodeError:
                yield here, DataError("not UTF-8 in or after this element; save the file as UTF-8")
                return


def parquet_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Rows of a parquet file, numbered from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("reading parquet needs pyarrow: pip install pyarrow, or convert the file to JSONL") from None
    try:
        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{stream.name}: not a parquet file ({error})") from None


def parse_tool_calls(value: Any, where: str) -> list[dict]:
    """The calls of a "function_call" turn: JSON of one {"name", "arguments"} or of a list of them."""
    try:
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, TypeError, KeyError):
        raise DataError(f'{where} is no function call; it must be JSON {{"name": ..., "arguments": ...}}') from None
    return [{"type": "function", "function": function} for function in functions]


def from_value_message(message: dict, where: str) -> dict:
    """{"from": "human", "value": ...} as {"role": "user", "content": ...}."""
    sender, rest = message["from"], {key: value for key, value in message.items() if key not in ("from", "value")}
    if sender == "function_call":
        return {"role": "assistant", "tool_calls": parse_tool_calls(message.get("value"), where), **rest}
    if not isinstance(sender, str) or sender not in FROM_ROLES:
        raise DataError(f"{where} is from {sender!r}; known are {', '.join([*FROM_ROLES, 'function_call'])}")
    return {"role": FROM_ROLES[sender], "content": message.get("value"), **rest}
