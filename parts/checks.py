"""Refuse options that cannot be run, by name and with the reason, before anything is read."""

import math
from dataclasses import Field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from losses import NO_REFERENCE, READS_RATINGS
from parts.config import DPOConfig
from parts.configs import check_length
from parts.loss_checks import check_losses
from parts.metrics import METRICS
from parts.names import BIAS
from parts.output import check_apart
from parts.rates import check_rates
from parts.rows import row_at, user_path
from parts.schedule import optimizer_kind
from parts.turns import describe_ratings

FSDP_WORDS = {"true", "full_shard", "shard_grad_op", "auto_wrap", "offload"}  # transformers' words


def check_config(c: DPOConfig) -> None:
    """Raise ValueError for the first option without a meaning."""
    options = vars(c)
    defaults = vars(DPOConfig())
    for option in fields(DPOConfig):
        check_field(option, options[option.name])
    check_losses(options, defaults)
    check_values(c, options)
    check_readers(c, options, defaults)
    check_rates(c.lr_scheduler_type, c.lr_scheduler_kwargs, c.learning_rate)
    check_fsdp(c)
    check_best_model(c)
    if c.sync_ref_model and c.precompute_ref_log_probs:
        raise ValueError(
            "--sync_ref_model moves the reference; --precompute_ref_log_probs needs one that does "
            "not move")
    if c.gradient_checkpointing == "selective" and c.torch_compile:
        raise ValueError(
            "--gradient_checkpointing selective with --torch_compile: the compiler already chooses "
            "what norms and MLPs keep; leave one of them out")
    if c.load_in_8bit:
        raise ValueError(
            "--load_in_8bit: LLM.int8 rounds activations too, and which columns it leaves exact "
            "depends on all tokens of a forward: a pair's log-probs would depend on the other "
            "pairs in its batch; use --load_in_4bit, which is also smaller")


def check_field(option: Field, value: Any) -> None:
    """Raise ValueError for a value that is not among the choices, too small, or infinite."""
    choices = option.metadata["choices"]
    least = option.metadata["least"]
    for one in value if isinstance(value, list) else [value]:
        told = str(one).lower() if isinstance(one, bool) else one
        if one is not None and choices and told not in choices:
            raise ValueError(f"--{option.name} {one}: expected one of {', '.join(choices)}")
    if value is not None and least is not None and not least <= value < math.inf:
        raise ValueError(f"--{option.name} {value}: it must be {least} or more")


def check_values(c: DPOConfig, options: dict[str, Any]) -> None:
    """Raise ValueError for what is missing, out of range, or set twice."""
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not options[name]:
            raise ValueError(f"--{name} is missing")
    for name in (c.model_name_or_path, c.ref_model_name_or_path):
        if isinstance(name, str) and user_path(name).is_dir():
            check_apart("--output_dir", c.output_dir, [user_path(name)])
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if options[name] == 0:
            raise ValueError(f"--{name} 0: it must be above 0")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if options[name] >= 1:
            raise ValueError(f"--{name} {options[name]}: it must be below 1")
    if not 0 <= c.seed < 2**32:
        raise ValueError(f"--seed {c.seed}: 0 <= seed < 2^32")
    if c.bf16 and c.dtype == "float64" or c.fp16 and (c.bf16 or c.dtype != "float32"):
        name = "fp16" if c.fp16 else "bf16"
        raise ValueError(
            f"--{name} --dtype {c.dtype}: choose one of --bf16 and --fp16, for float32 weights")
    if c.eval_fraction >= 1:
        raise ValueError(f"--eval_fraction {c.eval_fraction}: a share of the pairs, below 1")
    if c.eval_fraction and c.eval_dataset_name:
        raise ValueError("--eval_fraction and --eval_dataset_name: choose one")


def needs_reference(c: DPOConfig) -> bool:
    """Tell whether any of the losses reads a reference's log-probs."""
    return not (c.reference_free or set(c.loss_type) <= NO_REFERENCE)


def precomputes_reference(c: DPOConfig) -> bool:
    """Tell whether the reference runs once, before training: by default, unless it moves."""
    if not needs_reference(c):
        return False
    if c.precompute_ref_log_probs is None:
        return not c.sync_ref_model
    return c.precompute_ref_log_probs


