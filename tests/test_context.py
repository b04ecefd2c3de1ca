"""--context_parallel_size: ranks that share a stream compute what one rank computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny
from safetensors.torch import save_file
from test_gated_delta import SMALL as GATED_DELTA
from test_model import CORE, make
from test_ranks import (
    COMMON,
    GLOBAL_BATCH,
    LORA,
    apart,
    launch,
    ragged,  # noqa: F401  the same 37 pairs
    result,
)

import data
import dpo
import model as models
from extras.run.context import cut, grouped, join
from parts.ranks import Ranks


def settings(tiny, ragged, home: Path, name: str, ranks: int, size: int, micro: int = 4, **options) -> dict:  # noqa: F811
    """Options of a run whose global batch is 16 pairs, on groups of `size` ranks."""
    groups = ranks // size
    return COMMON | dict(
        model_name_or_path=str(tiny), dataset_name=str(ragged), output_dir=str(home / name), cache_dir=str(home / "cache"),
        per_device_train_batch_size=micro, gradient_accumulation_steps=GLOBAL_BATCH // (groups * micro),
        context_parallel_size=size, num_train_epochs=1.0) | options


MODES = {
    "all weights": {},
    "LoRA": LORA,
    "streams shorter than a cut allows, a live reference": dict(max_tokens_per_forward=20, precompute_ref_log_probs=False),
    "a loss that sorts, checkpointing": dict(loss_type=["aot", "sft"], gradient_checkpointing=True),
    "WPO, LD-DPO, evaluation, selective": dict(use_weighting=True, ld_alpha=0.5, eval_fraction=0.2, gradient_checkpointing="selective"),
    "float64, one pair in a forward": dict(dtype="float64", per_device_train_batch_size=1, gradient_accumulation_steps=GLOBAL_BATCH),
    "TR-DPO, bf16": dict(sync_ref_model=True, ref_model_sync_steps=2, bf16=True),
}
FEW = "one head of keys and values, float64"  # a model of its own
BOUNDS = {name: 1e-9 if "float64" in name else 2e-2 if "bf16" in name else 1e-5 for name in (*MODES, FEW)}
FSDP = ("all weights", "LoRA", "float64, one pair in a forward")
SAVED = dict(save_strategy="steps", save_steps=2, num_train_epochs=2.0)


def train_here(options: dict) -> None:
    dpo.DPOTrainer(args=dpo.DPOConfig(**options)).train()


def with_one_kv_head(home: Path) -> Path:
    home.mkdir()
    make_tiny(home)
    config = json.loads((home / "config.json").read_text()) | dict(num_key_value_heads=1)
    (home / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {n: p.shape for n, p in models.Decoder(models.read_config(config)).named_parameters()}
    save_file({n: torch.randn(s) * 0.1 for n, s in shapes.items()}, home / "model.safetensors", metadata={"format": "pt"})
    return home


@pytest.fixture(scope="module")
def home(tiny, ragged, tmp_path_factory) -> Path:  # noqa: F811
    """Each mode on one rank; and on two that share their streams, in a single launch."""
    home = tmp_path_factory.mktemp("context")
    runs = []
    few = with_one_kv_head(home / "few")
    for name, more in (MODES | {FEW: dict(model_name_or_path=str(few), dtype="float64")}).items():
        train_here(settings(tiny, ragged, home, f"{name}: one", 1, 1, **more))
        runs.append(settings(tiny, ragged, home, f"{name}: DDP", 2, 2, **more))
        if name in FSDP:
            runs.append(settings(tiny, ragged, home, f"{name}: FSDP", 2, 2, **more, fsdp="full_shard"))
    saved = settings(tiny, ragged, home, "saved", 1, 1, **SAVED)
    train_here(saved)
    runs.append(saved | dict(output_dir=str(home / "resumed"), context_parallel_size=2,
                             resume_from_checkpoint=str(home / "saved" / "checkpoint-2")))
    launch(runs, 2, home)
    return home


@pytest.mark.parametrize("name", BOUNDS)
def test_two_ranks_that_share_streams_equal_one(home, name):
    for kind in ("DDP", "FSDP") if name in FSDP else ("DDP",):
        loss, weight = apart(result(home, f"{name}: one"), result(home, f"{name}: {kind}"))
        print(f"{name}, {kind}: losses {loss:.1e}  weights {weight:.1e}")
        assert loss < BOUNDS[name] and weight < BOUNDS[name]


def test_all_that_is_measured_is_the_same(home):
    """Metrics count each pair once, though all ranks of a group have seen it."""
    from conftest import read_metrics

    name = "WPO, LD-DPO, evaluation, selective"
    one, two = (read_metrics(home / f"{name}: {kind}") for kind in ("one", "DDP"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a.keys() - {"eval_runtime", *(key for key in a if "per_second" in key or "mfu" in key)}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


def test_a_run_goes_on_with_its_streams_shared_or_not(home):
    loss, weight = apart(result(home, "saved"), result(home, "resumed"))
    assert loss < 1e-5 and weight < 1e-5
    options = json.loads((home / "runs-2.json").read_text())[-1] | dict(
        context_parallel_size=1, output_dir=str(home / "back"), resume_from_checkpoint=str(home / "resumed" / "checkpoint-4"))
    train_here(options)
    loss, weight = apart(result(home, "saved"), result(home, "back"))
    assert loss < 1e-5 and weight < 1e-5


@pytest.mark.slow
def test_four_ranks_in_two_groups_equal_one(tiny, ragged, tmp_path):  # noqa: F811
    runs = []
    for name in ("all weights", "LoRA", "a loss that sorts, checkpointing", "float64, one pair in a forward"):
        train_here(settings(tiny, ragged, tmp_path, f"{name}: one", 1, 1, **MODES[name]))
        more = MODES[name]
        if name == "float64, one pair in a forward":
            more = more | dict(gradient_accumulation_steps=GLOBAL_BATCH // 2)
        runs += [settings(tiny, ragged, tmp_path, f"{name}: {fsdp}", 4, 2, **more, fsdp=fsdp) for fsdp in (None, "full_shard")]
    launch(runs, 4, tmp_path)
    for run in runs:
        name = Path(run["output_dir"]).name
        loss, weight = apart(result(tmp_path, name.split(":")[0] + ": one"), result(tmp_path, name))
        print(f"{name}: losses {loss:.1e}  weights {weight:.1e}")
        assert loss < 1e-5 and weight < 1e-5


# The cut


def random_batch(count: int) -> data.Batch:
    rng = np.random.default_rng(count)
    ids = lambda: rng.integers(3, 50, rng.integers(1, 9)).astype(np.int32)
    return data.collate([data.Pair(ids(), ids(), ids()) for _ in range(count)], np.arange(count) + 7)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_parts_are_the_stream_and_each_pair_is_one_ranks_own(size, count):
    whole = random_batch(count)
    parts = [cut(whole, number, size, None) for number in range(size)]
    joined = torch.cat([part.input_ids for part in parts])
    assert len({len(part.input_ids) for part in parts}) == 1 and len(joined) < len(whole.input_ids) + size
    assert torch.equal(joined[: len(whole.input_ids)], whole.input_ids)
    assert sorted(torch.cat([part.pair_ids for part in parts]).tolist()) == whole.pair_ids.tolist()
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert all(part.spans[:, 1].max() == len(joined) for part in parts)
    length = len(joined) // size
    # what is gathered is every target where it lies in the stream; what a rank takes of it, its own pairs' in their order
    room = parts[0].part.room
    every = torch.full((size, room), -1)
    for number, part in enumerate(parts):
        every[number, : len(part.targets)] = (part.score_index + number * length) * 1000 + part.targets
    for part in parts:
        rows = [list(whole.pair_ids.tolist()).index(pair) for pair in part.pair_ids.tolist()]
        wanted = [(whole.score_index * 1000 + whole.targets).split(whole.lengths.sum(1).tolist())[row] for row in rows]
        assert torch.equal(every.flatten()[part.part.take], torch.cat([torch.zeros(0, dtype=torch.long), *wanted]))


# What is refused


@pytest.mark.parametrize("change,words", [
    (dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=48), "the 3 of this model, which share 1 .* divided by 2"),
    (dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
     "not for mixtures of experts"),
    (GATED_DELTA, "not for models with recurrent layers"),
])
def test_models_that_cannot_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        join(make(CORE["llama tied"] | change), 2)


def test_ranks_that_make_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="--context_parallel_size 2: 1 rank cannot be divided into groups of 2"):
        grouped(Ranks(0, 1, torch.device("cpu")), 2)


def test_joining_twice_is_joining_once():
    model = make(CORE["llama tied"])
    join(model, 2)
    join(model, 2)
    assert len(model._forward_hooks) == 1 and len(model.model._forward_pre_hooks) == 1
