"""checkpoint-N: what a run resumes from. A loadable model, the optimizer's state, and the run's position.

A checkpoint is written beside its place, synced to the disk and renamed, so that it is whole or absent; what a disk
damages later shows in the sha256 of each file, which trainer_state.json keeps. Rank 0 alone reads and writes; the
functions that take the trainer are called by all ranks.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterable, Iterator, Optional

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import model as models
from extras.lora.peft_files import load_adapter
from extras.models.opening import load_model
from parts.files import open_safetensors, read_json, whole, write_json

STATE = "trainer_state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
# Options that may differ between a run and its resume: they change no weight, or what they change is compared by
# content (model, data) or by effect (global_batch, total_steps).
MAY_DIFFER = set("""
    model_name_or_path model_revision output_dir gradient_checkpointing dataset_name dataset_config
    dataset_train_split dataset_test_split eval_dataset_name max_prompt_length max_completion_length truncation_mode
    on_bad_row dataset_num_proc cache_dir exact_global_loss precompute_ref_log_probs ref_model_name_or_path
    ref_model_device merge_adapter per_device_train_batch_size gradient_accumulation_steps max_tokens_per_forward
    num_train_epochs max_steps optim warmup_ratio use_cpu ddp_timeout logging_steps logging_first_step disable_tqdm
    report_to eval_strategy eval_steps eval_on_start per_device_eval_batch_size save_strategy save_steps
    save_total_limit resume_from_checkpoint force_resume load_best_model_at_end metric_for_best_model
    greater_is_better early_stopping_patience early_stopping_threshold skip_nonfinite fsdp push_to_hub hub_model_id
    hub_private_repo hub_revision hub_token dataset_revision generate_during_eval generate_prompts project
    run_name""".split())


# Which checkpoint


def find(trainer) -> Optional[tuple[Path, dict]]:
    """The checkpoint that --resume_from_checkpoint means, with its state, or None to start afresh.

    A worker that torchrun started again resumes without being asked. Raises ValueError where there is none, where none
    is whole, and where it is of another run.
    """
    asked = str(trainer.args.resume_from_checkpoint).lower()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if asked in ("none", "false") and not restarted:
        return None
    found = trainer.ranks.from_first(partial(choose, trainer, asked, restarted))
    if found is None:
        return None
    state = found["state"]
    adopt_batch(trainer, state["run"])
    differs = differences(trainer, state["run"])
    if differs and asked in ("none", "false"):
        trainer.say(f"{found['directory']}: of another run ({differs[0]}); starting from the beginning")
        return None
    if differs and not trainer.args.force_resume:
        raise ValueError(f"{found['directory']}: {'; '.join(differs)}; resume with the same settings and data, go on "
                         "all the same with --force_resume, or start a new run in another --output_dir")
    if state["step"] > trainer.total_steps:
        raise ValueError(f"{found['directory']}: step {state['step']} is beyond the {trainer.total_steps} steps of "
                         "this run")
    trainer.ranks.from_first(partial(check_moments, Path(found["directory"]), trainer))
    return Path(found["directory"]), state


def choose(trainer, asked: str, restarted: bool) -> Optional[dict]:
    """The newest whole checkpoint of output_dir, or the directory asked for; damaged ones are named."""
    newest = asked == "true" or restarted
    found = in_directory(trainer.output_dir)[::-1] if newest else [Path(trainer.args.resume_from_checkpoint)]
    damage = []
    for directory in found:
        if not newest and not (directory / STATE).exists():
            raise ValueError(f"--resume_from_checkpoint {directory}: no checkpoint there")
        try:
            state = read_state(directory)
            if damage:
                trainer.say(f"damaged: {'; '.join(damage)}; going on from {directory}")
            return {"directory": str(directory), "state": state}
        except ValueError as error:
            damage.append(str(error))
    if damage and asked not in ("none", "false"):
        raise ValueError(f"{'; '.join(damage)}; resume from another checkpoint, or start anew without "
                         "--resume_from_checkpoint")
    trainer.say(f"{trainer.output_dir}: {'; '.join(damage) or 'no checkpoint yet'}, starting from the beginning")
    return None


def in_directory(output_dir: Path) -> list[Path]:
    """Its checkpoint-N directories, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def read_state(directory: Path) -> dict:
    """trainer_state.json of a whole checkpoint; ValueError names the first file that is not what was written."""
    state = read_json(directory / STATE)
    if state.pop("sha256", None) != digest_of(state):
        raise ValueError(f"{directory / STATE}: its checksum differs")
    missing = [name for name in state["files"] if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory / missing[0]}: missing")
    for name, found in hash_files(directory, state["files"]).items():
        if found != state["files"][name]:
            raise ValueError(f"{directory / name}: its checksum differs from that in {STATE}")
    return state


