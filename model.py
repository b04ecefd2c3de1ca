"""Decoders that read a flat stream: every token of a micro-batch lies in one (T,) row, prompts once, no padding.

Embeddings, norms, projections and MLPs work on (T, C) and never hear of pairs. Attention alone knows which token
belongs where, through `spans`: rows (start, end, prefix_start, prefix_end), each a stretch of the stream that attends
fully to its prefix and causally to itself. The head scores only the positions it is asked for and never holds (T, V)
logits.

Families differ by features, not by classes: `FAMILIES` names what is unlike Llama, and the modules branch on that.
Parameters carry Hugging Face's names. Sizes: T tokens, N scored tokens, V vocabulary, C hidden, H heads, K kv heads,
D head dim.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_CHUNK = 2**24  # logits held at once: rows x vocabulary (64 MiB in float32)
SHARD_BYTES = 5 * 10**9  # a larger checkpoint is saved in several files


# Configuration: config.json -> ModelConfig


@dataclass(frozen=True)
class ModelConfig:
    """What the modules read. Fields that only some families use default to Llama's behaviour."""

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
    rope_layers: tuple[Optional[str], ...] = ()  # per layer: which of `ropes`, None for no rotation
    ropes: dict = field(default_factory=dict)  # name -> {"rope_type", "rope_theta", ...}
    rotary_dim: int = 0  # the first so many of head_dim are rotated
    norm: str = "rms"  # or "layer"
    norm_offset: bool = False  # Gemma: scale by 1 + weight
    # names of the norms before attention, after it, before the MLP, after it
    block_norms: tuple[Optional[str], ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    qk_norm: Optional[str] = None  # "head": over each head; "full": over all heads together
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False
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
    moe: Optional[dict] = None  # read by extras/moe.py


GEMMA = dict(norm_offset=True, embed_scale="sqrt", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
OLMO_NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

# What is unlike Llama in each family. A new family is usually one line here; where its parameters have other names
# than Llama's, one entry of RENAMED as well.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm="head"),
    "gemma": GEMMA,
    "gemma2": GEMMA | dict(block_norms=SANDWICH),
    "gemma3_text": GEMMA | dict(block_norms=SANDWICH, qk_norm="head"),
    "phi3": dict(fused_qkv=True, fused_gate_up=True),
    "olmo2": dict(block_norms=OLMO_NORMS, qk_norm="full"),
    "smollm3": dict(tie_word_embeddings=True),
    "granite": {},
    "gpt2": dict(norm="layer", learned_positions=True, qkv_bias=True, o_bias=True, mlp_bias=True, fused_qkv=True,
                 gated_mlp=False, hidden_act="gelu_new", tie_word_embeddings=True),
    "gpt_neox": dict(norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True, fused_qkv=True, gated_mlp=False),
    "mixtral": {},
    "qwen2_moe": dict(qkv_bias=True),
    "qwen3_moe": dict(qk_norm="head"),
    "olmoe": dict(qk_norm="full"),
}

# Keys of config.json that change nothing in the numbers of a forward pass at dropout 0.
HARMLESS = set("""
    architectures _name_or_path transformers_version torch_dtype dtype use_cache initializer_range bos_token_id
    eos_token_id pad_token_id unk_token_id model_type pretraining_tp rope_interleaved attention_dropout resid_pdrop
    embd_pdrop attn_pdrop hidden_dropout classifier_dropout summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params n_ctx output_attentions
    output_hidden_states return_dict gradient_checkpointing is_decoder is_encoder_decoder id2label label2id
    problem_type chunk_size_feed_forward cache_implementation auto_map _attn_implementation attn_implementation
    num_labels tokenizer_class finetuning_task layer_norm_eps_ embedding_dropout unsloth_version unsloth_fixed
    transformers.js_config mlp_dropout router_jitter_noise reorder_and_upcast_attn scale_attn_by_inverse_layer_idx_
    use_bidirectional_attention add_cross_attention use_sliding_window_ sliding_window_pattern_ torchscript""".split())


def read_config(raw: dict) -> ModelConfig:
    """ModelConfig from the content of config.json.

    Raises ValueError, by name, for a `model_type` not in FAMILIES and for a key that is neither read here nor known
    to be harmless and has a value that could mean something.
    """
    family = raw.get("model_type")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"the checkpoint is quantized ({method}); use the original one in bf16, fp16 or float32")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    get = ConfigReader(raw)
    config = ModelConfig(model_type=family, **(read_sizes(get) | read_features(get, family)))
    config = replace(config, **read_positions(get, config))
    get.refuse_unread()
    return config


