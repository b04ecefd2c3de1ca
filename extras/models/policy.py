"""Open a policy that is more than a plain checkpoint: from the hub, with a LoRA, in 4 bits, with
images."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from extras.lora.adapters import activate_named, fresh_settings
from extras.lora.targets import add_lora
from extras.models.objects import from_object
from extras.models.opening import (
    four_bit_of,
    load_adapted,
    match_processor,
    model_directory,
    open_pictures,
    tokenizer_home,
)
from extras.rows.pictures import open_tokenizer
from model import Decoder
from parts.config import DPOConfig
from parts.opened import Opened, loading_device
from parts.ranks import Ranks


def open_policy(c: DPOConfig, ranks: Ranks, given: dict[str, Any]) -> Opened:
    """Open the policy, its tokenizer and the LoRA that is trained.

    The policy is a checkpoint, one with a fresh LoRA on it, or an adapter's directory, whose LoRA
    is trained further.

    `given` are the trainer's arguments: as `model` a Decoder, or a model of transformers or PEFT;
    as `peft_config` PEFT's settings without a flag (rank_pattern, layers_to_transform ...). Raises
    ValueError.
    """
    model = given["model"]
    directory = None
    if isinstance(model, nn.Module) and not isinstance(model, Decoder):
        options = loading_options(c, ranks)
        model = from_object(model, c.model_name_or_path, c.model_adapter_name, options)
    if not isinstance(model, Decoder):
        name = c.model_name_or_path
        directory = model_directory(name, ranks, c.model_revision, c.model_adapter_name)
    tokenizer = given["processing_class"]
    if tokenizer is None:
        home = directory or model_directory(c.model_name_or_path, ranks, c.model_revision)
        tokenizer = open_tokenizer(tokenizer_home(home, ranks), c.chat_template)
    torch.manual_seed(c.seed)  # for the LoRA's random start
    lora: dict = {}
    if directory is not None:
        model, lora = load_adapted(directory, **loading_options(c, ranks))
        if lora and c.use_peft:
            raise ValueError(
                f"--use_peft: {c.model_name_or_path} is an adapter already, and is trained on as "
                "it is; for a new one on top, merge it first (--merge_adapter)")
    elif hasattr(model, "adapters"):
        lora = activate_named(model, c.model_adapter_name)
    continues = bool(lora)
    check_adapter(c, model, continues)
    match_processor(model, tokenizer)
    images = None
    if model.config.vision is not None:
        images = open_pictures(model, tokenizer, c.freeze_vision_tower)
    if c.use_peft:
        lora = lora or fresh_settings(c, given["peft_config"] or {})
        add_lora(model, lora)
    return Opened(
        model=model, tokenizer=tokenizer, lora=lora, continues=continues,
        directory=None if directory is None else Path(directory), images=images)


def check_adapter(c: DPOConfig, model: Decoder, continues: bool) -> None:
    """Raise ValueError for what needs a LoRA and has none."""
    if continues or c.use_peft:
        return
    if c.merge_adapter:
        raise ValueError(
            "--merge_adapter: there is no adapter to merge; add --use_peft, or name an adapter as "
            "the model")
    if model.four_bit:
        raise ValueError(
            f"{c.model_name_or_path}: weights in 4 bits are not trained themselves: add --use_peft "
            "for a LoRA on them, or train the original ones")


def loading_options(c: DPOConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the arguments of `load_adapted` that the flags give.

    They serve for the policy and for a reference that is another model.
    """
    return {
        "dtype": getattr(torch, c.dtype), "max_length": c.max_length, "ranks": ranks,
        "four_bit": four_bit_of(vars(c)),
        "device": str(loading_device(c, ranks))}
