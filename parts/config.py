"""Every option of a run: its name, default, type and help text, group by group.

The command line (parts/cli.py) and `dpo.DPOConfig` are both made of this one dataclass. Names and
defaults are TRL 1.16's wherever TRL has the option; parts/checks.py refuses combinations without
meaning.
"""

import os
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from losses import F_DIVERGENCES, LOSSES
from parts.rates import SHAPES
from parts.trl_flags import takes_trls

EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")  # values of --optim
BY_RULE = {"adafactor": "Adafactor", "muon": "Muon"}  # others that see a whole matrix
DTYPES = ("float32", "bfloat16", "float64")


def flag(
    default: Any,
    text: str,
    group: str = "",
    choices: tuple[str, ...] = (),
    least: float | None = None,
    bare: str | None = None,
) -> Any:
    """Declare an option with its help text.

    `group` opens a new group of `--help`; `least` is the smallest allowed value; `bare` is what the
    flag stands for when it is given without a value.
    """
    if choices:
        text = f"{text}: {', '.join(choices)}"
    meta = {"help": text, "group": group, "choices": choices, "least": least, "bare": bare}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


# Options that are paths on this machine, or may be.
PATHS = (
    "output_dir", "cache_dir", "model_name_or_path", "ref_model_name_or_path", "dataset_name",
    "eval_dataset_name", "resume_from_checkpoint", "generate_prompts", "chat_template")


