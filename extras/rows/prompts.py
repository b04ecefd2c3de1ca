"""Prompts with their images, as chat and --generate_during_eval answer them."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from data import Tokenizer
from extras.decoder.in_stream import Pictures
from extras.rows.pictures import RowImage, expand, of_prompt, open_rows, prepare, row_references
from extras.rows.written import prompt_fields
from parts.conversations import chat_texts
from parts.rows import DataError, find_files, read_rows
from parts.turns import parse_turns, split_row


class Asked(NamedTuple):
    """A prompt, text or messages, and the images that it has places for."""

    prompt: str | list[dict]
    images: tuple[RowImage, ...] = ()
    where: str = ""  # file and line, where it has one
    more: Mapping[str, Any] = MappingProxyType({})  # what its row has beside it: prompt_fields


class Encoded(NamedTuple):
    """A prompt as a model reads it, up to the answer."""

    text: str
    ids: list[int]
    pictures: Pictures | None = None


def read_prompts(path: str) -> Iterator[Asked]:
    """Yield the prompts of a file's rows. Raises DataError naming the line."""
    for where, row in read_rows(find_files(path)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = parse_turns(row, "prompt") if "prompt" in row else split_row(row, True)[0]
            if not prompt:
                raise DataError('"prompt" is empty')
            images = ()
            whole = row | {"prompt": prompt}  # which may be from another key
            if row_references(whole):
                opened = open_rows([whole], [where])[0]
                if isinstance(opened, DataError):
                    raise opened
                images = tuple(opened["images"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        yield Asked(prompt, images, where, prompt_fields(row))


def encode_asked(tokenizer: Tokenizer, asked: Asked) -> Encoded:
    """Encode a prompt; messages go through the chat template, as in training.

    Raises DataError for images that the model cannot read, or that have no place.
    """
    try:
        return encode(tokenizer, asked.prompt, asked.images, dict(asked.more))
    except DataError as error:
        raise DataError(f"{asked.where}: {error}" if asked.where else str(error)) from None


def encode(
    tokenizer: Tokenizer, prompt: str | list[dict], images: tuple[RowImage, ...], more: dict
) -> Encoded:
    processor = tokenizer.pictures
    if processor is not None:
        row, images = prepare({"prompt": prompt, "images": images}, processor)
        prompt = row["prompt"]
    elif images:
        raise DataError("the prompt has images, and the model reads none")
    is_text = isinstance(prompt, str)
    text = prompt if isinstance(prompt, str) else chat_texts(more, prompt, [], tokenizer)[0]
    spelled = text if processor is None else expand([text], images, processor)[0]
    ids = tokenizer.encode(spelled, add_special_tokens=is_text)
    if is_text and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # some tokenizers end every text with EOS, and nothing would follow that
    return Encoded(text, ids, of_prompt(ids, images, processor) if images else None)
