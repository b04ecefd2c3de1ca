"""Every option of TRL 1.16 and 0.18 works here, is named as without effect, or is refused with what to use instead."""

import dataclasses
import enum
import json
import os

import pytest
import yaml

import dpo
from parts import cli, trl_flags
from parts.checks import check_config

FIELDS = set(dpo.DPOConfig.__annotations__)
BASE = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
# What TRL 0.18.2 and the TrainingArguments of transformers 4.52 have beyond TRL 1.16.
OLDER = """ref_model_init_kwargs model_adapter_name ref_adapter_name force_use_ref_model use_logits_to_keep padding_value
    label_pad_token_id tools generate_during_eval gradient_checkpointing_use_reentrant torch_dtype max_prompt_length
    max_completion_length reference_free rpo_alpha warmup_ratio overwrite_output_dir save_safetensors half_precision_backend
    per_gpu_train_batch_size per_gpu_eval_batch_size logging_dir no_cuda use_mps_device jit_mode_eval use_ipex fp16_opt_level
    tpu_num_cores tpu_metrics_debug past_index fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap adafactor
    group_by_length use_legacy_prediction_loop include_inputs_for_metrics fp16_backend push_to_hub_model_id
    push_to_hub_organization push_to_hub_token _n_gpu mp_parameters torchdynamo ray_scope
    include_tokens_per_second""".split()


def trl_fields() -> dict[str, dataclasses.Field]:
    trl = pytest.importorskip("trl", reason="needs trl")
    kinds = (trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    return {field.name: field for kind in kinds for field in dataclasses.fields(kind)}


def test_every_option_of_trl_is_ours_or_in_a_table():
    known = FIELDS | cli.NO_EFFECT | trl_flags.RENAMED.keys() | trl_flags.OTHERS.keys() | {"datasets"}
    assert sorted(trl_fields().keys() - known) == []
    assert sorted(set(OLDER) - known) == []


def test_no_option_stands_twice():
    """What becomes an option leaves the tables."""
    tables = [cli.NO_EFFECT, set(trl_flags.RENAMED), set(trl_flags.OTHERS)]
    assert not [sorted(table & FIELDS) for table in tables if table & FIELDS]
    assert not cli.NO_EFFECT & trl_flags.OTHERS.keys() and set(trl_flags.RENAMED.values()) <= FIELDS
    assert sum(len(names.split()) for names in trl_flags.REASONS.values()) == len(trl_flags.OTHERS)


def test_what_a_reason_names_exists():
    """A substitute is an option of ours, so that nobody is sent in a circle."""
    elsewhere = {"nproc_per_node", "nnodes"}  # torchrun's
    for _, reason in trl_flags.REASONS:
        named = {word.strip(",:;.") for word in reason.replace("--", " --").split() if word.startswith("--")}
        assert {name[2:].partition("=")[0] for name in named} <= FIELDS | elsewhere, reason


@pytest.mark.parametrize("name", sorted(trl_flags.OTHERS.keys() - FIELDS - cli.NO_EFFECT))
def test_each_is_accepted_at_the_value_that_changes_nothing_and_else_refused_with_its_reason(name, capsys):
    harmless, reason = trl_flags.OTHERS[name]
    plain = dpo.parse_config(BASE)
    assert dpo.parse_config([*BASE, f"--{name}", "x" if harmless == trl_flags.ANY else harmless]) == plain
    assert f"without effect here: --{name}" in capsys.readouterr().err
    if harmless != trl_flags.ANY:
        with pytest.raises(ValueError) as error:
            dpo.parse_config([*BASE, f"--{name}", "other"])
        assert str(error.value) == f"--{name} other: not an option here; instead: {reason}"


def test_trls_whole_configuration_at_its_defaults_loads(tmp_path):
    """As YAML, all of its fields; none is refused, and what is ours reads TRL's value."""
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in defaults().items()}
    named = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(plain | named))
    c = dpo.parse_config(["--config", str(tmp_path / "trl.yaml")])
    check_config(c)
    for name in plain.keys() & FIELDS - named.keys():
        ours = getattr(c, name)
        assert ours == plain[name] or [ours] == plain[name] or ours == [plain[name]] or plain[name] is None, name


def defaults() -> dict:
    found = {}
    for name, field in trl_fields().items():
        made = field.default_factory() if field.default is dataclasses.MISSING and \
            field.default_factory is not dataclasses.MISSING else field.default
        if made is not dataclasses.MISSING:
            found[name] = made
    return found


