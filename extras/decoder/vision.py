"""Vision-language models: a tower that turns pictures into features, a projector into the decoder's space.

LLaVA (CLIP or SigLIP tower, two-layer projector), Idefics3 and SmolVLM (SigLIP tower, pixel shuffle), Qwen2-VL and
Qwen2.5-VL (extras/qwen_vl.py). Entered where config.json has a `vision_config`; files of pictures are read and cut by
extras/pictures.py.

The features take the place of the image tokens' embeddings in the stream. Each distinct picture of a batch is encoded
once, though both completions see it and rows may share it: `Pictures.source` says which feature stands where.
"""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import ACTIVATIONS, HARMLESS, ModelConfig, has_flash, read_config

LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
             max_position_embeddings=2048, rms_norm_eps=1e-6)  # what config.json leaves out, transformers fills in
SIGLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
              patch_size=16, num_channels=3, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
IDEFICS = SIGLIP | dict(hidden_size=1152, num_attention_heads=16, patch_size=32)
CLIP = SIGLIP | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
TOWERS = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP, "idefics3": IDEFICS, "idefics3_vision": IDEFICS,
          "smolvlm_vision": IDEFICS, "smolvlm": IDEFICS}
# of a tower alone, or left over from training: they change nothing in a forward pass
UNREAD = re.compile(r"^(projection_dim|vocab_size|initializer_factor|size|max_image_size|vision_use_head|use_base_siglip"
                    r"|_flash_attn_2_enabled|is_llama_config|perceiver_config|pixel_shuffle_factor|neftune_noise_alpha"
                    r"|tie_word_embeddings|use_cache)$")
TOP = re.compile(r"^(text_config|vision_config|model_type|ignore_index|image_seq_length|tie_word_embeddings|vocab_size"
                 r"|(image|video|vision)_.*token_(id|index)|vision_token_id|_?pad_token_id|scale_factor|projector_hidden_act"
                 r"|multimodal_projector_bias|vision_feature_layer|vision_feature_select_strategy|image_token_index)$")
QUICK_GELU = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


# Configuration


def read_vision_config(raw: dict, max_length: Optional[int] = None) -> ModelConfig:
    """ModelConfig of the decoder with `vision`, a dict, beside it. Raises ValueError for families that are not known."""
    kind = raw.get("model_type")
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        from extras.qwen_vl import split_config
    elif kind in ("llava", "idefics3", "smolvlm"):
        split_config = split_llava if kind == "llava" else split_idefics
    else:
        raise ValueError(f"model_type {kind!r} reads images or sound; of those, llava, idefics3, smolvlm, qwen2_vl and "
                         "qwen2_5_vl are supported, and text-only decoders")
    refuse_unknown({k: v for k, v in raw.items() if not TOP.match(k)} if "text_config" in raw else {}, kind)
    text, vision = split_config(raw)
    text = {k: v for k, v in text.items() if not UNREAD.match(k) or k == "vocab_size"}
    text["tie_word_embeddings"] = raw.get("tie_word_embeddings", (raw.get("text_config") or {}).get(
        "tie_word_embeddings", False))
    text["quantization_config"] = raw.get("quantization_config")
    config = read_config(text, max_length)
    return replace(config, model_type=kind, other_names=True, vision=vision | {"text_size": config.hidden_size})


def refuse_unknown(raw: dict, kind: str) -> None:
    odd = {k: v for k, v in raw.items() if not HARMLESS.match(k) and not UNREAD.match(k) and v not in (None, False, 0)}
    if odd:
        raise ValueError(f"config.json: {', '.join(f'{k} = {v!r}' for k, v in odd.items())}: not understood for "
                         f"{kind!r}, and it may change the model's numbers")


def read_tower(given: dict, kind: str, defaults: dict) -> dict:
    """The tower's keys, checked; what config.json leaves out is transformers' default."""
    refuse_unknown({k: v for k, v in given.items() if k not in defaults}, f"the tower of {kind}")
    tower = defaults | {k: v for k, v in given.items() if k in defaults and v is not None}
    acts = ACTIVATIONS | QUICK_GELU
    if tower["hidden_act"] not in acts:
        raise ValueError(f"config.json: hidden_act = {tower['hidden_act']!r} in vision_config; known are {', '.join(acts)}")
    return tower


