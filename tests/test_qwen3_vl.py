"""Qwen3-VL and Qwen3.5 with pictures: DeepStack, alternating axes, places interpolated from a table, files of experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_families import PAIRS, our_logits, their_logits
from test_families_trl import ON_EXPERTS
from test_model import assert_same_gradients, gradients, put_lora, randomize_lora, stream
from test_vision_model import stream_of
from vision_tiny import QWEN3, make_checkpoint, random_pictures, theirs_forward

import model as models
from extras.decoder.generate import Sampling, complete
from extras.decoder.memory import keeping_less, remake_cheap_ones
from extras.decoder.qwen_vl import axis_of_pairs
from extras.lora.peft_files import save_adapter
from extras.models.opening import build, load_model
from parts.activations import keep_all, recompute
from parts.names import carried_names, file_name, find_places

transformers = pytest.importorskip("transformers", reason="needs transformers")
WITH_DEEPSTACK = QWEN3[:2]


@pytest.fixture(scope="module", params=QWEN3)
def case(request, tmp_path_factory):
    """(family, transformers' model, its checkpoint)."""
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, make_checkpoint(request.param, directory), directory


def logits_of(model, family: str) -> torch.Tensor:
    sequences, pixels, grids = random_pictures(family)
    dtype = model.lm_head.weight.dtype
    ids, positions, spans, pictures = stream_of(sequences, pixels.to(dtype), grids, family)
    hidden, _ = model.model(models.Stream(ids, positions, spans, pictures=pictures))
    return sum(F.linear(x, w) for x, w in model.head_terms(hidden))


def logits_of_theirs(model, family: str) -> torch.Tensor:
    sequences, pixels, grids = random_pictures(family)
    found = theirs_forward(model, family, sequences, pixels, grids)
    return torch.cat([found[i, : len(s)] for i, s in enumerate(sequences)])


def assert_same_logits(got, expected, exact, family: str) -> None:
    """The gated delta rule rounds more, here and there: with it, ours are as near to float64 as theirs."""
    if family in WITH_DEEPSTACK:
        assert (got - expected).abs().max() < 1e-5
    else:
        assert (got - exact).abs().max() < 1.5 * (expected - exact).abs().max() + 1e-5 < 1e-4


def test_logits_and_gradients_equal_transformers(case):
    family, theirs, directory = case
    ours = load_model(directory)
    got, expected = logits_of(ours, family), logits_of_theirs(theirs, family)
    with torch.no_grad():
        assert_same_logits(got, expected, logits_of(copy.deepcopy(ours).double(), family), family)
    weights = torch.randn(200, generator=torch.Generator().manual_seed(1))
    of_theirs = gradients(theirs, (expected.log_softmax(-1) * weights).sum())
    found = gradients(ours, (got.log_softmax(-1) * weights).sum())
    assert {file_name(n, ours.config) for n in found} == of_theirs.keys()
    for n, g in found.items():
        g_theirs = of_theirs[file_name(n, ours.config)]
        assert g_theirs.any() and (g - g_theirs).norm() <= 1e-4 * g_theirs.norm() + 1e-6, n


def test_text_alone_is_computed_as_transformers_computes_it(case):
    family, theirs, directory = case
    ours = load_model(directory)
    with torch.no_grad():
        exact = our_logits(copy.deepcopy(ours).double())
        assert_same_logits(our_logits(ours), their_logits(theirs)[0], exact, family)


@pytest.mark.parametrize("new", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_greedy_answers_equal_transformers(case, new):
    family, theirs, directory = case
    prompt = PAIRS[0][0]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt):]
    assert complete(load_model(directory), [prompt], Sampling(temperature=0, max_new_tokens=new))[0] == expected.tolist()


def test_a_batch_of_text_gives_every_parameter_a_gradient(case):
    """As DDP and FSDP expect; zero in the tower and its mergers."""
    family, _, directory = case
    ours = load_model(directory)
    ours(models.Stream(*stream(PAIRS))).logps.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    assert not any(p.grad.any() for n, p in ours.named_parameters() if ".vision." in n)


