"""checkpoint-N: what a run resumes from. A loadable model, the optimizer's state, and the run's position.

The functions take the trainer, whose fields they read and fill.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Optional

from safetensors.torch import load_file, save_file
from torch import nn

import model as models

MUST_MATCH = ("loss_type", "loss_weights", "beta", "learning_rate", "seed", "lr_scheduler_type", "use_peft", "lora_r",
              "max_length", "shuffle_dataset", "dtype", "bnb_4bit_compute_dtype")


def find(trainer) -> Optional[Path]:
    """The directory --resume_from_checkpoint means, or None to start afresh. Raises ValueError if it is another run."""
    asked = trainer.args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    found = in_directory(trainer.output_dir) if str(asked).lower() == "true" else [Path(asked)]
    if not found:
        trainer.say(f"{trainer.output_dir}: no checkpoint yet, starting from the beginning")
        return None
    if not (found[-1] / "trainer_state.json").exists():
        raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint there")
    state = models.read_json(found[-1] / "trainer_state.json")
    run = state["run"] if isinstance(state.get("run"), dict) else {}
    for name, value in must_match(trainer).items():
        if run.get(name) != value:
            raise ValueError(f"{found[-1]}: {name} was {run.get(name)!r} there and is {value!r} now; resume with the "
                             f"same settings, or start a new run in another --output_dir")
    trainable = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    check(found[-1], state, trainer.total_steps, trainable)
    return found[-1]


def in_directory(output_dir: Path) -> list[Path]:
    """Its checkpoint-N directories, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def must_match(trainer) -> dict:
    """What a checkpoint must share with the run that resumes from it."""
    same = {name: getattr(trainer.args, name) for name in MUST_MATCH}
    return same | {"global_batch": trainer.global_batch, "total_steps": trainer.total_steps,
                   "data": trainer.train_store.digest, "model": trainer.started_from}


def check(directory: Path, state: dict, total_steps: int, trainable: dict[str, nn.Parameter]) -> None:
    """Raise ValueError for a damaged checkpoint, from its headers, before anything is run."""
    kinds = {"step": int, "num_tokens": int, "pairs_done": int, "pending": list, "delta_sum": (int, float), "delta_count": int}
    odd = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if odd or not 0 < state["step"] <= total_steps:
        raise ValueError(f"{directory / 'trainer_state.json'}: {', '.join(odd) or 'step'} is missing or has no meaning; "
                         "resume from another checkpoint")
    adapter = (directory / "adapter_config.json").exists()
    files = {"adapter_model.safetensors"} if adapter else set(models.open_checkpoint(directory).files.values())
    for file in files:
        models.open_safetensors(directory / file)
    path = directory / "optimizer.safetensors"
    opened = models.open_safetensors(path)
    found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    wanted = {f"{name}.{key}": tuple(p.shape) if key != "step" else () for name, p in trainable.items()
              for key in ("step", "exp_avg", "exp_avg_sq")}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {found.get(wrong[0], 'missing')}, this run has "
                         f"{wanted.get(wrong[0], 'none')}; it is of another model, or damaged")


def save(trainer) -> None:
    """Write checkpoint-N beside its place, then rename it."""
    if trainer.ranks.first:
        output_dir, name = trainer.output_dir, f"checkpoint-{trainer.step}"
        scratch = output_dir / f".{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        trainer.save_model(scratch)
        state = {f"{n}.{key}": value.cpu() for n, p in zip(trainer.trainable_names, trainer.trainable)
                 for key, value in trainer.optimizer.state[p].items()}
        save_file(state, scratch / "optimizer.safetensors")
        if trainer.args.sync_ref_model:
            models.save_model(trainer.ref_model, scratch / "ref_model")
        models.write_json(scratch / "trainer_state.json", {
            "step": trainer.step, "num_tokens": trainer.num_tokens, "pairs_done": trainer.pairs_done,
            "pending": trainer.pending, "delta_sum": trainer.delta_sum, "delta_count": trainer.delta_count,
            "run": must_match(trainer)})
        shutil.rmtree(output_dir / name, ignore_errors=True)
        os.replace(scratch, output_dir / name)
        if trainer.args.save_total_limit:
            for old in in_directory(output_dir)[: -trainer.args.save_total_limit]:
                shutil.rmtree(old)
    trainer.ranks.barrier()


def load(trainer, directory: Path) -> None:
    """Go on exactly where `directory` was written; later lines of metrics.jsonl are dropped."""
    state = models.read_json(directory / "trainer_state.json")
    if trainer.lora:
        models.load_adapter(trainer.model, directory)
    else:
        copy_weights(directory, trainer.model)
    if trainer.args.sync_ref_model:
        copy_weights(directory / "ref_model", trainer.ref_model)
    moments = load_file(directory / "optimizer.safetensors", device=str(trainer.ranks.device))
    for name, p in zip(trainer.trainable_names, trainer.trainable):
        trainer.optimizer.state[p] = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    trainer.step, trainer.num_tokens, trainer.pairs_done = state["step"], state["num_tokens"], state["pairs_done"]
    trainer.pending, trainer.delta_sum, trainer.delta_count = state["pending"], state["delta_sum"], state["delta_count"]
    if trainer.delta_count:
        trainer.options["delta"] = trainer.delta_sum / trainer.delta_count
    if trainer.ranks.first:
        cut_metrics(trainer.output_dir / "metrics.jsonl", trainer.step)
    trainer.say(f"resuming from {directory}, step {trainer.step} of {trainer.total_steps}")


def copy_weights(directory: Path, model: models.Decoder) -> None:
    """Overwrite `model` with the checkpoint's weights, keeping type and device."""
    loaded = models.load_model(directory, next(model.parameters()).dtype)
    model.load_state_dict(loaded.state_dict())


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`: those steps are run again."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text("".join(line + "\n" for line in lines if step_of(line) <= step), "utf-8")
    os.replace(scratch, path)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl. One torn by a kill is of steps that are run again: after all others."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
