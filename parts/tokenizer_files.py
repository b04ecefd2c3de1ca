"""The files of a Hugging Face tokenizer: which there are, their digest, and their tokens."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from parts.rows import DataError, user_path

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # of vision models
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
    *PROCESSOR_FILES,
    "video_preprocessor_config.json",
)


def read_json(path: Path) -> dict:
    """Read the JSON object in a file, {} where there is no file. Raises DataError naming it."""
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        what = f"expected a JSON object, found {type(value).__name__}"
        raise DataError(f"{path}: {what}; fetch the file again")
    return value


@contextmanager
def explained_types(directory: str | Path) -> Iterator[None]:
    """Raise DataError for a value of the wrong type in the files, wherever inside it shows."""
    try:
        yield
    except (DataError, OSError):
        raise
    except Exception as error:
        what = "the tokenizer's files hold a value of another type than expected"
        raise DataError(f"{directory}: {what} ({error!r:.200}); fetch them again") from None


def reads_pictures(directory: str | Path) -> bool:
    """Tell whether an image processor's files are beside the tokenizer."""
    return any((user_path(directory) / name).is_file() for name in PROCESSOR_FILES)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the tokenizer's files that exist, in a fixed order."""
    found = (path for name in TOKENIZER_FILES for path in sorted(directory.glob(name)))
    return [path for path in found if path.is_file()]


def files_digest(directory: Path, templates: dict[str, str] | None) -> str:
    """Hash the tokenizer's files, and the templates that replace its own, if any."""
    chosen = b"" if templates is None else json.dumps(sorted(templates.items())).encode()
    digest = hashlib.sha256(chosen)
    for path in tokenizer_files(directory):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.name}:{content};".encode())
    return digest.hexdigest()


def copy_files(source: Path, target: Path, templates: dict[str, str] | None) -> None:
    """Copy a tokenizer's files byte for byte; `templates`, by name, replace its own, if any."""
    for path in tokenizer_files(source):
        copy = target / path.relative_to(source)
        replaced = templates and path.suffix == ".jinja"
        if copy.resolve() != path.resolve() and not replaced:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for name, text in (templates or {}).items():
        more = f"additional_chat_templates/{name}.jinja"
        file = target / ("chat_template.jinja" if name == "default" else more)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8", newline="")


# Their tokens


def token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def named_tokens(config: dict) -> dict[str, str]:
    """Return {"bos_token": "<s>", ...}: the usual names, then a model's own (image_token, ...)."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    texts = {key: token_text(value) for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def tokens_to_add(
    config: dict, known: list[tokenizers.AddedToken]
) -> list[tokenizers.AddedToken]:
    """Return the tokens that the configuration adds or changes, by transformers' rules."""
    same = set(map(repr, known))
    named = list(named_tokens(config).values())
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    entries = (tokenizers.AddedToken(**entry) for _, entry in listed)
    tokens = [token for token in entries if repr(token) not in same]
    for token in tokens:
        token.special = token.special or token.content in named
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = [] if isinstance(extra, dict) else [token_text(token) for token in extra]
    there = {token.content for token in (*known, *tokens)}
    fresh = [text for text in dict.fromkeys([*named, *more]) if text not in there]
    return tokens + [tokenizers.AddedToken(t, special=True, normalized=False) for t in fresh]


def load_backend(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Load tokenizer.json with the configuration's additions, and the named tokens."""
    config = read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # an older tokenizer, whose other file wins
        config |= read_json(directory / "special_tokens_map.json")
    path = directory / "tokenizer.json"
    if not path.is_file():
        how = "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...) makes one"
        raise DataError(f"{directory}: no tokenizer.json; {how}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise DataError(f"{path}: not a tokenizer file ({error})") from None
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    known = list(backend.get_added_tokens_decoder().values())
    backend.add_tokens(tokens_to_add(config, known))
    return backend, named_tokens(config)
