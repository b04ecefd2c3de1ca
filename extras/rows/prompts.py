"""Read the prompts that chat and --generate_during_eval answer from a file."""

from collections.abc import Iterator

from parts.rows import DataError, find_files, read_rows
from parts.turns import parse_turns, split_row


def read_prompts(path: str) -> Iterator[str | list[dict]]:
    """Yield the prompts of a file's rows, text or messages. Raises DataError naming the line."""
    for where, row in read_rows(find_files(path)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = parse_turns(row, "prompt") if "prompt" in row else split_row(row, True)[0]
            if not prompt:
                raise DataError('"prompt" is empty')
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        yield prompt
