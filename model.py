"""Decoders that read a flat stream: every token of a micro-batch lies in one (T,) row, prompts once, no padding.

Embeddings, norms, projections and MLPs work on (T, C) and never hear of pairs. Attention alone knows which token
belongs where, through `spans`: rows (start, end, prefix_start, prefix_end), each a stretch of the stream that attends
fully to its prefix and causally to itself. The head scores only the positions it is asked for and never holds (T, V)
logits.

Families differ by features, not by classes: `FAMILIES` names what is unlike Llama, and the modules branch on that.
Parameters carry Hugging Face's names. What few readers need is imported where it is used: experts (extras/moe.py),
YaRN and LongRoPE (extras/rope.py), files laid out otherwise (extras/layouts.py).

Sizes: T tokens, N scored tokens, S spans, V vocabulary, C hidden, H heads, K kv heads, D head dim.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Optional

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_CHUNK = 2**24  # logits held at once: rows x vocabulary (64 MiB in float32)
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
    moe: Optional[dict] = None  # made and read by extras/moe.py
    other_names: bool = False  # its files name or lay out parameters otherwise: extras/layouts.py


REQUIRED = object()
# Keys of config.json that every family reads, with what a file without them means.
COMMON = dict(
    vocab_size=REQUIRED, hidden_size=REQUIRED, intermediate_size=REQUIRED, num_hidden_layers=REQUIRED,
    num_attention_heads=REQUIRED, max_position_embeddings=REQUIRED, rms_norm_eps=REQUIRED, num_key_value_heads=None,
    head_dim=None, hidden_act="silu", tie_word_embeddings=False, rope_theta=10000.0, rope_scaling=None,
    rope_parameters=None, partial_rotary_factor=1.0, original_max_position_embeddings=None)
BIAS = dict(attention_bias=False)
WINDOW = dict(use_sliding_window=False, sliding_window=4096, layer_types=None)
GEMMA = dict(norm_offset=True, scaled_embeddings=True)
GEMMA_KEYS = BIAS | dict(head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation=None, tie_word_embeddings=True)
GEMMA2_KEYS = GEMMA_KEYS | dict(query_pre_attn_scalar=256, sliding_window=4096, layer_types=None)
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
MOE = dict(num_experts=None, num_local_experts=None, num_experts_per_tok=REQUIRED, output_router_logits=False,
           router_aux_loss_coef=0.001)
QWEN_MOE = MOE | WINDOW | dict(moe_intermediate_size=REQUIRED, norm_topk_prob=False, decoder_sparse_step=1,
                               mlp_only_layers=None)

# What is unlike Llama in each family: features of ModelConfig, `keys` of config.json that it reads besides COMMON (with
# their defaults), and `slides`, which layers have the window where the file has no `layer_types`. A new family is
# usually one line here; where its files name parameters otherwise than Llama's, also an entry in extras/layouts.py.
FAMILIES = {
    "llama": dict(keys=BIAS | dict(mlp_bias=False)),
    "mistral": dict(keys=dict(sliding_window=4096), slides=lambda i, c: True),
    "qwen2": dict(qkv_bias=True, keys=WINDOW | dict(max_window_layers=28), slides=lambda i, c: i >= c["max_window_layers"]),
    "qwen3": dict(qk_norm="head", keys=BIAS | WINDOW | dict(head_dim=128, max_window_layers=28),
                  slides=lambda i, c: i >= c["max_window_layers"]),
    "gemma": GEMMA | dict(keys=GEMMA_KEYS),
    "gemma2": GEMMA | dict(block_norms=SANDWICH, slides=lambda i, c: i % 2 == 0, keys=GEMMA2_KEYS | dict(
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
    "gemma3_text": GEMMA | dict(
        block_norms=SANDWICH, qk_norm="head", slides=lambda i, c: (i + 1) % c["sliding_window_pattern"] != 0,
        keys=GEMMA2_KEYS | dict(rope_theta=1e6, rope_local_base_freq=10000.0, sliding_window_pattern=6,
                                attn_logit_softcapping=None, final_logit_softcapping=None)),
    "phi3": dict(fused_qkv="blocks", fused_gate_up=True, keys=dict(sliding_window=None), slides=lambda i, c: True),
    "olmo2": dict(block_norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), qk_norm="full",
                  keys=BIAS),
    "smollm3": dict(keys=BIAS | WINDOW | dict(mlp_bias=False, tie_word_embeddings=True, rope_theta=2e6,
                                              no_rope_layers=None, no_rope_layer_interval=4),
                    slides=lambda i, c: not turns(i, c)),
    "granite": dict(keys=BIAS | dict(mlp_bias=False, embedding_multiplier=1.0, attention_multiplier=1.0,
                                     residual_multiplier=1.0, logits_scaling=1.0)),
    "gpt2": dict(norm="layer", learned_positions=True, qkv_bias=True, o_bias=True, mlp_bias=True, fused_qkv="blocks",
                 gated_mlp=False, other_names=True, keys=dict(hidden_act="gelu_new", tie_word_embeddings=True)),
    "gpt_neox": dict(norm="layer", mlp_bias=True, fused_qkv="heads", gated_mlp=False, other_names=True, keys=dict(
        attention_bias=True, hidden_act="gelu", use_parallel_residual=True, partial_rotary_factor=0.25)),
    "mixtral": dict(other_names=True, slides=lambda i, c: True, keys=MOE | dict(rope_theta=1e6, sliding_window=None)),
    "qwen2_moe": dict(other_names=True, slides=lambda i, c: i % 2 == 0 and i < c["max_window_layers"], keys=QWEN_MOE | dict(
        qkv_bias=True, max_window_layers=28, shared_expert_intermediate_size=REQUIRED)),
    "qwen3_moe": dict(qk_norm="head", other_names=True, slides=lambda i, c: True, keys=QWEN_MOE | BIAS | dict(layer_types=None)),
    "olmoe": dict(qk_norm="full", other_names=True, keys=MOE | BIAS | dict(norm_topk_prob=False, router_aux_loss_coef=0.01)),
}

# Keys that change nothing in a forward pass without dropout.
HARMLESS = set("""
    architectures model_type auto_map dtype torch_dtype transformers_version _name_or_path tokenizer_class
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id forced_eos_token_id
    initializer_range use_cache pretraining_tp gradient_checkpointing is_decoder torchscript cache_implementation
    attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop embedding_dropout mlp_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    n_ctx max_sequence_length max_window_layers sliding_window_size _sliding_window_pattern reorder_and_upcast_attn
    full_attn_mod interpolate_factor _attn_implementation _attn_implementation_autoset attn_implementation
    output_attentions output_hidden_states return_dict use_return_dict id2label label2id num_labels problem_type
    finetuning_task chunk_size_feed_forward prefix max_length min_length do_sample temperature top_k top_p typical_p
    num_beams num_beam_groups num_return_sequences repetition_penalty length_penalty diversity_penalty
    unsloth_version unsloth_fixed transformers.js_config""".split())


def read_config(raw: dict, max_length: Optional[int] = None) -> ModelConfig:
    """ModelConfig from the content of config.json.

    `max_length` is the longest sequence of the run in tokens, None for "no longer than the model was made for". Phi-3's
    LongRoPE has other frequencies beyond its pretraining length; they are chosen once per run by `max_length`, where
    transformers chooses per batch, so that a pair's log-probs never depend on what it is batched with.
    Raises ValueError, by name, for what is not supported: other model types, quantized and encoder-decoder models, and
    keys that are neither read nor known to be harmless and have a value that could mean something.
    """
    refuse_foreign(raw)
    features = dict(FAMILIES[raw["model_type"]])
    c = read_keys(raw, features.pop("keys"))
    computed = read_sizes(c) | read_layers(c, features.pop("slides", None), "learned_positions" in features, max_length)
    computed |= read_features(c, raw["model_type"], features.pop("scaled_embeddings", False))
    if "num_experts_per_tok" in c:
        from extras.moe import read_moe

        computed["moe"] = read_moe(c)
    return ModelConfig(model_type=raw["model_type"], **(computed | features))


def refuse_foreign(raw: dict) -> None:
    """Raise ValueError for what is no decoder of FAMILIES in plain numbers."""
    family, quantized = raw.get("model_type"), raw.get("quantization_config")
    if quantized:
        raise ValueError(f"the checkpoint is quantized ({quantized.get('quant_method', 'method unknown')}); "
                         "use the original one in bf16, fp16 or float32")
    if raw.get("is_encoder_decoder"):
        raise ValueError(f"{family!r} is an encoder-decoder model; only decoders are supported")
    if raw.get("kv_lora_rank"):
        raise ValueError(f"{family!r} has multi-head latent attention (kv_lora_rank), which is not supported")
    remote = raw.get("auto_map", {}).get("AutoModelForCausalLM", "").rpartition(".")[2].lower()
    if family not in FAMILIES and remote:
        raise ValueError(f"model_type {family!r} needs remote code (auto_map), which is never run")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if not remote.startswith(family.removesuffix("_text").replace("_", "") if remote else ""):
        raise ValueError(f"auto_map names remote code of its own ({remote}) for model_type {family!r}; it is never run")


def read_keys(raw: dict, keys: dict) -> dict:
    """The keys that a family reads: its defaults, and what the file says over them (null is a value)."""
    if raw["model_type"] in ("gpt2", "gpt_neox"):
        from extras.layouts import llama_keys

        raw = llama_keys(raw)
    known = COMMON | keys
    odd = {k: v for k, v in raw.items()
           if k not in known and k not in HARMLESS and v not in (None, False, 0, "", [], {})}
    if odd:
        raise ValueError(f"config.json: {', '.join(f'{k} = {v!r}' for k, v in odd.items())}: not understood for "
                         f"model_type {raw['model_type']!r}, and it may change the model's numbers")
    c = known | {k: raw[k] for k in known if k in raw}
    missing = [k for k, v in c.items() if v is REQUIRED or known[k] is REQUIRED and v is None]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)}: missing")
    return c


def read_sizes(c: dict) -> dict:
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings")
    return {k: c[k] for k in same} | dict(
        num_key_value_heads=c["num_key_value_heads"] or c["num_attention_heads"], head_dim=head_dim(c),
        norm_eps=c["rms_norm_eps"], tie_word_embeddings=bool(c["tie_word_embeddings"]))


def head_dim(c: dict) -> int:
    return c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]


def read_features(c: dict, family: str, scaled_embeddings: bool) -> dict:
    """Biases, scales and soft-caps; a key that the family does not read is not in `c`."""
    act = c.get("hidden_activation") or c["hidden_act"]
    if family == "gemma" and act == "gelu":
        act = "gelu_pytorch_tanh"  # Gemma 1 was released with the wrong name in its files; transformers corrects it too
    if act not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act = {act!r}; known are {', '.join(ACTIVATIONS)}")
    bias = bool(c.get("attention_bias"))
    return dict(
        hidden_act=act, qkv_bias=bool(c.get("qkv_bias", bias)), o_bias=bias, mlp_bias=bool(c.get("mlp_bias")),
        parallel_residual=bool(c.get("use_parallel_residual")),
        embed_scale=c["hidden_size"] ** 0.5 if scaled_embeddings else c.get("embedding_multiplier", 1.0),
        residual_scale=c.get("residual_multiplier", 1.0), logit_scale=1 / c.get("logits_scaling", 1.0),
        attention_scale=c.get("attention_multiplier", c.get("query_pre_attn_scalar", head_dim(c)) ** -0.5),
        attn_softcap=c.get("attn_logit_softcapping"), final_softcap=c.get("final_logit_softcapping"))


def read_layers(c: dict, slides, learned_positions: bool, max_length: Optional[int]) -> dict:
    """Window and rotation of each layer."""
    n, window, types = c["num_hidden_layers"], c.get("sliding_window"), c.get("layer_types")
    if not window or c.get("use_sliding_window") is False:
        windows = (None,) * n
    elif types:
        windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    else:
        windows = tuple(window if slides(i, c) else None for i in range(n))
    ropes = {} if learned_positions else read_ropes(c, max_length)
    kinds = ["sliding_attention" if w and "sliding_attention" in ropes else "full_attention" for w in windows]
    return dict(windows=windows, ropes=ropes,
                rope_layers=tuple(kind if ropes and turns(i, c) else None for i, kind in enumerate(kinds)))


def turns(i: int, c: dict) -> bool:
    """Whether layer i has rotary embeddings; in SmolLM3 every fourth has none."""
    if c.get("no_rope_layers"):
        return bool(c["no_rope_layers"][i])
    return "no_rope_layers" not in c or (i + 1) % c["no_rope_layer_interval"] != 0


def check_length(config: ModelConfig, length: int) -> None:
    """Raise ValueError where sequences of `length` tokens are beyond what the configuration can represent."""
    limits = [rope.limit for rope in config.ropes.values() if rope.limit]
    limits += [config.max_position_embeddings] if config.learned_positions else []
    if limits and length > min(limits):
        why = "learned positions" if config.learned_positions else "rotary frequencies that hold"
        raise ValueError(f"sequences of {length} tokens: this model has {why} for {min(limits)}; lower --max_length")


# Rotary position embeddings

# rope_type -> the keys it reads besides rope_theta, partial_rotary_factor and original_max_position_embeddings
ROPE_KEYS = {
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
    return {name: read_rope(dict(rope), c, max_length) for name, rope in ropes.items()}


def read_rope(rope: dict, c: dict, max_length: Optional[int]) -> Rope:
    older, newer = rope.pop("type", None), rope.pop("rope_type", None)
    kind = "longrope" if "long_factor" in rope else newer or older or "default"  # Phi-3 called it "su" and "yarn"
    common = {k: c[k] for k in ("rope_theta", "partial_rotary_factor", "max_position_embeddings")}
    odd = [k for k, v in rope.items() if v is not None and k not in (*common, "original_max_position_embeddings",
                                                                    *ROPE_KEYS.get(kind, ()))]
    if kind not in ROPE_KEYS or odd:
        raise ValueError(f"config.json: rope_type {kind!r}{' with ' if odd else ''}{', '.join(odd)} is not supported; "
                         f"supported are {', '.join(ROPE_KEYS)}")
    rope = common | {k: v for k, v in rope.items() if v is not None}
    original = c["original_max_position_embeddings"] or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = original or c["max_position_embeddings"]
    try:
        return make_rope(kind, rope, int(head_dim(c) * rope["partial_rotary_factor"]), max_length)
    except KeyError as error:
        raise ValueError(f"config.json: rope_type {kind!r} needs {error}") from None


def make_rope(kind: str, rope: dict, dim: int, max_length: Optional[int]) -> Rope:
    """theta^(-2i/dim), stretched as `kind` says; float32, as the models were trained.

    `dynamic` only acts beyond max_position_embeddings and depends on the length there, so it is `default` with a limit.
    """
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)  # (dim/2,)
    if kind in ("yarn", "longrope"):
        from extras.rope import scaled_rope

        return Rope(*scaled_rope(kind, rope, freq, dim, max_length))
    if kind == "linear":
        freq = freq / rope["factor"]
    if kind == "llama3":
        freq = llama3_frequencies(rope, freq)
    return Rope(tuple(freq.tolist()), limit=rope["max_position_embeddings"] if kind == "dynamic" else None)


def llama3_frequencies(rope: dict, freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / freq
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / rope["factor"] + smooth * freq


def rotary_tables(ropes: dict[str, Rope], position_ids: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (cos, sin)}, each (T, 1, rotated dims); angles in float32, as the models were trained."""
    tables = {}
    with torch.autocast(position_ids.device.type, enabled=False):
        for name, rope in ropes.items():
            freq = torch.tensor(rope.frequencies, dtype=torch.float32, device=position_ids.device)
            angles = position_ids.float()[:, None] * freq  # (T, D/2)
            angles = torch.cat([angles, angles], -1)[:, None]  # (T, 1, D)
            tables[name] = ((angles.cos() * rope.factor).to(dtype), (angles.sin() * rope.factor).to(dtype))
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
        out = attend(q.to(v.dtype), k.to(v.dtype), v, plans[self.window], self.window, self.config)
        return self.o_proj(out.flatten(1))


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
        return self.down_proj(self.act(gate) * up)


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
        attended = x + self.norm(1, self.self_attn(self.norm(0, x), tables, plans)) * scale
        out = self.mlp(self.norm(2, x if self.config.parallel_residual else attended))
        out, router_logits = out if isinstance(out, tuple) else (out, None)
        return attended + self.norm(3, out) * scale, router_logits


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

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # (T, C)
        x, scale = self.embed_tokens(input_ids), self.config.embed_scale
        if scale != 1:
            x = x * torch.tensor(scale, dtype=x.dtype).item()  # rounded to the type, as Gemma was trained
        return x + self.embed_positions(position_ids) if self.config.learned_positions else x

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (T, C), and the router's logits (T, experts) of each sparse layer."""
        x, routed = self.embed(input_ids, position_ids), []
        tables = rotary_tables(self.config.ropes, position_ids, x.dtype)
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        plans = plan_attention(self.config, spans, position_ids, compute)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, router_logits = checkpoint(layer, x, tables, plans, use_reentrant=False)
            else:
                x, router_logits = layer(x, tables, plans)
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

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor, score_index: Tensor,
                targets: Tensor) -> TokenLogps:
        """Log-probs of `targets` (N,) at the hidden states `score_index` (N,) of the stream `input_ids` (T,)."""
        hidden, routed = self.model(input_ids, position_ids, spans)
        out = token_logps(self.head_terms(hidden[score_index]), targets, self.config.final_softcap)
        if self.config.moe is None:
            return out
        from extras.moe import load_balancing_loss

        return out._replace(aux_loss=load_balancing_loss(routed, spans, self.config.moe["per_token"]))

    def head_terms(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[(input, weight)] with logits = sum of input @ weight^T; a LoRA on the head is a second term."""
        hidden = hidden * self.config.logit_scale
        if isinstance(self.lm_head, LoraLinear):
            return self.lm_head.terms(hidden)
        return [(hidden, self.lm_head.weight)]

    def logits(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor) -> Tensor:  # (T, V)
        """Every logit, for generation and tests; training never builds them."""
        hidden, _ = self.model(input_ids, position_ids, spans)
        logits = sum(F.linear(x, w) for x, w in self.head_terms(hidden))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


# The head, in chunks


def token_logps(terms: list[tuple[Tensor, Tensor]], targets: Tensor, softcap: Optional[float] = None) -> TokenLogps:
    """log softmax(sum_k x_k w_k^T) at `targets` (N,), x_k (N, C_k), w_k (V, C_k), in chunks of N.

    The matrix products run in the autocast type where there is one, everything after them in float32 or wider.
    """
    device, compute = targets.device.type, terms[0][0].dtype
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return TokenLogps(*ChunkedLogps.apply(targets, softcap, compute, *(t for term in terms for t in term)))


class ChunkedLogps(torch.autograd.Function):
    """(N, V) logits exist one chunk at a time: scored and dropped in forward, made again in backward.

    d logp / d logits = onehot(target) - softmax(logits), so backward needs the logits and nothing else. Weight
    gradients are summed over the chunks in float32 at least, so that the chunk size does not show in bf16.
    """

    @staticmethod
    def forward(ctx, targets: Tensor, softcap: Optional[float], compute: torch.dtype, *tensors: Tensor):
        ctx.save_for_backward(targets, *tensors)
        ctx.softcap, ctx.compute = softcap, compute
        wide = torch.promote_types(compute, torch.float32)
        terms = cast_terms(tensors, compute)
        out = [score_chunk(chunk_logits(terms, rows, softcap).to(wide), targets[rows])
               for rows in chunks(len(targets), len(terms[0][1]))]
        out = [torch.cat(column) for column in zip(*out)] or [targets.new_zeros(0, dtype=wide)] * 5
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        targets, *tensors = ctx.saved_tensors
        terms = cast_terms(tensors, ctx.compute)
        wide = torch.promote_types(ctx.compute, torch.float32)
        grads = [torch.zeros(t.shape, dtype=wide, device=t.device) if needed else None
                 for t, needed in zip(tensors, ctx.needs_input_grad[3:])]
        for rows in chunks(len(targets), len(terms[0][1])):
            d = grad_logits(chunk_logits(terms, rows, ctx.softcap), targets[rows], grad[rows], ctx.softcap)  # (n, V)
            d = d.to(ctx.compute)
            for (x, w), grad_x, grad_w in zip(terms, grads[0::2], grads[1::2]):
                if grad_x is not None:
                    grad_x[rows] = (d @ w).to(wide)
                if grad_w is not None:
                    grad_w.addmm_(d.T, x[rows]) if wide == ctx.compute else grad_w.add_(d.T @ x[rows])
        return None, None, None, *(g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors))


def cast_terms(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(dtype), w.to(dtype)) for x, w in zip(tensors[0::2], tensors[1::2])]


def chunks(count: int, vocab_size: int) -> Iterator[slice]:
    size = max(16, HEAD_CHUNK // vocab_size)
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def chunk_logits(terms: list[tuple[Tensor, Tensor]], rows: slice, softcap: Optional[float]) -> Tensor:  # (n, V)
    (x, w), *more = terms
    logits = x[rows] @ w.T
    for x, w in more:
        logits.addmm_(x[rows], w.T)
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

    A is drawn as PEFT draws it, uniform on +-1/sqrt(in); B is zero, so training starts at the base model. Both are
    float32 whatever the base is.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device, dtype=torch.float32)
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
        """As the head's terms: W + BA is never built."""
        return [(x, self.weight)] + ([(self.low_rank(x), self.lora_B.weight)] if self.enabled else [])

    def delta(self) -> Tensor:
        """scaling * B A, what merging adds to the weight."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)


class LoraEmbedding(nn.Module):
    """base(ids) + scaling * (A[:, ids])^T B^T, with PEFT's parameter names; A starts at zero, B is normal."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / rank, True
        place = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, **place))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, **place))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        out = self.base_layer(ids)
        if not self.enabled:
            return out
        low_rank = F.embedding(ids, self.lora_embedding_A.T) * self.scaling
        return out + (low_rank @ self.lora_embedding_B.T).to(out.dtype)

    def delta(self) -> Tensor:
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def add_lora(model: Decoder, rank: int, alpha: float, dropout: float, targets: list[str]) -> list[str]:
    """Freeze `model` and wrap its target modules; returns the names of the wrapped modules.

    `targets` are last parts of module names (`q_proj`, `lm_head`, `embed_tokens`; those of the model's own files, as
    GPT-2's `c_attn`, too) or `all-linear`, which is every linear layer but the head. Raises ValueError for a target
    that matches nothing.
    """
    model.requires_grad_(False)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    wanted = {t: [n for n in modules if is_target(n, t, modules[n], model.config)] for t in targets}
    for target, matched in wanted.items():
        if not matched:
            known = sorted({n.rpartition(".")[2] for n in modules})
            raise ValueError(f"--lora_target_modules {target}: no such module; this model has {' '.join(known)}"
                             + (" (LoRA on stacked experts and their router is not supported)" if model.config.moe else ""))
    chosen = [n for n in modules if any(n in matched for matched in wanted.values())]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        base = modules[name]
        wrapped = (LoraEmbedding(base, rank, alpha) if isinstance(base, nn.Embedding)
                   else LoraLinear(base, rank, alpha, dropout))
        setattr(model.get_submodule(parent), child, wrapped)
    return chosen


