"""Vision-language models: a tower turns images into features, a projector maps these to the
decoder's size.

LLaVA, Idefics3 and SmolVLM (extras/decoder/towers.py), Qwen2-VL and Qwen2.5-VL (qwen_vl.py),
Qwen3-VL and Qwen3.5 (qwen3_vl.py). Used where config.json has a `vision_config`; image files are
read and cut by extras/rows/pictures.py.

The features replace the embeddings of the image tokens in the stream. Each distinct image of a
batch is encoded once, though both completions see it and rows may share it: `Pictures.source`
tells which feature goes where.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from extras.decoder import qwen3_vl, qwen_vl
from extras.decoder.in_stream import Pictures
from extras.decoder.towers import Tower
from model import ModelConfig
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


class Vision(nn.Module):
    """Put the features of images into the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.vision
        if c["kind"] == "qwen":
            self.tower = qwen_vl.Tower(c)
            self.projector = qwen_vl.Merger(c)
        elif c["kind"] == "qwen3":
            self.tower = qwen3_vl.Tower(c)
            self.projector = qwen3_vl.Merger(c)
        else:
            self.tower = Tower(c)
            self.projector = LlavaProjector(c) if c["kind"] == "llava" else ShuffleProjector(c)

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
        self, x: Tensor, tables: dict, pictures: Pictures | None, ropes: dict, run_layer: Callable,
    ) -> tuple[Tensor, dict, list[Tensor]]:
        """Return the embeddings (T, C) with features in their places, the rotary tables, and what
        is added in the same places after the first layers (DeepStack), (M, C) each.

        The tables change only for Qwen, whose positions have three axes. Without images a blank
        one is encoded and multiplied by 0 where the tower or projector learns, so that each
        parameter has a gradient on every rank, as DDP and FSDP expect.
        """
        if pictures is None:
            learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
            if not learns:
                return x, tables, []
            features, deep = self.encode(*self.blank(x.device))
            return x + 0 * sum(part.sum() for part in (features, *deep)), tables, []
        features, deep = self.encode(pictures.pixels, pictures.grids, run_layer)
        x = x.index_put((pictures.place,), features[pictures.source].to(x.dtype))
        if pictures.axes is not None:
            c = self.config
            tables = qwen_vl.axes_tables(
                ropes, pictures.axes, c["sections"], c["kind"] == "qwen3", x.dtype)
        return x, tables, [part[pictures.source].to(x.dtype) for part in deep]

    def blank(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return pixels and grids of the smallest image that the tower reads."""
        c = self.config
        if c["kind"] in ("qwen", "qwen3"):
            side = c["spatial_merge_size"]
            size = c["in_channels"] * c["temporal_patch_size"] * c["patch_size"] ** 2
            return torch.zeros(side * side, size, device=device), torch.tensor([[side, side]])
        shape = (1, c["num_channels"], c["image_size"], c["image_size"])
        return torch.zeros(shape, device=device), torch.zeros(0, 2).long()


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
