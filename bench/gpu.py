"""Is it right on this GPU, and how fast, beside TRL 1.16? One command, about ten minutes:

    python bench/gpu.py                       every check, every case; needs `pip install trl==1.16.0 peft` for TRL's side
    python bench/gpu.py --cases hh-0.5b       some cases; --no_trl: ours alone
    python bench/gpu.py --device cpu          the same on tiny models in float32: does this script run?

First correctness: each path that a GPU takes, beside its plain formula in float64 on the CPU, values and gradients. Then
speed: optimizer steps on random weights of known shapes, with token lengths drawn from those measured on HH-RLHF and
UltraFeedback, each run in a process of its own; the same pairs for TRL, its batch halved until it fits. Last, a table in
Markdown. A step of TRL is timed without the loading of its batch, ours with it. The reference is left out on both sides: it
runs once, before training. "share" is the model's FLOPs, each prompt once and nothing computed twice, over time and the rate
of a large bfloat16 product, measured here. What is missing (a GPU, TRL, a folder) is said before anything runs; a case that fails
is printed, left out of the table, and does not stop the others.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import model as models  # noqa: E402
from extras.models import nf4  # noqa: E402
from parts import head, kernels, ranks  # noqa: E402

LLAMA_8B = compare.SHAPES["llama-3.2-1b"] | dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128, tie_word_embeddings=False
)
TINY = compare.SHAPES["qwen2-0.5b"] | dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
# Tokens of prompt, chosen and rejected: values at the middle of each twelfth, measured with SmolLM2's tokenizer.
LENGTHS = {
    "hh": (
        (16, 20, 25, 41, 67, 84, 105, 129, 154, 185, 252, 363),
        (6, 10, 13, 17, 21, 26, 31, 39, 47, 60, 81, 122),
        (6, 11, 15, 21, 27, 34, 41, 50, 60, 75, 103, 163),
    ),
    "uf": (
        (8, 13, 18, 26, 43, 68, 89, 122, 162, 250, 393, 591),
        (8, 25, 47, 80, 127, 186, 246, 333, 415, 491, 606, 804),
        (11, 28, 51, 82, 117, 168, 227, 286, 356, 443, 512, 717),
    ),
}


class Case(NamedTuple):
    shape: dict
    lengths: str
    pairs: int  # in a step
    targets: Any = None  # of a LoRA over a bfloat16 base; None trains all weights, float32 with bfloat16 products


CASES = {
    "hh-0.5b": Case(compare.SHAPES["qwen2-0.5b"], "hh", 64),
    "hh-0.5b-small": Case(compare.SHAPES["qwen2-0.5b"], "hh", 8),
    "uf-0.5b": Case(compare.SHAPES["qwen2-0.5b"], "uf", 16),
    "hh-8b-lora": Case(LLAMA_8B, "hh", 16, "all-linear"),
}
WARM, STEPS = 2, 6


def main() -> None:
    args = parse()
    if args.one:
        side, name, cut = args.one
        found = (ours if side == "ours" else trl)(case_of(name, args), args, int(cut))
        print("RESULT " + json.dumps(found))
        return
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else compare.processor()
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    good = report_checks(checks(device))
    rate = compare.matrix_rate(argparse.Namespace(threads=torch.get_num_threads(), device=args.device, bf16=args.device == "cuda"))
    print(f"\na large product: {rate / 1e12:.3g} TFLOP/s\n")
    del_cache()
    results = {}
    for case in args.cases:
        results[case] = {"ours": run("ours", case, args)}
        if not args.no_trl:
            results[case]["trl"] = run("trl", case, args)
        report_case(case, results[case])
    table(results, rate, name)
    if args.json:
        found = {"device": name, "torch": torch.__version__, "rate": rate, "cases": results}
        Path(args.json).write_text(json.dumps(found, indent=1))
    failed = any("error" in found for sides in results.values() for found in sides.values())
    sys.exit(0 if good and not failed else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--no_trl", action="store_true")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # side, case, cut: what a process of its own runs
    args = parser.parse_args()
    if problem := missing(args):
        parser.exit(2, f"bench/gpu.py: {problem}\n")
    return args


def missing(args: argparse.Namespace) -> str | None:
    """Say what would end the run after minutes."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return "no GPU here; --device cpu runs this script on tiny models"
    if args.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name()} does not compute bfloat16, which every case runs in"
    absent = [] if args.no_trl else [name for name in ("trl", "peft") if importlib.util.find_spec(name) is None]
    if absent:
        return f"no {' and no '.join(absent)} here: `pip install trl==1.16.0 peft`, or --no_trl for ours alone"
    if args.json and not Path(args.json).absolute().parent.is_dir():
        return f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}"
    return None


