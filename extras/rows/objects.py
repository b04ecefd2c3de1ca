"""Convert objects passed to DPOTrainer into what the command line would name.

    DPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=load_dataset(...)).train()

(TRL's quick start.) Rows become a JSONL file in the cache, named after its content, so that they
are checked, tokenized and reported like any other file; a transformers tokenizer becomes the
directory that its own save_pretrained writes; a PEFT configuration becomes our flags.
`docs/api.md` lists what is accepted.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any

import data
import model as models
from extras.lora.targets import DEFAULTS
from extras.models.objects import check_object, is_peft, object_name
from extras.rows.mixture import Mixture
from extras.rows.pictures import open_tokenizer
from extras.rows.written import row_line
from parts.config import BY_RULE, EIGHT_BIT
from parts.custom_optimizer import make_custom
from parts.output import cache_directory
from parts.rows import NEEDS, find_files

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


# Arguments of TRL's and transformers' trainers that are not taken: what to use instead.
NOT_TAKEN = {
    "callbacks": "on_log=FUNCTION is given every line of metrics, and early_stopping_patience of "
    "DPOConfig stops; the loop is DPOTrainer.train, which you may edit",
    "compute_metrics": "evaluate() returns every metric; losses.pair_metrics is where to add one",
    "preprocess_logits_for_metrics": "logits are never held",
    "data_collator": "nothing is padded; extras/rows/collator.py has TRL's, for loops of your own",
    "model_init": "give the model",
    "compute_loss_func": "docs/extend.md adds a loss in one function",
    "tokenizer": "processing_class is its name",
}
TAKEN = ("optimizers", "optimizer_cls_and_kwargs", "quantization_config", "on_log")


def accept(args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a copy of `args` (a DPOConfig) that names the objects, and the objects to be read.

    `given` maps the trainer's arguments to their values. Raises ValueError for objects that cannot
    be trained on, saying what to give instead.
    """
    args = dataclasses.replace(args)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    check_arguments(given)
    given["optimizers"] = optimizer_maker(args, given)
    if given.get("quantization_config") is not None:
        args = dataclasses.replace(args, **quantization_flags(given["quantization_config"]))
    name_models(args, given)
    for name, field in (("train_dataset", "dataset_name"), ("eval_dataset", "eval_dataset_name")):
        given[name] = readable(name, given[name])
        if given[name] is not None:
            setattr(args, field, given[name] if isinstance(given[name], str) else name)
    if args.datasets:
        mixture = mixture_of(args, given["train_dataset"])
        args.datasets = mixture.entries
        args.dataset_name = mixture.name
        given["train_dataset"] = mixture
    args.output_dir = args.output_dir or f"{Path(args.model_name_or_path or 'model').name}-DPO"
    if given["peft_config"] is not None:
        flags, given["peft_config"] = lora_flags(given["peft_config"], args)
        args = dataclasses.replace(args, **flags)
    check_model_flags(args, given["model"])
    cache_dir = cache_directory(args.cache_dir)
    given["processing_class"] = tokenizer_of(
        given["processing_class"], cache_dir, args.chat_template)
    return args, given


def mixture_of(args: Any, train_dataset: Any) -> Mixture:
    """Return the rows of `datasets`. Raises ValueError where others are named beside them."""
    mixture = Mixture(args.datasets, args.dataset_revision, stops=args.on_bad_row == "stop")
    if train_dataset is not None:
        raise ValueError("train_dataset and datasets: give one of them")
    if args.dataset_name not in (None, mixture.name):
        raise ValueError(f"--dataset_name {args.dataset_name} and datasets: give one of them")
    if args.dataset_config is not None or args.dataset_train_split != "train":
        raise ValueError(
            "--dataset_config and --dataset_train_split: each entry of datasets has its own name "
            "and split")
    return mixture


