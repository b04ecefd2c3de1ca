"""docs/extend.md: each of its changes applies to the repository and does what the page says."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make_rows, read_metrics

CHANGES = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extend.md").read_text("utf-8"), re.S)
LOSS, FAMILY, FORMAT = CHANGES


@pytest.fixture
def changed(tmp_path):
    """changed(diff): a copy of the program with the change applied."""
    def apply(diff: str):
        place = tmp_path / "changed"
        place.mkdir()
        for name in ("losses.py", "data.py", "model.py", "dpo.py"):
            shutil.copy(ROOT / name, place)
        for name in ("extras", "parts"):
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        done = subprocess.run(["git", "apply", "-"], input=diff, cwd=place, capture_output=True, text=True,
                              env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return place

    return apply


def train(place, *words, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, str(place / "dpo.py"), "--use_cpu", "--max_steps", "1", "--output_dir",
                           str(place / "out"), *map(str, words)], cwd=place, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(place)})
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_a_loss(changed, tiny, pairs_file):
    place = changed(LOSS)
    named = ["--model_name_or_path", tiny, "--dataset_name", pairs_file]
    train(place, *named, "--loss_type", "squared_hinge", "--hinge_margin", 2)
    assert read_metrics(place / "out")[0]["loss"] == pytest.approx(4, abs=1e-4)
    train(place, *named, "--loss_type", "sigmoid", "squared_hinge", "--loss_weights", 1, 0.5)
    assert read_metrics(place / "out")[0]["loss"] == pytest.approx(0.693147 + 0.5, abs=1e-4)
    refused = train(place, *named, "--loss_type", "sigmoid", "--hinge_margin", 2, expect=2)
    assert "hinge_margin" in refused.stderr


def test_a_family(changed, tiny, pairs_file, tmp_path):
    """StableLM: the first loss is ln 2, and transformers loads what was trained."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, use_qkv_bias=True)
    transformers.StableLmForCausalLM(transformers.StableLmConfig(**size)).save_pretrained(tmp_path / "stablelm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / "stablelm")
    place = changed(FAMILY)
    named = ["--model_name_or_path", tmp_path / "stablelm", "--dataset_name", pairs_file]
    train(place, *named)
    assert read_metrics(place / "out")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    transformers.AutoModelForCausalLM.from_pretrained(place / "out")


def test_a_data_format(changed, tiny, tmp_path):
    """The same rows as tab-separated values and as JSON Lines give the same metrics; an odd row is named by its line."""
    rows = make_rows(9)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "rows.tsv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["prompt", "chosen", "rejected"], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    place = changed(FORMAT)
    found = []
    for name in ("rows.jsonl", "rows.tsv"):
        train(place, "--model_name_or_path", tiny, "--dataset_name", tmp_path / name)
        found.append(read_metrics(place / "out"))
    assert {k: v for k, v in found[0][0].items() if "time" not in k} == {k: v for k, v in found[1][0].items() if "time" not in k}
    (tmp_path / "odd.tsv").write_text("prompt\tchosen\trejected\nthe\t cat\t dog\nred\t blue\n")
    refused = train(place, "--model_name_or_path", tiny, "--dataset_name", tmp_path / "odd.tsv", expect=2)
    assert "odd.tsv:3: a row of another width" in refused.stderr
