"""gpt-oss: attention sinks on both paths of attention, its experts, and MXFP4 as published; see also test_families.py."""

import json

import pytest
import torch
from conftest import make_rows
from safetensors.torch import load_file, save_file
from test_cuda import flash  # noqa: F401  a fixture
from test_families import NARROW, PAIRS, YARN, our_logits, peft_and_back, random_model, their_logits
from test_model import assert_same_gradients, gradients, stream

import dpo
import model as models
from extras.decoder.explicit import explicit_attention
from extras.decoder.generate import Sampling, complete
from extras.decoder.moe import clamped_product
from extras.models import mxfp4, opening
from parts.configs import check_supported

transformers = pytest.importorskip("transformers", reason="needs transformers")
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

# config.json of gpt-oss-20b; the 120b has 36 layers and 128 experts
PUBLISHED = dict(
    architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=200002,
    experts_per_token=4, head_dim=64, hidden_act="silu", hidden_size=2880, initial_context_length=4096,
    initializer_range=0.02, intermediate_size=2880, layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072, model_type="gpt_oss", num_attention_heads=64, num_experts_per_tok=4,
    num_hidden_layers=24, num_key_value_heads=8, num_local_experts=32, output_router_logits=False, pad_token_id=199999,
    quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=[
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]),
    rms_norm_eps=1e-5, rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, rope_type="yarn", truncate=False,
                                         original_max_position_embeddings=4096),
    rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
    transformers_version="4.55.0.dev0", use_cache=True, vocab_size=201088)
WIDE = NARROW | dict(hidden_size=64, intermediate_size=32, num_local_experts=5, num_experts_per_tok=2, sliding_window=5,
                     rope_parameters=YARN | dict(truncate=False), experts_per_token=2, initial_context_length=16)
