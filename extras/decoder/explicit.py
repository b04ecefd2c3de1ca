"""Attention with its scores written out, where no fused kernel computes it: soft-capped scores
(Gemma 2), and sinks (gpt-oss) on a CPU."""

import torch
from torch import Tensor

QUERY_CHUNK = 512  # queries whose scores are held at once


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # (n, H, D)
    """softmax(scores) v, with scores = q k^T scale, or cap * tanh(q k^T scale / cap).

    `sinks` (H,) add exp(sink) to the softmax's denominator: one more key, whose value is zero.
    q is (n, H, D), k and v are (keys, K, D), mask is (n, keys). Without a mask the n queries are
    the last n of the keys; each sees the keys up to itself.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # (H, keys, D)
    if mask is None:
        mask = torch.ones(len(q), k.shape[1], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[1] - len(q))
    out = []
    for rows, allowed in zip(q.split(QUERY_CHUNK), mask.split(QUERY_CHUNK)):
        scores = rows.transpose(0, 1) @ k.transpose(1, 2) * scale  # (H, rows, keys)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            sink = sinks.to(scores.dtype)[:, None, None].expand(-1, len(rows), 1)
            scores = torch.cat([scores, sink], -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=wide)[..., :k.shape[1]]
        out.append((weights.to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(out)
