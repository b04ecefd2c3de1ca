"""Properties of data.py: rows, chat templates, token ids, the token store, batches, order."""

import gzip
import itertools
import json
import lzma
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch

import data
from parts.conversations import Renderer
from parts.rows import DataError, DroppedPair, find_files, read_rows
from parts.store import describe
from parts.turns import common_prefix_length

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
REAL_TOKENIZERS = ("smollm2", "qwen2_5", "phi3-mini-128k", "zephyr-infimm", "gpt2", "llava-1.5-7b", "stories260K")
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# Helpers


def say(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


USER, YES, NO = say("user", "x"), say("assistant", "yes"), say("assistant", "no")


def write_tokenizer(directory: Path, template: str | None = CHATML, bos: bool = True, **config) -> Path:
    """A tokenizer of bytes: ids 0, 1, 2 are <s>, </s>, <pad>, then one token per byte; no merges, so ids are text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<pad>", *alphabet]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **config}
    config |= {} if template is None else {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return data.Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("bytes")))


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data is not beside the checkout: ../shared/data/{name}")
    return path


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory):
    """name -> directory of a real tokenizer, unpacked once."""
    unpacked = {}

    def get(name: str) -> Path:
        if name == "stories260K":
            return shared_path("models/stories260K")
        if name not in unpacked:
            packed = shared_path(f"tokenizers/{name}")
            unpacked[name] = tmp_path_factory.mktemp(name)
            for path in packed.glob("*.xz"):
                (unpacked[name] / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        return unpacked[name]

    return get


def real_rows(name: str, count: int | None) -> list[dict]:
    return [row for _, row in itertools.islice(read_rows([shared_path(f"prefs/{name}")]), count)]


def write_rows(path: Path, rows: list, ending: str = "\n") -> Path:
    path.write_bytes("".join((row if isinstance(row, str) else json.dumps(row)) + ending for row in rows).encode())
    return path


def row(prompt="ab", chosen="cd", rejected="efg", **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def ids_of(pair: data.Pair) -> tuple[list, list, list]:
    return pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()


def build(path, tokenizer, cache, on_bad_row="stop", num_proc=None, **options) -> data.PairStore:
    files = path if isinstance(path, list) else [path]
    return data.build_store(files, tokenizer, data.DataOptions(**options), cache, on_bad_row, num_proc)


def random_pairs(seed: int, count: int, unshared: bool = True) -> list[data.Pair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        parts = [rng.integers(3, 99, rng.integers(low, 7)).astype(np.int32) for low in (0, 1, 1)]
        own = rng.integers(3, 99, rng.integers(0, 4)).astype(np.int32) if unshared and i % 3 == 2 else None
        pairs.append(data.Pair(*parts, own, float(i), math.nan))
    return pairs


# Token ids equal TRL's


def trl_pairs(rows: list[dict], tokenizer, max_length=None, mode="keep_start") -> list[tuple[list, list, list]]:
    """What TRL's own _prepare_dataset makes of the rows."""
    pytest.importorskip("trl")
    datasets, accelerate = pytest.importorskip("datasets"), pytest.importorskip("accelerate")
    from trl.trainer.dpo_trainer import DPOTrainer

    datasets.disable_progress_bars()
    accelerate.PartialState(cpu=True)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    return [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in prepared]


def assert_ids_equal_trl(rows, trl_rows, directory: Path, *other_forms):
    transformers = pytest.importorskip("transformers")
    theirs = trl_pairs(trl_rows, transformers.PreTrainedTokenizerFast.from_pretrained(directory))
    for form in (rows, *other_forms):
        ours = data.tokenize_rows(form, data.Tokenizer.load(directory), data.DataOptions(max_length=None))
        assert len(ours) == len(theirs) > 0
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert isinstance(mine, data.Pair), f"row {index}: {mine}"
            assert ids_of(mine) == other, f"row {index}"


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_ids_equal_trl_on_implicit_prompts_of_hh(name, real_tokenizer):
    rows = real_rows("hh_harmless_base_test.jsonl.gz", 200 if name in ("smollm2", "stories260K") else 30)
    assert_ids_equal_trl(rows, rows, real_tokenizer(name))


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_ids_equal_trl_on_explicit_prompts_of_ultrafeedback(name, real_tokenizer):
    rows = real_rows("ultrafeedback-train_clean.jsonl.gz", 100 if name in ("smollm2", "stories260K") else 20)
    assert_ids_equal_trl(rows, rows, real_tokenizer(name))


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "phi3-mini-128k", "zephyr-infimm"])
def test_ids_equal_trl_on_conversations_from_llamafactory(name, real_tokenizer):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = real_rows("llamafactory-dpo_en_demo.json.gz", 300)
    rows = rows[: 100 if name == "smollm2" else 20] + rows[-10:]  # of several turns, with a system message
    turns = [{k: v if isinstance(v, list) else [v] for k, v in r.items()} for r in rows]
    as_chat = [{k: [say(roles[m["from"]], m["value"]) for m in v] for k, v in r.items()} for r in turns]
    trl_rows = [{"prompt": r.pop("conversations"), **r} for r in as_chat]
    assert_ids_equal_trl(rows, trl_rows, real_tokenizer(name), trl_rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "zephyr-infimm"])
@pytest.mark.parametrize("file", ["hh_harmless_base_test", "ultrafeedback-train_clean", "ultrafeedback-eval_clean"])
def test_ids_equal_trl_on_whole_files(file, name, real_tokenizer):
    rows = real_rows(f"{file}.jsonl.gz", None)
    usable = [r for r in rows if r["chosen"] and r["rejected"] and r["chosen"] != r["rejected"]]
    assert len(usable) > 0.99 * len(rows)
    assert_ids_equal_trl(usable, usable, real_tokenizer(name))


def test_ids_equal_trl_on_implicit_conversations_tools_and_template_kwargs(tmp_path):
    template = (
        "{{ bos_token }}{% if tools %}T{{ tools | tojson }}{% endif %}{{ flavour }}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    directory = write_tokenizer(tmp_path, template)
    user, yes, no = say("user", "hé?"), say("assistant", "yes"), say("assistant", "no")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    tools = [{"type": "function", "function": {"name": "look", "description": "<&>"}}]
    for rows in (
        [{"chosen": [user, yes], "rejected": [user, no]}],
        [{"chosen": [user, yes], "rejected": [user, yes, user, no]}],
        [row([user], [yes], [no], tools=tools)],
        [row([user], [yes], [no], tools=json.dumps(tools))],
        [row([user], [yes], [no], chat_template_kwargs={"flavour": "sour"})],
        [row([user], [{"role": "assistant", "content": None, "tool_calls": [call]}], [no])],
        [row([say("system", "s"), user, yes, user], [no], [yes, user, no])],
    ):
        assert_ids_equal_trl(rows, json.loads(json.dumps(rows)), directory)


@pytest.mark.parametrize("bos", [True, False])
def test_ids_equal_trl_on_awkward_texts(bos, tmp_path):
    directory = write_tokenizer(tmp_path, bos=bos)
    rows = [
        row("", "yes", "no"), row("p ", " yes", "no "), row("a</s>", "b</s>", "c"), row("<s>x", "é", "🙂\u2028\r\n"),
        row("p", "</s>", "</s></s>"), row("p", " ", "\t"),
    ]  # fmt: skip
    assert_ids_equal_trl(rows, rows, directory)
    implicit = [
        {"chosen": "Q: a? A: yes", "rejected": "Q: a? A: no"}, {"chosen": "ab", "rejected": "abc"},
        {"chosen": "abc", "rejected": "ab"}, {"chosen": "x y", "rejected": "x z"}, {"chosen": "cax", "rejected": "cbx"},
    ]  # fmt: skip
    assert_ids_equal_trl(implicit, implicit, directory)


@pytest.mark.parametrize("chosen, rejected", [("yes ", "no"), ("ax", "bx"), ("a", "ab")])
def test_texts_that_share_no_beginning_have_no_prompt_and_are_refused(chosen, rejected, tokenizer):
    """TRL trains on an empty prompt here, or (its index -1) on all of a text that ends with a space."""
    with pytest.raises(DataError, match='the prompt is empty: "prompt" is missing, and chosen and rejected share no'):
        data.tokenize_pair({"chosen": chosen, "rejected": rejected}, tokenizer, data.DataOptions())
    given = data.tokenize_pair({"prompt": "", "chosen": chosen, "rejected": rejected}, tokenizer, data.DataOptions())
    assert tokenizer.decode(given.prompt_ids).startswith("<s>"), "an empty prompt that is given is meant"


@pytest.mark.parametrize("name", ["gpt-2", "phi-3", "qwen2"])
def test_ids_equal_llama_cpp_golden_vocabularies(name, real_tokenizer):
    folder = shared_path("tokenizers/golden")
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    expected = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    directory = real_tokenizer({"gpt-2": "gpt2", "phi-3": "phi3-mini-128k", "qwen2": "qwen2_5"}[name])
    ours = data.Tokenizer.load(directory).encode_batch(texts, add_special_tokens=False)
    assert len(texts) > 40
    for text, mine, line in zip(texts, ours, expected, strict=False):
        assert mine == [int(number) for number in line.split()], repr(text)


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_tokenizer_equals_transformers(name, real_tokenizer):
    transformers = pytest.importorskip("transformers")
    directory = real_tokenizer(name)
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(directory), data.Tokenizer.load(directory)
    specials = "".join(filter(None, [theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token]))
    texts = [
        "",
        " ",
        "  a  b\n\n",
        "Hello, wörld! 🙂 日本語\u200b",
        specials + "x " + specials,
        "<image>\x00\t",
        "a" * 500,
    ]
    for text in texts:
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert ours.size >= len(theirs) and ours.size > max(theirs.get_vocab().values())
    for token in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, token) == getattr(theirs, token)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.decode(ours.encode("Once upon a time"), True) == theirs.decode(theirs.encode("Once upon a time"), True)


