"""The demo: what it is made of, that its rule holds, and that `python dpo.py` alone does what the README promises."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics

import model as models
from data import DataOptions, Tokenizer, collate, tokenize_pair
from demo import make
from extras.watch import demo as show

DEMO = ROOT / "demo"


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def base() -> tuple[models.Decoder, Tokenizer]:
    return models.load_model(DEMO / "model"), Tokenizer.load(DEMO / "model")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """The README's first command, with nothing named but where its files go: (output directory, what it printed)."""
    out = tmp_path_factory.mktemp("demo")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it, and threads that wait for one another spin
    done = subprocess.run([sys.executable, ROOT / "dpo.py", "--output_dir", out / "run", "--cache_dir", out / "cache"],
                          cwd=out, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return out / "run", done.stdout


def test_demo_is_under_3_megabytes():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {"model.safetensors", "train.jsonl", "eval.jsonl", "config.toml"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_score_is_words_of_praise_minus_words_of_blame():
    assert show.net_praise(" The broth was rich and clear, but the waiter was rude. Go there hungry.") == 1
    assert show.net_praise(" The pages were clumsy. The ENDING was flat, and the jokes were stale.") == -3
    assert show.net_praise(" It stays by my bed.") == 0
    assert not show.PRAISE & show.BLAME


def test_openings_reasons_and_closings_have_no_word_that_scores():
    for kind in make.KINDS:
        texts = [kind.opening, *sum(kind.reasons, []), *sum(kind.closings, [])]
        texts += [*make.WHEN, *make.WHO, *make.PLACES, *(subject for subject, _ in kind.subjects)]
        assert [text for text in texts if show.net_praise(text)] == []


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_chosen_scores_above_rejected_in_every_pair(name):
    rows = read_rows(name)
    assert len(rows) >= 150
    assert [row for row in rows if show.net_praise(row["chosen"]) <= show.net_praise(row["rejected"])] == []


def test_no_prompt_is_trained_on_and_evaluated_on():
    train, held_out = ([row["prompt"] for row in read_rows(name)] for name in ("train.jsonl", "eval.jsonl"))
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train) and len(set(held_out)) == len(held_out)


def test_texts_in_one_stream_predict_what_each_predicts_alone(base):
    model, tokenizer = base
    texts = [tokenizer.encode(row["prompt"] + row["chosen"]) for row in read_rows("eval.jsonl")[:5]]
    together = show.next_logits(model, texts)
    alone = torch.cat([show.next_logits(model, [ids]) for ids in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_answers_follow_the_seed_and_stop_at_the_end(base):
    model, tokenizer = base
    prompts = [row["prompt"] for row in read_rows("eval.jsonl")[:8]]
    first, again, other = (show.answers(model, tokenizer, prompts, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert all(text.startswith(" ") and make.END not in text for text in first)
    assert sum(text.endswith(".") for text in first) >= 6


def test_make_pairs_puts_the_higher_score_first_and_leaves_ties_out(base):
    asked = [row["prompt"] for row in read_rows("eval.jsonl")[:8]]
    rows = make.make_pairs(asked, *base)
    both = show.answers(*base, asked + asked, make.SEED)
    scores = {prompt: sorted((show.net_praise(a), show.net_praise(b))) for prompt, a, b in zip(asked, both, both[8:])}
    made = {row["prompt"]: [show.net_praise(row["rejected"]), show.net_praise(row["chosen"])] for row in rows}
    assert made == {prompt: pair for prompt, pair in scores.items() if pair[0] < pair[1]}
    assert 2 < len(made) <= 8


@torch.no_grad()
def test_pairs_are_as_likely_to_the_base_as_its_own_samples(base):
    """Of what a model samples itself, the mean surprise is its mean entropy: the pairs are on-policy."""
    model, tokenizer = base
    pairs = [tokenize_pair(row, tokenizer, DataOptions()) for row in read_rows("eval.jsonl")]
    batch = collate(pairs)
    out = model(batch)
    assert len(out.logps) > 5000
    assert abs(float(-out.logps.mean() / out.entropy.mean()) - 1) < 0.1


def test_make_writes_the_same_files_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "REVIEWS", 160)
    monkeypatch.setattr(make, "PROMPTS", {"eval.jsonl": 2, "train.jsonl": 2})
    made = []
    for name in ("one", "two"):
        directory = tmp_path / name
        monkeypatch.setattr(make, "DEMO", directory)
        assert make.main() == 0
        made.append({str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()})
    assert made[0] == made[1]
    assert {"eval.jsonl", "train.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
            "model/tokenizer_config.json"} == set(made[0])


def test_demo_starts_at_log2_and_ends_with_held_out_accuracy_above_nine_tenths(demo_run):
    metrics = read_metrics(demo_run[0])
    first = next(m for m in metrics if "loss" in m)
    assert first["step"] == 1 and abs(first["loss"] - math.log(2)) < 1e-3
    assert metrics[-1]["eval_rewards/accuracies"] >= 0.9
    assert metrics[-1]["eval_loss"] < 0.5


def test_demo_prints_the_same_prompts_answered_before_and_after_and_a_higher_score(demo_run):
    printed = demo_run[1]
    for row in read_rows("eval.jsonl")[: show.SHOWN]:
        assert re.search(re.escape(row["prompt"]) + r"\n  before [+-]\d+ .+\n  after  [+-]\d+ .+\n", printed), printed
    before, after = map(float, re.search(r"before ([+-][\d.]+), after ([+-][\d.]+)", printed).groups())
    assert after > before + 2


def test_demo_model_before_and_after_training_loads_in_transformers(base, demo_run):
    transformers = pytest.importorskip("transformers")
    ids = base[1].encode("On Sunday, we had the pea soup at the Old Mill. The broth was")
    for directory in (DEMO / "model", demo_run[0]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert tokenizer("On Sunday, we had the pea soup at the Old Mill. The broth was").input_ids == ids
        assert tokenizer.eos_token == make.END
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ours = show.next_logits(models.load_model(directory), [ids])
        with torch.no_grad():
            torch.testing.assert_close(ours[0], theirs(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=1e-4)
