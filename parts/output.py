"""Directories a run writes to: output_dir, claimed by one run, and the cache.

A file has its old content or its new, never half of it.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError


def claim(directory: Path) -> IO:
    """Make `directory` and lock it for as long as the returned file is open.

    Raises ValueError, before hours are spent, if it cannot be written to or another process trains
    into it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a+")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--output_dir {directory}: cannot be written to ({why})") from None
    lock.seek(0)
    me = f"{platform.node()} {os.getpid()}"
    holder = lock.read()
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if holder != me:  # an older trainer of this process is not in the way
            raise ValueError(
                f"--output_dir {directory}: another run ({holder}: host, process) writes to it"
            ) from None
    except (ImportError, OSError):  # systems that cannot lock
        pass
    lock.truncate(0)
    lock.write(me)
    lock.flush()
    return lock


def check_apart(flag: str, written: str | Path, read: Iterable[str | Path]) -> None:
    """Raise ValueError where what `flag` says to write is one of what is read: it would be lost."""
    if "\0" in str(written):
        raise ValueError(f"{flag} {written!r}: cannot be written to (a NUL in the name)")
    for path in map(Path, read):
        if Path(written).resolve() == path.resolve():
            raise ValueError(
                f"{flag} {written}: that is read, and would be overwritten; give another name")


@contextmanager
def explained_writing(what: Path | str, scratch: Path | None = None) -> Iterator[None]:
    """Raise OSError that names `what` for one inside, which may name no file; remove `scratch`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            if scratch.is_file():
                scratch.unlink()
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{what}: cannot be written ({why})") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never half of it.

    Raises OSError naming it.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with explained_writing(path, scratch):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)


# Files that a reader of a directory takes for its model.
MODEL_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "model.safetensors",
    "model.safetensors.index.json"}


def replace_model(directory: Path, *writers: Callable[[Path], None]) -> dict:
    """Replace a directory's model files by those that `writers` write; return {}.

    They are written beside the old ones, and then moved to their places one by one. Raises OSError
    naming the directory, whose files stay as they were, where they cannot be written.
    """
    scratch = directory / f".model.{os.getpid()}"
    with explained_writing(f"{directory}: the model", scratch):
        for write in writers:
            write(scratch)
    names = {path.name for path in scratch.iterdir()}
    for path in filter(Path.is_file, scratch.rglob("*")):
        target = directory / path.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(scratch)
    if "config.json" in names:  # files of an earlier run would be read in the model's place
        for name in MODEL_FILES - names:
            (directory / name).unlink(missing_ok=True)
    return {}


def cache_directory(named: str | None) -> Path:
    """Return where tokenized pairs and reference log-probs are cached."""
    return Path(named) if named else Path.home() / ".cache" / "dpo"


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