def plain_value(option: Field, value: Any) -> Any:
    """A value as the trainer reads it, however a script or a file of TRL writes it.

    One word stands for a list of it, an empty list or string for the default, and ~ for the home
    directory, which no shell has expanded in a file or in Python.
    """
    is_list = str(option.type).startswith("list")
    if isinstance(value, (list, tuple, set)) and not value:
        return option.default if option.default is not MISSING else option.default_factory()
    if is_list and isinstance(value, (list, tuple)):
        return list(value)
    if is_list and value is not None:
        return [value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if option.name in PATHS and isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    return value


@takes_trls
@dataclass
class DPOConfig:
    """Every option of a run. Names and defaults are TRL 1.16's where it has the option."""

    # The model

    output_dir: str | None = flag(
        None, "where the trained model, checkpoints and metrics.jsonl are written", "model")
    model_name_or_path: str | None = flag(None, "directory or hub id of the model to train")
    model_revision: str | None = flag(
        None, "branch, tag or commit of a model on the hub (also --revision)")
    dtype: str = flag(
        "float32", "type of the weights; auto is that of the model's files", choices=(*DTYPES, "auto"))
    save_dtype: str | None = flag(
        None, "type of the weights in the saved model; auto is that of the model's own files, "
        "unset that of training; checkpoints are always written as they are trained",
        choices=("auto", "float32", "bfloat16", "float16"))
    full_determinism: bool = flag(
        False, "on a GPU, the same bits from the same run, for speed; on a CPU they are the same "
        "without it")
    disable_dropout: bool = flag(True, "turn off all dropout, including LoRA's")
    fsdp: str | None = flag(
        None, "split parameters, gradients, optimizer state and reference across the ranks; also "
        "takes transformers' words: full_shard, shard_grad_op, auto_wrap, offload (to the CPU)",
        bare="full_shard")
    context_parallel_size: int = flag(
        1, "ranks that share each forward's stream, for pairs too long for one GPU; the global "
        "batch counts groups of them", least=1)
    gradient_checkpointing: bool | str = flag(
        False, "recompute each block's activations in backward instead of keeping them; selective "
        "does so only with those that take no matrix product", choices=("true", "false", "selective"))
    activation_offloading: bool = flag(
        False, "keep activations in the host's memory between forward and backward; for GPUs")
    freeze_vision_tower: bool = flag(
        True, "of a vision-language model, train everything but the image encoder")
    torch_compile: bool = flag(
        False, "compile norms and MLPs: fewer passes over memory, a minute or more to start")
    router_aux_loss_coef: float | None = flag(
        None, "weight of the load-balancing loss of mixture-of-experts models; unset is "
        "config.json's",
        least=0)

    # The data

    dataset_name: str | None = flag(
        None, "preference pairs: file, glob or directory of .jsonl, .json, .gz of these, .csv, "
        ".parquet; or hub id; several with commas between", "data")
    datasets: list[dict] = flag(
        [], "instead, in a --config file: data sets trained on as one, each with path, name, "
        "split, columns, fraction; TRL's mixture")
    dataset_config: str | None = flag(None, "configuration, or folder, of a data set")
    dataset_revision: str | None = flag(
        None, "branch, tag or commit of a data set on the hub; unset is its main branch")
    dataset_train_split: str = flag("train", "split to train on")
    dataset_test_split: str = flag("test", "split to evaluate on, with --eval_strategy")
    eval_dataset_name: str | None = flag(None, "pairs to evaluate on; same forms as --dataset_name")
    eval_fraction: float = flag(
        0.0, "share of the training pairs held out for evaluation instead", least=0)
    max_length: int | None = flag(
        1024, "cut prompt + completion to this many tokens; none for no limit", least=1)
    max_prompt_length: int | None = flag(None, "cut prompts to this many tokens first", least=1)
    max_completion_length: int | None = flag(
        None, "cut completions to this many tokens first", least=1)
    truncation_mode: str = flag(
        "keep_start", "which end of a sequence a cut keeps", choices=("keep_start", "keep_end"))
    on_bad_row: str = flag(
        "stop", "unusable rows; stop names the first one, skip counts and lists them",
        choices=("stop", "skip"))
    shuffle_dataset: bool = flag(
        True, "shuffle each epoch, by seed and epoch alone; false keeps file order")
    dataset_num_proc: int | None = flag(None, "processes that tokenize", least=1)
    chat_template: str | None = flag(
        None, "chat template, or a file with it, instead of the model's; base models have none")
    cache_dir: str | None = flag(
        None, "where tokenized pairs and reference log-probs are kept; unset is ~/.cache/dpo")

    # The loss

    loss_type: list[str] = flag(
        ["sigmoid"], "one or more of: " + " ".join(sorted(LOSSES)), "loss")
    loss_weights: list[float] | None = flag(None, "weight of each loss type; unset is 1 each")
    beta: float = flag(0.1, "strength of the tie to the reference (ipo: the paper's tau)")
    label_smoothing: float = flag(
        0.0, "probability that a label is flipped (sigmoid, robust, exo_pair, aot, cpo)")
    f_divergence_type: str = flag("reverse_kl", "scores of f-DPO", choices=tuple(F_DIVERGENCES))
    f_alpha_divergence_coef: float = flag(0.5, "alpha of alpha_divergence, u^-alpha")
    reference_free: bool = flag(False, "take the reference's log-probs as 0")
    ld_alpha: float | None = flag(
        None, "LD-DPO: weight of the tokens beyond the shorter completion's length")
    ld_apply_to_ref: bool = flag(True, "LD-DPO: weight the reference's log-probs too")
    use_weighting: bool = flag(
        False, "WPO: weight pairs by how likely the policy is to write them itself")
    wpo_clamp: bool = flag(
        True, "WPO: clamp weights to at most 1, as the authors do (TRL does not)")
    rpo_alpha: float | None = flag(
        None, "RPO: weight of the chosen completion's negative log-likelihood", least=0)
    rpo_average: str = flag(
        "sequence", "RPO's average; sequence is the mean of per-token means",
        choices=("sequence", "token"))
    sft_average: str = flag(
        "token", "average of sft, orpo, cpo; token is over the global batch, sum is none",
        choices=("token", "sequence", "sum"))
    ipo_average: str = flag(
        "token", "ipo: log-ratios per token, or their sum", choices=("token", "sum"))
    discopop_tau: float = flag(0.05, "discopop: temperature of the blend")
    simpo_gamma: float = flag(
        0.5, "simpo, alphapo: target margin (the authors' flag is this over beta)")
    alphapo_alpha: float = flag(0.25, "alphapo: shape of the reward")
    cpo_alpha: float = flag(1.0, "cpo: weight of the negative log-likelihood")
    orpo_lambda: float = flag(0.1, "orpo: weight of the odds-ratio term (TRL calls it beta)")
    dpop_lambda: float = flag(50.0, "dpop: penalty where chosen falls below the reference")
    rdpo_alpha: float = flag(0.01, "rdpo: penalty per token of length difference")
    odpo_alpha: float = flag(1.0, "odpo: weight of the offset from the rows' scores")
    odpo_margin: str = flag(
        "log", "odpo: offset by the log of the score gap, or the raw gap", choices=("log", "raw"))
    rpo_eta: float = flag(1.0, "rpo_sq, rpo_bwd_kl, rpo_fwd_kl: scale of the rows' score gap")
    bco_delta: str = flag(
        "running", "bco_pair's delta: the running mean reward of earlier steps, this step's own "
        "first (as TRL 0.18), or zero (as TRL 1.16)", choices=("running", "first", "zero"))
    exact_global_loss: bool | None = flag(
        None, "compute the loss over the global batch at once, at the price of one more forward; "
        "unset does so where a loss sorts the batch")

    # The reference

    precompute_ref_log_probs: bool | None = flag(
        None, "run the reference once, before training, and keep no copy of it; unset does so "
        "unless the reference moves", "reference")
    ref_model_name_or_path: str | None = flag(
        None, "another model, or adapter, as reference; unset is the model as it starts")
    ref_adapter_name: str | None = flag(
        None, "the reference is the adapter of this name, in its folder; unset is what is trained, "
        "as it starts")
    ref_model_dtype: str | None = flag(
        None, "type of the reference's weights; bfloat16 halves its memory", choices=DTYPES)
    ref_model_device: str | None = flag(
        None, "device of the reference; cpu frees the GPU and is slow")
    sync_ref_model: bool = flag(False, "TR-DPO: move the reference towards the policy")
    ref_model_mixup_alpha: float = flag(0.6, "TR-DPO: share of the policy in the moved reference")
    ref_model_sync_steps: int = flag(512, "TR-DPO: steps between moves", least=1)

    # LoRA

    use_peft: bool = flag(False, "train a LoRA; the reference is the model without it", "LoRA")
    lora_r: int = flag(16, "rank", least=1)
    lora_alpha: int = flag(32, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, "dropout before A; needs --disable_dropout false", least=0)
    use_rslora: bool = flag(False, "scale by lora_alpha / sqrt(lora_r) instead")
    loraplus_lr_ratio: float | None = flag(
        None, "LoRA+: learning rate of B divided by that of A")
    merge_adapter: bool = flag(
        False, "at the end, add the LoRA to the weights and save the full model; over 4 bits, to "
        "the dequantized weights, in bfloat16")
    lora_target_modules: list[str] | None = flag(
        None, "names such as q_proj v_proj lm_head embed_tokens, or all-linear, or one pattern of "
        "whole names, as PEFT's; unset is q_proj v_proj, or what a family has in their place")
    lora_target_parameters: list[str] | None = flag(
        None, "stacks of experts and routers: mlp.experts.gate_up_proj mlp.experts.down_proj "
        "gate.weight")
    lora_modules_to_save: list[str] | None = flag(
        None, "modules that are fully trained beside the LoRA, such as lm_head norm")
    use_dora: bool = flag(
        False, "DoRA: learn the length of each row of the weights separately from its direction")
    model_adapter_name: str | None = flag(
        None, "train the adapter of this name, in its folder of model_name_or_path")
    load_in_4bit: bool = flag(
        False, "QLoRA: load the base, and a reference that is another model, in 4 bits; files in "
        "bitsandbytes' 4 bits need no flag")
    bnb_4bit_quant_type: str = flag(
        "nf4", "which 16 levels a weight may have", choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = flag(False, "quantize the scales of the 4 bits too")
    bnb_4bit_compute_dtype: str | None = flag(
        None, "type in which 4-bit weights are multiplied; unset is that of the other layers",
        choices=("float32", "bfloat16", "float16"))
    load_in_8bit: bool = flag(False, "refused: use --load_in_4bit")

    # Training

    per_device_train_batch_size: int = flag(8, "pairs in one forward", "training", least=1)
    gradient_accumulation_steps: int = flag(1, "forwards in one optimizer step", least=1)
    max_tokens_per_forward: int | None = flag(
        None, "cut forwards further, to at most this many tokens: bounds memory; unset is 4096 on "
        "a CPU, where longer ones are hardly faster", least=1)
    num_train_epochs: float = flag(3.0, "passes over the training pairs", least=0)
    max_steps: int = flag(
        -1, "stop after this many optimizer steps; -1: num_train_epochs decides")
    optim: str = flag(
        "adamw_torch_fused", "the optimizer: AdamW (two names of one), AdamW with moments in 8 bits "
        "(three names of one), Adafactor, or Muon for the matrices inside the model with AdamW for "
        "all else",
        choices=("adamw_torch_fused", "adamw_torch", *EIGHT_BIT, *BY_RULE))
    stochastic_rounding: bool | None = flag(
        None, "with dtype bfloat16, round weights and moments up or down at random, in proportion "
        "to how near each is, so that small steps are not lost; unset is on where all weights are "
        "trained")
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW", least=0)
    lr_scheduler_type: str = flag(
        "linear", "how the learning rate falls", choices=tuple(SHAPES))
    lr_scheduler_kwargs: dict | None = flag(
        None, "options of lr_scheduler_type, as JSON: '{\"min_lr_rate\": 0.1}'; docs/questions.md")
    warmup_steps: float = flag(0, "steps of linear warm-up; below 1, a share of all steps", least=0)
    warmup_ratio: float = flag(0.0, "older name of warmup_steps as a share", least=0)
    weight_decay: float = flag(
        0.0, "decoupled weight decay, of matrices only (not norms and biases)", least=0)
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment", least=0)
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment", least=0)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", least=0)
    max_grad_norm: float = flag(1.0, "clip gradients to this norm; 0 does not clip", least=0)
    bf16: bool | None = flag(
        None, "bfloat16 autocast over float32 weights; unset is on where the device computes it")
    fp16: bool = flag(
        False, "float16 autocast with loss scaling, for GPUs without bfloat16")
    skip_nonfinite: int = flag(
        0, "skip at most N steps whose loss or gradient is not finite", least=0)
    seed: int = flag(42, "seed of shuffling, the LoRA's random start and dropout")
    use_cpu: bool = flag(False, "train on the CPU even if there is a GPU")
    ddp_timeout: int = flag(1800, "collective timeout, seconds", least=1)

    # Evaluation and files

    logging_steps: float = flag(
        10, "steps between lines of metrics; below 1, a share of all steps",
        "evaluation and files", least=0)
    logging_first_step: bool = flag(False, "log the first step too")
    disable_tqdm: bool | None = flag(None, "no progress bar; unset shows one at a terminal")
    report_to: list[str] = flag(
        ["none"], "loggers besides metrics.jsonl",
        choices=("none", "tensorboard", "wandb", "trackio", "mlflow"))
    run_name: str | None = flag(None, "name of the run in the loggers; unset is output_dir's name")
    project: str = flag("huggingface", "project in the loggers (wandb, trackio), experiment in mlflow")
    eval_strategy: str = flag(
        "no", "when to evaluate; no is once, at the end, if there are pairs to evaluate on",
        choices=("no", "steps", "epoch"))
    eval_steps: float | None = flag(
        None, "steps between evaluations; unset is logging_steps", least=0)
    eval_on_start: bool = flag(False, "evaluate before the first step too")
    generate_during_eval: bool = flag(
        False, "answer a few prompts at each evaluation, and before the first step")
    generate_prompts: str | None = flag(
        None, "file of rows with these prompts; unset takes those of the first evaluation pairs")
    per_device_eval_batch_size: int = flag(
        8, "pairs in one forward of evaluation and of the reference pass", least=1)
    save_strategy: str = flag(
        "steps", "when to write checkpoint-N, from which a run resumes: also at the last step; best "
        "is at each evaluation that is better than all before",
        choices=("no", "steps", "epoch", "best"))
    save_steps: float = flag(
        500, "steps between checkpoints; below 1, a share of all steps", least=0)
    save_total_limit: int | None = flag(None, "keep at most N checkpoints", least=1)
    load_best_model_at_end: bool = flag(
        False, "keep the checkpoint of the best evaluation, and load it at the end")
    metric_for_best_model: str | None = flag(
        None, "the metric that decides which is best; unset is loss")
    greater_is_better: bool | None = flag(
        None, "whether more of it is better; unset is yes unless its name ends in loss")
    early_stopping_patience: int | None = flag(
        None, "stop after this many evaluations that were no better", least=1)
    early_stopping_threshold: float = flag(
        0.0, "how much better an evaluation must be to count", least=0)
    resume_from_checkpoint: str | None = flag(
        None, "true (the newest in output_dir) or a checkpoint-N directory; more epochs or steps "
        "than that run had make it longer")
    force_resume: bool = flag(
        False, "resume even if data or settings are not those of the checkpoint")
    dry_run: bool = flag(
        False, "set up, print steps, tokens, memory and time, and exit")

    # The hub

    push_to_hub: bool = flag(
        False, "at the end, upload output_dir with a model card; needs a token", "the hub")
    hub_strategy: str = flag(
        "every_save", "when to upload: what each checkpoint trained, while training goes on, and "
        "the end; or only the end", choices=("every_save", "end"))
    hub_model_id: str | None = flag(
        None, "owner/name of the repository; unset is output_dir's name, in your own account")
    hub_private_repo: bool | None = flag(
        None, "make the repository private; unset is its owner's default")
    hub_revision: str | None = flag(None, "branch to push to")
    hub_token: str | None = flag(
        None, "token to write with; unset is that of `hf auth login` or HF_TOKEN")

    def __post_init__(self) -> None:
        for option in fields(self):
            setattr(self, option.name, plain_value(option, getattr(self, option.name)))
