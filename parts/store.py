"""The token store: a data set's pairs in five arrays and a meta.json, found again by content.

    tokens.bin    int32    the pairs one after another as they lie in a Batch: prompt chosen
                           rejected; where the prompts differ: prompt chosen rejected_prompt
                           rejected
    lengths.bin   int32    (n, 4) prompt, chosen, rejected, rejected_prompt (-1: the same prompt)
    ratings.bin   float32  (n, 2) the rows' own scores, nan where absent
    places.bin    int64    (n, 2) number of the file, line
    ends.bin      int64    (n, 1) where the pair's tokens end, so that none are summed to find it

The directory is named after everything that its content depends on, so an outdated store is never
found.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from parts.rows import NEEDS, DataError, DroppedPair

STORE_VERSION = 4  # part of the name: raise it when the same rows would give other arrays
ARRAYS = {  # name: type, columns
    "tokens": (np.int32, 1),
    "lengths": (np.int32, 4),
    "ratings": (np.float32, 2),
    "places": (np.int64, 2),
    "ends": (np.int64, 1),
}
BAD_ROWS = 100  # that the report lists
LARGE_FILE = 2**28  # bytes, which take about a second to hash
GRAIN = 2 * 10**9  # nanoseconds; coarser than the clock of any file system in use


# Reading


def read_store(directory: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return meta.json, and the memory-mapped arrays by name. Raises DataError where damaged."""
    try:
        meta = json.loads((directory / "meta.json").read_text("utf-8"))
        arrays: dict[str, np.ndarray] = {}
        for name, (dtype, columns) in ARRAYS.items():
            flat = np.memmap(directory / f"{name}.bin", dtype, mode="r")
            arrays[name] = flat.reshape(-1, columns)
        counts = {len(array) for name, array in arrays.items() if name != "tokens"}
        if len(counts) > 1 or arrays["ends"][-1, 0] != len(arrays["tokens"]):
            raise ValueError("arrays of unequal length")
    except (OSError, ValueError) as error:
        what = f"damaged token store ({error})"
        raise DataError(f"{directory}: {what}; remove it, and it will be made again") from None
    return meta, arrays


# Finding or writing


@contextmanager
def explained_failures(cache_dir: Path) -> Iterator[None]:
    """Raise DataError, saying what to do, where the disk or the memory does not suffice."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise DataError(
            f"{cache_dir}: cannot hold the token store ({what}); change --cache_dir"
        ) from None
    except MemoryError:
        how = "lower --dataset_num_proc, or cut very long rows"
        raise DataError(f"out of memory while tokenizing; {how}") from None


def find_or_write(
    cache_dir: Path,
    files: list[Path],
    recipe: tuple,
    outcomes: Iterable[tuple],
    stop: bool,
    pictures: Any = None,
) -> Path:
    """Return the store's directory, writing it from `outcomes` where it does not exist yet.

    `recipe` is all that the arrays depend on besides the files. `outcomes` are (place, Pair or
    DataError) of every row, read lazily: not at all where the store is found. `pictures` is the
    tokenizer's. Raises DataError: at the first bad row if `stop`, when no pair is left, and when a
    file changed meanwhile.
    """
    with explained_failures(cache_dir):
        states = [file_state(path) for path in files]
        target = cache_dir / store_key(files, cache_dir, *recipe)
        if not target.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            # Written beside its place and renamed, so that a store is complete or absent.
            prefix = f"{target.name}.part-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=cache_dir) as scratch:
                write_pairs(Path(scratch), outcomes, files, stop, pictures)
                check_unchanged(files, states)
                os.chmod(scratch, 0o755)  # temporary directories are for their owner alone
                rename(scratch, target)
        elif pictures is not None:
            pictures.check_kept(target)
        return target


def counted(chunks: Iterable[list], progress: Callable[[int], None] | None) -> Iterator[tuple]:
    """Yield the chunks' items; after each chunk, tell `progress` how many there were so far."""
    done = 0
    for outcomes in chunks:
        yield from outcomes
        done += len(outcomes)
        if progress:
            progress(done)


def rename(scratch: str, target: Path) -> None:
    try:
        os.rename(scratch, target)
    except OSError:
        if not target.exists():  # otherwise another run was faster, with the same arrays
            raise


