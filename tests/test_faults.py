"""What goes wrong while a run is under way is named, in bounded time, and loses nothing that was saved."""

import gc
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file

import dpo
from parts import checkpoints
from parts.position import Position
from parts.precision import Scaler
from parts.schedule import Schedule

root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def settings(tiny, pairs_file, tmp_path):
    return dict(model_name_or_path=str(tiny), dataset_name=str(pairs_file), output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True,
                cache_dir=str(tmp_path / "cache"), num_train_epochs=2.0, logging_steps=1, save_steps=2, disable_tqdm=True,
                learning_rate=1e-3)


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def train(settings: dict):
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**settings))
    trainer.train()
    return trainer


# Numbers


def poisoned(monkeypatch, steps: dict[int, int]):
    """The loss of one pair, by its place in the batch, is nan at these steps."""
    keep_step, keep_losses, at = dpo.DPOTrainer.train_step, dpo.DPOTrainer.pair_losses, {}

    def step(self):
        at["now"] = self.position.step
        at["pair"] = int(self.pairs_of(self.position.step)[steps[self.position.step]]) if self.position.step in steps else None
        return keep_step(self)

    def spoiled(self, x, scored):
        values = keep_losses(self, x, scored)
        ids = at.get("ids")
        return values if at.get("pair") is None or ids is None else values * torch.where(ids == at["pair"], math.nan, 1.0)

    def batch(self, store, rows):
        made = keep_batch(self, store, rows)
        at["ids"] = made.pair_ids
        return made

    keep_batch = dpo.DPOTrainer.batch
    monkeypatch.setattr(dpo.DPOTrainer, "train_step", step)
    monkeypatch.setattr(dpo.DPOTrainer, "pair_losses", spoiled)
    monkeypatch.setattr(dpo.DPOTrainer, "batch", batch)


def test_a_loss_that_is_not_finite_names_its_pair_and_the_checkpoint_before_it(settings, monkeypatch):
    poisoned(monkeypatch, {3: 5})
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**settings))
    place = re.escape(trainer.train_store.where(int(trainer.pairs_of(3)[5])))
    with pytest.raises(FloatingPointError, match=rf"step 4: loss nan.* not finite are the pairs {place}; .*checkpoint-2 is complete"):
        trainer.train()


def test_steps_that_are_not_finite_are_skipped_so_many_times(settings, tmp_path, monkeypatch):
    poisoned(monkeypatch, {1: 0, 3: 2})
    train(settings | dict(skip_nonfinite=2))
    lines = read_metrics(tmp_path / "out")
    assert [m["step"] for m in lines] == [1, 3, 5, 6] and lines[-1]["skipped_steps"] == 2
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_one_more_than_allowed_stops_the_run(settings, monkeypatch):
    poisoned(monkeypatch, {1: 0, 3: 2})
    with pytest.raises(FloatingPointError, match="step 4"):
        train(settings | dict(skip_nonfinite=1))


def test_a_skipped_step_changes_nothing_but_the_count_of_steps(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Schedule, "learning_rate", lambda self, c, step: 0.0 if step == 2 else 1e-3)
    apply = dpo.DPOTrainer.apply
    monkeypatch.setattr(dpo.DPOTrainer, "apply", lambda self, *a: None if self.position.step == 2 else apply(self, *a))
    train(settings | dict(output_dir=str(tmp_path / "a")))
    monkeypatch.setattr(dpo.DPOTrainer, "apply", apply)
    poisoned(monkeypatch, {2: 0})
    train(settings | dict(output_dir=str(tmp_path / "b"), skip_nonfinite=1))
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(t, b[n]) for n, t in a.items())


def test_float16_with_loss_scaling_follows_float32(settings, tmp_path):
    train(settings | dict(output_dir=str(tmp_path / "a")))
    trainer = train(settings | dict(output_dir=str(tmp_path / "b"), fp16=True))
    a, b = (read_metrics(tmp_path / n) for n in "ab")
    assert trainer.position.scaling["scale"] > 1 and 0 < max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b)) < 5e-3
    assert [m["grad_norm"] for m in b] == pytest.approx([m["grad_norm"] for m in a], rel=0.02)


def test_overflow_in_float16_halves_the_scale_and_skips_the_step(settings, monkeypatch):
    keep = Scaler.unscale

    def overflows(scaler):
        if scaler.position.step in (1, 2):
            scaler.parameters[0].grad[0, 0] = math.inf
        keep(scaler)

    monkeypatch.setattr(Scaler, "unscale", overflows)
    trainer = train(settings | dict(fp16=True))
    assert trainer.position.scaling == {"scale": 2.0**14, "since": 3} and trainer.position.skipped == 0 and trainer.position.step == 6