def test_special_tokens_named_only_by_the_configuration_are_single_tokens_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    token = {
        "content": "<new>",
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
    }
    configs = [
        {"eos_token": "<end>", "additional_special_tokens": ["<more>"], "image_token": "<img>"},
        {"eos_token": {"content": "<end>", "__type": "AddedToken"}, "extra_special_tokens": {"video_token": "<vid>"}},
        {"added_tokens_decoder": {"300": token}, "eos_token": "<new>"},
        {"split_special_tokens": True},
    ]
    for number, config in enumerate(configs):
        directory = write_tokenizer(
            tmp_path / str(number), "{{ video_token }}{{ image_token }}{{ eos_token }}", **config
        )
        (directory / "special_tokens_map.json").write_text(
            json.dumps({"pad_token": {"content": "<p>", "lstrip": False}})
        )
        theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(directory), data.Tokenizer.load(directory)
        text = "a<end>b<more><img><vid><new></s><p>c<pad>"
        assert ours.encode(text) == theirs(text)["input_ids"], config
        assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token), config
        chat = [say("user", "x")]
        assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False), config


@pytest.mark.parametrize("listed", [False, True])
def test_flags_of_added_tokens_are_those_of_transformers(listed, tmp_path):
    transformers = pytest.importorskip("transformers")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    strip, fresh = {"content": "<strip>", **flags}, {"content": "<fresh>", **flags, "rstrip": True}
    config = {"added_tokens_decoder": {"259": strip, "260": fresh}} if listed else {}
    directory = write_tokenizer(tmp_path, mask_token="<strip>", **config)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken("<strip>", lstrip=True, rstrip=True)])
    backend.save(str(directory / "tokenizer.json"))
    text = "a  <strip>  b  <fresh>  c"
    ours, theirs = data.Tokenizer.load(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text), True) == theirs.decode(theirs(text)["input_ids"], True)


def test_padding_and_truncation_left_in_tokenizer_json_are_off(tokenizer, tmp_path):
    directory = write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(directory / "tokenizer.json"))
    texts = ["a", "a long text"]
    assert data.Tokenizer.load(directory).encode_batch(texts) == tokenizer.encode_batch(texts)


# Chat templates


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für einen Ort <b>&</b>",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "wo"}},
            "required": ["place"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}
CONVERSATIONS = {
    "one turn": [say("user", "Hi")],
    "answered": [say("user", "Hi"), say("assistant", "Hello")],
    "system": [say("system", "Be brief."), say("user", " Hi "), say("assistant", "Hello\n")],
    "several turns": [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d"), USER],
    "empty content": [say("user", ""), say("assistant", "")],
    "non-ASCII": [say("user", "日本語 <|im_end|> & \"quoted\" 'x' </s>"), say("assistant", "🙂\u2028{{ x }}")],
    "thinking": [say("user", "a"), say("assistant", "<think>\nhm\n</think>\n\nb"), say("user", "c")],
    "reasoning field": [say("user", "a"), say("assistant", "b", reasoning="because")],
    "tool call": [say("user", "w?"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  say("tool", "sunny", name="weather", tool_call_id="call12345"), say("assistant", "It is sunny.")],
    "tool call and text": [say("user", "w?"), say("assistant", "", tool_calls=[CALL]),
                           say("tool", '{"t": 3}', tool_call_id="call12345")],
    "two assistants": [say("user", "a"), say("assistant", "b"), say("assistant", "c")],
    "parts": [say("user", [{"type": "text", "text": "seen"}])],
}  # fmt: skip


def rendered(render, *args, **kwargs):
    """The text, or the fact that the template refused."""
    try:
        return render(*args, **kwargs)
    except Exception as error:
        return "refused", "error" if isinstance(error, DataError) else type(error).__name__


def template_files() -> list[Path]:
    return sorted((SHARED / "templates").glob("*.jinja"))


@pytest.mark.parametrize("path", template_files() or [None], ids=lambda path: path.stem if path else "none")
def test_every_template_renders_as_in_transformers(path, real_tokenizer, monkeypatch):
    transformers = pytest.importorskip("transformers")
    source = (path or shared_path("templates/*.jinja")).read_text("utf-8")
    directory, compared = real_tokenizer("smollm2"), 0
    ours = data.Tokenizer.load(directory, chat_template=source)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    options = itertools.product(CONVERSATIONS, (None, [TOOL]), (False, True), ({}, {"enable_thinking": False}))
    for name, tools, prompt, kwargs in options:
        messages = CONVERSATIONS[name]
        mine = rendered(ours.render, messages, prompt, tools=tools, **kwargs)
        other = rendered(
            theirs.apply_chat_template, messages, tools=tools, chat_template=source,
            add_generation_prompt=prompt, tokenize=False, **kwargs,
        )  # fmt: skip
        assert mine == other or (mine[0] == other[0] == "refused"), (name, tools is not None, prompt)
        compared += isinstance(mine, str)
    assert compared > 20


def test_generation_tag_loop_controls_namespace_and_tojson_work_as_in_transformers(real_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = """
    {%- set ns = namespace(seen=0, last='') %}
    {% for m in messages %}
        {% if m.role == 'system' %}{% continue %}{% endif %}
        {% set ns.seen = ns.seen + 1 %}
        {% generation %}{% set inner = m.content %}{{ inner }}|{{ ns.seen }}{% endgeneration %}
{{ {'b': m.content or 0, 'a': [1, none]} | tojson(indent=2) }} {{ dict(x=1) }} {{ inner is defined }}
        {% if ns.seen > 2 %}{% break %}{% endif %}
    {% endfor %}
    {{- bos_token }}{{ strftime_now('%%') }}{{ documents is none }}{{ tools is none }}"""
    directory = write_tokenizer(tmp_path, source)
    ours, theirs = data.Tokenizer.load(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    for messages in CONVERSATIONS.values():
        assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_templates_are_found_where_transformers_finds_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    layouts = {
        "config": ("C", {}),
        "list": (named, {}),
        "file wins": ("C", {"chat_template.jinja": "F"}),
        "folder": (None, {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "X"}),
    }
    for name, (config, files) in layouts.items():
        directory = write_tokenizer(tmp_path / name, config)
        for file, text in files.items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_text(text)
        ours, theirs = data.Tokenizer.load(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        for tools in (None, [], [TOOL]):
            other = theirs.apply_chat_template([say("user", "x")], tools=tools, tokenize=False)
            assert ours.render([say("user", "x")], tools=tools) == other, (name, tools)


def test_a_chosen_template_is_a_text_a_file_a_name_or_a_directory(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "short", "template": "S"}]
    directory = write_tokenizer(tmp_path / "t", named)
    (tmp_path / "my.jinja").write_text("F")
    other = write_tokenizer(tmp_path / "o", "O")
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    (other / "chat_template.jinja").write_text("O")
    choices = {"{{ 'x' }}": "x", str(tmp_path / "my.jinja"): "F", "short": "S", str(other): "O"}
    digests = set()
    for choice, expected in choices.items():
        tokenizer = data.Tokenizer.load(directory, chat_template=choice)
        assert tokenizer.render([say("user", "u")]) == expected
        digests.add(tokenizer.digest)
        saved = tmp_path / f"saved{len(digests)}"
        tokenizer.save(saved)
        assert data.Tokenizer.load(saved).render([say("user", "u")]) == expected
        assert data.Tokenizer.load(saved).templates == tokenizer.templates
    tokenizer = data.Tokenizer.load(other, chat_template="{{ 'x' }}")
    tokenizer.save(tmp_path / "over")
    assert data.Tokenizer.load(tmp_path / "over").render([say("user", "u")], tools=[TOOL]) == "x"
    assert len(digests) == len(choices)
    with pytest.raises(DataError, match="neither a file, nor a template, nor one of"):
        data.Tokenizer.load(directory, chat_template="nowhere.jinja")


def test_the_sandbox_refuses_escapes():
    escapes = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__globals__ }}{{ dict.mro() }}",
        "{{ '{0.__class__}'.format(messages) + raise_exception.__code__ }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ]
    messages = [say("user", "x")]
    for source in escapes:
        renderer = Renderer({"default": source}, ROOT)
        with pytest.raises(DataError, match="refused"):
            renderer.render([(messages, False)], {"tools": None})
        assert messages == [say("user", "x")]


def test_a_template_sees_copies_and_its_own_error_text_is_shown(tmp_path):
    tokenizer = data.Tokenizer.load(write_tokenizer(tmp_path / "a", "{{ raise_exception('roles must alternate') }}"))
    chat = row([say("user", "x")], [say("assistant", "y")], [say("assistant", "z")])
    with pytest.raises(DataError, match="refused the conversation: roles must alternate"):
        data.tokenize_pair(chat, tokenizer, data.DataOptions())
    broken = data.Tokenizer.load(write_tokenizer(tmp_path / "b", "a\n{% if %}"))
    with pytest.raises(DataError, match="broken at its line 2"):
        data.tokenize_pair(chat, broken, data.DataOptions())
    none = data.Tokenizer.load(write_tokenizer(tmp_path / "c", None))
    with pytest.raises(DataError, match="has no chat template.*--chat_template"):
        data.tokenize_pair(chat, none, data.DataOptions())


def test_saving_copies_the_tokenizer_byte_for_byte(tmp_path, real_tokenizer):
    source = real_tokenizer("qwen2_5")
    tokenizer = data.Tokenizer.load(source)
    (tmp_path / "there").mkdir()
    tokenizer.save(tmp_path / "there")
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert all((source / name).read_bytes() == (tmp_path / "there" / name).read_bytes() for name in names)
    assert data.Tokenizer.load(tmp_path / "there").digest == tokenizer.digest
    tokenizer.save(source)  # onto itself


def test_the_digest_of_a_tokenizer_follows_its_files(tmp_path):
    first = data.Tokenizer.load(write_tokenizer(tmp_path / "a")).digest
    assert first == data.Tokenizer.load(write_tokenizer(tmp_path / "b")).digest
    assert first != data.Tokenizer.load(write_tokenizer(tmp_path / "c", bos=False)).digest
    assert first != data.Tokenizer.load(write_tokenizer(tmp_path / "d", CHATML + " ")).digest
    assert first != data.Tokenizer.load(write_tokenizer(tmp_path / "e", eos_token="<pad>")).digest


def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer.json"):
        data.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer file"):
        data.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json: broken JSON"):
        data.Tokenizer.load(tmp_path)


# Reading files


def test_find_files_takes_files_globs_directories_and_several(tmp_path):
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", "d.json.gz", "notes.txt", "x[1].jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "e.jsonl").write_text("")

    def names(spec):
        return [path.name for path in find_files(spec)]

    assert names(str(tmp_path / "b.jsonl")) == ["b.jsonl"]
    assert names(str(tmp_path / "x[1].jsonl")) == ["x[1].jsonl"]
    assert names([tmp_path / "b.jsonl", str(tmp_path / "a.json"), str(tmp_path / "b*")]) == ["b.jsonl", "a.json"]
    assert names(str(tmp_path / "?.json*")) == ["a.json", "b.jsonl", "c.jsonl.gz", "d.json.gz"]
    assert names(str(tmp_path / "**/e*")) == ["e.jsonl"]
    assert names(tmp_path / "folder.jsonl") == ["e.jsonl"]
    for spec, message in (("none.jsonl", "no such file"), ("no*.jsonl", "no such file")):
        with pytest.raises(DataError, match=message):
            find_files(str(tmp_path / spec))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="in this directory"):
        find_files(tmp_path / "empty")


