"""Split the config.json of models that read images into that of their decoder and the tower's
settings.

LLaVA (CLIP or SigLIP tower), Idefics3, SmolVLM and Gemma 3 (SigLIP), Gemma 4, Qwen2-VL, Qwen2.5-VL,
Qwen3-VL and Qwen3.5. The modules are in extras/decoder/vision.py and the files that it names.

Of others, `WRAPPED`, only the decoder is trained, on text: their towers are neither read nor
changed.
"""

import math
import re

from parts.families import HARMLESS
from parts.kernels import ACTIVATIONS, TOWER_ACTIVATIONS

# What config.json leaves out, transformers fills in.
LLAMA = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6)
SIGLIP = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    image_size=224, patch_size=16, num_channels=3, hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6)
IDEFICS = SIGLIP | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)
CLIP = SIGLIP | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
LLAVA_TOWERS = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP}
QWEN2_TEXT = dict(rms_norm_eps=1e-6, max_position_embeddings=32768, rope_theta=1e6)
QWEN2 = dict(
    depth=32, embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu", mlp_ratio=4, num_heads=16,
    in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
QWEN25 = dict(
    depth=32, hidden_size=3584, out_hidden_size=3584, hidden_act="silu", intermediate_size=3420,
    num_heads=16, in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
    window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
QWEN3 = dict(
    depth=27, hidden_size=1152, hidden_act="gelu_pytorch_tanh", intermediate_size=4304,
    num_heads=16, in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
    out_hidden_size=3584, num_position_embeddings=2304)
# Of Qwen3-VL and Qwen3.5: what text_config leaves out, and how many pairs of dims turn with time,
# height and width where it does not say.
QWEN3_TEXT = {
    "qwen3_vl": dict(model_type="qwen3_vl_text", rope_theta=5e5),
    "qwen3_vl_moe": dict(model_type="qwen3_vl_moe_text", rope_theta=5e5),
    "qwen3_5": dict(model_type="qwen3_5_text"), "qwen3_5_moe": dict(model_type="qwen3_5_moe_text")}
QWEN3_SECTIONS = {"qwen3_vl": (24, 20, 20), "qwen3_5": (11, 11, 10)}
GEMMA3_TEXT = dict(
    model_type="gemma3_text", vocab_size=262208, hidden_size=2304, intermediate_size=9216,
    num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=True)
GEMMA4 = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12,
    num_key_value_heads=12, head_dim=64, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-6,
    patch_size=16, pooling_kernel_size=3, position_embedding_size=10240, use_clipped_linears=False,
    standardize=False)
# Keys of its tower that its modules do not read
GEMMA4_IGNORED = {"max_position_embeddings", "default_output_length", "global_head_dim"}
# Gemma 4 12B has no tower: pixels of a square, norms and linear maps
GEMMA4_PATCHES = dict(
    patch_size=16, pooling_kernel_size=3, mm_embed_dim=3840, mm_posemb_size=1120, rms_norm_eps=1e-6)
GEMMA4_REPEATED = {"num_soft_tokens", "model_patch_size", "output_proj_dims"}
# Keys of Qwen's tower: other names of read ones, then those of video, and a default.
QWEN_IGNORED = {"in_chans", "spatial_patch_size", "tokens_per_second", "rope_parameters"}
QWEN_OUTER = {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id",
              "vision_end_token_id", "vision_token_id", "text_config"}

# Decoders within a wrapper: what their text_config leaves out. (Files of Mistral 3 have a head of
# their own unless they say otherwise.)
WRAPPED = {
    "mistral3": dict(model_type="mistral"),
    "internvl": dict(model_type="qwen2"), "llama4": dict(model_type="llama4_text")}
GEMMA4_KINDS = ("gemma4", "gemma4_unified")
DECODERS = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}  # other names of families
# Keys of a tower used alone, or left over from training: they change nothing in a forward pass.
UNREAD = re.compile(
    r"^(projection_dim|vocab_size|initializer_factor|size|max_image_size|vision_use_head"
    r"|use_base_siglip|_flash_attn_2_enabled|is_llama_config|perceiver_config"
    r"|pixel_shuffle_factor|neftune_noise_alpha|tie_word_embeddings|use_cache)$")
