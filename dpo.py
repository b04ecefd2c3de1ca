"""Direct Preference Optimization (arXiv:2305.18290): raise the odds of chosen over rejected, relative to a reference.

    python dpo.py                                    the bundled demo, a minute or two on a laptop
    python dpo.py --model_name_or_path DIR --dataset_name prefs.jsonl --output_dir OUT
    torchrun --nproc_per_node=8 dpo.py ...           one machine, eight GPUs (gloo where there is no GPU)
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dpo.py ...
    python dpo.py --help                             every flag, its default and what it does

A step takes per_device_train_batch_size x ranks x gradient_accumulation_steps pairs. Its loss is the sum of the pairs'
losses over their number, whatever the ranks and the micro-batches: those change the speed, never the result.

Reading order: `DPOTrainer.train` and `train_step`, then `pair_logps`, then losses.py; data.py and model.py as needed.
"""

import argparse
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import losses
import model as models
from parts import files
from parts.configs import check_length
from parts.weights import is_plain

HERE = Path(__file__).resolve().parent


# Configuration and command line


def flag(default, text: str, group: str = "", choices: tuple = (), least: Optional[float] = None, bare: Optional[str] = None):
    """A configuration field with its help; `group` opens a new group of `--help`, `least` is its smallest value, `bare` is
    what the flag alone stands for."""
    meta = {"help": text + (f": {', '.join(choices)}" if choices else ""), "group": group, "choices": choices, "least": least,
            "bare": bare}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class DPOConfig:
    """Every option of a run. Names and defaults are TRL 1.16's where it has the option."""

    output_dir: Optional[str] = flag(None, "where the trained model, checkpoints and metrics.jsonl go", "model")
    model_name_or_path: Optional[str] = flag(None, "directory (or hub id) of the model to train")
    model_revision: Optional[str] = flag(None, "branch, tag or commit of a model on the hub (also --revision)")
    dtype: str = flag("float32", "type of the weights", choices=("float32", "bfloat16", "float64"))
    disable_dropout: bool = flag(True, "no dropout, in LoRA neither")
    fsdp: Optional[str] = flag(None, "share parameters, gradients, optimizer state and reference out among the ranks; or "
                               "transformers' words: full_shard, shard_grad_op, auto_wrap, offload (to the CPU)", bare="full_shard")
    gradient_checkpointing: bool = flag(False, "compute each block's activations twice to hold them once")
    freeze_vision_tower: bool = flag(True, "of a model that reads pictures, train all but the picture encoder")
    torch_compile: bool = flag(False, "compile norms and MLPs: fewer passes over memory, for a start of a minute or more")
    router_aux_loss_coef: Optional[float] = flag(None, "weight of the load-balancing loss of mixture-of-experts models; "
                                                 "unset takes config.json's", least=0)

    dataset_name: Optional[str] = flag(None, "preference pairs: file, glob or directory of .jsonl, .json, .gz; or hub id", "data")
    dataset_config: Optional[str] = flag(None, "which configuration, or folder, of a data set on the hub")
    dataset_revision: Optional[str] = flag(None, "branch, tag or commit of a data set on the hub; unset is its main branch")
    dataset_train_split: str = flag("train", "its split to train on")
    dataset_test_split: str = flag("test", "its split to evaluate on, with --eval_strategy")
    eval_dataset_name: Optional[str] = flag(None, "pairs to evaluate on, likewise")
    eval_fraction: float = flag(0.0, "share of the training pairs that is held out for evaluation instead", least=0)
    max_length: Optional[int] = flag(1024, "prompt + completion are cut to so many tokens; none for no limit", least=1)
    max_prompt_length: Optional[int] = flag(None, "prompts are cut to so many tokens first", least=1)
    max_completion_length: Optional[int] = flag(None, "completions are cut to so many tokens first", least=1)
    truncation_mode: str = flag("keep_start", "which end of a sequence a cut keeps", choices=("keep_start", "keep_end"))
    on_bad_row: str = flag("stop", "unusable rows; stop names the first, skip counts and lists them", choices=("stop", "skip"))
    shuffle_dataset: bool = flag(True, "shuffle each epoch, by seed and epoch alone; false keeps file order")
    dataset_num_proc: Optional[int] = flag(None, "processes that tokenize", least=1)
    cache_dir: Optional[str] = flag(None, "where tokenized pairs and reference log-probs are kept; unset is ~/.cache/dpo")

    loss_type: list[str] = flag(["sigmoid"], "one or more of: " + " ".join(sorted(losses.LOSSES)), "loss")
    loss_weights: Optional[list[float]] = flag(None, "weight of each loss type; unset is 1 each")
    beta: float = flag(0.1, "strength of the tie to the reference (ipo: the paper's tau)")
    label_smoothing: float = flag(0.0, "probability that a label is flipped (sigmoid, robust, exo_pair, aot, cpo)")
    f_divergence_type: str = flag("reverse_kl", "scores of f-DPO", choices=tuple(losses.F_DIVERGENCES))
    f_alpha_divergence_coef: float = flag(0.5, "alpha of alpha_divergence, u^-alpha")
    reference_free: bool = flag(False, "take the reference's log-probs as 0")
    ld_alpha: Optional[float] = flag(None, "LD-DPO: weight of the tokens beyond the shorter completion's length")
    ld_apply_to_ref: bool = flag(True, "LD-DPO weighs the reference's log-probs too")
    use_weighting: bool = flag(False, "WPO: weigh pairs by how likely the policy is to have written them")
    wpo_clamp: bool = flag(True, "WPO: weights are at most 1, as the authors have it (TRL does not clamp)")
    rpo_alpha: Optional[float] = flag(None, "RPO: add so much of the chosen completion's negative log-likelihood", least=0)
    rpo_average: str = flag("sequence", "its average; sequence is the mean of per-token means", choices=("sequence", "token"))
    sft_average: str = flag("token", "average of sft, orpo, cpo; token is over the global batch, sum is none",
                            choices=("token", "sequence", "sum"))
    ipo_average: str = flag("token", "ipo: log-ratios per token, or their sum", choices=("token", "sum"))
    discopop_tau: float = flag(0.05, "discopop: temperature of the blend")
    simpo_gamma: float = flag(0.5, "simpo, alphapo: target margin (the authors' flag is this over beta)")
    alphapo_alpha: float = flag(0.25, "alphapo: shape of the reward")
    cpo_alpha: float = flag(1.0, "cpo: weight of the negative log-likelihood")
    orpo_lambda: float = flag(0.1, "orpo: weight of the odds-ratio term (TRL calls it beta)")
    dpop_lambda: float = flag(50.0, "dpop: penalty where chosen falls below the reference")
    rdpo_alpha: float = flag(0.01, "rdpo: penalty per token of length difference")
    odpo_alpha: float = flag(1.0, "odpo: weight of the offset from the rows' scores")
    odpo_margin: str = flag("log", "odpo: offset by the log of the score gap, or the raw gap", choices=("log", "raw"))
    rpo_eta: float = flag(1.0, "rpo_sq, rpo_bwd_kl, rpo_fwd_kl: scale of the rows' score gap")
    bco_delta: str = flag("running", "bco_pair's delta: the running mean reward of earlier steps, this step's own first "
                          "(as TRL 0.18), or zero (as TRL 1.16)", choices=("running", "first", "zero"))
    exact_global_loss: Optional[bool] = flag(None, "compute the loss over the whole global batch at once, at the price of "
                                             "one more forward; unset does so where a loss sorts the batch")

    precompute_ref_log_probs: Optional[bool] = flag(None, "run the reference once, before training, and keep no copy; "
                                                    "unset does so unless the reference moves", "reference")
    ref_model_name_or_path: Optional[str] = flag(None, "another model, or adapter, as reference; unset is the model as it starts")
    ref_adapter_name: Optional[str] = flag(None, "the reference is the adapter of this name, in its folder; or what is trained, "
                                                 "as it starts")
    ref_model_dtype: Optional[str] = flag(None, "hold it in this type; bfloat16 halves its memory",
                                          choices=("float32", "bfloat16", "float64"))
    ref_model_device: Optional[str] = flag(None, "hold it there; cpu frees the GPU and is slow")
    sync_ref_model: bool = flag(False, "TR-DPO: move the reference towards the policy")
    ref_model_mixup_alpha: float = flag(0.6, "TR-DPO: share of the policy in the moved reference")
    ref_model_sync_steps: int = flag(512, "TR-DPO: steps between moves", least=1)

    use_peft: bool = flag(False, "train a LoRA; the reference is the model without it", "LoRA")
    lora_r: int = flag(16, "rank", least=1)
    lora_alpha: int = flag(32, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, "dropout before A; needs --disable_dropout false", least=0)
    use_rslora: bool = flag(False, "scale by lora_alpha / sqrt(lora_r) instead")
    loraplus_lr_ratio: Optional[float] = flag(None, "LoRA+: B learns so many times faster than A")
    merge_adapter: bool = flag(False, "at the end, add the LoRA to the weights and save a whole model; over 4 bits, to "
                                      "the weights made wide, in bfloat16")
    lora_target_modules: Optional[list[str]] = flag(None, "names such as q_proj v_proj lm_head embed_tokens, or "
                                                    "all-linear; unset is q_proj v_proj (or their fused form)")
    lora_target_parameters: Optional[list[str]] = flag(None, "stacks of experts and routers: mlp.experts.gate_up_proj "
                                                             "mlp.experts.down_proj gate.weight")
    lora_modules_to_save: Optional[list[str]] = flag(None, "modules that are trained whole beside the LoRA, such as lm_head norm")
    use_dora: bool = flag(False, "DoRA: learn the length of each row of the weights apart from its direction")
    model_adapter_name: Optional[str] = flag(None, "train the adapter of this name, in its folder of model_name_or_path")

    load_in_4bit: bool = flag(False, "QLoRA: hold the base, and a reference of its own, in 4 bits; files that are in "
                                     "bitsandbytes' 4 bits need no flag")
    bnb_4bit_quant_type: str = flag("nf4", "which 16 levels a weight may have", choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = flag(False, "quantize the scales of the 4 bits too")
    bnb_4bit_compute_dtype: Optional[str] = flag(None, "type in which weights of 4 bits are multiplied; unset is that "
                                                 "of the other layers", choices=("float32", "bfloat16", "float16"))
    load_in_8bit: bool = flag(False, "refused: use --load_in_4bit")

    per_device_train_batch_size: int = flag(8, "pairs in one forward", "training", least=1)
    gradient_accumulation_steps: int = flag(1, "forwards in one optimizer step", least=1)
    max_tokens_per_forward: Optional[int] = flag(None, "cut forwards further, to at most so many tokens: bounds memory; "
                                                 "unset is 2048 on a CPU, where more are no faster", least=1)
    num_train_epochs: float = flag(3.0, "passes over the pairs", least=0)
    max_steps: int = flag(-1, "stop after so many optimizer steps; -1 leaves it to num_train_epochs")
    optim: str = flag("adamw_torch_fused", "the optimizer; both are the same", choices=("adamw_torch_fused", "adamw_torch"))
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW", least=0)
    lr_scheduler_type: str = flag("linear", "how the learning rate falls",
                                  choices=("linear", "cosine", "constant", "constant_with_warmup"))
    warmup_steps: float = flag(0, "steps of linear warm-up; below 1, a share of all steps", least=0)
    warmup_ratio: float = flag(0.0, "the older name of that share", least=0)
    weight_decay: float = flag(0.0, "decoupled decay of matrices (norms and biases are left alone)", least=0)
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment", least=0)
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment", least=0)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", least=0)
    max_grad_norm: float = flag(1.0, "clip gradients to this norm; 0 does not", least=0)
    bf16: Optional[bool] = flag(None, "bfloat16 autocast over float32 weights; unset is on where the device computes it")
    fp16: bool = flag(False, "float16 autocast with loss scaling, for GPUs that know no bfloat16")
    skip_nonfinite: int = flag(0, "go on after so many steps whose loss or gradient was not finite, without applying them", least=0)
    seed: int = flag(42, "of shuffling, LoRA's start and dropout")
    use_cpu: bool = flag(False, "train on the CPU though there is a GPU")
    ddp_timeout: int = flag(1800, "seconds after which ranks give one another up", least=1)

    logging_steps: float = flag(10, "steps between lines of metrics; below 1, a share of all steps",
                                "evaluation and files", least=0)
    logging_first_step: bool = flag(False, "log the first step too")
    disable_tqdm: Optional[bool] = flag(None, "no progress bar; unset shows one at a terminal")
    report_to: list[str] = flag(["none"], "loggers besides metrics.jsonl", choices=("none", "tensorboard", "wandb", "trackio"))
    run_name: Optional[str] = flag(None, "the run's name there; unset is output_dir's")
    project: str = flag("huggingface", "the project there (wandb, trackio)")
    eval_strategy: str = flag("no", "when to evaluate; no is once, at the end, where there are pairs for it",
                              choices=("no", "steps", "epoch"))
    eval_steps: Optional[float] = flag(None, "steps between evaluations; unset is logging_steps", least=0)
    eval_on_start: bool = flag(False, "evaluate before the first step too")
    generate_during_eval: bool = flag(False, "answer a few prompts at each evaluation, and before the first step")
    generate_prompts: Optional[str] = flag(None, "file of rows with these prompts; unset is the first evaluation pairs'")
    per_device_eval_batch_size: int = flag(8, "pairs in one forward of evaluation and of the reference pass", least=1)
    save_strategy: str = flag("steps", "when to write checkpoint-N, from which a run resumes",
                              choices=("no", "steps", "epoch"))
    save_steps: float = flag(500, "steps between checkpoints; below 1, a share of all steps", least=0)
    save_total_limit: Optional[int] = flag(None, "keep so many checkpoints", least=1)
    load_best_model_at_end: bool = flag(False, "keep the checkpoint of the best evaluation, and end with it")
    metric_for_best_model: Optional[str] = flag(None, "the metric that says which is best; unset is loss")
    greater_is_better: Optional[bool] = flag(None, "whether more of it is better; unset unless its name ends in loss")
    early_stopping_patience: Optional[int] = flag(None, "stop after so many evaluations that were no better", least=1)
    early_stopping_threshold: float = flag(0.0, "by which an evaluation must be better to count", least=0)
    resume_from_checkpoint: Optional[str] = flag(None, "true (the newest in output_dir) or a checkpoint-N directory")
    force_resume: bool = flag(False, "resume though data or settings are not those of the checkpoint")

    dry_run: bool = flag(False, "set up, say how many steps and tokens, how much memory and time, and leave")

    push_to_hub: bool = flag(False, "at the end, upload output_dir with a model card; needs a token", "the hub")
    hub_model_id: Optional[str] = flag(None, "owner/name of the repository; unset is output_dir's name, your own")
    hub_private_repo: Optional[bool] = flag(None, "make it private; unset is its owner's default")
    hub_revision: Optional[str] = flag(None, "the branch to push to")
    hub_token: Optional[str] = flag(None, "token to write with; unset is that of `hf auth login` or HF_TOKEN")