def test_a_directory_yields_its_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in find_files(tmp_path)] == ["a.json", "b.jsonl", "c.jsonl.gz"]


def test_rows_are_the_same_from_lines_arrays_gzip_crlf_bom_and_parquet(tmp_path):
    rows = [row(chosen="ü🙂", rejected=str(i), prompt=f"p\n{i}") for i in range(5)]
    lines = "\n".join(json.dumps(r) for r in rows)
    raw = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    forms = {
        "a.jsonl": lines.encode(), "no_ascii.jsonl": raw.encode(), "crlf.jsonl": lines.replace("\n", "\r\n").encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + raw.encode(), "blank.jsonl": ("\n\n" + lines + "\n \n").encode(),
        "z.jsonl.gz": gzip.compress(lines.encode()), "unnamed_gzip.jsonl": gzip.compress(lines.encode()),
        "two_members.jsonl.gz": gzip.compress(lines[:100].encode()) + gzip.compress(lines[100:].encode()),
        "array.json": json.dumps(rows).encode(),
        "bom_array.json": b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode(),
        "array.json.gz": gzip.compress(("  \n" + json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()),
        "crlf_array.json": json.dumps(rows, indent=2).replace("\n", "\r\n").encode(),
        "lines.json": lines.encode(),
    }  # fmt: skip
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        found = list(read_rows([tmp_path / name]))
        assert [r for _, r in found] == rows, name
    assert [place for place, _ in read_rows([tmp_path / "blank.jsonl"])][:2] == [
        f"{tmp_path}/blank.jsonl:{i}" for i in (3, 4)
    ]
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = list(read_rows([tmp_path / "p.parquet"]))
    assert [r for _, r in found] == rows and found[4][0].endswith("p.parquet:5")


def test_elements_of_an_array_are_named_by_the_line_where_they_begin(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row(), row("x"), 3, row("y")], indent=2))
    found = list(read_rows([tmp_path / "a.json"]))
    assert [place.rpartition(":")[2] for place, _ in found] == ["2", "7", "12", "13"]
    assert isinstance(found[2][1], DataError) and "int" in str(found[2][1])


def test_a_long_array_is_read_piece_by_piece(tmp_path):
    rows = [row("p" * random.Random(i).randrange(300_000), str(i), 'é\n"]}' * i) for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=3))
    assert [r for _, r in read_rows([tmp_path / "a.json"])] == rows


def test_an_array_is_held_to_the_grammar_of_json(tmp_path):
    one = json.dumps(row())
    for text in ("[%s %s]", "[%s,]", "[,%s]", "[%s", "[%s] %s", "[[%s]", "[%s}", "[%s,,%s]"):
        (tmp_path / "a.json").write_text(text.replace("%s", one))
        found = [r for _, r in read_rows([tmp_path / "a.json"])]
        assert isinstance(found[-1], DataError), text
    for text, count in (("[]", 0), (" [\n]\n", 0), ("[%s]", 1), ("[%s\n,%s ]\n", 2)):
        (tmp_path / "a.json").write_text(text.replace("%s", one))
        assert [r for _, r in read_rows([tmp_path / "a.json"])] == [row()] * count, text
    (tmp_path / "a.json").write_text("[" + " " * 65530 + "123456789, " + one + "]")  # a number across two pieces
    number, good = (r for _, r in read_rows([tmp_path / "a.json"]))
    assert isinstance(number, DataError) and good == row()


def test_rows_before_the_damage_of_a_compressed_array_are_read(tmp_path):
    rows = [row(random.Random(i).randbytes(500).hex()) for i in range(1000)]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode())[:-1000])
    *found, damage = (r for _, r in read_rows([tmp_path / "a.json.gz"]))
    assert found == rows[: len(found)] and len(found) > 500 and "damaged" in str(damage)


