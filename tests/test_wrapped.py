"""Decoders published within a wrapper that reads pictures: trained on text, all else saved as it was read."""

import copy
import json

import pytest
import tokenizers
import torch
from conftest import make_rows, read_metrics
from safetensors.torch import load_file, save_file
from test_families import (
    EXPERTS_4,
    FULL,
    GEMMA4,
    GEMMA4_EXPERTS,
    NARROW,
    PAIRS,
    SIZES,
    SLIDING,
    YARN,
    our_logits,
    their_logits,
)
from test_families_trl import ON_EXPERTS
from test_model import assert_same_gradients, gradients, put_lora, randomize_lora, stream
from test_nf4 import WHOLE_ROWS
from vision_tiny import make_checkpoint

import dpo
import model as models
from extras.decoder.generate import Sampling, complete
from extras.lora.peft_files import save_adapter
from extras.models.objects import in_memory
from extras.models.opening import build, load_model
from extras.rows.pictures import open_tokenizer
from parts.names import BOUNDS, FIXED, carried_names, file_name, find_places

transformers = pytest.importorskip("transformers", reason="needs transformers")

SIGLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
              patch_size=4)
PIXTRAL = SIGLIP | dict(model_type="pixtral", head_dim=8)
INTERN = SIGLIP | dict(image_size=[8, 8], patch_size=[4, 4])
LLAMA4 = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
              vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
GEMMA4_EARS = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 4],
                   output_proj_dims=16)
# name -> (model_type, its configuration); Gemma 4's tower is read, and test_vision_model.py has it
CASES = {
    "gemma4": ("gemma4", dict(vision_config=None, audio_config=GEMMA4_EARS, text_config=GEMMA4)),
    "gemma4_experts": ("gemma4", dict(vision_config=None, audio_config=GEMMA4_EARS, text_config=GEMMA4_EXPERTS)),
    "mistral3": ("mistral3", dict(vision_config=PIXTRAL, text_config=NARROW | dict(
        model_type="mistral", sliding_window=None), tie_word_embeddings=False)),
    "ministral3": ("mistral3", dict(vision_config=PIXTRAL, tie_word_embeddings=True, text_config=NARROW | dict(
        model_type="ministral3", tie_word_embeddings=True, rope_parameters=YARN | dict(
            original_max_position_embeddings=128, llama_4_scaling_beta=0.1)))),
    "llama4": ("llama4", dict(vision_config=LLAMA4, text_config=EXPERTS_4)),
    "internvl": ("internvl", dict(vision_config=INTERN, text_config=SIZES | dict(model_type="qwen3", head_dim=12))),
}


def random_model(name: str, **text):
    kind, config = CASES[name]
    config = config | dict(text_config=config["text_config"] | text)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(config))
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2
            p.copy_(torch.randn_like(p) * scale + (p if p.dim() == 1 else 0))
            if kind == "gemma4" and n.endswith(("q_norm.weight", "k_norm.weight")):
                p *= 0.5  # as in test_families.py
        for n, b in model.named_buffers():
            if n.endswith(FIXED):
                b.uniform_(0.5, 1.5)
    return model.float().eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, transformers' model, its checkpoint as stock save_pretrained writes it)."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = random_model(request.param)
    theirs.save_pretrained(directory)
    return request.param, theirs, directory


def assert_same_logits(ours, theirs, tolerance: float = 1e-5) -> None:
    """The gated delta rule rounds more, here and there: with it, ours are as near to float64 as theirs."""
    with torch.no_grad():
        got, expected = our_logits(ours), their_logits(theirs)[0]
        if ours.config.mixer is None:
            assert (got - expected).abs().max() < tolerance
            return
        exact = our_logits(copy.deepcopy(ours).double())
        assert (got - exact).abs().max() < 1.5 * (expected - exact).abs().max() + tolerance < 1e-3