# Flags of TRL that steer only its machinery: taken, named once, without effect.
NO_EFFECT = set("""
    attn_implementation device_map remove_unused_columns padding_free pad_to_multiple_of pad_token dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph gradient_checkpointing_kwargs
    precompute_ref_batch_size logging_strategy logging_nan_inf_filter log_level log_level_replica log_on_each_node
    skip_memory_metrics overwrite_output_dir do_train do_eval prediction_loss_only include_num_input_tokens_seen
    average_tokens_across_devices ignore_bias_buffers lora_task_type torch_empty_cache_steps use_liger_kernel
    hub_strategy hub_always_push bnb_4bit_quant_storage
    save_safetensors half_precision_backend trust_remote_code tf32""".split())


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError."""

    def error(self, message: str):
        raise ValueError(message)


def whole(value) -> int:
    """int, but neither 2.5 nor `true` is a whole number."""
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError(value)
    return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(float(value))


def truth(value) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]


def number(value) -> float:
    """float, but `true` is no number, and neither is nan."""
    if isinstance(value, bool) or math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


PARSERS = {"bool": (truth, "true or false"), "int": (whole, "a whole number"), "float": (number, "a number"),
           "str": (str, "a text")}


def parse_value(name: str, value):
    """`value` (text, or from a config file) as the type of DPOConfig's field `name`. Raises ValueError."""
    field = DPOConfig.__dataclass_fields__[name]
    kind = str(field.type)
    if "Optional" in kind and str(value).lower() in ("none", "null"):
        return None
    parse, wanted = next(PARSERS[k] for k in PARSERS if k in kind)
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        parsed = [parse(v) for v in values]
        if not parsed or ("list" not in kind and len(parsed) > 1):
            raise ValueError
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ValueError(f"--{name} {value}: {wanted} is expected") from None
    return parsed if "list" in kind else parsed[0]


def check_field(field: dataclasses.Field, value) -> None:
    """Raise ValueError for a value that is none of the field's choices, below its least, or infinite."""
    choices, least = field.metadata["choices"], field.metadata["least"]
    for one in value if isinstance(value, list) else [value]:
        if one is not None and choices and one not in choices:
            raise ValueError(f"--{field.name} {one}: one of {', '.join(choices)} is expected")
    if value is not None and least is not None and not least <= value < math.inf:
        raise ValueError(f"--{field.name} {value}: it must be {least} or more")


def build_parser() -> Parser:
    parser = Parser(prog="dpo.py", description=__doc__, allow_abbrev=False, add_help=True,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="toml, json or yaml file with any of these; the command line wins")
    group = parser
    for f in dataclasses.fields(DPOConfig):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        text = f"{f.metadata['help']} [{default if default is not None else 'unset'}]".replace("%", "%%")
        kind = str(f.type)
        if "bool" in kind:
            group.add_argument(f"--{f.name}", nargs="?", const="true", metavar="BOOL", help=text)
            group.add_argument(f"--no_{f.name}", dest=f.name, action="store_const", const="false", help=argparse.SUPPRESS)
        else:
            nargs = "+" if "list" in kind else "?" if f.metadata["bare"] else None
            group.add_argument(f"--{f.name}", nargs=nargs, const=f.metadata["bare"], metavar="X", help=text)
    for name in NO_EFFECT:
        for option in (f"--{name}", f"--no_{name}"):
            parser.add_argument(option, dest=name, nargs="*", help=argparse.SUPPRESS)
    return parser


