# ruff: noqa: F811  pytest hands fixtures over by their names
"""QLoRA through the trainer: its flags, its files, and its numbers beside a wide model with the same weights."""

import json
import math

import pytest
import torch
from conftest import read_metrics, run_dpo
from safetensors.torch import load_file
from test_dpo import run  # noqa: F401
from test_nf4 import file_of

import dpo
import model as models
from extras import chat, merge, score
from extras.models import nf4
from extras.models.opening import load_adapted, load_model
from extras.models.speaker import load as load_speaker
from parts import trl_flags
from parts.files import read_json

LORA = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], dtype="float32", learning_rate=1e-2)
NF4 = LORA | dict(load_in_4bit=True)
KINDS = [dict(), dict(use_bnb_nested_quant=True), dict(bnb_4bit_quant_type="fp4")]
INPUTS = torch.arange(3, 15), torch.arange(12), torch.tensor([[0, 12, 0, 0]])


def four_bit(options: dict) -> dict:
    return dict(quant_type=options.get("bnb_4bit_quant_type", "nf4"), nested=options.get("use_bnb_nested_quant", False))


def write_wide(directory, out, **options):
    """The checkpoint with its weights rounded to 4 bits and made wide again: what QLoRA computes with, plainly."""
    model = load_model(directory, four_bit=four_bit(options))
    nf4.dequantize_linears(model, torch.float32)
    models.save_model(model, out)
    with_tokenizer(directory, out)
    return out


def with_tokenizer(directory, out):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((directory / name).read_bytes())


@pytest.fixture(scope="module")
def experts(tiny, tmp_path_factory):
    """A tiny Mixtral, with the tiny model's tokenizer."""
    directory = file_of("mixtral", tmp_path_factory.mktemp("mixtral"))
    with_tokenizer(tiny, directory)
    return directory


