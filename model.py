"""Decoders that read a flat stream: every token of a micro-batch lies in one (T,) row, prompts once, no padding.

Embeddings, norms, projections and MLPs work on (T, C) and never hear of pairs. Attention alone knows which token
belongs where, through `spans`: rows (start, end, prefix_start, prefix_end), each a stretch of the stream that attends
fully to its prefix and causally to itself. The head scores only the positions it is asked for and never holds (T, V)
logits.

Families differ by features, not by classes: a `Family` names what is unlike Llama, and the modules branch on that.
Four stand here, the others in extras/families.py. Parameters carry Hugging Face's names. What few readers need is
imported where it is used: experts (extras/moe.py), YaRN and LongRoPE (extras/rope.py), soft-capped attention
(extras/softcap.py), files laid out otherwise (extras/layouts.py), PEFT's files (extras/peft_io.py).

Sizes: T tokens, N scored tokens, S spans, V vocabulary, C hidden, H heads, K kv heads, D head dim.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_CHUNK = 2**24  # logits held at once: rows x vocabulary (64 MiB in float32); on a GPU eight times as many
SHARD_BYTES = 5 * 10**9  # a larger checkpoint is saved in several files


# Configuration: config.json -> ModelConfig


class Rope(NamedTuple):
    """How one kind of layer turns: radians per position of each pair of dims, and a factor on cos and sin."""

    frequencies: tuple[float, ...]
    factor: float = 1.0
    limit: Optional[int] = None  # tokens; a longer sequence would need other frequencies


@dataclass(frozen=True)
class ModelConfig:
    """What the modules read. Features that only some families have default to Llama's behaviour."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    windows: tuple[Optional[int], ...] = ()  # per layer; None attends to everything before
    rope_layers: tuple[Optional[str], ...] = ()  # per layer: which of `ropes`; None does not turn
    ropes: dict[str, Rope] = field(default_factory=dict)
    norm: str = "rms"  # or "layer"
    norm_offset: bool = False  # Gemma: scale by 1 + weight
    # names of the norms before attention, after it, before the MLP, after it
    block_norms: tuple[Optional[str], ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    qk_norm: Optional[str] = None  # "head": over each head; "full": over all heads together
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: Optional[str] = None  # "blocks": all q, then all k, then all v; "heads": q, k, v of each head in turn
    gated_mlp: bool = True
    fused_gate_up: bool = False
    parallel_residual: bool = False  # GPT-NeoX: x + attention(norm(x)) + mlp(norm(x))
    learned_positions: bool = False  # GPT-2
    attention_scale: float = 0.0
    attn_softcap: Optional[float] = None
    final_softcap: Optional[float] = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    moe: Optional[dict] = None  # made by extras/families.py, read by extras/moe.py
    vision: Optional[dict] = None  # made and read by extras/vision.py
    other_names: bool = False  # its files name or lay out parameters otherwise: extras/layouts.py


class Family(NamedTuple):
    """What is unlike Llama in a family: enough to read its config.json; the modules see ModelConfig alone.

    In the functions `c` is a dict of the keys that the family reads.
    """

    features: dict  # fields of ModelConfig that config.json does not say
    keys: dict  # keys of config.json it reads besides COMMON, with what a file without them means
    slides: Callable = lambda i, c: False  # whether layer i has the window, where the file has no layer_types
    turns: Callable = lambda i, c: True  # whether layer i has rotary embeddings
    more: Callable = lambda c: {}  # further fields of ModelConfig
    rename: Callable = lambda raw: raw  # config.json with Llama's keys


REQUIRED = object()
COMMON = dict(
    vocab_size=REQUIRED, hidden_size=REQUIRED, intermediate_size=REQUIRED, num_hidden_layers=REQUIRED,
    num_attention_heads=REQUIRED, max_position_embeddings=REQUIRED, rms_norm_eps=REQUIRED, num_key_value_heads=None,
    head_dim=None, hidden_act="silu", tie_word_embeddings=False, rope_theta=10000.0, rope_scaling=None,
    rope_parameters=None, partial_rotary_factor=1.0, original_max_position_embeddings=None)
BIAS = dict(attention_bias=False)
WINDOW = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None)
FAMILIES = {
    "llama": Family({}, BIAS | dict(mlp_bias=False)),
    "mistral": Family({}, dict(sliding_window=4096), slides=lambda i, c: True),
    "qwen2": Family(dict(qkv_bias=True), WINDOW, slides=lambda i, c: i >= c["max_window_layers"]),
    "qwen3": Family(dict(qk_norm="head"), BIAS | WINDOW | dict(head_dim=128),
                    slides=lambda i, c: i >= c["max_window_layers"]),
}

# Keys of config.json that change nothing in a forward pass without dropout.
HARMLESS = re.compile(r"""(?x) ^( architectures | model_type | auto_map | (torch_)?dtype | transformers_version
    | _name_or_path | tokenizer_class | (bos|eos|pad|unk|sep|decoder_start|forced_eos)_token_id | initializer_range
    | use_cache | cache_implementation | pretraining_tp | gradient_checkpointing | .*dropout | .*_pdrop | summary_.*
    | task_specific_params | n_ctx | max_sequence_length | max_window_layers | sliding_window_size
    | _sliding_window_pattern | reorder_and_upcast_attn | full_attn_mod | interpolate_factor | _?attn_implementation.*
    | output_(attentions|hidden_states) | (use_)?return_dict | id2label | label2id | problem_type | is_decoder
    | m(ax|in)_length | do_sample | temperature | top_[kp] | num_beams | repetition_penalty | unsloth_.*
    | transformers\.js_config )$""")