def del_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Right?


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def compared(fast: Callable, plain: Callable, inputs: list, device: torch.device, dtype: torch.dtype) -> float:
    """The worst relative error of a value or gradient of `fast`, in `dtype` on the device, beside `plain` in float64."""
    made = []
    for function, place, kind in ((fast, device, dtype), (plain, torch.device("cpu"), torch.float64)):
        leaves = [x.to(place, dtype).to(kind).requires_grad_() for x in inputs]  # the same rounded values
        out = function(*leaves)
        slope = torch.arange(out.numel(), device=place, dtype=torch.float64).cos().view(out.shape)
        made.append([out, *torch.autograd.grad((out.double() * slope).sum(), leaves)])
    return max(relative(a, b) for a, b in zip(*made, strict=True))


def dense_attention(q, k, v, batch: data.Batch, window: int | None, scale: float) -> torch.Tensor:
    """One mask over the whole stream."""
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, end, a, b in batch.spans.tolist():
        seen[start:end, start:end] = True
        seen[start:end, a:b] = True
    distance = batch.position_ids[:, None] - batch.position_ids[None, :]
    seen &= (distance >= 0) & (distance < (window or 10**9))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def random_batch(seed: int, vocabulary: int = 97, longest: int = 60) -> data.Batch:
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, vocabulary, rng.integers(1, longest))
    return data.collate([data.Pair(draw(), draw(), draw()) for _ in range(6)])


def checks(device: torch.device) -> list[tuple[str, float, float]]:
    """[(what, its worst relative error, the most that rounding explains)]."""
    bf16 = torch.bfloat16
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    found = []
    for heads, groups, size, window in ((14, 2, 64, None), (8, 8, 128, None), (32, 8, 128, 37), (4, 1, 256, 20)):
        batch = random_batch(heads + size)
        shape = dict(num_attention_heads=heads, num_key_value_heads=groups, head_dim=size, sliding_window=window)
        config = models.read_config(TINY | shape | {"model_type": "mistral"})
        plan = models.plan_attention(config, batch.spans, batch.position_ids.to(device), bf16)[window]
        T = len(batch.input_ids)
        dense = partial(dense_attention, batch=batch, window=window, scale=config.attention_scale)
        inputs = [rand(T, heads, size), rand(T, groups, size), rand(T, groups, size)]
        error = compared(plan, dense, inputs, device, bf16)
        found.append((f"attention, {heads} heads on {groups}, size {size}, window {window}", error, 2e-2))
    norm = models.Norm(64, models.read_config(TINY)).to(device)
    plain_norm = lambda x: x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    found.append(("RMSNorm", compared(norm, plain_norm, [rand(37, 64)], device, bf16), 2e-2))
    swish = lambda a, b: a * a.sigmoid() * b
    found.append(("SwiGLU", compared(kernels.swiglu, swish, [rand(33, 130), rand(33, 130)], device, bf16), 2e-2))
    lora = lambda out, x, a, b: out + 2 * (x @ a.T) @ b.T
    fast_lora = lambda out, x, a, b: kernels.add_low_rank(out * 1, x, a, b, 2.0)
    found.append(("LoRA", compared(fast_lora, lora, [rand(21, 40), rand(21, 48), rand(8, 48), rand(40, 8)], device, bf16), 2e-2))
    config = models.read_config(TINY)
    tables = lambda x: models.rotary_tables(config.ropes, torch.arange(37).to(x.device), torch.float32)["full_attention"]
    turned = lambda x: models.rotate(x, *tables(x))
    found.append(("rotation", compared(turned, turned, [rand(37, 4, 16)], device, bf16), 2e-2))
    return found + four_bit_checks(device, rand) + head_checks(device, rand) + model_checks(device)


