"""Rows in the forms of others become prompt, chosen, rejected; real files where they lie."""

import gzip
import json
import lzma

import pytest

import data
from data import DataError, DataOptions, Tokenizer
from extras import convert
from extras.convert import main
from parts.rows import read_rows

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
SYSTEM = {"role": "system", "content": "Be brief."}
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SCORES = {"chosen_score": 5, "rejected_score": 2}
ANSWERS = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
RECORD = {"id": "1", "fields": {"prompt": "2+2?", "response-1": "5", "response-2": "4"}}
VOTE = lambda *values: {"responses": {"better": [{"value": value, "user_id": "u"} for value in values]}}

FORMS = {
    "LLaMA-Factory, from/value": ({"conversations": [{"from": "human", "value": "2+2?"}], **ANSWERS}, PAIR),
    "LLaMA-Factory, messages": ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, PAIR),
    "LLaMA-Factory, Alpaca": ({"instruction": "Add.", "input": "2+2?", "output": "", "chosen": "4", "rejected": "5",
                               "system": "Be brief.", "history": [["Hi", "Hello"]]},
                              PAIR | {"prompt": [SYSTEM, *HI, {"role": "user", "content": "Add.\n2+2?"}]}),
    "LLaMA-Factory, images": ({"conversations": [{"from": "human", "value": "<image>?"}], **ANSWERS, "images": ["a.jpg"]},
                              PAIR | {"prompt": [{"role": "user", "content": "<image>?"}], "images": ["a.jpg"]}),
    "HH": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: 5"}, PAIR | {"prompt": [*HI, USER]}),
    "Argilla, binarized": ({"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5",
                            "chosen_avg_rating": 5, "rejected_avg_rating": 2, "source": "x"}, PAIR | SCORES),
    "Argilla, cleaned": ({"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD],
                          "chosen-rating": 5, "rejected-rating": 2}, PAIR | SCORES),
    "Argilla, Orca pairs": ({"system": "Be brief.", "input": "2+2?", "chosen": "4", "rejected": "5",
                             "generations": ["4", "5"], "rating": [2.0, 5.0], "order": ["x", "y"]},
                            PAIR | {"prompt": [SYSTEM, USER]} | SCORES),
    "Argilla, generations": ({"instruction": "2+2?", "generations": ["3", "4", "5"], "ratings": [3, 5, 2]},
                             PAIR | SCORES),
    "Argilla, record": (RECORD | VOTE("response-2", "response-1", "response-2"), PAIR),
    "Argilla, suggestion": (RECORD | {"suggestions": {"better": {"value": "response-2", "agent": "a"}}}, PAIR),
    "LLaMA-Factory, whole conversations": (
        {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD], "system": "Be brief."},
        PAIR | {"prompt": [SYSTEM, USER]}),
    "torchtune": ({"chosen_conversations": [USER, GOOD], "rejected_conversations": [USER, BAD]}, PAIR),
    "OpenAI": ({"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [GOOD],
                "non_preferred_output": [BAD]}, PAIR),
    "ms-swift": ({"messages": [SYSTEM, USER, GOOD], "rejected_response": "5"}, PAIR | {"prompt": [SYSTEM, USER]}),
    "ms-swift, messages": ({"messages": [*HI, USER, GOOD], "rejected_messages": [*HI, USER, BAD], "images": ["a.jpg"]},
                           PAIR | {"prompt": [*HI, USER], "images": ["a.jpg"]}),
    "ms-swift, query": ({"system": "Be brief.", "query": "2+2?", "response": "4", "rejected_response": "5",
                         "history": [["Hi", "Hello"]]}, PAIR | {"prompt": [SYSTEM, *HI, USER]}),
    "PKU-SafeRLHF": ({"prompt": "2+2?", "response_0": "5", "response_1": "4", "is_response_0_safe": True,
                      "better_response_id": 1, "safer_response_id": 0}, PAIR),
    "UltraFeedback": ({"instruction": "2+2?", "source": "x", "models": ["a", "b"], "completions": [
        {"model": "a", "response": "3", "overall_score": 9.0, "fine-grained_score": 3.5},
        {"model": "b", "response": "5", "overall_score": 10.0, "fine-grained_score": 2},
        {"model": "c", "response": "4", "overall_score": 1.0, "fine-grained_score": 5}]}, PAIR | SCORES),
    "Nectar": ({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: ", "num_responses": 3, "answers": [
        {"answer": "3", "model": "a", "rank": 2.0}, {"answer": "4", "model": "b", "rank": 1.0},
        {"answer": "5", "model": "c", "rank": 3.0}]}, PAIR | {"prompt": [*HI, USER]}),
    "NeMo-Aligner": ({"prompt": "2+2?", "chosen_response": "4", "rejected_response": "5", "chosen_reward": 5,
                      "rejected_reward": "2"}, PAIR | SCORES),
    "NeMo-RL": ({"context": [SYSTEM, USER], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
                PAIR | {"prompt": [SYSTEM, USER]}),
    "HelpSteer3": ({"context": [USER], "response1": "4", "response2": "5", "overall_preference": -2}, PAIR),
    "HelpSteer2": ({"prompt": "2+2?", "response_1": "5", "response_2": "4", "preference_strength": 2}, PAIR),
    "SHP": ({"history": "2+2?", "human_ref_A": "5", "human_ref_B": "4", "labels": 0, "score_A": 3, "score_B": 9}, PAIR),
    "Arena": ({"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"}, PAIR),
    "candidates": ({"question": "2+2?", "candidates": ["5", "3", "4"], "scores": [2, 3, 5]}, PAIR | SCORES),
    "context": ({"context": "2+2?", "chosen": "4", "rejected": "5"}, PAIR),
    "messages that end with the chosen answer": ({"messages": [USER, GOOD], "chosen": "4", "rejected": "5"}, PAIR),
    "system beside whole conversations": ({"system": "Be brief.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
                                          PAIR | {"prompt": [SYSTEM, USER]}),
    "an image": ({"instruction": "2+2?", "chosen": "4", "rejected": "5", "image": "a.jpg"}, PAIR | {"image": "a.jpg"}),
    "ours": (PAIR | SCORES, PAIR | SCORES),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form(form):
    row, expected = FORMS[form]
    assert convert.convert(row) == expected


BAD_ROWS = [
    ({"text": "x", "id": 1}, r"its keys \(text, id\) are of no form that is known: see python -m extras.convert --help"),
    ({"prompt": "x", "completion": "y", "label": True}, r"\(prompt, completion, label\) are an answer with a label of its own"),
    ({"prompt": "x", "candidates": ["4", "5"]}, '"candidates" has 2 answers without scores or ranks: nothing says which'),
    ({"prompt": "x", "replies": ["4", "5"]}, 'if "replies" are answers, nothing says which is better'),
    ({"prompt": "x", "response_0": "a", "response_1": "b", "better_response_id": -1}, 'neither is better: "better_response_id" is -1'),
    ({"context": [USER], "response1": "4", "response2": "5", "overall_preference": 0}, "neither is better"),
    ({"question": "2+2?", "context": "Sums.", "chosen": "4", "rejected": "5"}, "it has question and context; write them as one"),
    ({"messages": [USER, BAD], "chosen": "4", "rejected": "5"}, "the prompt ends with an answer of the assistant"),
    ({"instruction": "2+2?", "generations": ["4", "5"], "ratings": [3, 3]}, "its 2 rated generations do not differ"),
    (RECORD | VOTE("response-1", "response-2"), "its annotators name no better answer"),
    (RECORD, "its annotators name no better answer .no votes"),
    ({"instruction": "2+2?", "chosen": "4", "rejected": "4"}, "chosen and rejected are the same"),
    ({"instruction": "2+2?", "chosen": "4", "rejected": ""}, '"rejected" is missing or empty'),
    ({"chosen": "4", "rejected": "5"}, "no prompt, instruction, question or input"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "do not part at an answer"),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: d"}, "does not end with an answer"),
    ({"conversations": [{"from": "martian", "value": "x"}], "chosen": GOOD, "rejected": BAD}, "is from 'martian'"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_what_says_nothing_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        convert.convert(row)


def test_the_command_stops_at_a_bad_row_or_skips_and_lists_it(tmp_path, capsys):
    rows = [row for row, _ in FORMS.values()]
    lines = [json.dumps(row) for row in [rows[0], {"text": "x"}, *rows[1:]]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl.gz"
    assert main([str(tmp_path / "in.jsonl"), str(out)]) == 2 and not out.exists()
    assert "in.jsonl:2: its keys (text) are of no form" in capsys.readouterr().err
    assert main([str(tmp_path / "in.jsonl"), str(out), "--on_bad_row", "skip"]) == 0
    assert f"{len(rows)} rows, 1 skipped\nskipped" in capsys.readouterr().out
    assert [json.loads(line) for line in gzip.open(out, "rt")] == [expected for _, expected in FORMS.values()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.gz"]
    assert main([str(out), str(out)]) == 2 and "would be overwritten" in capsys.readouterr().err


def test_of_several_answers_every_pair_with_a_better_one(tmp_path):
    row = {"prompt": "2+2?", "responses": ["5", "4", "6", "3"], "scores": [1, 3, 1, 2]}
    pairs = [(one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in convert.convert_all(row, every=True)]
    assert pairs == [("4", "3"), ("4", "5"), ("4", "6"), ("3", "5"), ("3", "6")]
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    assert main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--every_pair"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5


def test_the_trainer_reads_each_form_or_names_the_command(tmp_path):
    """And none is read without its prompt."""
    from parts.forms import HINT, renamed
    from parts.turns import split_row

    read = []
    for name, (row, _) in FORMS.items():
        try:
            prompt, _, _ = split_row(renamed(row), need_rejected=True)
        except DataError as error:
            assert HINT in str(error), name
        else:
            assert prompt, name
            read.append(name)
    assert {"OpenAI", "ms-swift", "ms-swift, messages", "LLaMA-Factory, from/value", "HH", "ours"} <= set(read)


def test_a_split_of_a_directory_is_converted_not_all_of_it(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"query": split, "chosen": "4", "rejected": "5"}))
    for split in ("train", "test"):
        assert main([str(tmp_path), str(tmp_path / "out"), "--split", split]) == 0
        (row,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
        assert row["prompt"] == [{"role": "user", "content": split}]
    assert main([str(tmp_path), str(tmp_path / "out"), "--split", "dev"]) == 2
    assert "no split 'dev'; it has 'test', 'train'" in capsys.readouterr().err


def test_pictures_go_along_as_bytes_and_as_paths_that_lead_to_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = b"\x89PNG"
    row = {"question": "?", "chosen": "4", "rejected": "5", "image": {"bytes": content, "path": "a.png"}}
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in" / "p.parquet")
    (converted_row,) = converted(tmp_path / "in" / "p.parquet", tmp_path / "elsewhere")
    from extras.rows.pictures import find_content

    assert find_content(converted_row["image"], tmp_path) == ("", content)
    (tmp_path / "in" / "b.png").write_bytes(content)
    rows = [row | {"image": "b.png"}, row | {"image": None, "images": [{"path": "b.png", "bytes": None}, "https://x/y.png"]}]
    (tmp_path / "in" / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = converted(tmp_path / "in" / "p.jsonl", tmp_path / "elsewhere")
    for reference in (one["image"], two["images"][0]):
        assert find_content(reference, tmp_path / "elsewhere")[1] == content
    assert two["images"][1] == "https://x/y.png"
    (beside, _) = converted(tmp_path / "in" / "p.jsonl", tmp_path / "in")
    assert beside["image"] == "b.png"


def test_plain_text_is_hhs_form():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    text = convert.plain(convert.convert(row))
    assert text == {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " No"}


# Real files


def converted(path, tmp_path, *options) -> list[dict]:
    out = tmp_path / "out.jsonl"
    assert main([str(path), str(out), *options]) == 0
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_llamafactorys_file_keeps_its_token_ids(shared, tmp_path):
    """The reader of the trainer takes the file as it is; what is converted must give the same pairs."""
    for file in (shared / "tokenizers" / "smollm2").glob("*.xz"):
        (tmp_path / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
    tokenizer = Tokenizer.load(tmp_path)
    path = shared / "prefs" / "llamafactory-dpo_en_demo.json.gz"
    rows, originals = converted(path, tmp_path), [row for _, row in read_rows([path])]
    assert len(rows) == len(originals) == 300
    for row, original in list(zip(rows, originals))[:60]:
        a, b = (data.tokenize_pair(one, tokenizer, DataOptions(max_length=None)) for one in (row, original))
        assert all((x == y).all() for x, y in zip(a[:3], b[:3]))


def test_hhs_file_says_the_same_in_turns(shared, tmp_path, capsys):
    path = shared / "prefs" / "hh_harmless_base_test.jsonl.gz"
    rows = converted(path, tmp_path, "--on_bad_row", "skip", "--plain")
    said = capsys.readouterr().out
    originals = {(row["chosen"], row["rejected"]) for _, row in read_rows([path])}
    squeeze = lambda text: "".join(text.split())
    wanted = {tuple(map(squeeze, pair)) for pair in originals}
    assert len(rows) == 2308 and "2,308 rows, 4 skipped" in said  # an empty last turn
    assert all((squeeze(r["prompt"] + r["chosen"]), squeeze(r["prompt"] + r["rejected"])) in wanted for r in rows)


def test_ultrafeedbacks_file_and_pictures_pass(shared, tmp_path):
    rows = converted(shared / "prefs" / "ultrafeedback-eval_clean.jsonl.gz", tmp_path, "--on_bad_row", "skip")
    assert len(rows) >= 198 and all(r["prompt"][0]["role"] == "user" for r in rows)
    pictures = converted(shared / "prefs" / "image_pref" / "pref.jsonl", tmp_path)
    originals = [json.loads(line) for line in (shared / "prefs" / "image_pref" / "pref.jsonl").read_text().splitlines()]
    assert [{k: row[k] for k in PAIR} for row in pictures] == [{k: row[k] for k in PAIR} for row in originals]
    for row, original in zip(pictures, originals):
        named = [shared / "prefs" / "image_pref" / name for name in original["images"]]
        assert [(tmp_path / name).resolve() for name in row["images"]] == [path.resolve() for path in named]
