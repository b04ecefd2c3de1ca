"""docs/rounds.md: two rounds on the demo's own answers, and the judges that make pairs of them."""

import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, make_rows

from extras import chat, judge, score

TEXT = (ROOT / "docs" / "rounds.md").read_text("utf-8")
COMMANDS = re.findall(r"^    ((?:python|head) .*)$", TEXT, re.M)
(PROGRAM,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def run(words, folder) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    words = [{"python": sys.executable, "dpo.py": str(ROOT / "dpo.py")}.get(word, word) for word in words]
    words = [word.replace("python judge.py", f"{shlex.quote(sys.executable)} judge.py") for word in words]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout




def test_two_rounds_as_the_page_has_them_raise_the_judges_score(tmp_path):
    """Each command as it stands, in a folder with the demo; a shorter second round on a third of the prompts."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "judge.py").write_text(PROGRAM)
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        words = shlex.split(command, comments=False)
        if words[0] == "head":
            kept = (ROOT / "demo" / "train.jsonl").read_text("utf-8").splitlines(keepends=True)[:64]
            (tmp_path / words[-1]).write_text("".join(kept), "utf-8")
            continue
        said = run(words, tmp_path)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert 20 < len(pairs) <= 64 and all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    assert "pairs of 64 prompts" in said and (tmp_path / "own.jsonl").stat().st_size
    answer = next(words for words in map(shlex.split, COMMANDS) if "extras.chat" in words)
    second = [{"round1": "round2", "answers.jsonl": "again.jsonl"}.get(word, word) for word in answer]
    run(second, tmp_path)
    means = []
    for name in ("answers.jsonl", "again.jsonl"):
        rows = (tmp_path / name).read_bytes()
        done = subprocess.run([sys.executable, "judge.py"], input=rows, cwd=tmp_path, capture_output=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        scores = [float(word) for word in done.stdout.split()]
        means.append(sum(scores) / len(scores))
    assert means[1] > means[0] + 0.3, means


# Judges


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def rows_of(*answers) -> list[dict]:
    return [{"prompt": prompt, "completion": text, "finished": True} for prompt, text in answers]


def command(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


LENGTH = command("import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['completion']))")


def test_the_best_and_the_worst_of_each_prompt_are_a_pair(tmp_path, capsys):
    chat_prompt = [{"role": "user", "content": "q"}]
    said = lambda text: [{"role": "assistant", "content": text}]
    rows = rows_of(("a", " xx"), ("b", " x"), ("a", " xxxx"), ("a", " x"), ("b", " y"), ("a", ""))
    rows += [{"prompt": "a", "completion": " xxxxxxxx", "finished": False}, {"prompt": chat_prompt, "completion": said("x")},
             {"prompt": chat_prompt, "completion": said("x") * 2}]
    out = tmp_path / "pairs.jsonl"
    assert judge.main([write(tmp_path / "answers.jsonl", rows), "--command", LENGTH, "--output", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "a", "chosen": " xxxx", "rejected": " x", "chosen_score": 5.0, "rejected_score": 2.0},
        {"prompt": chat_prompt, "chosen": said("x") * 2, "rejected": said("x"), "chosen_score": 2.0, "rejected_score": 1.0}]
    assert "2 pairs of 3 prompts; 7 answers judged" in capsys.readouterr().out


def test_the_reward_of_an_answer_is_that_of_extras_score(tiny, tmp_path):
    """Three answers of a prompt, scored two by two, and again one against each other."""
    import dpo

    rows = make_rows(6)
    run_dir = tmp_path / "out"
    write(tmp_path / "train.jsonl", rows)
    dpo.DPOTrainer(args=dpo.DPOConfig(
        model_name_or_path=str(tiny), dataset_name=str(tmp_path / "train.jsonl"), output_dir=str(run_dir),
        cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=False, learning_rate=1e-2, max_steps=3, save_strategy="no")).train()
    texts = [" the cat", " red sun today", " dog", " dog", " why"]
    answers = [judge.Answer(f"x:{i}", row) for i, row in enumerate(rows_of(*(("blue moon", text) for text in texts), ("no", " yes")))]
    args = judge.make_parser().parse_args(["x", "--output", "y", "--reward", str(run_dir), "--use_cpu"])
    scores = judge.by_reward(args, answers)
    assert math.isnan(scores[-1]) and sum(map(math.isnan, scores)) == 2  # alone with its prompt; said twice
    pairs = [{"prompt": "blue moon", "chosen": texts[0], "rejected": text} for text in (texts[1], texts[3], texts[4])]
    output = tmp_path / "scores.jsonl"
    assert score.main([str(run_dir), write(tmp_path / "pairs.jsonl", pairs), "--use_cpu", "--cache_dir", str(tmp_path / "cache"),
                       "--output", str(output)]) == 0
    expected = [json.loads(line) for line in output.read_text().splitlines()]
    assert scores[0] == pytest.approx(expected[0]["chosen_reward"], abs=1e-5)
    assert [scores[1], scores[3], scores[4]] == pytest.approx([row["rejected_reward"] for row in expected], abs=1e-5)
    best = judge.best_and_worst(answers, scores)
    assert len(best) == 1 and best[0]["chosen_score"] == max(s for s in scores if not math.isnan(s))


def test_what_chat_writes_can_be_judged(tiny, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "a dog"}])
    answers, pairs = str(tmp_path / "answers.jsonl"), tmp_path / "pairs.jsonl"
    assert chat.main([str(tiny), "--prompts", prompts, "--num_samples", "6", "--max_new_tokens", "40", "--output", answers,
                      "--device", "cpu"]) == 0
    assert judge.main([answers, "--command", LENGTH, "--output", str(pairs)]) == 0
    assert {json.loads(line)["prompt"] for line in pairs.read_text().splitlines()} <= {"the cat", "a dog"}


WRONG = [
    (rows_of(("a", "x"), ("a", "y")), [], "give --command or --reward: one judge"),
    (rows_of(("a", "x"), ("a", "y")), ["--command", "x", "--reward", "y"], "give --command or --reward: one judge"),
    ([{"prompt": "a"}], ["--command", LENGTH], "answers.jsonl:1: no 'completion'; give the --output of extras.chat"),
    ([{"prompt": "a", "completion": 3}], ["--command", LENGTH], 'answers.jsonl:1: "completion" is neither text nor messages'),
    (rows_of(("a", "x"), ("a", "y")), ["--command", command("exit(3)")], "exit status 3"),
    (rows_of(("a", "x"), ("a", "y")), ["--command", command("print(1)")], "printed 1 words for 2 answers; print one number for each"),
    (rows_of(("a", "x"), ("a", "y")), ["--command", command("print('1 good')")], "'good' for "),
    (rows_of(("a", "x"), ("a", "y")), ["--command", "no-such-program"], "no-such-program"),
    (rows_of(("a", "x"), ("a", "y")), ["--command", LENGTH], "no prompt has two finished answers with different scores"),
]


@pytest.mark.parametrize("rows, words, message", WRONG)
def test_what_cannot_be_judged_is_one_message_and_exit_2(rows, words, message, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert judge.main([write(tmp_path / "answers.jsonl", rows), "--output", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and message in error and not out.exists()
