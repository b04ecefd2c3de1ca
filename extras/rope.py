"""Rotary frequencies for stretched contexts: YaRN (arXiv:2309.00071) and LongRoPE (arXiv:2402.13753)."""

import math
from typing import Optional

import torch
from torch import Tensor


def scaled_rope(kind: str, rope: dict, freq: Tensor, max_length: Optional[int]) -> tuple:
    """(frequencies, factor on cos and sin, limit in tokens or None) from the plain frequencies `freq` (dim/2,)."""
    return yarn(rope, freq) if kind == "yarn" else longrope(rope, freq, max_length)


def yarn(rope: dict, freq: Tensor) -> tuple:
    """Dims that turn more than `beta_fast` times within the pretraining length are kept, those that turn less than
    `beta_slow` times are divided by `factor`, with a linear ramp between (section 3.2); factor 0.1 ln(s) + 1 (eq. 15).
    """
    scale, half = rope["factor"], len(freq)

    def turning(times: float) -> float:  # the dim that turns so many times within the pretraining length
        base, length = rope["rope_theta"], rope["original_max_position_embeddings"]
        return half * math.log(length / (times * 2 * math.pi)) / math.log(base)

    low, high = turning(rope.get("beta_fast") or 32), turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return tuple((freq / scale * stretched + freq * (1 - stretched)).tolist()), yarn_factor(rope), None


def yarn_factor(rope: dict) -> float:
    """`attention_factor` where given; else of the two `mscale` of DeepSeek; else the paper's."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = lambda m: 0.1 * m * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return factor(rope["mscale"]) / factor(rope["mscale_all_dim"])
    return factor(1)


def longrope(rope: dict, freq: Tensor, max_length: Optional[int]) -> tuple:
    """Each dim is stretched by its own number: `short_factor` for sequences up to the pretraining length, `long_factor`
    beyond. `max_length` decides for the whole run; None is short, and longer sequences are then out of bounds.
    """
    original = rope["original_max_position_embeddings"]
    long = max_length is not None and max_length > original
    stretch = torch.tensor(rope["long_factor" if long else "short_factor"], dtype=torch.float32)
    if len(stretch) != len(freq):
        raise ValueError(f"config.json: longrope has {len(stretch)} factors for {len(freq)} rotated pairs of dims")
    factor = rope.get("attention_factor")
    if factor is None:
        scale = rope.get("factor") or rope["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return tuple((freq / stretch).tolist()), factor, None if long else original
