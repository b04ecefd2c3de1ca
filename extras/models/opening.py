"""The one place that opens any model: from the hub, with adapters, in 4 bits, with images.

    directory = model_directory("Qwen/Qwen2-0.5B-Instruct")

    # plain, with images, or in 4 bits
    model = load_model(directory, torch.bfloat16)
    # the same, or an adapter on its base
    model, settings = load_adapted(directory, torch.float32)

A plain model needs none of this: model.load_model opens it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import model as models
from model import Decoder, ModelConfig
from parts.configs import packed_in
from parts.files import read_json
from parts.rows import on_hub
from parts.weights import open_checkpoint

# Where


def model_directory(
    name: str, ranks: Any = None, revision: str | None = None, adapter: str | None = None,
) -> str:
    """Return the directory of a model, or of the adapter named `adapter` in it.

    `name` is a path, else an id on the hub, from which it is fetched; with `ranks`, all of them
    take the commit that rank 0 found. Raises ValueError for what is not there.
    """
    if on_hub(name) or revision is not None:
        from extras.hub import client

        directory = str(client.same_model(name, revision, ranks))
    else:
        directory = os.path.expanduser(name)
    if adapter is None:
        return directory
    from extras.lora.peft_files import adapter_home

    return adapter_home(directory, adapter)


def own_dtype(c: Any, ranks: Any) -> str:
    """Return what --dtype auto means: the type that config.json says its files have.

    `c` is the run's DPOConfig. Raises ValueError for float16, in which weights are not trained.
    """
    directory = model_directory(
        c.model_name_or_path, ranks, c.model_revision, c.model_adapter_name)
    if is_adapter(directory):
        from extras.lora.peft_files import find_base, read_settings

        directory = find_base(read_settings(Path(directory)), ranks)
    raw = read_json(Path(directory) / "config.json")
    text = raw | (raw.get("text_config") or {})
    stored = "bfloat16" if packed_in(raw) else "float32"
    dtype = text.get("dtype") or text.get("torch_dtype") or stored
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(
            f"--dtype auto: the files of {c.model_name_or_path} are in {dtype}; give --dtype float32, "
            "or bfloat16")
    return dtype


def is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / "adapter_config.json").exists()


def run_options(directory: str | Path) -> dict[str, Any]:
    """Return the options of the run whose output this directory is; {} if it is another's."""
    path = Path(directory) / "dpo_config.json"
    return read_json(path) if path.is_file() else {}


def four_bit_of(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of `load_model`'s `four_bit` that a run's options ask for."""
    if not options.get("load_in_4bit"):
        return None
    compute_dtype = options.get("bnb_4bit_compute_dtype")
    return {
        "quant_type": options.get("bnb_4bit_quant_type", "nf4"),
        "nested": options.get("use_bnb_nested_quant", False),
        "compute_dtype": compute_dtype and getattr(torch, compute_dtype)}


def tokenizer_home(directory: str, ranks: Any = None) -> str:
    """Return the tokenizer's directory: PEFT's adapters may leave it with their base."""
    if (Path(directory) / "tokenizer.json").exists() or not is_adapter(directory):
        return directory
    from extras.lora import peft_files

    return peft_files.find_base(peft_files.read_settings(Path(directory)), ranks)


# Opening


def build(config: ModelConfig) -> Decoder:
    """Make a Decoder; one that reads images gets the module that puts them into the stream."""
    if config.vision is None:
        return Decoder(config)
    from extras.decoder.vision import Vision

    return Decoder(config, Vision)


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
    max_length: int | None = None, four_bit: dict | None = None,
) -> Decoder:
    """Return a Decoder with the directory's weights: model.load_model for every checkpoint.

    Its linear layers are in 4 bits where the files have them so, or with `four_bit`, the settings
    of nf4.quantize_linears. MXFP4 and FP8 are dequantized, and saved so.
    """
    opened = open_checkpoint(directory)
    packed = packed_in(opened.raw_config)
    if packed == "mxfp4":
        from extras.models.mxfp4 import dequantized

        opened = dequantized(opened)
    elif packed == "fp8":
        from extras.models import fp8

        opened = fp8.dequantized(opened)
    if four_bit is None and not opened.raw_config.get("quantization_config"):
        return models.load_model(opened, dtype, device, max_length, build)
    from extras.models.nf4 import load_4bit

    return load_4bit(opened, four_bit, dtype, device, max_length, build)


def load_adapted(
    directory: str | Path, dtype: torch.dtype, max_length: int | None = None, ranks: Any = None,
    four_bit: dict | None = None, device: str = "cpu",
) -> tuple[Decoder, dict]:
    """Return a model and, where `directory` is a PEFT adapter, its LoRA's settings (else {}).

    The model of an adapter is its base, with the adapter active.
    """
    if not is_adapter(directory):
        return load_model(directory, dtype, device, max_length, four_bit), {}
    from extras.lora import peft_files
    from extras.lora.targets import add_lora

    settings = peft_files.read_settings(Path(directory))
    base = peft_files.find_base(settings, ranks)
    model = load_model(base, dtype, device, max_length, four_bit)
    try:
        add_lora(model, settings)
    except ValueError as error:
        raise ValueError(f"{directory}/adapter_config.json: {error}") from None
    peft_files.load_adapter(model, directory)
    return model.eval(), settings


def load_adapter(model: Decoder, directory: str, adapter_name: str = "default") -> Decoder:
    """Load an adapter onto `model` under a name; the first is active, and is trained.

    Others can be the reference. As with TRL 0.18: load_adapter(model, DIR, "train"),
    load_adapter(model, DIR, "reference"), and then DPOTrainer(model,
    args=DPOConfig(model_adapter_name="train", ref_adapter_name="reference", ...)).
    """
    from extras.lora.adapters import load_named

    return load_named(model, directory, adapter_name)


def match_processor(model: nn.Module, tokenizer: Any) -> None:
    """Leave a tokenizer its image processor only beside a model that reads images: rows with images
    are refused elsewhere. Raises ValueError for the processor of another model."""
    from extras.rows.pictures import check_features

    if model.config.vision is None:
        tokenizer.pictures = None
    elif tokenizer.pictures is not None:
        check_features(tokenizer.pictures, model.config.vision)


def open_pictures(model: nn.Module, tokenizer: Any, freeze_tower: bool) -> Any:
    """Freeze what a model that reads images does not train.

    Returns a Loader that decodes images in the background, or None where the directory lacks the
    processor's files.
    """
    from extras.decoder.vision import freeze

    freeze(model, freeze_tower)
    if tokenizer.pictures is None:
        return None
    from extras.rows.pictures import Loader

    return Loader(tokenizer.pictures)
