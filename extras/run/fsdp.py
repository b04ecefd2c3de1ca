"""--fsdp: parameters, gradients, optimizer state and the reference copy split across the ranks
(arXiv:2304.11277).

This is torch's own fully_shard, block by block: a block's weights are gathered for its forward,
dropped, gathered again for its backward, and its gradients are reduced to their shards. With bf16
the blocks are gathered in bfloat16. The shards and the reduction stay in float32, and so do
embedding and head, so that the residual stream is what it is without FSDP. Only rank 0 loads the
model; the other ranks start on the meta device and receive their shards from it.
"""

import copy
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import distribute_tensor

from model import Decoder
from parts.checks import fsdp_words
from parts.config import DPOConfig
from parts.precision import Precision
from parts.ranks import Ranks, backend_of


class Shards:
    """A `parts.place.Place` in which every rank holds a part of each weight."""

    is_sharded = True

    def __init__(
        self, model: nn.Module, ranks: Ranks, c: DPOConfig, precision: Precision, ref_adapter: dict,
    ):
        """Shard the policy.

        `ref_adapter` is the reference's own LoRA on the policy's base. Raises ValueError if there
        is one.
        """
        if ref_adapter:
            raise ValueError(
                "--fsdp: the reference is a LoRA on the policy's own base (one that is continued, "
                "or moves), which is not split; merge it into a model and give that as "
                "--ref_model_name_or_path")
        self.ranks = ranks
        self.half = precision.half
        words = fsdp_words(c.fsdp)
        if not dist.is_initialized():  # one process, not started by torchrun
            backend = backend_of(ranks.device)
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        offload: OffloadPolicy = OffloadPolicy()
        if "offload" in words:
            offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
        self.options = {
            "mesh": init_device_mesh(ranks.device.type, (ranks.world,)),
            "reshard_after_forward": "shard_grad_op" not in words,
            "offload_policy": offload}
        self.model = self.shared(model)
        self.module = self.model

    def sync(self, last: bool) -> Any:
        """Do nothing: gradients are reduced to their shards after every forward."""
        return nullcontext()

    def shared(self, model: nn.Module) -> nn.Module:
        """Return a sharded copy of rank 0's model.

        That is on the CPU; on the other ranks it is on the meta device.
        """
        is_narrow = next(model.parameters()).dtype.itemsize < 4 or self.half is not None
        reduce = torch.float32 if is_narrow else None
        wide = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
        narrow = MixedPrecisionPolicy(
            param_dtype=self.half, reduce_dtype=reduce, cast_forward_inputs=False)
        sharded = meta_copy(model)
        for block in sharded.model.layers:
            fully_shard(block, mp_policy=narrow, **self.options)
        # fully_shard's hook moves every tensor that the root is given, also those that Python reads:
        # they are hidden before it and shown after it.
        sharded.register_forward_pre_hook(show, prepend=True)
        # The root is always resharded: else it would stay gathered after a forward without
        # backward, and the next forward would see old weights.
        fully_shard(sharded, mp_policy=wide, **self.options | {"reshard_after_forward": True})
        sharded.register_forward_pre_hook(hide, prepend=True)
        offloads = isinstance(self.options["offload_policy"], CPUOffloadPolicy)
        sharded.to_empty(device="cpu" if offloads else self.ranks.device)
        self.scatter(sharded, model)
        for target, source in zip(sharded.buffers(), model.buffers()):
            target.copy_(source if not source.is_meta else target)
            dist.broadcast(target, 0)
        sharded.skeleton = (meta_copy(model),)  # in a tuple, so that it is no submodule
        return sharded

    @torch.no_grad()
    def scatter(self, sharded: nn.Module, source: nn.Module) -> None:
        """Fill every rank's shards from rank 0's parameters.

        Parameters that are on the meta device there are skipped.
        """
        given = dict(source.named_parameters())
        for name, p in sharded.named_parameters():
            is_there = self.ranks.from_first(lambda name=name: {"there": not given[name].is_meta})
            if is_there["there"]:
                self.fill(p, given[name])

    @torch.no_grad()
    def fill(self, target: Any, source: Tensor | None) -> None:
        """Fill `target`'s shards from rank 0's unsharded `source`; every rank calls this."""
        if not hasattr(target, "full_tensor"):  # AdamW's count of steps
            if self.ranks.first:
                target.copy_(source)
            there = target.detach().to(self.ranks.device)
            dist.broadcast(there, 0)
            target.copy_(there)
            return
        device = target.device_mesh.device_type
        if self.ranks.first:
            whole = source.detach().to(device, target.dtype).contiguous()
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        shard = distribute_tensor(whole, target.device_mesh, target.placements)
        target.to_local().detach().copy_(shard.to_local())

    def whole(self, tensor: Any) -> Tensor:
        """Return a sharded tensor unsharded; every rank calls this."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    @torch.no_grad()
    def gathered(self, sharded: nn.Module, trained_only: bool = False) -> Decoder:
        """Return an unsharded copy in rank 0's memory.

        It is on the meta device on the other ranks, and for weights that do not learn if
        `trained_only`.
        """
        twin = copy.deepcopy(sharded.skeleton[0])
        state = {}
        for name, p in sharded.named_parameters():
            if p.requires_grad or not trained_only:
                tensor = self.whole(p)
                if self.ranks.first:
                    state[name] = tensor.cpu()
        twin.load_state_dict(state, strict=False, assign=True)
        twin.tie()
        return twin


class Hidden:
    """The root's arguments while fully_shard's own hook looks for tensors in them."""

    def __init__(self, args: tuple):
        self.args = args


def hide(module: nn.Module, args: tuple) -> tuple:
    return (Hidden(args),)


def show(module: nn.Module, args: tuple) -> tuple:
    return args[0].args


def meta_copy(model: nn.Module) -> nn.Module:
    """Return the same modules without memory for their parameters and buffers.

    Tied parameters stay tied.
    """
    empty = {}
    for p in model.parameters():
        empty[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for b in model.buffers():
        empty[id(b)] = b.to("meta")
    return copy.deepcopy(model, empty)
