"""The reward-KL frontier of the demo: its measures against plain formulas, its command, what its run says."""

import itertools
import json
import math
import re

import pytest
import torch
from conftest import ROOT

import model as models
from data import Tokenizer
from demo import frontier

DEMO = ROOT / "demo" / "model"


def test_best_of_n_is_the_mean_over_all_subsets():
    scores = torch.tensor([[3.0, -1.0, 2.0, 2.0, 0.5], [0.0, 1.0, 4.0, -2.0, 1.5]], dtype=torch.float64)
    for n in (1, 2, 4):
        best = [max(c) for row in scores.tolist() for c in itertools.combinations(row, n)]
        point = frontier.best_of(n, scores)
        assert math.isclose(point.reward, sum(best) / len(best)) and math.isclose(point.kl, math.log(n) - (n - 1) / n)


def test_the_optimum_solves_the_problem_of_equation_3():
    """Among all reweightings of the answers none has a higher E[r] - beta KL: gradient 0 there, and lower nearby."""
    scores, beta = torch.tensor([[1.0, -2.0, 0.0, 3.0]], dtype=torch.float64), 1.5
    point = frontier.optimum(beta, scores)

    def value(q):
        return float((q * scores[0]).sum() - beta * (q * (q * 4).log()).sum())

    best = point.reward - beta * point.kl
    assert math.isclose(best, value((scores[0] / beta).softmax(-1)))
    torch.manual_seed(0)
    assert all(
        value(torch.softmax(scores[0] / beta + 0.3 * torch.randn(4, dtype=torch.float64), -1)) < best for _ in range(50)
    )


def test_the_kl_of_an_answer_is_that_of_its_steps():
    """Against log-probs token by token; 0 for the reference itself; its expectation is that of log pi - log ref."""
    ref, model = (models.load_model(DEMO, torch.float64) for _ in range(2))
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.04
    prompt, answer = [5, 9, 300], [17, 400, 23]
    expected = 0.0
    for t in range(len(answer)):
        ids = torch.tensor(prompt + answer[:t])
        n = len(ids)
        spans = torch.tensor([[0, n, 0, 0]], dtype=torch.int32)
        with torch.no_grad():
            p, q = (m.logits(ids, torch.arange(n), spans)[-1].log_softmax(-1) for m in (model, ref))
        expected += float((p.exp() * (p - q)).sum())
    assert math.isclose(frontier.answer_kl(model, ref, prompt, answer), expected, rel_tol=1e-9) and expected > 1e-3
    assert frontier.answer_kl(ref, ref, prompt, answer) == 0


def test_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "RUNS", [frontier.RUNS[0], frontier.RUNS[-1]])
    monkeypatch.setattr(frontier, "BASE_ANSWERS", 16)
    assert frontier.main(["--max_steps", "2", "--prompts", "3", "--output", str(tmp_path)]) == 0
    points = json.loads((tmp_path / "frontier.json").read_text())
    assert {p["method"] for p in points} >= {"base", "best of 2", "optimum", "DPO", "SFT on chosen"}
    assert (tmp_path / "frontier.svg").read_text().count("<circle") >= len(points) - len(frontier.OPTIMA)
    tokenizer = Tokenizer.load(DEMO)
    assert frontier.rewards(tokenizer, [tokenizer.encode("The soup was rich and thin and fresh.")]) == [1.0]


# What the committed run says; docs/frontier.md tells it in words


@pytest.fixture
def points():
    return [frontier.Point(**p) for p in json.loads((ROOT / "docs" / "frontier.json").read_text())]


def test_reward_rises_with_kl_and_dpo_dominates_sft(points):
    of = lambda name: [p for p in points if p.method == name]
    dpo, sft = of("DPO"), of("SFT on chosen")
    ends = [max((p for p in dpo if p.beta == beta), key=lambda p: p.step) for beta in sorted({p.beta for p in dpo})]
    assert len(ends) >= 4  # from small beta to large: less KL, less reward
    assert all(a.kl > b.kl and a.reward > b.reward for a, b in itertools.pairwise(ends))
    for point in sft:  # no point of sft lies above what DPO has at no more KL, but for the errors of both
        below = [p for p in dpo if p.kl <= point.kl + 2 * (point.kl_error + p.kl_error)]
        best = max(below, key=lambda p: p.reward)
        assert best.reward + 2 * math.hypot(best.reward_error, point.reward_error) > point.reward, point
    farthest = max(sft, key=lambda p: p.reward)
    assert max(p.reward for p in dpo) > farthest.reward + 5 * farthest.reward_error


def test_no_policy_lies_above_the_optimum(points):
    curve = sorted((p.kl, p.reward) for p in points if p.method in ("optimum", "base"))
    for p in points:
        if p.method in frontier.STYLE and p.kl < curve[-1][0]:
            right = next(i for i, (kl, _) in enumerate(curve) if kl > p.kl)
            (a, low), (b, high) = curve[right - 1], curve[right]
            assert p.reward < low + (high - low) * (p.kl - a) / (b - a) + 3 * p.reward_error, p


def test_picture_and_words_are_of_that_run(points):
    assert (ROOT / "docs" / "frontier.svg").read_text() == frontier.draw(points) + "\n"
    words = (ROOT / "docs" / "frontier.md").read_text()
    rows = set(frontier.table(points).splitlines())
    told = re.findall(r"^\| .*± .*\|$", words, re.M)
    assert len(told) >= 8 and set(told) <= rows
    readme = (ROOT / "README.md").read_text()
    ends = {(p.method, p.beta): p for p in points}  # the last of each run
    for name, key in (("SFT on chosen, three epochs", ("SFT on chosen", 0.1)), ("DPO, beta 5", ("DPO", 5)),
                      ("DPO, beta 1", ("DPO", 1)), ("DPO, beta 0.1", ("DPO", 0.1)),
                      ("best of 4 answers of the base", ("best of 4", 4))):
        assert f"| {name} | {ends[key].kl:.2f} | {ends[key].reward:+.2f} |" in readme, name
