"""Options of TRL and its older versions that DPOConfig does not have.

An option at a value that changes nothing here has no effect; at any other value it is refused,
with what to use instead. Also here: older names of our own options, and what only TRL's --config
files have. Used where a command line or a file names an option that is not ours.
"""

import dataclasses
import difflib
import enum
import functools
import json
import os
import sys
from collections.abc import Collection
from typing import Any

ANY = "*"  # whatever the value

# Flags of TRL that only steer its own machinery: accepted, and named once as having no effect.
NO_EFFECT = set("""
    attn_implementation device_map remove_unused_columns padding_free pad_to_multiple_of pad_token
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph gradient_checkpointing_kwargs precompute_ref_batch_size logging_strategy
    logging_nan_inf_filter log_level log_level_replica log_on_each_node skip_memory_metrics
    overwrite_output_dir do_train do_eval prediction_loss_only include_num_input_tokens_seen
    average_tokens_across_devices ignore_bias_buffers lora_task_type torch_empty_cache_steps
    use_liger_kernel hub_always_push bnb_4bit_quant_storage save_safetensors
    half_precision_backend trust_remote_code tf32""".split())

# Older, or other, names of an option.
RENAMED = {
    "revision": "model_revision",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "test_split_size": "eval_fraction"}

# Options that are not ours: (the value that changes nothing, why, or what to use instead): names.
REASONS = {
    (ANY, "nothing is padded"): "padding_value group_by_length length_column_name",
    (ANY, "prompts are left out by index"): "label_pad_token_id",
    (ANY, "only completions are scored, always"): "use_logits_to_keep",
    (ANY, "there is no data loader"): "dataloader_in_order dataloader_multiprocessing_context",
    (ANY, "there are no callbacks"): "restore_callback_states_from_checkpoint",
    (ANY, "checkpointing is never re-entrant"): "gradient_checkpointing_use_reentrant",
    (ANY, "training keeps no cache"): "use_cache",
    (ANY, "logits are never held, without Liger"): "liger_kernel_config",
    (ANY, "only for NVIDIA's Apex"): "fp16_opt_level fp16_backend",
    (ANY, "metrics are sums over all pairs, never joined from batches"):
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
        "include_for_metrics include_inputs_for_metrics use_legacy_prediction_loop past_index",
    (ANY, "--eval_strategy says when"): "do_predict",
    (ANY, "always shown"): "include_tokens_per_second",
    (ANY, "metrics.jsonl is in --output_dir"): "logging_dir",
    (ANY, "torchrun or accelerate launch sets it"):
        "local_rank _n_gpu accelerator_config accelerate_config ray_scope",
    (ANY, "only for SageMaker"): "mp_parameters",
    ("false", "leave it out: rows are always read as a stream, and tokenized once, to disk"):
        "dataset_streaming streaming",
    ("none", "--seed, which also sets the order"): "data_seed",
    ("false", "leave it out: an epoch's last batch may be small, and its loss is divided by its "
     "own pairs"): "dataloader_drop_last",
    ("random", "--shuffle_dataset false for file order; lengths need no grouping, as nothing is "
     "padded"): "train_sampling_strategy",
    ("none", "name the columns of a row prompt, chosen, rejected"): "label_names",
    ("none", "the rows' own \"tools\""): "tools",
    ("false", "leave it out: a resumed run continues with the pair it would have seen"):
        "ignore_data_skip",
    ("none", "--dtype, --model_revision and --load_in_4bit"): "model_init_kwargs",
    ("none", "--ref_model_dtype and --ref_model_device"): "ref_model_init_kwargs",
    ("false", "--ref_model_name_or_path"): "force_use_ref_model",
    ("none", "--lora_target_modules, which may also name lm_head and embed_tokens"):
        "optim_target_modules",
    ("none", "--gradient_checkpointing"):
        "activation_checkpointing activation_checkpointing_kwargs",
    ("false", "--gradient_checkpointing, --max_tokens_per_forward or --ref_model_device cpu, to "
     "bound memory"): "auto_find_batch_size",
    ("false", "leave it out: nothing is compiled"): "jit_mode_eval use_ipex",
    ("none", "leave it out: nothing is compiled"):
        "torch_compile_backend torch_compile_mode torchdynamo",
    ("none", "--disable_dropout false with --lora_dropout, as noise"): "neftune_noise_alpha",
    ("false", "--bf16: evaluation computes in the type of training"): "fp16_full_eval",
    ("false", "--dtype bfloat16"): "bf16_full_eval",
    ("false", "--use_cpu, or a CUDA GPU"): "use_mps_device tpu_metrics_debug",
    ("none", "--use_cpu, or a CUDA GPU"): "tpu_num_cores",
    ("none", "--adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay"): "optim_args",
    ("false", "--optim adafactor"): "adafactor",
    ("0", "--label_smoothing, which is DPO's"): "label_smoothing_factor",
    ("none", "leave it out: nccl on GPUs, gloo elsewhere"): "ddp_backend",
    ("none", "torchrun --nproc_per_node=N dpo.py --fsdp"):
        "fsdp_config deepspeed fsdp_transformer_layer_cls_to_wrap",
    ("none", "--fsdp, and for its cp_size or sp_size --context_parallel_size"): "parallelism_config",
    ("0", "--fsdp, which shards every block"): "fsdp_min_num_params",
    ("none", "TORCH_DISTRIBUTED_DEBUG=DETAIL"): "debug",
    (os.environ.get("WORLD_SIZE", "1"), "torchrun --nproc_per_node=N dpo.py"): "num_processes",
    ("1", "torchrun --nnodes"): "num_machines",
    ("0", "--eval_steps"): "eval_delay",
    ("none", "metrics.jsonl in --output_dir"):
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
    ("false", "--save_strategy no: only the model is written, at the end"): "save_only_model",
    ("false", "an --output_dir that all machines see; one process writes"): "save_on_each_node",
    ("false", "--save_steps"): "enable_jit_checkpoint",
    ("none", "--hub_model_id owner/name"): "push_to_hub_organization"}
