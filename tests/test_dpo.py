"""The trainer: what must never change the result, the files it writes, and what it refuses."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import textbook
import torch
from conftest import ROOT, make_rows, read_metrics, run_dpo
from safetensors.torch import load_file

import data
import dpo
import losses
import model as models
from extras.models.opening import load_adapted
from parts.rows import find_files

COMMON = dict(dtype="float64", bf16=False, use_cpu=True, learning_rate=3e-3, num_train_epochs=1.0, logging_steps=1,
              save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8)


@pytest.fixture
def run(tiny, pairs_file, tmp_path):
    """Train the tiny model in this process; returns (metrics of each step, final weights)."""

    def go(name="out", **options):
        config = dpo.DPOConfig(**(COMMON | dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file),
                                                output_dir=str(tmp_path / name), cache_dir=str(tmp_path / "cache")) | options))
        trainer = dpo.DPOTrainer(args=config)
        trainer.train()
        steps = [m for m in read_metrics(tmp_path / name) if "loss" in m]
        return steps, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    return go


def assert_same(a, b, tolerance=1e-10):
    """Two runs: every logged loss and reward, and every weight."""
    assert [m["step"] for m in a[0]] == [m["step"] for m in b[0]]
    for one, other in zip(a[0], b[0]):
        for key in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy", "num_tokens"):
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (key, one["step"])
    for name, p in a[1].items():
        assert torch.allclose(p, b[1][name].to(p), rtol=tolerance, atol=tolerance), name


def test_training_follows_the_textbook(run, tiny, pairs_file, tmp_path):
    steps, weights = run(beta=0.3, shuffle_dataset=False)
    policy, reference = (models.load_model(tiny, torch.float64) for _ in range(2))
    store = data.build_store(find_files(str(pairs_file)), data.Tokenizer.load(tiny), data.DataOptions(), tmp_path / "c")
    pairs = [store[i] for i in range(len(store))]
    history = textbook.train(policy, reference, [pairs[i : i + 8] for i in range(0, 23, 8)], 0.3, 3e-3, 1.0)
    assert history[0] == pytest.approx(math.log(2), abs=1e-12)
    assert [m["loss"] for m in steps] == pytest.approx(history, rel=1e-10)
    for name, p in policy.named_parameters():
        assert torch.allclose(p, weights[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("options", [
    dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
    dict(max_tokens_per_forward=40),
    dict(precompute_ref_log_probs=False),
    dict(gradient_checkpointing=True),
    dict(exact_global_loss=True),
    dict(exact_global_loss=True, per_device_train_batch_size=2, gradient_accumulation_steps=4),
], ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("loss", [
    dict(), dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]), dict(loss_type=["bco_pair"]),
    dict(ld_alpha=0.4, rpo_alpha=0.5), dict(use_weighting=True)], ids=lambda o: " ".join(map(str, o.values())) or "dpo")
def test_how_a_batch_is_cut_never_changes_the_result(run, options, loss):
    assert_same(run("a", **loss), run("b", **loss, **options))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_sorting_losses_sort_over_the_whole_global_batch(run, loss):
    whole = run("a", loss_type=[loss])
    cut = run("b", loss_type=[loss], per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(whole, cut)


def test_head_chunks_never_change_the_result(run, monkeypatch):
    whole = run("a")
    monkeypatch.setattr(models, "HEAD_CHUNK", 24 * 16)
    assert_same(whole, run("b"))


def test_another_copy_as_reference_is_the_same_reference(run, tiny):
    assert_same(run("a"), run("b", ref_model_name_or_path=str(tiny)))
    assert_same(run("a"), run("b", ref_model_name_or_path=str(tiny), precompute_ref_log_probs=False))


def test_a_bfloat16_reference_is_close_to_the_exact_one(run):
    exact, rounded = run("a", precompute_ref_log_probs=False), run("b", precompute_ref_log_probs=False, ref_model_dtype="bfloat16")
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(exact[0], rounded[0]))
    assert 0 < gap < 0.05


@pytest.mark.parametrize("live", [False, True])
def test_lora_starts_at_its_base_and_adapters_off_is_the_reference(run, live):
    options = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear", "lm_head", "embed_tokens"])
    steps, weights = run("a", **options, precompute_ref_log_probs=not live)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert steps[-1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert any("lora_B" in n and p.abs().sum() > 0 for n, p in weights.items())


# Start values: what each loss is where policy equals reference. dn = n_w - n_l and ds, the gap of the rows' scores, are
# arrays over the pairs of a step.
LN2 = math.log(2)
log_sigma = lambda z: -np.log1p(np.exp(-z))
START = {
    **dict.fromkeys("sigmoid robust aot aot_pair aot_unpaired sigmoid_norm dpop".split(), lambda dn, ds: LN2),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), lambda dn, ds: 1.0),
    **dict.fromkeys(("nca_pair", "bco_pair"), lambda dn, ds: 2 * LN2),
    "ipo": lambda dn, ds: 25.0, "sppo_hard": lambda dn, ds: 50.0, "discopop": lambda dn, ds: (LN2 + 1) / 2,
    "exo_pair": lambda dn, ds: -LN2 - math.log(1e-3 * (1 - 1e-3)) / 2,
    "rdpo": lambda dn, ds: -log_sigma(0.01 * dn), "odpo": lambda dn, ds: np.log1p(ds), "rpo_sq": lambda dn, ds: ds**2,
    "rpo_bwd_kl": lambda dn, ds: LN2 + log_sigma(ds) / (1 + np.exp(-ds)) + log_sigma(-ds) / (1 + np.exp(ds)),
    "rpo_fwd_kl": lambda dn, ds: -LN2 - (log_sigma(ds) + log_sigma(-ds)) / 2}
WEIGHTS = {name: 1 + i / 10 for i, name in enumerate(sorted(START))}  # all unequal: no two errors cancel


def start_of(trainer, step: int, names) -> float:
    """The weighted sum of the start values of `names`, mean over the pairs of a step (0, 1 ...)."""
    store, pairs = trainer.train_store, trainer.pairs_of(step)
    n_w, n_l = store.scored_lengths(pairs).T
    s_w, s_l = np.asarray(store.ratings[pairs], np.float64).T
    return sum(WEIGHTS[name] * float(np.mean(START[name](n_w - n_l, s_w - s_l))) for name in names)


def assert_starts(steps: list[dict], trainer, names) -> None:
    assert steps
    for m in steps:
        assert m["loss"] == pytest.approx(start_of(trainer, m["step"] - 1, names), rel=1e-11), m["step"]
        assert max(abs(m["rewards/margins"]), abs(m["rewards/chosen"])) < 1e-12, m["step"]


def all_at_once(names) -> dict:
    """One run with all of these losses, which stays where it starts."""
    return dict(loss_type=list(names), loss_weights=[WEIGHTS[name] for name in names], learning_rate=0.0)


@pytest.fixture
def trainers(monkeypatch):
    """The trainers made during the test, in order."""
    made, keep = [], dpo.DPOTrainer.train
    monkeypatch.setattr(dpo.DPOTrainer, "train", lambda self: made.append(self) or keep(self))
    return made


@pytest.mark.parametrize("loss", sorted(START))
def test_at_learning_rate_0_every_loss_stays_at_its_start_value(run, trainers, loss):
    """The live reference runs in the policy's own batches, so that equal is equal to the bit, and a tie counts 1/2."""
    steps, _ = run(loss_type=[loss], loss_weights=[WEIGHTS[loss]], learning_rate=0.0, num_train_epochs=2.0,
                   precompute_ref_log_probs=False)
    assert len(steps) == 6 and all(m["rewards/margins"] == 0 and m["rewards/accuracies"] == 0.5 for m in steps)
    assert_starts(steps, trainers[0], [loss])


