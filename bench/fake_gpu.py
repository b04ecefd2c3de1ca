"""The CUDA paths on a GPU that is not there: train steps, LoRA, 4 bits, experts, FSDP, generation, families.

    python bench/fake_gpu.py               needs a CUDA build of torch, gcc and Linux; no GPU
    python bench/fake_gpu.py --only lora
    python bench/fake_gpu.py --predict hh-0.5b   forward and backward of a case of bench/gpu.py, in bytes, FLOPs and a roofline's ms

Tensors are fake (torch's FakeTensorMode, device "cuda"): shapes, types and devices are checked as on a GPU, and nothing is
computed. Two small libraries stand in for the driver. For each path it prints how often the host waits for the device and where,
the operations on the device (about as many kernels), and the bytes that autograd keeps for the backward. No times. --predict
takes each operation to last as long as the slowest of its bytes at 2.6 TB/s, its FLOPs at 620 TFLOP/s and a launch of 2.2
microseconds, one after the other: rates assumed for an H100, and nothing that was measured.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ["cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 0; return 0; }"] + [
    name + "(void) { return 0; }"
    for name in """
cuCtxGetCurrent cuCtxSetCurrent cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuFuncGetAttribute cuFuncSetAttribute
cuFuncSetCacheConfig cuGetErrorString cuLaunchCooperativeKernel cuLaunchKernel cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2
cuModuleGetFunction cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload cuOccupancyMaxActiveBlocksPerMultiprocessor
cuPointerGetAttribute cuTensorMapEncodeTiled""".split()
]
RUNTIME = [
    "cudaGetDeviceCount(int *n) { *n = 1; return 0; }",
    "cudaGetDevice(int *d) { *d = 0; return 0; }",
    "cudaDeviceGetStreamPriorityRange(int *a, int *b) { *a = 0; *b = -5; return 0; }",
    "cudaStreamCreateWithPriority(void **s, unsigned f, int p) { *s = malloc(8); return 0; }",
    "cudaStreamIsCapturing(void *s, int *on) { *on = 0; return 0; }",
    "cudaEventCreateWithFlags(void **e, unsigned f) { *e = malloc(8); return 0; }",
    "cudaDriverGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 0; return 0; }",
] + [
    name + "() { return 0; }"
    for name in """
