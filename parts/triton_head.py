"""One pass over logits on a GPU where head.py's plain form takes ten: their statistics, and the
gradient by them written in their place. A leaf: head.py imports it where Triton runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a row at a time


@triton.jit
def score_kernel(logits, targets, columns, is_top1, V, N, stride, cap, WIDE: tl.constexpr,
                 STATISTICS: tl.constexpr, SLOPES: tl.constexpr, CAPPED: tl.constexpr,
                 BLOCK: tl.constexpr):
    """A program a row. Sums are relative to the highest logit so far, and shrink when it rises."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    target = tl.load(targets + row)
    # before the loop, whose sums all threads wait for: later, one may have overwritten it
    chosen = tl.load(at + target).to(WIDE)
    top = tl.full((), -float("inf"), WIDE)
    total = tl.full((), 0.0, WIDE)  # sum e^(z - top)
    weighted = tl.full((), 0.0, WIDE)  # sum e^(z - top) z
    squares = tl.full((), 0.0, WIDE)  # sum e^2(z - top)
    plain = tl.full((), 0.0, WIDE)  # sum z
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < V
        z = tl.load(at + offsets, mask=inside, other=-float("inf")).to(WIDE)
        higher = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - higher)
        e = tl.exp(z - higher)
        total = total * shrink + tl.sum(e, 0)
        if STATISTICS:
            finite = tl.where(inside, z, 0.0)
            weighted = weighted * shrink + tl.sum(e * finite, 0)
            squares = squares * shrink * shrink + tl.sum(e * e, 0)
            plain += tl.sum(finite, 0)
        top = higher
    log_total = tl.log(total)
    tl.store(columns + row, chosen - top - log_total)
    if STATISTICS:
        tl.store(columns + N + row, top + log_total - weighted / total)  # entropy
        tl.store(columns + 2 * N + row, tl.log(squares) - 2 * log_total)
        tl.store(columns + 3 * N + row, plain / V)
        tl.store(is_top1 + row, chosen == top)
    if SLOPES:
        for start in range(0, V, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < V
            z = tl.load(at + offsets, mask=inside, other=0.0).to(WIDE)
            d = tl.where(offsets == target, 1.0, 0.0) - tl.exp(z - top) / total
            if CAPPED:
                d *= 1 - (z / cap) * (z / cap)
            tl.store(at + offsets, d.to(logits.dtype.element_ty), mask=inside)


def score_chunk(logits: Tensor, targets: Tensor, how, slopes: bool) -> list[list[Tensor]]:
    """As head.py's `score_chunk`, in one group."""
    N, V = logits.shape
    count = 4 if how.statistics else 1
    columns = torch.empty(count, N, dtype=how.wide, device=logits.device)
    is_top1 = torch.empty(N, dtype=torch.bool, device=logits.device)
    if N:
        score_kernel[(N,)](
            logits, targets, columns, is_top1, V, N, logits.stride(0), how.softcap or 1.0,
            WIDE=tl.float64 if how.wide == torch.float64 else tl.float32,
            STATISTICS=how.statistics, SLOPES=slopes, CAPPED=how.softcap is not None, BLOCK=BLOCK)
    return [[*columns, is_top1] if how.statistics else [*columns]]
