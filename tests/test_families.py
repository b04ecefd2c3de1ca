"""Every family beside stock transformers, on random tiny checkpoints: values, gradients, files; real index files."""

import json
import lzma
import math
import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_model import (
    CORE,
    LLAMA,
    assert_same_gradients,
    completion_positions,
    gradients,
    make,
    padded,
    put_lora,
    random_pairs,
    randomize_lora,
    stream,
    write,
)

import model as models
from extras.decoder.generate import Sampling, complete
from extras.decoder.memory import save_memory
from extras.lora.peft_files import load_adapter, save_adapter
from extras.models.opening import build
from parts.activations import keep_all, recompute
from parts.configs import check_length
from parts.families import Family
from parts.names import FIXED, file_name, find_places

transformers = pytest.importorskip("transformers", reason="needs transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = SIZES | dict(num_experts=5, num_experts_per_tok=2)
NARROW = SIZES | dict(head_dim=12)
FOUR = SIZES | dict(num_hidden_layers=4)  # every fourth layer has no window
SLIDING, FULL = "sliding_attention", "full_attention"
LONG = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, short_factor=[1.0, 1.3, 1.7],
            long_factor=[2.0, 5.0, 9.0])
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)

DELTA = dict(layer_types=["linear_attention", "linear_attention", FULL], full_attention_interval=3, head_dim=16, linear_num_key_heads=2,
             linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=24)

EXPERTS_4 = FOUR | dict(head_dim=12, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=5,
                        num_experts_per_tok=1, attention_chunk_size=5, floor_scale=4, attn_scale=0.3)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2)
GRANITE_H = SIZES | MAMBA | dict(
    shared_intermediate_size=24, layer_types=["linear_attention", FULL, "linear_attention"], embedding_multiplier=3.0,
    attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0)
# transformers takes time_step_min for a limit (test_nemotron.py): here it limits nothing
NEMOTRON = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"} | dict(
    head_dim=12, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=2, time_step_min=1e-9, time_step_floor=1e-2)
NEMOTRON_EXPERTS = NEMOTRON | dict(
    layers_block_type=["linear_attention", "moe", FULL, "moe", "mlp"], n_routed_experts=6, num_experts_per_tok=2, n_group=3,
    topk_group=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=24, routed_scaling_factor=1.7)
# E2B in small: shared keys and values, wider MLPs where they are read, inputs of the layers' own
GEMMA4 = NARROW | dict(
    num_hidden_layers=6, layer_types=[SLIDING, FULL] * 3, sliding_window=5, global_head_dim=20, num_kv_shared_layers=2,
    hidden_size_per_layer_input=16, vocab_size_per_layer_input=61, use_double_wide_mlp=True, final_logit_softcapping=2.0)
# 26B-A4B in small: values that are keys, fewer of them in layers without a window, experts beside the MLP
GEMMA4_EXPERTS = NARROW | dict(
    num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2, sliding_window=5, global_head_dim=20,
    num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0, enable_moe_block=True,
    num_experts=5, top_k_experts=2, moe_intermediate_size=16, final_logit_softcapping=2.0,
    use_bidirectional_attention="vision")
GROUPS = dict(n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2, n_shared_experts=2, moe_intermediate_size=16,
              routed_scaling_factor=1.7, first_k_dense_replace=1)
LATENT = SIZES | GROUPS | dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)