def test_logits_and_gradients_equal_transformers(case):
    name, theirs, directory = case
    ours = load_model(directory)
    batch = stream(PAIRS)
    weights = torch.randn(len(batch[4]))
    logits = their_logits(theirs)[0]
    assert_same_logits(ours, theirs)
    log_p = logits.log_softmax(-1).gather(-1, batch[4][:, None])[:, 0]
    expected = gradients(theirs, (log_p * weights).sum())
    got = gradients(ours, (ours(models.Stream(*batch)).logps * weights).sum())
    assert {file_name(n, ours.config) for n in got} == {n for n, g in expected.items() if g.abs().max() > 0}
    for n, g in got.items():
        g_theirs = expected[file_name(n, ours.config)]
        g_theirs = g_theirs if g_theirs.shape == g.shape else g_theirs.mT  # Llama 4's experts are (in, out)
        assert (g - g_theirs).norm() <= 1e-4 * g_theirs.norm() + 1e-6, n


def test_shared_prompts_equal_unshared_ones(case):
    model = load_model(case[2], torch.float64)
    weights = torch.randn(len(stream(PAIRS)[4]), dtype=torch.float64)
    run = lambda shared: model(models.Stream(*stream(PAIRS, shared))).logps
    assert (run(True) - run(False)).abs().max() < 1e-10
    assert_same_gradients(*(gradients(model, (run(shared) * weights).sum()) for shared in (True, False)), 1e-10)


def perturbed(directory) -> models.Decoder:
    ours = load_model(directory)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p += torch.randn_like(p) * 0.02
    return ours


def older_names(name: str) -> str:
    """As files of before transformers 4.52, and those of google and mistralai, have it; or the other way."""
    new = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
           "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."}
    for old, plain in new.items():
        if name.startswith(old):
            return plain + name.removeprefix(old)
    return name


@pytest.mark.parametrize("rename", [str, older_names])
def test_what_was_trained_is_saved_and_all_else_as_it_was_byte_for_byte(case, rename, tmp_path):
    """In several files and in bfloat16 too; transformers computes with them what we compute."""
    name, theirs, directory = case
    if name == "llama4" and rename is older_names:
        pytest.skip("its names never changed")
    before = {rename(n): t for n, t in load_file(directory / "model.safetensors").items()}
    (tmp_path / "a").mkdir()
    save_file(before, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "a/config.json").write_bytes((directory / "config.json").read_bytes())
    ours = perturbed(tmp_path / "a")
    twin = copy.deepcopy(ours)  # as a reference is made
    assert twin.carried is ours.carried and len(ours.carried.tensors) > 10
    assert before.keys() == ours.layout.keys() | ours.carried.tensors.keys()
    models.save_model(ours, tmp_path / "b")
    after = load_file(tmp_path / "b/model.safetensors")
    assert after.keys() == before.keys()
    for n, tensor in before.items():
        assert torch.equal(after[n], tensor) == (n in ours.carried.tensors), n
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "b").eval()
    assert_same_logits(ours, again, 2e-5)
    models.save_model(ours, tmp_path / "c", torch.bfloat16)
    narrow = load_file(tmp_path / "c/model.safetensors")
    assert all(t.dtype == (torch.float32 if n in ours.carried.tensors else torch.bfloat16) for n, t in narrow.items())


def test_carried_tensors_are_cut_into_shards_with_the_others(case, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHARD_BYTES", 20_000)
    models.save_model(load_model(case[2]), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    before = load_file(case[2] / "model.safetensors")
    assert index["weight_map"].keys() == before.keys() and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    again = load_model(tmp_path)
    assert all(torch.equal(again.carried.tensors[n], before[n]) for n in again.carried.tensors)


@pytest.mark.parametrize("new", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_greedy_answers_equal_transformers(case, new):
    name, theirs, directory = case
    prompt = PAIRS[0][0]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt):]
    ours = complete(load_model(directory), [prompt], Sampling(temperature=0, max_new_tokens=new))[0]
    assert ours == expected.tolist()


@pytest.mark.parametrize("targets", [["all-linear"], pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow)])
def test_adapters_carry_pefts_names(case, targets, tmp_path):
    """Ours are on the decoder alone; PEFT, which sees the tower, has ones without effect there."""
    peft = pytest.importorskip("peft", reason="needs peft")
    name, theirs, directory = case
    ours = load_model(directory)
    put_lora(ours, 4, 8, 0.0, targets)
    randomize_lora(ours)
    save_adapter(ours, tmp_path / "a", dict(r=4, lora_alpha=8, lora_dropout=0.0, base_model_name_or_path="base"))
    load = lambda: transformers.AutoModelForImageTextToText.from_pretrained(directory)
    peers = peft.PeftModel.from_pretrained(load(), tmp_path / "a").eval()
    if name == "gemma4":  # adapters this large make its float32 round by more
        assert_same_logits(copy.deepcopy(ours).double(), peers.double(), 2e-5)
        peers.float()
    else:
        assert_same_logits(ours, peers, 2e-5)
    fresh = "all-linear" if targets == ["all-linear"] else targets
    if name.startswith("gemma4") and fresh == targets:  # PEFT cannot wrap what its tower calls q_proj
        with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
            peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules=fresh))
        fresh = rf"model\.language_model\..*({'|'.join(targets)})"
    fresh = peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules=fresh))
    in_decoder = {n for n in peft.get_peft_model_state_dict(fresh)
                  if ".language_model." in n and not ON_EXPERTS.search(n)}
    assert load_file(tmp_path / "a/adapter_model.safetensors").keys() == in_decoder


