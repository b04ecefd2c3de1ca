"""The reference's log-probs of pairs with pictures, on disk: found again where pixels and model are the same, and only there."""

import json
import shutil

import pytest
from test_vision_training import make_pictures, make_row
from vision_tiny import make_model_directory

import dpo
from parts.reference import PrecomputedReference

pytest.importorskip("PIL")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Folder with rows, the pictures they name, and a model."""
    folder = tmp_path_factory.mktemp("origin") / "here"
    (folder / "model").mkdir(parents=True)
    make_pictures(folder)
    rows = [make_row(0, ["0.png"]), make_row(1, ["1.png"]), make_row(2, ["0.png", "2.png"])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    make_model_directory("llava", folder / "model")
    return folder


def moved(folder):
    """Nothing else changes."""


def redrawn(folder):
    """Another picture of the same size under the same name: the same tokens."""
    from PIL import Image, ImageOps

    ImageOps.mirror(Image.open(folder / "1.png")).save(folder / "1.png")


def exchanged(folder):
    """The pictures of two rows, of one size each in the stream, in each other's place."""
    (folder / "0.png").rename(folder / "x.png")
    (folder / "1.png").rename(folder / "0.png")
    (folder / "x.png").rename(folder / "1.png")


def brightened(folder):
    """Other pixels reach the tower from the same files."""
    path = folder / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(image_mean=[0.3, 0.3, 0.3])))


@pytest.mark.parametrize("change, found", [(moved, True), (redrawn, False), (exchanged, False), (brightened, False)])
def test_the_cache_is_that_of_these_pixels(change, found, origin, tmp_path, monkeypatch):
    passes, keep = [], PrecomputedReference.run
    monkeypatch.setattr(PrecomputedReference, "run", lambda self, *args: passes.append(1) or keep(self, *args))
    shutil.copytree(origin, tmp_path / "there")
    change(tmp_path / "there")
    counts = []
    for folder in (origin, tmp_path / "there"):
        settings = dict(model_name_or_path=str(folder / "model"), dataset_name=str(folder / "rows.jsonl"), use_cpu=True,
                        output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), bf16=False)
        dpo.DPOTrainer(args=dpo.DPOConfig(**settings)).reference.prepare()
        counts.append(len(passes))
    assert counts == ([1, 1] if found else [1, 2])
