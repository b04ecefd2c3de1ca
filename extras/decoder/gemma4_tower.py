"""Gemma 4's image encoder: patches of any grid, positions on two axes, linear layers with bounds;
and `Patches`, which 12B has in its place.

An image of h x w patches comes as h w rows of pixels, row by row. A patch has a learned vector of
its column and one of its row, and in attention half of each head's dims turn with the column, half
with the row. Squares of k x k patches are averaged to one feature, which the projector normalizes
and maps to the decoder's size.

What transformers keeps in buffers, the bounds and a bias and scale of all features, are parameters
that never learn (parts/names.py:FIXED), so that they are read, saved and dealt to ranks as others.
"""

from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.decoder.per_layer import unit_norm
from extras.decoder.qwen_vl import patch_places
from extras.decoder.towers import attend_within
from model import Norm
from parts.kernels import TOWER_ACTIVATIONS
from parts.ropes import rotate

Tables = list[tuple[Tensor, Tensor]]  # (cos, sin) of column and row, (P, 1, D/2) each


class ClippedLinear(nn.Module):
    """linear(x), with x and the result held within bounds where the files have any."""

    def __init__(self, inputs: int, outputs: int, c: dict):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bounds = None
        if c["use_clipped_linears"]:  # least and most of the input, then of the output
            bounds = torch.tensor([-torch.inf, torch.inf] * 2)
            self.bounds = nn.Parameter(bounds, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is None:
            return self.linear(x)
        least_in, most_in, least_out, most_out = self.bounds.unbind()
        return self.linear(x.clamp(least_in, most_in)).clamp(least_out, most_out)


class Attention(nn.Module):
    """Attention of normalized queries on normalized keys and values, without a scale."""

    def __init__(self, c: dict, norm: Callable):
        super().__init__()
        size, D = c["hidden_size"], c["head_dim"]
        self.heads = c["num_attention_heads"]
        self.shared = self.heads // c["num_key_value_heads"]
        self.head_dim = D
        self.eps = c["rms_norm_eps"]
        self.q_proj = ClippedLinear(size, self.heads * D, c)
        self.k_proj = ClippedLinear(size, c["num_key_value_heads"] * D, c)
        self.v_proj = ClippedLinear(size, c["num_key_value_heads"] * D, c)
        self.o_proj = ClippedLinear(self.heads * D, size, c)
        self.q_norm = norm(D)
        self.k_norm = norm(D)

    def forward(self, x: Tensor, lengths: list[int], tables: Tables) -> Tensor:  # (P, C)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in projections)
        v = unit_norm(v, self.eps)
        q, k = (turned(part, tables).to(v.dtype) for part in (self.q_norm(q), self.k_norm(k)))
        if self.shared > 1:
            k, v = (part.repeat_interleave(self.shared, dim=1) for part in (k, v))
        q = q * self.head_dim**0.5  # attend_within divides by it
        return self.o_proj(attend_within(q, k, v, lengths).flatten(1))


def turned(x: Tensor, tables: Tables) -> Tensor:  # (P, H, D)
    """Rotate the first half of each head by the patch's column, the second by its row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    halves = x.to(wide).chunk(2, -1)
    return torch.cat([rotate(half, *table) for half, table in zip(halves, tables)], -1)


class MLP(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = ClippedLinear(size, inner, c)
        self.up_proj = ClippedLinear(size, inner, c)
        self.down_proj = ClippedLinear(inner, size, c)
        self.act = TOWER_ACTIVATIONS[c["hidden_act"]]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Norm, attention, norm, MLP, with a norm after each."""

    def __init__(self, c: dict, norm: Callable):
        super().__init__()
        size = c["hidden_size"]
        self.self_attn = Attention(c, norm)
        self.mlp = MLP(c)
        self.input_layernorm = norm(size)
        self.post_attention_layernorm = norm(size)
        self.pre_feedforward_layernorm = norm(size)
        self.post_feedforward_layernorm = norm(size)

    def forward(self, x: Tensor, lengths: list[int], tables: Tables) -> Tensor:  # (P, C)
        out = self.self_attn(self.input_layernorm(x), lengths, tables)
        x = x + self.post_attention_layernorm(out)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """A linear map of each patch's pixels, plus vectors of its column and its row."""

    def __init__(self, c: dict):
        super().__init__()
        size = c["hidden_size"]
        self.input_proj = nn.Linear(3 * c["patch_size"] ** 2, size, bias=False)
        self.position_embedding_table = nn.Parameter(
            torch.ones(2, c["position_embedding_size"], size))

    def forward(self, pixels: Tensor, places: Tensor) -> Tensor:  # (P, C)
        x = self.input_proj((2 * (pixels - 0.5)).to(self.input_proj.weight.dtype))
        columns, rows = self.position_embedding_table
        return x + F.embedding(places[:, 0], columns) + F.embedding(places[:, 1], rows)


class Tower(nn.Module):
    """Patches of all images as one stream; each attends within its image."""

    def __init__(self, c: dict):
        super().__init__()
        self.config = c
        settings = SimpleNamespace(norm_eps=c["rms_norm_eps"], norm_offset=False, norm="rms")
        norm = lambda size: Norm(size, settings)
        self.patch_embedder = PatchEmbedder(c)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            Block(c, norm) for _ in range(c["num_hidden_layers"]))
        if c["standardize"]:
            size = c["hidden_size"]
            self.std_bias = nn.Parameter(torch.zeros(size), requires_grad=False)
            self.std_scale = nn.Parameter(torch.ones(size), requires_grad=False)

    def unreached(self) -> list[nn.Module]:
        return []

    def forward(self, pixels: Tensor, grids: Tensor, run: Callable) -> Tensor:  # (F, C)
        c = self.config
        sizes = grids.tolist()
        places = grid_places(sizes, pixels.device)
        x = self.patch_embedder(pixels, places)
        tables = place_tables(places, c["head_dim"] // 2, c["rope_theta"])
        for layer in self.encoder.layers:
            x = run(layer, x, [h * w for h, w in sizes], tables)
        # float32 up to here and no further: in half precision the scaled features would overflow
        wide = torch.promote_types(x.dtype, torch.float32)
        features = pooled(x.to(wide), sizes, c["pooling_kernel_size"]) * c["hidden_size"] ** 0.5
        if c["standardize"]:
            features = (features - self.std_bias) * self.std_scale
        return features.to(x.dtype)


class Patches(nn.Module):
    """What Gemma 4 12B has for a tower: squares of pixels, a norm, a linear map, a norm, vectors of
    column and row, a norm."""

    def __init__(self, c: dict):
        super().__init__()
        size, inner = c["hidden_size"], c["intermediate_size"]
        self.patch_ln1 = nn.LayerNorm(inner)
        self.patch_dense = nn.Linear(inner, size)
        self.patch_ln2 = nn.LayerNorm(size)
        self.pos_embedding = nn.Parameter(torch.zeros(c["position_embedding_size"], 2, size))
        self.pos_norm = nn.LayerNorm(size)

    def unreached(self) -> list[nn.Module]:
        return []

    def forward(self, pixels: Tensor, grids: Tensor, run: Callable) -> Tensor:  # (P, C)
        places = grid_places(grids.tolist(), pixels.device)
        x = self.patch_ln1(pixels.to(self.patch_dense.weight.dtype))
        x = self.patch_ln2(self.patch_dense(x))
        columns, rows = self.pos_embedding.unbind(1)
        where = F.embedding(places[:, 0], columns) + F.embedding(places[:, 1], rows)
        return self.pos_norm(x + where)


def grid_places(sizes: list, device: torch.device) -> Tensor:  # (P, 2)
    """Return column and row of each patch of all images, row by row."""
    return patch_places(sizes, 1).flip(1).to(device, non_blocking=True)


def place_tables(places: Tensor, size: int, theta: float) -> Tables:
    """Return cos and sin of the angles by which `size` dims turn with each of the two axes."""
    powers = torch.arange(0, size, 2, device=places.device).float() / size
    freq = 1.0 / theta**powers  # (size/2,)
    tables = []
    for axis in places.unbind(1):
        angles = (axis[:, None] * freq).repeat(1, 2)[:, None]
        tables.append((angles.cos(), angles.sin()))
    return tables


def pooled(x: Tensor, sizes: list, k: int) -> Tensor:  # (F, C)
    """Average each k x k patches of every image."""
    squares = []
    for image, (h, w) in zip(x.split([h * w for h, w in sizes]), sizes):
        squares.append(image.view(h // k, k, w // k, k, -1).mean((1, 3)).flatten(0, 1))
    return torch.cat(squares)


class Projector(nn.Module):
    """RMSNorm without a weight, then a linear map to the decoder's size."""

    def __init__(self, c: dict):
        super().__init__()
        self.eps = c["rms_norm_eps"]
        self.embedding_projection = nn.Linear(c["hidden_size"], c["text_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        return self.embedding_projection(unit_norm(x, self.eps))