def test_blocks_that_keep_less_change_no_gradient(case):
    """DeepStack adds between the blocks, so recomputing one does not add twice."""
    family, _, directory = case
    model = load_model(directory, torch.float64)
    weights = torch.randn(200, dtype=torch.float64)
    run = lambda: gradients(model, (logits_of(model, family).log_softmax(-1) * weights).sum())
    expected = run()
    model.model.run_block = recompute
    assert_same_gradients(run(), expected, 1e-12)
    for module in model.model.layers.modules():
        remake_cheap_ones(module)
    model.model.run_block = keeping_less(keep_all, None)
    assert_same_gradients(run(), expected, 1e-12)


def test_deepstack_adds_where_the_pictures_are_and_after_the_first_layers_alone(tmp_path):
    """Layers 0 and 2 of the tower reach the outputs of layers 0 and 1 of the decoder, by the mergers listed for them."""
    make_checkpoint("qwen3_vl", tmp_path)
    model = load_model(tmp_path)
    added = {}

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, args, out, i=i: added.update({("out", i): out[0]}))
        layer.register_forward_pre_hook(lambda m, args, i=i: added.update({("in", i): args[0]}))
    sequences, pixels, grids = random_pictures("qwen3_vl")
    _, _, _, pictures = stream_of(sequences, pixels, grids, "qwen3_vl")
    with torch.no_grad():
        logits_of(model, "qwen3_vl")
        vision = model.model.vision
        _, kept = vision.tower(pixels, grids, keep_all)
        low, high = vision.projector.deep[1](kept[0]), vision.projector.deep[0](kept[2])
    for i, features in enumerate((low, high)):
        change = added["in", i + 1] - added["out", i]
        assert torch.allclose(change[pictures.place], features, atol=1e-5)
        change[pictures.place] = 0
        assert not change.any()


def test_the_pairs_of_dims_turn_with_time_height_and_width_in_turn():
    """As published: 24, 20 and 20 of 64 pairs, and Qwen3.5's 11, 11 and 10 of 32."""
    assert axis_of_pairs((24, 20, 20), True).tolist() == [0, 1, 2] * 20 + [0] * 4
    assert axis_of_pairs((11, 11, 10), True).tolist() == [0, 1, 2] * 10 + [0, 1]
    assert axis_of_pairs((16, 24, 24), False).tolist() == [0] * 16 + [1] * 24 + [2] * 24


def test_places_are_those_of_bilinear_interpolation_between_the_corners(tmp_path):
    make_checkpoint("qwen3_5", tmp_path)
    tower = load_model(tmp_path, torch.float64).model.vision.tower
    table = tower.pos_embed.weight.detach().T.view(1, -1, 5, 5)
    for h, w in ((6, 10), (2, 2), (4, 8)):
        image = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)[0]
        squares = image.view(-1, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).flatten(0, 3)
        assert (tower.positions([(h, w)]) - squares).abs().max() < 1e-6


# Files


def test_experts_are_read_either_way_round_and_saved_as_they_were_read(tmp_path):
    """Published files hold (in, out), those that transformers writes of a new model (out, in); it reads both."""
    theirs = make_checkpoint("qwen3_vl_moe", tmp_path / "a")
    state = load_file(tmp_path / "a/model.safetensors")
    turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in state.items()}
    (tmp_path / "b").mkdir()
    save_file(turned, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "b/config.json").write_bytes((tmp_path / "a/config.json").read_bytes())
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "b").eval()
    assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in again.named_parameters())
    plain, published = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert sum(".experts." in n for n in state) == 6
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), published.parameters(), strict=True))
    models.save_model(published, tmp_path / "c")
    after = load_file(tmp_path / "c/model.safetensors")
    assert after.keys() == turned.keys() and all(torch.equal(t, turned[n]) for n, t in after.items())


