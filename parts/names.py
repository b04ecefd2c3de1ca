"""Hugging Face's names and layouts of parameters, where they differ from ours.

GPT-2 and GPT-NeoX have names of their own; mixtures of experts come as one tensor per expert or
stacked; text models cut out of larger ones keep a prefix; models that read images have several.
Loading makes a map, and saving follows the same map backwards.
"""

import re
from typing import Any, Iterable, NamedTuple

from torch import Tensor

from parts.vision_configs import GEMMA4_KINDS, QWEN3_TEXT, WRAPPED

# Ours -> Hugging Face's, by module; "*" is the layer's number.
MODULES = {
    "gpt2": {
        "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f",
        "model.layers.*.input_layernorm": "transformer.h.*.ln_1",
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
        "model.layers.*.mlp.down_proj": "gpt_neox.layers.*.mlp.dense_4h_to_h"},
    "hunyuan_v1_dense": {
        "model.layers.*.self_attn.q_norm": "model.layers.*.self_attn.query_layernorm",
        "model.layers.*.self_attn.k_norm": "model.layers.*.self_attn.key_layernorm"},
    "gpt_oss": {"model.layers.*.mlp.gate": "model.layers.*.mlp.router"},
    "llama4_text": {
        "model.layers.*.mlp.gate": "model.layers.*.feed_forward.router"} | {
        f"model.layers.*.mlp.{n}": f"model.layers.*.feed_forward.{n}" for n in (
            "gate_proj", "up_proj", "down_proj", "shared_expert.gate_proj",
            "shared_expert.up_proj", "shared_expert.down_proj", "experts")},
    "granitemoehybrid": {
        "model.layers.*.mlp.gate_up_proj": "model.layers.*.shared_mlp.input_linear",
        "model.layers.*.mlp.down_proj": "model.layers.*.shared_mlp.output_linear"},
    "granitemoehybrid with experts": {
        "model.layers.*.mlp.gate": "model.layers.*.block_sparse_moe.router",
        "model.layers.*.mlp.gate.weight": "model.layers.*.block_sparse_moe.router.layer.weight",
        "model.layers.*.mlp.experts": "model.layers.*.block_sparse_moe.experts",
        "model.layers.*.mlp.experts.gate_up_proj":
            "model.layers.*.block_sparse_moe.input_linear.weight",
        "model.layers.*.mlp.experts.down_proj":
            "model.layers.*.block_sparse_moe.output_linear.weight",
        "model.layers.*.mlp.shared_expert.gate_up_proj":
            "model.layers.*.shared_mlp.input_linear",
        "model.layers.*.mlp.shared_expert.down_proj":
            "model.layers.*.shared_mlp.output_linear"},
    "nemotron_h": {"model.embed_tokens": "model.embeddings", "model.norm": "model.norm_f"},
    "falcon_h1": {
        "model.norm": "model.final_layernorm",
        "model.layers.*.mlp.gate_proj": "model.layers.*.feed_forward.gate_proj",
        "model.layers.*.mlp.up_proj": "model.layers.*.feed_forward.up_proj",
        "model.layers.*.mlp.down_proj": "model.layers.*.feed_forward.down_proj"}}
MODULES["llama4"] = MODULES["llama4_text"]  # in its wrapper
# how files of GPT-NeoX still name what transformers 5 calls lm_head
OLDER = {"embed_out": "lm_head"}
TRANSPOSED = {  # matrices that the files keep as (in, out)
    "gpt2": re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$"),
    "gpt_oss": re.compile(r"\.experts\.(gate_up|down)_proj$"),
    "llama4_text": re.compile(r"\.experts\.(gate_up|down)_proj$"),
    "llama4": re.compile(r"\.experts\.(gate_up|down)_proj$")}
# ... or keep either way: (in, out) as published, (out, in) as transformers 5 writes a new model
EITHER_WAY = {"qwen3_vl_moe": re.compile(r"\.experts\.(gate_up|down)_proj$")}
CONSTANTS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")  # causal masks in old files
# text models cut out of LLaVA's kind have "language_model.model.layers"; Nemotron-H's "backbone"
PREFIXES = {"model.language_model.": "model.", "language_model.": "", "backbone.": "model."}
OF_KEYS = re.compile(r"\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")
EXPERT = re.compile(
    r"(.*\.layers\.\d+\.(?:mlp|mixer|block_sparse_moe)\.experts)\.(\d+)\.(\w+)\.weight$")
