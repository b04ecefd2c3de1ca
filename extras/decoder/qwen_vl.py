"""Qwen2-VL and Qwen2.5-VL: images of any size, attention within windows, positions on three axes.
Qwen3-VL's tower is in qwen3_vl.py.

An image of h x w patches (both even) comes as h w rows of pixels, four neighbours at a time, and
the merger makes one feature of each four. In the decoder a token has a time, a height and a width.
Those of text are equal; those of an image are its rows and columns, counted from where the text
stopped; the text goes on after the highest of them.
"""

from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.decoder.towers import TowerMLP, attend_within
from model import Norm
from parts.kernels import ACTIVATIONS
from parts.ropes import rotary_tables, rotate

# The tower


class Attention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def forward(
        self, x: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor],
    ) -> Tensor:  # (P, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (rotate(part.to(wide), *tables).to(v.dtype) for part in (q, k))
        return self.proj(attend_within(q, k, v, lengths).flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, size: int, inner: int, act: str):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner)
        self.up_proj = nn.Linear(size, inner)
        self.down_proj = nn.Linear(inner, size)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def make_norm(size: int, c: dict) -> Norm:
    kind = "rms" if c["newer"] else "layer"
    return Norm(size, SimpleNamespace(norm_eps=1e-6, norm_offset=False, norm=kind))


class Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size = c["size"]
        self.norm1 = make_norm(size, c)
        self.norm2 = make_norm(size, c)
        self.attn = Attention(size, c["num_heads"])
        if c["newer"]:
            self.mlp = GatedMLP(size, c["intermediate_size"], c["hidden_act"])
        else:
            self.mlp = TowerMLP(size, int(size * c["mlp_ratio"]), c["hidden_act"])

    def forward(
        self, x: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor],
    ) -> Tensor:  # (P, C)
        x = x + self.attn(self.norm1(x), lengths, tables)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Patches of all images as one stream; most layers of Qwen2.5-VL attend within windows only."""

    def __init__(self, c: dict):
        super().__init__()
        self.config = c
        patch = (c["temporal_patch_size"], c["patch_size"], c["patch_size"])
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(c["in_channels"], c["size"], patch, patch, bias=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["depth"]))

    def unreached(self) -> list[nn.Module]:
        return []

    def forward(self, pixels: Tensor, grids: Tensor, run: Callable) -> Tensor:  # (P, C)
        c = self.config
        sizes = grids.tolist()
        weight = self.patch_embed.proj.weight
        x = F.linear(pixels.to(weight.dtype), weight.flatten(1))  # a patch is a row: no convolution
        tables = [table.to(x.device, non_blocking=True) for table in tower_tables(c, sizes)]
        images = [h * w for h, w in sizes]
        windows: list[int] = []
        if c["newer"]:
            merge = c["spatial_merge_size"]
            window = c["window_size"] // c["patch_size"] // merge
            order, windows = window_order(sizes, window, merge)
            order = order.to(x.device, non_blocking=True)
            x = x[order]
            tables = [table[order] for table in tables]
        for i, block in enumerate(self.blocks):
            is_full = not c["newer"] or i in c["fullatt_block_indexes"]
            x = run(block, x, images if is_full else windows, tables)
        return x[order.argsort()] if c["newer"] else x


def tower_tables(c: dict, grids: list) -> tuple[Tensor, Tensor]:  # (P, 1, D)
    """Return cos and sin: half of the dims turn with a patch's row, half with its column."""
    dim = c["size"] // c["num_heads"] // 2
    freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)  # (dim/2,)
    places = patch_places(grids, c["spatial_merge_size"])
    angles = (places[..., None] * freq).flatten(1)  # (P, dim)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def patch_places(grids: list, merge: int) -> Tensor:  # (P, 2)
    """Return row and column of each patch, in stream order: squares of merge x merge patches."""
    places = []
    for h, w in grids:
        axes = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        squares = [x.view(h // merge, merge, w // merge, merge).transpose(1, 2) for x in axes]
        places.append(torch.stack([x.flatten() for x in squares], 1))
    return torch.cat(places)


def window_order(grids: list, window: int, merge: int) -> tuple[Tensor, list[int]]:
    """Return (P,) the patches window by window, and the number of patches of each window.

    `window` counts merged squares; the last windows of a row or column may be smaller.
    """
    order = []
    lengths = []
    begin = 0
    for h, w in grids:
        down = h // merge
        across = w // merge
        index = torch.arange(down * across).view(down, across)
        for band in index.split(window, 0):
            for part in band.split(window, 1):
                squares = part.flatten()[:, None] * merge**2 + torch.arange(merge**2)
                order.append(begin + squares.flatten())
                lengths.append(squares.numel())
        begin += h * w
    return torch.cat(order), lengths


class Merger(nn.Module):
    """Make one feature of each merge x merge patches."""

    def __init__(self, c: dict):
        super().__init__()
        self.inner = c["size"] * c["spatial_merge_size"] ** 2
        self.ln_q = make_norm(c["size"], c)
        self.mlp = nn.Sequential(
            nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, c["out"]))

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        return self.mlp(self.ln_q(x).view(-1, self.inner))


# Positions on three axes


def axis_of_pairs(sections: tuple, alternate: bool) -> Tensor:  # (D/2,)
    """Tell with which axis each pair of dims turns: `sections` gives how many with each.

    They lie one after another, or `alternate` (Qwen3-VL): time, height and width in turn, and time
    again where height and width have had theirs.
    """
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    if alternate:
        axis = torch.zeros_like(axis)
        for i in (1, 2):
            axis[i : 3 * sections[i] : 3] = i
    return axis


def axes_tables(
    ropes: dict, axes: Tensor, sections: tuple, alternate: bool, dtype: torch.dtype,
) -> dict:
    """Return the rotary tables of a stream with axes (3, T); the rest as in `axis_of_pairs`."""
    per_axis = [rotary_tables(ropes, axis, dtype) for axis in axes]
    axis = axis_of_pairs(sections, alternate).repeat(2)  # (D,)
    axis = axis.to(axes.device, non_blocking=True)

    def pick(parts: list[Tensor]) -> Tensor:
        """Take each dim from the table of its own axis."""
        time, height, width = parts
        return torch.where(axis == 0, time, torch.where(axis == 1, height, width))

    return {name: tuple(pick([tables[name][i] for tables in per_axis]) for i in (0, 1))
            for name in ropes}
