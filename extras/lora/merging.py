"""Merging: add what an adapter learned to the weights, also of a model in 4 bits."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from extras.lora import kinds
from extras.lora.targets import replace_module
from extras.models.nf4 import (
    Experts4bit,
    Linear4bit,
    Quantized,
    dequantize_linears,
    requantize,
    wide_module,
)
from model import lora_modules
from parts.names import Place


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each update to its weight and remove the wrapper: the same model, up to rounding.

    A head and an embedding that were one matrix become two if either has an adapter.
    """
    if model.four_bit:
        return merge_4bit(model)
    untie(model)
    for name, wrapper in lora_modules(model).items():
        replace_module(model, name, merged(wrapper))
    model.requires_grad_(True)


def merged(wrapper: nn.Module) -> nn.Module:
    """Return the wrapped module, with the update added to its weights."""
    base = wrapper.base_layer
    if isinstance(wrapper, kinds.SavedModule):
        base.load_state_dict(wrapper.lora_saved.state_dict())
        return base
    for child, delta in kinds.deltas(wrapper).items():
        weight = getattr(base, child)
        weight.copy_(weight.to(delta.dtype) + delta)
    return base


def untie(model: nn.Module) -> None:
    """Give the head a copy of its own where it or the embedding has an adapter.

    Updates of the two differ, so they can no longer be one matrix; config.json and the names in
    the files follow.
    """
    adapted = lora_modules(model).keys() & {"lm_head", "model.embed_tokens"}
    if not (model.config.tie_word_embeddings and adapted):
        return
    head = getattr(model.lm_head, "base_layer", model.lm_head)
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config = replace(model.config, tie_word_embeddings=False)
    model.raw_config = model.raw_config | {"tie_word_embeddings": False}
    if model.layout:
        model.layout = model.layout | {"lm_head.weight": Place("lm_head.weight")}


@torch.no_grad()
def merge_4bit(
    model: nn.Module, again: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Merge the LoRA of a model in 4 bits: dequantize, add in float32, round to `dtype` once.

    An adapter that was trained over 4 bits belongs on the dequantized weights, not on the original
    ones: the two differ by far more than what it learned. The merged model takes the memory of
    `dtype`, which may be more than a GPU has, so it is moved to the CPU. With `again` the merged
    weights are quantized again, which rounds what was learned a second time; the others keep
    their 4 bits.
    """
    if not again:
        model.cpu()
    untie(model)
    for name, wrapper in lora_modules(model).items():
        narrow = wrapper.base_layer
        wrapper.base_layer = wide_module(narrow, torch.float32)
        base = merged(wrapper)
        replace_module(model, name, requantized(narrow, base) if again else base.to(dtype))
    if not again:
        dequantize_linears(model, dtype)
        model.to(dtype).requires_grad_(True)


def requantized(narrow: nn.Module, wide: nn.Module) -> nn.Module:
    """Return `wide` in the format of `narrow`, which may not have been in 4 bits either."""
    if isinstance(narrow, Linear4bit):
        return Linear4bit(requantize(narrow.state, wide.weight), narrow.bias, narrow.compute_dtype)
    if not isinstance(narrow, Experts4bit):
        return wide

    def each(states: Iterable[Quantized], weights: Iterable[Tensor]) -> list[Quantized]:
        return [requantize(state, weight) for state, weight in zip(states, weights)]

    parts = 2 if narrow.gated else 1
    halves = [matrix for expert in getattr(wide, wide.first) for matrix in expert.chunk(parts)]
    gate_up = each(narrow.gate_up, halves)
    down = each(narrow.down, wide.down_proj)
    return Experts4bit(gate_up, down, narrow.act, narrow.compute_dtype, narrow.gated)
