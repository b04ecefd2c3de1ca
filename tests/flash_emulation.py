"""PyTorch's flash attention operators on a CPU, in a loop, in any float type: registered with the dispatcher, which binds every
call to the operators' own signatures. The causal mask is aligned bottom-right, as the kernel's."""

import math

import torch
from torch import Tensor


def masked_scores(q: Tensor, k: Tensor, scale: float | None, left: int, right: int) -> Tensor:
    """Scores (H, queries, keys) of one stretch; -inf where a key is not seen."""
    n, m = len(q), len(k)
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
    seen = torch.ones(n, m, dtype=torch.bool)
    if right >= 0:
        seen &= distance >= -right
    if left >= 0:
        seen &= distance <= left
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -math.inf)


def stretches(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    """What the kernel demands of its arguments; yields each stretch's rows and keys."""
    assert q.dtype == k.dtype == v.dtype and q.dim() == k.dim() == 3 and k.shape == v.shape
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[1] % k.shape[1] == 0
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) and len(cu_q) == len(cu_k)
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        assert rows.stop - rows.start <= max_q and keys.stop - keys.start <= max_k
        yield rows, keys


def forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
            window_size_left=None, window_size_right=None, **unused):
    left, right = (-1 if size is None else size for size in (window_size_left, window_size_right))
    assert dropout_p == 0 and not return_debug_mask and is_causal == (right == 0)
    group = query.shape[1] // key.shape[1]
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for rows, keys in stretches(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k):
        k, v = (x[keys].repeat_interleave(group, 1) for x in (key, value))
        scores = masked_scores(query[rows], k, scale, left, right)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    state = torch.full((2,), 7, dtype=torch.uint64)
    return out, lse, state, torch.full((1,), 8.0), torch.empty(0)


def backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
             *, scale=None, window_size_left=None, window_size_right=None):
    """By hand: a kernel runs below autograd. With p the weights, ds = p (grad v^T - sum(grad out)).

    As in the kernel, the weights come from the log-sum-exp that is handed in.
    """
    left, right = (-1 if size is None else size for size in (window_size_left, window_size_right))
    assert rng_state[0] == 7 and unused == 8 and dropout_p == 0 and is_causal == (right == 0)
    group = query.shape[1] // key.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (query, key, value))
    for rows, keys in stretches(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k):
        q, g = query[rows], grad_out[rows]
        k, v = (x[keys].repeat_interleave(group, 1) for x in (key, value))
        p = (masked_scores(q, k, scale, left, right) - logsumexp[:, rows, None]).exp()
        ds = p * (torch.einsum("qhd,khd->hqk", g, v) - (g * out[rows]).sum(-1).T[..., None])
        ds = ds * (q.shape[-1] ** -0.5 if scale is None else scale)
        grad_q[rows] = torch.einsum("hqk,khd->qhd", ds, k)
        per_head = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, g)
        grad_k[keys], grad_v[keys] = (x.unflatten(1, (-1, group)).sum(2) for x in per_head)
    return grad_q, grad_k, grad_v


def register() -> torch.library.Library:
    """Register both; they stay for as long as what is returned."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library
