# ruff: noqa: F811  pytest hands fixtures over by their names
"""The reference's log-probs on disk: what finds them, what must not, and what survives a kill, damage and company."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_dpo
from safetensors.torch import load_file, save_file
from test_dpo import COMMON, assert_same, run  # noqa: F401

import dpo
from parts import c_layers, log, ref_cache
from parts.reference import PrecomputedReference


def files(tmp_path) -> list:
    return sorted((tmp_path / "cache").glob("ref-*.bin"))


def trainer_of(tmp_path, **options) -> dpo.DPOTrainer:
    options = COMMON | dict(cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"), max_steps=1) | options
    return dpo.DPOTrainer(args=dpo.DPOConfig(**options))


@pytest.fixture
def passes(monkeypatch):
    """The pairs of each pass of the reference that is run, in order."""
    made, keep = [], PrecomputedReference.run
    monkeypatch.setattr(PrecomputedReference, "run",
                        lambda self, store, pairs, bar: made.append(pairs.tolist()) or keep(self, store, pairs, bar))
    return made


def copied(directory, out, **config):
    """A copy of a checkpoint, its config.json changed."""
    shutil.copytree(directory, out)
    text = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(text | config))
    return str(out)


def nudged(directory, out):
    """A copy with the last bit of one weight flipped."""
    copied(directory, out)
    tensors = load_file(out / "model.safetensors")
    bits = tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)
    bits[-1, -1] ^= 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def rows_of(pairs_file, change) -> str:
    return "".join(json.dumps(change(json.loads(line))) + "\n" for line in pairs_file.read_text("utf-8").splitlines())


def rewritten(pairs_file, out):
    """The same rows in another file, packed, their keys in another order."""
    out = out.with_suffix(".jsonl.gz")
    out.write_bytes(gzip.compress(rows_of(pairs_file, lambda r: dict(reversed(r.items()))).encode()))
    return str(out)


def edited(pairs_file, out):
    out.write_text(rows_of(pairs_file, lambda r: r | {"chosen": r["chosen"].replace("cat", "dog")}), "utf-8")
    return str(out)


def renumbered(directory, out):
    """The same words, two of them with each other's number in the tokenizer."""
    copied(directory, out)
    text = json.loads((out / "tokenizer.json").read_text())
    words = text["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (out / "tokenizer.json").write_text(json.dumps(text))
    return str(out)


HITS = {
    "beta": dict(beta=0.3), "loss": dict(loss_type=["ipo"]), "two losses": dict(loss_type=["sigmoid", "sft"]),
    "learning rate": dict(learning_rate=1e-5), "batch": dict(per_device_train_batch_size=3),
    "batch of the pass": dict(per_device_eval_batch_size=2), "tokens of a forward": dict(max_tokens_per_forward=40),
    "accumulation": dict(gradient_accumulation_steps=2), "epochs": dict(max_steps=-1, num_train_epochs=2.0),
    "ld_alpha": dict(ld_alpha=0.4), "ld_alpha of the policy": dict(ld_alpha=0.4, ld_apply_to_ref=False),
    "weighting": dict(use_weighting=True), "rpo": dict(rpo_alpha=1.0), "seed": dict(seed=7),
    "order": dict(shuffle_dataset=False), "checkpointing": dict(gradient_checkpointing=True),
    "a fresh LoRA": dict(use_peft=True, lora_r=2), "its dropout": dict(use_peft=True, disable_dropout=False),
    "a length that cuts nothing": dict(max_length=512), "evaluation": dict(eval_fraction=0.2)}
MISSES = {
    "truncation": dict(max_length=9), "its end": dict(max_length=9, truncation_mode="keep_end"),
    "short completions": dict(max_completion_length=2), "short prompts": dict(max_prompt_length=2),
    "float64": dict(dtype="float64"), "bfloat16": dict(dtype="bfloat16"), "autocast": dict(bf16=True),
    "4 bits": dict(use_peft=True, load_in_4bit=True)}


@pytest.fixture
def keys(tiny, pairs_file, tmp_path, passes):
    """The names of the cache's files after the plain run, and after one with these options."""

    def go(options, plain=None):
        base = dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), dtype="float32")
        trainer_of(tmp_path, **base | dict(max_steps=-1) | (plain or {})).reference.prepare()
        before = files(tmp_path)
        passes.clear()
        trainer_of(tmp_path, **base | options).reference.prepare()
        return before, files(tmp_path)

    return go


