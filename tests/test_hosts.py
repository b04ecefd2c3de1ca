"""Two hosts: two network namespaces of this machine, joined by a virtual cable, with one torchrun node in each."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, read_metrics
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")]
PORT = 29561


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    names = [f"dpo{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "dpo0", "netns", names[0], "type", "veth", "peer", "name", "dpo0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "dpo0")
            ip("-n", name, "link", "set", "dpo0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{' '.join(error.cmd)}: {error.stderr.strip()}")
    try:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name])


def start(hosts: list[str], settings: list[str], home: Path) -> list[subprocess.Popen]:
    """A node on each host, of one rank."""
    nodes = []
    for number, host in enumerate(hosts):
        said = open(home / f"said-{number}", "w")
        nodes.append(subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
             f"--node_rank={number}", "--master_addr=10.77.0.1", f"--master_port={PORT}", str(ROOT / "tests" / "victim.py"), *settings],
            stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "dpo0"}))
    return nodes


def words(home: Path) -> str:
    return "\n".join((home / f"said-{n}").read_text() for n in (0, 1))


def settings(tiny, pairs_file, home: Path, name: str) -> list[str]:
    return [str(home), "--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir", str(home / name),
            "--cache_dir", str(home / "cache"), "--use_cpu", "--no_bf16", "--learning_rate", "1e-3", "--num_train_epochs", "4",
            "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_steps", "3", "--ddp_timeout", "15"]


def assert_same(home: Path, one: str, other: str) -> None:
    a, b = ([m["loss"] for m in read_metrics(home / name)] for name in (one, other))
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < 1e-5
    a, b = (load_file(home / name / "model.safetensors") for name in (one, other))
    assert max(float((t - b[n]).abs().max()) for n, t in a.items()) < 1e-5


def test_two_hosts_equal_one_and_a_cut_cable_ends_in_words_and_resumes(hosts, tiny, pairs_file, tmp_path):
    single = [sys.executable, str(ROOT / "tests" / "victim.py"), *settings(tiny, pairs_file, tmp_path, "one")]
    subprocess.run([*single, "--gradient_accumulation_steps", "2"], check=True, capture_output=True)

    nodes = start(hosts, settings(tiny, pairs_file, tmp_path, "two"), tmp_path)
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], words(tmp_path)
    assert_same(tmp_path, "one", "two")

    nodes = start(hosts, settings(tiny, pairs_file, tmp_path, "cut"), tmp_path)
    while not (tmp_path / "cut" / "checkpoint-9").exists():
        assert all(node.poll() is None for node in nodes), words(tmp_path)
        time.sleep(0.01)
    ip("-n", hosts[1], "link", "set", "dpo0", "down")
    began = time.monotonic()
    status = [node.wait(timeout=200) for node in nodes]
    seconds = time.monotonic() - began
    print(f"cut: ended after {seconds:.0f} s with a --ddp_timeout of 15\n{words(tmp_path)[-3000:]}")
    assert 0 not in status and seconds < 120
    assert "rank 0 has lost the others at step" in words(tmp_path) and "--resume_from_checkpoint true goes on" in words(tmp_path)

    ip("-n", hosts[1], "link", "set", "dpo0", "up")
    nodes = start(hosts, [*settings(tiny, pairs_file, tmp_path, "cut"), "--resume_from_checkpoint", "true"], tmp_path)
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], words(tmp_path)
    assert "resuming from" in words(tmp_path)
    assert_same(tmp_path, "one", "cut")