LORA = dict(use_peft=True, lora_r=2)


@pytest.mark.parametrize("sorting", [False, True], ids=["pair by pair", "whole batch at once"])
@pytest.mark.parametrize("mode", [
    {}, dict(precompute_ref_log_probs=False), LORA, LORA | dict(precompute_ref_log_probs=False), dict(max_length=9),
    dict(max_length=9, truncation_mode="keep_end"), dict(max_completion_length=3), dict(max_prompt_length=2),
    dict(gradient_accumulation_steps=2, per_device_train_batch_size=3), dict(max_tokens_per_forward=40),
    dict(ld_alpha=0.5), dict(gradient_checkpointing=True), dict(sync_ref_model=True, ref_model_sync_steps=1)], ids=str)
def test_every_loss_starts_at_its_closed_value_in_every_mode(run, trainers, mode, sorting):
    names = [name for name in START if sorting or name not in losses.SORTS_THE_BATCH]
    steps, _ = run(**all_at_once(names), **mode)
    assert_starts(steps, trainers[0], names)


@pytest.mark.parametrize("mode", [{}, dict(max_length=9, truncation_mode="keep_end")], ids=str)
def test_every_loss_starts_at_its_closed_value_with_each_prompt_twice(run, trainers, monkeypatch, mode):
    steps, _ = run("shared", **all_at_once(START), **mode)
    monkeypatch.setattr(data, "collate", partial(data.collate, share_prefix=False))
    alone, _ = run("unshared", **all_at_once(START), **mode, precompute_ref_log_probs=False)
    assert_starts(alone, trainers[1], START)
    for one, other in zip(steps, alone):
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-12)


