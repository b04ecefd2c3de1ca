"""Activations by name; norm, SwiGLU, rotation, LoRA and slices, with backward passes that are fast.

Each computes the plain formula in its docstring. They exist because PyTorch's own keep more tensors
for backward or go over them more often, and memory traffic decides, on a CPU as on a GPU. Where
Triton runs, and on a CPU where there is a C compiler, norm, SwiGLU and rotation are one pass each
(triton_layers.py, c_layers.py). Inside torch.compile the plain formulas are taken: the compiler
fuses those itself, and in torch 2.11 it gives wrong gradients for operations in place inside an
autograd Function.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from parts import c_layers

tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu,
    "relu2": lambda x: F.relu(x).square()}
# those of image encoders
TOWER_ACTIVATIONS = ACTIVATIONS | {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that a matrix product of x runs in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@lru_cache
def has_triton(device: torch.device) -> bool:
    """Tell whether Triton is installed and computes bfloat16 on this device."""
    return (device.type == "cuda" and find_spec("triton") is not None
            and torch.cuda.get_device_capability(device) >= (8, 0))


def takes_triton(device: torch.device) -> bool:
    return not torch.compiler.is_compiling() and has_triton(device)


def takes_c(dtype: torch.dtype, x: Tensor, *wide: Tensor) -> bool:
    return not torch.compiler.is_compiling() and c_layers.computes(dtype, x, *wide)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the type of the weight, rounded to `dtype`."""
    if takes_triton(x.device):
        from parts import triton_layers

        return triton_layers.RMSNorm.apply(x, weight, eps, dtype)
    if takes_c(dtype, x, weight):
        return c_layers.RMSNorm.apply(x, weight, eps)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return RMSNorm.apply(x, weight, eps, dtype)
    return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(dtype)


class RMSNorm(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps); dx = r (g - n mean(g n)) with g = dy w.

    PyTorch's own for the CPU is composed of six operations, and keeps the result of each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(weight.dtype)
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        n = x * r
        if grad.dim() == 2:
            grad_weight = torch.linalg.vecdot(grad, n, dim=0)
        else:
            grad_weight = (grad * n).flatten(0, -2).sum(0)
        g = grad * weight
        g.addcmul_(n, torch.linalg.vecdot(g, n)[..., None], value=-1 / x.shape[-1]).mul_(r)
        return g.to(x.dtype), grad_weight, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    if takes_triton(gate.device):
        from parts import triton_layers

        return triton_layers.SwiGLU.apply(gate, up)
    if gate.dtype == up.dtype and takes_c(gate.dtype, gate):
        return c_layers.SwiGLU.apply(gate, up)
    return F.silu(gate) * up if torch.compiler.is_compiling() else SwiGLU.apply(gate, up)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps two tensors for backward instead of three."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def product(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up."""
    return swiglu(gate, up) if act is F.silu else act(gate) * up


def rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """(a cos - b sin, b cos + a sin) of the halves (a, b), or even and odd, of the last dim."""
    if takes_triton(x.device) and cos.shape == (len(x), 1, x.shape[-1]):
        from parts import triton_layers

        return triton_layers.Rotation.apply(x, cos, sin, interleaved)
    if not interleaved and takes_c(x.dtype, x, cos, sin) and cos.shape == (len(x), 1, x.shape[-1]):
        return c_layers.Rotation.apply(x, cos, sin)
    if not torch.compiler.is_compiling():
        return Rotation.apply(x, cos, sin, interleaved)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat([a, b], -1) * cos + torch.cat([-b, a], -1) * sin


class Rotation(torch.autograd.Function):
    """(a cos - b sin, b cos + a sin) of the halves (a, b) of the last dim.

    Its gradient rotates back: the same with -sin. With `interleaved` a and b are the even and the
    odd dims; the result has them as halves all the same, which no product of query and key sees.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        ctx.interleaved = interleaved
        return turn(torch.cat([x[..., ::2], x[..., 1::2]], -1) if interleaved else x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = turn(grad, cos, -sin).to(ctx.dtype)
        if ctx.interleaved:
            grad = torch.stack(grad.chunk(2, -1), -1).flatten(-2)
        return grad, None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate in three passes; in the wider of the types of x and cos."""
    out = x * cos
    half = x.shape[-1] // 2
    x = x.to(out.dtype)
    sin = sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out


class LowRank(torch.autograd.Function):
    """out + s (x a^T) b^T, in the type of `out`, which it overwrites; LoRA's a (r, C), b (V, r).

    With g = s grad b: dx = g a, da = g^T x, db = s grad^T (x a^T). Keeps x itself, the tensor that
    other adapters on the same input keep too, where a wide `a` would keep a wide copy for each.
    """

    @staticmethod
    def forward(ctx, out: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        x = x.to(out.dtype)
        low = x.flatten(0, -2) @ a.to(x.dtype).T  # (T, r)
        ctx.save_for_backward(x, low, a, b)
        ctx.s = s
        ctx.mark_dirty(out)
        out.flatten(0, -2).addmm_(low, b.to(x.dtype).T, alpha=s)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        g = (rows @ b.to(x.dtype)).mul_(ctx.s)
        grad_x = (g @ a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        grad_b = (rows.T @ low).to(b.dtype).mul_(ctx.s)
        return grad, grad_x, (g.T @ x.flatten(0, -2)).to(a.dtype), grad_b, None


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return out + s (x a^T) b^T; see LowRank, which PyTorch's compiler would get wrong."""
    if torch.compiler.is_compiling():
        low = F.linear(x.to(out.dtype), a.to(out.dtype))
        return out + s * F.linear(low, b.to(out.dtype))
    return LowRank.apply(out, x, a, b, s)


def cut(x: Tensor, ranges: list[tuple[tuple[int, int], ...]]) -> list[Tensor]:
    """Return the stretches [a, b) of x, joined where an entry has several.

    By one split, whose gradient is one concatenation: the gradient of each slice would be a tensor
    as long as x, mostly zeros, and there are as many slices as completions.
    """
    edges = {0, len(x)}
    for stretches in ranges:
        for stretch in stretches:
            edges.update(stretch)
    edges = sorted(edges)
    number = {edge: i for i, edge in enumerate(edges)}
    pieces = x.split([b - a for a, b in pairwise(edges)])
    out = []
    for stretches in ranges:
        parts = []
        for a, b in stretches:
            parts += pieces[number[a] : number[b]]
        out.append(torch.cat(parts) if len(parts) > 1 else parts[0])
    return out
