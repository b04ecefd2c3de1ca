"""Every command of the README and of the pages in docs/ runs: these here, the demo in test_demo.py, the tests by CI."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_cuda import SIGNATURES

PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "questions.md")]  # test_questions.py
COMMANDS = list(dict.fromkeys(command for page in PAGES if page.name != "rounds.md" for command in re.findall(  # test_rounds.py: in order
    r"^    ((?:python3? |torchrun |echo |venv/).*)$", page.read_text("utf-8"), re.M)))
TRAIN = "python dpo.py --model_name_or_path MODEL --dataset_name prefs.jsonl --output_dir OUT"
ELSEWHERE = {  # where else a command is run
    "python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python dpo.py": "test_demo.py",
    "python dpo.py --config demo-pictures/config.toml": "test_demo_pictures.py",
    "python -m demo.frontier": "test_frontier.py",  # minutes
    "venv/bin/pip install -r tests/requirements.txt && venv/bin/python -m pytest": ".ci/run",
    "python3 -m venv oldest": ".ci/run"}


def test_the_readme_has_commands_and_the_tests_command_is_what_ci_runs():
    assert len(COMMANDS) >= 20 and TRAIN in COMMANDS and set(ELSEWHERE) <= set(COMMANDS)
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "venv/bin/pip install -q -r tests/requirements.txt && venv/bin/python -m pytest" in ci


def test_the_readme_the_requirements_and_ci_name_the_same_oldest_torch_and_ci_tests_the_core_on_it():
    oldest = re.search(r"^torch>=(.*)$", (ROOT / "requirements.txt").read_text("utf-8"), re.M)[1]
    assert 'dependencies = {file = ["requirements.txt"]}' in (ROOT / "pyproject.toml").read_text("utf-8")
    page, ci = ((ROOT / name).read_text("utf-8") for name in ("README.md", ".ci/run"))
    assert f"The oldest torch that `requirements.txt` allows is {oldest}." in page
    install, tests = re.findall(r"^    (oldest/bin/.*)$", page, re.M)
    assert f" torch=={oldest}.0 " in install and {install, tests} <= set(ci.splitlines())
    named = re.search(r"tests/test_{(.*)}\.py$", tests)[1].split(",")
    assert {"losses", "data", "model", "dpo"} <= set(named) and [n for n in named if not (ROOT / f"tests/test_{n}.py").is_file()] == []
    assert oldest == next(iter(SIGNATURES))  # the flash operators' arguments, in test_cuda.py


def run(command: str, here) -> subprocess.CompletedProcess:
    """With one thread and two ranks for eight; `python` and `torchrun` are those of this environment."""
    said = ""
    if command.startswith("echo"):
        said, command = command.removeprefix("echo ").split(" | ")
    words = shlex.split(command.replace("--nproc_per_node=8", "--nproc_per_node=2"))
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", "--standalone", *words[1:]]
    words = [sys.executable, *(str(ROOT / w) if w.endswith(".py") else w for w in words[1:])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(here), "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=here, input=said, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def workplace(tiny, pairs_file, tmp_path_factory):
    """A folder where MODEL and prefs.jsonl are, and OUT, which TRAIN made: the other commands run in any order."""
    here = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny, here / "MODEL")
    shutil.copy(pairs_file, here / "prefs.jsonl")
    assert run(TRAIN, here).returncode == 0
    return here


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_command(command, workplace):
    done = run(command, workplace)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text("utf-8")
    shown = [page.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:docs|tests|bench|demo|extras|parts)/[\w./-]+\.\w+)`", text)]
    assert [path for path in shown + named if not path.exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_python_of_the_pages(page, workplace):
    text = (ROOT / page).read_text("utf-8")
    code = re.search(r"```python\n(from dpo import.*?)```", text, re.S)[1].replace("Qwen/Qwen2.5-0.5B-Instruct", "MODEL")
    code = code.replace(" blue.", " blue").replace(" green.", " small")  # words of the tiny model
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(workplace), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=300,
                          env=environment)
    assert done.returncode == 0, f"{page}\n{done.stdout}\n{done.stderr}"


def test_published_figures_are_what_the_script_computes():
    said = subprocess.run([sys.executable, str(ROOT / "bench" / "published.py")], capture_output=True, text=True).stdout
    assert "A100 at 40% of peak, two sequences, head on all: 3.3 minutes" in said
    assert "A100 at 40% of peak, one stream, head on completions: 2.5 minutes" in said
