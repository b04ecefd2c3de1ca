"""What one sees of a run: the view at a terminal, lines elsewhere, sampled answers, loggers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_dpo

import dpo
import losses
from extras.watch import live, loggers, samples
from parts.metrics import length_bias


def settings(tiny, pairs_file, directory, **more) -> dict:
    return dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), eval_dataset_name=str(pairs_file),
                output_dir=str(directory / "out"), cache_dir=str(directory / "cache"), use_cpu=True, save_strategy="no",
                learning_rate=1e-3, max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=3) | more


# The view


def test_a_sparkline_fills_as_the_run_goes_on():
    assert live.sparkline([(0.25, 0.0), (0.5, 7.0), (0.75, 3.0)], 8, 1, live.BLOCKS) == ["▁▁▁▁██▄ "]
    tall = live.sparkline([(0.0, 0.0), (1.0, 1.0)], 2, 3, live.PLAIN)
    assert tall == [" @", " @", ".@"]
    assert live.sparkline([(1.0, 5.0)], 3, 1, live.PLAIN) == ["..."]  # one value has no range


@pytest.mark.parametrize("width", [20, 80, 149, 150, 200])
def test_the_view_fits_its_width(width):
    panel = live.Panel(None, {name: [(i / 50, i * 1.25) for i in range(1, 51)] for name in live.CURVES})
    lines = live.layout(panel, ["12.3 pairs/s", "1,234,567 tokens/s", "12,345 MiB", "1:02:03 left"], width, 24, True)
    plain = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
    assert max(map(len, plain)) < max(width, 50) and len(lines) == (4 if width < 150 else 1 + live.ROWS + 1)
    assert live.layout(panel, [], width, 7, True) == []


COMMAND = """{python} dpo.py --model_name_or_path {tiny} --dataset_name {pairs} --eval_dataset_name {pairs}
 --output_dir {out} --cache_dir {out}/cache --use_cpu --save_strategy no --learning_rate 1e-3 --max_steps 30
 --per_device_train_batch_size 4 --logging_steps 2 --eval_strategy steps --eval_steps 10 --generate_during_eval"""


def command(tiny, pairs_file, out) -> str:
    text = COMMAND.format(python=shlex.quote(sys.executable), tiny=tiny, pairs=pairs_file, out=out)
    return text.replace("\n", "")


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
@pytest.mark.parametrize("width", [80, 200])
def test_the_view_in_a_real_terminal(width, tiny, pairs_file, tmp_path):
    """The last screen: evaluations as lines above, the three curves in their place, nothing overwritten."""
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-u"]
    run = f"cd {ROOT} && OMP_NUM_THREADS=1 PYTHONIOENCODING=utf-8 {command(tiny, pairs_file, tmp_path)}"
    run += "; echo ended $?; sleep 60"
    subprocess.run([*tmux, "new-session", "-d", "-x", str(width), "-y", "50", run], check=True)
    try:
        deadline, shown = time.time() + 120, ""
        while "ended" not in shown and time.time() < deadline:
            time.sleep(0.3)
            shown = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"])
    lines = [line.rstrip() for line in shown.splitlines()]
    evals = [line for line in lines if re.match(r"step \d+: eval loss", line)]
    assert [line.split(":")[0] for line in evals] == ["step 0", "step 10", "step 20", "step 30"], shown
    assert "ended 0" in lines, shown
    titles = [i for i, line in enumerate(lines) if line.startswith("loss ")]
    assert len(titles) == 1, shown  # drawn in place, not one below the other
    if width == 80:
        rows = lines[titles[0]:titles[0] + 3]
        assert [row.split()[0] for row in rows] == ["loss", "accuracy", "margin"]
        assert all(re.search(r"[▁▂▃▄▅▆▇█]{12,}", row) for row in rows), shown
    else:
        assert re.match(r"loss .*accuracy .*margin ", lines[titles[0]]), shown
        assert sum("█" in line for line in lines[titles[0] + 1:titles[0] + 1 + live.ROWS]) == live.ROWS, shown
    assert any("pairs/s" in line and "tokens/s" in line and "MiB" in line and "left" in line for line in lines), shown
    assert not any("it/s" in line for line in lines)  # the bar is gone


def test_into_a_file_it_is_lines(tiny, pairs_file, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(shlex.split(command(tiny, pairs_file, tmp_path)), cwd=ROOT, stdout=log, stderr=log, check=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    text = (tmp_path / "log").read_text("utf-8")
    assert "\x1b" not in text and "\r" not in text
    assert len(re.findall(r"^step \d+/30: loss [\d.]+  accuracy", text, re.M)) == 15
    assert len(re.findall(r"^step \d+: eval loss", text, re.M)) == 4


# Sampled answers


def test_sampling_changes_nothing_of_the_run(tiny, pairs_file, tmp_path):
    """The same weights and metrics with and without; the same prompts each time; dropout is on, and stays on."""
    found = []
    for name, on in (("with", True), ("without", False)):
        c = dpo.DPOConfig(**settings(tiny, pairs_file, tmp_path / name, generate_during_eval=on, eval_on_start=not on,
                                     disable_dropout=False, use_peft=True, lora_dropout=0.3))
        trainer = dpo.DPOTrainer(args=c)
        trainer.train()
        assert trainer.model.training
        found.append((trainer, read_metrics(tmp_path / name / "out")))
    (one, rows), (other, plain) = found
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))
    strip = lambda rows: [
        {k: v for k, v in row.items() if "samples" not in k and "completions" not in k and "runtime" not in k}
        for row in rows
    ]
    assert strip(rows) == strip(plain)
    evals = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evals] == [0, 3, 6]
    assert all(
        [s["prompt"] for s in row["eval_samples"]] == [s["prompt"] for s in evals[0]["eval_samples"]] for row in evals
    )
    assert len(evals[0]["eval_samples"]) == samples.PROMPTS
    lengths = [s["tokens"] for s in evals[-1]["eval_samples"]]
    assert evals[-1]["eval_completions/mean_length"] == sum(lengths) / len(lengths)


def test_prompts_of_a_file_are_answered_and_two_ranks_say_what_one_says(tiny, pairs_file, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "why not"}\n')
    answers = []
    for ranks in (1, 2):
        words = [f"--{k}={v}" for k, v in settings(tiny, pairs_file, tmp_path / str(ranks), max_steps=3).items()]
        words += [f"--per_device_train_batch_size={8 // ranks}", "--generate_during_eval", "--generate_prompts",
                  str(tmp_path / "prompts.jsonl")]
        assert dpo.main(words) == 0 if ranks == 1 else run_dpo(*words, ranks=ranks)
        first = next(row for row in read_metrics(tmp_path / str(ranks) / "out") if "eval_samples" in row)
        answers.append(first["eval_samples"])
    assert answers[0] == answers[1] and [s["prompt"] for s in answers[0]] == ["the cat", "why not"]


@pytest.mark.parametrize(
    "more, message",
    [
        (
            dict(generate_prompts="nowhere.jsonl"),
            "--generate_prompts nowhere.jsonl: read only with --generate_during_eval",
        ),
        (dict(generate_during_eval=True, generate_prompts="nowhere.jsonl"), "nowhere.jsonl"),
        (
            dict(generate_during_eval=True, eval_strategy="no", eval_dataset_name=None),
            "--generate_during_eval: there are no pairs",
        ),
        (dict(report_to=["none", "wandb"]), "none goes with no other"),
        (dict(report_to=["comet_ml"]), "--report_to comet_ml: expected one of"),
        (dict(run_name="x"), "--run_name x: read only with --report_to"),
    ],
)
def test_what_cannot_be_is_refused_before_training(more, message, tiny, pairs_file, tmp_path):
    options = settings(tiny, pairs_file, tmp_path, **more)
    if options["eval_strategy"] == "no":
        del options["eval_steps"]
    with pytest.raises(ValueError, match=message):
        dpo.DPOTrainer(args=dpo.DPOConfig(**options))


# Loggers


def test_a_logger_that_is_not_installed_says_what_to_install(tiny, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard", "trackio", "mlflow"):
        with pytest.raises(ValueError, match=f"--report_to {name}: not installed; pip install {name}"):
            dpo.DPOTrainer(args=dpo.DPOConfig(**settings(tiny, pairs_file, tmp_path, report_to=[name])))


def test_wandb_and_trackio_get_every_line(tiny, pairs_file, tmp_path, monkeypatch):
    """Stand-ins with the functions that are called; the secret token is not among the settings."""
    seen = {"wandb": [], "trackio": []}

    def stand_in(name):
        run = types.SimpleNamespace(id="a1", log=lambda metrics, step=None: seen[name].append((metrics, step)),
                                    define_metric=lambda *names, **options: None)
        module = types.ModuleType(name)
        module.init = lambda **given: seen[name].append(given) or run
        module.Table = lambda columns, rows: [columns, *rows]
        module.__spec__ = types.SimpleNamespace()
        return module

    for name in seen:
        monkeypatch.setitem(sys.modules, name, stand_in(name))
    c = dpo.DPOConfig(**settings(tiny, pairs_file, tmp_path, report_to=["wandb", "trackio"], run_name="mine",
                                 generate_during_eval=True))
    dpo.DPOTrainer(args=c).train()
    rows = read_metrics(tmp_path / "out")
    for given, *logged in seen.values():
        assert given["name"] == "mine" and given["project"] == "huggingface" and "hub_token" not in given["config"]
        assert [m["train/loss"] for m, _ in logged if "train/loss" in m] == [r["loss"] for r in rows if "loss" in r]
        assert [m["eval/rewards/accuracies"] for m, _ in logged if "eval/loss" in m] == [
            r["eval_rewards/accuracies"] for r in rows if "eval_loss" in r]
    tables = [m["eval/samples"] for m, _ in seen["wandb"][1:] if "eval/samples" in m]
    assert len(tables) == 3 and tables[0][0] == ["prompt", "completion"]
    assert [step for _, step in seen["trackio"][1:]] == [r["step"] for r in rows]


def test_tensorboard_reads_back_what_metrics_has(tiny, pairs_file, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dpo.DPOTrainer(args=dpo.DPOConfig(**settings(tiny, pairs_file, tmp_path, report_to=["tensorboard"]))).train()
    events = EventAccumulator(str(tmp_path / "out" / "runs" / "out"))
    events.Reload()
    rows = [r for r in read_metrics(tmp_path / "out") if "loss" in r]
    got = [(e.step, e.value) for e in events.Scalars("train/rewards/margins")]
    assert [s for s, _ in got] == [2, 4, 6]
    assert np.allclose([v for _, v in got], [r["rewards/margins"] for r in rows])


# Length bias


def test_length_bias_is_the_correlation_of_margin_and_length():
    rng = np.random.default_rng(0)
    lengths, margins = rng.integers(1, 40, (2, 30)), rng.normal(size=30)
    t = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64)
    zeros = torch.zeros(30, dtype=torch.float64)
    pairs = losses.PairLogps(t(margins), zeros, zeros, zeros, t(lengths[0]), t(lengths[1]))
    assert abs(length_bias(pairs) - np.corrcoef(margins, lengths[0] - lengths[1])[0, 1]) < 1e-12
    assert length_bias(pairs._replace(policy_chosen_logps=t(3.0 * (lengths[0] - lengths[1])))) > 1 - 1e-12
    assert length_bias(pairs._replace(policy_chosen_logps=zeros)) == 0  # no margin varies: not nan


def test_the_settings_of_a_run_lie_beside_its_metrics_and_run_it_again(tiny, pairs_file, tmp_path):
    c = dpo.DPOConfig(**settings(tiny, pairs_file, tmp_path, hub_token=None))
    dpo.DPOTrainer(args=c).train()
    path = tmp_path / "out" / "dpo_config.json"
    assert "hub_token" not in json.loads(path.read_text())
    assert dpo.parse_config(["--config", str(path)]) == c
