"""Generation beside stock transformers, token for token and in distribution; the ways to talk to a model."""

import io
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT
from test_model import put_lora

import data
import model as models
from extras import chat
from extras.decoder import generate
from extras.decoder.generate import Cache, Sampling, complete
from extras.lora.peft_files import save_adapter
from extras.models import speaker

GREEDY = Sampling(temperature=0.0, max_new_tokens=40)
CHATML = ("{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<s> assistant' }}{% endif %}")
WINDOWED = ["mistral", "gemma2", "gemma3", "gpt2", "mixtral", "pythia"]


@pytest.fixture(scope="module")
def model(tiny):
    return models.load_model(tiny, torch.float64)


@pytest.fixture
def chatty(tiny, tmp_path):
    """The tiny model with a chat template: a directory."""
    directory = tmp_path / "chatty"
    directory.mkdir()
    for path in tiny.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


def peers():
    """transformers, and the families of test_families.py."""
    pytest.importorskip("transformers", reason="needs transformers")
    import test_families

    return test_families


def family(name: str, directory, positions: int = 256):
    """(transformers' random model of a family, its checkpoint's directory), made for longer sequences."""
    families = peers()
    kind, config = families.CASES[name]
    longer = config | {"n_positions" if kind == "gpt2" else "max_position_embeddings": positions}
    families.CASES[name] = kind, longer
    try:
        theirs = families.random_model(name)
    finally:
        families.CASES[name] = kind, config
    theirs.save_pretrained(directory)
    return theirs, directory


def their_greedy(theirs, prompt: list[int], count: int, **options) -> list[int]:
    """Exactly `count` tokens of transformers' generate."""
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                              pad_token_id=0, **options)
    return out[0, len(prompt):].tolist()


# Token for token


def case_names():
    try:
        import test_families
    except BaseException:  # pytest's Skipped is no Exception; each test then skips by itself
        return ["llama"]
    return list(test_families.CASES)


@pytest.mark.parametrize("name", case_names())
def test_greedy_is_transformers_generate_in_every_family(name, tmp_path):
    """200 tokens; the repetition penalty keeps random models from saying one word for ever."""
    # beyond 32, transformers changes longrope's frequencies half-way; beyond 128, it scales Ministral 3's queries
    longest = {"phi3 longrope": 32, "ministral3": 128}.get(name, 215)
    theirs, directory = family(name, tmp_path, positions=64 if name == "phi3 longrope" else 256)
    prompt = [5, 17, 3, 42, 8, 11, 29]
    count = min(200, longest - len(prompt))
    expected = their_greedy(theirs, prompt, count, repetition_penalty=6.0)
    ours = models.load_model(directory)
    got = complete(ours, [prompt], GREEDY._replace(max_new_tokens=count, repetition_penalty=6.0))
    assert got == [expected] and len(set(expected)) > 12


def test_greedy_is_transformers_generate_on_a_trained_model(shared):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    directory = shared / "models/stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = data.Tokenizer.load(directory)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "Lily and Ben", "The dog")]
    got = complete(models.load_model(directory), prompts, GREEDY._replace(max_new_tokens=200))
    assert got == [their_greedy(theirs, prompt, 200) for prompt in prompts]


def test_what_we_save_generates_the_same_in_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    models.save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    prompt = [1, 5, 9, 12]
    assert complete(model, [prompt], GREEDY) == [their_greedy(theirs, prompt, 40)]