def read_config_file(path: str) -> dict:
    """The options in a toml, json or yaml file. Raises ValueError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".toml"):
            import tomllib

            settings = tomllib.loads(text)
        elif path.endswith(".json"):
            settings = json.loads(text)
        else:
            import yaml

            settings = yaml.safe_load(text) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except Exception as error:  # each parser raises its own kind
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"--config {path}: found a {type(settings).__name__}; each entry must be an option's name and its value")
    return settings


def parse_config(argv: list[str]) -> DPOConfig:
    """DPOConfig from a command line; without model and data set, the demo's settings lie under it."""
    parsed, words = build_parser().parse_known_args(argv)
    given = vars(parsed)
    path = given.pop("config", None)
    settings = ({} if path is None else read_config_file(path)) | given
    fields = DPOConfig.__annotations__
    if words or settings.keys() - NO_EFFECT - fields.keys():  # TRL's other options, or a mistake
        from extras import trl_flags

        settings = trl_flags.settle(settings, words, fields.keys() | NO_EFFECT, path)
    if not {"model_name_or_path", "dataset_name"} & settings.keys():
        demo = read_config_file(str(HERE / "demo" / "config.toml"))
        settings = {k: str(HERE / v) if k.endswith(("_path", "dataset_name")) else v for k, v in demo.items()} | settings
    unread = sorted(settings.keys() & NO_EFFECT)
    if unread and int(os.environ.get("RANK", 0)) == 0:
        print(f"without effect here: {', '.join('--' + name for name in unread)}", file=sys.stderr)
    return DPOConfig(**{k: parse_value(k, v) for k, v in settings.items() if k not in NO_EFFECT})


def check_config(c: DPOConfig) -> None:
    """Raise ValueError for what cannot be run, before anything is read."""
    options, defaults = vars(c), vars(DPOConfig())
    for f in dataclasses.fields(DPOConfig):
        check_field(f, options[f.name])
    losses.check_losses(options, defaults)
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not options[name]:
            raise ValueError(f"--{name} is missing")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if options[name] == 0:
            raise ValueError(f"--{name} 0: it must be above 0")
    for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
        if options[name] >= 1:
            raise ValueError(f"--{name} {options[name]}: it must be below 1")
    if not 0 <= c.seed < 2**32:
        raise ValueError(f"--seed {c.seed}: 0 <= seed < 2^32")
    if c.bf16 and c.dtype == "float64" or c.fp16 and (c.bf16 or c.dtype != "float32"):
        raise ValueError(f"--{'fp16' if c.fp16 else 'bf16'} --dtype {c.dtype}: choose one of --bf16 and --fp16, for "
                         "float32 weights")
    if c.eval_fraction >= 1:
        raise ValueError(f"--eval_fraction {c.eval_fraction}: a share of the pairs, below 1")
    if c.eval_fraction and c.eval_dataset_name:
        raise ValueError("--eval_fraction and --eval_dataset_name: choose one")
    check_readers(c, options, defaults)


def check_readers(c: DPOConfig, options: dict, defaults: dict) -> None:
    """Refuse a non-default value that nothing reads in this combination, and reference modes that exclude each other."""
    reads_reference = not (set(c.loss_type) <= losses.NO_REFERENCE or c.reference_free)
    readers = {  # what reads them: (whether it is there, the flags)
        "--use_peft": (c.use_peft, "lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora "
                        "lora_target_parameters lora_modules_to_save"),
        "--sync_ref_model": (c.sync_ref_model, "ref_model_mixup_alpha ref_model_sync_steps"),
        "a loss that has a reference": (reads_reference, "precompute_ref_log_probs ref_model_name_or_path "
                                        "ref_adapter_name sync_ref_model"),
        "--eval_strategy steps": (c.eval_strategy == "steps", "eval_steps"),
        "--eval_strategy steps or epoch": (c.eval_strategy != "no" or bool(c.eval_dataset_name), "dataset_test_split"),
        "--load_best_model_at_end": (c.load_best_model_at_end, "metric_for_best_model greater_is_better early_stopping_patience"),
        "--early_stopping_patience": (c.early_stopping_patience is not None, "early_stopping_threshold"),
        "--resume_from_checkpoint": (c.resume_from_checkpoint is not None, "force_resume"),
        "--generate_during_eval": (c.generate_during_eval, "generate_prompts"),
        "--report_to": (c.report_to != ["none"], "run_name project"),
        "--push_to_hub": (c.push_to_hub, "hub_model_id hub_private_repo hub_revision hub_token"),
        "--load_in_4bit": (c.load_in_4bit, "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_compute_dtype"),
        "--disable_dropout false": (not c.disable_dropout, "lora_dropout"),
        "--loss_type bco_pair": ("bco_pair" in c.loss_type, "bco_delta")}
    for reader, (there, names) in readers.items():
        for name in names.split():
            if not there and options[name] != defaults[name]:
                raise ValueError(f"--{name} {options[name]}: read only with {reader}")
    if c.fsdp:
        from extras import fsdp

        fsdp.check_options(c)
    if c.load_best_model_at_end:
        from extras import checkpoints

        checkpoints.check_options(c, set(metrics_of([0.0] * len(SUMS), 1)))
    if c.sync_ref_model and c.precompute_ref_log_probs:
        raise ValueError("--sync_ref_model moves the reference; --precompute_ref_log_probs needs one that stays")
    if c.load_in_8bit:
        raise ValueError("--load_in_8bit: LLM.int8 rounds activations too, and which columns it spares depends on all "
                         "tokens of a forward: a pair's log-probs would depend on what it is batched with; use "
                         "--load_in_4bit, which is also smaller")


# Ranks


class Ranks(NamedTuple):
    """This process among the others that train the same model."""

    rank: int
    world: int
    device: torch.device
    timeout: int = 1800  # seconds after which it gives up one that is silent

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def exact(self) -> torch.device:
        """Where float64 sums are kept: Apple's GPUs have none."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def sum(self, x: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], dict]) -> dict:
        """`make()` is run by rank 0 and its JSON object handed to all; a ValueError or OSError there is raised on every rank."""
        if self.world == 1:
            return make()
        from extras import ranks

        return ranks.from_first(self, make)


def start_ranks(use_cpu: bool, timeout: int) -> Ranks:
    """Join the other processes of torchrun or accelerate, where there are any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available() and not use_cpu
    on_mac = torch.backends.mps.is_available() and not use_cpu and world == 1
    device = torch.device("cuda", local) if on_gpu else torch.device("mps" if on_mac else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif not on_mac:
        keep_freed_memory()
        torch.set_flush_denormal(True)  # saturated losses have gradients of 1e-40; CPUs multiply those 50 times slower
    if world > 1 and not dist.is_initialized():
        wait = timedelta(seconds=timeout)
        store, _, _ = next(rendezvous("env://", rank, world, timeout=wait))
        # torchrun keeps its store when it starts workers again; the addresses of those before must not be found there
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=wait, rank=rank, world_size=world, store=store)
    return Ranks(rank, world, device, timeout)