def test_keep_end_truncation_leaves_pairs_unshared(run, trainers):
    run(max_length=9, truncation_mode="keep_end")
    assert (trainers[0].train_store.rejected_prompt_lengths >= 0).sum() > 3


@pytest.mark.parametrize("mode", [{}, LORA, dict(precompute_ref_log_probs=False)], ids=str)
def test_every_loss_is_at_its_closed_value_after_a_resume(run, trainers, tmp_path, mode):
    options = all_at_once(START) | mode | dict(num_train_epochs=2.0, save_strategy="steps", save_steps=4)
    run("a", **options)
    steps, _ = run("a", **options, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_starts(steps, trainers[1], START)
    assert trainers[1].position.step == 6 and len(steps) == 6


@pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_loss_starts_at_its_closed_value_on_two_ranks(run, trainers, tiny, pairs_file, tmp_path, live):
    run(**all_at_once(START))
    flags = ["--no_precompute_ref_log_probs"] if live else []
    run_dpo("--model_name_or_path", tiny, "--dataset_name", pairs_file, "--output_dir", tmp_path / "two", "--cache_dir",
            tmp_path / "cache2", "--dtype", "float64", "--no_bf16", "--use_cpu", "--learning_rate", 0,
            "--num_train_epochs", 1, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--loss_type", *START,
            "--loss_weights", *(WEIGHTS[name] for name in START), *flags, ranks=2)
    assert_starts(read_metrics(tmp_path / "two"), trainers[0], START)


def test_bco_delta_is_the_mean_reward_of_earlier_steps(tiny, pairs_file, tmp_path):
    options = dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), output_dir=str(tmp_path),
                   cache_dir=str(tmp_path / "c"), loss_type=["bco_pair"], num_train_epochs=2.0, learning_rate=2e-2)
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**(COMMON | options)))
    used, keep = [], trainer.train_step

    def watched():
        used.append(trainer.position.delta)
        return keep()

    trainer.train_step = watched
    trainer.train()
    rewards = [(m["rewards/chosen"] + m["rewards/rejected"]) / 2 for m in read_metrics(tmp_path)]
    sizes = [8, 8, 7, 8, 8, 7]
    earlier = [sum(n * r for n, r in zip(sizes[:k], rewards[:k])) / max(1, sum(sizes[:k])) for k in range(6)]
    assert used == pytest.approx(earlier, abs=1e-12) and used[0] == 0 and abs(used[5]) > 1e-3


@pytest.mark.parametrize("flags", [["--loss_type", "sigmoid", "sft", "aot"], ["--precompute_ref_log_probs", "false"]], ids=" ".join)
def test_two_ranks_equal_one_with_twice_the_batch(run, tiny, pairs_file, tmp_path, flags):
    one = run("one", **{flags[0][2:]: flags[1:] if flags[0] == "--loss_type" else False})
    run_dpo("--model_name_or_path", tiny, "--dataset_name", pairs_file, "--output_dir", tmp_path / "two", "--cache_dir",
            tmp_path / "cache2", "--dtype", "float64", "--no_bf16", "--use_cpu", "--learning_rate", "3e-3", "--num_train_epochs", 1,
            "--logging_steps", 1, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4, *flags, ranks=2)
    assert_same(one, (read_metrics(tmp_path / "two"), load_file(tmp_path / "two" / "model.safetensors")), 1e-9)


