"""--context_parallel_size N: N ranks share one stream (Ulysses, arXiv:2309.14509), for pairs that are
too long for one GPU.

Each rank of a group has the same pairs, and of their stream, padded to a multiple of N, a part of
T / N tokens. All but attention works on that part. In attention an exchange turns all heads of the
part's tokens, (T / N, H, D), into all tokens of a part of the heads, (T, H / N, D); the ordinary
plan computes these, prompts still once; an exchange back follows. Each rank's head scores the
targets that its tokens predict. Then the group's log-probs are gathered, and each rank goes on with
those of its own share of the pairs: so losses, metrics and tables are what they are for any ranks.

The gradient by a log-prob goes back to the rank that scored it, and an exchange's gradient is the
same exchange. What a rank's backward leaves in the weights is then the part of the gradient that
went through its tokens; DDP and FSDP add these up as they do for ranks with pairs of their own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from extras.decoder.mixers import recurs
from model import Decoder, ModelConfig, TokenLogps, plan_attention
from parts.ranks import Ranks


def grouped(ranks: Ranks, size: int) -> Ranks:
    """Return the ranks as groups of `size` neighbours. Raises ValueError if that leaves any over."""
    if size == 1:
        return ranks
    if ranks.world % size:
        raise ValueError(
            f"--context_parallel_size {size}: {ranks.world} rank{'s' * (ranks.world > 1)} cannot be "
            f"divided into groups of {size}; start a multiple of {size}, with torchrun "
            "--nproc_per_node")
    mine = None
    for first in range(0, ranks.world, size):  # every rank takes part in making every group
        group = dist.new_group(list(range(first, first + size)))
        if first <= ranks.rank < first + size:
            mine = group
    number = ranks.rank % size
    return ranks._replace(context=size, cut=partial(cut, number=number, size=size, group=mine))


# The batch


class Part(NamedTuple):
    """What the forward of a part of a stream knows of the whole."""

    group: Any
    size: int  # ranks in the group
    position_ids: Tensor  # (T,)
    room: int  # the most targets that a rank scores
    take: Tensor  # (n,) where the rank's own pairs are among the group's (size * room,) log-probs

    def to(self, device: Any, **how: Any) -> "Part":
        return self._replace(
            position_ids=self.position_ids.to(device, **how), take=self.take.to(device, **how))

    def plan(
        self, config: ModelConfig, spans: Tensor, position_ids: Tensor, dtype: torch.dtype,
    ) -> list[dict[int | None, Callable]]:
        """Return the plans of all layers, as a cache does; `position_ids` are only the part's."""
        plans = plan_attention(config, spans, self.position_ids, dtype)
        exchanging = {
            window: ExchangingPlan(plan, self.group, self.size) for window, plan in plans.items()}
        return [exchanging] * config.num_hidden_layers


def cut(batch: Batch, number: int, size: int, group: Any) -> Batch:
    """Return rank `number`'s part of a stream that `size` ranks share, and its share of the pairs."""
    tokens = len(batch.input_ids)
    length = -(-tokens // size)
    pad = length * size - tokens
    spans = batch.spans
    if pad:
        spans = torch.cat([spans, spans.new_tensor([[tokens, tokens + pad, 0, 0]])])
    position_ids = torch.cat([batch.position_ids, torch.arange(pad)])
    here = slice(number * length, (number + 1) * length)
    scored_by = batch.score_index // length  # (N,) ranks
    counts = scored_by.bincount(minlength=size)
    room = max(1, int(counts.max()))
    order = scored_by.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)  # (N,) among the gathered
    place[order] = torch.arange(len(order)) + (torch.arange(size) * room - first)[scored_by[order]]
    is_own = torch.arange(len(batch.pair_ids)) % size == number  # (B,)
    share = {
        name: value[is_own] for name in ("lengths", "pair_ids", "ratings", "ref_logps")
        if (value := getattr(batch, name)) is not None}
    is_here = scored_by == number
    take = place[is_own.repeat_interleave(batch.lengths.sum(1))]
    return batch._replace(
        input_ids=F.pad(batch.input_ids, (0, pad))[here], position_ids=position_ids[here],
        spans=spans, score_index=batch.score_index[is_here] - here.start,
        targets=batch.targets[is_here], num_tokens=0 if number else batch.num_tokens,
        part=Part(group, size, position_ids, room, take), **share)


