"""Data at scale and hostile input: what stops a template, bounds memory, and makes a second start quick."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows
from test_data import NO, USER, YES, row, write_tokenizer

import data
import dpo
from parts import conversations, rows, store, template
from parts.files import read_json, write_json
from parts.rows import DataError, attempt

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{{ (6 + messages | length) ** 99999999 }}",
    "a long compilation": "{{ 7 ** 99999999 }}"}
GREEDY = {"a long text": "{{ 'a' * 10 ** 10 }}", "many": "{% for i in range(9999) %}{{ 'a' * 10 ** 6 }}{% endfor %}"}
CHAT = row([USER], [YES], [NO])


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setattr(conversations, "SECONDS", 0.5)


def tokenizer_with(tmp_path, source):
    return data.Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", source))


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_template_is_stopped(tmp_path, second, kind):
    with pytest.raises(DataError, match="ran for more than 0.5 s on this conversation and was stopped"):
        tokenizer_with(tmp_path, ENDLESS[kind]).render([USER])


@pytest.mark.parametrize("kind", GREEDY)
def test_a_template_that_wants_much_memory_is_refused(tmp_path, kind):
    with pytest.raises(DataError, match="MiB for this conversation|characters for one conversation"):
        tokenizer_with(tmp_path, GREEDY[kind]).render([USER])


def test_after_a_stop_other_rows_are_rendered_and_after_three_none_is_tried(tmp_path, second):
    tokenizer = tokenizer_with(tmp_path, "{% if messages[0].content == 'x' %}" + ENDLESS["loops"] + "{% endif %}ok")
    outcomes = []
    for content in "xyxyxy":
        outcomes.append(attempt(tokenizer.render, [USER | {"content": content}]))
    assert outcomes[1] == outcomes[3] == "ok"
    assert all("was stopped" in str(outcomes[i]) for i in (0, 2, 4)) and "not tried again" in str(outcomes[5])


def test_an_endless_template_ends_the_run_with_file_and_line(tiny, tmp_path, capsys, second, monkeypatch):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(ENDLESS["loops"])
    (tmp_path / "chats.jsonl").write_text("\n" + json.dumps(CHAT) + "\n")
    assert dpo.main(["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "chats.jsonl"),
                     "--output_dir", str(tmp_path / "o"), "--cache_dir", str(tmp_path / "c"), "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert "chats.jsonl:2: the chat template ran for more than" in error and error.count("error:") == 1


def test_outside_the_sandbox_no_file_can_be_opened(tmp_path, monkeypatch):
    """Were there a way out of the sandbox, the process behind it could still neither read nor write."""
    program = tmp_path / "open.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(Path(template.__file__).parent)!r})
import template
class Escaped:
    def render(self, values, **more):
        try:
            return open(values["file"], values["mode"]).read()
        except OSError as error:
            return f"refused: {{error}}"
template.compile_template = lambda source: Escaped()
template.serve(sys.stdin.buffer, sys.stdout.buffer, 5)
""")
    renderer = conversations.Renderer({"default": ""}, tmp_path)
    monkeypatch.setattr(conversations, "PROGRAM", program)
    for mode in "rw":
        (text,) = renderer.render([([], False)], {"tools": None, "file": str(tmp_path / "open.py"), "mode": mode})
        assert text.startswith("refused: [Errno 24]")


def test_the_rendering_process_ends_with_its_tokenizer(tmp_path):
    tokenizer = tokenizer_with(tmp_path, "x")
    tokenizer.render([USER])
    process = tokenizer.renderer.process
    del tokenizer
    assert process.wait(10) is not None


# Large and changing files


