"""Files as people have them: ten origins train directly, or after the one command that the error names.

Each file has two pairs in its origin's own form, with the columns beside them that such files have; both say the same.
"""

import datetime
import json

import pytest
from conftest import WORDS, read_metrics, write

import data
import dpo
from extras import convert
from parts.forms import HINT
from parts.rows import DataError
from parts.splits import find_split

TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
ASKED = ("why", "why not")
GOOD = ("the cat sees the sun", "the dog likes the moon")
BAD = ("a cat sleeps", "a dog runs")
SAY = lambda role, text: {"role": role, "content": text}
VALUE = lambda sender, text: {"from": sender, "value": text}
LINES = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
FINE = lambda score: {"helpfulness": {"Rating": str(score), "Rationale": "..."}}


def rows(make) -> list[dict]:
    return [make(*texts) for texts in zip(ASKED, GOOD, BAD)]


def text_file(name, make):
    return lambda folder: (folder / name).write_text(LINES(rows(make)))


def parquet_file(name, make):
    def write_file(folder):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        (folder / name).parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows(make)), folder / name)

    return write_file


def csv_file(name, make):
    def write_file(folder):
        import csv

        with open(folder / name, "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows(make)[0])
            writer.writeheader()
            writer.writerows(rows(make))

    return write_file


# Origin: (whether one command comes first, what writes its file or files)
ORIGINS = {
    "TRL, on the hub": (False, parquet_file("data/train-00000-of-00001.parquet", lambda q, a, b: {
        "prompt": [SAY("user", q)], "chosen": [SAY("assistant", a)], "rejected": [SAY("assistant", b)],
        "created": datetime.datetime(2024, 1, 1), "raw": b"\xff", "chosen_rating": float("nan"), "rejected_rating": 2.0})),
    "zephyr's ultrafeedback_binarized": (False, text_file("train_prefs.jsonl", lambda q, a, b: {
        "prompt": q, "prompt_id": "af32", "chosen": [SAY("user", q), SAY("assistant", a)], "rejected": [
            SAY("user", q), SAY("assistant", b)], "messages": [SAY("user", q), SAY("assistant", a)], "score_chosen": 8.5,
        "score_rejected": "n/a"})),
    "OpenAI": (False, text_file("dpo.jsonl", lambda q, a, b: {
        "input": {"messages": [SAY("user", q)], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [SAY("assistant", a)], "non_preferred_output": [SAY("assistant", b)]})),
    "ms-swift": (False, text_file("rlhf.jsonl", lambda q, a, b: {
        "messages": [SAY("user", q), SAY("assistant", a)], "rejected_response": b})),
    "LLaMA-Factory, ShareGPT": (False, lambda folder: write(folder / "dpo_en.json", rows(lambda q, a, b: {
        "conversations": [VALUE("human", q)], "chosen": VALUE("gpt", a), "rejected": VALUE("gpt", b)}))),
    "LLaMA-Factory, Alpaca": (True, lambda folder: write(folder / "dpo.json", rows(lambda q, a, b: {
        "instruction": q.split()[0], "input": " ".join(q.split()[1:]), "chosen": a, "rejected": b}))),
    "torchtune": (True, text_file("tune.jsonl", lambda q, a, b: {
        "chosen_conversations": [SAY("user", q), SAY("assistant", a)],
        "rejected_conversations": [SAY("user", q), SAY("assistant", b)]})),
    "Argilla's distilabel": (True, parquet_file("train.parquet", lambda q, a, b: {
        "system": "", "input": q, "generations": [b, a], "ratings": [1.0, 9.0], "labelling_model": "x"})),
    "raw UltraFeedback": (True, text_file("ultrafeedback.jsonl", lambda q, a, b: {
        "source": "x", "instruction": q, "models": ["m", "n"], "correct_answers": ["None"], "completions": [
            {"model": "m", "response": b, "overall_score": 10.0, "fine-grained_score": 1.5, "annotations": FINE(1)},
            {"model": "n", "response": a, "overall_score": 7.0, "fine-grained_score": 4.5, "annotations": FINE(5)}]})),
    "Nectar": (True, text_file("nectar.jsonl", lambda q, a, b: {
        "prompt": f"\n\nHuman: {q}\n\nAssistant: ", "turns": 1, "good_natured": True, "num_responses": 2, "source": ["x"],
        "answers": [{"answer": b, "model": "m", "rank": 7.0}, {"answer": a, "model": "n", "rank": 1.0}]})),
    "PKU-SafeRLHF": (True, text_file("train.jsonl", lambda q, a, b: {
        "prompt": q, "response_0": b, "response_1": a, "is_response_0_safe": True, "is_response_1_safe": True,
        "better_response_id": 1, "safer_response_id": 1})),
    "NeMo-RL": (True, text_file("nemo.jsonl", lambda q, a, b: {
        "context": [SAY("user", q)], "completions": [
            {"rank": 0, "completion": [SAY("assistant", a)]}, {"rank": 1, "completion": [SAY("assistant", b)]}]})),
    "a spreadsheet": (True, csv_file("prefs.csv", lambda q, a, b: {
        "question": q, "chosen": a, "rejected": b, "when": "2024-01-01", "chosen_score": "n/a"})),
}


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """The tiny model with a chat template."""
    directory = tmp_path_factory.mktemp("chatty")
    for path in tiny.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    write(directory / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    return directory


@pytest.mark.parametrize("origin", ORIGINS)
def test_files_of_others_train_directly_or_after_one_named_command(origin, chatty, tmp_path, monkeypatch, capsys):
    is_converted, write_files = ORIGINS[origin]
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    write_files(source)
    (path,) = find_split(str(source), None, "train")
    named = str(source)
    tokenizer = data.Tokenizer.load(chatty)
    if is_converted:
        with pytest.raises(DataError, match=HINT) as refused:
            data.build_store([path], tokenizer, data.DataOptions(), tmp_path / "cache")
        assert str(refused.value).startswith(f"{path}:"), "the row is named"
        assert convert.main([str(source), "pairs.jsonl"]) == 0
        named = "pairs.jsonl"
    argv = ["--model_name_or_path", str(chatty), "--dataset_name", named, "--output_dir", "out", "--cache_dir", "cache",
            "--max_steps", "1", "--use_cpu", "--bf16", "false", "--save_strategy", "no", "--shuffle_dataset", "false"]
    assert dpo.main(argv) == 0, capsys.readouterr().err
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    store = data.build_store(find_split(named, None, "train"), tokenizer, data.DataOptions(), tmp_path / "cache")
    assert len(store) == 2
    for pair, asked, good, bad in zip(store, ASKED, GOOD, BAD):
        said = [tokenizer.decode(ids).replace("<unk>", "").split() for ids in (
            pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        assert [[w for w in words if w in WORDS] for words in said] == [asked.split(), good.split(), bad.split()]