# The model


def join(model: Decoder, size: int) -> None:
    """Let a model read parts of streams, which are of text. Raises ValueError for models that cannot.

    By hooks that do nothing where the batch is no part; copies of the model have them too.
    """
    if size == 1 or gather_scores in model._forward_hooks.values():
        return
    c = model.config
    flag = f"--context_parallel_size {size}"
    reason = why_not(c)
    if reason:
        raise ValueError(f"{flag}: not for {reason}")
    if not divides_heads(c, size):
        raise ValueError(
            f"{flag}: each rank attends with its part of the heads, and the {c.num_attention_heads} "
            f"of this model, which share {c.num_key_value_heads} of keys and values, cannot be "
            f"divided by {size} without giving a rank heads of keys and values in part")
    model.model.register_forward_pre_hook(lend_plans, with_kwargs=True)
    model.register_forward_hook(gather_scores)


def why_not(c: ModelConfig) -> str:
    """Return what a model has that needs a stream whole; "" for nothing."""
    if any(recurs(c)):
        return "models with recurrent layers, whose state goes from token to token"
    if c.per_layer is not None:
        return "layers that read others' keys and values"
    if c.moe is not None and c.moe["router_aux_loss_coef"] is not None:
        return "mixtures of experts, whose balancing loss is that of a whole stream"
    return ""


def divides_heads(c: ModelConfig, size: int) -> bool:
    """Tell whether `size` ranks can have equal parts of the heads: `ExchangingPlan` gives heads of
    keys and values to several ranks where there are fewer of them than ranks."""
    return c.num_attention_heads % math.lcm(c.num_key_value_heads, size) == 0


def lend_plans(stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Have attention see the whole stream where a batch is a part of one."""
    part = getattr(args[0], "part", None)
    return None if part is None else (args, kwargs | {"cache": part})


def gather_scores(model: nn.Module, args: tuple, out: TokenLogps) -> TokenLogps | None:
    """Return what the group has scored of this rank's own pairs."""
    part = getattr(args[0], "part", None)
    if part is None:
        return None
    own = {name: value for name, value in out._asdict().items() if value is not None}
    rows = [value.to(out.logps.dtype) for value in own.values()]
    table = F.pad(torch.stack(rows), (0, part.room - len(out.logps)))  # (columns, room)
    every = Gathered.apply(table, part.group, part.size)  # (size, columns, room)
    found = every.transpose(0, 1).flatten(1)[:, part.take]  # (columns, n)
    columns = dict(zip(own, found))
    for name in columns.keys() - {"logps"}:
        columns[name] = columns[name].detach().to(own[name].dtype)
    return out._replace(**columns)


class ExchangingPlan(NamedTuple):
    """An attention plan of the whole stream, for a part of the heads, called with a part's tokens."""

    plan: Callable
    group: Any
    size: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (T / size, H, D)
        out = self.plan(*map(self.to_heads, (q, k, v)))  # (T, H / size, D)
        out = Exchange.apply(out.unflatten(0, (self.size, -1)), self.group)
        return out.transpose(0, 1).flatten(1, 2)

    def to_heads(self, x: Tensor) -> Tensor:
        """(T / size, H, D), all heads of a part, to (T, H / size, D), a part of the heads of all.

        Of keys and values that ranks share each gets a copy, and the copies' gradients are added.
        """
        copies = math.lcm(x.shape[1], self.size) // x.shape[1]
        x = x.repeat_interleave(copies, 1) if copies > 1 else x
        x = x.unflatten(1, (self.size, -1)).transpose(0, 1)
        return Exchange.apply(x, self.group).flatten(0, 1)


class Exchange(torch.autograd.Function):
    """x[i] goes to rank i of the group; y[i] is from rank i. Its gradient goes the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return exchanged(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(grad, ctx.group), None


def exchanged(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class Gathered(torch.autograd.Function):
    """Every rank's x, on every rank; its gradient is the sum of all ranks' by this rank's x."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any, size: int) -> Tensor:
        ctx.group = group
        out = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(out, x.contiguous(), group=group)
        return torch.stack(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None, None