def keep_freed_memory() -> None:
    """glibc returns freed tensors to the kernel, which then clears every page anew: 8 % of a CPU step. Keep them."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass  # another libc


@contextmanager
def ending_ranks():
    """Leave the other processes in order, and this one as it was, whatever happens inside."""
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        if dist.is_initialized():
            dist.destroy_process_group()


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, faster than float32 (of CPUs, those with AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def deal(pairs: np.ndarray, tokens: np.ndarray, world: int) -> list[np.ndarray]:
    """The pairs of a global batch for each rank, with nearly equal tokens: largest first, to whoever has least."""
    if world == 1:
        return [pairs]
    hands, load = [[] for _ in range(world)], np.zeros(world)
    for i in sorted(range(len(pairs)), key=lambda i: (-tokens[pairs[i]], i)):
        rank = int(load.argmin())
        hands[rank].append(i)
        load[rank] += tokens[pairs[i]]
    return [pairs[np.array(sorted(hand), dtype=np.int64)] for hand in hands]


# What one forward measures of each pair


class Scored(NamedTuple):
    """Of B pairs, in their order. `logps` and `chosen_nll` carry gradients; the others do not."""

    logps: Tensor  # (B, 2) chosen, rejected: sums over the completion, desensitised where ld_alpha is set
    chosen_nll: Tensor  # (B,) -log pi(chosen), always the plain sum
    wpo: Tensor  # (B,) WPO weights; ones without use_weighting
    stats: Tensor  # (B, 6) see STATS


STATS = ("entropy", "top1", "chosen_logits", "rejected_logits", "chosen_tokens", "rejected_tokens")  # sums over tokens


def score(model: nn.Module, batch: data.Batch, c: DPOConfig) -> tuple[Scored, Optional[Tensor]]:
    """Run the policy on a batch; also its mixture-of-experts auxiliary loss, where it has one."""
    out = model(batch)
    lengths = batch.lengths
    with torch.no_grad():
        per_token = (out.entropy, out.is_top1.to(out.entropy.dtype), out.mean_logits)
        entropy, top1, logits = (losses.completion_sums(t, lengths) for t in per_token)
        stats = torch.stack([entropy.sum(1), top1[:, 0], *logits.unbind(1), *lengths.to(logits.dtype).unbind(1)], 1)
        wpo = torch.ones(len(lengths), dtype=logits.dtype, device=logits.device)
        if c.use_weighting:
            wpo = losses.wpo_weights(out.logps, out.log_sum_sq_probs, lengths, c.wpo_clamp)
    plain = losses.completion_sums(out.logps, lengths)
    logps = plain if c.ld_alpha is None else losses.completion_sums(out.logps, lengths, c.ld_alpha)
    return Scored(logps, -plain[:, 0], wpo, stats), getattr(out, "aux_loss", None)


def split_sums(token_logps: Tensor, lengths: Tensor) -> Tensor:  # (B, 2, 2)
    """[completion, (first l_p tokens, rest)]: what is kept of a reference, so that ld_alpha may change later."""
    head = losses.completion_sums(token_logps, lengths, 0.0)
    return torch.stack([head, losses.completion_sums(token_logps, lengths) - head], -1)


def scored_lengths(store: data.PairStore, pairs: np.ndarray) -> np.ndarray:  # (P, 2)
    """Scored tokens of chosen and rejected: all of them, but for the first where no prompt precedes it."""
    prompt, chosen, rejected = store.lengths[pairs].T
    own = np.where(store.rejected_prompt_lengths[pairs] < 0, prompt, store.rejected_prompt_lengths[pairs])
    return np.maximum(np.stack([chosen - (prompt == 0), rejected - (own == 0)], 1), 0)


def longest(store: data.PairStore) -> int:
    """Tokens of the longest sequence, prompt and completion."""
    prompt, chosen, rejected = np.asarray(store.lengths).T
    own = np.where(store.rejected_prompt_lengths < 0, prompt, store.rejected_prompt_lengths)
    return int(max((prompt + chosen).max(), (own + rejected).max()))


def fingerprint(model: nn.Module) -> str:
    """Tells models apart without reading all of them: a hash of each tensor's name, shape and first thousand values."""
    h = hashlib.sha256()
    for name, p in chain(model.named_parameters(), model.named_buffers()):  # buffers: weights in 4 bits
        if p.is_meta:  # FSDP: rank 0 has the weights
            continue
        h.update(f"{name} {tuple(p.shape)}".encode())
        h.update(p.detach().flatten()[:1000].cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def find_model(name: str, ranks: Ranks | None = None, revision: str | None = None, adapter: str | None = None) -> str:
    """The directory of a model, or of the adapter so named in it: `name` as it is, else from the hub."""
    if not data.on_hub(name) and revision is None and adapter is None:
        return name
    from extras.models import opening

    return opening.model_directory(name, ranks, revision, adapter)


def tokenizer_home(directory: str, ranks: Ranks) -> str:
    """Where the tokenizer lies: PEFT's adapters may leave it with their base."""
    if is_plain(directory):
        return directory
    from extras.models import opening

    return opening.tokenizer_home(directory, ranks)


def load_policy(directory: str, dtype: torch.dtype, max_length: int | None = None, ranks: Ranks | None = None,
                four_bit: dict | None = None, device: str = "cpu") -> tuple[models.Decoder, dict]:
    """A model, and its LoRA's settings where `directory` is a PEFT adapter (the model is then its base with it active)."""
    if four_bit is None and is_plain(directory):
        return models.load_model(directory, dtype, device, max_length), {}
    from extras.models import opening

    return opening.load_adapted(directory, dtype, max_length, ranks, four_bit, device)


def load_adapter(model: models.Decoder, directory: str, adapter_name: str = "default") -> models.Decoder:
    """Load an adapter onto `model` under a name; the first is active and trained, others can be the reference.

    As with TRL 0.18: load_adapter(model, DIR, "train"), load_adapter(model, DIR, "reference"), and then
    DPOTrainer(model, args=DPOConfig(model_adapter_name="train", ref_adapter_name="reference", ...)).
    """
    from extras.models import opening

    return opening.load_adapter(model, directory, adapter_name)


# The trainer


class DPOTrainer:
    """Trains `model` on pairs; see DPOConfig for every option, and docs/api.md for what may be given as an object.

    Models are directories, hub ids or Decoders; data sets are paths, hub ids, PairStores or rows (a list of dicts, a
    datasets.Dataset). What is unset the configuration names.
    """

    def __init__(self, model: Any = None, ref_model: Any = None, args: Optional[DPOConfig] = None,
                 train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, peft_config: Any = None):
        c = args or DPOConfig()
        given = dict(model=model, ref_model=ref_model, train_dataset=train_dataset, eval_dataset=eval_dataset,
                     processing_class=processing_class, peft_config=peft_config)
        if any(value is not None for value in given.values()):
            from extras import objects

            c, given = objects.accept(c, given)
            model, ref_model, train_dataset, eval_dataset, processing_class, peft_config = given.values()
        self.args = c
        check_config(c)
        self.ranks = start_ranks(c.use_cpu, c.ddp_timeout)
        if self.ranks.world > 1:
            from extras import ranks

            ranks.agree(self.ranks, {name: value for name, value in vars(c).items() if name not in ranks.OWN})
        self.choose_places()
        if not isinstance(model, models.Decoder):
            model = find_model(model or c.model_name_or_path, self.ranks, c.model_revision, c.model_adapter_name)
        home = model if isinstance(model, str) else c.model_name_or_path
        self.tokenizer = processing_class or data.Tokenizer.load(tokenizer_home(home, self.ranks))
        if c.push_to_hub:  # before training, so that a missing token or right costs no run
            from extras import card

            card.create_repository(self)
        self.load_model(model, peft_config or {})
        self.make_ready()
        self.load_data(train_dataset, eval_dataset)
        self.load_ref(ref_model)
        if c.fsdp:
            from extras import fsdp

            fsdp.shard(self)
        if self.ranks.world > 1:
            ranks.agree(self.ranks, {"data": self.train_store.digest, "model": self.started_from, "torch": torch.__version__})
        self.plan_steps()
        self.begin()
        self.loggers = []
        if c.report_to != ["none"]:
            from extras import loggers

            self.loggers = loggers.make(self)
        if c.generate_during_eval:
            from extras import samples

            self.sample_prompts = samples.prompts_of(self)
        self.ranks.from_first(self.claim_output)
        self.checkpoint = None  # where to go on from
        if c.resume_from_checkpoint is not None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            self.find_checkpoint(c.resume_from_checkpoint)

    # set-up

    def choose_places(self) -> None:
        """Directories, devices and types."""
        c, device = self.args, self.ranks.device
        self.output_dir, self.panel = Path(c.output_dir), None
        self.cache_dir = Path(c.cache_dir) if c.cache_dir else Path.home() / ".cache" / "dpo"
        self.wide = torch.promote_types(getattr(torch, c.dtype), torch.float32)  # of sums of log-probs
        self.bf16 = c.dtype == "float32" and not c.fp16 and computes_bf16(device) if c.bf16 is None else c.bf16
        self.half = torch.float16 if c.fp16 else torch.bfloat16  # what autocast computes in, where it is on
        # where models are loaded to; FSDP hands shards out from rank 0's memory
        self.home = device if not c.fsdp else torch.device("cpu" if self.ranks.first else "meta")

    def begin(self) -> None:
        """All that moves during a run, as it is before the first step."""
        self.step, self.num_tokens, self.pairs_done, self.pending = 0, 0, 0, []
        self.order = -1, None  # epoch, and its pairs in order
        self.options, self.delta_sum, self.delta_count = vars(self.args) | {"delta": 0.0}, 0.0, 0
        self.evaluation, self.best = {}, {"step": 0, "value": None, "directory": None, "waited": 0}
        self.scaling = {"scale": 2.0**16 if self.args.fp16 else 1.0, "since": 0}  # of the loss
        self.skipped = 0  # steps not applied
        self.signal, self.leaving = 0, False  # what this process was told, and whether a rank was

    def load_model(self, model, settings: dict) -> None:
        """The policy: a checkpoint, one with a fresh LoRA on it, or an adapter's directory, whose LoRA is trained on.

        `settings` are PEFT's that have no flag (rank_pattern, layers_to_transform ...)."""
        c, adapter = self.args, {}
        torch.manual_seed(c.seed)
        self.model = self.given = model
        if not isinstance(model, models.Decoder):
            self.model, adapter = self.load_policy(model)
            if adapter and c.use_peft:
                raise ValueError(f"--use_peft: {c.model_name_or_path} is an adapter already, and is trained on as it is; "
                                 "for a new one on top, merge it first (--merge_adapter)")
        elif hasattr(model, "adapters"):
            from extras.lora.adapters import activate_named

            adapter = activate_named(model, c.model_adapter_name)
        self.lora, self.continues = adapter, bool(adapter)  # whether an adapter is trained on
        self.check_vocabulary(self.model)
        lora = bool(adapter or c.use_peft)
        if c.merge_adapter and not lora:
            raise ValueError("--merge_adapter: there is no adapter to merge; add --use_peft, or name an adapter as the model")
        if self.model.four_bit and not lora:
            raise ValueError(f"{c.model_name_or_path}: weights in 4 bits are not trained themselves: add --use_peft for "
                             "a LoRA on them, or train the original ones")
        self.pictures = None  # decodes them in the background
        if self.model.config.vision is not None:
            from extras.models import opening

            self.pictures = opening.open_pictures(self.model, self.tokenizer, c.freeze_vision_tower)
        elif not c.freeze_vision_tower:
            raise ValueError("--freeze_vision_tower false: this model reads no pictures")
        if c.use_peft:
            from extras.lora.adapters import fresh_settings
            from extras.lora.targets import add_lora

            self.lora = adapter or fresh_settings(c, settings)
            add_lora(self.model, self.lora)

    def make_ready(self) -> None:
        """The policy to its device, with what is to happen in its forward and backward."""
        c = self.args
        self.model.to(self.home).train(not c.disable_dropout)
        self.model.model.gradient_checkpointing = c.gradient_checkpointing
        if c.torch_compile:
            from extras.decoder.compiled import compile_blocks

            compile_blocks(self.model)
        moe = self.model.config.moe
        if moe is None and c.router_aux_loss_coef is not None:
            raise ValueError("--router_aux_loss_coef: this model has no experts")
        couples = moe is not None or set(c.loss_type) & losses.SORTS_THE_BATCH  # what lies in one forward
        self.max_tokens = c.max_tokens_per_forward or (2048 if self.ranks.device.type == "cpu" and not couples else None)
        declared = 0.0 if moe is None else moe["router_aux_loss_coef"]
        self.aux_coef = declared if c.router_aux_loss_coef is None else c.router_aux_loss_coef
        self.started_from = fingerprint(self.model)
        self.ddp = self.model
        if self.ranks.world > 1 and not c.fsdp:
            ids = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(self.model, device_ids=ids)
            self.ddp.broadcast_buffers = False  # nothing changes them; torch 2.13 warns of the argument of this name

    def load_policy(self, directory: str) -> tuple[models.Decoder, dict]:
        """As the flags have it: type, longest sequence, and whether it is put in 4 bits."""
        c = self.args
        compute_dtype = None if c.bnb_4bit_compute_dtype is None else getattr(torch, c.bnb_4bit_compute_dtype)
        four_bit = dict(quant_type=c.bnb_4bit_quant_type, nested=c.use_bnb_nested_quant, compute_dtype=compute_dtype)
        return load_policy(directory, getattr(torch, c.dtype), c.max_length, self.ranks,
                           four_bit if c.load_in_4bit else None, "meta" if str(self.home) == "meta" else "cpu")

    def check_vocabulary(self, model: models.Decoder) -> None:
        if self.tokenizer.size > model.config.vocab_size:
            raise ValueError(f"{self.args.model_name_or_path}: the tokenizer has {self.tokenizer.size} tokens, the "
                             f"embedding {model.config.vocab_size} rows; they do not belong together")

    def load_data(self, train_dataset, eval_dataset) -> None:
        c = self.args
        options = data.DataOptions(c.max_length, c.max_prompt_length, c.max_completion_length, c.truncation_mode,
                                   need_rejected=set(c.loss_type) != {"sft"})
        self.train_store = self.open_store(train_dataset or c.dataset_name, c.dataset_train_split, options)
        self.train_pairs = np.arange(len(self.train_store))  # those that are trained on
        self.eval_store, self.eval_pairs = None, np.arange(0)
        eval_dataset = eval_dataset or c.eval_dataset_name
        if c.eval_strategy != "no" and not eval_dataset and not c.eval_fraction:  # the other split
            eval_dataset = c.dataset_name if train_dataset is None and data.on_hub(c.dataset_name) else None
        if eval_dataset is not None:
            self.eval_store = self.open_store(eval_dataset, c.dataset_test_split, options)
            self.eval_pairs = np.arange(len(self.eval_store))
        elif c.eval_fraction:
            order = data.epoch_order(len(self.train_store), c.seed, 2**32, shuffle=True)  # an epoch no run reaches
            held_out = max(1, round(c.eval_fraction * len(order)))
            self.eval_store, self.eval_pairs = self.train_store, np.sort(order[:held_out])
            self.train_pairs = np.sort(order[held_out:])
        elif c.eval_strategy != "no" or c.eval_on_start or c.generate_during_eval:
            names = ("eval_on_start", "generate_during_eval", "eval_strategy")
            what = next(name for name in names if vars(c)[name] not in ("no", False))
            raise ValueError(f"--{what}: there are no pairs to evaluate on; give --eval_dataset_name or --eval_fraction")
        if not len(self.train_pairs):
            raise ValueError(f"{c.dataset_name}: no pair is left to train on; lower --eval_fraction")
        for store in filter(None, (self.train_store, self.eval_store)):
            check_length(self.model.config, longest(store))
        if set(c.loss_type) & losses.READS_RATINGS:
            from extras import ratings

            ratings.check(self)

    def find_rows(self, dataset, split: str) -> list[Path]:
        """Files of pairs: those that a path or glob names, else a split of a data set on the hub."""
        if not isinstance(dataset, str):
            from extras.objects import rows_file

            return rows_file(dataset, self.cache_dir)
        config, revision = self.args.dataset_config, self.args.dataset_revision
        if not data.on_hub(dataset) and config is None and revision is None:
            return data.find_files(dataset)
        from extras import hub

        return hub.local_dataset(dataset, config, split, revision)

    def open_store(self, dataset, split: str, options: data.DataOptions) -> data.PairStore:
        """The tokenized pairs: made, or found in the cache, by rank 0 and opened by all."""
        if isinstance(dataset, data.PairStore):
            return dataset

        def build() -> dict:
            store = data.build_store(self.find_rows(dataset, split), self.tokenizer, options, self.cache_dir,
                                     self.args.on_bad_row, self.args.dataset_num_proc)
            name = dataset if isinstance(dataset, str) else f"{split} rows"
            for line in data.describe(store.report):
                self.say(f"{name}: {line}")
            return {"directory": str(store.directory)}

        return data.PairStore.open(self.ranks.from_first(build)["directory"])

    def plan_steps(self, global_batch: Optional[int] = None) -> None:
        c = self.args
        self.global_batch = global_batch or c.per_device_train_batch_size * self.ranks.world * c.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(self.train_pairs) / self.global_batch)
        self.total_steps = c.max_steps if c.max_steps > 0 else math.ceil(c.num_train_epochs * self.steps_per_epoch)
        every = lambda steps: int(steps) if steps >= 1 else max(1, math.ceil(steps * self.total_steps))
        by = {"steps": every, "epoch": lambda _: self.steps_per_epoch, "no": lambda _: 0}
        self.log_every = every(c.logging_steps)
        self.eval_every = by[c.eval_strategy](c.eval_steps or c.logging_steps)
        self.save_every = by[c.save_strategy](c.save_steps)
        warmup = c.warmup_steps or c.warmup_ratio
        self.warmup = math.ceil(warmup * self.total_steps) if warmup < 1 else int(warmup)

    # the reference

    def load_ref(self, ref_model) -> None:
        """Decide where reference log-probs come from: nowhere, a pass before training, or a live model."""
        c = self.args
        self.needs_ref = not (c.reference_free or set(c.loss_type) <= losses.NO_REFERENCE)
        self.precompute = self.needs_ref and (not c.sync_ref_model if c.precompute_ref_log_probs is None
                                              else c.precompute_ref_log_probs)
        self.ref_model, self.ref_adapter = ref_model, {}  # a model of its own, or what the policy wears in its LoRA's place
        self.ref_sums = {}  # store digest -> data.open_sums
        if not self.needs_ref:
            return
        other = c.ref_model_name_or_path or c.ref_adapter_name  # than the policy as it starts
        if ref_model is None and self.lora:
            from extras.lora import adapters

            self.ref_adapter = adapters.reference_of(self)
        elif ref_model is None and other:
            self.load_ref_model()
        elif ref_model is None and not self.precompute:
            self.ref_model = copy.deepcopy(self.model)
        if self.ref_model is not None:
            dtype = None if c.ref_model_dtype is None else getattr(torch, c.ref_model_dtype)
            self.ref_model.requires_grad_(False).eval().to(c.ref_model_device or self.home, dtype)
        elif c.ref_model_dtype or c.ref_model_device:
            raise ValueError("--ref_model_dtype and --ref_model_device: the reference is no model of its own here, so there is "
                             "nothing to hold (--no_precompute_ref_log_probs keeps a copy, where all weights are trained)")
        if c.sync_ref_model and self.lora:
            from extras.lora import adapters

            self.ref_adapter = adapters.moving_reference(self)

    def find_ref(self) -> str:
        c = self.args
        return find_model(c.ref_model_name_or_path or c.model_name_or_path, self.ranks, adapter=c.ref_adapter_name)

    def load_ref_model(self) -> None:
        self.ref_model, _ = self.load_policy(self.find_ref())
        self.check_vocabulary(self.ref_model)

    def reference(self):
        """Within, the model whose log-probs are the reference's: one of its own, or the policy, without its LoRA or with
        another in its place."""
        if self.ref_model is not None or not self.lora:
            return nullcontext(self.ref_model or self.model)
        if not self.ref_adapter:
            return models.adapters_disabled(self.model)
        from extras.lora.adapters import swapped_in

        return swapped_in(self.model, self.ref_adapter)

    def ref_forward(self, batch: data.Batch) -> Tensor:  # (B, 2, 2)
        """The reference's sums."""
        with torch.no_grad(), self.reference() as model, evaluating(model):
            there = batch.to(next(model.parameters()).device)
            with torch.autocast(there.input_ids.device.type, self.half, enabled=self.bf16 or self.args.fp16):
                out = model(there)
            return split_sums(out.logps, there.lengths).to(batch.input_ids.device)

    def precompute_ref(self) -> None:
        """Run the reference over the pairs this run will visit and no earlier one did; remember them on disk, in blocks.

        Blocks are cut by pair number, so that a pass that was interrupted and resumed computes what a whole one does.
        """
        visits = [(self.train_store, self.visited())] + [(self.eval_store, self.eval_pairs)] * (self.eval_store is not None)
        held = self.whole_model(self.model if self.ref_model is None else self.ref_model)
        weights = self.ranks.from_first(lambda: {"digest": self.ref_digest(held)})["digest"]
        for store, wanted in visits:
            path = self.cache_dir / f"ref-{hashlib.sha256(f'{store.digest} {weights}'.encode()).hexdigest()[:32]}.bin"
            table = data.open_sums(path, len(store), np.dtype(str(self.wide).removeprefix("torch.")))
            missing = wanted[self.missing_ref(path, table, wanted)]
            with self.progress(None, "reference", total=len(missing) // self.ranks.world, unit="pair") as bar:
                for pairs in data.blocks_of(missing):
                    sums = self.ref_pass(store, pairs, bar)
                    if self.ranks.first:
                        data.write_sums(path, table, pairs, sums)
            self.ranks.barrier()
            self.ref_sums[store.digest] = table
        self.ref_model = None  # it has served

    def missing_ref(self, path: Path, table: np.memmap, pairs: np.ndarray) -> np.ndarray:  # (P,) bool
        """Which pairs' sums rank 0 does not find in the cache."""
        missing = np.zeros(len(pairs), bool)
        if self.ranks.first:
            missing, damaged = data.missing_sums(table, pairs)
            for number in damaged:
                self.say(f"{path}: damaged in block {number}; the reference is run again over its pairs")
        return self.ranks.sum(torch.from_numpy(missing.astype(np.uint8)).to(self.ranks.device)).cpu().numpy() > 0

    def ref_pass(self, store: data.PairStore, pairs: np.ndarray, bar) -> np.ndarray:  # (P, 2, 2)
        """Reference sums of `pairs`, sorted, shared out among the ranks."""
        sums = torch.zeros(len(pairs), 2, 2, dtype=torch.float64, device=self.ranks.exact)
        for rows in self.forwards(store, pairs, self.args.per_device_eval_batch_size):
            sums[np.searchsorted(pairs, rows)] = self.ref_forward(self.batch(store, rows)).to(sums)
            bar.update(len(rows))
        return self.ranks.sum(sums).to(self.wide).cpu().numpy()

    def ref_digest(self, held: models.Decoder) -> str:
        """Changes with all that changes what the reference says of given tokens: its weights, to the bit, and how it
        computes; and with nothing else (which loss, beta, batch size or ranks, whether a fresh LoRA lies on it)."""
        with self.reference() as reference:
            reference = held if self.args.fsdp else reference
            adapted = self.ref_model is not None or self.ref_adapter
            compute_dtype = (reference.four_bit or {}).get("compute_dtype")
            half = "fp16" if self.args.fp16 else self.bf16
            pixels = self.tokenizer.pictures if self.pictures else ""  # how pictures are cut and scaled
            h = hashlib.sha256(f"2 {half} {self.args.dtype} {compute_dtype} {reference.config}{pixels}".encode())
            for name, t in chain(reference.named_parameters(), reference.named_buffers()):  # buffers: weights in 4 bits
                if adapted or "lora_" not in name:
                    h.update(f"{name.replace('.base_layer.', '.')} {t.dtype} {tuple(t.shape)}".encode())
                    h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            for name, module in models.lora_modules(reference).items() if adapted else ():
                h.update(f"{name} {getattr(module, 'scaling', None)}".encode())
        return h.hexdigest()

    def visited(self) -> np.ndarray:
        """The training pairs that the run's steps touch, sorted."""
        if self.total_steps >= self.steps_per_epoch:
            return self.train_pairs
        return np.sort(np.concatenate([np.arange(0), *(self.pairs_of(step) for step in range(self.total_steps))]))

    def sync_ref(self) -> None:
        """TR-DPO (arXiv:2404.09656): ref <- alpha policy + (1 - alpha) ref."""
        if self.lora:
            from extras.lora.adapters import move_towards

            return move_towards(self.ref_adapter, models.lora_modules(self.model), self.args.ref_model_mixup_alpha)
        with torch.no_grad():
            for ref, policy in zip(self.ref_model.parameters(), self.model.parameters()):
                ref.lerp_(policy.to(ref.dtype), self.args.ref_model_mixup_alpha)

    # batches

    def pairs_of(self, step: int) -> np.ndarray:
        """The global batch of a step: a slice of its epoch's order, a function of seed and step alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            order = data.epoch_order(len(self.train_pairs), self.args.seed, epoch, self.args.shuffle_dataset)
            self.order = epoch, self.train_pairs[order]
        return self.order[1][within * self.global_batch : (within + 1) * self.global_batch]

    def forwards(self, store: data.PairStore, pairs: np.ndarray, size: int) -> list[np.ndarray]:
        """This rank's micro-batches of a global batch; every rank gets equally many, empty ones at the end."""
        cut = [data.micro_batches(hand, store.tokens, size, self.max_tokens)
               for hand in deal(pairs, store.tokens, self.ranks.world)]
        mine, most = cut[self.ranks.rank], max(map(len, cut))
        if self.pictures is not None:
            self.pictures.expect(store, mine)
        return mine + [np.arange(0)] * (most - len(mine))

    def batch(self, store: data.PairStore, rows: np.ndarray) -> data.Batch:
        """The stream of these pairs, with their reference sums where they are known."""
        batch = data.collate([store[int(i)] for i in rows], rows) if len(rows) else data.empty_batch()
        if self.pictures is not None and len(rows):
            batch = batch._replace(pictures=self.pictures.collect(batch, store, rows))
        if store.digest in self.ref_sums:
            batch = batch._replace(ref_logps=torch.from_numpy(data.take_sums(self.ref_sums[store.digest], rows)))
        return batch.to(self.ranks.device)

    def autocast(self):
        return torch.autocast(self.ranks.device.type, self.half, enabled=self.bf16 or self.args.fp16)

    # the loss

    def pair_logps(self, scored: Scored, lengths: Tensor, ratings: Tensor, ref_sums: Optional[Tensor],
                   tokens_per_pair: float) -> losses.PairLogps:
        """What the losses read, from the policy's sums and the reference's."""
        c, logps = self.args, scored.logps
        ref = torch.zeros_like(logps)
        if self.needs_ref:
            alpha = 1.0 if c.ld_alpha is None or not c.ld_apply_to_ref else c.ld_alpha
            ref = (ref_sums[..., 0] + alpha * ref_sums[..., 1]).to(logps.dtype)
        divergence = losses.F_DIVERGENCES[c.f_divergence_type]
        if c.f_divergence_type == "alpha_divergence":
            divergence = partial(divergence, f_alpha_divergence_coef=c.f_alpha_divergence_coef)
        return losses.PairLogps(
            *logps.unbind(1), *ref.detach().unbind(1), *lengths.to(logps.dtype).unbind(1),
            *ratings.to(logps.dtype).unbind(1), chosen_nll=scored.chosen_nll,
            chosen_tokens_per_pair=tokens_per_pair, score=divergence)

    def pair_losses(self, x: losses.PairLogps, scored: Scored) -> Tensor:  # (B,)
        return losses.pair_losses(x, self.options, scored.wpo if self.args.use_weighting else None)

    def ref_of(self, batch: data.Batch) -> Optional[Tensor]:  # (B, 2, 2)
        """The batch's reference sums: precomputed, or from the live reference."""
        if not self.needs_ref or batch.ref_logps is not None:
            return batch.ref_logps
        return self.ref_forward(batch)

    @torch.no_grad()
    def score_all(self, store: data.PairStore, pairs: np.ndarray, batches: list[data.Batch]):
        """PairLogps and Scored of all `pairs`, over every micro-batch and rank, without gradients.

        Each rank writes its pairs' rows into a table of zeros; the sum over ranks is the whole.
        """
        order = np.argsort(pairs)
        columns = (2, 1, 1, len(STATS), 4)  # logps, chosen_nll, wpo, stats, reference sums
        table = torch.zeros(len(pairs), sum(columns), dtype=torch.float64, device=self.ranks.exact)
        for batch in batches:
            with self.autocast():
                scored, _ = score(self.model, batch, self.args)
            ref = self.ref_of(batch) if self.needs_ref else batch.lengths.new_zeros(len(batch.lengths), 4)
            rows = order[np.searchsorted(pairs, batch.pair_ids.cpu().numpy(), sorter=order)]
            table[rows] = torch.cat([scored.logps, scored.chosen_nll[:, None], scored.wpo[:, None], scored.stats,
                                     ref.flatten(1)], 1).to(table)
        table = self.ranks.sum(table).to(self.ranks.device, self.wide)
        logps, nll, wpo, stats, ref = table.split(columns, 1)
        scored = Scored(logps, nll[:, 0], wpo[:, 0], stats)
        lengths = torch.from_numpy(scored_lengths(store, pairs)).to(table)
        ratings = torch.from_numpy(np.array(store.ratings[pairs])).to(table)
        return self.pair_logps(scored, lengths, ratings, ref.reshape(-1, 2, 2), lengths[:, 0].mean()), scored

    def add_rewards(self, total: float, count: int) -> None:
        """BCO's delta: the mean of 1/2 (beta r_w + beta r_l) over the pairs seen in training so far."""
        self.delta_sum, self.delta_count = self.delta_sum + total, self.delta_count + count
        self.options["delta"] = self.delta_sum / self.delta_count

    # one optimizer step

    def train_step(self) -> dict:
        """Loss, gradients and update of one global batch; returns the step's metrics."""
        c, store, pairs = self.args, self.train_store, self.pairs_of(self.step)
        torch.manual_seed(((c.seed * 1_000_003 + self.step) * 65_537 + self.ranks.rank) % 2**63)  # dropout; no RNG state to save
        batches = [self.batch(store, rows) for rows in self.forwards(store, pairs, c.per_device_train_batch_size)]
        if self.pictures is not None:
            self.pictures.look_ahead(self)
        whole = None
        if self.couples_the_batch():
            from extras import whole_batch

            whole = whole_batch.global_losses(self, pairs, batches)
        tokens_per_pair = float(scored_lengths(store, pairs)[:, 0].mean())
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.ranks.exact)
        for i, batch in enumerate(batches):
            share = len(batch.pair_ids) / len(pairs)
            last = i == len(batches) - 1  # ranks exchange gradients once a step
            with nullcontext() if last or self.ddp is self.model else self.ddp.no_sync():
                with self.autocast():
                    scored, aux = score(self.ddp, batch, c)
                x = self.pair_logps(scored, batch.lengths, batch.ratings, self.ref_of(batch), tokens_per_pair)
                if whole is None:
                    values = surrogate = self.pair_losses(x, scored)
                else:  # values to report, and a linear form to differentiate
                    values, surrogate = whole_batch.from_whole(whole, scored, batch)
                loss = surrogate.sum() / len(pairs)
                if aux is not None and self.aux_coef:
                    loss = loss + self.aux_coef * aux * share
                (loss * self.ranks.world * self.scaling["scale"]).backward()  # DDP averages
            sums += step_sums(x, scored, values, aux, share, c.beta)
        tokens = sum(batch.num_tokens for batch in batches)
        return self.update(sums, pairs, tokens)

    def couples_the_batch(self) -> bool:
        """Whether the loss must see the whole global batch at once: asked for, or because it sorts or moves delta first."""
        c = self.args
        sorts = bool(set(c.loss_type) & losses.SORTS_THE_BATCH) or c.bco_delta == "first"
        return sorts if c.exact_global_loss is None else c.exact_global_loss

    def update(self, sums: Tensor, pairs: np.ndarray, tokens: int) -> dict:
        """Clip, step, and turn the step's sums over all ranks into metrics."""
        c = self.args
        if c.fp16:
            from extras import faults

            faults.unscale(self)
        norm = files.whole(nn.utils.clip_grad_norm_(self.trainable, c.max_grad_norm or math.inf))
        sums = torch.cat([sums, torch.tensor([tokens, self.signal > 0], dtype=torch.float64, device=sums.device)])
        *sums, tokens, told = self.ranks.sum(sums).tolist()
        self.leaving = told > 0
        metrics = metrics_of(sums, len(pairs)) | {"grad_norm": float(norm), "learning_rate": self.learning_rate()}
        metrics["loss"] += self.aux_coef * metrics.get("aux_loss", 0.0)  # what is minimised, as TRL logs it
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            from extras import faults

            faults.skip(self, metrics, pairs)  # or FloatingPointError
            metrics = {}
        else:
            self.apply(dict(zip(SUMS, sums)), len(pairs))
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += int(tokens)
        self.pairs_done += len(pairs)
        if c.sync_ref_model and self.step % c.ref_model_sync_steps == 0:
            self.sync_ref()
        return metrics

    def apply(self, sums: dict, count: int) -> None:
        """The optimizer's step, with what else moves with it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group["ratio"]
        self.optimizer.step()
        if self.args.fp16:
            from extras import faults

            faults.rescale(self, finite=True)
        if "bco_pair" in self.args.loss_type and self.args.bco_delta == "running":
            self.add_rewards((sums["rewards/chosen"] + sums["rewards/rejected"]) / 2, count)

    def learning_rate(self) -> float:
        """Of the coming step: linear warm-up, then the schedule; a function of the step alone."""
        c, step, total = self.args, self.step, self.total_steps
        if step < self.warmup and c.lr_scheduler_type != "constant":
            return c.learning_rate * step / max(1, self.warmup)
        done = (step - self.warmup) / max(1, total - self.warmup)
        shape = {"linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done)))}
        return c.learning_rate * shape.get(c.lr_scheduler_type, 1.0)

    # the loop

    def train(self, resume_from_checkpoint: Any = None) -> dict:
        """Run all steps, log, evaluate, checkpoint, and save the model to output_dir; returns the last metrics."""
        c = self.args
        if self.step and resume_from_checkpoint is None:
            raise ValueError(f"this trainer has taken {self.step} steps already; make a new DPOTrainer to train again")
        if resume_from_checkpoint is not None:
            self.find_checkpoint(str(resume_from_checkpoint))
        if self.precompute:
            self.precompute_ref()
        self.make_optimizer()
        self.start_output()
        if (c.eval_on_start or c.generate_during_eval) and self.step == 0:
            self.evaluate()
        started, metrics = time.perf_counter(), {}
        self.started_at = (started, self.pairs_done, self.num_tokens)
        bar = self.progress(range(self.step, self.total_steps), "training", initial=self.step, total=self.total_steps)
        steps = bar
        if self.save_every:  # writes checkpoints between the steps: where due, and on SIGTERM or SIGUSR1
            from extras import checkpoints

            steps = checkpoints.saving(self, bar)
        for _ in steps:
            self.pending += filter(None, [self.train_step()])
            last = self.step == self.total_steps
            if self.pending and (self.step % self.log_every == 0 or last or (self.step == 1 and c.logging_first_step)):
                metrics = self.log_step(bar)
            if self.eval_store is not None and (last or self.eval_every and self.step % self.eval_every == 0):
                metrics = metrics | self.evaluate()
        self.save_model()
        if c.push_to_hub:
            self.push_to_hub()
        return metrics

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Metrics over all evaluation pairs at once, as `eval_...`; also a line of metrics.jsonl."""
        started = time.perf_counter()
        store, pairs = self.eval_store, self.eval_pairs
        if store is None:
            raise ValueError("there are no pairs to evaluate on; give eval_dataset, --eval_dataset_name or --eval_fraction")
        merged = self.args.merge_adapter and not self.lora
        if merged and self.needs_ref and self.ref_model is None and store.digest not in self.ref_sums:
            raise ValueError("the LoRA is merged, and the reference, which was the model without it, is gone; evaluate before "
                             "the model is saved, or with --precompute_ref_log_probs")
        if self.precompute and store.digest not in self.ref_sums:
            self.precompute_ref()
        rows = self.forwards(store, pairs, self.args.per_device_eval_batch_size)
        with evaluating(self.model):
            x, scored = self.score_all(store, pairs, (self.batch(store, r) for r in self.progress(rows, "evaluation")))
        sums = step_sums(x, scored, self.pair_losses(x, scored), None, 0.0, self.args.beta)
        metrics = {f"eval_{k}": v for k, v in metrics_of(sums.tolist(), len(pairs)).items()}
        metrics["eval_length_bias"] = losses.length_bias(x)
        if self.args.generate_during_eval:
            from extras import samples

            metrics |= samples.take(self)
        metrics["eval_runtime"] = time.perf_counter() - started
        self.evaluation = {"step": self.step, "epoch": self.step / self.steps_per_epoch} | metrics
        self.write_metrics(self.evaluation)
        self.say(f"step {self.step}: eval loss {metrics['eval_loss']:.4f}  accuracy "
                 f"{metrics['eval_rewards/accuracies']:.3f}  margin {metrics['eval_rewards/margins']:.4f}")
        return metrics

    def log_step(self, bar) -> dict:
        """The mean of each metric since the last log, to metrics.jsonl and to the screen."""
        mean = {k: sum(m[k] for m in self.pending) / len(self.pending) for k in self.pending[0]}
        mean["learning_rate"] = self.pending[-1]["learning_rate"]
        mean["grad_norm"] = self.pending[-1]["grad_norm"]
        self.pending = []
        mean |= {"skipped_steps": self.skipped} if self.skipped else {}
        metrics = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **mean, "num_tokens": self.num_tokens}
        self.write_metrics(metrics)
        began, pairs, tokens = self.started_at
        seconds = time.perf_counter() - began
        speed = f"{(self.pairs_done - pairs) / seconds:.1f} pairs/s  {(self.num_tokens - tokens) / seconds:,.0f} tokens/s"
        line = (f"step {self.step}/{self.total_steps}: loss {mean['loss']:.4f}  accuracy {mean['rewards/accuracies']:.3f}"
                f"  margin {mean['rewards/margins']:.4f}  {speed}")
        if getattr(bar, "disable", True) or not (HERE / "extras" / "live.py").exists():
            self.say(line)
        else:
            from extras import live

            live.show(self, bar, metrics, seconds)
        return metrics

    def make_optimizer(self) -> None:
        """AdamW; weight decay on matrices only; LoRA+ (arXiv:2402.12354) gives B its own learning rate."""
        c = self.args
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.trainable, self.trainable_names = [p for _, p in named], [n for n, _ in named]
        faster = lambda n: c.loraplus_lr_ratio or 1.0 if "lora_B" in n or "lora_embedding_B" in n else 1.0
        groups = [{"params": [p for n, p in named if (p.dim() >= 2) == matrices and faster(n) == ratio], "ratio": ratio,
                   "weight_decay": c.weight_decay if matrices else 0.0}
                  for matrices in (True, False) for ratio in sorted({faster(n) for n, _ in named})]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=c.learning_rate, eps=c.adam_epsilon,
                                           betas=(c.adam_beta1, c.adam_beta2), fused=c.dtype != "float64")

    # files

    def find_checkpoint(self, asked: Optional[str]) -> None:
        from extras import checkpoints

        self.args.resume_from_checkpoint = asked
        self.checkpoint = checkpoints.find(self)

    def start_output(self) -> None:
        """Go on from the checkpoint where there is one; else begin metrics.jsonl anew."""
        if self.checkpoint is not None:
            from extras import checkpoints

            checkpoints.load(self)
        elif self.ranks.first:
            (self.output_dir / "metrics.jsonl").write_bytes(b"")
        if self.ranks.first:  # what was run, for extras/report.py, extras/score.py and --config
            settings = {k: v for k, v in vars(self.args).items() if k != "hub_token"}
            write_atomically(self.output_dir / "dpo_config.json", json.dumps(settings, indent=1, default=str).encode())
        self.ranks.barrier()

    def claim_output(self) -> None:
        self.lock = claim(self.output_dir)

    def save_model(self, output_dir: Optional[str | Path] = None) -> None:
        """Write what was trained, with the tokenizer: a Hugging Face checkpoint, or a PEFT adapter."""
        directory = Path(output_dir or self.output_dir)
        merges = self.args.merge_adapter and directory == self.output_dir
        model = self.whole_model(self.model, bool(self.lora) and not merges)
        if self.ranks.first:
            scratch = directory / f".model.{os.getpid()}"
            self.write_model(model, scratch, merges)
            names = {path.name for path in scratch.iterdir()}
            for path in filter(Path.is_file, scratch.rglob("*")):  # a reader finds the old files or the new
                (directory / path.relative_to(scratch)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, directory / path.relative_to(scratch))
            shutil.rmtree(scratch)
            stale = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"}
            for name in stale - names if "config.json" in names else ():  # of an earlier run: read in the model's place
                (directory / name).unlink(missing_ok=True)
        if merges and not self.args.fsdp:
            self.lora = {}  # it is in the weights now; a gathered copy leaves the shards as they are

    def write_model(self, model: models.Decoder, directory: Path, merges: bool = False) -> None:
        if merges:
            from extras.lora.merging import merge_lora

            merge_lora(model)
        if self.lora and not merges:
            from extras.lora.peft_files import save_adapter

            save_adapter(model, directory, self.lora)
        else:
            models.save_model(model, directory)
        self.tokenizer.save(directory)

    def whole_model(self, model: models.Decoder, trained_only: bool = False) -> models.Decoder:
        """The model, or of one in shards a whole copy in rank 0's memory; asked for by all ranks."""
        if not self.args.fsdp:
            return model
        from extras import fsdp

        return fsdp.gather(model, self.ranks, trained_only)

    def push_to_hub(self, commit_message: str = "Trained with DPO", dataset_name: Optional[str] = None) -> None:
        """Upload output_dir, with a model card (which tells `dataset_name` where the rows were objects)."""
        from extras import card

        card.push(self, commit_message, dataset_name or self.args.dataset_name)

    def write_metrics(self, metrics: dict) -> None:
        if self.ranks.first:
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")
            for log in self.loggers:
                log(metrics)

    # the screen

    def say(self, line: str) -> None:
        if self.ranks.first:
            write = tqdm.write if self.panel is None else self.panel.write
            sys.stderr.flush()  # a bar that has ended
            write(line, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, items, label: str, **more):
        """`items` behind a progress bar, shown by rank 0 at a terminal."""
        hidden = not sys.stderr.isatty() if self.args.disable_tqdm is None else self.args.disable_tqdm
        return tqdm(items, desc=label, disable=hidden or not self.ranks.first, dynamic_ncols=True, leave=False, **more)