BAD_LINES = {
    "broken JSON": (b'{"prompt": "a", "chosen"', "broken JSON"),
    "two objects": (b"{} {}", "broken JSON.*one JSON object"),
    "bad UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 .byte 13 of the line."),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "a list": (b"[1]", "a JSON list, not an object"),
    "a number": (b"7", "a JSON int, not an object"),
    "too deep": (b"[" * 100_000, "broken JSON"),
    "too long a number": (b'{"a": ' + b"1" * 5000 + b"}", "broken JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_the_next_one_is_read(name, tmp_path):
    line, message = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(json.dumps(row()).encode() + b"\n" + line + b"\n" + json.dumps(row()).encode())
    places, rows = zip(*read_rows([tmp_path / "a.jsonl"]), strict=True)
    assert places == tuple(f"{tmp_path}/a.jsonl:{i}" for i in (1, 2, 3))
    assert rows[0] == rows[2] == row()
    with pytest.raises(DataError, match=message):
        raise rows[1]


def test_damaged_files_are_named(tmp_path):
    lines = "".join(json.dumps(row(str(i))) + "\n" for i in range(2000)).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    flipped = bytearray(gzip.compress(lines))
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
    (tmp_path / "garbled.jsonl.gz").write_bytes(gzip.compress(lines)[:10] + b"\xff" * 100)
    for name in ("cut", "flipped", "garbled"):
        found = [str(r) for _, r in read_rows([tmp_path / f"{name}.jsonl.gz"]) if isinstance(r, DataError)]
        assert found and "damaged" in found[-1], name
    (tmp_path / "cut.json").write_text(json.dumps([row(), row()])[:-20])
    *_, (_, last) = read_rows([tmp_path / "cut.json"])
    assert "broken JSON in the array" in str(last)
    (tmp_path / "bytes.json").write_bytes(json.dumps([row(), row()]).encode()[:-9] + b'\xff"}]')
    *_, (_, last) = read_rows([tmp_path / "bytes.json"])
    assert "not UTF-8" in str(last)
    (tmp_path / "closed.jsonl").write_text("")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows([tmp_path]))


# Bad rows