cudaSetDevice cudaEventDestroy cudaEventRecord cudaEventQuery cudaEventSynchronize cudaStreamWaitEvent cudaStreamSynchronize
cudaStreamQuery cudaDeviceSynchronize cudaGetLastError cudaThreadExchangeStreamCaptureMode""".split()
]


def with_stubs() -> None:
    """Start this program again with the two libraries in place."""
    home = Path(tempfile.mkdtemp(prefix="fake-gpu-"))
    for name, functions, more in (("libcuda.so.1", DRIVER, ["-Wl,-soname,libcuda.so.1"]), ("runtime.so", RUNTIME, [])):
        code = "#include <stdlib.h>\n" + "".join(f"int {function}\n" for function in functions)
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-w", "-x", "c", "-", *more, "-o", home / name], input=code, text=True, check=True
        )
    env = os.environ | {
        "LD_LIBRARY_PATH": str(home),
        "LD_PRELOAD": str(home / "runtime.so"),
        "FAKE_GPU": str(home),
        "OMP_NUM_THREADS": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--only", nargs="*", default=[""], help="paths whose name has one of these in it")
parser.add_argument("--predict", metavar="CASE", help="count bytes and FLOPs of this case instead")
parser.add_argument("--proj", default=str(ROOT), help="the checkout whose paths are run")
a = parser.parse_args()
if "FAKE_GPU" not in os.environ:
    with_stubs()
PROJ = os.path.realpath(a.proj)
sys.path[:0] = [PROJ, PROJ + "/tests"]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._subclasses.fake_tensor as fake_tensor  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

fake_tensor.init_gpu_context = lambda *x: None
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *x, **k: True
torch.cuda.get_device_capability = lambda *x: (9, 0)
torch.manual_seed = lambda seed: None

import conftest  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import model as models  # noqa: E402

DEVICE = torch.device("cuda", 0)
MODE = FakeTensorMode(allow_non_fake_inputs=True)
VIEWS = set(
    """view _unsafe_view t transpose permute expand slice select split split_with_sizes unbind detach alias as_strided
    unsqueeze squeeze
    reshape empty empty_like new_empty empty_strided new_empty_strided _reshape_alias lift_fresh unfold chunk view_as
    diagonal resize_ set_""".split()
)
SCORED = [1]  # tokens of the last batch
ASKED = collections.Counter()  # what the host asked of the device besides operations


def put(x):
    """The same on the device, without its numbers."""
    return torch.empty(x.shape, dtype=x.dtype, device=DEVICE) if isinstance(x, torch.Tensor) else x


def for_real(function):
    @functools.wraps(function)
    def run(*args, **named):
        with unset_fake_temporarily():
            return function(*args, **named)

    return run


real_plan = models.plan_varlen


def plan_varlen(config, spans, device, queries=None):
    with unset_fake_temporarily():
        plans = real_plan(config, spans, torch.device("cpu"), queries)
    return {w: p._replace(**{n: put(v) for n, v in p._asdict().items() if isinstance(v, torch.Tensor)}) for w, p in plans.items()}


models.plan_varlen = plan_varlen


def where(what: str) -> str:
    for frame in reversed(traceback.extract_stack()):
        if os.path.abspath(frame.filename).startswith(PROJ + "/") and "fake_gpu" not in frame.filename:
            return f"{what} at {os.path.relpath(frame.filename, PROJ)}:{frame.lineno}"
    return what


class Host(TorchDispatchMode):
    """Answers what the host asks of the device; counts that, and the operations."""

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):  # its parts come here one by one
            return NotImplemented
        name = func._opname
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = torch.device(kwargs.get("device") or "cpu").type
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors) and there == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name not in VIEWS:
            self.kernels += 1
        if name == "addmm" and func._overloadname.startswith("dtype"):  # has no fake form
            return kwargs["out"] if "out" in kwargs else torch.empty(args[0].shape, dtype=args[3], device=DEVICE)
        if name in ("convolution", "convolution_backward"):  # the choice of a kernel would ask the device
            there = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            return tree_map_only(torch.Tensor, put, func(*there[0], **there[1]))
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            ASKED[where("repeat_interleave without output_size")] += 1
            return torch.empty(SCORED[-1], dtype=args[0].dtype, device=DEVICE)
        if name == "_local_scalar_dense":
            ASKED[where("item")] += 1
            return 1.0 if args[0].dtype.is_floating_point else args[0].dtype == torch.bool or 1
        if name == "equal":
            return True
        if name == "bincount":
            ASKED[where("bincount")] += 1
            size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return torch.empty(size, dtype=torch.int64, device=args[0].device)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            to = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if isinstance(source, torch.Tensor) and source.device.type != torch.device(to).type and not is_async:
                ASKED[where(f"copy from {source.device.type} to {torch.device(to).type}")] += 1
        if name == "_to_copy" and there == "cuda" and not isinstance(args[0], FakeTensor):
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=DEVICE)
        return func(*args, **kwargs)


REAL = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy")}


def tolist(self):
    if not isinstance(self, FakeTensor):
        return REAL["tolist"](self)
    ASKED[where("tolist")] += 1
    return np.ones(tuple(self.shape), float if self.dtype.is_floating_point else int).tolist()


def numpy(self, *args, **named):
    if not isinstance(self, FakeTensor):
        return REAL["numpy"](self, *args, **named)
    ASKED[where("numpy")] += 1
    return np.zeros(tuple(self.shape), "float32" if self.dtype == torch.bfloat16 else str(self.dtype).removeprefix("torch."))


torch.Tensor.tolist, torch.Tensor.numpy = tolist, numpy
FakeTensor.tolist = tolist
real_tensor = torch.tensor


def tensor(value, *args, device=None, **named):
    if device is None or torch.device(device).type != "cuda":
        return real_tensor(value, *args, device=device, **named)
    ASKED[where("torch.tensor on the device")] += 1
    return put(for_real(real_tensor)(value, *args, **named))


torch.tensor = tensor
real_new_tensor = torch.Tensor.new_tensor


def new_tensor(self, value, **named):
    if not isinstance(self, FakeTensor):
        return real_new_tensor(self, value, **named)
    ASKED[where("new_tensor on the device")] += 1
    return put(for_real(real_tensor)(value, dtype=self.dtype))


torch.Tensor.new_tensor = new_tensor


BYTES, FLOPS, LAUNCH = 2.6e12, 6.2e14, 2.2e-6  # a second, a second, seconds
METER = []  # the Traffic that is counting


def size(x) -> int:
    """Bytes of all tensors in x; what is expanded is read from a cache."""
    if isinstance(x, torch.Tensor):
        return math.prod(n for n, step in zip(x.shape, x.stride()) if step) * x.element_size()
    return sum(map(size, x)) if isinstance(x, (list, tuple)) else 0


def product_flops(name: str, args, out) -> float:
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
        return 2 * math.prod(out.shape) * args[0 if name in ("mm", "bmm") else 1].shape[-1]
    return 0


class Traffic(Host):
    """Counts bytes and FLOPs too, by operation: [calls, bytes, FLOPs, seconds]."""

    def __init__(self):
        super().__init__()
        self.rows = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])

    def add(self, name: str, moved: float, flops: float = 0) -> None:
        seconds = max(moved / BYTES, flops / FLOPS, LAUNCH)
        self.rows[name] = [a + b for a, b in zip(self.rows[name], (1, moved, flops, seconds))]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._opname
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name in VIEWS or not any(t.device.type == "cuda" for t in results):
            return out
        if name in ("embedding", "index_select", "gather", "index"):
            moved = 2 * size(out)
        elif name == "copy_":
            moved = size(args[0]) + size(args[1])
        elif name in ("zero_", "fill_"):
            moved = size(out)
        else:
            is_added_to = not (name == "addmm" and (kwargs or {}).get("beta", 1) == 0)
            moved = size(list(args[0 if is_added_to else 1 :])) + size(out)
        self.add(name, moved, product_flops(name, args, out))
        return out


class Kernel:
    """In place of a Triton kernel: counted, not run."""

    launches = 0

    def __init__(self, name: str = ""):
        self.name = name

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **named):
        Kernel.launches += 1
        if METER:  # each tensor goes over once; logits that are overwritten, three times
            METER[0].add("Triton: " + self.name, size(list(args)) + (2 * size(args[0]) if named.get("SLOPES") else 0))


def replace_kernels() -> None:
    for path in [*Path(PROJ, "parts").glob("triton_*.py"), *Path(PROJ, "extras").glob("*/triton_*.py")]:
        module = importlib.import_module(".".join(path.relative_to(PROJ).with_suffix("").parts))
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            setattr(module, name, Kernel(name))


def sdpa(q, k, v, attn_mask=None, scale=None, is_causal=False, **more):
    """Shapes and devices of the plain path: the choice of a kernel asks the device that is not there."""
    scores = q @ k.transpose(-1, -2) * (scale or 1.0)
    if attn_mask is not None:
        assert attn_mask.device == q.device
        scores = scores.masked_fill(~attn_mask, -1e9)
    return scores.softmax(-1).to(v.dtype) @ v


torch.nn.functional.scaled_dot_product_attention = sdpa


def to_device(module, dtype=None) -> None:
    for m in module.modules():
        for kind in (m._parameters, m._buffers):
            for name, p in list(kind.items()):
                if p is not None:
                    t = torch.empty(p.shape, dtype=dtype or p.dtype, device=DEVICE)
                    kind[name] = torch.nn.Parameter(t, p.requires_grad) if isinstance(p, torch.nn.Parameter) else t


def measured(run) -> dict:
    """Run on fake tensors; count waits, operations and what is saved for backward."""
    ASKED.clear()
    Kernel.launches = 0
    saved = {}

    def pack(t):
        if isinstance(t, FakeTensor) and not isinstance(t, torch.nn.Parameter):
            saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    host = Host()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), host:
        run()
    return {"kernels": host.kernels + Kernel.launches, "saved": sum(saved.values()), "waits": collections.Counter(ASKED)}


work = Path(tempfile.mkdtemp())
(work / "tiny").mkdir()
tiny = conftest.make_tiny(work / "tiny")
rows = work / "pairs.jsonl"
rows.write_text("".join(json.dumps(r) + "\n" for r in conftest.make_rows(23, scores=True)))


class Stream:
    """In place of CUDA's streams and events: nothing runs, so nothing is waited for."""

    def __init__(self, *args, **named):
        pass

    def record_event(self, event=None):
        return event or Stream()

    def nothing(self, *args):
        pass

    record = wait = wait_event = wait_stream = synchronize = nothing


