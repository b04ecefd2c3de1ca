"""Pairs with pictures through the trainer: start values, TRL's numbers, LoRA, ranks, saved files."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_dpo
from safetensors.torch import load_file
from vision_tiny import FAMILIES, PAD, make_model_directory, theirs_forward

import dpo
import model as models
from extras.models.opening import load_adapted, load_model
from extras.run.forecast import memory, run_of
from parts.checks import check_store
from parts.names import FIXED, file_name

pytest.importorskip("PIL")
pytest.importorskip("transformers")
LN2 = 0.6931471805599453
ANSWERS = ["A cat.", "Two dogs, and a bird.", "Nothing at all", "The red one.", "It is a small house", "Four."]


def make_pictures(folder) -> None:
    from PIL import Image

    for i, (width, height) in enumerate([(40, 30), (20, 61), (28, 28)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height), 2).save(folder / f"{i}.png")


def make_row(i: int, images: list[str], key: str = "images") -> dict:
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": f"What is it, {i}?"}]
    message = lambda text: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    return {"prompt": [{"role": "user", "content": parts}], "chosen": message(ANSWERS[i % 6]),
            "rejected": message(ANSWERS[(i + 1) % 6]), key: images}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with pictures.jsonl (4 rows, one with two pictures), mixed.jsonl (text-only rows between), and checkpoints."""
    folder = tmp_path_factory.mktemp("vision")
    make_pictures(folder)
    rows = [make_row(0, ["0.png"]), make_row(1, ["1.png"]), make_row(2, ["0.png", "2.png"]), make_row(3, ["1.png"])]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mixed = [make_row(i, ["0.png"] if i in (0, 5) else []) for i in range(8)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mixed))
    for family in FAMILIES:
        (folder / family).mkdir()
        make_model_directory(family, folder / family)
    return folder


@pytest.fixture
def run(place, tmp_path):
    def go(name, family="llava", data="pictures", **options):
        settings = dict(model_name_or_path=str(place / family), dataset_name=str(place / f"{data}.jsonl"),
                        output_dir=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), logging_steps=1, use_cpu=True,
                        per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, bf16=False, shuffle_dataset=False)
        trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**settings | options))
        trainer.train()
        return read_metrics(tmp_path / name), trainer

    return go


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "gemma4", "gemma4_unified", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("options", [
    {}, {"precompute_ref_log_probs": False}, {"use_peft": True}, {"gradient_checkpointing": True, "freeze_vision_tower": False},
    {"precompute_ref_log_probs": False, "freeze_vision_tower": False}], ids=str)
def test_the_first_loss_is_log2_in_every_mode(run, family, options):
    metrics, _ = run("out", family, **options)
    assert metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert metrics[1]["loss"] != metrics[0]["loss"] and np.isfinite(metrics[1]["grad_norm"])


EAGER = dict(model_init_kwargs=dict(attn_implementation="eager"))  # Gemma 4's audio tower has no other


def trl_steps(place, tmp_path, model, arguments):
    """The metrics of TRL's steps."""
    (tmp_path / "run.json").write_text(json.dumps({"model": str(model), "data": str(place / "pictures.jsonl"),
                                                   "out": str(tmp_path / "trl"), "args": arguments}))
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "vision_peer.py"), str(tmp_path / "run.json")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(tmp_path / "trl")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma4_unified"])  # whose processor needs torchvision
def test_two_steps_equal_trl(run, place, tmp_path, family):
    """Losses, rewards, gradient norms and, after two steps, every parameter: tower, projector and language model."""
    pytest.importorskip("trl")
    if family == "smolvlm":
        pytest.importorskip("torchvision", exc_type=Exception, reason="transformers' processor needs a torchvision that loads")
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs num2words")
    arguments = dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, max_length=None)
    if family == "gemma4":
        arguments |= EAGER
    theirs = trl_steps(place, tmp_path, place / family, arguments)
    ours, trainer = run("ours", family, max_length=None, freeze_vision_tower=False)
    for a, b in zip(ours, theirs):
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            assert a[key] == pytest.approx(float(b[key]), rel=5e-4, abs=2e-4 if "rewards" in key else 1e-6), key
    params = load_file(tmp_path / "trl" / "params.safetensors")
    start = dict(load_model(place / family).named_parameters())
    moved = 0
    for name, p in trainer.model.named_parameters():
        if name.endswith(FIXED):
            assert torch.equal(p, start[name]), name
            continue
        expected = params[file_name(name, trainer.model.config)]
        change = (expected - start[name]).norm()
        moved += bool(change > 0)
        # Adam's first steps are as long for gradients that are all rounding (a key's bias) as for others
        if not name.endswith("k_proj.bias"):
            assert (p.detach() - expected).norm() <= 5e-4 * expected.norm() + 0.02 * change, name
    assert moved > 40


