"""--fsdp: parameters, gradients, optimizer state and the reference copy split across the ranks
(arXiv:2304.11277).

This is torch's own fully_shard, block by block: a block's weights are gathered for its forward,
dropped, gathered again for its backward, and its gradients are reduced to their shards. With bf16
the blocks are gathered in bfloat16. The shards and the reduction stay in float32, and so do
embedding and head, so that the residual stream is what it is without FSDP.

No rank ever holds a whole copy of the model. It is opened on the meta device and sharded there; then
the ranks take turns at reading a module from the files and dealing it to all. Rank 0 writes it, one
gathered tensor at a time.
"""

import copy
from collections.abc import Callable, Iterable
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
    register_fsdp_forward_method,
)
from torch.distributed.tensor import distribute_tensor

from extras.models.nf4 import Stack4bit
from model import lora_modules
from parts.checks import fsdp_words
from parts.config import DPOConfig
from parts.place import tensors_of
from parts.precision import Precision
from parts.ranks import Ranks, agree, backend_of


class Shards:
    """A `parts.place.Place` in which every rank holds a part of each weight."""

    is_sharded = True

    def __init__(
        self, model: nn.Module, ranks: Ranks, c: DPOConfig, precision: Precision, reference: Any,
    ):
        """Shard the policy, and the reference if it is a model of its own.

        Raises ValueError for a LoRA's reference that moves.
        """
        if reference.adapter and c.sync_ref_model:
            raise ValueError(
                "--fsdp with --sync_ref_model: the moving reference of a LoRA is as large as the "
                "weights that it is on, and is not split; leave one of them out, or train all "
                "weights")
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
        if reference.model is not None:
            reference.model = self.shared(reference.model)
        self.put_on(self.model, reference.adapter)

    def sync(self, last: bool) -> Any:
        """Do nothing: gradients are reduced to their shards after every forward."""
        return nullcontext()

    def shared(self, model: nn.Module) -> nn.Module:
        """Return a sharded copy of a model that is on the meta device, where rank 0 lacks it."""
        is_narrow = next(model.parameters()).dtype.itemsize < 4 or self.half is not None
        reduce = torch.float32 if is_narrow else None
        wide = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
        narrow = MixedPrecisionPolicy(
            param_dtype=self.half, reduce_dtype=reduce, cast_forward_inputs=False)
        sharded = meta_copy(model)
        for module in sharded.modules():
            if isinstance(module, Stack4bit):
                module.flatten()
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
        sharded.skeleton = (meta_copy(model),)  # in a tuple, so that it is no submodule
        register_fsdp_forward_method(sharded, "logits")  # generation: every rank takes part
        sharded.agreed = self.agreed
        sharded.device = self.ranks.device
        self.load(sharded, model)
        return sharded

    @torch.no_grad()
    def put_on(self, sharded: nn.Module, adapter: dict[str, nn.Module]) -> None:
        """Put a reference's adapter, which every rank holds whole, on the sharded model's base."""
        for name, wrapper in adapter.items():
            module = sharded.get_submodule(name)
            wrapper.base_layer = None  # else its shards counted as the adapter's parameters
            for part, p in list(wrapper.named_parameters()):
                there = torch.empty(p.shape, dtype=p.dtype, device=self.ranks.device)
                self.fill(there, p)
                owner, _, child = part.rpartition(".")
                wrapper.get_submodule(owner).register_parameter(child, nn.Parameter(there, False))
            wrapper.base_layer = getattr(module, "base_layer", module)

    def agreed(self, tokens: list[int]) -> list[int]:
        """Return rank 0's tokens: a rank that drew another would run fewer forwards, or more."""
        chosen = torch.tensor(tokens, device=self.ranks.device)
        dist.broadcast(chosen, 0)
        return chosen.tolist()

    @torch.no_grad()
    def load(self, sharded: nn.Module, source: nn.Module) -> None:
        """Fill every rank's shards: from rank 0's `source` what it has, all else from the files.

        The ranks read in turns, a module each. Raises ValueError, on every rank, if one cannot
        read, or reads other files.
        """
        targets = {name: tensor for name, _, tensor in tensors_of(sharded)}
        given = {name: tensor for name, _, tensor in tensors_of(source)}
        held = [name for name, tensor in given.items() if not tensor.is_meta]
        held = self.ranks.from_first(lambda: {"names": held})["names"]
        for name in held:
            self.fill(targets[name], given[name])
        modules: dict[str, list[str]] = {}
        for name in targets:
            if name not in set(held):
                modules.setdefault(name.rpartition(".")[0], []).append(name)
        if modules:
            agree(self.ranks, {"files": source.read.digest()})
        waiting = list(modules.values())
        while waiting:
            turn, waiting = waiting[: self.ranks.world], waiting[self.ranks.world :]
            mine = self.read(source, turn)
            for owner, names in enumerate(turn):
                for name in names:
                    self.fill(targets[name], mine.get(name), owner)

    def read(self, source: nn.Module, turn: list[list[str]]) -> dict[str, Tensor]:
        """Return {name: tensor} of this rank's module, of as many modules as there are ranks."""
        names = dict(enumerate(turn)).get(self.ranks.rank, [])
        plain = {name.replace(".base_layer.", "."): name for name in names}
        found = {}
        error = ""
        try:
            found = source.read(plain) if plain else {}
        except (ValueError, OSError) as failed:
            error = str(failed)
        error = self.ranks.first_error(error)
        if error:
            raise ValueError(error)
        return {plain[name]: tensor for name, tensor in found.items()}

    @torch.no_grad()
    def fill(self, target: Any, source: Tensor | None, owner: int = 0) -> None:
        """Fill `target`'s shards from the unsharded `source` of rank `owner`; every rank calls
        this."""
        is_mine = self.ranks.rank == owner
        if not hasattr(target, "full_tensor"):  # AdamW's count of steps
            if is_mine:
                target.copy_(source)
            there = target.detach().to(self.ranks.device)
            dist.broadcast(there, owner)
            target.copy_(there)
            return
        device = target.device_mesh.device_type
        if is_mine:
            whole = source.detach().to(device, target.dtype).reshape(target.shape).contiguous()
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        shard = distribute_tensor(
            whole, target.device_mesh, target.placements, src_data_rank=owner)
        target.to_local().detach().copy_(shard.to_local())

    def whole(self, tensor: Any) -> Tensor:
        """Return a sharded tensor unsharded; every rank calls this."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    @torch.no_grad()
    def gathered(self, sharded: nn.Module, trained_only: bool = False) -> nn.Module:
        """Return an unsharded copy of a model with a LoRA, or of one that came as an object, in
        rank 0's memory; any other as it is: it is written one tensor at a time.

        The copy is on the meta device on the other ranks, and for weights that do not learn if
        `trained_only`.
        """
        if not lora_modules(sharded) and not hasattr(sharded, "source"):
            return sharded
        twin = copy.deepcopy(sharded.skeleton[0])
        state = {}
        for name, shape, tensor in tensors_of(sharded):
            if tensor.requires_grad or not trained_only:
                whole = self.whole(tensor)
                if self.ranks.first:
                    state[name] = whole.cpu().view(shape)
        twin.load_state_dict(state, strict=False, assign=True)
        twin.tie()
        return twin

    def from_first(self, make: Callable[[Callable], dict], tensors: Iterable[Tensor]) -> dict:
        """Do `Ranks.from_first`; `make(whole)` gets what returns each of `tensors` unsharded, on
        the CPU, while the other ranks help to gather it."""
        held = [tensor for tensor in tensors if hasattr(tensor, "full_tensor")]
        number = {id(tensor): i for i, tensor in enumerate(held)}

        def give(i: int) -> Tensor | None:
            whole = self.whole(held[i].detach())
            return whole.cpu() if self.ranks.first else None

        def run(ask: Callable[[int], Tensor]) -> dict:
            return make(lambda t: ask(number[id(t)]) if id(t) in number else t.detach().cpu())

        return self.ranks.first_asking(run, give)


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
