"""Model families: a `Family` names what differs from Llama, and the modules branch on that.

To add one: an entry with its features and with the keys of its config.json that Llama's lacks;
where its files name parameters otherwise, `other_names=True` and an entry of parts/names.py as
well.
"""

import math
import re
from typing import Callable, NamedTuple


class Family(NamedTuple):
    """What differs from Llama in a family: enough to read its config.json.

    In the functions `c` is a dict of the keys that the family reads.
    """

    features: dict  # fields of ModelConfig that config.json does not say
    keys: dict  # keys of config.json it reads besides COMMON, with their defaults
    # whether layer i has the window, where the file has no layer_types
    slides: Callable = lambda i, c: False
    turns: Callable = lambda i, c: True  # whether layer i has rotary embeddings; c["slides"] too
    more: Callable = lambda c: {}  # further fields of ModelConfig
    rename: Callable = lambda raw: raw  # config.json with Llama's keys
    interleaved: bool = False  # rotates neighbouring dims, as GPT-J does


REQUIRED = object()  # in place of a default
INFINITY = float("inf")
COMMON = dict(
    vocab_size=REQUIRED, hidden_size=REQUIRED, intermediate_size=REQUIRED,
    num_hidden_layers=REQUIRED, num_attention_heads=REQUIRED, max_position_embeddings=REQUIRED,
    rms_norm_eps=REQUIRED, num_key_value_heads=None, head_dim=None, hidden_act="silu",
    tie_word_embeddings=False, rope_theta=10000.0, rope_scaling=None, rope_parameters=None,
    partial_rotary_factor=1.0, original_max_position_embeddings=None)

# Keys of config.json that change nothing in a forward pass without dropout.
HARMLESS = re.compile(r"""(?x) ^( architectures | model_type | auto_map | (torch_)?dtype
    | transformers_version | _name_or_path | tokenizer_class
    | (bos|eos|pad|unk|sep|eod|decoder_start|forced_eos)_token_id | initializer_range
    | use_cache | cache_implementation | pretraining_tp | gradient_checkpointing | .*dropout
    | .*_pdrop | summary_.* | task_specific_params | n_ctx | max_sequence_length
    | max_window_layers | sliding_window_size | _sliding_window_pattern
    | reorder_and_upcast_attn | full_attn_mod | interpolate_factor | _?attn_implementation.*
    | output_(attentions|hidden_states) | (use_)?return_dict | id2label | label2id | problem_type
    | is_decoder | m(ax|in)_length | do_sample | temperature | top_[kp] | num_beams
    | repetition_penalty | mamba_ssm_dtype | mtp_.* | unsloth_.* | transformers\.js_config )$""")

# Groups of keys that several families read.
BIAS = dict(attention_bias=False)
WINDOW = dict(
    use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None)
GEMMA_KEYS = BIAS | dict(
    head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation=None, tie_word_embeddings=True)
GEMMA2_KEYS = GEMMA_KEYS | dict(
    query_pre_attn_scalar=256, sliding_window=4096, layer_types=None, final_logit_softcapping=None)
GEMMA4_ROPES = dict(
    full_attention=dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4))
GEMMA4_KEYS = BIAS | dict(
    head_dim=256, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
    num_key_value_heads=4, sliding_window=512, layer_types=None, final_logit_softcapping=None,
    rope_parameters=GEMMA4_ROPES, global_head_dim=512, num_global_key_value_heads=None,
    attention_k_eq_v=False, num_kv_shared_layers=0, use_double_wide_mlp=False,
    hidden_size_per_layer_input=256, vocab_size_per_layer_input=262144, enable_moe_block=False,
    num_experts=None, top_k_experts=None, moe_intermediate_size=None)
