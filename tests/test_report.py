"""The report page, its charts, and the scores of pairs: read back, and opened in a real browser where there is one."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT, make_rows

import dpo
from extras import report, score
from extras.watch import chart, picture


def make_run(directory, steps: int = 40, samples: bool = True, **settings):
    """metrics.jsonl and dpo_config.json as a run writes them."""
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "epoch": step / steps,
                "loss": 0.69 - step / 100,
                "rewards/chosen": -step / 50,
                "rewards/rejected": -step / 10,
                "rewards/margins": step / 12.5,
                "rewards/accuracies": 0.5 + step / 100,
                "kl": -step,
                "entropy": 1.0,
                "grad_norm": 3.0,
                "learning_rate": 1e-6 * (steps - step),
            }
        )
    for step in (0, steps):
        lines.append({"step": step, "epoch": 0, "eval_loss": 0.69 - step / 90, "eval_rewards/margins": step / 13,
                      "eval_rewards/accuracies": 0.5, "eval_length_bias": step / 100} | ({} if not samples else {
                          "eval_completions/mean_length": 7.0,
                          "eval_samples": [{"prompt": "<b>why</b>", "completion": f"answer at {step}", "tokens": 3}]}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "dpo_config.json").write_text(json.dumps({"beta": 0.1, "learning_rate": 1e-6} | settings))
    return directory


def numbers_of(svg: str, curve: int = 0) -> list[tuple[float, float]]:
    return [tuple(map(float, p.split(","))) for p in re.findall(r'<polyline points="([^"]+)"', svg)[curve].split()]


# Charts


def test_a_curve_lies_where_its_numbers_are():
    """Back from pixels to numbers through the axis' own ticks."""
    points = [(0, 1.0), (10, 3.0), (20, 2.0)]
    svg = chart.chart("title", [chart.Line("a", points)], "step")
    ElementTree.fromstring(svg)
    labels = {t: float(x) for x, t in re.findall(r'<text x="([\d.]+)" y="236\.0"[^>]*>([^<]+)</text>', svg)}
    heights = {t: float(y) - 4 for y, t in re.findall(r'<text x="50\.0" y="([\d.]+)"[^>]*>([^<]+)</text>', svg)}
    across = (labels["20"] - labels["0"]) / 20
    up = (heights["1"] - heights["3"]) / 2
    got = [((x - labels["0"]) / across, 1 + (heights["1"] - y) / up) for x, y in numbers_of(svg)]
    assert all(abs(a - b) < 0.1 and abs(c - d) < 0.02 for (a, c), (b, d) in zip(got, points))


@pytest.mark.parametrize("low, high", [(0, 1), (-3.7, 1234), (1e-7, 3e-7), (-5, -4.99), (0.69314, 0.69315)])
def test_ticks_are_few_round_and_inside(low, high):
    found = chart.ticks(low, high)
    assert 3 <= len(found) <= 11 and all(low - 1e-12 <= t <= high + 1e-12 for t in found)
    step = found[1] - found[0]
    assert any(abs(step / 10.0 ** math.floor(math.log10(step * 1.0001)) - m) < 1e-3 for m in (1, 2, 5))


def test_missing_and_infinite_values_break_a_curve_and_constants_are_drawn():
    points = [(0, 1.0), (1, math.nan), (2, 1.0), (3, 1.0), (4, math.inf)]
    svg = chart.chart("<t>", [chart.Line("a & b", points)], "step")
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg and svg.count("<polyline") == 2
    ElementTree.fromstring(chart.chart("empty", [], "step"))


def test_a_histogram_counts_every_value_once():
    values = [-2.0, -1.0, 0.5, 0.5, 0.5, 3.0]
    svg = chart.histogram("h", values, "margin", bins=7)
    ElementTree.fromstring(svg)
    assert sum(int(n) for n in re.findall(r": (\d+)</title>", svg)) == len(values)


# The page


