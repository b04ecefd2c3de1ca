"""Image encoders of LLaVA (CLIP, SigLIP), Idefics3, SmolVLM and Gemma 3 (SigLIP)."""

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.kernels import TOWER_ACTIVATIONS
from parts.varlen import attend_both_ways, has_flash


def attend_within(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:  # (P, H, D)
    """softmax(q k^T / sqrt(D)) v within each stretch of the packed stream, in both directions.

    The decoder's plans are causal within a span, so they cannot be used here. Stretches of equal
    length go as one batch.
    """
    if has_flash(q.device, v.dtype, head_dim=q.shape[-1]):
        return attend_both_ways(q, k, v, lengths)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    rows = []
    out = []
    for length in sorted(set(lengths)):
        index = (starts[sizes == length][:, None] + torch.arange(length)).flatten()
        index = index.to(q.device, non_blocking=True)
        is_all = len(index) == len(q)  # nothing to pick, so no copy
        picked = [x if is_all else x[index] for x in (q, k, v)]
        batch = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in picked]  # (n, H, length, D)
        out.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        rows.append(index)
    return out[0] if len(out) == 1 else torch.cat(out)[torch.cat(rows).argsort()]


class TowerAttention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:  # (P, C)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in projections)
        return self.out_proj(attend_within(q, k, v, lengths).flatten(1))


class TowerMLP(nn.Module):
    def __init__(self, size: int, inner: int, act: str):
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)
        self.act = TOWER_ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TowerBlock(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size = c["hidden_size"]
        self.layer_norm1 = nn.LayerNorm(size, c["layer_norm_eps"])
        self.layer_norm2 = nn.LayerNorm(size, c["layer_norm_eps"])
        self.self_attn = TowerAttention(size, c["num_attention_heads"])
        self.mlp = TowerMLP(size, c["intermediate_size"], c["hidden_act"])

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:  # (P, C)
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """A linear map of each patch, plus its place in the image; CLIP adds a class token."""

    def __init__(self, c: dict):
        super().__init__()
        size = c["hidden_size"]
        patch = c["patch_size"]
        side = c["image_size"] // patch
        channels = c["num_channels"]
        self.patch_embedding = nn.Conv2d(channels, size, patch, patch, bias=not c["is_clip"])
        self.position_embedding = nn.Embedding(side * side + c["is_clip"], size)
        if c["is_clip"]:
            self.class_embedding = nn.Parameter(torch.zeros(size))

    def forward(self, pixels: Tensor) -> Tensor:  # (tiles, patches, C)
        weight = self.patch_embedding.weight
        x = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        if hasattr(self, "class_embedding"):
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class Tower(nn.Module):
    """CLIP's or SigLIP's image encoder, over all tiles as one stream."""

    def __init__(self, c: dict):
        super().__init__()
        self.config = c
        self.embeddings = Embeddings(c)
        if c["is_clip"]:
            self.pre_layrnorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerBlock(c) for _ in range(c["num_hidden_layers"]))
        self.post_layernorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def wanted(self) -> list[int]:
        """Return after how many layers features are taken."""
        n = self.config["num_hidden_layers"]
        return [i if i >= 0 else n + 1 + i for i in self.config["layers"]]

    def unreached(self) -> list[nn.Module]:
        """Return the modules that the files hold but no feature passes through."""
        layers = list(self.encoder.layers)[max(self.wanted()) :]
        return layers + ([self.post_layernorm] if self.config["kind"] == "llava" else [])

    def forward(
        self, pixels: Tensor, grids: Tensor, run: Callable,
    ) -> Tensor:  # (tiles, features, C)
        x = self.embeddings(pixels)
        x = self.pre_layrnorm(x) if self.config["is_clip"] else x
        tiles, length, _ = x.shape
        x = x.flatten(0, 1)
        wanted = self.wanted()
        kept = {}
        for i in range(max(wanted) + 1):
            if i in wanted:
                kept[i] = x
            if i < max(wanted):
                x = run(self.encoder.layers[i], x, [length] * tiles)
        if self.config["kind"] != "llava":
            kept = {i: self.post_layernorm(x) for i in wanted}
        x = torch.cat([kept[i] for i in wanted], -1).unflatten(0, (tiles, length))
        return x[:, 1:] if self.config["drop_first"] else x