OTHERS = {name: reason for reason, names in REASONS.items() for name in names.split()}

# What model_init_kwargs may hold, the arguments of transformers' from_pretrained: our options.
INIT_OPTIONS = {"dtype": "dtype", "torch_dtype": "dtype", "revision": "model_revision"}
INIT_SILENT = {
    "attn_implementation", "device_map", "trust_remote_code", "use_cache", "low_cpu_mem_usage",
    "use_safetensors", "use_kernels", "cache_dir", "token", "local_files_only"}


def settle(
    settings: dict[str, Any], words: list[str], known: Collection[str], path: str | None,
) -> dict[str, Any]:
    """Return `settings` (of a file and the command line) in our own names.

    `words` are what the parser did not know. An option of TRL that changes nothing is named on the
    screen and left out. Raises ValueError for one that would change something, with what to use
    instead, and for a name that nobody has.
    """
    foreign = {name: value for name, value in settings.items() if name not in known}
    ours = {name: value for name, value in settings.items() if name in known}
    set_environment(foreign.pop("env", None), path)
    ours = data_sets(ours.pop("datasets", None), path) | ours
    silent = []
    for where, options in ((f"--config {path}: ", foreign), ("--", pairs_of(words))):
        found, without_effect = translate(options, known, where)
        ours |= {name: value for name, value in found.items() if name not in settings}
        silent += without_effect
    name_silent(silent)
    return ours


