"""Blocks that keep less on the device for their backward: --gradient_checkpointing selective and
--activation_offloading.

Selective: the outputs of norms, act(gate) * up and act(gate) are not kept. They are computed again
from what is kept anyway (the norm's input; gate and up) by the same functions, so to the same bits,
in passes over memory without any matrix product.

Offloading: what a block keeps is copied to pinned host memory on a stream of its own while later
blocks run, and copied back one block ahead of the backward pass.

Both are hooks on the tensors that PyTorch saves (torch.autograd.graph.saved_tensors_hooks). With
--gradient_checkpointing true a block saves only its input, which is then what is offloaded.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from extras.decoder.moe import Experts
from model import MLP, Decoder, Norm
from parts.kernels import product

LEAST = 2**16  # bytes; less is not worth a copy
# What stands between a weight and the product that saves it: a weight is no activation.
OF_WEIGHTS = ("TBackward0", "TransposeBackward0", "ViewBackward0", "ToCopyBackward0")


def save_memory(
    model: Decoder, checkpointing: bool | str, offloading: bool, device: torch.device,
) -> None:
    """Make a model's blocks keep less. Raises ValueError where offloading cannot help."""
    if offloading and device.type != "cuda":
        raise ValueError(
            f"--activation_offloading on {device.type}: activations are in the host's memory "
            "already; use --gradient_checkpointing, or a smaller --max_tokens_per_forward")
    if checkpointing == "selective":
        for module in model.model.layers.modules():
            remake_cheap_ones(module)
    stack = model.model
    stack.run_block = keeping_less(stack.run_block, Host(device) if offloading else None)


