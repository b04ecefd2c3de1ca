"""Attention with soft-capped scores (Gemma 2), which no fused kernel computes."""

import torch
from torch import Tensor

QUERY_CHUNK = 512  # queries whose scores are held at once


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float,
) -> Tensor:  # (n, H, D)
    """softmax(cap * tanh(q k^T scale / cap)) v; q (n, H, D), k and v (keys, K, D), mask (n, keys).

    Without a mask the n queries are the last n of the keys; each sees the keys up to itself.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # (H, keys, D)
    if mask is None:
        mask = torch.ones(len(q), k.shape[1], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[1] - len(q))
    out = []
    for rows, allowed in zip(q.split(QUERY_CHUNK), mask.split(QUERY_CHUNK)):
        scores = rows.transpose(0, 1) @ k.transpose(1, 2) * scale  # (H, rows, keys)
        scores = (cap * torch.tanh(scores / cap)).masked_fill(~allowed, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out.append((scores.softmax(-1, dtype=wide).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(out)
