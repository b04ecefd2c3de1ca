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


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C means what it does at a terminal: these tests may be a script's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
                           (dict(adam_beta2=0.9), "adam_beta2")):
        with pytest.raises(ValueError, match=words):
            run(resume_from_checkpoint="true", **changed)
    lines, _ = run(resume_from_checkpoint="true", force_resume=True, num_train_epochs=3.0, learning_rate=1e-4)
    assert [m["step"] for m in lines] == list(range(1, 10))


EIGHT, BFLOAT16 = dict(optim="adamw_8bit"), dict(dtype="bfloat16")


@pytest.mark.parametrize("before, now, words", [
    ({}, EIGHT, r"those of AdamW, and this run's optimizer is AdamW \(8 bits\)"),
    (EIGHT, {}, r"those of AdamW \(8 bits\), and this run's optimizer is AdamW;"),
    (BFLOAT16, BFLOAT16 | dict(stochastic_rounding=False), r"those of AdamW \(stochastic rounding\)"),
    (EIGHT, EIGHT | dict(use_peft=True), r"optimizer.safetensors: model.* is not trained in this run; it is of another model"),
], ids=str)
def test_moments_of_another_optimizer_or_model_are_refused_though_forced(run, before, now, words):
    run(**before, max_steps=2)
    with pytest.raises(ValueError, match="there and is"):
        run(**now, max_steps=2, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match=words):
        run(**now, max_steps=2, resume_from_checkpoint="true", force_resume=True)


# Which steps have a checkpoint

LOSSES = [5, 3, 4, 4, 4, 4.5]
EVALUATED = dict(eval_fraction=0.2, eval_strategy="steps", eval_steps=1, losses=LOSSES)


@pytest.mark.parametrize("options", [
    dict(save_steps=4), dict(save_steps=100), dict(save_steps=2, max_steps=5), dict(save_steps=0.4), dict(save_strategy="no"),
    dict(save_strategy="epoch", num_train_epochs=1.5), dict(save_strategy="epoch", max_steps=4),
    dict(save_steps=2, max_steps=5, save_total_limit=1), dict(save_steps=2, max_steps=5, save_total_limit=2),
    dict(save_strategy="best", **EVALUATED), dict(save_strategy="best", save_total_limit=1, **EVALUATED),
    dict(load_best_model_at_end=True, save_steps=1, save_total_limit=1, **EVALUATED),
    dict(load_best_model_at_end=True, save_steps=1, save_total_limit=2, **EVALUATED),
    dict(load_best_model_at_end=True, save_steps=1, early_stopping_patience=2, **EVALUATED),
], ids=str)
def test_the_checkpoints_of_a_run_are_those_of_transformers(run, tmp_path, evaluations, options):
    """A run of 24 pairs in steps of 8, beside transformers' Trainer with the same numbers of steps and losses."""
    given = dict(options)
    losses = given.pop("losses", [])
    evaluations(losses)
    run(**given, per_device_train_batch_size=6 if losses else 8)
    ours = [p.name for p in checkpoints.in_directory(tmp_path / "out")]
    assert ours == transformers_checkpoints(tmp_path / "peer", options, losses)


def transformers_checkpoints(directory, options: dict, losses: list) -> list[str]:
    """The checkpoints that its Trainer leaves of a line's fit, where its evaluations report `losses`."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    rows = [{"x": torch.ones(2), "labels": torch.ones(1)} for _ in range(24)]
    best = dict(metric_for_best_model="score", greater_is_better=False) if losses else {}
    given = {k: v for k, v in options.items() if k in transformers.TrainingArguments.__dataclass_fields__}
    args = transformers.TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=8, **best,
        **dict(num_train_epochs=2.0, save_steps=2) | given)
    values = iter(losses)
    patience = options.get("early_stopping_patience")
    transformers.Trainer(
        Line(), args, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda _: {"score": next(values)},
        callbacks=[] if patience is None else [transformers.EarlyStoppingCallback(patience)]).train()
    return [p.name for p in checkpoints.in_directory(directory)]


class Line(torch.nn.Module):
    """y = w x + b by least squares."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        y = self.line(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def test_where_the_last_checkpoint_does_not_fit_the_model_is_written_all_the_same(run, tmp_path, monkeypatch, capsys):
    _, weights = run("whole", save_steps=100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(OSError, match="checkpoint-6: cannot be written .*No space left"):
        run("full", save_steps=100)
    assert f"the model of the last step is in {tmp_path / 'full'}" in capsys.readouterr().out
    found = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(t, found[n]) for n, t in weights.items())


# A run that gets another end


def test_a_longer_run_goes_on_from_the_last_checkpoint_as_if_it_had_never_ended(run, tmp_path, capsys):
    """3 steps an epoch: step 7 is the first of the third epoch, in its own order."""
    options = dict(lr_scheduler_type="constant", save_steps=100)
    whole = run("whole", num_train_epochs=4.0, **options)
    run("cut", num_train_epochs=2.0, **options)
    assert_bitwise(whole, run("cut", num_train_epochs=4.0, resume_from_checkpoint="true", **options))
    assert "checkpoint-6: of a run of 6 steps, which now has 12; from here on the learning rate is that of 12" in capsys.readouterr().out
    run("steps", max_steps=7, **options)
    assert_bitwise(whole, run("steps", max_steps=12, save_total_limit=1, resume_from_checkpoint="true", **options))
    assert [p.name for p in checkpoints.in_directory(tmp_path / "steps")] == ["checkpoint-12"]


