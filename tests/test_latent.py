# ruff: noqa: F811  pytest hands fixtures over by their names
"""Latent attention and routers with a correction bias: DeepSeek-V2 and V3, Kimi K2, GLM-4.5 to 4.7; see also test_families.py."""

import json
import re

import pytest
import torch
from conftest import make_rows
from safetensors.torch import load_file, save_file
from test_context import settings, train_here
from test_cuda import flash  # noqa: F401  a fixture
from test_families import CASES, LATENT, PAIRS, UNBALANCED, our_logits, peft_and_back, random_model, their_logits
from test_model import assert_same_gradients, gradients, stream
from test_ranks import apart, launch, ragged, result  # noqa: F401

import dpo
import model as models
from extras.decoder.generate import Sampling, complete
from extras.decoder.latent import LatentAttention
from extras.decoder.moe import GroupRouter
from extras.lora.targets import add_lora
from extras.models.opening import build, load_model
from parts.names import find_places

transformers = pytest.importorskip("transformers", reason="needs transformers")

BIAS = "e_score_correction_bias"
YARN = dict(beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096, type="yarn")
DEEPSEEK = dict(
    architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, ep_size=1, hidden_act="silu",
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_layer_freq=1, norm_topk_prob=True,
    scoring_func="sigmoid", seq_aux=True, aux_loss_alpha=0.001, topk_method="noaux_tc", tie_word_embeddings=False,
    n_group=1, topk_group=1, torch_dtype="bfloat16", use_cache=True)
GLM = dict(
    attention_dropout=0.0, hidden_act="silu", n_group=1, topk_group=1, n_shared_experts=1, norm_topk_prob=True,
    num_nextn_predict_layers=1, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000, tie_word_embeddings=False, use_cache=True)
# config.json as published, without what says how it is quantized
PUBLISHED = {
    "DeepSeek-V3": DEEPSEEK | dict(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256,
        num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=3, q_lora_rank=1536, routed_scaling_factor=2.5,
        max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000, rope_scaling=YARN | dict(factor=40),
        num_nextn_predict_layers=1),
    "Kimi-K2-Instruct": DEEPSEEK | dict(
        model_type="kimi_k2", vocab_size=163840, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=64, num_key_value_heads=64, n_shared_experts=1, n_routed_experts=384,
        num_experts_per_tok=8, first_k_dense_replace=1, q_lora_rank=1536, routed_scaling_factor=2.827,
        max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=50000.0, num_nextn_predict_layers=0,
        rope_scaling=YARN | dict(factor=32.0, beta_fast=1.0, beta_slow=1.0)),
    "Moonlight-16B-A3B-Instruct": DEEPSEEK | dict(
        model_type="deepseek_v3", vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None, routed_scaling_factor=2.446,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=50000.0, num_nextn_predict_layers=0, pretraining_tp=1),
    "DeepSeek-V2-Lite-Chat": DEEPSEEK | dict(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None, routed_scaling_factor=1.0, scoring_func="softmax",
        topk_method="greedy", norm_topk_prob=False, max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000,
        rope_scaling=YARN | dict(factor=40, mscale=0.707, mscale_all_dim=0.707),
        auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}),
    "GLM-4.5-Air": GLM | dict(
        model_type="glm4_moe", attention_bias=True, head_dim=128, hidden_size=4096, intermediate_size=10944,
        moe_intermediate_size=1408, num_attention_heads=96, num_key_value_heads=8, n_routed_experts=128, num_experts_per_tok=8,
        num_hidden_layers=46, first_k_dense_replace=1, max_position_embeddings=131072, partial_rotary_factor=0.5,
        routed_scaling_factor=1.0, use_qk_norm=False, vocab_size=151552),
    "GLM-4.5": GLM | dict(
        model_type="glm4_moe", attention_bias=True, head_dim=128, hidden_size=5120, intermediate_size=12288,
        moe_intermediate_size=1536, num_attention_heads=96, num_key_value_heads=8, n_routed_experts=160, num_experts_per_tok=8,
        num_hidden_layers=92, first_k_dense_replace=3, max_position_embeddings=131072, partial_rotary_factor=0.5,
        routed_scaling_factor=2.5, use_qk_norm=True, vocab_size=151552),
    "GLM-4.7-Flash": GLM | dict(
        model_type="glm4_moe_lite", attention_bias=False, hidden_size=2048, intermediate_size=10240, moe_intermediate_size=1536,
        num_attention_heads=20, num_key_value_heads=20, n_routed_experts=64, num_experts_per_tok=4, num_hidden_layers=47,
        first_k_dense_replace=1, max_position_embeddings=202752, partial_rotary_factor=1.0, routed_scaling_factor=1.8,
        topk_method="noaux_tc", q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        vocab_size=154880),
}
# values and tensors of the files, of those where a count is published, with the further layers; DeepSeek-V3's without scales
COUNTS = {"DeepSeek-V3": (684_489_845_504, None), "DeepSeek-V2-Lite-Chat": (15_706_484_224, None),
          "GLM-4.5-Air": (110_468_824_832, None), "GLM-4.5": (358_337_791_296, None), "GLM-4.7-Flash": (31_221_488_576, 9703)}


