"""An optimizer of the user's own: made, and its state in checkpoints whatever it holds.

The learning rates that it is made with are the peaks: each step scales them by the schedule.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parts.config import DPOConfig

Named = list[tuple[str, nn.Parameter]]
OURS = ("lr", "ratio", "params")  # entries of a group that a resume sets anew


def make_custom(make: Callable, c: DPOConfig, named: Named) -> torch.optim.Optimizer:
    """Return make(parameters), with the `ratio` by which the trainer scales each learning rate."""
    optimizer = make([parameter for _, parameter in named])
    for group in optimizer.param_groups:
        group["ratio"] = group["lr"] / c.learning_rate if c.learning_rate else 0.0
    return optimizer


def as_tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return tensors as they are and numbers as scalars, int64 or float64; other values have no
    place in a file of tensors."""
    found = {}
    for key, value in values.items():
        if torch.is_tensor(value) or hasattr(value, "full_tensor"):
            found[key] = value
        elif isinstance(value, (int, float)):
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            found[key] = torch.tensor(value, dtype=dtype)
    return found


def from_tensor(tensor: Tensor) -> Any:
    """Return a number that `as_tensors` made a scalar; any other tensor as it is."""
    is_number = tensor.dim() == 0 and tensor.dtype in (torch.int64, torch.float64)
    return tensor.item() if is_number else tensor


def saved_state(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """Return {name: tensor} of what the optimizer holds of each parameter and of each group."""
    found = {}
    for name, p in named:
        for key, tensor in as_tensors(optimizer.state[p]).items():
            found[f"{name}.{key}"] = tensor
    for i, group in enumerate(optimizer.param_groups):
        own = {key: value for key, value in group.items() if key not in OURS}
        for key, tensor in as_tensors(own).items():
            found[f"param_groups.{i}.{key}"] = tensor
    return found


def restore_state(
    optimizer: torch.optim.Optimizer, named: Named, found: dict[str, Tensor], place: Any,
) -> None:
    """Set what `saved_state` returned; `found` is rank 0's, and every rank calls this."""
    shapes = {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in found.items()}
    shapes = place.ranks.from_first(lambda: shapes)
    homes = {f"{name}.": (p, optimizer.state[p]) for name, p in named}
    for i, group in enumerate(optimizer.param_groups):
        homes[f"param_groups.{i}."] = (group["params"][0], group)
    for name, (shape, dtype) in shapes.items():
        stem, _, key = name.rpartition(".")
        p, home = homes[f"{stem}."]
        kind = getattr(torch, dtype)
        if shape == list(p.shape):
            target = torch.zeros_like(p, dtype=kind)
        else:
            target = torch.zeros(shape, dtype=kind, device=p.device)
        place.fill(target, found.get(name))
        home[key] = from_tensor(target)
