"""The trainer from Python, as in TRL's quick start: every object gives the run that the command line gives."""

import dataclasses
import doctest
import json
import re

import pytest
import torch
from conftest import make_rows, read_metrics

import data
import dpo
import extras.rows.collator
import model as models
from dpo import DPOConfig, DPOTrainer
from extras.rows import objects
from extras.rows.collator import DataCollatorForPreference
from parts.files import read_json

ROWS = make_rows(10, seed=3)
SETTINGS = dict(num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, use_cpu=True)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Of a run in a folder of its own, which is also its home and where it is started."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return DPOConfig(output_dir="out", **SETTINGS)


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights that the command line trains."""
    place = tmp_path_factory.mktemp("expected")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["--model_name_or_path", str(tiny), "--dataset_name", str(place / "rows.jsonl"), "--output_dir",
            str(place / "out"), "--cache_dir", str(place / "cache")]
    assert dpo.main([*argv, *(word for k, v in SETTINGS.items() for word in (f"--{k}", str(v)))]) == 0
    return weights(place / "out")


def weights(directory) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in models.load_model(directory).named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def transformers_tokenizer(tiny):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny)


def dataset(rows):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    return datasets.Dataset.from_list(rows)


FORMS = {
    "a list of rows": lambda tiny: dict(model=str(tiny), train_dataset=ROWS),
    "a path object": lambda tiny: dict(model=tiny, train_dataset=ROWS),
    "a generator": lambda tiny: dict(model=tiny, train_dataset=(row for row in ROWS)),
    "a datasets.Dataset": lambda tiny: dict(model=str(tiny), train_dataset=dataset(ROWS)),
    "a Decoder": lambda tiny: dict(model=models.load_model(tiny), train_dataset=ROWS,
                                   processing_class=data.Tokenizer.load(tiny)),
    "transformers' tokenizer": lambda tiny: dict(model=str(tiny), train_dataset=ROWS,
                                                 processing_class=transformers_tokenizer(tiny)),
}


@pytest.mark.parametrize("form", FORMS)
def test_objects_train_what_the_command_line_trains(form, tiny, expected, settings):
    before = dataclasses.asdict(settings)
    trainer = DPOTrainer(args=settings, **FORMS[form](tiny))
    assert abs(read_first(trainer) - 0.693147) < 1e-5
    assert same(weights("out"), expected)
    assert dataclasses.asdict(settings) == before, "the caller's configuration was changed"


def read_first(trainer) -> float:
    trainer.train()
    return read_metrics(trainer.log.directory)[0]["loss"]


def test_the_quick_start_needs_no_configuration(tiny, settings):
    """TRL's: DPOTrainer(model=..., train_dataset=...); the result lies in MODEL-DPO."""
    trainer = DPOTrainer(model=str(tiny), train_dataset=ROWS[:3])
    assert str(trainer.log.directory) == f"{tiny.name}-DPO" and trainer.args.learning_rate == 1e-6


def test_the_configurations_first_argument_is_the_output_directory():
    assert DPOConfig("somewhere").output_dir == "somewhere"


def test_train_evaluate_and_save(tiny, settings, tmp_path):
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, eval_dataset=make_rows(5, seed=11))
    before = trainer.evaluate()
    assert abs(before["eval_loss"] - 0.693147) < 1e-5 and before["eval_rewards/margins"] == 0
    assert trainer.train()["eval_loss"] != before["eval_loss"]
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert same(weights("elsewhere"), weights("out"))
    with pytest.raises(ValueError, match="no pairs to evaluate on; give eval_dataset"):
        DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).evaluate()


def test_train_resumes_as_the_flag_does(tiny, expected, settings):
    settings.save_steps, settings.max_steps = 1, 2
    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).train()
    settings.max_steps = -1
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS)
    with pytest.raises(ValueError, match="total_steps was 2 there and is 3 now"):
        trainer.train(resume_from_checkpoint=True)
    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).train()
    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).train(resume_from_checkpoint="out/checkpoint-1")
    assert same(weights("out"), expected)


def test_a_reference_by_name_and_as_a_model_are_the_same(tiny, expected, settings):
    for ref_model in (str(tiny), models.load_model(tiny)):
        DPOTrainer(model=str(tiny), ref_model=ref_model, args=settings, train_dataset=ROWS).train()
        assert same(weights("out"), expected)


