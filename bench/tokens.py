"""Measure how fast pairs are tokenized, in how much memory, and how long a second start takes.

    python -m bench.tokens --model_name_or_path DIR        a million synthetic pairs, one process
    python -m bench.tokens --model_name_or_path DIR --pairs 5000000 --num_proc 8
    python -m bench.tokens --model_name_or_path DIR --dataset_name prefs.jsonl

Synthetic rows go to a scratch directory, and are read from there like any other file. A rate per
core is rows per second of processor time, of this process and its children; peak memory is that of
the largest of them; second start is the time to open the store once it is cached. Prints JSON.
"""

import argparse
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import data
from parts.rows import find_files

SYLLABLES = [a + b for a, b in itertools.product("bcdfghklmnprstvw", "aeiou")]


def write_rows(path: Path, count: int) -> None:
    """Write synthetic pairs of about 80 words, distributed as in a language (Zipf)."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    text = lambda low, high: " ".join(
        rng.choices(words, cum_weights=weights, k=rng.randint(low, high))
    )
    with open(path, "w", encoding="utf-8") as f:
        for i in range(count):
            row = {
                "prompt": f"{i}: {text(5, 30)}",
                "chosen": f" yes {text(5, 50)}",
                "rejected": f" no {text(5, 50)}",
            }
            f.write(json.dumps(row) + "\n")
    os.utime(path, (1, 1))  # an old time: hashes of files just written are not remembered


def usage() -> tuple[float, float]:
    """Return (processor seconds of this process and ended children, MiB of the largest)."""
    own, others = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return sum(u.ru_utime + u.ru_stime for u in (own, others)), max(
        own.ru_maxrss, others.ru_maxrss
    ) / unit


def measure(files: list[Path], directory: str, cache_dir: Path, num_proc: int | None) -> dict:
    tokenizer = data.Tokenizer.load(directory)
    build = lambda: data.build_store(
        files, tokenizer, data.DataOptions(), cache_dir, "skip", num_proc
    )
    (before, _), began = usage(), time.perf_counter()
    store = build()
    (after, peak), seconds = usage(), time.perf_counter() - began
    rows, tokens = store.report["rows"], int(store.tokens.sum())
    began = time.perf_counter()
    store = build()
    store[len(store) - 1]
    again = time.perf_counter() - began
    return {
        "rows": rows,
        "pairs": len(store),
        "tokens": tokens,
        "megabytes": sum(map(os.path.getsize, files)) / 1e6,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "rows_per_core_second": rows / (after - before),
        "tokens_per_core_second": tokens / (after - before),
        "peak_mib": peak,
        "second_start_seconds": again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--num_proc", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.dataset_name is None:
            write_rows(Path(scratch) / "pairs.jsonl", args.pairs)
        files = find_files(args.dataset_name or str(Path(scratch) / "pairs.jsonl"))
        found = measure(files, args.model_name_or_path, Path(scratch) / "cache", args.num_proc)
    print(json.dumps({k: round(v, 3 if v < 100 else 0) for k, v in found.items()}, indent=1))


if __name__ == "__main__":
    main()
