"""TRL 1.16 trained beside us on the same model, pairs and order: every logged number, step by step."""

import gzip
import json
import lzma

import pytest
import torch
from conftest import read_metrics, run_dpo, write
from safetensors.torch import load_file, save_file

import model as models

trl_peer = pytest.importorskip("trl_peer")
pytest.importorskip("trl")

# Ours and TRL's names of the same thing; both run in float32 without checkpointing, in file order.
OURS = ["--no_bf16", "--use_cpu", "--no_shuffle_dataset", "--logging_steps", 1, "--save_strategy", "no"]


@pytest.fixture(scope="session")
def chat_model(shared, tmp_path_factory):
    """A random two-layer Llama with SmolLM2's tokenizer and chat template."""
    directory = tmp_path_factory.mktemp("chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes(lzma.open(shared / "tokenizers" / "smollm2" / f"{name}.xz").read())
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152,
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
              "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
    write(directory / "config.json", config)
    torch.manual_seed(1)
    state = {n: torch.randn(p.shape) * 0.2 if p.dim() == 2 else torch.ones(p.shape)
             for n, p in models.Decoder(models.read_config(config)).named_parameters()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def real_pairs(shared, tmp_path_factory):
    """{name: file of 24 real pairs}: HH dialogues, UltraFeedback text, LLaMA-Factory conversations."""
    directory, out = tmp_path_factory.mktemp("real"), {}
    prefs = shared / "prefs"
    hh = [json.loads(line) for line in gzip.open(prefs / "hh_harmless_base_test.jsonl.gz", "rt")]
    uf = [json.loads(line) for line in gzip.open(prefs / "ultrafeedback-train_clean.jsonl.gz", "rt")]
    chat = json.load(gzip.open(prefs / "llamafactory-dpo_en_demo.json.gz", "rt"))
    chat = [{"prompt": r["conversations"], "chosen": [r["chosen"]], "rejected": [r["rejected"]]} for r in chat]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for r in chat:
        for key, messages in r.items():
            r[key] = [{"role": roles[m["from"]], "content": m["value"]} for m in messages]
    for name, rows in {"hh": hh, "uf": uf, "chat": chat}.items():
        short = [r for r in rows if len(json.dumps(r)) < 1800 and r["chosen"] and r["rejected"]][:24]
        out[name] = directory / f"{name}.jsonl"
        out[name].write_text("".join(json.dumps(r) + "\n" for r in short))
    return out


def side_by_side(tmp_path, model, data, flags, trl_args, steps, peft=None):
    """Both trainers, from the same start; returns (TRL's metrics, ours) per step."""
    common = dict(per_device_train_batch_size=4, max_steps=steps, learning_rate=1e-3, max_length=256)
    theirs = trl_peer.run_trl(tmp_path, model, [data], trl_peer.FLOAT32 | common | trl_args, peft=peft, threads=1)
    words = [w for name, value in common.items() for w in (f"--{name}", value)]
    run_dpo("--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "ours", "--cache_dir",
            tmp_path / "cache", *OURS, *words, *flags)
    ours = read_metrics(tmp_path / "ours")
    theirs = [m for m in theirs if "loss" in m]
    assert len(theirs) == len(ours) == steps
    return theirs, ours


def assert_agree(theirs, ours, tolerance):
    for t, o in zip(theirs, ours):
        for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert abs(o[key] - t[key]) <= tolerance * max(1, abs(t[key])), (key, o["step"], o[key], t[key])
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(o[key] - t[key]) <= 10 * tolerance * max(1, abs(t[key])), (key, o["step"], o[key], t[key])
        for key in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
            assert abs(o[key] - t[key]) <= 10 * tolerance * max(1, abs(t[key])), (key, o["step"], o[key], t[key])
        assert o["num_tokens"] == t["num_tokens"] and abs(o["learning_rate"] - t["learning_rate"]) < 1e-12


@pytest.mark.parametrize("name", ["hh", "uf"])
def test_ten_steps_on_text_equal_trl(tmp_path, shared, real_pairs, name):
    theirs, ours = side_by_side(tmp_path, shared / "models" / "stories260K", real_pairs[name], [], {}, 10)
    assert_agree(theirs, ours, 2e-4)


@pytest.mark.parametrize("name", ["hh", "chat"])
def test_ten_steps_on_chat_equal_trl(tmp_path, chat_model, real_pairs, name):
    theirs, ours = side_by_side(tmp_path, chat_model, real_pairs[name], [], {}, 10)
    assert_agree(theirs, ours, 2e-4)
