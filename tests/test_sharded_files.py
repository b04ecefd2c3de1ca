"""Under --fsdp no rank holds a whole model: each reads a part of the files, and they are written one tensor at a time."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT, make_rows, make_tiny, read_metrics, write
from safetensors.torch import load_file, save_file
from test_nf4 import file_of
from test_ranks import COMMON, QLORA

import dpo
import model as models
from parts.files import TensorFile, write_tensors
from parts.ranks import ending_ranks


def test_a_file_written_as_a_stream_is_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "scalar": torch.tensor(2.5), "half": torch.randn(7).bfloat16(), "none": torch.empty(0, 4),
               "count": torch.arange(4), "codes": torch.arange(5, dtype=torch.uint8), "mask": torch.tensor([True, False])}
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", kinds, iter(tensors.values()))
    theirs, ours = load_file(tmp_path / "x.safetensors"), TensorFile(tmp_path / "x.safetensors")
    assert theirs.keys() == ours.header.keys() == tensors.keys()
    for name, t in tensors.items():
        for other in (theirs[name], ours.read(name)):
            assert other.dtype == t.dtype and torch.equal(other, t)
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1])
    with pytest.raises(OSError, match="x.safetensors: the file ends within mask"):
        ours.read("mask")


def test_saving_holds_no_more_than_a_layers_experts_at_a_time(tmp_path):
    """Their files have a tensor for each expert's matrix: pieces of two parameters by turns."""
    model = models.load_model(file_of("mixtral", tmp_path / "mixtral"))
    held, most, asked = weakref.WeakSet(), [0], []

    def whole(p):
        asked.append(p)
        copy = p.detach().clone()
        held.add(copy)
        most[0] = max(most[0], len(held))
        return copy

    models.save_model(model, tmp_path / "again", whole=whole)
    assert most[0] <= 3 and len(asked) == len(set(map(id, asked))) == len(list(model.parameters()))
    one, other = load_file(tmp_path / "mixtral" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.fixture()
def sharded(tiny, pairs_file, tmp_path):
    """Options of a run under --fsdp on one process."""
    return COMMON | dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), output_dir=str(tmp_path / "out"),
                         cache_dir=str(tmp_path / "c"), fsdp="full_shard", max_steps=1)


@pytest.mark.parametrize("more", [{}, QLORA], ids=["wide", "4 bits"])
def test_a_model_is_read_module_by_module_when_it_is_sharded(sharded, monkeypatch, more):
    """Until then it has no memory, and each module is read once."""
    from extras.run import fsdp

    found, keep = [], fsdp.Shards.read
    monkeypatch.setattr(fsdp.Shards, "read", lambda self, source, turn: (
        found.append(([t for n, t in source.named_parameters() if "lora_" not in n], turn)), keep(self, source, turn))[1])
    with ending_ranks():
        trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**sharded | more))
        names = [n for n, _ in trainer.model.named_parameters() if "lora_" not in n]
    assert all(p.is_meta for given, _ in found for p in given)
    assert sorted(n for _, turn in found for unit in turn for n in unit) == sorted(names)
    assert all(len(turn) == 1 and len({n.rpartition(".")[0] for n in turn[0]}) == 1 for _, turn in found)


def test_a_tied_head_that_differs_is_refused_under_fsdp_too(tiny, sharded, tmp_path):
    directory = tmp_path / "tied"
    directory.mkdir()
    for file in tiny.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    write(directory / "config.json", json.loads((tiny / "config.json").read_text()) | dict(tie_word_embeddings=True))
    with ending_ranks(), pytest.raises(ValueError, match="ties the head to the embedding"):
        dpo.DPOTrainer(args=dpo.DPOConfig(**sharded | dict(model_name_or_path=str(directory))))


RANKS = 8
LIMITED = """
import json, resource, sys
sys.path[:0] = [{root!r}]
from parts.ranks import ending_ranks
import dpo, parts.ranks, extras.run.fsdp, extras.lora.targets, extras.models.policy
import model as models
models.SHARD_BYTES = 10**7  # several files: safetensors maps a file that it opens
parts.ranks.keep_freed_memory = lambda: None  # what is freed is not held
with ending_ranks():
    c = dpo.DPOConfig(**json.loads(sys.argv[1]))
    dpo.start_ranks(c.use_cpu, c.ddp_timeout).barrier()
    now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[2]),) * 2)
    dpo.DPOTrainer(args=c).train()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Float32 weights of 295 MB in bfloat16 files of at most 10 MB, and pairs: (directory, bytes in float32)."""
    home = tmp_path_factory.mktemp("large")
    make_tiny(home)
    config = json.loads((home / "config.json").read_text()) | dict(
        hidden_size=320, intermediate_size=1280, num_hidden_layers=48, torch_dtype="bfloat16")
    write(home / "config.json", config)
    torch.manual_seed(0)
    parameters = dict(models.Decoder(models.read_config(config)).named_parameters())
    (home / "model.safetensors").unlink()
    files = {n: f"model-{i // 20:05d}.safetensors" for i, n in enumerate(parameters)}
    for file in set(files.values()):
        save_file({n: p.detach().bfloat16() for n, p in parameters.items() if files[n] == file}, home / file, metadata={"format": "pt"})
    write(home / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_rows(16, seed=3)))
    return home, 4 * sum(p.numel() for p in parameters.values())


def run_limited(home, options: dict, ranks: int, allowance: int) -> subprocess.CompletedProcess:
    (home / "limited.py").write_text(LIMITED.format(root=str(ROOT)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    # the matrix libraries' own buffers are larger with AVX-512 and AMX: the allowance is for the model
    env |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    return subprocess.run(
        ["bash", "-c", 'ulimit -s 1024; exec "$@"', "-", sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", str(home / "limited.py"), json.dumps(options), str(allowance)],
        capture_output=True, text=True, timeout=1500, env=env)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_a_model_larger_than_a_ranks_allowance_loads_trains_saves_and_resumes(large, tmp_path):
    directory, size = large
    allowance = int(0.9 * size)  # beyond what Python and PyTorch take; weights, gradients and moments are size / 2 a rank
    base = COMMON | dict(model_name_or_path=str(directory), dataset_name=str(directory / "pairs.jsonl"), cache_dir=str(tmp_path / "c"),
                         fsdp="full_shard", num_train_epochs=1.0, per_device_train_batch_size=1, max_steps=2)
    cut = base | dict(output_dir=str(tmp_path / "out"), save_strategy="steps", save_steps=1)
    resumed = cut | dict(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for options in (cut, resumed):
        done = run_limited(tmp_path, options, RANKS, allowance)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:3000] + "..." + done.stderr[-3000:]
    one = run_limited(tmp_path, base | dict(output_dir=str(tmp_path / "one"), fsdp=None), 1, allowance)
    assert one.returncode == 1 and "allocate memory" in one.stderr, "one process does not fit into what a rank may take"
    for name in ("out", "resumed"):
        assert [m["step"] for m in read_metrics(tmp_path / name)] == [1, 2]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == json.loads((tmp_path / "resumed" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 10
    for file in set(index.values()):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    assert models.load_model(tmp_path / "out").config.num_hidden_layers == 48