def check_readers(c: DPOConfig, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError for a value that is not the default and that nothing in this run reads."""
    readers = {  # what reads the flags: (whether it is on, the flags)
        "--use_peft": (
            c.use_peft, "lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora "
            "lora_target_parameters lora_modules_to_save"),
        "--sync_ref_model": (c.sync_ref_model, "ref_model_mixup_alpha ref_model_sync_steps"),
        "a loss that has a reference": (
            needs_reference(c), "precompute_ref_log_probs ref_model_name_or_path ref_adapter_name "
            "sync_ref_model"),
        "--eval_strategy steps": (c.eval_strategy == "steps", "eval_steps"),
        "--eval_strategy steps or epoch": (
            c.eval_strategy != "no" or bool(c.eval_dataset_name), "dataset_test_split"),
        "--load_best_model_at_end or --save_strategy best": (
            c.load_best_model_at_end or c.save_strategy == "best",
            "metric_for_best_model greater_is_better early_stopping_patience"),
        "--early_stopping_patience": (
            c.early_stopping_patience is not None, "early_stopping_threshold"),
        "--resume_from_checkpoint": (c.resume_from_checkpoint is not None, "force_resume"),
        "--generate_during_eval": (c.generate_during_eval, "generate_prompts"),
        "--report_to": (c.report_to != ["none"], "run_name project"),
        "--push_to_hub": (
            c.push_to_hub, "hub_strategy hub_model_id hub_private_repo hub_revision "
            "hub_token"),
        "--load_in_4bit": (
            c.load_in_4bit, "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_compute_dtype"),
        "--optim other than adafactor": (
            c.optim != "adafactor", "adam_beta1 adam_beta2 adam_epsilon"),
        "--dtype bfloat16": (c.dtype in ("bfloat16", "auto"), "stochastic_rounding"),
        "--disable_dropout false": (not c.disable_dropout, "lora_dropout"),
        "--loss_type bco_pair": ("bco_pair" in c.loss_type, "bco_delta"),
    }
    for reader, (is_on, names) in readers.items():
        for name in names.split():
            if not is_on and options[name] != defaults[name]:
                raise ValueError(f"--{name} {options[name]}: read only with {reader}")


def fsdp_words(fsdp: str | None) -> set[str]:
    """Return the words of --fsdp; none where it is off. Blocks are always wrapped one by one.

    Raises ValueError for an unknown word.
    """
    found = set(str(fsdp or "").lower().split()) - {"false"}
    unknown = sorted(found - FSDP_WORDS)
    if unknown:
        raise ValueError(
            f"--fsdp {fsdp}: {', '.join(unknown)} is not supported; known are "
            f"{', '.join(sorted(FSDP_WORDS))}")
    return found


def check_fsdp(c: DPOConfig) -> None:
    """Raise ValueError for what FSDP cannot be combined with."""
    if c.fsdp and c.ref_model_device:
        raise ValueError("--fsdp with --ref_model_device: not supported; leave one of them out")
    if c.fsdp and c.load_in_4bit and torch.__version__ < "2.13":
        raise ValueError(
            f"--fsdp with --load_in_4bit: torch {torch.__version__} shards no weights that are "
            "integers, as 4-bit weights are; install torch 2.13 or newer, or leave one of them out")


def check_best_model(c: DPOConfig) -> None:
    """Raise ValueError where what asks for the best model lacks what it needs."""
    if c.save_strategy == "best" and c.eval_strategy == "no":
        raise ValueError("--save_strategy best: it needs evaluations; give --eval_strategy")
    if not c.load_best_model_at_end and c.save_strategy != "best":
        return
    if c.eval_strategy == "no" or c.save_strategy == "no":
        raise ValueError(
            "--load_best_model_at_end: it needs evaluations and checkpoints; give --eval_strategy "
            "and --save_strategy")
    name = (c.metric_for_best_model or "loss").removeprefix("eval_")
    if not name.endswith(tuple(METRICS)):  # of several sets, NAME_loss: check_best_metric
        raise ValueError(
            f"--metric_for_best_model {name}: no such metric; there are "
            f"{', '.join(sorted(METRICS))}")


def check_store(c: DPOConfig, store: Any, config: Any, tokenizer_size: int) -> None:
    """Raise ValueError for pairs that this model or these losses cannot be given."""
    check_length(config, store.longest())
    if store.pictures and c.context_parallel_size > 1:
        raise ValueError(
            f"--context_parallel_size {c.context_parallel_size}: not for rows with images; leave "
            "them out, or train without it")
    check_tokens(c, store, config.vocab_size, tokenizer_size)
    check_ratings(c, store)


def check_ratings(c: DPOConfig, store: Any) -> None:
    """Raise ValueError for a pair without the scores that a loss reads.

    odpo takes the log of their gap, so there chosen must be above rejected.
    """
    reading = sorted(set(c.loss_type) & READS_RATINGS)
    if not reading:
        return
    takes_log = "odpo" in reading and c.odpo_margin == "log"
    gap = store.ratings[:, 0] - store.ratings[:, 1]
    bad = np.flatnonzero(np.isnan(gap) | (gap <= 0) if takes_log else np.isnan(gap))
    if len(bad):
        where = store.where(int(bad[0]))
        found = "chosen_score <= rejected_score"
        if np.isnan(gap[bad[0]]):
            found = describe_ratings(row_at(where))
        raise ValueError(
            f"{where}: {found}, which --loss_type {reading[0]} reads ({len(bad)} such rows)")


def check_pairs(c: DPOConfig, train_pairs: Any, eval_sets: dict[str, Any]) -> None:
    """Raise ValueError if there are no pairs to train on, or none to evaluate on though asked."""
    if not len(train_pairs):
        raise ValueError(f"{c.dataset_name}: no pair is left to train on; lower --eval_fraction")
    for name in ("eval_on_start", "generate_during_eval", "eval_strategy"):
        if not eval_sets and getattr(c, name) not in ("no", False):
            raise ValueError(
                f"--{name}: there are no pairs to evaluate on; give --eval_dataset_name or "
                "--eval_fraction")
    if c.load_best_model_at_end:
        check_best_metric(c, eval_sets)


def check_best_metric(c: DPOConfig, eval_sets: dict[str, Any]) -> None:
    """Raise ValueError where --metric_for_best_model is none of these sets' metrics.

    Of several sets a metric is named with the set: "NAME_loss".
    """
    name = "eval_" + (c.metric_for_best_model or "loss").removeprefix("eval_")
    known = [f"{prefix}_{metric}" for prefix in eval_sets for metric in sorted(METRICS)]
    if name not in known:
        raise ValueError(
            f"--metric_for_best_model {name.removeprefix('eval_')}: no such metric; there are "
            f"{', '.join(metric.removeprefix('eval_') for metric in known)}")


def check_tokens(c: DPOConfig, store: Any, vocab_size: int, tokenizer_size: int) -> None:
    """Raise ValueError for a pair with a token that the embedding has no row for.

    A tokenizer may have more tokens than that: Gemma 3's text models have one for images, which no
    text uses.
    """
    if tokenizer_size <= vocab_size:
        return
    at = np.flatnonzero(np.asarray(store.stream[:, 0]) >= vocab_size)
    if len(at):
        pair = int(np.searchsorted(store.ends, at[0], side="right"))
        raise ValueError(
            f"{store.where(pair)}: token {int(store.stream[at[0], 0])}, but the embedding of "
            f"{c.model_name_or_path} has {vocab_size} rows (the tokenizer {tokenizer_size} "
            "tokens); give the tokenizer that belongs to the model, or leave such rows out")


def check_optimizer(trainer: Any) -> None:
    """Say what will surprise about the optimizer; raise ValueError where a flag has no effect."""
    c = trainer.args
    say = trainer.log.say
    fixed = [name for name, _ in trainer.model.named_buffers() if name.endswith(f".{BIAS}")]
    if fixed:
        say(f"the correction biases of {len(fixed)} routers ({BIAS}) are held fixed, and saved as "
            "they were read")
    if c.stochastic_rounding is not None and (c.dtype != "bfloat16" or trainer.lora):
        raise ValueError(
            f"--stochastic_rounding {c.stochastic_rounding}: read only with --dtype bfloat16 and "
            "without LoRA, whose weights are float32")
    if c.optim.startswith("paged"):
        say(
            f"--optim {c.optim}: nothing is paged, the moments stay on the device; in all else it "
            "is adamw_8bit")
    kind = optimizer_kind(trainer) or ""
    if c.dtype != "bfloat16" or trainer.lora or not c.learning_rate or "stochastic" in kind:
        return
    share = share_moved(trainer.model, c.learning_rate)
    say(
        f"--dtype bfloat16: at --learning_rate {c.learning_rate:g} a step moves {share:.2g} of the "
        "weights, all others are rounded back; --stochastic_rounding moves all of them, and so "
        "does --bf16 over float32 weights")


def share_moved(model: nn.Module, step: float) -> float:
    """Return the share of bfloat16 weights that a step of this size, AdamW's first, changes.

    It is estimated from 10,000 or so of each tensor's.
    """
    moved = counted = 0.0
    for p in model.parameters():
        if p.requires_grad and not p.is_meta:
            flat = p.detach().flatten()
            some = flat[:: max(1, len(flat) // 10_000)].float()
            is_moved = (some - step * some.sign()).bfloat16() != some
            moved += float(is_moved.float().mean()) * len(flat)
            counted += len(flat)
    return moved / max(1.0, counted)


def check_dropout(c: DPOConfig, raw_config: dict[str, Any]) -> None:
    """Raise ValueError for dropout of the model's own, asked for by --disable_dropout false.

    Only LoRA has dropout here; leaving out the model's silently would train another model.
    """
    if c.disable_dropout:
        return
    text = raw_config | (raw_config.get("text_config") or {})
    for name, value in text.items():
        is_dropout = name.endswith(("dropout", "_pdrop")) and isinstance(value, (int, float))
        if is_dropout and value > 0 and name not in ("classifier_dropout", "summary_first_dropout"):
            raise ValueError(
                f"--disable_dropout false: config.json has {name} = {value}, and dropout inside "
                "the model is not supported; set it to 0 there (LoRA's own, --lora_dropout, is)")


def check_model(c: DPOConfig, config: Any, raw_config: dict[str, Any]) -> None:
    """Raise ValueError for flags about parts that this model does not have."""
    check_dropout(c, raw_config)
    if config.vision is None and not c.freeze_vision_tower:
        raise ValueError("--freeze_vision_tower false: this model reads no images")
    if config.moe is None and c.router_aux_loss_coef is not None:
        raise ValueError("--router_aux_loss_coef: this model has no experts")
    if config.moe and config.moe["router_aux_loss_coef"] is None and c.router_aux_loss_coef:
        raise ValueError(
            f"--router_aux_loss_coef {c.router_aux_loss_coef:g}: {config.model_type} models have "
            "no load-balancing loss here, as in transformers; leave it out")


def check_held_reference(c: DPOConfig, model: Any) -> None:
    """Raise ValueError for a type or device of a reference that is no model of its own."""
    if model is None and (c.ref_model_dtype or c.ref_model_device):
        raise ValueError(
            "--ref_model_dtype and --ref_model_device: the reference is no model of its own here, "
            "so they have no effect (--no_precompute_ref_log_probs keeps a copy, where all weights "
            "are trained)")


def check_evaluation(c: DPOConfig, sets: dict[str, Any], lora: dict, reference: Any) -> None:
    """Raise ValueError for an evaluation without pairs, or whose reference no longer exists."""
    if not sets:
        raise ValueError(
            "there are no pairs to evaluate on; give eval_dataset, --eval_dataset_name or "
            "--eval_fraction")
    is_merged = c.merge_adapter and not lora
    if is_merged and any(reference.needs_policy(store) for store, _ in sets.values()):
        raise ValueError(
            "the LoRA is merged, and the reference, which was the model without it, is gone; "
            "evaluate before the model is saved, or with --precompute_ref_log_probs")
