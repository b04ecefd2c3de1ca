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
    "ours": (PAIR | SCORES, PAIR | SCORES),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form(form):
    row, expected = FORMS[form]
    assert convert.convert(row) == expected


BAD_ROWS = [
    ({"text": "x", "label": 1}, r"its keys \(text, label\) are of no form that is known: LLaMA-Factory"),
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
    assert pictures == [{k: row[k] for k in ("prompt", "chosen", "rejected", "images")} for row in originals]