# Sums over pairs, and the metrics they make

PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                "logps/rejected", "kl")
SUMS = ("loss", *PAIR_METRICS, *STATS, "aux_loss")


@torch.no_grad()
def step_sums(x: losses.PairLogps, scored: Scored, values: Tensor, aux: Optional[Tensor], share: float,
              beta: float) -> Tensor:  # (len(SUMS),) float64
    """Sums over the pairs of a forward, in the order of SUMS; the auxiliary loss with the forward's share of the pairs."""
    pair = losses.pair_metrics(x, beta)
    columns = [values, *(pair[name] for name in PAIR_METRICS), *scored.stats.unbind(1)]
    exact = dict(dtype=torch.float64, device="cpu" if values.device.type == "mps" else values.device)
    rest = torch.zeros((), **exact) if aux is None else aux.detach().to(**exact) * share
    return torch.stack([*(column.detach().to(**exact).sum() for column in columns), rest])


def metrics_of(sums: list[float], pairs: int) -> dict:
    """TRL's metrics from sums over a global batch: means over pairs, or over the tokens they are about."""
    s = dict(zip(SUMS, sums))
    per = lambda name, tokens: s[name] / tokens if tokens else 0.0
    out = {"loss": s["loss"] / pairs, **{name: s[name] / pairs for name in PAIR_METRICS}}
    out["logits/chosen"] = per("chosen_logits", s["chosen_tokens"])
    out["logits/rejected"] = per("rejected_logits", s["rejected_tokens"])
    out["entropy"] = per("entropy", s["chosen_tokens"] + s["rejected_tokens"])
    out["mean_token_accuracy"] = per("top1", s["chosen_tokens"])
    return out | ({"aux_loss": s["aux_loss"]} if s["aux_loss"] else {})