GATES = ("w1", "gate_proj")
UPS = ("w3", "up_proj")
DOWNS = ("w2", "down_proj")
# the ends of names of what never learns, as in transformers
FIXED = (".layer_scalar", ".bounds", ".std_bias", ".std_scale")
BOUNDS = ("input_min", "input_max", "output_min", "output_max")  # in the files; here one tensor
BIAS = "e_score_correction_bias"  # of a router: carried_names
NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
QUANTIZED = (".SCB", ".qweight", ".weight_scale", ".weight_scale_inv", ".absmax")

# Of models that read images: ours -> transformers', by the first prefix that fits ...
VISION = {
    "llava": {"model.vision.tower.": "model.vision_tower.",
              "model.vision.projector.": "model.multi_modal_projector.",
              "model.": "model.language_model."},
    "idefics3": {"model.vision.tower.": "model.vision_model.",
                 "model.vision.projector.": "model.connector.", "model.": "model.text_model."},
    "qwen2_vl": {"model.vision.projector.deep.": "model.visual.deepstack_merger_list.",
                 "model.vision.projector.": "model.visual.merger.",
                 "model.vision.tower.": "model.visual.", "model.": "model.language_model."}}
VISION |= {"smolvlm": VISION["idefics3"], "gemma3": VISION["llava"]}
VISION |= dict.fromkeys(("qwen2_5_vl", *QWEN3_TEXT), VISION["qwen2_vl"])
VISION |= dict.fromkeys(WRAPPED, {"model.": "model.language_model."})  # their towers are carried
VISION["gemma4"] = VISION["llava"] | {"model.vision.projector.": "model.embed_vision."}
VISION["gemma4_unified"] = {
    "model.vision.tower.": "model.embed_vision.",
    "model.vision.projector.": "model.embed_vision.multimodal_embedder.",
    "model.": "model.language_model."}
VISION["llama4"] = {"model.": "language_model.model.", "lm_head": "language_model.lm_head"}
# ... and back, from the prefixes of transformers 4 and 5.
VISION_OURS = (
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision.tower."),
    (r"^(model\.)?multi_modal_projector\.", "model.vision.projector."),
    (r"^(model\.)?vision_model\.", "model.vision.tower."),
    (r"^model\.connector\.", "model.vision.projector."),
    (r"^(model\.)?visual\.deepstack_merger_list\.", "model.vision.projector.deep."),
    (r"^(model\.)?visual\.merger\.", "model.vision.projector."),
    (r"^(model\.)?vision_embedder\.", "model.vision.tower."),  # Gemma 4 12B: files, transformers
    (r"^(model\.)?embed_vision\.(?=patch_|pos_)", "model.vision.tower."),
    (r"^(model\.)?embed_vision\.(multimodal_embedder\.)?", "model.vision.projector."),  # Gemma 4
    (r"^(model\.)?embed_audio\.", "model.vision.audio_projector."),
    (r"^(model\.)?audio_tower\.", "model.vision.audio_tower."),
    (r"^(model\.)?visual\.", "model.vision.tower."),
    (r"^(model\.(text_model|language_model)|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head", "lm_head"))


def may_be_turned(name: str, config: Any) -> bool:
    """Tell whether only its shape says which way round the files keep a matrix."""
    family = config.model_type
    return family in EITHER_WAY and bool(EITHER_WAY[family].search(name))


class Place(NamedTuple):
    """Which of our parameters, or which part of it, a tensor of the files is."""

    name: str
    index: tuple = ()  # the part, where the files hold a stack in pieces
    transposed: bool = False  # the files keep (in, out)

    def view(self, parameter: Tensor) -> Tensor:
        part = parameter[self.index]
        return part.mT if self.transposed else part


def file_name(name: str, config: Any) -> str:
    """Return Hugging Face's name of a module or parameter of ours."""
    if not config.other_names:
        return name
    name = rename(name, modules(config.model_type, config.moe))
    if config.model_type not in VISION:
        return name
    for ours, theirs in VISION[config.model_type].items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def modules(family: str, moe: dict | None) -> dict[str, str]:
    """Return {our name: Hugging Face's} of a family's modules."""
    known = MODULES.get(family, {})
    return MODULES.get(f"{family} with experts", known) if moe else known


def find_places(names: Iterable[str], config: Any) -> dict[str, Place]:
    """Return {tensor name in the files: Place}. Raises ValueError for leftovers of quantization."""
    carried = carried_names(names, config)
    # old files carry this constant
    names = [n for n in names if n not in carried and not n.endswith("rotary_emb.inv_freq")]
    quantized = [n for n in names if n.endswith(QUANTIZED)]
    if quantized:
        raise ValueError(
            f"the checkpoint is quantized (it has {quantized[0]}); use the original one")
    if config.vision is not None:
        ours = {n: vision_name(n) for n in names if not n.endswith("position_ids")}
        found = other_places(ours.values(), config.model_type, config.moe)
        places = {theirs: found[name] for theirs, name in ours.items() if name in found}
    elif config.other_names or any("language_model." in n for n in names):
        places = other_places(names, config.model_type, config.moe)
    else:
        places = {n: Place(n) for n in names}
    if config.tie_word_embeddings:
        tied = Place("model.embed_tokens.weight")
        places = {n: tied if p.name == "lm_head.weight" else p for n, p in places.items()}
    return places


