"""What the CUDA paths rest on, as far as a CPU can tell: PyTorch's flash operators emulated behind their own signatures, what
each version of PyTorch calls them, and the settings of a GPU run."""

import os
import subprocess
import sys
from types import SimpleNamespace

import flash_emulation
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_model import CORE, LLAMA, MIXED, assert_same_gradients, gradients, make, random_pairs, stream

import model as models
from extras.decoder import generate, towers
from extras.decoder.moe import SparseMLP
from extras.lora.targets import add_lora
from extras.run import forecast
from parts import kernels, ranks, varlen
from parts.config import DPOConfig
from parts.precision import choose_precision
from parts.varlen import VarlenPlan, has_flash, plan_varlen


@pytest.fixture
def flash(monkeypatch):
    """The CUDA path of attention, on the CPU."""
    library = flash_emulation.register()
    for place in (models, towers, generate):
        monkeypatch.setattr(place, "has_flash", lambda *kind, **more: True)
    yield
    library._destroy()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("shared", [True, False])
def test_varlen_plan_attends_as_the_plain_path(name, shared, monkeypatch, request):
    """Values and gradients, in float64: what the kernel is given, with its arithmetic emulated."""
    model = make(CORE[name])
    plain = model(models.Stream(*stream(MIXED, shared))).logps
    expected = gradients(model, plain.sum())
    request.getfixturevalue("flash")
    fast = model(models.Stream(*stream(MIXED, shared))).logps
    assert (fast - plain).abs().max() < 1e-10
    assert_same_gradients(gradients(model, fast.sum()), expected, 1e-10)


