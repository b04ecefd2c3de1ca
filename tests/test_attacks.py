"""What must not end in a traceback, a crash or a wasted run: odd files and flags, and runs that were killed."""

import json
import shutil

import pytest
import torch
from conftest import make_rows, read_metrics
from safetensors.torch import load_file, save_file

import dpo
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
