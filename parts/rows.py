"""Files of preference rows, read one row at a time.

    for place, row in read_rows(find_files("prefs/*.jsonl")):  # "prefs/a.jsonl:17", {"prompt": ...}

JSON Lines, a JSON array, CSV, any of them gzipped; parquet and Arrow (both need pyarrow). A row
that cannot be read comes as a DataError in its place, so that the caller decides whether one bad
row ends the run.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from parts.forms import renamed

NEEDS = (
    "each row needs prompt, chosen, rejected "
    "(or chosen and rejected that begin with the same prompt)"
)
LONGEST_ROW = 2**26  # bytes; anything longer is no row, and is not read into memory
FILE_PATTERNS = tuple(
    f"*.{kind}" for kind in "jsonl json jsonl.gz json.gz csv csv.gz parquet".split())
NOT_DATA = {  # files of these names hold no rows
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

# In a JSON array: what stands before an element, and what ends it; by whether it is the first.
BEFORE = {True: re.compile(r"\s*\[\s*"), False: re.compile(r"\s*,\s*")}
ENDING = {True: re.compile(r"\s*\[\s*\]\s*"), False: re.compile(r"\s*\]\s*")}
CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")  # as text
PIECE = 1 << 16  # bytes of an array that are read at a time


class DataError(ValueError):
    """Unusable input. The message is for its author: where, what was found, what to do."""


class DroppedPair(DataError):
    """A sound row of which truncation leaves nothing to score. Counted and printed, never fatal."""


def attempt(function: Callable, *arguments: Any) -> Any:
    """Return what the function returns, or the DataError that it raises."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


# Which files


def user_path(name: str | Path) -> Path:
    """Return the path with ~ expanded; ~NAME of a user who does not exist stays as it is."""
    return Path(os.path.expanduser(name))


def find_files(spec: str | Path | list) -> list[Path]:
    """Find the files that a path, a glob, a directory or a list of these names, in order.

    Raises DataError where one of them names no file.
    """
    found: list[Path] = []
    for one in [spec] if isinstance(spec, str | Path) else spec:
        path = user_path(one)
        matches = matching_files(path)
        if not matches:
            nothing = f"no {', '.join(FILE_PATTERNS)} in this directory"
            what = nothing if path.is_dir() else "no such file"
            raise DataError(f"{one}: {what}; give a .jsonl or .json file, a directory or a glob")
        found += matches
    return list(dict.fromkeys(found))  # a file that two globs match is read once


def matching_files(path: Path) -> list[Path]:
    if path.is_dir():
        names = {match for pattern in FILE_PATTERNS for match in path.glob(pattern)}
        return sorted(name for name in names if name.is_file() and name.name not in NOT_DATA)
    if path.is_file():  # before the glob: a file's name may contain * or [
        return [path]
    names = sorted(glob.glob(str(path), recursive=True))
    return [Path(name) for name in names if os.path.isfile(name)]


def names_in(spec: str) -> list[str]:
    """List the data sets of a name: one, or several with commas between them."""
    if user_path(spec).exists() or glob.has_magic(spec):
        return [spec]
    return [name.strip() for name in spec.split(",") if name.strip()]


def on_hub(name: Any) -> bool:
    """Tell whether a data set or model is not on this machine, so that the hub is asked."""
    if not isinstance(name, str):
        return False
    here = lambda one: user_path(one).exists() or glob.has_magic(one)
    return not all(map(here, names_in(name)))


# Their rows


def read_rows(files: Iterable[str | Path]) -> Iterator[tuple[str, dict | DataError]]:
    """Stream the rows of files as ("prefs.jsonl:17", row), in our names: see `raw_rows`."""
    for place, row in raw_rows(files):
        yield place, renamed(row) if isinstance(row, dict) else row


def raw_rows(files: Iterable[str | Path]) -> Iterator[tuple[str, dict | DataError]]:
    """Stream the rows of files as ("prefs.jsonl:17", row), as they stand there.

    What cannot be read (bad UTF-8, broken JSON, not an object, damaged gzip) comes as a DataError
    in the row's place. Raises DataError for a file that cannot be opened.
    """
    for path in map(Path, files):
        number = 0
        try:
            for number, row in file_rows(path):
                yield f"{path}:{number}", row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            damaged = DataError(f"the compressed file is damaged ({error}); fetch it again")
            yield f"{path}:{number + 1}", damaged
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_chunks(files: Iterable[str | Path], size: int) -> Iterator[list]:
    """Yield the rows of `read_rows` in lists of at most `size`."""
    rows = read_rows(files)
    while chunk := list(islice(rows, size)):
        yield chunk


def row_at(place: str) -> dict | DataError | None:
    """Return the row at "prefs.jsonl:17" again; None where there is none."""
    rows = read_rows([place.rpartition(":")[0]])
    try:
        return next((row for where, row in rows if where == place), None)
    except DataError:  # the file is gone
        return None


