"""Models, data and trained models over the real client of the hub, against a server of our own on 127.0.0.1."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, make_rows, read_metrics, run_dpo
from hub_server import HubServer

from extras.hub import card
from extras.hub import client as hub
from parts import splits

pytest.importorskip("huggingface_hub")

# Runs each request in a process of its own, forked from one that has imported torch and not yet the client, which reads
# its environment on import.
RUNNER = """
import json, os, sys, traceback
import data, model
def show(value):
    print(json.dumps(value, default=str))
def run(request):
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for number, file in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    status = 0
    try:
        assert "huggingface_hub" not in sys.modules
        from extras.hub import card, client
        exec(request["code"], dict(hub=client, card=card, show=show))
    except ValueError as error:
        show({"error": str(error)})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
for line in sys.stdin:
    child = os.fork() or run(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def runner():
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def environment(server, tmp_path):
    """Of a client of `server`: no token, a cache of its own, a home of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return kept | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1",
                   "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}


@pytest.fixture
def start(runner, environment, tmp_path):
    """start(code, **variables): the number of a process that runs it, in a directory without model or data."""
    place = tmp_path / "elsewhere"
    place.mkdir()

    def start(code: str, **variables) -> int:
        request = {"code": code, "environment": environment | variables, "directory": str(place)}
        runner.stdin.write(json.dumps(request) + "\n")
        runner.stdin.flush()
        return int(runner.stdout.readline())

    return start


@pytest.fixture
def client(start, runner, tmp_path):
    """client(code, **variables): what `show` printed last in such a process, {"error": ...} after a ValueError."""

    def client(code: str, **variables):
        start(code, **variables)
        status = int(runner.stdout.readline())
        printed, errors = ((tmp_path / "elsewhere" / name).read_text() for name in ("stdout", "stderr"))
        assert status == 0 and "Traceback" not in errors, errors
        return json.loads(printed.splitlines()[-1])

    return client


def contents(directory) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def sharded(tiny) -> dict[str, bytes]:
    """The tiny model in two weight files with an index."""
    from safetensors.torch import load_file, save

    state = load_file(tiny / "model.safetensors")
    names = sorted(state)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    files = {file: save({n: state[n] for n in half}) for file, half in halves.items()}
    index = {"metadata": {}, "weight_map": {n: file for file, half in halves.items() for n in half}}
    rest = {n: c for n, c in contents(tiny).items() if not n.endswith(".safetensors")}
    return rest | files | {"model.safetensors.index.json": json.dumps(index).encode()}


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow.parquet import write_table

    sink = arrow.BufferOutputStream()
    write_table(arrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


MODEL = 'path = hub.local_model("org/tiny"); show({"path": path, "files": sorted(p.name for p in path.rglob("*"))})'
NOT_NEEDED = {"README.md": b"hello", "pytorch_model.bin": b"pickle", "tf_model.h5": b"h5", "onnx/model.onnx": b"onnx",
              "consolidated.safetensors": b"the weights again", "original/consolidated.00.pth": b"and again",
              "onnx/config.json": b"{}", "fp16/model.safetensors": b"and again", "model.gguf": b"gguf"}


# Models


def test_only_the_files_of_the_model_are_fetched_and_only_once(server, client, tiny):
    files = contents(tiny) | {"generation_config.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    server.add("model", "org/tiny", files | NOT_NEEDED)
    got = client(MODEL)
    assert got["files"] == sorted(files)
    assert sorted(server.downloaded()) == sorted(files)
    asked = len(server.requests)
    assert client(MODEL) == got
    assert not server.downloaded(asked)


def test_the_fetched_model_loads_and_is_the_same(server, client, tiny, sharded):
    server.add("model", "org/tiny", sharded | NOT_NEEDED)
    code = """
import torch
import model as models
a, b = models.load_model(hub.local_model("org/tiny")), models.load_model(hub.local_model(%r))
show([all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), len(list(a.parameters()))])
""" % str(tiny)
    assert client(code) == [True, 21]
    assert sorted(server.downloaded()) == sorted(sharded)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="mamba"), "org/tiny: model_type 'mamba' is not supported"),
    (dict(model_type="mamba", quantization_config={"quant_method": "fp8"}), "model_type 'mamba' is not supported"),
    (dict(quantization_config={"quant_method": "awq", "bits": 4}), "org/tiny: the checkpoint is quantized (awq)"),
    (dict(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "quantized (bitsandbytes)")],
    ids=["family", "family first", "awq", "8 bits"])
def test_a_model_that_cannot_be_trained_is_refused_before_its_weights_are_fetched(server, client, tiny, change, words):
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | change).encode()
    server.add("model", "org/tiny", files)
    assert words in client("show(hub.local_model('org/tiny'))")["error"]
    assert "config.json" in server.downloaded() and "model.safetensors" not in server.downloaded()


def test_an_adapter_is_fetched_without_a_config(server, client):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "tokenizer.json": b"{}"}
    server.add("model", "org/tiny", files | NOT_NEEDED)
    assert client(MODEL)["files"] == sorted(files)


def test_a_directory_is_taken_as_it_is(client, server, tiny):
    assert client(f"show(hub.local_model({str(tiny)!r}))") == str(tiny)
    assert "is a directory" in client(f"show(hub.local_model({str(tiny)!r}, 'v1'))")["error"]
    assert not server.requests


def test_revisions_are_branches_tags_and_commits(server, client, tiny):
    repo = server.add("model", "org/tiny", contents(tiny))
    old = repo.branches["main"]
    changed = repo.commit(contents(tiny) | {"generation_config.json": b'{"top_k": 3}'})
    repo.branches["v1"] = old
    for revision, commit in {None: changed, "main": changed, "v1": old, old: old, changed: changed}.items():
        path = client(f"show(hub.local_model('org/tiny', {revision!r}))")
        assert path.endswith(commit)
        assert os.path.exists(path + "/generation_config.json") == (commit == changed)
    assert "it has no revision 'v2'" in client("show(hub.local_model('org/tiny', 'v2'))")["error"]


REFUSED = [
    ("org/absent", "org/absent: no such path here and no such model on http://127.0.0.1"),
    ("org/secret", "if it is private, log in with `hf auth login`, or set HF_TOKEN"),
    ("org/gated", "org/gated: a gated model: ask for access at http://127.0.0.1"),
    ("org/pickled", "its weights are pickled (pytorch_model.bin), and pickles are never read"),
    ("org/empty", "not a model that can be loaded: config.json, model.safetensors missing among its 1 files"),
    ("./models/tiny", "./models/tiny: no such directory here, and not the id of a model on the hub"),
    ("a/b/c", "not the id of a model on the hub, which is owner/name"),
]
ASK_ALL = """
found = {}
for name in NAMES:
    try:
        found[name] = load(name)
    except ValueError as error:
        found[name] = str(error)
