"""Families beyond the four of model.py, each a line or two: what is unlike Llama.

To add one: a `Family` with its features and with the keys of its config.json that Llama's lacks; where its files name
parameters otherwise, an entry of extras/layouts.py as well.
"""

from extras.layouts import llama_keys
from model import BIAS, FAMILIES, REQUIRED, WINDOW, Family


def find_family(raw: dict) -> Family:
    """The Family of a config.json; raises ValueError, saying why, where there is none."""
    name, families = raw.get("model_type"), FAMILIES | MORE_FAMILIES
    if raw.get("is_encoder_decoder"):
        raise ValueError(f"model_type {name!r} is an encoder-decoder model; only decoders are supported")
    if raw.get("kv_lora_rank"):
        raise ValueError(f"model_type {name!r} has multi-head latent attention (kv_lora_rank), which is not supported")
    if "audio_config" in raw:
        raise ValueError(f"model_type {name!r} reads sound; text-only decoders are supported "
                         f"({', '.join(families)})")
    remote = (raw.get("auto_map") or {}).get("AutoModelForCausalLM", "").rpartition(".")[2]
    if name not in families:
        why = " and needs remote code (auto_map), which is never run" if remote else ""
        raise ValueError(f"model_type {name!r} is not supported{why}; supported are {', '.join(families)}")
    # files of a supported family often still name the code it had before transformers took it in; other code is other
    if remote and not remote.lower().startswith(name.removesuffix("_text").replace("_", "")):
        raise ValueError(f"auto_map names code of its own ({remote}) for model_type {name!r}; remote code is never run")
    return families[name]


SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
OLMO2_NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
GEMMA_KEYS = BIAS | dict(head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation=None, tie_word_embeddings=True)
GEMMA2_KEYS = GEMMA_KEYS | dict(query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
                                final_logit_softcapping=None)
SCALES = dict(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
MOE_KEYS = dict(num_experts=None, num_local_experts=None, num_experts_per_tok=REQUIRED, output_router_logits=False,
                router_aux_loss_coef=0.001)
QWEN_MOE_KEYS = MOE_KEYS | dict(moe_intermediate_size=REQUIRED, norm_topk_prob=False, decoder_sparse_step=1,
                                mlp_only_layers=None)


def gemma(c: dict) -> dict:
    """Gemma 1's first files say "gelu" and mean its tanh form."""
    act = c["hidden_activation"] or c["hidden_act"]
    old_name = act == "gelu" and "query_pre_attn_scalar" not in c
    return dict(embed_scale=c["hidden_size"] ** 0.5, hidden_act="gelu_pytorch_tanh" if old_name else act,
                attention_scale=c.get("query_pre_attn_scalar", c["head_dim"]) ** -0.5,
                attn_softcap=c.get("attn_logit_softcapping"), final_softcap=c.get("final_logit_softcapping"))


def smollm3_turns(i: int, c: dict) -> bool:
    """Every fourth layer has no rotary embeddings."""
    given = c["no_rope_layers"]
    return bool(given[i]) if given else (i + 1) % c["no_rope_layer_interval"] != 0


def granite(c: dict) -> dict:
    return dict(embed_scale=c["embedding_multiplier"], attention_scale=c["attention_multiplier"],
                residual_scale=c["residual_multiplier"], logit_scale=1 / c["logits_scaling"])


def moe(c: dict) -> dict:
    """What extras/moe.py reads; a layer is dense where `sparse` is False."""
    step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    return dict(moe=dict(
        experts=c["num_experts"] or c["num_local_experts"], per_token=c["num_experts_per_tok"],
        size=c.get("moe_intermediate_size", c["intermediate_size"]),
        shared_size=c.get("shared_expert_intermediate_size"), normalize=c.get("norm_topk_prob", True),
        sparse=tuple((i + 1) % step == 0 and i not in dense for i in range(c["num_hidden_layers"])),
        router_aux_loss_coef=c["router_aux_loss_coef"]))


MORE_FAMILIES = {
    "gemma": Family(dict(norm_offset=True), GEMMA_KEYS, more=gemma),
    "gemma2": Family(dict(norm_offset=True, block_norms=SANDWICH),
                     GEMMA2_KEYS | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
                     slides=lambda i, c: i % 2 == 0, more=gemma),
    "gemma3_text": Family(dict(norm_offset=True, block_norms=SANDWICH, qk_norm="head"),
                          GEMMA2_KEYS | dict(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6),
                          slides=lambda i, c: (i + 1) % c["sliding_window_pattern"] != 0, more=gemma),
    "phi3": Family(dict(fused_qkv="blocks", fused_gate_up=True), dict(sliding_window=None), slides=lambda i, c: True),
    "olmo2": Family(dict(block_norms=OLMO2_NORMS, qk_norm="full"), BIAS),
    "smollm3": Family({}, BIAS | WINDOW | dict(mlp_bias=False, tie_word_embeddings=True, rope_theta=2e6,
                                               no_rope_layers=None, no_rope_layer_interval=4),
                      slides=lambda i, c: not smollm3_turns(i, c), turns=smollm3_turns),
    "granite": Family({}, BIAS | SCALES | dict(mlp_bias=False), more=granite),
    "gpt2": Family(dict(norm="layer", learned_positions=True, qkv_bias=True, o_bias=True, mlp_bias=True,
                        fused_qkv="blocks", gated_mlp=False, other_names=True),
                   dict(hidden_act="gelu_new", tie_word_embeddings=True), rename=llama_keys),
    "gpt_neox": Family(dict(norm="layer", mlp_bias=True, fused_qkv="heads", gated_mlp=False, other_names=True),
                       dict(attention_bias=True, hidden_act="gelu", use_parallel_residual=True,
                            partial_rotary_factor=0.25),
                       more=lambda c: dict(parallel_residual=c["use_parallel_residual"]), rename=llama_keys),
    "mixtral": Family(dict(other_names=True), MOE_KEYS | dict(rope_theta=1e6, sliding_window=None),
                      slides=lambda i, c: True, more=moe),
    "qwen2_moe": Family(dict(other_names=True),
                        QWEN_MOE_KEYS | WINDOW | dict(qkv_bias=True, shared_expert_intermediate_size=REQUIRED),
                        slides=lambda i, c: i % 2 == 0 and i < c["max_window_layers"],
                        more=lambda c: moe(c) | dict(qkv_bias=c["qkv_bias"])),
    "qwen3_moe": Family(dict(qk_norm="head", other_names=True),
                        QWEN_MOE_KEYS | BIAS | dict(use_sliding_window=False, sliding_window=4096),
                        slides=lambda i, c: True, more=moe),
    "olmoe": Family(dict(qk_norm="full", other_names=True),
                    MOE_KEYS | BIAS | dict(norm_topk_prob=False, router_aux_loss_coef=0.01), more=moe),
}
