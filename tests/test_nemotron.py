"""Nemotron-H: layers that are a Mamba-2 mixer, attention, an MLP or experts, with one residual each; see also test_families.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import FULL, our_logits, peft_and_back, random_model, their_logits
from test_gated_delta import GREEDY, alone
from test_mamba import assert_same_tensors
from test_model import randomize_lora

import model as models
from extras.decoder.generate import complete
from extras.decoder.mixers import attends, recurs
from extras.lora.merging import merge_lora
from extras.lora.peft_files import adapter_tensors
from extras.lora.targets import add_lora
from extras.models.nf4 import dequantize_linears
from extras.models.opening import load_model
from extras.run import forecast
from parts.names import find_places

transformers = pytest.importorskip("transformers", reason="needs transformers")

DENSE = dict(  # as Nemotron-H 8B was published
    architectures=["NemotronHForCausalLM"], attention_bias=False, attention_dropout=0.0, attention_head_dim=128,
    auto_map={"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}, chunk_size=128, conv_kernel=4, expand=2,
    hidden_dropout=0.0, hidden_size=4096, hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    intermediate_size=21504, layer_norm_epsilon=1e-5, mamba_head_dim=64, mamba_hidden_act="silu", mamba_num_heads=128,
    mamba_proj_bias=False, max_position_embeddings=8192, mlp_bias=False, mlp_hidden_act="relu2", model_type="nemotron_h",
    n_groups=8, num_attention_heads=32, num_hidden_layers=52, num_key_value_heads=8, num_logits_to_keep=1,
    rescale_prenorm_residual=True, residual_in_fp32=False, rms_norm_eps=1e-5, sliding_window=None, ssm_state_size=128,
    tie_word_embeddings=False, time_step_floor=1e-4, time_step_limit=[0.0, float("inf")], time_step_max=0.1,
    time_step_min=0.001, time_step_rank=256, use_bias=False, use_conv_bias=True, use_mamba_kernels=True, vocab_size=131072)
EXPERTS = {k: v for k, v in DENSE.items() if k not in ("attention_head_dim", "rms_norm_eps", "time_step_limit", "time_step_rank")} | dict(
    head_dim=128, hidden_size=2688, hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    intermediate_size=1856, mamba_num_heads=64, mamba_ssm_cache_dtype="float32", max_position_embeddings=262144,
    moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, n_group=1, n_routed_experts=128, n_shared_experts=1,
    norm_eps=1e-5, norm_topk_prob=True, num_experts_per_tok=6, num_key_value_heads=2, partial_rotary_factor=1.0,
    rope_theta=10000, routed_scaling_factor=2.5, topk_group=1)
# name -> (config.json, layers of each kind, billions of parameters as its card says)
PUBLISHED = {
    "Nemotron-H-8B-Base-8K": (DENSE, "24M 4* 24-", "8.1"),
    "Nemotron-Nano-9B-v2": (DENSE | dict(
        hidden_size=4480, hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", num_hidden_layers=56,
        intermediate_size=15680, mamba_head_dim=80, num_attention_heads=40, max_position_embeddings=131072), "27M 4* 25-", "8.9"),
    "Nemotron-Nano-12B-v2": (DENSE | dict(
        hidden_size=5120, hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        num_hidden_layers=62, intermediate_size=20480, mamba_head_dim=80, num_attention_heads=40), "28M 6* 28-", "12.3"),
    "Nemotron-3-Nano-30B-A3B": (EXPERTS, "23M 6* 23E", "31.6"),
    "Nemotron-3-Super-120B-A12B": (EXPERTS | dict(  # its layers in another order
        hidden_size=4096, hybrid_override_pattern="MEMEM*EMEME" * 8, num_hidden_layers=88, mamba_num_heads=128, n_routed_experts=512,
        num_experts_per_tok=22, moe_intermediate_size=2688, moe_latent_size=1024, moe_shared_expert_intermediate_size=5376,
        routed_scaling_factor=5.0, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E"), "40M 8* 40E", "120")}
SPARSE = "nemotron_h_experts"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    theirs = random_model(SPARSE)
    directory = tmp_path_factory.mktemp("nemotron")
    theirs.save_pretrained(directory)
    return theirs, directory


# config.json


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_make_the_tensors_of_transformers(name):
    raw, kinds, billions = PUBLISHED[name]
    config = models.read_config(raw)
    pattern = raw["hybrid_override_pattern"]
    assert kinds == " ".join(f"{pattern.count(kind)}{kind}" for kind in "M*-E" if kind in pattern)
    assert recurs(config) == tuple(kind == "M" for kind in pattern)
    assert attends(config) == tuple(kind == "*" for kind in pattern)
    assert (config.moe["sparse"] if "E" in pattern else ()) == tuple(kind == "E" for kind in pattern if "E" in pattern)
    assert config.rope_layers == (None,) * len(pattern) and config.mixer["dt_limit"] == (0.0, float("inf"))
    assert str(round(assert_same_tensors(raw) / 1e9, 1)).startswith(billions)


def test_of_the_experts_as_many_are_active_as_the_cards_say():
    """3.6 of 31.6 billion, and 12 of 120: embedding and head are among them."""
    for name, active in {"Nemotron-3-Nano-30B-A3B": "3.6", "Nemotron-3-Super-120B-A12B": "12."}.items():
        config = models.read_config(PUBLISHED[name][0])
        ends = 2 * config.vocab_size * config.hidden_size
        assert str(round((forecast.count(config, forecast.Run(1, 1))["matrices"] + ends) / 1e9, 1)).startswith(active), name


def test_published_names_are_those_of_the_parameters():
    names = ["backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.A_log",
             "backbone.layers.1.mixer.experts.7.up_proj.weight", "backbone.layers.1.mixer.shared_experts.down_proj.weight",
             "backbone.layers.1.mixer.gate.weight", "backbone.layers.5.mixer.v_proj.weight", "backbone.layers.5.norm.weight",
             "backbone.norm_f.weight", "lm_head.weight"]
    carried = ["backbone.layers.1.mixer.gate.e_score_correction_bias", "mtp.layers.0.enorm.weight",
               "mtp.layers.1.mixer.experts.0.up_proj.weight"]
    config = models.read_config(EXPERTS)
    with torch.device("meta"):
        own = dict(models.Decoder(config).named_parameters())
    places = find_places(names + carried, config)
    assert list(places) == names
    shapes = [tuple(place.view(own[place.name]).shape) for place in places.values()]
    assert shapes == [(131072, 2688), (10304, 2688), (64,), (1856, 2688), (2688, 3712), (128, 2688), (256, 2688), (2688,),
                      (2688,), (131072, 2688)]


def test_every_spelling_means_the_same():
    """Of the layers, as the first files have them, as transformers 5 writes them, and as it wrote them before."""
    pattern = DENSE["hybrid_override_pattern"]
    without = {k: v for k, v in DENSE.items() if k not in ("hybrid_override_pattern", "num_hidden_layers")}
    expected = models.read_config(DENSE)
    for words in (dict(zip("M*-", ("linear_attention", "full_attention", "mlp"))), dict(zip("M*-", ("mamba", "attention", "mlp")))):
        for key in ("layers_block_type", "layer_types"):
            assert models.read_config(without | {key: [words[kind] for kind in pattern]}) == expected
    respelled = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "time_step_limit": "mamba_dt_limit",
                 "use_conv_bias": "mamba_conv_bias", "chunk_size": "mamba_chunk_size", "expand": "mamba_expand",
                 "layer_norm_epsilon": "norm_eps", "attention_head_dim": "head_dim"}
    assert models.read_config({respelled.get(k, k): v for k, v in DENSE.items()}) == expected
    unsaid = {k: v for k, v in DENSE.items() if k not in ("attention_head_dim", "time_step_limit", "rms_norm_eps")}
    assert models.read_config(unsaid) == expected
    assert models.read_config(DENSE | dict(n_routed_experts=0, moe_latent_size=None)) == expected


def test_what_transformers_writes_is_what_the_first_files_say(sparse):
    written = json.loads((sparse[1] / "config.json").read_text())
    letters = {"linear_attention": "M", FULL: "*", "mlp": "-", "moe": "E"}
    pattern = "".join(letters[kind] for kind in written.pop("layers_block_type"))
    assert models.read_config(written | dict(hybrid_override_pattern=pattern)) == models.load_model(sparse[1]).config


@pytest.mark.parametrize("change, message", [
    (dict(hybrid_override_pattern="M-X"), "names X; known are M"), (dict(hybrid_override_pattern=""), "names no layer"),
    (dict(hybrid_override_pattern=None), "names no layer"), (dict(hybrid_override_pattern=["mamba", 5]), "names 5"),
    (dict(layers_block_type=["mamba"] * 52), "hybrid_override_pattern|layers_block_type = .* another name of it says"),
    (dict(num_hidden_layers=51), "layer_types names 52 layers of 51"), (dict(norm_eps=1e-6), "norm_eps = 1e-06, but another name"),
    (dict(head_dim=64), "head_dim = .*, but another name of it says"), (dict(attention_bias=True), "attention_bias = True is not"),
    (dict(use_bias=True), "use_bias = True is not supported"), (dict(sliding_window=128), "sliding_window = 128 is not supported"),
    (dict(mamba_hidden_act="gelu"), "mamba_hidden_act = 'gelu' is not supported"), (dict(mlp_hidden_act="relu3"), "hidden_act = 'relu3'"),
    (dict(mamba_num_heads=12), "12 mamba_n_heads of 64 in 8 mamba_n_groups"), (dict(rotary_dim=3), "rotary_dim = 3: not understood"),
    (dict(conv_kernel=None), "mamba_d_conv = None: expected a whole number"), (dict(ssm_state_size=None), "mamba_d_state = None"),
    (dict(time_step_limit=[0.1]), "time_step_limit = .0.1.: expected two numbers")])
def test_a_value_without_a_meaning_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(DENSE | change)


@pytest.mark.parametrize("change, message", [
    (dict(n_routed_experts=0), "n_routed_experts = 0: expected"), (dict(n_shared_experts=2), "n_shared_experts = 2 is not"),
    (dict(num_experts_per_tok=129), "num_experts_per_tok = 129 of 128"), (dict(moe_latent_size=0), "moe_latent_size = 0: expected"),
    (dict(n_group=3), "n_group = 3"), (dict(moe_shared_expert_intermediate_size=None), "moe_shared_expert_intermediate_size")])
def test_experts_that_cannot_be_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(EXPERTS | change)


# Values


@pytest.mark.parametrize("limit", [None, [0.0, 0.3], [0.2, 0.4]], ids=str)
def test_time_steps_are_limited_as_the_file_says(limit, tmp_path):
    """Falls the day transformers mends it (huggingface/transformers#48989): for the limit it takes time_step_min, by which
    parameters were drawn. Given the file's own limit, it computes what we do."""
    limits = {} if limit is None else dict(time_step_limit=limit)
    theirs = random_model("nemotron_h", time_step_min=0.15, **limits)
    theirs.save_pretrained(tmp_path)
    ours = models.load_model(tmp_path)
    assert ours.config.mixer["dt_limit"] == tuple(limit or (0.0, float("inf")))
    with torch.no_grad():
        got, wrong = our_logits(ours), their_logits(theirs)[0]
        for mixer in theirs.modules():
            if hasattr(mixer, "time_step_limit"):
                assert mixer.time_step_limit == (0.15, float("inf"))
                mixer.time_step_limit = ours.config.mixer["dt_limit"]
        assert (got - their_logits(theirs)[0]).abs().max() < 1e-5 < 1e-2 < (got - wrong).abs().max()


@pytest.mark.parametrize("name", ["nemotron_h", SPARSE])
def test_samples_of_a_prompt_go_on_from_its_state(name, tmp_path):
    """Several prompts, several samples of each: all as if each sequence were read alone."""
    random_model(name).save_pretrained(tmp_path)
    model = models.load_model(tmp_path, torch.float64)
    prompts = [[5, 17, 3, 42, 8, 11, 29], [9], [4, 4, 30, 2]]
    with torch.no_grad():
        expected = [alone(model, prompt) for prompt in prompts]
    assert complete(model, prompts, GREEDY, samples=2) == [e for e in expected for _ in range(2)]


def test_layers_that_predict_several_tokens_are_saved_as_they_were(sparse, tmp_path):
    state = load_file(sparse[1] / "model.safetensors")
    extra = {"mtp.layers.0.eh_proj.weight": torch.randn(32, 64), "mtp.layers.1.mixer.gate.e_score_correction_bias": torch.randn(6)}
    save_file(state | extra, tmp_path / "model.safetensors")
    raw = json.loads((sparse[1] / "config.json").read_text()) | dict(num_nextn_predict_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = models.load_model(tmp_path)
    models.save_model(ours, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == (state | extra).keys() and all(torch.equal(again[n], t) for n, t in (state | extra).items())


# LoRA


STACKS = ["mixer.experts.up_proj", "mixer.experts.down_proj"]


@pytest.mark.parametrize("settings", [
    {}, dict(target_modules=["in_proj", "o_proj", "up_proj"]), dict(target_modules=["q_proj"], target_parameters=STACKS),
    dict(target_modules=["q_proj"], target_parameters=["gate.weight", "experts.up_proj"])], ids=str)
def test_adapters_go_to_peft_and_back(settings, sparse, tmp_path):
    """up_proj and down_proj are the linear layers of MLPs and shared experts, never the routed ones, which PEFT names otherwise."""
    ours = models.load_model(sparse[1])
    wrapped = add_lora(ours, dict(r=2, lora_alpha=4, lora_dropout=0.0) | settings)
    if not settings:
        usual = pytest.importorskip("peft").utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["nemotron_h"]
        assert {n.rpartition(".")[2] for n in wrapped} == {*usual}
        settings = dict(target_modules=usual)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(sparse[1], experts_implementation="eager")
    there, changed, back = peft_and_back(ours, load, settings, tmp_path)
    assert there < 2e-5 < 1e-3 < changed and back < 2e-5


def test_a_lora_on_experts_is_merged(sparse, tmp_path):
    ours = models.load_model(sparse[1])
    add_lora(ours, dict(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["in_proj"], target_parameters=STACKS))
    randomize_lora(ours)
    with torch.no_grad():
        expected = our_logits(ours)
        merge_lora(ours)
        models.save_model(ours, tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert (their_logits(again)[0] - expected).abs().max() < 1e-5 < 1e-2 < (their_logits(sparse[0])[0] - expected).abs().max()


# 4 bits


WIDE = dict(hidden_size=64, intermediate_size=64, head_dim=16, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64)


@pytest.mark.parametrize("name, more", [("nemotron_h", {}), (SPARSE, {}), (f"{SPARSE} inner", dict(moe_latent_size=64))])
def test_four_bits_are_those_of_bitsandbytes(name, more, tmp_path):
    """Every linear layer but the head. bitsandbytes leaves stacked experts wide: they are put in its numbers by hand."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from test_nf4 import their_config

    theirs = random_model(name, **{k: v for k, v in WIDE.items() if "moe" not in k or name != "nemotron_h"}, **more)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, torch.float32, four_bit=dict(quant_type="nf4", nested=False))
    kinds = {n: type(m).__name__ for n, m in ours.named_modules() if "4bit" in type(m).__name__}
    assert "Linear4bit" == kinds["model.layers.0.mixer.in_proj"] == kinds["model.layers.0.mixer.out_proj"]
    assert ("Experts4bit" in kinds.values()) == (name != "nemotron_h")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=their_config(transformers, "nf4", False), dtype=torch.float32).train()
    rounded = lambda w: bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(w.contiguous(), quant_type="nf4"))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if ".experts." in n:
                p.copy_(torch.stack([rounded(matrix) for matrix in p]))
        assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 2e-5
        models.save_model(ours, tmp_path / "narrow")
        assert torch.equal(our_logits(load_model(tmp_path / "narrow")), our_logits(ours))


def test_a_lora_over_experts_in_4_bits_is_one_over_their_wide_numbers(sparse):
    settings = dict(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["up_proj"], target_parameters=STACKS)
    narrow, wide = (load_model(sparse[1], four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None)) for _ in range(2))
    dequantize_linears(wide, torch.float32)
    for model in (narrow, wide):
        add_lora(model, settings)
    randomize_lora(narrow)
    with torch.no_grad():
        for n, p in adapter_tensors(wide).items():
            p.copy_(adapter_tensors(narrow)[n])
        assert (our_logits(wide) - our_logits(narrow)).abs().max() < 1e-5