def four_bit_checks(device: torch.device, rand: Callable) -> list[tuple[str, float, float]]:
    """Quantized and made wide on the device, beside the same on the CPU: to the bit."""
    weight = rand(300, 1000).float()
    found = []
    for nested in (False, True):
        there, here = (nf4.quantize(weight.to(place), nested=nested) for place in (device, "cpu"))
        error = max(float(a.cpu().ne(b).sum()) for a, b in ((there.packed, here.packed), (there.absmax, here.absmax)))
        wide = [nf4.dequantize(state, torch.bfloat16).cpu() for state in (there, here)]
        found.append((f"NF4{', nested' * nested}, values that differ", max(error, float(wide[0].ne(wide[1]).sum())), 0))
    return found


def head_checks(device: torch.device, rand: Callable) -> list[tuple[str, float, float]]:
    targets = torch.randint(0, 5000, (75,), generator=torch.Generator().manual_seed(1))
    how = "Triton" if head.has_triton(device) else "plain"

    def logps(x: torch.Tensor, w: torch.Tensor, cap: float | None, keep: int) -> torch.Tensor:
        return models.token_logps([(x, w)], targets.to(x.device), cap, keep).logps

    def dense(x: torch.Tensor, w: torch.Tensor, cap: float | None) -> torch.Tensor:
        logits = x @ w.T if cap is None else cap * torch.tanh(x @ w.T / cap)
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    found = []
    inputs = [rand(75, 64), rand(5000, 64) * 0.3]
    for cap in (None, 30.0):
        for keep in (0, head.KEPT):
            error = compared(partial(logps, cap=cap, keep=keep), partial(dense, cap=cap), inputs, device, torch.bfloat16)
            found.append((f"head ({how}), soft-cap {cap}, {'kept' if keep else 'computed again'}", error, 2e-2))
    x, w = (t.to(device, torch.float32) for t in inputs)
    rows = x @ w.T
    at = targets.to(device)
    how = head.How(None, torch.float32, 2**24, 0)
    columns = lambda *inputs: [torch.cat(column) for column in zip(*head.score_chunk(*inputs, slopes=False))]
    fast = columns(rows.clone(), at, how)
    exact = columns(rows.double().cpu(), targets, how._replace(compute=torch.float64))
    found.append(("head, statistics", max(relative(a, b) for a, b in zip(fast, exact)), 1e-4))
    return found


def model_checks(device: torch.device) -> list[tuple[str, float, float]]:
    """A whole model and its gradients on the device, beside itself in float64 on the CPU."""
    batch = random_batch(1, vocabulary=512)

    def logps_and_grads(model: models.Decoder, place: torch.device, half: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast(place.type, torch.bfloat16, enabled=half):
            logps = model(batch.to(place)).logps
        logps.sum().backward()
        return [logps.detach(), torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])]

    torch.manual_seed(0)
    exact = models.Decoder(models.read_config(TINY)).double()
    expected = logps_and_grads(exact, torch.device("cpu"), False)
    found = []
    for name, half, limit in (("float32", False, 1e-4), ("bfloat16 products", True, 5e-2)):
        model = models.Decoder(models.read_config(TINY)).to(device)
        model.load_state_dict({n: p.float() for n, p in exact.state_dict().items()})
        got = logps_and_grads(model, device, half)
        found.append((f"a model, {name}", max(relative(a, b) for a, b in zip(got, expected)), limit))
        model.model.gradient_checkpointing = True
        again = logps_and_grads(model, device, half)
        found.append((f"a model, {name}, checkpointed", max(relative(a, b) for a, b in zip(again, expected)), limit))
    return found


def report_checks(found: list[tuple[str, float, float]]) -> bool:
    print(f"{'beside the plain formula in float64':58}{'error':>10}{'limit':>10}")
    for name, error, limit in found:
        print(f"{name:58}{error:10.1e}{limit:10.0e}  {'ok' if error <= limit else 'NOT OK'}")
    return all(error <= limit for _, error, limit in found)


# How fast?


