"""Preference data: JSONL rows -> checked messages -> token ids -> a memory-mapped store -> one flat stream per forward.

    row    {"prompt": ..., "chosen": ..., "rejected": ...}   text or conversations; the prompt may be implicit
    pair   prompt_ids, chosen_ids, rejected_ids              what `tokenize_pair` makes of a row
    store  all pairs in four memory-mapped arrays            made once by `build_store`, then found again by content
    batch  prompt0 chosen0 rejected0 prompt1 ...             no padding, every prompt once: see `Batch`

To see the data as the trainer sees it (prompt dim, chosen green, rejected red, and what prefix sharing saves):

    python data.py prefs.jsonl --model_name_or_path Qwen2-0.5B-Instruct -n 5

Token ids are TRL 1.16's for every row that has a meaning; a row without one (chosen equal to rejected, an empty
completion, an unknown role), on which TRL trains or crashes, is refused by file and line.
"""

import codecs
import glob
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

NEEDS = "each row needs prompt, chosen, rejected (or chosen and rejected that begin with the same prompt)"
LONGEST_ROW = 2**26  # bytes; what is longer is no row, and is not read into memory
FILE_PATTERNS = ("*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz")


class DataError(ValueError):
    """Unusable input. The message is for the person who made it: where, what was found, what to do."""


class DroppedPair(DataError):
    """A sound row of which truncation leaves nothing to score. Counted and printed, never an error of the data."""


# Rows


def find_files(spec: str | Path | list) -> list[Path]:
    """Files named by a path, a glob, a directory or several of these, in order. Raises DataError where one has none."""
    found: list[Path] = []
    for one in [spec] if isinstance(spec, (str, Path)) else spec:
        path = Path(one).expanduser()
        if path.is_dir():
            matches = sorted({match for pattern in FILE_PATTERNS for match in path.glob(pattern)})
        elif path.is_file():  # whose name may have the characters of a glob
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
        if not matches:
            what = f"no {', '.join(FILE_PATTERNS)} in this directory" if path.is_dir() else "no such file"
            raise DataError(f"{one}: {what}; give a .jsonl or .json file, a directory or a glob")
        found += matches
    return list(dict.fromkeys(found))  # a file that two globs match is read once


def on_hub(name: Any) -> bool:
    """Whether a name of data or of a model is none of a path or glob here, so that the hub is asked."""
    return isinstance(name, str) and not Path(name).expanduser().exists() and not glob.has_magic(name)


def attempt(function: Callable, *arguments) -> Any:
    """What the function returns, or the DataError that it raises: one bad row does not end the others."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


def parse_line(line: bytes) -> dict:
    """One JSON object. Raises DataError on anything else."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON ({error}) in {line[:40]!r}; each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"found a JSON {type(row).__name__}, not an object; {NEEDS}")
    return row


def line_rows(stream: BinaryIO) -> Iterator[tuple[int, dict | DataError]]:
    """JSON Lines as (line number, row); blank lines are skipped."""
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_ROW + 1), b""), 1):
        if len(line) > LONGEST_ROW:
            yield number, DataError(f"a line of more than {LONGEST_ROW >> 20} MiB; nothing after it is read; {NEEDS}")
            return
        if line.strip():
            yield number, attempt(parse_line, line)