def is_target(name: str, target: str, module: nn.Module, config: ModelConfig) -> bool:
    if target == "all-linear":
        return isinstance(module, nn.Linear) and name != "lm_head"
    return any(("." + n).endswith("." + target) for n in (name, file_name(name, config)))


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
        if not isinstance(files, dict):
            raise ValueError(f"{index}: no \"weight_map\" in it")
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


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
               max_length: Optional[int] = None) -> Decoder:
    """Decoder with the directory's weights, cast to `dtype` on the way; `max_length` as in `read_config`.

    `model.layout` remembers how the files name and cut the parameters, for `save_model`. Raises ValueError listing
    every missing, unexpected and misshaped tensor with its file, before any weight is read.
    """
    checkpoint = open_checkpoint(directory)
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
    generation = checkpoint.directory / "generation_config.json"
    model.generation_config = read_json(generation) if generation.exists() else None
    return model.requires_grad_(True)


def file_name(name: str, config: ModelConfig) -> str:
    """Hugging Face's name of a module or parameter of ours."""
    if not config.other_names:
        return name
    from extras.layouts import file_name

    return file_name(name, config.model_type)


def find_places(names: Iterable[str], config: ModelConfig) -> dict[str, Place]:
    """{tensor name in the files: Place}. Raises ValueError for the leftovers of quantization."""
    quantized = [n for n in names if n.endswith((".SCB", ".qweight", ".weight_scale", ".weight_scale_inv", ".absmax"))]
    if quantized:
        raise ValueError(f"the checkpoint is quantized (it has {quantized[0]}); use the original one")
    names = [n for n in names if not n.endswith("rotary_emb.inv_freq")]  # old files carry this constant
    if config.other_names or any("language_model." in n for n in names):
        from extras.layouts import find_places

        places = {n: Place(*place) for n, place in find_places(names, config.model_type, config.moe).items()}
    else:
        places = {n: Place(n) for n in names}
    tied = Place("model.embed_tokens.weight")
    return {n: tied if config.tie_word_embeddings and p.name == "lm_head.weight" else p for n, p in places.items()}


