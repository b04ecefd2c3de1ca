"""LoRA beyond model.py's LoraLinear: DoRA; LoRA on embeddings, experts and routers; modules that
are fully trained.

Every kind wraps a module as its `base_layer`, computes what that module does where `enabled` is
False, and has "lora_" in the names of its own parameters, so that the base's are those without.
"""

import copy
import math
from itertools import chain
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.decoder.moe import Router, grouped_linear
from model import LoraLinear


def wide(x: Tensor) -> torch.dtype:
    """Return the type of an adapter on x: at least float32, whatever its base is."""
    return torch.promote_types(x.dtype, torch.float32)


def add_low_rank(
    module: nn.Module, base: nn.Module, rank: int, alpha: float, dropout: float,
) -> None:
    """Give `module` what a LoraLinear on `base` has, with A and B drawn as there."""
    plain = LoraLinear(base, rank, alpha, dropout)
    module.base_layer = base
    module.scaling = plain.scaling
    module.enabled = True
    module.dropout = plain.dropout
    module.lora_A = plain.lora_A
    module.lora_B = plain.lora_B


# Kinds


class DoraLinear(nn.Module):
    """m / |W + s B A| (W + s B A) x (arXiv:2402.09353 eq. 5).

    The norm is over each row and carries no gradient (its section 4.3). m starts at |W|, so
    training starts at the base. With dropout the base's part of the update sees the dropped input
    too, as in PEFT.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        add_low_rank(self, base, rank, alpha, dropout)
        magnitude = torch.linalg.norm(self.direction(), dim=1)  # (out,)
        self.lora_magnitude_vector = nn.Parameter(magnitude)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @torch.no_grad()
    def direction(self) -> Tensor:  # (out, in)
        weight = self.base_layer.weight
        return weight.to(wide(weight)) + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def scale(self) -> Tensor:  # (out,)
        return self.lora_magnitude_vector / torch.linalg.norm(self.direction(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if not self.enabled:
            return out
        dropped = self.dropout(x)
        plain = self.base_layer(dropped) if self.training and self.dropout.p else out
        if self.base_layer.bias is not None:
            plain = plain - self.base_layer.bias
        low_rank = self.lora_B(self.lora_A(dropped.to(self.lora_A.weight.dtype))) * self.scaling
        scale = self.scale()
        return out + ((scale - 1) * plain + scale * low_rank).to(out.dtype)

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the head's products; scaling the rows of W takes a second matrix of its size."""
        if not self.enabled:
            return [(x, self.weight)]
        scale = self.scale()[:, None]
        low_rank = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))) * self.scaling
        return [(x, scale * self.weight), (low_rank, scale * self.lora_B.weight)]

    def delta(self) -> Tensor:
        """Return what merging adds to the weight."""
        return self.scale()[:, None] * self.direction() - self.weight


class LoraEmbedding(nn.Module):
    """base(ids) + scaling * (A[:, ids])^T B^T, with PEFT's parameter names.

    A starts at zero, B is drawn from a normal distribution. With `dora` each column of the sum is
    scaled to the length m, over the vocabulary.
    """

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dora: bool = False):
        super().__init__()
        self.base_layer = base
        self.scaling = alpha / rank
        self.enabled = True
        self.dora = dora
        options = {"device": base.weight.device, "dtype": wide(base.weight)}
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, **options))
        drawn = torch.randn(base.embedding_dim, rank, dtype=options["dtype"])  # see LoraLinear
        self.lora_embedding_B = nn.Parameter(drawn.to(options["device"]))
        if dora:
            self.lora_magnitude_vector = nn.Parameter(self.norm())  # (C,)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def low_rank(self) -> Tensor:  # (V, C)
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T

    @torch.no_grad()
    def norm(self) -> Tensor:  # (C,)
        return torch.linalg.norm(self.weight + self.low_rank(), dim=0)

    def forward(self, ids: Tensor) -> Tensor:
        out = self.base_layer(ids)
        if not self.enabled:
            return out
        update = F.embedding(ids, self.lora_embedding_A.T) * self.scaling @ self.lora_embedding_B.T
        if not self.dora:
            return out + update.to(out.dtype)
        return (self.lora_magnitude_vector / self.norm() * (out + update)).to(out.dtype)

    def delta(self) -> Tensor:
        """Return what merging adds to the weight."""
        if not self.dora:
            return self.low_rank()
        scaled = self.lora_magnitude_vector / self.norm() * (self.weight + self.low_rank())
        return scaled - self.weight


