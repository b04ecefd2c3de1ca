"""The blocks of TRL's documentation, with only the import changed: what they train is the command line's, to the bit.

The names in the blocks are directories here (Qwen/Qwen3-0.6B holds a tiny model), so that the text stays as it is.
Left out of option 3 are flash_attention_2, which no CPU has, and load_in_4bit beside quantization_config, which
transformers 5 refuses; and its adapter is named "trained", since PEFT on torch 2.13 refuses "train".
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, make_rows, make_tiny, read_metrics
from safetensors.torch import load_file, save_file

import dpo
import model as models

transformers = pytest.importorskip("transformers", reason="needs transformers")
datasets = pytest.importorskip("datasets", reason="needs datasets")
peft = pytest.importorskip("peft", reason="needs peft")
LN2 = 0.693147
DATA = "trl-lib/ultrafeedback_binarized"

QUICK_START = """
from trl import DPOTrainer
from datasets import load_dataset

trainer = DPOTrainer(
    model="Qwen/Qwen3-0.6B",
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
"""

OLDER_QUICK_START = """
# train_dpo.py
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
train_dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

training_args = DPOConfig(output_dir="Qwen2-0.5B-DPO", logging_steps=10)
trainer = DPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
trainer.train()
"""

NEW_ADAPTER = """
from datasets import load_dataset
from trl import DPOTrainer
from peft import LoraConfig

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

trainer = DPOTrainer(
    "Qwen/Qwen3-0.6B",
    train_dataset=dataset,
    peft_config=LoraConfig(),
)

trainer.train()
"""

TRAINED_ADAPTER = """
from datasets import load_dataset
from trl import DPOTrainer
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("trl-lib/Qwen3-4B-LoRA", is_trainable=True)
dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

trainer = DPOTrainer(
    model=model,
    train_dataset=dataset,
)

trainer.train()
"""

UNSLOTH = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
model = FastLanguageModel.get_peft_model(model)
train_dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

training_args = DPOConfig(output_dir="Qwen2-0.5B-DPO", logging_steps=10, bf16=True)
trainer = DPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
trainer.train()
"""

OPTION_1 = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from peft import PeftModel
from transformers import AutoModelForCausalLM

load = lambda: AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
model = PeftModel.from_pretrained(load(), "path/to/peft", is_trainable=True)
ref_model = PeftModel.from_pretrained(load(), "path/to/peft")
trainer = DPOTrainer(
    model,
    ref_model,
    args=DPOConfig(output_dir="option-1"),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
"""

OPTION_2 = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
model = PeftModel.from_pretrained(model, "path/to/peft").merge_and_unload()
model.save_pretrained("merged")
trainer = DPOTrainer(
    model,
    args=DPOConfig(output_dir="option-2"),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
"""

OPTION_3 = """
import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

# Load the base model.
bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    llm_int8_threshold=6.0,
    llm_int8_has_fp16_weight=False,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
)
model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen2-0.5B-Instruct",
    quantization_config=bnb_config,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)
model.config.use_cache = False

# Load the adapter.
model = PeftModel.from_pretrained(
    model,
    "path/to/peft",
    is_trainable=True,
    adapter_name="trained",
)
# Load the adapter a second time, with a different name, which will be our reference model.
model.load_adapter("path/to/peft", adapter_name="reference")

# Initialize the trainer, without a ref_model param.
training_args = DPOConfig(
    model_adapter_name="trained",
    ref_adapter_name="reference",
)
dpo_trainer = DPOTrainer(
    model,
    args=training_args,
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
dpo_trainer.train()
"""

SCRIPT = """
python trl/scripts/dpo.py \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --learning_rate 5.0e-6 \\
    --num_train_epochs 1 \\
    --per_device_train_batch_size 2 \\
    --max_steps 1000 \\
    --gradient_accumulation_steps 8 \\
    --eval_strategy steps \\
    --eval_steps 50 \\
    --output_dir Qwen2-0.5B-DPO \\
    --no_remove_unused_columns \\
    --use_peft \\
    --lora_r 32 \\
    --lora_alpha 16
"""

VISION = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "vision/FAMILY"
model = AutoModelForImageTextToText.from_pretrained(model_id)
processor = AutoProcessor.from_pretrained(model_id)
train_dataset = load_dataset("HuggingFaceH4/rlaif-v_formatted", split="train")
training_args = DPOConfig(output_dir="vision-DPO", max_length=None)
trainer = DPOTrainer(
    model,
    args=training_args,
    train_dataset=train_dataset,
    processing_class=processor,
)
trainer.train()
"""


# The place that the blocks run in


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the models and data that the blocks name, which is home and where they run."""
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen2-0.5B-Instruct"):
        (tmp_path / name).mkdir(parents=True)
        make_tiny(tmp_path / name)
        rounded(tmp_path / name)
    (tmp_path / DATA).mkdir(parents=True)
    write_rows(tmp_path / DATA / "train.jsonl", make_rows(10, seed=3))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def rounded(directory) -> None:
    """Weights that bfloat16 holds, so that a model loaded in bfloat16 is the same."""
    state = load_file(directory / "model.safetensors")
    state = {name: t.bfloat16().float() for name, t in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def write_rows(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_adapter(directory, **more) -> None:
    """A LoRA that was trained: its B is not zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **more))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(directory)


def execute(block: str) -> dict:
    """Run a block of the documentation with `from trl` changed; return its names."""
    names: dict = {}
    exec(compile(block.replace("from trl import", "from dpo import"), "block", "exec"), names)
    return names


def command(line: str, out: str = "command"):
    """Run a command line with a cache of its own; return the output directory."""
    assert dpo.main([*shlex.split(line), "--output_dir", out, "--cache_dir", f"{out}-cache"]) == 0
    return models.Path(out)


def weights(directory) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in models.load_model(directory).named_parameters()}


def adapter(directory) -> dict[str, torch.Tensor]:
    return load_file(models.Path(directory) / "adapter_model.safetensors")


def of_object(model, name="default") -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a)


def losses_of(directory) -> list[float]:
    return [row["loss"] for row in read_metrics(models.Path(directory)) if "loss" in row]


# The blocks


def test_the_quick_start(place):
    execute(QUICK_START)
    found = weights("Qwen3-0.6B-DPO")
    assert same(found, weights(command(f"--model_name_or_path Qwen/Qwen3-0.6B --dataset_name {DATA}/train.jsonl")))
    assert not same(found, weights("Qwen/Qwen3-0.6B"))


def test_the_quick_start_with_a_model_and_a_tokenizer(place):
    names = execute(OLDER_QUICK_START)
    found = weights("Qwen2-0.5B-DPO")
    out = command(f"--model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name {DATA}/train.jsonl")
    assert same(found, weights(out)) and losses_of("Qwen2-0.5B-DPO") == losses_of(out)
    assert same(found, dict(names["model"].named_parameters())), "the object is not what was trained"
    assert names["trainer"].state.log_history == read_metrics(models.Path("Qwen2-0.5B-DPO"))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained("Qwen2-0.5B-DPO")
    assert same(dict(reloaded.named_parameters()), dict(names["model"].named_parameters()))


def test_a_new_adapter(place):
    execute(NEW_ADAPTER)
    out = command(f"--model_name_or_path Qwen/Qwen3-0.6B --dataset_name {DATA}/train.jsonl --use_peft --lora_r 8 --lora_alpha 8")
    assert same(adapter("Qwen3-0.6B-DPO"), adapter(out)) and losses_of("Qwen3-0.6B-DPO") == losses_of(out)


def test_an_adapter_that_was_trained(place):
    make_adapter("trl-lib/Qwen3-4B-LoRA", modules_to_save=["norm"])
    names = execute(TRAINED_ADAPTER)
    found = adapter("Qwen2-0.5B-Instruct-DPO")
    assert same(found, adapter(command(f"--model_name_or_path trl-lib/Qwen3-4B-LoRA --dataset_name {DATA}/train.jsonl")))
    assert same(found, of_object(names["model"])) and not same(found, adapter("trl-lib/Qwen3-4B-LoRA"))


def test_unsloth(place, monkeypatch):
    """Its model is a PeftModel with a fresh LoRA, which PEFT has drawn."""

    def get_peft_model(model):
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "up_proj"]))
        model.save_pretrained("start")
        return model

    def from_pretrained(name):
        return (transformers.AutoModelForCausalLM.from_pretrained(name), transformers.AutoTokenizer.from_pretrained(name))

    language_model = types.SimpleNamespace(from_pretrained=from_pretrained, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastLanguageModel=language_model))
    names = execute(UNSLOTH)
    found = adapter("Qwen2-0.5B-DPO")
    assert same(found, adapter(command(f"--model_name_or_path start --dataset_name {DATA}/train.jsonl --bf16 true")))
    assert same(found, of_object(names["model"]))
    assert losses_of("Qwen2-0.5B-DPO")[0] == pytest.approx(LN2, abs=1e-2)  # the mean since the first step


def test_peft_option_1_two_instances_that_each_load_the_adapter(place):
    make_adapter("path/to/peft", modules_to_save=["norm"])
    names = execute(OPTION_1)
    found = adapter("option-1")
    out = command(f"--model_name_or_path path/to/peft --ref_model_name_or_path path/to/peft --dataset_name {DATA}/train.jsonl")
    assert same(found, adapter(out)) and losses_of("option-1") == losses_of(out)
    assert same(found, of_object(names["model"]))
    assert same(of_object(names["ref_model"]), adapter("path/to/peft")), "the reference was trained"


def test_peft_option_2_merge_and_train_another_adapter_on_top(place):
    make_adapter("path/to/peft")
    names = execute(OPTION_2)
    transformers.AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct").save_pretrained("merged")
    found = adapter("option-2")
    out = command(f"--model_name_or_path merged --dataset_name {DATA}/train.jsonl --use_peft --lora_r 4 --lora_alpha 8 "
                  "--lora_target_modules q_proj v_proj")
    assert same(found, adapter(out)) and losses_of("option-2") == losses_of(out)
    lora = {n.replace(".default", ""): p for n, p in names["model"].named_parameters() if "lora_" in n}
    assert same({f"base_model.model.{n}": p for n, p in lora.items()}, found), "the object is not what was trained"


def test_peft_option_3_the_adapter_loaded_twice_on_4_bits(place):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    make_adapter("path/to/peft")
    names = execute(OPTION_3)
    found = adapter("Qwen2-0.5B-Instruct-DPO")
    out = command(f"--model_name_or_path path/to/peft --ref_model_name_or_path path/to/peft --dataset_name {DATA}/train.jsonl "
                  "--load_in_4bit --use_bnb_nested_quant --bnb_4bit_compute_dtype bfloat16")
    assert same(found, adapter(out)) and losses_of("Qwen2-0.5B-Instruct-DPO") == losses_of(out)
    assert same(found, of_object(names["model"], "trained")) and not same(found, adapter("path/to/peft"))
    assert same(of_object(names["model"], "reference"), adapter("path/to/peft")), "the reference was trained"


def test_the_scripts_command(place):
    """TRL's --max_steps 1000 and its evaluations, made fewer here."""
    write_rows(place / DATA / "test.jsonl", make_rows(5, seed=4))
    argv = shlex.split(SCRIPT.replace("\\\n", " ").replace(" 1000", " 4").replace("_steps 50", "_steps 2"))[2:]
    argv[argv.index("--dataset_name") + 1] = f"{DATA}/train.jsonl"
    assert dpo.main([*argv, "--eval_dataset_name", f"{DATA}/test.jsonl"]) == 0
    config = dpo.DPOConfig(
        output_dir="python", learning_rate=5.0e-6, num_train_epochs=1, per_device_train_batch_size=2, max_steps=4,
        gradient_accumulation_steps=8, eval_strategy="steps", eval_steps=2, remove_unused_columns=False)
    load = lambda split: datasets.load_dataset(DATA, split=split)
    dpo.DPOTrainer(
        "Qwen/Qwen2-0.5B-Instruct", args=config, train_dataset=load("train"), eval_dataset=load("test"),
        peft_config=peft.LoraConfig(r=32, lora_alpha=16)).train()
    assert same(adapter("Qwen2-0.5B-DPO"), adapter("python"))
    assert [row["eval_loss"] for row in read_metrics(models.Path("python")) if "eval_loss" in row] == \
        [row["eval_loss"] for row in read_metrics(models.Path("Qwen2-0.5B-DPO")) if "eval_loss" in row]


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_5_vl"])
def test_vision_with_a_model_and_a_processor(place, family):
    pytest.importorskip("PIL")
    from test_vision_training import make_pictures, make_row
    from vision_tiny import make_model_directory

    from extras.models.opening import load_model

    (place / "vision" / family).mkdir(parents=True)
    make_model_directory(family, place / "vision" / family)
    rows = place / "HuggingFaceH4" / "rlaif-v_formatted"
    rows.mkdir(parents=True)
    make_pictures(rows)
    write_rows(rows / "train.jsonl", [make_row(i, [str(rows / f"{i % 3}.png")]) for i in range(4)])
    block = VISION.replace("FAMILY", family)
    if "qwen" in family and importlib.util.find_spec("torchvision") is None:  # which its processor needs, for videos
        block = block.replace("AutoProcessor.from_pretrained(model_id)", "model_id")
    names = execute(block)
    found = dict(load_model("vision-DPO").named_parameters())
    out = command(f"--model_name_or_path vision/{family} --dataset_name {rows}/train.jsonl --max_length none")
    assert same(found, dict(load_model(out).named_parameters())) and losses_of("vision-DPO") == losses_of(out)
    saved = transformers.AutoModelForImageTextToText.from_pretrained("vision-DPO")
    assert same(dict(saved.named_parameters()), dict(names["model"].named_parameters()))
    start = transformers.AutoModelForImageTextToText.from_pretrained(f"vision/{family}")
    assert not same(dict(start.named_parameters()), dict(names["model"].named_parameters()))


RANKS = """
import sys

import torch
from conftest import make_rows
from transformers import AutoModelForCausalLM

import model as models
from dpo import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
args = DPOConfig(output_dir="ranks", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True)
trainer = DPOTrainer(model=model, args=args, train_dataset=make_rows(10, seed=3))
trainer.train()
torch.distributed.barrier()
saved = dict(models.load_model("ranks").named_parameters())
assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters()), "the object is not what was trained"
assert len(trainer.state.log_history) == 1
"""


def test_every_ranks_object_is_what_was_trained(place):
    (place / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