def test_layers_that_predict_several_tokens_are_carried(tmp_path):
    """Qwen's mtp.*, which transformers does not read either; experts and all."""
    for name in ("qwen3_5_moe", "qwen3_5"):
        make_checkpoint(name, tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        more = {"mtp.fc.weight": torch.randn(3, 4), "mtp.layers.0.self_attn.q_proj.weight": torch.randn(2, 2),
                "mtp.layers.0.mlp.experts.1.gate_proj.weight": torch.randn(2, 2).bfloat16()}
        save_file(state | more, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        models.save_model(load_model(tmp_path / name), tmp_path / "out")
        after = load_file(tmp_path / "out/model.safetensors")
        assert after.keys() == state.keys() | more.keys()
        assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in more.items())


def test_objects_of_transformers_are_opened_as_their_files_are(case):
    ours = load_model(in_memory(case[1]))
    assert len(ours.carried.tensors) == len(load_model(case[2]).carried.tensors)
    assert_same_logits(ours, case[1])


# Through the command line


@pytest.fixture(scope="module")
def trainable(tiny, tmp_path_factory):
    """An InternVL's directory with an image processor's file and a tokenizer, and pairs."""
    directory = tmp_path_factory.mktemp("trainable")
    random_model("internvl").save_pretrained(directory / "model")
    (directory / "model/tokenizer_config.json").write_bytes((tiny / "tokenizer_config.json").read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|image_pad|>"])
    tokenizer.save(str(directory / "model/tokenizer.json"))
    assert open_tokenizer(directory / "model").pictures is None  # before its image processor's file is there
    (directory / "model/preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}')
    assert open_tokenizer(directory / "model").pictures is not None
    rows = make_rows(8, seed=1)
    (directory / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows[2]["images"] = ["cat.png"]
    (directory / "pictures.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def run(directory, out, *more, data="pairs.jsonl") -> int:
    return dpo.main([
        "--model_name_or_path", str(directory / "model"), "--dataset_name", str(directory / data), "--use_cpu",
        "--output_dir", str(out), "--cache_dir", str(out) + " cache", "--max_steps", "2", "--learning_rate", "1e-2",
        "--logging_steps", "1",
        *more])


def test_training_changes_the_decoder_alone(trainable, tmp_path):
    assert run(trainable, tmp_path / "out", "--save_steps", "1") == 0
    losses = [step["loss"] for step in read_metrics(tmp_path / "out")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) != losses[1]
    before, after = (load_file(d / "model.safetensors") for d in (trainable / "model", tmp_path / "out"))
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert before.keys() == after.keys() and same == {n for n in before if "multi_modal_projector." in n or "vision_tower." in n}
    assert (tmp_path / "out/preprocessor_config.json").exists()
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_rows_with_images_are_refused_by_line(trainable, tmp_path, capsys):
    assert run(trainable, tmp_path / "out", data="pictures.jsonl") == 2
    message = capsys.readouterr().err
    assert "pictures.jsonl:3" in message and "the row has images" in message and "qwen2_5_vl" in message


def test_adapters_in_4_bits_train_on_the_decoder(trainable, tmp_path):
    assert run(trainable, tmp_path / "out", "--use_peft", "--load_in_4bit") == 0
    names = load_file(tmp_path / "out/adapter_model.safetensors").keys()
    assert len(names) == 12 and all(".language_model.layers." in n for n in names)


def test_in_4_bits_the_rest_is_saved_as_it_was_too(tmp_path):
    """As `extras.merge --again` saves it: transformers leaves the tower alone, and computes the same."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    random_model("internvl", **WHOLE_ROWS).save_pretrained(tmp_path / "wide")
    ours = load_model(tmp_path / "wide", four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None))
    models.save_model(ours, tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (tmp_path / "wide", tmp_path))
    carried = ours.carried.tensors
    assert len(carried) > 10 and all(torch.equal(before[n], after[n]) for n in carried)
    # in training mode, as test_nf4.load_theirs says
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).train()
    assert {type(m).__name__ for n, m in again.named_modules() if ".vision_tower." in n and n.endswith("fc1")} == {"Linear"}
    with torch.no_grad():
        assert (our_logits(ours) - their_logits(again)[0]).abs().max() < 1e-4


# Real files


def medgemma() -> tuple[dict, list[str]]:
    """config.json of google/medgemma-27b-it, without what has no default, and the names in its index.

    Its tower and projector are read too. It has as many parameters as the hub says of google/gemma-3-27b-it.
    """
    raw = dict(
        model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255999,
        eoi_token_index=256000, image_token_index=262144, mm_tokens_per_image=256, torch_dtype="bfloat16",
        vision_config=dict(hidden_size=1152, image_size=896, intermediate_size=4304, model_type="siglip_vision_model",
                           num_attention_heads=16, num_hidden_layers=27, patch_size=14, vision_use_head=False),
        text_config=dict(
            attention_bias=False, head_dim=128, hidden_activation="gelu_pytorch_tanh", hidden_size=5376,
            intermediate_size=21504, layer_types=[FULL if i % 6 == 5 else SLIDING for i in range(62)],
            max_position_embeddings=131072, model_type="gemma3_text", num_attention_heads=32, num_hidden_layers=62,
            num_key_value_heads=16, query_pre_attn_scalar=168, rms_norm_eps=1e-6, rope_local_base_freq=10000,
            rope_scaling=dict(factor=8.0, rope_type="linear"), rope_theta=1000000, sliding_window=1024,
            vocab_size=262208))
    inside = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm "
              "mlp.gate_proj mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm "
              "pre_feedforward_layernorm post_feedforward_layernorm").split()
    names = [f"language_model.model.layers.{i}.{n}.weight" for i in range(62) for n in inside]
    names += ["language_model.model.embed_tokens.weight", "language_model.model.norm.weight"]
    inside = "layer_norm1 layer_norm2 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2"
    tower = [f"encoder.layers.{i}.{n}.{kind}" for i in range(27) for n in inside.split() for kind in ("weight", "bias")]
    tower += ["embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias",
              "embeddings.position_embedding.weight", "post_layernorm.weight", "post_layernorm.bias"]
    return raw, names + [f"vision_tower.vision_model.{n}" for n in tower] + [
        "multi_modal_projector.mm_input_projection_weight", "multi_modal_projector.mm_soft_emb_norm.weight"]


@pytest.mark.parametrize("published, parameters, carried", [(medgemma, 27_432_406_640, 0)])
def test_published_files_name_every_parameter_of_the_decoder(published, parameters, carried):
    raw, names = published()
    config = models.read_config(raw)
    with torch.device("meta"):
        found = dict(build(config).named_parameters())
    places = find_places(names, config)
    assert {p.name for p in places.values()} == found.keys()
    assert carried_names(names, config) == set(names) - places.keys() and len(places) == len(names) - carried
    assert sum(p.numel() for p in found.values()) == parameters


# What differs in the text_config of google/gemma-4-NAME-it: (layers, every which one has no window, the rest)
GEMMA4_SIZES = {
    "E2B": (35, 5, dict(hidden_size=1536, intermediate_size=6144, num_attention_heads=8, num_key_value_heads=1,
                        hidden_size_per_layer_input=256, num_kv_shared_layers=20, use_double_wide_mlp=True,
                        sliding_window=512)),
    "E4B": (42, 6, dict(hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=2,
                        hidden_size_per_layer_input=256, num_kv_shared_layers=18, sliding_window=512)),
    "26B-A4B": (30, 6, dict(hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8,
                            num_global_key_value_heads=2, attention_k_eq_v=True, hidden_size_per_layer_input=0,
                            enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
                            sliding_window=1024, use_bidirectional_attention="vision")),
    "31B": (60, 6, dict(hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_key_value_heads=16,
                        num_global_key_value_heads=4, attention_k_eq_v=True, hidden_size_per_layer_input=0,
                        sliding_window=1024, use_bidirectional_attention="vision"))}


GEMMA4_TOWERS = {
    True: dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=12,
               head_dim=64, global_head_dim=64, use_clipped_linears=True, standardize=False),
    False: dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16,
                head_dim=72, global_head_dim=72, use_clipped_linears=False, standardize=True)}


def gemma4(name: str) -> tuple[dict, dict]:
    """Its configuration, and the model of it on the meta device as {name in the files: parameter}."""
    layers, every, own = GEMMA4_SIZES[name]
    raw = dict(
        model_type="gemma4", audio_token_id=258881, boa_token_id=256000, boi_token_id=255999, eoa_token_index=258883,
        eoi_token_id=258882, eos_token_id=[1, 106], image_token_id=258880, video_token_id=258884, initializer_range=0.02,
        tie_word_embeddings=True, vision_soft_tokens_per_image=280, audio_config=dict(model_type="gemma4_audio"),
        vision_config=GEMMA4_TOWERS[name[:1] == "E"] | dict(
            model_type="gemma4_vision", attention_bias=False, default_output_length=280, max_position_embeddings=131072,
            patch_size=16, pooling_kernel_size=3, position_embedding_size=10240, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_theta=100.0, rope_type="default")), text_config=own | dict(
            model_type="gemma4_text", attention_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=1,
            expert_intermediate_size=None, final_logit_softcapping=30.0, global_head_dim=512, head_dim=256,
            hidden_activation="gelu_pytorch_tanh", max_position_embeddings=131072, num_hidden_layers=layers,
            layer_types=[SLIDING if (i + 1) % every else FULL for i in range(layers)], pad_token_id=0, rms_norm_eps=1e-6,
            rope_parameters={FULL: dict(partial_rotary_factor=0.25, rope_theta=1e6, rope_type="proportional"),
                             SLIDING: dict(rope_theta=1e4, rope_type="default")},
            tie_word_embeddings=True, vocab_size=262144, vocab_size_per_layer_input=262144))
    config = models.read_config(raw)
    with torch.device("meta"):
        found = dict(build(config).named_parameters())
    return raw, {file_name(n, config): p for n, p in found.items()}


@pytest.mark.parametrize("name, tensors", [("E2B", 600), ("E4B", 719), ("26B-A4B", 657), ("31B", 832)])
def test_published_files_of_gemma_4_hold_as_many_tensors_as_its_decoder_and_what_is_carried(name, tensors):
    """E2B's and E4B's have keys and values of layers that read others'; files made later have none."""
    raw, found = gemma4(name)
    config = models.read_config(raw)
    reads = config.per_layer["reads"]
    unread = [f"model.language_model.layers.{i}.self_attn.{n}.weight" for i, j in enumerate(reads) if i != j
              for n in ("k_proj", "v_proj", "k_norm")]
    ears = ["model.audio_tower.subsample_conv_projection.layer0.conv.weight", "model.embed_audio.embedding_projection.weight",
            "model.audio_tower.layers.0.self_attn.q_proj.input_max"]
    assert sum("language_model" in n for n in found) + len(unread) == tensors
    names = [n.removesuffix("bounds") + last for n in found for last in (BOUNDS if n.endswith("bounds") else [""])]
    assert carried_names([*names, *unread, *ears], config) == {*unread, *ears}
    assert find_places([*names, *unread, *ears], config).keys() == {*names}
    assert len(names) - len(found) == (3 * 16 * 7 if name[:1] == "E" else 0)  # a layer's seven have four bounds each
    assert config.ropes[FULL].frequencies[64:] == (0,) * 192 and len(config.ropes[SLIDING].frequencies) == 128
    if name == "E2B":
        assert found["model.language_model.embed_tokens_per_layer.weight"].shape == (262144, 35 * 256)
        assert reads[:15] == tuple(range(15)) and reads[15:20] == (13, 13, 13, 13, 14)
        widths = [found[f"model.language_model.layers.{i}.self_attn.q_proj.weight"].shape[0] for i in (3, 4)]
        assert widths == [8 * 256, 8 * 512]


@pytest.mark.parametrize("name, size", {"26B-A4B": 51_611_872_412, "31B": 62_546_177_752}.items())
def test_published_sizes_of_gemma_4_are_those_of_its_decoder_tower_and_projection(name, size):
    """total_size of two index files, in bfloat16."""
    assert 2 * sum(p.numel() for p in gemma4(name)[1].values()) == size


def test_gemma_4_12b_has_as_many_parameters_as_the_hub_says():
    """google/gemma-4-12B: no tower, no audio encoder."""
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 8
    text = gemma4("31B")[0]["text_config"] | dict(
        model_type="gemma4_unified_text", hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=1, attention_k_eq_v=True, layer_types=types)
    patches = dict(model_type="gemma4_unified_vision", mm_embed_dim=3840, mm_posemb_size=1120, model_patch_size=48, patch_size=16,
                   num_soft_tokens=280, output_proj_dims=3840, pooling_kernel_size=3, rms_norm_eps=1e-6)
    raw = gemma4("31B")[0] | dict(model_type="gemma4_unified", text_config=text, vision_config=patches)
    config = models.read_config(raw)
    with torch.device("meta"):
        model = build(config)
    audio = 640 * 3840  # carried: embed_audio's projection
    assert sum(p.numel() for p in model.parameters()) + audio == 11_959_730_224


def test_the_configuration_of_qwen36_27b_is_read():
    """That of Qwen/Qwen3.6-27B; its name says how many parameters."""
    raw = dict(
        model_type="qwen3_5", image_token_id=248056, video_token_id=248057, vision_start_token_id=248053,
        vision_end_token_id=248054, language_model_only=False, tie_word_embeddings=False,
        vision_config=dict(model_type="qwen3_5_vision", depth=27, out_hidden_size=5120), text_config=dict(
            model_type="qwen3_5_text", attention_bias=False, attn_output_gate=True, full_attention_interval=4,
            head_dim=256, hidden_act="silu", hidden_size=5120, intermediate_size=17408, linear_conv_kernel_dim=4,
            layer_types=[FULL if i % 4 == 3 else "linear_attention" for i in range(64)], linear_key_head_dim=128,
            linear_num_key_heads=16, linear_num_value_heads=48, linear_value_head_dim=128, mamba_ssm_dtype="float32",
            max_position_embeddings=262144, mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False,
            num_attention_heads=24, num_hidden_layers=64, num_key_value_heads=4, output_gate_type="swish",
            partial_rotary_factor=0.25, rms_norm_eps=1e-6, tie_word_embeddings=False, vocab_size=248320,
            rope_parameters=dict(mrope_interleaved=True, mrope_section=[11, 11, 10], partial_rotary_factor=0.25,
                                 rope_theta=10000000, rope_type="default")))
    config = models.read_config(raw)
    with torch.device("meta"):
        found = dict(build(config).named_parameters())
    assert 26.5e9 < sum(p.numel() for p in found.values()) < 27.5e9
    names = [file_name(n, config) for n in found] + ["mtp.layers.0.mlp.up_proj.weight"]
    assert {p.name for p in find_places(names, config).values()} == found.keys()
    assert carried_names(names, config) == set(names[-1:])


def test_wrappers_without_a_row_are_refused_by_name():
    with pytest.raises(ValueError, match="model_type 'paligemma' reads images or sound; of those, llava, .*gemma3.*are"):
        models.read_config(dict(model_type="paligemma", vision_config={}, text_config={}))
    raw = medgemma()[0] | dict(text_weight=2.0)
    with pytest.raises(ValueError, match="text_weight = 2.0: not understood"):
        models.read_config(raw)