def split_llava(raw: dict) -> tuple[dict, dict]:
    """(config.json of the decoder, the tower's settings)."""
    text, given = dict(raw.get("text_config") or {}), dict(raw["vision_config"])
    text.setdefault("model_type", "llama")
    tower = given.get("model_type", "clip_vision_model")
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"llava with a tower of type {tower!r} is not supported; clip_vision_model and siglip_vision_model are")
    strategy = raw.get("vision_feature_select_strategy", "default")
    layers = raw.get("vision_feature_layer", -2)
    vision = read_tower(given, "llava", TOWERS[tower]) | dict(
        kind="llava", is_clip=tower == "clip_vision_model", drop_first=strategy == "default",
        layers=tuple(layers) if isinstance(layers, (list, tuple)) else (layers,),
        projector_act=raw.get("projector_hidden_act", "gelu"), projector_bias=raw.get("multimodal_projector_bias", True))
    return (LLAMA if text["model_type"] == "llama" else {}) | text, vision


def split_idefics(raw: dict) -> tuple[dict, dict]:
    text, given = dict(raw.get("text_config") or {}), dict(raw["vision_config"])
    text.setdefault("model_type", "llama")
    vision = read_tower(given, raw["model_type"], IDEFICS)
    return LLAMA | text, vision | dict(kind="idefics3", is_clip=False, drop_first=False, layers=(-1,),
                                       scale_factor=raw.get("scale_factor", 2))


# Names in the files; the left side is ours

NAMES = {"llava": {"model.vision.tower.": "model.vision_tower.", "model.vision.projector.": "model.multi_modal_projector.",
                   "model.": "model.language_model."},
         "idefics3": {"model.vision.tower.": "model.vision_model.", "model.vision.projector.": "model.connector.",
                      "model.": "model.text_model."},
         "qwen2_vl": {"model.vision.projector.": "model.visual.merger.", "model.vision.tower.": "model.visual.",
                      "model.": "model.language_model."}}