def test_trl_gives_gemma_4s_policy_another_padding_token_than_its_reference(run, place, tmp_path):
    """A bug of TRL 1.16: it writes the tokenizer's padding token into the policy's configuration alone.

    Gemma 4 reads that token's embedding wherever an image is, so that with files whose config.json has another one, policy and
    reference of equal weights differ in the first step. Ours are what the files say, which TRL's reference is.
    """
    pytest.importorskip("trl")
    shutil.copytree(place / "gemma4", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    assert raw["text_config"]["pad_token_id"] == PAD
    path.write_text(json.dumps(raw | {"text_config": raw["text_config"] | {"pad_token_id": 0}}))
    arguments = dict(per_device_train_batch_size=4, max_steps=1, learning_rate=1e-3, max_length=None, beta=0.1)
    theirs = trl_steps(place, tmp_path, tmp_path / "model", arguments | EAGER)[0]
    ours = run("ours", model_name_or_path=str(tmp_path / "model"), max_length=None)[0][0]
    for answer in ("chosen", "rejected"):
        reward = float(theirs[f"rewards/{answer}"])
        assert ours[f"logps/{answer}"] == pytest.approx(float(theirs[f"logps/{answer}"]) - reward / 0.1, rel=1e-6)
        assert abs(reward) > 1e-3 and ours[f"rewards/{answer}"] == 0


def gradients_of_a_step(trainer) -> dict:
    """Train one step; every gradient of its global batch, {name in the files: gradient}."""
    kept, update = {}, trainer.update

    def keep(*given):
        kept.update({file_name(n, trainer.model.config): p.grad.clone() for n, p in trainer.model.named_parameters()
                     if p.grad is not None})
        return update(*given)

    trainer.update = keep
    trainer.train()
    return kept


@pytest.mark.parametrize("family, parameters", [("gemma4", 100), ("gemma4_unified", 60)])
def test_gemma_4s_gradients_of_the_dpo_loss_equal_autograd_through_transformers(place, tmp_path, family, parameters):
    """Of every parameter, prompts with images shared by both answers, in float64; transformers' model is in eval mode."""
    transformers = pytest.importorskip("transformers")
    settings = dict(model_name_or_path=str(place / family), dataset_name=str(place / "pictures.jsonl"), beta=0.3,
                    output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=False, dtype="float64",
                    per_device_train_batch_size=4, freeze_vision_tower=False, max_length=None, max_steps=1)
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**settings))
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(place / family).double().eval()
    loss = 0
    for i in range(4):
        logps = []
        pair = trainer.train_store[i]
        images = trainer.batch(trainer.train_store, np.array([i])).pictures
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids = [int(t) for t in (*pair.prompt_ids, *answer)]
            logits = theirs_forward(theirs, family, [ids], images.pixels.double(), images.grids, trainer.images.processor.token_id)[0]
            scored = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            logps.append(scored.gather(-1, torch.tensor(ids[len(pair.prompt_ids):])[:, None]).sum())
        margin = logps[0] - logps[1]
        loss = loss - torch.nn.functional.logsigmoid(0.3 * (margin - margin.detach())) / 4
    loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    got = gradients_of_a_step(trainer)
    assert got.keys() == expected.keys() and len(got) > parameters
    for name, grad in got.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name  # its norms are float32