# name -> (model_type, configuration); windows of 5 and 6 are crossed by the pairs below
CASES = {
    "llama": ("llama", SIZES | dict(attention_bias=True, mlp_bias=True)),
    "llama linear": ("llama", SIZES | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "llama 3": ("llama", SIZES | dict(rope_parameters=dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32))),
    "llama dynamic": ("llama", SIZES | dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "llama yarn": ("llama", SIZES | dict(rope_parameters=YARN)),
    "qwen2 yarn": ("qwen2", SIZES | dict(rope_parameters=YARN | dict(
        rope_theta=100.0, beta_fast=4.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.2, truncate=False))),
    "mistral": ("mistral", NARROW | dict(sliding_window=5)),
    "qwen2": ("qwen2", SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("qwen3", NARROW | dict(attention_bias=True)),
    "gemma": ("gemma", NARROW),
    "gemma2": ("gemma2", NARROW | dict(sliding_window=5, query_pre_attn_scalar=20, attn_logit_softcapping=3.0,
                                       final_logit_softcapping=2.0)),
    "gemma3": ("gemma3_text", NARROW | dict(
        sliding_window=5, layer_types=[SLIDING, FULL, SLIDING], query_pre_attn_scalar=20, rope_parameters={
            FULL: dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            SLIDING: dict(rope_type="default", rope_theta=1e4)})),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4_experts": ("gemma4_text", GEMMA4_EXPERTS),
    "phi3": ("phi3", SIZES | dict(sliding_window=5)),
    "phi3 longrope": ("phi3", SIZES | dict(rope_parameters=LONG, original_max_position_embeddings=32)),
    "olmo2": ("olmo2", SIZES),
    "olmo3": ("olmo3", FOUR | dict(sliding_window=5, rope_parameters={
        FULL: YARN, SLIDING: dict(rope_type="default", rope_theta=1e4)})),
    "exaone4": ("exaone4", SIZES | dict(sliding_window=5, sliding_window_pattern=2)),
    "exaone4 full": ("exaone4", SIZES | dict(sliding_window=None, layer_types=[FULL] * 3)),
    "seed_oss": ("seed_oss", NARROW | dict(attention_out_bias=True, mlp_bias=True, attention_dropout=0.0,
                                            residual_dropout=0.0)),
    "arcee": ("arcee", SIZES | dict(mlp_bias=True)),
    "ministral3": ("ministral3", NARROW | dict(rope_parameters=YARN | dict(
        original_max_position_embeddings=128, beta_fast=4.0, mscale=1.0, mscale_all_dim=1.0,
        llama_4_scaling_beta=0.1))),
    "glm4": ("glm4", NARROW),
    "cohere2": ("cohere2", FOUR | dict(sliding_window=5, logit_scale=0.5)),
    "hunyuan": ("hunyuan_v1_dense", NARROW | dict(attention_bias=True, rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, factor=1.0, alpha=50.0))),
    "ernie4_5": ("ernie4_5", NARROW | dict(use_bias=True)),
    "smollm3": ("smollm3", SIZES | dict(no_rope_layer_interval=2)),
    "granite": ("granite", SIZES | dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5,
                                        logits_scaling=2.0)),
    "granite_h": ("granitemoehybrid", GRANITE_H | dict(num_local_experts=0, attention_bias=True)),
    "granite_h rope": ("granitemoehybrid", GRANITE_H | dict(
        num_local_experts=0, position_embedding_type="rope", mamba_conv_bias=False, mamba_n_groups=1)),
    "granite_h without h": ("granitemoehybrid", GRANITE_H | dict(
        num_local_experts=0, position_embedding_type="rope", layer_types=[FULL] * 3)),
    "granite_h experts": ("granitemoehybrid", GRANITE_H | dict(num_local_experts=5, num_experts_per_tok=2)),
    "falcon_h1": ("falcon_h1", SIZES | MAMBA | dict(
        mamba_d_ssm=64, embedding_multiplier=5.0, lm_head_multiplier=0.5, key_multiplier=0.4, attention_in_multiplier=1.3,
        attention_out_multiplier=0.9, ssm_in_multiplier=1.25, ssm_out_multiplier=0.6, ssm_multipliers=[0.9, 1.3, 0.5, 1.7, 0.4],
        mlp_multipliers=[0.9, 0.6])),
    "falcon_h1 norm": ("falcon_h1", SIZES | MAMBA | dict(mamba_d_ssm=64, mamba_rms_norm=True, mamba_norm_before_gate=False)),
    "falcon_h1 norm first": ("falcon_h1", SIZES | MAMBA | dict(mamba_d_ssm=64, mamba_rms_norm=True, mamba_norm_before_gate=True, mamba_n_groups=1)),
    "nemotron_h": ("nemotron_h", NEMOTRON | dict(layers_block_type=["linear_attention", "mlp", FULL, "linear_attention", "mlp"])),
    "nemotron_h bias": ("nemotron_h", NEMOTRON | dict(
        layers_block_type=[FULL, "linear_attention", "mlp"], mlp_bias=True, use_conv_bias=False, n_groups=1)),
    "nemotron_h_experts": ("nemotron_h", NEMOTRON_EXPERTS),
    "nemotron_h_experts inner": ("nemotron_h", NEMOTRON_EXPERTS | dict(
        n_group=1, topk_group=1, moe_latent_size=24, norm_topk_prob=False, mlp_bias=True)),
    "llama4": ("llama4_text", EXPERTS_4 | dict(interleave_moe_layer_step=2)),
    "llama4 without norm": ("llama4_text", EXPERTS_4 | dict(
        use_qk_norm=False, num_experts_per_tok=2, no_rope_layers=[1, 0, 0, 1], rope_parameters=dict(
            rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=1.0,  # as Scout's
            original_max_position_embeddings=32))),
    "gpt2": ("gpt2", dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
                          eos_token_id=2)),
    "pythia": ("gpt_neox", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "pythia sequential": ("gpt_neox", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | dict(
        use_parallel_residual=False, attention_bias=False, rope_parameters=dict(
            rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0))),
    "mixtral": ("mixtral", SIZES | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=5)),
    "qwen2_moe": ("qwen2_moe", EXPERTS | dict(moe_intermediate_size=16, shared_expert_intermediate_size=24,
                                              mlp_only_layers=[1])),
    "qwen3_moe": ("qwen3_moe", EXPERTS | dict(moe_intermediate_size=16, norm_topk_prob=True, head_dim=12)),
    "olmoe": ("olmoe", EXPERTS),
    "gpt_oss": ("gpt_oss", NARROW | dict(
        num_local_experts=5, num_experts_per_tok=2, sliding_window=5, swiglu_limit=0.7, rope_parameters=YARN | dict(
            rope_theta=100.0, beta_fast=4.0, beta_slow=0.5, truncate=False))),
    "deepseek_v2": ("deepseek_v2", LATENT | dict(topk_method="group_limited_greedy", mlp_bias=True)),
    "deepseek_v2 lite": ("deepseek_v2", LATENT | dict(q_lora_rank=None, rope_parameters=YARN | dict(
        mscale=0.707, mscale_all_dim=0.707))),
    "deepseek_v3": ("deepseek_v3", LATENT | dict(attention_bias=True, rope_parameters=YARN | dict(
        rope_theta=100.0, beta_fast=4.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.2))),
    "deepseek_v3 ungrouped": ("deepseek_v3", LATENT | dict(
        q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, v_head_dim=24)),
    "glm4_moe": ("glm4_moe", NARROW | GROUPS | dict(attention_bias=True, use_qk_norm=True)),
    "glm4_moe_lite": ("glm4_moe_lite", {k: v for k, v in LATENT.items() if k != "first_k_dense_replace"} | dict(
        v_head_dim=20, mlp_layer_types=["sparse", "dense", "sparse"])),
    "qwen3_next": ("qwen3_next", EXPERTS | DELTA | dict(
        moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1])),
    "qwen3_5": ("qwen3_5_text", SIZES | DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", {k: v for k, v in EXPERTS.items() if k != "intermediate_size"} | DELTA | dict(
        moe_intermediate_size=16, shared_expert_intermediate_size=24)),
}
SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "granite_h experts"]
UNBALANCED = ["deepseek_v2", "deepseek_v2 lite", "deepseek_v3", "deepseek_v3 ungrouped", "glm4_moe", "glm4_moe_lite",
              "llama4", "llama4 without norm", "nemotron_h_experts", "nemotron_h_experts inner"]
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight", "mlp.router.bias",
           "block_sparse_moe.router.layer.weight", "feed_forward.router.weight")
STACKED = ("gpt_oss", "granite_h experts", "llama4", "llama4 without norm")  # in its files too
EAGER = ("gemma2", "gpt_oss")
LIMITED = {"gpt2": 64, "llama dynamic": 64, "phi3 longrope": 32}  # tokens that the positions reach
PAIRS = random_pairs([(7, 5, 9), (1, 1, 12), (9, 6, 2)])


def attention(name: str) -> str:
    """Only the eager implementation has soft-capped scores, and sinks."""
    return "eager" if name in EAGER else "sdpa"


def random_model(name: str, **changed):
    """transformers' model of a case, every parameter random: norms and biases too."""
    family, config = CASES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **config | changed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention(name))
    with torch.no_grad():
        for n, p in model.named_parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2
            p.copy_(torch.randn_like(p) * scale + (p if p.dim() == 1 else 0))
            if n.endswith("A_log"):
                # states that last: of one that is gone at the next token, rounding decides over the output's sign
                p -= 3
            if name.startswith("gemma4") and n.endswith(("q_norm.weight", "k_norm.weight")):
                p *= 0.5  # scores as large as with a scale of 1 / sqrt(head dim): of larger ones rounding decides
        for n, b in model.named_buffers():
            if n.endswith(FIXED):
                b.uniform_(0.5, 1.5)
            if n.endswith("e_score_correction_bias"):
                b.copy_(torch.randn_like(b) * 0.2)
    return model.float().eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, transformers' model, its checkpoint as stock save_pretrained writes it)."""
    directory = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    theirs = random_model(request.param)
    theirs.save_pretrained(directory)
    return request.param, theirs, directory