def read_config(raw: dict, max_length: Optional[int] = None) -> ModelConfig:
    """ModelConfig from the content of config.json.

    `max_length` is the longest sequence of the run in tokens, None for "no longer than the model was made for". Phi-3's
    LongRoPE has other frequencies beyond its pretraining length; they are chosen once per run by `max_length`, where
    transformers chooses per batch, so that a pair's log-probs never depend on what it is batched with.
    Raises ValueError, by name, for what is not supported: other model types, quantized and encoder-decoder models, and
    keys that are neither read nor known to be harmless and have a value that could mean something.
    """
    if "vision_config" in raw:
        from extras.vision import read_vision_config

        return read_vision_config(raw, max_length)
    try:
        return make_config(raw, max_length)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"config.json: a value of another type or size than expected ({error!r:.200})") from None


def make_config(raw: dict, max_length: Optional[int]) -> ModelConfig:
    family = find_family(raw)
    c = read_keys(family.rename(raw), family.keys)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "hidden_act")
    bias = bool(c.get("attention_bias"))
    fields = {k: c[k] for k in same} | dict(
        num_key_value_heads=c["num_key_value_heads"] or c["num_attention_heads"], head_dim=c["head_dim"],
        norm_eps=c["rms_norm_eps"], tie_word_embeddings=bool(c["tie_word_embeddings"]), qkv_bias=bias, o_bias=bias,
        mlp_bias=bool(c.get("mlp_bias")), attention_scale=c["head_dim"] ** -0.5)
    ropes = {} if family.features.get("learned_positions") else read_ropes(c, max_length)
    fields |= read_layers(c, family, ropes) | family.more(c) | family.features
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act = {fields['hidden_act']!r}; known are {', '.join(ACTIVATIONS)}")
    return ModelConfig(model_type=raw["model_type"], **fields)


def find_family(raw: dict) -> Family:
    quantized = raw.get("quantization_config")
    if quantized:
        raise ValueError(f"the checkpoint is quantized ({quantized.get('quant_method', 'method unknown')}); "
                         "use the original one in bf16, fp16 or float32")
    if raw.get("model_type") in FAMILIES and "auto_map" not in raw:
        return FAMILIES[raw["model_type"]]
    from extras.families import find_family  # raises ValueError, saying why

    return find_family(raw)


def read_keys(raw: dict, keys: dict) -> dict:
    """The keys that a family reads: its defaults, and what the file says over them (null is a value)."""
    known = COMMON | keys
    odd = {k: v for k, v in raw.items()
           if k not in known and not HARMLESS.match(k) and v not in (None, False, 0, "", [], {})}
    if odd:
        raise ValueError(f"config.json: {', '.join(f'{k} = {v!r}' for k, v in odd.items())}: not understood for "
                         f"model_type {raw['model_type']!r}, and it may change the model's numbers")
    c = known | {k: raw[k] for k in known if k in raw}
    missing = [k for k in known if known[k] is REQUIRED and (c[k] is REQUIRED or c[k] is None)]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)}: missing")
    check_values(c, known)
    c["head_dim"] = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    return c


SIZES = dict(vocab_size=2**24, hidden_size=2**20, intermediate_size=2**24, num_hidden_layers=2**12, head_dim=2**16,
             num_attention_heads=2**16, num_key_value_heads=2**16, num_experts=2**16, num_local_experts=2**16)


def check_values(c: dict, known: dict) -> None:
    """Raise ValueError for a size that no model has, and for a value that is neither null nor of its default's type."""
    for key, value in c.items():
        default, size = known[key], SIZES.get(key)
        if size is not None:
            fits, wanted = type(value) is int and 1 <= value <= size, f"a whole number from 1 to {size}"
        elif isinstance(default, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, (int, float)) or key == "rms_norm_eps":
            fits, wanted = type(value) in (int, float) and abs(value) < 1e30, "a number"
        else:
            fits, wanted = not isinstance(default, str) or isinstance(value, str), "a text"
        if not fits and not (value is None and default is not REQUIRED):
            raise ValueError(f"config.json: {key} = {value!r:.60}: {wanted} is expected")


def read_layers(c: dict, family: Family, ropes: dict[str, Rope]) -> dict:
    """Window and rotation of each layer."""
    n, types = c["num_hidden_layers"], c.get("layer_types")
    window = (c.get("sliding_window") or None) if c.get("use_sliding_window", True) else None
    if types and len(types) != n:
        raise ValueError(f"config.json: layer_types names {len(types)} layers of {n}")
    slides = [t == "sliding_attention" for t in types] if types else [family.slides(i, c) for i in range(n)]
    kinds = ["sliding_attention" if s and "sliding_attention" in ropes else "full_attention" for s in slides]
    turns = tuple(kind if kind in ropes and family.turns(i, c) else None for i, kind in enumerate(kinds))
    return dict(windows=tuple(window if s else None for s in slides), ropes=ropes, rope_layers=turns)


def check_length(config: ModelConfig, length: int) -> None:
    """Raise ValueError where a sequence of `length` tokens is longer than the positions of the model reach."""
    limits = [rope.limit for rope in config.ropes.values() if rope.limit]
    limits += [config.max_position_embeddings] if config.learned_positions else []
    if limits and length > min(limits):
        raise ValueError(f"a sequence of {length} tokens: the positions of this {config.model_type} model, as it was "
                         f"loaded, reach {min(limits)}; set --max_length accordingly")


# Rotary position embeddings

ROPE_KEYS = {  # rope_type -> the keys it reads besides those of all
    "default": (), "linear": ("factor",), "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor")}


