"""What a run does over its steps, as people who come from transformers know it: schedules, saves, loggers."""

import json

import pytest
import torch

import dpo
from parts.checks import check_config
from parts.rates import SHAPES
from parts.schedule import Schedule

BASE = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
KWARGS = [
    ("linear", {}), ("constant", {}), ("constant_with_warmup", {}),
    ("cosine", {}), ("cosine", {"num_cycles": 0.8}),
    ("cosine_with_restarts", {}), ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-7}), ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_warmup_with_min_lr", {"min_lr": 0, "warmup_lr_rate": 0.2}),
    ("polynomial", {}), ("polynomial", {"power": 2, "lr_end": 1e-8}),
    ("inverse_sqrt", {}), ("inverse_sqrt", {"timescale": 50}),
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 4, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "warmup_type": "cosine", "decay_type": "linear", "min_lr_ratio": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "warmup_type": "1-sqrt", "num_cycles": 0.7}),
]


def schedule_of(total: int, warmup: int) -> Schedule:
    return Schedule(global_batch=1, steps_per_epoch=total, total_steps=total, log_every=1, eval_every=0, save_every=0,
                    warmup=warmup)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind, kwargs", KWARGS)
def test_a_schedule_is_transformers_own_at_every_step(kind, kwargs, warmup):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peak, total = 3e-6, 29
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = transformers.get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    c = dpo.DPOConfig(learning_rate=peak, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs or None)
    ours = schedule_of(total, warmup)
    for step in range(total):
        assert ours.learning_rate(c, step) / peak == pytest.approx(theirs.get_last_lr()[0] / peak, rel=0, abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_every_schedule_of_transformers_is_there_but_those_that_follow_a_metric():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = {kind.value for kind in transformers.SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert theirs == set(SHAPES) == {kind for kind, _ in KWARGS}


def test_scheduler_kwargs_come_as_json_or_from_a_file(tmp_path):
    flags = ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs"]
    assert dpo.parse_config([*BASE, *flags, '{"power": 2, "lr_end": 1e-9}']).lr_scheduler_kwargs == {"power": 2, "lr_end": 1e-9}
    assert dpo.parse_config([*BASE, *flags, "none"]).lr_scheduler_kwargs is None
    (tmp_path / "a.yaml").write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\n")
    assert dpo.parse_config([*BASE, "--config", str(tmp_path / "a.yaml")]).lr_scheduler_kwargs == {"min_lr_rate": 0.1}


WRONG = [
    ("cosine_with_min_lr", {}, "give one of min_lr and min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": 0.0, "min_lr_rate": 0.1}, "give one of min_lr and min_lr_rate"),
    ("polynomial", {"lr_end": 1.0}, "lr_end 1 must be below --learning_rate 1e-06"),
    ("polynomial", {"pover": 2}, "pover: no such option; it takes lr_end, power"),
    ("polynomial", {"power": "two"}, "power 'two': expected a number"),
    ("linear", {"power": 2}, "power: no such option; it takes none"),
    ("warmup_stable_decay", {}, "num_decay_steps is missing"),
    ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "sqrt"}, "decay_type sqrt: expected linear, cosine or 1-sqrt"),
]


@pytest.mark.parametrize("kind, kwargs, words", WRONG)
def test_scheduler_kwargs_without_meaning_are_refused(kind, kwargs, words):
    c = dpo.parse_config([*BASE, "--lr_scheduler_type", kind, "--lr_scheduler_kwargs", json.dumps(kwargs)])
    with pytest.raises(ValueError) as error:
        check_config(c)
    assert str(error.value) == f"--lr_scheduler_kwargs of {kind}: {words}"


@pytest.mark.parametrize("value", ["[1]", "power=2", "3"])
def test_scheduler_kwargs_that_are_no_object_are_refused(value):
    with pytest.raises(ValueError, match="expected a JSON object"):
        dpo.parse_config([*BASE, "--lr_scheduler_kwargs", value])