TOP = re.compile(
    r"^(text_config|vision_config|model_type|ignore_index|image_seq_length|tie_word_embeddings"
    r"|vocab_size|(image|video|vision)_.*token_(id|index)|vision_token_id|_?pad_token_id"
    r"|scale_factor|projector_hidden_act|multimodal_projector_bias|vision_feature_layer"
    r"|vision_feature_select_strategy|image_token_index)$")
# of Gemma 3, and of towers that are not computed
OUTER = re.compile(
    r"^([be]o[ai]_token_(id|index)|audio_(token_id|config)|mm_tokens_per_image|spatial_merge_size"
    r"|downsample_ratio|vision_soft_tokens_per_image)$")


def split_config(raw: dict) -> tuple[dict, dict | None]:
    """Return (config.json of the decoder, the tower's settings; None where it is only carried).

    Raises ValueError for other families.
    """
    kind = raw.get("model_type")
    if kind not in SPLITS:
        raise ValueError(f"model_type {kind!r} reads images or sound; of those, "
                         f"{', '.join(SPLITS)} are supported, and text-only decoders")
    if "text_config" in raw:
        refuse_unknown({k: v for k, v in raw.items() if not TOP.match(k)
                        and not (kind in ("gemma3", *GEMMA4_KINDS, *WRAPPED) and OUTER.match(k))}, kind)
    text, vision = SPLITS[kind](raw)
    tied = text.get("tie_word_embeddings", False)
    text = {k: v for k, v in text.items() if not UNREAD.match(k) or k == "vocab_size"}
    text["tie_word_embeddings"] = raw.get("tie_word_embeddings", tied)
    text["quantization_config"] = raw.get("quantization_config")
    return text, vision


def unwrap(raw: dict) -> tuple[dict, None]:
    """Return the config.json of the decoder alone."""
    text = WRAPPED[raw["model_type"]] | raw["text_config"]
    return text, None


def check_sections(vision: dict, pairs: int) -> None:
    """Raise ValueError where not all of the `pairs` of dims that turn have an axis."""
    sections = vision.get("sections", (pairs, 0, 0))
    if len(sections) != 3 or sum(sections) != pairs or min(sections) < 0:
        raise ValueError(f"config.json: mrope_section = {list(sections)}: expected pairs of dims "
                         f"for time, height and width; found {sum(sections)} in all, of {pairs}")


def check_joint(vision: dict, fields: dict) -> None:
    """Raise ValueError where the tower's features do not fit the decoder."""
    out = vision.get("out_hidden_size", vision.get("out", fields["hidden_size"]))
    if out != fields["hidden_size"]:
        raise ValueError(f"config.json: the tower's features have {out} numbers (out_hidden_size in "
                         f"vision_config), the decoder's {fields['hidden_size']} (hidden_size)")
    deep, layers = vision.get("deep", ()), fields["num_hidden_layers"]
    if len(deep) > layers:
        raise ValueError(f"config.json: deepstack_visual_indexes names {len(deep)} layers, more than "
                         f"the decoder's {layers}")


def check_sizes(tower: dict, defaults: dict) -> None:
    """Raise ValueError for values that no tower has."""
    for key, default in defaults.items():
        value = tower[key]
        wanted = ""
        if isinstance(default, bool):
            wanted = "" if isinstance(value, bool) else "true or false"
        elif key == "mlp_ratio" or isinstance(default, float):
            if type(value) not in (int, float) or not 0 <= value < 1e30:
                wanted = "a number, 0 or more"
        elif isinstance(default, int) and not (type(value) is int and 1 <= value <= 2**20):
            wanted = f"a whole number from 1 to {2**20}"
        elif isinstance(default, list) and not {*value} <= {*range(tower["depth"])}:
            wanted = f"layers of the tower, 0 to {tower['depth'] - 1}"
        if wanted:
            raise ValueError(
                f"config.json: {key} = {value!r:.60} in vision_config: expected {wanted}")


def check_tower(tower: dict, defaults: dict) -> None:
    """Raise ValueError for sizes that no tower has."""
    check_sizes(tower, defaults)
    size = tower.get("embed_dim", tower["hidden_size"])
    heads = tower.get("num_heads") or tower["num_attention_heads"]
    turns = 4 if "num_heads" in tower else 1  # Qwen's rotate, half with the row, half with the column
    if "head_dim" not in tower and size % (heads * turns):
        raise ValueError(f"config.json: {heads} heads in vision_config do not divide its size {size}"
                         + (" into multiples of 4" if turns == 4 else ""))
    smallest = tower["patch_size"] * tower.get("spatial_merge_size", 1)
    for key in ("image_size", "window_size"):
        if tower.get(key, smallest) < smallest:
            raise ValueError(f"config.json: {key} = {tower[key]} in vision_config holds no patch of "
                             f"{smallest}")


