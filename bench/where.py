"""Profile a training step: its CPU kernels in groups, compared with the machine's matrix rate.

    python bench/where.py --model DIR --data prefs.jsonl --pairs 16 [--bf16] [--threads 1]

All pairs are one batch, trained on four times; PyTorch's profiler watches the fourth, when memory
has been touched and Adam's moments exist. The reference is left out (its pass is a forward).
"products" have a rate of their own: their FLOPs, with the head's second pass, over their time.
"share" is the model's FLOPs, nothing computed twice, over time and rate.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare  # noqa: E402

import dpo  # noqa: E402

GROUPS = {  # a kernel belongs to the first group with a word of its name
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("attention",),
    "casts and copies": ("copy_", "aten::cat"),
    "softmax over the vocabulary": ("softmax", "aten::exp", "aten::log", "aten::amax"),
    "optimizer, gradient norm": ("adam", "vector_norm"),
    "other passes over tensors": (
        "mul",
        "add",
        "silu",
        "pow",
        "mean",
        "sum",
        "rsqrt",
        "div",
        "sub",
        "vecdot",
        "neg",
        "fill_",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    setting = SimpleNamespace(
        model=args.model,
        max_length=1024,
        adapter="none",
        bf16=args.bf16,
        device="cpu",
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer, work = prepare(args, setting, Path(scratch))
        for _ in range(3):
            trainer.train_step()
        rate = compare.matrix_rate(setting)
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
            started = time.perf_counter()
            trainer.train_step()
            seconds = time.perf_counter() - started
    report(seen.key_averages(), seconds, rate, work)


def prepare(
    args: argparse.Namespace, setting: SimpleNamespace, scratch: Path
) -> tuple[dpo.DPOTrainer, dict]:
    pairs = scratch / "pairs.jsonl"
    compare.write_rows(pairs, compare.read_rows(args.data, args.pairs))
    work = compare.count_work(setting, pairs, scratch / "store")
    trainer = dpo.DPOTrainer(
        args=dpo.DPOConfig(
            model_name_or_path=args.model,
            dataset_name=str(pairs),
            output_dir=str(scratch / "out"),
            max_length=1024,
            cache_dir=str(scratch / "cache"),
            per_device_train_batch_size=args.pairs,
            num_train_epochs=9.0,
            bf16=args.bf16,
            reference_free=True,
            save_strategy="no",
            use_cpu=True,
        )
    )
    trainer.make_optimizer()
    return trainer, work


def report(kernels, seconds: float, rate: float, work: dict) -> None:
    spent, flops = dict.fromkeys([*GROUPS, "all else: Python, dispatch, allocation"], 0.0), 0
    for kernel in kernels:
        group = next(
            (g for g, words in GROUPS.items() if any(w in kernel.key for w in words)), None
        )
        if group:
            spent[group] += kernel.self_cpu_time_total / 1e6
        flops += kernel.flops if group == "matrix products" else 0
    *_, rest = spent
    spent[rest] = seconds - sum(spent.values())
    share = work["forward_flops"] * 3 / seconds / rate
    print(
        f"{work['pairs']} pairs, {work['stream_tokens']} tokens in {seconds:.2f} s: "
        f"{share:.0%} of {rate / 1e9:.0f} GFLOP/s"
    )
    for group, s in spent.items():
        own = f"   {flops / s / 1e9:.0f} GFLOP/s" if group == "matrix products" else ""
        print(f"{group:42}{s:8.2f} s{s / seconds:8.1%}{own}")


if __name__ == "__main__":
    main()