def carried_names(names: Iterable[str], config: Any) -> set[str]:
    """Return the names of what is saved as it was read.

    Of a wrapper, what is neither its decoder nor a tower that is computed; layers that predict
    several tokens at once ("mtp" of Qwen and Nemotron-H; DeepSeek's and GLM's come after the last
    layer); the correction biases of routers, which do not learn; SigLIP's pooling head, whose
    output Gemma 3 does not read; keys and values of layers that read others'.
    """
    found = {n for n in names if n.endswith(f".{BIAS}")}
    more = config.moe.get("more_layers", 0) if config.moe else 0
    if more:
        first = config.num_hidden_layers
        numbers = {n: NUMBER.search(n) for n in names}
        found |= {n for n, m in numbers.items() if m and first <= int(m[1]) < first + more}
    if config.model_type.startswith(("qwen3_next", "qwen3_5", "nemotron_h")):
        found |= {n for n in names if n.startswith("mtp.")}
    if config.model_type == "gemma3":
        found |= {n for n in names if vision_name(n).startswith("model.vision.tower.head.")}
    if config.per_layer:
        reads = config.per_layer["reads"]
        found |= {n for n in names if (own := OF_KEYS.search(n)) and int(own[1]) < len(reads)
                  and reads[int(own[1])] != int(own[1])
                  and not vision_name(n).startswith("model.vision.")}
    if config.model_type in (*GEMMA4_KINDS, *WRAPPED):
        rest = "model.vision." if config.vision is None else "model.vision.audio_"
        found |= {n for n in names if vision_name(n).startswith(rest)}
    return found


def vision_name(name: str) -> str:
    """Return our name of a tensor of a model that reads images."""
    for pattern, ours in VISION_OURS:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return name


def rename(name: str, names: dict[str, str]) -> str:
    """Look the module's part of `name` up in `names`; a parameter's own last part stays."""
    number = re.search(r"\.\d+\.", name + ".")
    pattern = name if number is None else name.replace(number.group(), ".*.", 1)
    stem, _, last = pattern.rpartition(".")
    new = names.get(pattern) or (f"{names[stem]}.{last}" if stem in names else pattern)
    return new if number is None else new.replace(".*.", number.group(), 1)


def other_places(names: Iterable[str], family: str, moe: dict | None) -> dict[str, Place]:
    """Return {tensor name in the files: Place}; constants are left out."""
    back = {theirs: ours for ours, theirs in modules(family, moe).items()} | OLDER
    places = {}
    for name in names:
        if CONSTANTS.search(name):
            continue
        plain = without_prefix(name)
        if family == "gpt2" and not plain.startswith(("transformer.", "lm_head.")):
            plain = "transformer." + plain
        expert = EXPERT.match(plain)
        if moe and expert:
            places[name] = expert_place(*expert.groups(), moe)
        else:
            transposed = family in TRANSPOSED and bool(TRANSPOSED[family].search(plain))
            ours = rename(plain, back).replace(".block_sparse_moe.", ".mlp.")
            stem, _, last = ours.rpartition(".")
            bound = last in BOUNDS
            places[name] = (Place(f"{stem}.bounds", (BOUNDS.index(last),)) if bound
                            else Place(ours, transposed=transposed))
    return places


def without_prefix(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def expert_place(stacks: str, number: str, matrix: str, moe: dict) -> Place:
    """Find one expert's matrix in the stacks; gate_up is (experts, 2 size, C), gate above up."""
    stacks = stacks.replace(".block_sparse_moe.", ".mlp.")
    size = moe["size"]
    if not moe.get("gated", True):
        return Place(f"{stacks}.{matrix}", (int(number),))
    if matrix in DOWNS:
        return Place(f"{stacks}.down_proj", (int(number),))
    rows = {**dict.fromkeys(GATES, slice(0, size)), **dict.fromkeys(UPS, slice(size, 2 * size))}
    if matrix not in rows:  # no such parameter: reported as unexpected
        return Place(f"{stacks}.{matrix}")
    return Place(f"{stacks}.gate_up_proj", (int(number), rows[matrix]))