def check_tensors(checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict, config: ModelConfig) -> None:
    """Raise ValueError listing every missing, unexpected or misshaped tensor, from the files' headers alone."""
    problems, found = [], dict.fromkeys(parameters, 0)
    for file in sorted(set(checkpoint.files.values())):
        opened = open_safetensors(checkpoint.directory / file)
        present = set(opened.keys())
        for name in sorted(n for n, f in checkpoint.files.items() if f == file and n in layout):
            if name not in present:
                problems.append(f"missing {name} in {file}, where the index says it is")
                continue
            header, place = opened.get_slice(name), layout[name]
            shape = tuple(header.get_shape())
            expected = tuple(place.view(parameters[place.name]).shape) if place.name in parameters else None
            if expected is None:
                problems.append(f"unexpected {name} {shape} in {file}")
            elif shape != expected:
                problems.append(f"{name} in {file} is {shape}, config.json says {expected}")
            elif header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                problems.append(f"{name} in {file} is quantized ({header.get_dtype()})")
            found[place.name] = found.get(place.name, 0) + math.prod(shape)
    problems += [f"missing {'parts of ' if found[name] else ''}{file_name(name, config)}"
                 for name, p in parameters.items() if found[name] < p.numel() and not any(name in s for s in problems)]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"{checkpoint.directory}: {shown}")