@pytest.mark.parametrize("kind", ["linear", "cosine_with_min_lr"])
def test_from_the_checkpoint_on_the_learning_rate_is_that_of_the_new_total(run, monkeypatch, kind):
    options = dict(lr_scheduler_type=kind, warmup_steps=0.5, save_steps=100)
    options["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1} if kind != "linear" else None
    run("cut", max_steps=6, **options)
    extended = run("cut", max_steps=11, resume_from_checkpoint="true", **options)
    keep = dpo.make_schedule

    def changes(c, *sizes):
        before, after = (keep(dpo.replace(c, max_steps=steps), *sizes) for steps in (6, 11))
        rate = lambda self, c, step: type(before).learning_rate(before if step < 6 else after, c, step)
        return type("Changes", (type(after),), {"learning_rate": rate})(*after)

    monkeypatch.setattr(dpo, "make_schedule", changes)
    assert_bitwise(run("whole", max_steps=11, **options), extended)


def test_the_learning_rates_of_a_longer_run_are_those_of_transformers(run, tmp_path):
    """But for the first new step, at which transformers still takes the rate that the shorter run had left: 0."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    def theirs(epochs, asked=None):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / "peer"), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
            per_device_train_batch_size=8, num_train_epochs=epochs, learning_rate=3e-3, lr_scheduler_type="linear")
        trainer = transformers.Trainer(Line(), args, train_dataset=[{"x": torch.ones(2), "labels": torch.ones(1)}] * 24)
        trainer.train(resume_from_checkpoint=asked)
        return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]

    theirs(2)
    run()
    ours = [line["learning_rate"] for line in run(num_train_epochs=3.0, resume_from_checkpoint="true")[0]]
    peer = theirs(3, True)
    assert peer[6] == 0 and ours[6] == pytest.approx(3e-3 * 3 / 9)
    assert ours[:6] + ours[7:] == pytest.approx(peer[:6] + peer[7:])


def test_a_run_may_end_earlier_but_not_before_its_checkpoint(run, tmp_path):
    options = dict(lr_scheduler_type="constant", save_steps=4)
    run(max_steps=8, **options)
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    with pytest.raises(ValueError, match=r"checkpoint-4: step 4 is beyond the 3 steps .*; raise --num_train_epochs or --max_steps"):
        run(max_steps=3, resume_from_checkpoint="true", **options)
    shorter = run(max_steps=5, resume_from_checkpoint="true", **options)
    assert_bitwise(run("whole", max_steps=5, **options), shorter)


def test_of_two_runs_in_a_directory_the_one_of_this_length_is_resumed(run, tmp_path):
    """The older, shorter one got further than the run that was cut short after its second step."""
    whole = run("whole", max_steps=9)
    run("cut", max_steps=6, save_steps=100)
    run("cut", max_steps=9, save_steps=4, save_total_limit=1)
    assert {p.name for p in checkpoints.in_directory(tmp_path / "cut")} == {"checkpoint-6", "checkpoint-9"}
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-9")
    assert_bitwise(whole, run("cut", max_steps=9, resume_from_checkpoint="true"))


def test_a_worker_that_restarts_does_not_go_on_from_a_shorter_run(run, monkeypatch, capsys):
    run(max_steps=4)
    whole = run("whole", max_steps=6)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert_bitwise(whole, run(max_steps=6))
    assert "of another run (it had another number of steps); starting from the beginning" in capsys.readouterr().out


def test_what_changes_no_weight_may_change_on_resume(run, tmp_path):
    whole = run("whole")
    run("cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    assert_bitwise(whole, run("cut", resume_from_checkpoint="true", save_steps=5, gradient_checkpointing=True, save_total_limit=1))
    assert [p.name for p in checkpoints.in_directory(tmp_path / "cut")] == ["checkpoint-6"]


def test_every_option_is_either_compared_or_may_differ():
    assert checkpoints.MAY_DIFFER <= dpo.DPOConfig.__annotations__.keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
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


def test_a_second_ctrl_c_stops_at_once(run, tmp_path, monkeypatch, capfd):
    keep = dpo.DPOTrainer.train_step

    def told(self):
        if self.position.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert "again stops at once" in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)
        return keep(self)

    monkeypatch.setattr(dpo.DPOTrainer, "train_step", told)
    with pytest.raises(KeyboardInterrupt):
        run("cut", save_steps=100)
    assert checkpoints.in_directory(tmp_path / "cut") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_sigint_stays_ignored_while_training(run, tmp_path, monkeypatch):
    whole = run("whole", save_steps=100)
    keep = dpo.DPOTrainer.train_step

    def told(self):
        os.kill(os.getpid(), signal.SIGINT)
        return keep(self)

    monkeypatch.setattr(dpo.DPOTrainer, "train_step", told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert_bitwise(run("told", save_steps=100), whole)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_without_checkpoints_is_one_line_and_status_130(tiny, pairs_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", lambda self: os.kill(os.getpid(), signal.SIGINT))
    status = dpo.main([*f"--model_name_or_path {tiny} --dataset_name {pairs_file} --save_strategy no".split(),
                       "--output_dir", str(tmp_path / "out")])
    said = capfd.readouterr().err
    assert status == 130 and "stopped by Ctrl-C" in said and "Traceback" not in said


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


def test_the_best_checkpoint_alone_is_kept_and_is_what_the_run_ends_with(run, tmp_path, evaluations):
    evaluations([5, 3, 4, 4, 4, 4.5])
    _, weights = run(**BEST | dict(save_steps=1))
    assert [p.name for p in checkpoints.in_directory(tmp_path / "out")] == ["checkpoint-2"]
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


