"""Every option of TRL 1.16 and 0.18 works here, is named as without effect, or is refused with what to use instead."""

import dataclasses
import enum
import json
import os
from functools import partial

import pytest
import yaml

import dpo
from parts import trl_flags
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
    known = FIELDS | trl_flags.NO_EFFECT | trl_flags.RENAMED.keys() | trl_flags.OTHERS.keys() | {"datasets"}
    assert sorted(trl_fields().keys() - known) == []
    assert sorted(set(OLDER) - known) == []


def test_no_option_stands_twice():
    """What becomes an option leaves the tables."""
    tables = [trl_flags.NO_EFFECT, set(trl_flags.RENAMED), set(trl_flags.OTHERS)]
    assert not [sorted(table & FIELDS) for table in tables if table & FIELDS]
    assert not trl_flags.NO_EFFECT & trl_flags.OTHERS.keys() and set(trl_flags.RENAMED.values()) <= FIELDS
    assert sum(len(names.split()) for names in trl_flags.REASONS.values()) == len(trl_flags.OTHERS)


def test_what_a_reason_names_exists():
    """A substitute is an option of ours, so that nobody is sent in a circle."""
    elsewhere = {"nproc_per_node", "nnodes"}  # torchrun's
    for _, reason in trl_flags.REASONS:
        named = {word.strip(",:;.") for word in reason.replace("--", " --").split() if word.startswith("--")}
        assert {name[2:].partition("=")[0] for name in named} <= FIELDS | elsewhere, reason


@pytest.mark.parametrize("name", sorted(trl_flags.OTHERS.keys() - FIELDS - trl_flags.NO_EFFECT))
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


# From Python as from the command line


def other_than(name: str, field: dataclasses.Field, default):
    """A value of the field's kind that is not its default."""
    ours = dpo.DPOConfig.__dataclass_fields__.get(name)
    choices = [c for c in (ours.metadata["choices"] if ours else ()) if c not in (default, [default])]
    kind = str(field.type)
    if choices:
        return choices[-1]
    if isinstance(default, bool) or (default is None and "bool" in kind):
        return not default
    if isinstance(default, (int, float)) or (default is None and ("int" in kind or "float" in kind)):
        return 3 if default != 3 else 4
    if isinstance(default, dict) or (default is None and "dict" in kind):
        return {"a": 1}
    return ["sft"] if name == "loss_type" else "other"


def words_of(value) -> list[str]:
    value = value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, (list, tuple)):
        return [str(v) for v in value] or ["none"]
    return [str(value).lower() if value is None or isinstance(value, bool) else str(value)]


def verdict(make, name: str, capsys):
    """(works, the value), (named, None), or (refused, what to use instead)."""
    capsys.readouterr()
    try:
        c = make()
    except ValueError as error:
        assert "instead: " in str(error), f"{name}: {error}"
        return "refused", str(error).partition("instead: ")[2]
    ours = trl_flags.RENAMED.get(name, name)
    said = capsys.readouterr().err
    if f"--{name}" in said:
        assert said.startswith("without effect here: ") and said.count("without effect") == 1
        return "named", None
    return "works", getattr(c, ours, "one data set")


def test_each_documented_option_works_is_named_or_refused_from_python_as_from_the_command_line(capsys):
    """Every field of TRL's four dataclasses, at its default and at another value; no other outcome, and no TypeError."""
    fields, table, wrong = trl_fields(), {}, []
    for name in sorted(fields.keys() - {"datasets"}):  # only --config has it
        default = defaults().get(name)
        for value in (default, other_than(name, fields[name], default)):
            both = (verdict(partial(dpo.DPOConfig, **{name: value}), name, capsys),
                    verdict(partial(dpo.parse_config, [*BASE, f"--{name}", *words_of(value)]), name, capsys))
            table[name, value == default] = both[0][0]
            if both[0] != both[1]:
                wrong.append((name, value, *both))
    assert not wrong, "\n".join(map(str, wrong))
    assert not [name for (name, is_default), how in table.items() if is_default and how == "refused"]
    changed = [how for (_, is_default), how in table.items() if not is_default]
    assert {how: changed.count(how) > 20 for how in set(changed)} == {"works": True, "named": True, "refused": True}


