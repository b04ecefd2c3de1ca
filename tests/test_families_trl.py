"""Every family beside TRL 1.16, through the command line: random tiny checkpoints, a word tokenizer, two steps.

No family needs a wider tolerance than another. Gemma 2's soft-capped scores, which transformers computes by its eager
attention only, agree as closely as the others' (2e-6 in the logits).
"""

import json
import math
import re

import pytest
import torch
import trl_peer
from conftest import make_rows, read_metrics
from safetensors.torch import load_file
from test_families import CASES, SPARSE, attention, our_logits, random_model, their_logits
from test_peers import OURS, assert_agree, words

import dpo
from extras.models.opening import load_adapted
from parts import families as known_families

transformers = pytest.importorskip("transformers", reason="needs transformers")

FAMILIES = """llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma4 gemma4_experts phi3 olmo2 olmo3 exaone4 seed_oss arcee ministral3
    glm4 cohere2 hunyuan ernie4_5 smollm3 granite gpt2 pythia
    granite_h falcon_h1 nemotron_h nemotron_h_experts llama4
    mixtral qwen2_moe qwen3_moe olmoe qwen3_next qwen3_5 qwen3_5_moe gpt_oss
    deepseek_v2 deepseek_v3 glm4_moe glm4_moe_lite""".split()
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3", "gemma4", "gemma4_experts", "phi3", "olmo3", "exaone4", "cohere2", "mixtral", "gpt_oss",
            "llama4")
NO_BALANCE = ("granite_h",)  # TRL's own sum over experts asks this configuration for a num_experts that it lacks
# TRL calls `base_model` for hidden states, which for transformers' Llama4ForCausalLM is the model itself, with its head
NOT_IN_TRL = ("llama4",)
IN_TRL = [name for name in FAMILIES if name not in NOT_IN_TRL]
ROWS = make_rows(8, seed=1)
COMMON = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["all-linear"], "learning_rate": 1e-2}
TOLERANCE = 1e-5  # of max(1, |TRL's|), ten times that for rewards; found below 1e-6, and GELU for its tanh form is 2e-5
ON_EXPERTS = re.compile(r"\.((mlp|mixer)\.(experts|gate)|feed_forward\.router)\.")
COEFFICIENT = 0.1  # a hundred times most families' own, so that what it does to the gradients shows


def flags_of(name: str) -> dict:
    return COMMON | ({"router_aux_loss_coef": COEFFICIENT} if name in SPARSE else {})