def test_the_tower_is_frozen_unless_asked_for(run, place):
    start = dict(load_model(place / "llava").named_parameters())
    moved = lambda trainer: {n.split(".")[2] for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n]) and "vision" in n}
    assert moved(run("a")[1]) == {"projector"}
    assert moved(run("b", freeze_vision_tower=False)[1]) == {"projector", "tower"}


@pytest.mark.parametrize("family, targets, frozen, expected", [
    ("llava", ["q_proj", "v_proj"], True, {"layers"}), ("llava", ["all-linear"], True, {"layers", "projector"}),
    ("llava", ["all-linear"], False, {"layers", "projector", "tower"}),
    ("llava", ["encoder.layers.0.mlp.fc1"], False, {"tower"}), ("gemma3", ["all-linear"], True, {"layers"}),
    ("gemma3", ["all-linear"], False, {"layers", "tower"}),  # its projector's matrix is no linear layer
    ("gemma4", ["q_proj", "v_proj"], False, {"layers"}),  # its tower's have a linear layer within, as in PEFT
    ("gemma4", ["all-linear"], True, {"layers", "projector", "per_layer_model_projection"}),
    ("gemma4", ["all-linear"], False, {"layers", "projector", "tower", "per_layer_model_projection"}),
    ("gemma4_unified", ["all-linear"], True, {"layers", "projector"}),
    ("gemma4_unified", ["all-linear"], False, {"layers", "projector", "tower"})])
def test_lora_on_the_language_model_the_tower_or_both_loads_in_peft(run, place, tmp_path, family, targets, frozen, expected):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    _, trainer = run("out", family, use_peft=True, lora_r=4, lora_target_modules=targets, freeze_vision_tower=frozen,
                     learning_rate=1e-2)
    part = lambda n: n.split(".")[2] if "vision" in n else n.split(".")[1]
    assert {part(n) for n in models.lora_modules(trainer.model)} == expected
    base = transformers.AutoModelForImageTextToText.from_pretrained(place / family)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    state = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    from extras.lora.peft_files import adapter_tensors

    ours = adapter_tensors(trainer.model)
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[n], ours[n]) for n in ours) and any(p.any() for n, p in ours.items() if "lora_B" in n)
    again, _ = load_adapted(str(tmp_path / "out"), torch.float32)
    assert all(torch.equal(p, ours[n]) for n, p in adapter_tensors(again).items())


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_unified"])
def test_gemma_trains_in_4_bits_and_with_adapters(run, place, family):
    metrics, trainer = run("out", family, use_peft=True, load_in_4bit=True)
    assert metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6) and metrics[1]["loss"] != metrics[0]["loss"]