def shard(t, words: str) -> None:
    """Split a trainer's models as one of two ranks does, whose exchanges do nothing; the files are not read."""
    from extras.run import fsdp

    if not dist.is_initialized():
        for_real(dist.init_process_group)("fake", store=FakeStore(), rank=0, world_size=2)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream, torch.cuda.current_device = Stream, lambda: 0
    torch.Tensor.pin_memory = lambda self, *args, **named: self
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    fsdp.init_device_mesh = for_real(init_device_mesh)
    fsdp.Shards.load = lambda self, sharded, source: None
    t.ranks = t.ranks._replace(world=2)
    t.place = fsdp.Shards(
        t.model,
        t.ranks,
        dataclasses.replace(t.args, fsdp=words),
        t.precision,
        t.reference if hasattr(t.reference, "adapter") else dpo.NoReference(),
    )
    t.model = t.place.model


def step(fsdp="", **more) -> dict:
    """One train_step of the tiny model."""
    options = dict(
        model_name_or_path=str(tiny),
        dataset_name=str(rows),
        output_dir=tempfile.mkdtemp(),
        cache_dir=str(work / "cache"),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=8,
        report_to=["none"],
        save_strategy="no",
        disable_tqdm=True,
    )
    t = dpo.DPOTrainer(args=dpo.DPOConfig(**options | more))
    t.reference.prepare()
    t.max_tokens = None
    collate, from_numpy = data.collate, torch.from_numpy

    def noted(*args, **named):
        batch = for_real(collate)(*args, **named)
        SCORED.append(len(batch.targets))
        return batch

    with MODE:
        to_device(t.model)
        t.model.tie()
        if t.reference.model is not None:
            to_device(t.reference.model)
            t.reference.model.tie()
        for wrapper in getattr(t.reference, "adapter", {}).values():
            base = wrapper._modules.pop("base_layer")
            to_device(wrapper)
            wrapper.base_layer = base
        t.ranks = t.place.ranks = t.ranks._replace(device=DEVICE)
        if fsdp:
            shard(t, fsdp)
        t.make_optimizer()
        t.optimizer.step = lambda: None
        data.collate, torch.from_numpy = noted, for_real(from_numpy)
        try:
            return measured(t.train_step)
        finally:
            data.collate, torch.from_numpy = collate, from_numpy