SCALES = dict(
    embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
MOE_KEYS = dict(
    num_experts=None, num_local_experts=None, num_experts_per_tok=REQUIRED,
    output_router_logits=False, router_aux_loss_coef=0.001)
QWEN_MOE_KEYS = MOE_KEYS | dict(
    moe_intermediate_size=REQUIRED, norm_topk_prob=False, decoder_sparse_step=1,
    mlp_only_layers=None)

# Qwen3-Next and Qwen3.5
DELTA_KEYS = BIAS | dict(
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128,
    linear_num_key_heads=16, linear_num_value_heads=32, layer_types=None,
    full_attention_interval=4, head_dim=256, partial_rotary_factor=0.25)
SHARED_KEYS = dict(moe_intermediate_size=REQUIRED, shared_expert_intermediate_size=REQUIRED)
# DeepSeek's mixtures of experts, and GLM's
GROUP_KEYS = BIAS | dict(
    n_routed_experts=REQUIRED, num_experts_per_tok=REQUIRED, moe_intermediate_size=REQUIRED,
    n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1, norm_topk_prob=True,
    routed_scaling_factor=1.0, num_nextn_predict_layers=1, output_router_logits=False)
LATENT_KEYS = GROUP_KEYS | dict(
    q_lora_rank=None, kv_lora_rank=REQUIRED, qk_nope_head_dim=REQUIRED, qk_rope_head_dim=REQUIRED,
    v_head_dim=REQUIRED)
DEEPSEEK_KEYS = LATENT_KEYS | dict(
    n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3)

# Mamba-2: Granite 4 H, Falcon-H1, Nemotron-H
MAMBA_KEYS = dict(
    mamba_n_heads=128, mamba_n_groups=1, mamba_d_state=256, mamba_d_head=None, mamba_d_conv=4,
    mamba_expand=2, mamba_conv_bias=True, time_step_limit=None)
FALCON_H1_SCALES = dict(
    embedding_multiplier=1.0, lm_head_multiplier=1.0, key_multiplier=1.0,
    attention_in_multiplier=1.0, attention_out_multiplier=1.0, ssm_in_multiplier=1.0,
    ssm_out_multiplier=1.0, ssm_multipliers=None, mlp_multipliers=None)

NEMOTRON_EXPERTS = dict(
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=7688,
    moe_shared_expert_intermediate_size=7688, moe_latent_size=None, num_nextn_predict_layers=0)
NEMOTRON_KEYS = MAMBA_KEYS | GROUP_KEYS | NEMOTRON_EXPERTS | dict(
    layer_types=None, hidden_act="relu2", mlp_bias=False, num_key_value_heads=8, head_dim=128,
    rms_norm_eps=1e-5, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=8)
# other names of them in Nemotron-H's files, of several ages
NEMOTRON_NAMES = dict(
    layers_block_type="layer_types", hybrid_override_pattern="layer_types",
    mlp_hidden_act="hidden_act", attention_head_dim="head_dim", norm_eps="rms_norm_eps",
    num_query_groups="num_key_value_heads", layer_norm_epsilon="rms_norm_eps",
    mamba_num_heads="mamba_n_heads", mamba_head_dim="mamba_d_head",
    ssm_state_size="mamba_d_state", mamba_state_dim="mamba_d_state", n_groups="mamba_n_groups",
    mamba_num_groups="mamba_n_groups", conv_kernel="mamba_d_conv", use_conv_bias="mamba_conv_bias",
    mamba_dt_limit="time_step_limit", num_local_experts="n_routed_experts")
NEMOTRON_LAYERS = {
    "M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe",
    "mamba": "linear_attention", "attention": "full_attention"}
# what its files say of initialization, of kernels and of what is computed besides; `expand` is
# there, but heads and their size are what counts
NEMOTRON_UNREAD = (
    "time_step_min", "time_step_max", "time_step_floor", "time_step_rank", "mamba_dt_min",
    "mamba_dt_max", "mamba_dt_init_floor", "rescale_prenorm_residual", "residual_in_fp32", "expand",
    "mamba_expand", "chunk_size", "mamba_chunk_size", "use_mamba_kernels", "mamba_ssm_cache_dtype",
    "num_logits_to_keep", "moe_shared_expert_overlap", "num_nextn_predict_layers")

# Norms before attention, after it, before the MLP, after it.
SANDWICH = ("input_layernorm", "post_attention_layernorm",
            "pre_feedforward_layernorm", "post_feedforward_layernorm")
DELTA = dict(norm_offset=True, qk_norm="head", output_gate=True)
OLMO2_NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
GLM4_NORMS = ("input_layernorm", "post_self_attn_layernorm",
              "post_attention_layernorm", "post_mlp_layernorm")


def gemma(c: dict) -> dict:
    """Read scales and soft-caps; Gemma 1's first files say "gelu" and mean its tanh form."""
    act = c["hidden_activation"] or c["hidden_act"]
    if act == "gelu" and "query_pre_attn_scalar" not in c:
        act = "gelu_pytorch_tanh"
    return dict(embed_scale=c["hidden_size"] ** 0.5, hidden_act=act,
                attention_scale=c.get("query_pre_attn_scalar", c["head_dim"]) ** -0.5,
                attn_softcap=c.get("attn_logit_softcapping"),
                final_softcap=c.get("final_logit_softcapping"))


def gemma4_keys(raw: dict) -> dict:
    """Read `per_layer_config`, which newer files have, as what older ones say of all layers without
    a window. (What attends both ways with "vision" are pictures alone.)

    Raises ValueError where it says anything else.
    """
    raw = without(raw, dict(use_bidirectional_attention="vision"))
    count = raw.get("num_hidden_layers") or 0
    types = raw.get("layer_types") or [
        "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    raw["layer_types"] = [*types[:-1], "full_attention"]  # the last one always
    if raw.get("rope_parameters") is None:
        raw["rope_parameters"] = GEMMA4_ROPES
    own = raw.pop("per_layer_config", None)
    if own is None:
        return raw
    odd = [i for i in own if not i.isdecimal()]
    if odd:
        raise ValueError(f"config.json: per_layer_config names {odd[0]!r:.60}, which is no layer")
    own = {int(i): dict(changes) for i, changes in own.items()}
    full = [i for i, kind in enumerate(raw["layer_types"]) if kind == "full_attention"]
    changes = own.get(full[0], {})
    is_known = changes.keys() <= {"head_dim", "num_key_value_heads"}
    if own != (dict.fromkeys(full, changes) if changes else {}) or not is_known:
        raise ValueError("config.json: per_layer_config says more than the head_dim and "
                         "num_key_value_heads of all layers without a window; not supported")
    raw["global_head_dim"] = changes.get("head_dim", raw.get("head_dim"))
    raw["num_global_key_value_heads"] = changes.get("num_key_value_heads")
    return raw


def gemma4(c: dict) -> dict:
    """Read what extras/decoder/per_layer.py needs."""
    n, types = c["num_hidden_layers"], c["layer_types"]
    full = [kind == "full_attention" for kind in types]
    first = n - c["num_kv_shared_layers"]  # from here on, layers read others' keys and values
    makers = {kind: i for i, kind in enumerate(types[:first])}
    odd = sorted({*types} - {"full_attention", "sliding_attention"})
    if odd:
        raise ValueError(f"config.json: layer_types names {', '.join(odd)}; sliding_attention and "
                         "full_attention are known")
    if not 0 < first <= n or not makers.keys() >= set(types):
        raise ValueError(f"config.json: num_kv_shared_layers = {n - first} of {n}: no layer before "
                         "them makes the keys and values that they read")
    lacking = set(types) - {k for k, v in (c["rope_parameters"] or {}).items() if isinstance(v, dict)}
    if lacking:
        raise ValueError(f"config.json: rope_parameters says nothing of {', '.join(sorted(lacking))}")
    if c["hidden_size_per_layer_input"] and (c["vocab_size_per_layer_input"] or 0) < c["vocab_size"]:
        raise ValueError(f"config.json: vocab_size_per_layer_input = {c['vocab_size_per_layer_input']} "
                         f"is less than vocab_size = {c['vocab_size']}")
    few = c["num_global_key_value_heads"] or c["num_key_value_heads"]
    if few and c["num_attention_heads"] % few:
        raise ValueError(f"config.json: num_attention_heads = {c['num_attention_heads']} is no "
                         f"multiple of num_global_key_value_heads = {few}")
    of_full = dict(head_dim=c["global_head_dim"] or c["head_dim"])
    if c["attention_k_eq_v"] and c["num_global_key_value_heads"]:
        of_full["num_key_value_heads"] = c["num_global_key_value_heads"]
    wide = dict(intermediate_size=2 * c["intermediate_size"]) if c["use_double_wide_mlp"] else {}
    sizes = tuple((of_full if full[i] else {}) | (wide if i >= first else {}) for i in range(n))
    experts = None
    if c["enable_moe_block"]:
        experts = dict(experts=c["num_experts"], per_token=c["top_k_experts"],
                       size=c["moe_intermediate_size"])
        if None in experts.values() or experts["per_token"] > experts["experts"]:
            raise ValueError("config.json: enable_moe_block needs num_experts, top_k_experts of "
                             f"them, and moe_intermediate_size; it has {experts}")
    return gemma(c) | dict(hidden_act=c["hidden_activation"], per_layer=dict(
        sizes=sizes, reads=tuple(i if i < first else makers[types[i]] for i in range(n)),
        same=tuple(full[i] and c["attention_k_eq_v"] for i in range(n)),
        input_size=c["hidden_size_per_layer_input"] or 0,
        vocab_size=c["vocab_size_per_layer_input"], moe=experts))


def smollm3_turns(i: int, c: dict) -> bool:
    """Tell whether layer i rotates: all but every fourth."""
    given = c["no_rope_layers"]
    if given and len(given) != c["num_hidden_layers"]:
        raise ValueError(f"config.json: no_rope_layers names {len(given)} layers of "
                         f"{c['num_hidden_layers']}")
    return bool(given[i]) if given else (i + 1) % c["no_rope_layer_interval"] != 0


def granite(c: dict) -> dict:
    return dict(
        embed_scale=c["embedding_multiplier"], attention_scale=c["attention_multiplier"],
        residual_scale=c["residual_multiplier"], logit_scale=1 / c["logits_scaling"])


def moe(c: dict) -> dict:
    """Read what extras/decoder/moe.py needs; a layer is dense where `sparse` is False."""
    step = c.get("decoder_sparse_step", 1)
    dense = c.get("mlp_only_layers") or []
    layers = range(c["num_hidden_layers"])
    experts, per_token = c["num_experts"] or c["num_local_experts"], c["num_experts_per_tok"]
    if not experts or per_token > experts:
        raise ValueError(
            f"config.json: num_experts_per_tok = {per_token} of {experts or 0} experts")
    return dict(moe=dict(
        experts=experts, per_token=per_token,
        size=c.get("moe_intermediate_size", c["intermediate_size"]),
        shared_size=c.get("shared_expert_intermediate_size"),
        normalize=c.get("norm_topk_prob", True),
        sparse=tuple((i + 1) % step == 0 and i not in dense for i in layers),
        router_aux_loss_coef=c["router_aux_loss_coef"]))


def gpt_oss(c: dict) -> dict:
    """A softmax over the chosen experts' logits is that over all, normalized over the chosen."""
    clamp = (c["swiglu_alpha"], c["swiglu_limit"])
    return dict(sinks=True, moe=moe(c)["moe"] | dict(clamp=clamp))


def gpt_oss_keys(raw: dict) -> dict:
    """Leave out what its files say twice; an act is named, but is not what its experts compute."""
    return without(raw, dict(
        hidden_act="silu", experts_per_token=raw.get("num_experts_per_tok")),
        ("initial_context_length",))


def without(raw: dict, said: dict, unread: tuple[str, ...] = ()) -> dict:
    """Leave out keys that are not read, and those that only say what the family does anyway.

    Raises ValueError where they say something else.
    """
    odd = [f"{k} = {raw[k]!r}" for k, v in said.items() if raw.get(k) not in (None, v)]
    if odd:
        raise ValueError(f"config.json: {', '.join(odd)} is not supported")
    return {k: v for k, v in raw.items() if k not in said and k not in unread}


def delta(c: dict, fused: bool = False) -> dict:
    """Read what extras/decoder/gated_delta.py needs; `fused` is how its projections are cut."""
    types = c["layer_types"]
    if not types:
        every = c["full_attention_interval"]
        types = ["full_attention" if (i + 1) % every == 0 else "linear_attention"
                 for i in range(c["num_hidden_layers"])]
    odd = sorted({*types} - {"full_attention", "linear_attention"})
    if odd:
        raise ValueError(f"config.json: layer_types names {', '.join(odd)}; linear_attention and "
                         "full_attention are known")
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    if value_heads % key_heads:
        raise ValueError(f"config.json: linear_num_value_heads = {value_heads} is no multiple of "
                         f"linear_num_key_heads = {key_heads}")
    recurs = tuple(t == "linear_attention" for t in types)
    return dict(mixer=dict(
        kind="gated_delta", recurs=recurs, attends=tuple(not r for r in recurs), fused=fused,
        key_heads=key_heads, key_size=c["linear_key_head_dim"], value_heads=value_heads,
        value_size=c["linear_value_head_dim"], width=c["linear_conv_kernel_dim"]))


def grouped(c: dict, scores: str = "sigmoid") -> dict:
    """Read what the routers of DeepSeek and GLM need (extras/decoder/moe.py's GroupRouter).

    Experts come in groups, of which a token may choose in some; with sigmoid scores there is a
    correction bias, which the choice alone sees.
    """
    experts, per_token = c["n_routed_experts"], c["num_experts_per_tok"]
    groups, kept = c["n_group"] or 1, c["topk_group"] or 1
    least = 2 if scores == "sigmoid" else 1  # a group counts by its best experts
    if experts % groups or experts // groups < least or kept > groups:
        raise ValueError(f"config.json: n_routed_experts = {experts} in n_group = {groups}, of "
                         f"which topk_group = {kept}: no such division")
    if per_token > kept * (experts // groups):
        raise ValueError(f"config.json: num_experts_per_tok = {per_token} of "
                         f"{kept * (experts // groups)} experts in topk_group = {kept} groups")
    layers = range(c["num_hidden_layers"])
    sparse = [i >= c["first_k_dense_replace"] for i in layers]
    if c.get("mlp_layer_types"):
        odd = sorted({*c["mlp_layer_types"]} - {"sparse", "dense"})
        if odd:
            raise ValueError(f"config.json: mlp_layer_types names {', '.join(odd)}; sparse and dense "
                             "are known")
        sparse = [kind == "sparse" for kind in c["mlp_layer_types"]]
    if len(sparse) != len(layers):
        raise ValueError(
            f"config.json: mlp_layer_types names {len(sparse)} layers of {len(layers)}")
    size = c["moe_intermediate_size"]
    return dict(moe=dict(
        experts=experts, per_token=per_token, size=size, sparse=tuple(sparse), scores=scores,
        shared_size=size * (c["n_shared_experts"] or 0), normalize=bool(c["norm_topk_prob"]),
        groups=groups, groups_kept=kept, scale=c["routed_scaling_factor"],
        router_aux_loss_coef=None, more_layers=c["num_nextn_predict_layers"] or 0))


def latent(c: dict, scores: str = "sigmoid") -> dict:
    """Read what extras/decoder/latent.py needs, and the experts.

    `head_dim` is the larger of that of queries and keys and that of values. YaRN's `mscale_all_dim`
    scales the scores (the factor on cos and sin is a ratio of two such numbers, most often 1).
    """
    heads = c["num_attention_heads"]
    if (c["num_key_value_heads"] or heads) != heads:
        raise ValueError(
            f"config.json: num_key_value_heads = {c['num_key_value_heads']}, but latent attention "
            f"has keys and values for each of its {heads} heads")
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    scale = (nope + rope) ** -0.5
    given = c["rope_scaling"] or c["rope_parameters"] or {}
    if given.get("mscale_all_dim") and given["factor"] > 1:
        scale *= (0.1 * given["mscale_all_dim"] * math.log(given["factor"]) + 1) ** 2
    sizes = dict(
        query=c["q_lora_rank"], latent=c["kv_lora_rank"], nope=nope, rope=rope, value=value)
    return grouped(c, scores) | dict(
        latent=sizes, head_dim=max(nope + rope, value), attention_scale=scale)


# what files of DeepSeek's layout say of training, or twice
UNREAD = ("aux_loss_alpha", "seq_aux", "num_mtp_layers", "qk_head_dim", "head_dim")


def latent_keys(raw: dict) -> dict:
    """Leave out what DeepSeek's layout implies; `head_dim` becomes that of the rotated part."""
    if raw["model_type"] == "deepseek_v2":
        said = dict(scoring_func="softmax", norm_topk_prob=False)
        method = raw.get("topk_method") or "greedy"
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"config.json: topk_method = {method!r} is not supported")
        raw = {k: v for k, v in raw.items() if k != "topk_method"}
        if method == "greedy":
            raw |= dict(n_group=1, topk_group=1)
    else:
        said = dict(scoring_func="sigmoid", topk_method="noaux_tc")
    raw = without(raw, said | dict(rope_interleave=True, moe_layer_freq=1, ep_size=1), UNREAD)
    return raw | dict(head_dim=raw.get("qk_rope_head_dim"))


def without_axes(raw: dict) -> dict:
    """Drop how Qwen3.5 divides its rotation by time, height and width: in text they are equal."""
    raw = without(raw, dict(attn_output_gate=True, output_gate_type="swish"))
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(key), dict):
            raw[key] = {k: v for k, v in raw[key].items() if not k.startswith("mrope_")}
    if "moe_intermediate_size" in raw:  # no layer is dense
        raw.setdefault("intermediate_size", raw["moe_intermediate_size"])
    return raw


def mamba(c: dict, recurs: tuple[bool, ...], attends: tuple[bool, ...], **more: object) -> dict:
    """Read what extras/decoder/mamba.py needs, for the layers that `recurs` names."""
    heads, groups = c["mamba_n_heads"], c["mamba_n_groups"]
    inner = c.get("mamba_d_ssm") or c["mamba_expand"] * c["hidden_size"]
    size = c["mamba_d_head"] or inner // heads
    if heads * size != inner or heads % groups:
        raise ValueError(f"config.json: {heads} mamba_n_heads of {size} in {groups} mamba_n_groups "
                         f"do not make {inner} channels")
    limit = c["time_step_limit"] or [0.0, INFINITY]
    # as transformers 5 writes it into config.json
    limit = [INFINITY if x == {"__float__": "Infinity"} else x for x in limit]
    if [type(x) for x in limit] != [float, float] or not limit[0] <= limit[1]:
        raise ValueError(f"config.json: time_step_limit = {c['time_step_limit']!r:.60}: expected "
                         "two numbers, the smaller first")
    return dict(mixer=dict(
        kind="mamba", recurs=recurs, attends=attends, heads=heads, head_size=size, groups=groups,
        state_size=c["mamba_d_state"], width=c["mamba_d_conv"], conv_bias=c["mamba_conv_bias"],
        dt_limit=tuple(limit), act=c["hidden_act"], norm="last", scales=None) | more)


def without_scan(raw: dict) -> dict:
    """Leave out what says how Mamba's scan is cut, and biases that no published file has."""
    raw = without(raw, dict(mamba_proj_bias=False, projectors_bias=False, mamba_use_mlp=True), (
        "mamba_chunk_size", "num_logits_to_keep", "mlp_expansion_factor", "normalization_function"))
    none = dict(mamba_d_head="auto", num_local_experts=0, num_experts_per_tok=0)
    return {k: v for k, v in raw.items() if k not in none or v != none[k]}


def renamed(raw: dict, names: dict[str, str]) -> dict:
    """Give keys their other names. Raises ValueError where a file has several that disagree."""
    found: dict = {}
    for key, value in raw.items():
        name = names.get(key, key)
        if found.get(name) not in (None, value) and value is not None:
            raise ValueError(f"config.json: {key} = {value!r:.60}, but another name of it says "
                             f"{found[name]!r:.60}")
        found[name] = found.get(name) if value is None else value
    return found


def nemotron_keys(raw: dict) -> dict:
    """Give Nemotron-H's config.json the names of other families, and its layers as a list.

    Attention does not rotate, so nothing that is said of that counts; nor does what is said of
    experts in a model without them.
    """
    raw = without(raw, dict(
        attention_bias=False, use_bias=False, mamba_proj_bias=False, n_shared_experts=1,
        sliding_window=0, mamba_hidden_act="silu"), NEMOTRON_UNREAD)
    for key in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        if raw.get(key) is not None:
            raw[key] = [NEMOTRON_LAYERS.get(kind, kind) for kind in raw[key]]
    raw = renamed(raw, NEMOTRON_NAMES)
    types = raw.get("layer_types") or []
    odd = sorted(map(str, {*types} - {*NEMOTRON_LAYERS.values()}))
    if odd or not types:
        raise ValueError(
            f"config.json: hybrid_override_pattern or layers_block_type names "
            f"{', '.join(odd) or 'no layer'}; known are M (linear_attention, mamba), "
            "* (full_attention, attention), - (mlp) and E (moe)")
    unread = () if "moe" in types else NEMOTRON_EXPERTS
    raw = {k: v for k, v in raw.items() if not (k.startswith("rope_") or k in unread)}
    return raw | dict(num_hidden_layers=raw.get("num_hidden_layers") or len(types))


def nemotron(c: dict) -> dict:
    """Read what each layer is: a Mamba mixer, attention, an MLP, or experts."""
    types = c["layer_types"]
    recurs, attends = (
        tuple(t == kind for t in types) for kind in ("linear_attention", "full_attention"))
    inner = c["mamba_n_heads"] * c["mamba_d_head"]
    found = mamba(c | dict(mamba_d_ssm=inner), recurs, attends, act="silu")
    if "moe" in types:
        kinds = ["sparse" if t == "moe" else "dense" for t in types]
        found |= dict(moe=grouped(c | dict(mlp_layer_types=kinds))["moe"] | dict(
            shared_size=c["moe_shared_expert_intermediate_size"], gated=False,
            inner=c["moe_latent_size"]))
    return found


def llama4(c: dict) -> dict:
    """Read attention in chunks, and where its experts are; the dense MLP has a size of its own."""
    layers = range(c["num_hidden_layers"])
    turns = tuple(smollm3_turns(i, c) for i in layers)
    size = c["attention_chunk_size"]
    types = c["layer_types"] or []
    if any((kind == "chunked_attention") != turn for kind, turn in zip(types, turns)):
        raise ValueError("config.json: layer_types: chunked attention in other layers than those "
                         "that rotate (no_rope_layers) is not supported")
    step = c["interleave_moe_layer_step"]
    given = c["moe_layers"]
    sparse = tuple(i in given if given is not None else (i + 1) % step == 0 for i in layers)
    scale = (float(c["floor_scale"]), float(c["attn_scale"]))
    return dict(
        windows=tuple(-size if turn else None for turn in turns),
        mixer=dict(
            kind="chunked", size=size, recurs=(False,) * len(turns), attends=(True,) * len(turns),
            eps=c["rms_norm_eps"] if c["use_qk_norm"] else None,
            temperature=scale if c["attn_temperature_tuning"] else None),
        moe=moe(c)["moe"] | dict(
            sparse=sparse, shared_size=c["intermediate_size"], router_aux_loss_coef=None,
            scales_input=True, shared_gate=False),
        intermediate_size=c["intermediate_size_mlp"])


def granite_hybrid(c: dict) -> dict:
    """Read which layers have attention; their MLP is called a shared one, beside experts or not."""
    kinds = dict(mamba=True, linear_attention=True, attention=False, full_attention=False)
    types = c["layer_types"] or ["mamba"] * c["num_hidden_layers"]
    odd = sorted({*types} - kinds.keys())
    if odd:
        raise ValueError(f"config.json: layer_types names {', '.join(odd)}; known are "
                         f"{', '.join(kinds)}")
    recurs = tuple(kinds[t] for t in types)
    experts = {}
    if c["num_local_experts"]:
        experts = dict(moe=moe(c)["moe"] | dict(
            shared_size=c["shared_intermediate_size"], shared_gate=False))
    mixer = mamba(c, recurs, tuple(not r for r in recurs)) if any(recurs) else {}
    return granite(c) | mixer | experts | dict(intermediate_size=c["shared_intermediate_size"])


def numbers(c: dict, key: str, count: int) -> list[float]:
    """Return a list of factors, ones where the file has none."""
    given = [1.0] * count if c[key] is None else c[key]
    is_list = isinstance(given, list) and len(given) == count
    if not is_list or not all(type(x) in (int, float) and abs(x) < 1e30 for x in given):
        raise ValueError(f"config.json: {key} = {given!r:.60}: expected {count} numbers")
    return given


def falcon_h1(c: dict) -> dict:
    """Read the multipliers; those inside attention scale its scores, the rest is the mixer's."""
    inside = c["attention_in_multiplier"]
    parts = [c["ssm_in_multiplier"] * s for s in numbers(c, "ssm_multipliers", 5)]
    every = (True,) * c["num_hidden_layers"]
    norm = None
    if c["mamba_rms_norm"]:
        norm = "first" if c["mamba_norm_before_gate"] else "last"
    return dict(
        embed_scale=c["embedding_multiplier"], logit_scale=c["lm_head_multiplier"],
        attention_scale=c["head_dim"] ** -0.5 * c["key_multiplier"] * inside**2) | mamba(
        c, every, every, norm=norm, scales=parts, out_scale=c["ssm_out_multiplier"],
        attention_out=inside * c["attention_out_multiplier"],
        mlp_scales=numbers(c, "mlp_multipliers", 2))


LLAMA_KEYS = {
    "gpt2": {"n_embd": "hidden_size", "n_head": "num_attention_heads",
             "n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings",
             "n_inner": "intermediate_size", "activation_function": "hidden_act",
             "layer_norm_epsilon": "rms_norm_eps"},
    "gpt_neox": {"layer_norm_eps": "rms_norm_eps", "rotary_pct": "partial_rotary_factor",
                 "rotary_emb_base": "rope_theta"}}


def llama_keys(raw: dict) -> dict:
    """Give GPT-2's or GPT-NeoX's config.json Llama's names for what Llama has too."""
    raw = without(raw, dict(scale_attn_weights=True))
    names = LLAMA_KEYS[raw["model_type"]]
    raw = {names.get(k, k): v for k, v in raw.items()}
    if raw.get("intermediate_size") is None and "hidden_size" in raw:
        raw["intermediate_size"] = 4 * raw["hidden_size"]
    return raw


def cohere2_keys(raw: dict) -> dict:
    """Give Cohere2's config.json Llama's names."""
    raw = without(raw, dict(
        use_parallel_block=True, use_gated_activation=True, use_embedding_sharing=True,
        position_embedding_type="rope_gptj", rotary_pct=1.0, layer_switch=4,
        order_of_interleaved_layers="local_attn_first"), ("use_parallel_embedding",))
    return {"rms_norm_eps" if k == "layer_norm_eps" else k: v for k, v in raw.items()}


HUNYUAN_UNREAD = (
    "cla_share_factor", "dense_list", "pool_type", "org_vocab_size", "mask_init_id", "pad_id",
    "im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id")


def hunyuan_keys(raw: dict) -> dict:
    """Stretch the base by `alpha`: what its files call "dynamic" does not depend on the length.

    Its files have keys of relatives with pictures, with classes or with shared keys and values.
    """
    raw = without(raw, dict(
        use_qk_norm=True, use_rotary_pos_emb=True, norm_type="rms",
        attention_head_dim=raw.get("head_dim")), HUNYUAN_UNREAD)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not rope.get("alpha"):
        return raw
    dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    theta = rope.get("rope_theta") or raw.get("rope_theta", COMMON["rope_theta"])
    theta *= rope["alpha"] ** (dim / (dim - 2))
    return raw | dict(rope_scaling=None, rope_parameters=dict(rope_theta=theta))


FAMILIES = {
    "llama": Family({}, BIAS | dict(mlp_bias=False)),
    "mistral": Family({}, dict(sliding_window=4096), slides=lambda i, c: True),
    "qwen2": Family(
        dict(qkv_bias=True), WINDOW, slides=lambda i, c: i >= c["max_window_layers"]),
    "qwen3": Family(
        dict(qk_norm="head"), BIAS | WINDOW | dict(head_dim=128),
        slides=lambda i, c: i >= c["max_window_layers"]),
    "gemma": Family(dict(norm_offset=True), GEMMA_KEYS, more=gemma),
    "gemma2": Family(
        dict(norm_offset=True, block_norms=SANDWICH),
        GEMMA2_KEYS | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        slides=lambda i, c: i % 2 == 0, more=gemma),
    "gemma3_text": Family(
        dict(norm_offset=True, block_norms=SANDWICH, qk_norm="head"),
        GEMMA2_KEYS | dict(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6),
        slides=lambda i, c: (i + 1) % c["sliding_window_pattern"] != 0, more=gemma),
    "gemma4_text": Family(
        dict(block_norms=SANDWICH, attention_scale=1.0), GEMMA4_KEYS, more=gemma4,
        rename=gemma4_keys),
    "phi3": Family(
        dict(fused_qkv="blocks", fused_gate_up=True), dict(sliding_window=None),
        slides=lambda i, c: True),
    "olmo2": Family(dict(block_norms=OLMO2_NORMS, qk_norm="full"), BIAS),
    "olmo3": Family(
        dict(block_norms=OLMO2_NORMS, qk_norm="full"),
        BIAS | dict(rope_theta=5e5, rope_local_base_freq=None, sliding_window=4096,
                    layer_types=None),
        slides=lambda i, c: (i + 1) % 4 != 0),
    "exaone4": Family(
        dict(block_norms=OLMO2_NORMS, qk_norm="head"),
        dict(sliding_window=4096, sliding_window_pattern=None, layer_types=None),
        slides=lambda i, c: (i + 1) % (c["sliding_window_pattern"] or 4) != 0,
        turns=lambda i, c: c["slides"][i] or not c["sliding_window"]),
    "seed_oss": Family(
        {}, dict(attention_bias=True, attention_out_bias=False, mlp_bias=False, head_dim=128,
                 num_key_value_heads=8),
        more=lambda c: dict(o_bias=c["attention_out_bias"])),
    "arcee": Family(
        dict(gated_mlp=False), BIAS | dict(mlp_bias=False, hidden_act="relu2")),
    "ministral3": Family(
        {}, dict(rope_parameters=REQUIRED, head_dim=128, sliding_window=None),
        slides=lambda i, c: True),
    "glm4": Family(
        dict(block_norms=GLM4_NORMS, fused_gate_up=True, o_bias=False),
        dict(attention_bias=True, head_dim=128, partial_rotary_factor=0.5), interleaved=True),
    "cohere2": Family(
        dict(norm="layer without bias", parallel_residual=True,
             block_norms=("input_layernorm", None, "input_layernorm", None)),
        BIAS | dict(tie_word_embeddings=True, logit_scale=0.0625, sliding_window=4096,
                    sliding_window_pattern=4, layer_types=None),
        slides=lambda i, c: (i + 1) % c["sliding_window_pattern"] != 0,
        turns=lambda i, c: c["slides"][i] and bool(c["sliding_window"]),
        more=lambda c: dict(logit_scale=c["logit_scale"]), rename=cohere2_keys, interleaved=True),
    "hunyuan_v1_dense": Family(
        dict(qk_norm="rotated", other_names=True), BIAS, rename=hunyuan_keys),
    "ernie4_5": Family(
        {}, dict(use_bias=False, head_dim=128, tie_word_embeddings=True, rope_theta=5e5),
        more=lambda c: dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), c["use_bias"]),
        interleaved=True),
    "smollm3": Family(
        {}, BIAS | WINDOW | dict(mlp_bias=False, tie_word_embeddings=True, rope_theta=2e6,
                                 no_rope_layers=None, no_rope_layer_interval=4),
        slides=lambda i, c: not smollm3_turns(i, c), turns=smollm3_turns),
    "granite": Family({}, BIAS | SCALES | dict(mlp_bias=False), more=granite),
    "granitemoehybrid": Family(
        dict(fused_gate_up=True, other_names=True),
        BIAS | SCALES | MAMBA_KEYS | MOE_KEYS | dict(
            shared_intermediate_size=REQUIRED, num_experts_per_tok=None, layer_types=None,
            position_embedding_type=None),
        turns=lambda i, c: c["position_embedding_type"] == "rope", more=granite_hybrid,
        rename=without_scan),
    "falcon_h1": Family(
        dict(block_norms=("input_layernorm", None, "pre_ff_layernorm", None), other_names=True),
        MAMBA_KEYS | FALCON_H1_SCALES | dict(
            mamba_d_ssm=None, mamba_rms_norm=False, mamba_norm_before_gate=True),
        more=falcon_h1, rename=without_scan),
    "nemotron_h": Family(
        dict(single=True, gated_mlp=False, other_names=True), NEMOTRON_KEYS,
        turns=lambda i, c: False, more=nemotron, rename=nemotron_keys),
    "llama4_text": Family(
        dict(other_names=True),
        BIAS | MOE_KEYS | dict(
            intermediate_size_mlp=REQUIRED, head_dim=128, num_key_value_heads=8,
            num_experts_per_tok=1, num_local_experts=16, moe_layers=None,
            interleave_moe_layer_step=1, use_qk_norm=True, no_rope_layers=None,
            no_rope_layer_interval=4, attention_chunk_size=8192, layer_types=None,
            attn_temperature_tuning=True, floor_scale=8192, attn_scale=0.1, rope_theta=5e5),
        turns=smollm3_turns, more=llama4, interleaved=True),
    "gpt2": Family(
        dict(norm="layer", learned_positions=True, qkv_bias=True, o_bias=True, mlp_bias=True,
             fused_qkv="blocks", gated_mlp=False, other_names=True),
        dict(hidden_act="gelu_new", tie_word_embeddings=True), rename=llama_keys),
    "gpt_neox": Family(
        dict(norm="layer", mlp_bias=True, fused_qkv="heads", gated_mlp=False, other_names=True),
        dict(attention_bias=True, hidden_act="gelu", use_parallel_residual=True,
             partial_rotary_factor=0.25),
        more=lambda c: dict(parallel_residual=c["use_parallel_residual"]), rename=llama_keys),
    "mixtral": Family(
        dict(other_names=True), MOE_KEYS | dict(rope_theta=1e6, sliding_window=None),
        slides=lambda i, c: True, more=moe),
    "qwen2_moe": Family(
        dict(other_names=True),
        QWEN_MOE_KEYS | WINDOW | dict(qkv_bias=True, shared_expert_intermediate_size=REQUIRED),
        slides=lambda i, c: i % 2 == 0 and i < c["max_window_layers"],
        more=lambda c: moe(c) | dict(qkv_bias=c["qkv_bias"])),
    "qwen3_moe": Family(
        dict(qk_norm="head", other_names=True),
        QWEN_MOE_KEYS | BIAS | dict(use_sliding_window=False, sliding_window=4096),
        slides=lambda i, c: True, more=moe),
    "olmoe": Family(
        dict(qk_norm="full", other_names=True),
        MOE_KEYS | BIAS | dict(norm_topk_prob=False, router_aux_loss_coef=0.01), more=moe),
    "gpt_oss": Family(
        dict(other_names=True),
        MOE_KEYS | dict(
            attention_bias=True, head_dim=64, num_key_value_heads=8, sliding_window=128,
            layer_types=None, swiglu_alpha=1.702, swiglu_limit=7.0, rope_theta=150000.0,
            rope_parameters=dict(
                rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=4096)),
        slides=lambda i, c: i % 2 == 0, more=gpt_oss, rename=gpt_oss_keys),
    "deepseek_v2": Family(
        dict(other_names=True),
        LATENT_KEYS | dict(
            n_shared_experts=2, num_nextn_predict_layers=0, norm_topk_prob=False, mlp_bias=False),
        more=lambda c: latent(c, "softmax"), rename=latent_keys, interleaved=True),
    "deepseek_v3": Family(
        dict(other_names=True), DEEPSEEK_KEYS, more=latent, rename=latent_keys, interleaved=True),
    "kimi_k2": Family(
        dict(other_names=True), DEEPSEEK_KEYS, more=latent, rename=latent_keys, interleaved=True),
    "glm4_moe": Family(
        dict(o_bias=False, other_names=True),
        GROUP_KEYS | dict(
            first_k_dense_replace=1, partial_rotary_factor=0.5, use_qk_norm=False),
        more=lambda c: grouped(c) | dict(qk_norm="head" if c["use_qk_norm"] else None),
        rename=lambda raw: without(raw, dict(scoring_func="sigmoid", topk_method="noaux_tc"))),
    "glm4_moe_lite": Family(
        dict(other_names=True),
        LATENT_KEYS | dict(
            first_k_dense_replace=1, mlp_layer_types=None, routed_scaling_factor=1.8),
        more=latent, rename=latent_keys, interleaved=True),
    "qwen3_next": Family(
        DELTA | dict(other_names=True),
        QWEN_MOE_KEYS | DELTA_KEYS | SHARED_KEYS | dict(norm_topk_prob=True),
        more=lambda c: moe(c) | delta(c, fused=True)),
    "qwen3_5_text": Family(DELTA, DELTA_KEYS, more=delta, rename=without_axes),
    "qwen3_5_moe_text": Family(
        DELTA | dict(other_names=True), MOE_KEYS | DELTA_KEYS | SHARED_KEYS,
        more=lambda c: moe(c) | delta(c), rename=without_axes),
}


