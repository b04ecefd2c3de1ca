"""What must not end in a traceback, a crash or a wasted run: odd files and flags, and runs that were killed."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_rows, read_metrics
from safetensors.torch import load_file, save_file

import dpo
import model as models
from extras import chat, convert, judge, merge, plan, score
from extras.models.opening import load_adapted
from parts.precision import Scaler


@pytest.fixture
def flags(tiny, pairs_file, tmp_path):
    """A run of two steps with a checkpoint after each; later flags win."""
    return ["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir", str(tmp_path / "out"),
            "--cache_dir", str(tmp_path / "cache"), "--use_cpu", "--no_bf16", "--max_steps", "2", "--save_steps", "1",
            "--logging_steps", "1"]


def refused(capsys, flags, *words) -> bool:
    """Whether the run ends with status 2 and one message that has these words."""
    status, error = dpo.main(flags), capsys.readouterr().err
    return status == 2 and error.count("error:") == 1 and "Traceback" not in error and all(w in error for w in words)


@pytest.mark.parametrize("name,text", [("c.json", "[1, 2]"), ("c.json", "null"), ("c.yaml", "- beta"), ("c.yaml", "1: 2"),
                                       ("c.json", '{"loss_type": [[]]}'), ("c.json", '{"seed": Infinity}'),
                                       ("c.json", '{"beta": 1' + "0" * 400 + "}")])
def test_a_config_file_of_another_shape_is_refused_by_name(flags, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert refused(capsys, [*flags, "--config", str(tmp_path / name)])


def test_an_empty_config_name_is_no_config_and_is_refused(flags, capsys):
    assert refused(capsys, [*flags, "--config", ""], "--config")


@pytest.mark.parametrize("name", ["file", "file/below", "nul\0", "x" * 300])
def test_an_output_dir_that_cannot_be_written_to_is_refused_before_the_reference_pass(flags, tmp_path, capsys, name, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(dpo.DPOTrainer, "train", lambda self: pytest.fail("training began"))
    assert refused(capsys, [*flags, "--output_dir", f"{tmp_path}/{name}"], "--output_dir")


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--dataset_name", "--eval_dataset_name", "--ref_model_name_or_path"])
def test_the_home_of_a_user_who_does_not_exist_is_a_path_that_is_not_there(flags, capsys, flag):
    assert refused(capsys, [*flags, flag, "~nobody-of-that-name/x"], "~nobody-of-that-name/x")


@pytest.mark.parametrize("more", [["--eval_strategy", "steps"], ["--eval_strategy", "epoch"], ["--eval_on_start"]])
def test_evaluating_on_nothing_is_refused(flags, capsys, more):
    assert refused(capsys, [*flags, *more], more[0], "no pairs to evaluate on")


def test_a_run_that_diverges_says_where_without_a_traceback_and_ends_with_1(flags, capsys):
    assert dpo.main([*flags, "--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_steps", "4"]) == 1
    error = capsys.readouterr().err
    assert error.count("error: step") == 1 and "Traceback" not in error


def first_step_only(flags, tmp_path):
    """The run, thrown back to its first checkpoint: that checkpoint, and the flags that resume from it."""
    assert dpo.main(flags) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    return tmp_path / "out" / "checkpoint-1", [*flags, "--resume_from_checkpoint", "true"]


def test_a_metrics_line_torn_by_a_kill_does_not_stop_the_resume(flags, tmp_path):
    checkpoint, again = first_step_only(flags, tmp_path)
    whole = read_metrics(checkpoint.parent)
    path = checkpoint.parent / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert dpo.main(again) == 0
    assert read_metrics(checkpoint.parent) == whole


def edit_state(checkpoint, **values):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | values))


def edit_moments(checkpoint, change):
    path = checkpoint / "optimizer.safetensors"
    save_file(change(load_file(path)), path)


DAMAGE = {
    "no moments": lambda c: (c / "optimizer.safetensors").unlink(),
    "half the moments": lambda c: (c / "optimizer.safetensors").write_bytes((c / "optimizer.safetensors").read_bytes()[:50]),
    "a moment missing": lambda c: edit_moments(c, lambda s: dict(list(s.items())[1:])),
    "moments of another shape": lambda c: edit_moments(c, lambda s: {n: t.flatten()[:1].clone() for n, t in s.items()}),
    "no weights": lambda c: (c / "model.safetensors").unlink(),
    "half the weights": lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:-9]),
    "half the state": lambda c: (c / "trainer_state.json").write_text("{"),
    "a step beyond the run": lambda c: edit_state(c, step=99),
    "a step before the run": lambda c: edit_state(c, step=-1),
    "a step that is text": lambda c: edit_state(c, step="one"),
    "no list of pending metrics": lambda c: edit_state(c, pending=None),
    "no settings": lambda c: edit_state(c, run=None),
}


@pytest.fixture(scope="module")
def finished(tiny, pairs_file, tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    given = ["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--cache_dir", str(home / "cache"),
             "--use_cpu", "--no_bf16", "--max_steps", "2", "--save_steps", "1"]
    assert dpo.main([*given, "--output_dir", str(home / "out")]) == 0
    return home, given


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(finished, tmp_path, capsys, damage):
    home, given = finished
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(home / "out" / "checkpoint-1", checkpoint)
    again = [*given, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint)]
    DAMAGE[damage](checkpoint)
    assert refused(capsys, again, str(checkpoint))


def test_a_checkpoint_of_another_type_of_weights_is_refused(finished, tmp_path, capsys):
    home, given = finished
    again = [*given, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(home / "out" / "checkpoint-1")]
    assert refused(capsys, [*again, "--dtype", "bfloat16"], "dtype was 'float32'")


@pytest.mark.parametrize("count", [1, 2])
def test_one_pair_and_a_batch_larger_than_the_data_train_and_stay_finite(flags, tmp_path, count):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count)))
    assert dpo.main([*flags, "--dataset_name", str(path), "--per_device_train_batch_size", "1000", "--max_steps", "3"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_merging_without_an_adapter_is_refused(flags, capsys):
    assert refused(capsys, [*flags, "--merge_adapter"], "--merge_adapter", "no adapter to merge")


def test_a_whole_model_saved_over_an_adapter_or_shards_is_what_is_read_back(flags, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json",
                 "model_of_mine.safetensors"):
        (out / name).write_text("of an earlier run")
    assert dpo.main([*flags, "--max_steps", "1"]) == 0
    model, settings = load_adapted(str(out), torch.float32)
    assert not settings and (out / "model_of_mine.safetensors").exists()
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())


def test_training_twice_with_one_trainer_is_refused_and_keeps_the_metrics(flags, tmp_path):
    trainer = dpo.DPOTrainer(args=dpo.parse_config(flags))
    trainer.train()
    before = read_metrics(tmp_path / "out")
    with pytest.raises(ValueError, match="taken 2 steps already"):
        trainer.train()
    assert read_metrics(tmp_path / "out") == before


def test_a_checkpoint_before_the_first_step_that_was_applied_is_written_and_resumed(flags, tmp_path, monkeypatch):
    """float16's first steps overflow, which is how the scale is found."""
    real, steps = Scaler.unscale, []

    def overflow_once(scaler):
        real(scaler)
        steps.append(scaler.position.step)
        if scaler.position.step == 0:
            scaler.parameters[0].grad.fill_(float("inf"))

    monkeypatch.setattr(Scaler, "unscale", overflow_once)
    flags = [*flags, "--fp16"]
    assert dpo.main(flags) == 0
    whole = load_file(tmp_path / "out" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    assert dpo.main([*flags, "--resume_from_checkpoint", "true"]) == 0 and steps == [0, 1, 1]
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_logger_that_cannot_be_started_ends_the_run_in_one_message(flags, capsys, monkeypatch):
    from extras.watch import loggers

    def trackio(c, step, ids):
        raise RuntimeError("no key")

    monkeypatch.setattr(loggers, "trackio", trackio)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: name)
    assert dpo.main([*flags, "--report_to", "trackio"]) == 1
    error = capsys.readouterr().err
    assert error.count("error: --report_to trackio: it cannot be started (no key)") == 1 and "Traceback" not in error


