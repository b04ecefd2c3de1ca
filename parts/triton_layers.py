"""Norm, SwiGLU and rotation on a GPU: one pass forward and one backward, where kernels.py's plain
forms take three to eight. A leaf: kernels.py imports it where Triton runs.

All compute in the type of the weight or the tables, float32 at least, and round once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values of each tensor that a program holds, or one row where that is longer
PROGRAMS = 512  # at most, for a norm's backward: each sums a gradient of the weight over its rows


def launch(kernel: Any, programs: int, first: Tensor, *more: Any, **options: Any) -> None:
    """Run on the device of `first`, which need not be the current one: a reference may lie apart.

    No programs, no launch: CUDA refuses an empty grid.
    """
    if programs:
        with torch.cuda.device_of(first):
            kernel[(programs,)](first, *more, **options)


def rows_of(x: Tensor) -> Tensor:
    """Return x as (R, C), without a copy where its rows lie at equal distances."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def tile(C: int) -> dict[str, int]:
    """Return how a program's tile is cut: rows by columns, and the warps for it."""
    columns = triton.next_power_of_2(C)
    rows = max(1, TILE // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 4 if columns <= TILE else 16}


def wide_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def norm_kernel(x, weight, y, rstd, R, C, stride, eps, WIDE: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), kept in `rstd`. A program takes ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < R)[:, None] & (column < C)[None, :]
    v = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(WIDE)
    w = tl.load(weight + column, mask=column < C, other=0.0)
    r = 1 / tl.sqrt(tl.sum(v * v, 1) / C + eps)
    n = v * r[:, None] * w[None, :]
    tl.store(y + row[:, None] * C + column[None, :], n.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=row < R)


@triton.jit
def norm_grad_kernel(x, weight, rstd, grad, dx, parts, R, C, stride, grad_stride,
                     WIDE: tl.constexpr, LEARNS: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):
    """dx = r (g - n mean(g n)) with n = x r and g = dy w; dw = sum over rows of dy n.

    A program takes every num_programs-th tile of rows and sums dw over them, without atomics.
    """
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < C, other=0.0)
    total = tl.zeros((COLUMNS,), WIDE)
    for start in range(program * ROWS, R, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < R)[:, None] & (column < C)[None, :]
        r = tl.load(rstd + row, mask=row < R, other=0.0)[:, None]
        v = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(WIDE)
        n = v * r
        at = grad + row[:, None] * grad_stride + column[None, :]
        g = tl.load(at, mask=inside, other=0.0).to(WIDE)
        if LEARNS:
            total += tl.sum(g * n, 0)
        g = g * w[None, :]
        d = (g - n * (tl.sum(g * n, 1) / C)[:, None]) * r
        tl.store(dx + row[:, None] * C + column[None, :], d.to(dx.dtype.element_ty), mask=inside)
    if LEARNS:
        tl.store(parts + program.to(tl.int64) * C + column, total, mask=column < C)