@pytest.mark.parametrize("options", [dict(), dict(use_peft=True, lora_r=4, disable_dropout=False), dict(loss_type=["bco_pair"]),
                                     dict(sync_ref_model=True, ref_model_sync_steps=2)], ids=str)
def test_resume_is_bitwise(run, tmp_path, options, monkeypatch):
    options = options | dict(num_train_epochs=3.0, logging_steps=2, dtype="float32")
    whole = run("whole", **options)
    keep = dpo.DPOTrainer.train_step

    def dies(self):
        if self.position.step == 5:
            raise KeyboardInterrupt
        return keep(self)

    monkeypatch.setattr(dpo.DPOTrainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run("cut", save_strategy="steps", save_steps=3, **options)
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", keep)
    resumed = run("cut", save_strategy="steps", save_steps=3, resume_from_checkpoint="true", **options)
    assert whole[0] == resumed[0]
    for name, p in whole[1].items():
        assert torch.equal(p, resumed[1][name]), name


def test_resume_refuses_another_run(run):
    run("a", save_strategy="epoch")
    with pytest.raises(ValueError, match="beta was 0.1 there and is 0.2 now"):
        run("a", beta=0.2, resume_from_checkpoint="true")


def test_resume_refuses_another_model(run, tiny, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    save_file({n: t * 1.01 for n, t in load_file(tiny / "model.safetensors").items()}, other / "model.safetensors")
    run("a", save_strategy="epoch")
    with pytest.raises(ValueError, match="model was"):
        run("a", model_name_or_path=str(other), resume_from_checkpoint="true")


def test_eval_metrics_are_those_of_all_pairs_at_once(run, tmp_path, pairs_file):
    run("a", eval_dataset_name=str(pairs_file), eval_on_start=True, learning_rate=0.0, per_device_eval_batch_size=4)
    first, *_, last = [m for m in read_metrics(tmp_path / "a") if "eval_loss" in m]
    assert first["step"] == 0 and last["step"] == 3
    assert first["eval_loss"] == last["eval_loss"] == pytest.approx(math.log(2), abs=1e-12)


def test_eval_fraction_holds_pairs_out(tiny, pairs_file, tmp_path):
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**COMMON, model_name_or_path=str(tiny), dataset_name=str(pairs_file),
                                                output_dir=str(tmp_path), cache_dir=str(tmp_path / "c"), eval_fraction=0.2))
    _, eval_pairs = trainer.eval_sets["eval"]
    assert len(eval_pairs) == 5 and len(trainer.train_pairs) == 18
    assert not set(eval_pairs) & set(trainer.train_pairs)


def test_every_epoch_visits_every_pair_once(tiny, pairs_file, tmp_path):
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**COMMON, model_name_or_path=str(tiny), dataset_name=str(pairs_file),
                                                output_dir=str(tmp_path), cache_dir=str(tmp_path / "c")))
    for epoch in range(2):
        seen = np.concatenate([trainer.pairs_of(3 * epoch + step) for step in range(3)])
        assert sorted(seen) == list(range(23))
    assert list(trainer.pairs_of(0)) != list(trainer.pairs_of(3))


def test_dealing_gives_each_pair_to_one_rank_and_balances_tokens():
    tokens = np.array([100, 1, 1, 1, 50, 49, 2, 90])
    hands = data.deal(np.arange(8), tokens, 3)
    assert sorted(np.concatenate(hands)) == list(range(8))
    assert max(tokens[h].sum() for h in hands) <= 104


@pytest.mark.parametrize("kind,shape", [("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]), ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
                                        ("constant", [1] * 6), ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447])])
def test_learning_rate_schedules(run, kind, shape):
    steps, _ = run(lr_scheduler_type=kind, warmup_steps=2, num_train_epochs=2.0)
    assert [m["learning_rate"] / 3e-3 for m in steps] == pytest.approx(shape, abs=1e-6)


