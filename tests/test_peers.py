"""TRL 1.16 trained beside us on the same model, pairs and order: every logged number, step by step."""

import gzip
import json
import lzma

import pytest
import torch
from conftest import read_metrics, run_dpo, write
from safetensors.torch import save_file

import dpo
import model as models
from extras.lora.peft_files import load_adapter, save_adapter
from extras.lora.targets import add_lora

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


# Every loss and option that TRL has, through the command line; one process of TRL, whose import takes long, makes all
# of its runs. Not here: combinations that TRL refuses or gets wrong (tests/README.md lists them).

PLAIN = "sigmoid hinge ipo nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop sft sigmoid_norm".split()
ZERO_DELTA = {"bco_pair": {"bco_delta": "zero"}}  # TRL has no running mean
ALPHA = {"f_divergence_type": "alpha_divergence"}
WPO, UNCLAMPED = {"use_weighting": True}, {"wpo_clamp": False}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
EIGHT = {"per_device_train_batch_size": 8, "learning_rate": 3e-3}
SLOW = {"learning_rate": 1e-4}  # at 5e-4 ipo's third loss is 1e9 with forward_kl, and rounding decides its fourth digit
CASES = {  # name: (shared flags, ours alone, TRL's alone)
    **{name: ({"loss_type": [name]}, ZERO_DELTA.get(name, {}), {}) for name in PLAIN},
    "exo_pair": ({"loss_type": ["exo_pair"]}, {}, {"label_smoothing": 1e-3}),  # ours means 1e-3 by its 0
    "sigmoid_norm, beta 5": ({"loss_type": ["sigmoid_norm"], "beta": 5.0}, {}, {}),
    "sigmoid, beta 0.7": ({"beta": 0.7}, {}, {}),
    "discopop, tau 0.3": ({"loss_type": ["discopop"], "discopop_tau": 0.3}, {}, {}),
    "robust, smoothed": ({"loss_type": ["robust"], "label_smoothing": 0.15}, {}, {}),
    "exo_pair, smoothed": ({"loss_type": ["exo_pair"], "label_smoothing": 0.15}, {}, {}),
    # one forward of 8 pairs, whose margins change places; sigmoid to compare with
    **{f"{name}, 8 pairs": (EIGHT | {"loss_type": [name]}, {}, {}) for name in ("sigmoid", "aot", "aot_unpaired")},
    **{f"{name}, smoothed": (EIGHT | {"loss_type": [name], "label_smoothing": 0.15}, {}, {})
       for name in ("aot", "aot_unpaired")},
    **{f"{name}, {kind}": ({"loss_type": [name], "f_divergence_type": kind} | smoothed, {}, {})
       for name, smoothed in (("sigmoid", {}), ("hinge", {}), ("discopop", {}), ("ipo", {"beta": 1.0} | SLOW),
                              ("sigmoid_norm", {"beta": 5.0}), ("robust", {"label_smoothing": 0.1}),
                              ("exo_pair", {"label_smoothing": 1e-3}))
       for kind in ("forward_kl", "js_divergence")},
    "sigmoid, alpha 0.3": (ALPHA, {"f_alpha_divergence_coef": 0.3}, {"f_alpha_divergence_coef": 0.7}),
    "hinge, alpha 0.5": (ALPHA | {"loss_type": ["hinge"]}, {}, {}),
    **{f"{name}, WPO": (WPO | {"loss_type": [name]}, UNCLAMPED, {}) for name in ("sigmoid", "ipo", "apo_zero")},
    **{f"{name}, LD-DPO": ({"ld_alpha": 0.4, "loss_type": [name]}, {}, {}) for name in ("sigmoid", "sppo_hard", "ipo")},
    "sigmoid, LD-DPO, WPO": (WPO | {"ld_alpha": 0.4}, UNCLAMPED, {}),
    "MPO": (MPO, {"bco_delta": "zero"}, {}),
    "hinge + sigmoid_norm": ({"loss_type": ["hinge", "sigmoid_norm"], "loss_weights": [0.5, 2.0]}, {}, {}),
}
COMMON = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 5e-4, "max_length": 512}
LORA_STEPS = {"max_steps": 10, "learning_rate": 5e-3}
LORAS = {  # PEFT's settings besides rank and alpha
    "q_proj v_proj": {"target_modules": ["q_proj", "v_proj"]}, "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}}
REFERENCES = {  # both run 10 steps at the learning rate of LORA_STEPS
    "precomputed": {"precompute_ref_log_probs": True}, "live": {"precompute_ref_log_probs": False},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.6}}


@pytest.fixture(scope="session")
def short_pairs(shared, tmp_path_factory):
    """16 short real dialogues."""
    path = tmp_path_factory.mktemp("short") / "hh.jsonl"
    with gzip.open(shared / "prefs" / "hh_harmless_base_test.jsonl.gz", "rt") as rows:
        short = [line for line in rows if len(line) < 500 and all(json.loads(line).values())][:16]
    path.write_text("".join(short))
    return path


def start_of(model, directory):
    """An adapter with which a run goes on: of ours, which PEFT reads."""
    if not directory.exists():
        settings = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"],
                    "base_model_name_or_path": str(model)}
        policy = models.load_model(model)
        add_lora(policy, settings)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p += torch.randn_like(p) * 0.02 if "lora_" in name else 0
        save_adapter(policy, directory, settings)
    return directory