@contextmanager
def evaluating(model: nn.Module):
    """Within, without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def claim(directory: Path):
    """Make `directory` and lock it, as long as the returned file is open. Raises ValueError, before hours are spent, where it
    cannot be written to, or another process trains into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a+")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"--output_dir {directory}: cannot be written to ({getattr(error, 'strerror', None) or error})") from None
    lock.seek(0)
    me, holder = f"{platform.node()} {os.getpid()}", lock.read()
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if holder != me:  # an older trainer of this process is not in the way
            raise ValueError(f"--output_dir {directory}: another run ({holder}: host, process) writes to it") from None
    except (ImportError, OSError):  # systems that cannot lock
        pass
    lock.truncate(0)
    lock.write(me)
    lock.flush()
    return lock


def write_atomically(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(scratch, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(scratch, path)


def refuse(error: Exception | str, status: int) -> int:
    """Say once on each machine what is wrong, and return the exit status."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or "rank" in str(error)[:5]:  # what is one rank's own it says itself
        print(f"error: {error}", file=sys.stderr)
    return status


def train(trainer: DPOTrainer) -> None:
    """Train; the demo answers the same prompts before and after."""
    if trainer.args.model_name_or_path != str(HERE / "demo" / "model") or trainer.args.fsdp:
        trainer.train()
        return
    from demo import show

    before = show.sample(trainer)
    trainer.train()
    show.compare(before, show.sample(trainer))


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 trained and saved; 2 unusable arguments or data, with one message; 143 (SIGTERM) or 138 (SIGUSR1) told
    to leave, after a checkpoint; 1 else."""
    with ending_ranks():
        try:
            trainer = DPOTrainer(args=parse_config(sys.argv[1:] if argv is None else argv))
        except (ValueError, OSError) as error:
            return refuse(error, 2)
        if trainer.args.dry_run:
            from extras import plan

            list(map(trainer.say, plan.describe(trainer)))
            return 0
        try:
            train(trainer)
        except Exception as error:
            from extras import faults

            return refuse(faults.explained(error, trainer), 1)
        return 0


if __name__ == "__main__":
    sys.exit(main())
