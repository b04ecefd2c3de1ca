"""JSON and safetensors files, with errors that name the file."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' names of types
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool}


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises ValueError naming a file that is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # half of a surrogate pair, which UTF-8 cannot hold, is written as JSON escapes it
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def open_safetensors(path: Path) -> Any:
    """Open a file to read its tensors one by one. Raises ValueError naming one that is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        message = f"{path}: not a complete safetensors file ({error}); download it again"
        raise ValueError(message) from None


def write_tensors(
    path: Path, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[Tensor],
) -> None:
    """Write a safetensors file as a stream: never more than one of `tensors` is in memory.

    `kinds` gives each one's name, shape and type, in the order in which they come.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in kinds.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            f.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """A safetensors file whose tensors are read one by one; nothing of it stays in memory."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            self.header = json.loads(f.read(size))
        self.begin = 8 + size
        self.header.pop("__metadata__", None)

    def read(self, name: str) -> Tensor:
        entry = self.header[name]
        start, end = entry["data_offsets"]
        raw = torch.empty(end - start, dtype=torch.uint8)
        with open(self.path, "rb") as f:
            f.seek(self.begin + start)
            if f.readinto(raw.numpy()) != len(raw):
                raise OSError(f"{self.path}: the file ends within {name}")
        return raw.view(TYPES[entry["dtype"]]).view(entry["shape"])
