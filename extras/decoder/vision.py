"""Vision-language models: a tower turns pictures into features, a projector into the decoder's space.

LLaVA, Idefics3 and SmolVLM (extras/decoder/towers.py), Qwen2-VL and Qwen2.5-VL (qwen_vl.py). Entered
where config.json has a `vision_config`; files of pictures are read and cut by extras/pictures.py.

The features take the place of the image tokens' embeddings in the stream. Each distinct picture of
a batch is encoded once, though both completions see it and rows may share it: `Pictures.source`
says which feature stands where.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from extras.decoder import qwen_vl
from extras.decoder.in_stream import Pictures
from extras.decoder.towers import Tower
from model import ModelConfig
from parts.kernels import ACTIVATIONS


class LlavaProjector(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.linear_1 = nn.Linear(c["hidden_size"] * len(c["layers"]), c["text_size"], bias=c["projector_bias"])
        self.linear_2 = nn.Linear(c["text_size"], c["text_size"], bias=c["projector_bias"])
        self.act = ACTIVATIONS[c["projector_act"]]

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        return self.linear_2(self.act(self.linear_1(x))).flatten(0, 1)


class ShuffleProjector(nn.Module):
    """s x s neighbouring features become one, then a linear map (Idefics3's pixel shuffle)."""

    def __init__(self, c: dict):
        super().__init__()
        self.scale = c["scale_factor"]
        self.modality_projection = nn.Module()
        self.modality_projection.proj = nn.Linear(c["hidden_size"] * self.scale**2, c["text_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        tiles, length, size = x.shape
        side, s = int(length**0.5), self.scale
        x = x.view(tiles, side // s, s, side // s, s, size).transpose(2, 3)  # (tiles, down, across, s, s, C)
        return self.modality_projection.proj(x.reshape(-1, s * s * size))


class Vision(nn.Module):
    """Puts the features of pictures into the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.vision
        if c["kind"] == "qwen":
            self.tower, self.projector = qwen_vl.Tower(c), qwen_vl.Merger(c)
        else:
            self.tower = Tower(c)
            self.projector = (LlavaProjector if c["kind"] == "llava" else ShuffleProjector)(c)

    def encode(self, pixels: Tensor, grids: Tensor, save_memory: bool = False) -> Tensor:  # (F, C)
        """Features of all pictures, one after another, in the decoder's size."""
        run = lambda layer, *args: layer(*args)
        if save_memory and torch.is_grad_enabled():
            run = lambda layer, *args: checkpoint(layer, *args, use_reentrant=False)
        return self.projector(self.tower(pixels, grids, run))

    def forward(self, x: Tensor, tables: dict, pictures: Pictures | None, ropes: dict, save_memory: bool):
        """The stream's embeddings (T, C) with features in their places, and the rotary tables of Qwen's three axes.

        Without pictures a blank one is encoded and multiplied by 0 where the tower or projector learns, so that each
        parameter has a gradient on every rank, as DDP and FSDP expect.
        """
        if pictures is None:
            learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
            return (x + 0 * self.encode(*self.blank(x.device)).sum(), tables) if learns else (x, tables)
        features = self.encode(pictures.pixels, pictures.grids, save_memory)[pictures.source]  # (M, C)
        x = x.index_put((pictures.place,), features.to(x.dtype))
        if pictures.axes is not None:
            tables = qwen_vl.axes_tables(ropes, pictures.axes, self.config["sections"], x.dtype)
        return x, tables

    def blank(self, device) -> tuple[Tensor, Tensor]:
        """The smallest picture that the tower reads."""
        c = self.config
        if c["kind"] == "qwen":
            side = c["spatial_merge_size"]
            size = c["in_channels"] * c["temporal_patch_size"] * c["patch_size"] ** 2
            return torch.zeros(side * side, size, device=device), torch.tensor([[side, side]])
        return torch.zeros(1, c["num_channels"], c["image_size"], c["image_size"], device=device), torch.zeros(0, 2).long()


def freeze(model: nn.Module, tower: bool) -> None:
    """Freezes modules that no feature comes through and, if `tower`, the whole tower; LoRA leaves them alone.

    The projector always learns.
    """
    vision, names = model.model.vision, {m: n for n, m in model.named_modules()}
    idle = [vision.tower] if tower else vision.tower.unreached()
    for module in idle:
        module.requires_grad_(False)
    model.no_lora = tuple(f"{names[module]}." for module in idle)