class ConfigReader:
    """Looks keys up in config.json and remembers which were looked at."""

    def __init__(self, raw: dict):
        self.raw, self.seen = raw, set(HARMLESS)

    def __call__(self, *names, default=None):
        """The first of `names` that is present and not null."""
        self.seen.update(names)
        return next((self.raw[n] for n in names if self.raw.get(n) is not None), default)

    def need(self, *names):
        value = self(*names)
        if value is None:
            raise ValueError(f"config.json: {names[0]!r} is missing")
        return value

    def refuse_unread(self) -> None:
        odd = {k: v for k, v in self.raw.items() if k not in self.seen and v not in (None, False, 0, "", [], {})}
        if odd:
            raise ValueError(f"config.json: {', '.join(f'{k} = {v!r}' for k, v in odd.items())}: not understood for "
                             f"model_type {self.raw['model_type']!r}, and it may change the model's numbers")


def read_sizes(get: ConfigReader) -> dict:
    hidden, heads = get.need("hidden_size", "n_embd"), get.need("num_attention_heads", "n_head")
    return dict(
        vocab_size=get.need("vocab_size"), hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=get("intermediate_size", "n_inner", default=4 * hidden),
        num_hidden_layers=get.need("num_hidden_layers", "n_layer"),
        num_key_value_heads=get("num_key_value_heads", default=heads),
        head_dim=get("head_dim", default=hidden // heads),
        max_position_embeddings=get("max_position_embeddings", "n_positions", default=2048),
        norm_eps=get("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", default=1e-6))


def read_features(get: ConfigReader, family: str) -> dict:
    """FAMILIES' features, with what config.json says on top."""
    f = dict(FAMILIES[family])
    hidden, heads = get.need("hidden_size", "n_embd"), get.need("num_attention_heads", "n_head")
    f["hidden_act"] = get("hidden_activation", "hidden_act", "activation_function", default=f.get("hidden_act", "silu"))
    get("hidden_act")  # Gemma carries both names and reads hidden_activation
    f["tie_word_embeddings"] = get("tie_word_embeddings", default=f.get("tie_word_embeddings", False))
    bias = get("attention_bias", default=f.get("qkv_bias", False))
    f["qkv_bias"] = get("qkv_bias", default=bias)
    f["o_bias"] = bias if family in ("llama", "granite", "gpt_neox", "qwen3", "qwen3_moe", "gemma", "gemma2",
                                     "gemma3_text", "olmo2", "olmoe", "smollm3") else f.get("o_bias", False)
    f["mlp_bias"] = get("mlp_bias", default=f.get("mlp_bias", False))
    f["parallel_residual"] = get("use_parallel_residual", default=family == "gpt_neox")
    f["embed_scale"] = hidden**0.5 if f.get("embed_scale") == "sqrt" else get("embedding_multiplier", default=1.0)
    f["residual_scale"] = get("residual_multiplier", default=1.0)
    f["logit_scale"] = 1 / get("logits_scaling", default=1.0)
    scalar = get("query_pre_attn_scalar", default=get("head_dim", default=hidden // heads))
    f["attention_scale"] = get("attention_multiplier", default=scalar**-0.5)
    f["attn_softcap"], f["final_softcap"] = get("attn_logit_softcapping"), get("final_logit_softcapping")
    if get("scale_attn_weights", default=True) is False:
        raise ValueError("config.json: scale_attn_weights = false is not supported")
    if get("scale_attn_by_inverse_layer_idx") or get("clip_qkv"):
        raise ValueError("config.json: scale_attn_by_inverse_layer_idx and clip_qkv are not supported")
    if family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        from extras.moe import read_moe

        f["moe"] = read_moe(get, family)
    return f


def read_positions(get: ConfigReader, config: ModelConfig) -> dict:
    """Windows and rotary embeddings, per layer, from either generation of files."""
    n, family = config.num_hidden_layers, config.model_type
    sliding = sliding_layers(get, family, n)
    window = get("sliding_window")
    if config.learned_positions:
        return dict(windows=(None,) * n, rope_layers=(None,) * n)
    ropes = read_ropes(get)
    fraction = get("partial_rotary_factor", "rotary_pct",
                   default=ropes["full_attention"].get("partial_rotary_factor", 0.25 if family == "gpt_neox" else 1.0))
    kind = [("sliding_attention" if s and "sliding_attention" in ropes else "full_attention") for s in sliding]
    rotated = get("no_rope_layers", default=None)  # SmolLM3: 1 rotates, 0 does not
    interval = get("no_rope_layer_interval", default=4)
    if family == "smollm3" and rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(n)]
    rope_layers = tuple(k if rotated is None or rotated[i] else None for i, k in enumerate(kind))
    return dict(windows=tuple(window if s else None for s in sliding), ropes=ropes, rope_layers=rope_layers,
                rotary_dim=int(config.head_dim * fraction))


def sliding_layers(get: ConfigReader, family: str, n: int) -> list[bool]:
    """Which layers use the sliding window, by `layer_types` or by the family's older rule."""
    types, pattern = get("layer_types"), get("sliding_window_pattern", "_sliding_window_pattern", default=6)
    used, first = get("use_sliding_window"), get("max_window_layers", default=0)
    if types is not None:
        return [t == "sliding_attention" for t in types]
    if get("sliding_window") is None:
        return [False] * n
    if family == "gemma2":
        return [i % 2 == 0 for i in range(n)]
    if family == "gemma3_text":
        return [(i + 1) % pattern != 0 for i in range(n)]
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"):
        return [bool(used) and i >= first for i in range(n)]
    return [family in ("mistral", "mixtral", "phi3")] * n


def read_ropes(get: ConfigReader) -> dict:
    """{"full_attention": {...}, maybe "sliding_attention": {...}} from `rope_parameters` or the older keys."""
    new, old = get("rope_parameters"), get("rope_scaling")
    theta = get("rope_theta", "rotary_emb_base", default=10000.0)
    local = get("rope_local_base_freq")
    shared = {"original_max_position_embeddings": get("original_max_position_embeddings"),
              "max_position_embeddings": get("max_position_embeddings", default=2048)}
    if new and all(isinstance(v, dict) for v in new.values()):
        ropes = {k: dict(v) for k, v in new.items()}
    elif new:
        ropes = {"full_attention": dict(new)}
    else:
        ropes = {"full_attention": {**(old or {})}}
        if local is not None:
            ropes["sliding_attention"] = {"rope_theta": local}
    for rope in ropes.values():
        rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default")) or "default"
        rope.setdefault("rope_theta", theta)
        for key, value in shared.items():
            rope.setdefault(key, value)
    return ropes


# Rotary position embeddings


def inverse_frequencies(rope: dict, dim: int) -> tuple[Tensor, float]:  # (dim/2,) float32, and a factor on cos and sin
    """theta^(-2i/dim), stretched as `rope_type` says: default, linear, llama3; yarn and longrope in extras/rope.py.

    `dynamic` only acts beyond max_position_embeddings, where sequences are refused, so up to there it is `default`.
    """
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    kind = rope["rope_type"]
    if kind in ("default", "dynamic"):
        return freq, 1.0
    if kind == "linear":
        return freq / rope["factor"], 1.0
    if kind == "llama3":
        return llama3_frequencies(rope, freq), 1.0
    from extras.rope import scaled_frequencies

    return scaled_frequencies(rope, freq, dim)


def llama3_frequencies(rope: dict, freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / freq
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / rope["factor"] + smooth * freq


def rotary_tables(config: ModelConfig, position_ids: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """{rope name: (cos, sin)}, each (T, 1, rotary_dim); angles in float32, as the models were trained."""
    tables = {}
    with torch.autocast(position_ids.device.type, enabled=False):
        for name, rope in config.ropes.items():
            freq, factor = inverse_frequencies(rope, config.rotary_dim)
            angles = position_ids.float()[:, None] * freq.to(position_ids.device)  # (T, D/2)
            angles = torch.cat([angles, angles], -1)[:, None]  # (T, 1, D)
            tables[name] = ((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))
    return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (T, H, D)
    """Rotate the first `cos.shape[-1]` dims of each head: x cos + rotate_half(x) sin."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = part.chunk(2, -1)
    turned = part * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


# Attention over spans


class Call(NamedTuple):
    """One attention call: queries [start, end) of the stream on keys that lie in one or two stretches."""

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    mask: Optional[Tensor]  # (queries, keys) True where attended; None is plain causal


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
        key_count = sum(b - a for a, b in keys)
        mask = None
        if len(keys) == 2 or (window is not None and key_count > window):
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


def plan_varlen(spans: Tensor, device: torch.device) -> VarlenPlan:
    start, end, prefix_start, prefix_end = spans.long().unbind(1)
    queries, keys = end - start, end - start + prefix_end - prefix_start
    index = torch.cat([torch.cat([torch.arange(c, d), torch.arange(a, b)]) for a, b, c, d in spans.tolist()])
    cu = lambda n: F.pad(n.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    return VarlenPlan(index.to(device, non_blocking=True), cu(queries), cu(keys), int(queries.max()), int(keys.max()))


def plan_attention(config: ModelConfig, spans: Tensor, position_ids: Tensor, dtype: torch.dtype) -> dict:
    """{window: plan} for one stream; made once and used by every layer."""
    device = position_ids.device
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and config.attn_softcap is None:
        plan = plan_varlen(spans, device)
        return {window: plan for window in set(config.windows)}
    return {window: plan_calls(spans, position_ids, window) for window in set(config.windows)}


def attend(q: Tensor, k: Tensor, v: Tensor, plan, window: Optional[int], config: ModelConfig) -> Tensor:  # (T, H, D)
    """softmax(q k^T scale) v over the spans of the stream; q (T, H, D), k and v (T, K, D)."""
    if isinstance(plan, VarlenPlan):
        from torch.nn.attention.varlen import varlen_attn

        k, v = k[plan.key_index], v[plan.key_index]
        left = -1 if window is None else window - 1
        return varlen_attn(q, k, v, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
                           scale=config.attention_scale, window_size=(left, 0), enable_gqa=True)
    gather = lambda x, call: torch.cat([x[a:b] for a, b in call.keys]) if len(call.keys) > 1 else x[slice(*call.keys[0])]
    core = softcapped_attention if config.attn_softcap else fused_attention
    return torch.cat([core(q[c.start : c.end], gather(k, c), gather(v, c), c.mask, config) for c in plan])


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], config: ModelConfig) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, n, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                         scale=config.attention_scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], config: ModelConfig) -> Tensor:
    """Gemma 2: scores are cap * tanh(scores / cap), which no fused kernel does; written out, 512 queries at a time."""
    cap, group = config.attn_softcap, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # (H, keys, D)
    if mask is None:
        mask = torch.ones(len(q), k.shape[1], dtype=torch.bool, device=q.device).tril()
    out = []
    for rows, allowed in zip(q.split(512), mask.split(512)):
        scores = rows.transpose(0, 1) @ k.transpose(1, 2) * config.attention_scale  # (H, rows, keys)
        scores = (cap * torch.tanh(scores / cap)).masked_fill(~allowed, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out.append((scores.softmax(-1, dtype=wide).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(out)


# Modules, leaf to root


class Norm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * w (Gemma: 1 + w), or LayerNorm; statistics in float32 at least."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.eps, self.offset, self.layer = config.norm_eps, config.norm_offset, config.norm == "layer"
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if self.layer else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = 1 + self.weight if self.offset else self.weight
        return F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), self.eps).to(x.dtype)


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
            per_head = config.qk_norm == "head"
            self.q_norm = Norm(D if per_head else H * D, config)
            self.k_norm = Norm(D if per_head else K * D, config)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        H, K, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        if self.config.fused_qkv:
            q, k, v = self.qkv_proj(x).split([H * D, K * D, K * D], -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(-1, H, D), k.view(-1, K, D), v.view(-1, K, D)
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = (rotate(part, *tables[self.rope]).to(v.dtype) for part in (q, k))
        out = attend(q.to(v.dtype), k.to(v.dtype), v, plans[self.window], self.window, self.config)
        return self.o_proj(out.reshape(-1, H * D))


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    def __init__(self, config: ModelConfig, intermediate_size: Optional[int] = None):
        super().__init__()
        C, size = config.hidden_size, intermediate_size or config.intermediate_size
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"config.json: hidden_act = {config.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
        self.act, self.gated, self.fused = ACTIVATIONS[config.hidden_act], config.gated_mlp, config.fused_gate_up
        if self.fused:
            self.gate_up_proj = nn.Linear(C, 2 * size, bias=config.mlp_bias)
        else:
            if self.gated:
                self.gate_proj = nn.Linear(C, size, bias=config.mlp_bias)
            self.up_proj = nn.Linear(C, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, C, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (T, C)
        if not self.gated:
            return self.down_proj(self.act(self.up_proj(x)))
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act(gate) * up)


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

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        scale = self.config.residual_scale
        attended = self.norm(1, self.self_attn(self.norm(0, x), tables, plans)) * scale
        if self.config.parallel_residual:
            return x + attended + self.mlp(self.norm(2, x))
        x = x + attended
        return x + self.norm(3, self.mlp(self.norm(2, x))) * scale


def make_mlp(config: ModelConfig, layer: int) -> nn.Module:
    if config.moe is None:
        return MLP(config)
    from extras.moe import make_experts

    return make_experts(config, layer, MLP)


class Stack(nn.Module):
    """Embedding, blocks, last norm: stream in, hidden states out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config)

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor) -> Tensor:  # (T, C)
        x = self.embed_tokens(input_ids) * self.config.embed_scale
        if self.config.learned_positions:
            x = x + self.embed_positions(position_ids)
        tables = rotary_tables(self.config, position_ids, x.dtype)
        compute = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        plans = plan_attention(self.config, spans, position_ids, compute)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, tables, plans, use_reentrant=False)
            else:
                x = layer(x, tables, plans)
        return self.norm(x)


class TokenLogps(NamedTuple):
    """Of each scored token; all (N,), in nats, float32 or wider. Only `logps` carries gradients."""

    logps: Tensor
    entropy: Tensor  # of the predicted distribution
    log_sum_sq_probs: Tensor  # log sum_v p_v^2, which WPO needs
    mean_logits: Tensor  # over the vocabulary
    is_top1: Tensor  # bool: the target is the likeliest token


class Decoder(nn.Module):
    """A causal language model on a flat stream, with its head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor, score_index: Tensor,
                targets: Tensor) -> TokenLogps:
        """Log-probs of `targets` (N,) at the hidden states `score_index` (N,) of the stream `input_ids` (T,)."""
        hidden = self.model(input_ids, position_ids, spans)[score_index]  # (N, C)
        return token_logps(self.head_terms(hidden), targets, self.config.final_softcap)

    def head_terms(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[(input, weight)] with logits = sum of input @ weight^T; a LoRA on the head is a second term."""
        hidden = hidden * self.config.logit_scale
        if isinstance(self.lm_head, LoraLinear):
            return self.lm_head.terms(hidden)
        return [(hidden, self.lm_head.weight)]

    def logits(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor) -> Tensor:  # (T, V)
        """Every logit, for generation and tests; training never builds them."""
        hidden = self.model(input_ids, position_ids, spans)
        logits = sum(F.linear(x, w) for x, w in self.head_terms(hidden))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


# The head, in chunks


def token_logps(terms: list[tuple[Tensor, Tensor]], targets: Tensor, softcap: Optional[float] = None) -> TokenLogps:
    """log softmax(sum_k x_k w_k^T) at `targets` (N,), x_k (N, C_k), w_k (V, C_k), in chunks of N.

    The matrix products run in the autocast type where there is one, everything after them in float32 or wider.
    """
    device = targets.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        terms = [(x.to(dtype), w.to(dtype)) for x, w in terms]
    with torch.autocast(device, enabled=False):
        return TokenLogps(*ChunkedLogps.apply(targets, softcap, *(t for term in terms for t in term)))


class ChunkedLogps(torch.autograd.Function):
    """(N, V) logits exist one chunk at a time: scored and dropped in forward, made again in backward.

    d logp / d logits = onehot(target) - softmax(logits), so backward needs the logits and nothing else.
    """

    @staticmethod
    def forward(ctx, targets: Tensor, softcap: Optional[float], *tensors: Tensor):
        ctx.save_for_backward(targets, *tensors)
        ctx.softcap = softcap
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        out = [score_chunk(chunk_logits(tensors, rows, softcap).to(wide), targets[rows])
               for rows in chunks(len(targets), tensors[1].shape[0])]
        out = [torch.cat(column) for column in zip(*out)] or [targets.new_zeros(0, dtype=wide)] * 5
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        targets, *tensors = ctx.saved_tensors
        grads = [torch.zeros_like(t) if needed else None for t, needed in zip(tensors, ctx.needs_input_grad[2:])]
        for rows in chunks(len(targets), tensors[1].shape[0]):
            logits = chunk_logits(tensors, rows, ctx.softcap)
            d = grad_logits(logits, targets[rows], grad[rows], ctx.softcap).to(tensors[0].dtype)  # (n, V)
            for k in range(0, len(tensors), 2):
                x, w = tensors[k][rows], tensors[k + 1]
                if grads[k] is not None:
                    grads[k][rows] = d @ w
                if grads[k + 1] is not None:
                    grads[k + 1].addmm_(d.T, x)
        return None, None, *grads


def chunks(count: int, vocab_size: int) -> Iterator[slice]:
    size = max(16, HEAD_CHUNK // vocab_size)
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def chunk_logits(tensors, rows: slice, softcap: Optional[float]) -> Tensor:  # (n, V)
    logits = tensors[0][rows] @ tensors[1].T
    for k in range(2, len(tensors), 2):
        logits.addmm_(tensors[k][rows], tensors[k + 1].T)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def score_chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # five (n,)
    """TokenLogps of one chunk in few passes over it; overwrites `logits`."""
    mean = logits.mean(-1)
    top = logits.amax(-1)
    at_target = logits.gather(-1, targets[:, None]).squeeze(-1)
    logits -= top[:, None]  # z, at most 0
    e = logits.exp()
    total = e.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(e, logits) / total  # log sum e^z - sum p z
    log_sum_sq = torch.linalg.vecdot(e, e).log() - 2 * total.log()
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

    A is drawn as PEFT draws it, uniform on +-1/sqrt(in); B is zero, so training starts at the base model.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if not self.enabled:
            return out
        return out + self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scaling

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As the head's terms: W + BA is never built."""
        base = [(x, self.base_layer.weight)]
        if not self.enabled:
            return base
        return base + [(self.lora_A(self.dropout(x)) * self.scaling, self.lora_B.weight)]

    def delta(self) -> Tensor:
        """scaling * B A, what merging adds to the weight."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)


class LoraEmbedding(nn.Module):
    """base(ids) + scaling * (A[:, ids])^T B^T, with PEFT's parameter names; A starts at zero, B is normal."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / rank, True
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        out = self.base_layer(ids)
        if not self.enabled:
            return out
        return out + F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T * self.scaling

    def delta(self) -> Tensor:
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def add_lora(model: Decoder, rank: int, alpha: float, dropout: float, targets: list[str]) -> list[str]:
    """Freeze `model` and wrap its target modules; returns the names of the wrapped modules.

    `targets` are last parts of module names (`q_proj`, `lm_head`, `embed_tokens`) or `all-linear`, which is every
    linear layer but the head. Raises ValueError for a target that matches nothing.
    """
    model.requires_grad_(False)
    kinds = (nn.Linear, nn.Embedding)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    wanted = lambda n, t: n.endswith("." + t) or n == t or (t == "all-linear" and n != "lm_head"
                                                            and isinstance(model.get_submodule(n), nn.Linear))
    for target in targets:
        if not any(wanted(n, target) for n in names):
            known = sorted({n.rsplit(".", 1)[-1] for n in names})
            raise ValueError(f"--lora_target_modules {target}: no such module; this model has {' '.join(known)}")
    chosen = [n for n in names if any(wanted(n, t) for t in targets)]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        wrapped = (LoraEmbedding(base, rank, alpha) if isinstance(base, nn.Embedding)
                   else LoraLinear(base, rank, alpha, dropout))
        setattr(model.get_submodule(parent), child, wrapped)
    return chosen


def lora_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (LoraLinear, LoraEmbedding))}