show(found)
"""


def test_what_cannot_be_had_is_said(server, client, tiny):
    server.add("model", "org/secret", contents(tiny), readers={"somebody"})
    server.add("model", "org/gated", contents(tiny), gated=True)
    server.add("model", "org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    server.add("model", "org/empty", {"README.md": b"soon"})
    for token in ({}, {"HF_TOKEN": "good-token"}):
        found = client(f"load, NAMES = hub.local_model, {[name for name, _ in REFUSED]!r}\n{ASK_ALL}", **token)
        for name, message in REFUSED:
            assert message in found[name] and len(found[name].splitlines()) == 1, name


def test_a_token_opens_what_is_gated_or_private(server, client, tiny, tmp_path):
    """From the variable, and from the file that `hf auth login` writes."""
    for name, access in {"org/gated": dict(gated=True), "org/secret": {}}.items():
        server.add("model", name, contents(tiny), readers={"me"}, **access)
    read = "show(sorted(p.name for p in hub.local_model('{}').iterdir()))".format
    assert client(read("org/gated"), HF_TOKEN="good-token") == sorted(contents(tiny))
    tokens = {r.path.split("/")[1]: r.token for r in server.requests if r.path.startswith(("/store/", "/org/"))}
    assert tokens == {"org": "good-token", "store": None}
    (tmp_path / "hf_home").mkdir(exist_ok=True)
    (tmp_path / "hf_home/token").write_text("good-token")
    assert client(read("org/secret")) == sorted(contents(tiny))
    error = client(read("org/other"), HF_TOKEN="made-up-token")["error"]
    assert "refused it (401): the token is invalid or lacks the right" in error


def test_offline_mode_uses_the_cache_alone(server, client, tiny):
    server.add("model", "org/tiny", contents(tiny))
    error = client(MODEL, HF_HUB_OFFLINE="1")["error"]
    assert "org/tiny: not in the cache" in error and "HF_HUB_OFFLINE=0" in error
    got = client(MODEL)
    asked = len(server.requests)
    assert client(MODEL, HF_HUB_OFFLINE="1") == got
    assert len(server.requests) == asked


def test_a_hub_out_of_reach_falls_back_on_the_cache(server, client, tiny):
    server.add("model", "org/tiny", contents(tiny))
    got = client(MODEL)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert client(MODEL, **nowhere) == got
    error = client("show(hub.local_model('org/other'))", **nowhere)["error"]
    assert "not in the cache, and http://127.0.0.1:9 cannot be reached: ConnectError" in error


def test_a_broken_download_goes_on_where_it_broke(server, client):
    """At the last whole piece: the client writes 10 MiB at a time."""
    file, weights = "model.safetensors", bytes(range(256)) * (12 * 2**12)
    server.add("model", "org/tiny", {"config.json": b"{}", file: weights})
    server.breaks[file] = 11 * 2**20
    path = client(MODEL)["path"]
    assert open(f"{path}/{file}", "rb").read() == weights
    asked = [r for r in server.requests if r.method == "GET" and server.names().get(r.path.split("/")[-1]) == file]
    assert [r.range for r in asked] == [None, f"bytes={10 * 2**20}-"]


def test_after_a_kill_only_the_unfinished_file_is_fetched_again(server, start, runner, client, sharded, tmp_path):
    server.add("model", "org/tiny", sharded)
    file = "model-00002-of-00002.safetensors"
    server.breaks[file] = -1000
    first = start(MODEL)
    assert server.waiting.wait(60)
    deadline = time.time() + 60
    other = "model-00001-of-00002.safetensors"
    while not list((tmp_path / "hf_home").rglob(f"snapshots/*/{other}")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    assert int(runner.stdout.readline()) == -signal.SIGKILL
    assert "not all of it" in client(MODEL, HF_HUB_OFFLINE="1")["error"]
    asked = len(server.requests)
    path = client(MODEL)["path"]
    assert server.downloaded(asked) == [file]
    assert {n: open(f"{path}/{n}", "rb").read() for n in sharded} == sharded


# Data sets

CARD = """---
configs:
- config_name: small
  data_files: few/*.jsonl
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-*]
---
# Pairs
"""


def test_a_split_that_the_card_declares(server, client):
    parts = {f"data/train-0000{i}-of-00002.jsonl": jsonl(make_rows(3, i)) for i in range(2)}
    test, few = jsonl(make_rows(2, 7)), jsonl(make_rows(1, 8))
    server.add("dataset", "org/pairs", parts | {"data/test-00000-of-00001.jsonl": test, "few/a.jsonl": few,
                                                "README.md": CARD.encode(), "data/junk.csv": b"a,b"})
    read = 'show([open(p).read() for p in hub.local_dataset("org/pairs"{})])'.format
    assert client(read("")) == [c.decode() for c in parts.values()]
    assert sorted(server.downloaded()) == ["README.md", *parts]
    assert client(read(", split='test'")) == [test.decode()]
    assert client(read(", config='small'")) == [few.decode()]
    asked = len(server.requests)
    assert client(read(", split='test'"), HF_HUB_OFFLINE="1") == [test.decode()]
    assert len(server.requests) == asked
    assert "no split 'dev'; it has 'test', 'train'" in client(read(", split='dev'"))["error"]
    assert "no config 'big'; it has small, default" in client(read(", config='big'"))["error"]


def test_offline_part_of_a_split_is_not_taken_for_the_whole(server, client, tmp_path):
    parts = {f"data/train-{i}.jsonl": jsonl(make_rows(3, i)) for i in range(3)}
    server.add("dataset", "org/pairs", parts | {".gitattributes": b""})
    client("from huggingface_hub import snapshot_download\n"
           "show(snapshot_download('org/pairs', repo_type='dataset', allow_patterns=['data/train-[01].jsonl', '.g*']))")
    assert "or not all of it" in client('show(hub.local_dataset("org/pairs"))', HF_HUB_OFFLINE="1")["error"]
    assert len(client('show(hub.local_dataset("org/pairs"))')) == 3
    for listing in (tmp_path / "hf_home").rglob("trees/*.json"):
        listing.unlink()
    assert "has no list of its files" in client('show(hub.local_dataset("org/pairs"))', HF_HUB_OFFLINE="1")["error"]


REFUSED_DATA = [
    ("org/absent", "no such path here and no such dataset on http://127.0.0.1"),
    ("org/gated", "a gated dataset: ask for access at http://127.0.0.1"),
    ("org/script", "its rows are made by a script of its own, which is never run"),
    ("org/text", "no split 'train'; its files (train.txt ...) are none that can be read"),
    ("prefs.jsonl", "prefs.jsonl: no such file, directory or glob here"),
    ("data/*.jsonl", "data/*.jsonl: no such file"),
]


def test_what_data_cannot_be_had_is_said(server, client):
    server.add("dataset", "org/gated", {"train.jsonl": jsonl(make_rows(1))}, gated=True)
    server.add("dataset", "org/script", {"script.py": b"print()", "README.md": b"# x"})
    server.add("dataset", "org/text", {"train.txt": b"a,b", "README.md": b"# x"})
    found = client(f"load, NAMES = hub.local_dataset, {[name for name, _ in REFUSED_DATA]!r}\n{ASK_ALL}")
    for name, message in REFUSED_DATA:
        assert message in found[name] and len(found[name].splitlines()) == 1, name


def test_parquet_is_read_and_without_pyarrow_says_what_to_install_before_any_download(server, client, tmp_path):
    rows = make_rows(4)
    server.add("dataset", "org/pairs", {"data/train-00000-of-00001.parquet": parquet(rows), "README.md": b""})
    (tmp_path / "without").mkdir()
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pyarrow" else real(name, *rest)
show(hub.local_dataset("org/pairs"))
"""
    assert "pip install pyarrow" in client(code)["error"]
    assert "data/train-00000-of-00001.parquet" not in server.downloaded()
    assert client("from parts.rows import read_rows\nshow([row for _, row in read_rows(hub.local_dataset('org/pairs'))])") == rows


def test_local_paths_are_taken_as_they_are(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "tree/data/train-00000-of-00001.jsonl", "tree/data/test-00000-of-00001.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(make_rows(1)))
    assert hub.local_dataset(str(tmp_path / "a.jsonl")) == [tmp_path / "a.jsonl"]
    assert hub.local_dataset(str(tmp_path / "?.jsonl")) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(ValueError, match="a config or a revision .en. is for data sets on the hub"):
        hub.local_dataset(str(tmp_path / "a.jsonl"), "en")
    assert hub.local_dataset(str(tmp_path)) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert hub.local_dataset(str(tmp_path / "tree"), split="test") == [tmp_path / "tree/data/test-00000-of-00001.jsonl"]


DATA = "data/{}-0000{}-of-0000{}.parquet".format
LAYOUTS = {
    "shards": ([DATA("train", 0, 2), DATA("train", 1, 2), DATA("train_sft", 0, 1), DATA("test", 0, 1)], {}, None,
               {"train": [DATA("train", 0, 2), DATA("train", 1, 2)], "train_sft": [DATA("train_sft", 0, 1)],
                "test": [DATA("test", 0, 1)]}),
    "shards with a hash": (["data/train_prefs-00000-of-00001-6ef0.parquet"], {}, None,
                           {"train_prefs": ["data/train_prefs-00000-of-00001-6ef0.parquet"]}),
    "file names": (["train.jsonl", "dev.jsonl", "eval_1.jsonl", "dataset_info.json", ".cache/train.jsonl"], {}, None,
                   {"train": ["train.jsonl"], "validation": ["dev.jsonl"], "test": ["eval_1.jsonl"]}),
    "folder names": (["train/a.json", "train/b.json", "test/a.json"], {}, None,
                     {"train": ["train/a.json", "train/b.json"], "test": ["test/a.json"]}),
    "folders for configs": (["good/train.jsonl.gz", "good/test.jsonl.gz", "harmless/train.jsonl.gz"], {}, "good",
                            {"train": ["good/train.jsonl.gz"], "test": ["good/test.jsonl.gz"]}),
    "all configs together": (["helpful/train.jsonl.gz", "harmless/train.jsonl.gz", "other/x.jsonl.gz"], {}, None,
                             {"train": ["harmless/train.jsonl.gz", "helpful/train.jsonl.gz"]}),
    "shards in a config": (["en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet"], {}, "de",
                           {"train": ["de/train-00000-of-00001.parquet"]}),
    "no split named": (["prefs.jsonl"], {}, None, {"train": ["prefs.jsonl"]}),
    "words that only begin so": (["trainer.jsonl", "contest.jsonl"], {}, None,
                                 {"train": ["contest.jsonl", "trainer.jsonl"]}),
    "card: one pattern": (["x/a.jsonl", "x/y/b.jsonl", "c.jsonl"], {"configs": [
        {"config_name": "default", "data_files": "x/*.jsonl"}]}, None, {"train": ["x/a.jsonl"]}),
    "card: list of patterns": (["x/a.jsonl", "x/y/b.jsonl", "c.jsonl"], {"configs": [
        {"config_name": "only", "data_files": ["x/**/*.jsonl", "c.jsonl"]}]}, None,
        {"train": ["c.jsonl", "x/a.jsonl", "x/y/b.jsonl"]}),
    "card: splits as a mapping": (["a.jsonl", "b.jsonl"], {"configs": [
        {"config_name": "default", "data_files": {"train": "a.jsonl", "test": "b.jsonl"}}]}, None,
        {"train": ["a.jsonl"], "test": ["b.jsonl"]}),
    "card: directory": (["x/train.jsonl", "x/test.jsonl", "train.jsonl"], {"configs": [
        {"config_name": "default", "data_dir": "x"}]}, None, {"train": ["x/train.jsonl"], "test": ["x/test.jsonl"]}),
    "card: default among several": (["a.jsonl", "b.jsonl"], {"configs": [
        {"config_name": "a", "data_files": "a.jsonl"}, {"config_name": "b", "data_files": "b.jsonl", "default": True}]},
        None, {"train": ["b.jsonl"]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_as_datasets_finds_them(layout):
    names, readme, config, expected = LAYOUTS[layout]
    for split, files in expected.items():
        assert splits.split_files("org/x", names, readme, config, split) == files
    with pytest.raises(ValueError, match="no split 'nosuch'.*; it has " + ", ".join(map(repr, sorted(expected)))):
        splits.split_files("org/x", names, readme, config, "nosuch")


@pytest.mark.parametrize("names, readme, config, message", [
    ([DATA("train", 0, 3), DATA("train", 2, 3)], {}, None, "data/train has 2 of its 3 files"),
    (["train.jsonl", "train.parquet"], {}, None, r"\(.jsonl, .parquet\); one of"),
    (["train.txt"], {"configs": [{"config_name": "x", "data_files": "*.txt"}]}, None,
     "is train.txt .a kind that is not read"),
    (["a.jsonl", "b.jsonl"], {"configs": [{"config_name": n, "data_files": f"{n}.jsonl"} for n in "ab"]}, None,
     "several configs, name one; it has a, b"),
    (["en/train.jsonl"], {}, "de", "no config 'de'; its folders are en"),
])
def test_unclear_layouts_are_refused(names, readme, config, message):
    with pytest.raises(ValueError, match=message):
        splits.split_files("org/x", names, readme, config, "train")


# Training and back

SETTINGS = dict(model_name_or_path="org/tiny", dataset_name="org/pairs", output_dir="somewhere/out",
                cache_dir="/secret/cache", loss_type=["sigmoid"],
                beta=0.2, learning_rate=1e-3, seed=42, lora_r=16, hub_token="hf_secret",
                ref_model_name_or_path="/secret/models/ref", eval_dataset_name="/secret/eval.jsonl")


def test_from_hub_to_hub(server, client, environment, tiny, tmp_path):
    """Model and data come from the hub, dpo.py trains, the result is pushed, fetched again and loads."""
    rows = make_rows(8)
    server.add("model", "org/tiny", contents(tiny))
    server.add("dataset", "org/pairs", {"data/train-00000-of-00001.parquet": parquet(rows), "README.md": b"# pairs"})
    out = tmp_path / "out"
    code = """
import dpo
(file,) = hub.local_dataset("org/pairs")
argv = ["--model_name_or_path", str(hub.local_model("org/tiny")), "--dataset_name", str(file), "--output_dir", OUT,
        "--cache_dir", OUT + "/../cache", "--per_device_train_batch_size", "4", "--num_train_epochs", "1",
        "--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", "1", "--use_cpu"]
status = dpo.main(argv)
card.write_card(OUT, SETTINGS, {}, "me/tiny-DPO")
address = hub.push(OUT, "me/tiny-DPO", private=True)
import torch
import model as models
a, b = models.load_model(OUT), models.load_model(hub.local_model("me/tiny-DPO"))
show([status, address, all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))])
"""
    status, address, same = client(f"OUT, SETTINGS = {str(out)!r}, {SETTINGS!r}\n{code}", HF_TOKEN="good-token")
    repo = server.repos["model", "me/tiny-DPO"]
    sha, pushed = repo.files("main")
    assert (status, same, repo.private) == (0, True, True) and address.endswith(sha)
    local = {n: c for n, c in contents(out).items() if not n.startswith(("checkpoint-", ".")) and n != "dpo_config.json"}
    assert pushed.keys() - {".gitattributes"} == local.keys() and all(pushed[n] == c for n, c in local.items())
    assert (out / "checkpoint-1").is_dir() and {"README.md", "training.svg", "metrics.jsonl", "tokenizer.json"} <= local.keys()


def test_pushing_again_and_to_a_branch(server, client, tmp_path):
    (tmp_path / "out").mkdir()
    for text, more in {"one": "", "two": "", "three": ", revision='trial'"}.items():
        (tmp_path / "out/config.json").write_text(text)
        client(f"show(hub.push({str(tmp_path / 'out')!r}, 'tiny'{more}))", HF_TOKEN="good-token")
    repo = server.repos["model", "me/tiny"]
    assert repo.files("main")[1]["config.json"] == b"two" and repo.files("trial")[1]["config.json"] == b"three"
    assert not repo.private


@pytest.mark.parametrize("variables, message", [
    ({}, "refused it (401)"), ({"HF_TOKEN": "made-up-token"}, "refused it (401)"),
    ({"HF_TOKEN": "good-token"}, "refused it (403): the token is invalid or lacks the right"),
    ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached: ConnectError")])
def test_a_push_that_cannot_be_is_refused_before_training(server, client, variables, message):
    assert message in client("show(hub.create('somebody/tiny'))", **variables)["error"]


def test_the_card_tells_the_run_and_no_secrets(tmp_path):
    lines = [{"step": 1, "epoch": 0.5, "loss": 0.7}, {"step": 2, "epoch": 1.0, "loss": 0.6, "rewards/margins": 0.1},
             {"step": 2, "epoch": 1.0, "eval_loss": 0.65, "eval_rewards/margins": 0.05}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card.write_card(tmp_path, SETTINGS, {"lora_r": 16, "beta": 0.1}, "me/tiny-DPO").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "org/tiny" and front["datasets"] == ["org/pairs"]
    assert "dpo" in front["tags"] and front["library_name"] == "transformers"
    assert "| `beta` | 0.2 |" in text and "lora_r" not in text
    assert "| `loss` | 0.6 | 0.65 |" in text and "| `rewards/margins` | 0.1 | 0.05 |" in text
    assert "secret" not in text and "somewhere" not in text and "| `ref_model_name_or_path` | ref |" in text
    assert 'model="me/tiny-DPO"' in text and "Once upon a time" in text and f"]({card.PICTURE})" in text
    assert (tmp_path / card.PICTURE).read_text().count("<polyline") == 4  # loss and margins, of training and evaluation


def test_the_card_of_an_adapter_over_local_files(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / card.PICTURE).write_bytes(b"png")
    settings = SETTINGS | {"model_name_or_path": str(base), "dataset_name": str(base / "x.jsonl")}
    text = card.model_card(tmp_path, settings, {}, "me/a")
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front and "datasets" not in front and front["library_name"] == "peft"
    assert str(tmp_path) not in text and "`base` trained with" in text and "on `x.jsonl`" in text
    assert "AutoPeftModelForCausalLM" in text and f"]({card.PICTURE})" in text and "No metrics were logged" in text


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_documented_command(ranks, server, environment, client, tiny, tmp_path, monkeypatch):
    """Two ranks fetch every file once; the split for evaluation is found; the adapter that is pushed names its base on
    the hub, and answers."""
    for name, value in (environment | {"HF_TOKEN": "good-token"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    server.add("model", "org/tiny", contents(tiny))
    server.add("dataset", "org/pairs", {f"data/{split}-00000-of-00001.parquet": parquet(make_rows(9, seed))
                                        for seed, split in enumerate(("train", "test"))} | {"README.md": b"# pairs"})
    run_dpo("--model_name_or_path", "org/tiny", "--dataset_name", "org/pairs", "--num_train_epochs", 1,
            "--logging_steps", 1, "--eval_strategy", "epoch", "--output_dir", "tiny-DPO", "--use_peft", "--push_to_hub",
            ranks=ranks)
    fetched = server.downloaded()
    assert sorted(fetched) == sorted({*contents(tiny), "README.md", "data/train-00000-of-00001.parquet",
                                      "data/test-00000-of-00001.parquet"})
    assert {"loss", "eval_loss"} <= {key for line in read_metrics(tmp_path / "tiny-DPO") for key in line}
    pushed = server.repos["model", "me/tiny-DPO"].files("main")[1]
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    assert b"base_model: org/tiny\nbase_model_relation: adapter\n" in pushed["README.md"]
    assert str(tmp_path).encode() not in b"".join(c for n, c in pushed.items() if not n.endswith(".safetensors"))
    code = """
import io, sys
from extras import chat
sys.stdin = io.StringIO("the cat")
show(chat.main(["me/tiny-DPO", "--max_new_tokens", "3", "--device", "cpu"]))
"""
    assert client(code) == 0


def test_names_that_are_nowhere_are_exit_2(server, environment, tiny, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server.add("model", "org/tiny", contents(tiny))
    out = tmp_path / "out"
    for (model, dataset), message in {("org/absent", "org/pairs"): "org/absent: no such path here and no such model on",
                                      ("org/tiny", "org/pairs"): "org/pairs: no such path here and no such dataset on",
                                      ("./nowhere", "x.jsonl"): "./nowhere: no such directory here"}.items():
        done = run_dpo("--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", out, expect=2)
        assert message in done.stderr and "Traceback" not in done.stderr


VERBATIM = ("dpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
            "--num_train_epochs 1 --logging_steps 25 --output_dir Qwen2-0.5B-DPO")
CONVERSATION = '{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}'


def conversations(count: int, seed: int) -> list[dict]:
    """Rows as UltraFeedback binarized has them: whole conversations and scores, the prompt implicit."""
    said = lambda role, text: {"role": role, "content": text.strip()}
    return [{side: [said("user", row["prompt"]), said("assistant", row[side])] for side in ("chosen", "rejected")}
            | {"score_chosen": 8.0, "score_rejected": 3.0} for row in make_rows(count, seed)]


def launched(launcher: list[str], words: str) -> list[str]:
    return [sys.executable, "-m", *launcher, str(ROOT / "dpo.py"), *words.split()[1:]]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_documented_command_verbatim(launcher, server, environment, tiny, tmp_path):
    """As the documentation has it, with two processes for eight: one epoch over the hub's parquet, saved and loadable."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if launcher == "accelerate":
        pytest.importorskip("accelerate", reason="needs accelerate")
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    server.add("model", "Qwen/Qwen2-0.5B-Instruct", contents(tiny) | {"chat_template.jinja": CONVERSATION.encode()} | NOT_NEEDED)
    server.add("dataset", "trl-lib/ultrafeedback_binarized", {
        f"data/{split}-00000-of-00001.parquet": parquet(conversations(64 if split == "train" else 9, seed))
        for seed, split in enumerate(("train", "test"))} | {"README.md": b"# pairs"})
    done = subprocess.run(launched(launch, VERBATIM), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trl-lib/ultrafeedback_binarized: 64 pairs from 64 rows") == 1
    assert sorted(server.downloaded()) == sorted({*contents(tiny), "chat_template.jinja", "README.md",
                                                  "data/train-00000-of-00001.parquet"})
    (line,) = read_metrics(tmp_path / "Qwen2-0.5B-DPO")
    assert (line["step"], line["epoch"]) == (4, 1.0)  # 64 pairs, 8 x 2 a step
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= contents(tmp_path / "Qwen2-0.5B-DPO").keys()


def test_a_split_at_a_revision_of_the_data(server, environment, tiny, tmp_path, monkeypatch):
    """--dataset_revision, --dataset_config, --dataset_train_split, and --revision for the model: what is named is trained on."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = server.add("model", "org/tiny", contents(tiny))
    model.branches["v1"] = model.branches["main"]
    model.commit({"README.md": b"moved away"})
    pairs = server.add("dataset", "org/pairs", {"few/dev.jsonl": jsonl(make_rows(5)), "few/train.jsonl": jsonl(make_rows(7)),
                                                "README.md": b"# pairs"})
    pairs.branches["old"] = pairs.branches["main"]
    pairs.commit({"README.md": b"moved away"})
    words = ["--model_name_or_path", "org/tiny", "--dataset_name", "org/pairs", "--dataset_config", "few",
             "--dataset_train_split", "validation", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    done = run_dpo(*words, "--revision", "v1", "--dataset_revision", "old")
    assert "org/pairs: 5 pairs from 5 rows" in done.stdout
    done = run_dpo(*words, "--revision", "v2", expect=2)
    assert "org/tiny: it has no revision 'v2'" in done.stderr
    done = run_dpo(*words, "--revision", "v1", "--dataset_revision", "new", expect=2)
    assert "org/pairs: it has no revision 'new'" in done.stderr
