"""Vision-language models: a tower turns images into features, a projector maps these to the
decoder's size.

LLaVA, Idefics3, SmolVLM and Gemma 3 (extras/decoder/towers.py), Gemma 4 (gemma4_tower.py),
Qwen2-VL and Qwen2.5-VL (qwen_vl.py), Qwen3-VL and Qwen3.5 (qwen3_vl.py). Used where config.json
has a `vision_config`; image files are read and cut by extras/rows/pictures.py.

The features replace the embeddings of the image tokens in the stream. Each distinct image of a
batch is encoded once, though both completions see it and rows may share it: `Pictures.source`
tells which feature goes where.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.decoder import gemma4_tower, qwen3_vl, qwen_vl
from extras.decoder.both_ways import BothWays
from extras.decoder.in_stream import Pictures
from extras.decoder.towers import Tower
from model import ModelConfig, Norm
from parts.activations import keep_all
from parts.kernels import ACTIVATIONS


class LlavaProjector(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size = c["hidden_size"] * len(c["layers"])
        self.linear_1 = nn.Linear(size, c["text_size"], bias=c["projector_bias"])
        self.linear_2 = nn.Linear(c["text_size"], c["text_size"], bias=c["projector_bias"])
        self.act = ACTIVATIONS[c["projector_act"]]

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        return self.linear_2(self.act(self.linear_1(x))).flatten(0, 1)


class ShuffleProjector(nn.Module):
    """Join s x s neighbouring features, then apply a linear map (Idefics3's pixel shuffle)."""

    def __init__(self, c: dict):
        super().__init__()
        self.scale = c["scale_factor"]
        self.modality_projection = nn.Module()
        size = c["hidden_size"] * self.scale**2
        self.modality_projection.proj = nn.Linear(size, c["text_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        tiles, length, size = x.shape
        side = int(length**0.5)
        s = self.scale
        x = x.view(tiles, side // s, s, side // s, s, size)
        x = x.transpose(2, 3)  # (tiles, down, across, s, s, C)
        return self.modality_projection.proj(x.reshape(-1, s * s * size))


class PoolProjector(nn.Module):
    """Average squares of neighbouring features to `tokens` of them, norm, linear map (Gemma 3)."""

    def __init__(self, c: dict):
        super().__init__()
        side = c["image_size"] // c["patch_size"]
        self.side = side
        self.width = side // math.isqrt(c["tokens"])
        norm = SimpleNamespace(norm_eps=c["layer_norm_eps"], norm_offset=True, norm="rms")
        self.mm_soft_emb_norm = Norm(c["hidden_size"], norm)
        self.mm_input_projection_weight = nn.Parameter(
            torch.zeros(c["hidden_size"], c["text_size"]))

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        x = x.transpose(1, 2).unflatten(-1, (self.side, self.side))  # (images, C, down, across)
        x = F.avg_pool2d(x, self.width).flatten(2).transpose(1, 2)
        return (self.mm_soft_emb_norm(x) @ self.mm_input_projection_weight).flatten(0, 1)


PROJECTORS = {"llava": LlavaProjector, "idefics3": ShuffleProjector, "gemma3": PoolProjector}


class Vision(nn.Module):
    """Put the features of images into the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.vision
        self.ropes = config.ropes
        if c["kind"] == "qwen":
            self.tower = qwen_vl.Tower(c)
            self.projector = qwen_vl.Merger(c)
        elif c["kind"] == "qwen3":
            self.tower = qwen3_vl.Tower(c)
            self.projector = qwen3_vl.Merger(c)
        elif c["kind"].startswith("gemma4"):
            is_tower = c["kind"] == "gemma4"
            self.tower = gemma4_tower.Tower(c) if is_tower else gemma4_tower.Patches(c)
            self.projector = gemma4_tower.Projector(c)
        else:
            self.tower = Tower(c)
            self.projector = PROJECTORS[c["kind"]](c)

    def encode(
        self, pixels: Tensor, grids: Tensor, run_layer: Callable = keep_all,
    ) -> tuple[Tensor, list[Tensor]]:  # each (F, C)
        """Return the features of all images, one after another, in the decoder's size; and those
        that DeepStack adds after the decoder's first layers, if the family has it.

        `run_layer` decides what a layer keeps for its backward.
        """
        found = self.tower(pixels, grids, run_layer)
        if self.config["kind"] != "qwen3":
            return self.projector(found), []
        last, kept = found
        return self.projector(last), self.projector.stack(kept)

    def forward(
        self, x: Tensor, tables: dict, pictures: Pictures | None, run_layer: Callable, cache: Any,
    ) -> tuple[Tensor, dict, Any, list[Tensor]]:
        """Return the embeddings (T, C) with features in their places, the rotary tables, what
        plans attention in place of `cache`, and what is added in the same places after the first
        layers, (M, C) each: Qwen3-VL's DeepStack.

        The tables change only for Qwen, whose positions have three axes, and the plan only where
        images are seen both ways (Gemma). Without images, 0 times the sum of the tower's and
        projector's weights is added where they learn, so that each has a gradient on every rank, as
        DDP and FSDP expect.
        """
        if pictures is None:
            learning = [p for p in self.parameters() if p.requires_grad]
            if torch.is_grad_enabled() and learning:
                x = x + 0 * torch.stack([p.sum() for p in learning]).sum()
            return x, tables, cache, []
        c = self.config
        features, deep = self.encode(pictures.pixels, pictures.grids, run_layer)
        x = x.index_put((pictures.place,), features[pictures.source].to(x.dtype))
        if pictures.axes is not None:
            alternate = c["kind"] == "qwen3"
            tables = qwen_vl.axes_tables(
                self.ropes, pictures.axes, c["sections"], alternate, x.dtype)
        if c.get("both_ways"):
            assert pictures.runs is not None
            cache = BothWays(pictures.runs.tolist(), c["both_ways"], cache)
        return x, tables, cache, [part[pictures.source].to(x.dtype) for part in deep]


def freeze(model: nn.Module, tower: bool) -> None:
    """Freeze modules that no feature passes through and, if `tower`, the tower with all its layers.

    LoRA leaves frozen modules alone. The projector always learns.
    """
    vision = model.model.vision
    names = {module: name for name, module in model.named_modules()}
    idle = [vision.tower] if tower else vision.tower.unreached()
    for module in idle:
        module.requires_grad_(False)
    model.no_lora = tuple(f"{names[module]}." for module in idle)