def merged_trainer(flags, *more):
    trainer = dpo.DPOTrainer(args=dpo.parse_config([*flags, "--use_peft", "--lora_r", "4", "--merge_adapter",
                                                    "--eval_fraction", "0.2", "--learning_rate", "0.01", *more]))
    return trainer, trainer.train()


def test_an_evaluation_after_the_merge_is_that_of_before_or_refused(flags):
    trainer, trained = merged_trainer(flags)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    trainer, _ = merged_trainer(flags, "--no_precompute_ref_log_probs")
    with pytest.raises(ValueError, match="the LoRA is merged"):
        trainer.evaluate()


def test_a_merged_model_is_saved_whole_wherever_it_is_saved(flags, tmp_path):
    trainer, _ = merged_trainer(flags)
    trainer.save_model(tmp_path / "other")
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


# config.json of the families whose layers differ: each value that has no meaning is refused by name

BASE = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2)
FALCON_H1 = BASE | MAMBA | dict(model_type="falcon_h1", mamba_d_ssm=64)
GRANITE_H = BASE | MAMBA | dict(
    model_type="granitemoehybrid", shared_intermediate_size=24, layer_types=["mamba", "attention"])
DEEPSEEK = BASE | dict(
    model_type="deepseek_v3", num_key_value_heads=4, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2,
    moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=10)
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
GLM = {k: v for k, v in DEEPSEEK.items() if k != "first_k_dense_replace"} | dict(model_type="glm4_moe_lite")
LLAMA4 = BASE | dict(model_type="llama4_text", head_dim=12, intermediate_size_mlp=40, num_local_experts=4)
GEMMA4 = BASE | dict(
    model_type="gemma4_text", head_dim=12, global_head_dim=20, hidden_size_per_layer_input=16, vocab_size_per_layer_input=61,
    layer_types=["sliding_attention", "full_attention"], sliding_window=5)
