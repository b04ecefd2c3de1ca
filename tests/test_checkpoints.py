"""Checkpoints: whole or named as damaged, resumed exactly, best kept, written when the process is told to leave."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file

import dpo
from parts import checkpoints


@pytest.fixture
def run(tiny, pairs_file, tmp_path):
    """Train the tiny model in this process; returns (lines of metrics.jsonl but for times, final weights)."""

    def go(name="out", **options):
        settings = dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), output_dir=str(tmp_path / name), bf16=False,
                        cache_dir=str(tmp_path / "cache"), use_cpu=True, learning_rate=3e-3, num_train_epochs=2.0, logging_steps=1,
                        save_steps=2, disable_tqdm=True)
        dpo.DPOTrainer(args=dpo.DPOConfig(**(settings | options))).train()
        return timeless(tmp_path / name), load_file(tmp_path / name / "model.safetensors")

    return go


def timeless(directory) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "eval_runtime"} for m in read_metrics(directory)]


def assert_bitwise(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(t, b[1][n]) for n, t in a[1].items())


def flip(path, at=-9):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


DAMAGE = {
    "a bit of the weights": lambda c: flip(c / "model.safetensors"),
    "a bit of the moments": lambda c: flip(c / "optimizer.safetensors"),
    "a bit of the state": lambda c: flip(c / "trainer_state.json", 14),
    "half the moments": lambda c: (c / "optimizer.safetensors").write_bytes((c / "optimizer.safetensors").read_bytes()[:999]),
    "no tokenizer": lambda c: (c / "tokenizer.json").unlink(),
    "no state": lambda c: (c / "trainer_state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(run, tmp_path, capsys, damage):
    whole = run()
    DAMAGE[damage](tmp_path / "out" / "checkpoint-6")
    resumed = run(resume_from_checkpoint="true")
    said = capsys.readouterr().out
    assert "checkpoint-6" in said.split("damaged: ")[1] and f"going on from {tmp_path / 'out' / 'checkpoint-4'}" in said
    assert_bitwise(whole, resumed)


def test_where_no_checkpoint_is_whole_that_is_said(run, tmp_path):
    run(save_steps=3)
    for directory in checkpoints.in_directory(tmp_path / "out"):
        flip(directory / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-6.*checkpoint-3.*start anew"):
        run(save_steps=3, resume_from_checkpoint="true")


def test_every_file_of_a_checkpoint_is_safetensors_or_text_with_its_checksum(run, tmp_path):
    run(sync_ref_model=True, ref_model_sync_steps=2)
    home = tmp_path / "out" / "checkpoint-4"
    there = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    assert {p.rsplit(".", 1)[1] for p in there} == {"safetensors", "json", "jsonl"}
    assert there == json.loads((home / "trainer_state.json").read_text())["files"].keys() | {"trainer_state.json"}


@pytest.mark.parametrize("options", [dict(eval_fraction=0.2, eval_strategy="steps", eval_steps=3.0), dict(logging_steps=4),
                                     dict(loss_type=["bco_pair"]), dict(sync_ref_model=True, ref_model_sync_steps=3)], ids=str)
@pytest.mark.parametrize("back_to", [2, 4, 6])
def test_a_resume_from_any_checkpoint_ends_in_the_same_weights_and_lines(run, tmp_path, options, back_to):
    whole = run("whole", **options)
    run("cut", **options)
    for directory in checkpoints.in_directory(tmp_path / "cut"):
        if int(directory.name[11:]) > back_to:
            shutil.rmtree(directory)
    assert_bitwise(whole, run("cut", resume_from_checkpoint="true", **options))


def test_a_finished_run_that_is_resumed_writes_no_line_twice(run):
    options = dict(eval_fraction=0.2, eval_strategy="epoch", save_steps=1)
    assert_bitwise(run(**options), run(resume_from_checkpoint="true", **options))


def test_changed_settings_and_data_are_refused_by_name_unless_forced(run, pairs_file, tmp_path):
    run()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(pairs_file.read_text().splitlines(True)[:22]))
    for changed, words in ((dict(weight_decay=0.1), "weight_decay was 0.0 there and is 0.1"), (dict(dataset_name=str(other)), "data"),
                           (dict(adam_beta2=0.9), "adam_beta2"), (dict(num_train_epochs=3.0), "total_steps was 6")):
        with pytest.raises(ValueError, match=words):
            run(resume_from_checkpoint="true", **changed)
    lines, _ = run(resume_from_checkpoint="true", force_resume=True, num_train_epochs=3.0, learning_rate=1e-4)
    assert [m["step"] for m in lines] == list(range(1, 10))


def test_what_changes_no_weight_may_change_on_resume(run, tmp_path):
    whole = run("whole")
    run("cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    assert_bitwise(whole, run("cut", resume_from_checkpoint="true", save_steps=5, gradient_checkpointing=True, save_total_limit=1))
    assert [p.name for p in checkpoints.in_directory(tmp_path / "cut")] == ["checkpoint-5"]


def test_every_option_is_either_compared_or_may_differ():
    assert checkpoints.MAY_DIFFER <= dpo.DPOConfig.__annotations__.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_leave_saves_first(run, tmp_path, monkeypatch, number):
    whole, keep = run("whole", save_steps=100), dpo.DPOTrainer.train_step

    def told(self):
        if self.position.step == 2:
            os.kill(os.getpid(), number)
        return keep(self)

    before = signal.getsignal(number)
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", told)
    with pytest.raises(SystemExit) as leaving:
        run("cut", save_steps=100)
    assert leaving.value.code == 128 + number and signal.getsignal(number) == before
    assert [p.name for p in checkpoints.in_directory(tmp_path / "cut")] == ["checkpoint-3"]
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", keep)
    assert_bitwise(whole, run("cut", save_steps=100, resume_from_checkpoint="true"))


def test_the_second_run_on_one_output_directory_refuses(run, tiny, pairs_file, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from parts.output import claim\n"
         "lock = claim(pathlib.Path(sys.argv[2])); print('held', flush=True); sys.stdin.read()", str(ROOT), str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"another run \(.* {holder.pid}: host, process\) writes to it"):
        run()
    holder.kill()
    holder.wait()
    run()


# The best model


@pytest.fixture
def evaluations(monkeypatch):
    """Evaluations report these losses, in turn."""
    keep = dpo.metrics_of

    def report(values):
        values = iter(values)
        made = lambda sums, pairs: keep(sums, pairs) | ({"loss": next(values)} if pairs == 5 else {})
        monkeypatch.setattr(dpo, "metrics_of", made)

    return report


BEST = dict(eval_fraction=0.2, eval_strategy="steps", eval_steps=1.0, load_best_model_at_end=True, save_total_limit=1, save_steps=100,
            per_device_train_batch_size=6)  # 18 pairs are trained on in 6 steps, 5 evaluated


def test_the_best_checkpoint_is_kept_and_is_what_the_run_ends_with(run, tmp_path, evaluations):
    evaluations([5, 3, 4, 4, 4, 4.5])
    _, weights = run(**BEST | dict(save_steps=1))
    assert [p.name for p in checkpoints.in_directory(tmp_path / "out")] == ["checkpoint-2", "checkpoint-6"]
    best = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(t, weights[n]) for n, t in best.items())


@pytest.mark.parametrize("options,greater", [(dict(), False), (dict(metric_for_best_model="eval_rewards/margins"), True),
                                             (dict(metric_for_best_model="logps/rejected", greater_is_better=False), False)])
def test_which_evaluation_is_the_best(run, tmp_path, options, greater):
    lines, _ = run(**BEST | options)
    name = "eval_" + options.get("metric_for_best_model", "loss").removeprefix("eval_")
    values = {m["step"]: m[name] for m in lines if name in m}
    best = (max if greater else min)(values, key=values.get)
    state = json.loads((checkpoints.in_directory(tmp_path / "out")[-1] / "trainer_state.json").read_text())
    assert len(values) == 6 and state["best"]["step"] == best and state["best"]["value"] == values[best]


@pytest.mark.parametrize("losses,threshold,last", [([5, 3, 4, 4, 4, 4], 0.0, 4), ([5, 4.9, 4.8, 4.7, 4.6, 4.5], 0.2, 3),
                                                   ([5, 4, 3, 2, 1, 0], 0.0, 6), ([5, 6, 4, 6, 3, 6], 0.0, 6)])
def test_early_stopping_counts_as_transformers_does(run, evaluations, losses, threshold, last):
    evaluations(losses)
    lines, _ = run(**BEST, early_stopping_patience=2, early_stopping_threshold=threshold)
    assert lines[-1]["step"] == last == stops_at(losses, 2, threshold)


def stops_at(losses, patience, threshold) -> int:
    """By transformers' own callback."""
    transformers = pytest.importorskip("transformers")
    callback = transformers.EarlyStoppingCallback(patience, threshold)
    args = type("Args", (), dict(greater_is_better=False, metric_for_best_model="loss", load_best_model_at_end=True))
    state, control = transformers.TrainerState(best_metric=None), transformers.TrainerControl()
    for step, loss in enumerate(losses, 1):
        callback.on_evaluate(args, state, control, {"eval_loss": loss})
        if control.should_training_stop:
            return step
        state.best_metric = loss if state.best_metric is None or loss < state.best_metric else state.best_metric
    return len(losses)


def test_best_and_waiting_go_on_after_a_resume(run, tmp_path, evaluations, monkeypatch):
    evaluations([5, 3, 4])
    keep = dpo.DPOTrainer.train_step
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", lambda self: keep(self) if self.position.step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(**BEST | dict(save_steps=1))
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", keep)
    evaluations([4.5, 2.0, 2.0])
    lines, _ = run(**BEST | dict(save_steps=1), early_stopping_patience=2, resume_from_checkpoint="true")
    assert lines[-1]["step"] == 4


@pytest.mark.parametrize("options,words", [
    (dict(eval_strategy="no"), "needs evaluations and checkpoints"), (dict(save_strategy="no"), "needs evaluations and checkpoints"),
    (dict(metric_for_best_model="bleu"), "bleu: no such metric"), (dict(load_best_model_at_end=False, early_stopping_patience=1), "read only")])
def test_best_model_options_that_cannot_be_met_are_refused(run, options, words):
    with pytest.raises(ValueError, match=words):
        run(**{k: v for k, v in (BEST | options).items() if options.get("eval_strategy") != "no" or k != "eval_steps"})


