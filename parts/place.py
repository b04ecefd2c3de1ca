"""Where the policy computes: in one process, or in several under DDP. For --fsdp see
extras/run/fsdp.py."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parts.ranks import Ranks


class Place:
    """One process, or DDP: every rank holds all weights.

    `module` is what forwards of the policy call, so that gradients are exchanged; `model` is the
    Decoder inside.
    """

    is_sharded = False

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.ranks = ranks
        self.model = model
        self.module = model
        if ranks.world > 1:
            # Without device_ids: with them DDP would move the spans, which stay on the CPU.
            self.module = DistributedDataParallel(model)
            # Buffers never change. Set here, since torch 2.13 warns of the argument.
            self.module.broadcast_buffers = False

    def sync(self, last: bool) -> Any:
        """Exchange gradients only after a step's last forward; until then they are summed."""
        return nullcontext() if last or self.module is self.model else self.module.no_sync()

    def shared(self, model: nn.Module) -> nn.Module:
        """Return another model, distributed as the policy is: here unsharded, on every rank."""
        return model

    def gathered(self, model: nn.Module, trained_only: bool = False) -> nn.Module:
        """Return the model unsharded, at least in rank 0's memory; every rank calls this."""
        return model

    def from_first(self, make: Callable[[Callable], dict], tensors: Iterable[Tensor]) -> dict:
        """Do `Ranks.from_first`; `make(whole)` gets what returns each of `tensors` unsharded, on
        the CPU."""
        return self.ranks.from_first(partial(make, on_cpu))

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter, gradient norm or moment unsharded; every rank calls this."""
        return tensor

    @torch.no_grad()
    def fill(self, target: Tensor, source: Tensor | None) -> None:
        """Overwrite `target` on every rank with rank 0's `source`; every rank calls this."""
        if self.ranks.first:
            target.copy_(source)
        if self.ranks.world > 1:
            there = target.detach().to(self.ranks.device)  # the reference may be on the CPU
            dist.broadcast(there, 0)
            target.copy_(there)


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def tensors_of(model: nn.Module) -> list[tuple[str, torch.Size, Tensor]]:
    """Return (name, shape, tensor) of a model's parameters, then of its buffers (4-bit weights).

    Of a sharded model too: with names, shapes and order as they were before it was sharded.
    """
    like = getattr(model, "skeleton", (model,))[0]
    held = dict(chain(model.named_parameters(), model.named_buffers()))
    named = chain(like.named_parameters(), like.named_buffers())
    return [(name, t.shape, held[name]) for name, t in named]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode inside; the previous mode is restored after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
