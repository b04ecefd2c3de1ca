"""Killed at any moment and resumed, a run ends where the uninterrupted one ends."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
VICTIM = ROOT / "tests" / "victim.py"
PHASES = ("tokenizing", "precomputing", "stepping", "saving", "evaluating", "finishing")


def flags(tiny, pairs_file, home: Path, name: str) -> list[str]:
    return [str(home / "notes"), "--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir", str(home / name),
            "--cache_dir", str(home / "cache"), "--use_cpu", "--no_bf16", "--learning_rate", "1e-3", "--num_train_epochs", "6",
            "--per_device_train_batch_size", "4", "--logging_steps", "3", "--eval_strategy", "steps", "--eval_steps", "4",
            "--eval_fraction", "0.2", "--save_steps", "2", "--save_total_limit", "2", "--ddp_timeout", "30",
            "--resume_from_checkpoint", "true"]


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(command: list[str]) -> str:
    process = start(command)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    return said


def wait_for(process: subprocess.Popen, note: Path, phase: str, times: int) -> int | None:
    """The process id of the rank that came to the phase so many times; None where the run ended before."""
    note.unlink(missing_ok=True)
    while process.poll() is None:
        if note.exists():
            pid, found, count = note.read_text().split()
            if found == phase and int(count) >= times:
                return int(pid)
        time.sleep(0.005)
    return None


def result(directory: Path) -> tuple:
    lines = [{k: v for k, v in m.items() if k != "eval_runtime"} for m in read_metrics(directory)]
    return lines, load_file(directory / "model.safetensors")


def assert_bitwise(whole: Path, cut: Path) -> None:
    (a_lines, a), (b_lines, b) = result(whole), result(cut)
    assert a_lines == b_lines
    assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_thirty_kills_at_random_moments_leave_no_trace(tiny, pairs_file, tmp_path):
    (tmp_path / "notes").mkdir()
    finish([str(VICTIM), *flags(tiny, pairs_file, tmp_path, "whole")])
    shutil.rmtree(tmp_path / "cache")
    rng, kills, ended = random.Random(1), {phase: 0 for phase in PHASES}, 0
    while sum(kills.values()) < 30 or min(kills.values()) < 3:
        phase = rng.choice([p for p in PHASES if kills[p] < 8])
        if phase in ("tokenizing", "precomputing"):
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        process = start([str(VICTIM), *flags(tiny, pairs_file, tmp_path, "cut")])
        pid = wait_for(process, tmp_path / "notes" / "rank-0", phase, rng.randint(1, 9) if phase in ("saving", "stepping") else 1)
        if pid is not None:
            time.sleep(rng.uniform(0, 0.06))
            process.kill()
            kills[phase] += 1
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        ended += process.returncode == 0
        if process.returncode == 0:  # it got through to the end: the same, and once more from the start
            assert_bitwise(tmp_path / "whole", tmp_path / "cut")
            shutil.rmtree(tmp_path / "cut")
    finish([str(VICTIM), *flags(tiny, pairs_file, tmp_path, "cut")])
    print(kills, f"and {ended} runs that came to their end between them")
    assert_bitwise(tmp_path / "whole", tmp_path / "cut")


def test_a_rank_of_two_that_is_killed_is_started_again_by_torchrun(tiny, pairs_file, tmp_path):
    (tmp_path / "notes").mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finish([*torchrun, str(VICTIM), *flags(tiny, pairs_file, tmp_path, "whole")])
    command = flags(tiny, pairs_file, tmp_path, "cut")[:-2]  # no --resume_from_checkpoint: it resumes by itself
    process = start([*torchrun, "--max_restarts=6", str(VICTIM), *command])
    rng, killed = random.Random(2), []
    for phase in ("stepping", "saving", "evaluating", "stepping", "saving"):
        rank = rng.randint(0, 1) if phase != "saving" else 0
        pid = wait_for(process, tmp_path / "notes" / f"rank-{rank}", phase, rng.randint(3, 6) if phase == "stepping" else 1)
        assert pid is not None, process.communicate()[0]
        os.kill(pid, signal.SIGKILL)
        killed.append((phase, rank))
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert said.count("resuming from") >= 4, said
    assert_bitwise(tmp_path / "whole", tmp_path / "cut")