@pytest.fixture(scope="session")
def trl_runs(shared, short_pairs, tmp_path_factory):
    """Directory with TRL's output of every case; processes of one test session share it."""
    filelock = pytest.importorskip("filelock")  # a package that huggingface_hub needs
    directory = tmp_path_factory.getbasetemp()
    directory = (directory.parent if directory.name.startswith("popen-") else directory) / "trl"
    run = {"model": shared / "models" / "stories260K", "data": [short_pairs], "threads": 1}
    args = trl_peer.FLOAT32 | COMMON
    directory.mkdir(exist_ok=True)
    runs = {name: run | {"args": args | both | theirs} for name, (both, _, theirs) in CASES.items()}
    for name, settings in LORAS.items():
        runs[name] = run | {"args": args | LORA_STEPS, "peft": {"r": 8, "lora_alpha": 16} | settings}
    for name, options in REFERENCES.items():
        runs[name] = run | {"args": args | LORA_STEPS | {"learning_rate": 1e-3} | options}
    start = start_of(run["model"], directory / "start")
    for name in ("continued", "continued, precomputed"):
        precompute = {"precompute_ref_log_probs": name != "continued"}
        runs[name] = run | {"args": args | LORA_STEPS | precompute, "adapter": start}
    with filelock.FileLock(f"{directory}.lock"):
        if not (directory / "done").exists():
            trl_peer.run_many(directory, runs)
            (directory / "done").touch()
    return directory


def words(flags: dict) -> list[str]:
    """A command line."""
    out = []
    for name, value in flags.items():
        out += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return out


def losses_of(directory) -> list[float]:
    return [step["loss"] for step in read_metrics(directory) if "loss" in step]


@pytest.mark.parametrize("name", CASES)
def test_every_loss_and_option_of_trl_trains_as_it_does(name, trl_runs, shared, short_pairs, tmp_path):
    both, ours, _ = CASES[name]
    places = {"model_name_or_path": shared / "models" / "stories260K", "dataset_name": short_pairs,
              "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    assert dpo.main([*map(str, OURS), *words(places | COMMON | both | ours)]) == 0
    theirs = losses_of(trl_runs / name)
    assert len(theirs) == 3 and losses_of(tmp_path / "out") == pytest.approx(theirs, rel=5e-4)


def test_no_two_cases_are_the_same_run(trl_runs):
    """Else a flag that one of them is about would not have been tried."""
    runs = {name: losses_of(trl_runs / name) for name in CASES}
    alike = {frozenset((a, b)) for a in runs for b in runs if a < b and runs[a] == pytest.approx(runs[b], rel=1e-3)}
    assert alike == {frozenset(("sigmoid", "robust"))}  # equal without smoothing


def test_all_losses_of_trl_are_among_the_cases():
    trl = pytest.importorskip("trl")
    text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    tried = {name for both, _, _ in CASES.values() for name in both.get("loss_type", ["sigmoid"])}
    assert len(tried) == 15 and all(f"'{name}'" in text for name in tried)
    assert text.count("'") == 2 * 15


@pytest.mark.parametrize("name", LORAS)
def test_lora_trains_as_with_trl_and_peft(name, trl_runs, shared, short_pairs, tmp_path):
    """From the adapter with which TRL began: its A is random."""
    names = {"target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}
    settings = {names.get(k, k): [v] if isinstance(v, str) else v for k, v in LORAS[name].items()}
    places = {"model_name_or_path": shared / "models" / "stories260K", "dataset_name": short_pairs,
              "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    lora = {"use_peft": True, "lora_r": 8, "lora_alpha": 16} | settings
    trainer = dpo.DPOTrainer(args=dpo.parse_config([*map(str, OURS), *words(places | COMMON | LORA_STEPS | lora)]))
    load_adapter(trainer.model, trl_runs / name / "initial")
    trainer.train()
    theirs = [step for step in read_metrics(trl_runs / name) if "loss" in step]
    ours = read_metrics(tmp_path / "out")
    assert len(theirs) == len(ours) == 10 and abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.01
    assert_agree(theirs, ours, 2e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_train_as_with_trl(name, trl_runs, shared, short_pairs, tmp_path):
    places = {"model_name_or_path": shared / "models" / "stories260K", "dataset_name": short_pairs,
              "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    options = LORA_STEPS | {"learning_rate": 1e-3} | REFERENCES[name]
    assert dpo.main([*map(str, OURS), *words(places | COMMON | options)]) == 0
    theirs = [step for step in read_metrics(trl_runs / name) if "loss" in step]
    assert_agree(theirs, read_metrics(tmp_path / "out"), 2e-4)


def test_the_moving_reference_is_another_run(trl_runs):
    assert losses_of(trl_runs / "moving")[:3] == pytest.approx(losses_of(trl_runs / "live")[:3], rel=1e-5)
    assert losses_of(trl_runs / "moving")[-1] != pytest.approx(losses_of(trl_runs / "live")[-1], rel=1e-2)


@pytest.mark.parametrize("name", ["continued", "continued, precomputed"])
def test_a_continued_adapter_trains_as_with_trl_and_peft(name, trl_runs, shared, short_pairs, tmp_path):
    places = {"model_name_or_path": start_of(shared / "models" / "stories260K", trl_runs / "start"),
              "dataset_name": short_pairs, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    live = {"precompute_ref_log_probs": name != "continued"}
    assert dpo.main([*map(str, OURS), *words(places | COMMON | LORA_STEPS | live)]) == 0
    theirs = [step for step in read_metrics(trl_runs / name) if "loss" in step]
    assert_agree(theirs, read_metrics(tmp_path / "out"), 2e-4)