def refuse_unknown(raw: dict, kind: str) -> None:
    """Raise ValueError for keys that are not understood and have a value that says something."""
    odd = [f"{k} = {v!r}" for k, v in raw.items()
           if not HARMLESS.match(k) and not UNREAD.match(k) and v not in (None, False, 0)]
    if odd:
        raise ValueError(f"config.json: {', '.join(odd)}: not understood for {kind!r}, "
                         "and it may change the model's numbers")


def read_tower(given: dict, kind: str, defaults: dict) -> dict:
    """Return the tower's keys, checked, with transformers' defaults for those left out."""
    unknown = {k: v for k, v in given.items() if k not in defaults}
    refuse_unknown(unknown, f"the tower of {kind}")
    tower = defaults | {k: v for k, v in given.items() if k in defaults and v is not None}
    if tower["hidden_act"] not in TOWER_ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act = {tower['hidden_act']!r} in vision_config; "
                         f"known are {', '.join(TOWER_ACTIVATIONS)}")
    check_tower(tower, defaults)
    return tower


def split_llava(raw: dict) -> tuple[dict, dict]:
    """Split LLaVA's, whose decoder is a Llama where the file names no other."""
    text = dict(raw.get("text_config") or {})
    given = dict(raw["vision_config"])
    text.setdefault("model_type", "llama")
    tower = given.get("model_type", "clip_vision_model")
    if tower not in LLAVA_TOWERS:
        raise ValueError(f"llava with a tower of type {tower!r} is not supported; "
                         "clip_vision_model and siglip_vision_model are")
    strategy = raw.get("vision_feature_select_strategy", "default")
    layers = raw.get("vision_feature_layer", -2)
    act = raw.get("projector_hidden_act", "gelu")
    if strategy not in ("default", "full") or act not in ACTIVATIONS:
        raise ValueError(f"config.json: vision_feature_select_strategy = {strategy!r}, "
                         f"projector_hidden_act = {act!r}: known are default and full; "
                         f"{', '.join(ACTIVATIONS)}")
    vision = read_tower(given, "llava", LLAVA_TOWERS[tower]) | dict(
        kind="llava", is_clip=tower == "clip_vision_model", drop_first=strategy == "default",
        layers=tuple(layers) if isinstance(layers, (list, tuple)) else (layers,),
        projector_act=act, projector_bias=bool(raw.get("multimodal_projector_bias", True)))
    depth = vision["num_hidden_layers"]
    if not vision["layers"] or not {*vision["layers"]} <= {*range(-depth - 1, depth + 1)}:
        raise ValueError(f"config.json: vision_feature_layer = {layers!r:.60}: the tower has {depth}")
    return (LLAMA if text["model_type"] == "llama" else {}) | text, vision


def split_idefics(raw: dict) -> tuple[dict, dict]:
    """Split that of Idefics3 and SmolVLM, whose decoder is a Llama where the file names no other.
    """
    text = dict(raw.get("text_config") or {})
    text.setdefault("model_type", "llama")
    vision = read_tower(dict(raw["vision_config"]), raw["model_type"], IDEFICS) | dict(
        kind="idefics3", is_clip=False, drop_first=False, layers=(-1,),
        scale_factor=raw.get("scale_factor", 2))
    scale, side = vision["scale_factor"], vision["image_size"] // vision["patch_size"]
    if type(scale) is not int or scale < 1 or side % scale:
        raise ValueError(f"config.json: scale_factor = {scale!r:.60}: {side} x {side} patches are not "
                         "joined by that many")
    return LLAMA | text, vision


