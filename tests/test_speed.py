"""What speed rests on, and must not change: compiled modules, hand-written backward passes, one split of the stream."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import dpo
import model as models
from extras.decoder.compiled import compile_blocks
from parts.kernels import RMSNorm, SwiGLU
from parts.ropes import Rope
from parts.threads import set_threads

CONFIG = dict(model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5)


def make_batch(pairs: int, seed: int) -> data.Batch:
    random = np.random.default_rng(seed)
    draw = lambda: random.integers(0, 61, random.integers(2, 12))
    return data.collate([data.Pair(draw(), draw(), draw()) for _ in range(pairs)])


def logps_and_grads(model: models.Decoder, batch: data.Batch) -> list[torch.Tensor]:
    model.zero_grad()
    logps = model(batch).logps
    logps.sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in model.parameters())]


def graphs_of_compiled_equal_to_plain(backend: str) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of tests before this one
    torch.manual_seed(0)
    model = models.Decoder(models.read_config(CONFIG)).double()
    batches = [make_batch(pairs, pairs) for pairs in (2, 3, 5, 7)]
    plain, names = [logps_and_grads(model, b) for b in batches], list(model.state_dict())
    compile_blocks(model, backend)
    for batch, expected in zip(batches, plain):
        torch.testing.assert_close(logps_and_grads(model, batch), expected, rtol=1e-9, atol=1e-10)
    assert list(model.state_dict()) == names
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_modules_equal_plain_ones_at_every_length_with_one_graph_each():
    assert 0 < graphs_of_compiled_equal_to_plain("aot_eager") <= 4  # more: lengths or layers were compiled anew


def test_a_whole_model_inside_torch_compile_has_the_plain_ones_gradients():
    """Norm, SwiGLU, rotation and head in one compiled function; torch 2.11 would get operations in place inside Functions wrong."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = models.Decoder(models.read_config(CONFIG)).double()
    batch = make_batch(3, 0)
    expected, plain = logps_and_grads(model, batch), model(batch)
    compiled = torch.compile(lambda: model(batch), backend="aot_eager")
    model.zero_grad()
    out = compiled()
    out.logps.sum().backward()
    torch.testing.assert_close([out.logps.detach(), *(p.grad for p in model.parameters())], expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out[1:5], plain[1:5], rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_inductor_kernels_equal_plain_ones():
    assert 0 < graphs_of_compiled_equal_to_plain("inductor") <= 4


def test_rms_norm_by_hand_has_the_values_and_gradients_of_pytorch():
    torch.manual_seed(0)
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 3, 16), (16,)))
    for y in (x, x.flatten(0, 1)):
        grad = torch.randn_like(y)
        ours, theirs = RMSNorm.apply(y, w, 1e-5, torch.float64), F.rms_norm(y, (16,), w, 1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        for a, b in zip(*(torch.autograd.grad(out, (x, w), grad) for out in (ours, theirs))):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-5, torch.float64), (x[0].detach().requires_grad_(), w))


def test_the_turn_of_rotary_embeddings_by_hand_has_its_values_and_gradients():
    """Against x cos + rotate_half(x) sin, with a part of the dims left alone."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = models.rotary_tables({"": Rope((1.0, 0.1, 0.02))}, torch.arange(5), x.dtype)[""][:2]
    half = torch.cat([-x[..., 3:6], x[..., :3]], -1)
    expected = torch.cat([x[..., :6] * cos + half * sin, x[..., 6:]], -1)
    torch.testing.assert_close(models.rotate(x, cos, sin), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: models.rotate(x, cos, sin), x)


def test_gated_activation_by_hand_has_its_gradient():
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


def test_a_cut_stream_has_the_stretches_and_the_gradients_of_slices():
    x = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    ranges = [((0, 6),), ((0, 4), (6, 9)), ((9, 12),)]
    slices = [torch.cat([x[a:b] for a, b in stretches]) for stretches in ranges]
    parts = models.cut(x, ranges)
    assert all(torch.equal(a, b) for a, b in zip(parts, slices))
    a, b = (torch.autograd.grad(sum((t ** 3).sum() for t in ts), x)[0] for ts in (parts, slices))
    torch.testing.assert_close(a, b)


def test_a_bf16_log_prob_does_not_depend_on_the_other_pairs_of_its_stream():
    torch.manual_seed(0)
    model = models.Decoder(models.read_config(CONFIG | {"hidden_size": 64}))
    random = np.random.default_rng(0)
    pairs = [data.Pair(*(random.integers(0, 61, 20) for _ in range(3))) for _ in range(6)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        many, few = (model(b).logps
                     for b in (data.collate(pairs), data.collate(pairs[:2])))
    torch.testing.assert_close(many[: len(few)], few, rtol=2e-2, atol=2e-2)


def test_a_norm_is_rounded_once_for_the_products_after_it():
    """Under autocast it gives the products' type, rounded from float32, and its gradient comes back in float32."""
    torch.manual_seed(0)
    norm = models.Norm(32, models.read_config(CONFIG))
    x = torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert torch.equal(y, norm(x).bfloat16())
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32


@pytest.mark.parametrize("options,limit", [({}, 4096), (dict(max_tokens_per_forward=300), 300),
                                           (dict(loss_type=["aot"], exact_global_loss=False), None)], ids=str)
def test_forwards_on_a_cpu_are_cut_by_their_tokens_unless_one_loss_couples_them(tiny, pairs_file, tmp_path, options, limit):
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(model_name_or_path=str(tiny), dataset_name=str(pairs_file), use_cpu=True,
                                                output_dir=str(tmp_path / "o"), cache_dir=str(tmp_path / "c"), **options))
    pairs = np.tile(trainer.train_pairs, 80)
    sizes = [int(trainer.train_store.tokens[rows].sum()) for rows in trainer.forwards(trainer.train_store, pairs, len(pairs))]
    assert sum(sizes) > 2 * 4096
    assert (len(sizes) == 1) if limit is None else (max(sizes) <= limit < sizes[0] + sizes[1])


