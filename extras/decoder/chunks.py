"""Streams of spans cut into chunks, for layers whose state goes from token to token.

A chunk is computed by matrix products inside all chunks at once, then by one step per chunk along
each sequence. A completion's first chunk goes on from the state after its prompt: the state forks,
and the prompt is computed once. Spans lie side by side in a step. The short convolution before
such a layer forks in the same way.

Sizes: T tokens, S spans, N chunks of n tokens, W tokens of the convolution, D its channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64


class ChunkPlan(NamedTuple):
    """How a stream's spans are cut into chunks, in the order of the steps that compute them."""

    size: int  # n
    place: Tensor  # (T,) of each token in the chunks laid end to end
    steps: list[int]  # chunks of each step
    # of each step but the first: which chunk of the step before each of its chunks goes on from
    parents: list[Tensor]
    ends: list[tuple[int, int]]  # of each span: step of its last chunk, and which chunk of it
    # what the convolution reads, of each span the W - 1 tokens before it and its own: positions in
    # the stream, and from T on those before the stream, W - 1 of each span
    reads: Tensor  # (T + S (W - 1),)
    kept: Tensor  # (T,) which of the convolution's results are those of the tokens
    tails: Tensor  # (S, W - 1) what a token after the span would read before itself

    def chunked(self, x: Tensor) -> Tensor:
        """Lay x (T, ...) out as (N, n, ...); a chunk that is not full ends in zeros."""
        rows = x.new_zeros(sum(self.steps) * self.size, *x.shape[1:])
        return rows.index_copy(0, self.place, x).unflatten(0, (-1, self.size))


def plan_chunks(
    spans: Tensor, width: int, device: torch.device, chunk: int = CHUNK,
) -> ChunkPlan:
    """Plan one stream of spans (S, 4), each after its prefix; `width` is W."""
    rows = spans.tolist()
    length = rows[-1][1]
    size = min(chunk, max(end - start for start, end, *_ in rows))
    parents: list[list[int]] = []
    # span -> its last chunk (step, which chunk of it), and what the convolution reads of its end
    found = {}
    chunks = []  # (step, which chunk of it, first token, token after the last)
    reads = []
    for i, (start, end, *prefix) in enumerate(rows):
        before = length + torch.arange(i * (width - 1), (i + 1) * (width - 1))
        if prefix[1] > prefix[0] and tuple(prefix) not in found:
            raise ValueError(f"the prefix {prefix} is no span that comes before")
        (step, which), before = found.get(tuple(prefix), ((-1, 0), before))
        for at in range(start, end, size):
            step += 1
            parents += [[]] if step == len(parents) else []
            parents[step].append(which)
            which = len(parents[step]) - 1
            chunks.append((step, which, at, min(at + size, end)))
        reads.append(torch.cat([before, torch.arange(start, end)]))
        found[start, end] = (step, which), reads[-1][end - start :]
    steps = list(map(len, parents))
    place = torch.empty(length, dtype=torch.int64)
    for step, which, a, b in chunks:
        first = (sum(steps[:step]) + which) * size
        place[a:b] = torch.arange(first, first + b - a)
    kept = torch.arange(length) + (width - 1) * torch.repeat_interleave(
        torch.arange(len(rows)), (spans[:, 1] - spans[:, 0]).cpu().long())
    to_device = lambda x: x.to(device, non_blocking=True)
    return ChunkPlan(
        size=size, place=to_device(place), steps=steps,
        parents=[to_device(torch.tensor(p)) for p in parents[1:]],
        ends=[found[start, end][0] for start, end, *_ in rows],
        reads=to_device(torch.cat(reads)), kept=to_device(kept),
        tails=to_device(torch.stack([found[start, end][1] for start, end, *_ in rows])))


class Convolution(torch.autograd.Function):
    """y_t = sum_j weight[:, j] x[t - W + 1 + j], over the tokens before t in its sequence.

    x is (T, D), weight (D, W); `before` (S (W - 1), D), without gradient, lies before the stream.
    Autograd would keep each product and make as many whole gradients of x as there are taps.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, before: Tensor, plan: ChunkPlan) -> Tensor:
        read = torch.cat([x, before])[plan.reads]
        ctx.save_for_backward(read, weight)
        ctx.plan = plan
        count = len(read) - weight.shape[1] + 1
        out = read.new_zeros(count, len(weight))
        for j, w in enumerate(weight.T):
            out.addcmul_(read[j : j + count], w)
        return out[plan.kept]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, weight = ctx.saved_tensors
        plan = ctx.plan
        count = len(read) - weight.shape[1] + 1
        grad = grad.new_zeros(count, len(weight)).index_copy_(0, plan.kept, grad)
        grad_read = torch.zeros_like(read)
        grad_weight = torch.empty_like(weight)
        for j, w in enumerate(weight.T):
            grad_read[j : j + count].addcmul_(grad, w)
            grad_weight[:, j] = torch.linalg.vecdot(read[j : j + count], grad, dim=0)
        grad_x = torch.zeros_like(read).index_add_(0, plan.reads, grad_read)
        return grad_x[: len(plan.place)], grad_weight, None, None
