"""Optimizers that look at a whole matrix: Adafactor and Muon, as rules by which SmallAdamW steps.

    bytes a weight      float32   --dtype bfloat16
    --optim adafactor      8             4         weight, gradient; a number per row and column
    --optim muon          12             6         and one moment, for hidden matrices; else AdamW

A rule gets a parameter's state, its new value's type, its gradient in that type and its group, and
returns the new value. Under FSDP the tensors are sharded by rows, and a rule sums over the ranks.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parts.config import DPOConfig

Named = list[tuple[str, nn.Parameter]]
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's Muon, chosen for a steep start at 0


def rules_of(c: DPOConfig, named: Named) -> list[tuple[Callable | None, Named]]:
    """Return what steps by which rule; None is AdamW."""
    if c.optim == "adafactor":
        return [(adafactor, named)]
    if c.optim == "muon":
        hidden = [(name, p) for name, p in named if is_hidden(name, p)]
        rest = [(name, p) for name, p in named if not is_hidden(name, p)]
        return [(muon, hidden), (None, rest)]
    return [(None, named)]


def adafactor(state: dict[str, Any], p: Any, g: Any, group: dict) -> Tensor:
    """Adafactor (arXiv:1804.04235, algorithms 4 and 5) with learning rates from the flags.

    It is what `--optim adafactor` means in transformers: no first moment, scale_parameter and
    relative_step off. The second moment is v = r c^T / mean(r), where r and c are moving averages
    of g^2's means over rows and columns, with beta2 = 1 - t^-0.8. An update g / sqrt(v) whose root
    mean square exceeds 1 is scaled down to 1. Stacked experts have a v each.
    """
    beta2 = 1 - state["step"] ** -0.8
    square = g.square() + 1e-30
    if p.dim() < 2:
        update = local(averaged(state, "exp_avg_sq", square, beta2).rsqrt() * g)
    else:
        rows = averaged(state, "exp_avg_sq_row", whole(square.sum(-1)) / p.shape[-1], beta2)
        columns = averaged(state, "exp_avg_sq_col", whole(square.sum(-2)) / p.shape[-2], beta2)
        by_row = (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
        update = local(g) * part(by_row, p)
        update.mul_(part(columns.rsqrt().unsqueeze(-2), p))
    rms = (summed(torch.square(update, out=local(square)).sum(), p) / p.numel()).sqrt()
    return decayed(p, g.dtype, group).sub_(update.mul_(group["lr"] / rms.clamp(min=1)))


def muon(state: dict[str, Any], p: Any, g: Any, group: dict) -> Tensor:
    """Muon (kellerjordan.github.io/posts/muon) with Nesterov's momentum, as torch.optim.Muon.

    The update of an (m, n) matrix is, about, the nearest one with orthonormal rows or columns,
    times 0.2 sqrt(max(m, n)), so that its root mean square is AdamW's and one learning rate serves
    both (arXiv:2502.16982). Every rank computes it for the whole matrix.
    """
    moment = averaged(state, "momentum_buffer", g, MOMENTUM, p.dtype)
    update = whole(g.lerp(moment, MOMENTUM).bfloat16())
    for matrix in update.view(-1, *p.shape[-2:]):  # several, where experts are stacked
        matrix.copy_(orthogonal(matrix))
    rate = group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:]))
    return decayed(p, g.dtype, group).sub_(part(update, p), alpha=rate)


def is_hidden(name: str, p: nn.Parameter) -> bool:
    """Tell whether Muon steps a parameter: a matrix, or one for each expert, inside the model."""
    is_matrix = p.dim() == 2 and not name.endswith("bias") or p.dim() == 3 and ".experts." in name
    return is_matrix and "embed" not in name and "lm_head" not in name


def orthogonal(x: Tensor) -> Tensor:
    """Bring all singular values of a bfloat16 (m, n) matrix near 1: five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def averaged(
    state: dict[str, Any], key: str, value: Tensor, beta: float, dtype: torch.dtype | None = None,
) -> Tensor:
    """Update the moving average state[key] = beta state[key] + (1 - beta) value, and return it.

    It is kept in `dtype`, by default that of `value`, and returned before it is rounded to it.
    """
    before = state[key].to(value.dtype) if key in state else torch.zeros_like(value)
    found = before.lerp(value, 1 - beta)
    state[key] = found.to(dtype or found.dtype)
    return found


def decayed(p: Any, dtype: torch.dtype, group: dict) -> Tensor:
    """Return a copy of this rank's weights after weight decay."""
    return local(p).to(dtype, copy=True).mul_(1 - group["lr"] * group["weight_decay"])


# Tensors that FSDP has cut along their first dimension


def local(t: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Any) -> Tensor:
    """Return a tensor that may be sharded, or a sum over shards, whole; every rank calls this."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def part(t: Tensor, p: Any) -> Tensor:
    """Return the rows of a whole tensor that belong to this rank's shard of `p`."""
    if not hasattr(p, "to_local") or t.shape[0] == 1:  # one value for all rows
        return t
    rows = -(-p.shape[0] // p.device_mesh.size())
    return t[p.device_mesh.get_local_rank() * rows :][: len(p.to_local())]


def summed(t: Tensor, p: Any) -> Tensor:
    """Return the sum over the ranks that share `p`; every rank calls this."""
    if not hasattr(p, "to_local"):
        return t
    there = t.to(p.device_mesh.device_type)
    dist.all_reduce(there, group=p.device_mesh.get_group())
    return there.to(t.device)