QWEN3_VL = dict(
    model_type="qwen3_vl", text_config=BASE | dict(head_dim=16, rope_scaling=dict(mrope_section=[4, 2, 2])),
    vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, out_hidden_size=32,
                       num_position_embeddings=16, deepstack_visual_indexes=[0, 1]))
GEMMA3 = dict(
    model_type="gemma3", text_config=BASE | dict(head_dim=12), mm_tokens_per_image=4,
    vision_config=dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, image_size=28, patch_size=7))
GEMMA4_IMAGES = dict(
    model_type="gemma4", text_config=GEMMA4 | dict(num_hidden_layers=2), image_token_id=3, audio_config=None,
    vision_config=dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
                       head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=20, use_clipped_linears=True))
UNIFIED = dict(
    model_type="gemma4_unified", text_config=BASE | dict(head_dim=12, global_head_dim=20, layer_types=GEMMA4["layer_types"]),
    vision_config=dict(mm_embed_dim=32, mm_posemb_size=70, model_patch_size=48, output_proj_dims=32, patch_size=16))
LLAVA = dict(model_type="llava", text_config=BASE | dict(model_type="llama"), vision_config=GEMMA3["vision_config"])
NAN = float("nan")
MEANINGLESS = [
    (FALCON_H1, "mlp_multipliers", True), (FALCON_H1, "mlp_multipliers", [1.0]), (FALCON_H1, "ssm_multipliers", [None] * 5),
    (FALCON_H1, "mlp_multipliers", [NAN, 1.0]), (FALCON_H1, "embedding_multiplier", None), (FALCON_H1, "lm_head_multiplier", None),
    (FALCON_H1, "time_step_limit", [0.0, NAN]), (FALCON_H1, "rms_norm_eps", -1e-6), (GRANITE_H, "residual_multiplier", None),
    (GRANITE_H, "mamba_d_conv", None), (FALCON_H1, "mamba_d_state", None),
    (DEEPSEEK, "n_shared_experts", -1), (DEEPSEEK, "n_shared_experts", 0.5), (DEEPSEEK, "num_nextn_predict_layers", 0.5),
    (DEEPSEEK, "first_k_dense_replace", -1), (DEEPSEEK, "qk_rope_head_dim", 7), (DEEPSEEK, "max_position_embeddings", "x"),
    (DEEPSEEK, "rope_scaling", YARN | dict(factor=0)), (DEEPSEEK, "rope_scaling", YARN | dict(mscale=NAN)),
    (DEEPSEEK, "rope_scaling", YARN | dict(mscale={})), (DEEPSEEK, "rope_scaling", YARN | dict(mscale_all_dim="x")),
    (DEEPSEEK, "rope_scaling", YARN | dict(original_max_position_embeddings=0)),
    (GLM, "mlp_layer_types", ["sparse", "x"]), (GLM, "mlp_layer_types", ["sparse"]),
    (LLAMA4, "attention_chunk_size", 0), (LLAMA4, "attention_chunk_size", None), (LLAMA4, "floor_scale", 0),
    (LLAMA4, "no_rope_layers", [1]), (LLAMA4, "no_rope_layers", [1] * 3), (LLAMA4, "interleave_moe_layer_step", -1),
    (LLAMA4, "num_key_value_heads", 3),
    (GEMMA4, "hidden_size_per_layer_input", -1), (GEMMA4, "vocab_size_per_layer_input", 60), (GEMMA4, "num_kv_shared_layers", 2),
    (GEMMA4, "global_head_dim", 19), (GEMMA4, "num_global_key_value_heads", 3), (GEMMA4, "per_layer_config", {"x": {}}),
    (GEMMA4, "rope_parameters", dict(full_attention=dict(rope_theta=1e4))),
    (GEMMA4, "rope_parameters", dict(full_attention={}, sliding_attention={}, x={})),
    (QWEN3_VL, "deepstack_visual_indexes", [0, 2]), (QWEN3_VL, "num_position_embeddings", -1), (QWEN3_VL, "patch_size", 0),
    (QWEN3_VL, "out_hidden_size", 16), (QWEN3_VL, "num_heads", 16), (QWEN3_VL, "depth", 2.0), (QWEN3_VL, "spatial_merge_size", "x"),
    (GEMMA3, "mm_tokens_per_image", -1), (GEMMA3, "mm_tokens_per_image", 0), (GEMMA3, "image_size", -28), (GEMMA3, "patch_size", 29),
    (GEMMA4_IMAGES, "head_dim", 6), (GEMMA4_IMAGES, "num_key_value_heads", 3), (GEMMA4_IMAGES, "use_clipped_linears", "x"),
    (GEMMA4_IMAGES, "pooling_kernel_size", 0), (GEMMA4_IMAGES, "rope_parameters", dict(rope_theta="x")),
    (GEMMA4_IMAGES, "rope_parameters", dict(rope_type="yarn")), (GEMMA4_IMAGES, "rope_parameters", [1]),
    (GEMMA4_IMAGES, "hidden_activation", "x"), (GEMMA4_IMAGES, "standardize", 1), (GEMMA4_IMAGES, "image_token_id", "x"),
    (UNIFIED, "mm_embed_dim", 0), (UNIFIED, "model_patch_size", 47), (UNIFIED, "output_proj_dims", 33), (UNIFIED, "patch_size", "x"),
    (GEMMA3, "layer_norm_eps", "x"), (LLAVA, "vision_feature_layer", -9), (LLAVA, "projector_hidden_act", "x"),
    (LLAVA, "vision_feature_select_strategy", "x"), (LLAVA, "num_attention_heads", 3)]


