"""The picture demo: made by its script, trained through the command line."""

import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics, run_dpo

pytest.importorskip("PIL")


def make(folder, *flags):
    done = subprocess.run([sys.executable, "-m", "demo.pictures", str(folder), *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_picture_demo_is_made_and_trains(tmp_path):
    folder = make(tmp_path / "shapes", "--pairs", "64", "--epochs", "1")
    run_dpo("--config", folder / "config.toml", "--cache_dir", tmp_path / "cache", "--logging_steps", 1)
    metrics = read_metrics(folder / "trained")
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "eval_rewards/accuracies" in metrics[-1]


@pytest.mark.slow
def test_the_picture_demo_reaches_nine_in_ten_on_pictures_it_has_not_seen(tmp_path):
    folder = make(tmp_path / "shapes")
    run_dpo("--config", folder / "config.toml", "--cache_dir", tmp_path / "cache", timeout=900)
    assert read_metrics(folder / "trained")[-1]["eval_rewards/accuracies"] >= 0.9


def test_a_trained_demo_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path / "shapes", "--pairs", "1")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model")
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    from PIL import Image

    inputs = processor(text="<image> what is this ?", images=Image.open(next((folder / "png").glob("*.png"))), return_tensors="pt")
    assert model(**inputs).logits.shape[1] == 16 + 4  # features, words
