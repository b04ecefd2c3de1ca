"""Llama 4's attention: in layers with rotary embeddings a token sees only its own chunk of
positions, and queries and keys are normalized; the others (NoPE) see all, with queries scaled by
their position.

A chunk is the `size` positions from a multiple of `size`. Attention in chunks is attention over
spans that are cut where their positions enter the next chunk: a piece's prefix is what its chunk
has of the span's prefix. So any plan computes it, and no mask knows of chunks.

In ModelConfig's `windows` a chunk is its size below zero, which no window is.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extras.decoder.per_layer import unit_norm


def cut_spans(spans: Tensor, size: int) -> Tensor:
    """Cut spans (S, 4) at multiples of `size` positions, counted from the prefix's first token.

    A cache's spans have a fifth column, how many of a span's last tokens are new. Pieces without
    new tokens are left out.
    """
    pieces = []
    for start, end, prefix_start, prefix_end, *new in spans.tolist():
        prefix = prefix_end - prefix_start  # the position of token `start`
        first = end - new[0] if new else start
        at = first
        while at < end:
            chunk = (at - start + prefix) // size * size  # its first position
            stop = min(end, start - prefix + chunk + size)
            own = max(start, start - prefix + chunk)
            seen = (prefix_start + chunk, prefix_end) if chunk < prefix else (0, 0)
            pieces.append([own, stop, *seen, stop - at] if new else [own, stop, *seen])
            at = stop
    return torch.tensor(pieces, dtype=spans.dtype)


class TunedPlan(NamedTuple):
    """A plan whose queries and keys are first normalized, or whose queries are scaled."""

    plan: Callable
    eps: float | None  # of the norm over each head of queries and keys; None: no norm
    scale: Tensor | None  # (T, 1, 1) of the queries

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (T, H, D)
        if self.eps is not None:
            q, k = (unit_norm(x, self.eps) for x in (q, k))
        return self.plan(q if self.scale is None else (q * self.scale).to(q.dtype), k, v)


def temperature(position_ids: Tensor, floor: float, growth: float) -> Tensor:  # (T, 1, 1)
    """1 + growth log(1 + floor((position + 1) / floor)) (arXiv:2501.19399)."""
    steps = ((position_ids.double() + 1) / floor).floor()
    return (steps.log1p() * growth + 1).float()[:, None, None]


def plan_chunked(make: Callable, config: Any, spans: Tensor) -> dict:
    """Return {window: plan}; `make(config, spans)` makes those of spans, cut or not."""
    whole = replace(config, windows=(None,), mixer=None)
    size = config.mixer["size"]
    return {None: make(whole, spans)[None], -size: make(whole, cut_spans(spans, size))[None]}


def tuned(config: Any, plans: dict, position_ids: Tensor) -> dict:
    """Return the plans of chunks with norms, and that of all positions with its temperature."""
    c = config.mixer
    scale = temperature(position_ids, *c["temperature"]) if c["temperature"] else None
    return {window: TunedPlan(plan, *((None, scale) if window is None else (c["eps"], None)))
            for window, plan in plans.items()}
