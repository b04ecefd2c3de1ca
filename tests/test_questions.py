"""docs/questions.md: every command is one, and the slow run holds the sentences to what they give."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics

import dpo
from extras import score
from parts.checks import check_config

TEXT = (ROOT / "docs" / "questions.md").read_text("utf-8")
COMMANDS = re.findall(r"^    ((?:python|head) .*)$", TEXT, re.M)
RUNS = [shlex.split(c)[2:] for c in COMMANDS if c.startswith("python dpo.py")]


def test_every_command_is_one():
    assert len(RUNS) >= 8 and len(COMMANDS) >= 11
    for words in RUNS:
        c = dpo.parse_config(words)
        check_config(c)
        assert c.output_dir in words and c.model_name_or_path == "demo/model"


def test_the_first_loss_is_ln_2_and_the_accuracy_one_half(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = next(words for words in RUNS if words[-1] == "first")
    assert dpo.main([*words[:-1], str(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--use_cpu",
                     "--eval_dataset_name", "none"]) == 0
    (row,) = read_metrics(tmp_path)
    assert abs(row["loss"] - 0.6931) < 1e-4 and row["rewards/accuracies"] == 0.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every command, with its files elsewhere: {output_dir: (status, training, evaluation)}."""
    here, found = tmp_path_factory.mktemp("questions"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for command in COMMANDS:
            if command.startswith("head"):
                command, _, name = command.rpartition(" > ")
                (here / name).write_bytes(subprocess.run(shlex.split(command), capture_output=True, check=True).stdout)
                continue
            words = [str(here / w) if w in ("falls", "few.jsonl") else w for w in shlex.split(command)]
            if words[1] == "dpo.py":
                name = words[-1].split("/")[-1]
                status = dpo.main([*words[2:-1], str(here / name), "--cache_dir", str(here / "cache"), "--use_cpu"])
                rows = read_metrics(here / name)
                last = [r for r in rows if "eval_loss" in r]
                found[name] = status, [r for r in rows if "loss" in r], last[-1] if last else None
            elif words[1] == "-m":
                assert score.main([*words[3:], "--cache_dir", str(here / "cache"), "--use_cpu"]) == 0
            else:
                assert words[1] == "data.py"
                subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    return found


@pytest.mark.slow
def test_the_sentences_are_true(runs):
    status = {name: s for name, (s, _, _) in runs.items()}
    assert status.pop("nan") == 1 and set(status.values()) == {0}
    evals = {name: e for name, (_, _, e) in runs.items()}
    falls, held = evals["falls"], evals["held"]
    assert (
        falls["eval_rewards/chosen"] < 0
        and falls["eval_rewards/margins"] > 0.05
        and falls["eval_rewards/accuracies"] > 0.75
    )
    assert held["eval_rewards/chosen"] > falls["eval_rewards/chosen"] and held["eval_rewards/margins"] > 0.05
    assert runs["slow"][1][-1]["loss"] > 0.68
    assert runs["few"][1][-1]["rewards/accuracies"] > 0.98 > 0.93 > evals["few"]["eval_rewards/accuracies"]
    assert evals["priced"]["eval_length_bias"] < evals["plain"]["eval_length_bias"]
    assert abs(evals["parts"]["eval_loss"] - evals["plain"]["eval_loss"]) < 2e-3
