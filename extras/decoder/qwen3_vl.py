"""Qwen3-VL and Qwen3.5: learned position embeddings of patches, and features of several of the
tower's layers (DeepStack, arXiv:2406.04334).

Images come as Qwen2-VL's do (qwen_vl.py), and so do positions on three axes; their dims alternate.
Each patch gets, besides its rotation, a position embedding: one learned square grid is interpolated
to each image's size. DeepStack adds features of layer `deep[i]` of the tower to what layer i of the
decoder returns, where the image's tokens are. Qwen3.5 has no DeepStack.

Sizes: P patches of all images, F features, C hidden.
"""

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.decoder.qwen_vl import Attention, patch_places, tower_tables
from parts.kernels import TOWER_ACTIVATIONS


class MLP(nn.Module):
    def __init__(self, size: int, inner: int, out: int, act: str):
        super().__init__()
        self.linear_fc1 = nn.Linear(size, inner)
        self.linear_fc2 = nn.Linear(inner, out)
        self.act = TOWER_ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size = c["hidden_size"]
        self.norm1 = nn.LayerNorm(size, 1e-6)
        self.norm2 = nn.LayerNorm(size, 1e-6)
        self.attn = Attention(size, c["num_heads"])
        self.mlp = MLP(size, c["intermediate_size"], size, c["hidden_act"])

    def forward(
        self, x: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor],
    ) -> Tensor:  # (P, C)
        x = x + self.attn(self.norm1(x), lengths, tables)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Patches of all images as one stream; each attends within its image."""

    def __init__(self, c: dict):
        super().__init__()
        self.config = c
        patch = (c["temporal_patch_size"], c["patch_size"], c["patch_size"])
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(c["in_channels"], c["hidden_size"], patch, patch)
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], c["hidden_size"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["depth"]))

    def unreached(self) -> list[nn.Module]:
        return []

    def forward(self, pixels: Tensor, grids: Tensor, run: Callable) -> tuple[Tensor, dict]:
        """Return the features (P, C), and {layer: those after it} where DeepStack takes them."""
        c = self.config
        sizes = grids.tolist()
        proj = self.patch_embed.proj
        x = F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        x = x + self.positions(sizes).to(x.dtype)
        tables = [table.to(x.device, non_blocking=True) for table in tower_tables(c, sizes)]
        kept = {}
        for i, block in enumerate(self.blocks):
            x = run(block, x, [h * w for h, w in sizes], tables)
            if i in c["deep"]:
                kept[i] = x
        return x, kept

    def positions(self, sizes: list) -> Tensor:  # (P, C)
        """Interpolate the grid bilinearly to each image's (height, width) in patches.

        Its corners are the image's corners.
        """
        side = int(self.config["num_position_embeddings"] ** 0.5)
        places = patch_places(sizes, self.config["spatial_merge_size"]).float()  # (P, 2)
        ends = torch.cat([torch.tensor([[h - 1, w - 1]]).expand(h * w, 2) for h, w in sizes])
        exact = places * (side - 1) / ends.clamp(min=1)
        low = exact.floor()
        share = exact - low
        corners = torch.stack([low, low + 1]).clamp(max=side - 1).long()  # (2, P, 2)
        shares = torch.stack([1 - share, share])
        index = corners[:, None, :, 0] * side + corners[None, :, :, 1]  # (2, 2, P)
        weights = shares[:, None, :, 0] * shares[None, :, :, 1]
        device = self.pos_embed.weight.device
        index, weights = (x.flatten(0, 1).to(device, non_blocking=True) for x in (index, weights))
        return (self.pos_embed(index) * weights[..., None]).sum(0)  # of (4, P, C)


class Merger(nn.Module):
    """Make one feature of merge x merge patches; DeepStack's mergers normalize them joined."""

    def __init__(self, c: dict, joined: bool = False):
        super().__init__()
        self.inner = c["hidden_size"] * c["spatial_merge_size"] ** 2
        self.joined = joined
        self.norm = nn.LayerNorm(self.inner if joined else c["hidden_size"], 1e-6)
        self.linear_fc1 = nn.Linear(self.inner, self.inner)
        self.linear_fc2 = nn.Linear(self.inner, c["out_hidden_size"])
        self.layers = () if joined else c["deep"]
        self.deep = nn.ModuleList(Merger(c, joined=True) for _ in self.layers)

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        x = x.reshape(-1, self.inner) if self.joined else x
        x = self.norm(x).reshape(-1, self.inner)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))

    def stack(self, kept: dict[int, Tensor]) -> list[Tensor]:  # each (F, C) of the decoder
        """Return the features for the decoder's first layers, of the tower's lowest layer first."""
        return [self.deep[self.layers.index(i)](kept[i]) for i in sorted(kept)]