@pytest.mark.parametrize("name", HITS)
def test_what_changes_no_reference_log_prob_finds_them(keys, passes, name):
    before, after = keys(HITS[name])
    assert before == after and len(before) == 1 and not passes


@pytest.mark.parametrize("name", MISSES)
def test_what_changes_one_does_not(keys, passes, name):
    before, after = keys(MISSES[name])
    assert len(after) == len(before) + 1 == 2 and passes


@pytest.mark.parametrize("change", ["a copy", "the same model as reference", "the same rows in another file"])
def test_where_things_lie_does_not_matter(keys, passes, tiny, pairs_file, tmp_path, change):
    options = {"a copy": lambda: dict(model_name_or_path=copied(tiny, tmp_path / "model")),
               "the same model as reference": lambda: dict(ref_model_name_or_path=str(tiny)),
               "the same rows in another file": lambda: dict(dataset_name=rewritten(pairs_file, tmp_path / "r.gz"))}
    before, after = keys(options[change]())
    assert before == after and not passes


@pytest.mark.parametrize("change", ["one bit of one weight", "one word of the rows", "the tokenizer", "the config",
                                    "a reference of its own", "its type"])
def test_content_does(keys, passes, tiny, pairs_file, tmp_path, change):
    nudge = lambda: nudged(tiny, tmp_path / "model")
    options = {"one bit of one weight": lambda: dict(model_name_or_path=nudge()),
               "one word of the rows": lambda: dict(dataset_name=edited(pairs_file, tmp_path / "rows.jsonl")),
               "the tokenizer": lambda: dict(model_name_or_path=renumbered(tiny, tmp_path / "model")),
               "the config": lambda: dict(model_name_or_path=copied(tiny, tmp_path / "model", rope_theta=5e3)),
               "a reference of its own": lambda: dict(ref_model_name_or_path=nudge()),
               "its type": lambda: dict(ref_model_name_or_path=str(tiny), ref_model_dtype="bfloat16")}
    before, after = keys(options[change]())
    assert len(after) == len(before) + 1 == 2 and passes


@pytest.mark.parametrize("one, other", [
    (dict(), dict(use_bnb_nested_quant=True)), (dict(), dict(bnb_4bit_quant_type="fp4")),
    (dict(), dict(bnb_4bit_compute_dtype="bfloat16"))], ids=str)
def test_every_way_of_4_bits_is_its_own(keys, passes, one, other):
    base = dict(dtype="float32", use_peft=True, load_in_4bit=True)
    before, after = keys(base | other, base | one)
    assert len(after) == len(before) + 1 == 2 and passes


@pytest.mark.parametrize("options, count", [(dict(bf16=True), 2), (dict(dtype="bfloat16"), 2), (dict(bf16=False), 1)], ids=str)
def test_with_layers_in_c_a_reference_in_bfloat16_is_another(tiny, pairs_file, tmp_path, monkeypatch, options, count):
    """They round otherwise than PyTorch's, and the first loss would not be ln 2."""
    if c_layers.library() is None:
        pytest.skip("no C compiler")
    options = dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file)) | dict(dtype="float32") | options
    trainer_of(tmp_path, **options).reference.prepare()
    monkeypatch.setattr(c_layers, "library", lambda: None)
    trainer_of(tmp_path, **options).reference.prepare()
    assert len(files(tmp_path)) == count


def test_an_adapter_that_is_gone_on_from_is_told_from_its_base_and_from_another_scale(run, pairs_file, tmp_path):
    run("first", use_peft=True, lora_r=4, learning_rate=1e-2, dtype="float32")
    shutil.copytree(tmp_path / "first", tmp_path / "scaled")
    settings = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    (tmp_path / "scaled" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 64}))
    for name, count in (("first", 2), ("scaled", 3), ("first", 3)):
        options = dict(model_name_or_path=str(tmp_path / name), dataset_name=str(pairs_file), dtype="float32")
        trainer_of(tmp_path, **options).reference.prepare()
        assert len(files(tmp_path)) == count


# Numbers


