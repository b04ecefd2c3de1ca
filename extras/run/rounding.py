"""Stochastic rounding to bfloat16, with random bits that are a function of (seed, step, tensor,
element) alone.

Rounded to nearest, a bfloat16 weight ignores every step below 1/512 of it. Rounded up with a
probability equal to the share of the way to the next bfloat16 value, it is right on average
(arXiv:2010.06192): the expectation of `rounded(x, bits)` over uniform bits is x, exactly.

No generator is kept: element i of a tensor gets the i-th output of splitmix64 (Steele, Lea and
Flood, 2014) seeded by the tensor's name and the step. So a shard draws what its elements would
draw in the whole tensor, and a resumed run needs no state.
"""

import hashlib

import torch
from torch import Tensor


def signed(value: int) -> int:
    """Return the int64 with the same 64 bits as an unsigned integer."""
    return value - 2**64 if value >= 2**63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)
FIRST = signed(0xBF58476D1CE4E5B9)
SECOND = signed(0x94D049BB133111EB)


def key_of(seed: int, step: int, name: str) -> int:
    """Return an int64 that stands for a tensor at a step of a run."""
    digest = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def draws(key: int, first: int, count: int, device: torch.device) -> Tensor:  # (count,) int64
    """Return 64 random bits for each of the elements first, first + 1, ...: splitmix64."""
    z = torch.arange(first + 1, first + count + 1, device=device)
    z.mul_(GOLDEN).add_(key)
    z.bitwise_xor_(shifted(z, 30)).mul_(FIRST)
    z.bitwise_xor_(shifted(z, 27)).mul_(SECOND)
    return z.bitwise_xor_(shifted(z, 31))


def shifted(z: Tensor, by: int) -> Tensor:
    """Return z >> by with zeros coming in: torch's shift of a signed integer copies the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def rounded(x: Tensor, bits: Tensor, lane: int = 0) -> Tensor:
    """Round float32 to bfloat16, away from 0 where 16 of the bits carry into the upper half.

    `lane` 0 to 3 says which 16 of the 64 bits.
    """
    sixteen = (bits >> 16 * lane).bitwise_and_(0xFFFF).to(torch.int32)
    upper = sixteen.add_(x.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    return upper.view(torch.float32).to(torch.bfloat16)
