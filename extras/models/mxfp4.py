"""gpt-oss's experts as published, in MXFP4 (OCP Microscaling Formats 1.0), dequantized
as they are read.

A value is one of 16 times 2^(scale - 127), with one scale for 32 values along the input. The files
have blocks (experts, out, in / 32, 16), two values in a byte, the low half first, and scales
(experts, out, in / 32). Every value is a bfloat16 number, and the model is saved dequantized.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parts.weights import Checkpoint

HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = HALF + tuple(-x for x in HALF)  # by the 4 bits
BIAS = 127  # of a scale


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:  # (experts, in, out) bfloat16
    """Return VALUES[4 bits] * 2^(scale - 127), in the layout of transformers' files."""
    pairs = torch.tensor([[VALUES[i % 16], VALUES[i // 16]] for i in range(256)])  # by the byte
    experts, rows, groups, half = blocks.shape
    out = torch.empty(experts, rows, groups * half * 2, dtype=torch.bfloat16)
    for expert, block, scale in zip(out, blocks, scales):  # one at a time: float32 is wide
        values = pairs[block.int()].flatten(-2)  # (out, in / 32, 32)
        expert.copy_(torch.ldexp(values, scale.int()[..., None] - BIAS).flatten(1))
    return out.mT


class Packed:
    """A tensor's slice as safetensors gives it, made of blocks and scales as it is read."""

    def __init__(self, name: str, blocks: Any, scales: Any):
        self.parts = (blocks, scales)
        packed, shape = tuple(blocks.get_shape()), tuple(scales.get_shape())
        kinds = sorted({blocks.get_dtype(), scales.get_dtype()})
        if kinds != ["U8"] or len(packed) != 4 or packed != (*shape, 16):
            raise ValueError(
                f"{name}: blocks {packed} and scales {shape} of {', '.join(kinds)} are not MXFP4; "
                "expected (experts, out, in / 32, 16) and (experts, out, in / 32) of U8")
        experts, rows, groups = shape
        self.shape = (experts, 32 * groups, rows)

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, experts: slice) -> Tensor:
        return dequantize(*(part[experts] for part in self.parts))


class Unpacked:
    """The tensors of all files, read as those of one safetensors file are.

    `parts` are {name: the two names in the files of which it is made}, by `kind`.
    """

    def __init__(
        self, checkpoint: Checkpoint, parts: dict[str, tuple[str, str]], kind: Callable[..., Any],
    ):
        self.directory = checkpoint.directory
        self.files = {file: checkpoint.open(file) for file in sorted({*checkpoint.files.values()})}
        self.home = {n: self.files[file] for n, file in checkpoint.files.items()}
        self.parts = parts
        self.kind = kind

    def keys(self) -> list[str]:
        whole = {part: name for name, found in self.parts.items() for part in found}
        names = [n for opened in self.files.values() for n in opened.offset_keys()]
        return list(dict.fromkeys(whole.get(n, n) for n in names))

    offset_keys = keys

    def get_tensor(self, name: str) -> Tensor:
        if name in self.parts:
            return self.get_slice(name)[:]
        return self.home[name].get_tensor(name)

    def get_slice(self, name: str) -> Any:
        found = [self.home[n].get_slice(n) for n in self.parts.get(name, (name,))]
        if len(found) == 1:
            return found[0]
        try:
            return self.kind(name, *found)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from None


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as it would be in bfloat16. Raises ValueError for half of a tensor."""
    names = checkpoint.files
    parts = {}
    for name in names:
        stem, _, kind = name.rpartition("_")
        if kind in ("blocks", "scales"):
            parts[stem] = (f"{stem}_blocks", f"{stem}_scales")
            for other in parts[stem]:
                if other not in names:
                    raise ValueError(
                        f"{checkpoint.directory}: {name} is there, but {other} is missing")
    return unpacked(checkpoint, parts, Packed)


def unpacked(
    checkpoint: Checkpoint, parts: dict[str, tuple[str, str]], kind: Callable[..., Any],
) -> Checkpoint:
    """Return a checkpoint with the tensors of `parts` made by `kind`, which is not quantized."""
    home = {part: name for name, found in parts.items() for part in found}
    files = {home.get(name, name): file for name, file in checkpoint.files.items()}
    raw = {k: v for k, v in checkpoint.raw_config.items() if k != "quantization_config"}
    if not (raw.get("dtype") or raw.get("torch_dtype")):
        raw["dtype"] = "bfloat16"
    memory = Unpacked(checkpoint, parts, kind)
    return checkpoint._replace(files=files, raw_config=raw, memory=memory)