def text_rows(place) -> None:
    """texts.jsonl: rows without images, whose messages are texts."""
    say = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": say("user", f"What is it, {i}?"), "chosen": say("assistant", ANSWERS[i]),
             "rejected": say("assistant", ANSWERS[i + 1])} for i in range(4)]
    (place / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize("family, around", [
    ("gemma3", "<s><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"),
    ("gemma4", "<s><|turn>user\n{}<turn|>\n<|turn>model\n"), ("gemma4_unified", "<s><|turn>user\n{}<turn|>\n<|turn>model\n")])
def test_rows_of_text_leave_gemmas_tower_and_projector_as_they_were(run, place, tmp_path, family, around):
    """To the byte, though the projector may learn; and no blank image is encoded for it."""
    text_rows(place)
    metrics, trainer = run("out", family, "texts", learning_rate=1e-2)
    assert metrics[1]["loss"] != pytest.approx(LN2, abs=1e-4)
    before, after = (load_file(d / "model.safetensors") for d in (place / family, tmp_path / "out"))
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert before.keys() == after.keys()
    sound = ("audio", "layer_scalar")
    assert same == {n for n in before if any(part in n for part in ("vision", "multi_modal_projector", *sound))}
    seen = trainer.train_store[0].prompt_ids
    assert trainer.tokenizer.decode(seen) == around.format("What is it, 0?")


def test_ranks_share_gemmas_streams_of_text_and_refuse_those_with_images(run, place, tmp_path):
    text_rows(place)
    one, _ = run("one", "gemma3", "texts", dtype="float64")
    run_dpo("--model_name_or_path", place / "gemma3", "--cache_dir", tmp_path / "cache2", "--use_cpu", "--dtype", "float64",
            "--no_bf16", "--max_steps", 2, "--learning_rate", "1e-3", "--per_device_train_batch_size", 4, "--logging_steps", 1,
            "--shuffle_dataset", "false", "--context_parallel_size", 2, "--dataset_name", place / "texts.jsonl",
            "--output_dir", tmp_path / "two", ranks=2)
    for a, b in zip(one, read_metrics(tmp_path / "two"), strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-9, abs=1e-12) for k in ("loss", "grad_norm", "logps/chosen"))
    _, trainer = run("images", "gemma3")
    trainer.args.context_parallel_size = 2
    with pytest.raises(ValueError, match="--context_parallel_size 2: not for rows with images"):
        check_store(trainer.args, trainer.train_store, trainer.model.config, trainer.tokenizer.size)


@pytest.mark.parametrize("family, patches", [("gemma3", 3 * 16), ("gemma4_unified", 56 + 64 + 63)])
def test_a_dry_run_knows_the_images(run, family, patches):
    """Three distinct ones; the masks of prompt and completions, in pairs of query and key."""
    _, trainer = run("out", family, max_steps=1)
    found = run_of(trainer)
    p, chosen, rejected = trainer.train_store.lengths.astype(int).T
    assert found.patches == patches and not found.tower_learns
    assert found.masked == ((p + chosen) ** 2 + rejected * (p + rejected)).sum()
    text = memory(trainer.model.config, found._replace(patches=0, masked=0))
    assert memory(trainer.model.config, found)["total"] > text["total"]


@pytest.mark.parametrize("change, words", [
    (dict(size={"height": 14, "width": 14}), "images of 14 x 14 pixels and 4 tokens, and config.json says 28 x 28 pixels and 4"),
    (dict(do_pan_and_scan=True), "do_pan_and_scan is on"), (None, "28 x 28 pixels and 256 tokens, .* says 28 x 28 pixels and 4")])
def test_a_processor_of_another_gemma_is_refused(run, place, tmp_path, change, words):
    shutil.copytree(place / "gemma3", tmp_path / "model")
    path = tmp_path / "model" / ("processor_config.json" if change is None else "preprocessor_config.json")
    given = json.loads(path.read_text())
    given.pop("image_seq_length", None)
    path.write_text(json.dumps(given | (change or {})))
    with pytest.raises(ValueError, match=words):
        run("out", model_name_or_path=str(tmp_path / "model"))


