"""Read config.json into the fields of ModelConfig, checked."""

import math
from typing import Any

from parts.families import COMMON, HARMLESS, REQUIRED, Family, find_family
from parts.kernels import ACTIVATIONS
from parts.ropes import Rope, read_ropes
from parts.vision_configs import check_joint, check_sections, split_config

# The largest value that is taken for a size; more is a damaged file.
SIZES = dict(
    vocab_size=2**24, hidden_size=2**20, intermediate_size=2**24, num_hidden_layers=2**12,
    head_dim=2**16, num_attention_heads=2**16, num_key_value_heads=2**16, num_experts=2**16,
    num_local_experts=2**16, num_experts_per_tok=2**16, moe_intermediate_size=2**24,
    linear_num_key_heads=2**16, linear_num_value_heads=2**16, linear_key_head_dim=2**16,
    linear_value_head_dim=2**16, linear_conv_kernel_dim=2**10, mamba_n_heads=2**16,
    mamba_n_groups=2**16, mamba_d_state=2**16, mamba_d_head=2**16, mamba_d_conv=2**10,
    mamba_expand=2**10, mamba_d_ssm=2**20, shared_intermediate_size=2**24,
    n_routed_experts=2**16,
    n_group=2**16, topk_group=2**16, q_lora_rank=2**20, kv_lora_rank=2**20, v_head_dim=2**16,
    qk_nope_head_dim=2**16, qk_rope_head_dim=2**16, global_head_dim=2**16,
    num_global_key_value_heads=2**16, top_k_experts=2**16, max_position_embeddings=2**40,
    intermediate_size_mlp=2**24, attention_chunk_size=2**40, vocab_size_per_layer_input=2**24,
    interleave_moe_layer_step=2**12, no_rope_layer_interval=2**12, decoder_sparse_step=2**12,
    full_attention_interval=2**12, moe_latent_size=2**20,
    moe_shared_expert_intermediate_size=2**24)
# Whole numbers that may be 0 as well.
COUNTS = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers",
          "num_kv_shared_layers", "hidden_size_per_layer_input", "shared_expert_intermediate_size")
# Numbers that are divided or multiplied by, so that 0, a negative one or null has no meaning; null
# stands for none where that is the family's default.
ABOVE_0 = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling",
           "query_pre_attn_scalar", "routed_scaling_factor", "floor_scale", "swiglu_limit")
# Keys that ModelConfig has under the same name.
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "max_position_embeddings", "hidden_act")


def read_fields(raw: dict, max_length: int | None = None) -> dict:
    """Return the fields of ModelConfig from the content of config.json; see model.read_config."""
    wrong = (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError)
    try:
        if "vision_config" not in raw:
            return text_fields(raw, max_length)
        text, vision = split_config(raw)
        fields = text_fields(text, max_length)
        if vision is not None:
            vision = vision | {"text_size": fields["hidden_size"]}
            check_sections(vision, len(fields["ropes"]["full_attention"].frequencies))
            check_joint(vision, fields)
        return fields | dict(model_type=raw["model_type"], other_names=True, vision=vision)
    except wrong as error:
        raise ValueError("config.json: a value of another type or size than expected "
                         f"({error!r:.200})") from None


def check_supported(raw: dict) -> None:
    """Raise ValueError for a model that cannot be trained, from its config.json: before its weights
    are fetched. The family comes first, then how it is quantized."""
    quantized = raw.get("quantization_config") or {}
    read_fields({k: v for k, v in raw.items() if k != "quantization_config"})
    method = quantized.get("quant_method", "bitsandbytes")
    in_4bit = method == "bitsandbytes" and quantized.get("load_in_4bit")
    if quantized and not packed_in(raw) and not in_4bit:
        raise ValueError(
            f"the checkpoint is quantized ({method}); use the original one in bf16, fp16 or float32, "
            "or one in bitsandbytes' 4 bits")


def packed_in(raw: dict) -> str:
    """Return in which of the forms that extras/models reads as numbers a config.json says its files
    are: "mxfp4", as gpt-oss is published; "fp8" in blocks, as DeepSeek-V3 is; "" for neither."""
    quantized = raw.get("quantization_config")
    if not isinstance(quantized, dict):
        return ""
    method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
    if method == "mxfp4" and raw.get("model_type") == "gpt_oss":
        return "mxfp4"
    sides = block if isinstance(block, list) and len(block) == 2 else [0]
    is_plain = quantized.get("fmt") in (None, "e4m3") and "vision_config" not in raw
    in_blocks = all(type(side) is int and side > 0 for side in sides)
    return "fp8" if method == "fp8" and is_plain and in_blocks else ""