def write_pairs(
    directory: Path,
    outcomes: Iterable[tuple],
    files: list[Path],
    stop: bool,
    pictures: Any,
) -> None:
    """Write the arrays and meta.json. Raises DataError for a bad row if `stop`, and for no pair."""
    report: dict[str, Any] = {"rows": 0, "counts": {}, "first": {}, "bad_rows": []}
    numbers = {str(path): number for number, path in enumerate(files)}
    hashes = [hashlib.sha256() for _ in ARRAYS]
    kept: dict = {}  # of the images
    end = 0  # of the tokens written
    with ExitStack() as stack:
        opened = (open(directory / f"{name}.bin", "wb") for name in ARRAYS)
        streams = [stack.enter_context(stream) for stream in opened]
        for place, outcome in outcomes:
            is_bad = isinstance(outcome, DataError)
            if stop and is_bad and not isinstance(outcome, DroppedPair):
                raise DataError(f"{place}: {outcome}")
            count_outcome(report, place, outcome)
            if is_bad:
                continue
            file, _, line = place.rpartition(":")
            pieces = pair_pieces(outcome, (numbers[file], int(line)), end)
            end += len(pieces[0])
            for stream, sha, piece in zip(streams, hashes, pieces, strict=True):
                stream.write(piece.tobytes())
                sha.update(piece.tobytes())
            if outcome.pictures:
                index = report["counts"]["kept"] - 1
                pictures.keep(kept, index, outcome.pictures, directory)
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
    check_any_left(report, list(numbers))
    # Of the pairs, not of their places: the same rows in another file are the same data.
    digest = hashlib.sha256("".join(sha.hexdigest() for sha in hashes[:3]).encode())
    if kept:
        digest.update(json.dumps(kept["pairs"]).encode())
    meta = {
        "files": list(numbers),
        "digest": digest.hexdigest(),
        "report": report,
        "pictures": kept or None,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def pair_pieces(pair: Any, place: tuple[int, int], begin: int) -> tuple[np.ndarray, ...]:
    """Return a data.Pair as written to the arrays, in their order.

    Its tokens begin at `begin`.
    """
    shared = pair.rejected_prompt_ids is None
    own_prompt = pair.prompt_ids[:0] if shared else pair.rejected_prompt_ids
    stream = np.concatenate([pair.prompt_ids, pair.chosen_ids, own_prompt, pair.rejected_ids])
    lengths = [len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)]
    lengths.append(-1 if shared else len(own_prompt))
    ratings = (pair.chosen_rating, pair.rejected_rating)
    values = (stream, lengths, ratings, place, begin + len(stream))
    types = (dtype for dtype, _ in ARRAYS.values())
    return tuple(np.asarray(value, dtype) for value, dtype in zip(values, types, strict=True))


# The report


def count_outcome(report: dict, place: str, outcome: Any) -> None:
    """Add one row to the report, which keeps each kind's first place and the first bad rows."""
    report["rows"] += 1
    if isinstance(outcome, DroppedPair):
        names = [f"dropped, as {outcome}"]
    elif isinstance(outcome, DataError):
        names = ["bad"]
        if len(report["bad_rows"]) < BAD_ROWS:
            report["bad_rows"].append(f"{place}: {outcome}")
    else:
        names = ["kept", *outcome.flags]
    for name in names:
        report["counts"][name] = report["counts"].get(name, 0) + 1
        report["first"].setdefault(name, place)


def describe(report: dict) -> list[str]:
    """Return lines about the rows: each kind with its count and one place."""
    explained = {
        "bad": "skipped, as unusable",
        "unclean_prefix": "the prompt's last tokens change when a completion follows, "
        "which then begins there",
        "truncated": "truncated",
        "same_after_truncation": "chosen and rejected are the same after truncation",
    }
    counts = report["counts"]
    others = sorted(counts.keys() - explained.keys() - {"kept"})
    lines = [f"{counts.get('kept', 0):,} pairs from {report['rows']:,} rows"]
    for name in [*explained, *others]:
        if name in counts:
            what = explained.get(name, name)
            lines.append(f"{what}: {counts[name]:,} (first: {report['first'][name]})")
    return lines + [f"skipped {bad}" for bad in report["bad_rows"]]


def check_any_left(report: dict, files: list[str]) -> None:
    if report["counts"].get("kept"):
        return
    why = f"no rows; {NEEDS}"
    if report["rows"]:
        why = "; ".join(["no pair is left", *describe(report)[:5]])
    raise DataError(f"{', '.join(files)}: {why}")


# The name


def store_key(files: list[Path], cache_dir: Path, *recipe: Any) -> str:
    """Hash all that a store depends on: files (name, content), tokenizing library, `recipe`."""
    parts = (STORE_VERSION, tokenizers.__version__, *recipe)
    sha = hashlib.sha256(repr(parts).encode())
    for path in files:
        is_large = os.path.getsize(path) >= LARGE_FILE
        content = remembered_hash(path, cache_dir) if is_large else file_hash(path)
        sha.update(f"{path}:{content};".encode())
    return sha.hexdigest()[:32]


def file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_state(path: Path) -> list[int]:
    """Return what a write to the file changes: identity, size, and the times the system keeps."""
    state = os.stat(path)
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def check_unchanged(files: list[Path], states: list[list[int]]) -> None:
    """Raise DataError where a file was written to since its state was taken."""
    for path, state in zip(files, states, strict=True):
        if file_state(path) != state:
            what = "it changed while it was read"
            raise DataError(f"{path}: {what}; start again when it is complete")


def remembered_hash(path: Path, cache_dir: Path) -> str:
    """Return the file's hash, kept in cache_dir and trusted while the file's state stays the same.

    A write changes the time of change (ctime), which no program can set. Only where it comes within
    one tick of the clock does it leave the times as they are, so a file that was written to a
    moment ago is hashed, and not remembered (git keeps its index by the same rule).
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    memory = cache_dir / "hashes" / f"{name}.json"
    state = file_state(path)
    began = time.time_ns()
    with suppress(OSError, ValueError, KeyError, TypeError):  # none there, or a damaged one
        known = json.loads(memory.read_text("utf-8"))
        if known["state"] == state:
            return known["hash"]
    value = file_hash(path)
    if max(state[3:]) < began - GRAIN:
        with suppress(OSError):  # a cache that cannot be written to only costs time
            memory.parent.mkdir(parents=True, exist_ok=True)
            scratch = memory.with_suffix(f".{os.getpid()}")
            scratch.write_text(
                json.dumps({"file": str(path), "state": state, "hash": value}), "utf-8"
            )
            os.replace(scratch, memory)
    return value