class LoraExperts(nn.Module):
    """LoRA on stacks of experts (extras/decoder/moe.py): x_e W_e^T + s (x_e A_e^T) B_e^T.

    Parameters are laid out as in PEFT's files: A (experts * rank, in), B (out, rank * experts).
    `stacks` is {stack: (rank, alpha)}. `turned`: PEFT has A on the side of the outputs and B on that
    of the inputs, A (experts * rank, out), B (in, rank * experts).
    """

    def __init__(
        self, base: nn.Module, stacks: dict[str, tuple[int, float]], dropout: float,
        turned: bool = False,
    ):
        super().__init__()
        self.turned = turned
        self.base_layer = base
        self.enabled = True
        self.dropout = nn.Dropout(dropout)
        self.scaling = {name: alpha / rank for name, (rank, alpha) in stacks.items()}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        like = next(chain(base.parameters(), base.buffers()))
        # experts in 4 bits have only buffers of integers
        dtype = wide(like) if like.is_floating_point() else torch.float32
        options = {"device": like.device, "dtype": dtype}
        for name, (rank, _) in stacks.items():
            count, rows, columns = stack_shape(base, name)
            if turned:
                rows, columns = columns, rows
            drawn = torch.empty(count * rank, columns, dtype=dtype)  # see LoraLinear
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            self.lora_A[name] = nn.Parameter(drawn.to(like.device))
            self.lora_B[name] = nn.Parameter(torch.zeros(rows, rank * count, **options))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (experts, rank, in) and B (experts, out, rank) of a stack."""
        experts = stack_shape(self.base_layer, name)[0]
        a = self.lora_A[name].unflatten(0, (experts, -1))
        b = self.lora_B[name].unflatten(1, (-1, experts)).permute(2, 0, 1)
        return (b.mT, a.mT) if self.turned else (a, b)

    def update(self, name: str, x: Tensor, counts: Tensor) -> Tensor:
        a, b = self.factors(name)
        low_rank = grouped_linear(self.dropout(x.to(a.dtype)), a, counts) * self.scaling[name]
        return grouped_linear(low_rank, b, counts)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        names = self.lora_A if self.enabled else ()
        return run_experts(self.base_layer, x, counts, {name: self.update for name in names})

    def deltas(self) -> dict[str, Tensor]:
        """Return {stack: what merging adds to it}."""
        found = {}
        for name in self.lora_A:
            a, b = self.factors(name)
            found[name] = self.scaling[name] * torch.bmm(b, a)
        return found


def stack_shape(experts: nn.Module, name: str) -> tuple[int, int, int]:
    """Return (experts, out, in) of a stack, which may be in 4 bits."""
    if hasattr(experts, name):
        return tuple(getattr(experts, name).shape)
    size, hidden = experts.gate_up[0].shape
    count = len(experts.down)
    rows = len(experts.gate_up) // count * size
    return (count, rows, hidden) if name == experts.first else (count, hidden, size)


def run_experts(
    base: nn.Module, x: Tensor, counts: Tensor, updates: dict[str, Callable],
) -> Tensor:
    """Run the experts, with `updates[stack](stack, x, counts)` added to a stack's product."""

    def project(name: str, x: Tensor) -> Tensor:
        out = base.project(name, x, counts)
        return out + updates[name](name, x, counts).to(out.dtype) if name in updates else out

    return project("down_proj", base.combine(project(base.first, x)))


class LoraRouter(nn.Module):
    """LoRA on the logits of a router."""

    def __init__(self, base: Router, rank: int, alpha: float, dropout: float):
        super().__init__()
        add_low_rank(self, base, rank, alpha, dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.enabled:
            return self.base_layer(x)
        dropped = self.dropout(x.to(self.lora_A.weight.dtype))
        update = self.lora_B(self.lora_A(dropped)) * self.scaling
        logits = self.base_layer.logits(x)
        return self.base_layer.route(logits + update.to(logits.dtype))

    def delta(self) -> Tensor:
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)


class SavedModule(nn.Module):
    """A module that is fully trained beside the LoRA (PEFT's modules_to_save).

    `base_layer` stays as it was.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        self.enabled = True
        dtype = wide(next(base.parameters()))
        self.lora_saved = copy.deepcopy(base).to(dtype).requires_grad_(True)

    @property
    def weight(self) -> Tensor:
        return (self.lora_saved if self.enabled else self.base_layer).weight

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        if not self.enabled:
            return self.base_layer(x, *more)
        theirs = next(self.base_layer.parameters()).dtype
        own = next(self.lora_saved.parameters()).dtype
        if theirs == own:
            return self.lora_saved(x, *more)
        out = self.lora_saved(x.to(own) if x.is_floating_point() else x, *more)
        return out.to(theirs) if torch.is_tensor(out) else (out[0].to(theirs), *out[1:])


class DenseDelta(nn.Module):
    """A module with dense updates of its weights: TR-DPO's moving reference of a LoRA policy."""

    def __init__(self, base: nn.Module, deltas: dict[str, Tensor]):
        super().__init__()
        self.base_layer = base
        self.enabled = True
        self.lora_delta = nn.ParameterDict()
        for name, delta in deltas.items():
            self.lora_delta[name] = nn.Parameter(delta.detach().clone(), False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor, *counts: Tensor) -> Any:
        base = self.base_layer
        if "weight" not in self.lora_delta:
            return run_experts(base, x, *counts, dict.fromkeys(self.lora_delta, self.grouped))
        delta = self.lora_delta["weight"]
        if isinstance(base, nn.Embedding):
            return (base(x) + F.embedding(x, delta)).to(base.weight.dtype)
        if isinstance(base, Router):
            update = F.linear(x.to(delta.dtype), delta)
            logits = base.logits(x)
            return base.route(logits + update.to(logits.dtype))
        out = base(x)
        return out + F.linear(x.to(delta.dtype), delta).to(out.dtype)

    def grouped(self, name: str, x: Tensor, counts: Tensor) -> Tensor:
        delta = self.lora_delta[name]
        return grouped_linear(x.to(delta.dtype), delta, counts)

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, self.weight), (x, self.lora_delta["weight"])]

    def deltas(self) -> dict[str, Tensor]:
        return dict(self.lora_delta)


def deltas(wrapper: nn.Module) -> dict[str, Tensor]:
    """Return {parameter of the base: what merging adds to it}."""
    return wrapper.deltas() if hasattr(wrapper, "deltas") else {"weight": wrapper.delta()}