def text_fields(raw: dict, max_length: int | None) -> dict:
    """Return the fields of a decoder that reads text alone."""
    family = find_family(raw)
    c = read_keys(family.rename(raw), family.keys)
    bias = bool(c.get("attention_bias"))
    ropes = {} if family.features.get("learned_positions") else read_ropes(
        c, max_length, family.interleaved)
    fields = {k: c[k] for k in SAME} | dict(
        model_type=raw["model_type"],
        num_key_value_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=c["head_dim"], norm_eps=c["rms_norm_eps"],
        tie_word_embeddings=bool(c["tie_word_embeddings"]), qkv_bias=bias, o_bias=bias,
        mlp_bias=bool(c.get("mlp_bias")), attention_scale=c["head_dim"] ** -0.5)
    fields |= read_layers(c, family, ropes) | family.more(c) | family.features
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act = {fields['hidden_act']!r}; "
                         f"known are {', '.join(ACTIVATIONS)}")
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads = {heads} is no multiple of "
                         f"num_key_value_heads = {kv_heads}")
    odd = [k for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)]
    if odd:
        raise ValueError(f"config.json: what it says makes {', '.join(odd)} no finite number")
    return fields


def read_keys(raw: dict, keys: dict) -> dict:
    """Return the keys that a family reads: those in the file (null is a value), else its defaults.

    Raises ValueError for a missing one, and for a key that is neither read nor known to be harmless
    and has a value that could mean something.
    """
    known = COMMON | keys
    odd = [f"{k} = {v!r}" for k, v in raw.items() if k not in known
           and not HARMLESS.match(k) and v not in (None, False, 0, "", [], {})]
    if odd:
        raise ValueError(f"config.json: {', '.join(odd)}: not understood for model_type "
                         f"{raw['model_type']!r}, and it may change the model's numbers")
    c = known | {k: raw[k] for k in known if k in raw}
    missing = [k for k in known if known[k] is REQUIRED and (c[k] is REQUIRED or c[k] is None)]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)}: missing")
    for key, value in c.items():
        check_value(key, value, known[key])
    c["head_dim"] = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    return c


def check_value(key: str, value: Any, default: Any) -> None:
    """Raise ValueError for a size that no model has, and for a value not of its default's type.

    null is accepted where the key is not required, but for numbers that are needed.
    """
    size = SIZES.get(key)
    if size is not None:
        fits = type(value) is int and 1 <= value <= size
        wanted = f"a whole number from 1 to {size}"
    elif key in ABOVE_0:
        fits = type(value) in (int, float) and 0 < value < 1e30
        wanted = "a number above 0"
    elif key in COUNTS:
        fits = type(value) is int and 0 <= value <= 2**24
        wanted = f"a whole number from 0 to {2**24}"
    elif key in ("router_aux_loss_coef", "rms_norm_eps"):
        fits = type(value) in (int, float) and 0 <= value < 1e30
        wanted = "a number, 0 or more"
    elif isinstance(default, bool):
        fits = isinstance(value, bool)
        wanted = "true or false"
    elif isinstance(default, (int, float)):
        fits = type(value) in (int, float) and abs(value) < 1e30
        wanted = "a number"
    else:
        fits = not isinstance(default, str) or isinstance(value, str)
        wanted = "a string"
    is_needed = (key in (*ABOVE_0, "mamba_d_conv", "mamba_d_state")
                 or key.startswith(("linear_", "router_", "moe_"))
                 or key.endswith(("_multiplier", "attn_scale", "chunk_size")))
    takes_null = default is None or default is not REQUIRED and not is_needed
    if not fits and not (value is None and takes_null):
        raise ValueError(f"config.json: {key} = {value!r:.60}: expected {wanted}")


def read_layers(c: dict, family: Family, ropes: dict[str, Rope]) -> dict:
    """Return window and rotation of each layer."""
    n = c["num_hidden_layers"]
    types = c.get("layer_types")
    if types and len(types) != n:
        raise ValueError(f"config.json: layer_types names {len(types)} layers of {n}")
    if types:
        slides = [t == "sliding_attention" for t in types]
    else:
        slides = [family.slides(i, c) for i in range(n)]
    c["slides"] = slides
    window = None
    if c.get("use_sliding_window", True):
        window = c.get("sliding_window") or None
    if window is not None and not (type(window) is int and window > 0):
        raise ValueError(
            f"config.json: sliding_window = {window!r}: expected a whole number from 1")
    rope_layers = []
    for i, slide in enumerate(slides):
        kind = "full_attention"
        if slide and "sliding_attention" in ropes:
            kind = "sliding_attention"
        rope_layers.append(kind if kind in ropes and family.turns(i, c) else None)
    return dict(windows=tuple(window if slide else None for slide in slides), ropes=ropes,
                rope_layers=tuple(rope_layers))


def check_length(config: Any, length: int) -> None:
    """Raise ValueError where `length` tokens are more than the model's positions reach."""
    limits = [rope.limit for rope in config.ropes.values() if rope.limit]
    if config.learned_positions:
        limits.append(config.max_position_embeddings)
    if limits and length > min(limits):
        raise ValueError(
            f"a sequence of {length} tokens: the positions of this {config.model_type} model, "
            f"as it was loaded, reach {min(limits)}; set --max_length accordingly")
