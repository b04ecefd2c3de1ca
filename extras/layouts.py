"""Files that name or cut parameters otherwise than model.py does.

GPT-2 and GPT-NeoX have names of their own; mixtures of experts come as one tensor per expert or stacked; text models
cut out of larger ones keep a prefix. The map made on loading is the one that saving follows backwards.
"""

import re
from typing import Iterable, Optional

# Ours -> Hugging Face's, by module; "*" is the layer's number.
MODULES = {
    "gpt2": {
        "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f", "model.layers.*.input_layernorm": "transformer.h.*.ln_1",
        "model.layers.*.self_attn.qkv_proj": "transformer.h.*.attn.c_attn",
        "model.layers.*.self_attn.o_proj": "transformer.h.*.attn.c_proj",
        "model.layers.*.post_attention_layernorm": "transformer.h.*.ln_2",
        "model.layers.*.mlp.up_proj": "transformer.h.*.mlp.c_fc",
        "model.layers.*.mlp.down_proj": "transformer.h.*.mlp.c_proj"},
    "gpt_neox": {
        "model.embed_tokens": "gpt_neox.embed_in", "model.norm": "gpt_neox.final_layer_norm",
        "model.layers.*.input_layernorm": "gpt_neox.layers.*.input_layernorm",
        "model.layers.*.post_attention_layernorm": "gpt_neox.layers.*.post_attention_layernorm",
        "model.layers.*.self_attn.qkv_proj": "gpt_neox.layers.*.attention.query_key_value",
        "model.layers.*.self_attn.o_proj": "gpt_neox.layers.*.attention.dense",
        "model.layers.*.mlp.up_proj": "gpt_neox.layers.*.mlp.dense_h_to_4h",
        "model.layers.*.mlp.down_proj": "gpt_neox.layers.*.mlp.dense_4h_to_h"}}
OLDER = {"embed_out": "lm_head"}  # how files of GPT-NeoX still name what transformers 5 calls lm_head
VISION = ("llava", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # GPT-2 keeps (in, out)
CONSTANTS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")  # causal masks in old files
PREFIXES = {"model.language_model.": "model.", "language_model.": ""}  # "language_model.model.layers", as LLaVA's
EXPERT = re.compile(r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
GATES, UPS, DOWNS = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")

KEYS = {
    "gpt2": {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
             "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
             "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"},
    "gpt_neox": {"layer_norm_eps": "rms_norm_eps", "rotary_pct": "partial_rotary_factor",
                 "rotary_emb_base": "rope_theta"}}


def llama_keys(raw: dict) -> dict:
    """GPT-2's or GPT-NeoX's config.json with Llama's names for what Llama has too."""
    raw = dict(raw)
    if raw.pop("scale_attn_weights", True) is False:
        raise ValueError("config.json: scale_attn_weights = False is not supported")
    names = KEYS[raw["model_type"]]
    raw = {names.get(k, k): v for k, v in raw.items()}
    if raw.get("intermediate_size") is None and "hidden_size" in raw:
        raw["intermediate_size"] = 4 * raw["hidden_size"]
    return raw


def other_name(name: str, family: str) -> str:
    """Hugging Face's name of a module or parameter of ours."""
    if family in VISION:
        from extras.vision import other_name

        return other_name(name, family)
    return rename(name, MODULES.get(family, {}))


def rename(name: str, names: dict[str, str]) -> str:
    """`name` with its module's part looked up in `names`; a parameter's own last part stays."""
    number = re.search(r"\.\d+\.", name + ".")
    pattern = name if number is None else name.replace(number.group(), ".*.", 1)
    stem, _, last = pattern.rpartition(".")
    new = names.get(pattern) or (f"{names[stem]}.{last}" if stem in names else pattern)
    return new if number is None else new.replace(".*.", number.group(), 1)


def other_places(names: Iterable[str], family: str, moe: Optional[dict]) -> dict[str, tuple]:
    """{tensor name in the files: (our parameter, index into it, transposed)}; constants are left out."""
    if family in VISION:
        from extras.vision import our_name

        return {name: (our_name(name), (), False) for name in names if not name.endswith("position_ids")}
    back = {theirs: ours for ours, theirs in MODULES.get(family, {}).items()} | OLDER
    places = {}
    for name in names:
        if CONSTANTS.search(name):
            continue
        plain = next((new + name.removeprefix(old) for old, new in PREFIXES.items() if name.startswith(old)), name)
        if family == "gpt2" and not plain.startswith(("transformer.", "lm_head.")):
            plain = "transformer." + plain
        expert = EXPERT.match(plain)
        if moe and expert:
            places[name] = expert_place(*expert.groups(), moe["size"])
        elif moe:
            places[name] = (plain.replace(".block_sparse_moe.", ".mlp."), (), False)
        else:
            places[name] = (rename(plain, back), (), family == "gpt2" and bool(TRANSPOSED.search(plain)))
    return places


def expert_place(layer: str, number: str, matrix: str, size: int) -> tuple:
    """One expert's matrix in the stacks: gate and up lie one above the other, (experts, 2 size, C)."""
    if matrix in DOWNS:
        return f"{layer}.mlp.experts.down_proj", (int(number),), False
    rows = {**dict.fromkeys(GATES, slice(0, size)), **dict.fromkeys(UPS, slice(size, 2 * size))}
    if matrix not in rows:
        return f"{layer}.mlp.experts.{matrix}", (), False  # no such parameter: reported as unexpected
    return f"{layer}.mlp.experts.gate_up_proj", (int(number), rows[matrix]), False
