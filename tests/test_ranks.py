"""The result is the same on any number of ranks, sharded or not, however the batch is cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_rows, read_metrics
from safetensors.torch import load_file

import dpo

GLOBAL_BATCH = 16
COMMON = dict(bf16=False, use_cpu=True, learning_rate=1e-3, num_train_epochs=2.0, logging_steps=1, save_strategy="no",
              disable_tqdm=True)
LORA = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear", "embed_tokens", "lm_head"])

QLORA = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], load_in_4bit=True, dtype="float32")


@pytest.fixture(scope="session")
def ragged(tmp_path_factory) -> Path:
    """37 pairs: a global batch of 16, another, and 5."""
    path = tmp_path_factory.mktemp("ragged") / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in make_rows(37, seed=7)), encoding="utf-8")
    return path


def launch(runs: list[dict], ranks: int, home: Path, expect: int = 0) -> subprocess.CompletedProcess:
    """All runs in one process group of that many ranks."""
    (home / f"runs-{ranks}.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
         str(ROOT / "tests" / "rank_runs.py"), str(home / f"runs-{ranks}.json")],
        capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def settings(tiny, ragged, home: Path, name: str, ranks: int, micro: int, **options) -> dict:
    """Options of a run whose global batch is 16 pairs, in forwards of `micro`."""
    assert GLOBAL_BATCH % (ranks * micro) == 0
    return COMMON | dict(
        model_name_or_path=str(tiny), dataset_name=str(ragged), output_dir=str(home / name), cache_dir=str(home / "cache"),
        per_device_train_batch_size=micro, gradient_accumulation_steps=GLOBAL_BATCH // (ranks * micro)) | options


def result(home: Path, name: str) -> tuple[list[float], dict]:
    file = next((home / name).glob("*model.safetensors"))
    return [m["loss"] for m in read_metrics(home / name) if "loss" in m], load_file(file)


def apart(a, b) -> tuple[float, float]:
    """The largest difference of losses, and of weights."""
    assert len(a[0]) == len(b[0]) and a[1].keys() == b[1].keys()
    return (max(abs(x - y) for x, y in zip(a[0], b[0])), max(float((t - b[1][n]).abs().max()) for n, t in a[1].items()))


def combinations(worlds: tuple, micros: tuple, tokens: tuple) -> dict[str, dict]:
    """{name: what it is} of all weights and LoRA, on so many ranks, DDP or FSDP, however forwards are cut."""
    found = {}
    for kind, more in KINDS.items():
        for ranks in worlds:
            for fsdp in (None, "full_shard"):
                for micro in sorted({min(m, GLOBAL_BATCH // ranks) for m in micros}):
                    for most in tokens:
                        name = f"{kind}, {ranks} ranks, {'FSDP' if fsdp else 'DDP'}, {micro} pairs, {most or 'any'} tokens"
                        found[name] = dict(kind=kind, ranks=ranks, micro=micro, more=more | dict(fsdp=fsdp, max_tokens_per_forward=most))
    return found


KINDS = {"all weights": {}, "LoRA": LORA}
MODES = {
    "float64": dict(dtype="float64"),
    "float64, LoRA, a hundred times the learning rate": LORA | dict(dtype="float64", learning_rate=1e-2),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "selective checkpointing": dict(gradient_checkpointing="selective"),
    "a live reference": dict(precompute_ref_log_probs=False),
    "TR-DPO": dict(sync_ref_model=True, ref_model_sync_steps=2),
    "offload": dict(fsdp="full_shard auto_wrap offload"),
    "shard_grad_op": dict(fsdp="shard_grad_op"),
    "LoRA, live reference": LORA | dict(precompute_ref_log_probs=False),
    "LoRA, merged": LORA | dict(merge_adapter=True, lora_target_modules=["all-linear"]),
    "DoRA, a saved head": LORA | dict(use_dora=True, lora_target_modules=["all-linear"], lora_modules_to_save=["lm_head"]),
    "4 bits": QLORA,
    "4 bits, nested, checkpointing, live reference": QLORA | dict(
        use_bnb_nested_quant=True, gradient_checkpointing=True, precompute_ref_log_probs=False),
    "4 bits, merged": QLORA | dict(merge_adapter=True),
    "4 bits, against another adapter": QLORA | dict(ref_model_name_or_path="{home}/LoRA"),
    "a continued adapter": dict(model_name_or_path="{home}/LoRA"),
    "a continued adapter, live": dict(model_name_or_path="{home}/LoRA", precompute_ref_log_probs=False),
    "a loss that sorts": dict(loss_type=["aot", "sft"]),
    "LoRA, checkpointing, bfloat16 base": LORA | dict(gradient_checkpointing=True, dtype="bfloat16"),
    "bf16": dict(bf16=True),
}
BOUNDS = {name: 1e-9 if "float64" in name else 2e-2 if "bf" in name else 1e-5 for name in MODES}


ANSWERS = dict(generate_during_eval=True, eval_strategy="epoch", eval_fraction=0.3)


def placed(options: dict, home: Path) -> dict:
    return {name: v.format(home=home) if isinstance(v, str) else v for name, v in options.items()}


def plain_runs(tiny, ragged, home: Path) -> None:
    for kind, more in KINDS.items():
        dpo.DPOTrainer(args=dpo.DPOConfig(**settings(tiny, ragged, home, kind, 1, 16, **more))).train()


def runs_of(found: dict[str, dict], ranks: int, tiny, ragged, home: Path) -> list[dict]:
    return [settings(tiny, ragged, home, name, ranks, c["micro"], **c["more"]) for name, c in found.items() if c["ranks"] == ranks]


def differences(home: Path, found: dict[str, dict]) -> list[tuple[str, float, float]]:
    """Of each run from that on one rank: (name, losses, weights)."""
    rows = [(name, *apart(result(home, c["kind"]), result(home, name))) for name, c in found.items()]
    for name, loss, weight in rows:
        print(f"{name:60} losses {loss:.1e}  weights {weight:.1e}")
    return rows


FEW = combinations((2,), (4,), (None, 60))


@pytest.fixture(scope="module")
def home(tiny, ragged, tmp_path_factory) -> Path:
    """Runs on one rank, and in a single launch all of them on two."""
    home = tmp_path_factory.mktemp("ranks")
    plain_runs(tiny, ragged, home)
    for name, more in MODES.items():
        one = settings(tiny, ragged, home, f"{name}: one", 1, 8, **placed(more, home) | dict(fsdp=None))
        dpo.DPOTrainer(args=dpo.DPOConfig(**one)).train()
    saved = settings(tiny, ragged, home, "saved", 1, 8, **SAVED)
    dpo.DPOTrainer(args=dpo.DPOConfig(**saved)).train()
    runs = runs_of(FEW, 2, tiny, ragged, home)
    runs += [settings(tiny, ragged, home, name, 2, 8, **dict(fsdp="true") | placed(more, home)) for name, more in MODES.items()]
    runs += [settings(tiny, ragged, home, f"answers {bf16}", 2, 8, **ANSWERS | dict(bf16=bf16, fsdp="true")) for bf16 in (True, False)]
    for kind, more in KEPT.items():
        whole = settings(tiny, ragged, home, f"{kind}, whole", 2, 8, **more | SHARDED)
        runs += [whole, whole | dict(output_dir=str(home / f"{kind}, resumed"),
                                     resume_from_checkpoint=str(home / f"{kind}, whole" / "checkpoint-2"))]
    runs += [saved | dict(output_dir=str(home / f"resumed {fsdp}"), fsdp=fsdp,
                          resume_from_checkpoint=str(home / "saved" / "checkpoint-2")) for fsdp in ("full_shard", None)]
    launch(runs, 2, home)
    return home


KEPT = {"all weights, sharded": {}, "4 bits, sharded": QLORA}
SHARDED = dict(fsdp="full_shard", save_strategy="steps", save_steps=2)
SAVED = dict(save_strategy="steps", save_steps=2, sync_ref_model=True, ref_model_sync_steps=1)


def test_two_ranks_ddp_or_fsdp_equal_one(home):
    assert all(loss < 1e-5 and weight < 1e-5 for _, loss, weight in differences(home, FEW))


def test_no_thread_of_gloos_outlives_the_group(tiny, ragged, tmp_path):
    """One may abort its process while Python ends. (After FSDP they do: DTensor's caches keep the mesh, and it the group.)"""
    done = launch([settings(tiny, ragged, tmp_path, "out", 2, 8, num_train_epochs=1.0)], 2, tmp_path)
    assert done.stdout.count("threads of gloo's left: 0") == 2


@pytest.mark.slow
def test_ranks_sharding_and_cuts_never_change_the_result(tiny, ragged, tmp_path):
    found = combinations((1, 2, 4), (1, 4, 16), (None, 60))
    plain_runs(tiny, ragged, tmp_path)
    for ranks in (1, 2, 4):
        launch(runs_of(found, ranks, tiny, ragged, tmp_path), ranks, tmp_path)
    assert all(loss < 1e-5 and weight < 1e-5 for _, loss, weight in differences(tmp_path, found))


@pytest.mark.slow
def test_four_ranks_train_4_bits_as_one_does(tiny, ragged, tmp_path):
    """Plain and nested, with a merged adapter too; a rank has fewer rows of some tensors than others, or none."""
    modes = {name: MODES[name] for name in ("4 bits", "4 bits, nested, checkpointing, live reference", "4 bits, merged")}
    for name, more in modes.items():
        dpo.DPOTrainer(args=dpo.DPOConfig(**settings(tiny, ragged, tmp_path, f"{name}: one", 1, 8, **more))).train()
    launch([settings(tiny, ragged, tmp_path, name, 4, 4, **more, fsdp="full_shard") for name, more in modes.items()], 4, tmp_path)
    for name in modes:
        loss, weight = apart(result(tmp_path, f"{name}: one"), result(tmp_path, name))
        print(f"{name}: losses {loss:.1e}  weights {weight:.1e}")
        assert loss < 1e-5 and weight < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_fsdp_goes_with(home, mode):
    loss, weight = apart(result(home, f"{mode}: one"), result(home, mode))
    print(f"{mode}: losses {loss:.1e}  weights {weight:.1e}")
    assert loss < BOUNDS[mode] and weight < BOUNDS[mode]


@pytest.mark.parametrize("bf16", [True, False])
def test_fsdp_answers_at_evaluation_as_one_process_does(home, tiny, ragged, bf16):
    one = settings(tiny, ragged, home, f"answers {bf16}: one", 1, 8, **ANSWERS | dict(bf16=bf16))
    dpo.DPOTrainer(args=dpo.DPOConfig(**one)).train()
    samples = [[m["eval_samples"] for m in read_metrics(home / name) if "eval_samples" in m]
               for name in (f"answers {bf16}", f"answers {bf16}: one")]
    assert len(samples[0]) == 3 and len(samples[0][0]) == 8
    assert samples[0] == samples[1] or bf16  # one process answers in float32


@pytest.mark.parametrize("fsdp", ["full_shard", None])
def test_a_run_goes_on_with_its_batch_on_other_ranks_sharded_or_not(home, fsdp):
    """One rank's checkpoint resumed by the same command on two; the checkpoint of those resumed on one."""
    loss, weight = apart(result(home, "saved"), result(home, f"resumed {fsdp}"))
    assert loss < 1e-5 and weight < 1e-5
    options = json.loads((home / "runs-2.json").read_text())[-1] | dict(
        fsdp=None, output_dir=str(home / "back"), resume_from_checkpoint=str(home / f"resumed {fsdp}" / "checkpoint-4"))
    dpo.DPOTrainer(args=dpo.DPOConfig(**options)).train()
    loss, weight = apart(result(home, "saved"), result(home, "back"))
    assert loss < 1e-5 and weight < 1e-5


@pytest.mark.parametrize("kind", KEPT)
def test_a_sharded_run_is_resumed_to_the_bit_and_on_one_process(home, tiny, ragged, kind):
    whole, resumed = result(home, f"{kind}, whole"), result(home, f"{kind}, resumed")
    assert apart(whole, resumed) == (0, 0)
    one = settings(tiny, ragged, home, f"{kind}, on one", 2, 8, **KEPT[kind] | SHARDED | dict(
        fsdp=None, resume_from_checkpoint=str(home / f"{kind}, whole" / "checkpoint-2")))
    dpo.DPOTrainer(args=dpo.DPOConfig(**one)).train()
    loss, weight = apart(whole, result(home, f"{kind}, on one"))
    assert loss < 1e-5 and weight < 1e-5


@pytest.mark.parametrize("fsdp,words", [("hybrid_shard", "hybrid_shard is not supported"), ("full", "known are")])
def test_words_of_fsdp_that_mean_nothing_here_are_refused(tiny, ragged, tmp_path, fsdp, words):
    with pytest.raises(ValueError, match=words):
        dpo.DPOTrainer(args=dpo.DPOConfig(**settings(tiny, ragged, tmp_path, "x", 1, 16, fsdp=fsdp)))