def digest_of(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of each file, several at a time."""

    def hashed(name: str) -> str:
        with open(directory / name, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(hashed, names)))


def of_run(trainer) -> dict:
    """What a checkpoint must share with the run that resumes from it, and (`cut`) how its global batch came about."""
    c = trainer.args
    same = {name: value for name, value in sorted(vars(c).items()) if name not in MAY_DIFFER}
    return same | {"global_batch": trainer.global_batch, "total_steps": trainer.total_steps,
                   "data": trainer.train_store.digest, "model": trainer.started_from, "bf16": trainer.bf16,
                   "cut": [c.per_device_train_batch_size, c.gradient_accumulation_steps]}


def adopt_batch(trainer, run: dict) -> None:
    """On another number of ranks, the same command goes on with the global batch that the run began with."""
    now = of_run(trainer)
    if run.get("cut") == now["cut"] and run.get("global_batch") != now["global_batch"]:
        trainer.plan_steps(run["global_batch"])
        trainer.say(f"the run began with {run['global_batch']} pairs in a step, and goes on so")


def differences(trainer, run: dict) -> list[str]:
    """"beta was 0.1 there and is 0.2 now", of all that must be the same. An option that `run` lacks had its default."""
    defaults = vars(type(trainer.args)())
    return [f"{name} was {run.get(name, defaults.get(name))!r} there and is {value!r} now"
            for name, value in of_run(trainer).items() if name != "cut" and run.get(name, defaults.get(name)) != value]


def check_moments(directory: Path, trainer) -> None:
    """Raise ValueError where the optimizer's tensors are not those of this run's parameters (--force_resume)."""
    path = directory / "optimizer.safetensors"
    opened = open_safetensors(path)
    found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    wanted = {f"{name}.{key}": tuple(p.shape) if key != "step" else () for name, p in trainer.model.named_parameters()
              if p.requires_grad for key in MOMENTS}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {found.get(wrong[0], 'missing')}, this run has "
                         f"{wanted.get(wrong[0], 'none')}; it is of another model")


# Writing


def save(trainer) -> None:
    """checkpoint-N of the step that is done; then the oldest beyond --save_total_limit are removed.

    Raises OSError, on every rank, where it cannot be written; the checkpoints before it stay whole.
    """
    model, ref_model, moments = *whole_models(trainer), {}
    for name, p in zip(trainer.trainable_names, trainer.trainable):
        state = trainer.optimizer.state[p] or no_moments(p)
        for key in MOMENTS:
            tensor = whole(state[key])
            if trainer.ranks.first:
                moments[f"{name}.{key}"] = tensor.cpu()
    trainer.ranks.from_first(partial(write, trainer, model, ref_model, moments))


def no_moments(p: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter that no step has moved: what its first step begins with."""
    return {"step": torch.zeros((), device=p.device), **{key: torch.zeros_like(p) for key in MOMENTS[1:]}}


def whole_models(trainer) -> tuple[models.Decoder, Optional[models.Decoder]]:
    """The policy, and the reference where it moves; of a policy with LoRA only the LoRA counts."""
    moved = trainer.args.sync_ref_model and not trainer.lora
    model = trainer.whole_model(trainer.model, bool(trainer.lora))
    return model, trainer.whole_model(trainer.ref_model) if moved else None


def write(trainer, model: models.Decoder, ref_model: Optional[models.Decoder], moments: dict[str, Tensor]) -> None:
    target = trainer.output_dir / f"checkpoint-{trainer.step}"
    scratch = target.with_name(f".{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        trainer.write_model(model, scratch)
        if ref_model is not None:
            models.save_model(ref_model, scratch / "ref_model")
        elif trainer.args.sync_ref_model:
            from extras.lora.adapters import adapter_state

            save_file(adapter_state(trainer.ref_adapter), scratch / "ref_adapter.safetensors")
        save_file(moments, scratch / "optimizer.safetensors")
        finish(trainer, scratch)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
        sync(trainer.output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        last = in_directory(trainer.output_dir)
        raise OSError(f"{target}: cannot be written ({error}); " + (
            f"{last[-1].name} is whole: make room, then go on with --resume_from_checkpoint true" if last else
            "there is no checkpoint before it")) from None
    remove_old(trainer)


def finish(trainer, scratch: Path) -> None:
    """Write what is not weights, and see all files on the disk."""
    metrics = trainer.output_dir / "metrics.jsonl"
    if metrics.exists():
        shutil.copyfile(metrics, scratch / metrics.name)
    names = sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file())
    state = {"step": trainer.step, "num_tokens": trainer.num_tokens, "pairs_done": trainer.pairs_done,
             "pending": trainer.pending, "delta_sum": trainer.delta_sum, "delta_count": trainer.delta_count,
             "best": trainer.best, "scaling": trainer.scaling, "skipped": trainer.skipped, "run": of_run(trainer),
             "files": hash_files(scratch, names)}
    write_json(scratch / STATE, state | {"sha256": digest_of(json.loads(json.dumps(state)))})
    for path in [*scratch.rglob("*"), scratch]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(trainer) -> None:
    """Keep --save_total_limit checkpoints, and the best one and the newest in any case."""
    limit, found = trainer.args.save_total_limit, in_directory(trainer.output_dir)
    if limit is None:
        return
    spare = [p for p in found[:-1] if str(p) != trainer.best["directory"]]
    for old in spare[: max(0, len(found) - limit)]:
        shutil.rmtree(old)


# Reading


def load(trainer) -> None:
    """Go on exactly where trainer.checkpoint was written; metrics.jsonl becomes what it was then."""
    directory, state = trainer.checkpoint
    read_weights(trainer, directory)
    read_moments(trainer, directory / "optimizer.safetensors")
    trainer.step, trainer.num_tokens, trainer.pairs_done = state["step"], state["num_tokens"], state["pairs_done"]
    trainer.pending, trainer.best = state["pending"], state["best"]
    trainer.scaling, trainer.skipped = state["scaling"], state["skipped"]
    trainer.delta_sum, trainer.delta_count = state["delta_sum"], state["delta_count"]
    if trainer.delta_count:
        trainer.options["delta"] = trainer.delta_sum / trainer.delta_count
    metrics = directory / "metrics.jsonl"
    if trainer.ranks.first:
        scratch = trainer.output_dir / ".metrics.jsonl"
        scratch.write_bytes(metrics.read_bytes() if metrics.exists() else b"")
        os.replace(scratch, trainer.output_dir / "metrics.jsonl")
    trainer.say(f"resuming from {directory}, step {trainer.step} of {trainer.total_steps}")


def read_weights(trainer, directory: Path) -> None:
    """The policy's weights, and those of a moved reference, from rank 0 to all."""
    model, ref_model = whole_models(trainer)
    if trainer.ranks.first:
        if trainer.lora:
            load_adapter(model, directory)
        else:
            copy_weights(directory, model)
        if ref_model is not None:
            copy_weights(directory / "ref_model", ref_model)
    for ours, read in ((trainer.model, model), (trainer.ref_model, ref_model)):
        for name, p in read.named_parameters() if read is not None else ():
            if p.requires_grad or read is ref_model:
                from_first(trainer, ours.get_parameter(name), p)
    if trainer.args.sync_ref_model and trainer.lora:
        from extras.lora.adapters import adapter_state, load_adapter_state

        if trainer.ranks.first:
            load_adapter_state(trainer.ref_adapter, directory / "ref_adapter.safetensors")
        for tensor in adapter_state(trainer.ref_adapter).values():
            from_first(trainer, tensor, tensor)


def copy_weights(directory: Path, model: models.Decoder) -> None:
    """Overwrite `model` with the checkpoint's weights, keeping type and device."""
    loaded = load_model(directory, next(model.parameters()).dtype)
    model.load_state_dict(loaded.state_dict())


def read_moments(trainer, path: Path) -> None:
    """AdamW's state; a fused one counts its steps where the parameters are."""
    found = load_file(path) if trainer.ranks.first else {}
    for name, p in zip(trainer.trainable_names, trainer.trainable):
        state = no_moments(p)
        for key in MOMENTS:
            from_first(trainer, state[key], found.get(f"{name}.{key}"))
        trainer.optimizer.state[p] = state


@torch.no_grad()
def from_first(trainer, target: Tensor, source: Optional[Tensor]) -> None:
    """Write rank 0's `source` into `target`, or into each rank's shard of it."""
    if hasattr(target, "full_tensor"):
        from extras import fsdp

        fsdp.fill(target, source if trainer.ranks.first else None)
        return
    if trainer.ranks.first:
        target.copy_(source)
    if trainer.ranks.world > 1:
        there = target.detach().to(trainer.ranks.device)
        dist.broadcast(there, 0)
        target.copy_(there)


# While training


def saving(trainer, steps: Iterable) -> Iterator:
    """Yield each step, and after it write the checkpoint that is due: by --save_steps, because the evaluation is the
    best so far, or because the process was told to leave.

    Ends early where evaluations get no better. At the end the best model is loaded.
    """
    c = trainer.args
    with signals_noticed(trainer):
        for step in steps:
            yield step
            best = c.load_best_model_at_end and trainer.evaluation.get("step") == trainer.step and judge(trainer)
            if trainer.step % trainer.save_every == 0 or best or trainer.leaving:
                save(trainer)
            if trainer.leaving:
                trainer.say(f"told to leave: checkpoint-{trainer.step} is written; "
                            "--resume_from_checkpoint true goes on from it")
                raise SystemExit(128 + (trainer.signal or signal.SIGTERM))
            if c.early_stopping_patience is not None and trainer.best["waited"] >= c.early_stopping_patience:
                trainer.say(f"step {trainer.step}: no evaluation was better than that of step {trainer.best['step']}; "
                            "stopping early")
                break
    if c.load_best_model_at_end and trainer.best["step"] not in (0, trainer.step):
        read_weights(trainer, Path(trainer.best["directory"]))
        trainer.say("the best model is that of step {step}, {name} {value:g}".format(**trainer.best))


@contextmanager
def signals_noticed(trainer):
    """Within, SIGTERM and SIGUSR1 are kept in trainer.signal; `update` tells all ranks."""

    def notice(number, frame):
        trainer.signal = number

    numbers = (signal.SIGTERM, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, notice) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def judge(trainer) -> bool:
    """Whether the last evaluation is the best so far; counts those since the best (as transformers does, an improvement
    of at most early_stopping_threshold is none to wait for, though it is the new best)."""
    c, best = trainer.args, trainer.best
    name = "eval_" + (c.metric_for_best_model or "loss").removeprefix("eval_")
    greater = not name.endswith("loss") if c.greater_is_better is None else c.greater_is_better
    value = trainer.evaluation[name]
    gain = math.inf if best["value"] is None else (value - best["value"]) * (1 if greater else -1)
    waited = 0 if gain > c.early_stopping_threshold else best["waited"] + 1
    if gain > 0:
        directory = trainer.output_dir / f"checkpoint-{trainer.step}"
        best = {"name": name, "value": value, "step": trainer.step, "directory": str(directory)}
    trainer.best = best | {"waited": waited}
    return gain > 0


def check_options(c, metrics: set[str]) -> None:
    """Raise ValueError where --load_best_model_at_end lacks what it needs; `metrics` are those of an evaluation."""
    if c.eval_strategy == "no" or c.save_strategy == "no":
        raise ValueError("--load_best_model_at_end: it needs evaluations and checkpoints; give --eval_strategy and "
                         "--save_strategy")
    name = (c.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in metrics:
        raise ValueError(f"--metric_for_best_model {name}: no such metric; there are {', '.join(sorted(metrics))}")
