"""Attention over spans in one call of PyTorch's flash kernel, on CUDA in bfloat16 or float16.

The kernel is called as PyTorch's operator. `torch.nn.attention.varlen` wraps it, but takes other
arguments in each version; the operator's have been the same since torch 2.10, and it needs none
for grouped queries.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class FlashAttention(torch.autograd.Function):
    """softmax(q k^T scale) v for each stretch of a VarlenPlan, q (T, H, D), k and v (T, K, D).

    Keys are gathered by their stream positions here, so that backward keeps k and v as they lie in
    the stream and not the copies.

    `sinks` (H,) are one more key each, of value zero: the denominator exp(lse) becomes exp(lse) +
    exp(sink). The kernel's backward needs no more than that new lse and the new output.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: "VarlenPlan",
                sinks: Tensor | None = None) -> Tensor:
        out, lse, *rest = flash_forward(q, plan.gathered(k), plan.gathered(v), plan)
        if sinks is not None:
            alone = lse
            assert alone.shape == (q.shape[1], len(q)), (alone.shape, q.shape)  # (H, T)
            lse = torch.logaddexp(alone, sinks.to(alone.dtype)[:, None])
            out = (out * (alone - lse).exp().T[..., None]).to(out.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, sinks, out, lse, *rest)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, *rest = ctx.saved_tensors
        plan = ctx.plan
        keys, values = plan.gathered(k), plan.gathered(v)
        dq, dk, dv = flash_backward(grad, q, keys, values, out, rest, plan)
        dsinks = None if sinks is None else sinks_gradient(grad, out, rest[0], sinks)
        return dq, plan.collected(dk), plan.collected(dv), None, dsinks


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:  # (H,)
    """-sum_t p_t (grad_t . out_t), where p_t = exp(sink - lse_t) is the sink's weight.

    grad and out are (T, H, D), lse is (H, T), with the sinks in it.
    """
    weights = (sinks.to(lse.dtype)[:, None] - lse).exp()
    dots = torch.linalg.vecdot(grad.to(lse.dtype), out.to(lse.dtype))  # (T, H)
    return -torch.linalg.vecdot(weights, dots.T).to(sinks.dtype)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, plan: "VarlenPlan") -> tuple[Tensor, ...]:
    """Return the output, its log-sum-exp, and two tensors that the backward call wants back."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys, 0.0,
        plan.is_causal, False, **plan.options)[:4]


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rest: list[Tensor],
                   plan: "VarlenPlan") -> tuple[Tensor, Tensor, Tensor]:
    lse, rng_state, unused = rest
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
        0.0, plan.is_causal, rng_state, unused, **plan.options)


class VarlenPlan(NamedTuple):
    """Attention in one call of the flash kernel, on stretches of queries and their keys.

    A stretch's keys are its prefix and then itself, so what several stretches see is copied once
    for each. The tensors are int32, on the device.
    """

    cu_queries: Tensor  # (stretches + 1,)
    cu_keys: Tensor  # (stretches + 1,)
    max_queries: int
    max_keys: int
    scale: float | None = None
    window: int | None = None  # the kernel aligns it, and the causal mask, bottom-right
    is_causal: bool = True
    index: Tensor | None = None  # (copies,) stream position of each key; None: as they lie
    own: Tensor | None = None  # (T,) which copy is a position's own
    again: Tensor | None = None  # (P,) which copies are a prefix's
    source: Tensor | None = None  # (P,) stream positions of these

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:  # (T, H, D)
        return FlashAttention.apply(q.to(v.dtype), k.to(v.dtype), v, self, *sinks)

    @property
    def options(self) -> dict[str, Any]:
        """Return what both of PyTorch's operators take by name."""
        left = -1 if self.window is None else self.window - 1
        right = 0 if self.is_causal else -1
        return {"scale": self.scale, "window_size_left": left, "window_size_right": right}

    def gathered(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    def collected(self, grad: Tensor) -> Tensor:
        """Return the gradient of what was gathered.

        A pair's prompt is copied once, so each sum has two terms, and does not depend on order.
        """
        if self.index is None:
            return grad
        assert self.own is not None, "a plan for some of the queries has no backward"
        out = grad.index_select(0, self.own)
        return out.index_add_(0, self.source, grad.index_select(0, self.again))


def plan_varlen(
    config: Any, spans: Tensor, device: torch.device, queries: Tensor | None = None,
) -> dict[int | None, VarlenPlan]:
    """Return {window: plan}.

    The queries are all tokens; or the last `queries` (S,) of each span, and then spans may lie
    apart, and there is no backward.
    """
    rows = spans.numpy().astype(np.int64)
    if queries is None:
        rows = joined(rows)
    pieces = rows[:, [2, 0]].ravel()  # of each span: its prefix, itself
    sizes = rows[:, [3, 1]].ravel() - pieces
    keys = sizes[0::2] + sizes[1::2]
    counts = sizes[1::2] if queries is None else queries.numpy()
    arrays = [cumulative(counts), cumulative(keys)]
    if queries is not None or keys.sum() > counts.sum():
        index = np.repeat(pieces - sizes.cumsum() + sizes, sizes) + np.arange(sizes.sum())
        arrays.append(index)
    if queries is None and len(arrays) > 2:
        is_own = np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)
        arrays += [np.flatnonzero(is_own), np.flatnonzero(~is_own), index[~is_own]]
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int32))  # one transfer
    cu_queries, cu_keys, *more = packed.to(device, non_blocking=True).split(list(map(len, arrays)))
    plan = VarlenPlan(
        cu_queries, cu_keys, int(counts.max()), int(keys.max()), config.attention_scale,
        **dict(zip(("index", "own", "again", "source"), more)))
    return {window: plan._replace(window=window) for window in config.windows}


def joined(rows: np.ndarray) -> np.ndarray:
    """Make one stretch of a prompt and the completion that follows it."""
    follows = (rows[1:, 2:] == rows[:-1, :2]).all(1) & (rows[1:, 0] == rows[:-1, 1])
    follows &= rows[:-1, 2] == rows[:-1, 3]
    rows[:-1][follows, 1] = rows[1:][follows, 1]
    return rows[np.append(True, ~follows)]


def cumulative(sizes: np.ndarray) -> np.ndarray:
    return np.append(0, sizes.cumsum())


def attend_both_ways(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:  # (T, H, D)
    """Attend within stretches of these lengths, in both directions: what image encoders do."""
    ends = torch.from_numpy(cumulative(np.array(lengths)).astype(np.int32))
    ends = ends.to(q.device, non_blocking=True)
    return VarlenPlan(ends, ends, max(lengths), max(lengths), is_causal=False)(q, k, v)


def head_sizes(config: Any) -> dict[int | None, int]:
    """Return {window: the largest head dim of the layers that have it}."""
    own = config.per_layer["sizes"] if config.per_layer else ({},) * len(config.windows)
    sizes: dict[int | None, int] = {}
    for window, differs in zip(config.windows, own):
        sizes[window] = max(sizes.get(window, 0), differs.get("head_dim", config.head_dim))
    return sizes


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int,
              softcap: float | None = None) -> bool:
    """Tell whether the flash kernel can compute attention of this kind on this device.

    Not on AMD's GPUs: whether their kernel aligns the mask bottom-right has not been seen.
    """
    return (device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (8, 0)
            and head_dim % 8 == 0 and head_dim <= 256
            and dtype in (torch.bfloat16, torch.float16) and softcap is None)