def test_what_is_refused_in_python_names_the_class():
    with pytest.raises(ValueError, match="^DPOConfig: fp16_full_eval true: not an option here; instead: --bf16"):
        dpo.DPOConfig(fp16_full_eval=True)
    with pytest.raises(ValueError, match="^DPOConfig: learnin_rate: no such option; did you mean learning_rate?"):
        dpo.DPOConfig(learnin_rate=1)


def test_trls_own_objects_are_values():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    c = dpo.DPOConfig(
        torch_dtype=torch.bfloat16, eval_strategy=transformers.trainer_utils.IntervalStrategy.EPOCH, evaluation_strategy=None,
        lr_scheduler_type=transformers.SchedulerType.COSINE, report_to=None, fsdp=["full_shard", "auto_wrap"])
    assert (c.dtype, c.eval_strategy, c.lr_scheduler_type) == ("bfloat16", "epoch", "cosine")
    assert (c.report_to, c.fsdp) == (["none"], "full_shard auto_wrap")
    assert dpo.DPOConfig(model_init_kwargs={"dtype": torch.bfloat16, "revision": "v1", "attn_implementation": "sdpa"}) == \
        dpo.DPOConfig(dtype="bfloat16", model_revision="v1")
    assert dpo.parse_config([*BASE, "--model_init_kwargs", '{"dtype": "bfloat16"}']).dtype == "bfloat16"
    with pytest.raises(ValueError, match="model_init_kwargs max_memory: not an option here; instead: --dtype"):
        dpo.DPOConfig(model_init_kwargs={"max_memory": 1})


def test_a_copy_of_a_configuration_names_nothing_again(capsys):
    c = dpo.DPOConfig("out", dataloader_num_workers=4)
    assert capsys.readouterr().err == "without effect here: --dataloader_num_workers\n"
    assert dataclasses.replace(c, beta=0.2).output_dir == "out" and capsys.readouterr().err == ""


def test_trls_configuration_at_its_defaults_is_made_in_python():
    plain = {name: value for name, value in defaults().items() if name not in ("output_dir", "datasets")}
    c = dpo.DPOConfig("out", **plain)
    assert c.loss_type == ["sigmoid"] and c.bf16 == plain["bf16"]


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
    assert c.datasets == [{"path": "trl-lib/ultrafeedback_binarized", "name": "small", "split": "train[:1%]",
                           "columns": ["prompt", "chosen", "rejected"]}]
    assert (c.eval_fraction, c.learning_rate) == (0.1, 1e-6)
    assert (c.loss_type, c.loss_weights, c.lora_target_modules) == (["sigmoid", "sft"], [1.0, 0.2], ["all-linear"])
    assert os.environ.pop("WANDB_PROJECT") == "pairs"
    said = capsys.readouterr().err
    assert "--streaming false" in said and "--gradient_checkpointing_kwargs" in said


BAD_FILES = [
    ({"env": ["A"]}, "env: found a list; give NAME: value"),
    ({"datasets": "x"}, "datasets: give a list of entries with path, name, split"),
    ({"datasets": [{"name": "a"}]}, "datasets: give a list of entries with path, name, split"),
    ({"datasets": [{"path": "a", "fraction": 0.5}, {"path": "b"}]}, "datasets: fraction: give it for each data set, or for none"),
    ({"datasets": [{"path": "a", "fraction": -1}]}, "datasets: a: fraction -1: expected a number, 0 or more"),
    ({"datasets": [{"path": "a", "fraction": 0}]}, "datasets: fraction: each is 0"),
    ({"datasets": [{"path": "a", "weight": 0.5}]}, "datasets: a: weight: no such option"),
    ({"datasets": [{"path": "a", "columns": "prompt"}]}, "datasets: a: columns prompt: expected a list of names"),
    ({"datasets": [{"path": "a", "data_files": 1}]}, "datasets: a: data_files: give a path, a list of paths"),
    ({"datasets": [{"path": "a", "data_dir": "x"}]}, "datasets: a: data_dir: give name, a config or folder"),
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