def translate(
    options: dict[str, Any], known: Collection[str], where: str,
) -> tuple[dict[str, Any], list[str]]:
    """Return (our options, what has no effect) of options that are not ours, as `settle` has them.

    `where` they stand begins an error's message.
    """
    ours: dict[str, Any] = {}
    silent = []
    for name, value in options.items():
        if name in RENAMED:
            if text_of(value) != "none":
                ours[RENAMED[name]] = value
            continue
        if name == "model_init_kwargs" and text_of(value) != "none":
            ours |= init_options(value, where)
            continue
        if name not in OTHERS:
            raise ValueError(where + no_such(name, known, flag=where == "--"))
        neutral, reason = OTHERS[name]
        if neutral not in (ANY, text_of(value)):
            raise ValueError(
                f"{where}{name} {text_of(value)}: not an option here; instead: {reason}")
        why = f"({reason})" if neutral == ANY else text_of(value)
        silent.append(f"--{name} {why}")
    return ours, silent


def init_options(given: Any, where: str) -> dict[str, Any]:
    """Return our options of model_init_kwargs, a dict or its JSON. Raises ValueError for others."""
    try:
        entries = json.loads(given) if isinstance(given, str) else dict(given)
    except (TypeError, ValueError):
        entries = {text_of(given): given}  # refused below
    ours = {}
    for name, value in entries.items():
        if name in INIT_OPTIONS:
            ours[INIT_OPTIONS[name]] = plain(value)
        elif name not in INIT_SILENT and text_of(value) != "none":
            reason = OTHERS["model_init_kwargs"][1]
            raise ValueError(
                f"{where}model_init_kwargs {name}: not an option here; instead: {reason}")
    return ours


def name_silent(options: list[str]) -> None:
    """Name options without effect on the screen, once for all ranks."""
    if options and int(os.environ.get("RANK", 0)) == 0:
        print(f"without effect here: {', '.join(options)}", file=sys.stderr)


# DPOConfig in Python


def takes_trls(config: type) -> type:
    """Let a dataclass of options be made with TRL's other options too, as the command line is.

    Values may be TRL's: an enum, a torch.dtype. Raises ValueError for an option that would change
    something, with what to use instead, and for a name that nobody has.
    """
    make = config.__init__

    @functools.wraps(make)
    def init(self: Any, *values: Any, **options: Any) -> None:
        known = {field.name: field for field in dataclasses.fields(config)}
        own = {}
        for name, value in options.items():
            takes_none = name in known and "None" in str(known[name].type)
            if name in known and (value is not None or takes_none):  # else None is the default
                own[name] = one_word(plain(value)) if name == "fsdp" else plain(value)
        silent = [f"--{name}" for name in sorted(options.keys() & NO_EFFECT)]
        foreign = {
            name: plain(value) for name, value in options.items()
            if name not in known and name not in NO_EFFECT}
        found, without_effect = translate(foreign, known, f"{config.__name__}: ")
        name_silent(silent + without_effect)
        make(self, *values, **found | own)

    config.__init__ = init
    return config


def plain(value: Any) -> Any:
    """Return an enum as its value and a torch.dtype as its name, in lists too."""
    if isinstance(value, enum.Enum):
        return value.value
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def one_word(fsdp: Any) -> Any:
    """Return --fsdp as the command line has it: TRL's may be a list of words, or true or false."""
    if isinstance(fsdp, bool):
        return "full_shard" if fsdp else None
    return " ".join(fsdp) or None if isinstance(fsdp, (list, tuple)) else fsdp


def text_of(value: Any) -> str:
    """Return a value as the table has it: none and empty containers are none; 0.0 is 0."""
    if value is None or value in ([], (), {}, "", "null"):
        return "none"
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    text = f"{value:g}" if isinstance(value, float) else str(value).lower()
    return text.removesuffix(".0")


def no_such(name: str, known: Collection[str], flag: bool) -> str:
    """Say that there is no option of this name, and which comes nearest."""
    near = difflib.get_close_matches(name, [*known, *RENAMED, *OTHERS], 1)
    hint = "; see --help" if flag else ""
    if near:
        hint = f"; did you mean {'--' if flag else ''}{near[0]}?"
    return f"{name}: no such {'flag' if flag else 'option'}{hint}"