def split_gemma(raw: dict) -> tuple[dict, dict]:
    """Split Gemma 3's. Raises ValueError where pooling would not make the number of tokens asked for.
    """
    vision = read_tower(dict(raw["vision_config"]), "gemma3", SIGLIP)
    tokens = raw.get("mm_tokens_per_image", 256)
    if type(tokens) is not int or tokens < 1:
        raise ValueError(
            f"config.json: mm_tokens_per_image = {tokens!r:.60}: expected a whole number from 1")
    side = vision["image_size"] // vision["patch_size"]
    across = math.isqrt(tokens)
    if across * across != tokens or side % across:
        raise ValueError(f"config.json: mm_tokens_per_image = {tokens}: {side} x {side} patches are "
                         "not pooled to a square of that many")
    vision |= dict(kind="gemma3", is_clip=False, drop_first=False, layers=(-1,), tokens=tokens,
                   both_ways="everywhere")
    return GEMMA3_TEXT | raw["text_config"], vision


def split_gemma4(raw: dict) -> tuple[dict, dict | None]:
    """Split Gemma 4's, whose sound is not read; files of text alone have no tower."""
    text = dict(model_type="gemma4_text") | raw["text_config"]
    if raw["vision_config"] is None:
        return text, None
    given = {k: v for k, v in raw["vision_config"].items() if k not in GEMMA4_IGNORED}
    theta = gemma4_theta(given.pop("rope_parameters", None) or {})
    given["hidden_act"] = given.pop("hidden_activation", None)
    vision = read_tower(given, "gemma4", GEMMA4)
    heads, shared = vision["num_attention_heads"], vision["num_key_value_heads"]
    if vision["head_dim"] % 4 or heads % shared:
        raise ValueError(
            f"config.json: head_dim = {vision['head_dim']}, num_attention_heads = {heads} and "
            f"num_key_value_heads = {shared} in vision_config: expected a head_dim that is a multiple "
            "of 4, and as many heads for each of keys and values")
    both_ways = "windows" if text.get("use_bidirectional_attention") == "vision" else None
    return text, vision | gemma4_tokens(raw, text) | dict(
        kind="gemma4", both_ways=both_ways, rope_theta=theta)


def split_unified(raw: dict) -> tuple[dict, dict | None]:
    """Split that of Gemma 4 12B: a decoder without per-layer inputs, and no tower.

    Its patches are the squares that other sizes pool.
    """
    text = dict(hidden_size_per_layer_input=0, sliding_window=1024) | raw["text_config"]
    sees = text.setdefault("use_bidirectional_attention", "vision") == "vision"
    text["model_type"] = "gemma4_text"
    if raw["vision_config"] is None:
        return text, None
    given = {k: v for k, v in raw["vision_config"].items() if v is not None}
    known = GEMMA4_PATCHES.keys() | GEMMA4_REPEATED
    refuse_unknown({k: v for k, v in given.items() if k not in known}, "the tower of gemma4_unified")
    c = GEMMA4_PATCHES | {k: v for k, v in given.items() if k in GEMMA4_PATCHES}
    check_sizes(c, GEMMA4_PATCHES)
    square = c["patch_size"] * c["pooling_kernel_size"]
    for key, expected in dict(model_patch_size=square, output_proj_dims=c["mm_embed_dim"]).items():
        if given.get(key, expected) != expected:
            raise ValueError(f"config.json: {key} = {given[key]!r:.60} in vision_config: expected "
                             f"{expected}, as its other sizes say")
    return text, gemma4_tokens(raw, text) | dict(
        kind="gemma4_unified", both_ways="whole" if sees else None, patch_size=square,
        pooling_kernel_size=1, position_embedding_size=c["mm_posemb_size"],
        hidden_size=c["mm_embed_dim"], intermediate_size=3 * square**2,
        rms_norm_eps=c["rms_norm_eps"])


def gemma4_tokens(raw: dict, text: dict) -> dict:
    """Return the tokens of images, videos and sound, and the padding which they are to per-layer
    inputs."""
    usual = dict(image_token_id=258880, video_token_id=258884, audio_token_id=258881)
    ids = {key: raw.get(key, default) for key, default in usual.items()}
    ids["pad_token_id"] = text.get("pad_token_id") or 0
    for key, value in ids.items():
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"config.json: {key} = {value!r:.60}: expected a token id")
    padding = ids.pop("pad_token_id")
    return dict(padding=padding, placeholders=tuple(i for i in ids.values() if i is not None))