@pytest.fixture(scope="module", params=SPARSE)
def sparse(request, tmp_path_factory):
    return saved_model(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=SPARSE + UNBALANCED)
def mixture(request, tmp_path_factory):
    return saved_model(request.param, tmp_path_factory)


def saved_model(name: str, tmp_path_factory) -> tuple:
    directory = tmp_path_factory.mktemp(name.replace(" ", "_"))
    theirs = random_model(name)
    theirs.save_pretrained(directory)
    return name, theirs, directory


def their_logits(theirs, pairs=PAIRS, **options) -> torch.Tensor:
    """Logits that predict the scored tokens, from two padded sequences per pair, and the whole output."""
    ids, mask = padded(pairs)
    out = theirs(ids, attention_mask=mask, **options)
    rows, columns = map(list, zip(*completion_positions(pairs)))
    return out.logits[rows, columns], out


def peft_and_back(ours, load, settings: dict, directory) -> tuple[float, float, float]:
    """Largest differences of logits: ours and PEFT's with our adapter, what it changes, and ours and PEFT's with PEFT's."""
    peft = pytest.importorskip("peft", reason="needs peft")
    apart = lambda theirs: float((our_logits(ours) - their_logits(theirs)[0]).abs().max())
    with torch.no_grad():
        randomize_lora(ours)
        save_adapter(ours, directory / "a", dict(r=2, lora_alpha=4, lora_dropout=0.0, base_model_name_or_path="x") | settings)
        there, changed = apart(peft.PeftModel.from_pretrained(load(), directory / "a").eval()), apart(load().eval())
        theirs = peft.get_peft_model(load(), peft.LoraConfig(r=2, lora_alpha=4, **settings)).eval()
        randomize_lora(theirs)
        theirs.save_pretrained(directory / "b")
        load_adapter(ours, directory / "b")
        return there, changed, apart(theirs)


def our_logits(ours, pairs=PAIRS) -> torch.Tensor:
    input_ids, position_ids, spans, score, _ = stream(pairs)
    return ours.logits(input_ids, position_ids, spans)[score]


def in_files(ours, named: dict) -> dict:
    """Tensors by our parameter names, cut and named as the model's files are."""
    return {theirs: place.view(named[place.name]) for theirs, place in ours.layout.items() if place.name in named}


def their_gradients(theirs, loss, names) -> dict:
    """By the names of the files: one expert's share of a stacked gradient, and GPT-NeoX's older name of the head."""
    stacked = gradients(theirs, loss)
    found = {}
    for name in names:
        if name.endswith(FIXED):
            continue
        plain = name.replace("embed_out", "lm_head").replace("router.layer", "router").replace("backbone.", "model.")
        for theirs_once, now in (("input_linear.weight", "gate_up_proj"), ("output_linear.weight", "down_proj")):
            plain = plain.replace(f"block_sparse_moe.{theirs_once}", f"block_sparse_moe.experts.{now}")
        if plain not in stacked:
            plain = plain.replace("block_sparse_moe", "mlp")
        if plain in stacked:
            found[name] = stacked[plain]
            continue
        layer, rest = plain.split(".experts.")
        number, matrix, _ = rest.split(".")
        down = matrix in ("w2", "down_proj")
        if f"{layer}.experts.up_proj" in stacked:  # without gates
            found[name] = stacked[f"{layer}.experts.{matrix}"][int(number)]
            continue
        whole = stacked[f"{layer}.experts.{'down_proj' if down else 'gate_up_proj'}"][int(number)]
        found[name] = whole if down else whole.chunk(2)[matrix in ("w3", "up_proj")]
    return found


# 1. Values, gradients, files


def test_logits_equal_transformers(case):
    name, theirs, directory = case
    with torch.no_grad():
        difference = our_logits(models.load_model(directory)) - their_logits(theirs)[0]
    assert difference.abs().max() < 1e-5


def test_gradients_equal_transformers(case):
    """Of every parameter, of randomly weighted log-probs of the completions."""
    name, theirs, directory = case
    ours = models.load_model(directory)
    batch = stream(PAIRS)
    weights = torch.randn(len(batch[4]))
    log_p = their_logits(theirs)[0].log_softmax(-1).gather(-1, batch[4][:, None])[:, 0]
    expected = their_gradients(theirs, (log_p * weights).sum(), ours.layout)
    got = in_files(ours, gradients(ours, (ours(models.Stream(*batch)).logps * weights).sum()))
    assert got.keys() == expected.keys()
    for n, g in expected.items():
        assert (got[n] - g).norm() <= 1e-4 * g.norm() + 1e-6, n
    assert sum(g.norm() > 0 for g in expected.values()) > 0.7 * len(expected)  # experts that got no token have none


def test_bf16_autocast_is_as_near_to_float32_as_transformers_is(case):
    name, theirs, directory = case
    ours = models.load_model(directory)
    with torch.no_grad():
        exact = their_logits(theirs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            peer, own = their_logits(theirs)[0].float(), our_logits(ours).float()
            logps = ours(models.Stream(*stream(PAIRS))).logps
    assert_as_near(own, peer, exact, name)
    dense = own.log_softmax(-1).gather(-1, stream(PAIRS)[4][:, None])[:, 0]
    assert (logps - dense).abs().max() < 0.2 and logps.dtype == torch.float32


def test_bf16_weights_are_as_near_to_float32_as_in_transformers(case):
    """The whole model in bf16, as a reference model may be held; exact are the rounded weights in float32."""
    name, _, directory = case
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=attention(name)).eval()
    ours = models.load_model(directory, torch.bfloat16)
    with torch.no_grad():
        peer, own = their_logits(theirs)[0].float(), our_logits(ours).float()
        exact = our_logits(ours.float())
    assert_as_near(own, peer, exact, name)


def assert_as_near(own, peer, exact, name: str) -> None:
    # a token near the border of two experts may go to the other one, in either implementation: not the mean then
    middle = torch.median if name in (*SPARSE, *UNBALANCED, "gemma4_experts") else torch.mean
    error = lambda x: middle((x - exact).pow(2).mean(-1)).sqrt().item()
    assert error(own) < 1.5 * error(peer) + 1e-3


def test_gemma_norms_are_not_rounded_before_they_are_applied():
    """1 + weight has more digits than bf16 holds."""
    norm = models.Norm(64, models.read_config(LLAMA | dict(model_type="gemma"))).bfloat16()
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(0, 0.05)
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    exact = torch.nn.functional.rms_norm(x.double(), (64,), 1 + norm.weight.double(), norm.eps)
    assert torch.equal(norm(x), exact.bfloat16())


def test_files_come_back_byte_for_byte(case, tmp_path):
    """load -> save: the same names, shapes and bytes; transformers reads the same model; so do we."""
    name, theirs, directory = case
    models.save_model(models.load_model(directory), tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention(name))
    with torch.no_grad():
        assert torch.equal(their_logits(again.eval())[0], their_logits(theirs)[0])