@contextmanager
def adapters_disabled(model: nn.Module):
    """Within, `model` is its base: the reference of a LoRA run."""
    modules = list(lora_modules(model).values())
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


# Files


class Checkpoint(NamedTuple):
    """A directory of safetensors, opened: where each tensor lies, and how its names map to ours."""

    directory: Path
    files: dict[str, str]  # tensor name in the file -> file name
    raw_config: dict


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Find the weight files of a Hugging Face directory. Raises ValueError naming what is missing or unreadable."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    raw = read_json(directory / "config.json")
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index}: no \"weight_map\" in it")
        missing = sorted({f for f in files.values() if not (directory / f).exists()})
        if missing:
            raise ValueError(f"{index}: names {', '.join(missing)}, which the directory lacks; download it again")
    elif single.exists():
        files = {name: single.name for name in open_safetensors(single).keys()}
    else:
        raise ValueError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    return Checkpoint(directory, files, raw)


def read_json(path: Path) -> dict:
    """Raises ValueError naming the file where it is missing, unreadable, or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """Decoder with the directory's weights, cast to `dtype` on the way; `model.layout` remembers the files' names.

    Raises ValueError listing every missing, unexpected and misshaped tensor with its file.
    """
    checkpoint = open_checkpoint(directory)
    try:
        config = read_config(checkpoint.raw_config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory}: {error}") from None
    with torch.device("meta"):
        model = Decoder(config)
    expected = {name: p for name, p in model.named_parameters()}  # a tied head is listed once
    state, layout, problems = {}, {}, []
    for file in sorted(set(checkpoint.files.values())):
        opened = open_safetensors(checkpoint.directory / file)
        present = set(opened.keys())
        for name in sorted(n for n, f in checkpoint.files.items() if f == file):
            if name not in present:
                problems.append(f"missing {name} in {file}, where the index says it is")
                continue
            ours = our_name(name, config)
            if ours is None:  # a buffer that older files carry
                continue
            if ours == "lm_head.weight" and config.tie_word_embeddings:
                layout[ours] = name
                continue
            tensor = from_file(ours, opened.get_tensor(name), config)
            if ours not in expected:
                problems.append(f"unexpected {name} {tuple(tensor.shape)} in {file}")
            elif tensor.shape != expected[ours].shape:
                problems.append(f"{name} in {file} is {tuple(tensor.shape)}, config.json says {tuple(expected[ours].shape)}")
            else:
                layout[ours] = name
                state[ours] = tensor.to(device=device, dtype=dtype)
    problems += [f"missing {name}" for name in expected if name not in state and not any(name in p for p in problems)]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"{checkpoint.directory}: {shown}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    model.layout, model.raw_config = layout, checkpoint.raw_config
    return model.requires_grad_(True)


# Where a family's files name a parameter otherwise than Llama's: {ours: theirs}, layer numbers as "*".
GPT2_NAMES = {
    "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe", "model.norm": "transformer.ln_f",
    "model.layers.*.input_layernorm": "transformer.h.*.ln_1", "model.layers.*.self_attn.qkv_proj": "transformer.h.*.attn.c_attn",
    "model.layers.*.self_attn.o_proj": "transformer.h.*.attn.c_proj", "model.layers.*.post_attention_layernorm": "transformer.h.*.ln_2",
    "model.layers.*.mlp.up_proj": "transformer.h.*.mlp.c_fc", "model.layers.*.mlp.down_proj": "transformer.h.*.mlp.c_proj"}
NEOX_NAMES = {
    "model.embed_tokens": "gpt_neox.embed_in", "model.norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
    "model.layers.*.input_layernorm": "gpt_neox.layers.*.input_layernorm",
    "model.layers.*.post_attention_layernorm": "gpt_neox.layers.*.post_attention_layernorm",
    "model.layers.*.self_attn.qkv_proj": "gpt_neox.layers.*.attention.query_key_value",
    "model.layers.*.self_attn.o_proj": "gpt_neox.layers.*.attention.dense",
    "model.layers.*.mlp.up_proj": "gpt_neox.layers.*.mlp.dense_h_to_4h",
    "model.layers.*.mlp.down_proj": "gpt_neox.layers.*.mlp.dense_4h_to_h"}
RENAMED = {"gpt2": GPT2_NAMES, "gpt_neox": NEOX_NAMES}
OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")


def our_name(name: str, config: ModelConfig) -> Optional[str]:
    """The parameter a tensor of the files is, or None for a buffer that carries nothing."""
    if OLD_BUFFERS.search(name):
        return None
    if config.model_type == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        name = "transformer." + name
    stem, _, last = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", stem)
    generic = re.sub(r"\.\d+\.", ".*.", stem, count=1)
    ours = {theirs: ours for ours, theirs in RENAMED.get(config.model_type, {}).items()}.get(generic, generic)
    return (ours.replace("*", number.group(1)) if number else ours) + "." + last


def from_file(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Undo the two layouts that differ: GPT-2 keeps (in, out), GPT-NeoX interleaves q, k, v by head."""
    if config.model_type == "gpt2" and tensor.dim() == 2 and "embed" not in name and name != "lm_head.weight":
        return tensor.T.contiguous()
    if config.model_type == "gpt_neox" and "qkv_proj" in name:
        by_head = tensor.unflatten(0, (config.num_attention_heads, 3, config.head_dim))
        return by_head.transpose(0, 1).reshape(tensor.shape)
    return tensor