def check_arguments(given: dict[str, Any]) -> None:
    """Raise ValueError for an argument of other trainers, and TypeError for one that nobody has."""
    known = {"model", "ref_model", "train_dataset", "eval_dataset", "processing_class"}
    for name, value in given.items():
        is_empty = value is None or (isinstance(value, (list, tuple)) and not value)
        if name in NOT_TAKEN and not is_empty:
            raise ValueError(f"{name} is not taken: {NOT_TAKEN[name]}")
        if name not in {*NOT_TAKEN, *TAKEN, *known, "peft_config"}:
            raise TypeError(f"DPOTrainer() got an unexpected keyword argument {name!r}")
    if given.get("on_log") is not None and not callable(given["on_log"]):
        kind = type(given["on_log"]).__name__
        raise ValueError(f"on_log is a {kind}; give a function of a line of metrics, a dict")


def optimizer_maker(args: Any, given: dict[str, Any]) -> Callable | None:
    """Return what makes the optimizer of a DPOConfig and [(name, parameter)]; None: by the flags.

    Raises ValueError for an optimizer that is made already, and if there are two.
    """
    make = given.get("optimizers")
    if isinstance(make, (tuple, list)) and all(part is None for part in make):
        make = None  # transformers' default
    by_class = given.get("optimizer_cls_and_kwargs")
    if make is None and by_class is not None:
        kind, options = by_class
        make = partial(made_of_class, kind, options)
    if make is not None and not callable(make):
        raise ValueError(
            f"optimizers is a {type(make).__name__}; give a function of the parameters that learn, "
            "such as lambda parameters: torch.optim.SGD(parameters, lr=1e-4); the schedule is "
            "--lr_scheduler_type")
    if make is not None and args.optim in (*EIGHT_BIT, *BY_RULE):
        raise ValueError(f"optimizers and optim={args.optim!r}: choose one")
    return None if make is None else partial(make_custom, make)


def made_of_class(kind: type, options: dict, parameters: list) -> Any:
    return kind(parameters, **options)


def quantization_flags(config: Any) -> dict[str, Any]:
    """Convert transformers' BitsAndBytesConfig, or a dict of its entries, to DPOConfig's fields."""
    read = config.get if isinstance(config, Mapping) else partial(getattr, config)
    if not read("load_in_4bit", False) and not read("load_in_8bit", False):
        raise ValueError(
            f"quantization_config is a {type(config).__name__} without load_in_4bit; only "
            "bitsandbytes' 4 bits are trained on")
    if read("load_in_8bit", False):
        return {"load_in_8bit": True}  # which is refused, with the reason
    dtype = read("bnb_4bit_compute_dtype", None)
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": read("bnb_4bit_quant_type", "fp4"),
        "use_bnb_nested_quant": bool(read("bnb_4bit_use_double_quant", False)),
        "bnb_4bit_compute_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}


def name_models(args: Any, given: dict[str, Any]) -> None:
    """Name the model objects in `args`. Raises ValueError for what is no model."""
    for name in ("model", "ref_model"):
        if given[name] is not None and not isinstance(given[name], (str, models.Decoder)):
            check_object(name, given[name])
    model = given["model"]
    if model is not None and model is given["ref_model"] and not isinstance(model, str):
        raise ValueError(
            "model and ref_model are the same object; leave ref_model out, and the reference is "
            "the model as it starts")
    if isinstance(model, str):
        args.model_name_or_path = model
    elif model is not None:
        own = None if isinstance(model, models.Decoder) else object_name(model)
        args.model_name_or_path = args.model_name_or_path or own or "model"
    is_unnamed = model is not None and args.model_name_or_path == "model"
    if is_unnamed and not isinstance(model, str) and given["processing_class"] is None:
        raise ValueError(
            f"processing_class is missing: a {type(model).__name__} has no tokenizer; "
            "give data.Tokenizer.load(DIRECTORY)"
        )
    if isinstance(given["ref_model"], str):
        args.ref_model_name_or_path = given["ref_model"]
        given["ref_model"] = None