BAD_ROWS = {
    "missing chosen": ({"prompt": "a", "rejected": "b"}, '"chosen" is missing; each row needs prompt, chosen, reje'),
    "missing rejected": ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    "prompt alone": ({"prompt": "a"}, '"chosen" is missing'),
    "null": (row(rejected=None), '"rejected" is null; it must be text or a list of messages'),
    "null prompt": (row(prompt=None), '"prompt" is null'),
    "number": (row(chosen=3), '"chosen" is a int'),
    "list of texts": (row(chosen=["b"]), '"chosen".0. is a str; a message is'),
    "text and conversation": (row(chosen=[YES]), "one of chosen and rejected is text"),
    "text prompt, conversations": (row("a", [YES], [NO]), "one of prompt and chosen is text"),
    "chat prompt, texts": (row([USER], "a", "b"), "one of prompt and chosen is text"),
    "empty chosen": (row(chosen=""), 'the completion of "chosen" is empty'),
    "empty rejected": (row(rejected=""), 'the completion of "rejected" is empty'),
    "empty list": (row([USER], [], [NO]), 'the completion of "chosen" is empty'),
    "empty message": (row([USER], [YES], [say("assistant", "")]), 'the completion of "rejected" is empty'),
    "empty parts": (row([USER], [YES], [say("assistant", [])]), 'the completion of "rejected" is empty'),
    "same": (row("a", "b", "b"), "chosen and rejected are the same;"),
    "same implicit": ({"chosen": "b", "rejected": "b"}, "chosen and rejected are the same;"),
    "same conversations": (row([USER], [YES], [dict(YES)]), "chosen and rejected are the same;"),
    "same tokens": (row("a", "b", "b</s>"), "chosen and rejected are the same tokens"),
    "unknown role": (row([say("robot", "x")], [YES], [NO]), '"prompt".0. has the role .robot.; known are system'),
    "no role": (row([{"content": "x"}], [YES], [NO]), "has the role None"),
    "role of wrong type": (row([say(["user"], "x")], [YES], [NO]), "has the role .'user'."),
    "unknown from": (row([{"from": "x", "value": "y"}], [YES], [NO]), "is from 'x'; known are human"),
    "from of wrong type": (row([{"from": ["x"], "value": "y"}], [YES], [NO]), "is from"),
    "no content": (row([{"role": "user"}], [YES], [NO]), "content of type NoneType"),
    "content of wrong type": (row([say("user", 3)], [YES], [NO]), "content of type int"),
    "bad parts": (row([say("user", [3])], [YES], [NO]), "content of type list"),
    "function call": (row([{"from": "function_call", "value": "no JSON"}], [YES], [NO]), "is no function call"),
    "no shared message": ({"chosen": [USER, YES], "rejected": [NO, YES]}, "the prompt is empty"),
    "empty prompt": (row([], [YES], [NO]), "the prompt is empty"),
    "tools": (row([USER], [YES], [NO], tools="{"), '"tools" is broken JSON'),
    "tools of wrong type": (row([USER], [YES], [NO], tools=["x"]), '"tools" must be a list of objects'),
    "kwargs": (row([USER], [YES], [NO], chat_template_kwargs=3), '"chat_template_kwargs" must be an object'),
    "reserved kwargs": (row([USER], [YES], [NO], chat_template_kwargs={"messages": 1}), "without any of messages"),
    "system of wrong type": (row([USER], [YES], [NO], system=3), '"system" is a int'),
    "two systems": (row([say("system", "a"), USER], [YES], [NO], system="b"), "begins with another system message"),
    "system beside text": (row(system="b"), '"system" is set, but the prompt is text'),
    "tools beside text": (row(tools=[{}]), '"tools" is set, but the prompt is text'),
    "images": (row(images=["a.jpg"]), "the row has images"),
    "image parts": (row([say("user", [{"type": "image"}])], [YES], [NO]), "the row has images"),
    "videos": (row(videos=["a.mp4"]), "the row has videos, which no model here reads"),
    "video parts": (row([say("user", [{"type": "video"}])], [YES], [NO]), "the row has videos"),
    "audio": (row(audios=["a.wav"]), "the row has audio, which no model here reads"),
    "audio parts": (row([say("user", [{"type": "input_audio"}])], [YES], [NO]), "the row has audio"),
    "lone surrogate": (row("\ud83d"), "half of a surrogate pair"),
    "prompt by another name": (
        {"question": "q?", "chosen": "a", "rejected": "ab"},
        '"prompt" is missing, but "question" is there; python -m extras.convert IN OUT'),
    "prompt in a chat": (
        {"question": "What?", "chosen": [say("system", "s"), YES], "rejected": [say("system", "s"), NO]},
        'but "question" is there; python -m extras.convert'),
    "prompt as messages": ({"messages": [USER], "chosen": "ab", "rejected": "ac"}, 'but "messages" is there'),
    "answers by another name": (
        {"prompt": "a", "chosen_response": "b", "rejected_response": "c"},
        '"chosen" is missing.*; python -m extras.convert IN OUT'),
    "OpenAI's without messages": ({"input": {}, "preferred_output": [YES], "non_preferred_output": [NO]},
                                  '"prompt" is null'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_with_its_place_or_is_skipped_and_listed(name, tokenizer, tmp_path):
    bad, message = BAD_ROWS[name]
    path = write_rows(tmp_path / "prefs.jsonl", [row(), row("x"), bad, row("y")])
    with pytest.raises(DataError, match=message) as caught:
        build(path, tokenizer, tmp_path / "cache")
    assert str(caught.value).startswith(f"{path}:3: ")
    assert not list((tmp_path / "cache").iterdir())
    store = build(path, tokenizer, tmp_path / "cache", "skip")
    assert len(store) == 3 and store.report["counts"] == {"kept": 3, "bad": 1}
    assert [store.where(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 2, 4)]
    assert store.report["bad_rows"][0].startswith(f"{path}:3: ")
    assert any(line == "skipped " + str(caught.value) for line in describe(store.report))


@pytest.mark.parametrize("name", BAD_LINES)
def test_an_unreadable_line_stops_or_is_skipped(name, tokenizer, tmp_path):
    line, message = BAD_LINES[name]
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        build(path, tokenizer, tmp_path / "cache")
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(build(path, tokenizer, tmp_path / "cache", "skip")) == 1


def test_no_rows_and_no_pair_left_are_errors(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "array.json").write_text("[ ]")
    for name in ("empty.jsonl", "array.json"):
        for mode in ("stop", "skip"):
            with pytest.raises(DataError, match="no rows"):
                build(tmp_path / name, tokenizer, tmp_path / "cache", mode)
    path = write_rows(tmp_path / "bad.jsonl", [row(chosen=""), row("long prompt")])
    with pytest.raises(DataError, match="no pair is left.*skipped, as unusable: 1 .*dropped, as the prompt alone"):
        build(path, tokenizer, tmp_path / "cache", "skip", max_length=3)
    assert not list((tmp_path / "cache").iterdir())


def test_a_text_needs_an_eos_token(tmp_path):
    tokenizer = data.Tokenizer.load(write_tokenizer(tmp_path, eos_token=None))
    with pytest.raises(DataError, match="no eos_token"):
        data.tokenize_pair(row(), tokenizer, data.DataOptions())


def test_scores_are_read_under_their_usual_names(tokenizer):
    def ratings(**more):
        pair = data.tokenize_pair(row(**more), tokenizer, data.DataOptions())
        return pair.chosen_rating, pair.rejected_rating

    assert ratings(chosen_score=8, rejected_score=2.5) == (8.0, 2.5)
    assert ratings(score_chosen=8, score_rejected=2.5) == (8.0, 2.5)
    assert ratings(chosen_rating=8, rejected_rating=2.5) == (8.0, 2.5)
    from decimal import Decimal

    assert ratings(chosen_score=Decimal("8.5"), rejected_score=2) == (8.5, 2)
    assert ratings(chosen_score=8, rejected_score=None)[0] == 8 and math.isnan(ratings(chosen_score=8)[1])
    assert all(map(math.isnan, ratings()))


UNREAD = {
    "text": ({"chosen_score": "9 of 10", "rejected_score": 2}, '"chosen_score" is .9 of 10.; a score is a finite number'),
    "infinite": ({"score_chosen": math.inf, "score_rejected": 1}, '"score_chosen" is inf'),
    "nan": ({"chosen_score": 1, "rejected_score": math.nan}, '"rejected_score" is nan'),
    "huge": ({"score_chosen": 1, "score_rejected": 10**400}, '"score_rejected" is 1000'),
    "bool": ({"chosen_score": 1, "rejected_score": True}, '"rejected_score" is True'),
    "one": ({"chosen_score": 1}, '"rejected_score" is missing'),
    "null": ({"chosen_rating": None, "rejected_rating": None}, "no chosen_score and rejected_score"),
    "none": ({}, "no chosen_score and rejected_score"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_score_that_is_none_stops_only_the_losses_that_read_it(name, tokenizer, tmp_path):
    from parts.checks import check_ratings
    from parts.config import DPOConfig

    more, message = UNREAD[name]
    sound = row("y", chosen_score=2, rejected_score=1)
    store = build(write_rows(tmp_path / "p.jsonl", [sound, row(**more), sound]), tokenizer, tmp_path / "cache")
    assert len(store) == 3 and np.isnan(store.ratings[1]).any() and store.ratings[2].tolist() == [2, 1]
    check_ratings(DPOConfig(loss_type=["sigmoid"]), store)
    for loss in ("odpo", "rpo_sq"):
        with pytest.raises(ValueError, match=message) as caught:
            check_ratings(DPOConfig(loss_type=[loss]), store)
        assert str(caught.value).startswith(f"{tmp_path}/p.jsonl:2: ")
        assert str(caught.value).endswith(f"which --loss_type {loss} reads (1 such rows)")


def test_columns_that_nobody_reads_may_hold_anything(tokenizer, tmp_path):
    """Times, bytes, decimals, nan, as parquet and Arrow have them."""
    import datetime
    from decimal import Decimal

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    more = {"at": datetime.datetime(2024, 1, 1), "day": datetime.date(2024, 1, 1), "raw": b"\xff", "none": None,
            "price": Decimal("1.5"), "chosen_score": math.nan, "took": datetime.timedelta(1)}
    parquet.write_table(pyarrow.Table.from_pylist([row(**more)] * 3), tmp_path / "p.parquet")
    store = build(tmp_path / "p.parquet", tokenizer, tmp_path / "cache")
    assert ids_of(store[2]) == ids_of(data.tokenize_pair(row(), tokenizer, data.DataOptions()))


def test_forms_of_a_conversation_are_the_same_pair(tokenizer):
    whole = row([say("system", "s"), USER], [YES], [NO])
    expected = ids_of(data.tokenize_pair(whole, tokenizer, data.DataOptions()))
    value = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = {k: [{"from": value[m["role"]], "value": m["content"]} for m in v] for k, v in whole.items()}
    forms = [
        row([USER], [YES], [NO], system="s"),
        row([say("system", "s"), USER], [YES], [NO], system="s"),
        {"chosen": [say("system", "s"), USER, YES], "rejected": [say("system", "s"), USER, NO]},
        {"prompt": "x", "chosen": [say("system", "s"), USER, YES], "rejected": [say("system", "s"), USER, NO]},
        {"conversations": whole["prompt"], "chosen": YES, "rejected": NO},
        sharegpt,
        {"conversations": sharegpt["prompt"], "chosen": sharegpt["chosen"][0], "rejected": sharegpt["rejected"]},
        dict(reversed(whole.items())),
        row([dict(reversed(m.items())) for m in whole["prompt"]], [YES], [NO], system=None, tools=None, images=[]),
    ]
    for form in forms:
        assert ids_of(data.tokenize_pair(form, tokenizer, data.DataOptions())) == expected, form


def test_from_value_function_calls_and_observations_become_tool_messages():
    from parts.turns import with_role

    call = with_role({"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}, "here")
    assert call == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    assert with_role({"from": "observation", "value": "3"}, "here") == say("tool", "3")


def test_rows_of_random_shape_are_tokenized_or_refused_with_a_message(tokenizer):
    rng, outcomes = random.Random(0), []
    keys = (
        "prompt",
        "chosen",
        "rejected",
        "conversations",
        "tools",
        "chat_template_kwargs",
        "system",
        "images",
        "question",
    )
    words = ("", "a", " ", "x y", "</s>", "\ud800", "user", "assistant", "{", "[]", '{"name": 1, "arguments": {}}')
    names = ("role", "content", "from", "value", "tool_calls", "thinking", "name", "type", "text")

    def value(depth: int):
        kind = rng.randrange(9 if depth < 3 else 4)
        if kind < 4:
            return rng.choice([None, True, 0, -3.5, 10**400, [], {}, *words])
        if kind < 6:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if kind < 7:
            return {rng.choice(names): value(depth + 1) for _ in range(rng.randrange(4))}
        roles, contents = ("user", "assistant", "system"), ("a", "b", "", None, [{"type": "text", "text": "t"}])
        return [say(rng.choice(roles), rng.choice(contents)) for _ in range(rng.randrange(1, 4))]

    for _ in range(8000):
        some = {key: value(0) for key in keys if rng.random() < (0.8 if key in keys[:3] else 0.1)}
        mode = rng.choice(["keep_start", "keep_end"])
        options = data.DataOptions(
            rng.choice([None, 1, 2, 5, 50]), truncation_mode=mode, need_rejected=rng.random() < 0.8
        )
        (outcome,) = data.tokenize_rows([some], tokenizer, options)
        outcomes.append("pair" if isinstance(outcome, data.Pair) else str(outcome)[-30:])
        if isinstance(outcome, data.Pair):
            assert data.collate([outcome]).lengths[0, 0] > 0
    assert outcomes.count("pair") > 15 and len(set(outcomes)) > 12


# Where completions begin


def test_a_completion_begins_where_the_tokens_part_and_such_rows_are_counted(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}, [("b", "c")]))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = data.Tokenizer.load(tmp_path)
    pair = data.tokenize_pair(row("ab", "ca", "a"), tokenizer, data.DataOptions())  # "b" + "c" merge
    assert ids_of(pair) == ([1], [4, 1, 0], [2, 1, 0]) and pair.flags == ("unclean_prefix",)
    store = build(
        write_rows(tmp_path / "r.jsonl", [row("ab", "b", "a"), row("ab", "ca", "a")]), tokenizer, tmp_path / "c"
    )
    assert store.report["counts"] == {"kept": 2, "unclean_prefix": 1}
    assert store.report["first"]["unclean_prefix"].endswith("r.jsonl:2")
    assert any(
        "last tokens change when a completion follows, which then begins there: 1 (" in line
        for line in describe(store.report)
    )


def test_text_completions_end_with_one_eos_and_chats_with_their_templates_own(tokenizer):
    assert (
        ids_of(data.tokenize_pair(row("a", "b", "c</s>"), tokenizer, data.DataOptions()))[1][-1]
        == tokenizer.eos_token_id
    )
    pair = data.tokenize_pair(row("a", "b", "c</s>"), tokenizer, data.DataOptions())
    assert tokenizer.decode(pair.prompt_ids) == "<s>a" and tokenizer.decode(pair.rejected_ids) == "c</s>"
    chat = data.tokenize_pair(row([USER], [YES], [NO]), tokenizer, data.DataOptions())
    assert tokenizer.decode(chat.prompt_ids) == "<|user|>x</s>\n<|assistant|>"  # no BOS: the template writes none
    assert tokenizer.decode(chat.chosen_ids) == "yes</s>\n"


def test_a_template_that_drops_the_completion_is_an_error(tmp_path):
    tokenizer = data.Tokenizer.load(write_tokenizer(tmp_path, "{{ messages[0].content }}"))
    with pytest.raises(DataError, match="adds no token that could be scored"):
        data.tokenize_pair(row([USER], [YES], [NO]), tokenizer, data.DataOptions())


def test_without_need_of_rejected_rows_may_lack_it(tokenizer, tmp_path):
    options = data.DataOptions(need_rejected=False)
    alone = data.tokenize_pair({"prompt": "ab", "chosen": "cd"}, tokenizer, options)
    both = data.tokenize_pair(row("ab", "cd", "xy"), tokenizer, options)
    assert ids_of(alone) == ids_of(both) and len(alone.rejected_ids) == 0
    implicit = data.tokenize_pair({"chosen": "abcd", "rejected": "abxy"}, tokenizer, options)
    assert ids_of(implicit) == ids_of(both)
    with pytest.raises(DataError, match='"rejected" is missing'):
        data.tokenize_pair({"chosen": "abcd"}, tokenizer, options)
    mixed = [{"prompt": "ab", "chosen": "cd"}, row("ab", "cd", "xy"), {"prompt": "ab", "chosen": "cd"}]
    assert [ids_of(pair) for pair in data.tokenize_rows(mixed, tokenizer, options)] == [ids_of(alone)] * 3
    store = build(
        write_rows(tmp_path / "r.jsonl", [{"prompt": "ab", "chosen": "cd"}]), tokenizer, tmp_path, need_rejected=False
    )
    batch = data.collate([store[0], store[0]])
    assert batch.lengths.tolist() == [[3, 0], [3, 0]] and batch.num_tokens == 12 == len(batch.input_ids)
    assert batch.spans.tolist() == [[0, 3, 0, 0], [3, 6, 0, 3], [6, 9, 0, 0], [9, 12, 6, 9]]
    assert data.collate([store[0]], share_prefix=False).lengths.tolist() == [[3, 0]]


# Truncation


def sequences_of(pair: data.Pair) -> list[tuple[list, list]]:
    """[(token ids, completion mask)] of chosen and rejected as two whole sequences."""
    own = pair.prompt_ids if pair.rejected_prompt_ids is None else pair.rejected_prompt_ids
    halves = ((pair.prompt_ids, pair.chosen_ids), (own, pair.rejected_ids))
    return [([*map(int, p), *map(int, c)], [0] * len(p) + [1] * len(c)) for p, c in halves]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [2, 5, 8, 11, 40])
def test_truncation_equals_trls_collator(mode, max_length):
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rng, kept = random.Random(0), 0
    options = data.DataOptions(max_length=max_length, truncation_mode=mode)
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    for _ in range(60):
        parts = [[rng.randrange(3, 99) for _ in range(rng.randint(1, 9))] for _ in range(3)]
        try:
            pair = data.make_pair([parts[0], parts[0] + parts[1], parts[0] + parts[2]], (0.0, 0.0), options)
        except DroppedPair:
            assert mode == "keep_start" and len(parts[0]) >= max_length  # TRL filters these before its collator
            continue
        except DataError:
            assert parts[1] == parts[2]
            continue
        prompt = parts[0][: common_prefix_length(parts[0], parts[0] + parts[1])]
        theirs = collator([{"prompt_ids": prompt, "chosen_ids": parts[1], "rejected_ids": parts[2]}])
        for (ids, mask), their_ids, attention, their_mask in zip(
            sequences_of(pair), theirs["input_ids"], theirs["attention_mask"], theirs["completion_mask"], strict=True
        ):
            size = int(attention.sum())
            assert (ids, mask) == (their_ids[:size].tolist(), their_mask[:size].tolist())
        kept += 1
    assert kept > 3


def test_keep_start_leaves_prompts_shared_and_keep_end_parts_them_where_they_differ():
    ids = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]]
    pair = data.make_pair(ids, (0.0, 0.0), data.DataOptions(max_length=5))
    assert (
        ids_of(pair) == ([1, 2, 3, 4], [5], [7]) and pair.rejected_prompt_ids is None and pair.flags == ("truncated",)
    )
    pair = data.make_pair(ids, (0.0, 0.0), data.DataOptions(max_length=4, truncation_mode="keep_end"))
    assert ids_of(pair) == ([3, 4], [5, 6], [7]) and pair.rejected_prompt_ids.tolist() == [2, 3, 4]
    equal = [*ids[:2], [1, 2, 3, 4, 7, 8]]
    pair = data.make_pair(equal, (0.0, 0.0), data.DataOptions(max_length=4, truncation_mode="keep_end"))
    assert ids_of(pair) == ([3, 4], [5, 6], [7, 8]) and pair.rejected_prompt_ids is None
    pair = data.make_pair(equal, (0.0, 0.0), data.DataOptions(max_length=2, truncation_mode="keep_end"))
    assert ids_of(pair) == ([], [5, 6], [7, 8]) and pair.rejected_prompt_ids is None


def test_prompt_and_completion_limits_cut_as_trl_018_does():
    ids = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8]]
    for mode in ("keep_start", "keep_end"):
        options = data.DataOptions(None, max_prompt_length=2, max_completion_length=2, truncation_mode=mode)
        pair = data.make_pair(ids, (0.0, 0.0), options)
        assert ids_of(pair) == ([3, 4], [5, 6], [8]) and pair.flags == ("truncated",)


