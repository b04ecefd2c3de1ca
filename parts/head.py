"""The head's log-probs, in chunks: forward and backward."""

from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor

from parts import c_layers
from parts.kernels import has_triton

KEPT = 8  # chunks whose gradient by the logits is kept for backward

Terms = list[tuple[Tensor, Tensor]]  # inputs (N, C_k) and weights (V, C_k)


class How(NamedTuple):
    """How the head computes. Beside the soft-cap, nothing here changes more than rounding."""

    softcap: float | None
    compute: torch.dtype  # of the matrix products
    chunk: int  # logits held at once
    keep: int | None  # chunks kept for backward: 0 where memory counts more; None: no backward
    statistics: bool = True  # or the log-probs alone

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.compute, torch.float32)


def chunked_logps(targets: Tensor, how: How, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """Return the fields of TokenLogps; inside torch.compile (see kernels.py) of all rows at once.

    `tensors` are x_0, w_0, x_1, w_1, ...: the logits are sum_k x_k w_k^T.
    """
    if not torch.compiler.is_compiling():
        return ChunkedLogps.apply(targets, how, *tensors)
    tensors = [t.to(how.compute) for t in tensors]
    logits = sum(x @ w.T for x, w in zip(tensors[0::2], tensors[1::2]))
    if how.softcap is not None:
        logits = torch.tanh(logits / how.softcap) * how.softcap
    at = targets[:, None]
    log_p = logits.log_softmax(-1, dtype=how.wide)
    fixed = log_p.detach()
    rest = statistics(logits.detach(), fixed.clone(), fixed.exp(), at) if how.statistics else []
    return log_p.gather(-1, at).squeeze(-1), *rest


class ChunkedLogps(torch.autograd.Function):
    """Log-probs whose (N, V) logits exist one chunk at a time.

    D = d logp / d logits = onehot(target) - softmax(logits) is independent of the loss, so forward
    can write it over the logits. Where weights learn, it keeps D of the first `keep` chunks, and
    backward computes the logits of the others again, one product of four: kept whole, D would be
    the largest tensor of the step. Where the inputs alone learn (LoRA), it multiplies D by the
    weight at once and drops it, and backward has no product left.
    """

    @staticmethod
    def forward(ctx, targets: Tensor, how: How, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights = ctx.needs_input_grad[2::2], ctx.needs_input_grad[3::2]
        ctx.how = how
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.inputs_alone = how.keep is not None and any(inputs) and not any(weights)
        tensors = [t.to(how.compute) for t in tensors]  # once, for backward too
        terms = list(zip(tensors[0::2], tensors[1::2]))
        slopes = [torch.empty_like(x, dtype=how.wide) for x, _ in terms if ctx.inputs_alone]
        keep = (how.keep or 0) if any(weights) else 0
        kept = []
        out = []
        for rows in chunks(targets, len(terms[0][1]), how.chunk):
            logits = chunk_logits(terms, rows, how.softcap)  # (n, V)
            keeps = ctx.inputs_alone or len(kept) < keep
            out += score_chunk(logits, targets[rows], how, keeps)
            for slope, (_, w) in zip(slopes, terms):
                slope[rows] = (logits @ w).to(how.wide)
            if keeps and not ctx.inputs_alone:
                kept.append(logits)
        ctx.save_for_backward(*(slopes if ctx.inputs_alone else (targets, *tensors, *kept)))
        out = [torch.cat(column) for column in zip(*out)]
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.inputs_alone:
            grads = [g for slope in ctx.saved_tensors for g in (slope * grad[:, None], None)]
        else:
            grads = product_grads(ctx, grad)
        grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return None, None, *grads


def product_grads(ctx, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients of inputs and weights, chunk by chunk.

    They are summed in float32 at least, or the number of chunks would show in bfloat16.
    """
    how = ctx.how
    count = len(ctx.dtypes)
    targets, *saved = ctx.saved_tensors
    tensors, kept = saved[:count], saved[count:]
    terms = list(zip(tensors[0::2], tensors[1::2]))
    grads = [torch.empty(t.shape, dtype=how.wide, device=t.device) if needed else None
             for t, needed in zip(tensors, ctx.needs_input_grad[2:])]
    for i, rows in enumerate(chunks(targets, len(terms[0][1]), how.chunk)):
        if i < len(kept):
            d = kept[i]
        else:
            d = chunk_logits(terms, rows, how.softcap)
            score_chunk(d, targets[rows], how._replace(statistics=False), slopes=True)
        g = grad[rows, None]  # applied in float32, beside D, which is far larger than the inputs
        for (x, w), grad_x, grad_w in zip(terms, grads[0::2], grads[1::2]):
            if grad_x is not None:
                torch.mul(d @ w, g, out=grad_x[rows])
            if grad_w is not None:
                add_product(grad_w, d.T, (x[rows] * g).to(d.dtype), first=i == 0)
    return grads


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, in the type of total; the first product overwrites it."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda and total.dtype == torch.float32 and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
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
    some 600 rows. On a CPU larger chunks were slower.
    """
    size = budget if device == "cpu" else 8 * budget
    return max(16, size // vocab_size)


def chunk_logits(terms: Terms, rows: slice, softcap: float | None) -> Tensor:  # (n, V)
    (x, w), *more = terms
    logits = x[rows] @ w.T
    for x, w in more:
        logits.addmm_(x[rows], w.T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def few_rows(budget: int, logits: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut a chunk into groups of rows, since scoring passes over them several times in float32.

    A group is what a CPU's caches hold, on a GPU `budget` values.
    """
    size = group_rows(logits.shape[1], logits.device.type, budget)
    return zip(*(t.split(size) for t in (logits, *more)))


def group_rows(vocab_size: int, device: str, budget: int) -> int:
    return 32 if device == "cpu" else max(16, budget // vocab_size)


def score_chunk(logits: Tensor, targets: Tensor, how: How, slopes: bool) -> list[list[Tensor]]:
    """Return the TokenLogps of groups of rows; overwrite the logits by D if asked."""
    if has_triton(logits.device):
        from parts import triton_head

        return triton_head.score_chunk(logits, targets, how, slopes)
    if c_layers.computes(logits.dtype, logits):
        return c_layers.score_chunk(logits, targets, how, slopes)
    out = []
    for rows, at in few_rows(how.chunk, logits, targets[:, None]):
        wide = rows.to(how.wide)
        log_p = wide.log_softmax(-1)
        out.append([log_p.gather(-1, at).squeeze(-1)])
        if slopes or how.statistics:
            p = log_p.exp()
        if how.statistics:
            out[-1] += statistics(wide, log_p, p, at)
        if slopes:
            write_slopes(rows, p, at, how)
    return out


def statistics(logits: Tensor, log_p: Tensor, p: Tensor, at: Tensor) -> list[Tensor]:  # four (n,)
    """Return the rest of TokenLogps; overwrites `log_p`."""
    entropy = -log_p.mul_(p).sum(-1)
    log_sum_sq = 2 * torch.linalg.vector_norm(p, dim=-1).log()
    mean = logits.mean(-1, dtype=p.dtype)
    is_top1 = logits.gather(-1, at).squeeze(-1) == logits.amax(-1)
    return [entropy, log_sum_sq, mean, is_top1]


def write_slopes(logits: Tensor, p: Tensor, at: Tensor, how: How) -> None:
    """logits = onehot - p, through the soft-cap: d/dx cap tanh(x/cap) = 1 - (y/cap)^2."""
    d = p.neg_().scatter_add_(-1, at, p.new_ones(at.shape))
    if how.softcap is not None:
        d.mul_(1 - (logits.to(how.wide) / how.softcap) ** 2)
    logits.copy_(d)
