"""Measure what a 4-bit base saves: memory of LoRA over bfloat16 and over NF4, loading and training.

    python bench/qlora.py --model DIR --data prefs.jsonl
                          [--pairs 16] [--batch 2] [--max_length 512] [--json FILE]

Each run is a process of its own. `load` is what the process holds after loading the model, beyond
what it held before, and `load peak` the most it held meanwhile; `train peak` is of a full run of
dpo.py with gradient checkpointing. All are private memory (RssAnon, sampled every millisecond):
pages of the mapped checkpoint belong to the file, and the system may drop them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASES = {
    "bfloat16": [],
    "nf4": ["--load_in_4bit"],
    "nf4, nested": ["--load_in_4bit", "--use_bnb_nested_quant"],
}
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import dpo
from extras.models import opening
status = "/proc/self/status"
private = lambda: next(int(l.split()[1]) for l in open(status) if l.startswith("RssAnon"))
settings = dict(nested="nested" in sys.argv[3]) if "nf4" in sys.argv[3] else None
if settings:
    from extras.models import nf4
    # Not counted: the first call allocates memory that is not the model's.
    nf4.quantize(torch.ones(64, 64), nested=True)
before = private()
print("loading", before, flush=True)
model = opening.load_model(sys.argv[2], torch.bfloat16, four_bit=settings)
print(private() - before)
"""


def main() -> None:
    args = parse()
    rows = {}
    for name, flags in BASES.items():
        held, load_peak, _ = watch([sys.executable, "-c", LOAD, str(ROOT), args.model, name])
        with tempfile.TemporaryDirectory() as scratch:
            _, peak, seconds = watch(
                [sys.executable, str(ROOT / "dpo.py"), *map(str, training(args, scratch)), *flags]
            )
            losses = [
                json.loads(line)["loss"]
                for line in (Path(scratch) / "metrics.jsonl").read_text().splitlines()
            ]
        rows[name] = {
            "load": held,
            "load peak": load_peak,
            "train peak": peak,
            "seconds": seconds,
            "first loss": losses[0],
            "last loss": losses[-1],
        }
        print(f"{name:12}" + "".join(f"  {k} {v:.4g}" for k, v in rows[name].items()), flush=True)
    if args.json:
        whole = {"about": "MiB, seconds", "arguments": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(whole, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--json", help="write everything here")
    return parser.parse_args()


def training(args, scratch: str) -> list:
    return [
        "--model_name_or_path",
        args.model,
        "--dataset_name",
        args.data,
        "--output_dir",
        scratch,
        "--cache_dir",
        Path(scratch) / "cache",
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--dtype",
        "bfloat16",
        "--gradient_checkpointing",
        "--per_device_train_batch_size",
        args.batch,
        "--per_device_eval_batch_size",
        args.batch,
        "--max_steps",
        args.pairs // args.batch,
        "--max_length",
        args.max_length,
        "--use_cpu",
        "--learning_rate",
        "1e-4",
        "--shuffle_dataset",
        "false",
        "--save_strategy",
        "no",
        "--logging_steps",
        1,
        "--disable_tqdm",
    ]


def watch(command: list[str]) -> tuple[float, float, float]:
    """Run a command: (MiB it says it holds, its peak MiB since loading began, seconds)."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    before = int(process.stdout.readline().split()[1]) if command[1] == "-c" else 0
    peak = 0
    while process.poll() is None:
        peak = max(peak, private(process.pid))
        time.sleep(0.001)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    said = process.stdout.read()
    held = int(said.split()[-1]) / 1024 if command[1] == "-c" else 0.0
    return held, (peak - before) / 1024, time.perf_counter() - started


def private(pid: int) -> int:
    """Read the private memory of a process, KiB (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0
    )


if __name__ == "__main__":
    main()
