"""Write rows as JSON Lines: rows of Python objects, and rows that extras.convert made.

Pictures in memory (PIL images, bytes) become data URIs, numpy values what they stand for, and paths
of pictures keep leading to their files.
"""

import base64
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extras.rows.pictures import pillow, to_rgb
from parts.forms import READ
from parts.rows import NEEDS, DataError

ELSEWHERE = re.compile(r"data:|file:|https?:")
PATH_KEYS = ("image", "image_url", "path", "url")


def json_value(value: Any) -> Any:
    """Turn what JSON lacks into what it has; raise TypeError for what has no such form."""
    if isinstance(value, bytes | bytearray | memoryview):
        return data_uri(bytes(value))
    if hasattr(value, "getbands"):  # a PIL image, written as a picture that a path named is read
        Image, ImageOps = pillow()
        content = io.BytesIO()
        to_rgb(ImageOps.exif_transpose(value), Image).save(content, "PNG")
        return data_uri(content.getvalue())
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def data_uri(content: bytes) -> str:
    return "data:;base64," + base64.b64encode(content).decode()


def row_line(number: int, row: Any) -> bytes:
    """Encode row `number` of Python objects as a line of JSON, its pictures' paths made absolute.

    Columns that training does not read are left out where JSON lacks their values. Raises DataError
    naming the row.
    """
    try:
        row = with_paths(dict(row), os.path.abspath)
        return (to_json(row, ensure_ascii=True) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {number} of the data set cannot be written as JSON ({error}); {NEEDS}, as text "
            "or lists of messages (images as paths, bytes or PIL images)"
        ) from None


def to_json(row: dict, ensure_ascii: bool = False) -> str:
    dumps = json.JSONEncoder(ensure_ascii=ensure_ascii, default=json_value).encode
    try:
        return dumps(row)
    except (TypeError, ValueError):
        return dumps({key: value for key, value in row.items() if key in READ or is_json(value)})


def is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=json_value)
        return True
    except (TypeError, ValueError, RecursionError):
        return False


# Paths of pictures


def with_paths(row: dict, moved: Callable[[str], str]) -> dict:
    """Return the row with each path of a picture replaced by moved(path); URLs stay."""
    row = dict(row)
    for key in ("images", "image"):
        if isinstance(row.get(key), list | tuple):
            row[key] = [with_path(one, moved) for one in row[key]]
        elif row.get(key) is not None:
            row[key] = with_path(row[key], moved)
    for key in ("prompt", "chosen", "rejected", "conversations"):
        if isinstance(row.get(key), list):
            row[key] = [message_with_paths(one, moved) for one in row[key]]
    return row


def prompt_fields(row: dict) -> dict[str, Any]:
    """Return what a row has that belongs to its prompt: images, and what its template reads."""
    keys = ("images", "image", "system", "tools", "chat_template_kwargs")
    return {key: row[key] for key in keys if row.get(key)}


def with_path(reference: Any, moved: Callable[[str], str]) -> Any:
    """Return a reference to a picture (a path, a URI, {"bytes", "path"}) with its path replaced."""
    if isinstance(reference, str) and reference and not ELSEWHERE.match(reference):
        return moved(os.path.expanduser(reference))
    if isinstance(reference, dict):
        held = reference.get("bytes") or reference.get("base64")
        keys = () if held else PATH_KEYS
        return reference | {key: with_path(reference[key], moved) for key in keys if key in reference}
    return reference


def message_with_paths(message: Any, moved: Callable[[str], str]) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    is_picture = lambda part: isinstance(part, dict) and part.get("type") in ("image", "image_url")
    parts = [with_path(part, moved) if is_picture(part) else part for part in message["content"]]
    return message | {"content": parts}


def mover(source: Path, target: Path) -> Callable[[str], str]:
    """Return what makes a path relative to `source` lead to the same file from `target`."""
    if source.resolve() == target.resolve():
        return lambda path: path
    return lambda path: os.path.relpath(absolute(path, source), target.resolve())


def absolute(path: str, folder: Path) -> str:
    """Return a path from the root, its folders without links, which `..` would not lead out of."""
    return str((folder / path).parent.resolve() / Path(path).name)
