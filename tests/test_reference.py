"""Every way of having a reference is the plainest one: two whole models, both live."""

import copy
import gc
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics, write
from safetensors.torch import save_file

import dpo
import model as models
from extras.lora import adapters, peft_files
from extras.lora.merging import merge_lora
from extras.lora.peft_files import save_adapter
from extras.lora.targets import add_lora
from extras.models.opening import load_adapted, load_adapter
from parts.reference import PrecomputedReference

STEPS = 20
COMMON = dict(dtype="float32", bf16=False, use_cpu=True, learning_rate=1e-3, max_steps=STEPS, logging_steps=1,
              save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4, lr_scheduler_type="constant")
LORA = dict(use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "up_proj"], learning_rate=5e-3)
DORA = LORA | dict(use_dora=True)
SAVED = LORA | dict(lora_modules_to_save=["norm", "lm_head"])
EDGES = LORA | dict(lora_target_modules=["all-linear", "lm_head", "embed_tokens"])
SYNC = dict(sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.6)
LIVE = dict(precompute_ref_log_probs=False)
NAMED = dict(model_adapter_name="train", ref_adapter_name="reference")
GOES_ON = dict(model_name_or_path="{first}", learning_rate=5e-3)

# name: (options; the plain reference: which model, mixed as TR-DPO has it or not, in which type). Braces stand for
# directories: {tiny} the base, {first} and {second} adapters on it, {pair} both in folders of their names.
MODES = {
    "precomputed": ({}, "{tiny}"),
    "live copy": (LIVE, "{tiny}"),
    "live copy on the CPU": (LIVE | dict(ref_model_device="cpu", ref_model_dtype="float32"), "{tiny}"),
    "live copy in bfloat16": (LIVE | dict(ref_model_dtype="bfloat16"), "{tiny}", torch.bfloat16),
    "another model": (dict(ref_model_name_or_path="{other}"), "{other}"),
    "another model, live": (LIVE | dict(ref_model_name_or_path="{other}"), "{other}"),
    "an adapter for all weights": (dict(ref_model_name_or_path="{first}"), "{first}"),
    "TR-DPO": (SYNC, "{tiny}"),
    "fresh LoRA": (LORA, "{tiny}"),
    "fresh LoRA, live": (LORA | LIVE, "{tiny}"),
    "rsLoRA": (LORA | dict(use_rslora=True), "{tiny}"),
    "LoRA+": (LORA | dict(loraplus_lr_ratio=4.0), "{tiny}"),
    "DoRA": (DORA, "{tiny}"),
    "DoRA, live": (DORA | LIVE, "{tiny}"),
    "modules to save, live": (SAVED | LIVE, "{tiny}"),
    "head and embedding, live": (EDGES | LIVE, "{tiny}"),
    "continued": (GOES_ON, "{first}"),
    "continued, live": (GOES_ON | LIVE, "{first}"),
    "named: the same twice": (GOES_ON | NAMED, "{first}"),
    "named: two folders": (GOES_ON | NAMED | dict(model_name_or_path="{pair}"), "{second}"),
    "named: two folders, live": (GOES_ON | NAMED | LIVE | dict(model_name_or_path="{pair}"), "{second}"),
    "another adapter": (GOES_ON | LIVE | dict(ref_model_name_or_path="{second}"), "{second}"),
    "an adapter for a fresh LoRA": (LORA | dict(ref_model_name_or_path="{second}"), "{second}"),
    "the base for a continued LoRA": (GOES_ON | LIVE | dict(ref_model_name_or_path="{tiny}"), "{tiny}"),
    "TR-DPO, fresh LoRA": (LORA | SYNC, "{tiny}"),
    "TR-DPO, DoRA": (DORA | SYNC, "{tiny}"),
    "TR-DPO, modules to save": (SAVED | SYNC, "{tiny}"),
    "TR-DPO, head and embedding": (EDGES | SYNC, "{tiny}"),
    "TR-DPO, continued": (GOES_ON | SYNC, "{first}"),
    "TR-DPO, towards another's start": (GOES_ON | SYNC | dict(ref_model_name_or_path="{second}"), "{second}"),
}
STARTS_AT_LOG_2 = [name for name, (options, ref, *kind) in MODES.items()
                   if not kind and ref == options.get("model_name_or_path", "{tiny}")]