@pytest.mark.parametrize("flags,words", [
    (["--no_such_flag", "1"], "no such flag"),
    (["--adam_beta1", "1"], "must be below 1"),
    (["--seed", "-1"], "0 <= seed"),
    (["--save_steps", "0"], "above 0"),
    (["--eval_steps", "-3", "--eval_strategy", "steps"], "--eval_steps"),
    (["--bta", "0.2"], "did you mean --beta"),
    (["--beta", "high"], "--beta high: expected a number"),
    (["--beta", "-1"], "must be above 0"),
    (["--loss_type", "dpo"], "--loss_type dpo: unknown"),
    (["--loss_type", "hinge", "--label_smoothing", "0.1"], "does not read it"),
    (["--loss_type", "robust", "--label_smoothing", "0.5"], "0 <= eps < 0.5"),
    (["--loss_type", "bco_pair", "--f_divergence_type", "forward_kl"], "f_divergence_type with --loss_type bco_pair"),
    (["--loss_type", "aot", "--use_weighting"], "belong to no one pair"),
    (["--loss_type", "simpo", "--reference_free"], "read no reference"),
    (["--loss_type", "simpo", "--ref_model_name_or_path", "x"], "a loss that has a reference"),
    (["--loss_weights", "1", "2"], "2 weights for 1"),
    (["--lora_r", "8"], "read only with --use_peft"),
    (["--truncation_mode", "middle"], "one of keep_start, keep_end"),
    (["--bf16", "maybe"], "true or false"),
    (["--sync_ref_model", "--precompute_ref_log_probs"], "moves the reference"),
    (["--per_device_train_batch_size", "0"], "must be 1 or more"),
    (["--resume_from_checkpoint", "nowhere"], "no checkpoint there"),
    (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
    (["--model_name_or_path", "missing-model"], "missing-model"),
])
def test_unusable_arguments_end_in_one_message_and_exit_2(tiny, pairs_file, tmp_path, capsys, flags, words):
    status = dpo.main(["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir",
                       str(tmp_path / "out"), "--cache_dir", str(tmp_path / "c"), "--use_cpu", *flags])
    error = capsys.readouterr().err
    assert status == 2 and words in error and "Traceback" not in error and error.count("error:") == 1


def test_under_torchrun_the_first_rank_alone_says_what_is_wrong(tiny, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "the", "chosen": " a"}\n')
    done = run_dpo("--model_name_or_path", tiny, "--dataset_name", bad, "--output_dir", tmp_path / "o", "--cache_dir",
                   tmp_path / "c", "--use_cpu", ranks=2, expect=1)
    assert done.stderr.count("error: ") == 1 and "bad.jsonl:1" in done.stderr
    assert f'{dpo.__file__}", line' not in done.stderr and "SIGABRT" not in done.stderr  # torchrun prints its own trace


LAST_WORDS = """import atexit, os, sys
atexit.register(lambda: os.write(2, b"at exit\\n"))
class Last:
    def __del__(self, write=os.write): write(2, b"Python ends\\n")
sys.last = Last()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_an_error_a_rank_does_what_is_due_at_exit_and_python_does_not_end(tiny, tmp_path, monkeypatch, ranks):
    """It has not left the group, and while Python ends gloo's threads would now and then abort it."""
    (tmp_path / "sitecustomize.py").write_text(LAST_WORDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "the", "chosen": " a"}\n')
    words = ["--model_name_or_path", tiny, "--dataset_name", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "o"]
    done = run_dpo(*words, "--cache_dir", tmp_path / "c", "--use_cpu", ranks=ranks, expect=2 if ranks == 1 else 1)
    before = done.stderr[: done.stderr.find("ChildFailedError")]  # torchrun's own comes after
    assert "at exit" in before and ("Python ends" in before) == (ranks == 1)


def test_flags_parse_in_every_spelling():
    base = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    parse = lambda *words: dpo.parse_config([*base, *words])
    assert parse("--bf16").bf16 is parse("--bf16", "true").bf16 is True
    assert parse("--bf16", "false").bf16 is parse("--no_bf16").bf16 is False
    config = parse("--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.2", "--max_length", "none", "--no_remove_unused_columns")
    assert config.loss_type == ["sigmoid", "sft"] and config.loss_weights == [1.0, 0.2] and config.max_length is None


@pytest.mark.parametrize("name,text", [("c.toml", 'beta = 0.3\nloss_type = ["ipo"]'), ("c.json", '{"beta": 0.3, "loss_type": ["ipo"]}'),
                                       ("c.yaml", "beta: 0.3\nloss_type: ipo\n")])
def test_config_files_set_flags_and_the_command_line_wins(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    base = ["--model_name_or_path", "m", "--dataset_name", "d", "--config", str(tmp_path / name)]
    assert dpo.parse_config(base).beta == 0.3 and dpo.parse_config(base).loss_type == ["ipo"]
    assert dpo.parse_config([*base, "--beta", "0.7"]).beta == 0.7


def test_defaults_are_those_of_trl():
    trl = pytest.importorskip("trl")
    theirs = vars(trl.DPOConfig(output_dir="unused", bf16=False, report_to="none"))
    ours = vars(dpo.DPOConfig())
    on_purpose = {"gradient_checkpointing", "precompute_ref_log_probs", "bf16", "output_dir", "disable_tqdm",
                  "report_to"}  # TRL makes [] of "none"
    shared = set(ours) & set(theirs) - on_purpose
    assert len(shared) > 35
    differing = {n: (ours[n], theirs[n]) for n in shared
                 if ours[n] != theirs[n] and str(getattr(theirs[n], "value", theirs[n])) != str(ours[n])}
    assert not differing


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        dpo.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in text for name in dpo.DPOConfig.__annotations__)
    assert "[0.1]" in text and "reference:" in text


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(run, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "sigmoid", lambda x, beta: x.delta_score * math.nan)
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*pairs.jsonl:\d+"):
        run()


# Adapters


def adapter_run(run, tmp_path, **options):
    """A first adapter, trained a little: its directory."""
    run("first", use_peft=True, lora_r=4, lora_target_modules=["q_proj", "up_proj"], dtype="float32", learning_rate=1e-2, **options)
    return tmp_path / "first"


@pytest.mark.parametrize("live", [False, True])
def test_a_continued_adapter_starts_at_log_2_against_itself(run, tmp_path, live):
    first = adapter_run(run, tmp_path)
    options = dict(model_name_or_path=str(first), dtype="float32", precompute_ref_log_probs=not live)
    still, _ = run("still", learning_rate=0.0, **options)
    assert [m["loss"] for m in still] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    moved, _ = run("moved", **options)
    assert moved[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(moved[-1]["loss"] - math.log(2)) > 1e-4


def test_live_and_precomputed_references_of_a_continued_adapter_agree(run, tmp_path):
    first = adapter_run(run, tmp_path)
    options = dict(model_name_or_path=str(first), dtype="float32", learning_rate=1e-2, num_train_epochs=2.0)
    assert_same(run("a", **options), run("b", **options, precompute_ref_log_probs=False), 1e-5)


def test_another_adapter_can_be_the_reference(run, tmp_path, tiny):
    first = adapter_run(run, tmp_path)
    against, _ = run("a", ref_model_name_or_path=str(first), dtype="float32", learning_rate=0.0)
    assert against[0]["rewards/margins"] != 0
    mirrored, _ = run("b", model_name_or_path=str(first), ref_model_name_or_path=str(tiny), dtype="float32", learning_rate=0.0)
    assert [m["rewards/margins"] for m in mirrored] == pytest.approx([-m["rewards/margins"] for m in against], rel=1e-4)


def test_a_merged_adapter_is_the_adapted_model(run, tmp_path, tiny):
    options = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], use_rslora=True, learning_rate=1e-2)
    run("adapter", **options)
    run("merged", merge_adapter=True, **options)
    adapted, _ = load_adapted(tmp_path / "adapter", torch.float64)
    merged = models.load_model(tmp_path / "merged", torch.float64)
    ids = torch.arange(3, 15)
    inputs = (ids, torch.arange(12), torch.tensor([[0, 12, 0, 0]]))
    assert torch.allclose(adapted.logits(*inputs), merged.logits(*inputs), atol=1e-5)
    assert not torch.allclose(merged.logits(*inputs), models.load_model(tiny, torch.float64).logits(*inputs), atol=1e-3)