class RMSNorm(torch.autograd.Function):
    """As kernels.py's RMSNorm."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = rows_of(x)
        R, C = rows.shape
        how = tile(C)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(R, dtype=weight.dtype, device=x.device)
        launch(norm_kernel, triton.cdiv(R, how["ROWS"]), rows, weight, y, rstd, R, C,
               rows.stride(0), eps, WIDE=wide_type(weight.dtype), **how)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, grad = rows_of(x), rows_of(grad)
        R, C = rows.shape
        how = tile(C)
        programs = min(triton.cdiv(R, how["ROWS"]), PROGRAMS)
        learns = ctx.needs_input_grad[1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = weight.new_empty(programs if learns else 0, C)
        launch(norm_grad_kernel, programs, rows, weight, rstd, grad, dx, parts, R, C,
               rows.stride(0), grad.stride(0), WIDE=wide_type(weight.dtype), LEARNS=learns, **how)
        return dx, parts.sum(0) if learns else None, None, None


@triton.jit
def swiglu_kernel(gate, up, out, C, BLOCKS, gate_stride, up_stride, WIDE: tl.constexpr,
                  BLOCK: tl.constexpr):
    """silu(gate) * up. A program takes BLOCK columns of a row, of which there are BLOCKS."""
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    y = g / (1 + tl.exp(-g)) * u
    tl.store(out + row * C + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_grad_kernel(gate, up, grad, dgate, dup, C, BLOCKS, gate_stride, up_stride, grad_stride,
                       WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """With s = sigmoid(g): du = dy g s, dg = dy u s (1 + g (1 - s))."""
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    d = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(WIDE)
    s = 1 / (1 + tl.exp(-g))
    du = d * g * s
    dg = d * u * s * (1 + g * (1 - s))
    tl.store(dgate + row * C + column, dg.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * C + column, du.to(dup.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """As kernels.py's SwiGLU."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        g, u = rows_of(gate), rows_of(up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        block, blocks = columns_of(g)
        launch(swiglu_kernel, len(g) * blocks, g, u, out, g.shape[1], blocks, g.stride(0),
               u.stride(0), WIDE=wide_type(gate.dtype), BLOCK=block)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        g, u, grad = rows_of(gate), rows_of(up), rows_of(grad)
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        block, blocks = columns_of(g)
        launch(swiglu_grad_kernel, len(g) * blocks, g, u, grad, dgate, dup, g.shape[1], blocks,
               g.stride(0), u.stride(0), grad.stride(0), WIDE=wide_type(gate.dtype), BLOCK=block)
        return dgate, dup


def columns_of(rows: Tensor) -> tuple[int, int]:
    """Return how many columns a program takes, and how many programs a row needs."""
    block = min(1024, triton.next_power_of_2(rows.shape[1]))
    return block, triton.cdiv(rows.shape[1], block)


@triton.jit
def rotation_kernel(x, cos, sin, out, R, H, HALF, x_token, x_head, WIDE: tl.constexpr,
                    BACK: tl.constexpr, READS_PAIRS: tl.constexpr, WRITES_PAIRS: tl.constexpr,
                    ROWS: tl.constexpr, DIMS: tl.constexpr):
    """(a cos - b sin, b cos + a sin); backward the same with -sin. A row is a head of a token.

    The dims a and b of a pair are neighbours (PAIRS), or lie in the two halves of a head.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    token, head = row // H, row % H
    inside = (row < R) & (dim < HALF)
    c = tl.load(cos + token * 2 * HALF + dim, mask=inside, other=0.0).to(WIDE)
    s = tl.load(sin + token * 2 * HALF + dim, mask=inside, other=0.0).to(WIDE)
    if BACK:
        s = -s
    first = x + token * x_token + head * x_head + (2 * dim if READS_PAIRS else dim)
    a = tl.load(first, mask=inside, other=0.0).to(WIDE)
    b = tl.load(first + (1 if READS_PAIRS else HALF), mask=inside, other=0.0).to(WIDE)
    at = out + row * 2 * HALF + (2 * dim if WRITES_PAIRS else dim)
    tl.store(at, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    at += 1 if WRITES_PAIRS else HALF
    tl.store(at, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


class Rotation(torch.autograd.Function):
    """As kernels.py's Rotation of x (T, H, D) by tables (T, 1, D), whose two halves are equal; but
    in the type of x, which is what attention takes: the plain form's is wider and rounded there."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotated(x, cos, sin, READS_PAIRS=interleaved, WRITES_PAIRS=False, BACK=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = rotated(grad, cos, sin, READS_PAIRS=False, WRITES_PAIRS=ctx.interleaved, BACK=True)
        return dx, None, None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, **how: bool) -> Tensor:  # (T, H, D)
    T, H, D = x.shape
    assert cos.shape == sin.shape == (T, 1, D), (cos.shape, sin.shape, x.shape)
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dims = triton.next_power_of_2(D // 2)
    rows = max(1, TILE // 2 // dims)
    launch(rotation_kernel, triton.cdiv(T * H, rows), x, cos, sin, out, T * H, H, D // 2,
           x.stride(0), x.stride(1), WIDE=wide_type(torch.promote_types(x.dtype, cos.dtype)),
           ROWS=rows, DIMS=dims, **how)
    return out