def test_a_plain_run_imports_no_compiler_and_says_how_threads_wait_before_torch_is_loaded(tmp_path):
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "The tea", "chosen": " was good.", "rejected": " was bad."}\n')
    code = ("import sys; before = 'torch' in sys.modules; import dpo, os; status = dpo.main(sys.argv[1:]);"
            "print('found', before, status, 'torch._dynamo' in sys.modules, os.environ['GOMP_SPINCOUNT'])")
    flags = dict(model_name_or_path=tmp_path / "model", dataset_name=tmp_path / "pairs.jsonl", cache_dir=tmp_path / "cache",
                 output_dir=tmp_path / "out", max_steps=1, per_device_train_batch_size=1)
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code, *(f"--{k}={v}" for k, v in flags.items())], cwd=ROOT, text=True,
                          env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    assert "found False 0 False 30000" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("quota, threads", [("150000 100000", "2"), ("800000 100000", None), ("max 100000", None), (None, None)])
def test_threads_are_at_most_what_the_quota_of_a_container_grants(quota, threads, tmp_path):
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    for own in ({}, {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1"}):
        environment = dict(own)
        set_threads(environment, tmp_path / "cpu.max", 8)
        assert environment.get("OMP_NUM_THREADS") == own.get("OMP_NUM_THREADS", threads)
        assert environment.get("GOMP_SPINCOUNT") == (own.get("GOMP_SPINCOUNT") if own.get("OMP_WAIT_POLICY") else own.get("GOMP_SPINCOUNT", "30000"))


def run_gpu_bench(*flags: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", *flags], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gpu_bench_checks_every_path_and_ends_with_a_table(tmp_path):
    said = run_gpu_bench("--no_trl", "--cases", "hh-8b-lora", "--json", str(tmp_path / "found.json"))
    assert said.count("  ok") >= 16 and "NOT OK" not in said and "aten::mm" in said
    cells = said.splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == "hh-8b-lora" and float(cells[1]) > 0 and cells[-1].endswith("%"), said
    found = json.loads((tmp_path / "found.json").read_text())["cases"]["hh-8b-lora"]["ours"]
    assert found["pairs"] == 2 and found["seconds"] > 0 and found["flops"] > 1e6


@pytest.fixture
def bench(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu")


def refusal(bench, monkeypatch, capsys, *flags: str) -> str:
    """The one line that the bench says before anything runs; a second one fails here."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(SystemExit) as end:
        bench.parse()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def test_the_gpu_bench_says_in_one_line_what_is_missing_before_it_measures(bench, monkeypatch, capsys, tmp_path):
    say = partial(refusal, bench, monkeypatch, capsys)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "trl" else sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert say() == "bench/gpu.py: no GPU here; --device cpu runs this script on tiny models"
    assert say("--device", "cpu").startswith("bench/gpu.py: no trl here: `pip install trl==1.16.0 peft`, or --no_trl")
    assert "there is no folder" in say("--device", "cpu", "--no_trl", "--json", str(tmp_path / "none" / "found.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "Tesla T4 does not compute bfloat16" in say()


def test_a_case_that_fails_or_does_not_fit_leaves_the_others_in_the_gpu_benchs_table(bench, monkeypatch, capsys):
    sent = []

    def run(command, **named):
        sent.append(command[-3:])
        side, case, cut = command[-3:]
        good = {"seconds": 0.5, "pairs": 64, "peak_gib": 2.0} | ({"flops": 1e12, "kernels": []} if side == "ours" else {})
        error = {"uf-0.5b": "ValueError: wrong", "hh-8b-lora": "torch.OutOfMemoryError: CUDA out of memory"}.get(case)
        too_large = side == "trl" and case == "hh-0.5b" and cut == "1"
        error = "torch.OutOfMemoryError: too much" if too_large else error
        return SimpleNamespace(stdout="" if error else "RESULT " + json.dumps(good), stderr=error or "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "checks", lambda device: [("all", 0.0, 1.0)])
    monkeypatch.setattr(bench.compare, "matrix_rate", lambda args: 1e13)
    monkeypatch.setattr(bench, "case_of", lambda name, args: bench.CASES[name])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--cases", "hh-0.5b", "uf-0.5b", "hh-8b-lora"])
    monkeypatch.setattr(bench, "missing", lambda args: None)
    with pytest.raises(SystemExit) as end:
        bench.main()
    said = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said[-3:]]
    assert rows[0] == ["hh-0.5b", "128.0", "128.0", "1.0x", "2.00", "2.00", "1.00x", "20%"]
    assert rows[1][:3] == ["uf-0.5b", "failed", "failed"] and rows[2][:3] == ["hh-8b-lora", "does not fit", "does not fit"]
    assert "uf-0.5b ours: failed ValueError: wrong" in said and end.value.code == 1
    assert [cut for side, case, cut in sent if (side, case) == ("trl", "hh-0.5b")] == ["1", "2"]
    assert [cut for side, case, cut in sent if (side, case) == ("ours", "hh-8b-lora")] == ["1", "2", "4", "8", "16"]


@pytest.mark.slow
def test_the_gpu_bench_runs_trl_beside_ours():
    pytest.importorskip("trl")
    rows = [line.strip("| ").split(" | ") for line in run_gpu_bench("--cases", "hh-0.5b", "uf-0.5b").splitlines()[-2:]]
    assert [row[0] for row in rows] == ["hh-0.5b", "uf-0.5b"] and all(row[3].endswith("x") for row in rows)
