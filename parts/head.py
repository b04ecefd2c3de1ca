"""The head's log-probs, in chunks: forward and backward."""

from typing import Any, Iterator

import torch
from torch import Tensor


class ChunkedLogps(torch.autograd.Function):
    """Log-probs whose (N, V) logits exist one chunk at a time.

    They are scored and dropped in forward, and computed again in backward: kept, they would be the
    largest tensor of the step, and computing them again is one product of three.
    d logp / d logits = onehot(target) - softmax(logits), so backward needs nothing else.
    """

    @staticmethod
    def forward(ctx, targets: Tensor, softcap: float | None, compute: torch.dtype, budget: int,
                *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.budget = budget
        ctx.softcap = softcap
        ctx.compute = compute
        ctx.dtypes = [t.dtype for t in tensors]
        wide = torch.promote_types(compute, torch.float32)
        tensors = [t.to(compute) for t in tensors]  # once, for backward too
        ctx.save_for_backward(targets, *tensors)
        terms = list(zip(tensors[0::2], tensors[1::2]))
        out = []
        for rows in chunks(targets, len(terms[0][1]), budget):
            chunk = chunk_logits(terms, rows, softcap)  # (n, V)
            for logits, at in few_rows(budget, chunk, targets[rows]):
                out.append(score_rows(logits.to(wide), at))
        out = [torch.cat(column) for column in zip(*out)]
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        targets, *tensors = ctx.saved_tensors
        terms = list(zip(tensors[0::2], tensors[1::2]))
        # gradients are summed in float32 at least, or the number of chunks would show in bfloat16
        wide = torch.promote_types(ctx.compute, torch.float32)
        grads = [torch.empty(t.shape, dtype=wide, device=t.device) if needed else None
                 for t, needed in zip(tensors, ctx.needs_input_grad[4:])]
        for rows in chunks(targets, len(terms[0][1]), ctx.budget):
            d = chunk_logits(terms, rows, ctx.softcap)  # (n, V), overwritten by its gradient
            for logits, *at in few_rows(ctx.budget, d, targets[rows], grad[rows]):
                logits.copy_(grad_logits(logits, *at, ctx.softcap))
            for (x, w), grad_x, grad_w in zip(terms, grads[0::2], grads[1::2]):
                if grad_x is not None:
                    grad_x[rows] = (d @ w).to(wide)
                if grad_w is not None:
                    add_product(grad_w, d.T, x[rows], first=rows.start == 0)
        grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return None, None, None, None, *grads


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, in the type of total; the first product overwrites it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def chunks(targets: Tensor, vocab_size: int, budget: int) -> Iterator[slice]:
    """Yield slices of rows; at least one, possibly empty.

    So a stream without scored tokens has empty log-probs, and gradients that are zero, not None.
    """
    count = len(targets)
    size = chunk_rows(vocab_size, targets.device.type, budget)
    return (slice(i, min(i + size, count)) for i in range(0, max(count, 1), size))


def chunk_rows(vocab_size: int, device: str, budget: int) -> int:
    """Return the rows of a chunk of `budget` logits, on a GPU of eight times as many.

    Every chunk reads the whole weight, and adds to all of its gradient: a GPU waits for that below
    some 600 rows.
    """
    size = budget if device == "cpu" else 8 * budget
    return max(16, size // vocab_size)


def chunk_logits(terms: list[tuple[Tensor, Tensor]], rows: slice,
                 softcap: float | None) -> Tensor:  # (n, V)
    (x, w), *more = terms
    logits = x[rows] @ w.T
    for x, w in more:
        logits.addmm_(x[rows], w.T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def few_rows(budget: int, logits: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut a chunk into groups of rows, since scoring passes over them several times in float32.

    A group is what a CPU's caches hold, on a GPU `budget` values.
    """
    size = 32 if logits.device.type == "cpu" else max(16, budget // logits.shape[1])
    return zip(*(t.split(size) for t in (logits, *more)))


def score_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # five (n,)
    """Return TokenLogps of some rows, in few passes over them; overwrites `logits`."""
    mean = logits.mean(-1)
    top = logits.amax(-1)
    at_target = logits.gather(-1, targets[:, None]).squeeze(-1)
    logits -= top[:, None]  # z, at most 0
    e = logits.exp()
    total = e.sum(-1)
    entropy = total.log() - logits.mul_(e).sum(-1) / total  # log sum e^z - sum p z
    log_sum_sq = e.square_().sum(-1).log() - 2 * total.log()
    return at_target - top - total.log(), entropy, log_sum_sq, mean, at_target == top


def grad_logits(logits: Tensor, targets: Tensor, grad: Tensor,
                softcap: float | None) -> Tensor:  # (n, V)
    """grad * (onehot - softmax), through the soft-cap: d/dx cap tanh(x/cap) = 1 - (y/cap)^2."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    d = logits.softmax(-1, dtype=wide).mul_(-grad[:, None])
    d.scatter_add_(-1, targets[:, None], grad[:, None].to(wide))
    return d if softcap is None else d.mul_(1 - (logits.to(wide) / softcap) ** 2)