def check_model_flags(args: Any, model: Any) -> None:
    """Raise ValueError for options that a model object cannot follow."""
    if model is None or isinstance(model, str):
        return
    if is_peft(model) and args.use_peft:
        raise ValueError(
            "model is a PeftModel, which is trained as it is: leave peft_config out, or merge its "
            "adapter first (model.merge_and_unload()) for a new one on top")
    if is_peft(model) and args.merge_adapter:
        raise ValueError(
            "merge_adapter: the model is a PeftModel; leave it out, and merge it when it is "
            "trained: model.merge_and_unload()")
    if args.load_in_4bit and not isinstance(model, models.Decoder):
        raise ValueError(
            "load_in_4bit: the model is an object already; load it with quantization_config="
            "BitsAndBytesConfig(load_in_4bit=True), or give its name")


def readable(name: str, dataset: Any) -> Any:
    """Return a name, a PairStore, a list of paths, an iterable of rows, or, for evaluation, a dict
    of those by name.

    Raises ValueError for other objects, for no rows, and for several data sets to train on.
    """
    kind = type(dataset).__name__
    if dataset is None or isinstance(dataset, (str, data.PairStore)):
        return dataset
    if kind == "DataFrame":
        return frame_rows(name, dataset)
    if isinstance(dataset, Mapping):
        if name == "train_dataset" or not dataset:
            given = ", ".join(map(str, dataset))
            raise ValueError(f"{name} is a {kind} of {given or 'nothing'}; give one of them")
        return {str(key): readable(f"{name}[{key!r}]", one) for key, one in dataset.items()}
    if not isinstance(dataset, Iterable):
        raise ValueError(
            f"{name} is a {kind}; give a path, a hub id, a list of rows or a datasets.Dataset"
        )
    if isinstance(dataset, Sized) and not len(dataset):
        raise ValueError(f"{name} has no rows; {NEEDS}")
    return dataset


def frame_rows(name: str, frame: Any) -> list[dict]:
    """Return the rows of a pandas DataFrame, without the cells that pandas leaves empty."""
    if not len(frame):
        raise ValueError(f"{name} has no rows; {NEEDS}")
    is_empty = lambda cell: cell is None or (isinstance(cell, float) and cell != cell)
    rows = frame.to_dict("records")
    return [{k: cell for k, cell in row.items() if not is_empty(cell)} for row in rows]


def rows_file(rows: Iterable[Any], cache_dir: Path) -> list[Path]:
    """Write the rows to one JSONL file in the cache, named after its content; its path, in a list.

    Line n is row n - 1. A list of paths needs no writing. Raises DataError for a row that is not
    an object, or holds what JSON cannot (a decoded image, say).
    """
    if isinstance(rows, Mixture):
        return rows.files(cache_dir)
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


def tokenizer_of(
    given: Any, cache_dir: Path, chat_template: str | None = None,
) -> data.Tokenizer | None:
    """Return our tokenizer as it is, or load one from a directory, or from a tokenizer or processor
    of transformers.

    The latter write their files to the cache by their own save_pretrained. Raises ValueError for
    anything else.
    """
    if given is None or isinstance(given, data.Tokenizer):
        return given
    if isinstance(given, (str, Path)):
        return open_tokenizer(given, chat_template)
    tokenizer = getattr(given, "tokenizer", given)  # a processor has one
    if not getattr(tokenizer, "is_fast", False) or not hasattr(given, "save_pretrained"):
        raise ValueError(
            f"processing_class is a {type(given).__name__}; give a data.Tokenizer, a directory "
            "with tokenizer.json, or a fast tokenizer or a processor of transformers"
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="tokenizer.part-") as scratch:
        given.save_pretrained(scratch)
        target = cache_dir / f"tokenizer-{content_digest(Path(scratch))}"
        if not target.exists():
            try:
                Path(scratch).rename(target)
            except OSError:
                if not target.exists():  # else another process wrote the same files first
                    raise
            Path(scratch).mkdir(exist_ok=True)  # TemporaryDirectory expects something to remove
        os.chmod(target, 0o755)
    return open_tokenizer(target, chat_template)


def content_digest(directory: Path) -> str:
    """Hash the names and bytes of a directory's files."""
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, directory.rglob("*"))):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory)} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


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
