"""Number types of a run: weights, matrix products, sums; and the loss scaling of float16."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parts.config import DPOConfig
from parts.position import Position

PATIENCE = 2000  # steps without overflow before the scale is doubled, as in torch's GradScaler


class Precision(NamedTuple):
    """The types of a run."""

    weights: torch.dtype
    half: torch.dtype | None  # what autocast computes in; None where it is off
    sums: torch.dtype  # of log-probs over a completion: float32 at least

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return a context in which matrix products run in `half`, if there is one."""
        half = self.half or torch.bfloat16
        return torch.autocast(device.type, half, enabled=self.half is not None)


def computes_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware, faster than float32.

    Of CPUs, those with AMX or AVX512-BF16 do; of Apple's GPUs, all from macOS 14 on.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def choose_precision(c: DPOConfig, device: torch.device) -> Precision:
    """Return the types that --dtype, --bf16 and --fp16 ask for.

    bfloat16 is on by default where the device computes it.
    """
    weights = getattr(torch, c.dtype)
    bf16 = c.bf16
    if bf16 is None:
        bf16 = c.dtype == "float32" and not c.fp16 and computes_bf16(device)
    half = torch.float16 if c.fp16 else torch.bfloat16 if bf16 else None
    return Precision(weights, half, torch.promote_types(weights, torch.float32))


class Scaler:
    """Loss scaling for float16 (arXiv:1710.03740); where it is off the scale is 1.

    Small gradients vanish in float16, so the loss is multiplied by a scale, and the gradients are
    divided by it before they are used. A step that overflows halves the scale and is skipped: that
    is part of the method. The scale is part of the run's position, so a resumed run continues with
    it.
    """

    def __init__(self, enabled: bool, parameters: Iterable[nn.Parameter], position: Position):
        self.enabled = enabled
        self.parameters = list(parameters)
        self.position = position

    @property
    def state(self) -> dict[str, float]:
        """Return {`scale`: the factor on the loss, `since`: steps without overflow}."""
        return self.position.scaling

    def backward(self, loss: Tensor) -> None:
        (loss * self.state["scale"]).backward()

    def unscale(self) -> None:
        """Divide the gradients by the scale."""
        if not self.enabled:
            return
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(1 / self.state["scale"])

    def clip(self, max_norm: float) -> Tensor:
        """Unscale the gradients, clip them to `max_norm` (0: do not), return their norm before."""
        self.unscale()
        return nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def overflowed(self, loss: float) -> bool:
        """Tell whether a step that is not finite only overflowed float16; then halve the scale."""
        if not self.enabled or not math.isfinite(loss) or self.state["scale"] <= 1:
            return False
        self.adjust(finite=False)
        return True

    def adjust(self, finite: bool) -> None:
        """Halve the scale after an overflow; double it after 2000 steps without one."""
        if not self.enabled:
            return
        self.state["since"] = self.state["since"] + 1 if finite else 0
        if not finite:
            self.state["scale"] *= 0.5
        elif self.state["since"] == PATIENCE:
            self.state["scale"] *= 2.0
            self.state["since"] = 0
