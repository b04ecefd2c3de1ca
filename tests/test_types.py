"""ruff and mypy find nothing, as pyproject.toml sets them."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("tool", [["ruff", "check", "--no-cache", "."], ["mypy", "--no-incremental"]])
def test_the_tool_finds_nothing(tool):
    if subprocess.run([sys.executable, "-m", tool[0], "--version"], capture_output=True).returncode:
        pytest.skip(f"needs {tool[0]}")
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_tools_are_installed_for_the_tests():
    assert {"ruff", "mypy"} <= set((ROOT / "tests" / "requirements.txt").read_text("utf-8").split())