def read_ropes(c: dict, max_length: Optional[int]) -> dict[str, Rope]:
    """{"full_attention": Rope, maybe "sliding_attention": Rope} from `rope_parameters` or the older keys."""
    given = c["rope_scaling"] or c["rope_parameters"] or {}
    ropes = {k: v for k, v in given.items() if isinstance(v, dict)} or {"full_attention": given}
    if "rope_local_base_freq" in c:  # Gemma 3: layers with a window have a base of their own
        ropes = {"sliding_attention": {"rope_theta": c["rope_local_base_freq"]}} | ropes
    return {name: read_rope(rope, c, max_length) for name, rope in ropes.items()}


def read_rope(given: dict, c: dict, max_length: Optional[int]) -> Rope:
    """One Rope; raises ValueError for a kind or a key that is not known, and for a missing one."""
    longest, original = c["max_position_embeddings"], "original_max_position_embeddings"
    rope = {"rope_theta": c["rope_theta"], "partial_rotary_factor": c["partial_rotary_factor"], original: longest}
    # Phi-3's first files call it "su" or "yarn"
    kind = "longrope" if "long_factor" in given else given.get("rope_type") or given.get("type") or "default"
    odd = sorted(given.keys() - rope.keys() - {"type", "rope_type", *ROPE_KEYS.get(kind, ())})
    if kind not in ROPE_KEYS or odd:
        raise ValueError(f"config.json: rope_type {kind!r}{' with ' if odd else ''}{', '.join(odd)} is not supported; "
                         f"supported are {', '.join(ROPE_KEYS)}")
    rope |= {k: v for k, v in given.items() if v is not None}
    rope |= {original: c[original] or rope[original], "max_position_embeddings": longest}
    try:
        return make_rope(kind, rope, int(c["head_dim"] * rope["partial_rotary_factor"]), max_length)
    except KeyError as error:
        raise ValueError(f"config.json: rope_type {kind!r} needs {error}") from None


def make_rope(kind: str, rope: dict, dim: int, max_length: Optional[int]) -> Rope:
    """theta^(-2i/dim), stretched as `kind` says; float32, as the models were trained.

    `dynamic` only acts beyond max_position_embeddings and depends on the length there, so it is `default` with a limit.
    """
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)  # (dim/2,)
    if kind in ("yarn", "longrope"):
        from extras.rope import scaled_rope

        return Rope(*scaled_rope(kind, rope, freq, max_length))
    if kind == "linear":
        freq = freq / rope["factor"]
    if kind == "llama3":  # long wavelengths divided by `factor`, short ones kept, a smooth ramp between
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        wavelength = 2 * math.pi / freq
        smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        freq = (1 - smooth) * freq / rope["factor"] + smooth * freq
    return Rope(tuple(freq.tolist()), limit=rope["max_position_embeddings"] if kind == "dynamic" else None)


def rotary_tables(ropes: dict[str, Rope], position_ids: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (cos, sin)}, each (T, 1, rotated dims); angles in float32, as the models were trained."""
    tables = {}
    with torch.autocast(position_ids.device.type, enabled=False):
        for name, rope in ropes.items():
            freq = torch.tensor(rope.frequencies, dtype=torch.float32).to(position_ids.device, non_blocking=True)
            angles = position_ids.float()[:, None] * freq  # (T, D/2)
            angles = torch.cat([angles, angles], -1)[:, None]  # (T, 1, D)
            tables[name] = ((angles.cos() * rope.factor).to(dtype), (angles.sin() * rope.factor).to(dtype))
    return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (T, H, D)
    """Turn the first `cos.shape[-1]` dims of each head: x cos + rotate_half(x) sin; in the wider of their types."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = Rotation.apply(part, cos, sin)
    return torch.cat([turned, rest.to(turned.dtype)], -1) if rest.shape[-1] else turned


class Rotation(torch.autograd.Function):
    """Of the two halves of the last dim: (a cos - b sin, b cos + a sin). Its gradient turns back: the same with -sin."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin).to(ctx.dtype), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    x, sin = x.to(out.dtype), sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out


# Attention over spans


class Call(NamedTuple):
    """One attention call: queries [start, end) of the stream on keys that lie in one or two stretches."""

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    mask: Optional[Tensor]  # (queries, keys) True where attended; None is plain causal, a single query sees every key


def plan_calls(spans: Tensor, position_ids: Tensor, window: Optional[int]) -> list[Call]:
    """Turn spans (S, 4) into attention calls: a prompt and its first completion are one causal sequence."""
    rows, calls, i = spans.tolist(), [], 0
    while i < len(rows):
        start, end, prefix_start, prefix_end = rows[i]
        i += 1
        if prefix_start == prefix_end and i < len(rows) and rows[i][2:] == [start, end] and rows[i][0] == end:
            end = rows[i][1]  # the span that follows its own prefix
            i += 1
        keys = ((prefix_start, prefix_end), (start, end)) if prefix_end > prefix_start else ((start, end),)
        mask = None
        if len(keys) == 2 or (window is not None and end - start > window):
            mask = span_mask(position_ids[start:end], torch.cat([position_ids[a:b] for a, b in keys]), window)
        calls.append(Call(start, end, keys, mask))
    return calls


def span_mask(queries: Tensor, keys: Tensor, window: Optional[int]) -> Tensor:  # (q, k) bool
    """0 <= position_q - position_k < window: positions, never stream indices."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class VarlenPlan(NamedTuple):
    """The same spans for one `varlen_attn` call: keys are gathered per span as prefix + self."""

    key_index: Tensor  # (sum of prefix + self lengths,) stream positions
    cu_queries: Tensor  # (S + 1,) int32
    cu_keys: Tensor  # (S + 1,) int32
    max_queries: int
    max_keys: int