def gemma4_theta(rope: dict) -> float:
    """Return the base of the angles by which the tower's heads turn."""
    settings = rope if isinstance(rope, dict) else {"rope_type": None}
    theta = settings.get("rope_theta", 100.0)
    is_number = type(theta) in (int, float) and 0 < theta < 1e30
    if settings.get("rope_type", "axial") not in ("axial", "default") or not is_number:
        raise ValueError(f"config.json: rope_parameters = {rope!r:.90} in vision_config: expected "
                         'a rope_theta above 0, and "axial" or "default" for a rope_type')
    return theta


def split_qwen(raw: dict) -> tuple[dict, dict]:
    """Split Qwen's, whose decoder is a Qwen2; older files have its keys at the top level."""
    older = {k: v for k, v in raw.items() if k not in QWEN_OUTER}
    text = dict(raw.get("text_config") or older) | {"model_type": "qwen2"}
    rope = dict(text.pop("rope_scaling", None) or {})
    rope |= dict(text.pop("rope_parameters", None) or {})
    sections = rope.pop("mrope_section", [16, 24, 24])
    rope = {k: "default" if v == "mrope" else v for k, v in rope.items()}
    rope.pop("type", None)
    text["rope_parameters"] = rope
    newer = raw["model_type"] == "qwen2_5_vl"
    given = {k: v for k, v in raw["vision_config"].items() if k not in QWEN_IGNORED}
    theta = (raw["vision_config"].get("rope_parameters") or {}).get("rope_theta", 10000.0)
    if theta != 10000.0:
        raise ValueError(f"config.json: rope_theta = {theta} in vision_config is not supported")
    c = read_tower(given, raw["model_type"], QWEN25 if newer else QWEN2)
    if newer:
        c |= {"size": c["hidden_size"], "out": c["out_hidden_size"]}
    else:
        c |= {"size": c["embed_dim"], "out": c["hidden_size"]}
    c |= {"kind": "qwen", "newer": newer, "sections": tuple(sections)}
    return QWEN2_TEXT | text, c


def split_qwen3(raw: dict) -> tuple[dict, dict]:
    """Split that of Qwen3-VL and Qwen3.5, whose dims turn with time, height and width in turn."""
    kind = raw["model_type"]
    text = QWEN3_TEXT[kind] | raw["text_config"]
    text["model_type"] = DECODERS.get(text["model_type"], text["model_type"])
    if text["model_type"] == "qwen3_moe" and text.setdefault("norm_topk_prob", True) is not True:
        raise ValueError(f"config.json: norm_topk_prob = {text['norm_topk_prob']} is not supported "
                         f"for {kind!r}, whose routers always normalize")
    axes = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = text.get(key) or {}
        axes |= {k: v for k, v in given.items() if k.startswith("mrope_")}
        text[key] = {k: v for k, v in given.items() if k not in axes}
    if axes.get("mrope_interleaved") is False:
        raise ValueError(f"config.json: mrope_interleaved = False is not supported for {kind!r}")
    given = {k: v for k, v in raw["vision_config"].items() if k not in QWEN_IGNORED}
    deep = given.pop("deepstack_visual_indexes", None)
    if kind.startswith("qwen3_5"):
        deep = ()
    elif deep is None:
        deep = (8, 16, 24)
    c = read_tower(given, kind, QWEN3)
    if len({*deep}) < len(deep) or not {*deep} <= {*range(c["depth"])}:
        raise ValueError(f"config.json: deepstack_visual_indexes = {list(deep)} in vision_config: "
                         f"expected different layers of the tower, 0 to {c['depth'] - 1}")
    places = c["num_position_embeddings"]
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"config.json: num_position_embeddings = {places} in vision_config: "
                         "expected those of a square")
    default = QWEN3_SECTIONS[kind.removesuffix("_moe")]
    return text, c | dict(
        kind="qwen3", size=c["hidden_size"], deep=tuple(deep),
        sections=tuple(axes.get("mrope_section", default)))


READS_IMAGES = {
    "llava": split_llava, "idefics3": split_idefics, "smolvlm": split_idefics,
    "gemma3": split_gemma, "gemma4": split_gemma4, "gemma4_unified": split_unified,
    "qwen2_vl": split_qwen, "qwen2_5_vl": split_qwen, **dict.fromkeys(QWEN3_TEXT, split_qwen3)}
SPLITS = READS_IMAGES | dict.fromkeys(WRAPPED, unwrap)