@pytest.fixture(scope="session")
def places(tiny, pairs_file, tmp_path_factory):
    """{name in braces: directory}"""
    here = tmp_path_factory.mktemp("places")
    for name, seed, targets in (("first", 1, ["q_proj", "up_proj"]), ("second", 2, ["v_proj", "up_proj", "lm_head"])):
        policy = models.load_model(tiny)
        settings = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, base_model_name_or_path=str(tiny))
        torch.manual_seed(seed)
        add_lora(policy, settings)
        with torch.no_grad():
            for n, p in policy.named_parameters():
                p += torch.randn_like(p) * 0.05 if "lora_" in n else 0
        for directory in (here / name, here / "pair" / {"first": "train", "second": "reference"}[name]):
            save_adapter(policy, directory, settings)
    other = models.load_model(tiny)
    with torch.no_grad():
        for p in other.parameters():
            p += torch.randn_like(p) * 0.02
    models.save_model(other, here / "other")
    (here / "other" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    return {name: str(here / name) for name in ("first", "second", "pair", "other")} | {"tiny": str(tiny)}


def options_of(options: dict, places: dict, pairs_file, out) -> dict:
    filled = {k: v.format(**places) if isinstance(v, str) else v for k, v in options.items()}
    return dict(model_name_or_path=places["tiny"], dataset_name=str(pairs_file), output_dir=str(out),
                cache_dir=str(out.parent / "cache")) | COMMON | filled


def whole(directory: str) -> models.Decoder:
    """A model without wrappers."""
    model, settings = load_adapted(directory, torch.float32)
    if settings:
        merge_lora(model)
    return model


@torch.no_grad()
def mix(ref: models.Decoder, policy: models.Decoder, alpha: float) -> None:
    """ref <- alpha policy + (1 - alpha) ref, over all weights of the merged policy."""
    merged = copy.deepcopy(policy)
    if models.lora_modules(merged):
        merge_lora(merged)
    for p, q in zip(ref.parameters(), merged.parameters(), strict=True):
        p.copy_(alpha * q + (1 - alpha) * p)


@pytest.fixture(scope="session")
def plain(places, pairs_file, tmp_path_factory):
    """{mode: metrics of 20 steps with two whole models}, made when first asked for."""
    made, here = {}, tmp_path_factory.mktemp("plain")

    def steps(mode: str) -> list[dict]:
        if mode not in made:
            options, ref, *kind = MODES[mode]
            drop = ("ref_adapter_name", "ref_model_name_or_path", "ref_model_dtype", "ref_model_device", *SYNC)
            args = {k: v for k, v in options.items() if k not in drop} | LIVE
            args = options_of(args, places, pairs_file, here / "out")
            ref = whole(ref.format(**places)).to(kind[0] if kind else torch.float32)
            trainer = dpo.DPOTrainer(ref_model=ref, args=dpo.DPOConfig(**args))
            trainer.make_optimizer()
            made[mode] = []
            for step in range(1, STEPS + 1):
                made[mode].append(trainer.train_step())
                if options.get("sync_ref_model") and step % options["ref_model_sync_steps"] == 0:
                    mix(ref, trainer.model, options["ref_model_mixup_alpha"])
        return made[mode]

    return steps


def assert_equal(steps: list[dict], expected: list[dict], what: str = "") -> None:
    assert len(steps) == len(expected) == STEPS
    for one, other in zip(steps, expected):
        for key in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen"):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), (what, key, one["step"])
        # another order of summation shows most in the norm of gradients that have nearly the same size and other signs
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), (what, one["step"])


@pytest.mark.parametrize("mode", MODES)
def test_twenty_steps_equal_two_whole_models(mode, plain, places, pairs_file, tmp_path):
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**options_of(MODES[mode][0], places, pairs_file, tmp_path / "out")))
    trainer.train()
    steps = [m for m in read_metrics(tmp_path / "out") if "loss" in m]
    assert_equal(steps, plain(mode))
    first = steps[0]["loss"]
    if mode in STARTS_AT_LOG_2:
        assert first == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert abs(first - math.log(2)) > 1e-6
    assert abs(steps[-1]["loss"] - first) > 1e-3


