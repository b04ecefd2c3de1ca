"""Data sets that lie here: splits of a directory are those of datasets.load_dataset, and other files than JSON."""

import csv
import json
import pathlib
import sys

import numpy as np
import pytest
from conftest import make_rows, run_dpo

import dpo
from extras.rows import written
from extras.rows.mixture import Mixture
from parts.rows import DataError, on_hub, read_rows
from parts.splits import find_split, has_splits

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: kept/a.jsonl
  - split: held_out
    path: [kept/b.jsonl, "more/*.jsonl"]
- config_name: small
  data_files: kept/a.jsonl
---
# Pairs
"""
LAYOUTS = {  # files: what their only row says is their name
    "files": ["train.jsonl", "test.jsonl"],
    "a clone": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    "folders": ["train/a.json", "train/b.json", "validation/a.json"],
    "names within names": ["pairs_train.jsonl", "pairs_dev.jsonl", "eval.jsonl"],
    "CSV": ["train.csv", "test.csv"],
    "a card": ["kept/a.jsonl", "kept/b.jsonl", "more/c.jsonl", "other.jsonl"],
    "no split named": ["a.jsonl", "b.jsonl"],
}


def lay(folder, names, card=""):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": "?", "chosen": name, "rejected": "no"}
        if name.endswith(".csv"):
            (folder / name).write_text(f'prompt,chosen,rejected\n?,"{name}",no\n')
        else:
            (folder / name).write_text(json.dumps(row) + "\n")
    if card:
        (folder / "README.md").write_text(card)


def said(files) -> list[str]:
    return [row["chosen"] for _, row in read_rows(files)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_of_a_directory_are_those_of_load_dataset(layout, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    folder = tmp_path / "pairs"
    lay(folder, LAYOUTS[layout], CARD if layout == "a card" else "")
    config = {"name": "default"} if layout == "a card" else {}
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **config)
    for split in ("train", "test", "validation", "held_out"):
        if split in theirs:
            assert said(find_split(str(folder), None, split)) == theirs[split]["chosen"], split
        elif layout != "no split named":
            with pytest.raises(ValueError, match=f"no split '{split}'; it has {', '.join(map(repr, sorted(theirs)))}"):
                find_split(str(folder), None, split)


def test_files_that_name_no_split_are_one_set_for_training_and_for_evaluation_alike(tmp_path):
    lay(tmp_path, ["a.jsonl", "b.json", "folder/train.jsonl", "folder/test.jsonl"])
    for spec in (tmp_path, tmp_path / "a.jsonl", tmp_path / "*.jsonl"):
        for split in ("train", "test"):
            assert said(find_split(str(spec), None, split))[0] == "a.jsonl"
        with pytest.raises(ValueError, match="no split 'nosuch'; nothing there names splits, it is all one"):
            find_split(str(spec), None, "nosuch")
    assert said(find_split(str(tmp_path), None, "train")) == ["a.jsonl", "b.json"] and not has_splits(str(tmp_path))
    with pytest.raises(ValueError, match="a config or a revision .en. is for data sets on the hub"):
        find_split(str(tmp_path / "a.jsonl"), "en", "train")


def test_the_configs_of_a_card_are_found_by_name(tmp_path):
    lay(tmp_path, LAYOUTS["a card"], CARD)
    assert said(find_split(str(tmp_path), "small", "train")) == ["kept/a.jsonl"]
    with pytest.raises(ValueError, match="no config 'big'; it has default, small"):
        find_split(str(tmp_path), "big", "train")


def test_copies_in_two_forms_and_lfs_pointers_are_refused(tmp_path):
    lay(tmp_path, ["a.jsonl", "a.csv"])
    with pytest.raises(ValueError, match=r"it is a.csv, a.jsonl \(.csv, .jsonl\); one of"):
        find_split(str(tmp_path), None, "train")
    (tmp_path / "p.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="p.parquet: only git-lfs's pointer to the file; git lfs pull"):
        list(read_rows([tmp_path / "p.parquet"]))


def test_several_data_sets_with_commas_between_them_are_one(tmp_path):
    lay(tmp_path / "one", ["train.jsonl", "test.jsonl"])
    lay(tmp_path, ["two.jsonl", "a,b.jsonl"])
    names = f"{tmp_path}/one, {tmp_path}/two.jsonl"
    assert said(find_split(names, None, "train")) == ["train.jsonl", "two.jsonl"]
    assert said(find_split(str(tmp_path / "a,b.jsonl"), None, "train")) == ["a,b.jsonl"], "a name with a comma in it"
    assert not on_hub(names) and on_hub(f"{names},org/three") and not on_hub(f"{tmp_path}/a,b.jsonl")


# Folders that datasets.save_to_disk wrote


def test_what_save_to_disk_wrote_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    rows = make_rows(5, scores=True)
    train, test = datasets.Dataset.from_list(rows[:3]), datasets.Dataset.from_list(rows[3:])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"), num_shards=2)
    read = lambda name, split: [row for _, row in read_rows(find_split(str(tmp_path / name), None, split))]
    assert read("both", "train") == rows[:3] and read("both", "test") == rows[3:] and has_splits(str(tmp_path / "both"))
    assert read("one", "train") == read("one", "test") == rows[:3] and not has_splits(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="no split 'dev'; it has 'train', 'test'"):
        read("both", "dev")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="no such file, but state.json names it"):
        read("one", "train")


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow"])
def test_without_pyarrow_its_files_are_refused_with_what_to_install(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow: pip install pyarrow, or convert the file to JSONL"):
        list(read_rows([tmp_path / name]))


# CSV


def test_csv_gives_text_numbers_for_scores_and_conversations_from_json(tmp_path):
    turns = [{"role": "user", "content": 'say "hi",\nthen go'}]
    cells = [["prompt", "chosen", "rejected", "chosen_score", "system"], ["12", "a\nb", "ü", "4.5", ""],
             [json.dumps(turns), "c", "d", "x", "s"], ["p", "e", "f"]]
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(cells)
    places, rows = zip(*read_rows([tmp_path / "p.csv"]), strict=True)
    assert rows[0] == {"prompt": "12", "chosen": "a\nb", "rejected": "ü", "chosen_score": 4.5}
    assert rows[1] == {"prompt": turns, "chosen": "c", "rejected": "d", "chosen_score": "x", "system": "s"}
    assert isinstance(rows[2], DataError) and "more or fewer cells than the first line" in str(rows[2])
    assert [place.rpartition(":")[2] for place in places] == ["2", "4", "5"]


@pytest.mark.parametrize("content, message", [
    (b"prompt,chosen,rejected\na,b\xff,c\n", "not UTF-8"),
    (b'prompt,chosen,rejected\na,"b,c\n', "broken CSV"),
    (b"prompt,chosen,rejected\n\"[{'role': 'user', 'content': 'a'}]\",b,c\n", '"prompt" is a conversation that is not JSON'),
])  # fmt: skip
def test_broken_csv_is_named(content, message, tmp_path):
    (tmp_path / "p.csv").write_bytes(content)
    *_, (place, row) = read_rows([tmp_path / "p.csv"])
    assert isinstance(row, DataError) and message in str(row) and place.startswith(f"{tmp_path}/p.csv:")


# Rows from Python


class Opaque:
    pass


def test_rows_of_python_keep_what_is_read_and_lose_what_json_lacks(tmp_path):
    import datetime

    row = {"prompt": "a", "chosen": "b", "rejected": "c", "at": datetime.datetime(2024, 1, 1), "o": Opaque(), 3: {1, 2},
           "chosen_score": np.float32(1.5), "rejected_score": np.int64(1), "emb": np.ones(2), "raw": b"\xff"}
    line = json.loads(written.row_line(0, row))
    assert line == {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 1.5, "rejected_score": 1, "emb": [1, 1],
                    "raw": "data:;base64,/w=="}
    turns = np.array([{"role": "user", "content": "x"}], dtype=object)  # as pandas reads parquet
    assert json.loads(written.row_line(0, {"prompt": turns}))["prompt"] == [{"role": "user", "content": "x"}]
    with pytest.raises(DataError, match="row 7 of the data set cannot be written as JSON .a Opaque is not JSON"):
        written.row_line(7, row | {"chosen": Opaque()})


def test_pictures_of_python_rows_are_the_pictures_that_paths_name(tmp_path, monkeypatch):
    """PIL images, bytes, datasets.Image and paths relative to the working directory: the same pixels."""
    Image = pytest.importorskip("PIL.Image")
    from extras.rows.pictures import decode, find_content

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8), "RGBA")
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.convert("RGB").save(tmp_path / "turned.png", exif=exif)
    monkeypatch.chdir(tmp_path)

    def pixels(reference) -> np.ndarray:
        line = json.loads(written.row_line(0, {"images": [reference]}))
        return np.asarray(decode(find_content(line["images"][0], tmp_path / "cache")[1]))

    for name in ("a.png", "turned.png"):
        content = (tmp_path / name).read_bytes()
        expected = np.asarray(decode(content))
        forms = [name, f"./{name}", str(tmp_path / name), content, {"bytes": content, "path": "lost.png"},
                 {"bytes": None, "path": name}, Image.open(name)]
        for form in forms:
            assert (pixels(form) == expected).all() and pixels(form).shape == expected.shape, form
    part = {"type": "image", "image": "a.png"}
    line = json.loads(written.row_line(0, {"prompt": [{"role": "user", "content": [part]}]}))
    assert line["prompt"][0]["content"][0]["image"] == str(tmp_path / "a.png")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    column = datasets.Dataset.from_dict({"images": [["a.png"]]}).cast_column("images", datasets.List(datasets.Image()))
    for rows in (column, column.cast_column("images", datasets.List(datasets.Image(decode=False)))):
        assert (pixels(rows[0]["images"][0]) == np.asarray(decode((tmp_path / "a.png").read_bytes()))).all()


# Runs


def test_both_splits_of_a_directory_are_used_and_a_loss_that_reads_scores_says_what_it_found(tiny, tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        rows = [row | {"chosen_score": "high"} for row in make_rows(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", tiny, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", "--max_steps", 1,
             "--save_strategy", "no", "--use_cpu", "--dataset_name", tmp_path]
    done = run_dpo(*words, "--eval_strategy", "steps", "--eval_steps", 1)
    assert "6 pairs from 6 rows" in done.stdout and "3 pairs from 3 rows" in done.stdout
    assert "3 pairs from 3 rows" in run_dpo(*words, "--dataset_train_split", "test").stdout
    refused = run_dpo(*words, "--loss_type", "odpo", expect=2).stderr
    assert f"{tmp_path}/train.jsonl:1: \"chosen_score\" is 'high'; a score is a finite number" in refused


# Mixtures


FRACTIONS = [None, (0.7, 0.3), (2, 1), (1, 0), (0.01, 0.99)]
MIXTURES = [[dict(path="json", data_files="a.jsonl", **({} if f is None else {"fraction": f[0]})),
             dict(path="folder", **({} if f is None else {"fraction": f[1]}))] for f in FRACTIONS]
MIXTURES += [
    [dict(path="folder", split="test"), dict(path="folder", split="train[:2]")],
    [dict(path="json", data_files={"train": "a.jsonl", "more": "b.jsonl"}, split="more[-50%:]+train[1:4]")],
    [dict(path="json", data_files=["a.jsonl", "b.jsonl"], split="train[35%:65%]", columns=["chosen", "rejected", "prompt"])],
    [dict(path="json", data_files="a.jsonl"), dict(path="json", data_files="a.jsonl")],
    [dict(path="configs", name="one"), dict(path="configs", name="two", split="train[:1]")],
]


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Data sets in the working directory; their rows' prompts name them."""
    def write(path, count):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(
            {"prompt": f"{path.relative_to(tmp_path)} {i}", "chosen": " yes", "rejected": " no", "extra": i}) + "\n" for i in range(count)))

    for name, count in {"a.jsonl": 11, "b.jsonl": 7, "folder/train.jsonl": 6, "folder/test.jsonl": 3,
                        "configs/x/rows.jsonl": 2, "configs/y/rows.jsonl": 3}.items():
        write(tmp_path / name, count)
    (tmp_path / "configs" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: x/rows.jsonl\n- config_name: two\n  data_files: y/rows.jsonl\n---\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("entries", MIXTURES, ids=str)
def test_a_mixture_has_the_rows_of_trls_in_its_order(sets, tmp_path, entries):
    trl, utils = pytest.importorskip("trl"), pytest.importorskip("trl.scripts.utils")
    pytest.importorskip("datasets").config.HF_DATASETS_CACHE = str(tmp_path / "theirs")
    theirs = utils.get_dataset(trl.DatasetMixtureConfig(datasets=[utils.DatasetConfig(**entry) for entry in entries]))["train"]
    ours = [row for _, row in read_rows(Mixture(entries, None, stops=True).files(tmp_path / "cache"))]
    columns = entries[0].get("columns")
    assert [row["prompt"] for row in ours] == list(theirs["prompt"])
    assert columns is None or all(row.keys() == set(columns) == set(theirs.column_names) for row in ours)


def test_a_mixture_of_a_file_trains_as_its_rows_in_one_file_do(sets, tiny, tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n- {path: a.jsonl, fraction: 0.5}\n- {path: folder, split: test, fraction: 0.25}\n- {path: b.jsonl, fraction: 0.25}\n")
    rows = [line for name, count in (("a.jsonl", 6), ("folder/test.jsonl", 3), ("b.jsonl", 3))
            for line in (tmp_path / name).read_text().splitlines(True)[:count]]
    (tmp_path / "one.jsonl").write_text("".join(rows))
    flags = ["--model_name_or_path", str(tiny), "--cache_dir", "cache", "--use_cpu", "--no_bf16", "--max_steps", "3",
             "--save_strategy", "no", "--learning_rate", "1e-3", "--eval_fraction", "0.2", "--eval_strategy", "epoch"]
    assert dpo.main([*flags, "--config", "mix.yaml", "--output_dir", "mixed"]) == 0
    assert dpo.main([*flags, "--dataset_name", "one.jsonl", "--output_dir", "one"]) == 0
    assert (tmp_path / "mixed" / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    again = ["--config", "mixed/dpo_config.json", "--output_dir", "again"]  # what a run has written runs again
    assert dpo.main(again) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("more, words", [
    (["--dataset_name", "b.jsonl"], "--dataset_name b.jsonl and datasets: give one of them"),
    (["--dataset_train_split", "test"], "each entry of datasets has its own name and split"),
    (["--output_dir", "out"], r"datasets: a.jsonl: columns: no row has nobody"),
])
def test_a_mixture_beside_other_names_of_data_is_refused(sets, tiny, capsys, more, words):
    entries = [{"path": "a.jsonl", "columns": ["prompt", "chosen", "rejected", "nobody"]}, {"path": "b.jsonl"}]
    pathlib.Path("mix.json").write_text(json.dumps({"datasets": entries}))
    flags = ["--model_name_or_path", str(tiny), "--use_cpu", "--output_dir", "out", "--config", "mix.json", "--cache_dir", "cache"]
    assert dpo.main([*flags, *more]) == 2
    assert words in capsys.readouterr().err


def test_a_broken_row_of_a_mixture_is_named_where_it_stands_or_skipped(sets, tmp_path):
    with open("a.jsonl", "a") as file:
        file.write("{broken\n")
    entries = [{"path": "a.jsonl", "columns": ["prompt", "chosen", "rejected"]}]
    with pytest.raises(ValueError, match=r"a\.jsonl:12: broken JSON"):
        Mixture(entries, None, stops=True).files(tmp_path / "cache")
    rows = [row for _, row in read_rows(Mixture(entries, None, stops=False).files(tmp_path / "cache"))]
    assert len(rows) == 12 and isinstance(rows[-1], DataError)


def test_slices_beyond_the_rows_or_without_any_are_refused_by_name(sets, tmp_path):
    for split, words in (("train[:99]", r"split train\[:99\]: \[:99\] of 11 rows"), ("train[:200%]", r"200%\]: 200%: at most 100 %"),
                         ("train[1:2:3]", "expected a name"), ("train[5:5]", r"split train\[5:5\]: none of the 11 rows"),
                         ("train[:2]+train[9:5]", r"split train\[9:5\]: none of")):
        with pytest.raises(ValueError, match=f"datasets: a.jsonl: .*{words}"):
            Mixture([{"path": "a.jsonl", "split": split}], None, stops=True).files(tmp_path / "cache")


def test_a_fraction_of_no_rows_is_refused_by_name(sets, tmp_path):
    pathlib.Path("none.jsonl").write_text("")
    entries = [{"path": "a.jsonl", "fraction": 0.5}, {"path": "none.jsonl", "fraction": 0.5}]
    with pytest.raises(ValueError, match="datasets: none.jsonl: no rows"):
        Mixture(entries, None, stops=True).files(tmp_path / "cache")
    entries[1]["fraction"] = 0
    assert len(Mixture(entries, None, stops=True).files(tmp_path / "cache")) == 1


@pytest.mark.parametrize("entry", [{"path": 3}, {"path": ["a.jsonl", "b.jsonl"]}, {"path": "json", "data_files": []}], ids=str)
def test_entries_that_name_no_files_are_refused(sets, tiny, capsys, entry):
    pathlib.Path("mix.json").write_text(json.dumps({"datasets": [entry]}))
    assert dpo.main(["--model_name_or_path", str(tiny), "--use_cpu", "--output_dir", "out", "--config", "mix.json"]) == 2
    assert "--config mix.json: datasets: " in capsys.readouterr().err


def test_data_sets_on_the_command_line_are_refused_under_their_own_name(tiny, capsys):
    assert dpo.main(["--model_name_or_path", str(tiny), "--output_dir", "out", "--datasets", '[{"path": "a.jsonl"}]']) == 2
    assert "error: --datasets: give " in capsys.readouterr().err
