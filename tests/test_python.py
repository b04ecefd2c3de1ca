"""The trainer from Python, as in TRL's quick start: every object gives the run that the command line gives."""

import dataclasses
import doctest
import json
import re

import numpy as np
import pytest
import torch
from conftest import make_rows, read_metrics

import data
import dpo
import extras.rows.collator
import losses
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
    assert abs(before["eval_loss"] - 0.693147) < 1e-5 and abs(before["eval_rewards/margins"]) < 1e-6
    assert trainer.train()["eval_loss"] != before["eval_loss"]
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert same(weights("elsewhere"), weights("out"))
    with pytest.raises(ValueError, match="no pairs to evaluate on; give eval_dataset"):
        DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).evaluate()


def test_train_resumes_as_the_flag_does(tiny, expected, settings):
    settings.save_steps, settings.max_steps, settings.beta = 1, 2, 0.5
    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).train()
    settings.beta = 0.1
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS)
    with pytest.raises(ValueError, match="beta was 0.5 there and is 0.1 now"):
        trainer.train(resume_from_checkpoint=True)
    settings.max_steps = -1
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
    "model is a Linear; give a directory, a hub id, a model.Decoder, or a model of transformers": lambda tiny: dict(
        model=torch.nn.Linear(2, 2), train_dataset=ROWS),
    "processing_class is missing: a Decoder has no tokenizer": lambda tiny: dict(
        model=models.load_model(tiny), train_dataset=ROWS),
    "train_dataset is a dict of train, test; give one of them": lambda tiny: dict(
        model=tiny, train_dataset={"train": ROWS, "test": ROWS}),
    "train_dataset has no rows": lambda tiny: dict(model=tiny, train_dataset=[]),
    "train_dataset is a int; give a path": lambda tiny: dict(model=tiny, train_dataset=3),
    "row 1 of the data set cannot be written as JSON .a object is not JSON": lambda tiny: dict(
        model=tiny, train_dataset=[ROWS[0], ROWS[1] | {"chosen": object()}]),
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


# Models as objects

