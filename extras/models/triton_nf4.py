"""4-bit weights dequantized in one pass on a GPU; nf4.py's plain form goes over them four times.
A leaf: nf4.py imports it where Triton runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parts.triton_layers import launch

BLOCK = 1024  # bytes that a program takes: two values each


@triton.jit
def dequantize_kernel(packed, scales, code, out, N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """level * absmax in float32, rounded once.

    No sum follows the product that a GPU could fuse with it: the bits are those of the plain form.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = start + tl.arange(0, BLOCK)
    inside = 2 * byte < N
    number = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + 2 * byte // SIZE, mask=inside, other=0.0)
    high = tl.load(code + (number >> 4)) * scale
    low = tl.load(code + (number & 15)) * scale
    at = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + at, tl.interleave(high, low).to(out.dtype.element_ty), mask=at < N)


def dequantize(packed: Tensor, scales: Tensor, code: Tensor, size: int, shape: tuple[int, ...],
               dtype: torch.dtype) -> Tensor:
    """Return code[4 bits] * scale of each value, in `shape`, as nf4.py's `dequantize`.

    `packed` has two values in a byte, the high half first; `size` values share a scale.
    """
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    N = out.numel()
    launch(dequantize_kernel, triton.cdiv(N, 2 * BLOCK), packed.contiguous(), scales.contiguous(),
           code, out, N, SIZE=size, BLOCK=BLOCK)
    return out