def test_a_pair_that_truncation_empties_is_dropped_and_counted(tokenizer, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [row("abc", "x", "y"), row("a", "x", "y"), row("ab", "xz", "xy")])
    store = build(path, tokenizer, tmp_path, max_length=4)
    assert store.report["counts"] == {"kept": 2, "dropped, as the prompt alone fills max_length": 1,
                                      "truncated": 1, "same_after_truncation": 1}  # fmt: skip
    lines = describe(store.report)
    assert lines[0] == "2 pairs from 3 rows"
    assert any(line == f"dropped, as the prompt alone fills max_length: 1 (first: {path}:1)" for line in lines)
    with pytest.raises(DroppedPair, match="nothing to score"):
        data.tokenize_pair(row(), tokenizer, data.DataOptions(max_length=1, truncation_mode="keep_end"))


def test_nothing_is_ever_left_without_a_scored_token(tokenizer):
    for mode, length, prompt in itertools.product(("keep_start", "keep_end"), range(1, 9), ("", "a", "abcde")):
        options = data.DataOptions(length, max_completion_length=2, truncation_mode=mode)
        try:
            pair = data.tokenize_pair(row(prompt, "xy", "z"), tokenizer, options)
        except DroppedPair:
            continue
        assert data.collate([pair]).lengths.min() > 0, (mode, length, prompt)


def test_unusable_options_are_refused(tokenizer, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [row()])
    for options in (
        {"max_length": 0},
        {"max_prompt_length": -1},
        {"max_completion_length": 0},
        {"truncation_mode": "keep"},
    ):
        with pytest.raises(DataError, match=next(iter(options))):
            build(path, tokenizer, tmp_path, **options)


# The store