def find_family(raw: dict) -> Family:
    """Return the Family of a config.json. Raises ValueError, saying why, where there is none."""
    name = raw.get("model_type")
    known = ", ".join(FAMILIES)
    if raw.get("is_encoder_decoder"):
        raise ValueError(
            f"model_type {name!r} is an encoder-decoder model; only decoders are supported")
    if "audio_config" in raw:
        raise ValueError(f"model_type {name!r} reads sound; text-only decoders are supported "
                         f"({known})")
    remote = (raw.get("auto_map") or {}).get("AutoModelForCausalLM", "").rpartition(".")[2]
    if name not in FAMILIES:
        why = " and needs remote code (auto_map), which is never run" if remote else ""
        raise ValueError(f"model_type {name!r} is not supported{why}; supported are {known}")
    # files of a supported family often still name the code it had before transformers took it in
    own = {"kimi_k2": "deepseek_v3"}.get(name, name).removesuffix("_text").replace("_", "")
    if remote and not remote.replace("_", "").lower().startswith(own):
        raise ValueError(f"auto_map names code of its own ({remote}) for model_type {name!r}; "
                         "remote code is never run")
    quantized = raw.get("quantization_config")
    if quantized:
        raise ValueError(
            f"the checkpoint is quantized ({quantized.get('quant_method', 'method unknown')}); "
            "use the original one in bf16, fp16 or float32 (those in bitsandbytes' 4 bits, FP8 in "
            "blocks, and gpt-oss in MXFP4, are opened by load_model of extras/models/opening.py)")
    return FAMILIES[name]