def test_a_peft_configuration_becomes_our_flags(tiny, settings):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["v_proj", "q_proj", "down_proj"], use_rslora=True,
                             task_type="CAUSAL_LM")
    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, peft_config=config).train()
    saved = read_json(models.Path("out") / "adapter_config.json")
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 12, True)
    assert sorted(saved["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    flags = objects.lora_flags({"r": 4, "target_modules": "all-linear"}, settings)
    assert flags == ({"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}, {})
    with pytest.raises(ValueError, match="peft_config is of the type IA3; only LoRA"):
        objects.lora_flags(peft.IA3Config(), settings)
    with pytest.raises(ValueError, match="peft_config: bias='all' has no counterpart here"):
        objects.lora_flags(peft.LoraConfig(bias="all"), settings)


@pytest.mark.parametrize("pattern, chosen", [
    (r".*layers\.1\..*(q|up)_proj", ["1.mlp.up_proj", "1.self_attn.q_proj"]),
    (r"model\.layers\.\d+\.self_attn\.v_proj", ["0.self_attn.v_proj", "1.self_attn.v_proj"])])
def test_target_modules_as_one_string_is_pefts_pattern(tiny, settings, pattern, chosen):
    """The modules that PEFT wraps, from a configuration, a dict, a flag of Python and the command line."""
    peft = pytest.importorskip("peft", reason="needs peft")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny), peft.LoraConfig(target_modules=pattern))
    wrapped = sorted({n.partition(".lora_A")[0].partition("layers.")[2] for n, _ in theirs.named_parameters() if ".lora_A" in n})
    assert wrapped == chosen
    flag = dataclasses.replace(settings, use_peft=True, lora_target_modules=pattern)
    listed = dpo.parse_config(["--use_peft", "--lora_target_modules", pattern]).lora_target_modules
    command = dataclasses.replace(settings, use_peft=True, lora_target_modules=listed)
    ways = [(settings, peft.LoraConfig(r=4, target_modules=pattern)), (settings, {"r": 4, "target_modules": pattern}),
            (flag, None), (command, None)]
    for args, config in ways:
        trainer = DPOTrainer(model=str(tiny), args=args, train_dataset=ROWS, peft_config=config)
        assert sorted(n.partition("layers.")[2] for n in models.lora_modules(trainer.model)) == chosen
        assert trainer.lora["target_modules"] == pattern


@pytest.mark.parametrize("pattern, words", [("q_pro(", "no pattern"), ("q_proj$", "no such module")])
def test_a_pattern_that_is_none_or_matches_nothing_is_refused(tiny, settings, pattern, words):
    args = dataclasses.replace(settings, use_peft=True, lora_target_modules=pattern)
    with pytest.raises(ValueError, match=f"--lora_target_modules {re.escape(pattern)}: {words}"):
        DPOTrainer(model=str(tiny), args=args, train_dataset=ROWS)


def test_settings_of_peft_that_have_no_flag_are_taken_too(tiny, settings):
    config = dict(r=4, target_modules=["v_proj", "q_proj"], layers_to_transform=[1], rank_pattern={"q_proj": 2})
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, peft_config=config)
    ranks = {n: m.lora_A.out_features for n, m in models.lora_modules(trainer.model).items()}
    assert ranks == {"model.layers.1.self_attn.q_proj": 2, "model.layers.1.self_attn.v_proj": 4}
    trainer.train()
    saved = read_json(models.Path("out") / "adapter_config.json")
    assert (saved["layers_to_transform"], saved["rank_pattern"]) == ([1], {"q_proj": 2})


REFUSED = {
    "model is a Linear; give a directory, a hub id, or a model.Decoder": lambda tiny: dict(
        model=torch.nn.Linear(2, 2), train_dataset=ROWS),
    "processing_class is missing: a Decoder has no tokenizer": lambda tiny: dict(
        model=models.load_model(tiny), train_dataset=ROWS),
    "train_dataset is a dict of train, test; give one of them": lambda tiny: dict(
        model=tiny, train_dataset={"train": ROWS, "test": ROWS}),
    "train_dataset has no rows": lambda tiny: dict(model=tiny, train_dataset=[]),
    "train_dataset is a int; give a path": lambda tiny: dict(model=tiny, train_dataset=3),
    "row 1 of the data set cannot be written as JSON .Object of type bytes": lambda tiny: dict(
        model=tiny, train_dataset=[ROWS[0], ROWS[1] | {"images": b"png"}]),
    "processing_class is a int; give a data.Tokenizer": lambda tiny: dict(model=tiny, train_dataset=ROWS, processing_class=3),
    r"rows-[0-9a-f]{16}.jsonl:2: .rejected. is missing": lambda tiny: dict(
        model=tiny, train_dataset=[ROWS[0], {"prompt": "the", "chosen": " cat"}]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_on_is_said(message, tiny, settings):
    with pytest.raises(ValueError, match=message):
        DPOTrainer(args=settings, **REFUSED[message](tiny))


def test_a_list_of_paths_is_read_as_files(tiny, expected, settings, tmp_path):
    for name, rows in (("a.jsonl", ROWS[:4]), ("b.jsonl", ROWS[4:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    DPOTrainer(model=tiny, args=settings, train_dataset=["a.jsonl", tmp_path / "b.jsonl"]).train()
    assert same(weights("out"), expected)


def test_a_tokenizer_of_transformers_keeps_its_template(tiny, settings, tmp_path):
    tokenizer = transformers_tokenizer(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    ours = objects.tokenizer_of(tokenizer, tmp_path / "cache")
    assert ours.templates == {"default": tokenizer.chat_template}
    assert ours.encode("the cat sees") == tokenizer("the cat sees").input_ids
    assert objects.tokenizer_of(tokenizer, tmp_path / "cache").directory == ours.directory
    assert len(list((tmp_path / "cache").iterdir())) == 1


# The padded collator

EXAMPLES = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
            {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]}]


def test_the_collators_worked_example():
    batch = DataCollatorForPreference(pad_token_id=0)(EXAMPLES)
    expected = {
        "input_ids": [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_mask": [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]}
    assert {name: rows.tolist() for name, rows in batch.items()} == expected
    assert all(rows.dtype == torch.int64 for rows in batch.values())
    assert doctest.testmod(extras.rows.collator).failed == 0


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 4}, {"max_length": 3}, {"max_length": 4, "pad_to_multiple_of": 8},
                                     {"max_length": 3, "truncation_mode": "keep_end"}])
def test_the_collator_gives_what_trl_gives(options):
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    examples = [e | {"ref_chosen_logps": -1.5 * i, "ref_rejected_logps": -2.0} for i, e in enumerate(EXAMPLES)]
    for rows in (EXAMPLES, examples, EXAMPLES[:1]):
        ours, theirs = (kind(pad_token_id=0, **options)(rows)
                        for kind in (DataCollatorForPreference, trl.DataCollatorForPreference))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_the_padded_batch_scores_as_the_stream_does(tiny):
    """A row's log-prob over its completion mask is the trainer's sum."""
    model, tokenizer = models.load_model(tiny, torch.float64), data.Tokenizer.load(tiny)
    pairs = [data.tokenize_pair(row, tokenizer, data.DataOptions()) for row in ROWS[:3]]
    padded = DataCollatorForPreference(pad_token_id=0)([
        {name: getattr(pair, name).tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs])
    batch = data.collate(pairs)
    out = model(batch)
    sums = [part.sum() for part in out.logps.split(batch.lengths.flatten().tolist())]
    for row, (ids, mask, scored) in enumerate(zip(padded["input_ids"], padded["completion_mask"], padded["attention_mask"])):
        where = mask.nonzero()[:, 0]
        n = int(scored.sum())
        span = torch.tensor([[0, n, 0, 0]], dtype=torch.int32)
        alone = model(models.Stream(ids[:n], torch.arange(n), span, where - 1, ids[where]))
        torch.testing.assert_close(alone.logps.sum(), sums[2 * (row % 3) + row // 3])


@pytest.mark.parametrize("message, options, examples", [
    ("expected keep_start or keep_end", {"truncation_mode": "middle"}, EXAMPLES),
    ("only pt", {"return_tensors": "np"}, EXAMPLES),
    ("ref_chosen_logps: only 1 of 2 examples have it", {}, [EXAMPLES[0] | {"ref_chosen_logps": 1.0}, EXAMPLES[1]])])
def test_the_collator_refuses(message, options, examples):
    with pytest.raises(ValueError, match=message):
        DataCollatorForPreference(pad_token_id=0, **options)(examples)


