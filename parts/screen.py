"""Text that a terminal, file or pipe cannot encode is escaped, so that it ends no run."""

import sys


def escape_unknown() -> None:
    """Have stdout escape the characters that its encoding lacks (PYTHONIOENCODING=ascii)."""
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def can_show(text: str) -> bool:
    """Tell whether stdout's encoding has all characters of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