def read_tensors(checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict, dtype: torch.dtype,
                 device: str) -> dict[str, Tensor]:
    """The weights, copied out of the memory-mapped files one by one: cast on the way, no second copy of the model."""
    state, done = {}, set()
    for file in sorted(set(checkpoint.files.values())):
        opened = open_safetensors(checkpoint.directory / file)
        for name in sorted(n for n, f in checkpoint.files.items() if f == file and n in layout):
            place, tensor = layout[name], opened.get_tensor(name)
            if place.name not in state:
                state[place.name] = torch.empty(parameters[place.name].shape, dtype=dtype, device=device)
            view = place.view(state[place.name])
            if place in done and not torch.equal(view, tensor.to(view)):
                raise ValueError(f"{checkpoint.directory}: config.json ties the head to the embedding, but {name} in "
                                 f"{file} differs from it")
            view.copy_(tensor)
            done.add(place)
    return state


# Files: writing


def save_model(model: Decoder, directory: str | Path, dtype: Optional[torch.dtype] = None) -> None:
    """Write the weights as they were laid out in the files read, in shards of at most 5 GB, cast to `dtype` if given.

    config.json is written with that dtype, generation_config.json where there was one. LoRA wrappers are left out:
    this is the base model (merge first to keep what was learned).
    """
    directory = Path(directory)
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
    shards, size, total = [[]], 0, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtype.itemsize
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards, size = shards + [[]], 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map = {}
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
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """{PEFT's name: parameter} of the LoRA."""
    named = {}
    for name, module in lora_modules(model).items():
        prefix = f"base_model.model.{file_name(name, model.config)}."
        named |= {prefix + n: p for n, p in module.named_parameters() if n.startswith("lora_")}
    return named