@pytest.mark.parametrize("name", WINDOWED)
def test_kept_keys_and_values_give_the_logits_of_the_whole(name, tmp_path):
    """float64: several prompts, three samples each, windows crossed; and the cache taken up in pieces."""
    _, directory = family(name, tmp_path)
    ours = models.load_model(directory, torch.float64)
    prompts, o = [[5, 17, 3, 42, 8, 11, 29], [7], [9, 9, 31]], Sampling(max_new_tokens=9, seed=3)
    sequences, size = generate.place(prompts, o, 3, 0)
    cache = Cache(size)
    with torch.no_grad():
        logits = generate.prefill(ours, prompts, sequences, cache)
        for step in range(9):
            for s, row in zip(sequences, logits):
                whole = prompts[s.number // 3] + s.tokens
                n = len(whole)
                expected = ours.logits(torch.tensor(whole), torch.arange(n), torch.tensor([[0, n, 0, 0]]))[-1]
                assert (row - expected).abs().max() < 1e-5  # logits are float32
                s.tokens.append((7 * s.number + 5 * step) % 61)
            logits = generate.read_tokens(ours, sequences, cache)


def test_one_query_of_soft_capped_attention_sees_every_key():
    from extras.decoder.explicit import explicit_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    whole = explicit_attention(q, k, v, None, 0.3, 5.0)
    assert torch.allclose(explicit_attention(q[3:], k, v, None, 0.3, 5.0), whole[3:], atol=1e-6)
    assert torch.allclose(explicit_attention(q[2:], k, v, None, 0.3, 5.0), whole[2:], atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kept_keys_and_values_on_a_gpu(tmp_path):
    """Flash attention over the cache, bf16, against the whole sequence in float32."""
    _, directory = family("mistral", tmp_path)
    exact, ours = (models.load_model(directory, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16))
    prompts = [[5, 17, 3, 42, 8, 11, 29], [7, 1]]
    for i, tokens in enumerate(complete(ours, prompts, Sampling(max_new_tokens=20), samples=2)):
        whole = torch.tensor(prompts[i // 2] + tokens, device="cuda")
        n = len(whole)
        logits = exact.logits(whole, torch.arange(n, device="cuda"), torch.tensor([[0, n, 0, 0]]))
        sequences, size = generate.place([whole.tolist()[:-1]], Sampling(max_new_tokens=1), 1, 0)
        cache = Cache(size)
        generate.prefill(ours, [whole.tolist()[:-1]], sequences, cache)
        sequences[0].tokens.append(int(whole[-1]))
        assert (generate.read_tokens(ours, sequences, cache)[0] - logits[-1]).abs().max() < 0.1


# In distribution


def test_distribution_is_that_of_transformers_processors():
    peers()
    from transformers.generation import logits_process as theirs

    torch.manual_seed(0)
    logits, ids = torch.randn(6, 50) * 3, torch.randint(0, 50, (6, 9))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    cases = [(1.0, 0.7, 0, 1.0), (1.3, 1.0, 0, 1.0), (1.0, 1.0, 5, 1.0), (1.0, 1.0, 0, 0.6), (1.2, 1.7, 12, 0.8),
             (0.8, 0.5, 50, 0.01), (1.0, 1.0, 0, 1e-9)]
    for penalty, temperature, top_k, top_p in cases:
        o = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        expected = theirs.TemperatureLogitsWarper(temperature)(ids, expected)
        expected = theirs.TopKLogitsWarper(top_k)(ids, expected) if top_k else expected
        expected = theirs.TopPLogitsWarper(top_p)(ids, expected) if top_p < 1 else expected
        got = generate.distribution(generate.penalize(logits, seen, penalty), o)
        assert torch.allclose(got, expected.softmax(-1), atol=1e-6) and torch.equal(got > 0, expected > -torch.inf)


def chi_square(counts: Counter, probs: dict, draws: int) -> float:
    """How many standard deviations chi-square lies above its mean (Wilson and Hilferty); rare outcomes are one cell."""
    common = {k: p for k, p in probs.items() if p * draws >= 5}
    cells = [(counts[k], p) for k, p in common.items()]
    rest = max(1 - sum(common.values()), 0.0)
    cells += [(draws - sum(counts[k] for k in common), rest)] if rest * draws >= 5 else []
    statistic, freedom = sum((n - draws * p) ** 2 / (draws * p) for n, p in cells), len(cells) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("o", [
    Sampling(), Sampling(temperature=1.5, top_k=8), Sampling(top_p=0.7, repetition_penalty=1.4)])
def test_samples_have_the_distribution_of_the_model(o, model):
    """Two tokens after a prompt, 3,000 times: the pairs' counts against their exact probabilities."""
    prompt, draws = [1, 5, 9], 3000
    o = o._replace(max_new_tokens=2, seed=11)
    counts = Counter(map(tuple, complete(model, [prompt], o, samples=draws)))
    probs = {}
    for first, p in enumerate(exact_distribution(model, prompt, o)):
        for second, q in enumerate(exact_distribution(model, prompt + [first], o) if p > 0 else ()):
            probs[first, second] = p * q
    assert set(counts) <= {k for k, p in probs.items() if p > 0}
    assert abs(chi_square(counts, probs, draws)) < 3.5
    flat = {k: 1 / sum(p > 0 for p in probs.values()) for k, p in probs.items() if p > 0}
    assert chi_square(counts, flat, draws) > 10  # the test would see another distribution


def exact_distribution(model, ids: list[int], o: Sampling) -> list[float]:
    n = len(ids)
    with torch.no_grad():
        logits = model.logits(torch.tensor(ids), torch.arange(n), torch.tensor([[0, n, 0, 0]]))[-1:]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, ids] = True
    return generate.distribution(generate.penalize(logits, seen, o.repetition_penalty), o)[0].tolist()


def test_inversion_never_draws_what_has_no_probability():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    at = lambda u: generate.draw(probs, torch.tensor([u], dtype=torch.float64)).item()
    assert [at(0.0), at(0.4999), at(0.5), at(1 - 2**-53)] == [1, 1, 3, 3]


def test_what_is_drawn_depends_on_seed_and_number_alone(model):
    """Not on the batch, the other prompts' lengths, or on where a list of prompts is cut."""
    prompts, o = [[1, 5, 9], [1, 7], [1, 12, 3, 4, 8]], Sampling(max_new_tokens=12, seed=5, stop_ids=frozenset({2}))
    together = complete(model, prompts, o, samples=3)
    apart = [tokens for i, prompt in enumerate(prompts) for tokens in complete(model, [prompt], o, 3, first=3 * i)]
    assert together == apart
    assert len(set(map(tuple, together))) == 9 and {len(t) for t in together} != {12}
    assert complete(model, prompts, o._replace(seed=6), samples=3) != together


# When to stop, what to refuse, what to keep


def test_sequences_end_at_a_stop_token_or_at_their_length(model):
    prompts = [[1, 5, 9], [1, 7]]
    free = complete(model, prompts, GREEDY)
    stop = free[0][4]
    for whole, ended in zip(free, complete(model, prompts, GREEDY._replace(stop_ids=frozenset({stop})))):
        assert ended == (whole[:whole.index(stop) + 1] if stop in whole else whole)
    assert [len(t) for t in complete(model, prompts, GREEDY._replace(max_new_tokens=1))] == [1, 1]


@pytest.mark.parametrize("o, message", [
    (dict(temperature=-1.0), "--temperature -1.0: it must be 0 .greedy. or more"), (dict(top_p=0.0), "--top_p 0.0"),
    (dict(top_k=-2), "--top_k -2"), (dict(repetition_penalty=0.0), "--repetition_penalty 0.0"),
    (dict(seed=-1), "--seed -1"), (dict(max_new_tokens=0), "--max_new_tokens 0: it must be at least 1")])
def test_options_without_a_meaning_are_refused(o, message, model):
    with pytest.raises(ValueError, match=message):
        complete(model, [[1]], Sampling()._replace(**o))


def test_a_prompt_that_is_empty_or_too_long_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="without a single token"):
        complete(model, [[1], []], GREEDY)
    _, directory = family("gpt2", tmp_path, positions=64)
    ours = models.load_model(directory)
    assert len(complete(ours, [[3] * 24], GREEDY)[0]) == 40
    with pytest.raises(ValueError, match="a sequence of 65 tokens.* reach 64"):
        complete(ours, [[3] * 25], GREEDY)


def test_a_conversation_reads_only_what_is_new(model, monkeypatch):
    """Turns that go on, that repeat, and that begin anew: the tokens of a fresh cache, and few of them read."""
    read, forward = [], generate.forward
    monkeypatch.setattr(generate, "forward", lambda m, ids, *rest: read.append(len(ids)) or forward(m, ids, *rest))
    cache, o = Cache(0), GREEDY._replace(max_new_tokens=6)
    answer = complete(model, [[1, 5, 9, 4]], o)[0]
    for prompt, new in [([1, 5, 9, 4], 4), ([1, 5, 9, 4, *answer, 7, 8], 3), ([1, 5, 9, 4, *answer, 7, 8], 1),
                        ([1, 5, 6], 1), ([3, 5], 2)]:
        read.clear()
        got = [step[0] for step in generate.generate(model, [prompt], o, cache=cache)]
        assert read == [new] + [1] * 5, prompt
        assert got == complete(model, [prompt], o)[0]


def test_a_stopped_answer_leaves_a_cache_that_can_go_on(model):
    cache, o = Cache(0), GREEDY._replace(max_new_tokens=9)
    steps = generate.generate(model, [[1, 5, 9]], o, cache=cache)
    begun = [next(steps)[0] for _ in range(4)]
    steps.close()
    prompt = [1, 5, 9, *begun, 6]
    assert [step[0] for step in generate.generate(model, [prompt], o, cache=cache)] == complete(model, [prompt], o)[0]


# Models, adapters, options


def options(*argv):
    return chat.parse([*map(str, argv), "--device", "cpu"])


def test_an_adapter_is_loaded_on_its_base(chatty, tmp_path):
    ours = models.load_model(chatty)
    put_lora(ours, 4, 8, 0.1, ["q_proj", "lm_head"])
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p += torch.randn_like(p) if "lora_B" in name else 0
    save_adapter(ours, tmp_path / "adapter", dict(r=4, lora_alpha=8, lora_dropout=0.1,
                                                         base_model_name_or_path=str(chatty)))
    loaded, base = (speaker.load(str(d), options(d)) for d in (tmp_path / "adapter", chatty))
    expected = complete(ours.eval(), [[1, 5, 9]], GREEDY)
    assert complete(loaded.model, [[1, 5, 9]], GREEDY) == expected != complete(base.model, [[1, 5, 9]], GREEDY)
    assert not loaded.raw and not loaded.model.training


@pytest.mark.parametrize("words", [["--greedy"], ["--prompts", "asked.jsonl", "--output", "said.jsonl", "--greedy"]])
@pytest.mark.parametrize("flags, half", [(dict(bf16=True), torch.bfloat16), (dict(bf16=False), None),
                                         (dict(bf16=False, dtype="bfloat16"), None)])
def test_a_runs_model_answers_in_the_arithmetic_of_its_run(chatty, tmp_path, monkeypatch, flags, half, words):
    run = tmp_path / "run"
    shutil.copytree(chatty, run)
    (run / "dpo_config.json").write_text(json.dumps(dict(dtype="float32", bf16=None, fp16=False) | flags))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "the cat"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    read, seen, keep = [], [], generate.forward
    monkeypatch.setattr(generate, "forward", lambda model, *given: (read.append(given), seen.append(keep(model, *given)))[1] or seen[-1])
    assert chat.main([str(run), *words, "--device", "cpu", "--raw", "--max_new_tokens", "2"]) == 0
    model = models.load_model(run, getattr(torch, flags.get("dtype", "float32"))).eval()
    ids, positions, spans, *_ = read[0]

    def expected(half):
        with torch.no_grad(), torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            return keep(model, ids, positions, spans, generate.Cache(spans[0][1] + 2))

    assert torch.equal(seen[0], expected(half))
    assert half is None or not torch.equal(seen[0], expected(None))
    assert not torch.is_autocast_enabled("cpu")


def test_what_is_asked_for_wins_over_the_runs_types(chatty, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chatty, run)
    (run / "dpo_config.json").write_text(json.dumps(dict(dtype="float32", bf16=True, fp16=False)))
    assert speaker.load(str(run), options(run)).precision.half == torch.bfloat16
    asked = speaker.load(str(run), options(run, "--dtype", "float32"))
    assert asked.precision.half is None and asked.model.lm_head.weight.dtype == torch.float32


def test_a_name_that_is_no_directory_is_looked_up_on_the_hub(chatty, monkeypatch):
    from extras.hub import client

    monkeypatch.setattr(client, "local_model", lambda name, revision=None: {"org/chatty": chatty}[name])
    assert speaker.load("org/chatty", options("org/chatty")).name == "org/chatty"


def test_options_come_from_the_command_line_then_from_the_models_own_file(chatty):
    sampling = lambda *argv: speaker.load(str(chatty), options(chatty, *argv)).sampling
    assert sampling() == Sampling(max_new_tokens=512, stop_ids=frozenset({2}))
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1,
           "eos_token_id": [7, 3]}
    (chatty / "generation_config.json").write_text(json.dumps(own))
    assert sampling() == Sampling(0.6, 20, 0.9, 1.1, 0, 512, frozenset({2, 3, 7}))
    assert sampling("--top_k", 0, "--temperature", 1.2, "--seed", 4)[:5] == (1.2, 0, 0.9, 1.1, 4)
    assert sampling("--greedy").temperature == 0
    assert sampling("--no_generation_config") == Sampling(max_new_tokens=512, stop_ids=frozenset({2, 3, 7}))
    (chatty / "generation_config.json").write_text(json.dumps(own | {"min_p": 0.1, "num_beams": 1}))
    with pytest.raises(ValueError, match="generation_config.json: min_p = 0.1: not supported here"):
        sampling()
    sampling("--no_generation_config")


@pytest.mark.parametrize("argv, message", [
    ([], "give one model, or --compare BASE TUNED"), (["a", "--compare", "a", "b"], "give one model, or --compare"),
    (["a", "--prompts", "f"], "--prompts and --output belong together"),
    (["a", "--num_samples", "0"], "must be at least 1"),
    (["a", "--num_samples", "2"], "read only with --prompts"),
    (["a", "--greedy", "--temperature", "1"], "--greedy with --temperature: choose one"),
    (["nowhere/at/all"], "nowhere/at/all: no such directory here"),
    (["{tiny}", "--system", "x"], "--system: .* chat template"),
    (["{chatty}", "--top_p", "2"], "--top_p 2.0: it must be above 0, at most 1")])
def test_unusable_commands_are_exit_2_with_one_message(argv, message, tiny, chatty, capsys):
    assert chat.main([a.format(tiny=tiny, chatty=chatty) for a in argv]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error) and len(error.splitlines()) == 1


# What is shown


class Fake:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def test_pieces_are_the_text_and_never_half_a_character():
    text = "naïve 日本 😀!\n"
    pieces = list(speaker.pieces(speaker.Speaker("", None, Fake(), None, True), text.encode()))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    broken = b"ab\xf0\x9fcd\xf0"
    pieces = list(speaker.pieces(speaker.Speaker("", None, Fake(), None, True), broken))
    assert "".join(pieces) == broken.decode("utf-8", "replace")


def test_pieces_of_a_real_tokenizer_are_its_text(shared):
    directory = shared / "models/stories260K"  # pieces of bytes, and words that carry their space
    one = speaker.Speaker("", None, data.Tokenizer.load(directory), None, True)
    for text in ("Once upon a time, there was a día.\n日本", "a"):
        ids = one.tokenizer.encode(text, add_special_tokens=False)
        assert "".join(speaker.pieces(one, ids)) == one.tokenizer.decode(ids)


def test_a_model_does_not_steer_the_terminal():
    assert chat.printable("a\x1b[2J\tb\r\nç日\x9b😀") == "a\\x1b[2J\tb\\x0d\nç日\\x9b😀"


def test_columns_stand_side_by_side():
    shown = chat.columns(["base", "a rather long name of a model"], ["one two three four\n\nfive", "six"], 25)
    assert shown.split("\n") == [
        "base        | a rather...", "----------- | -----------", "one two     | six", "three four  |", "            |",
        "five        |"]


# The three ways to use it


def ask(monkeypatch, capsys, text: str, *argv) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert chat.main([*map(str, argv), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_one_answer_from_standard_input(chatty, monkeypatch, capsys):
    model, tokenizer = models.load_model(chatty), data.Tokenizer.load(chatty)
    stop = Sampling(max_new_tokens=9, seed=3, stop_ids=frozenset({2}))

    def expected(prompt: str, o: Sampling = stop) -> str:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        return tokenizer.decode(complete(model, [ids], o)[0], skip_special_tokens=True) + "\n"

    common = (chatty, "--max_new_tokens", 9, "--seed", 3)
    assert ask(monkeypatch, capsys, "the cat\n", *common) == expected("<s> user the cat </s> <s> assistant")
    assert ask(monkeypatch, capsys, "the cat", *common, "--system", "why not") == expected(
        "<s> system why not </s> <s> user the cat </s> <s> assistant")
    assert ask(monkeypatch, capsys, "the cat", *common, "--raw", "--greedy") == expected(
        "<s> the cat", stop._replace(temperature=0.0))
    assert ask(monkeypatch, capsys, "the cat", *common, "--seed", 4) == expected(
        "<s> user the cat </s> <s> assistant", stop._replace(seed=4))


def test_two_models_answer_the_same(chatty, tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out = ask(monkeypatch, capsys, "the dog", "--compare", chatty, tiny, "--max_new_tokens", 6, "--greedy")
    rows = [[cell.strip() for cell in line.split(" | ")] for line in out.splitlines() if line.strip("-| ")]
    single = [ask(monkeypatch, capsys, "the dog", d, "--max_new_tokens", 6, "--greedy").strip() for d in (chatty, tiny)]
    assert rows[1:] == [single] and single[0] != single[1]


def test_completions_of_a_file_of_prompts(chatty, tmp_path):
    """A row per completion, in order; the same whatever the batch; text, messages and implicit prompts."""
    messages = [{"role": "system", "content": "not"}, {"role": "user", "content": "sun"}]
    rows = [{"prompt": "the cat"}, {"prompt": messages}, {"chosen": "a red dog runs", "rejected": "a red cat"},
            {"prompt": "why", "chosen": "a", "rejected": "b"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*argv):
        output = tmp_path / "out.jsonl"
        files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(output), "--max_new_tokens", "8"]
        assert chat.main([str(chatty), *files, "--device", "cpu", "--system", "yes", *argv]) == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    got = run("--num_samples", "3")
    assert got == run("--num_samples", "3", "--batch_size", "1") == run("--num_samples", "3", "--batch_size", "7")
    assert got != run("--num_samples", "3", "--seed", "1")
    assert [(row["prompt"], row["sample"]) for row in got] == [
        (prompt, i) for prompt in ("the cat", messages, "a red", "why") for i in range(3)]
    assert {tuple(row) for row in got} == {("prompt", "sample", "tokens", "completion", "finished")}
    assert all(row["finished"] or row["tokens"] == 8 for row in got)
    assert {row["finished"] for row in got} == {True, False}
    model, tokenizer = models.load_model(chatty), data.Tokenizer.load(chatty)
    ids = tokenizer.encode("<s> system not </s> <s> user sun </s> <s> assistant", add_special_tokens=False)
    tokens = complete(model, [ids], Sampling(max_new_tokens=8, stop_ids=frozenset({2})), 3, first=3)[1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert got[4]["completion"] == [{"role": "assistant", "content": text}]


def test_a_bad_row_of_prompts_is_named(chatty, tmp_path, capsys):
    for line, message in {'{"text": "x"}': '"prompt" is missing|"chosen" is missing', "{": "broken JSON",
                          '{"prompt": ""}': '"prompt" is empty'}.items():
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
        assert chat.main([str(chatty), "--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "o.jsonl"),
                          "--max_new_tokens", "2", "--device", "cpu"]) == 2
        assert re.search(rf"error: .*p\.jsonl:2: ({message})", capsys.readouterr().err)


def test_a_conversation_at_a_terminal(chatty):
    """Answers stream; /again answers the same question anew, with other draws; /new forgets; /quit ends."""
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "extras.chat", str(chatty), "--max_new_tokens", "7", "--device", "cpu"]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=subprocess.DEVNULL, cwd=ROOT,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"})
    os.close(inner)
    shown = ""

    def until_prompt(line: str) -> str:
        nonlocal shown
        os.write(outer, line.encode() + b"\n")
        return wait(len(shown))

    def wait(begin: int) -> str:
        nonlocal shown
        deadline = time.time() + 60
        while not shown[begin:].replace("\r", "").endswith("\n> ") and time.time() < deadline:
            shown += os.read(outer, 4096).decode()
        return shown[begin:].replace("\r", "").removesuffix("\n> ").split("\n", 1)[-1]

    wait(0)
    first = until_prompt("the cat")
    again, second = until_prompt("/again"), until_prompt("sun and moon")
    until_prompt("/new")
    anew = until_prompt("the dog")
    os.write(outer, b"/quit\n")
    assert process.wait(60) == 0
    os.close(outer)
    model, tokenizer = models.load_model(chatty), data.Tokenizer.load(chatty)

    def expected(text: str, turn: int) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False)
        o = Sampling(max_new_tokens=7, stop_ids=frozenset({2}))
        return tokenizer.decode(complete(model, [ids], o, first=turn)[0], skip_special_tokens=True)

    one = "<s> user the cat </s> <s> assistant"
    assert (first, again) == (expected(one, 0), expected(one, 1)) and first != again
    assert second == expected(f"{one} {again} </s> <s> user sun and moon </s> <s> assistant", 2)
    assert anew == expected("<s> user the dog </s> <s> assistant", 3)


@pytest.mark.slow
def test_greedy_is_transformers_generate_on_smollm2(tmp_path_factory):
    """200 tokens each, three prompts in one batch; and the bench that times both runs on it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tool, directory = ROOT.parent / "shared/tools/get_smollm2.py", tmp_path_factory.getbasetemp() / "smollm2"
    if not tool.exists():
        pytest.skip(f"{tool} not found")
    if not (directory / "model.safetensors").exists():
        made = subprocess.run([sys.executable, str(tool), str(directory)], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"SmolLM2 could not be made: {made.stderr[-300:]}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer, ours = data.Tokenizer.load(directory), models.load_model(directory).eval()
    ask = lambda text: tokenizer.encode(tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True),
                                        add_special_tokens=False)
    prompts = [ask("Why is the sky blue?"), ask("Write a poem about a lighthouse."), tokenizer.encode("Once upon a time")]
    got = complete(ours, prompts, GREEDY._replace(max_new_tokens=200))
    assert got == [their_greedy(theirs, prompt, 200) for prompt in prompts]
