"""Prompts with their images, as chat and --generate_during_eval answer them."""

from collections.abc import Iterator
from typing import NamedTuple

from data import Tokenizer
from extras.decoder.in_stream import Pictures
from extras.rows.pictures import RowImage, expand, of_prompt, open_rows, prepare, row_references
from extras.rows.written import image_fields
from parts.rows import DataError, find_files, read_rows
from parts.turns import parse_turns, split_row


class Asked(NamedTuple):
    """A prompt, text or messages, and the images that it has places for."""

    prompt: str | list[dict]
    images: tuple[RowImage, ...] = ()
    where: str = ""  # file and line, where it has one
    named: dict | None = None  # how its row names the images: written.image_fields


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
            if row_references(row):
                opened = open_rows([row], [where])[0]
                if isinstance(opened, DataError):
                    raise opened
                images = tuple(opened["images"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        yield Asked(prompt, images, where, image_fields(row))


def encode_asked(tokenizer: Tokenizer, asked: Asked) -> Encoded:
    """Encode a prompt; messages go through the chat template.

    Raises DataError for images that the model cannot read, or that have no place.
    """
    try:
        return encode(tokenizer, asked.prompt, asked.images)
    except DataError as error:
        raise DataError(f"{asked.where}: {error}" if asked.where else str(error)) from None


def encode(
    tokenizer: Tokenizer, prompt: str | list[dict], images: tuple[RowImage, ...]
) -> Encoded:
    processor = tokenizer.pictures
    if processor is not None:
        row, images = prepare({"prompt": prompt, "images": images}, processor)
        prompt = row["prompt"]
    elif images:
        raise DataError("the prompt has images, and the model reads none")
    is_text = isinstance(prompt, str)
    if isinstance(prompt, str):
        text = prompt
    else:
        text = tokenizer.render(prompt, add_generation_prompt=True)
    spelled = expand([text], images, processor)[0] if images else text
    ids = tokenizer.encode(spelled, add_special_tokens=is_text)
    if is_text and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # some tokenizers end every text with EOS, and nothing would follow that
    return Encoded(text, ids, of_prompt(ids, images, processor) if images else None)