FEW = ["precomputed", "TR-DPO", "DoRA", "continued, live", "named: two folders", "TR-DPO, fresh LoRA",
       "TR-DPO, continued"]


@pytest.mark.parametrize("modes", [FEW, pytest.param(list(MODES), marks=pytest.mark.slow)], ids=["few", "all"])
def test_twenty_steps_on_two_ranks_equal_two_whole_models(modes, plain, places, pairs_file, tmp_path):
    """In one launch."""
    runs = []
    for i, mode in enumerate(modes):
        run = options_of(MODES[mode][0], places, pairs_file, tmp_path / str(i))
        runs.append(run | dict(per_device_train_batch_size=2, cache_dir=str(tmp_path / "cache")))
    write(tmp_path / "runs.json", runs)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "tests" / "reference_modes.py", tmp_path / "runs.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for i, mode in enumerate(modes):
        assert_equal([m for m in read_metrics(tmp_path / str(i)) if "loss" in m], plain(mode), mode)


# The moving reference of a LoRA


def test_mixing_a_and_b_would_not_be_mixing_weights(places):
    """Why the reference of TR-DPO is held as dense deltas."""
    model, _ = load_adapted(places["first"], torch.float64)
    start = {n: m.delta() for n, m in models.lora_modules(model).items()}
    dense = adapters.dense_adapter(models.lora_modules(model), adapters.copy_adapter(models.lora_modules(model)))
    mixed_factors = adapters.copy_adapter(models.lora_modules(model))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p += torch.randn_like(p) * 0.1 if "lora_" in n else 0
        for name, module in models.lora_modules(model).items():
            for p, q in ((mixed_factors[name].lora_A.weight, module.lora_A.weight),
                         (mixed_factors[name].lora_B.weight, module.lora_B.weight)):
                p.lerp_(q, 0.6)
    adapters.move_towards(dense, models.lora_modules(model), 0.6)
    for name, module in models.lora_modules(model).items():
        expected = 0.6 * module.delta() + 0.4 * start[name]
        assert torch.allclose(dense[name].lora_delta["weight"], expected, atol=1e-14)
        assert not torch.allclose(mixed_factors[name].delta(), expected, atol=1e-3)


@pytest.mark.parametrize("options", [LORA | SYNC, SAVED | SYNC | dict(use_dora=True), GOES_ON | SYNC],
                         ids=["fresh", "dora", "continued"])
def test_a_moved_reference_is_restored_bit_for_bit(options, places, pairs_file, tmp_path):
    options = options | dict(max_steps=8, save_strategy="steps", save_steps=5)
    trainers = []
    for more in ({}, dict(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))):
        filled = options_of(options | more, places, pairs_file, tmp_path / "a")
        trainers.append(dpo.DPOTrainer(args=dpo.DPOConfig(**filled)))
        trainers[-1].train()
    whole_run, resumed = (t.checkpoints.moving_adapter() for t in trainers)
    assert trainers[1].position.step == 8 and whole_run.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[n]) for n, t in whole_run.items())
    assert any(t.abs().max() > 0 for t in whole_run.values())
    for p, q in zip(trainers[0].model.parameters(), trainers[1].model.parameters()):
        assert torch.equal(p, q)


# What cannot be


NOTHING_TO_HOLD = "--ref_model_dtype and --ref_model_device: the reference is no model of its own"
NOBODY = "neither an adapter .* nor a folder with one named 'nobody'"


