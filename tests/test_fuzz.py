"""Odd files, drawn from a seed: each run ends in success or in exit status 2 with one message.

    python tests/test_fuzz.py SEED COUNT [FIRST]      prints each case that ended otherwise, and counts

A case is one file of a small whole set-up (pairs, conversations, model, tokenizer, adapter), mutated once to thrice,
and one run of a step on it in a process of its own, under limits of processor time and memory: what hangs or eats all
memory is found as surely as a traceback.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_SECONDS, MEMORY = 20, 3 * 2**30
ODD = [None, True, False, "", "x", "12", "none", "\ud800", "a" * 5000, "../../x", "/dev/zero", "{{", -1, 0, 1, 2, 3, 1e308,
       -0.5, 1e-30, 2**31, 2**63, 10**30, float("nan"), float("inf"), [], {}, [None], [[]], {"x": 1}, ["x"] * 40,
       [1, "x", None], [10**9]]
TEMPLATE = ("{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
            "{% if add_generation_prompt %}<s> assistant{% endif %}")


# Mutations


def deep(rng: random.Random):
    value = 1
    for _ in range(rng.choice([50, 300])):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return value


def places(value, found=None) -> list[tuple]:
    """(container, key) of every value within."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def mutate_value(value, rng: random.Random):
    """A JSON value with one part replaced, removed, doubled or exchanged."""
    spots = places(value)
    if not spots or rng.random() < 0.03:
        return rng.choice(ODD)
    shallow = [spot for spot in spots if spot[0] is value]  # else a vocabulary would take all the mutations
    container, key = rng.choice(shallow if rng.random() < 0.5 else spots)
    kind = rng.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.25:
        other, name = rng.choice(spots)
        with contextlib.suppress(KeyError, IndexError):
            container[key] = json.loads(json.dumps(other[name]))
    elif kind < 0.3:
        container[key] = deep(rng)
    elif kind < 0.4 and isinstance(container[key], (int, float)):
        container[key] = container[key] * rng.choice([-1, 0.5, 2, 1000, 10**12])
    elif kind < 0.45 and isinstance(container, dict):
        container[rng.choice(["x", "type", "rope_scaling", "quantization_config", ""])] = rng.choice(ODD)
    else:
        container[key] = rng.choice(ODD)
    return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A flipped bit, a cut, strange bytes, a piece twice, or deep nesting."""
    at = rng.randrange(len(content) + 1)
    kind = rng.randrange(6)
    if kind == 0 and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at:]
    if kind == 3:
        end = min(len(content), at + rng.randint(1, 200))
        return content[:end] + content[at:end] + content[end:]
    if kind == 4:
        return content[:at] + rng.choice([b"[", b'{"x":']) * rng.choice([10, 2000, 100_000]) + content[at:]
    strange = [b"\0", b"\xff", b"\\ud800", b"1e999", b"9" * 5000, b"NaN", b'""', b"\xef\xbb\xbf"]
    return content[:at] + rng.choice(strange) + content[at:]


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return mutate_bytes(content, rng)
    value = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        value = mutate_value(value, rng) if isinstance(value, (dict, list)) else value
    return json.dumps(value).encode()


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        with contextlib.suppress(ValueError):
            lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header: its length, its JSON, or its bytes; the weights too are cut or lengthened now and then."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.1:
        lengths = [0, 1, length - 1, length + 1, 2**20, 2**40, 2**63, 2**64 - 1]
        return struct.pack("<Q", rng.choice(lengths)) + content[8:]
    if kind < 0.2:
        return content[: rng.randrange(len(content))]
    header = mutate_json(header, rng)
    return struct.pack("<Q", len(header)) + header + (rest if kind < 0.9 else rest + b"x" * 8)


TARGETS = {  # file -> (its mutation, how often, what is run)
    "pairs.jsonl": (mutate_lines, 4, "text"), "chats.jsonl": (mutate_lines, 4, "chat"),
    "model/config.json": (mutate_json, 5, "text"), "model/tokenizer.json": (mutate_json, 4, "text"),
    "model/tokenizer_config.json": (mutate_json, 4, "chat"), "model/special_tokens_map.json": (mutate_json, 1, "chat"),
    "model/generation_config.json": (mutate_json, 1, "text"), "model/model.safetensors": (mutate_safetensors, 4, "text"),
    "model/chat_template.jinja": (mutate_bytes, 2, "chat"),
    "sharded/model.safetensors.index.json": (mutate_json, 2, "sharded"),
    "adapter/adapter_config.json": (mutate_json, 3, "adapter"),
    "adapter/adapter_model.safetensors": (mutate_safetensors, 2, "adapter")}


def mutated_case(home: Path, seed: int) -> tuple[str, str]:
    """Mutate one file of the set-up in `home`: (the file, what is run)."""
    rng = random.Random(seed)
    name = rng.choices(list(TARGETS), [weight for _, weight, _ in TARGETS.values()])[0]
    mutate, _, kind = TARGETS[name]
    path = home / name
    content = path.read_bytes()
    while (odd := mutate(content, rng)) == content:
        pass
    path.write_bytes(odd)
    return name, kind


# Runs


def make_setup(home: Path) -> None:
    """A whole small set-up: pairs, conversations, a model with a tokenizer, one in shards, an adapter."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import make_rows, make_tiny

    import dpo
    import model as models

    (home / "model").mkdir()
    make_tiny(home / "model")
    write = lambda name, value: (home / name).write_text(json.dumps(value))
    write("model/special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
    write("model/generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.7})
    tokens = {"0": {"content": "<unk>", "special": True}, "2": {"content": "</s>", "lstrip": False, "special": True}}
    settings = json.loads((home / "model" / "tokenizer_config.json").read_text())
    write("model/tokenizer_config.json", settings | {
        "added_tokens_decoder": tokens, "extra_special_tokens": ["<x>"], "model_max_length": 256})
    (home / "model" / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((home / "model" / "config.json").read_text()) | {"vocab_size": 26, "head_dim": 8}
    model = models.Decoder(models.read_config(config))
    model.raw_config = config | {"attention_bias": False, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}}
    models.save_model(model, home / "model")
    rows = [r | {"chosen": " yes" + r["chosen"], "rejected": " no" + r["rejected"]} for r in make_rows(6, scores=True)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    say = lambda role, content: {"role": role, "content": content}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    more = {"tools": tools, "chat_template_kwargs": {"x": 1}}
    chats = [more | {"prompt": [say("system", "be"), say("user", r["prompt"])], "chosen": [say("assistant", r["chosen"])],
                     "rejected": [say("assistant", r["rejected"])]} for r in rows]
    chats.append({"chosen": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "dog"}],
                  "rejected": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "cat"}]})
    (home / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chats))
    shutil.copytree(home / "model", home / "sharded")
    (home / "sharded" / "model.safetensors").unlink()
    limit, models.SHARD_BYTES = models.SHARD_BYTES, 20_000
    models.save_model(model, home / "sharded")
    models.SHARD_BYTES = limit
    adapter = ["--use_peft", "--lora_r", "2", "--output_dir", str(home / "adapter")]
    assert dpo.main([*arguments(home, "text"), *adapter]) == 0


