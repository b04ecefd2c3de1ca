"""Compare ours with TRL 1.16 on the same model, pairs, order and precision; print medians.

    python bench/compare.py --model DIR --data prefs.jsonl --pairs 32 --batch 8 --rounds 5
    ... --bf16 --checkpointing      in bfloat16; recomputing activations
    ... --adapter lora              LoRA on q_proj and v_proj on both sides; qlora: ours alone
    ... --ablate sharing packing    ours with one thing turned off; see ABLATIONS
    ... --model qwen2-0.5b --tokenizer DIR --device cuda     a random model of that shape
    sh bench/table.sh MODEL PAIRS OUT    README's table and every ablation

Both train one epoch in file order, each run in a fresh process, with the reference precomputed:
TRL's fastest mode, and our default. Activation checkpointing is off on both sides unless asked for;
TRL 1.16 itself disables padding_free, and Liger needs a GPU, so this is TRL at its fastest on CPU.
Columns:

    run s     from start to the saved model: imports, tokenization, reference pass, training
    start s   until the first optimizer step: imports, tokenization, reference, on both sides
    train s   the optimizer steps
    tokens/s  of training; real tokens as TRL counts them: a prompt twice, padding never
    peak MiB  resident set of the process; on a GPU, CUDA's peak of reserved memory
    share     of the machine's matrix rate, measured here: the model's FLOPs (prompts once, nothing
              recomputed) of reference pass and training, over run s

An ablation runs ours with one thing turned off (or on: compile, checkpointing, forwards of other
lengths) beside our default.
Prints a table, and JSON with --json.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPES = {  # random models for machines where a real one is not at hand
    "qwen2-0.5b": dict(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=True,
    ),
}
ABLATIONS = {  # flags, or code that runs before dpo.main()
    "sharing": "import functools, data; "
    "data.collate = functools.partial(data.collate, share_prefix=False)",
    "packing": {"max_tokens_per_forward": 1},
    "forwards_1024": {"max_tokens_per_forward": 1024},
    "forwards_2048": {"max_tokens_per_forward": 2048},
    "forwards_4096": {"max_tokens_per_forward": 4096},
    "chunked_head": "import model; model.HEAD_CHUNK = 2**40",
    "wide_chunks": "import model; model.HEAD_CHUNK, model.KEPT = 2**26, 2",
    # backward computes all logits again, of a frozen head too
    "kept_logits": "import model, parts.head; model.How = "
    "lambda cap, compute, chunk, keep, more: parts.head.How(cap, compute, chunk, None, more)",
    "lean_reference": "import model; forward = model.Decoder.forward; "
    "model.Decoder.forward = lambda self, batch, statistics=True: forward(self, batch)",
    "precomputed_reference": {"precompute_ref_log_probs": False},
    "lora_product": "import model; from torch.nn.functional import linear; "
    "model.add_low_rank = lambda out, x, a, b, s: "
    "out + s * linear(linear(x.to(out.dtype), a.to(out.dtype)), b.to(out.dtype))",
    "c_layers": "from parts import c_layers; c_layers.library = lambda: None",
    "short_spin": {},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"torch_compile": True},
}
ENVIRONMENTS = {"short_spin": {"GOMP_SPINCOUNT": "300000"}}  # OpenMP's default
COLUMNS = (
    "run_s",
    "start_s",
    "train_s",
    "cpu_s",
    "pairs_per_s",
    "tokens_per_s",
    "peak_mib",
    "share",
)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if args.model in SHAPES:
            args.model = make_model(SHAPES[args.model], args.tokenizer, scratch / args.model)
        rows = read_rows(args.data, args.pairs)
        pairs = scratch / "pairs.jsonl"
        write_rows(pairs, rows)
        work = count_work(args, pairs, scratch / "store")
        results, rates = {name: [] for name in sides(args)}, []
        for i in range(args.rounds):
            rates.append(matrix_rate(args))
            for name in results:
                results[name].append(run(name, args, pairs, scratch / f"{name}{i}", work))
                print(f"round {i + 1} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    report(args, results, max(rates), work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json, for a random model")
    parser.add_argument("--data", required=True, help=".jsonl, .json, .gz")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--adapter", choices=("none", "lora", "qlora"), default="none")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--ablate",
        nargs="+",
        choices=tuple(ABLATIONS),
        default=[],
        help="ours with and without, no TRL",
    )
    parser.add_argument("--json", help="write everything here")
    return parser.parse_args()


def sides(args) -> list[str]:
    return ["ours", *args.ablate] if args.ablate or args.adapter == "qlora" else ["ours", "trl"]


def make_model(config: dict, tokenizer: str, directory: Path) -> str:
    """Save a random checkpoint with a tokenizer whose ids fit its vocabulary."""
    import model

    torch.manual_seed(0)
    made = model.Decoder(model.read_config(config))
    made.raw_config = config
    model.save_model(made, directory, torch.bfloat16)
    for file in Path(tokenizer).glob("tokenizer*.json"):
        shutil.copy(file, directory)
    return str(directory)


def read_rows(path: str, count: int) -> list[dict]:
    """Read the first rows that both sides accept."""
    from parts import rows as files

    rows = (row for _, row in files.read_rows(files.find_files(path)) if isinstance(row, dict))
    usable = [
        r for r in rows if r.get("chosen") and r.get("rejected") and r["chosen"] != r["rejected"]
    ]
    return usable[:count]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def count_work(args, pairs: Path, cache: Path) -> dict:
    """Count pairs, tokens and model FLOPs: each prompt once, nothing computed twice."""
    import data
    import model

    options = data.DataOptions(args.max_length, None, None, "keep_start", need_rejected=True)
    store = data.build_store([pairs], data.Tokenizer.load(args.model), options, cache)
    from parts.files import read_json

    config = model.read_config(read_json(Path(args.model) / "config.json"))
    with torch.device("meta"):
        blocks = sum(
            p.numel() for p in model.Decoder(config).model.layers.parameters() if p.dim() == 2
        )
    batches = [data.collate([store[i]]) for i in range(len(store))]
    scored = sum(len(b.targets) for b in batches)
    attended = sum(
        (e - s) * (d - c) + (e - s) * (e - s + 1) // 2
        for b in batches
        for s, e, c, d in b.spans.tolist()
    )
    forward = (
        2 * blocks * int(store.tokens.sum())
        + 2 * config.vocab_size * config.hidden_size * scored
        + 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * attended
    )
    return {
        "pairs": len(store),
        "stream_tokens": int(store.tokens.sum()),
        "tokens": sum(b.num_tokens for b in batches),
        "scored_tokens": scored,
        "forward_flops": forward,
        "flops": forward * (4 if args.adapter == "none" else 3),
    }  # a frozen weight needs no gradient


def matrix_rate(args) -> float:
    """Measure the FLOP/s of a large matrix product in the run's precision."""
    torch.set_num_threads(args.threads)
    size = 2048 if args.device == "cpu" else 8192
    a, b = torch.randn(
        2, size, size, dtype=torch.bfloat16 if args.bf16 else torch.float32, device=args.device
    )
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def ours(name: str, args, pairs: Path, out: Path) -> list[str]:
    words = {
        "model_name_or_path": args.model,
        "dataset_name": pairs,
        "output_dir": out,
        "cache_dir": out / "cache",
        "num_train_epochs": 1,
        "per_device_train_batch_size": args.batch,
        "max_length": args.max_length,
        "bf16": args.bf16,
        "gradient_checkpointing": args.checkpointing,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": args.device == "cpu",
    }
    words |= {} if args.adapter == "none" else {"use_peft": True}
    words |= {"load_in_4bit": True} if args.adapter == "qlora" else {}
    change = ABLATIONS.get(name, {})
    words, change = (words | change, "") if isinstance(change, dict) else (words, change)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dpo; {change}\n"
        "status = dpo.main(sys.argv[1:])"
    )
    return [
        sys.executable,
        "-c",
        code + PEAK.format(out=str(out)) + "\nsys.exit(status)",
        *(f"--{k}={v}" for k, v in words.items()),
    ]