def bare(config) -> models.Decoder:
    with torch.device("meta"):
        return build(config)


def further_layer(model: models.Decoder) -> dict[str, torch.Tensor]:
    """{name: tensor} of the layer that predicts one more token, as the files have it beside the model's."""
    c = model.config
    last, new = (f"model.layers.{i}." for i in (c.num_hidden_layers - 1, c.num_hidden_layers))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = {n.replace(last, new): t.detach().clone() for n, t in tensors if n.startswith(last)}
    shapes = {"embed_tokens": (c.vocab_size, c.hidden_size), "shared_head.head": (c.vocab_size, c.hidden_size),
              "shared_head.norm": (c.hidden_size,), "eh_proj": (c.hidden_size, 2 * c.hidden_size),
              "enorm": (c.hidden_size,), "hnorm": (c.hidden_size,)}
    device = next(model.parameters()).device
    return found | {f"{new}{n}.weight": torch.ones(shape, device=device) for n, shape in shapes.items()}


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe", "glm4_moe_lite", "deepseek_v2"])
def case(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = random_model(request.param)
    theirs.save_pretrained(directory)
    return request.param, theirs, directory


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """transformers' model, and its checkpoint."""
    directory = tmp_path_factory.mktemp("deepseek")
    theirs = random_model("deepseek_v3")
    theirs.save_pretrained(directory)
    return theirs, directory


# The router


def router(**changes) -> GroupRouter:
    moe = dict(experts=6, per_token=2, normalize=True, groups=3, groups_kept=2, scale=2.0, scores="sigmoid") | changes
    torch.manual_seed(0)
    made = GroupRouter(8, moe).double()
    torch.nn.init.normal_(made.weight)
    return made


def test_the_router_by_hand():
    """The bias decides who is chosen, within the best groups; the weights do not know it."""
    made = router()
    logits = torch.tensor([[0.0, 0.1, 3.0, -3.0, 1.0, 0.9]]).double()
    _, weights, chosen = made.route(logits)
    # groups by the sum of their sigmoids: (0.5 + 0.525), (0.953 + 0.047), (0.731 + 0.711): the second is out, its best too
    assert sorted(chosen[0].tolist()) == [4, 5]
    a, b = torch.sigmoid(logits[0, chosen[0]])
    assert torch.allclose(weights[0], 2 * torch.stack([a, b]) / (a + b), atol=1e-12)
    made.e_score_correction_bias += torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    _, weights, chosen = made.route(logits)
    assert sorted(chosen[0].tolist()) == [1, 4]
    scores = torch.sigmoid(logits[0, chosen[0]])
    assert torch.allclose(weights[0], 2 * scores / scores.sum(), atol=1e-12)


def test_softmax_scores_choose_groups_by_their_best():
    made = router(scores="softmax", normalize=False, groups_kept=1)
    logits = torch.tensor([[1.0, 1.0, 2.0, -9.0, 0.0, 0.0]]).double()
    _, weights, chosen = made.route(logits)
    assert sorted(chosen[0].tolist()) == [2, 3]
    assert torch.allclose(weights[0], 2 * logits.softmax(-1)[0, chosen[0]], atol=1e-12)


def test_the_routers_gradient_is_that_of_the_weights_alone():
    made = router()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(made, {"weight": w}, (x,))[1], (x, made.weight))
    assert not made.e_score_correction_bias.requires_grad