NAMES |= {"smolvlm": NAMES["idefics3"], "qwen2_5_vl": NAMES["qwen2_vl"]}
OURS = ((r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision.tower."),
        (r"^(model\.)?multi_modal_projector\.", "model.vision.projector."),
        (r"^model\.vision_model\.", "model.vision.tower."), (r"^model\.connector\.", "model.vision.projector."),
        (r"^(model\.)?visual\.merger\.", "model.vision.projector."), (r"^(model\.)?visual\.", "model.vision.tower."),
        (r"^(model\.(text_model|language_model)|language_model\.model)\.", "model."), (r"^language_model\.lm_head", "lm_head"))


def other_name(name: str, family: str) -> str:
    """transformers' name of a module or parameter of ours."""
    for ours, theirs in NAMES[family].items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def our_name(name: str) -> str:
    """Our name of a tensor, whichever of the prefixes of transformers 4 and 5 its file has."""
    for pattern, ours in OURS:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return name


# Modules


class Pictures(NamedTuple):
    """The pictures of a stream: what the tower reads, and where in the stream its features stand."""

    pixels: Tensor  # (tiles, 3, height, width), or for Qwen (patches, 3 x frames x height x width)
    grids: Tensor  # (pictures, 2) int64, patches down and across; read by Qwen
    place: Tensor  # (M,) int64, stream positions of image tokens
    source: Tensor  # (M,) int64, which feature each of them becomes
    axes: Optional[Tensor] = None  # (3, T) int64, Qwen's time, height and width of every token

    def to(self, device, non_blocking: bool = False) -> "Pictures":
        """On a device, except `grids`, which the tower reads on the CPU."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in self._asdict().items() if v is not None and k != "grids"}
        return self._replace(**moved)


def attend_within(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:  # (P, H, D)
    """softmax(q k^T / sqrt(D)) v within each stretch of the packed stream, in both directions.

    (`model.attend` is causal within a span.) Stretches of equal length go as one batch.
    """
    if has_flash(SimpleNamespace(head_dim=q.shape[-1], attn_softcap=None), q.device, v.dtype):
        from torch.nn.attention.varlen import varlen_attn

        ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(q.device)
        return varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))
    sizes = torch.tensor(lengths)
    starts, rows, out = sizes.cumsum(0) - sizes, [], []
    for length in sorted(set(lengths)):
        index = (starts[sizes == length][:, None] + torch.arange(length)).flatten().to(q.device)
        whole = len(index) == len(q)
        part = [(x if whole else x[index]).unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]  # (n, H, length, D)
        out.append(F.scaled_dot_product_attention(*part).transpose(1, 2).flatten(0, 1))
        rows.append(index)
    return out[0] if len(out) == 1 else torch.cat(out)[torch.cat(rows).argsort()]


class TowerAttention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:  # (P, C)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend_within(q, k, v, lengths).flatten(1))


class TowerMLP(nn.Module):
    def __init__(self, size: int, inner: int, act: str):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(size, inner), nn.Linear(inner, size), (ACTIVATIONS | QUICK_GELU)[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TowerBlock(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        size, eps = c["hidden_size"], c["layer_norm_eps"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(size, eps), nn.LayerNorm(size, eps)
        self.self_attn = TowerAttention(size, c["num_attention_heads"])
        self.mlp = TowerMLP(size, c["intermediate_size"], c["hidden_act"])

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:  # (P, C)
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """A linear map of each patch, its place in the picture, and for CLIP a token for the whole."""

    def __init__(self, c: dict):
        super().__init__()
        size, patch, side = c["hidden_size"], c["patch_size"], c["image_size"] // c["patch_size"]
        self.patch_embedding = nn.Conv2d(c["num_channels"], size, patch, patch, bias=not c["is_clip"])
        self.position_embedding = nn.Embedding(side * side + c["is_clip"], size)
        if c["is_clip"]:
            self.class_embedding = nn.Parameter(torch.zeros(size))

    def forward(self, pixels: Tensor) -> Tensor:  # (tiles, patches, C)
        weight = self.patch_embedding.weight
        x = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        if hasattr(self, "class_embedding"):
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class Tower(nn.Module):
    """CLIP's or SigLIP's picture encoder, over all tiles as one stream."""

    def __init__(self, c: dict):
        super().__init__()
        self.config = c
        self.embeddings = Embeddings(c)
        if c["is_clip"]:
            self.pre_layrnorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerBlock(c) for _ in range(c["num_hidden_layers"]))
        self.post_layernorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def wanted(self) -> list[int]:
        """After how many layers features are taken."""
        n = self.config["num_hidden_layers"]
        return [i if i >= 0 else n + 1 + i for i in self.config["layers"]]

    def unreached(self) -> list[nn.Module]:
        """Modules that the files hold and no feature comes through."""
        layers = list(self.encoder.layers)[max(self.wanted()) :]
        return layers + ([] if self.config["kind"] == "idefics3" else [self.post_layernorm])

    def forward(self, pixels: Tensor, grids: Tensor, run: Callable) -> Tensor:  # (tiles, features, C)
        x = self.embeddings(pixels)
        x = self.pre_layrnorm(x) if self.config["is_clip"] else x
        tiles, length, _ = x.shape
        x, kept, wanted = x.flatten(0, 1), [], self.wanted()
        for i in range(max(wanted) + 1):
            if i in wanted:
                kept.append(x)
            if i < max(wanted):
                x = run(self.encoder.layers[i], x, [length] * tiles)
        if self.config["kind"] == "idefics3":
            kept = [self.post_layernorm(x)]
        x = torch.cat([kept[sorted(set(wanted)).index(i)] for i in wanted], -1).unflatten(0, (tiles, length))
        return x[:, 1:] if self.config["drop_first"] else x


class LlavaProjector(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.linear_1 = nn.Linear(c["hidden_size"] * len(c["layers"]), c["text_size"], bias=c["projector_bias"])
        self.linear_2 = nn.Linear(c["text_size"], c["text_size"], bias=c["projector_bias"])
        self.act = ACTIVATIONS[c["projector_act"]]

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        return self.linear_2(self.act(self.linear_1(x))).flatten(0, 1)


class ShuffleProjector(nn.Module):
    """s x s neighbouring features become one, then a linear map (Idefics3's pixel shuffle)."""

    def __init__(self, c: dict):
        super().__init__()
        self.scale = c["scale_factor"]
        self.modality_projection = nn.Module()
        self.modality_projection.proj = nn.Linear(c["hidden_size"] * self.scale**2, c["text_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (F, C) of the decoder
        tiles, length, size = x.shape
        side, s = int(length**0.5), self.scale
        x = x.view(tiles, side // s, s, side // s, s, size).transpose(2, 3)  # (tiles, down, across, s, s, C)
        return self.modality_projection.proj(x.reshape(-1, s * s * size))


class Vision(nn.Module):
    """Puts the features of pictures into the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.vision
        if c["kind"] == "qwen":
            from extras import qwen_vl

            self.tower, self.projector = qwen_vl.Tower(c), qwen_vl.Merger(c)
        else:
            self.tower = Tower(c)
            self.projector = (LlavaProjector if c["kind"] == "llava" else ShuffleProjector)(c)

    def encode(self, pixels: Tensor, grids: Tensor, save_memory: bool = False) -> Tensor:  # (F, C)
        """Features of all pictures, one after another, in the decoder's size."""
        run = lambda layer, *args: layer(*args)
        if save_memory and torch.is_grad_enabled():
            run = lambda layer, *args: checkpoint(layer, *args, use_reentrant=False)
        return self.projector(self.tower(pixels, grids, run))

    def forward(self, x: Tensor, tables: dict, pictures: Optional[Pictures], ropes: dict, save_memory: bool):
        """The stream's embeddings (T, C) with features in their places, and the rotary tables of Qwen's three axes.

        Without pictures a blank one is encoded and multiplied by 0 where the tower or projector learns, so that each
        parameter has a gradient on every rank, as DDP and FSDP expect.
        """
        if pictures is None:
            learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
            return (x + 0 * self.encode(*self.blank(x.device)).sum(), tables) if learns else (x, tables)
        features = self.encode(pictures.pixels, pictures.grids, save_memory)[pictures.source]  # (M, C)
        x = x.index_put((pictures.place,), features.to(x.dtype))
        if pictures.axes is not None:
            from extras.qwen_vl import axes_tables

            tables = axes_tables(ropes, pictures.axes, self.config["sections"], x.dtype)
        return x, tables

    def blank(self, device) -> tuple[Tensor, Tensor]:
        """The smallest picture that the tower reads."""
        c = self.config
        if c["kind"] == "qwen":
            side = c["spatial_merge_size"]
            size = c["in_channels"] * c["temporal_patch_size"] * c["patch_size"] ** 2
            return torch.zeros(side * side, size, device=device), torch.tensor([[side, side]])
        return torch.zeros(1, c["num_channels"], c["image_size"], c["image_size"], device=device), torch.zeros(0, 2).long()


def make_ready(model: nn.Module, tokenizer, freeze_tower: bool):
    """Freeze what is not trained; returns what decodes pictures, None where the model's directory lacks the processor."""
    freeze(model, freeze_tower)
    if tokenizer.pictures is None:
        return None
    from extras.pictures import Loader

    return Loader(tokenizer.pictures)


def freeze(model: nn.Module, tower: bool) -> None:
    """Freezes modules that no feature comes through and, if `tower`, the whole tower; LoRA leaves them alone.

    The projector always learns.
    """
    vision, names = model.model.vision, {m: n for n, m in model.named_modules()}
    idle = [vision.tower] if tower else vision.tower.unreached()
    for module in idle:
        module.requires_grad_(False)
    model.no_lora = tuple(f"{names[module]}." for module in idle)