def file_of(path, count):
    made = [r | {"chosen": " yes" + r["chosen"], "rejected": " no" + r["rejected"]} for r in make_rows(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return path


@pytest.fixture
def build(tiny, tmp_path):
    tokenizer = data.Tokenizer.load(tiny)
    return lambda *files, **more: data.build_store(list(files), tokenizer, data.DataOptions(), tmp_path / "c", **more)


def make_old(path):
    """Dated back, as git's rule wants it: a file that was written to a moment ago is not remembered."""
    os.utime(path, (1, 1))
    time.sleep(0.05)


def test_a_large_file_is_hashed_once_and_again_when_it_grew_or_changed(build, tmp_path, monkeypatch):
    hashed, honest = [], store.file_hash
    monkeypatch.setattr(store, "LARGE_FILE", 100)
    monkeypatch.setattr(store, "GRAIN", 0)
    monkeypatch.setattr(store, "file_hash", lambda path: hashed.append(path) or honest(path))
    path = file_of(tmp_path / "p.jsonl", 20)
    make_old(path)
    first = build(path)
    assert build(path).directory == first.directory and len(hashed) == 1
    with open(path, "a") as f:
        f.write(json.dumps(make_rows(21)[-1]) + "\n")
    grown = build(path)
    assert len(grown) == 21 and len(hashed) == 2
    content, state = path.read_bytes(), os.stat(path)
    path.write_bytes(content.replace(b" dog", b" cat"))  # as long, and dated as before
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert build(path).digest != grown.digest and len(hashed) == 3


def test_a_file_written_to_a_moment_ago_is_not_remembered(build, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LARGE_FILE", 100)
    build(file_of(tmp_path / "p.jsonl", 20))
    assert not (tmp_path / "c" / "hashes").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"state": 1}'])
def test_a_damaged_memory_of_hashes_only_costs_time(build, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(store, "LARGE_FILE", 100)
    monkeypatch.setattr(store, "GRAIN", 0)
    path = file_of(tmp_path / "p.jsonl", 20)
    make_old(path)
    first = build(path)
    (memory,) = (tmp_path / "c" / "hashes").iterdir()
    memory.write_text(damage)
    assert build(path).directory == first.directory


def test_a_file_that_grows_while_it_is_read_is_an_error_and_leaves_no_store(build, tmp_path):
    path = file_of(tmp_path / "p.jsonl", 600)

    def grow(done):
        with open(path, "a") as f:
            f.write("\n")

    with pytest.raises(DataError, match="p.jsonl: it changed while it was read"):
        build(path, progress=grow)
    assert not [p for p in (tmp_path / "c").iterdir() if p.name != "hashes"]


def test_opening_a_store_reads_none_of_its_tokens(build, tmp_path):
    pairs = build(file_of(tmp_path / "p.jsonl", 20))
    ends = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in (pairs[i] for i in range(20))]
    assert pairs.ends.tolist() == [sum(ends[: i + 1]) for i in range(20)] and pairs.tokens.tolist() == ends
    assert isinstance(pairs.ends, np.memmap) and isinstance(pairs.stream, np.memmap)


def test_a_line_without_end_is_not_read_into_memory(build, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_ROW", 1000)
    path = file_of(tmp_path / "p.jsonl", 3)
    with open(path, "a") as f:
        f.write(" " * 5000)
    with pytest.raises(DataError, match="p.jsonl:4: a line of more than"):
        build(path)


def test_a_full_disk_is_named_and_leaves_nothing(build, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot hold the token store .No space left on device.; change --cache_dir"):
        build(file_of(tmp_path / "p.jsonl", 3))
    assert not list((tmp_path / "c").iterdir())


def test_a_tokenizing_process_that_is_killed_is_named(build, tmp_path):
    killed = []

    def kill(done):
        for child in multiprocessing.active_children()[:1]:
            if not killed:
                child.kill()
                killed.append(child)

    with pytest.raises(DataError, match="a tokenizing process died.*--dataset_num_proc"):
        build(file_of(tmp_path / "p.jsonl", 256 * 12), num_proc=2, progress=kill)
    assert killed


def test_half_a_surrogate_pair_in_a_models_json_is_written_back_as_it_was(tmp_path):
    """Found by the fuzz campaign: the run trained, and then could not write generation_config.json."""
    value = {"x": "\ud800", "y": "ü"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value and "ü" in (tmp_path / "x.json").read_text("utf-8")