def save_adapter(model: Decoder, directory: str | Path, settings: dict) -> None:
    """Write the LoRA as a PEFT adapter: adapter_model.safetensors and adapter_config.json.

    `settings` are r, lora_alpha, lora_dropout and base_model_name_or_path; `target_modules` is filled in with the
    names of the wrapped modules, which PEFT matches exactly.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().to("cpu", torch.float32).contiguous() for n, p in adapter_tensors(model).items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted(file_name(n, model.config) for n in lora_modules(model))
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, **settings,
        "target_modules": modules})


def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Fill the LoRA parameters of `model` from a PEFT adapter of the same targets, rank and scaling.

    Raises ValueError where the adapter is another, or is more than a plain LoRA. Copies of base weights, which PEFT
    stores beside a LoRA on the embedding or the head, are skipped.
    """
    path = Path(directory) / "adapter_model.safetensors"
    config = read_json(Path(directory) / "adapter_config.json")
    extra = [k for k in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices")
             if config.get(k)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if extra or config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{directory}: only a plain LoRA is read, this adapter has {', '.join(extra) or config['peft_type']}")
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    opened, ours = open_safetensors(path), adapter_tensors(model)
    theirs = {n for n in opened.keys() if ".lora_" in n}
    if theirs != ours.keys():
        raise ValueError(f"{path}: its tensors are not those of this LoRA; first difference: {min(theirs ^ ours.keys())}")
    for name, module in lora_modules(model).items():
        if not math.isclose(module.scaling, scaling):
            raise ValueError(f"{path}: alpha / rank is {scaling:g}, this LoRA has {module.scaling:g}")
    with torch.no_grad():
        for name, parameter in ours.items():
            tensor = opened.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, this LoRA has {tuple(parameter.shape)}")
            parameter.copy_(tensor)