def plan_varlen(spans: Tensor, device: torch.device, queries: Optional[Tensor] = None) -> VarlenPlan:
    """`queries` (S,): how many of each span's last tokens ask; unset is all of them."""
    start, end, prefix_start, prefix_end = spans.long().unbind(1)
    keys = end - start + prefix_end - prefix_start
    queries = end - start if queries is None else queries
    index = torch.cat([torch.cat([torch.arange(c, d), torch.arange(a, b)]) for a, b, c, d in spans.tolist()])
    cu = lambda n: F.pad(n.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    return VarlenPlan(index.to(device, non_blocking=True), cu(queries), cu(keys), int(queries.max()), int(keys.max()))


class CachedPlan(NamedTuple):
    """A plan over keys and values of a layer that are kept; `attend` adds the stream's own at their places."""

    plan: list[Call] | VarlenPlan
    keys: Tensor  # (places, K, D)
    values: Tensor  # (places, K, D)
    places: Tensor  # (T,) of this stream's tokens


def has_flash(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn` computes this model's attention."""
    D = config.head_dim
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and D % 8 == 0 and D <= 256
            and dtype in (torch.bfloat16, torch.float16) and config.attn_softcap is None)


def plan_attention(config: ModelConfig, spans: Tensor, position_ids: Tensor, dtype: torch.dtype) -> dict:
    """{window: plan} for one stream; made once and used by every layer."""
    if has_flash(config, position_ids.device, dtype):
        return dict.fromkeys(config.windows, plan_varlen(spans, position_ids.device))
    return {window: plan_calls(spans, position_ids, window) for window in set(config.windows)}


def attend(q: Tensor, k: Tensor, v: Tensor, plan, window: Optional[int], config: ModelConfig) -> Tensor:  # (T, H, D)
    """softmax(q k^T scale) v over the spans of the stream, in the type of v; q (T, H, D), k and v (T, K, D)."""
    if isinstance(plan, CachedPlan):
        plan, keys, values, places = plan
        k, v = keys.index_copy_(0, places, k.to(keys.dtype)), values.index_copy_(0, places, v)
    if isinstance(plan, VarlenPlan):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = q.to(v.dtype), k.to(v.dtype)[plan.key_index], v[plan.key_index]
        left = -1 if window is None else window - 1
        return varlen_attn(q, k, v, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
                           scale=config.attention_scale, window_size=(left, 0), enable_gqa=True)
    core = fused_attention
    if config.attn_softcap:
        from extras.softcap import softcapped_attention

        core = partial(softcapped_attention, cap=config.attn_softcap)
    dtype = v.dtype
    # a CPU's float32 kernel is faster than its bfloat16 one
    compute = torch.promote_types(dtype, torch.float32) if q.device.type == "cpu" else dtype
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    queries, ranges = cut(q, [((start, end),) for start, end, _, _ in plan]), [keys for _, _, keys, _ in plan]
    with torch.autocast(q.device.type, enabled=False):
        return torch.cat([core(*parts, mask, config.attention_scale) for *parts, (_, _, _, mask)
                          in zip(queries, cut(k, ranges), cut(v, ranges), plan)]).to(dtype)


def cut(x: Tensor, ranges: list[tuple[tuple[int, int], ...]]) -> list[Tensor]:
    """The stretches [a, b) of x, joined where an entry has several.

    By one split, whose gradient is one concatenation; each slice would have a gradient as long as x.
    """
    edges = sorted({0, len(x), *(edge for stretches in ranges for stretch in stretches for edge in stretch)})
    at = {edge: i for i, edge in enumerate(edges)}
    pieces = x.split([b - a for a, b in pairwise(edges)])
    parts = ([pieces[i] for a, b in stretches for i in range(at[a], at[b])] for stretches in ranges)
    return [torch.cat(part) if len(part) > 1 else part[0] for part in parts]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:  # (n, H, D)
    K = k.shape[1]
    q = q.unflatten(1, (K, -1)).permute(1, 2, 0, 3)  # (K, H/K, n, D)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # read in place by each head
    causal = mask is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


# Modules, leaf to root


class Norm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * w (Gemma: 1 + w), or LayerNorm; statistics in float32 at least.

    Its result has the type that the matrix products after it run in: rounded once for all of them.
    """

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.eps, self.offset, self.layer = config.norm_eps, config.norm_offset, config.norm == "layer"
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if self.layer else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).to(compute_dtype(x))
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide) + 1 if self.offset else self.weight.to(wide)
        if x.device.type == "cpu":
            return RMSNorm.apply(x, weight, self.eps, compute_dtype(x))
        return F.rms_norm(x.to(wide), x.shape[-1:], weight, self.eps).to(compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x runs in: autocast's type where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class RMSNorm(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps); dx = r (g - n mean(g n)) with g = dy w.

    PyTorch's own for the CPU is put together of six operations, and keeps all that they make.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(weight.dtype)
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        grad, n = grad.to(weight.dtype), x * r
        grad_weight = torch.linalg.vecdot(grad, n, dim=0) if grad.dim() == 2 else (grad * n).flatten(0, -2).sum(0)
        g = grad * weight
        g.addcmul_(n, torch.linalg.vecdot(g, n)[..., None], value=-1 / x.shape[-1]).mul_(r)
        return g.to(x.dtype), grad_weight, None, None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.window, self.rope = config, config.windows[layer], config.rope_layers[layer]
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(C, (H + 2 * K) * D, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
            self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
            self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        if config.qk_norm:
            q_size, k_size = (D, D) if config.qk_norm == "head" else (H * D, K * D)
            self.q_norm, self.k_norm = Norm(q_size, config), Norm(k_size, config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (T, H, D), (T, K, D), (T, K, D)
        c = self.config
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if c.fused_qkv == "heads":
            return self.qkv_proj(x).view(-1, H, 3, D).unbind(2)
        if c.fused_qkv:
            q, k, v = self.qkv_proj(x).split([H * D, K * D, K * D], -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(-1, H, D), k.view(-1, K, D), v.view(-1, K, D)
        return (self.q_norm(q), self.k_norm(k), v) if c.qk_norm == "head" else (q, k, v)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        q, k, v = self.project(x)
        if self.rope is not None:
            q, k = (rotate(part, *tables[self.rope]) for part in (q, k))
        out = attend(q, k, v, plans[self.window], self.window, self.config)
        return self.o_proj(out.flatten(1))


tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        C, bias = config.hidden_size, config.mlp_bias
        self.act, self.gated, self.fused = ACTIVATIONS[config.hidden_act], config.gated_mlp, config.fused_gate_up
        if self.fused:
            self.gate_up_proj = nn.Linear(C, 2 * size, bias=bias)
        else:
            if self.gated:
                self.gate_proj = nn.Linear(C, size, bias=bias)
            self.up_proj = nn.Linear(C, size, bias=bias)
        self.down_proj = nn.Linear(size, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (T, C)
        if not self.gated:
            return self.down_proj(self.act(self.up_proj(x)))
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(SwiGLU.apply(gate, up) if self.act is F.silu else self.act(gate) * up)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps two tensors for backward instead of three."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def make_mlp(config: ModelConfig, layer: int) -> nn.Module:
    if config.moe is None or not config.moe["sparse"][layer]:
        return MLP(config, config.intermediate_size)
    from extras.moe import SparseMLP

    shared = MLP(config, config.moe["shared_size"]) if config.moe["shared_size"] else None
    return SparseMLP(config.hidden_size, config.moe, ACTIVATIONS[config.hidden_act], shared)


class Block(nn.Module):
    """Norm, attention, norm, MLP with residuals; which of the four norms exist is the family's."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.self_attn = Attention(config, layer)
        self.mlp = make_mlp(config, layer)
        for name in filter(None, config.block_norms):
            self.add_module(name, Norm(config.hidden_size, config))

    def norm(self, which: int, x: Tensor) -> Tensor:
        name = self.config.block_norms[which]
        return x if name is None else getattr(self, name)(x)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> tuple[Tensor, Optional[Tensor]]:
        """Hidden states (T, C), and the router's logits (T, experts) of a sparse layer."""
        scale = self.config.residual_scale
        attended = torch.add(x, self.norm(1, self.self_attn(self.norm(0, x), tables, plans)), alpha=scale)
        out = self.mlp(self.norm(2, x if self.config.parallel_residual else attended))
        out, router_logits = out if isinstance(out, tuple) else (out, None)
        return torch.add(attended, self.norm(3, out), alpha=scale), router_logits


def make_embedding(count: int, size: int) -> nn.Embedding:
    """Drawn with the standard deviation 0.02 of transformers' models; uniformly, since a normal draw on the meta device
    imports PyTorch's compiler, which takes seconds."""
    bound = 0.02 * 3**0.5
    return nn.Embedding(count, size, _weight=torch.empty(count, size).uniform_(-bound, bound))


class Stack(nn.Module):
    """Embedding, blocks, last norm: stream in, hidden states out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embed_tokens = make_embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = make_embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config)
        if config.vision is not None:
            from extras.vision import Vision

            self.vision = Vision(config)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # (T, C)
        x, scale = self.embed_tokens(input_ids), self.config.embed_scale
        if scale != 1:
            x = x * torch.tensor(scale, dtype=x.dtype).item()  # rounded to the type, as Gemma was trained
        return x + self.embed_positions(position_ids) if self.config.learned_positions else x

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor, cache=None,
                pictures=None) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (T, C), and the router's logits (T, experts) of each sparse layer.

        With a `cache` (extras/generate.py) the stream goes on where an earlier one ended; `pictures`
        (extras/vision.py) take the places of their tokens.
        """
        x, routed = self.embed(input_ids, position_ids), []
        tables = rotary_tables(self.config.ropes, position_ids, x.dtype)
        if self.config.vision is not None:
            x, tables = self.vision(x, tables, pictures, self.config.ropes, self.gradient_checkpointing)
        stream = (self.config, spans, position_ids, compute_dtype(x))
        plans = cache.plan(*stream) if cache else [plan_attention(*stream)] * len(self.layers)
        for layer, plan in zip(self.layers, plans):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, router_logits = checkpoint(layer, x, tables, plan, use_reentrant=False)
            else:
                x, router_logits = layer(x, tables, plan)
            routed += [] if router_logits is None else [router_logits]
        return self.norm(x), routed


class TokenLogps(NamedTuple):
    """Of each scored token; all (N,), in nats, float32 or wider. Only `logps` and `aux_loss` carry gradients."""

    logps: Tensor
    entropy: Tensor  # of the predicted distribution
    log_sum_sq_probs: Tensor  # log sum_v p_v^2, which WPO needs
    mean_logits: Tensor  # over the vocabulary
    is_top1: Tensor  # bool: the target is the likeliest token
    aux_loss: Optional[Tensor] = None  # (): load balancing over the experts, unscaled; None without experts


class Decoder(nn.Module):
    """A causal language model on a flat stream, with its head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.layout, self.raw_config, self.generation_config = {}, {}, None  # what load_model found in the files
        self.no_lora: tuple[str, ...] = ()  # beginnings of names that LoRA leaves alone
        self.four_bit = None  # how its linear layers are quantized, where they are (extras/nf4.py)

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor, score_index: Tensor,
                targets: Tensor, pictures=None) -> TokenLogps:
        """Log-probs of `targets` (N,) at the hidden states `score_index` (N,) of the stream `input_ids` (T,)."""
        hidden, routed = self.model(input_ids, position_ids, spans, pictures=pictures)
        out = token_logps(self.head_terms(hidden[score_index]), targets, self.config.final_softcap)
        if self.config.moe is None:
            return out
        from extras.moe import load_balancing_loss

        return out._replace(aux_loss=load_balancing_loss(routed, spans, self.config.moe["per_token"]))

    def head_terms(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[(input, weight)] with logits = sum of input @ weight^T; a LoRA on the head is a second term, so that W + BA
        is never built."""
        hidden, head = hidden * self.config.logit_scale, self.lm_head
        return head.terms(hidden) if hasattr(head, "terms") else [(hidden, head.weight)]

    def logits(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor, rows: Optional[Tensor] = None,
               cache=None) -> Tensor:  # (T, V), or (len(rows), V)
        """Logits of all positions or of `rows`, for generation and tests; training never builds them."""
        hidden, _ = self.model(input_ids, position_ids, spans, cache)
        hidden = hidden if rows is None else hidden[rows]
        logits = sum(F.linear(x, w) for x, w in self.head_terms(hidden))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


# The head, in chunks


def token_logps(terms: list[tuple[Tensor, Tensor]], targets: Tensor, softcap: Optional[float] = None) -> TokenLogps:
    """log softmax(sum_k x_k w_k^T) at `targets` (N,), x_k (N, C_k), w_k (V, C_k), in chunks of N.

    The matrix products run in the autocast type where there is one, everything after them in float32 or wider.
    """
    compute = compute_dtype(terms[0][0])
    with torch.autocast(targets.device.type, enabled=False):
        return TokenLogps(*ChunkedLogps.apply(targets, softcap, compute, *(t for term in terms for t in term)))


class ChunkedLogps(torch.autograd.Function):
    """(N, V) logits exist one chunk at a time: scored and dropped in forward, made again in backward.

    d logp / d logits = onehot(target) - softmax(logits), so backward needs the logits and nothing else. Weight
    gradients are summed over the chunks in float32 at least, so that the chunk size does not show in bf16.
    """

    @staticmethod
    def forward(ctx, targets: Tensor, softcap: Optional[float], compute: torch.dtype, *tensors: Tensor):
        ctx.softcap, ctx.compute, ctx.dtypes = softcap, compute, [t.dtype for t in tensors]
        wide = torch.promote_types(compute, torch.float32)
        tensors = [t.to(compute) for t in tensors]  # once, for backward too
        ctx.save_for_backward(targets, *tensors)
        terms = list(zip(tensors[0::2], tensors[1::2]))
        out = [score_rows(logits.to(wide), at) for rows in chunks(targets, len(terms[0][1])) for logits, at in
               few_rows(chunk_logits(terms, rows, softcap), targets[rows])]
        out = [torch.cat(column) for column in zip(*out)]
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        targets, *tensors = ctx.saved_tensors
        terms = list(zip(tensors[0::2], tensors[1::2]))
        wide = torch.promote_types(ctx.compute, torch.float32)
        grads = [torch.empty(t.shape, dtype=wide, device=t.device) if needed else None
                 for t, needed in zip(tensors, ctx.needs_input_grad[3:])]
        for rows in chunks(targets, len(terms[0][1])):
            d = chunk_logits(terms, rows, ctx.softcap)  # (n, V), overwritten by its gradient
            for logits, *at in few_rows(d, targets[rows], grad[rows]):
                logits.copy_(grad_logits(logits, *at, ctx.softcap))
            for (x, w), grad_x, grad_w in zip(terms, grads[0::2], grads[1::2]):
                if grad_x is not None:
                    grad_x[rows] = (d @ w).to(wide)
                if grad_w is not None:
                    add_product(grad_w, d.T, x[rows], first=rows.start == 0)
        return None, None, None, *(g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, in the type of total; the first product overwrites it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    else:
        total.copy_(a @ b) if first else total.add_(a @ b)


def chunks(targets: Tensor, vocab_size: int) -> Iterator[slice]:
    """At least one, though it be empty: a stream without scored tokens has empty log-probs and zero gradients."""
    count, size = len(targets), chunk_rows(vocab_size, targets.device.type)
    return (slice(i, min(i + size, count)) for i in range(0, max(count, 1), size))


def chunk_rows(vocab_size: int, device: str) -> int:
    """Every chunk reads the whole weight, and adds to all of its gradient: a GPU waits for that below some 600 rows."""
    return max(16, HEAD_CHUNK * (1 if device == "cpu" else 8) // vocab_size)


def chunk_logits(terms: list[tuple[Tensor, Tensor]], rows: slice, softcap: Optional[float]) -> Tensor:  # (n, V)
    (x, w), *more = terms
    logits = x[rows] @ w.T
    for x, w in more:
        logits.addmm_(x[rows], w.T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def few_rows(logits: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of a chunk so many rows at once as are gone over many times in float32: what a CPU's caches hold, or 64 MiB."""
    size = 32 if logits.device.type == "cpu" else max(16, HEAD_CHUNK // logits.shape[1])
    return zip(*(t.split(size) for t in (logits, *more)))


def score_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # five (n,)
    """TokenLogps of some rows in few passes over them, and one more tensor of their size; overwrites `logits`."""
    mean = logits.mean(-1)
    top = logits.amax(-1)
    at_target = logits.gather(-1, targets[:, None]).squeeze(-1)
    logits -= top[:, None]  # z, at most 0
    e = logits.exp()
    total = e.sum(-1)
    entropy = total.log() - logits.mul_(e).sum(-1) / total  # log sum e^z - sum p z
    log_sum_sq = e.square_().sum(-1).log() - 2 * total.log()
    return at_target - top - total.log(), entropy, log_sum_sq, mean, at_target == top


def grad_logits(logits: Tensor, targets: Tensor, grad: Tensor, softcap: Optional[float]) -> Tensor:  # (n, V)
    """grad * (onehot - softmax), through the soft-cap where there is one: d/dx cap tanh(x/cap) = 1 - (y/cap)^2."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    d = logits.softmax(-1, dtype=wide).mul_(-grad[:, None])
    d.scatter_add_(-1, targets[:, None], grad[:, None].to(wide))
    return d if softcap is None else d.mul_(1 - (logits.to(wide) / softcap) ** 2)


# LoRA


class LoraLinear(nn.Module):
    """base(x) + scaling * B A dropout(x) (arXiv:2106.09685); base is any module that maps x linearly.

    A is drawn as PEFT draws it, uniform on +-1/sqrt(in); B is zero, so training starts at the base model. Both are
    at least float32 whatever the base is.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        weight = base.weight  # asked for once: in 4 bits it is made wide on the way
        place = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def low_rank(self, x: Tensor) -> Tensor:  # (T, rank), the input of B
        return self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out + self.lora_B(self.low_rank(x)).to(out.dtype) if self.enabled else out

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `Decoder.head_terms` has them."""
        return [(x, self.weight)] + ([(self.low_rank(x), self.lora_B.weight)] if self.enabled else [])

    def delta(self) -> Tensor:
        """scaling * B A, what merging adds to the weight."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)


def add_lora(model: Decoder, rank: int, alpha: float, dropout: float, targets: list[str] | str, **more) -> list[str]:
    """Freeze `model` and wrap its target modules; returns the names of the wrapped modules.

    `targets` are last parts of module names (`q_proj`, `lm_head`, `embed_tokens`; also as the model's own files name
    them, GPT-2's `c_attn`) or `all-linear`, which is every linear layer but the head. `more` are PEFT's other settings
    (extras/lora_targets.py). Raises ValueError for a target that matches nothing.
    """
    from extras.lora_targets import add_lora

    return add_lora(model, more | dict(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def lora_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}


@contextmanager
def adapters_disabled(model: nn.Module):
    """Within, `model` is its base: the reference of a LoRA run."""
    modules = list(lora_modules(model).values())
    for module in modules:
        module.enabled = False
    try:
        yield model
    finally:
        for module in modules:
            module.enabled = True


def merge_lora(model: Decoder) -> None:
    """Add what was learned to the weights and take the wrappers away: the same model, to rounding."""
    from extras.lora_kinds import merge

    merge(model)


# Files: reading


class Checkpoint(NamedTuple):
    """A directory of safetensors, opened: where each tensor lies."""

    directory: Path
    files: dict[str, str]  # tensor name in the file -> file name
    raw_config: dict


class Place(NamedTuple):
    """Which of our parameters, or which part of it, a tensor of the files is."""

    name: str
    index: tuple = ()  # the part, where the files hold a stack in pieces
    transposed: bool = False  # GPT-2 keeps (in, out)

    def view(self, parameter: Tensor) -> Tensor:
        part = parameter[self.index]
        return part.T if self.transposed else part


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Find the weight files of a Hugging Face directory. Raises ValueError naming what is missing or unreadable."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    raw = read_json(directory / "config.json")
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ValueError(f"{index}: no \"weight_map\" from tensors to files of this directory in it")
        missing = sorted({f for f in files.values() if not (directory / f).exists()})
        if missing:
            raise ValueError(f"{index}: names {', '.join(missing)}, which the directory lacks; download it again")
    elif single.exists():
        files = {name: single.name for name in open_safetensors(single).keys()}
    else:
        raise ValueError(f"{directory}: no model.safetensors and no model.safetensors.index.json; "
                         "pickled weights (pytorch_model.bin) are never read")
    return Checkpoint(directory, files, raw)


def read_json(path: Path) -> dict:
    """Raises ValueError naming the file where it is missing, unreadable, or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
               max_length: Optional[int] = None, four_bit: Optional[dict] = None) -> Decoder:
    """Decoder with the directory's weights, cast to `dtype` on the way; `max_length` as in `read_config`.

    With `four_bit`, the settings of nf4.quantize_linears, or where the files are quantized so, its linear layers are in
    4 bits. `model.layout` remembers how the files name and cut the parameters, for `save_model`. Raises ValueError
    listing every missing, unexpected and misshaped tensor with its file, before any weight is read.
    """
    checkpoint = open_checkpoint(directory)
    if four_bit is not None or checkpoint.raw_config.get("quantization_config"):
        from extras.nf4 import load_4bit

        return load_4bit(checkpoint, four_bit, dtype, device, max_length)
    try:
        config = read_config(checkpoint.raw_config, max_length)
        layout = find_places(checkpoint.files, config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory}: {error}") from None
    with torch.device("meta"):
        model = Decoder(config)
    parameters = dict(model.named_parameters())  # a tied head is listed once
    check_tensors(checkpoint, layout, parameters, config)
    model.load_state_dict(read_tensors(checkpoint, layout, parameters, dtype, device), strict=False, assign=True)
    model.tie()
    model.layout, model.raw_config = layout, checkpoint.raw_config
    model.generation_config = read_generation_config(checkpoint.directory)
    return model.requires_grad_(True)


def read_generation_config(directory: Path) -> Optional[dict]:
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else None


def file_name(name: str, config: ModelConfig) -> str:
    """Hugging Face's name of a module or parameter of ours."""
    if not config.other_names:
        return name
    from extras.layouts import other_name

    return other_name(name, config.model_type)


def find_places(names: Iterable[str], config: ModelConfig) -> dict[str, Place]:
    """{tensor name in the files: Place}. Raises ValueError for the leftovers of quantization."""
    quantized = [n for n in names if n.endswith((".SCB", ".qweight", ".weight_scale", ".weight_scale_inv", ".absmax"))]
    if quantized:
        raise ValueError(f"the checkpoint is quantized (it has {quantized[0]}); use the original one")
    names = [n for n in names if not n.endswith("rotary_emb.inv_freq")]  # old files carry this constant
    if config.other_names or any("language_model." in n for n in names):
        from extras.layouts import other_places

        places = {n: Place(*place) for n, place in other_places(names, config.model_type, config.moe).items()}
    else:
        places = {n: Place(n) for n in names}
    tied = Place("model.embed_tokens.weight")
    return {n: tied if config.tie_word_embeddings and p.name == "lm_head.weight" else p for n, p in places.items()}


def each_tensor(checkpoint: Checkpoint, layout: dict[str, Place]) -> Iterator[tuple]:
    """(name, Place, file, opened file) of every tensor that is there, in the order of the disk."""
    for file in sorted(set(checkpoint.files.values())):
        opened = open_safetensors(checkpoint.directory / file)
        for name in opened.offset_keys():
            if name in layout and checkpoint.files.get(name) == file:
                yield name, layout[name], file, opened


def check_tensors(checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict, config: ModelConfig) -> None:
    """Raise ValueError listing every missing, unexpected or misshaped tensor, from the files' headers alone."""
    problems, found, absent = [], dict.fromkeys(parameters, 0), dict(layout)
    for name, place, file, opened in each_tensor(checkpoint, layout):
        del absent[name]
        header = opened.get_slice(name)
        shape = tuple(header.get_shape())
        if place.name not in parameters:
            problems.append(f"unexpected {name} {shape} in {file}")
            continue
        expected = place.view(parameters[place.name]).shape
        found[place.name] += expected.numel()
        if shape != tuple(expected):
            problems.append(f"{name} in {file} is {shape}, config.json says {tuple(expected)}")
        elif header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} in {file} is quantized ({header.get_dtype()})")
    problems += [f"missing {name} in {checkpoint.files[name]}, where the index says it is" for name in absent]
    told = {place.name for place in absent.values()}
    problems += [f"missing {'parts of ' if found[name] else ''}{file_name(name, config)}"
                 for name, p in parameters.items() if found[name] < p.numel() and name not in told]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{checkpoint.directory}: {'; '.join(problems[:10])}{more}")


def read_tensors(checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict, dtype: torch.dtype,
                 device: str) -> dict[str, Tensor]:
    """The weights, copied out of the memory-mapped files one by one: cast on the way, no second copy of the model."""
    state = {}
    for name, place, file, opened in each_tensor(checkpoint, layout):
        twice = place.name in state and place.index == ()  # a tied head that the files hold as well
        if place.name not in state:
            state[place.name] = torch.empty(parameters[place.name].shape, dtype=dtype, device=device)
        if device == "meta":  # FSDP: the weights come from rank 0
            continue
        view, tensor = place.view(state[place.name]), opened.get_tensor(name)
        if twice and not torch.equal(view, tensor.to(view)):
            raise ValueError(f"{checkpoint.directory}: config.json ties the head to the embedding, but {name} in "
                             f"{file} differs from it")
        view.copy_(tensor)
    return state


# Files: writing


def whole(tensor: Tensor) -> Tensor:
    """Of a tensor in shards (extras/fsdp.py) all of it, where all ranks ask; another as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_model(model: Decoder, directory: str | Path, dtype: Optional[torch.dtype] = None) -> None:
    """Write the weights as they were laid out in the files read, in shards of at most 5 GB, cast to `dtype` if given.

    config.json is written with that dtype, generation_config.json where there was one. LoRA wrappers are left out:
    this is the base model (merge first to keep what was learned). What is in 4 bits is written so.
    """
    directory = Path(directory)
    if model.four_bit:
        from extras.nf4 import save_4bit

        return save_4bit(model, directory, model.four_bit.get("compute_dtype"))
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {n.replace(".base_layer.", "."): p.detach() for n, p in model.named_parameters() if "lora_" not in n}
    layout = model.layout or find_places([file_name(n, model.config) for n in parameters], model.config)
    dtype = dtype or next(iter(parameters.values())).dtype
    save_shards({theirs: place.view(parameters[place.name]) for theirs, place in layout.items()}, directory, dtype)
    key = "torch_dtype" if "torch_dtype" in model.raw_config else "dtype"
    write_json(directory / "config.json", model.raw_config | {key: str(dtype).removeprefix("torch.")})
    if model.generation_config is not None:
        write_json(directory / "generation_config.json", model.generation_config)


def save_shards(tensors: dict[str, Tensor], directory: Path, dtype: torch.dtype) -> None:
    """Write views of the parameters; one shard at a time is gathered in memory."""
    sizes, shards, size, weight_map = {n: t.numel() * dtype.itemsize for n, t in tensors.items()}, [[]], 0, {}
    for name, nbytes in sizes.items():
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards, size = shards + [[]], 0
        shards[-1].append(name)
        size += nbytes
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shard, seen = {}, set()
        for name in names:
            tensor = tensors[name].to("cpu", dtype).contiguous()
            shard[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # a tied head, written twice
            seen.add(tensor.data_ptr())
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair, as JSON escapes it


def save_adapter(model: Decoder, directory: str | Path, settings: dict) -> None:
    """Write the LoRA as a PEFT adapter; `settings` are r, lora_alpha, lora_dropout and base_model_name_or_path."""
    from extras.peft_io import save_adapter

    save_adapter(model, Path(directory), settings)


def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Fill the LoRA of `model` from a PEFT adapter of the same targets, rank and scaling; ValueError if it differs."""
    from extras.peft_io import load_adapter

    load_adapter(model, Path(directory))
