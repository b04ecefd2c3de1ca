"""Convert objects passed to DPOTrainer into what the command line would name.

    DPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=load_dataset(...)).train()

(TRL's quick start.) Rows become a JSONL file in the cache, named after its content, so that they
are checked, tokenized and reported like any other file; a transformers tokenizer becomes the
directory that its own save_pretrained writes; a PEFT configuration becomes our flags.
`docs/api.md` lists what is accepted.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import data
import model as models
from extras.lora.targets import DEFAULTS
from extras.rows.pictures import open_tokenizer
from parts.rows import NEEDS, DataError, find_files

# Entries of a PEFT configuration that do not affect training, and those our flags name otherwise.
PEFT_SILENT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
PEFT_FLAGS = {
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "target_parameters": "lora_target_parameters",
}


def accept(args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a copy of `args` (a DPOConfig) that names the objects, and the objects to be read.

    `given` maps the trainer's arguments to their values. Raises ValueError for objects that cannot
    be trained on, saying what to give instead.
    """
    args = dataclasses.replace(args)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    for name in ("model", "ref_model"):
        check_model(name, given[name])
    for name in ("train_dataset", "eval_dataset"):
        check_dataset(name, given[name])
    model = given["model"]
    if isinstance(model, str):
        args.model_name_or_path = model
    elif model is not None:
        args.model_name_or_path = args.model_name_or_path or "model"
    unnamed = isinstance(model, models.Decoder) and args.model_name_or_path == "model"
    if unnamed and given["processing_class"] is None:
        raise ValueError(
            "processing_class is missing: a Decoder has no tokenizer; "
            "give data.Tokenizer.load(DIRECTORY)"
        )
    if isinstance(given["ref_model"], str):
        args.ref_model_name_or_path = given["ref_model"]
        given["ref_model"] = None
    for name, field in (("train_dataset", "dataset_name"), ("eval_dataset", "eval_dataset_name")):
        if given[name] is not None:
            setattr(args, field, given[name] if isinstance(given[name], str) else name)
    args.output_dir = args.output_dir or f"{Path(args.model_name_or_path or 'model').name}-DPO"
    if given["peft_config"] is not None:
        flags, given["peft_config"] = lora_flags(given["peft_config"], args)
        args = dataclasses.replace(args, **flags)
    cache_dir = cache_directory(args.cache_dir)
    given["processing_class"] = tokenizer_of(given["processing_class"], cache_dir)
    return args, given


def cache_directory(named: str | None) -> Path:
    return Path(named) if named else Path.home() / ".cache" / "dpo"


def check_model(name: str, model: Any) -> None:
    if model is not None and not isinstance(model, (str, models.Decoder)):
        raise ValueError(
            f"{name} is a {type(model).__name__}; give a directory, a hub id, or a model.Decoder "
            "(of a transformers model: model.save_pretrained(DIRECTORY), then DIRECTORY)"
        )


def check_dataset(name: str, dataset: Any) -> None:
    """Accept a name, a PairStore, a list of paths, or any iterable of rows.

    Raises ValueError for other objects, for no rows, and for a mapping of several data sets.
    """
    kind = type(dataset).__name__
    if dataset is None or isinstance(dataset, (str, data.PairStore)):
        return
    if isinstance(dataset, Mapping):
        raise ValueError(f"{name} is a {kind} of {', '.join(map(str, dataset))}; give one of them")
    if not isinstance(dataset, Iterable):
        raise ValueError(
            f"{name} is a {kind}; give a path, a hub id, a list of rows or a datasets.Dataset"
        )
    if isinstance(dataset, Sized) and not len(dataset):
        raise ValueError(f"{name} has no rows; {NEEDS}")


def rows_file(rows: Iterable[Any], cache_dir: Path) -> list[Path]:
    """Write the rows to one JSONL file in the cache, named after its content; its path, in a list.

    Line n is row n - 1. A list of paths needs no writing. Raises DataError for a row that is not
    an object, or holds what JSON cannot (a decoded image, say).
    """
    if isinstance(rows, (list, tuple)) and all(isinstance(row, (str, Path)) for row in rows):
        return find_files(list(rows))
    cache_dir.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile("wb", dir=cache_dir, prefix="rows.part-", delete=False) as f:
        try:
            for number, row in enumerate(rows):
                line = row_line(number, row)
                f.write(line)
                digest.update(line)
        except BaseException:
            os.unlink(f.name)
            raise
    path = cache_dir / f"rows-{digest.hexdigest()[:16]}.jsonl"
    os.replace(f.name, path)
    return [path]


def row_line(number: int, row: Any) -> bytes:
    """Encode a row as a line of JSON. Raises DataError naming the row."""
    try:
        return (json.dumps(dict(row), ensure_ascii=True) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {number} of the data set cannot be written as JSON ({error}); {NEEDS}, as text "
            "or lists of messages (images as paths)"
        ) from None


def tokenizer_of(given: Any, cache_dir: Path) -> data.Tokenizer | None:
    """Return our tokenizer as it is, or load one from a directory or a transformers tokenizer.

    The latter writes its files to the cache by its own save_pretrained. Raises ValueError for
    anything else.
    """
    if given is None or isinstance(given, data.Tokenizer):
        return given
    if isinstance(given, (str, Path)):
        return open_tokenizer(given)
    if not getattr(given, "is_fast", False):
        raise ValueError(
            f"processing_class is a {type(given).__name__}; give a data.Tokenizer, a directory "
            "with tokenizer.json, or a fast tokenizer of transformers"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="tokenizer.part-") as scratch:
        given.save_pretrained(scratch)
        target = cache_dir / f"tokenizer-{open_tokenizer(scratch).digest[:16]}"
        if not target.exists():
            try:
                Path(scratch).rename(target)
            except OSError:
                if not target.exists():  # else another process wrote the same files first
                    raise
            Path(scratch).mkdir(exist_ok=True)  # TemporaryDirectory expects something to remove
        os.chmod(target, 0o755)
    return open_tokenizer(target)


def lora_flags(config: Any, args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a PEFT LoraConfig, or a dict of its entries, to DPOConfig's fields.

    Return the fields, and the settings that have no flag (rank patterns, layers). Raises
    ValueError for entries that are not supported.
    """
    if isinstance(config, Mapping):
        entries = dict(config)
    else:
        entries = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    kind = str(entries.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise ValueError(f"peft_config is of the type {kind}; only LoRA can be trained")
    plain = {} if isinstance(config, Mapping) else vars(type(config)())
    flags: dict[str, Any] = {"use_peft": True}
    more: dict[str, Any] = {}
    for name, value in entries.items():
        flag = PEFT_FLAGS.get(name, name)
        if flag in type(args).__dataclass_fields__:
            flags[flag] = sorted(value) if isinstance(value, set) else value
        elif name in DEFAULTS:
            more[name] = sorted(value) if isinstance(value, set) else value
        elif name not in PEFT_SILENT and value != plain.get(name) and value:
            raise ValueError(
                f"peft_config: {name}={value!r} has no counterpart here; taken are r, lora_alpha, "
                "lora_dropout, target_modules, use_rslora and what `python dpo.py --help` "
                "lists under LoRA"
            )
    if args.disable_dropout:
        flags.pop("lora_dropout", None)  # off with all dropout, as in TRL
    return flags, more