def to_file(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `from_file`."""
    if config.model_type == "gpt_neox" and "qkv_proj" in name:
        by_kind = tensor.unflatten(0, (3, config.num_attention_heads, config.head_dim))
        return by_kind.transpose(0, 1).reshape(tensor.shape)
    return from_file(name, tensor, config)


def save_model(model: Decoder, directory: str | Path) -> None:
    """Write the weights under the names they were read by, in files of at most 5 GB, and config.json with its dtype.

    LoRA wrappers are left out: this is the base model (merge first to keep what was learned).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = {n: n.replace(".base_layer.", ".") for n, _ in model.named_parameters() if "lora_" not in n}
    state = {model.layout.get(ours, ours): to_file(ours, model.get_parameter(n).detach(), model.config).cpu().contiguous()
             for n, ours in names.items()}
    if model.layout.get("lm_head.weight") and model.config.tie_word_embeddings:  # the files had the tied head too
        state[model.layout["lm_head.weight"]] = model.lm_head.weight.detach().cpu().clone()
    save_shards(state, directory)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in model.raw_config else "dtype"
    write_json(directory / "config.json", model.raw_config | {key: dtype})


def save_shards(state: dict[str, Tensor], directory: Path) -> None:
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards, size = shards + [{}], 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in shard}
    total = sum(t.nbytes for t in state.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_adapter(model: Decoder, directory: str | Path, settings: dict) -> None:
    """Write the LoRA as a PEFT adapter: adapter_model.safetensors and adapter_config.json.

    `settings` are r, lora_alpha, lora_dropout, target_modules and base_model_name_or_path.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{n}": p.detach().cpu().contiguous() for n, p in model.named_parameters() if "lora_" in n}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, **settings})


def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Fill the LoRA parameters of `model` from a PEFT adapter of the same targets and rank; ValueError if it differs."""
    path = Path(directory) / "adapter_model.safetensors"
    opened = open_safetensors(path)
    theirs = {n.removeprefix("base_model.model."): n for n in opened.keys()}
    ours = {n: p for n, p in model.named_parameters() if "lora_" in n}
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise ValueError(f"{path}: its tensors are not those of this LoRA; first difference: {odd[0]}")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(opened.get_tensor(theirs[name]))