STACKS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """transformers' model in float32, and its checkpoint."""
    directory = tmp_path_factory.mktemp("gpt_oss")
    theirs = random_model("gpt_oss")
    theirs.save_pretrained(directory)
    return theirs, directory


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as gpt-oss's are published, small and random: its tensors, and its directory.

    Two files, and the blocks and scales of one stack are not in the same one.
    """
    directory = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gpt_oss", **WIDE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = {n: torch.randn_like(p) * (0.2 if p.dim() == 1 else p.shape[-1] ** -0.5) for n, p in model.state_dict().items()}
    state = {n: (p + 1 if "norm" in n else p).bfloat16() for n, p in state.items()}
    for name in [n for n in state if n.endswith(STACKS)]:
        experts, size, rows = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, size // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(120, 126, (experts, rows, size // 32), dtype=torch.uint8)
    files = {n: f"model-0000{1 + n.endswith('down_proj_scales')}-of-00002.safetensors" for n in state}
    for file in set(files.values()):
        save_file({n: state[n] for n in files if files[n] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    raw = {k: v for k, v in config.to_dict().items() if k not in ("dtype", "torch_dtype")}
    raw["quantization_config"] = PUBLISHED["quantization_config"]
    (directory / "config.json").write_text(json.dumps(raw))
    return state, directory


# Sinks


def test_a_sink_is_one_more_key_without_a_value():
    """Each query's weights, summed by hand in float64; gradients by differences."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 4, 8).double(), torch.randn(6, 2, 8).double(), torch.randn(6, 2, 8).double()
    sinks = torch.randn(4).double()
    out = explicit_attention(q, k, v, None, 0.3, sinks=sinks)
    for i in range(4):
        for head in range(4):
            scores = [0.3 * (q[i, head] @ k[j, head // 2]) for j in range(i + 3)]
            total = sum(s.exp() for s in scores) + sinks[head].exp()
            expected = sum(s.exp() / total * v[j, head // 2] for j, s in enumerate(scores))
            assert torch.allclose(out[i, head], expected, atol=1e-12)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    assert torch.autograd.gradcheck(lambda q, k, v, s: explicit_attention(q, k, v, None, 0.3, sinks=s), inputs)


@pytest.mark.parametrize("shared", [True, False])
def test_sinks_on_the_flash_path_equal_the_plain_path(shared, plain, request):
    """float64, values and gradients of all parameters, with the kernel's arithmetic emulated."""
    model = models.load_model(plain[1], torch.float64)
    weights = torch.randn(len(stream(PAIRS)[4])).double()
    logps = model(models.Stream(*stream(PAIRS, shared))).logps
    expected = gradients(model, (logps * weights).sum())
    request.getfixturevalue("flash")
    fast = model(models.Stream(*stream(PAIRS, shared))).logps
    assert (fast - logps).abs().max() < 1e-10
    got = gradients(model, (fast * weights).sum())
    assert_same_gradients(got, expected, 1e-10)
    assert all(got[f"model.layers.{i}.self_attn.sinks"].abs().min() > 1e-6 for i in range(3))


def test_answers_on_the_flash_path_are_those_of_the_plain_path(plain, request):
    model = models.load_model(plain[1], torch.float64)
    options = Sampling(temperature=0, max_new_tokens=12)
    prompts = [list(PAIRS[0][0]), list(PAIRS[2][0])]
    expected = complete(model, prompts, options, samples=2)
    request.getfixturevalue("flash")
    assert complete(model, prompts, options, samples=2) == expected


# Experts


def test_the_clamp_acts_where_transformers_clamps():
    """On values on both sides of the limits, gradients too; the gate has no lower limit."""
    experts = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(
        transformers.GptOssConfig(**WIDE, swiglu_limit=0.7))
    x = torch.linspace(-3, 3, 400).double().requires_grad_()
    both = x.view(20, 20)[torch.randperm(20)]
    ours, theirs = clamped_product(both[:, ::2], both[:, 1::2], 1.702, 0.7), experts._apply_gate(both)
    assert torch.allclose(ours, theirs, atol=1e-14)
    weights = torch.randn(20, 10).double()
    got, expected = (torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (ours, theirs))
    assert torch.allclose(got, expected, atol=1e-14)


@pytest.mark.parametrize("settings", [
    dict(target_modules=["q_proj", "o_proj"]),
    dict(target_modules=["v_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])])
def test_adapters_go_to_peft_and_back(settings, plain, tmp_path):
    """On attention and on the experts, whose stacks the files hold transposed."""
    from extras.lora.targets import add_lora

    ours = models.load_model(plain[1])
    add_lora(ours, dict(r=2, lora_alpha=4, lora_dropout=0.0) | settings)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(plain[1], attn_implementation="eager")
    there, changed, back = peft_and_back(ours, load, settings, tmp_path)
    assert there < 2e-5 < 1e-3 < changed and back < 2e-5


# MXFP4


def test_mxfp4_is_bit_for_bit_what_transformers_reads():
    """Every byte, beside every scale from the least to the greatest."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    blocks = blocks.view(2, 128, 16, 16)[:, :, torch.randperm(16)]
    scales = torch.arange(256, dtype=torch.uint8).view(2, 128, 1).repeat(1, 1, 16)
    ours, theirs = mxfp4.dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert ours.shape == theirs.shape == (2, 512, 128) and ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.view(torch.int16))
    assert ours.isfinite().all(1).sum() > 250  # all but the greatest scale


def test_mxfp4_values_by_hand():
    """0x2B: the low half comes first: 11 is -1.5, 2 is 1; scale 128 is a factor of 2."""
    block = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    block[0, 0, 0, 0] = 0x2B
    assert mxfp4.dequantize(block, torch.tensor([[[128]]], dtype=torch.uint8))[0, :3, 0].tolist() == [-3.0, 2.0, 0.0]


def test_published_files_are_read_as_transformers_reads_them_and_saved_in_bfloat16(published, tmp_path):
    state, directory = published
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True)).eval()
    ours = opening.load_model(directory)
    assert len(ours.read.digest()) == 16  # what ranks compare reads slices too
    with torch.no_grad():
        expected = their_logits(theirs)[0]
        assert (our_logits(ours) - expected).abs().max() < 1e-5
    models.save_model(ours, tmp_path, torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    packed = {n for n in state if n.endswith(("_blocks", "_scales"))}
    assert saved.keys() == state.keys() - packed | {n[:-7] for n in packed}
    assert all(t.dtype == torch.bfloat16 for t in saved.values())
    assert all(torch.equal(saved[n], state[n]) for n in state.keys() - packed)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in raw and raw["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(their_logits(again.eval())[0], expected)
        assert torch.equal(our_logits(models.load_model(tmp_path)), our_logits(ours))  # a plain checkpoint now


def test_published_files_train_from_the_command_line(published, tiny, tmp_path):
    _, directory = published
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((tiny / file).read_bytes())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8, seed=1)), encoding="utf-8")
    flags = f"""--model_name_or_path {directory} --dataset_name {tmp_path}/pairs.jsonl --output_dir {tmp_path}/out
        --cache_dir {tmp_path}/cache --dtype auto --max_steps 2 --learning_rate 1e-3"""
    assert dpo.main([*flags.split()]) == 0
    saved = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.0.mlp.experts.down_proj" in saved and not any(n.endswith("_blocks") for n in saved)
    assert saved["model.layers.0.self_attn.sinks"].dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (our_logits(models.load_model(tmp_path / "out")) - our_logits(opening.load_model(directory))).abs().max() > 1e-4


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.layers.1.mlp.experts.down_proj_scales"), "down_proj_blocks is there, but .*down_proj_scales is missing"),
    (lambda s: s.pop("model.layers.1.mlp.experts.down_proj_blocks"), "down_proj_scales is there, but .*down_proj_blocks is missing"),
    (lambda s: s.update({"model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(5, 64, 1, dtype=torch.uint8)}),
     "gate_up_proj: blocks .5, 64, 2, 16. and scales .5, 64, 1. of U8 are not MXFP4"),
    (lambda s: s.update({"model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(5, 64, 2)}), "of F32, U8 are not MXFP4"),
    (lambda s: s.update({f"model.layers.0.mlp.experts.down_proj_{k}": torch.zeros(5, 64, 2, *b, dtype=torch.uint8)
                         for k, b in (("blocks", [16]), ("scales", []))}), r"down_proj in .* is .5, 64, 64., config.json says .5, 32, 64.")])
def test_damaged_mxfp4_is_named(change, message, published, tmp_path):
    state = dict(published[0])
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((published[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
        opening.load_model(tmp_path)


def test_what_is_not_computed_is_refused_by_name(published, tmp_path):
    directory = published[1]
    with pytest.raises(ValueError, match="quantized .mxfp4.*gpt-oss in MXFP4, are opened by load_model of extras/models/opening.py"):
        models.load_model(directory)
    with pytest.raises(ValueError, match="gpt-oss's experts are not put in 4 bits; leave out --load_in_4bit"):
        opening.load_model(directory, four_bit=dict(quant_type="nf4", nested=False, compute_dtype=None))
    raw = json.loads((directory / "config.json").read_text())
    for change, message in {"hidden_act": "gelu", "experts_per_token": 3, "swiglu_beta": 1.0}.items():
        with pytest.raises(ValueError, match=change):
            check_supported(raw | {change: message})
    other = dict(model_type="llama", hidden_size=32, vocab_size=61, intermediate_size=48, num_hidden_layers=1, rms_norm_eps=1e-5,
                 num_attention_heads=4, max_position_embeddings=64, quantization_config=raw["quantization_config"])
    with pytest.raises(ValueError, match="quantized .mxfp4."):
        check_supported(other)


# As published


@pytest.mark.parametrize("layers, experts, billions, total_size, tensors", [
    (24, 32, 20.91, 13_761_264_768, 459), (36, 128, 116.83, 65_248_815_744, 687)])
def test_published_sizes_are_those_of_the_index_files(layers, experts, billions, total_size, tensors):
    """Parameters as the model card counts them; bytes and tensors as model.safetensors.index.json has them."""
    raw = PUBLISHED | dict(num_hidden_layers=layers, num_local_experts=experts,
                           layer_types=["sliding_attention", "full_attention"] * (layers // 2))
    check_supported(raw)
    config = models.read_config({k: v for k, v in raw.items() if k != "quantization_config"})
    assert config.windows == (128, None) * (layers // 2) and config.moe["clamp"] == (1.702, 7.0)
    with torch.device("meta"):
        parameters = dict(models.Decoder(config).named_parameters())
    packed = [n for n in parameters if n.endswith(STACKS)]
    assert round(sum(p.numel() for p in parameters.values()) / 1e9, 2) == billions
    assert len(parameters) + len(packed) == tensors
    stored = lambda n, p: p.numel() // 2 + p.numel() // 32 if n in packed else 2 * p.numel()
    assert sum(stored(n, p) for n, p in parameters.items()) == total_size
    names = {models.file_name(n, config).removeprefix("model.layers.0.") for n in parameters if ".layers.0." in n}
    assert names == {f"self_attn.{m}_proj.{p}" for m in "qkvo" for p in ("weight", "bias")} | {
        "self_attn.sinks", "mlp.router.weight", "mlp.router.bias", "input_layernorm.weight", "post_attention_layernorm.weight"
    } | {f"mlp.experts.{s}{b}" for s in STACKS for b in ("", "_bias")}


def test_yarn_without_rounding_is_transformers(tmp_path):
    config = models.read_config({k: v for k, v in PUBLISHED.items() if k != "quantization_config"})
    rope = config.ropes["full_attention"]
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(
        transformers.AutoConfig.for_model(**{k: v for k, v in PUBLISHED.items() if k != "quantization_config"}))
    assert torch.allclose(torch.tensor(rope.frequencies), theirs.inv_freq, rtol=1e-6, atol=0)
    assert rope.factor == pytest.approx(theirs.attention_scaling)
    unsaid = {k: v for k, v in PUBLISHED.items() if k not in ("quantization_config", "rope_scaling")}
    assert models.read_config(unsaid).ropes == config.ropes