def test_a_store_gives_back_what_was_tokenized(tokenizer, tmp_path):
    rng = random.Random(1)
    rows = [row("p" * rng.randint(0, 9), f"{i}" * rng.randint(1, 9), f"x{i}", chosen_score=i) for i in range(700)]
    options = {"max_length": 9, "truncation_mode": "keep_end"}
    store = build(write_rows(tmp_path / "r.jsonl", rows), tokenizer, tmp_path / "cache", **options)
    assert (
        len(store) == 700 and (store.rejected_prompt_lengths >= 0).any() and (store.rejected_prompt_lengths < 0).any()
    )
    for index, r in enumerate(rows):
        expected, got = data.tokenize_pair(r, tokenizer, data.DataOptions(**options)), store[index]
        assert ids_of(got) == ids_of(expected) and store.where(index).endswith(f":{index + 1}")
        own = [
            None if pair.rejected_prompt_ids is None else pair.rejected_prompt_ids.tolist() for pair in (got, expected)
        ]
        assert own[0] == own[1] and (got.chosen_rating, math.isnan(got.rejected_rating)) == (index, True)
        assert store.lengths[index].tolist() == [len(part) for part in ids_of(got)]
        assert store.tokens[index] == len(data.collate([got]).input_ids)
    assert isinstance(store.lengths.base, np.memmap) or isinstance(store.lengths, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store[0].prompt_ids[:] = 0


def test_a_store_is_found_again_by_content_and_made_anew_on_any_change(tokenizer, tmp_path, monkeypatch):
    path, cache = write_rows(tmp_path / "r.jsonl", [row(), row("x")]), tmp_path / "cache"
    first = build(path, tokenizer, cache)
    monkeypatch.setattr(data, "tokenize_rows", None)  # whoever tokenizes now fails
    os.utime(path, (0, 0))
    again = build(path, tokenizer, cache)
    assert (
        again.directory == first.directory
        and again.digest == first.digest == data.PairStore(first.directory).digest
    )
    assert again.report == first.report
    monkeypatch.undo()
    seen = {first.directory}
    other = data.Tokenizer.load(write_tokenizer(tmp_path / "t", CHATML + " "))
    for store in (
        build(path, tokenizer, cache, max_length=77), build(path, tokenizer, cache, truncation_mode="keep_end"),
        build(path, tokenizer, cache, max_prompt_length=7), build(path, tokenizer, cache, max_completion_length=7),
        build(path, tokenizer, cache, need_rejected=False), build(path, other, cache),
        build(path, tokenizer, cache, "skip"),
        build([path, write_rows(tmp_path / "s.jsonl", [row("y")])], tokenizer, cache),
    ):  # fmt: skip
        assert store.directory not in seen
        seen.add(store.directory)
    write_rows(path, [row(), row("z")])  # of the same size
    os.utime(path, (0, 0))
    changed = build(path, tokenizer, cache)
    assert changed.directory not in seen and changed.digest != first.digest


def test_an_unfinished_store_is_never_opened(tokenizer, tmp_path, monkeypatch):
    path, cache = write_rows(tmp_path / "r.jsonl", [row(str(i)) for i in range(600)]), tmp_path / "cache"
    calls, original = [], data.tokenize_rows

    def dies_later(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(data, "tokenize_rows", dies_later)
    with pytest.raises(KeyboardInterrupt):
        build(path, tokenizer, cache)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed before it could tidy up
    monkeypatch.setattr(data, "tokenize_rows", dies_later)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        build(path, tokenizer, cache)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.undo()
    assert len(build(path, tokenizer, cache)) == 600


def test_two_processes_that_build_the_same_store_both_get_it(tokenizer, tmp_path, monkeypatch):
    path, cache = write_rows(tmp_path / "r.jsonl", [row()]), tmp_path / "cache"
    original = os.rename

    def slower(scratch, target):
        monkeypatch.setattr(os, "rename", original)
        build(path, tokenizer, cache)
        original(scratch, target)

    monkeypatch.setattr(os, "rename", slower)
    assert len(build(path, tokenizer, cache)) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_store_is_named(tokenizer, tmp_path):
    store = build(write_rows(tmp_path / "r.jsonl", [row()]), tokenizer, tmp_path / "cache")
    for name in ("tokens.bin", "ratings.bin", "meta.json"):
        whole = (store.directory / name).read_bytes()
        for content in (whole[:-4], b""):
            (store.directory / name).write_bytes(content)
            with pytest.raises(DataError, match="damaged token store"):
                data.PairStore(store.directory)
        (store.directory / name).write_bytes(whole)
    assert len(data.PairStore(store.directory)) == 1


def test_key_order_line_endings_gzip_and_the_form_of_the_file_do_not_change_the_pairs(tokenizer, tmp_path):
    rows = [row(f"é {i}", f"a{i}", f"b{i}", chosen_score=i) for i in range(20)]
    shuffled = [dict(random.Random(i).sample(list(r.items()), len(r))) for i, r in enumerate(rows)]
    (tmp_path / "gz").mkdir()
    zipped = tmp_path / "gz" / "r.jsonl.gz"
    zipped.write_bytes(gzip.compress(write_rows(tmp_path / "r.jsonl", rows).read_bytes()))
    array = tmp_path / "r.json"
    array.write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    paths = [tmp_path / "r.jsonl", zipped, array, write_rows(tmp_path / "k.jsonl", shuffled)]
    paths.append(write_rows(tmp_path / "c.jsonl", rows, "\r\n"))
    digests = {build(path, tokenizer, tmp_path / "cache").digest for path in paths}
    assert len(digests) == 1
    assert build(write_rows(tmp_path / "o.jsonl", rows[::-1]), tokenizer, tmp_path / "cache").digest not in digests


def test_pairs_of_several_files_know_their_file(tokenizer, tmp_path):
    one, two = write_rows(tmp_path / "a:1.jsonl", [row(), row("x")]), write_rows(tmp_path / "b.jsonl", [row("y")])
    store = build([two, one], tokenizer, tmp_path / "cache")
    assert [store.where(i) for i in range(3)] == [f"{two}:1", f"{one}:1", f"{one}:2"]


def test_worker_processes_give_the_same_store(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_ROWS", 50)
    directory = write_tokenizer(tmp_path / "t")
    tokenizer = data.Tokenizer.load(directory, chat_template="{{ messages | tojson }}")
    rows = [row([say("user", str(i))], [YES], [NO]) for i in range(600)] + [row(chosen="")]
    path = write_rows(tmp_path / "r.jsonl", rows)
    alone = build(path, tokenizer, tmp_path / "one", "skip")
    several = build(path, tokenizer, tmp_path / "two", "skip", num_proc=2)
    assert several.digest == alone.digest and several.report == alone.report


def test_a_place_that_cannot_hold_the_store_is_named(tokenizer, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [row()])
    with pytest.raises(DataError, match="cannot hold the token store.*--cache_dir"):
        build(path, tokenizer, path)


def test_progress_counts_the_rows(tokenizer, tmp_path):
    path, seen = write_rows(tmp_path / "r.jsonl", [row(str(i)) for i in range(600)]), []
    data.build_store([path], tokenizer, data.DataOptions(), tmp_path / "cache", progress=seen.append)
    assert seen == [256, 512, 600]


# Batches


def test_the_collator_example_of_trl_as_a_stream():
    pairs = [data.Pair(*map(np.array, ([1, 2, 3], [4, 5], [6]))), data.Pair(*map(np.array, ([7, 8], [9], [10, 11])))]
    batch = data.collate(pairs, [40, 41])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]
    assert batch.spans.tolist() == [[0, 3, 0, 0], [3, 5, 0, 3], [5, 6, 0, 3], [6, 8, 0, 0], [8, 9, 6, 8], [9, 11, 6, 8]]
    assert batch.score_index.tolist() == [2, 3, 2, 7, 7, 9]
    assert batch.targets.tolist() == [4, 5, 6, 9, 10, 11]
    assert batch.lengths.tolist() == [[2, 1], [1, 2]]
    assert batch.pair_ids.tolist() == [40, 41]
    assert batch.num_tokens == 16  # the ones in TRL's attention_mask
    types = {name: value.dtype for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    assert types.pop("spans") == torch.int32 and types.pop("ratings") == torch.float32
    assert set(types.values()) == {torch.int64}


def test_the_collator_example_of_trl_as_two_sequences_per_pair():
    pairs = [data.Pair(*map(np.array, ([1, 2, 3], [4, 5], [6]))), data.Pair(*map(np.array, ([7, 8], [9], [10, 11])))]
    batch = data.collate(pairs, share_prefix=False)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 7, 8, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]
    assert batch.spans.tolist() == [[0, 5, 0, 0], [5, 9, 0, 0], [9, 12, 0, 0], [12, 16, 0, 0]]
    assert batch.score_index.tolist() == [2, 3, 7, 10, 13, 14]
    assert batch.targets.tolist() == [4, 5, 6, 9, 10, 11]
    assert batch.lengths.tolist() == [[2, 1], [1, 2]] and batch.num_tokens == 16


def test_an_unshared_pair_is_two_sequences_and_its_neighbour_stays_a_tree():
    unshared = data.Pair(*map(np.array, ([3, 4], [5, 6], [7])), np.array([2, 3, 4]))
    batch = data.collate([unshared, data.Pair(*map(np.array, ([7], [9], [10])))])
    assert batch.input_ids.tolist() == [3, 4, 5, 6, 2, 3, 4, 7, 7, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 1]
    assert batch.spans.tolist() == [[0, 4, 0, 0], [4, 8, 0, 0], [8, 9, 0, 0], [9, 10, 8, 9], [10, 11, 8, 9]]
    assert batch.score_index.tolist() == [1, 2, 6, 8, 8] and batch.targets.tolist() == [5, 6, 7, 9, 10]
    assert batch.num_tokens == 12


def test_without_a_prompt_token_the_first_completion_token_is_not_scored():
    batch = data.collate([data.Pair(*map(np.array, ([], [5, 6], [7, 8, 9])))])
    assert batch.spans.tolist() == [[0, 2, 0, 0], [2, 5, 0, 0]] and batch.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert batch.lengths.tolist() == [[1, 2]]
    assert batch.score_index.tolist() == [0, 2, 3] and batch.targets.tolist() == [6, 8, 9]
    half = data.collate([data.Pair(*map(np.array, ([1], [5, 6], [7, 8])), np.array([], int))])
    assert half.lengths.tolist() == [[2, 1]] and half.targets.tolist() == [5, 6, 8]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_stream_says_the_same_as_ordinary_sequences(seed, share_prefix):
    """Each scored token has, through its span and prefix, exactly the context it has in prompt + completion."""
    pairs = random_pairs(seed, 9)
    batch = data.collate(pairs, share_prefix=share_prefix)
    span_at = {i: s for s in batch.spans.tolist() for i in range(s[0], s[1])}
    assert sorted(span_at) == list(range(len(batch.input_ids)))
    scored, count = zip(batch.score_index.tolist(), batch.targets.tolist(), strict=True), 0
    for pair, lengths in zip(pairs, batch.lengths.tolist(), strict=True):
        for (ids, mask), length in zip(sequences_of(pair), lengths, strict=True):
            positions = [i for i in range(1, len(ids)) if mask[i]]
            assert length == len(positions)
            for at in positions:
                index, target = next(scored)
                start, _, prefix_start, prefix_end = span_at[index]
                context = [*range(prefix_start, prefix_end), *range(start, index + 1)]
                assert batch.input_ids[context].tolist() == ids[:at] and target == ids[at]
                assert batch.position_ids[context].tolist() == list(range(at))
                count += 1
    assert count == len(batch.targets) == int(batch.lengths.sum())
    assert batch.num_tokens == sum(len(ids) for pair in pairs for ids, _ in sequences_of(pair))


def test_a_batch_of_pairs_is_its_pairs_one_after_another():
    pairs = random_pairs(3, 5)
    whole, parts = data.collate(pairs), [data.collate([pair]) for pair in pairs]
    for name in ("input_ids", "position_ids", "targets", "lengths"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert whole.num_tokens == sum(part.num_tokens for part in parts)
    assert whole.ratings[:, 0].tolist() == [0, 1, 2, 3, 4] and whole.ratings[:, 1].isnan().all()


def test_moving_a_batch_leaves_what_is_read_in_python_on_the_cpu():
    moved = data.collate(random_pairs(0, 2)).to("meta")
    assert moved.spans.device.type == moved.pair_ids.device.type == "cpu"
    for name in ("input_ids", "position_ids", "score_index", "targets", "lengths", "ratings"):
        assert getattr(moved, name).device.type == "meta", name
    assert moved.ref_logps is None and moved.num_tokens > 0
    assert moved._replace(ref_logps=torch.zeros(2)).to("meta").ref_logps.device.type == "meta"


def test_an_empty_batch_is_one_token_without_targets():
    batch, usual = data.empty_batch(), data.collate(random_pairs(0, 1))
    assert len(batch.input_ids) == 1 and batch.spans.tolist() == [[0, 1, 0, 0]]
    assert len(batch.targets) == len(batch.score_index) == len(batch.pair_ids) == batch.num_tokens == 0
    for mine, other in zip(batch, usual, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype and mine.dim() == other.dim() and mine.shape[1:] == other.shape[1:]


# Order


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    order = data.epoch_order(1000, 42, 3, True)
    np.random.seed(7)
    torch.manual_seed(7)
    assert (order == data.epoch_order(1000, 42, 3, True)).all()
    assert (np.sort(order) == np.arange(1000)).all() and order.dtype == np.int64
    others = [data.epoch_order(1000, seed, epoch, True) for seed, epoch in ((42, 4), (43, 3), (3, 42), (-1, 3), (0, 0))]
    assert all((order != other).mean() > 0.9 for other in others)
    assert data.epoch_order(5, 42, 3, False).tolist() == [0, 1, 2, 3, 4]
    assert len(data.epoch_order(0, 1, 1, True)) == 0


def test_the_order_of_an_epoch_is_pinned():
    assert data.epoch_order(10, 42, 0, True).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]


def test_each_position_is_equally_likely_in_a_shuffled_epoch():
    firsts = np.bincount([data.epoch_order(8, 0, epoch, True)[0] for epoch in range(4000)], minlength=8)
    assert ((firsts - 500) ** 2 / 500).sum() < 30  # chi squared with 7 degrees of freedom: p < 1e-4


def test_micro_batches_keep_the_order_and_both_limits():
    tokens = np.array([5, 5, 5, 30, 1, 1, 1, 1, 9])
    order = np.array([8, 0, 1, 3, 2, 4, 5, 6, 7])
    assert [b.tolist() for b in data.micro_batches(order, tokens, 3, None)] == [[8, 0, 1], [3, 2, 4], [5, 6, 7]]
    assert [b.tolist() for b in data.micro_batches(order, tokens, 4, None)] == [[8, 0, 1, 3], [2, 4, 5, 6], [7]]
    assert [b.tolist() for b in data.micro_batches(order, tokens, 3, 10)] == [[8], [0, 1], [3], [2, 4, 5], [6, 7]]
    assert [b.tolist() for b in data.micro_batches(order, tokens, 99, 1)] == [[i] for i in order]
    assert data.micro_batches(order[:0], tokens, 3, 10) == []
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens, order = rng.integers(1, 50, 40), rng.permutation(40)[:30]
        pairs, limit = int(rng.integers(1, 9)), int(rng.integers(1, 120))
        batches = data.micro_batches(order, tokens, pairs, limit)
        assert np.concatenate(batches).tolist() == order.tolist()
        assert all(len(b) == 1 or (len(b) <= pairs and tokens[b].sum() <= limit) for b in batches)
        for batch, after in itertools.pairwise(batches):  # none could have taken one pair more
            assert len(batch) == pairs or tokens[batch].sum() + tokens[after[0]] > limit


# The viewer


def test_the_viewer_shows_pairs_through_the_mask_and_counts_tokens(tokenizer, tmp_path):
    rows = [row("ab", "c\x1b[2J", "def"), row("ab", "cd", "e"), row("x" * 99, "y", "z")]
    path = write_rows(tmp_path / "r.jsonl", rows)
    command = [sys.executable, ROOT / "data.py", path, "--model_name_or_path", tokenizer.directory]
    done = subprocess.run(
        [*command, "--max_length", "50", "-n", "1"], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    expected = "[prompt: 3 tokens]\n<s>ab\n[chosen: 6 tokens]\nc\\x1b[2J</s>\n[rejected: 4 tokens]\ndef</s>\n"
    assert f"--- {path}:1\n{expected}" in done.stdout
    assert "\x1b" not in done.stdout and f"{path}:2" not in done.stdout
    assert "2 pairs; mean tokens: prompt 3.0, chosen 4.5, rejected 3.0" in done.stdout
    assert "36 tokens as two padded sequences" in done.stdout and "27 tokens as two sequences" in done.stdout
    assert "21 tokens as a stream: 22.2% less by sharing, 41.7% less in all" in done.stdout
    assert "dropped, as the prompt alone fills max_length: 1 (first" in done.stdout


def test_the_viewer_ends_with_2_and_one_message_on_bad_data(tokenizer, tmp_path, capsys):
    from extras.view import main

    path = write_rows(tmp_path / "r.jsonl", [row(), "{"])
    model = ["--model_name_or_path", str(tokenizer.directory)]
    assert main([str(path), *model]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"data.py: {path}:2: broken JSON") and err.count("\n") == 1
    assert main([str(path), *model, "--on_bad_row", "skip", "--max_length", "none"]) == 0
    assert main([str(tmp_path / "none"), *model]) == 2
    assert main([str(path), "--model_name_or_path", str(tmp_path)]) == 2


def test_a_terminal_gets_colours(tokenizer, tmp_path):
    from extras.view import show_pair

    store = build(write_rows(tmp_path / "r.jsonl", [row("ab", "c", "d")]), tokenizer, tmp_path / "cache")
    shown = show_pair(store, 0, tokenizer, color=True)
    assert "\x1b[2m<s>ab\x1b[0m" in shown and "\x1b[32mc</s>\x1b[0m" in shown and "\x1b[31md</s>\x1b[0m" in shown


# Real data


def test_all_of_hh_is_usable_and_shares_its_prompts(real_tokenizer, tmp_path):
    tokenizer = data.Tokenizer.load(real_tokenizer("stories260K"))
    store = build(shared_path("prefs/hh_harmless_base_test.jsonl.gz"), tokenizer, tmp_path, max_length=None)
    assert len(store) == store.report["rows"] == 2312 and "bad" not in store.report["counts"]
    assert (store.rejected_prompt_lengths < 0).all()


def test_rows_of_ultrafeedback_with_an_empty_answer_are_named(real_tokenizer, tmp_path):
    tokenizer = data.Tokenizer.load(real_tokenizer("stories260K"))
    path = shared_path("prefs/ultrafeedback-train_clean.jsonl.gz")
    with pytest.raises(
        DataError, match=r"ultrafeedback-train_clean.jsonl.gz:307: chosen and rejected are the same"
    ):
        build(path, tokenizer, tmp_path)
    report = build(path, tokenizer, tmp_path, "skip").report
    assert sum("is empty" in bad for bad in report["bad_rows"]) == 2 and report["rows"] == 1000