@pytest.mark.parametrize("options, message", [
    (LORA | SYNC | dict(precompute_ref_log_probs=True), "--sync_ref_model moves the reference; --precompute_ref"),
    (LORA | SYNC | dict(ref_model_name_or_path="{other}"), "--sync_ref_model with a LoRA: the reference is another"),
    (LORA | dict(ref_model_dtype="bfloat16"), NOTHING_TO_HOLD), (dict(ref_model_device="cpu"), NOTHING_TO_HOLD),
    (dict(model_name_or_path="{pair}", model_adapter_name="nobody"), NOBODY),
    (LORA | dict(ref_adapter_name="nobody"), NOBODY),
    (dict(model_name_or_path="{first}", ref_adapter_name="nobody"), "has no folder of that name; without the flag, the adapter as it"),
    (dict(model_name_or_path="{first}", model_adapter_name="../first"), "is not a plain name"),
    (dict(use_dora=True), "read only with --use_peft"),
    (dict(lora_modules_to_save=["norm"]), "read only with --use_peft"),
    (dict(ref_adapter_name="x", reference_free=True), "read only with a loss that has a reference")])
def test_what_cannot_be_is_refused(options, message, places, pairs_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        dpo.DPOTrainer(args=dpo.DPOConfig(**options_of(options, places, pairs_file, tmp_path / "out")))


# From Python, as with TRL 0.18


def test_adapters_loaded_under_names_train_and_refer(places, plain, pairs_file, tmp_path):
    model = models.load_model(places["tiny"])
    load_adapter(model, places["second"], "reference")
    load_adapter(model, places["first"], "train")
    with pytest.raises(ValueError, match="an adapter named 'train' already"):
        load_adapter(model, places["first"], "train")
    options = options_of(dict(model_adapter_name="train", ref_adapter_name="reference", learning_rate=5e-3), places,
                         pairs_file, tmp_path / "out")
    trainer = dpo.DPOTrainer(model=model, args=dpo.DPOConfig(**options))
    trainer.train()
    assert_equal([m for m in read_metrics(tmp_path / "out") if "loss" in m], plain("named: two folders"))
    assert peft_files.read_settings(tmp_path / "out")["target_modules"] == ["q_proj", "up_proj"]
    with pytest.raises(ValueError, match="--model_adapter_name nobody: the model has reference, train"):
        dpo.DPOTrainer(model=model, args=dpo.DPOConfig(**options | dict(model_adapter_name="nobody")))


# Memory


@pytest.fixture(scope="session")
def broad(tiny, tmp_path_factory):
    """A model whose weights outweigh its activations."""
    directory = tmp_path_factory.mktemp("broad")
    config = json.loads((tiny / "config.json").read_text()) | dict(hidden_size=256, intermediate_size=1024)
    write(directory / "config.json", config)
    (directory / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (directory / "tokenizer_config.json").write_bytes((tiny / "tokenizer_config.json").read_bytes())
    torch.manual_seed(0)
    shapes = {n: p.shape for n, p in models.Decoder(models.read_config(config)).named_parameters()}
    save_file({n: torch.randn(shape) * 0.05 for n, shape in shapes.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    return directory


@pytest.fixture
def others_frozen():
    """What other tests left is not looked through at each count."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Of all tensors with memory, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@pytest.mark.parametrize("options, copies", [
    ({}, 1), (LIVE, 2), (LIVE | dict(ref_model_dtype="bfloat16"), 1.5), (LORA, 1), (LORA | LIVE, 1)], ids=str)
def test_copies_of_the_weights_that_are_held(options, copies, broad, pairs_file, tmp_path, monkeypatch, others_frozen):
    """In float32 sizes of the model, gradients and moments not counted: with the reference precomputed, one, in the
    pass before training and in every step."""
    before, held = live_bytes(), []
    for kind, name in ((PrecomputedReference, "run"), (dpo.DPOTrainer, "train_step")):
        keep = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *a, keep=keep: held.append(
            excess(getattr(self, "trainer", self))) or keep(self, *a))

    def excess(trainer) -> float:
        weights = sum(p.nbytes for p in trainer.model.parameters())
        state = trainer.optimizer.state if hasattr(trainer, "optimizer") else {}
        moments = sum(t.nbytes for s in state.values() for t in s.values())
        return (live_bytes() - before - moments) / weights

    options = options | dict(model_name_or_path=str(broad), max_steps=3)
    run = options_of(options, {"tiny": str(broad)}, pairs_file, tmp_path / "out")
    dpo.DPOTrainer(args=dpo.DPOConfig(**run)).train()
    assert len(held) >= 3 and all(h == pytest.approx(copies, abs=0.1) for h in held), held
