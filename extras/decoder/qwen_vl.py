"""Qwen2-VL and Qwen2.5-VL: pictures of any size, attention within windows, positions on three axes.

A picture of h x w patches (both even) comes as h w rows of pixels, four neighbours at a time: the merger makes one
feature of each four. In the decoder a token has a time, a height and a width; those of text are equal, a picture's are
its rows and columns from where the text stopped, and the text goes on after the highest of them.
"""

from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.vision import TowerMLP, attend_within, read_tower
from model import ACTIVATIONS, Norm, rotary_tables, rotate

QWEN2 = dict(depth=32, embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu", mlp_ratio=4, num_heads=16,
             in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
QWEN25 = dict(depth=32, hidden_size=3584, out_hidden_size=3584, hidden_act="silu", intermediate_size=3420, num_heads=16,
              in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
              fullatt_block_indexes=[7, 15, 23, 31])
IGNORED = {"in_chans", "spatial_patch_size", "tokens_per_second", "rope_parameters"}  # the last two: of video, and default
OUTER = {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
         "vision_token_id", "text_config"}
TEXT = dict(rms_norm_eps=1e-6, max_position_embeddings=32768, rope_theta=1e6)


# Configuration


def split_config(raw: dict) -> tuple[dict, dict]:
    """(config.json of the decoder, a Qwen2, and the tower's settings); older files hold the decoder's keys at the top."""
    text = dict(raw.get("text_config") or {k: v for k, v in raw.items() if k not in OUTER}) | {"model_type": "qwen2"}
    rope = dict(text.pop("rope_scaling", None) or {}) | dict(text.pop("rope_parameters", None) or {})
    sections = rope.pop("mrope_section", [16, 24, 24])
    rope = {k: "default" if v == "mrope" else v for k, v in rope.items()}
    rope.pop("type", None)
    text["rope_parameters"] = rope
    newer = raw["model_type"] == "qwen2_5_vl"
    given = {k: v for k, v in raw["vision_config"].items() if k not in IGNORED}
    theta = (raw["vision_config"].get("rope_parameters") or {}).get("rope_theta", 10000.0)
    if theta != 10000.0:
        raise ValueError(f"config.json: rope_theta = {theta} in vision_config is not supported")
    c = read_tower(given, raw["model_type"], QWEN25 if newer else QWEN2)
    c |= {"size": c["hidden_size"], "out": c["out_hidden_size"]} if newer else {"size": c["embed_dim"], "out": c["hidden_size"]}
    return TEXT | text, c | {"kind": "qwen", "newer": newer, "sections": tuple(sections)}


# The tower


class Attention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor]) -> Tensor:  # (P, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (rotate(part.to(wide), *tables).to(v.dtype) for part in (q, k))
        return self.proj(attend_within(q, k, v, lengths).flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, size: int, inner: int, act: str):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(size, inner), nn.Linear(size, inner), nn.Linear(inner, size)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def make_norm(size: int, c: dict) -> Norm:
    return Norm(size, SimpleNamespace(norm_eps=1e-6, norm_offset=False, norm="rms" if c["newer"] else "layer"))


class Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size = c["size"]
        self.norm1, self.norm2 = make_norm(size, c), make_norm(size, c)
        self.attn = Attention(size, c["num_heads"])
        self.mlp = (GatedMLP(size, c["intermediate_size"], c["hidden_act"]) if c["newer"] else
                    TowerMLP(size, int(size * c["mlp_ratio"]), c["hidden_act"]))

    def forward(self, x: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor]) -> Tensor:  # (P, C)
        x = x + self.attn(self.norm1(x), lengths, tables)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Patches of all pictures as one stream; most layers of Qwen2.5-VL look within windows only."""

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
        c, grids = self.config, grids.tolist()
        weight = self.patch_embed.proj.weight
        x = F.linear(pixels.to(weight.dtype), weight.flatten(1))  # a patch is a row: the convolution is a product
        tables = [table.to(x.device) for table in self.tables(grids)]
        whole, windows = [h * w for h, w in grids], []
        if c["newer"]:
            order, windows = window_order(grids, c["window_size"] // c["patch_size"] // c["spatial_merge_size"],
                                          c["spatial_merge_size"])
            order = order.to(x.device)
            x, tables = x[order], [table[order] for table in tables]
        for i, block in enumerate(self.blocks):
            is_whole = not c["newer"] or i in c["fullatt_block_indexes"]
            x = run(block, x, whole if is_whole else windows, tables)
        return x[order.argsort()] if c["newer"] else x

    def tables(self, grids: list) -> tuple[Tensor, Tensor]:  # (P, 1, D)
        """cos and sin: half of the dims turn with the row, half with the column of a patch."""
        dim = self.config["size"] // self.config["num_heads"] // 2
        freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)  # (dim/2,)
        angles = (patch_places(grids, self.config["spatial_merge_size"])[..., None] * freq).flatten(1)  # (P, dim)
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()


def patch_places(grids: list, merge: int) -> Tensor:  # (P, 2)
    """Row and column of each patch, in the order of the stream: squares of merge x merge, row by row."""
    places = []
    for h, w in grids:
        rows, columns = (x.view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
                         for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        places.append(torch.stack([rows, columns], 1))
    return torch.cat(places)


def window_order(grids: list, window: int, merge: int) -> tuple[Tensor, list[int]]:
    """(P,) the patches window by window, and how many each window has; windows count merged squares, the last ones of a
    row or column are smaller."""
    order, lengths, begin = [], [], 0
    for h, w in grids:
        down, across = h // merge, w // merge
        index = torch.arange(down * across).view(down, across)
        for band in index.split(window, 0):
            for part in band.split(window, 1):
                squares = part.flatten()[:, None] * merge**2 + torch.arange(merge**2)
                order.append(begin + squares.flatten())
                lengths.append(squares.numel())
        begin += h * w
    return torch.cat(order), lengths


class Merger(nn.Module):
    """Each merge x merge patches become one feature."""

    def __init__(self, c: dict):
        super().__init__()
        inner = c["size"] * c["spatial_merge_size"] ** 2
        self.inner, self.ln_q = inner, make_norm(c["size"], c)
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, c["out"]))

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        return self.mlp(self.ln_q(x).view(-1, self.inner))


# Positions on three axes


def axes_tables(ropes: dict, axes: Tensor, sections: tuple, dtype: torch.dtype) -> dict:
    """Rotary tables of a stream with axes (3, T): which axis turns a pair of dims is told by `sections`."""
    per_axis = [rotary_tables(ropes, axis, dtype) for axis in axes]
    pick = lambda parts: torch.cat([part[..., a:b] for part, (a, b) in zip(parts * 2, cuts)], -1)
    ends = np.cumsum(sections * 2).tolist()
    cuts = list(zip([0, *ends], ends))
    return {name: tuple(pick([tables[name][i] for tables in per_axis]) for i in (0, 1)) for name in ropes}


def stream_axes(input_ids: np.ndarray, spans: np.ndarray, image_token: int, grids: dict, merge: int) -> np.ndarray:
    """(3, T) positions of a stream; `grids` gives for each span without prefix the (h, w) of its pictures, in patches.

    Both completions of a pair begin at the highest position of their prompt + 1, on every axis.
    """
    axes = np.zeros((3, len(input_ids)), np.int64)
    for start, end, prefix_start, prefix_end in spans.tolist():
        begin, at = axes[:, prefix_start:prefix_end].max(initial=-1) + 1, start
        places = start + np.flatnonzero(input_ids[start:end] == image_token)
        for h, w in grids.get(start, ()):
            h, w = h // merge, w // merge
            picture, places = places[0], places[h * w :]
            axes[:, at:picture] = begin + np.arange(picture - at)
            begin += picture - at
            rows, columns = np.divmod(np.arange(h * w), w)
            axes[:, picture : picture + h * w] = begin + np.stack([0 * rows, rows, columns])
            begin, at = begin + max(h, w), picture + h * w
        axes[:, at:end] = begin + np.arange(end - at)
    return axes
