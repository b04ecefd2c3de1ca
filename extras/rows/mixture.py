"""Several data sets trained on as one: `datasets:` of a --config file, as TRL 1.16 reads it.

    datasets:
      - path: org/a          # whatever --dataset_name takes
        name: small          # a config
        split: train[:1000]
        columns: [prompt, chosen, rejected]
        fraction: 0.7
      - path: b.jsonl
        fraction: 0.3

Each keeps its rows' order, and they stand one after another. Fractions are shares of the mixture,
which is as large as it can be if no row is taken twice: of a data set whose share is w, the first
round(w N) rows, where N is the least of rows / w. A data set of which rows or columns are taken
becomes a JSONL file in the cache; any other is read where it lies.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from extras.rows.written import row_line, with_paths
from parts.rows import DataError, find_files, raw_rows, user_path
from parts.splits import find_split, is_here
from parts.trl_flags import check_data_sets

BUILDERS = ("json", "csv", "parquet", "arrow")  # paths that only say what data_files are
SLICE = re.compile(r"(?P<name>[\w.-]+)(\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?")


class Slice(NamedTuple):
    """What stands in the brackets of train[10%:1000]; None is the split's begin or end."""

    begin: str | None
    end: str | None

    def rows(self, count: int) -> range:
        """Return which of `count` rows are meant. Raises ValueError for more than there are."""
        first, last = (at_row(bound, count) for bound in self)
        begin = 0 if first is None else first
        end = count if last is None else last
        if not 0 <= begin <= count or not 0 <= end <= count:
            raise ValueError(f"[{self.begin or ''}:{self.end or ''}] of {count} rows")
        return range(begin, max(begin, end))


def at_row(bound: str | None, count: int) -> int | None:
    """Return a bound as a number of rows: percents are rounded, and negative ones count back."""
    if bound is None:
        return None
    number = int(bound.removesuffix("%"))
    if bound.endswith("%"):
        if abs(number) > 100:
            raise ValueError(f"{bound}: at most 100 %")
        number = round(number * count / 100)
    return number + count if number < 0 else number


class Part(NamedTuple):
    """Rows of a data set: those of some files, or a slice of them."""

    name: str  # in messages
    files: list[Path]
    slice: Slice

    @property
    def is_whole(self) -> bool:
        return self.slice == (None, None)

    def rows(self) -> range:
        """Return which rows of the files are meant. Raises ValueError for a slice without any."""
        count = sum(1 for _ in raw_rows(self.files))
        try:
            found = self.slice.rows(count)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if not self.is_whole and not found:
            raise ValueError(f"{self.name}: none of the {count} rows is between these bounds")
        return found