def test_logits_of_routers_are_float32_under_autocast(deepseek):
    """A choice between two experts may hang on the last digits."""
    ours = models.load_model(deepseek[1])
    gate = ours.model.layers[1].mlp.gate
    x = torch.randn(7, 32)
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, chosen = gate(x)
    assert torch.equal(logits, expected[0]) and torch.equal(weights, expected[1]) and torch.equal(chosen, expected[2])


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.half().float()])
def test_the_bias_keeps_the_type_of_the_files(change, deepseek):
    ours = models.load_model(deepseek[1], torch.bfloat16)
    name = f"model.layers.1.mlp.gate.{BIAS}"
    before = ours.get_buffer(name).clone()
    assert before.dtype == torch.float32 and not torch.equal(before, before.bfloat16().float())
    change(ours)
    assert torch.equal(ours.get_buffer(name), before) and ours.get_buffer(name).dtype == torch.float32


# What is saved as it was read


def with_further_layer(directory, out) -> dict[str, torch.Tensor]:
    """The checkpoint with a layer that predicts one more token; returns that layer's tensors."""
    more = further_layer(models.load_model(directory))
    more = {n: t + torch.randn_like(t) for n, t in more.items()}
    out.mkdir(exist_ok=True)
    save_file(load_file(directory / "model.safetensors") | more, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((directory / "config.json").read_text())
    return more


def test_biases_and_further_layers_are_saved_as_they_were_read(deepseek, with_tokenizer, tmp_path, capsys):
    """Through a run of two steps from the command line, which says so, in bfloat16 beside float32 biases."""
    more = with_further_layer(deepseek[1], tmp_path / "model")
    assert f"model.layers.3.mlp.gate.{BIAS}" in more and len(more) == 25
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((with_tokenizer / file).read_bytes())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8, seed=1)), encoding="utf-8")
    flags = f"""--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/pairs.jsonl --output_dir {tmp_path}/out
        --cache_dir {tmp_path}/cache --max_steps 2 --learning_rate 1e-2 --save_dtype bfloat16"""
    assert dpo.main([*flags.split()]) == 0
    assert f"the correction biases of 2 routers ({BIAS}) are held fixed, and saved as they were read" in capsys.readouterr().out
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("model", "out"))
    assert before.keys() == after.keys()
    kept = {n for n in before if n.startswith("model.layers.3.") or n.endswith(BIAS)}
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == torch.float32 for n in kept)
    changed = {n for n in before.keys() - kept if not torch.equal(before[n].bfloat16(), after[n])}
    assert len(changed) > 0.9 * (len(before) - len(kept))
    assert all(after[n].dtype == torch.bfloat16 for n in before.keys() - kept)


