"""Weights in FP8 with a scale for each block, dequantized as they are read: DeepSeek-V3, Kimi K2,
Qwen3's -FP8 files.

A value is a float8 (4 bits of exponent, 3 of mantissa) times the scale of its block, most often of
128 x 128 values: beside NAME (out, in) the files have NAME_scale_inv, the blocks' scales. The last
row and column of blocks need not be full. The products are rounded to bfloat16, and the model is
saved dequantized.
"""

from functools import partial
from typing import Any

from torch import Tensor

from extras.models.mxfp4 import unpacked
from parts.weights import FLOATS, Checkpoint

SCALES = "_scale_inv"


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:  # bfloat16
    """Return values (rows, columns) times their blocks' scales; the first row begins a block."""
    rows, columns = values.shape
    wide = scales.float().repeat_interleave(block[0], 0)[:rows]
    wide = wide.repeat_interleave(block[1], 1)[:, :columns]
    return wide.mul_(values.float()).bfloat16()


class Packed:
    """A tensor's slice as safetensors gives it, made of values and scales as it is read."""

    def __init__(self, name: str, values: Any, scales: Any, block: tuple[int, int]):
        self.parts = (values, scales)
        self.block = block
        self.shape, found = tuple(values.get_shape()), tuple(scales.get_shape())
        wanted = tuple(-(-size // side) for size, side in zip(self.shape, block))
        kind, scale = values.get_dtype(), scales.get_dtype()
        is_known = kind == "F8_E4M3" and scale in FLOATS
        if not is_known or len(self.shape) != 2 or found != wanted:
            raise ValueError(
                f"{name}: {kind} {self.shape} with scales {scale} {found}; expected F8_E4M3 (out, "
                f"in) with a scale, a float, for each block of {block[0]} x {block[1]}")

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, rows: slice) -> Tensor:
        values, scales = self.parts
        start, stop, _ = rows.indices(self.shape[0])
        side = self.block[0]
        first = start // side  # whole blocks
        blocks = scales[first : -(-stop // side)]
        return dequantize(values[first * side : stop], blocks, self.block)[start - first * side :]


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as it would be in bfloat16. Raises ValueError for half of a tensor."""
    rows, columns = checkpoint.raw_config["quantization_config"]["weight_block_size"]
    names = checkpoint.files
    parts = {}
    for name in names:
        stem = name.removesuffix(SCALES)
        if stem != name:
            if stem not in names:
                raise ValueError(
                    f"{checkpoint.directory}: {name} is there, but {stem} is missing")
            parts[stem] = (stem, name)
    return unpacked(checkpoint, parts, partial(Packed, block=(rows, columns)))