def file_rows(path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """Yield (line, row) of one file, whose form is told by its first bytes rather than its name."""
    with ExitStack() as stack:
        stream: Any = stack.enter_context(open(path, "rb"))
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        if stream.peek(3)[:3] == codecs.BOM_UTF8:
            stream.read(3)
        rows = line_rows
        if stream.peek(64)[:64].startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: only git-lfs's pointer to the file; git lfs pull fetches it")
        if path.suffix == ".parquet":
            rows = parquet_rows
        elif path.suffix == ".arrow":
            rows = arrow_rows
        elif path.name.endswith((".csv", ".csv.gz")):
            rows = csv_rows
        elif stream.peek(4096)[:4096].lstrip()[:1] == b"[":
            rows = array_rows
        yield from rows(stream)


def parse_line(line: bytes) -> dict:
    """Parse one JSON object. Raises DataError on anything else."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line"
        raise DataError(f"not UTF-8 ({where}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        what = f"broken JSON ({error}) in {line[:40]!r}"
        raise DataError(f"{what}; each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"found a JSON {type(row).__name__}, not an object; {NEEDS}")
    return row


def line_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Yield JSON Lines as (line number, row), skipping blank lines."""
    lines = iter(lambda: stream.readline(LONGEST_ROW + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_ROW:
            what = f"a line of more than {LONGEST_ROW >> 20} MiB; nothing after it is read"
            yield number, DataError(f"{what}; {NEEDS}")
            return
        if line.strip():
            yield number, attempt(parse_line, line)


def array_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Yield the elements of one JSON array as (line where it begins, row), reading piece by piece.

    Broken JSON ends the file: where the next element begins is then unknown.
    """
    decode = codecs.getincrementaldecoder("utf-8")().decode
    parse = json.JSONDecoder().raw_decode
    buffer = ""
    at = 0  # in the buffer: where the next element, or the comma before it, is looked for
    line = 1
    first = True
    final = False  # the stream is at its end
    size = PIECE
    while not (final and ENDING[first].fullmatch(buffer, at)):
        gap = BEFORE[first].match(buffer, at)
        begin = gap.end() if gap else at
        here = line + buffer.count("\n", at, begin)
        try:
            row, end = parse(buffer, begin) if gap else (None, None)
            if end is None or (end == len(buffer) and not final):
                raise ValueError("a comma or ] is missing")
            at = end
            line = here + buffer.count("\n", begin, end)
            first = False
            size = PIECE
            if not isinstance(row, dict):
                row = DataError(f"found a JSON {type(row).__name__}; {NEEDS}")
            yield here, row
        except (ValueError, RecursionError) as error:
            if final or isinstance(error, RecursionError) or size > 2 * LONGEST_ROW:
                what = f"broken JSON in the array ({error})"
                yield here, DataError(f"{what}; nothing after it can be read")
                return
            try:  # perhaps the element only continues in the next piece
                piece = stream.read(size)
                size *= 2  # so that a long element is parsed again only log(n) times
                final = not piece
                buffer = buffer[at:] + decode(piece, final)
                at = 0
            except UnicodeDecodeError:
                yield here, DataError("not UTF-8 in or after this element; save the file as UTF-8")
                return


def csv_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Yield the rows of a CSV file as (line where it begins, row); its first line names the keys.

    An empty cell is a missing value. Broken CSV ends the file.
    """
    csv.field_size_limit(LONGEST_ROW)
    line = 1
    try:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8", newline=""), strict=True)
        line += reader.line_num if reader.fieldnames else 0
        for cells in reader:
            yield line, attempt(parse_cells, cells)
            line = reader.line_num + 1
    except UnicodeDecodeError:
        yield line, DataError("not UTF-8 in or after this row; save the file as UTF-8")
    except csv.Error as error:
        yield line, DataError(f"broken CSV ({error}); nothing after it is read")


def parse_cells(cells: dict) -> dict:
    """Turn a row of CSV into values: conversations are JSON, scores are numbers, the rest is text.

    Raises DataError.
    """
    if None in cells or None in cells.values():
        raise DataError(f"more or fewer cells than the first line has; {NEEDS}")
    row = {key: value for key, value in cells.items() if value}
    for key, value in row.items():
        if CONVERSATION.match(value):
            try:
                row[key] = json.loads(value)
            except ValueError:
                what = f'"{key}" is a conversation that is not JSON'
                raise DataError(f"{what}; save the rows as JSON Lines") from None
        elif "score" in key or "rating" in key:
            try:
                row[key] = float(value)
            except ValueError:
                pass  # a loss that reads it says so
    return row


def import_arrow(what: str) -> Any:
    """Import pyarrow, which is optional. Raises DataError saying what to do without it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        needs = f"reading {what} needs pyarrow: pip install pyarrow"
        raise DataError(f"{needs}, or convert the file to JSONL") from None
    return pyarrow


def parquet_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Yield the rows of a parquet file, numbered from 1. Raises DataError without pyarrow."""
    pyarrow = import_arrow("parquet")
    try:
        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{stream.name}: not a parquet file ({error})") from None


def arrow_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """Yield the rows of an Arrow stream, as datasets' save_to_disk writes it; as `parquet_rows`."""
    pyarrow = import_arrow("Arrow files")
    try:
        batches = pyarrow.ipc.open_stream(stream)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{stream.name}: not an Arrow stream ({error})") from None