def test_trained_weights_reach_transformers(case, tmp_path):
    """The way out is not only the way in backwards: after a step, transformers computes what we compute."""
    name, theirs, directory = case
    ours = models.load_model(directory)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p += torch.randn_like(p) * 0.02
        models.save_model(ours, tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention(name))
        difference = our_logits(ours) - their_logits(again.eval())[0]
    assert difference.abs().max() < 2e-5


def keep_less(model, checkpointing):
    model.model.run_block = recompute if checkpointing is True else keep_all
    if checkpointing == "selective":
        save_memory(model, checkpointing, False, torch.device("cpu"))


def test_stream_equals_unshared_and_checkpointed(case):
    """float64, values and gradients: sharing the prompt and recomputing blocks change nothing."""
    name, _, directory = case
    model = models.load_model(directory, torch.float64)
    weights = torch.randn(len(stream(PAIRS)[4]), dtype=torch.float64)

    def run(shared):
        logps = model(models.Stream(*stream(PAIRS, shared))).logps
        return logps, gradients(model, (logps * weights).sum())

    expected, expected_gradients = run(False)
    for checkpointing in (False, True, "selective"):
        keep_less(model, checkpointing)
        logps, got = run(True)
        assert (logps - expected).abs().max() < 1e-10
        assert_same_gradients(got, expected_gradients, 1e-10)


@pytest.mark.parametrize("new", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_greedy_answers_equal_transformers(case, new):
    """`new` tokens, or as many as there are positions."""
    name, theirs, directory = case
    ours = models.load_model(directory)
    prompt = PAIRS[0][0]
    new = min(new, LIMITED.get(name, 200) - len(prompt))
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt):]
    assert complete(ours, [prompt], Sampling(temperature=0, max_new_tokens=new))[0] == expected.tolist()


# Both generations of config.json


