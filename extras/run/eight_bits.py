"""Moments in 8 bits: blocks of 256 elements, each with its largest magnitude, and the dynamic code
of bitsandbytes (arXiv:2110.02861).

A code is an index into 256 sorted values in [-1, 1], or in [0, 1] for second moments, which are
never negative. The values have a power of ten and a fraction; the larger they are, the finer the
fraction. An element is its block's largest magnitude times its code's value.

Blocks are counted on the flattened whole tensor, whichever rank holds the elements. So results do
not depend on how FSDP cuts a tensor, and a checkpoint is bitsandbytes' state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


def dynamic_code(signed: bool) -> Tensor:  # (256,)
    """Return the values of the codes, ascending.

    For e = 0 .. 6 the magnitudes in (0.1, 1) 10^(e - 6) are the middles of 2^e equal parts
    (unsigned: of 2^(e + 1)); then come 0 and 1. There is no -1.
    """
    values = [0.0, 1.0]
    for e in range(7):
        parts = 2**e if signed else 2 ** (e + 1)
        ends = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        middles = ((ends[:-1] + ends[1:]) / 2).mul(10 ** (e - 6)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def blocked(x: Tensor, lead: int) -> Tensor:  # (blocks, 256)
    """Lay elements in their blocks; the first stands at position `lead` of its block.

    Elements that are not there are 0.
    """
    return F.pad(x, (lead, -(lead + len(x)) % BLOCK)).view(-1, BLOCK)


def largest(x: Tensor, lead: int) -> Tensor:  # (blocks,)
    """Return the largest magnitude of each block."""
    return blocked(x, lead).abs().amax(1)


def encode(x: Tensor, absmax: Tensor, code: Tensor, lead: int) -> Tensor:  # (n,) uint8
    """Return the code nearest to each element over the largest magnitude of its block."""
    scale = 1 / absmax.clamp(min=torch.finfo(absmax.dtype).tiny)  # a block of zeros stays zero
    bounds = (code[:-1] + code[1:]) / 2
    found = torch.bucketize(blocked(x, lead) * scale[:, None], bounds, out_int32=True)
    return found.to(torch.uint8).view(-1)[lead : lead + len(x)]


def decode(codes: Tensor, absmax: Tensor, code: Tensor, lead: int) -> Tensor:  # (n,)
    values = code[blocked(codes, lead).int()]
    return values.mul_(absmax[:, None]).view(-1)[lead : lead + len(codes)]