def test_a_stack_of_another_shape_is_refused(tmp_path):
    make_checkpoint("qwen3_vl_moe", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    save_file(state | {name: state[name][:, :-1].contiguous()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts.down_proj in .* is \(4, 31, 12\), config.json says"):
        load_model(tmp_path)


def published(kind: str, tied: bool, sizes: tuple, tower: tuple, **more) -> dict:
    """config.json of Qwen/Qwen3-VL-..., by the sizes in which they differ."""
    hidden, inner, layers, heads, kv_heads = sizes
    depth, width, inside, deep = tower
    vision = dict(
        deepstack_visual_indexes=deep, depth=depth, hidden_act="gelu_pytorch_tanh", hidden_size=width, in_channels=3,
        initializer_range=0.02, intermediate_size=inside, model_type=kind, num_heads=16, num_position_embeddings=2304,
        out_hidden_size=hidden, patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    text = dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=151643, dtype="bfloat16", eos_token_id=151645,
        head_dim=128, hidden_act="silu", hidden_size=hidden, initializer_range=0.02, intermediate_size=inner,
        max_position_embeddings=262144, model_type=f"{kind}_text", num_attention_heads=heads, num_hidden_layers=layers,
        num_key_value_heads=kv_heads, rms_norm_eps=1e-6, rope_theta=5000000, use_cache=True, vocab_size=151936,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"))
    return dict(
        image_token_id=151655, model_type=kind, text_config=text | more, tie_word_embeddings=tied, video_token_id=151656,
        vision_config=vision, vision_end_token_id=151653, vision_start_token_id=151652)


LARGE = (27, 1152, 4304, [8, 16, 24])
SMALL = (24, 1024, 4096, [5, 11, 17])
OF_EXPERTS = dict(decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
                  num_experts=128, num_experts_per_tok=8)


def names_of(raw: dict) -> list[str]:
    """The names in its index."""
    inside = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm "
              "input_layernorm post_attention_layernorm").split()
    sparse = "num_experts" in raw["text_config"]
    inside = [f"{n}.weight" for n in inside] + (
        ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if sparse else
        [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")])
    layers = raw["text_config"]["num_hidden_layers"]
    names = [f"model.language_model.layers.{i}.{n}" for i in range(layers) for n in inside]
    names += ["model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "model.visual.pos_embed.weight"]
    names += [] if raw["tie_word_embeddings"] else ["lm_head.weight"]
    blocks = [f"blocks.{i}.{n}" for i in range(raw["vision_config"]["depth"])
              for n in "attn.proj attn.qkv mlp.linear_fc1 mlp.linear_fc2 norm1 norm2".split()]
    mergers = [f"{m}.{n}" for m in ("merger", *(f"deepstack_merger_list.{i}" for i in range(3)))
               for n in ("linear_fc1", "linear_fc2", "norm")]
    return names + [f"model.visual.{n}.{kind}" for n in [*blocks, *mergers, "patch_embed.proj"] for kind in ("weight", "bias")]


@pytest.mark.parametrize("raw, parameters", [
    (published("qwen3_vl", True, (2048, 6144, 28, 16, 8), SMALL), 2_127_532_032),
    (published("qwen3_vl", True, (2560, 9728, 36, 32, 8), SMALL), 4_437_815_808),
    (published("qwen3_vl", False, (4096, 12288, 36, 32, 8), LARGE), 8_767_123_696),
    (published("qwen3_vl_moe", False, (2048, 6144, 48, 32, 4), LARGE, **OF_EXPERTS), 31_070_754_032)],
    ids=["2B", "4B", "8B", "30B-A3B"])
def test_published_files_name_every_parameter(raw, parameters):
    """As many as the hub says of Qwen/Qwen3-VL-2B-Instruct and its relatives."""
    config = models.read_config(raw)
    with torch.device("meta"):
        found = dict(build(config).named_parameters())
    names = names_of(raw)
    places = find_places(names, config)
    assert {p.name for p in places.values()} == found.keys() and not carried_names(names, config)
    assert {file_name(n, config) for n in found} == set(names) and len(places) == len(names)
    assert sum(p.numel() for p in found.values()) == parameters


@pytest.mark.parametrize("where, key, value, words", [
    ("vision_config", "deepstack_visual_indexes", [8, 16, 27], r"deepstack_visual_indexes = \[8, 16, 27\].*0 to 26"),
    ("vision_config", "deepstack_visual_indexes", [8, 8, 24], r"deepstack_visual_indexes = \[8, 8, 24\]"),
    ("vision_config", "num_position_embeddings", 2300, "num_position_embeddings = 2300.*a square"),
    ("vision_config", "window_size", 112, "window_size = 112"),
    ("text_config", "rope_scaling", dict(mrope_interleaved=False, mrope_section=[24, 20, 20]), "mrope_interleaved = False"),
    ("text_config", "rope_scaling", dict(mrope_section=[16, 24, 20]), r"mrope_section = \[16, 24, 20\].*60 .*64"),
    ("text_config", "norm_topk_prob", False, "norm_topk_prob = False"),
    ("text_config", "rope_scaling", dict(mrope_section=[64]), r"mrope_section = \[64\]")])
def test_settings_that_are_not_computed_are_refused(where, key, value, words):
    raw = published("qwen3_vl_moe", False, (2048, 6144, 48, 32, 4), LARGE, **OF_EXPERTS)
    raw[where] = raw[where] | {key: value}
    with pytest.raises(ValueError, match=words):
        models.read_config(raw)


# Adapters, and 4 bits


@pytest.mark.parametrize("targets", [["all-linear"], pytest.param(["q_proj", "linear_fc2"], marks=pytest.mark.slow)])
def test_adapters_carry_pefts_names_in_the_tower_too(case, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    family, theirs, directory = case
    ours = load_model(directory)
    put_lora(ours, 4, 1, 0.0, targets)
    randomize_lora(ours)
    save_adapter(ours, tmp_path / "a", dict(r=4, lora_alpha=1, lora_dropout=0.0, base_model_name_or_path="base"))
    load = lambda: transformers.AutoModelForImageTextToText.from_pretrained(directory)
    with torch.no_grad():
        expected = logits_of_theirs(peft.PeftModel.from_pretrained(load(), tmp_path / "a").eval(), family)
        assert_same_logits(logits_of(ours, family), expected, logits_of(copy.deepcopy(ours).double(), family), family)
    fresh = "all-linear" if targets == ["all-linear"] else targets
    fresh = peft.get_peft_model_state_dict(peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules=fresh)))
    assert load_file(tmp_path / "a/adapter_model.safetensors").keys() == {n for n in fresh if not ON_EXPERTS.search(n)}


def test_in_4_bits_the_weights_are_those_that_transformers_reads(tmp_path):
    """Those of tower and mergers too. On some CPUs bitsandbytes needs rows of 64 numbers, and rounds products to bfloat16."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    theirs = make_checkpoint("qwen3_vl", tmp_path / "a", hidden_size=64)
    ours = load_model(tmp_path / "a", four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None))
    models.save_model(ours, tmp_path / "b")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "b").eval()
    narrow = {n: m.weight for n, m in again.named_modules() if type(m).__name__ == "Linear4bit"}
    in_bits = {file_name(n, ours.config): m for n, m in ours.named_modules() if hasattr(m, "stored")}
    assert narrow.keys() == in_bits.keys()
    assert {"model.visual.deepstack_merger_list.1.linear_fc1", "model.visual.blocks.0.attn.qkv"} < narrow.keys()
    with torch.no_grad():
        for name, weight in narrow.items():
            wide = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(wide, in_bits[name].weight)
            theirs.get_submodule(name).weight.copy_(wide)
        got = logits_of(ours, "qwen3_vl")
        assert (got - logits_of_theirs(theirs, "qwen3_vl")).abs().max() < 1e-5
        assert torch.equal(logits_of(load_model(tmp_path / "b"), "qwen3_vl"), got)