def test_loraplus_moves_b_faster(run):
    options = dict(use_peft=True, lora_r=4, max_steps=1)
    plain, fast = run("a", **options)[1], run("b", **options, loraplus_lr_ratio=4.0)[1]
    for name, p in plain.items():
        if "lora_B" in name:
            assert torch.allclose(fast[name], 4 * p, rtol=1e-9)


def test_adapters_load_in_peft(run, tmp_path, tiny):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run("a", use_peft=True, lora_r=4, use_rslora=True, lora_target_modules=["all-linear"], dtype="float32", learning_rate=1e-2)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "a")
    ours, _ = load_adapted(tmp_path / "a", torch.float32)
    ids = torch.arange(3, 15)
    with torch.no_grad():
        logits = ours.logits(ids, torch.arange(12), torch.tensor([[0, 12, 0, 0]]))
        assert torch.allclose(theirs(ids[None]).logits[0], logits, atol=1e-5)


# Bad input through the command line: one message, exit status 2


def broken(tiny, directory, damage):
    """A copy of the tiny checkpoint with one thing wrong."""
    shutil.copytree(tiny, directory)
    config, weights = directory / "config.json", directory / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "missing shard":
        weights.unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "m-1.safetensors"}}))
    elif damage == "unknown family":
        config.write_text(config.read_text().replace('"llama"', '"lama"'))
    elif damage == "unknown key":
        config.write_text(config.read_text().replace('"model_type"', '"wobble": 3, "model_type"'))
    elif damage == "quantized":
        config.write_text(config.read_text().replace('"model_type"', '"quantization_config": {"quant_method": "gptq"}, "model_type"'))
    elif damage == "wrong shape":
        config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 47'))
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "large tokenizer":
        text = (directory / "tokenizer.json").read_text()
        (directory / "tokenizer.json").write_text(re.sub(r'"yes": ?\d+', '"yes": 900', text))
    elif damage == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    return directory