def test_the_page_holds_every_curve_and_table_and_nothing_from_elsewhere(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", beta=0.5, loss_type=["ipo"])
    assert report.main([str(one)], lambda _: None) == 0
    page = (one / "report.html").read_text()
    for title, keys, _ in picture.CHARTS:
        assert (f">{title}</text>" in page) == (not keys[0].startswith("logps")), title  # this run has no logps
    assert "answer at 0" in page and "answer at 40" in page and "&lt;b&gt;why" in page and "<b>why" not in page
    assert report.main([str(one), str(two), "--output", str(tmp_path / "both.html")], lambda _: None) == 0
    both = (tmp_path / "both.html").read_text()
    assert (
        'id="run0"' in both
        and 'id="run1"' in both
        and re.search(r'class="differs"><td>beta</td><td>0.1</td><td>0.5', both)
    )
    for text in (page, both):
        assert len(text) < 2_000_000 and "<script" not in text
        assert set(re.findall(r"https?://[^\"' <]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_a_long_run_stays_small_and_keeps_its_means(tmp_path):
    run = picture.read_run(make_run(tmp_path / "long", steps=20_000))
    page = report.page([run])
    assert len(page) < 500_000
    points = picture.points_of(run.train, "loss")
    assert len(points) == picture.MOST and abs(points[0][1] - (0.69 - 25.5 / 100)) < 1e-9  # steps 1 to 50


def test_a_running_run_and_what_is_none(tmp_path, capsys):
    run = make_run(tmp_path / "run", samples=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')  # being written
    (run / "dpo_config.json").unlink()
    assert report.main([str(run)], lambda _: None) == 0
    assert (
        "Not recorded" in (run / "report.html").read_text() and "None: no run had" in (run / "report.html").read_text()
    )
    (tmp_path / "metrics.jsonl").write_text("")
    for directory, message in ((tmp_path / "no", "no metrics.jsonl there"), (tmp_path, "no line of metrics in it yet")):
        assert report.main([str(directory)]) == 2
        assert message in capsys.readouterr().err


def test_pictures_need_matplotlib_and_say_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(run), "--png", str(tmp_path / "png")], lambda _: None) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert report.main([str(run), "--png", str(tmp_path / "png")], lambda _: None) == 0
    assert (tmp_path / "png/loss.png").read_bytes()[:4] == b"\x89PNG"


def browser():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(browser() is None, reason="needs chromium")
def test_the_page_in_a_real_browser(tmp_path):
    """Offline: a picture that is not blank, no word on the console, a run switched off is not drawn."""
    make_run(tmp_path / "one"), make_run(tmp_path / "two", beta=0.5)
    html, shot = tmp_path / "both.html", tmp_path / "shot.png"
    assert report.main([str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(html)], lambda _: None) == 0

    def look(page) -> bytes:
        done = subprocess.run(
            [
                browser(),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--window-size=1200,2400",
                "--enable-logging=stderr",
                "--v=0",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--screenshot={shot}",
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        return shot.read_bytes()

    whole = look(html)
    assert whole[:4] == b"\x89PNG" and len(whole) > 60_000
    html.write_text(html.read_text().replace('id="run1" checked', 'id="run1"'))
    assert look(html) != whole
    html.write_text("<script>console.error('seen?')</script>")
    with pytest.raises(AssertionError, match="CONSOLE"):  # the test would see a word
        look(html)


# Scores


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A LoRA and a whole model, trained on the same pairs; with their last evaluation."""
    directory = tmp_path_factory.mktemp("scored")
    pairs = directory / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(30, seed=3)))
    out = {}
    for kind in ("whole", "lora"):
        c = dpo.DPOConfig(
            model_name_or_path=str(tiny),
            dataset_name=str(pairs),
            eval_dataset_name=str(pairs),
            use_cpu=True,
            output_dir=str(directory / kind),
            cache_dir=str(directory / "cache"),
            save_strategy="no",
            learning_rate=2e-3,
            max_steps=4,
            beta=0.3,
            use_peft=kind == "lora",
            max_length=18,
        )
        out[kind] = dpo.DPOTrainer(args=c).train()
    return directory, pairs, out


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_scores_are_those_of_the_runs_own_evaluation(kind, trained, capsys):
    directory, pairs, metrics = trained
    rows = directory / f"{kind}.jsonl"
    words = [str(directory / kind), str(pairs), "--output", str(rows), "--html", str(directory / "s.html"), "--use_cpu",
             "--cache_dir", str(directory / "cache"), "--worst", "3"]
    assert score.main(words) == 0
    shown, found = capsys.readouterr().out, [json.loads(line) for line in rows.read_text().splitlines()]
    mean = lambda key: sum(row[key] for row in found) / len(found)
    expected = metrics[kind]
    assert math.isclose(mean("margin"), expected["eval_rewards/margins"], rel_tol=1e-5)
    assert math.isclose(mean("chosen_reward"), expected["eval_rewards/chosen"], rel_tol=1e-4, abs_tol=1e-6)
    assert f"accuracy          {expected['eval_rewards/accuracies']:.3f} of 30" in shown
    assert f"{expected['eval_length_bias']:+.3f} (correlation" in shown
    assert found[4]["where"].endswith("pairs.jsonl:5")
    wrong = sorted((row["margin"], row["where"]) for row in found if row["margin"] < 0)[:3]
    assert re.findall(r"^(-[\d.]+)  (\S+)$", shown, re.M) == [(f"{m:+.4f}", where) for m, where in wrong] and wrong
    assert sum(int(n) for n in re.findall(r"^ +[+-][\d.]+  [█ ]+ (\d+)$", shown, re.M)) == 30
    ElementTree.fromstring(re.search(r"<svg.*</svg>", (directory / "s.html").read_text(), re.S)[0])


def test_rewards_scale_with_beta_and_a_reference_can_be_named(trained, tiny, tmp_path, capsys):
    directory, pairs, _ = trained
    common = [str(pairs), "--use_cpu", "--cache_dir", str(directory / "cache"), "--output"]
    assert score.main([str(directory / "whole"), *common, str(tmp_path / "a")]) == 0
    assert (
        score.main([str(directory / "whole"), *common, str(tmp_path / "b"), "--beta", "0.6", "--ref", str(tiny)]) == 0
    )
    a, b = ([json.loads(line)["margin"] for line in (tmp_path / n).read_text().splitlines()] for n in "ab")
    assert torch.allclose(2 * torch.tensor(a), torch.tensor(b), rtol=1e-6)
    capsys.readouterr()
    assert score.main([str(tiny), *common, str(tmp_path / "c")]) == 2  # no run, no adapter
    assert "give --ref" in capsys.readouterr().err
    assert score.main([str(directory / "whole"), "nowhere.jsonl", "--use_cpu"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_one_picture_for_a_readme(tmp_path):
    make_run(tmp_path / "run")
    said = []
    assert report.main([str(tmp_path / "run"), "--svg", str(tmp_path / "p.svg")], said.append) == 0
    drawn = (tmp_path / "p.svg").read_text()
    assert str(tmp_path / "p.svg") in map(str, said)
    demo = (ROOT / "docs" / "demo.svg").read_text()
    for heading in ("Loss", "Rewards of chosen and rejected", "Margin", "Accuracy"):
        assert f">{heading}</text>" in drawn and f">{heading}</text>" in demo
