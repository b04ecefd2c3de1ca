"""JSON and safetensors files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


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


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor unsharded (every rank must call this); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
