"""Weights as DeepSeek-V3's are published, in FP8 with a scale for each block, read as numbers.

A value is a float8 (4 bits of exponent, 3 of mantissa) times the scale of its block, most often of
128 x 128 values: beside NAME (out, in) the files have NAME_scale_inv, the blocks' scales, where the
last row and column of blocks need not be full. So are Qwen3's -FP8 files. The numbers are rounded to
bfloat16, and so the model is saved.
"""

from functools import partial
from typing import Any

from torch import Tensor

from extras.models.mxfp4 import unpacked
from parts.weights import Checkpoint

SCALES = "_scale_inv"


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:  # bfloat16
    """Return values (rows, columns) times the scales of their blocks, the first of which is whole."""
    rows, columns = values.shape
    wide = scales.float().repeat_interleave(block[0], 0)[:rows]
    wide = wide.repeat_interleave(block[1], 1)[:, :columns]
    return wide.mul_(values.float()).bfloat16()


class Packed:
    """A safetensors file's slice of a tensor, of values and scales."""

    def __init__(self, name: str, values: Any, scales: Any, block: tuple[int, int]):
        self.parts = (values, scales)
        self.block = block
        self.shape, found = tuple(values.get_shape()), tuple(scales.get_shape())
        wanted = tuple(-(-size // side) for size, side in zip(self.shape, block))
        kind = values.get_dtype()
        if kind != "F8_E4M3" or len(self.shape) != 2 or found != wanted:
            raise ValueError(
                f"{name}: {kind} {self.shape} with scales {found}; expected F8_E4M3 (out, in) with "
                f"a scale for each block of {block[0]} x {block[1]}")

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, rows: slice) -> Tensor:
        values, scales = self.parts
        start, stop, _ = rows.indices(self.shape[0])
        side = self.block[0]
        first = start // side  # whole blocks
        there = dequantize(values[first * side : stop], scales[first : -(-stop // side)], self.block)
        return there[start - first * side :]


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