@pytest.mark.parametrize("damage,words", [
    ("truncated", "model.safetensors"), ("no weights", "no model.safetensors"), ("no config", "config.json"),
    ("missing shard", "m-1.safetensors"), ("unknown family", "'lama'"), ("unknown key", "wobble"), ("quantized", "gptq"),
    ("wrong shape", "mlp.down_proj.weight in model.safetensors"), ("broken config", "config.json"),
    ("large tokenizer", "token 900, but the embedding of"), ("no tokenizer", "tokenizer.json")])
def test_a_bad_model_ends_in_one_message_and_exit_2(tiny, pairs_file, tmp_path, capsys, damage, words):
    model = broken(tiny, tmp_path / "model", damage)
    status = dpo.main(["--model_name_or_path", str(model), "--dataset_name", str(pairs_file), "--output_dir",
                       str(tmp_path / "out"), "--cache_dir", str(tmp_path / "c"), "--use_cpu"])
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("error:") == 1


@pytest.mark.parametrize("line,words", [
    (b'{"prompt": "the", "chosen": " a"}', "rejected"), (b'{"prompt": "the", "chosen": " a", "rejected": 3}', "rejected"),
    (b'{"prompt": "the"', "JSON"), (b'{"prompt": "\xff", "chosen": " a", "rejected": " b"}', "UTF-8"),
    (b'{"prompt": "the", "chosen": "", "rejected": " b"}', "empty"),
    (b'{"prompt": "the", "chosen": " a", "rejected": " a"}', "same"),
    (b'{"prompt": [{"role": "boss", "content": "x"}], "chosen": [{"role": "assistant", "content": "a"}],'
     b' "rejected": [{"role": "assistant", "content": "b"}]}', "boss"), (b"[1]", "object")])
