"""Answers to prompts with images: extras.chat, its rows for extras.judge, and --generate_during_eval."""

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics
from test_vision_training import make_pictures, make_row
from vision_tiny import make_model_directory, theirs_forward

import data
import dpo
from extras import chat, judge
from extras.decoder.generate import Sampling, complete, end_tokens
from extras.models.opening import load_model
from extras.rows.pictures import decode, features, one_mark_each, open_image, open_tokenizer, preprocess
from extras.rows.prompts import Asked, encode_asked, read_prompts

pytest.importorskip("PIL")
pytest.importorskip("transformers")
FAMILIES = ("llava", "idefics3", "gemma3", "gemma4", "qwen2_5_vl", "qwen3_5")
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with images, rows that name them, and a checkpoint of each family; {family: transformers' model}."""
    folder = tmp_path_factory.mktemp("chat")
    make_pictures(folder)
    rows = [make_row(0, ["0.png"]), make_row(1, []), make_row(2, ["0.png", "2.png"])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    models = {}
    for family in FAMILIES:
        (folder / family).mkdir()
        models[family] = make_model_directory(family, folder / family)
    with torch.no_grad():  # else every answer of this one would begin with the mark of an image
        models["llava"].lm_head.weight[open_tokenizer(folder / "llava").pictures.token_id] = 0
    models["llava"].save_pretrained(folder / "llava")
    return folder, models


def ask(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    status = chat.main([str(word) for word in (*words, "--device", "cpu")])
    said = capsys.readouterr()
    return said.out if status == 0 else f"{status}: {said.err}"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_answer_about_an_image_is_transformers(place, family, monkeypatch, capsys):
    """The template's text, the processor's pixels, and the likeliest token each time."""
    folder, models = place
    said = ask(monkeypatch, capsys, folder / family, "--image", folder / "1.png", "--greedy", "--max_new_tokens", 8)
    tokenizer = open_tokenizer(folder / family)
    image = open_image(str(folder / "1.png"), folder)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text, ids, pictures = encode_asked(tokenizer, Asked(question, (image,)))
    assert text == tokenizer.render(question, add_generation_prompt=True) and QUESTION in text
    written = []
    token = tokenizer.pictures.token_id
    others = {"gemma4": ["<|video|>", "<|audio|>"], "qwen2_5_vl": ["<|video_pad|>"], "qwen3_5": ["<|video_pad|>"]}
    marks = {token, *map(tokenizer.backend.token_to_id, others.get(family, []))}
    for _ in range(8):
        logits = theirs_forward(models[family], family, [ids + written], pictures.pixels, pictures.grids, token)
        written.append(int(logits[0, -1].argmax()))
        if written[-1] in marks:  # a random model's, which theirs would read as one more image, or as sound
            break
    assert len(written) > 2 and said.startswith(chat.printable(tokenizer.decode(written, skip_special_tokens=True)))
    other = ask(monkeypatch, capsys, folder / family, "--image", folder / "2.png", "--greedy", "--max_new_tokens", 8)
    assert other != said
    assert (pictures.pixels.numpy() == preprocess(decode((folder / "1.png").read_bytes()), tokenizer.pictures)).all()


def test_rows_with_images_become_pairs_with_images(place, tmp_path, capsys):
    """Answers lie in another folder, the pairs in a third; both lead to the images, and train."""
    folder, _ = place
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    answers, pairs = tmp_path / "a" / "answers.jsonl", tmp_path / "b" / "pairs.jsonl"
    words = [folder / "llava", "--prompts", folder / "rows.jsonl", "--num_samples", 3, "--max_new_tokens", 5, "--output", answers]
    assert chat.main([*map(str, words), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [len(row.get("images", [])) for row in rows] == [1, 1, 1, 0, 0, 0, 2, 2, 2]
    assert all((answers.parent / name).samefile(folder / name.rpartition("/")[2]) for row in rows for name in row.get("images", []))
    count = "import json, sys\nfor line in sys.stdin: row = json.loads(line); print(len(row['completion'][0]['content']))"
    (tmp_path / "count.py").write_text(count)
    for row in rows:  # cut off by their length, all of them
        row["finished"] = True
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of = lambda: [json.loads(line) for line in pairs.read_text().splitlines()]
    said = judge.main([str(answers), "--command", f"{sys.executable} {tmp_path / 'count.py'}", "--output", str(pairs)])
    assert said == 0, capsys.readouterr().err
    assert [len(row.get("images", [])) for row in rows_of()] == [1, 0, 2]
    c = dpo.DPOConfig(
        model_name_or_path=str(folder / "llava"), dataset_name=str(pairs), output_dir=str(tmp_path / "out"), use_cpu=True,
        cache_dir=str(tmp_path / "cache"), bf16=False, max_steps=1)
    dpo.DPOTrainer(args=c).train()
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_answers_at_an_evaluation_see_the_images(place, tmp_path, file, family):
    """The held-out pairs' prompts, or a file's, answered by the model as it is: at rate 0."""
    folder, _ = place
    more = dict(generate_prompts=str(folder / "rows.jsonl")) if file else {}
    c = dpo.DPOConfig(
        model_name_or_path=str(folder / family), dataset_name=str(folder / "rows.jsonl"), output_dir=str(tmp_path / "out"),
        eval_dataset_name=str(folder / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=False, max_steps=1,
        learning_rate=0.0, eval_strategy="epoch", generate_during_eval=True, **more)
    dpo.DPOTrainer(args=c).train()
    samples = next(row["eval_samples"] for row in read_metrics(tmp_path / "out") if "eval_samples" in row)
    model, tokenizer = load_model(folder / family), open_tokenizer(folder / family)
    expected = []
    for number, names in enumerate([["0.png"], [], ["0.png", "2.png"]]):
        images = tuple(open_image(str(folder / name), folder) for name in names)
        _, ids, pictures = encode_asked(tokenizer, Asked(make_row(number, names)["prompt"], images))
        o = Sampling(seed=c.seed, max_new_tokens=128, stop_ids=end_tokens(model, tokenizer.eos_token_id))
        expected.append(complete(model, [ids], o, first=number, pictures=[pictures])[0])
    assert [row["tokens"] for row in samples] == [len(tokens) for tokens in expected]
    assert [row["completion"] for row in samples] == [tokenizer.decode(t, skip_special_tokens=True) for t in expected]
    marks = [row["prompt"].count("<image>") + row["prompt"].count("<|image_pad|>") for row in samples]
    assert marks == [1, 0, 2]  # one for each image, and not for each feature


def test_a_prompt_is_shown_with_one_mark_for_each_image(place):
    """Also beside each other, and where tiles have marks between the features of one image."""
    folder, _ = place
    images = [open_image(str(folder / name), folder) for name in ("0.png", "1.png")]
    for family in ("llava", "idefics3"):
        processor = open_tokenizer(folder / family).pictures
        counts = [features(image, processor) for image in images]
        token = processor.token_id
        tiles = [token, 5, *[token] * (counts[1] - 1)]  # 5: a mark between two tiles
        assert one_mark_each([1, *[token] * counts[0], *tiles, 7], images, processor) == [1, token, token, 7]


@pytest.mark.parametrize("words, message", [
    (["llava", "--image", "nowhere.png"], "nowhere.png"),
    (["llava", "--image", "0.png", "--prompts", "rows.jsonl", "--output", "out.jsonl"], "--image is not read with --prompts"),
    (["llava", "--image", "0.png", "--raw"], "write <image> once for each"),
    (["text", "--image", "0.png"], "the model reads none")])
def test_images_that_cannot_be_read_are_named(place, tiny, words, message, monkeypatch, capsys):
    folder, _ = place
    monkeypatch.chdir(folder)
    words = [tiny if word == "text" else word for word in words]
    said = ask(monkeypatch, capsys, *words)
    assert said.startswith("2: error:") and message in said


def test_images_in_the_rows_are_written_as_they_are_read(place, tmp_path):
    """Bytes of a parquet file, a data URI, a path from the root: the answers' file leads to the same pixels."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder, _ = place
    held = {"bytes": (folder / "0.png").read_bytes(), "path": None}
    rows = [{"prompt": "Is it <image>?", "images": [held]}, {"prompt": "Is <image> it?", "images": [held]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = [folder / "llava", "--prompts", tmp_path / "rows.parquet", "--max_new_tokens", 2, "--output", tmp_path / "o.jsonl", "--raw"]
    assert chat.main([*map(str, words), "--device", "cpu"]) == 0
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(written) == 2
    for row in written:
        assert open_image(row["images"][0], tmp_path).sha256 == open_image(str(folder / "0.png"), tmp_path).sha256


def test_a_conversation_goes_on_about_its_image(place, monkeypatch, capsys):
    """The image stays with the first question, and /new asks about it again."""
    folder, _ = place
    seen = []
    encode = chat.encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda speaker, asked, system: seen.append(asked) or encode(speaker, asked, system))
    lines = iter(["What is it?", "And now?", "/again", "/new", "Is <image> it?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    words = [folder / "qwen2_5_vl", "--image", folder / "0.png", "--max_new_tokens", 2, "--device", "cpu"]
    assert chat.main([*map(str, words)]) == 0
    contents = [[turn["content"] for turn in asked.prompt if turn["role"] == "user"] for asked in seen]
    first = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert contents == [[first], [first, "And now?"], [first, "And now?"], ["Is <image> it?"]]
    assert all(len(asked.images) == 1 for asked in seen)


def test_a_text_only_model_refuses_rows_with_images(place, tiny, tmp_path, capsys):
    folder, _ = place
    words = [tiny, "--prompts", folder / "rows.jsonl", "--output", tmp_path / "o.jsonl", "--device", "cpu"]
    assert chat.main([*map(str, words)]) == 2
    assert "rows.jsonl:1: the prompt has images, and the model reads none" in capsys.readouterr().err


def turn(text: str) -> dict:
    return {"from": "human", "value": text}


ROWS = {
    "two images": make_row(2, ["0.png", "2.png"]),
    "system": {**make_row(0, ["0.png"]), "system": "Be short."},
    "from and value": {"images": ["0.png"], "prompt": [turn("Is <image> it?")], "chosen": [{"from": "gpt", "value": "Yes."}],
                       "rejected": [{"from": "gpt", "value": "No."}]},
    "conversations": {"conversations": [{"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "Well?"}]}],
                      "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": [{"role": "assistant", "content": "No."}]},
    "implicit": {"image": "0.png", "chosen": [{"role": "user", "content": "It is?"}, {"role": "assistant", "content": "Yes."}],
                 "rejected": [{"role": "user", "content": "It is?"}, {"role": "assistant", "content": "No."}]},
    "text": {"image": "1.png", "prompt": "Look, <image>, it is", "chosen": " red", "rejected": " blue"},
}


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_asked_in_the_tokens_that_it_is_trained_in(place, tmp_path, name, family, monkeypatch):
    """From another folder than the images', which the row's file names by paths from its own."""
    folder, _ = place
    file = folder / f"{name.replace(' ', '_')}.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    monkeypatch.chdir(tmp_path)
    tokenizer = open_tokenizer(folder / family)
    places = [f"{file}:1"]
    (row,) = tokenizer.pictures.open_rows([ROWS[name]], places)
    trained = data.tokenize_pair(row, tokenizer, data.DataOptions())
    (asked,) = read_prompts(str(file))
    encoded = encode_asked(tokenizer, asked)
    assert encoded.ids[: len(trained.prompt_ids)] == trained.prompt_ids.tolist()
    assert len(encoded.ids) - len(trained.prompt_ids) <= 1  # an end that changes when a completion follows
    assert len(encoded.pictures.place) >= 4 * len(asked.images) > 0
    assert "Be short." in encoded.text or name != "system"


@pytest.mark.parametrize("row, message", [
    ({"prompt": "What is <image>?"}, "1 places for images"), ({"prompt": [{"role": "user", "content": "<image>"}]}, "1 places"),
    ({"prompt": "What is it?", "image": "0.png"}, "names no place for its images"), ({"prompt": "<image>", "image": "none.png"}, "none.png")])
def test_rows_whose_images_and_places_differ_are_named(place, tmp_path, row, message, capsys):
    folder, _ = place
    (folder / "odd.jsonl").write_text(json.dumps(row) + "\n")
    words = [folder / "llava", "--prompts", folder / "odd.jsonl", "--output", tmp_path / "o.jsonl", "--device", "cpu"]
    assert chat.main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert message in said and ("odd.jsonl:1" in said or "none.png" in said)


def test_a_text_model_beside_a_processors_files_is_asked_text(place, tiny, tmp_path, monkeypatch, capsys):
    """Their template would want parts; and images are refused, as in training."""
    folder, _ = place
    shutil.copytree(tiny, tmp_path / "text")
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copy(folder / "llava" / name, tmp_path / "text")
    (tmp_path / "text" / "chat_template.jinja").write_text("{% for m in messages %}{{ 'user: ' + m['content'] }}{% endfor %}")
    words = ["--greedy", "--max_new_tokens", 2]
    assert not ask(monkeypatch, capsys, tmp_path / "text", *words).startswith("2:")
    assert "the model reads none" in ask(monkeypatch, capsys, tmp_path / "text", "--image", folder / "0.png", *words)


def test_a_processor_that_is_not_the_models_is_named(place, tmp_path, monkeypatch, capsys):
    folder, _ = place
    shutil.copytree(folder / "llava", tmp_path / "odd")
    file = tmp_path / "odd" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})))
    said = ask(monkeypatch, capsys, tmp_path / "odd", "--image", folder / "0.png")
    assert said.startswith("2: error:") and "the processor that belongs to the model" in said


def test_the_judge_knows_an_image_by_its_file(place, tmp_path, capsys):
    """Answers of one prompt in two folders are of one prompt; those about two images are not."""
    folder, _ = place
    for number, (name, text) in enumerate([("0.png", "a"), ("0.png", "bb"), ("2.png", "ccc")]):
        home = tmp_path / str(number)
        home.mkdir()
        row = {"prompt": "<image>", "image": os.path.relpath(folder / name, home), "completion": text, "finished": True}
        (home / "answers.jsonl").write_text(json.dumps(row) + "\n")
    count = "import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['completion']))"
    (tmp_path / "count.py").write_text(count)
    words = [f"{tmp_path}/*/answers.jsonl", "--command", f"{sys.executable} {tmp_path / 'count.py'}", "--output", tmp_path / "pairs.jsonl"]
    assert judge.main([*map(str, words)]) == 0, capsys.readouterr().err
    (pair,) = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert (pair["chosen"], pair["rejected"]) == ("bb", "a") and (tmp_path / pair["image"]).samefile(folder / "0.png")