class Mixture:
    """The entries of `datasets`; `files` finds their rows."""

    def __init__(self, entries: list[Any], revision: str | None, stops: bool):
        """`stops`: a row that cannot be read is an error here, else when the rows are tokenized.

        Raises ValueError for entries that cannot be meant.
        """
        self.entries = [plain_entry(entry) for entry in entries]
        check_data_sets(self.entries, "datasets: ")
        self.revision = revision
        self.stops = stops

    @property
    def name(self) -> str:
        return os.path.expanduser(",".join(str(entry["path"]) for entry in self.entries))

    def files(self, cache_dir: Path) -> list[Path]:
        """List the files of the mixture, in its order. Raises ValueError naming the entry."""
        found = [self.parts_of(entry) for entry in self.entries]
        shares = [entry.get("fraction") for entry in self.entries]
        keep: list[int | None] = [None] * len(found)
        if shares[0] is not None:
            counts = [sum(len(part.rows()) for part in parts) for parts in found]
            for entry, count in zip(self.entries, counts, strict=True):
                if entry["fraction"] and not count:
                    raise ValueError(
                        f"datasets: {entry['path']}: no rows, so that a mixture with a fraction of "
                        "them has none either; leave it out, or give fraction 0")
            keep = list(shares_of(counts, shares))
        files = []
        for entry, parts, most in zip(self.entries, found, keep, strict=True):
            columns = entry.get("columns")
            is_whole = all(part.is_whole for part in parts)
            if most is None and columns is None and is_whole:
                files += [file for part in parts for file in part.files]
            elif most != 0:
                rows = islice(self.read(parts), most)
                files.append(self.write(entry, rows, cache_dir))
        return files

    def parts_of(self, entry: dict) -> list[Part]:
        """Find the files of an entry, by split: `a[:10%]+b` has two."""
        parts = []
        for one in str(entry.get("split") or "train").split("+"):
            match = SLICE.fullmatch(one.strip())
            if not match:
                raise ValueError(
                    f"datasets: {entry['path']}: split {one.strip()!r}: expected a name, or one "
                    "with rows or percents, such as train[:1000] or train[10%:20%]")
            files = self.find(entry, match["name"])
            name = f"datasets: {entry['path']}: split {one.strip()}"
            parts.append(Part(name, files, Slice(match["begin"], match["end"])))
        return parts

    def find(self, entry: dict, split: str) -> list[Path]:
        path = str(entry["path"])
        files = entry.get("data_files")
        if isinstance(files, dict):
            if split not in files:
                raise ValueError(
                    f"datasets: {path}: no split {split!r}; data_files has {', '.join(files)}")
            files = files[split]
        if files is not None:
            folder = user_path("" if path in BUILDERS else path)
            names = [files] if isinstance(files, str) else files
            return find_files([folder / user_path(name) for name in names])
        if is_here(path, self.revision):
            return find_split(path, entry.get("name"), split)
        from extras.hub import client

        return client.local_dataset(path, entry.get("name"), split, self.revision)

    # Rows

    def read(self, parts: list[Part]) -> Iterator[tuple[str, Any]]:
        for part in parts:
            whole = raw_rows(part.files)
            if part.is_whole:
                yield from whole
            else:
                rows = part.rows()
                yield from islice(whole, rows.start, rows.stop)

    def write(self, entry: dict, rows: Iterator[tuple[str, Any]], cache_dir: Path) -> Path:
        """Write rows to a JSONL file in the cache, named after its content: line n is row n - 1."""
        cache_dir.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        columns = entry.get("columns")
        seen: set[str] = set()
        with tempfile.NamedTemporaryFile(
                "wb", dir=cache_dir, prefix="rows.part-", delete=False) as f:
            try:
                for number, (place, row) in enumerate(rows):
                    line = self.line(number, place, row, columns, seen)
                    f.write(line)
                    digest.update(line)
                missing = sorted(set(columns or ()) - seen)
                if missing:
                    raise ValueError(
                        f"datasets: {entry['path']}: columns: no row has {', '.join(missing)}")
            except BaseException:
                os.unlink(f.name)
                raise
        stem = re.sub(r"\W+", "-", Path(str(entry["path"])).name)
        target = cache_dir / f"rows-{stem}-{digest.hexdigest()[:16]}.jsonl"
        os.replace(f.name, target)
        return target

    def line(
        self, number: int, place: str, row: Any, columns: list[str] | None, seen: set[str],
    ) -> bytes:
        """Encode a row, or, where it could not be read, raise its error or keep it as a bad row."""
        if isinstance(row, DataError):
            if self.stops:
                raise DataError(f"{place}: {row}")
            return b'"a row that could not be read"\n'
        seen.update(row)
        if columns is not None:
            row = {name: value for name, value in row.items() if name in columns}
        folder = Path(place.rpartition(":")[0]).resolve().parent
        return row_line(number, with_paths(row, lambda path: str(folder / path)))


def shares_of(counts: list[int], fractions: list[float]) -> Iterator[int]:
    """Yield how many rows of each data set are taken: TRL's numbers."""
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(count / weight for count, weight in zip(counts, weights) if weight > 0)
    for weight in weights:
        yield round(weight * total)


def plain_entry(entry: Any) -> Any:
    """Return TRL's DatasetConfig as a dict, and all else as it is."""
    if isinstance(entry, dict) or not hasattr(entry, "path"):
        return entry
    return {name: value for name, value in vars(entry).items() if value is not None}
