"""Ours and TRL 1.16 in turn, on the same model, pairs, order and precision; medians of several rounds.

    python bench/compare.py --model DIR --data prefs.jsonl --pairs 32 --batch 8 --rounds 3 [--bf16] [--checkpointing]

Both train one epoch in file order with full fine-tuning and the reference precomputed (TRL's fastest mode on these
machines, ours by default), each in a fresh process. `whole run` is everything from start to the saved model: imports,
tokenization, the reference pass, training. Peak memory is the process's resident set. Prints a table, and JSON with --json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    args = parse()
    rows = read_rows(args.data, args.pairs)
    results = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "pairs.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        for i in range(args.rounds):
            for name, command in (("ours", ours), ("trl", trl)):
                results[name].append(measure(command(args, data, Path(scratch) / f"{name}{i}"), len(rows)))
                print(f"round {i + 1} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    summary = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}
    show(args, summary, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help=".jsonl, .json, .gz")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", help="write everything here")
    return parser.parse_args()


def read_rows(path: str, count: int) -> list[dict]:
    """The first rows that both sides take."""
    sys.path.insert(0, str(ROOT))
    import data

    rows = (row for _, row in data.read_rows(data.find_files(path)) if isinstance(row, dict))
    usable = [r for r in rows if r.get("chosen") and r.get("rejected") and r["chosen"] != r["rejected"]]
    return usable[:count]


def ours(args, data: Path, out: Path) -> list[str]:
    words = {"model_name_or_path": args.model, "dataset_name": data, "output_dir": out, "cache_dir": out / "cache",
             "num_train_epochs": 1, "per_device_train_batch_size": args.batch, "max_length": args.max_length,
             "bf16": args.bf16, "gradient_checkpointing": args.checkpointing, "shuffle_dataset": False,
             "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    return [sys.executable, str(ROOT / "dpo.py"), *(f"--{k}={v}" for k, v in words.items())]


def trl(args, data: Path, out: Path) -> list[str]:
    out.mkdir()
    run = {"model": args.model, "data": [str(data)], "out": str(out), "threads": args.threads, "save": True, "args": {
        "num_train_epochs": 1, "per_device_train_batch_size": args.batch, "max_length": args.max_length,
        "bf16": args.bf16, "gradient_checkpointing": args.checkpointing, "precompute_ref_log_probs": True}}
    (out / "run.json").write_text(json.dumps(run))
    return [sys.executable, str(ROOT / "tests" / "trl_peer.py"), str(out / "run.json")]


def measure(command: list[str], pairs: int) -> dict:
    """Run to the end; seconds, CPU seconds and peak memory of the process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nexit {process.returncode}: {process.stderr.read()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "pairs_per_s": round(pairs / seconds, 4),
            "peak_mib": peak // 1024}


def resident(pid: int) -> int:
    """Peak resident set so far, KiB (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def show(args, summary: dict, results: dict) -> None:
    import torch

    ratio = {k: summary["ours"][k] / summary["trl"][k] for k in ("pairs_per_s", "peak_mib", "cpu_seconds")}
    print(f"{'':6}{'whole run s':>13}{'CPU s':>9}{'pairs/s':>9}{'peak MiB':>10}")
    for name, r in summary.items():
        print(f"{name:6}{r['seconds']:13.1f}{r['cpu_seconds']:9.1f}{r['pairs_per_s']:9.3f}{r['peak_mib']:10d}")
    print(f"ours / TRL: {ratio['pairs_per_s']:.2f}x pairs/s, {ratio['peak_mib']:.2f}x memory, {ratio['cpu_seconds']:.2f}x CPU")
    if args.json:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        setting = {k: v for k, v in vars(args).items() if k not in ("model", "data", "json")} | {
            "model": Path(args.model).name, "data": Path(args.data).name}
        text = json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "setting": setting, "median": summary,
                           "ratio": ratio, "rounds": results}, indent=1)
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
