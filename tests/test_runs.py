"""What a run does over its steps, as people who come from transformers know it: schedules, saves, loggers."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types

import pytest
import torch
from conftest import ROOT, read_metrics

import dpo
from extras.hub import client
from extras.watch import loggers
from parts.checks import check_config
from parts.rates import SHAPES
from parts.schedule import Schedule

BASE = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
KWARGS = [
    ("linear", {}), ("constant", {}), ("constant_with_warmup", {}),
    ("cosine", {}), ("cosine", {"num_cycles": 0.8}),
    ("cosine_with_restarts", {}), ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-7}), ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_warmup_with_min_lr", {"min_lr": 0, "warmup_lr_rate": 0.2}),
    ("polynomial", {}), ("polynomial", {"power": 2, "lr_end": 1e-8}),
    ("inverse_sqrt", {}), ("inverse_sqrt", {"timescale": 50}),
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 4, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "warmup_type": "cosine", "decay_type": "linear", "min_lr_ratio": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "warmup_type": "1-sqrt", "num_cycles": 0.7}),
]


def schedule_of(total: int, warmup: int) -> Schedule:
    return Schedule(global_batch=1, steps_per_epoch=total, total_steps=total, log_every=1, eval_every=0, save_every=0,
                    warmup=warmup)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind, kwargs", KWARGS)
def test_a_schedule_is_transformers_own_at_every_step(kind, kwargs, warmup):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peak, total = 3e-6, 29
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = transformers.get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    c = dpo.DPOConfig(learning_rate=peak, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs or None)
    ours = schedule_of(total, warmup)
    for step in range(total):
        assert ours.learning_rate(c, step) / peak == pytest.approx(theirs.get_last_lr()[0] / peak, rel=0, abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_every_schedule_of_transformers_is_there_but_those_that_follow_a_metric():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = {kind.value for kind in transformers.SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert theirs == set(SHAPES) == {kind for kind, _ in KWARGS}


def test_scheduler_kwargs_come_as_json_or_from_a_file(tmp_path):
    flags = ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs"]
    assert dpo.parse_config([*BASE, *flags, '{"power": 2, "lr_end": 1e-9}']).lr_scheduler_kwargs == {"power": 2, "lr_end": 1e-9}
    assert dpo.parse_config([*BASE, *flags, "none"]).lr_scheduler_kwargs is None
    (tmp_path / "a.yaml").write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\n")
    assert dpo.parse_config([*BASE, "--config", str(tmp_path / "a.yaml")]).lr_scheduler_kwargs == {"min_lr_rate": 0.1}


WRONG = [
    ("cosine_with_min_lr", {}, "give one of min_lr and min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": 0.0, "min_lr_rate": 0.1}, "give one of min_lr and min_lr_rate"),
    ("polynomial", {"lr_end": 1.0}, "lr_end 1 must be below --learning_rate 1e-06"),
    ("polynomial", {"pover": 2}, "pover: no such option; it takes lr_end, power"),
    ("polynomial", {"power": "two"}, "power 'two': expected a number"),
    ("linear", {"power": 2}, "power: no such option; it takes none"),
    ("warmup_stable_decay", {}, "num_decay_steps is missing"),
    ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "sqrt"}, "decay_type sqrt: expected linear, cosine or 1-sqrt"),
]


@pytest.mark.parametrize("kind, kwargs, words", WRONG)
def test_scheduler_kwargs_without_meaning_are_refused(kind, kwargs, words):
    c = dpo.parse_config([*BASE, "--lr_scheduler_type", kind, "--lr_scheduler_kwargs", json.dumps(kwargs)])
    with pytest.raises(ValueError) as error:
        check_config(c)
    assert str(error.value) == f"--lr_scheduler_kwargs of {kind}: {words}"


@pytest.mark.parametrize("value", ["[1]", "power=2", "3"])
def test_scheduler_kwargs_that_are_no_object_are_refused(value):
    with pytest.raises(ValueError, match="expected a JSON object"):
        dpo.parse_config([*BASE, "--lr_scheduler_kwargs", value])


# Runs of a tiny model


@pytest.fixture
def train(tiny, pairs_file, tmp_path):
    """train(**options): a run of six steps in output_dir out; the trainer."""

    def go(**options) -> dpo.DPOTrainer:
        plain = dict(
            model_name_or_path=str(tiny), dataset_name=str(pairs_file), output_dir=str(tmp_path / "out"),
            cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-2, max_steps=6,
            per_device_train_batch_size=4, logging_steps=1)
        trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**plain | options))
        trainer.train()
        return trainer

    return go


EVALUATED = dict(eval_fraction=0.3, eval_strategy="steps", eval_steps=1)


def steps_saved(directory) -> set[int]:
    return {int(path.name[11:]) for path in directory.glob("checkpoint-*")}


@pytest.mark.parametrize("metric, sign", [(None, -1), ("rewards/chosen", 1)])
def test_save_strategy_best_writes_each_evaluation_that_is_better_than_all_before(train, tmp_path, metric, sign):
    train(save_strategy="best", metric_for_best_model=metric, **EVALUATED)
    rows = [row for row in read_metrics(tmp_path / "out") if "eval_loss" in row]
    values = [sign * row[f"eval_{metric or 'loss'}"] for row in rows]
    better = {row["step"] for i, row in enumerate(rows) if all(values[i] > value for value in values[:i])}
    assert len(rows) == 6 and steps_saved(tmp_path / "out") == better


def test_with_a_limit_the_best_alone_is_kept(train, tmp_path):
    trainer = train(save_strategy="best", save_total_limit=1, **EVALUATED)
    assert steps_saved(tmp_path / "out") == {trainer.position.best["step"]}


@pytest.mark.parametrize("flags, words", [
    (["--save_strategy", "best"], "--save_strategy best: it needs evaluations; give --eval_strategy"),
    (["--hub_strategy", "end"], "--hub_strategy end: read only with --push_to_hub"),
    (["--push_to_hub", "--hub_strategy", "all_checkpoints"], "--hub_strategy all_checkpoints: expected one of every_save, end"),
])
def test_saves_without_meaning_are_refused(flags, words):
    with pytest.raises(ValueError) as error:
        check_config(dpo.parse_config([*BASE, *flags]))
    assert str(error.value) == words


@pytest.mark.parametrize("version, splits", [("2.10.0", False), ("2.11.0+cu130", False), ("2.13.0", True), ("2.14.1+cu130", True)])
def test_4_bit_weights_are_split_where_torch_can_split_integers(version, splits, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    c = dpo.parse_config([*BASE, "--use_peft", "--load_in_4bit", "--fsdp"])
    if splits:
        return check_config(c)
    with pytest.raises(ValueError, match=f"^--fsdp with --load_in_4bit: torch {re.escape(version)} shards no weights that are integers"):
        check_config(c)


class Hub:
    """A stand-in for the hub: what was pushed, in order. `open` lets waiting uploads through."""

    def __init__(self, fails: bool = False):
        self.pushed, self.open, self.fails = [], threading.Event(), fails

    def create(self, name, private=None, token=None):
        return f"me/{name}"

    def push(self, directory, repo_id, revision=None, token=None, message=""):
        self.open.wait(30)
        if self.fails and message != "Trained with DPO":
            raise ValueError("the hub is away")
        self.pushed.append((message, repo_id, {path.name for path in directory.iterdir() if path.is_file()}))
        return "https://hub/commit"


def connect(monkeypatch, **options) -> Hub:
    hub = Hub(**options)
    monkeypatch.setattr(client, "create", hub.create)
    monkeypatch.setattr(client, "push", hub.push)
    return hub


def test_every_save_pushes_what_a_checkpoint_trained_and_training_goes_on(train, tmp_path, monkeypatch):
    """The first upload lasts until the run has ended, so that the next ones are left out; its checkpoint is deleted."""
    hub = connect(monkeypatch)
    end = dpo.DPOTrainer.push_to_hub

    def push_to_hub(self, *given):
        assert steps_saved(tmp_path / "out") == {6} and not hub.pushed
        hub.open.set()
        end(self, *given)

    monkeypatch.setattr(dpo.DPOTrainer, "push_to_hub", push_to_hub)
    train(push_to_hub=True, save_steps=2, save_total_limit=1)
    assert [pushed[:2] for pushed in hub.pushed] == [
        ("Training in progress, step 2", "me/out"), ("Trained with DPO", "me/out")]
    first, last = (files for *_, files in hub.pushed)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= first & last and "README.md" in last
    assert not first & {"optimizer.safetensors", "trainer_state.json"} and not (tmp_path / "out" / ".push").exists()


def test_hub_strategy_end_pushes_once(train, monkeypatch):
    hub = connect(monkeypatch)
    hub.open.set()
    train(push_to_hub=True, hub_strategy="end", save_steps=2)
    assert [message for message, *_ in hub.pushed] == ["Trained with DPO"]


def test_a_hub_that_is_away_does_not_end_the_run(train, monkeypatch, capsys):
    hub = connect(monkeypatch, fails=True)
    hub.open.set()
    train(push_to_hub=True, save_steps=6)
    assert [message for message, *_ in hub.pushed] == ["Trained with DPO"]
    assert "not pushed (Training in progress, step 6): the hub is away" in capsys.readouterr().out


def test_sampled_answers_stop_at_every_end_token_of_generation_config(tiny, train, tmp_path):
    """The token that an answer without it has in its middle is made an end: the answer stops there."""
    options = dict(generate_during_eval=True, max_steps=1, learning_rate=0.0, **EVALUATED)
    free = train(save_strategy="no", **options).samples
    first = next(row for row in read_metrics(tmp_path / "out") if "eval_samples" in row)["eval_samples"]
    model = tmp_path / "two-ends"
    shutil.copytree(tiny, model)
    word = first[0]["completion"].split()[2]
    end = dpo.data.Tokenizer.load(tiny).encode(word, add_special_tokens=False)[0]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    stopped = train(save_strategy="no", model_name_or_path=str(model), **options).samples
    assert free.sampling.stop_ids == {2} and stopped.sampling.stop_ids == {2, end}
    again = next(row for row in read_metrics(tmp_path / "out") if "eval_samples" in row)["eval_samples"]
    for before, after in zip(first, again):
        words = before["completion"].split()
        assert after["completion"].split() == (words[:words.index(word) + 1] if word in words else words)


# Output that cannot be encoded


def test_a_run_and_the_commands_end_well_where_stdout_is_ascii(tiny, tmp_path):
    """Rows, prompts and paths with characters that stdout lacks."""
    home = tmp_path / "Größe"
    home.mkdir()
    rows = [{"prompt": f"the Götterdämmerung {i}", "chosen": " was schön ✓", "rejected": " was böse ✗ ✗"} for i in range(4)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    model = ["--model_name_or_path", tiny]
    out = ["--output_dir", home / "out", "--cache_dir", home / "cache", "--use_cpu"]
    commands = [
        ["dpo.py", *model, "--dataset_name", home / "pairs.jsonl", *out, "--max_steps", 2, "--logging_steps", 1,
         "--eval_fraction", 0.5, "--generate_during_eval"],
        ["data.py", home / "pairs.jsonl", *model],
        ["-m", "extras.score", home / "out", home / "pairs.jsonl", "--cache_dir", home / "cache", "--use_cpu"],
        ["-m", "extras.report", home / "out"],
    ]
    for words in commands:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.isascii() and "Gr\\xf6\\xdfe" in done.stdout + done.stderr, done


# Loggers


class Loggers:
    """Stand-ins for wandb and mlflow: the runs that were started, {id: lines}, and how."""

    def __init__(self):
        self.runs, self.started, self.params, self.active = {}, [], {}, None

    def start(self, run_id, **how) -> str:
        run_id = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(run_id, [])
        self.started.append((run_id, how))
        return run_id

    def wandb(self) -> types.ModuleType:
        module = types.ModuleType("wandb")

        def init(id=None, resume=None, **more):
            run_id = self.start(id, resume=resume)
            return types.SimpleNamespace(
                id=run_id, define_metric=lambda *names, **options: None,
                log=lambda metrics: self.runs[run_id].append((metrics["train/global_step"], metrics)))

        module.init = init
        module.__spec__ = types.SimpleNamespace()
        return module

    def mlflow(self) -> types.ModuleType:
        module = types.ModuleType("mlflow")

        def start_run(run_id=None, run_name=None):
            self.active = self.start(run_id, run_name=run_name)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.active))

        def log_params(values):
            assert len(values) <= 100 and all(len(value) <= 500 for value in values.values())
            self.params |= values

        module.start_run, module.log_params = start_run, log_params
        module.active_run = lambda: None
        module.set_experiment = lambda name: self.started.append(("experiment", name))
        module.log_metrics = lambda values, step: self.runs[self.active].append((step, values))
        module.log_dict = lambda values, path: self.runs[self.active].append((path, values))
        module.__spec__ = types.SimpleNamespace()
        return module


@pytest.fixture
def logged(monkeypatch) -> Loggers:
    seen = Loggers()
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, getattr(seen, name)())
    return seen


def test_mlflow_gets_every_line_the_options_and_the_samples(train, logged, tmp_path):
    train(report_to=["mlflow"], project="pairs", run_name="mine", hub_token=None, generate_during_eval=True, **EVALUATED)
    assert logged.started == [("experiment", "pairs"), ("run0", {"run_name": "mine"})]
    lines = logged.runs["run0"]
    rows = read_metrics(tmp_path / "out")
    assert [(step, values["train/loss"]) for step, values in lines if "train/loss" in values] == [
        (row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [(step, values["eval/loss"]) for step, values in lines if "eval/loss" in values] == [
        (row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    samples = {path: values["samples"] for path, values in lines if "samples" in values}
    assert samples["eval_samples/step-6.json"] == [row for row in rows if "eval_samples" in row][-1]["eval_samples"]
    assert logged.params["learning_rate"] == "0.01" and "hub_token" not in logged.params


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_with_its_run_in_the_logger(name, train, logged, tmp_path):
    both = [name, "mlflow" if name == "wandb" else "wandb"]
    train(report_to=both, save_steps=4)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    train(report_to=both, save_steps=4, resume_from_checkpoint="true")
    assert [run_id for run_id, _ in logged.started] == ["run0", "run1", "run0", "run1"]
    steps = [step for step, _ in logged.runs["run0"]]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6]


def test_a_new_run_in_the_same_directory_is_a_new_run_in_the_logger(train, logged):
    train(report_to=["wandb"], save_strategy="no")
    train(report_to=["wandb"], save_strategy="no")
    assert logged.started == [("run0", {"resume": None}), ("run1", {"resume": None})]


def test_the_ids_are_not_uploaded():
    assert loggers.IDS in client.LEFT_OUT