def test_the_cached_reference_is_read_and_is_the_same(run, tmp_path, passes):
    first = run("a")
    assert len(files(tmp_path)) == 1 and len(passes) == 1
    assert_same(first, run("b", beta=0.1))
    assert len(passes) == 1


@pytest.mark.parametrize("options", [dict(ld_alpha=0.4), dict(ld_alpha=0.0), dict(ld_alpha=0.4, ld_apply_to_ref=False)],
                         ids=str)
def test_ld_alpha_needs_no_new_pass_and_is_that_of_a_live_reference(run, passes, options):
    run("plain")
    passes.clear()
    cached = run("a", **options)
    assert not passes
    assert_same(cached, run("b", **options, precompute_ref_log_probs=False))


def test_only_what_the_run_visits_is_run_and_only_once(run, tmp_path, passes):
    run("a", max_steps=1, shuffle_dataset=False)
    assert passes == [list(range(8))]
    whole = run("b", shuffle_dataset=False)
    assert passes[1:] == [list(range(8, 23))]
    assert_same(whole, run("c", shuffle_dataset=False, cache_dir=str(tmp_path / "elsewhere")))


def test_a_continued_adapter_is_its_own_reference_without_dropout(run, tmp_path):
    options = dict(learning_rate=1e-2, disable_dropout=False, dtype="float32")
    run("first", use_peft=True, lora_r=4, lora_dropout=0.5, **options)
    on = options | dict(model_name_or_path=str(tmp_path / "first"))
    assert_same(run("a", **on, per_device_eval_batch_size=3), run("b", **on, precompute_ref_log_probs=False), 1e-4)


def test_two_ranks_share_it_and_one_finds_what_they_made(run, tiny, pairs_file, tmp_path, passes):
    run_dpo("--model_name_or_path", tiny, "--dataset_name", pairs_file, "--output_dir", tmp_path / "two", "--cache_dir",
            tmp_path / "cache", "--dtype", "float64", "--no_bf16", "--use_cpu", "--learning_rate", "3e-3",
            "--num_train_epochs", 1, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--save_strategy", "no",
            "--per_device_eval_batch_size", 20, ranks=2)
    one = run("one")
    assert not passes and len(files(tmp_path)) == 1
    assert_same(one, (read_metrics(tmp_path / "two"), load_file(tmp_path / "two" / "model.safetensors")), 1e-9)


# What may happen to it