def forward_backward(raw: dict, kind: str) -> dict:
    """A model of its own on three pairs, under autocast or with bfloat16 weights."""
    m = models.Decoder(models.read_config(raw))
    batch = data.collate([data.Pair(*(np.arange(1, n) for n in (5, 9, 7))) for _ in range(3)])

    def run():
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
            out = m(batch._replace(**{n: put(v) for n, v in batch._asdict().items() if n not in ("spans", "pair_ids")}))
        total = out.logps.sum()
        (total if out.aux_loss is None else total + out.aux_loss).backward()
        assert all(p.grad is not None for p in m.parameters() if p.requires_grad)

    with MODE:
        to_device(m, torch.bfloat16 if kind == "bfloat16" else None)
        m.tie()
        return measured(run)


def generation() -> dict:
    from extras.decoder import generate

    m = models.load_model(tiny, torch.bfloat16)
    generate.plan_varlen = plan_varlen
    options = generate.Sampling(max_new_tokens=3, temperature=0.7, top_k=5, top_p=0.9)
    with MODE, torch.no_grad():
        to_device(m)
        return measured(lambda: generate.complete(m, [[1, 5, 6], [1, 4]], options, samples=2))


def module_to(self, *args, **named):
    """In place of nn.Module.to, which does not put fake tensors into modules."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **named)
    for m in self.modules():
        for kind in (m._parameters, m._buffers):
            for name, p in kind.items():
                if p is None:
                    continue
                there, wide = torch.device(device or p.device), dtype if dtype and p.is_floating_point() else p.dtype
                if (there.type, wide) != (p.device.type, p.dtype):
                    t = torch.empty(p.shape, dtype=wide, device=there)
                    kind[name] = torch.nn.Parameter(t, p.requires_grad) if isinstance(p, torch.nn.Parameter) else t
    return self


def bench_run(name: str) -> dict:
    """Our side of a case of bench/gpu.py, with a tiny model in two forwards: does that script reach its end?"""
    import gpu

    case = gpu.CASES[name]._replace(shape=gpu.TINY, pairs=4)
    stand_ins = [
        (torch.cuda, "synchronize", lambda *x: None),
        (torch.cuda, "reset_peak_memory_stats", lambda *x: None),
        (torch.cuda, "max_memory_allocated", lambda *x: 0),
        (gpu, "top_kernels", lambda step, device: []),
        (torch.nn.Module, "to", module_to),
        (torch, "from_numpy", for_real(torch.from_numpy)),
        (data, "collate", for_real(data.collate)),
    ]
    before = [getattr(place, what) for place, what, _ in stand_ins]
    for place, what, stand_in in stand_ins:
        setattr(place, what, stand_in)
    try:
        with MODE, contextlib.redirect_stdout(io.StringIO()):
            return measured(lambda: gpu.ours(case, argparse.Namespace(device="cuda"), 2))
    finally:
        for (place, what, _), old in zip(stand_ins, before):
            setattr(place, what, old)


def predict(name: str) -> None:
    """Forward and backward of the whole step in one stream, under autocast where all weights learn."""
    import gpu

    case = gpu.CASES[name]
    rng = np.random.default_rng(0)
    sizes = zip(*(rng.choice(column, case.pairs) for column in gpu.LENGTHS[case.lengths]))
    batch = data.collate([data.Pair(*(np.ones(n, int) for n in row)) for row in sizes])
    config = models.read_config(case.shape)
    with torch.device("meta"):
        m = models.Decoder(config)
    if case.targets is not None:
        from extras.lora.targets import add_lora

        add_lora(m.to(torch.bfloat16), {"r": 16, "lora_alpha": 32, "target_modules": case.targets})
    with MODE:
        to_device(m)
        m.tie()
        saved = {}
        METER[:] = [Traffic()]
        weights = {p.untyped_storage()._cdata for p in m.parameters()}

        def pack(t):
            if isinstance(t, FakeTensor) and t.untyped_storage()._cdata not in weights:
                saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), METER[0]:
            with torch.autocast("cuda", torch.bfloat16, enabled=case.targets is None):
                out = m(batch._replace(**{n: put(v) for n, v in batch._asdict().items() if n not in ("spans", "pair_ids")}))
            out.logps.sum().backward()
    rows = METER.pop().rows
    print(f"{name}: {case.pairs} pairs, {len(batch.input_ids)} tokens, {len(batch.targets)} of them scored; forward and backward")
    print(f"{'operation':34}{'calls':>7}{'GB':>9}{'TFLOP':>9}{'ms':>9}")
    total = [sum(column) for column in zip(*rows.values())]
    for kind, row in [*sorted(rows.items(), key=lambda item: -item[1][3])[:16], ("all", total)]:
        print(f"{kind:34}{row[0]:7}{row[1] / 1e9:9.2f}{row[2] / 1e12:9.2f}{row[3] * 1e3:9.2f}")
    print(f"saved for backward: {sum(saved.values()) / 2**20:.0f} MiB")




def families() -> dict:
    """{name: config.json} of every family of tests/test_families.py, with heads that the flash kernel takes."""
    import test_families

    fitting = {"head_dim": 16, "global_head_dim": 24, "qk_nope_head_dim": 16, "v_head_dim": 24}
    found = {}
    for name, (family, given) in test_families.CASES.items():
        settings = given | {key: size for key, size in fitting.items() if key in given}
        found[name] = test_families.transformers.AutoConfig.for_model(family, **settings).to_diff_dict()
    return found


def pictures(family: str, kind: str) -> dict:
    """A model that reads images, on two sequences with one each."""
    import test_vision_model
    import vision_tiny

    from extras.models.opening import load_model

    home = Path(tempfile.mkdtemp())
    vision_tiny.make_checkpoint(family, home)
    m = load_model(home)
    sequences, pixels, grids = vision_tiny.random_pictures(family)
    ids, positions, spans, seen = test_vision_model.stream_of(sequences, pixels, grids, family)
    from_numpy = torch.from_numpy

    def run():
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
            stream = models.Stream(put(ids), put(positions), spans, pictures=seen.to(DEVICE, non_blocking=True))
            loss = sum((x @ w.T).sum() for x, w in m.head_terms(m.model(stream)[0]))
        loss.backward()

    with MODE:
        to_device(m, torch.bfloat16 if kind == "bfloat16" else None)
        m.tie()
        torch.from_numpy = for_real(from_numpy)
        try:
            return measured(run)
        finally:
            torch.from_numpy = from_numpy


LIVE = dict(precompute_ref_log_probs=False)
LORA = dict(use_peft=True, lora_target_modules=["all-linear"])
STEPS = {
    "full": {},
    "full, 3 forwards, checkpointing": dict(gradient_checkpointing=True, gradient_accumulation_steps=3),
    "live reference": LIVE,
    "lora, all linear": LORA,
    "lora, bf16 weights": LORA | LIVE | dict(dtype="bfloat16", bf16=False),
    "lora, head, embedding, DoRA": dict(
        use_peft=True, use_dora=True, lora_target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]
    ),
    "qlora, nested": LORA | LIVE | dict(load_in_4bit=True, use_bnb_nested_quant=True),
    "fp16": dict(bf16=False, fp16=True),
    "WPO, LD-DPO, sft": dict(loss_type=["sigmoid", "sft"], use_weighting=True, ld_alpha=0.5),
    "aot": dict(loss_type=["aot"]),
    "TR-DPO": dict(sync_ref_model=True, ref_model_sync_steps=1),
    "TR-DPO, lora": LORA | dict(sync_ref_model=True, ref_model_sync_steps=1),
    "float32, plain attention": dict(bf16=False),
    "FSDP": dict(fsdp="full_shard"),
    "FSDP, live reference, 3 forwards": LIVE | dict(fsdp="full_shard", gradient_accumulation_steps=3),
    "FSDP, bf16 weights, checkpointing": dict(fsdp="shard_grad_op", dtype="bfloat16", bf16=False, gradient_checkpointing=True),
    "FSDP, lora": LORA | LIVE | dict(fsdp="full_shard"),
    "FSDP, offload": dict(fsdp="full_shard offload"),
}
if torch.__version__ >= "2.13":  # refused before
    STEPS["FSDP, qlora"] = LORA | LIVE | dict(fsdp="full_shard", load_in_4bit=True)


def cases() -> dict:
    found = {f"step: {name}": functools.partial(step, **more) for name, more in STEPS.items()} | {"generation": generation}
    found |= {f"bench/gpu.py: {name}": functools.partial(bench_run, name) for name in ("hh-0.5b", "hh-8b-lora")}
    if importlib.util.find_spec("transformers") is None:
        print("families and images are left out: they need `pip install transformers==5.23.0`")
        return found
    import vision_tiny

    towers = [name for name in vision_tiny.FAMILIES if "moe" not in name]  # those experts are too narrow for grouped_mm
    for kind in ("autocast", "bfloat16"):
        found |= {f"{name}, {kind}": functools.partial(forward_backward, raw, kind) for name, raw in families().items()}
        found |= {f"images: {name}, {kind}": functools.partial(pictures, name, kind) for name in towers}
    return found



def main() -> int:
    replace_kernels()
    if a.predict:
        predict(a.predict)
        return 0
    print(f"torch {torch.__version__}; fake tensors, no GPU: waits, operations (about kernels) and bytes saved for backward")
    failed = 0
    for name, run in cases().items():
        if not any(word in name for word in a.only):
            continue
        try:
            found = run()
        except Exception as error:
            failed += 1
            ours = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PROJ + "/")]
            line = f"{os.path.relpath(ours[-1].filename, PROJ)}:{ours[-1].lineno}" if ours else ""
            print(
                f"{name:34} FAILED: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''} {line}",
                flush=True,
            )
            continue
        waits = found["waits"]
        print(
            f"{name:34} {sum(waits.values()):4} waits {found['kernels']:6} kernels {found['saved'] / 1024:9.1f} KiB saved",
            flush=True,
        )
        for what, count in waits.most_common(6):
            print(f"{'':38} {count} x {what}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