FAMILIES = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=24),
    "mixtral": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    vocab_size=24, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  vocab_size=24, head_dim=8, tie_word_embeddings=True),
    "gpt_neox": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=24),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_object_trains_as_its_files_do_and_is_trained_itself(family, tiny, settings, tmp_path):
    """Transposed matrices, stacked experts, a tied head, other names; made from a configuration, so without a name."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **FAMILIES[family]))
    model.save_pretrained(tmp_path / "files")
    start = {n: p.clone() for n, p in model.state_dict().items()}
    tokenizer = transformers_tokenizer(tiny)
    DPOTrainer(model=model, args=settings, train_dataset=ROWS, processing_class=tokenizer).train()
    found = weights("out")
    DPOTrainer(model=tmp_path / "files", args=settings, train_dataset=ROWS, processing_class=tokenizer).train()
    assert same(weights("out"), found)
    model.save_pretrained(tmp_path / "again")
    assert same(weights(tmp_path / "again"), found)
    assert not all(torch.equal(p, start[n]) for n, p in model.state_dict().items())


def loaded(directory, **options):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def test_an_object_of_the_same_type_has_no_second_copy_of_its_weights(tiny, settings):
    model = loaded(tiny)
    trainer = DPOTrainer(model=model, args=settings, train_dataset=ROWS)
    ours = dict(trainer.model.named_parameters())
    assert all(p.data_ptr() == ours[n].data_ptr() for n, p in model.named_parameters())
    trainer.train()
    assert same(weights("out"), dict(model.named_parameters()))


def test_a_bfloat16_object_is_trained_as_the_flag_says_and_rounded_back(tiny, settings):
    model = loaded(tiny, dtype=torch.bfloat16)
    DPOTrainer(model=model, args=settings, train_dataset=ROWS).train()
    found = weights("out")
    assert all(p.dtype == torch.float32 for p in found.values())
    assert all(torch.equal(p, found[n].bfloat16()) for n, p in model.named_parameters())


@pytest.mark.parametrize("live", [True, False])
def test_a_reference_object_is_used_and_not_trained(tiny, settings, tmp_path, live):
    torch.manual_seed(5)
    other = loaded(tiny)
    for p in other.parameters():
        p.data += 0.05 * torch.randn_like(p)
    other.save_pretrained(tmp_path / "other")
    settings.precompute_ref_log_probs = not live
    before = {n: p.clone() for n, p in other.named_parameters()}
    DPOTrainer(model=loaded(tiny), ref_model=other, args=settings, train_dataset=ROWS).train()
    found = weights("out")
    assert same(dict(other.named_parameters()), before)
    DPOTrainer(model=tiny, ref_model=tmp_path / "other", args=settings, train_dataset=ROWS,
               processing_class=data.Tokenizer.load(tiny)).train()
    assert same(weights("out"), found) and read_metrics(models.Path("out"))[0]["loss"] != pytest.approx(0.693147, abs=1e-4)


def test_a_quantization_of_transformers_becomes_our_flags(tiny, settings):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    trainer = DPOTrainer(model=tiny, args=settings, train_dataset=ROWS, peft_config={"r": 4}, quantization_config=config)
    c = trainer.args
    assert (c.load_in_4bit, c.bnb_4bit_quant_type, c.use_bnb_nested_quant, c.bnb_4bit_compute_dtype) == (
        True, "nf4", True, "bfloat16")
    with pytest.raises(ValueError, match="load_in_8bit: LLM.int8 rounds activations"):
        DPOTrainer(model=tiny, args=settings, train_dataset=ROWS,
                   quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def peft_model(tiny, **options):
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(loaded(tiny), peft.LoraConfig(r=2, target_modules=["q_proj"], **options))


def test_what_a_model_object_cannot_be_is_said(tiny, settings):
    model, adapted = loaded(tiny), peft_model(tiny)
    meta = loaded(tiny).to("meta")
    two = peft_model(tiny)
    two.merge_adapter()
    cases = [
        (dict(model=model, ref_model=model), "the same object; leave ref_model out"),
        (dict(model=adapted, peft_config={"r": 4}), "model is a PeftModel, which is trained as it is: leave peft_config out"),
        (dict(model=adapted, args=dataclasses.replace(settings, merge_adapter=True)), "merge_adapter: the model is a PeftModel"),
        (dict(model=adapted, args=dataclasses.replace(settings, model_adapter_name="x")), "--model_adapter_name x: the model has default"),
        (dict(model=model, quantization_config={"load_in_4bit": True}, peft_config={"r": 4}), "load_in_4bit: the model is an object already"),
        (dict(model=meta), "model.embed_tokens.weight is on the meta device"),
        (dict(model=two), "its adapter is merged into .*q_proj; call unmerge_adapter"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            DPOTrainer(**dict(args=settings, train_dataset=ROWS) | arguments)


def test_arguments_of_other_trainers_are_named_or_unknown(tiny, settings):
    take = lambda **more: DPOTrainer(model=tiny, args=settings, train_dataset=ROWS, **more)
    take(callbacks=[], compute_metrics=None, optimizers=(None, None), data_collator=None)
    for arguments, message in [
            (dict(callbacks=[print]), "callbacks is not taken: on_log=FUNCTION"), (dict(compute_metrics=print), "compute_metrics is not"),
            (dict(data_collator=print), "data_collator is not taken: nothing is padded"), (dict(on_log=3), "on_log is a int"),
            (dict(optimizers=(3, None)), "optimizers is a tuple; give a function of the parameters"),
            (dict(tokenizer=3), "tokenizer is not taken: processing_class is its name"),
            (dict(quantization_config={}), "quantization_config is a dict without load_in_4bit")]:
        with pytest.raises(ValueError, match=message):
            take(**arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'eval_datset'"):
        take(eval_datset=ROWS)


# Data as objects


def test_a_pandas_frame_trains_as_its_rows_do(tiny, expected, settings):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame([row | ({"note": 1.5} if i else {}) for i, row in enumerate(ROWS)])  # nan in row 0
    DPOTrainer(model=tiny, args=settings, train_dataset=frame).train()
    assert same(weights("out"), expected)
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        DPOTrainer(model=tiny, args=settings, train_dataset=frame[:0])


def test_columns_of_numpy_are_read(tiny, expected, settings):
    rows = [row | {"tags": np.arange(3), "size": np.int64(i)} for i, row in enumerate(ROWS)]
    DPOTrainer(model=tiny, args=settings, train_dataset=rows).train()
    assert same(weights("out"), expected)


# Evaluation, the log, the optimizer


def test_several_evaluation_sets_are_each_named(tiny, settings):
    a, b = make_rows(5, seed=11), make_rows(4, seed=12)
    settings.eval_strategy, settings.eval_steps = "steps", 2
    alone = {}
    for name, rows in (("a", a), ("b", b)):
        DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, eval_dataset=rows).train()
        alone[name] = [row["eval_loss"] for row in read_metrics(models.Path("out")) if "eval_loss" in row]
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, eval_dataset={"a": a, "b": b})
    last = trainer.train()
    lines = read_metrics(models.Path("out"))
    for name in "ab":
        assert [row[f"eval_{name}_loss"] for row in lines if f"eval_{name}_loss" in row] == alone[name]
        assert last[f"eval_{name}_loss"] == alone[name][-1]
    assert "eval_loss" not in last and trainer.state.log_history == lines


def test_the_best_model_is_of_one_of_several_sets(tiny, settings):
    sets = {"a": make_rows(5, seed=11), "b": make_rows(4, seed=12)}
    best = dataclasses.replace(settings, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    make = lambda c: DPOTrainer(model=str(tiny), args=c, train_dataset=ROWS, eval_dataset=sets)
    with pytest.raises(ValueError, match="--metric_for_best_model loss: no such metric; there are a_"):
        make(best)
    trainer = make(dataclasses.replace(best, metric_for_best_model="eval_b_loss"))
    assert trainer.train()["eval_b_loss"] == trainer.state.best_metric


def test_evaluate_takes_a_data_set(tiny, settings):
    rows = make_rows(5, seed=11)
    given = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, eval_dataset=rows)
    plain = lambda metrics: {n.partition("_")[2]: v for n, v in metrics.items() if not n.endswith("runtime")}
    before = given.evaluate()
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS)
    assert plain(trainer.evaluate(rows)) == plain(before)
    assert plain(trainer.evaluate(rows, metric_key_prefix="test")) == plain(before)
    assert list(trainer.evaluate({"x": rows}))[0].startswith("eval_x_")
    trainer.train()
    after = trainer.evaluate(rows)  # its reference was run before training
    given.train()
    assert plain(after) == plain(given.evaluate()) and after["eval_loss"] != before["eval_loss"]
    with pytest.raises(ValueError, match="the reference has been run and is no longer in memory"):
        trainer.evaluate(make_rows(5, seed=12))


@pytest.mark.parametrize("options", [dict(precompute_ref_log_probs=False), dict(use_peft=True)])
def test_a_new_data_set_is_evaluated_after_training_where_the_reference_is_still_there(tiny, settings, options):
    rows = make_rows(5, seed=12)
    settings = dataclasses.replace(settings, **options)
    given = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, eval_dataset=rows)
    metrics = given.train()
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] == metrics["eval_loss"]


def test_the_training_rows_are_evaluated_on_though_the_run_visits_few(tiny, settings):
    settings.max_steps = 1
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_on_log_is_given_every_line(tiny, settings):
    lines = []
    trainer = DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, eval_dataset=ROWS[:3], on_log=lines.append)
    trainer.train()
    assert lines == read_metrics(models.Path("out")) == trainer.state.log_history
    state = trainer.state
    assert (state.global_step, state.max_steps, state.epoch) == (3, 3, 1.0)


def test_an_optimizer_of_ones_own_steps_by_the_schedule(tiny, settings):
    """SGD at 0.5, falling linearly over three steps: w <- w - 0.5 (1 - step/3) grad."""
    settings.max_grad_norm = 0.0
    seen = []

    class Watched(torch.optim.SGD):
        def step(self):
            before = [(p.detach().clone(), p.grad.clone()) for p in self.param_groups[0]["params"]]
            super().step()
            seen.append((self.param_groups[0]["lr"], before, [p.detach().clone() for p in self.param_groups[0]["params"]]))

    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, optimizers=lambda params: Watched(params, lr=0.5)).train()
    assert [lr for lr, _, _ in seen] == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    for lr, before, after in seen:
        for (p, grad), new in zip(before, after):
            torch.testing.assert_close(new, p - lr * grad)


OPTIMIZERS = {
    "momentum": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "Adafactor": (torch.optim.Adafactor, dict(lr=1e-2)),
    "Adam": (torch.optim.Adam, dict(lr=1e-3, amsgrad=True)),
    "ASGD": (torch.optim.ASGD, dict(lr=1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_ones_own_resumes_to_the_bit(tiny, settings, name):
    settings.save_steps = 1
    make = lambda: DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, optimizer_cls_and_kwargs=OPTIMIZERS[name])
    make().train()
    found = weights("out")
    make().train(resume_from_checkpoint="out/checkpoint-1")
    assert same(weights("out"), found)
    with pytest.raises(ValueError, match="optimizer"):
        DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS).train(resume_from_checkpoint="out/checkpoint-1")


def test_a_function_that_makes_adamw_is_adamw(tiny, expected, settings):
    adamw = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0, fused=True)
    DPOTrainer(model=str(tiny), args=settings, train_dataset=ROWS, optimizers=adamw).train()
    assert same(weights("out"), expected)


# Every loss by this door


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_every_loss_by_its_name_alone(loss, tiny, settings):
    options = dict(loss_type=loss, max_steps=2)
    if loss in ("robust", "exo_pair"):
        options["label_smoothing"] = 0.1
    rows = make_rows(10, seed=3, scores=True)
    found = []
    words = ["--model_name_or_path", str(tiny), "--output_dir", "out", "--dataset_name", "rows.jsonl"]
    models.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert dpo.main(words + [word for k, v in (SETTINGS | options).items() for word in (f"--{k}", str(v))]) == 0
    found = weights("out")
    trainer = DPOTrainer(model=loaded(tiny), args=dataclasses.replace(settings, **options), train_dataset=rows)
    trainer.train()
    assert same(weights("out"), found)


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