def test_what_is_saved_is_whole_for_transformers(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, trainer = run("out", freeze_vision_tower=False)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    ours = {file_name(n, trainer.model.config): p for n, p in trainer.model.named_parameters()}
    assert all(torch.equal(p, ours[n]) for n, p in theirs.named_parameters())
    assert isinstance(transformers.AutoProcessor.from_pretrained(tmp_path / "out"), transformers.LlavaProcessor)


@pytest.mark.parametrize("family", ["idefics3", "gemma4"])
def test_micro_batches_and_prefix_sharing_do_not_change_the_result(run, family):
    one, _ = run("a", family, dtype="float64")
    many, _ = run("b", family, dtype="float64", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for a, b in zip(one, many, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-9, abs=1e-12) for k in ("loss", "grad_norm", "logps/chosen"))


@pytest.mark.parametrize("family, flags", [
    ("llava", ()), ("llava", ("--fsdp", "full_shard")), ("gemma3", ("--fsdp", "full_shard")),
    ("gemma4", ()), ("gemma4", ("--fsdp", "full_shard")), ("gemma4_unified", ())], ids=str)
def test_two_ranks_with_text_only_batches_equal_one(run, place, tmp_path, family, flags):
    """Three of four micro-batches of a step are text alone, on one rank all; the tower trains."""
    options = dict(data="mixed", dtype="float64", freeze_vision_tower=False)
    one, trainer = run("one", family, per_device_train_batch_size=4, max_steps=2, **options)
    run_dpo("--model_name_or_path", place / family, "--dataset_name", place / "mixed.jsonl", "--output_dir", tmp_path / "two",
            "--cache_dir", tmp_path / "cache2", "--logging_steps", 1, "--use_cpu", "--dtype", "float64", "--no_bf16", "--max_steps", 2,
            "--learning_rate", "1e-3", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2,
            "--shuffle_dataset", "false", "--freeze_vision_tower", "false", *flags, ranks=2)
    two = read_metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-9, abs=1e-12) for k in ("loss", "grad_norm", "logps/chosen"))
    saved = load_file(tmp_path / "two" / "model.safetensors")
    ours = {theirs: p.view(trainer.model.get_parameter(p.name)) for theirs, p in trainer.model.layout.items()}
    assert all((saved[n] - p.detach()).abs().max() < 1e-9 for n, p in ours.items())


def test_the_command_of_trl_s_documentation_runs(place, tmp_path):
    """examples/scripts/dpo_vlm.py's flags, with names and sizes changed."""
    run_dpo("--dataset_name", place / "pictures.jsonl", "--model_name_or_path", place / "qwen2_5_vl", "--per_device_train_batch_size", 2,
            "--gradient_accumulation_steps", 2, "--dataset_num_proc", 2, "--output_dir", tmp_path / "out", "--dtype", "bfloat16",
            "--bf16", "--torch_dtype", "bfloat16", "--gradient_checkpointing", "--use_peft", "--lora_target_modules", "all-linear",
            "--max_steps", 1, "--cache_dir", tmp_path / "cache", "--logging_steps", 1, "--no_remove_unused_columns",
            "--trust_remote_code", "--use_cpu")
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(LN2, abs=1e-3)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_six_rows_over_real_photographs(run, shared):
    metrics, _ = run("out", "idefics3", dataset_name=str(shared / "prefs" / "image_pref" / "pref.jsonl"), per_device_train_batch_size=2,
                     max_steps=3, max_length=4096)
    assert metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6) and len(metrics) == 3


def test_pictures_in_rows_of_python_train_as_their_files_do(place, run, tmp_path, monkeypatch):
    """Paths from the working directory, and PIL images; rows with a video are refused."""
    Image = pytest.importorskip("PIL.Image")
    expected, _ = run("files")
    monkeypatch.chdir(place)
    named = [make_row(0, ["0.png"]), make_row(1, ["1.png"]), make_row(2, ["0.png", "2.png"]), make_row(3, ["1.png"])]
    opened = [row | {"images": [Image.open(name) for name in row["images"]]} for row in named]
    settings = dict(model_name_or_path=str(place / "llava"), cache_dir=str(tmp_path / "cache"), logging_steps=1, use_cpu=True,
                    per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, bf16=False, shuffle_dataset=False)
    for name, rows in (("named", named), ("opened", opened)):
        config = dpo.DPOConfig(output_dir=str(tmp_path / name), **settings)
        dpo.DPOTrainer(args=config, train_dataset=rows).train()
        found = read_metrics(tmp_path / name)
        assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    with pytest.raises(ValueError, match="the row has videos, which no model here reads"):
        dpo.DPOTrainer(args=config, train_dataset=[named[0] | {"videos": ["a.mp4"]}])