def test_transformers_reads_a_saved_model_with_a_further_layer(deepseek, tmp_path):
    with_further_layer(deepseek[1], tmp_path / "a")
    models.save_model(models.load_model(tmp_path / "a"), tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(their_logits(again)[0], their_logits(deepseek[0])[0])


def test_a_layer_beyond_those_that_config_json_names_is_refused(deepseek, tmp_path):
    with_further_layer(deepseek[1], tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | dict(num_nextn_predict_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"unexpected model.layers.3"):
        models.load_model(tmp_path)


@pytest.mark.parametrize("spoil, message", [
    (lambda s, n: s.pop(n), f"{BIAS}: missing; config.json says .6,."),
    (lambda s, n: s.update({n: torch.zeros(5)}), f"{BIAS}: .5,. of torch.float32; config.json says .6,."),
    (lambda s, n: s.update({n: torch.zeros(6, dtype=torch.int32)}), f"{BIAS}: .6,. of torch.int32; config.json says .6,.")])
def test_a_bias_that_does_not_fit_is_named(spoil, message, deepseek, tmp_path):
    state = load_file(deepseek[1] / "model.safetensors")
    spoil(state, f"model.layers.2.mlp.gate.{BIAS}")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((deepseek[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        models.load_model(tmp_path)


def test_a_model_made_from_nothing_is_saved_with_its_biases(deepseek, tmp_path):
    loaded = models.load_model(deepseek[1])
    model = models.Decoder(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.raw_config = loaded.raw_config
    models.save_model(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(our_logits(models.load_model(tmp_path)), our_logits(loaded))


# Attention


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3 ungrouped", "glm4_moe_lite"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_flash_path_equals_the_plain_path(name, shared, tmp_path, request):
    """float64, values and gradients of all parameters, with values narrower and wider than queries, and as wide; its
    kernel takes one size of heads."""
    random_model(name).save_pretrained(tmp_path)
    model = models.load_model(tmp_path, torch.float64)
    weights = torch.randn(len(stream(PAIRS)[4])).double()
    logps = model(models.Stream(*stream(PAIRS, shared))).logps
    expected = gradients(model, (logps * weights).sum())
    request.getfixturevalue("flash")
    fast = model(models.Stream(*stream(PAIRS, shared))).logps
    assert (fast - logps).abs().max() < 1e-10
    assert_same_gradients(gradients(model, (fast * weights).sum()), expected, 1e-10)


def test_answers_on_the_flash_path_are_those_of_the_plain_path(deepseek, request):
    model = models.load_model(deepseek[1], torch.float64)
    options = Sampling(temperature=0, max_new_tokens=12)
    prompts = [list(PAIRS[0][0]), list(PAIRS[2][0])]
    expected = complete(model, prompts, options, samples=2)
    request.getfixturevalue("flash")
    assert complete(model, prompts, options, samples=2) == expected


def test_norms_within_attention_have_an_epsilon_of_their_own(deepseek):
    """1e-6, whatever config.json says of the others: transformers' are made so."""
    raw = json.loads((deepseek[1] / "config.json").read_text()) | dict(rms_norm_eps=0.25)
    layer = bare(models.read_config(raw)).model.layers[0]
    assert layer.input_layernorm.eps == 0.25
    assert layer.self_attn.q_a_layernorm.eps == layer.self_attn.kv_a_layernorm.eps == 1e-6


# LoRA, 4 bits


@pytest.mark.parametrize("settings", [
    {},
    dict(target_modules=["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    dict(target_modules=["kv_b_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"]),
    dict(target_modules=["q_a_proj", "gate_proj", "up_proj", "down_proj"])], ids=str)
def test_adapters_go_to_peft_and_back(settings, deepseek, tmp_path):
    """On what PEFT takes them for: gate_proj, up_proj and down_proj are the routed experts'."""
    ours = models.load_model(deepseek[1])
    wrapped = add_lora(ours, dict(r=2, lora_alpha=4, lora_dropout=0.0) | settings)
    if not settings:
        assert {n.rpartition(".")[2] for n in wrapped} == {"q_b_proj", "kv_b_proj"}
        settings = dict(target_modules=["q_b_proj", "kv_b_proj"])
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(deepseek[1])
    there, changed, back = peft_and_back(ours, load, settings, tmp_path)
    assert there < 2e-5 < 1e-3 < changed and back < 2e-5


def test_4_bits_are_the_wide_model_with_these_weights(case, tmp_path):
    """Routers and biases stay; what is written is read back to the same numbers."""
    from extras.models import nf4

    name, _, directory = case
    narrow = load_model(directory, four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None))
    plain = models.load_model(directory)
    assert len([n for n, _ in narrow.named_modules() if n.endswith(("kv_b_proj", "k_proj"))]) == 3
    biases = [n for n, _ in plain.named_buffers()]
    assert bool(biases) == (name != "deepseek_v2")
    assert all(torch.equal(narrow.get_buffer(n), plain.get_buffer(n)) for n in biases)
    with torch.no_grad():
        got = our_logits(narrow)
        models.save_model(narrow, tmp_path / "narrow")
        again = our_logits(load_model(tmp_path / "narrow"))
        nf4.dequantize_linears(narrow, torch.float32)
        assert (got - our_logits(narrow)).abs().max() < 1e-5 and torch.equal(got, again)
        assert (got - our_logits(plain)).abs().max() > 1e-3


# Ranks


@pytest.fixture(scope="module")
def with_tokenizer(deepseek, tiny, tmp_path_factory):
    """The checkpoint as a run takes it."""
    directory = tmp_path_factory.mktemp("with_tokenizer")
    for home, files in ((deepseek[1], ("model.safetensors", "config.json")), (tiny, ("tokenizer.json", "tokenizer_config.json"))):
        for file in files:
            (directory / file).write_bytes((home / file).read_bytes())
    return directory


def test_two_ranks_equal_one_however_they_share(with_tokenizer, ragged, tmp_path):
    """DDP, --fsdp, and streams shared by --context_parallel_size: experts without a balancing loss see tokens one by one."""
    kinds = {"DDP": {}, "FSDP": dict(fsdp="full_shard"), "streams": dict(context_parallel_size=2)}
    options = lambda name, ranks, **more: settings(
        with_tokenizer, ragged, tmp_path, name, ranks, more.pop("context_parallel_size", 1), dtype="float64", **more)
    train_here(options("one", 1))
    launch([options(name, 2, **more) for name, more in kinds.items()], 2, tmp_path)
    for name in kinds:
        loss, weight = apart(result(tmp_path, "one"), result(tmp_path, name))
        print(f"{name}: losses {loss:.1e}  weights {weight:.1e}")
        assert loss < 1e-9 and weight < 1e-9


# config.json


LARGE = ("GLM-4.5", "Kimi-K2-Instruct")  # beside their smaller relatives


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in PUBLISHED])
def test_published_sizes_and_names(name):
    """Parameters, tensors and their names as the published files have them; what is read is what transformers reads."""
    raw = PUBLISHED[name]
    config = models.read_config(raw)
    model = bare(config)
    c = config.latent
    more = further_layer(model) if raw.get("num_nextn_predict_layers") else {}
    own = [*model.named_parameters(), *model.named_buffers()]
    size, count = COUNTS.get(name, (None, None))
    assert size is None or sum(t.numel() for _, t in own) + sum(t.numel() for t in more.values()) == size
    experts = config.moe["experts"]
    names = set()
    for n in [n for n, _ in own] + list(more):
        stack = re.match(r"(.*\.experts\.)(gate_up_proj|down_proj)$", n)
        kinds = () if stack is None else ("gate_proj", "up_proj") if stack[2] == "gate_up_proj" else ("down_proj",)
        names |= {f"{stack[1]}{e}.{kind}.weight" for e in range(experts) for kind in kinds} or {n}
    assert count is None or len(names) == count
    places = find_places(names, config)
    assert {p.name for p in places.values()} == {n for n, _ in model.named_parameters()}
    assert names - places.keys() == {n for n in names if f".layers.{config.num_hidden_layers}." in n or n.endswith(BIAS)}
    model_type = raw["model_type"].replace("kimi_k2", "deepseek_v3")
    theirs = transformers.AutoConfig.for_model(model_type, **{k: v for k, v in raw.items() if k not in ("auto_map", "model_type")})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(theirs)
    attention = theirs.model.layers[0].self_attn
    assert config.attention_scale == pytest.approx(attention.scaling)
    rope = config.ropes["full_attention"]
    rotary = type(theirs.model.rotary_emb)(theirs.config)
    assert torch.allclose(torch.tensor(rope.frequencies), rotary.inv_freq, rtol=1e-6, atol=0)
    assert rope.factor == pytest.approx(rotary.attention_scaling)
    assert c is None or config.head_dim == max(attention.qk_head_dim, attention.v_head_dim)
    expected = {n: tuple(p.shape) for n, p in theirs.state_dict().items()}
    assert {n: tuple(t.shape) for n, t in own} == expected


@pytest.mark.parametrize("change, message", [
    (dict(num_key_value_heads=2), "num_key_value_heads = 2, but latent attention has keys and values for each of its 4 heads"),
    (dict(n_group=4), "n_routed_experts = 6 in n_group = 4, of which topk_group = 2: no such division"),
    (dict(n_group=6), "n_routed_experts = 6 in n_group = 6"),
    (dict(topk_group=4), "of which topk_group = 4: no such division"),
    (dict(num_experts_per_tok=5), "num_experts_per_tok = 5 of 4 experts in topk_group = 2 groups"),
    (dict(scoring_func="softmax"), "scoring_func = 'softmax' is not supported"),
    (dict(topk_method="greedy"), "topk_method = 'greedy' is not supported"),
    (dict(rope_interleave=False), "rope_interleave = False is not supported"),
    (dict(moe_layer_freq=2), "moe_layer_freq = 2 is not supported"),
    (dict(kv_lora_rank=0), "kv_lora_rank = 0: expected a whole number"),
    (dict(kv_lora_rank=None), "kv_lora_rank: missing"),
    (dict(v_head_dim="x"), "v_head_dim = 'x': expected a whole number"),
    (dict(routed_scaling_factor=None), "routed_scaling_factor = None: expected a number above 0"),
    (dict(model_type="deepseek_v2", norm_topk_prob=True, topk_method="greedy"), "norm_topk_prob = True is not supported"),
    (dict(model_type="deepseek_v2", topk_method="noaux_tc", norm_topk_prob=False), "topk_method = 'noaux_tc' is not supported"),
    (dict(model_type="glm4_moe_lite", mlp_layer_types=["sparse"]), "mlp_layer_types names 1 layers of 3"),
    (dict(auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}), "auto_map names code of its own"),
    (dict(index_topk=2048), "index_topk = 2048: not understood")], ids=str)
def test_numbers_that_no_model_computes_with_are_refused_by_name(change, message):
    raw = LATENT | dict(model_type="deepseek_v3", rms_norm_eps=1e-6)
    assert models.read_config(raw).latent["latent"] == 16
    with pytest.raises(ValueError, match=message):
        models.read_config(raw | change)


def test_a_balancing_loss_is_refused_where_the_family_has_none(with_tokenizer, pairs_file, tmp_path, capsys):
    flags = ["--model_name_or_path", str(with_tokenizer), "--dataset_name", str(pairs_file), "--output_dir", str(tmp_path / "o"),
             "--cache_dir", str(tmp_path / "c"), "--router_aux_loss_coef", "0.1"]
    assert dpo.main(flags) == 2
    assert "--router_aux_loss_coef 0.1: deepseek_v3 models have no load-balancing loss here" in capsys.readouterr().err


def test_every_case_here_has_the_seam_that_it_is_meant_for():
    for name in (n for n in UNBALANCED if not n.startswith(("llama4", "nemotron"))):  # another router, another block
        config = models.read_config(random_model(name).config.to_dict())
        layer = bare(config).model.layers[2]
        assert isinstance(layer.self_attn, LatentAttention) == (CASES[name][0] != "glm4_moe")
        assert isinstance(layer.mlp.gate, GroupRouter)
