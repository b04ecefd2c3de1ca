"""Hashes of large files, remembered: a second start need not read them whole."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data import file_state

GRAIN = 2 * 10**9  # nanoseconds; coarser than the clock of any file system in use


def remembered_hash(path: Path, cache_dir: Path, compute: Callable[[Path], str]) -> str:
    """`compute(path)`, kept in cache_dir and believed while the file's state is the same: its identity, size and times.

    A write changes the time of change (ctime), which no program can set. Only where it comes within one tick of the
    clock does it leave the times as they are, so a file that was written to just before is hashed, and not remembered
    (git keeps its index by the same rule).
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    state, memory, began = file_state(path), cache_dir / "hashes" / f"{name}.json", time.time_ns()
    with suppress(OSError, ValueError, KeyError, TypeError):  # none there, or a damaged one
        known = json.loads(memory.read_text("utf-8"))
        if known["state"] == state:
            return known["hash"]
    value = compute(path)
    if max(state[3:]) < began - GRAIN:
        with suppress(OSError):  # a cache that cannot be written to only costs time
            memory.parent.mkdir(parents=True, exist_ok=True)
            scratch = memory.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps({"file": str(path), "state": state, "hash": value}), "utf-8")
            os.replace(scratch, memory)
    return value