def test_the_scale_grows_after_many_good_steps_as_torchs_own():
    position, theirs = Position(scaling={"scale": 2.0**16, "since": 0}), torch.amp.GradScaler("cpu")
    ours = Scaler(True, [], position)
    theirs.scale(torch.ones(()))
    for finite in [True] * 2000 + [False] + [True] * 5:
        ours.adjust(finite)
        theirs._found_inf_per_device(optimizer := torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
        theirs._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {"cpu": torch.tensor(0.0 if finite else 1.0)}
        theirs.update()
    assert position.scaling["scale"] == theirs.get_scale() == 2.0**16


def test_a_resumed_float16_run_keeps_its_scale_and_is_bitwise_the_same(settings, tmp_path, monkeypatch):
    keep, first = Scaler.unscale, []

    def overflows(scaler):
        if scaler.position.step == 1 and not first.append(1):
            scaler.parameters[0].grad[0, 0] = math.inf
        keep(scaler)

    monkeypatch.setattr(Scaler, "unscale", overflows)
    ended = train(settings | dict(fp16=True)).position.scaling
    whole = load_file(tmp_path / "out" / "model.safetensors")
    resumed = train(settings | dict(fp16=True, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")))
    assert len(first) == 1 and resumed.position.scaling == ended == {"scale": 2.0**15, "since": 4}
    assert all(torch.equal(t, whole[n]) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


# Devices


def test_apples_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dpo.start_ranks(False, 60).device.type == "mps" and dpo.start_ranks(True, 60).device.type == "cpu"
    assert dpo.Ranks(0, 1, torch.device("mps")).exact.type == "cpu"


# Memory


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError("no"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")], ids=str)
def test_out_of_memory_names_the_forward_its_tokens_and_what_helps(settings, capsys, monkeypatch, error):
    keep, seen = dpo.score, []

    def fails(model, batch, c):
        seen.append(batch)
        if len(seen) == 6:  # the second micro-batch of the third step
            raise error
        return keep(model, batch, c)

    monkeypatch.setattr(dpo, "score", fails)
    more = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert dpo.main(flags(settings | more)) == 1
    said = capsys.readouterr().err
    assert f"step 3 (micro-batch 2 of 2, {len(seen[-1].pair_ids)} pairs, {len(seen[-1].input_ids):,} tokens; " in said
    assert "--max_tokens_per_forward" in said and "checkpoint-2 is complete" in said and "Traceback" not in said


def test_an_error_that_is_none_of_these_keeps_its_traceback(settings, monkeypatch):
    monkeypatch.setattr(dpo, "score", lambda *a: [][1])
    with pytest.raises(IndexError):
        dpo.main(flags(settings))


# Disks and clocks


def mounted(directory, options: str):
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")


@root
def test_a_full_disk_is_named_and_the_last_checkpoint_stays_whole(settings, tmp_path, capsys):
    disk = tmp_path / "disk"
    mounted(disk, "size=700k")
    try:
        small = settings | dict(output_dir=str(disk / "out"), save_steps=1)
        assert dpo.main(flags(small)) == 1
        said = capsys.readouterr().err
        assert "No space left" in said and "make room" in said and "Traceback" not in said
        found = checkpoints.in_directory(disk / "out")
        assert found and all(checkpoints.read_state(c)["step"] for c in found)
        assert f"checkpoint-{len(found) + 1}: cannot be written" in said and f"{found[-1].name} is complete" in said
        assert not list((disk / "out").glob(".checkpoint-*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@root
@pytest.mark.parametrize("size", [28, 36])
def test_a_cache_on_a_full_disk_in_memory_ends_in_one_message_and_not_in_a_bus_error(settings, tmp_path, size):
    """In a process of its own: a hole of a mapped file, read where there is no room to fill it, kills that."""
    mounted(tmp_path / "disk", f"size={size}k")
    try:
        done = subprocess.run([sys.executable, str(ROOT / "dpo.py"), *flags(settings | dict(cache_dir=str(tmp_path / "disk" / "c")))],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 1, 2), (done.returncode, done.stderr)
        if done.returncode:
            assert done.stderr.count("error: ") == 1 and "No space left on device); change --cache_dir" in done.stderr, done.stderr
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def limited(settings: dict, size: int, saves: str = "no") -> str:
    """What a run says, in a process whose files end at `size` bytes; it ends with status 1."""
    words = flags(settings | dict(save_strategy=saves))
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2); import dpo; sys.exit(dpo.main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and re.findall("^error: ", done.stderr, re.M) == ["error: "] and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("more", [{}, dict(use_peft=True, lora_r=64)])
def test_a_last_model_that_has_no_room_is_named_and_the_one_before_it_stays(settings, tmp_path, more):
    settings = settings | more | dict(max_steps=2)
    out = tmp_path / "out"
    assert train(settings).position.step == 2
    gc.collect()  # with the trainer goes its lock on the directory
    before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert before
    assert f"{out}: the model: cannot be written (" in limited(settings | dict(learning_rate=0.01), 40_000)
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == before
    assert not list(out.glob(".model.*"))


@root
def test_a_read_only_directory_is_refused_before_hours_are_spent(settings, tmp_path, capsys):
    disk = tmp_path / "disk"
    mounted(disk, "size=1m,ro")
    try:
        assert dpo.main(flags(settings | dict(output_dir=str(disk / "out")))) == 2
        assert "--output_dir" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_clock_that_was_moved_back_changes_nothing(settings, tmp_path, monkeypatch):
    train(settings)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    for age, directory in enumerate(checkpoints.in_directory(tmp_path / "out")):  # the newest has the oldest times
        for path in [*directory.iterdir(), directory]:
            os.utime(path, (10**9 - age, 10**9 - age))
    checkpoints.shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    monkeypatch.setattr(time, "time", iter(range(10**6, 0, -1)).__next__)
    trainer = train(settings | dict(resume_from_checkpoint="true"))
    assert trainer.checkpoints.found.directory.name == "checkpoint-4"
    assert all(torch.equal(t, whole[n]) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


# Ranks

TWO = """
import os, sys
sys.path.insert(0, {root!r})
import dpo
rank = os.environ["RANK"]
{more}
sys.exit(dpo.main(sys.argv[1:]))
"""


def two_ranks(settings, tmp_path, more: str, timeout: int = 200) -> tuple[int, str, float]:
    """Exit status, what was said, and seconds, of two ranks that first run `more`."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(root=str(ROOT), more=more))
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
                           *flags(settings)], capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr, time.monotonic() - began


def test_ranks_with_other_flags_end_in_one_message(settings, tmp_path):
    status, said, _ = two_ranks(settings, tmp_path, "sys.argv += ['--beta', '0.2'] if rank == '1' else []")
    assert status != 0 and said.count("error: ") == 1 and "the ranks disagree: beta is 0.2 on rank 1 and 0.1 on rank 0" in said


@pytest.mark.parametrize("made,message", [
    ("", "error: the ranks disagree: the folder of --model_name_or_path is 'not here' on rank 1 and 'here' on rank 0"),
    ("os.makedirs('missing', exist_ok=True)", "error: rank 1 alone: missing: no tokenizer.json")], ids=["no folder", "an empty one"])
def test_a_host_without_the_model_is_named(settings, tmp_path, made, message):
    more = f"os.chdir({str(tmp_path)!r}); {made}\nsys.argv += ['--model_name_or_path', 'missing'] if rank == '1' else []"
    status, said, _ = two_ranks(settings, tmp_path, more)
    assert status != 0 and said.count("error: ") == 1 and message in said


SLOW = """
import time
from parts.log import Log
keep = Log.claim
Log.claim = lambda self: (time.sleep(8), keep(self))[1]
"""


def test_ranks_wait_for_rank_0_longer_than_their_time_out_while_it_works(settings, tmp_path):
    """As for tokenizing, which rank 0 does alone. Nothing is warned of on the way."""
    status, said, _ = two_ranks(settings | dict(ddp_timeout=4, num_train_epochs=0.1), tmp_path, SLOW)
    assert status == 0 and "Warning" not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("more,words", [
    ("dpo.fingerprint = lambda model: rank", "model is '1' on rank 1 and '0' on rank 0"),
    ("import data\nif rank == '1': data.PairStore.digest = property(lambda s: 'x', lambda s, v: None)",
     "data is 'x' on rank 1"),
    ("from parts import weights; sys.argv.append('--fsdp'); weights.Reader.digest = lambda self: rank", "files is '1' on rank 1"),
    ("from parts import weights; sys.argv.append('--fsdp'); keep = weights.Reader.__call__\n"
     "def fails(self, *names):\n    if rank == '1' and 'meta' not in names: raise OSError('a disk of rank 1 cannot be read')\n    return keep(self, *names)\n"
     "weights.Reader.__call__ = fails", "a disk of rank 1 cannot be read")])
def test_ranks_with_another_model_or_data_end_in_one_message(settings, tmp_path, more, words):
    status, said, _ = two_ranks(settings, tmp_path, more)
    assert status != 0 and said.count("error: ") == 1 and words in said


DIES = """
import signal, time
from pathlib import Path
keep = dpo.DPOTrainer.train_step
def step(self):
    if rank == '1' and self.position.step == 3:
        Path({died!r}).write_text(str(time.time()))
        os.kill(os.getpid(), signal.{signal})
    return keep(self)
dpo.DPOTrainer.train_step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("name,within", [("SIGKILL", 60), ("SIGSTOP", 90)])
def test_a_rank_that_dies_or_falls_silent_ends_the_run_in_bounded_time(settings, tmp_path, name, within):
    """A stopped process answers nothing, as one on a host that is cut off."""
    died = tmp_path / "died"
    status, said, _ = two_ranks(settings | dict(ddp_timeout=15), tmp_path, DIES.format(signal=name, died=str(died)))
    assert status != 0 and time.time() - float(died.read_text()) < within
    assert name == "SIGKILL" or "rank 0 has lost the others at step 4" in said and "checkpoint-2 is complete" in said, said
