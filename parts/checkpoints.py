"""checkpoint-N, what a run resumes from: a loadable model, AdamW's moments, and the run's position.

A checkpoint is written beside its place, synced to the disk and renamed, so it is complete or
absent. Later damage on the disk shows in the sha256 of each file, which trainer_state.json keeps.
Only rank 0 reads and writes; every rank calls the methods.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parts.config import BY_RULE, DPOConfig
from parts.custom_optimizer import restore_state, saved_state
from parts.files import TensorFile, read_json, write_json, write_tensors
from parts.output import sync
from parts.place import tensors_of
from parts.schedule import optimizer_kind

STATE = "trainer_state.json"
STOPPING = b"\nCtrl-C: saving a checkpoint after this step; again stops at once\n"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
# Options that may differ between a run and its resume: they change no weight, or their effect is
# compared instead (model and data by content; global_batch, total_steps).
MAY_DIFFER = set("""
    save_dtype chat_template model_name_or_path model_revision output_dir gradient_checkpointing
    activation_offloading context_parallel_size
    dataset_name dataset_config dataset_train_split dataset_test_split eval_dataset_name
    datasets max_prompt_length max_completion_length
    truncation_mode on_bad_row dataset_num_proc cache_dir exact_global_loss precompute_ref_log_probs
    ref_model_name_or_path ref_model_device merge_adapter per_device_train_batch_size
    gradient_accumulation_steps max_tokens_per_forward num_train_epochs max_steps optim warmup_ratio stochastic_rounding
    use_cpu ddp_timeout logging_steps logging_first_step disable_tqdm report_to eval_strategy
    eval_steps eval_on_start per_device_eval_batch_size save_strategy save_steps save_total_limit
    resume_from_checkpoint force_resume load_best_model_at_end metric_for_best_model
    greater_is_better early_stopping_patience early_stopping_threshold skip_nonfinite fsdp
    push_to_hub hub_strategy hub_model_id hub_private_repo hub_revision hub_token dataset_revision
    generate_during_eval generate_prompts project run_name""".split())


class Found(NamedTuple):
    """A checkpoint that the run resumes from."""

    directory: Path
    state: dict


class Checkpoints:
    """Find, write and read a run's checkpoints, and notice when the process is told to leave."""

    def __init__(self, trainer: Any, fingerprint: str):
        self.trainer = trainer
        self.fingerprint = fingerprint  # of the policy's weights as the run began
        self.found: Found | None = None  # what to resume from
        self.when_saved: Callable[[Path], None] = lambda directory: None  # --push_to_hub
        self.signal = 0  # SIGINT, SIGTERM or SIGUSR1, if this process was sent one
        self.leaving = False  # whether any rank was: agreed on once a step, with the metrics

    # A reference that moves (TR-DPO) does not follow from the flags: a checkpoint must hold it

    def moving_model(self) -> nn.Module | None:
        """Return the reference if it is a model of its own that moves."""
        c = self.trainer.args
        return self.trainer.reference.model if c.sync_ref_model and not self.trainer.lora else None

    def moving_adapter(self) -> dict[str, Tensor]:
        """Return {name: tensor} of the reference's LoRA, if it moves."""
        if not (self.trainer.args.sync_ref_model and self.trainer.lora):
            return {}
        state = {}
        for name, module in self.trainer.reference.adapter.items():
            for part, p in module.named_parameters():
                if part.startswith("lora_"):
                    state[f"{name}.{part}"] = p.detach()
        return state

    # Which checkpoint

    def start_from(self, asked: Any) -> None:
        """Take up what `train(resume_from_checkpoint=asked)` says; None leaves the flag's.

        Raises ValueError where this trainer has trained already.
        """
        step = self.trainer.position.step
        if asked is not None:
            self.trainer.args.resume_from_checkpoint = str(asked)
            self.find(str(asked))
        elif step:
            raise ValueError(
                f"this trainer has taken {step} steps already; make a new DPOTrainer to train "
                "again")

    def find(self, asked: str | None) -> None:
        """Find the checkpoint that `--resume_from_checkpoint asked` means.

        A worker that torchrun restarted resumes without being asked. Raises ValueError if there is
        none, if all are damaged, and if it belongs to another run.
        """
        trainer = self.trainer
        name = str(asked).lower()
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.found = None
        if name in ("none", "false") and not restarted:
            return
        newest = name == "true" or restarted
        is_asked = name not in ("none", "false")
        found = trainer.ranks.from_first(partial(self.choose, asked, newest, is_asked))
        if found is None:
            return
        directory = Path(found["directory"])
        state = found["state"]
        self.adopt_batch(state["run"])
        differs = self.differences(state["run"])
        if not is_asked and not differs and self.has_other_end(state["run"]):
            differs = ["it had another number of steps"]
        if differs and not is_asked:
            trainer.log.say(
                f"{directory}: of another run ({differs[0]}); starting from the beginning")
            return
        if differs and not trainer.args.force_resume:
            raise ValueError(
                f"{directory}: {'; '.join(differs)}; resume with the same settings and data, "
                "continue anyway with --force_resume, or start a new run in another --output_dir")
        total = trainer.schedule.total_steps
        if state["step"] > total:
            raise ValueError(
                f"{directory}: step {state['step']} is beyond the {total} steps of this run; raise "
                "--num_train_epochs or --max_steps, or name an earlier checkpoint")
        before = state["run"].get("total_steps")
        if before != total:
            trainer.log.say(
                f"{directory}: of a run of {before} steps, which now has {total}; from here on the "
                f"learning rate is that of {total}")
        self.check_optimizer(directory, state["run"])
        self.found = Found(directory, state)

    def check_optimizer(self, directory: Path, run: dict) -> None:
        """Raise ValueError if the moments are of another optimizer or model, --force_resume or
        not: there is no way to go on from them."""
        trainer = self.trainer
        kind = optimizer_kind(trainer)
        before = run.get("optimizer")
        if layout_of(before) != layout_of(kind):
            raise ValueError(
                f"{directory}: its moments are those of {optimizer_name(before)}, and this run's "
                f"optimizer is {optimizer_name(kind)}; resume with the same --optim and --dtype, "
                f"or start a new run from its weights, --model_name_or_path {directory}")
        check = check_moments if kind is None else check_parameters
        if kind != "of a function":  # whose tensors may have any names
            trainer.ranks.from_first(partial(check, directory, trainer.model))

    def choose(self, asked: str | None, newest: bool, is_asked: bool) -> dict | None:
        """Return the newest undamaged checkpoint of output_dir, or the directory asked for.

        Damaged ones are named on the screen.
        """
        home = self.trainer.log.directory
        say = self.trainer.log.say
        damage: list[str] = []
        candidates = in_directory(home)[::-1] if newest else [Path(str(asked))]
        if newest and not self.trainer.args.force_resume:
            candidates = sorted(candidates, key=self.distance)
        for directory in candidates:
            if not newest and not (directory / STATE).exists():
                raise ValueError(f"--resume_from_checkpoint {directory}: no checkpoint there")
            try:
                state = read_state(directory)
            except ValueError as error:
                damage.append(str(error))
                continue
            if damage:
                say(f"damaged: {'; '.join(damage)}; going on from {directory}")
            return {"directory": str(directory), "state": state}
        if damage and is_asked:
            raise ValueError(
                f"{'; '.join(damage)}; resume from another checkpoint, or start anew without "
                "--resume_from_checkpoint")
        say(f"{home}: {'; '.join(damage) or 'no checkpoint yet'}, starting from the beginning")
        return None

    def distance(self, directory: Path) -> int:
        """Return 0 for a checkpoint of this run, 1 if that had another number of steps, else 2."""
        try:
            run = read_json(directory / STATE)["run"]
            return 2 if self.differences(run) else int(self.has_other_end(run))
        except (ValueError, KeyError, TypeError):
            return 0  # damaged: named where it is read

    def has_other_end(self, run: dict) -> bool:
        return run.get("total_steps") != self.trainer.schedule.total_steps

    def of_run(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the run that resumes from it.

        Two may differ: `cut`, how its global batch is made up, and `total_steps`.
        """
        trainer = self.trainer
        c = trainer.args
        same = {name: v for name, v in sorted(vars(c).items()) if name not in MAY_DIFFER}
        return same | {
            "optimizer": optimizer_kind(trainer),
            "global_batch": trainer.schedule.global_batch,
            "total_steps": trainer.schedule.total_steps,
            "data": trainer.train_store.digest,
            "model": self.fingerprint,
            "bf16": trainer.precision.half is torch.bfloat16,
            "cut": [c.per_device_train_batch_size, c.gradient_accumulation_steps]}

    def adopt_batch(self, run: dict) -> None:
        """Keep the first run's global batch if the same command now has more or fewer ranks."""
        now = self.of_run()
        if run.get("cut") == now["cut"] and run.get("global_batch") != now["global_batch"]:
            self.trainer.plan_steps(run["global_batch"])
            self.trainer.log.say(
                f"the run began with {run['global_batch']} pairs in a step, and continues with it")

    def differences(self, run: dict) -> list[str]:
        """Return "beta was 0.1 there and is 0.2 now", for all that must be the same.

        An option that `run` lacks had its default.
        """
        found = []
        before = vars(DPOConfig()) | run
        for name, value in self.of_run().items():
            if name not in ("cut", "total_steps") and before.get(name) != value:
                told = optimizer_name if name == "optimizer" else repr
                found.append(f"{name} was {told(before.get(name))} there and is {told(value)} now")
        return found

    # While training

    @contextmanager
    def noticing_signals(self) -> Iterator[None]:
        """Only note Ctrl-C, SIGTERM and SIGUSR1 inside; the run leaves after the step it is in.

        A second Ctrl-C stops at once. A SIGINT that is ignored, as in a script's background jobs,
        or that the caller handles, is left as it is.
        """

        def notice(number: int, frame: Any) -> None:
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)
                os.write(2, STOPPING)  # a print could be inside another one, which raises
            self.signal = number

        is_main = threading.current_thread() is threading.main_thread()
        saves = self.trainer.schedule.save_every > 0
        numbers = [signal.SIGTERM, signal.SIGUSR1] if is_main and saves else []
        if numbers and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        before = {number: signal.signal(number, notice) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after(self, evaluated: dict) -> bool:
        """Save if a checkpoint is due; return whether to stop training now.

        It is due by --save_steps, at the last step, because `evaluated` is the best so far, or
        because the process was told to leave. As in transformers, --save_strategy best writes
        none at the last step, and steps none where the run stops early.
        """
        trainer = self.trainer
        c = trainer.args
        every = trainer.schedule.save_every
        if not every:
            return False
        step = trainer.position.step
        judges = c.load_best_model_at_end or c.save_strategy == "best"
        best = bool(evaluated) and judges and self.judge(evaluated)
        patience = c.early_stopping_patience
        stops = patience is not None and trainer.position.best["waited"] >= patience
        if c.save_strategy == "epoch":
            is_last = stops or step == trainer.schedule.total_steps
        else:
            is_last = c.save_strategy == "steps" and step == trainer.schedule.total_steps
        if step % every == 0 or best or self.leaving or is_last:
            self.save_or_end()
        if stops and not self.leaving:
            trainer.log.say(
                f"step {step}: no evaluation was better than that of step "
                f"{trainer.position.best['step']}; stopping early")
        return stops or self.leaving

    def save_or_end(self) -> None:
        """Save; where the disk has no room for it after the last step, still write the model."""
        trainer = self.trainer
        try:
            self.save()
        except OSError:
            if trainer.position.step == trainer.schedule.total_steps:
                trainer.save_model()
                trainer.log.say(f"the model of the last step is in {trainer.log.directory}")
            raise

    def judge(self, evaluated: dict) -> bool:
        """Tell whether an evaluation is the best so far, and count those since the best.

        As in transformers, an improvement of at most early_stopping_threshold counts as none,
        though it is the new best.
        """
        trainer = self.trainer
        c = trainer.args
        best = trainer.position.best
        name = "eval_" + (c.metric_for_best_model or "loss").removeprefix("eval_")
        greater = c.greater_is_better
        if greater is None:
            greater = not name.endswith("loss")
        value = evaluated[name]
        gain = math.inf
        if best["value"] is not None:
            gain = (value - best["value"]) * (1 if greater else -1)
        waited = 0 if gain > c.early_stopping_threshold else best["waited"] + 1
        if gain > 0:
            step = trainer.position.step
            # The name alone: the output directory may be moved, or spelled another way, on a
            # resume.
            directory = f"checkpoint-{step}"
            best = {"name": name, "value": value, "step": step, "directory": directory}
        trainer.position.best = best | {"waited": waited}
        return gain > 0

    def leave(self) -> None:
        """Exit as the shell expects of a process that a signal ended: 128 + its number."""
        self.trainer.log.say(
            f"told to leave: checkpoint-{self.trainer.position.step} is written; resume from it "
            "with --resume_from_checkpoint true")
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def load_best(self) -> None:
        """Make the best checkpoint's weights the model's, with --load_best_model_at_end.

        As in transformers, --save_total_limit 1 then keeps that checkpoint alone.
        """
        trainer = self.trainer
        best = trainer.position.best
        if trainer.args.load_best_model_at_end and best["step"] not in (0, trainer.position.step):
            directory = trainer.log.directory / Path(best["directory"]).name
            is_there = trainer.ranks.from_first(lambda: {"is": (directory / STATE).is_file()})["is"]
            if not is_there:
                trainer.log.say(
                    f"{directory}: the best model was there, and is gone; the last one is kept")
                return
            self.read_weights(directory)
            trainer.log.say(
                f"the best model is that of step {best['step']}, {best['name']} {best['value']:g}")
            if trainer.ranks.first and trainer.args.save_total_limit == 1:
                for other in self.of_this_run():
                    if other != directory:
                        shutil.rmtree(other)

    # Writing

    def save(self) -> None:
        """Write checkpoint-N of the last step; then remove the oldest beyond --save_total_limit.

        Raises OSError, on every rank, if it cannot be written; earlier checkpoints stay as they
        are.
        """
        trainer = self.trainer
        place = trainer.place
        models = [place.gathered(trainer.model, trained_only=bool(trainer.lora))]
        if self.moving_model() is not None:
            models.append(place.gathered(self.moving_model()))
        moments = self.moments()
        tensors = [*chain(*(model.parameters() for model in models)), *moments.values()]
        place.from_first(partial(self.write, models, moments), tensors)
        self.when_saved(trainer.log.directory / f"checkpoint-{trainer.position.step}")

    def moments(self) -> dict[str, Tensor]:
        """Return {name: tensor} of the optimizer's state."""
        trainer = self.trainer
        named = trained(trainer.model)
        if optimizer_kind(trainer) is not None:
            return saved_state(trainer.optimizer, named)
        found = {}
        for name, p in named:
            state = trainer.optimizer.state[p] or no_moments(p)
            found |= {f"{name}.{key}": state[key] for key in MOMENTS}
        return found

    def write(
        self, models: list[nn.Module], moments: dict[str, Tensor], whole: Callable,
    ) -> dict:
        """Write all files beside their place, then rename the directory; on rank 0 only.

        `models` are the policy and, if it moves, the reference; `whole` gathers a tensor.
        """
        trainer = self.trainer
        target = trainer.log.directory / f"checkpoint-{trainer.position.step}"
        scratch = target.with_name(f".{target.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            for model, name in zip(models, ("", "ref_model")):
                trainer.write_model(scratch / name, model, whole)
            trainer.tokenizer.save(scratch)
            if self.moving_adapter():
                save_file(self.moving_adapter(), scratch / "ref_adapter.safetensors")
            kinds = {name: (tuple(t.shape), t.dtype) for name, t in moments.items()}
            write_tensors(scratch / "optimizer.safetensors", kinds, map(whole, moments.values()))
            self.write_state(scratch)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(scratch, target)
            sync(target.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise OSError(f"{target}: cannot be written ({error}); make room") from None
        self.remove_old()
        return {}

    def write_state(self, scratch: Path) -> None:
        """Write what is not weights, and sync all files to the disk."""
        metrics = self.trainer.log.directory / "metrics.jsonl"
        if metrics.exists():
            shutil.copyfile(metrics, scratch / metrics.name)
        names = sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file())
        state = self.trainer.position.saved()
        state |= {"run": self.of_run(), "files": hash_files(scratch, names)}
        digest = digest_of(json.loads(json.dumps(state)))
        write_json(scratch / STATE, state | {"sha256": digest})
        for path in [*scratch.rglob("*"), scratch]:
            sync(path)

    def is_of_run(self, directory: Path) -> bool:
        """Whether a checkpoint was written by this run, or by the one that it goes on from: one of
        an earlier run in the same directory may have a higher number."""
        try:
            run = read_json(directory / STATE)["run"]
        except (ValueError, KeyError, TypeError):
            return False
        step = int(directory.name.removeprefix("checkpoint-"))
        last = self.trainer.position.step
        if self.has_other_end(run):
            last = self.found.state["step"] if self.found else 0
        return not self.differences(run) and step <= last

    def of_this_run(self) -> list[Path]:
        return [p for p in in_directory(self.trainer.log.directory) if self.is_of_run(p)]

    def remove_old(self) -> None:
        """Keep at most --save_total_limit checkpoints, and always the best one and the newest."""
        trainer = self.trainer
        limit = trainer.args.save_total_limit
        if limit is None:
            return
        found = self.of_this_run()
        best = Path(trainer.position.best["directory"] or "").name
        spare = [p for p in found[:-1] if p.name != best]
        for old in spare[: max(0, len(found) - limit)]:
            shutil.rmtree(old)

    # Reading

    def resume(self) -> bytes:
        """Go on exactly where the checkpoint was written; return metrics.jsonl as it was then.

        Without a checkpoint the run starts from the beginning, and no line has been written.
        """
        if self.found is None:
            return b""
        trainer = self.trainer
        directory, state = self.found
        self.read_weights(directory)
        self.read_moments(directory / "optimizer.safetensors")
        trainer.position.restore(state)
        trainer.log.say(
            f"resuming from {directory}, step {trainer.position.step} of "
            f"{trainer.schedule.total_steps}")
        metrics = directory / "metrics.jsonl"
        return metrics.read_bytes() if trainer.ranks.first and metrics.exists() else b""

    def read_weights(self, directory: Path) -> None:
        """Read the weights of the policy, and of a reference that moves, from rank 0 to all."""
        trainer = self.trainer
        trainer.read_model(directory, trainer.model)
        if self.moving_model() is not None:
            trainer.read_model(directory / "ref_model", self.moving_model())
        if self.moving_adapter():
            self.read_adapter(directory / "ref_adapter.safetensors")

    def read_adapter(self, path: Path) -> None:
        """Read the LoRA of a reference that moves.

        Raises ValueError for a file of another adapter.
        """
        trainer = self.trainer
        ours = self.moving_adapter()
        found = load_file(path) if trainer.ranks.first else dict.fromkeys(ours)
        odd = ours.keys() ^ found.keys()
        if odd:
            raise ValueError(f"{path}: {min(odd)}: it is of another run")
        for name, tensor in ours.items():
            trainer.place.fill(tensor, found[name])

    def read_moments(self, path: Path) -> None:
        """Read the optimizer's state.

        Each tensor goes where its parameter is: a fused AdamW counts its steps there.
        """
        trainer = self.trainer
        named = trained(trainer.model)
        if optimizer_kind(trainer) is not None:
            found = load_file(path) if trainer.ranks.first else {}
            return restore_state(trainer.optimizer, named, found, trainer.place)
        file = TensorFile(path) if trainer.ranks.first else None
        for name, p in named:
            state = no_moments(p)
            for key in MOMENTS:
                trainer.place.fill(state[key], file and file.read(f"{name}.{key}"))
            trainer.optimizer.state[p] = state


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that learn, with their names, in the model's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def no_moments(p: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state before a parameter's first step."""
    zeros = {key: torch.zeros_like(p) for key in MOMENTS[1:]}
    return {"step": torch.zeros((), device=p.device), **zeros}


def fingerprint(model: nn.Module) -> str:
    """Hash each tensor's name, shape and first thousand values.

    This tells models apart without reading all of them. Of a sharded model rank 0's counts; every
    rank calls this.
    """
    h = hashlib.sha256()
    for name, shape, tensor in tensors_of(model):
        h.update(f"{name} {tuple(shape)}".encode())
        h.update(first_values(tensor, 1000).cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def first_values(tensor: Any, count: int) -> Tensor:
    """Return the first values; of a sharded tensor rank 0's, gathered only if it has too few."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        rows = -(-tensor.shape[0] // tensor.device_mesh.size())  # of rank 0
        has_enough = rows * math.prod(tensor.shape[1:]) >= count
        tensor = tensor.to_local() if has_enough else tensor.full_tensor()
    return tensor.flatten()[:count]


# Files of a checkpoint


def in_directory(output_dir: Path) -> list[Path]:
    """Return the checkpoint-N directories, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def last_checkpoint(output_dir: Path) -> str:
    """Say, in messages about a run that ended, what to resume from; "" if there is nothing."""
    found = in_directory(output_dir)
    if not found:
        return ""
    return f". {found[-1].name} is complete: resume from it with --resume_from_checkpoint true"


def read_state(directory: Path) -> dict:
    """Read trainer_state.json of a complete checkpoint.

    Raises ValueError naming the first file that is missing or was changed.
    """
    state = read_json(directory / STATE)
    if state.pop("sha256", None) != digest_of(state):
        raise ValueError(f"{directory / STATE}: its checksum differs")
    for name in state["files"]:
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name}: missing")
    for name, found in hash_files(directory, state["files"]).items():
        if found != state["files"][name]:
            raise ValueError(f"{directory / name}: its checksum differs from that in {STATE}")
    return state


def digest_of(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of each file; several are read at a time."""

    def hashed(name: str) -> str:
        with open(directory / name, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(hashed, names)))


def optimizer_name(kind: str | None) -> str:
    """Return how messages name what `optimizer_kind` says."""
    if kind == "of a function":
        return "one of your own"
    if layout_of(kind) in BY_RULE.values():
        return str(kind)
    return f"AdamW ({kind})" if kind else "AdamW"


def layout_of(kind: str | None) -> str:
    """Return what decides which tensors optimizer.safetensors has."""
    return (kind or "").partition(",")[0]


def check_parameters(directory: Path, model: nn.Module) -> dict:
    """Raise ValueError if SmallAdamW's tensors are not those of this model's parameters."""
    path = directory / "optimizer.safetensors"
    shapes = {name: tuple(p.shape) for name, p in trained(model)}
    for name, entry in TensorFile(path).header.items():
        stem, _, key = name.rpartition(".")
        if stem.startswith("param_groups."):
            continue
        shape = tuple(entry["shape"])
        if stem not in shapes or shape != moment_shape(key, shapes[stem], shape):
            raise ValueError(
                f"{path}: {name} is {shape}, and {stem} is {shapes.get(stem, 'not trained')} in "
                "this run; it is of another model")
    return {}


def moment_shape(key: str, of_weights: tuple, found: tuple) -> tuple:
    """Return the shape that a moment of such weights must have; of others, `found`."""
    if key in (*MOMENTS[1:], "state1", "state2", "momentum_buffer"):
        return of_weights
    of_means = {"exp_avg_sq_row": of_weights[:-1], "exp_avg_sq_col": of_weights[:-2] + of_weights[-1:]}
    return of_means.get(key, found)


def check_moments(directory: Path, model: nn.Module) -> None:
    """Raise ValueError if AdamW's tensors are not those of this model (with --force_resume)."""
    path = directory / "optimizer.safetensors"
    found = {name: tuple(entry["shape"]) for name, entry in TensorFile(path).header.items()}
    wanted = {}
    for name, p in trained(model):
        for key in MOMENTS:
            wanted[f"{name}.{key}"] = () if key == "step" else tuple(p.shape)
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]} is {found.get(wrong[0], 'missing')}, this run has "
            f"{wanted.get(wrong[0], 'none')}; it is of another model")
