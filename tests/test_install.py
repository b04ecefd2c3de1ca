"""`pip install .` installs everything that a run needs, with the command `dpo`; the source archive has the rest."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("parts", "extras", "demo", "docs", "bench", "tests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, source archive), built from a copy of the repository."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77")
    home = tmp_path_factory.mktemp("built")
    (home / "source").mkdir()
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, home / "source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, home / "source" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta as b; print(b.build_wheel(W), b.build_sdist(W))".replace("W", repr(str(home)))
    done = subprocess.run([sys.executable, "-c", code], cwd=home / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(home / name for name in done.stdout.split()[-2:])


def test_the_wheel_has_the_core_the_parts_the_rooms_and_the_demo(built):
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    here = [path for folder in ("parts", "extras", "demo") for path in (ROOT / folder).rglob("*")]
    wanted = {p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.py"), *here] if p.is_file() and p.suffix != ".pyc"}
    assert names == wanted and {"demo/model/model.safetensors", "demo/config.toml", "extras/run/fsdp.py"} <= names


def test_the_archive_has_what_the_commands_of_the_pages_need(built):
    names = {name.partition("/")[2] for name in tarfile.open(built[1]).getnames()}
    assert {"docs/map.md", "docs/frontier.json", "bench/compare.py", "tests/conformance.py", "tests/conftest.py",
            "requirements.txt", "CITATION.cff", "LICENSE", "demo/train.jsonl", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_installed_command_trains_the_demo(built, tmp_path):
    """In an empty folder, with nothing of the repository on the path."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target", target, built[0]]
    assert subprocess.run(pip).returncode == 0
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    (tmp_path / "empty").mkdir()

    def call(*words) -> str:
        done = subprocess.run(list(map(str, words)), cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "--lr_scheduler_kwargs" in call(target / "bin" / "dpo", "--help")
    assert "step 1/1: loss 0.6931" in call(target / "bin" / "dpo", "--max_steps", 1, "--use_cpu", "--eval_strategy", "no")
    assert (tmp_path / "empty" / "demo-DPO" / "model.safetensors").is_file()
    assert "--num_samples" in call(sys.executable, "-m", "extras.chat", "--help")


def test_the_version_and_the_packages_are_those_told_elsewhere(built):
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    metadata = next(zipfile.ZipFile(built[0]).read(n).decode() for n in zipfile.ZipFile(built[0]).namelist() if n.endswith("METADATA"))
    required = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in line]
    assert required == (ROOT / "requirements.txt").read_text("utf-8").split()