def test_varlen_plan_joins_prompt_and_chosen_and_copies_a_prompt_once():
    """Two pairs, (3, 2, 1) tokens and one of unequal prompts: each prompt key is copied for the rejected answer alone."""
    spans = torch.tensor([(0, 3, 0, 0), (3, 5, 0, 3), (5, 6, 0, 3), (6, 8, 0, 0), (8, 11, 0, 0)], dtype=torch.int32)
    plan = plan_varlen(make(CORE["llama"]).config, spans, torch.device("cpu"))[None]
    assert plan.cu_queries.tolist() == [0, 5, 6, 8, 11] and plan.cu_keys.tolist() == [0, 5, 9, 11, 14]
    assert plan.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10] and (plan.max_queries, plan.max_keys) == (5, 4 + 1)
    assert plan.own.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13]
    assert plan.again.tolist() == [5, 6, 7] and plan.source.tolist() == [0, 1, 2]
    x = torch.randn(11, 2, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(14, 2, 4, dtype=torch.float64)
    expected, = torch.autograd.grad(x[plan.index.long()], x, grad)
    torch.testing.assert_close(plan.collected(grad), expected)


def test_varlen_plan_copies_no_key_where_no_prompt_is_shared():
    plan = plan_varlen(make(CORE["llama"]).config, torch.tensor([(0, 3, 0, 0), (3, 7, 0, 0)]), torch.device("cpu"))[None]
    assert plan.index is None and torch.equal(plan.cu_queries, plan.cu_keys)


@pytest.mark.parametrize("seed", range(4))
def test_varlen_plan_has_each_spans_prefix_and_self_as_keys(seed):
    """Against one arange per span, for shared and unshared pairs in any order."""
    random = np.random.default_rng(seed)
    pairs = random_pairs(random.integers(1, 9, (6, 3)).tolist(), seed=seed)
    spans = torch.cat([stream(pairs, shared)[2] for shared in (True, False)])
    size = int(spans[: 3 * len(pairs), 1].max())
    spans[3 * len(pairs):, :2] += size
    plan = plan_varlen(make(CORE["llama"]).config, spans, torch.device("cpu"))[None]
    own = [list(range(c, d)) + list(range(a, b)) for a, b, c, d in spans.tolist()]
    seen = {}
    for i in range(len(plan.cu_keys) - 1):
        keys = plan.index[plan.cu_keys[i]: plan.cu_keys[i + 1]].tolist()
        queries = plan.cu_queries[i + 1] - plan.cu_queries[i]
        for back in range(int(queries)):
            seen[keys[-1 - back]] = keys[: len(keys) - back]  # bottom-right: a query sees what comes before it
    expected = {key: keys[: len(keys) - back] for (a, b, *_), keys in zip(spans.tolist(), own)
                for back, key in enumerate(range(b - 1, a - 1, -1))}
    assert seen == expected


@pytest.mark.parametrize("kind, targets", [("bf16", None), ("bfloat16", "all-linear"), ("bfloat16", ("q_proj", "v_proj"))])
def test_what_a_block_saves_with_flash_attention_is_what_the_forecast_counts(kind, targets, request):
    """Within 5 %: counted on the tensors of one block, whose other parts save the same on the CPU."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    config = LLAMA | dict(hidden_size=128, intermediate_size=320, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1)
    model = make(config, dtype)
    if targets:
        add_lora(model, {"r": 4, "lora_alpha": 4, "target_modules": targets if isinstance(targets, str) else list(targets)})
    request.getfixturevalue("flash")
    *_, spans, _, _ = parts = stream(MIXED * 4, True)
    position_ids = parts[1]
    T = len(position_ids)
    tables = models.rotary_tables(model.config.ropes, position_ids, dtype)
    plans = models.plan_attention(model.config, spans, position_ids, torch.bfloat16)
    x = torch.randn(T, 128, dtype=dtype, requires_grad=True)
    outside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *next(iter(tables.values()))[:2])}
    saved = {}

    def see(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in outside:
            saved[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        model.model.layers[0](x, tables, plans)
    run = forecast.Run(T, T, weights=str(dtype).removeprefix("torch."), bf16=kind == "bf16", device="cuda",
                       rank=4 if targets else 0, targets=targets or ())
    expected = forecast.block_activations(model.config, run, forecast.count(model.config, run)["block"])
    assert sum(storage.nbytes() for storage in saved.values()) == pytest.approx(expected, rel=0.05)


def test_image_encoders_attend_in_both_directions_through_the_flash_operators(request):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 8, dtype=torch.float64, requires_grad=True).unbind(0)
    lengths = [4, 2, 3]
    plain = towers.attend_within(q, k, v, lengths)
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
    request.getfixturevalue("flash")
    fast = towers.attend_within(q, k, v, lengths)
    torch.testing.assert_close(fast, plain)
    for a, b in zip(torch.autograd.grad(fast.square().sum(), (q, k, v)), expected):
        torch.testing.assert_close(a, b)


def test_generation_through_the_flash_operators_writes_what_the_plain_path_writes(request):
    """Queries that are the last tokens of their spans, keys that lie anywhere in the cache."""
    model = make(CORE["mistral"]).eval()
    options = generate.Sampling(max_new_tokens=6, temperature=0.0)
    prompts = [[5, 6, 7, 8], [9, 4]]
    plain = [generate.complete(model, prompts, options, samples=n) for n in (1, 2)]
    request.getfixturevalue("flash")
    assert [generate.complete(model, prompts, options, samples=n) for n in (1, 2)] == plain


# The flash operators' arguments: (positional, by name), as each version of PyTorch prints their schemas

FORWARD = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
BACKWARD = ("grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused")
NAMED = "scale window_size_left window_size_right"
OLD = NAMED + " seqused_k alibi_slopes"
NEW = OLD + " block_table num_splits"
SIGNATURES = {
    "2.10": {"forward": (FORWARD, OLD), "backward": (BACKWARD, NAMED)},
    "2.11": {"forward": (FORWARD, OLD), "backward": (BACKWARD, NAMED)},
    "2.13": {"forward": (FORWARD, NEW), "backward": (BACKWARD, NAMED)},
    "2.14": {"forward": (FORWARD, NEW), "backward": (BACKWARD, NAMED)}}


class Recorded:
    """In place of torch.ops.aten: notes the arguments of both operators, and answers."""

    def __init__(self):
        self.calls = {}

    def _flash_attention_forward(self, *args, **named):
        self.calls["forward"] = args, named
        return args[0], args[0], args[0], args[0], args[0]

    def _flash_attention_backward(self, *args, **named):
        self.calls["backward"] = args, named
        return args[1], args[2], args[3]


@pytest.mark.parametrize("version", SIGNATURES)
def test_the_calls_of_the_flash_operators_bind_to_each_versions_signature(version, monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(varlen.torch.ops, "aten", recorded)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    plan = VarlenPlan(ends, ends, 3, 3, scale=0.5, window=2)
    q, k, v = torch.randn(3, 3, 2, 8, requires_grad=True).unbind(0)
    plan(q, k, v).sum().backward()
    for name, (args, named) in recorded.calls.items():
        positional, by_name = (words.split() for words in SIGNATURES[version][name])
        assert len(args) == len(positional) and set(named) <= set(by_name)
        given = dict(zip(positional, args)) | named
        assert given["cum_seq_q"] is ends and given["cum_seq_k"] is ends and given["max_q"] == given["max_k"] == 3
        assert (given["dropout_p"], given["is_causal"], given["scale"]) == (0.0, True, 0.5)
        assert (given["window_size_left"], given["window_size_right"]) == (1, 0)
        assert all(torch.equal(given[n], t) for n, t in zip(("query", "key", "value"), (q, k, v)))
    assert recorded.calls["forward"][0][-1] is False  # return_debug_mask


def test_the_signatures_are_those_of_the_pytorch_that_is_installed():
    version = ".".join(torch.__version__.split(".")[:2])
    expected = SIGNATURES.get(version, SIGNATURES["2.14"])  # a newer one fails here if it calls them otherwise
    for name, (positional, by_name) in expected.items():
        arguments = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema.arguments
        assert [a.name for a in arguments if not a.kwarg_only] == positional.split()
        named = [a.name for a in arguments if a.kwarg_only]
        assert named[:len(by_name.split())] == by_name.split()


# The README's table of devices

ROWS = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:]
        for line in (ROOT / "README.md").read_text("utf-8").partition("| device | attention |")[2].split("\n\n")[0].splitlines()}


def row(device: str) -> tuple[str, str]:
    """(what the README says of a device's attention, of its number type)"""
    (cells,) = [cells for name, cells in ROWS.items() if name.startswith(device)]
    return cells[0], cells[1]


@pytest.mark.parametrize("name, capability, hip, flash, bf16", [
    ("NVIDIA, compute capability 8.0 on", (8, 0), None, True, True), ("NVIDIA, compute capability 8.0 on", (12, 0), None, True, True),
    ("NVIDIA before that", (7, 5), None, False, False), ("NVIDIA before that", (7, 0), None, False, False),
    ("AMD", (9, 4), "7.0", False, True)])
def test_a_gpu_takes_the_attention_and_the_numbers_that_the_readme_says(name, capability, hip, flash, bf16, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: SimpleNamespace(major=capability[0]))
    device = torch.device("cuda", 0)
    said, numbers = row(name)
    for dtype in (torch.bfloat16, torch.float16):
        assert has_flash(device, dtype, 256) == flash == said.startswith("one flash call a layer in bfloat16 or float16")
    assert not has_flash(device, torch.float32, 64) and not has_flash(device, torch.bfloat16, 64, 30.0)
    assert not has_flash(device, torch.bfloat16, 264)
    kernels.has_triton.cache_clear()
    assert kernels.has_triton(device) == (bf16 and kernels.find_spec("triton") is not None)
    kernels.has_triton.cache_clear()
    assert choose_precision(DPOConfig("o"), device).half == (torch.bfloat16 if bf16 else None)
    assert numbers.startswith("bfloat16" if bf16 else "float32")
    assert choose_precision(DPOConfig("o", fp16=True), device).half == torch.float16


def test_one_process_on_a_mac_takes_its_gpu_in_bfloat16_from_macos_14_on_as_the_readme_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = ranks.start_ranks(False, 60).device
    assert device.type == "mps" and ranks.start_ranks(True, 60).device.type == "cpu"
    for macos, half in ((14, torch.bfloat16), (13, None)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *asked, macos=macos: (macos, 0) >= asked)
        assert choose_precision(DPOConfig("o"), device).half == half
    assert not has_flash(device, torch.bfloat16, 64) and not kernels.has_triton(device)
    assert row("Apple (MPS), one process")[1] == "bfloat16 from macOS 14 on, else float32"
    monkeypatch.setenv("WORLD_SIZE", "2")  # gloo sums nothing that lies there
    monkeypatch.setattr(ranks, "rendezvous", lambda *args, **named: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: None)
    assert ranks.start_ranks(False, 60).device.type == "cpu"


@pytest.mark.parametrize("amx, avx512, half", [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, None)])
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it_and_attends_in_float32(amx, avx512, half, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_precision(DPOConfig("o"), torch.device("cpu")).half == half
    seen = []
    plan = models.CallPlan([models.Call(0, 3, ((0, 3),), None)], lambda q, k, v, mask: seen.append(q.dtype) or q)
    x = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    assert plan(x, x, x).dtype == torch.bfloat16 and seen == [torch.float32]
    assert row("CPU")[0].startswith("`scaled_dot_product_attention` in float32") and row("CPU")[1].startswith("bfloat16 with AMX or AVX512-BF16")


# The settings of a run on GPUs

@pytest.fixture
def gpu_ranks(monkeypatch):
    """start_ranks as rank 1 of 2, each with a GPU: what it asks of torch, which is not there."""
    asked = {}
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what is set here is undone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(
        device=device, allocator=os.environ.get("PYTORCH_ALLOC_CONF"), cublas=os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    monkeypatch.setattr(ranks, "rendezvous", lambda *args, **named: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: asked.update(named, backend=backend))
    return asked


def test_ranks_on_gpus_also_sum_what_lies_on_the_cpu_and_name_their_device(gpu_ranks):
    """--fsdp "full_shard offload" keeps shards on the CPU, whose norm is summed there."""
    assert ranks.start_ranks(False, 60).device == torch.device("cuda", 1)
    assert gpu_ranks["backend"] == "cpu:gloo,cuda:nccl" and gpu_ranks["device_id"] == torch.device("cuda", 1)
    assert ranks.backend_of(torch.device("cpu")) == "gloo"


def test_memory_on_a_gpu_is_in_segments_that_grow_unless_the_user_says_otherwise(gpu_ranks, monkeypatch):
    ranks.start_ranks(False, 60)
    assert gpu_ranks["allocator"] == "expandable_segments:True"  # set before the device is
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    ranks.start_ranks(False, 60)
    assert gpu_ranks["allocator"] is None


def test_full_determinism_is_asked_of_torch_before_the_device_is_used_and_undone_at_the_end(gpu_ranks):
    with ranks.ending_ranks():
        ranks.start_ranks(False, 60, deterministic=True)
        assert gpu_ranks["cublas"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash attention's backward would only warn
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("status,leaves", [(0, True), (1, False), (2, False), (SystemExit(143), True), (RuntimeError("x"), False), (KeyboardInterrupt(), False)], ids=repr)
def test_the_other_ranks_are_left_in_order_only_by_a_command_that_did_not_fail(status, leaves, monkeypatch):
    left, ended = [], []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr(ranks.os, "_exit", ended.append)
    monkeypatch.setattr(ranks.atexit, "_run_exitfuncs", lambda: None)

    @ranks.among_ranks
    def command(argv):
        if isinstance(status, BaseException):
            raise status
        return status

    try:
        assert command([]) == (130 if isinstance(status, KeyboardInterrupt) else status)
    except (SystemExit, RuntimeError) as error:
        assert error is status
    assert bool(left) == leaves
    assert ended == ([130] if isinstance(status, KeyboardInterrupt) else [status] if status in (1, 2) else [])


def test_fsdp_leaves_what_is_read_in_python_where_it_is():
    """fully_shard moves every tensor of the root's arguments to the device; spans and pair_ids are hidden from it."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_state as state
from test_model import CORE, MIXED, make, stream
import model as models
from extras.run.fsdp import Shards
from parts.config import DPOConfig
from parts.precision import Precision
from parts.ranks import Ranks
from parts.reference import NoReference
seen = []
keep = state.FSDPState._root_pre_forward
def recorded(self, module, args, kwargs):
    if isinstance(module, models.Decoder):
        seen.extend(type(a).__name__ for a in torch.utils._pytree.tree_leaves((args, kwargs)))
    return keep(self, module, args, kwargs)
state.FSDPState._root_pre_forward = recorded
model = make(CORE["llama"], torch.float32)
batch = models.Stream(*stream(MIXED))
expected = model(batch).logps
place = Shards(model, Ranks(0, 1, torch.device("cpu")), DPOConfig(fsdp="full_shard"), Precision(torch.float32, None, torch.float32), NoReference())
out = place.module(batch, statistics=False).logps
out.sum().backward()
torch.testing.assert_close(out, expected)
assert seen == ["Hidden", "bool"], seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_experts_count_their_rows_without_asking_the_device(monkeypatch):
    """torch.bincount waits for the device, to learn the largest number; a sum by index does not."""
    moe = dict(experts=4, per_token=2, normalize=True, size=8, shared_size=0, router_aux_loss_coef=0.0)
    torch.manual_seed(0)
    layer = SparseMLP(8, moe, torch.nn.functional.silu, None).double()
    for p in layer.parameters():
        p.data.normal_()
    x = torch.randn(6, 8, dtype=torch.float64)
    _, weights, chosen = layer.gate(x)
    monkeypatch.setattr(torch, "bincount", None)
    out, _ = layer(x)
    one = lambda t, e: layer.experts.down_proj[e] @ (torch.nn.functional.silu(g[:8]) * g[8:] if (g := layer.experts.gate_up_proj[e] @ t) is not None else 0)
    expected = torch.stack([sum(w * one(t, e) for w, e in zip(ws, es)) for t, ws, es in zip(x, weights, chosen)])
    torch.testing.assert_close(out, expected)


def test_a_lora_is_drawn_on_the_cpu_whatever_the_device():
    """Else ranks with shards, which open the model on the CPU, would begin elsewhere than ranks without."""
    def drawn(device):
        base = torch.nn.Linear(6, 5, device=device)
        torch.manual_seed(3)
        wrapper = models.LoraLinear(base, 2, 4, 0.0)
        return torch.rand(3), {p.device.type for p in wrapper.parameters()}

    here, there = drawn("cpu"), drawn("meta")
    assert torch.equal(here[0], there[0])  # as many numbers were drawn on the CPU
    assert (here[1], there[1]) == ({"cpu"}, {"meta"})
