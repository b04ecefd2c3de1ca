"""Data at scale and hostile input: what stops a template, bounds memory, and makes a second start quick."""

import json
import shutil

import pytest
from test_data import NO, USER, YES, row, write_tokenizer

import data
import dpo
from extras import template

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{{ (6 + messages | length) ** 99999999 }}",
    "a long compilation": "{{ 7 ** 99999999 }}"}
GREEDY = {"a long text": "{{ 'a' * 10 ** 10 }}", "many": "{% for i in range(9999) %}{{ 'a' * 10 ** 6 }}{% endfor %}"}
CHAT = row([USER], [YES], [NO])


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.5)


def tokenizer_with(tmp_path, source):
    return data.Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", source))


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_template_is_stopped(tmp_path, second, kind):
    with pytest.raises(data.DataError, match="ran for more than 0.5 s on this conversation and was stopped"):
        tokenizer_with(tmp_path, ENDLESS[kind]).render([USER])


@pytest.mark.parametrize("kind", GREEDY)
def test_a_template_that_wants_much_memory_is_refused(tmp_path, kind):
    with pytest.raises(data.DataError, match="MiB for this conversation|characters for one conversation"):
        tokenizer_with(tmp_path, GREEDY[kind]).render([USER])


def test_after_a_stop_other_rows_are_rendered_and_after_three_none_is_tried(tmp_path, second):
    tokenizer = tokenizer_with(tmp_path, "{% if messages[0].content == 'x' %}" + ENDLESS["loops"] + "{% endif %}ok")
    outcomes = []
    for content in "xyxyxy":
        outcomes.append(data.attempt(tokenizer.render, [USER | {"content": content}]))
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
sys.path.insert(0, {str(data.Path(template.__file__).parent)!r})
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
    renderer = template.Renderer({"default": ""})
    monkeypatch.setattr(template, "__file__", str(program))
    for mode in "rw":
        (text,) = renderer.render("default", [([], False)], {"file": str(tmp_path / "open.py"), "mode": mode})
        assert text.startswith("refused: [Errno 24]")


def test_the_rendering_process_ends_with_its_tokenizer(tmp_path):
    tokenizer = tokenizer_with(tmp_path, "x")
    tokenizer.render([USER])
    process = tokenizer.renderer.process
    del tokenizer
    assert process.wait(10) is not None
