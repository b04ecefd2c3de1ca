"""What people bring from elsewhere: how they write options, name paths, reuse directories, and what their models hold."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import make_rows, read_metrics, write
from safetensors.torch import load_file

import dpo
from dpo import DPOConfig, DPOTrainer
from parts.cli import parse_config

ROOT = Path(dpo.__file__).resolve().parent


def options(tiny, pairs_file, tmp_path, **more) -> dict:
    return dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), output_dir=str(tmp_path / "out"),
                cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=False, max_steps=2, logging_steps=1,
                per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True) | more


def train(settings: dict) -> DPOTrainer:
    trainer = DPOTrainer(args=DPOConfig(**settings))
    trainer.train()
    return trainer


def words(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


# How options are written


def test_one_word_stands_for_a_list_of_it(tiny, pairs_file, tmp_path):
    assert DPOConfig(report_to="none").report_to == ["none"]
    assert DPOConfig(loss_type=("sigmoid", "sft"), loss_weights=(1, 0.5)).loss_weights == [1, 0.5]
    train(options(tiny, pairs_file, tmp_path, loss_type="ipo", beta=0.1))
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(25, abs=1e-3)  # 1 / (4 beta^2)


@pytest.mark.parametrize("line", ["report_to: []", "fsdp: []", "loss_type: []", "lora_target_modules: []"])
def test_an_empty_list_in_a_file_is_the_default(line, tmp_path):
    (tmp_path / "c.yaml").write_text(line)
    name = line.partition(":")[0]
    found = parse_config(["--config", str(tmp_path / "c.yaml"), "--model_name_or_path", "m"])
    assert getattr(found, name) == getattr(DPOConfig(), name)


def test_paths_below_the_home_directory_are_found_wherever_they_are_named(tiny, pairs_file, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(tiny, home / "model")
    shutil.copy(pairs_file, home / "pairs.jsonl")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    write(home / "c.json", dict(model_name_or_path="~/model", dataset_name="~/pairs.jsonl", output_dir="~/out",
                                cache_dir="~/cache", max_steps=1, bf16=False, use_cpu=True, save_strategy="no"))
    assert dpo.main(["--config", "~/c.json"]) == 0
    assert (home / "out" / "model.safetensors").is_file() and (home / "cache").is_dir()
    assert not (tmp_path / "~").exists()


# Directories that are used again, or moved


BEST = dict(eval_fraction=0.3, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_strategy="steps",
            save_steps=1, metric_for_best_model="rewards/margins", greater_is_better=True, learning_rate=1e-2)


def test_the_best_model_is_found_after_its_directory_was_moved(tiny, pairs_file, tmp_path):
    """Word salads teach nothing about other word salads: held-out margins fall, and the first is the best."""
    settings = options(tiny, pairs_file, tmp_path, max_steps=5, **BEST)
    trainer = train(settings)
    assert trainer.position.best["directory"] == "checkpoint-1"
    best = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    moved = tmp_path / "moved"
    moved.mkdir()
    for step in (1, 2, 3):
        shutil.move(tmp_path / "out" / f"checkpoint-{step}", moved)
    shutil.rmtree(tmp_path / "out")
    train(settings | dict(output_dir=str(moved), resume_from_checkpoint="true", save_total_limit=1))
    assert (moved / "checkpoint-1").is_dir()
    ended = load_file(moved / "model.safetensors")
    assert all(torch.equal(tensor, ended[name]) for name, tensor in best.items())


def test_a_best_model_that_is_gone_leaves_the_last_one_and_says_so(tiny, pairs_file, tmp_path, capsys):
    settings = options(tiny, pairs_file, tmp_path, max_steps=4, **BEST)
    train(settings)
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    trainer = train(settings | dict(resume_from_checkpoint="true"))
    assert "checkpoint-1: the best model was there, and is gone; the last one is kept" in capsys.readouterr().out
    ended = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(p, ended[name]) for name, p in trainer.model.named_parameters())


def test_a_limit_on_checkpoints_counts_this_runs_alone(tiny, pairs_file, tmp_path):
    settings = options(tiny, pairs_file, tmp_path, save_strategy="steps")
    train(settings | dict(max_steps=5, save_steps=5))
    train(settings | dict(max_steps=4, save_steps=2, beta=0.5, save_total_limit=1))
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_resume_takes_the_newest_checkpoint_of_its_own_run(tiny, pairs_file, tmp_path):
    settings = options(tiny, pairs_file, tmp_path, save_strategy="steps")
    train(settings | dict(max_steps=6, save_steps=6))  # an older run, with a higher number
    mine = settings | dict(max_steps=5, save_steps=2, beta=0.5)
    train(mine)
    resumed = DPOTrainer(args=DPOConfig(**mine, resume_from_checkpoint="true"))
    assert resumed.checkpoints.found.directory.name == "checkpoint-5"


# Models and tokenizers


def test_a_spare_token_that_no_text_uses_does_not_stop_a_run_and_one_in_use_does(tiny, tmp_path, capsys):
    """Gemma 3's text models have <image_soft_token>, one more than their embedding has rows."""
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(model / "tokenizer.json"))
    rows = make_rows(6)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = options(model, tmp_path / "pairs.jsonl", tmp_path)
    assert dpo.main(words(settings)) == 0
    rows[3]["chosen"] += " <image_soft_token>"
    (tmp_path / "used.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert dpo.main(words(settings | dict(dataset_name=tmp_path / "used.jsonl"))) == 2
    assert "used.jsonl:4: token 24, but the embedding of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "hidden_dropout"])
def test_the_models_own_dropout_is_refused_by_name_if_it_is_asked_for(name, tiny, pairs_file, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    write(model / "config.json", json.loads((model / "config.json").read_text()) | {name: 0.1})
    train(options(model, pairs_file, tmp_path))  # off by default, as in TRL
    with pytest.raises(ValueError, match=rf"--disable_dropout false: config.json has {name} = 0.1"):
        train(options(model, pairs_file, tmp_path, disable_dropout=False))


TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.mark.parametrize("as_file", [True, False])
def test_a_base_model_learns_from_conversations_with_a_template_of_ones_own(as_file, tiny, tmp_path):
    user = {"role": "user", "content": "the cat sees"}
    rows = [{"prompt": [user], "chosen": [{"role": "assistant", "content": f"the dog {end}"}],
             "rejected": [{"role": "assistant", "content": "a sun"}]} for end in ("runs", "sleeps", "today", "why")]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    settings = options(tiny, tmp_path / "chat.jsonl", tmp_path)
    with pytest.raises(ValueError, match="--chat_template"):
        train(settings)
    train(settings | dict(chat_template=str(tmp_path / "mine.jinja") if as_file else TEMPLATE))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


# Types


@pytest.mark.parametrize("given,saved", [(None, torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float16)])
def test_the_model_is_saved_in_the_type_that_is_asked_for(given, saved, tiny, pairs_file, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "float16"}
    write(model / "config.json", config)
    trainer = train(options(model, pairs_file, tmp_path, save_dtype=given, save_strategy="steps", save_steps=2))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(p.to(saved), found[name]) for name, p in trainer.model.named_parameters())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(saved).removeprefix("torch.")
    kept = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())


def test_dtype_auto_is_the_type_of_the_models_files(tiny, pairs_file, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    write(model / "config.json", config | {"torch_dtype": "bfloat16"})
    trainer = train(options(model, pairs_file, tmp_path, dtype="auto"))
    assert next(trainer.model.parameters()).dtype == torch.bfloat16 and trainer.args.dtype == "bfloat16"
    write(model / "config.json", config | {"torch_dtype": "float16"})
    with pytest.raises(ValueError, match="--dtype auto: the files of .* are in float16; give --dtype float32"):
        train(options(model, pairs_file, tmp_path, dtype="auto"))