@pytest.mark.parametrize("base", [FALCON_H1, GRANITE_H, DEEPSEEK, GLM, LLAMA4, GEMMA4, QWEN3_VL, GEMMA3, GEMMA4_IMAGES, UNIFIED, LLAVA],
                         ids=lambda raw: raw["model_type"])
def test_the_files_that_the_values_below_spoil_are_read(base):
    assert models.read_config(base).hidden_size == 32


@pytest.mark.parametrize("base,key,value", MEANINGLESS, ids=lambda value: str(value)[:20])
def test_a_value_without_a_meaning_is_refused_by_the_name_of_its_key(base, key, value, tiny, flags, tmp_path, capsys):
    vision = base.get("vision_config", {})
    is_inner = key in vision or vision and key in ("layer_norm_eps", "spatial_merge_size", "rope_parameters", "hidden_activation", "standardize")
    raw = base | ({"vision_config": vision | {key: value}} if is_inner else {key: value})
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    words = {"num_attention_heads": "heads", "num_key_value_heads": "heads", "num_heads": "heads", "qk_rope_head_dim": "rotate",
             "global_head_dim": "rotate", "rope_scaling": "rope_", "patch_size": "_size",
             "hidden_activation": "hidden_act"}
    assert refused(capsys, [*flags, "--model_name_or_path", str(tmp_path / "model"), "--dry_run"], "config.json: ",
                   words.get(key, key))