def keeping_less(run_block: Callable, host: "Host | None") -> Callable:
    """Return `run_block` with hooks on what PyTorch saves in it.

    It is a function, so that copies of the model (FSDP, a live reference) share it.
    """

    def run(layer: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run_block(layer, *args)
        shelf = None if host is None else host.next_shelf()
        with saved_tensors_hooks(partial(pack, shelf=shelf), unpack):
            return run_block(layer, *args)

    return run


class Saved(NamedTuple):
    """A saved tensor as a view of one that can be had again."""

    held: "Remade | Parked"
    size: torch.Size
    stride: tuple[int, ...] | None  # None: `held` expanded to `size`
    offset: int


def pack(t: Tensor, shelf: "Shelf | None") -> Tensor | Saved:
    """Return what is kept in the place of a saved tensor."""
    base = t if t._base is None else t._base
    remade = getattr(base, "remade", None)
    if remade is not None:
        remade.keep(shelf)
        return Saved(remade, t.size(), t.stride(), t.storage_offset())
    if shelf is not None and is_activation(t):
        return shelf.park(t)
    # Detached: a node that saves its own output, as attention does, would else hold itself.
    return t.detach()


def unpack(saved: Tensor | Saved) -> Tensor:
    """Return the saved tensor."""
    if isinstance(saved, Tensor):
        return saved
    value = saved.held.take()
    if saved.stride is None:
        return value.expand(saved.size)
    return value.as_strided(saved.size, saved.stride, saved.offset)


# Selective


class Remade:
    """A tensor that `make(*inputs)` computes again: once for all nodes that saved it."""

    def __init__(self, make: Callable, *inputs: Tensor, dtype: torch.dtype):
        self.make = make
        self.inputs: list[Any] = list(inputs)
        self.dtype = dtype  # autocast's in forward; backward runs outside of autocast
        self.users = 0
        self.value: Tensor | None = None

    def keep(self, shelf: "Shelf | None") -> None:
        """Count one more user; the first has the inputs kept."""
        if not self.users:
            self.inputs = [pack(x, shelf) for x in self.inputs]
        self.users += 1

    def take(self) -> Tensor:
        value = self.value
        if value is None:
            with torch.no_grad():
                value = self.make(*map(unpack, self.inputs)).to(self.dtype)
        self.users -= 1
        self.value = value if self.users > 0 else None
        return value


def remake_cheap_ones(module: nn.Module) -> None:
    """Have a module mark its results that are cheap to compute again."""
    if isinstance(module, Norm):
        module.register_forward_hook(mark_norm)
    elif isinstance(module, (MLP, Experts)):
        module.product = marked_product
        if not getattr(module, "gated", True):
            module.act = partial(marked_act, module.act)


def mark(out: Any, make: Callable, *inputs: Tensor) -> Tensor:
    if out.requires_grad:
        out.remade = Remade(make, *inputs, dtype=out.dtype)
    return out


def mark_norm(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    mark(out, module.forward, args[0])


def marked_act(act: Callable, x: Tensor) -> Tensor:
    return mark(act(x), act, x)


def marked_product(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, without keeping act(gate) either."""
    # `product` recognises SiLU, whose hand-written form keeps no act(gate)
    marked = act if act is F.silu else partial(marked_act, act)
    return mark(product(marked, gate, up), partial(product, act), gate, up)


# Offloading


def is_activation(t: Tensor) -> bool:
    """Tell whether a saved tensor is worth offloading: neither small, nor constant, nor a weight."""
    if t.is_leaf or t.numel() * t.element_size() < LEAST:
        return False
    node = t.grad_fn
    while node is not None and node.name() in OF_WEIGHTS:
        node = node.next_functions[0][0]
    return node is not None and "AccumulateGrad" not in node.name()


class Host:
    """The host's memory as a place for what blocks keep, a shelf for each."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: Shelf | None = None

    def next_shelf(self) -> "Shelf":
        """Return an empty shelf for a block; what the block before the last has parked leaves the
        device, so that computing is at most two blocks ahead of copying."""
        shelf = Shelf(self.last, self.stream)
        if self.last is not None and self.last.before is not None:
            self.last.before.clear_device()
        self.last = shelf
        return shelf


class Shelf:
    """What one block has parked, and the shelf of the block before it."""

    def __init__(self, before: "Shelf | None", stream: Any):
        self.before = before
        self.stream = stream
        self.copied: Any = None  # the event after the last copy to the host
        self.parked: list[weakref.ref] = []

    def park(self, t: Tensor) -> Saved:
        """Copy a tensor to the host; one that several nodes save is copied once."""
        whole: Any = t if t._base is None else t._base
        if distinct(t).numel() == whole.numel():
            view = Saved(None, t.size(), t.stride(), t.storage_offset())
        else:
            whole = distinct(t)
            view = Saved(None, t.size(), None, 0)
        parked = getattr(whole, "parked", None)
        if parked is None:
            parked = whole.parked = Parked(whole.detach(), self)
            self.parked.append(weakref.ref(parked))
        parked.users += 1
        return view._replace(held=parked)

    def clear_device(self) -> None:
        """Drop the tensors on the device, once they are copied."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        for parked in self.entries():
            parked.there = None

    def entries(self) -> list["Parked"]:
        return [parked for ref in self.parked if (parked := ref()) is not None]

    def fetch_before(self) -> None:
        """Start copying back what the block before has parked: its backward comes next."""
        before = self.before
        self.before = None
        for parked in [] if before is None else before.entries():
            parked.fetch()


class Parked:
    """A tensor in the host's memory; on the device only while it is copied or used."""

    def __init__(self, t: Tensor, shelf: Shelf):
        self.shelf = shelf
        self.there: Tensor | None = t
        self.device = t.device
        self.users = 0
        self.fetched: Any = None  # the event after the copy back
        stream = shelf.stream
        self.host = torch.empty_like(t, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(t)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(t, non_blocking=True)
        shelf.copied = stream.record_event()

    def fetch(self) -> None:
        """Start copying back to the device, unless it is there.

        The memory belongs to the stream that computes: what is freed there is not written to
        before its last use.
        """
        if self.there is not None:
            return
        self.there = torch.empty_like(self.host, device=self.device)
        stream = self.shelf.stream
        if stream is None:
            self.there.copy_(self.host)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.there.copy_(self.host, non_blocking=True)
        self.fetched = stream.record_event()

    def take(self) -> Tensor:
        self.shelf.fetch_before()
        self.fetch()
        if self.fetched is not None:
            torch.cuda.current_stream().wait_event(self.fetched)
        value = self.there
        self.users -= 1
        if self.users <= 0:
            self.there = None
        return value


def distinct(t: Tensor) -> Tensor:
    """Return a tensor without the dimensions that were only expanded."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t