def assert_close(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        for key in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (key, a["step"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("reference", [{}, dict(precompute_ref_log_probs=False)], ids=["precomputed", "live"])
def test_20_steps_are_those_of_two_wide_copies(run, tiny, tmp_path, kind, reference):
    wide = str(write_wide(tiny, tmp_path / "wide", **kind))
    plain, _ = run("plain", **LORA, max_steps=20, model_name_or_path=wide, ref_model_name_or_path=wide,
                   precompute_ref_log_probs=False)
    steps, weights = run("narrow", **NF4, **kind, **reference, max_steps=20)
    assert len(steps) == 20 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[-1]["loss"] < 0.68
    assert_close(steps, plain)
    assert not any(n.endswith("q_proj.base_layer.weight") for n in weights)


def test_20_steps_of_experts_in_4_bits_are_those_of_two_wide_copies(run, experts, tmp_path):
    wide = str(write_wide(experts, tmp_path / "wide"))
    plain, _ = run("plain", **LORA, max_steps=20, model_name_or_path=wide, ref_model_name_or_path=wide,
                   precompute_ref_log_probs=False)
    steps, _ = run("narrow", **NF4, max_steps=20, model_name_or_path=str(experts))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert_close(steps, plain)


@pytest.mark.parametrize("model", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_two_ranks_equal_one_and_leave_the_4_bits_alone(run, tiny, experts, pairs_file, tmp_path, model):
    directory = tiny if model == "dense" else experts
    steps, _ = run("one", **NF4, use_bnb_nested_quant=True, max_steps=20, model_name_or_path=str(directory),
                   router_aux_loss_coef=None if model == "dense" else 0.0)
    aux = [] if model == "dense" else ["--router_aux_loss_coef", 0]
    run_dpo("--model_name_or_path", directory, "--dataset_name", pairs_file, "--output_dir", tmp_path / "two",
            "--cache_dir", tmp_path / "cache2", "--no_bf16", "--use_cpu", "--learning_rate", "1e-2", "--max_steps", 20,
            "--logging_steps", 1, "--save_strategy", "no", "--per_device_train_batch_size", 4, "--use_peft", "--lora_r",
            4, "--lora_target_modules", "all-linear", "--load_in_4bit", "--use_bnb_nested_quant", *aux, ranks=2)
    assert_close(read_metrics(tmp_path / "two"), steps)


def test_a_checkpoint_in_4_bits_is_found_to_be_so(run, tiny, tmp_path):
    models.save_model(load_model(tiny, four_bit=dict(nested=True)), tmp_path / "narrow")
    with_tokenizer(tiny, tmp_path / "narrow")
    steps, _ = run("a", **NF4, use_bnb_nested_quant=True)
    assert run("b", **LORA, model_name_or_path=str(tmp_path / "narrow"))[0] == steps
    compute = dict(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    rounded, _ = run("c", **LORA, **compute, model_name_or_path=str(tmp_path / "narrow"))
    assert 0 < abs(rounded[0]["logps/chosen"] - steps[0]["logps/chosen"]) < 0.5


def test_gradient_checkpointing_changes_nothing(run):
    assert run("a", **NF4)[0] == run("b", **NF4, gradient_checkpointing=True)[0]


def test_checkpoints_hold_the_adapter_alone_and_resume_to_the_bit(run, tmp_path, monkeypatch):
    options = NF4 | dict(max_steps=6, save_strategy="steps", save_steps=2)
    whole = run("whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    resumed = run("whole", **options, resume_from_checkpoint=str(checkpoint))
    assert whole[0] == resumed[0] and all(torch.equal(p, resumed[1][n]) for n, p in whole[1].items())
    for other in (dict(bnb_4bit_quant_type="fp4"), dict(bnb_4bit_compute_dtype="bfloat16"), dict(load_in_4bit=False)):
        with pytest.raises(ValueError, match="was .* there and is"):
            run("whole", **options | other, resume_from_checkpoint=str(checkpoint))


def test_an_adapter_goes_on_over_4_bits_against_itself(run, tmp_path):
    run("first", **NF4)
    options = dict(model_name_or_path=str(tmp_path / "first"), load_in_4bit=True, dtype="float32", learning_rate=1e-2)
    steps, _ = run("on", **options)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(steps[-1]["rewards/margins"]) > 1e-3
    assert_close(run("live", **options, precompute_ref_log_probs=False)[0], steps)


def test_another_adapter_over_4_bits_can_be_the_reference(run, tiny, tmp_path):
    first, _ = run("first", **NF4)
    flags = dict(load_in_4bit=True, dtype="float32", learning_rate=0.0)
    against, _ = run("a", **LORA | flags, ref_model_name_or_path=str(tmp_path / "first"))
    mirrored, _ = run("b", **flags, model_name_or_path=str(tmp_path / "first"), ref_model_name_or_path=str(tiny))
    assert against[0]["rewards/margins"] != 0
    assert [m["rewards/margins"] for m in mirrored] == pytest.approx([-m["rewards/margins"] for m in against], abs=1e-5)


def test_merging_writes_the_dequantized_weights_and_the_adapter_in_bfloat16(run, tiny, tmp_path):
    run("adapter", **NF4)
    run("merged", **NF4, merge_adapter=True)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} and "quantization_config" not in (
        read_json(tmp_path / "merged" / "config.json"))
    adapted, _ = load_adapted(tmp_path / "adapter", torch.float32, four_bit=dict(quant_type="nf4"))
    off_base, _ = load_adapted(tmp_path / "adapter", torch.float32)
    with torch.no_grad():
        logits, merged = adapted.logits(*INPUTS), models.load_model(tmp_path / "merged").logits(*INPUTS)
        gap, elsewhere = (merged - logits).abs().max(), (off_base.logits(*INPUTS) - logits).abs().max()
    assert gap < 0.1 * elsewhere  # bfloat16's rounding is small beside the distance from the weights of before


def test_an_adapter_is_merged_without_training_and_quantized_again_for_a_fresh_one(run, tiny, tmp_path):
    run("adapter", **NF4)
    flags = [str(tmp_path / "adapter"), str(tmp_path / "again"), "--load_in_4bit", "--again"]
    assert merge.main(flags) == 0
    adapted, _ = load_adapted(tmp_path / "adapter", torch.float32, four_bit=dict(quant_type="nf4"))
    expected = {n: nf4.dequantize(m.base_layer.state) + m.delta() for n, m in models.lora_modules(adapted).items()}
    again = load_model(tmp_path / "again")
    for name, weight in expected.items():
        assert torch.equal(again.get_submodule(name).state.packed, nf4.quantize(weight).packed)
    steps, _ = run("fresh", **LORA, model_name_or_path=str(tmp_path / "again"))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(steps[-1]["rewards/margins"]) > 1e-3
    assert merge.main([str(tmp_path / "adapter"), str(tmp_path / "bf16"), "--load_in_4bit"]) == 0
    wide = models.load_model(tmp_path / "bf16", torch.bfloat16)
    assert all(torch.equal(wide.get_submodule(n).weight, w.to(torch.bfloat16)) for n, w in expected.items())


@pytest.mark.parametrize("flags, says", [
    (["--load_in_4bit"], "add --use_peft"),
    (["--load_in_8bit", "--use_peft"], "use --load_in_4bit"),
    (["--use_peft", "--bnb_4bit_quant_type", "fp4"], "read only with --load_in_4bit"),
    (["--use_peft", "--load_in_4bit", "--bnb_4bit_quant_type", "int4"], "one of nf4, fp4"),
    (["--use_peft", "--load_in_4bit", "--bnb_4bit_compute_dtype", "int8"], "one of float32, bfloat16, float16"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_cannot_be_is_refused_with_the_reason(tiny, pairs_file, tmp_path, capsys, flags, says):
    status = dpo.main(["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir",
                       str(tmp_path / "out"), "--cache_dir", str(tmp_path / "c"), "--use_cpu", *flags])
    error = capsys.readouterr().err
    assert status == 2 and says in error and error.count("error:") == 1


def test_what_cannot_be_merged_is_refused(tiny, tmp_path, capsys):
    assert merge.main([str(tiny), str(tmp_path / "out")]) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_the_names_and_defaults_are_trls():
    trl = pytest.importorskip("trl")
    theirs, ours = vars(trl.ModelConfig()), vars(dpo.DPOConfig())
    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    assert all(theirs[name] == ours[name] for name in names)
    assert "bnb_4bit_quant_storage" in theirs.keys() & trl_flags.NO_EFFECT


@pytest.mark.parametrize("kind", [dict(), dict(bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True, bf16=True),
                                  dict(bnb_4bit_compute_dtype="bfloat16")], ids=str)
def test_the_rewards_of_extras_score_are_those_of_the_runs_last_evaluation(run, pairs_file, tmp_path, kind):
    """Of a wide base they would be others: the LoRA was trained on the 4-bit one."""
    run("out", **NF4, **kind, eval_dataset_name=str(pairs_file))
    last = read_metrics(tmp_path / "out")[-1]

    def margin(*more) -> float:
        output = tmp_path / "scores.jsonl"
        words = [str(tmp_path / "out"), str(pairs_file), "--cache_dir", str(tmp_path / "cache"), "--use_cpu", "--output", str(output)]
        assert score.main([*words, *more]) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return sum(row["margin"] for row in rows) / len(rows)

    assert margin() == pytest.approx(last["eval_rewards/margins"], abs=2e-6)
    options = read_json(tmp_path / "out" / "dpo_config.json")
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_compute_dtype"):
        options.pop(name)
    (tmp_path / "out" / "dpo_config.json").write_text(json.dumps(options | {"load_in_4bit": False}))
    assert abs(margin() - last["eval_rewards/margins"]) > 1e-4


def test_extras_chat_answers_with_the_runs_4_bit_base(run, tmp_path):
    trainer_steps, _ = run("out", **NF4, bnb_4bit_quant_type="fp4")
    speaker = load_speaker(str(tmp_path / "out"), chat.make_parser().parse_args([str(tmp_path / "out"), "--device", "cpu"]))
    expected, _ = load_adapted(tmp_path / "out", torch.float32, four_bit=dict(quant_type="fp4"))
    assert speaker.model.four_bit and trainer_steps
    packed = {name: module.state.packed for name, module in expected.named_modules() if hasattr(module, "state")}
    found = {name: module.state.packed for name, module in speaker.model.named_modules() if hasattr(module, "state")}
    assert packed.keys() == found.keys() and packed and all(torch.equal(packed[n], found[n]) for n in packed)


def test_a_merged_qlora_is_scored_wide(run, pairs_file, tmp_path):
    run("out", **NF4, merge_adapter=True)
    words = [str(tmp_path / "out"), str(pairs_file), "--cache_dir", str(tmp_path / "cache"), "--use_cpu"]
    assert score.main(words) == 0