def trl(args, pairs: Path, out: Path) -> list[str]:
    out.mkdir()
    run = {
        "model": args.model,
        "data": [str(pairs)],
        "out": str(out),
        "threads": args.threads,
        "save": True,
        "args": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": args.batch,
            "max_length": args.max_length,
            "bf16": args.bf16,
            "gradient_checkpointing": args.checkpointing,
            "precompute_ref_log_probs": True,
            "use_cpu": args.device == "cpu",
        },
    }
    if args.adapter == "lora":
        run["peft"] = {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
        }
    (out / "run.json").write_text(json.dumps(run))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); "
        "import trl_peer; trl_peer.main(sys.argv[1])"
    )
    return [sys.executable, "-c", code + PEAK.format(out=str(out)), str(out / "run.json")]


PEAK = """
import torch
if torch.cuda.is_initialized():
    open({out!r} + "/cuda_peak", "w").write(str(torch.cuda.max_memory_reserved()))"""


def run(name: str, args, pairs: Path, out: Path, work: dict) -> dict:
    """Run once in a process of its own, measured from outside."""
    command = trl(args, pairs, out) if name == "trl" else ours(name, args, pairs, out)
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), **ENVIRONMENTS.get(name, {})}
    before, started, marks, peak = (
        resource.getrusage(resource.RUSAGE_CHILDREN),
        time.perf_counter(),
        {},
        0,
    )
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=env)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            watch(out / "metrics.jsonl", marks, time.perf_counter() - started)
            time.sleep(0.02)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\nexit {process.returncode}: {errors.read()[-2000:]}")
    start, train = (
        (marks["begun"], marks["last"] - marks["begun"]) if name != "trl" else trl_times(out)
    )
    peak = int((out / "cuda_peak").read_text()) // 1024 if args.device == "cuda" else peak
    shutil.rmtree(out)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "run_s": round(seconds, 2),
        "start_s": round(start, 2),
        "train_s": round(train, 2),
        "cpu_s": round(cpu, 2),
        "pairs_per_s": round(work["pairs"] / seconds, 4),
        "tokens_per_s": round(work["tokens"] / train, 1),
        "peak_mib": peak // 1024,
        "flops_per_s": work["flops"] / seconds,
    }