YAML = """
# TRL's kind of file
env:
  WANDB_PROJECT: pairs
model_name_or_path: Qwen/Qwen2.5-0.5B
datasets:
  - path: trl-lib/ultrafeedback_binarized
    name: small
    split: train[:1%]
    columns: [prompt, chosen, rejected]
test_split_size: 0.1
streaming: false
learning_rate: 5e-7
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
torch_dtype: bfloat16
bf16: true
fp16: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
lora_target_modules: all-linear
use_peft: true
load_best_model_at_end: false
output_dir: out
"""


def test_a_yaml_file_of_trl_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (tmp_path / "dpo.yaml").write_text(YAML)
    c = dpo.parse_config(["--config", str(tmp_path / "dpo.yaml"), "--learning_rate", "1e-6", "--revision", "v1"])
    assert (c.model_name_or_path, c.model_revision, c.dtype) == ("Qwen/Qwen2.5-0.5B", "v1", "bfloat16")
    assert (c.dataset_name, c.dataset_config) == ("trl-lib/ultrafeedback_binarized", "small")
    assert (c.dataset_train_split, c.eval_fraction, c.learning_rate) == ("train[:1%]", 0.1, 1e-6)
    assert (c.loss_type, c.loss_weights, c.lora_target_modules) == (["sigmoid", "sft"], [1.0, 0.2], ["all-linear"])
    assert os.environ.pop("WANDB_PROJECT") == "pairs"
    said = capsys.readouterr().err
    assert "--streaming false" in said and "--gradient_checkpointing_kwargs" in said


BAD_FILES = [
    ({"env": ["A"]}, "env: found a list; give NAME: value"),
    ({"datasets": "x"}, "datasets: give a list of entries with path, name, split"),
    ({"datasets": [{"path": "a"}, {"path": "b", "split": "x"}]}, "datasets: 2 of them, with different name or split"),
    ({"datasets": [{"path": "a", "fraction": 0.5}]}, "datasets: fraction; write the share of the rows"),
    ({"datasets": [{"path": "json", "data_files": ["a", "b"]}]}, "datasets: data_files; give one path or glob"),
    ({"datasets": [{"path": "a", "data_dir": "x"}]}, "datasets: data_dir; give dataset_config"),
    ({"learnin_rate": 1}, "learnin_rate: no such option; did you mean learning_rate?"),
    ({"deepspeed": "zero3.json"}, "deepspeed zero3.json: not an option here; instead: torchrun"),
    ({"num_processes": 8}, "num_processes 8: not an option here; instead: torchrun --nproc_per_node"),
]


@pytest.mark.parametrize("settings, message", BAD_FILES)
def test_what_a_file_has_that_cannot_be_is_said(settings, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as error:
        dpo.parse_config(["--config", str(tmp_path / "a.json")])
    assert str(error.value).startswith(f"--config {tmp_path / 'a.json'}: ")


@pytest.mark.parametrize("argv, message", [
    (["--learning-rat", "1"], "--learning_rat: no such flag; did you mean --learning_rate?"),
    (["--zzz"], "--zzz: no such flag; see --help"),
    (["prefs.jsonl"], "prefs.jsonl: each option is --name value"),
    (["--fp16_full_eval"], "--fp16_full_eval true: not an option here; instead: --bf16"),
    (["--deepspeed=zero3.json"], "--deepspeed zero3.json: not an option here"),
])
def test_unknown_words_of_the_command_line(argv, message):
    with pytest.raises(ValueError, match=message):
        dpo.parse_config([*BASE, *argv])


def test_negated_and_listed_flags_of_trl(capsys):
    assert dpo.parse_config([*BASE, "--no_fp16_full_eval", "--include_for_metrics", "inputs", "loss"]) == dpo.parse_config(BASE)
    said = capsys.readouterr().err
    assert "--fp16_full_eval false, --include_for_metrics (metrics are sums over all pairs" in said


def test_the_file_wins_over_defaults_and_loses_to_the_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("datasets: [{path: a}]\nevaluation_strategy: epoch\nmodel_name_or_path: m\n")
    c = dpo.parse_config(["--config", str(tmp_path / "a.yaml"), "--dataset_name", "b"])
    assert (c.dataset_name, c.eval_strategy) == ("b", "epoch")