def test_the_plan_of_a_config_that_cannot_be_read_is_one_message(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(FALCON_H1 | dict(mlp_multipliers=[1.0])))
    for directory in (tmp_path, tmp_path / "none"):
        assert plan.main([str(directory)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {directory}")
    (tmp_path / "config.json").write_text(json.dumps(FALCON_H1))
    assert plan.main([str(tmp_path)]) == 0


# Weights that are not finite

def with_weights(tiny, directory, **changed):
    """A copy of a checkpoint in which some tensors are others."""
    shutil.copytree(tiny, directory)
    names = {n.replace(".", "_"): n for n in load_file(tiny / "model.safetensors")}
    state = load_file(tiny / "model.safetensors") | {names[n]: t for n, t in changed.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("values", [torch.full((32,), float("nan")), torch.full((32,), 1e300, dtype=torch.float64)])
@pytest.mark.parametrize("more", [[], ["--no_precompute_ref_log_probs"], ["--loss_type", "simpo"], ["--fsdp", "full_shard"], ["--skip_nonfinite", "9"]])
def test_weights_that_are_not_finite_are_named_and_not_the_pairs(flags, tiny, tmp_path, capsys, values, more):
    directory = with_weights(tiny, tmp_path / "spoiled", model_norm_weight=values)
    assert dpo.main([*flags, "--model_name_or_path", str(directory), *more]) == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "not finite in the model's model.norm.weight" in error
    assert "pairs.jsonl:" not in error and "Traceback" not in error


def test_a_reference_whose_weights_are_not_finite_is_named(flags, tiny, tmp_path, capsys):
    directory = with_weights(tiny, tmp_path / "spoiled", model_norm_weight=torch.full((32,), float("nan")))
    for more in ([], ["--no_precompute_ref_log_probs"]):
        assert dpo.main([*flags, "--ref_model_name_or_path", str(directory), *more]) == 1
        assert "not finite in the reference's model.norm.weight" in capsys.readouterr().err


# Adapters

@pytest.fixture
def adapter(flags, tmp_path):
    """An adapter of a short run, to be spoiled."""
    assert dpo.main([*flags, "--use_peft", "--lora_r", "4", "--output_dir", str(tmp_path / "adapter")]) == 0
    return tmp_path / "adapter"


@pytest.mark.parametrize("setting, words", [
    (dict(lora_alpha=float("inf")), "alphas are finite"), (dict(lora_alpha=float("nan")), "alphas are finite"),
    (dict(lora_alpha=1e308), "alphas are finite"), (dict(alpha_pattern={"q_proj": "x"}), "alphas are finite"),
    (dict(alpha_pattern={"q_proj": None}), "alphas are finite"), (dict(lora_dropout=2), "lora_dropout = 2"),
    (dict(lora_dropout=float("nan")), "lora_dropout = nan"), (dict(target_modules=["nothing"]), "nothing: no such module")])
def test_a_setting_of_an_adapter_without_a_meaning_is_refused_by_its_file(flags, adapter, capsys, setting, words):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    assert refused(capsys, [*flags, "--model_name_or_path", str(adapter)], f"{path}: ", words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_adapter_tensors_that_are_no_floats_are_refused(flags, adapter, capsys, dtype):
    path = adapter / "adapter_model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path)
    assert refused(capsys, [*flags, "--model_name_or_path", str(adapter)], str(path), f"is {dtype}; expected a type of floats")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError("no more"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 128000000000 bytes")])
def test_a_model_too_large_to_open_ends_in_one_message(flags, capsys, monkeypatch, error):
    def load_model(*arguments):
        raise error

    monkeypatch.setattr(models, "load_model", load_model)
    assert dpo.main(flags) == 1
    told = capsys.readouterr().err
    assert told.count("error: rank 0 is out of memory before the first step") == 1 and "--load_in_4bit" in told and "Traceback" not in told


def test_an_error_of_the_code_while_opening_keeps_its_traceback(flags, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *arguments: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        dpo.main(flags)


# Files that are read are never written over

def unchanged(path, main, argv, words, capsys) -> bool:
    """Whether a command refuses to write over a file or directory that it reads, and leaves it as it was."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    before = {file: file.read_bytes() for file in files if file.is_file()}
    status, error = main(argv), capsys.readouterr().err
    assert status == 2 and error.count("error:") == 1 and words in error, error
    now = sorted(path.rglob("*")) if path.is_dir() else [path]
    return before == {file: file.read_bytes() for file in now if file.is_file()}


def test_no_command_writes_over_what_it_reads(tiny, flags, adapter, pairs_file, tmp_path, capsys):
    capsys.readouterr()
    words = "is read, and would be overwritten"
    pairs, model = tmp_path / "mine.jsonl", tmp_path / "model"
    shutil.copy(pairs_file, pairs)
    shutil.copytree(tiny, model)
    read = ["--prompts", str(pairs), "--output", f"{tmp_path}/./mine.jsonl"]
    assert unchanged(pairs, chat.main, [str(tiny), "--raw", *read], words, capsys)
    for flag in ("--output", "--html"):
        again = [str(tiny), str(pairs), "--ref", str(tiny), "--use_cpu", "--cache_dir", str(tmp_path / "cache"), flag, str(pairs)]
        assert unchanged(pairs, score.main, again, words, capsys)
    assert unchanged(pairs, judge.main, [str(pairs), "--command", "cat", "--output", str(pairs)], words, capsys)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(model)}))
    for out in (model, adapter):
        assert unchanged(out, merge.main, [str(adapter), str(out)], words, capsys)
    for flag in ("--model_name_or_path", "--ref_model_name_or_path"):
        assert unchanged(model, dpo.main, [*flags, flag, str(model), "--output_dir", str(model)], words, capsys)


@pytest.mark.parametrize("more, words", [
    (["--device", "nowhere"], "--device nowhere: "), (["--seed", "9" * 30], "--seed 9999"), (["--prompts", "EMPTY"], "no prompts")])
def test_flags_of_the_chat_that_mean_nothing_are_refused(tiny, pairs_file, tmp_path, capsys, more, words):
    (tmp_path / "empty.jsonl").write_text("")
    more = [str(tmp_path / "empty.jsonl") if word == "EMPTY" else word for word in more]
    assert chat.main([str(tiny), "--raw", "--prompts", str(pairs_file), "--output", str(tmp_path / "out.jsonl"), *more]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_dpo_config_is_named_by_the_commands_that_read_it(tiny, pairs_file, tmp_path, capsys, text):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "dpo_config.json").write_text(text)
    assert chat.main([str(model), "--raw", "--prompts", str(pairs_file), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert score.main([str(model), str(pairs_file), "--use_cpu"]) == 2
    assert capsys.readouterr().err.count(f"error: {model}/dpo_config.json: ") == 2


@pytest.mark.parametrize("template", [5, [{"x": 1}], [5], {"default": 5}, [{"name": "default", "template": None}]])
def test_a_chat_template_of_another_kind_is_refused_by_its_directory(tiny, flags, tmp_path, capsys, template):
    model = shutil.copytree(tiny, tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    say = lambda role, text: [{"role": role, "content": text}]
    row = {"prompt": say("user", "the cat"), "chosen": say("assistant", "a dog"), "rejected": say("assistant", "the sun")}
    (tmp_path / "turns.jsonl").write_text(json.dumps(row) + "\n")
    more = ["--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "turns.jsonl")]
    assert refused(capsys, [*flags, *more], f"{model}: its chat_template is ")


def test_an_empty_eos_token_is_none(tiny, flags, tmp_path, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": ""}))
    assert refused(capsys, [*flags, "--model_name_or_path", str(model)], "the tokenizer has no eos_token, so an answer has no end")


@pytest.mark.parametrize("option, words", [
    (dict(temperature="x"), "--temperature, or that of generation_config.json, is 'x'"), (dict(top_p=[]), "--top_p, or that of"),
    (dict(top_k=0.5), "--top_k, or that of"), (dict(repetition_penalty={}), "--repetition_penalty, or that of"),
    (dict(eos_token_id=[[1]]), "eos_token_id is"), (dict(eos_token_id="x"), "eos_token_id is ")])
def test_what_a_generation_config_cannot_mean_is_refused_by_the_chat(tiny, pairs_file, tmp_path, capsys, option, words):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True} | option))
    assert chat.main([str(model), "--raw", "--prompts", str(pairs_file), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert words in capsys.readouterr().err


def test_a_pipe_among_the_files_of_a_directory_is_not_waited_for(flags, pairs_file, tmp_path):
    (tmp_path / "rows").mkdir()
    os.mkfifo(tmp_path / "rows" / "a.jsonl")
    shutil.copy(pairs_file, tmp_path / "rows" / "b.jsonl")
    assert dpo.main([*flags, "--dataset_name", str(tmp_path / "rows")]) == 0


@pytest.mark.parametrize("turn", [{"from": "gpt"}, {"role": "assistant"}, {"from": "gpt", "value": None}])
def test_a_turn_without_a_text_is_not_converted(tmp_path, capsys, turn):
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": turn}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    assert convert.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    assert "in.jsonl:1: found " in capsys.readouterr().err