def test_a_bad_row_ends_in_one_message_and_exit_2_or_is_skipped_and_listed(tiny, tmp_path, capsys, line, words):
    rows = tmp_path / "rows.jsonl"
    good = "".join(json.dumps(r) + "\n" for r in make_rows(3)).encode()
    rows.write_bytes(good + line + b"\n" + good)
    flags = ["--model_name_or_path", str(tiny), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out"),
             "--cache_dir", str(tmp_path / "c"), "--use_cpu", "--max_steps", "1", "--no_bf16"]
    assert dpo.main(flags) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:4" in error and words in error and error.count("error:") == 1
    assert dpo.main([*flags, "--on_bad_row", "skip"]) == 0
    assert "rows.jsonl:4" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_missing_or_empty_file_is_named(tiny, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    assert dpo.main(["--model_name_or_path", str(tiny), "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir",
                     str(tmp_path / "o"), "--cache_dir", str(tmp_path / "c"), "--use_cpu"]) == 2
    assert "rows.jsonl" in capsys.readouterr().err


@pytest.fixture
def fork(tmp_path):
    """fork(*flags): `cp *.py parts` into an empty folder, which trains the demo's pairs there; the finished process."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "parts", folder / "parts", ignore=shutil.ignore_patterns("__pycache__"))

    def train(*flags) -> subprocess.CompletedProcess:
        words = ["--model_name_or_path", ROOT / "demo" / "model", "--dataset_name", ROOT / "demo" / "train.jsonl",
                 "--output_dir", "out", *flags]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run([sys.executable, "dpo.py", *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=240,
                              env=environment | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)})

    return train


def test_the_core_trains_saves_and_resumes_with_extras_deleted(fork, tmp_path):
    steps = ["--save_steps", 2, "--logging_steps", 1]
    first = fork("--max_steps", 4, *steps)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "fork" / "out"
    whole, metrics = load_file(out / "model.safetensors"), read_metrics(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and metrics[0]["loss"] == pytest.approx(LN2, abs=1e-4)
    shutil.rmtree(out / "checkpoint-4")
    resumed = fork("--max_steps", 4, *steps, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "checkpoint-2" in resumed.stdout + resumed.stderr
    again = load_file(out / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("flags,status", [("--use_peft", 2), ("--dry_run", 2), ("--loss_type aot", 1)])
def test_without_extras_an_option_that_needs_it_ends_in_one_line(fork, flags, status):
    """Exit status 2 where setting up needs it, 1 where a step is the first to need it."""
    refused = fork("--max_steps", 2, *flags.split())
    assert refused.returncode == status, refused.stdout + refused.stderr
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "extras" in errors[0] and "Traceback" not in refused.stderr


def test_without_demo_and_without_a_model_one_line_says_what_to_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("parts.cli.ROOT", tmp_path)
    assert dpo.main(["--max_steps", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--model_name_or_path MODEL --dataset_name prefs.jsonl" in said


def test_without_extras_the_view_of_the_data_is_refused_in_one_line(tmp_path):
    shutil.copytree(ROOT / "parts", tmp_path / "parts")
    shutil.copy(ROOT / "data.py", tmp_path)
    done = subprocess.run([sys.executable, "data.py", "prefs.jsonl"], cwd=tmp_path, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: ") and "extras/" in done.stderr


def test_losses_data_and_model_do_not_import_one_another():
    import ast

    for name in ("losses", "data", "model"):
        tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & {"losses", "data", "model", "dpo"} and "pickle" not in imported


def test_the_four_packages_bring_everything_that_is_imported():
    """torch needs jinja2, tokenizers huggingface_hub, and that tqdm and PyYAML: nothing is installed for us alone."""
    from importlib.metadata import requires

    needs = lambda package: {r.split(";")[0].strip().split()[0].split(">")[0].split("=")[0].split("<")[0].split("!")[0].split("[")[0].lower()
                             for r in requires(package) or () if "extra ==" not in r}
    assert "jinja2" in needs("torch") and "huggingface-hub" in {n.replace("_", "-") for n in needs("tokenizers")}
    assert {"tqdm", "pyyaml"} <= needs("huggingface_hub")


def test_delta_of_the_steps_own_rewards_needs_the_whole_batch(run):
    with pytest.raises(ValueError, match="--exact_global_loss false with --bco_delta first"):
        run("out", loss_type=["bco_pair"], bco_delta="first", exact_global_loss=False)


def test_the_callers_configuration_stays_as_it_is(tiny, pairs_file, tmp_path):
    given = dpo.DPOConfig(**COMMON | dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), max_steps=1,
                                          output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")))
    before = dict(vars(given))
    dpo.DPOTrainer(args=given).train(resume_from_checkpoint="false")
    assert vars(given) == before