def arguments(home: Path, kind: str) -> list[str]:
    model = {"adapter": "adapter", "sharded": "sharded"}.get(kind, "model")
    rows = "chats.jsonl" if kind == "chat" else "pairs.jsonl"
    return ["--model_name_or_path", str(home / model), "--dataset_name", str(home / rows),
            "--output_dir", str(home / "out"), "--cache_dir", str(home / "cache"), "--use_cpu", "--no_bf16", "--max_steps", "1", "--save_strategy", "no",
            "--per_device_train_batch_size", "2"]


def run_limited(argv: list[str], output: Path) -> int:
    """dpo.main in a child with limits: its exit status, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        status = 99
        try:
            stream = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            import dpo

            status = dpo.main(argv)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def may_end_so(status: int, output: str) -> bool:
    """Success; 2 with one message; or, where mutated weights are no numbers any more, 1 with one that names the step."""
    messages = [line for line in output.splitlines() if line.startswith("error: ")]
    if "Traceback" in output or "panicked" in output or len(messages) != (status != 0):
        return False
    return status in (0, 2) or (status == 1 and messages[0].startswith("error: step"))


def campaign(seed: int, count: int, first: int = 0) -> tuple[int, Counter]:
    failures, counts = 0, Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole, output = Path(scratch) / "whole", Path(scratch) / "output"
        whole.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            make_setup(whole)
        for kind in ("text", "chat", "sharded", "adapter"):
            status = run_limited(arguments(whole, kind), output)
            assert status == 0, output.read_text()
            shutil.rmtree(whole / "cache")
            shutil.rmtree(whole / "out")
        for number in range(first, first + count):
            home = Path(scratch) / "case"
            shutil.copytree(whole, home)
            base = home / "adapter" / "adapter_config.json"
            base.write_text(base.read_text().replace(str(whole), str(home)))
            name, kind = mutated_case(home, seed * 1_000_003 + number)
            status = run_limited(arguments(home, kind), output)
            text = output.read_text(errors="replace")
            counts[name, status] += 1
            if not may_end_so(status, text):
                failures += 1
                print(f"case {number} {name}: status {status}\n{text[-1500:]}\n", flush=True)
            shutil.rmtree(home)
    return failures, counts


def run_campaign(seed: int, count: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, __file__, str(seed), str(count)], capture_output=True, text=True,
                          env=os.environ | ENVIRONMENT)


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of Linux")


@needs_fork
def test_sixty_odd_files_end_in_success_or_in_one_message():
    done = run_campaign(seed=1, count=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_fork
@pytest.mark.slow
def test_two_thousand_odd_files_end_in_success_or_in_one_message():
    done = run_campaign(seed=2, count=2000)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    found, by_kind = campaign(*map(int, sys.argv[1:]))
    for (file, status), times in sorted(by_kind.items()):
        print(f"{file}: status {status}: {times}")
    print(f"{found} of {sum(by_kind.values())} ended otherwise")
    sys.exit(found > 0)