def test_a_pass_that_was_interrupted_goes_on_and_is_bitwise_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ref_cache, "SUMS_BLOCK", 5)
    whole = run("whole", cache_dir=str(tmp_path / "elsewhere"))
    keep, blocks = PrecomputedReference.run, []

    def dies_in_the_third(self, store, pairs, bar):
        blocks.append(list(pairs))
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return keep(self, store, pairs, bar)

    monkeypatch.setattr(PrecomputedReference, "run", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    resumed = run("cut")
    assert blocks[2] == blocks[3] and len(blocks) == 6  # five blocks of 23 pairs; the third was tried twice
    assert whole[0] == resumed[0] and all(torch.equal(p, resumed[1][n]) for n, p in whole[1].items())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import dpo
from parts import ref_cache
ref_cache.SUMS_BLOCK, written, write = 5, [], ref_cache.write_sums

def dies(path, table, pairs, sums):
    if len(written) == 2:
        with open(path, "r+b") as stream:  # half of the third block is on the disk
            stream.seek(2 * table.itemsize)
            stream.write(sums.tobytes()[: sums.nbytes // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(pairs)
    write(path, table, pairs, sums)

ref_cache.write_sums = dies
dpo.main(sys.argv[2:])
"""


def test_a_long_pass_of_the_reference_says_how_far_it_is_where_there_is_no_terminal(run, tmp_path, capsys, monkeypatch):
    run("short")
    assert "reference" not in capsys.readouterr().out  # within half a minute
    monkeypatch.setattr(log, "SILENCE", 0.0)
    run("long", cache_dir=str(tmp_path / "elsewhere"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference, once before training: ")]
    assert len(said) >= 3 and said == sorted(set(said), key=said.index) and said[-1].endswith(" 100%")


def test_a_kill_amid_a_write_costs_that_block_alone(run, tiny, pairs_file, tmp_path, passes, capsys, monkeypatch):
    flags = ["--model_name_or_path", tiny, "--dataset_name", pairs_file, "--output_dir", tmp_path / "out",
             "--cache_dir", tmp_path / "cache", "--dtype", "float64", "--no_bf16", "--use_cpu", "--num_train_epochs", 1]
    done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), *map(str, flags)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setattr(ref_cache, "SUMS_BLOCK", 5)
    resumed = run("a")
    assert passes == [list(range(10, 15)), list(range(15, 20)), list(range(20, 23))]
    assert "damaged in block 2" in capsys.readouterr().out
    assert_same(resumed, run("b", cache_dir=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize("where", ["a sum", "a checksum", "the end"])
def test_damage_is_noticed_and_its_block_alone_made_again(run, tmp_path, passes, monkeypatch, capsys, where):
    monkeypatch.setattr(ref_cache, "SUMS_BLOCK", 5)
    first = run("a")
    cache, = files(tmp_path)
    raw, size = bytearray(cache.read_bytes()), 5 * 4 * 8 + 32
    if where == "the end":
        raw = raw[:-7]
    else:
        raw[3 * size + (17 if where == "a sum" else size - 3)] ^= 1
    cache.write_bytes(raw)
    passes.clear()
    assert_same(first, run("b"))
    number = 4 if where == "the end" else 3
    assert passes == [list(range(5 * number, min(5 * number + 5, 23)))]
    assert f"{cache}: damaged in block {number}" in capsys.readouterr().out
    passes.clear()
    assert_same(first, run("c"))
    assert not passes


def test_runs_side_by_side_lose_nothing_of_each_other(tmp_path):
    path, rng = tmp_path / "ref.bin", np.random.default_rng(0)
    sums = rng.normal(size=(3000, 2, 2))
    mine = [np.sort(rng.choice(3000, 1500, replace=False)) for _ in range(6)]

    def writes(pairs):
        table = ref_cache.open_sums(path, 3000, sums.dtype)
        for few in np.split(pairs, range(100, 1500, 100)):
            for part in ref_cache.blocks_of(few):
                ref_cache.write_sums(path, table, part, sums[part])

    threads = [threading.Thread(target=writes, args=(pairs,)) for pairs in mine]
    [t.start() for t in threads]
    [t.join() for t in threads]
    table, written = ref_cache.open_sums(path, 3000, sums.dtype), np.unique(np.concatenate(mine))
    assert np.array_equal(ref_cache.take_sums(table, written), sums[written])
    missing, damaged = ref_cache.missing_sums(table, np.arange(3000))
    assert not damaged and np.array_equal(np.flatnonzero(missing), np.setdiff1d(np.arange(3000), written))


def test_what_is_there_stays_to_the_bit(tmp_path):
    path, pairs = tmp_path / "ref.bin", np.array([3, 7])
    table = ref_cache.open_sums(path, 10, np.dtype("float32"))
    ref_cache.write_sums(path, table, pairs, np.ones((2, 2, 2), np.float32))
    ref_cache.write_sums(path, table, np.array([6, 7]), np.full((2, 2, 2), 2, np.float32))
    assert ref_cache.take_sums(table, np.array([3, 6, 7]))[:, 0, 0].tolist() == [1, 2, 1]
    assert ref_cache.missing_sums(table, np.array([2, 6]))[0].tolist() == [True, False]


@pytest.mark.slow
def test_five_million_pairs_do_not_live_in_memory(tmp_path):
    """80 MB of sums: opened, checked and read at random in a process that may hold 16 MB more than before."""
    code = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from parts import ref_cache
from pathlib import Path
anonymous = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
path, count = Path(sys.argv[2]), 5_000_000
before = anonymous()
table = ref_cache.open_sums(path, count, np.dtype("float32"))
rng, most = np.random.default_rng(0), 0
for pairs in ref_cache.blocks_of(np.arange(count))[::40]:
    ref_cache.write_sums(path, table, pairs, rng.normal(size=(len(pairs), 2, 2)).astype(np.float32))
    most = max(most, anonymous())
for _ in range(2000):
    ref_cache.take_sums(table, rng.integers(0, count, 64))
print(max(most, anonymous()) - before)
"""
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "ref.bin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # 40 of them are the numbers of the pairs