@pytest.fixture(scope="session")
def families(tiny, tmp_path_factory):
    """Directory with pairs.jsonl and each family's checkpoint, NAME/model; processes of one test session share it."""
    filelock = pytest.importorskip("filelock")  # a package that huggingface_hub needs
    directory = tmp_path_factory.getbasetemp()
    directory = (directory.parent if directory.name.startswith("popen-") else directory) / "families"
    with filelock.FileLock(f"{directory}.lock"):
        if not (directory / "done").exists():
            for name in FAMILIES:
                random_model(name).save_pretrained(directory / name / "model")
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    (directory / name / "model" / file).write_bytes((tiny / file).read_bytes())
            (directory / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
            (directory / "done").touch()
    return directory


@pytest.fixture(scope="session")
def trl_runs(families):
    """The same directory with TRL's metrics of each family in NAME/trl: one process of TRL, whose import takes long."""
    import filelock

    with filelock.FileLock(f"{families}.lock"):
        if not (families / "trl-done").exists():
            run = {"data": [families / "pairs.jsonl"], "threads": 1}
            trl_peer.run_many(families, {f"{name}/trl": run | {
                "model": families / name / "model", "args": trl_peer.FLOAT32 | flags_of(name) | (
                    {"router_aux_loss_coef": 0.0} if name in NO_BALANCE else {})} for name in IN_TRL})
            (families / "trl-done").touch()
    return families


def train(directory, name: str, out, flags: dict) -> list[dict]:
    """Train by the command line, in this process; the metrics of its steps."""
    places = {"model_name_or_path": directory / name / "model", "dataset_name": directory / "pairs.jsonl",
              "output_dir": out, "cache_dir": out.parent / "cache"}
    assert dpo.main([*map(str, OURS), *words(places | flags)]) == 0
    return read_metrics(out)


def test_every_family_is_here_and_every_window_is_crossed(families):
    assert {CASES[name][0] for name in FAMILIES} == known_families.FAMILIES.keys() - {"kimi_k2"}  # is deepseek_v3
    lengths = [len(f"{row['prompt']} {row[side]}".split()) for row in ROWS for side in ("chosen", "rejected")]
    assert len(set(lengths)) > 5
    windows = {name: load_adapted(families / name / "model", torch.float32)[0].config.windows for name in FAMILIES}
    assert {name for name in FAMILIES if any(windows[name])} == set(WINDOWED)
    longest = {name: max(abs(window or 0) for window in windows[name]) for name in WINDOWED}  # chunks are below 0
    longer = {name: sum(n > longest[name] for n in lengths) for name in WINDOWED}
    assert min(longer.values()) >= len(lengths) / 2, longer


def test_what_trl_cannot_train_is_what_is_said():
    """Falls the day transformers mends it; then Llama 4 goes beside TRL too."""
    for name in FAMILIES:
        theirs = random_model(name)
        assert (theirs.base_model is theirs) == (name in NOT_IN_TRL), name


@pytest.mark.parametrize("name", IN_TRL)
def test_two_steps_equal_trl(name, trl_runs, tmp_path):
    theirs = [step for step in read_metrics(trl_runs / name / "trl") if "loss" in step]
    ours = train(trl_runs, name, tmp_path / "out", flags_of(name))
    assert len(theirs) == len(ours) == 2 and abs(ours[1]["rewards/margins"]) > 1e-4  # the first update shows
    assert_agree(theirs, ours, TOLERANCE)
    assert ours[1]["rewards/accuracies"] == theirs[1]["rewards/accuracies"]
    for t, o in zip(theirs, ours):
        assert ("aux_loss" in o) == ("aux_loss" in t) == (name in SPARSE)
        assert o.get("aux_loss", 0.0) == pytest.approx(t.get("aux_loss", 0.0), rel=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_on_all_linear_layers_trains_and_loads_in_peft(name, families, tmp_path):
    """All linear layers are PEFT's, save that ours are never experts or routers; PEFT counts them in for the other
    mixtures of experts, not for qwen2_moe."""
    peft = pytest.importorskip("peft", reason="needs peft")
    ours = train(families, name, tmp_path / "out", flags_of(name) | LORA)
    balance = COEFFICIENT * ours[0].get("aux_loss", 0.0)  # the loss is what is minimised, experts' balance included
    assert ours[0]["loss"] == pytest.approx(math.log(2) + balance, abs=1e-6) != ours[1]["loss"]
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    base = transformers.AutoModelForCausalLM.from_pretrained(
        families / name / "model", attn_implementation=attention(name)).eval()
    with torch.no_grad():
        untrained = their_logits(base)[0]
        theirs = their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval())[0]
        again = our_logits(load_adapted(tmp_path / "out", torch.float32)[0])
        exact = our_logits(load_adapted(tmp_path / "out", torch.float64)[0])
    assert (again - theirs).abs().max() < (1e-4 if "qwen3_" in name else 2e-5) < 1e-3 < (theirs - untrained).abs().max()
    # the gated delta rule rounds more: ours are as near to float64 as theirs
    assert (again - exact).abs().max() < 1.5 * (theirs - exact).abs().max() + 1e-5
    fresh = transformers.AutoModelForCausalLM.from_pretrained(families / name / "model")
    targets = "all-linear"
    if name.startswith(("falcon_h1", "nemotron_h")):  # here PEFT refuses "all-linear", because of out_proj, which ours leaves out
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
            peft.get_peft_model(fresh, peft.LoraConfig(r=4, target_modules=targets))
        targets = ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        fresh = transformers.AutoModelForCausalLM.from_pretrained(families / name / "model")
    fresh = peft.get_peft_model(fresh, peft.LoraConfig(r=4, target_modules=targets))
    assert adapter.keys() == {n for n in peft.get_peft_model_state_dict(fresh) if not ON_EXPERTS.search(n)}
