"""Refuse options of the data before any row is read."""

from typing import Any

from parts.rows import DataError


def check_options(options: Any) -> None:
    """Raise DataError unless the lengths of data.DataOptions are positive and its mode is known."""
    for name, length in options._asdict().items():
        if name.endswith("_length") and length is not None and length < 1:
            raise DataError(f"{name} is {length}; it must be at least 1, or unset for no limit")
    mode = options.truncation_mode
    if mode not in ("keep_start", "keep_end"):
        raise DataError(f"truncation_mode is {mode!r}; take keep_start or keep_end")