def pairs_of(words: list[str]) -> dict[str, Any]:
    """Return {name: value} of flags the parser did not know.

    They come as `--x`, `--x 1`, `--x=1`, `--no_x` or `--x a b`.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].replace("-", "_").partition("=")
            is_negated = name.startswith("no_") and name[3:] in OTHERS
            name = name[3:] if is_negated else name
            found[name] = value or ("false" if is_negated else True)
        elif not name:
            raise ValueError(f"{word}: each option is --name value; see --help")
        else:
            found[name] = word if found[name] is True else f"{found[name]} {word}"
    return found


def set_environment(variables: Any, path: str | None) -> None:
    """Set the variables under `env:` in a file of TRL's.

    Those that torch reads on import (OMP_NUM_THREADS) come too late, as they do in TRL.
    """
    if variables is None:
        return
    if not isinstance(variables, dict):
        kind = type(variables).__name__
        raise ValueError(f"--config {path}: env: found a {kind}; give NAME: value")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def data_sets(entries: Any, path: str | None) -> dict[str, Any]:
    """Return `datasets:` of a file in our options: as data sets joined by name, where that is all.

    extras/rows/mixture.py reads any others.
    """
    if not entries:
        return {}
    entries = [entries] if isinstance(entries, dict) else entries
    check_data_sets(entries, f"--config {path}: datasets: " if path else "--datasets: ")
    split = entries[0].get("split")
    config = entries[0].get("name")
    plain = {"path": None, "name": config, "split": split}
    names = [str(entry["path"]) for entry in entries]
    is_plain = len(set(names)) == len(names) and "[" not in str(split) and "+" not in str(split)
    for entry in entries:
        there = {name: value for name, value in entry.items() if value is not None}
        is_plain = is_plain and plain == {"name": None, "split": None} | there | {"path": None}
    if not is_plain:
        return {"datasets": entries}
    found = {"dataset_config": config, "dataset_train_split": split}
    return {"dataset_name": ",".join(names)} | {k: v for k, v in found.items() if v is not None}


ENTRY = ("path", "name", "split", "columns", "fraction", "data_files")


def check_data_sets(entries: Any, where: str) -> None:
    """Raise ValueError for a mixture's entries that cannot be meant; `where` begins the message."""
    is_path = lambda path: bool(path) and isinstance(path, (str, os.PathLike))
    has_path = lambda entry: isinstance(entry, dict) and is_path(entry.get("path"))
    if not isinstance(entries, (list, tuple)) or not all(map(has_path, entries)):
        raise ValueError(f"{where}give a list of entries with {', '.join(ENTRY)}")
    for entry in entries:
        check_data_set(entry, f"{where}{entry['path']}: ")
    shares = [entry.get("fraction") for entry in entries]
    given = [share for share in shares if share is not None]
    if given and len(given) < len(shares):
        raise ValueError(f"{where}fraction: give it for each data set, or for none")
    if given and not sum(given) > 0:
        raise ValueError(f"{where}fraction: each is 0; no row would be left")


def check_data_set(entry: dict, where: str) -> None:
    for name, value in entry.items():
        if name == "data_dir" and value is not None:
            raise ValueError(f"{where}data_dir: give name, a config or folder, or path with it")
        if name not in ENTRY and value is not None:
            raise ValueError(f"{where}{no_such(str(name), ENTRY, flag=False)}")
    share = entry.get("fraction")
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 <= share < float("inf")):
        raise ValueError(f"{where}fraction {share}: expected a number, 0 or more")
    columns = entry.get("columns")
    is_names = isinstance(columns, (list, tuple)) and all(isinstance(c, str) for c in columns)
    if columns is not None and not (is_names and columns):
        raise ValueError(f"{where}columns {columns}: expected a list of names")
    files = entry.get("data_files")
    if files is not None and not (files and isinstance(files, (str, list, dict))):
        raise ValueError(f"{where}data_files: give a path, a list of paths, or those of each split")
