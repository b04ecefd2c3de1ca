"""What opening a model gives, when the plain way (model.load_model) is enough, and limits of the
model."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from losses import SORTS_THE_BATCH
from parts import weights
from parts.checks import check_held_reference, fsdp_words
from parts.config import DPOConfig
from parts.ranks import Ranks
from parts.rows import on_hub
from parts.tokenizer_files import reads_pictures


class Opened(NamedTuple):
    """A policy as it is before the first step, and what belongs to it."""

    model: nn.Module
    tokenizer: Any
    lora: dict = {}  # PEFT's settings of the LoRA that is trained; {}: all weights are
    continues: bool = False  # the LoRA was trained before, so its start is the reference
    directory: Path | None = None  # where it was read from; None for a model given as an object
    images: Any = None  # decodes images in the background, for a vision-language model


def is_plain(c: DPOConfig) -> bool:
    """Tell whether the model is one local directory of safetensors that is trained in full."""
    options = (c.use_peft, c.merge_adapter, c.load_in_4bit, c.model_revision, c.model_adapter_name)
    if any(options) or on_hub(c.model_name_or_path):
        return False
    directory = Path(c.model_name_or_path)
    return weights.is_plain(directory) and not reads_pictures(directory)


def is_sharded(c: DPOConfig) -> bool:
    return bool(fsdp_words(c.fsdp))


def loading_device(c: DPOConfig, ranks: Ranks) -> torch.device:
    """Return where a model's files are read to: with FSDP nowhere yet, since each rank reads its
    part when the model is sharded."""
    return torch.device("meta") if is_sharded(c) else ranks.device


def moved(
    model: nn.Module, c: DPOConfig, ranks: Ranks, dtype: torch.dtype | None = None,
    device: str | None = None,
) -> nn.Module:
    """Return the model where it stays until training.

    FSDP deals what is in rank 0's memory (a fresh LoRA, a model given as an object) to all ranks;
    the others need none of it.
    """
    if not is_sharded(c):
        return model.to(device or ranks.device, dtype)
    return model.to(dtype=dtype) if ranks.first else model.to("meta", dtype)


def save_dtype(c: DPOConfig, model: Any) -> torch.dtype | None:
    """The type in which the trained model is saved; None is the type it was trained in."""
    if c.save_dtype is None:
        return None
    raw = model.raw_config
    own = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return getattr(torch, own if c.save_dtype == "auto" else c.save_dtype)


def aux_coef(c: DPOConfig, config: Any) -> float:
    """Return the weight of the load-balancing loss; 0 without experts that have one."""
    if c.router_aux_loss_coef is not None:
        return c.router_aux_loss_coef
    return own_aux_coef(config) or 0.0


def own_aux_coef(config: Any) -> float | None:
    """Return what config.json says of the load-balancing loss; None where the family has none."""
    return config.moe["router_aux_loss_coef"] if config.moe else None


def max_tokens(c: DPOConfig, config: Any, device: torch.device) -> int | None:
    """Return how many tokens one forward may have; None for no limit.

    On a CPU a forward casts every weight and adds to every gradient, which 2048 tokens at a time
    took a fifth of a step's time, and still longer forwards gain little. Cutting one changes no
    result, except for losses that mix what is in one forward: those are cut only if asked.
    """
    mixes = own_aux_coef(config) is not None or bool(set(c.loss_type) & SORTS_THE_BATCH)
    default = 4096 if device.type == "cpu" and not mixes else None
    most = c.max_tokens_per_forward or default
    return most and most * c.context_parallel_size  # of a stream; each rank has its part of it


def hold_reference(c: DPOConfig, ranks: Ranks, model: nn.Module | None) -> None:
    """Freeze a reference that is a model of its own, in the type and on the device of the flags."""
    check_held_reference(c, model)
    if model is not None:
        dtype = None if c.ref_model_dtype is None else getattr(torch, c.ref_model_dtype)
        moved(model.requires_grad_(False).eval(), c, ranks, dtype, c.ref_model_device)


def give_back(model: nn.Module, lora: dict) -> None:
    """Bring the object that the model was made from, if any, up to date: it is the caller's."""
    source = getattr(model, "source", None)
    if source is not None:
        source.update(model, lora)