def watch(metrics: Path, marks: dict, now: float) -> None:
    """Note when metrics.jsonl grows: it is made before the first step, with a line after each."""
    size = metrics.stat().st_size if metrics.exists() else None
    if size is not None and size != marks.get("size"):
        marks |= {"size": size, "last": now}
        marks.setdefault("begun", now)


def trl_times(out: Path) -> tuple[float, float]:
    seconds = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["timing"]["seconds"]
    return seconds["total"] - seconds["train"], seconds["train"]


def resident(pid: int) -> int:
    """Read the peak resident set so far, KiB (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0
    )


def report(args, results: dict, rate: float, work: dict) -> None:
    """Print medians and ratios; write them with every round, if asked."""
    median = medians(results, rate)
    print(
        f"{work['pairs']} pairs, {work['tokens']} tokens "
        f"({work['stream_tokens']} with each prompt once), "
        f"{work['flops'] / 1e12:.2f} TFLOP; matrix rate {rate / 1e9:.0f} GFLOP/s: "
        f"{work['flops'] / rate:.1f} s of products at that rate"
    )
    print(f"{'':22}" + "".join(f"{c:>13}" for c in COLUMNS))
    for name, r in median.items():
        print(
            f"{name:22}"
            + "".join(
                f"{r[c]:13.3f}" if c in ("share", "pairs_per_s") else f"{r[c]:13.1f}"
                for c in COLUMNS
            )
        )
    keys = ("pairs_per_s", "tokens_per_s", "peak_mib", "cpu_s")
    ratio = {
        n: {k: round(median["ours"][k] / median[n][k], 3) for k in keys}
        for n in median
        if n != "ours"
    }
    for name, r in ratio.items():
        print(f"ours / {name}: " + "  ".join(f"{k} {v:.2f}x" for k, v in r.items()))
    if args.json:
        found = {"median": median, "ours_over": ratio, "rounds": results}
        write_json(args, {"work": work, "matrix_gflops": round(rate / 1e9)} | found)


def medians(results: dict, rate: float) -> dict:
    """Return each side's medians over the rounds, with its share of the matrix rate."""
    found = {}
    for name, runs in results.items():
        found[name] = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        found[name]["share"] = round(found[name].pop("flops_per_s") / rate, 3)
    return found


def write_json(args, found: dict) -> None:
    """Write what was found, with the day, the machine and the setting."""
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
    }
    hidden = ("model", "data", "json", "tokenizer")
    setting = {k: v for k, v in vars(args).items() if k not in hidden}
    setting |= {"model": Path(args.model).name, "data": Path(args.data).name}
    day = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "setting": setting}
    Path(args.json).write_text(json.dumps(day | found, indent=1) + "\n")


def processor() -> str:
    """Name the processor, and its bfloat16 matrix instructions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    return " ".join(
        [
            *(names[:1] or [platform.processor()]),
            *(f for f in ("avx512_bf16", "amx_bf16") if f" {f}" in info),
        ]
    )


if __name__ == "__main__":
    main()
