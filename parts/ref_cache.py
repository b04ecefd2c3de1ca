"""The reference's log-probs on disk: one file of blocks of pairs, each with its checksum."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np

SUMS_BLOCK = 1024  # pairs


def open_sums(path: Path, count: int, dtype: np.dtype) -> np.memmap:
    """Memory-map the file, made where absent, as records of a block of pairs.

    A record has `sums` (SUMS_BLOCK, 2, 2), nan where not known, and their `sha256`.
    """
    record = np.dtype([("sums", dtype, (SUMS_BLOCK, 2, 2)), ("sha256", np.uint8, 32)])
    size = -(-count // SUMS_BLOCK) * record.itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if path.stat().st_size < size:
        lengthen(path, size)  # what is not there yet, or was cut off, reads as zeros
    elif path.stat().st_size > size:
        os.truncate(path, size)
    return np.memmap(path, record, "r")


def lengthen(path: Path, size: int) -> None:
    """Make a file longer, with its bytes set aside on the disk: on a full tmpfs, reading a hole of
    a mapped file would end the process (SIGBUS). Raises OSError where there is no room."""
    try:
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS has none, nor have some file systems
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"{path}: no room for the reference's log-probs ({os.strerror(error.errno)}); "
                "change --cache_dir") from None
        os.truncate(path, size)


def blocks_of(pairs: np.ndarray) -> list[np.ndarray]:
    """Cut sorted pairs where a block ends."""
    if not len(pairs):
        return []
    cuts = np.flatnonzero(np.diff(pairs // SUMS_BLOCK)) + 1
    return np.split(pairs, cuts)


def read_block(record: np.void) -> np.ndarray | None:  # (SUMS_BLOCK, 2, 2)
    """Return a block's sums; None where they are damaged, or a write was cut short."""
    if not any(record.tobytes()):
        return np.full_like(record["sums"], np.nan)  # never written
    found = hashlib.sha256(record["sums"].tobytes()).digest()
    intact = found == record["sha256"].tobytes()
    return np.array(record["sums"]) if intact else None


def missing_sums(table: np.memmap, pairs: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return which of the sorted pairs lack sums, (P,) bool, and the numbers of damaged blocks."""
    missing = [np.zeros(0, bool)]
    damaged = []
    for part in blocks_of(pairs):
        number = int(part[0] // SUMS_BLOCK)
        block = read_block(table[number])
        if block is None:
            damaged.append(number)
            missing.append(np.ones(len(part), bool))
        else:
            missing.append(np.isnan(block[part % SUMS_BLOCK, 0, 0]))
    return np.concatenate(missing), damaged


def write_sums(path: Path, table: np.memmap, pairs: np.ndarray, sums: np.ndarray) -> None:
    """Add sums (P, 2, 2) of pairs of one block.

    What is there stays, to the bit: other runs may be reading it.
    """
    import fcntl  # Windows has none; runs with a live reference need none

    number = pairs[0] // SUMS_BLOCK
    rows = pairs % SUMS_BLOCK
    with open(path, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
        block = read_block(table[number])
        if block is None:
            block = np.full_like(table[number]["sums"], np.nan)
        block[rows] = np.where(np.isnan(block[rows]), sums, block[rows])
        stream.seek(number * table.itemsize)
        stream.write(block.tobytes() + hashlib.sha256(block.tobytes()).digest())
        stream.flush()
        os.fsync(stream.fileno())


def take_sums(table: np.memmap, pairs: np.ndarray) -> np.ndarray:  # (P, 2, 2)
    """Return the sums of pairs in any order."""
    return np.array(table["sums"][pairs // SUMS_BLOCK, pairs % SUMS_BLOCK])