def case_of(name: str, args: argparse.Namespace) -> Case:
    case = CASES[name]
    return case if args.device == "cuda" else case._replace(shape=TINY, pairs=min(case.pairs, 2))


def run(side: str, name: str, args: argparse.Namespace) -> dict:
    """Run a case in a process of its own; TRL's batch is halved and accumulated until it fits."""
    case = case_of(name, args)
    cut = 1
    while cut <= case.pairs:
        command = [sys.executable, __file__, "--device", args.device, "--one", side, name, str(cut)]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT ")) | {"forwards": cut}
        if "OutOfMemoryError" not in done.stderr:
            print(f"{' '.join(command)}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        cut *= 2
    return {}


def make_rows(case: Case, count: int) -> list[dict]:
    """Pairs of words that are one token each."""
    rng = np.random.default_rng(0)
    words = min(case.shape["vocab_size"], 50000)
    text = lambda size: " ".join(f"w{i}" for i in rng.integers(2, words, size))
    sizes = [rng.choice(column, count) for column in LENGTHS[case.lengths]]
    return [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in zip(*sizes)]


def make_tokenizer(case: Case, directory: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory.mkdir(exist_ok=True)
    words = {f"w{i}": i for i in range(min(case.shape["vocab_size"], 50000))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0", "pad_token": "w0", "unk_token": "w1"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(case.shape | {"eos_token_id": 0, "bos_token_id": None}))
    return directory


class Clock:
    """Seconds of each step, waited for, and the device's peak after the first steps."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.stamps: list[float] = []

    def stamp(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            if len(self.stamps) == 2 * WARM:
                torch.cuda.reset_peak_memory_stats()
        self.stamps.append(time.perf_counter())

    def found(self) -> dict:
        seconds = [b - a for a, b in zip(self.stamps[0::2], self.stamps[1::2])][WARM:]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else compare.resident("self") / 2**20
        return {"seconds": statistics.median(seconds), "peak_gib": peak}


def ours(case: Case, args: argparse.Namespace, cut: int) -> dict:
    if args.device == "cuda":
        ranks.reuse_memory()  # as a run does, before the first tensor
    with tempfile.TemporaryDirectory() as scratch:
        home = make_tokenizer(case, Path(scratch) / "home")
        options = {} if case.targets is None else dict(
            use_peft=True, dtype="bfloat16" if args.device == "cuda" else "float32", lora_target_modules=[case.targets])
        c = dpo.DPOConfig(
            output_dir=str(Path(scratch) / "out"), model_name_or_path=str(home), cache_dir=str(Path(scratch) / "cache"),
            per_device_train_batch_size=case.pairs // cut, gradient_accumulation_steps=cut, max_steps=WARM + STEPS + 1,
            max_length=None, shuffle_dataset=False, save_strategy="no", reference_free=True, use_cpu=args.device == "cpu",
            bf16=args.device == "cuda" and case.targets is None, **options)
        torch.set_default_dtype(getattr(torch, c.dtype))  # 8B in float32 would need 32 GB first
        with torch.device(args.device):
            model = models.Decoder(models.read_config(case.shape))
        torch.set_default_dtype(torch.float32)
        model.raw_config = case.shape
        trainer = dpo.DPOTrainer(
            model=model, args=c, train_dataset=make_rows(case, case.pairs * (WARM + STEPS + 1)),
            processing_class=data.Tokenizer.load(home))
        trainer.make_optimizer()
        clock = Clock(args.device)
        work = []
        for _ in range(WARM + STEPS):
            pairs = [trainer.train_store[int(i)] for i in trainer.pairs_of(trainer.position.step)]
            work.append(forward_flops(trainer.model.config, data.collate(pairs)))
            clock.stamp()
            trainer.train_step()
            clock.stamp()
        passes = 3 if case.targets is None else 2  # a frozen weight needs no gradient
        found = clock.found() | {"pairs": case.pairs, "flops": passes * statistics.mean(work[WARM:])}
        return found | {"kernels": top_kernels(trainer.train_step, args.device)}


def forward_flops(config: models.ModelConfig, batch: data.Batch) -> float:
    """Count the model's operations on a stream, each prompt once."""
    with torch.device("meta"):
        blocks = sum(p.numel() for p in models.Decoder(config).model.layers.parameters() if p.dim() == 2)
    seen = sum((e - s) * (d - c) + (e - s) * (e - s + 1) / 2 for s, e, c, d in batch.spans.tolist())
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * seen
    return 2 * blocks * len(batch.input_ids) + 2 * config.vocab_size * config.hidden_size * len(batch.targets) + attention


def top_kernels(step: Callable, device: str) -> list[tuple[str, float]]:
    """[(kernel, its share of all kernels' time)] of one step."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    spent = lambda k: k.self_device_time_total if device == "cuda" else k.self_cpu_time_total
    kernels = sorted(seen.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, kernels)) or 1
    return [(k.key[:70], spent(k) / total) for k in kernels[:12]]


def trl(case: Case, args: argparse.Namespace, cut: int) -> dict:
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = Clock(args.device)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.stamp()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stamp()

    with tempfile.TemporaryDirectory() as scratch:
        home = make_tokenizer(case, Path(scratch) / "home")
        lora = None
        if case.targets is not None:
            from peft import LoraConfig

            lora = LoraConfig(r=16, lora_alpha=32, target_modules=case.targets, task_type="CAUSAL_LM")
        dtype = torch.bfloat16 if lora is not None and args.device == "cuda" else torch.float32
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home), dtype=dtype)
        c = DPOConfig(
            output_dir=str(Path(scratch) / "out"), per_device_train_batch_size=case.pairs // cut,
            gradient_accumulation_steps=cut, max_steps=WARM + STEPS, max_length=None, bf16=args.device == "cuda",
            gradient_checkpointing=False, precompute_ref_log_probs=True, report_to=[], save_strategy="no",
            use_cpu=args.device == "cpu", disable_tqdm=True, logging_steps=1000)
        rows = Dataset.from_list(make_rows(case, case.pairs * (WARM + STEPS)))
        tokenizer = AutoTokenizer.from_pretrained(home)
        trainer = DPOTrainer(model=model, args=c, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        trainer.add_callback(Watch())
        trainer.train()
    return clock.found() | {"pairs": case.pairs}


# What was found


def report_case(name: str, sides: dict) -> None:
    for side, found in sides.items():
        if "seconds" not in found:
            print(f"{name} {side}: {unmeasured(found)} {found.get('error', '')}", flush=True)
            continue
        print(f"{name} {side}: {1e3 * found['seconds']:.1f} ms a step of {found['pairs']} pairs in {found['forwards']} "
              f"forwards, {found['peak_gib']:.2f} GiB", flush=True)
        for kernel, share in found.get("kernels", ()):
            print(f"    {share:6.1%}  {kernel}")


def unmeasured(found: dict) -> str:
    return "failed" if "error" in found else "does not fit"


def table(results: dict, rate: float, device: str) -> None:
    theirs = "TRL " + (importlib.metadata.version("trl") if importlib.util.find_spec("trl") else "1.16.0")
    print(f"\n{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, "
          f"`python bench/gpu.py {' '.join(sys.argv[1:])}`; matrix rate {rate / 1e12:.3g} TFLOP/s\n")
    print(f"| case | pairs/s | {theirs} | ratio | peak GiB | {theirs} | ratio | share of the matrix rate |")
    print("|---|---|---|---|---|---|---|---|")
    for name, sides in results.items():
        own, other = sides["ours"], sides.get("trl")
        cells = [name, unmeasured(own), "", "", "", "", "", ""]
        if "seconds" in own:
            share = own["flops"] / own["seconds"] / rate
            cells = [name, f"{own['pairs'] / own['seconds']:.1f}", "", "", f"{own['peak_gib']:.2f}", "", "", f"{share:.0%}"]
        if other is not None and "seconds" not in other:
            cells[2] = cells[5] = unmeasured(other)
        elif other is not None:
            cells[2], cells[5] = f"{other['pairs'] / other['seconds']:.1f}", f"{other['peak_gib']:.2f}"
            if "seconds" in own:
                cells[3] = f"{other['seconds'] / own['seconds']:.1f}x"
                cells[6] = f"{own['peak_gib'] / other['peak_gib']:.2f}x"
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