def file_rows(path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """(line, row) of one file: gzip is known by its first bytes, a JSON array by its first character."""
    with ExitStack() as stack:
        stream = stack.enter_context(open(path, "rb"))
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        if stream.peek(3)[:3] == codecs.BOM_UTF8:
            stream.read(3)
        rows = line_rows
        if path.suffix == ".parquet":
            from extras.formats import parquet_rows as rows
        elif stream.peek(4096)[:4096].lstrip()[:1] == b"[":
            from extras.formats import array_rows as rows
        yield from rows(stream)


def read_rows(files: Iterable[str | Path]) -> Iterator[tuple[str, dict | DataError]]:
    """Rows of JSONL, JSON-array, gzipped or parquet files as ("prefs.jsonl:17", row), streamed.

    What cannot be read (bad UTF-8, broken JSON, not an object, damaged gzip) comes as a DataError in the row's place.
    """
    for path in map(Path, files):
        number = 0
        try:
            for number, row in file_rows(path):
                yield f"{path}:{number}", row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield f"{path}:{number + 1}", DataError(f"the compressed file is damaged ({error}); fetch it again")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


# The tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "additional_chat_templates/*.jinja", "chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def read_json(path: Path) -> dict:
    """The JSON object in a file, {} where there is none."""
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: a JSON object was expected, found {type(value).__name__}; fetch the file again")
    return value


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer that are there, in a fixed order."""
    return [path for name in TOKENIZER_FILES for path in sorted(directory.glob(name)) if path.is_file()]


def token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def named_tokens(config: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: the usual names, then those that a model adds (image_token, ...)."""
    extra = config.get("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    return {key: token_text(value) for key, value in named.items() if isinstance(token_text(value), str)}


def tokens_to_add(config: dict, known: list[tokenizers.AddedToken]) -> list[tokenizers.AddedToken]:
    """What the configuration adds to tokenizer.json's tokens, or says otherwise of them, as transformers does it."""
    same, named = set(map(repr, known)), list(named_tokens(config).values())
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokens = [token for _, entry in listed if repr(token := tokenizers.AddedToken(**entry)) not in same]
    for token in tokens:
        token.special = token.special or token.content in named
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = [] if isinstance(extra, dict) else map(token_text, extra)
    there = {token.content for token in (*known, *tokens)}
    fresh = [text for text in dict.fromkeys([*named, *extra]) if text not in there]
    return tokens + [tokenizers.AddedToken(text, special=True, normalized=False) for text in fresh]


def load_backend(directory: Path, config: dict) -> tokenizers.Tokenizer:
    """tokenizer.json with the configuration's additions. Raises DataError."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{directory}: no tokenizer.json; "
                        "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...) makes one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise DataError(f"{path}: not a tokenizer file ({error})") from None
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    backend.add_tokens(tokens_to_add(config, list(backend.get_added_tokens_decoder().values())))
    return backend


class Tokenizer:
    """tokenizer.json and the configuration beside it: encodes, decodes, renders conversations by the chat template.

    Equal to PreTrainedTokenizerFast.from_pretrained. For Llama-2 alone transformers 5 rebuilds the pipeline and differs
    from tokenizer.json in the spaces after special tokens; this follows the file, as transformers 4 and others do.
    """

    def __init__(self, directory: str | Path, chat_template: str | None = None):
        self.directory = Path(directory).expanduser()
        config = read_json(self.directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # of the older kind, which the other file overrides
            config |= read_json(self.directory / "special_tokens_map.json")
        self.backend = load_backend(self.directory, config)
        self.special_tokens = named_tokens(config)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = map(self.special_tokens.get, names)
        self.bos_token_id, self.eos_token_id = (
            None if token is None else self.backend.token_to_id(token) for token in (self.bos_token, self.eos_token))
        self.size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        self.chat_template = chat_template
        self.renderer: Any = None  # made by what first needs them
        self.pictures: Any = None
        if any((self.directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            from extras.pictures import load_processor

            self.pictures = load_processor(self.directory, self.backend)  # None where it is not one of pictures
        digest = hashlib.sha256(b"" if chat_template is None else json.dumps(sorted(self.templates.items())).encode())
        for path in tokenizer_files(self.directory):
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()};".encode())
        self.digest = digest.hexdigest()

    @classmethod
    def load(cls, directory: str | Path, chat_template: str | None = None) -> "Tokenizer":
        """The tokenizer of a model directory. Raises DataError where it cannot be used."""
        try:
            return cls(directory, chat_template)
        except (DataError, OSError):
            raise
        except Exception as error:  # a value of the wrong type fails where it is used first, in Python or in Rust
            raise DataError(f"{directory}: the tokenizer's files hold a value of another type than expected "
                            f"({error!r:.200}); fetch them again") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; the special tokens added are those of the tokenizer's own post-processor (a BOS, mostly)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    @cached_property
    def templates(self) -> dict[str, str]:
        """{name: source} of the chat templates there are; "default" is the one that is used."""
        from extras.conversations import choose_templates, find_templates

        return choose_templates(find_templates(self.directory), self.chat_template)

    def render(self, messages: list[dict], add_generation_prompt: bool = False, tools=None, **kwargs) -> str:
        """A conversation as the template's text; `kwargs` are the template's. Raises DataError with its message."""
        from extras.conversations import render

        (text,) = render(self, [(messages, add_generation_prompt)], tools, **kwargs)
        return text

    def save(self, directory: str | Path):
        """Copies the tokenizer's files byte for byte; templates that the user chose take the place of its own."""
        chosen = {} if self.chat_template is None else self.templates
        for path in tokenizer_files(self.directory):
            target = Path(directory) / path.relative_to(self.directory)
            if target.resolve() != path.resolve() and not (chosen and path.suffix == ".jinja"):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        for name, source in chosen.items():
            file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            target = Path(directory) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source, "utf-8", newline="")


# From a row to a pair of token ids

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
RATINGS = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"))
REASONING = ("reasoning_content", "thinking", "reasoning")


class DataOptions(NamedTuple):
    """All that changes the token ids of a pair, beside the tokenizer. Lengths in tokens, None for no limit."""

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"  # or "keep_end"
    need_rejected: bool = True  # False where only chosen completions are trained on (loss_type sft alone)


class Pair(NamedTuple):
    """One prompt with two completions, as int32 token ids."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    rejected_prompt_ids: np.ndarray | None = None  # None: the same prompt; else the pair is two whole sequences
    chosen_rating: float = math.nan  # the row's own score, where it has one
    rejected_rating: float = math.nan
    flags: tuple[str, ...] = ()  # what the report counts
    pictures: tuple = ()  # of extras/pictures.py, in the order of the prompt


class RowTexts(NamedTuple):
    """What is tokenized of a row."""

    texts: list[str]  # the prompt alone, then the prompt with each completion
    add_special_tokens: bool  # to text; a chat template writes its own
    ratings: tuple[float, float]


def check_options(options: DataOptions):
    """Raises DataError unless lengths are positive and the mode is known."""
    for name, length in options._asdict().items():
        if name.endswith("_length") and length is not None and length < 1:
            raise DataError(f"{name} is {length}; it must be at least 1, or unset for no limit")
    if options.truncation_mode not in ("keep_start", "keep_end"):
        raise DataError(f"truncation_mode is {options.truncation_mode!r}; take keep_start or keep_end")


def parse_message(message: Any, where: str) -> dict:
    """A message in role/content form. Raises DataError naming the role or the type that was found."""
    if not isinstance(message, dict):
        raise DataError(f'{where} is a {type(message).__name__}; a message is {{"role": ..., "content": ...}}')
    if "from" in message and "role" not in message:
        from extras.formats import from_value_message

        message = from_value_message(message, where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    is_parts = isinstance(content, list) and all(isinstance(part, (dict, str)) for part in content)
    if not (isinstance(content, str) or is_parts or (content is None and message.get("tool_calls"))):
        raise DataError(f"{where} has a content of type {type(content).__name__}; give text or a list of parts")
    return message


def parse_turns(row: dict, key: str) -> str | list[dict]:
    """row[key] as text or as a list of messages (a single message counts as a list of one)."""
    if key not in row:
        raise DataError(f'"{key}" is missing; {NEEDS}')
    value = row[key]
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f'"{key}" is {kind}; it must be text or a list of messages')
    return [parse_message(message, f'"{key}"[{index}]') for index, message in enumerate(messages)]


def common_prefix_length(left, right) -> int:
    """How many first tokens, characters or messages are equal."""
    shortest = min(len(left), len(right))
    if left[:shortest] == right[:shortest]:  # the usual case, at C's speed
        return shortest
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def extract_prompt(chosen, rejected):
    """(prompt, chosen, rejected) of two texts or conversations that begin alike: TRL's rule.

    The completions begin at the first character (or message) that differs, or at the space before it, since tokens
    carry the space in front of a word. Where one begins the other, its last character (message) is its completion.
    """
    at, shortest = common_prefix_length(chosen, rejected), min(len(chosen), len(rejected))
    if at > 0 and (at == shortest or chosen[at - 1] == " "):
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def split_row(row: dict, need_rejected: bool):
    """(prompt, chosen, rejected) as texts or lists of messages; rejected None where it is neither there nor needed."""
    key = next((key for key in ("prompt", "conversations") if key in row), None)
    optional = not need_rejected and key and "rejected" not in row
    chosen, rejected = parse_turns(row, "chosen"), None if optional else parse_turns(row, "rejected")
    if rejected is not None and type(chosen) is not type(rejected):
        raise DataError("one of chosen and rejected is text, the other a conversation; make them alike")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same; there is no preference to learn, remove the row")
    prompt = parse_turns(row, key) if key else None
    if key and type(prompt) is type(chosen):
        return prompt, chosen, rejected
    whole = isinstance(chosen, list) and rejected is not None and chosen[:1] == rejected[:1]
    if key and not (isinstance(prompt, str) and whole):  # a text prompt beside whole conversations repeats their start
        raise DataError("one of prompt and chosen is text, the other a conversation; make them alike")
    for name in ("instruction", "question", "query"):
        if not key and isinstance(row.get(name), str) and row[name] not in str(row["chosen"]):
            raise DataError(f'"prompt" is missing, but "{name}" is there; rename it to "prompt"')
    return extract_prompt(chosen, rejected)


def is_empty(completion: str | list[dict]) -> bool:
    """No text; no message; or a last message that says nothing and calls nothing."""
    if isinstance(completion, str) or not completion:
        return not completion
    return not any(completion[-1].get(key) for key in ("content", "tool_calls", *REASONING))


def parse_ratings(row: dict) -> tuple[float, float]:
    """The row's (chosen, rejected) scores, nan where absent."""
    keys = next((keys for keys in RATINGS if keys[0] in row or keys[1] in row), RATINGS[0])
    scores = {key: row[key] for key in keys if row.get(key) is not None}
    for key, score in scores.items():
        if type(score) not in (int, float) or not abs(score) < 1e38:  # float32's range, and no nan
            raise DataError(f'"{key}" is {repr(score)[:40]}; a score is a finite number')
    return tuple(float(scores.get(key, math.nan)) for key in keys)


def plain_texts(row: dict, prompt: str, completions: list[str], tokenizer: Tokenizer) -> list[str]:
    """The prompt, then prompt + completion, each ending with EOS."""
    for key in ("system", "tools"):
        if row.get(key):
            raise DataError(f'"{key}" is set, but the prompt is text; write it into the prompt, or give conversations')
    eos = tokenizer.eos_token
    if eos is None:
        raise DataError("the tokenizer has no eos_token, so an answer has no end; set it in tokenizer_config.json")
    return [prompt, *(prompt + text + ("" if text.endswith(eos) else eos) for text in completions)]


def row_texts(row: dict, tokenizer: Tokenizer, options: DataOptions) -> RowTexts:
    """Checks a row and renders it. Raises DataError saying what was found and what to do."""
    if row.get("images") or row.get("image"):
        raise DataError("the row has images, but this is a text run; remove them, or train a vision model "
                        "(with its preprocessor_config.json)")
    prompt, chosen, rejected = split_row(row, options.need_rejected)
    completions = [chosen] if rejected is None else [chosen, rejected]
    for name, completion in zip(("chosen", "rejected"), completions, strict=False):
        if is_empty(completion):
            raise DataError(f'the completion of "{name}" is empty; give an answer, or remove the row')
    is_plain = isinstance(prompt, str)
    if is_plain:
        texts = plain_texts(row, prompt, completions, tokenizer)
    else:
        from extras.conversations import chat_texts

        texts = chat_texts(row, prompt, completions, tokenizer)
    if re.search("[\ud800-\udfff]", "".join(texts)):
        raise DataError("the text has half of a surrogate pair (\\ud83d alone, say); write whole characters")
    return RowTexts(texts, is_plain, parse_ratings(row))


def truncate(prompt: list[int], completions: list[list[int]], options: DataOptions) -> list[tuple[list, list]]:
    """[(prompt, completion)] after max_prompt_length, max_completion_length and max_length. Raises DroppedPair.

    max_prompt_length keeps the prompt's last tokens, max_completion_length a completion's first, as in TRL 0.18;
    max_length the first or the last of both together, by truncation_mode.
    """
    keeps_start, limit = options.truncation_mode == "keep_start", options.max_length or sys.maxsize
    prompt = prompt[-(options.max_prompt_length or sys.maxsize) :]
    if keeps_start and len(prompt) >= limit:
        raise DroppedPair("the prompt alone fills max_length")
    sequences = []
    for completion in completions:
        whole = prompt + completion[: options.max_completion_length]
        begin = 0 if keeps_start else max(0, len(whole) - limit)
        border = max(begin, len(prompt))
        sequences.append((whole[begin:border], whole[border : begin + limit]))
    if any(len(prompt) + len(completion) < 2 for prompt, completion in sequences):
        raise DroppedPair("truncation leaves nothing to score")
    return sequences


def make_pair(ids: list[list[int]], ratings: tuple[float, float], options: DataOptions) -> Pair:
    """A Pair from the token ids of prompt, prompt + chosen, prompt + rejected.

    A completion begins at the first token where they differ, which is earlier than the prompt's end where tokens merge
    across the boundary or the template renders the prompt alone differently (TRL's rule).
    """
    head, *wholes = ids
    length = min(common_prefix_length(head, whole) for whole in wholes)
    if any(len(whole) <= max(length, 1) for whole in wholes):
        raise DataError("a completion adds no token that could be scored; remove the row, or check the chat template")
    if len(wholes) == 2 and wholes[0] == wholes[1]:
        raise DataError("chosen and rejected are the same tokens; there is no preference to learn, remove the row")
    sequences = truncate(head[:length], [whole[length:] for whole in wholes], options)
    (prompt, chosen), (other, rejected) = sequences[0], sequences[-1]
    flags = {
        "unclean_prefix": length < len(head),
        "truncated": any(len(p) + len(c) < len(whole) for (p, c), whole in zip(sequences, wholes, strict=True)),
        "same_after_truncation": len(wholes) == 2 and sequences[0] == sequences[1]}
    if not options.need_rejected:
        other, rejected = prompt, []
    arrays = [np.asarray(part, np.int32) for part in (prompt, chosen, rejected)]
    own_prompt = None if prompt == other else np.asarray(other, np.int32)
    return Pair(*arrays, own_prompt, *ratings, tuple(name for name, is_so in flags.items() if is_so))


def tokenize_rows(rows: list[dict | DataError], tokenizer: Tokenizer, options: DataOptions) -> list[Pair | DataError]:
    """Rows as pairs; an error stands in its row's place."""
    if tokenizer.pictures is not None:
        from extras.pictures import tokenize_rows

        return tokenize_rows(rows, tokenizer, options)
    return encode_rows([row if isinstance(row, DataError) else attempt(row_texts, row, tokenizer, options)
                        for row in rows], tokenizer, options)


def encode_rows(outcomes: list[RowTexts | DataError], tokenizer: Tokenizer,
                options: DataOptions) -> list[Pair | DataError]:
    """Texts as pairs, by two calls of the tokenizer, which uses all cores."""
    for special in (True, False):
        places = [i for i, o in enumerate(outcomes) if isinstance(o, RowTexts) and o.add_special_tokens == special]
        encoded = iter(tokenizer.encode_batch([text for i in places for text in outcomes[i].texts], special))
        for i in places:
            ids = list(islice(encoded, len(outcomes[i].texts)))
            outcomes[i] = attempt(make_pair, ids, outcomes[i].ratings, options)
    return outcomes


def tokenize_pair(row: dict, tokenizer: Tokenizer, options: DataOptions) -> Pair:
    """One row as token ids. Raises DataError (what was found, what to do), DroppedPair where nothing is left of it."""
    (outcome,) = tokenize_rows([row], tokenizer, options)
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


# The store

STORE_VERSION = 2  # part of the digest: to be raised when the same rows would give other arrays
ARRAYS = {"tokens": (np.int32, 1), "lengths": (np.int32, 4), "ratings": (np.float32, 2), "places": (np.int64, 2),
          "ends": (np.int64, 1)}
CHUNK_ROWS = 256
LARGE_FILE = 2**28  # bytes, which take about a second to hash


class PairStore:
    """All pairs of a data set, read-only in memory-mapped arrays; made by `build_store`.

    On disk: the pairs one after another as they lie in a Batch (prompt chosen rejected; where the prompts differ prompt
    chosen rejected_prompt rejected), and per pair their four lengths (rejected_prompt -1: shared) and where they end.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / "meta.json").read_text("utf-8"))
            self.stream, table, self.ratings, self.places, ends = (
                np.memmap(self.directory / f"{name}.bin", dtype, mode="r").reshape(-1, width)
                for name, (dtype, width) in ARRAYS.items())
            if not len(table) == len(self.ratings) == len(self.places) == len(ends) or ends[-1, 0] != len(self.stream):
                raise ValueError("arrays of unequal length")
        except (OSError, ValueError) as error:
            raise DataError(f"{directory}: damaged token store ({error}); remove it, it will be made again") from None
        self.files, self.digest, self.report = meta["files"], meta["digest"], meta["report"]
        self.pictures = meta.get("pictures")  # read by extras/pictures.py
        self.lengths, self.rejected_prompt_lengths = table[:, :3], table[:, 3]  # (n, 3), (n,)
        self.ends = ends[:, 0]  # (n,)
        self.tokens = np.diff(self.ends, prepend=0)  # (n,)

    @classmethod
    def open(cls, directory: str | Path) -> "PairStore":
        """The store that `build_store` made in this directory."""
        return cls(directory)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Pair:
        prompt, chosen, rejected = self.lengths[index].tolist()
        ids = np.asarray(self.stream[self.ends[index] - self.tokens[index] : self.ends[index], 0])
        prompt_ids, chosen_ids, own_prompt, rejected_ids = np.split(ids, [prompt, prompt + chosen, len(ids) - rejected])
        own_prompt = None if self.rejected_prompt_lengths[index] < 0 else own_prompt
        return Pair(prompt_ids, chosen_ids, rejected_ids, own_prompt, *self.ratings[index].tolist())

    def where(self, index: int) -> str:
        """File and line of a pair, for messages."""
        file, line = self.places[index]
        return f"{self.files[file]}:{line}"


Outcome = tuple[str, Pair | DataError]  # of a row: where it is, what became of it


def count_outcome(report: dict, place: str, outcome: Pair | DataError):
    """Adds one row to the report, which keeps the first place of each kind and the first hundred bad rows."""
    report["rows"] += 1
    if isinstance(outcome, Pair):
        names = ["kept", *outcome.flags]
    elif isinstance(outcome, DroppedPair):
        names = [f"dropped, as {outcome}"]
    else:
        names = ["bad"]
        report["bad_rows"] += [f"{place}: {outcome}"][: 100 - len(report["bad_rows"])]
    for name in names:
        report["counts"][name] = report["counts"].get(name, 0) + 1
        report["first"].setdefault(name, place)


def describe(report: dict) -> list[str]:
    """What happened to the rows, as lines to be printed once: each kind with its count and one place."""
    explained = {
        "bad": "skipped, as unusable",
        "unclean_prefix": "the prompt's last tokens change when a completion follows, which then begins there",
        "truncated": "truncated",
        "same_after_truncation": "chosen and rejected are the same after truncation"}
    counts, first = report["counts"], report["first"]
    names = [*explained, *sorted(counts.keys() - explained.keys() - {"kept"})]
    return [f"{counts.get('kept', 0):,} pairs from {report['rows']:,} rows",
            *(f"{explained.get(n, n)}: {counts[n]:,} (first: {first[n]})" for n in names if n in counts),
            *(f"skipped {bad}" for bad in report["bad_rows"])]


def pair_pieces(pair: Pair, place: tuple[int, int], begin: int) -> tuple[np.ndarray, ...]:
    """One pair as it is written to the arrays, in their order; its tokens begin at `begin`."""
    prompt, chosen, rejected, own_prompt = pair[:4]
    shared, own_prompt = own_prompt is None, prompt[:0] if own_prompt is None else own_prompt
    stream = np.concatenate([prompt, chosen, own_prompt, rejected])
    lengths = len(prompt), len(chosen), len(rejected), -1 if shared else len(own_prompt)
    values = stream, lengths, (pair.chosen_rating, pair.rejected_rating), place, begin + len(stream)
    return tuple(np.asarray(value, dtype) for value, (dtype, _) in zip(values, ARRAYS.values(), strict=True))


def write_pairs(directory: Path, outcomes: Iterable[Outcome], files: list[Path], stop: bool):
    """Writes the arrays and meta.json. Raises DataError at a bad row if `stop`, and when no pair is left."""
    report: dict[str, Any] = {"rows": 0, "counts": {}, "first": {}, "bad_rows": []}
    numbers = {str(path): number for number, path in enumerate(files)}
    hashes, pictures, written = [hashlib.sha256() for _ in ARRAYS], {}, 0  # tokens
    with ExitStack() as stack:
        streams = [stack.enter_context(open(directory / f"{name}.bin", "wb")) for name in ARRAYS]
        for place, outcome in outcomes:
            if stop and isinstance(outcome, DataError) and not isinstance(outcome, DroppedPair):
                raise DataError(f"{place}: {outcome}")
            count_outcome(report, place, outcome)
            if isinstance(outcome, Pair):
                file, _, line = place.rpartition(":")
                pieces = pair_pieces(outcome, (numbers[file], int(line)), written)
                written += len(pieces[0])
                for stream, sha, piece in zip(streams, hashes, pieces, strict=True):
                    stream.write(piece.tobytes())
                    sha.update(piece.tobytes())
                if outcome.pictures:
                    from extras.pictures import keep

                    keep(pictures, report["counts"]["kept"] - 1, outcome.pictures, directory)
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
    if not report["counts"].get("kept"):
        why = "; ".join(["no pair is left", *describe(report)[:5]]) if report["rows"] else f"no rows; {NEEDS}"
        raise DataError(f"{', '.join(numbers)}: {why}")
    digest = hashlib.sha256("".join(sha.hexdigest() for sha in hashes[:3]).encode())  # of pairs, not of their places
    if pictures:
        digest.update(json.dumps(pictures["pairs"]).encode())
    meta = {"files": list(numbers), "digest": digest.hexdigest(), "report": report, "pictures": pictures or None}
    (directory / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def file_state(path: Path) -> list[int]:
    """What a write to the file changes: its identity, size, and the times that the system keeps."""
    state = os.stat(path)
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def store_key(files: list[Path], cache_dir: Path, *parts) -> str:
    """Digest of all that a store depends on: the files' names and contents, the tokenizing library, and `parts`."""
    sha = hashlib.sha256(repr((STORE_VERSION, tokenizers.__version__, *parts)).encode())
    for path in files:
        if os.path.getsize(path) < LARGE_FILE:
            content = file_hash(path)
        else:
            from extras.hashes import remembered_hash

            content = remembered_hash(path, cache_dir, file_hash)
        sha.update(f"{path}:{content};".encode())
    return sha.hexdigest()[:32]


def check_unchanged(files: list[Path], states: list[list[int]]):
    """Raises DataError where a file was written to since its state was taken: rows of two contents would be mixed."""
    for path, state in zip(files, states, strict=True):
        if file_state(path) != state:
            raise DataError(f"{path}: it changed while it was read; start again when it is whole")


def tokenize_chunk(chunk: list[tuple], tokenizer: Tokenizer, options: DataOptions) -> list[Outcome]:
    """[(place, row)] -> [(place, what became of it)]."""
    places, rows = zip(*chunk, strict=True)
    if tokenizer.pictures is not None:
        from extras.pictures import open_rows

        rows = open_rows(rows, places)
    return list(zip(places, tokenize_rows(rows, tokenizer, options), strict=True))


def tokenize_files(files: list[Path], tokenizer: Tokenizer, options: DataOptions, num_proc: int | None,
                   progress: Callable[[int], None] | None) -> Iterator[Outcome]:
    """Every row's outcome, in order, with a bounded number of rows in memory."""
    rows, done = read_rows(files), 0
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    tokenized = (tokenize_chunk(chunk, tokenizer, options) for chunk in chunks)
    if num_proc is not None and num_proc > 1:
        from extras.workers import tokenize_in_workers

        tokenized = tokenize_in_workers(chunks, tokenizer, options, num_proc)
    for outcomes in tokenized:
        yield from outcomes
        done += len(outcomes)
        if progress:
            progress(done)


def build_store(files: list[Path], tokenizer: Tokenizer, options: DataOptions, cache_dir: str | Path,
                on_bad_row: str = "stop", num_proc: int | None = None,
                progress: Callable[[int], None] | None = None) -> PairStore:
    """Tokenizes files into a store inside cache_dir, or opens the one that is there for the same contents and options.

    One process calls this; others open `store.directory`. The tokenizer itself uses all cores, the rest one; `num_proc`
    processes share out all of it. `progress` gets the number of rows done. Raises DataError: at the first bad row
    (on_bad_row "stop"; "skip" counts and lists them), and when no pair is left.
    """
    check_options(options)
    assert on_bad_row in ("stop", "skip"), on_bad_row
    cache_dir = Path(cache_dir)
    try:
        states = list(map(file_state, files))
        target = cache_dir / store_key(files, cache_dir, tokenizer.digest, tuple(options), on_bad_row)
        if not target.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            outcomes = tokenize_files(files, tokenizer, options, num_proc, progress)
            write_store(target, outcomes, files, states, on_bad_row == "stop")
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise DataError(f"{cache_dir}: cannot hold the token store ({what}); change --cache_dir") from None
    except MemoryError:
        raise DataError("out of memory while tokenizing; lower --dataset_num_proc, or cut very long rows") from None
    return PairStore.open(target)


def write_store(target: Path, outcomes: Iterable[Outcome], files: list[Path], states: list, stop: bool):
    """The store is written beside its place and renamed, so that it is whole or absent."""
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as scratch:
        write_pairs(Path(scratch), outcomes, files, stop)
        check_unchanged(files, states)
        os.chmod(scratch, 0o755)  # temporary directories are for their owner alone
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.exists():  # else another run was faster, with the same arrays
                raise


# What a reference says of the pairs: one file, block after block of them, each with its checksum

SUMS_BLOCK = 1024  # pairs


def open_sums(path: Path, count: int, dtype: np.dtype) -> np.memmap:
    """The file, memory-mapped, as records of `sums` (SUMS_BLOCK, 2, 2), nan where not known, and their `sha256`."""
    record = np.dtype([("sums", dtype, (SUMS_BLOCK, 2, 2)), ("sha256", np.uint8, 32)])
    size = -(-count // SUMS_BLOCK) * record.itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if path.stat().st_size != size:
        os.truncate(path, size)  # what is not there yet, or was cut off, reads as zeros
    return np.memmap(path, record, "r")


def blocks_of(pairs: np.ndarray) -> list[np.ndarray]:
    """Sorted pairs, cut where a block ends."""
    return np.split(pairs, np.flatnonzero(np.diff(pairs // SUMS_BLOCK)) + 1) if len(pairs) else []


def read_block(record: np.void) -> np.ndarray | None:  # (SUMS_BLOCK, 2, 2)
    """A block's sums; None where they are damaged, or where a write was cut short."""
    if not any(record.tobytes()):
        return np.full_like(record["sums"], np.nan)  # never written
    intact = hashlib.sha256(record["sums"].tobytes()).digest() == record["sha256"].tobytes()
    return np.array(record["sums"]) if intact else None


def missing_sums(table: np.memmap, pairs: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Which of the sorted pairs have no sums yet, (P,) bool, and the numbers of blocks that are damaged."""
    missing, damaged = [np.zeros(0, bool)], []
    for part in blocks_of(pairs):
        block = read_block(table[part[0] // SUMS_BLOCK])
        damaged += [int(part[0] // SUMS_BLOCK)] if block is None else []
        missing.append(np.ones(len(part), bool) if block is None else np.isnan(block[part % SUMS_BLOCK, 0, 0]))
    return np.concatenate(missing), damaged


def write_sums(path: Path, table: np.memmap, pairs: np.ndarray, sums: np.ndarray) -> None:
    """Adds sums (P, 2, 2) of pairs of one block. What is there stays, to the bit: other runs may be reading it."""
    import fcntl

    number, rows = pairs[0] // SUMS_BLOCK, pairs % SUMS_BLOCK
    with open(path, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
        block = read_block(table[number])
        block = np.full_like(table[number]["sums"], np.nan) if block is None else block
        block[rows] = np.where(np.isnan(block[rows]), sums, block[rows])
        stream.seek(number * table.itemsize)
        stream.write(block.tobytes() + hashlib.sha256(block.tobytes()).digest())
        stream.flush()
        os.fsync(stream.fileno())


def take_sums(table: np.memmap, pairs: np.ndarray) -> np.ndarray:  # (P, 2, 2)
    return np.array(table["sums"][pairs // SUMS_BLOCK, pairs % SUMS_BLOCK])


# Batches


class Batch(NamedTuple):
    """B pairs as one flat stream of T tokens in S spans, of which N are targets.

    A span attends to its prefix and causally to itself: prompts have no prefix, completions have their prompt, a pair
    whose prompts differ is two spans without prefix. Positions restart after the prompt for each completion. The pairs
    of TRL's collator example, prompt 1 2 3, chosen 4 5, rejected 6, then prompt 7 8, chosen 9, rejected 10 11:

        input_ids     1 2 3 | 4 5 | 6 | 7 8 | 9 | 10 11
        position_ids  0 1 2 | 3 4 | 3 | 0 1 | 2 |  2  3
        spans         (0, 3, 0, 0) (3, 5, 0, 3) (5, 6, 0, 3) (6, 8, 0, 0) (8, 9, 6, 8) (9, 11, 6, 8)
        score_index   2 3 | 2 | 7 | 7 9          the stream position that predicts
        targets       4 5 | 6 | 9 | 10 11        the token that is predicted
        lengths       (2, 1) (1, 2)
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    spans: Tensor  # (S, 4) int32, on the CPU always: start, end, prefix_start, prefix_end (0, 0: no prefix)
    score_index: Tensor  # (N,) int64: chosen of pair 0, rejected of pair 0, chosen of pair 1, ...
    targets: Tensor  # (N,) int64
    lengths: Tensor  # (B, 2) int64, scored tokens of chosen and rejected; they sum to N
    pair_ids: Tensor  # (B,) int64, index in the store
    num_tokens: int  # tokens as TRL counts them: the prompt twice, padding never
    ratings: Tensor  # (B, 2) float32, nan where absent
    ref_logps: Tensor | None = None  # filled by the trainer
    pictures: Any = None  # extras/vision.py's Pictures, likewise

    def to(self, device) -> "Batch":
        """The batch on a device, except `spans`, which the attention reads on the CPU."""
        tensors = {k: v for k, v in self._asdict().items() if hasattr(v, "to") and k != "spans"}
        return self._replace(**{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


class Layout(NamedTuple):
    """A piece of a batch that begins at 0: arrays, for the fields of Batch."""

    input_ids: Any
    position_ids: Any
    spans: Any
    score_index: Any
    targets: Any
    lengths: Any


def shared_layout(pair: Pair) -> Layout:
    """prompt chosen rejected; the last prompt token predicts the first token of both completions."""
    p, c, r = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    positions = np.concatenate([np.arange(p + c), np.arange(p, p + r)])
    spans = np.array([[0, p, 0, 0], [p, p + c, 0, p], [p + c, p + c + r, 0, p]])[: 3 if r else 2]
    score_index = np.concatenate([np.arange(p - 1, p + c - 1), [p - 1][:r], np.arange(p + c, p + c + r - 1)])
    ids = np.concatenate([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
    return Layout(ids, positions, spans, score_index, ids[p:], [c, r])


def whole_layout(prompt: np.ndarray, completion: np.ndarray) -> Layout:
    """prompt + completion as one span without prefix, where nothing predicts the very first token."""
    ids = np.concatenate([prompt, completion])
    n, scored = len(ids), min(len(completion), len(ids) - 1)
    spans, score_index = np.array([[0, n, 0, 0]]), np.arange(n - 1 - scored, n - 1)
    return Layout(ids, np.arange(n), spans, score_index, ids[n - scored :], [scored])


def pair_layouts(pair: Pair, share_prefix: bool) -> list[Layout]:
    """A pair as one shared piece, or as two whole sequences."""
    if share_prefix and pair.rejected_prompt_ids is None and len(pair.prompt_ids):
        return [shared_layout(pair)]
    chosen = whole_layout(pair.prompt_ids, pair.chosen_ids)
    if not len(pair.rejected_ids):
        return [chosen._replace(lengths=[*chosen.lengths, 0])]
    own_prompt = pair.prompt_ids if pair.rejected_prompt_ids is None else pair.rejected_prompt_ids
    return [chosen, whole_layout(own_prompt, pair.rejected_ids)]


def collate(pairs: list[Pair], pair_ids=None, share_prefix: bool = True) -> Batch:
    """The pairs as one stream. `share_prefix` False lays each pair as two whole sequences; the numbers are the same."""
    layouts, size = [], 0
    for one in (layout for pair in pairs for layout in pair_layouts(pair, share_prefix)):
        spans = one.spans + size * (one.spans[:, [1, 1, 3, 3]] > 0)  # no prefix stays 0, 0
        layouts.append(one._replace(spans=spans, score_index=one.score_index + size))
        size += len(one.input_ids)
    columns = (torch.from_numpy(np.concatenate(column).astype(np.int64)) for column in zip(*layouts, strict=True))
    input_ids, position_ids, spans, score_index, targets, lengths = columns
    shared = [pair for pair in pairs if share_prefix and pair.rejected_prompt_ids is None and len(pair.rejected_ids)]
    return Batch(
        input_ids, position_ids, spans.to(torch.int32), score_index, targets, lengths.view(-1, 2),
        pair_ids=torch.as_tensor(np.asarray(range(len(pairs)) if pair_ids is None else pair_ids, np.int64)),
        num_tokens=size + sum(len(pair.prompt_ids) for pair in shared),
        ratings=torch.tensor([(pair.chosen_rating, pair.rejected_rating) for pair in pairs], dtype=torch.float32))


def empty_batch() -> Batch:
    """A stream of one token without targets, for a rank that has no pair left when the others have."""
    none, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    spans = torch.tensor([[0, 1, 0, 0]], dtype=torch.int32)
    return Batch(one, one.clone(), spans, none, none, none.view(0, 2), none, 0, torch.zeros(0, 2))


# Order


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of n pairs in an epoch: (n,) int64, a function of seed and epoch alone.

    Sorts the raw words of Philox keyed on (seed, epoch), which stay the same from one numpy to the next.
    """
    if not shuffle:
        return np.arange(n)
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def micro_batches(order: np.ndarray, tokens: np.ndarray, max_pairs: int,
                  max_tokens: int | None = None) -> list[np.ndarray]:
    """Cuts `order` into consecutive forwards of at most max_pairs pairs and max_tokens stream tokens.

    `tokens` are those of every pair of the store. A pair longer than max_tokens stands alone.
    """
    assert max_pairs > 0, f"max_pairs is {max_pairs}"
    batches, begin, size = [], 0, 0
    for at, index in enumerate(order):
        too_long = max_tokens is not None and size + tokens[index] > max_tokens
        if at > begin and (too_long or at - begin == max_pairs):
            batches.append(order[begin:at])
            begin, size = at, 0
        size += int(tokens[index])
    return [*batches, order[begin:]] if len(order) else []


if __name__ == "__main__":
    from extras.view import main

    sys.exit(main())