def test_an_object_of_transformers_trains_as_its_files_do(run, place, tmp_path):
    """With its processor, as TRL's script for Gemma 3 gives them."""
    transformers = pytest.importorskip("transformers")
    expected, _ = run("files", "gemma3")
    model = transformers.AutoModelForImageTextToText.from_pretrained(place / "gemma3")
    processor = transformers.AutoProcessor.from_pretrained(place / "gemma3")
    config = dpo.DPOConfig(
        output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), logging_steps=1, use_cpu=True, max_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-3, bf16=False, shuffle_dataset=False,
        dataset_name=str(place / "pictures.jsonl"))
    dpo.DPOTrainer(model, args=config, processing_class=processor).train()
    found = read_metrics(tmp_path / "out")
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]


def test_the_flag_needs_a_tower(tiny, pairs_file, tmp_path):
    done = run_dpo("--model_name_or_path", tiny, "--dataset_name", pairs_file, "--output_dir", tmp_path, "--no_freeze_vision_tower",
                   expect=2)
    assert "this model reads no images" in done.stderr


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma4"])
def test_resuming_with_pictures_is_bitwise(run, tmp_path, family):
    whole, _ = run("a", family, max_steps=4, save_steps=2, freeze_vision_tower=False)
    a = load_file(tmp_path / "a" / "model.safetensors")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    run("b", family, max_steps=4, save_steps=2, freeze_vision_tower=False, resume_from_checkpoint="true")
    b = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def own_pictures(place, tmp_path):
    """Pictures and rows that may be spoiled, with the flags of a run over them that has filled the cache."""
    make_pictures(tmp_path)
    (tmp_path / "rows.jsonl").write_text((place / "pictures.jsonl").read_text())
    flags = ["--model_name_or_path", str(place / "llava"), "--dataset_name", str(tmp_path / "rows.jsonl"), "--cache_dir",
             str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--max_steps", "2", "--save_steps", "1",
             "--no_shuffle_dataset", "--per_device_train_batch_size", "1", "--no_precompute_ref_log_probs"]
    assert dpo.main(flags) == 0
    return flags


SPOILT = {"gone": (lambda path: path.unlink(), "0.png: No such file"),
          "another": (lambda path: path.write_bytes(path.with_name("1.png").read_bytes()), "0.png: the image has changed since the pairs")}


@pytest.mark.parametrize("how", SPOILT)
def test_a_picture_that_is_gone_or_changed_since_the_cache_was_filled_is_told_before_the_first_step(own_pictures, tmp_path, capsys, how,
                                                                                                    monkeypatch):
    spoil, words = SPOILT[how]
    spoil(tmp_path / "0.png")
    monkeypatch.setattr(dpo.DPOTrainer, "train", lambda trainer: pytest.fail("training began"))
    assert dpo.main(own_pictures) == 2
    assert capsys.readouterr().err.count(words) == 1


@pytest.mark.parametrize("how", SPOILT)
def test_a_picture_that_goes_during_training_ends_the_run_in_one_message(own_pictures, tmp_path, capsys, how, monkeypatch):
    spoil, words = SPOILT[how]
    train = dpo.DPOTrainer.train

    def spoil_first(trainer):
        spoil(tmp_path / "0.png")
        return train(trainer)

    monkeypatch.setattr(dpo.DPOTrainer, "train", spoil_first)
    assert dpo.main(own_pictures) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and words in error and "checkpoint-2 is complete: resume from it" in error


@pytest.mark.parametrize("change", [dict(patch_size=14), dict(vision_feature_select_strategy="full"), dict(num_additional_image_tokens=0)])
def test_a_processor_that_counts_other_features_than_llavas_tower_gives_is_refused(run, place, tmp_path, change):
    shutil.copytree(place / "llava", tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="tokens, and config.json says 28 x 28 pixels and 16 tokens"):
        run("out", model_name_or_path=str(tmp_path / "model"))
