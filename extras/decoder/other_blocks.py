"""Blocks that model.Block does not describe: Gemma 4's (per_layer.py), and those of a single
residual, which are a mixer of tokens, an MLP or experts (Nemotron-H, arXiv:2504.03624)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from extras.decoder.mixers import KINDS, attends, recurs
from extras.decoder.per_layer import PerLayerBlock


def make_other_block(
    config: Any, layer: int, norm: Callable, make_attention: Callable, make_mlp: Callable,
) -> nn.Module:
    """Return layer number `layer`; the last three make model.py's parts of a block."""
    if config.per_layer is not None:
        own = replace(config, **config.per_layer["sizes"][layer])
        return PerLayerBlock(own, layer, partial(norm, config=own), make_mlp(own, layer))
    is_mlp = False
    if recurs(config)[layer]:
        mixer = KINDS[config.mixer["kind"]].make(config)
    elif attends(config)[layer]:
        mixer = make_attention(config, layer)
    else:
        mixer = make_mlp(config, layer)
        is_mlp = True
    return SingleBlock(norm(config.hidden_size, config), mixer, is_mlp)


class SingleBlock(nn.Module):
    """x + mixer(norm(x)), under Hugging Face's names, by which an MLP is a mixer too."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, is_mlp: bool):
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.is_mlp = is_mlp

    def forward(self, x: Tensor, tables: dict, plans: dict) -> tuple[Tensor, None]:  # (T, C)
        normed = self.norm(x)
        out = self.mixer(normed) if self.is_mlp else self.mixer(normed, tables, plans)
        return x + out, None
