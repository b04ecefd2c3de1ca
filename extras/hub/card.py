"""Write the model card that a run is pushed to the hub with (extras/hub/pushing.py)."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from extras.hub.client import is_hub_id
from extras.watch.picture import PICTURE, write_picture
from parts.conversations import find_templates

ALWAYS = (
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)
# Paths on one machine, secrets, and what the card names elsewhere.
NEVER = (
    "output_dir",
    "cache_dir",
    "config",
    "resume_from_checkpoint",
    "hub_token",
    "run_name",
    "project",
    "push_to_hub",
    "model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
)

TEXT = """\
---
{front}---

# {title}

{base} trained with [Direct Preference Optimization](https://arxiv.org/abs/2305.18290) on {data}.
{picture}
## Use

```python
{use}
```

## Training

| option | value |
|---|---|
{options}

PyTorch {torch}, Python {python}.

## Results

{results}

`rewards/...` are DPO's implicit rewards: beta times the log-ratio of the trained model to its
reference, summed over a completion. `accuracies` is the share of pairs whose chosen completion has
the higher one, `margins` the mean gap.
"""

USE_MODEL = """\
from transformers import pipeline

generate = pipeline("text-generation", model="{id}")
print(generate({prompt}, max_new_tokens=128)[0]["generated_text"])"""
CHAT_PROMPT = '[{"role": "user", "content": "Why is the sky blue?"}]'
USE_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{id}")
tokenizer = AutoTokenizer.from_pretrained("{id}")"""


def write_card(
    directory: str | Path, settings: dict[str, Any], defaults: dict[str, Any], repo_id: str
) -> Path:
    """Write README.md and training.svg from settings and metrics.jsonl; return README's path."""
    path = Path(directory) / "README.md"
    write_picture(directory)
    path.write_text(model_card(Path(directory), settings, defaults, repo_id), encoding="utf-8")
    return path


def model_card(
    directory: Path, settings: dict[str, Any], defaults: dict[str, Any], repo_id: str
) -> str:
    """Write the card: settings that differ from `defaults` or always matter, and the last metrics.

    Paths and tokens stay out of it: a model or data set that is not a hub id is named by the last
    part of its path, and is not in the front matter.
    """
    adapter = (directory / "adapter_config.json").exists()
    matters = lambda k, v: k not in NEVER and (k in ALWAYS or v != defaults.get(k))
    kept = {k: v for k, v in settings.items() if matters(k, v)}
    prompt = CHAT_PROMPT if find_templates(directory) else '"Once upon a time"'
    picture = ""
    if (directory / PICTURE).exists():
        picture = f"\n![Rewards and loss over the steps]({PICTURE})\n"
    return TEXT.format(
        front=yaml.safe_dump(front_matter(settings, repo_id, adapter), sort_keys=False),
        title=repo_id.split("/")[-1],
        base=named(settings["model_name_or_path"], ""),
        data=named(settings["dataset_name"], "datasets/"),
        picture=picture,
        use=(USE_ADAPTER if adapter else USE_MODEL).format(id=repo_id, prompt=prompt),
        options="\n".join(f"| `{k}` | {cell(v)} |" for k, v in sorted(kept.items())),
        torch=torch.__version__,
        python=platform.python_version(),
        results=results(directory / "metrics.jsonl"),
    )


def front_matter(settings: dict[str, Any], repo_id: str, adapter: bool) -> dict[str, Any]:
    """Collect the metadata that the hub reads; YAML at the head of the card."""
    base = settings["model_name_or_path"]
    data = settings["dataset_name"]
    front = {}
    if is_hub_id(base):
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    if is_hub_id(data):
        front["datasets"] = [data]
    tags = ["dpo", *(["lora"] if adapter else [])]
    return front | {
        "library_name": "peft" if adapter else "transformers",
        "model_name": repo_id.split("/")[-1],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def named(name: str, kind: str) -> str:
    """Link to a hub id; name the last part of any other path."""
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(name).name}`"


def cell(value: Any) -> str:
    """Format a value as a table cell; of a path, show only the last part."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(cell, value))
    is_path = isinstance(value, str) and "/" in value and not is_hub_id(value)
    text = Path(value).name if is_path else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def results(path: Path) -> str:
    """Tabulate the last logged training step beside the last evaluation, or say there is none."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    train = next((row for row in reversed(rows) if "loss" in row), {})
    evaluated = next((row for row in reversed(rows) if "eval_loss" in row), {})
    shown = [k for k in train if k not in ("step", "epoch")]
    shown = shown or [k[5:] for k in evaluated if k.startswith("eval_")]
    if not shown:
        return "No metrics were logged."
    number = lambda row, key: f"{row[key]:.6g}" if isinstance(row.get(key), (int, float)) else ""
    at = [row.get("step", "-") for row in (train, evaluated)]
    head = f"| | training, step {at[0]} | evaluation, step {at[1]} |\n|---|---|---|\n"
    return head + "\n".join(
        f"| `{k}` | {number(train, k)} | {number(evaluated, f'eval_{k}')} |" for k in shown
    )