def older(raw: dict) -> dict:
    """A config.json of transformers 5 as transformers 4 wrote it."""
    raw = dict(raw, torch_dtype=raw["dtype"])
    del raw["dtype"]
    rope = raw.pop("rope_parameters", None)
    if rope is None:
        return raw
    if FULL in rope:  # Gemma 3, OLMo 3
        if raw["model_type"] == "gemma3_text":
            raw["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        rope = rope[FULL]
    rope = dict(rope)
    theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    if raw["model_type"] == "gpt_neox":
        raw |= dict(rotary_emb_base=theta, rotary_pct=fraction)
    else:
        raw |= dict(rope_theta=theta) | ({} if fraction is None else dict(partial_rotary_factor=fraction))
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else dict(rope, type=kind)
    return raw


def test_older_files_mean_the_same(case):
    """`rope_theta` + `rope_scaling` for `rope_parameters`, `torch_dtype` for `dtype`; no `layer_types`."""
    name, theirs, directory = case
    new = json.loads((directory / "config.json").read_text())
    assert "dtype" in new and ("rope_parameters" in new) == (name != "gpt2" and not name.startswith("nemotron_h"))
    if name.startswith(("ministral3", "gemma4")):
        return  # are younger
    assert models.read_config(older(new)) == models.read_config(new)
    if name not in ("gemma3", "llama4 without norm") and "granite_h" not in name:  # whose layers here follow no rule
        without = {k: v for k, v in older(new).items() if k not in ("layer_types", "no_rope_layers")}
        assert models.read_config(without) == models.read_config(new)


SCOUT = dict(
    model_type="llama4_text", vocab_size=202048, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384,
    num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128, hidden_act="silu", rms_norm_eps=1e-5,
    attention_bias=False, attention_chunk_size=8192, for_llm_compressor=False, num_experts_per_tok=1,
    output_router_logits=False, rope_theta=500000.0, router_aux_loss_coef=0.001, router_jitter_noise=0.0,
    tie_word_embeddings=False)
# Configurations as published (those parts that matter), which must be read without complaint.
PUBLISHED = {
    "Llama-2-7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5,
                       max_position_embeddings=4096, hidden_act="silu", pretraining_tp=1, rope_scaling=None,
                       tie_word_embeddings=False, use_cache=True, torch_dtype="float16", transformers_version="4.31.0"),
    "gemma-2-2b-it": dict(model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216,
                          num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                          hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
                          max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                          query_pre_attn_scalar=256, sliding_window=4096, cache_implementation="hybrid",
                          rope_theta=10000.0, attention_bias=False, attention_dropout=0.0),
    "gemma-3-1b-it": dict(model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912,
                          num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
                          hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, max_position_embeddings=32768,
                          attn_logit_softcapping=None, final_logit_softcapping=None, cache_implementation="hybrid",
                          query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6,
                          rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None),
    "Phi-4-mini": dict(model_type="phi3", vocab_size=200064, hidden_size=3072, intermediate_size=8192,
                       num_hidden_layers=32, num_attention_heads=24, num_key_value_heads=8, rms_norm_eps=1e-5,
                       max_position_embeddings=131072, original_max_position_embeddings=4096, hidden_act="silu",
                       partial_rotary_factor=0.75, rope_theta=10000.0, sliding_window=262144, embd_pdrop=0.0,
                       rope_scaling=dict(type="longrope", long_factor=[1.5] * 48, short_factor=[1.0] * 48),
                       full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, attention_bias=False,
                       tie_word_embeddings=True, auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}),
    "pythia-70m": dict(model_type="gpt_neox", vocab_size=50304, hidden_size=512, intermediate_size=2048,
                       num_hidden_layers=6, num_attention_heads=8, hidden_act="gelu", layer_norm_eps=1e-5,
                       max_position_embeddings=2048, rotary_pct=0.25, rotary_emb_base=10000,
                       use_parallel_residual=True, tie_word_embeddings=False),
    "Qwen2.5-1.5B": dict(model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                         num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, hidden_act="silu",
                         max_position_embeddings=32768, max_window_layers=21, rms_norm_eps=1e-6, rope_theta=1000000.0,
                         sliding_window=32768, use_sliding_window=False, tie_word_embeddings=True, use_mrope=False),
    "gpt2": dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024, n_ctx=1024,
                 activation_function="gelu_new", layer_norm_epsilon=1e-5, attn_pdrop=0.1, embd_pdrop=0.1,
                 resid_pdrop=0.1, summary_type="cls_index", summary_proj_to_labels=True, summary_use_proj=True,
                 summary_first_dropout=0.1, task_specific_params={"text-generation": {"max_length": 50}}),
    "Olmo-3-7B-Instruct": dict(
        model_type="olmo3", vocab_size=100278, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, max_position_embeddings=65536,
        rope_theta=500000, sliding_window=4096, attention_bias=False, rope_scaling=dict(
            attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0, rope_type="yarn",
            original_max_position_embeddings=8192)),
    "EXAONE-4.0-32B": dict(
        model_type="exaone4", vocab_size=102400, hidden_size=5120, intermediate_size=27392, num_hidden_layers=64,
        num_attention_heads=40, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_theta=1000000, sliding_window=4096, sliding_window_pattern="LLLG", layer_types=[
            FULL if i % 4 == 3 else SLIDING for i in range(64)], rope_scaling=dict(
            factor=16.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3"), tie_word_embeddings=False),
    "Seed-OSS-36B-Instruct": dict(
        model_type="seed_oss", vocab_size=155136, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
        num_attention_heads=80, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, max_position_embeddings=524288,
        rope_theta=1e7, rope_scaling=dict(rope_type="default"), attention_bias=True, attention_out_bias=False,
        mlp_bias=False, residual_dropout=0.1, tie_word_embeddings=False),
    "AFM-4.5B": dict(
        model_type="arcee", vocab_size=128004, hidden_size=2560, intermediate_size=18432, num_hidden_layers=36,
        num_attention_heads=20, num_key_value_heads=4, head_dim=128, hidden_act="relu2", rms_norm_eps=1e-5,
        max_position_embeddings=65536, rope_theta=10000.0, rope_scaling=dict(
            beta_fast=32.0, beta_slow=1.0, factor=20.0, mscale=1.0, original_max_position_embeddings=4096,
            rope_type="yarn", type="yarn"), attention_bias=False, mlp_bias=False, tie_word_embeddings=False),
    "Devstral-2-123B-Instruct-2512": dict(
        model_type="ministral3", vocab_size=131072, hidden_size=12288, intermediate_size=28672, num_hidden_layers=88,
        num_attention_heads=96, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144,
        sliding_window=None, tie_word_embeddings=False, rope_parameters=dict(
            beta_fast=4.0, beta_slow=1.0, factor=64.0, llama_4_scaling_beta=0.0, mscale=1.0, mscale_all_dim=0.0,
            original_max_position_embeddings=4096, rope_theta=1e6, rope_type="yarn", type="yarn")),
    "GLM-4-9B-0414": dict(
        model_type="glm4", vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=32768,
        partial_rotary_factor=0.5, rope_theta=10000.0, attention_bias=True, tie_word_embeddings=False),
    "c4ai-command-r7b-12-2024": dict(
        model_type="cohere2", vocab_size=256000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, layer_norm_eps=1e-5, logit_scale=0.25,
        max_position_embeddings=8192, rope_theta=50000, rope_scaling=None, sliding_window=4096,
        sliding_window_pattern=4, layer_switch=4, order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj", rotary_pct=1.0, use_embedding_sharing=True, use_gated_activation=True,
        use_parallel_block=True, use_parallel_embedding=True, cache_implementation="hybrid"),
    "Hy-MT2-7B": dict(
        model_type="hunyuan_v1_dense", vocab_size=128167, org_vocab_size=128167, hidden_size=4096,
        intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        attention_head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144, norm_type="rms", mlp_bias=False,
        add_classification_head=False, cla_share_factor=2, class_num=0, dense_list=[4096, 0], im_end_id=5,
        im_newline_id=11, im_start_id=4, mask_init_id=12, pad_id=127961, pool_type="last", pretraining_tp=1,
        sep_token_id=127962, text_end_id=7, text_start_id=6, use_cla=False, use_qk_norm=True, use_rotary_pos_emb=True,
        tie_word_embeddings=True, rope_theta=10000.0, rope_scaling=dict(
            alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, mscale_all_dim=1.0, type="dynamic")),
    "ERNIE-4.5-0.3B-PT": dict(
        model_type="ernie4_5", vocab_size=103424, hidden_size=1024, intermediate_size=3072, num_hidden_layers=18,
        num_attention_heads=16, num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_theta=500000, use_bias=False, tie_word_embeddings=True,
        auto_map={"AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM"}),
    "Llama-4-Scout-17B-16E-Instruct, its text_config": SCOUT | dict(
        max_position_embeddings=10485760, num_local_experts=16, interleave_moe_layer_step=1, use_qk_norm=True,
        no_rope_layers=[], attn_temperature_tuning=True, floor_scale=8192, attn_scale=0.1, rope_scaling=dict(
            factor=16.0, high_freq_factor=1.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3")),
    "Llama-4-Maverick-17B-128E-Instruct, its text_config": SCOUT | dict(
        max_position_embeddings=1048576, num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False,
        rope_scaling=None),
    "granite-4.0-h-micro": dict(
        model_type="granitemoehybrid", vocab_size=100352, hidden_size=2048, intermediate_size=8192, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=131072,
        attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12, logits_scaling=8,
        residual_multiplier=0.22, layer_types=["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_state=128, mamba_expand=2,
        mamba_n_groups=1, mamba_n_heads=64, mamba_proj_bias=False, normalization_function="rmsnorm", num_experts_per_tok=0,
        num_local_experts=0, output_router_logits=False, position_embedding_type="nope", rope_scaling=None,
        rope_theta=10000, router_aux_loss_coef=0.01, shared_intermediate_size=8192, tie_word_embeddings=True),
    "Falcon-H1-0.5B-Instruct": dict(
        model_type="falcon_h1", vocab_size=32784, hidden_size=1024, intermediate_size=2048, num_hidden_layers=36,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=16384, attention_bias=False, attention_in_multiplier=1.0, attention_out_multiplier=0.9375,
        attn_layer_indices=None, embedding_multiplier=5.656854249492381, key_multiplier=0.39062499999999994,
        lm_head_multiplier=0.0390625, mamba_chunk_size=128, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64,
        mamba_d_ssm=1536, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=24,
        mamba_norm_before_gate=False, mamba_proj_bias=False, mamba_rms_norm=False, mamba_use_mlp=True, mlp_bias=False,
        mlp_expansion_factor=8, mlp_multipliers=[0.8838834764831844, 0.5859375], num_logits_to_keep=1,
        projectors_bias=False, rope_scaling=None, rope_theta=100000000000.0, ssm_in_multiplier=1.25,
        ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        ssm_out_multiplier=0.23570226039551587, tie_word_embeddings=False),
    "Qwen3-30B-A3B": dict(model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
                          num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                          hidden_act="silu", rms_norm_eps=1e-6, max_position_embeddings=40960, max_window_layers=48,
                          decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
                          num_experts=128, num_experts_per_tok=8, output_router_logits=False, rope_scaling=None,
                          rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
                          use_sliding_window=False, attention_bias=False),
    "Qwen3-Next-80B-A3B-Instruct": dict(
        model_type="qwen3_next", vocab_size=151936, hidden_size=2048, intermediate_size=5120, num_hidden_layers=48,
        num_attention_heads=16, num_key_value_heads=2, head_dim=256, hidden_act="silu", rms_norm_eps=1e-6,
        max_position_embeddings=262144, decoder_sparse_step=1, mlp_only_layers=[], full_attention_interval=4,
        linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
        linear_value_head_dim=128, moe_intermediate_size=512, norm_topk_prob=True, num_experts=512,
        num_experts_per_tok=10, shared_expert_intermediate_size=512, output_router_logits=False,
        router_aux_loss_coef=0.001, partial_rotary_factor=0.25, rope_scaling=None, rope_theta=10000000,
        tie_word_embeddings=False, use_sliding_window=False, attention_bias=False),
    "Qwen3.6-27B, its text_config": dict(
        model_type="qwen3_5_text", vocab_size=248320, hidden_size=5120, intermediate_size=17408, num_hidden_layers=64,
        num_attention_heads=24, num_key_value_heads=4, head_dim=256, hidden_act="silu", rms_norm_eps=1e-6,
        max_position_embeddings=262144, attention_bias=False, attn_output_gate=True, output_gate_type="swish",
        full_attention_interval=4, layer_types=(["linear_attention"] * 3 + [FULL]) * 16, linear_conv_kernel_dim=4,
        linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=48, linear_value_head_dim=128,
        mamba_ssm_dtype="float32", mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False,
        partial_rotary_factor=0.25, tie_word_embeddings=False, rope_parameters=dict(
            mrope_interleaved=True, mrope_section=[11, 11, 10], partial_rotary_factor=0.25, rope_theta=10000000,
            rope_type="default")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_transformers_reads_them(name, tmp_path):
    raw = PUBLISHED[name]
    config = models.read_config(raw)
    theirs = transformers.AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "auto_map"})
    same = SLIDING if getattr(theirs, "sliding_window", None) else FULL
    types = getattr(theirs, "layer_types", None) or [same] * config.num_hidden_layers
    assert [w is not None for w in config.windows] == [t in (SLIDING, "chunked_attention") for t in types]
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


def test_gemma1_gelu_means_its_tanh_form():
    assert models.read_config(LLAMA | dict(model_type="gemma", hidden_act="gelu")).hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize("change, message", [
    (dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2, clip_qkv=8.0), "clip_qkv = 8.0: not understood"),
    (dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1), "jitter_noise"),
    (dict(model_type="gpt2", scale_attn_weights=False), "scale_attn_weights = False is not supported"),
    (dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True: not"),
    (dict(model_type="gemma2", use_bidirectional_attention=True), "use_bidirectional_attention = True"),
    (dict(model_type="gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0: not understood"),
    (dict(model_type="cohere2", layer_norm_eps=1e-5, use_parallel_block=False), "use_parallel_block = False is not supported"),
    (dict(model_type="cohere2", layer_norm_eps=1e-5, rotary_pct=0.5), "rotary_pct = 0.5 is not supported"),
    (dict(model_type="hunyuan_v1_dense", use_cla=True), "use_cla = True: not understood"),
    (dict(model_type="hunyuan_v1_dense", use_qk_norm=False), "use_qk_norm = False is not supported"),
    (dict(model_type="ministral3"), "rope_parameters: missing"),
    (dict(model_type="phi3", rope_scaling=dict(LONG, short_factor=[1.0])), "longrope has 1 factors for 3 rotated"),
    (dict(model_type="phi3", rope_scaling=dict(type="longrope", long_factor=[1.0])), "'longrope' needs 'short_factor'"),
    (dict(rope_scaling=dict(type="yarn")), "rope_type 'yarn' needs 'factor'"),
])
def test_options_that_transformers_would_compute_otherwise_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(LLAMA | change)


MIX = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
COHERE = dict(model_type="cohere2", layer_norm_eps=1e-5)
GATED = dict(model_type="qwen3_5_text")


@pytest.mark.parametrize("change, message", [
    (dict(model_type="gemma2", final_logit_softcapping=0), "final_logit_softcapping = 0: expected a number above 0"),
    (dict(model_type="gemma3_text", final_logit_softcapping="x"), "final_logit_softcapping = 'x': expected a number above 0"),
    (dict(model_type="gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar = 0: expected a number above 0"),
    (dict(model_type="gemma2", sliding_window=-1), "sliding_window = -1: expected a whole number from 1"),
    (COHERE | dict(logit_scale=None), "logit_scale = None: expected a number above 0"),
    (COHERE | dict(logit_scale=0), "logit_scale = 0: expected a number above 0"),
    (GATED | dict(linear_value_head_dim=None), "linear_value_head_dim = None: expected a whole number"),
    (GATED | dict(linear_key_head_dim=-8), "linear_key_head_dim = -8: expected a whole number"),
    (MIX | dict(num_experts_per_tok=0), "num_experts_per_tok = 0: expected a whole number"),
    (MIX | dict(num_experts_per_tok=9), "num_experts_per_tok = 9 of 4 experts"),
    (MIX | dict(num_local_experts=None), "num_experts_per_tok = 2 of 0 experts"),
    (MIX | dict(router_aux_loss_coef=-1), "router_aux_loss_coef = -1: expected a number, 0 or more"),
    (MIX | dict(router_aux_loss_coef=None), "router_aux_loss_coef = None: expected"),
    (dict(rope_theta=0), "rope_theta = 0 of rope_type 'default': expected a number above 0"),
    (dict(rope_theta=-1), "rope_theta = -1 of rope_type 'default': expected a number above 0"),
], ids=str)
def test_numbers_that_no_model_computes_with_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(LLAMA | change)


# Long contexts


@pytest.mark.parametrize("max_length, pairs", [(32, [(10, 20, 9)]), (60, [(20, 30, 20)])])
def test_longrope_is_chosen_once_by_max_length(max_length, pairs, tmp_path):
    """Within the pretraining length the short frequencies, beyond it the long ones: transformers for such a batch."""
    theirs = random_model("phi3 longrope")
    theirs.save_pretrained(tmp_path)
    pairs = random_pairs(pairs)
    with torch.no_grad():
        expected = their_logits(theirs, pairs)[0]
        got = our_logits(models.load_model(tmp_path, max_length=max_length), pairs)
        other = our_logits(models.load_model(tmp_path, max_length=92 - max_length), pairs)
    assert (got - expected).abs().max() < 1e-5 < 1e-2 < (other - expected).abs().max()


def test_lengths_that_the_positions_do_not_reach_are_refused():
    def config(name, max_length=None):
        return models.read_config(random_model(name).config.to_dict(), max_length)

    for name, limit in {"phi3 longrope": 32, "gpt2": 64, "llama dynamic": 64, "ministral3": 128}.items():
        check_length(config(name), limit)
        with pytest.raises(ValueError, match=f"a sequence of {limit + 1} tokens"):
            check_length(config(name), limit + 1)
    check_length(config("phi3 longrope", max_length=33), 10**6)


def test_the_pretraining_length_beside_the_rope_keys_wins_over_theirs():
    raw = random_model("phi3 longrope").config.to_dict()
    raw["rope_parameters"]["original_max_position_embeddings"] = 16
    assert models.read_config(raw).ropes[FULL].limit == 32
    del raw["original_max_position_embeddings"]
    assert models.read_config(raw).ropes[FULL].limit == 16


# 2. Real files


INDEX = {"gemma-2b": None, "llama3.2-3b": None, "mixtral-8x22b": None, "phi3-mini": None, "qwen2.5-14b-cogito": None,
         "llama3.1-8b": "quantized .bitsandbytes.", "llava-1.5-7b": None, "qwen2.5-vl-7b": None}


@pytest.mark.parametrize("name", INDEX)
def test_real_index_files_name_every_parameter_or_are_refused(name, shared):
    read = lambda file: json.loads(lzma.open(shared / "index" / name / f"{file}.xz").read())
    raw, names = read("config.json"), read("model.safetensors.index.json")["weight_map"]
    if INDEX[name]:
        with pytest.raises(ValueError, match=INDEX[name]):
            models.read_config(raw)
        return
    config = models.read_config(raw)
    with torch.device("meta"):
        parameters = dict(build(config).named_parameters())
    places = find_places(names, config)
    assert places.keys() == names.keys()
    assert {p.name for p in places.values()} == parameters.keys()
    covered = dict.fromkeys(parameters, 0)
    for place in places.values():
        covered[place.name] += place.view(parameters[place.name]).numel()
    assert covered == {n: p.numel() for n, p in parameters.items()}


def test_quantized_names_are_refused_even_where_the_config_is_silent(shared):
    names = json.loads(lzma.open(shared / "index/llama3.1-8b/model.safetensors.index.json.xz").read())["weight_map"]
    with pytest.raises(ValueError, match="quantized .it has model.layers.0.*SCB"):
        find_places(names, models.read_config(LLAMA))


# 3. Experts


def test_auxiliary_loss_equals_transformers_on_padded_pairs(sparse):
    """With the prompt shared, value and gradients of all parameters; gradient checkpointing keeps them."""
    name, theirs, directory = sparse
    ours = models.load_model(directory)
    expected = their_logits(theirs, output_router_logits=True)[1].aux_loss
    routers = [n for n in ours.layout if n.endswith(ROUTERS)]
    expected_gradients = their_gradients(theirs, expected, ours.layout)
    assert sum(n.endswith("weight") for n in routers) == sum(ours.config.moe["sparse"])
    for checkpointing in (False, True, "selective"):
        keep_less(ours, checkpointing)
        for shared in (True, False):
            aux = ours(models.Stream(*stream(PAIRS, shared))).aux_loss
            assert aux.shape == () and abs(aux.item() - expected.item()) < 1e-5
            got = in_files(ours, gradients(ours, aux))
            for n, g in expected_gradients.items():
                assert (got[n] - g).abs().max() < 1e-5, n
            assert all(got[n].abs().max() > 1e-4 for n in routers)


def test_router_gradients_of_log_probs_and_auxiliary_loss_together(sparse):
    """As training sees them: mean log-prob plus coefficient times auxiliary loss."""
    name, theirs, directory = sparse
    ours = models.load_model(directory)
    batch = stream(PAIRS)
    logits, out = their_logits(theirs, output_router_logits=True)
    log_p = logits.log_softmax(-1).gather(-1, batch[4][:, None])[:, 0]
    coefficient = ours.config.moe["router_aux_loss_coef"]
    assert coefficient == theirs.config.router_aux_loss_coef
    expected = their_gradients(theirs, log_p.mean() + 10 * coefficient * out.aux_loss, ours.layout)
    got = ours(models.Stream(*batch))
    got = in_files(ours, gradients(ours, got.logps.mean() + 10 * coefficient * got.aux_loss))
    for n in expected:
        if n.endswith(ROUTERS):
            assert (got[n] - expected[n]).abs().max() < 1e-5, n


def test_a_token_weighs_as_many_as_the_sequences_that_hold_it():
    from extras.decoder.moe import token_weights

    _, _, spans, *_ = stream([([1, 2, 3], [4], [5, 6]), ([7], [8])])
    assert token_weights(spans).tolist() == [2, 2, 2, 1, 1, 1, 1, 1]
    assert token_weights(stream([([1, 2, 3], [4], [5, 6])], shared=False)[2]).tolist() == [1] * 9


def test_a_coefficient_that_the_file_leaves_out_is_the_familys(sparse):
    raw = json.loads((sparse[2] / "config.json").read_text())
    del raw["router_aux_loss_coef"]
    theirs = type(sparse[1].config)().router_aux_loss_coef
    assert models.read_config(raw).moe["router_aux_loss_coef"] == theirs


def test_dense_models_have_no_auxiliary_loss():
    assert make(CORE["llama"])(models.Stream(*stream(PAIRS))).aux_loss is None


def test_fused_and_single_expert_files_are_one_model(mixture, tmp_path):
    """Each is saved as it was read, and transformers reads both."""
    name, theirs, directory = mixture
    if name in STACKED:
        return
    single = models.load_model(directory)
    assert sum(".experts." in n for n in single.layout) > sum(".experts." in n for n, _ in single.named_parameters())
    state = {file_name(n, single.config): p.detach() for n, p in (*single.named_parameters(), *single.named_buffers())}
    (tmp_path / "fused").mkdir()
    save_file(state, tmp_path / "fused/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused/config.json").write_text((directory / "config.json").read_text())
    fused = models.load_model(tmp_path / "fused")
    assert all(torch.equal(p, q) for p, q in zip(single.parameters(), fused.parameters(), strict=True))
    models.save_model(fused, tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == state.keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(their_logits(again)[0], their_logits(theirs)[0])


def test_a_missing_expert_is_named(mixture, tmp_path):
    name, _, directory = mixture
    if name in STACKED:
        return
    state = load_file(directory / "model.safetensors")
    gone = next(n for n in state if ".experts.1." in n)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing parts of model.layers.\d.(mlp|mixer).experts.(gate_up|up|down)_proj"):
        models.load_model(tmp_path)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("apart", [False, True])
def test_grouped_linear_gives_every_row_its_own_expert(counts, dtype, tolerance, apart):
    """bfloat16 goes through `grouped_mm`, the others through the loop; experts without a token included; with matrices whose
    numbers lie apart, as a LoRA's B has them."""
    from extras.decoder.moe import grouped_linear

    torch.manual_seed(0)
    x, w = torch.randn(9, 16, dtype=dtype, requires_grad=True), torch.randn(4, 8, 16, dtype=dtype)
    w = (w.permute(1, 2, 0).contiguous().permute(2, 0, 1) if apart else w).requires_grad_()
    out = grouped_linear(x, w, torch.tensor(counts))
    expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    exact = torch.einsum("ni,noi->no", wide_x, wide_w[expert])
    scale = torch.randn(9, 8, dtype=torch.float64)
    got = torch.autograd.grad((out * scale.to(dtype)).sum(), (x, w))
    for a, b in zip((out, *got), (exact, *torch.autograd.grad((exact * scale).sum(), (wide_x, wide_w))), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_no_expert_sees_a_token_that_was_not_sent_to_it(mixture):
    from extras.decoder.moe import SparseMLP

    ours = models.load_model(mixture[2])
    layer = next(m for m in ours.modules() if isinstance(m, SparseMLP))
    seen = []
    layer.experts.register_forward_pre_hook(lambda m, args: seen.append((len(args[0]), args[1].tolist())))
    layer(torch.randn(11, 32))
    (rows, counts), = seen
    assert rows == sum(counts) == 11 * ours.config.moe["per_token"]


def test_lora_targets_that_are_experts_are_told_how_to_name_them(mixture):
    ours = models.load_model(mixture[2])
    for target in ("experts", "gate_up_proj"):
        if target == "gate_up_proj" and mixture[0] == "granite_h experts":
            continue  # its shared expert has a linear layer of that name
        with pytest.raises(ValueError, match=f"--lora_target_modules {target}: .*experts and routers: --lora_target_parameters"):
            put_lora(ours, 2, 4, 0.0, [target])


# Files with other names


@pytest.mark.parametrize("old, new", [("model.", "language_model.model."), ("model.", "model.language_model.")])
def test_prefixes_of_text_models_cut_out_of_larger_ones(old, new, tmp_path):
    model = make(CORE["qwen2"], torch.float32)
    write(model, tmp_path / "plain")
    rename = lambda n: new + n.removeprefix(old) if n.startswith(old) else n
    if new.startswith("language_model."):
        rename = lambda n: "language_model." + n
    state = {rename(n): p for n, p in load_file(tmp_path / "plain/model.safetensors").items()}
    (tmp_path / "prefixed").mkdir()
    save_file(state, tmp_path / "prefixed/model.safetensors")
    (tmp_path / "prefixed/config.json").write_text((tmp_path / "plain/config.json").read_text())
    loaded = models.load_model(tmp_path / "prefixed")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    models.save_model(loaded, tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == state.keys()


def test_original_gpt2_and_pythia_files(tmp_path):
    """The first releases: GPT-2 without "transformer.", both with causal masks and frequencies as tensors."""
    constants = {"gpt2": {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()}, "pythia": {
        "gpt_neox.layers.0.attention.bias": (1, 1, 64, 64), "gpt_neox.layers.0.attention.masked_bias": (),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (1,)}}
    for name, extra in constants.items():
        theirs = random_model(name)
        theirs.save_pretrained(tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        state = {n.removeprefix("transformer."): p for n, p in state.items()}
        save_file(state | {n: torch.ones(shape) for n, shape in extra.items()}, tmp_path / name / "model.safetensors")
        ours = models.load_model(tmp_path / name)
        with torch.no_grad():
            assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 1e-5
        models.save_model(ours, tmp_path / (name + " again"))
        assert load_file(tmp_path / (name + " again/model.safetensors")).keys() == state.keys()


@pytest.mark.parametrize("name", ["gpt2", "pythia", "qwen2_moe"])
def test_models_made_from_nothing_are_saved_under_hugging_face_names(name, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "a")
    model = models.Decoder(models.read_config(json.loads((tmp_path / "a/config.json").read_text())))
    model.load_state_dict(models.load_model(tmp_path / "a").state_dict())
    model.raw_config = json.loads((tmp_path / "a/config.json").read_text())
    models.save_model(model, tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(their_logits(again)[0], their_logits(theirs)[0])


@pytest.mark.parametrize("name, targets", [
    ("gpt2", ["c_attn"]), ("gpt2", ["attn.c_proj", "lm_head"]), ("gpt2", ["all-linear"]), ("gpt2", ["wte"]),
    ("pythia", ["query_key_value"]), ("pythia", ["all-linear"]), ("pythia", ["dense", "lm_head"]),
    ("phi3", ["qkv_proj", "gate_up_proj"]), ("gemma3", ["all-linear"]),
    ("qwen2_moe", ["q_proj", "shared_expert.up_proj"])])
def test_adapters_carry_the_names_of_the_familys_own_modules(name, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    random_model(name).save_pretrained(tmp_path / "base")
    ours = models.load_model(tmp_path / "base")
    put_lora(ours, 4, 8, 0.0, targets)
    randomize_lora(ours)
    save_adapter(ours, tmp_path / "a", dict(r=4, lora_alpha=8, lora_dropout=0.0, base_model_name_or_path="base"))
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "a").eval()
    with torch.no_grad():
        assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 2e-5
        fresh = "all-linear" if targets == ["all-linear"] else targets
        theirs = peft.get_peft_model(load(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=fresh)).eval()
        randomize_lora(theirs)
        theirs.save_pretrained(tmp_path / "b")
        load_adapter(ours, tmp_path / "b")
        assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 2e-5


def test_embedding_scale_is_rounded_to_the_weights_type():
    """Gemma multiplies by sqrt(hidden_size) in bf16 where its weights are bf16."""
    model = make(LLAMA | dict(model_type="gemma", hidden_size=48, num_attention_heads=4), torch.bfloat16)
    ids = torch.arange(5)
    factor = torch.tensor(math.sqrt(48), dtype=torch.bfloat16)
    assert torch.equal(model.model.embed(ids, ids), model.model.embed_tokens(ids) * factor)


def test_a_further_family_is_one_entry(tmp_path, monkeypatch):
    """The example of docs/extend.md: StableLM, LayerNorm and a partial rotation on Llama's layout."""
    from parts.families import FAMILIES

    page = (ROOT / "docs" / "extend.md").read_text("utf-8")
    shown = re.search(r'^\+    "stablelm": (.*?),\n    ', page, re.S | re.M)[1]
    entry = eval(shown.replace("\n+", "\n"), {"Family": Family})
    monkeypatch.setitem(CASES, "stablelm", ("stablelm", SIZES | dict(use_qkv_bias=True)))
    theirs = random_model("stablelm")
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="model_type 'stablelm' is not supported"):
        models.load_model(tmp_path / "a")
    monkeypatch.setitem(FAMILIES, "stablelm", entry)
    ours = models.load_model(tmp_path / "a")
    models.save_model(ours, tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert (our_logits(ours) - their_logits(theirs)[0]).abs().max() < 1e-5
        assert torch.equal(their_logits(again)[0], their_logits(theirs)[0])
