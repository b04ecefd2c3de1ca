"""Decoders that read a flat stream: every token of a micro-batch lies in one (T,) row, no padding.

Embeddings, norms, projections and MLPs work on (T, C) and never hear of pairs. Attention alone
knows which token belongs where, through `spans`: rows (start, end, prefix_start, prefix_end), each
a stretch of the stream that attends fully to its prefix and causally to itself. The head scores
only the positions it is asked for and never holds (T, V) logits.

From leaf to root: configuration, attention, modules, head, LoRA, files. Families differ
by features, not by classes (parts/families.py); parameters carry Hugging Face's names, and where
files differ, parts/names.py has the map. Backward passes written by hand are in parts/kernels.py.

Sizes: T tokens, N scored tokens, S spans, V vocabulary, C hidden, H heads, K kv heads, D head dim.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts import weights
from parts.activations import keep_all
from parts.configs import read_fields
from parts.head import KEPT, How, chunked_logps
from parts.kernels import ACTIVATIONS, add_low_rank, compute_dtype, cut, product, rms_norm
from parts.names import FIXED, file_name, find_places
from parts.ropes import Rope, rotary_tables, rotate
from parts.varlen import has_flash, head_sizes, plan_varlen

# Logits held at once: rows x vocabulary (64 MiB in float32); on a GPU eight times as many.
HEAD_CHUNK = 2**24
SHARD_BYTES = 5 * 10**9  # a larger checkpoint is saved in several files


# Configuration


@dataclass(frozen=True)
class ModelConfig:
    """What the modules read. Features that only some families have default to Llama's."""

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
    windows: tuple[int | None, ...] = ()  # per layer; None sees all before, -n chunks of n
    rope_layers: tuple[str | None, ...] = ()  # per layer: which of `ropes`; None does not rotate
    ropes: dict[str, Rope] = field(default_factory=dict)
    norm: str = "rms"  # or "layer", "layer without bias"
    norm_offset: bool = False  # Gemma: scale by 1 + weight
    # names of the norms before attention, after it, before the MLP, after it
    block_norms: tuple[str | None, ...] = (
        "input_layernorm", None, "post_attention_layernorm", None)
    # "full": over all heads together; "head": over each; "rotated": over each, after the rotation
    qk_norm: str | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    # "blocks": all q, then all k, then all v; "heads": q, k, v of each head in turn
    fused_qkv: str | None = None
    gated_mlp: bool = True
    fused_gate_up: bool = False
    parallel_residual: bool = False  # GPT-NeoX: x + attention(norm(x)) + mlp(norm(x))
    learned_positions: bool = False  # GPT-2
    attention_scale: float = 0.0
    attn_softcap: float | None = None
    sinks: bool = False  # gpt-oss: a learned logit per head in the softmax's denominator
    final_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    output_gate: bool = False  # q_proj makes a gate too: its sigmoid scales attention's output
    mixer: dict | None = None  # recurrent or chunked, read by extras/decoder/mixers.py
    single: bool = False  # Nemotron-H: a layer mixes tokens or is an MLP, not both
    latent: dict | None = None  # read by extras/decoder/latent.py
    moe: dict | None = None  # read by extras/decoder/moe.py
    vision: dict | None = None  # read by extras/decoder/vision.py
    per_layer: dict | None = None  # layers of other sizes: extras/decoder/per_layer.py
    other_names: bool = False  # its files name or lay out parameters otherwise


def read_config(raw: dict, max_length: int | None = None) -> ModelConfig:
    """Return the ModelConfig of a config.json's content.

    `max_length` is the longest sequence of the run in tokens, None for "no longer than the model
    was made for". Phi-3's LongRoPE has other frequencies beyond its pretraining length; they are
    chosen once per run by `max_length`, where transformers chooses per batch, so that a pair's
    log-probs never depend on what it is batched with.

    Raises ValueError, by name, for what is not supported: other model types, quantized and
    encoder-decoder models, and keys that are neither read nor known to be harmless.
    """
    return ModelConfig(**read_fields(raw, max_length))


class Stream(NamedTuple):
    """What a Decoder reads; data.Batch has these fields and more."""

    input_ids: Tensor  # (T,)
    # (T,) restart after the prompt for each completion: the rejected one must not be moved by the
    # length of the chosen one before it, or its numbers were not those of an ordinary sequence
    position_ids: Tensor
    # (S, 4) on the CPU: they become Python integers, and reading those from a GPU would stall it
    spans: Tensor
    score_index: Tensor | None = None  # (N,) stream positions that predict `targets`
    targets: Tensor | None = None  # (N,)
    pictures: Any = None  # extras/decoder/vision.py's Pictures


# Attention over spans. A plan is made once per stream and called by every layer: plan(q, k, v).


class Call(NamedTuple):
    """One attention call: queries [start, end) of the stream on one or two stretches of keys."""

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    # (queries, keys) True where attended; None is plain causal, a single query sees every key
    mask: Tensor | None


class CallPlan(NamedTuple):
    """Attention in one call per group of spans: runs everywhere."""

    calls: list[Call]
    attention: Callable  # of one call: (q, k, v, mask) -> (n, H, D)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """softmax(q k^T scale) v (T, H, D), in the type of v; q is (T, H, D), k, v (T, K, D)."""
        attention = self.attention if sinks is None else partial(self.attention, sinks=sinks)
        compute = dtype = v.dtype
        if q.device.type == "cpu":
            # the CPU's float32 kernel is faster than its bfloat16 one, and more exact
            compute = torch.promote_types(dtype, torch.float32)
        queries = cut(q.to(compute), [((call.start, call.end),) for call in self.calls])
        keys = cut(k.to(compute), [call.keys for call in self.calls])
        values = cut(v.to(compute), [call.keys for call in self.calls])
        masks = [call.mask for call in self.calls]
        with torch.autocast(q.device.type, enabled=False):
            out = map(attention, queries, keys, values, masks)
            return torch.cat(list(out)).to(dtype)


def plan_calls(spans: Tensor, position_ids: Tensor, window: int | None) -> list[Call]:
    """Turn spans (S, 4) into calls: a prompt and its first completion are one causal sequence."""
    rows = spans.tolist()
    calls = []
    i = 0
    while i < len(rows):
        start, end, prefix_start, prefix_end = rows[i]
        i += 1
        plain = prefix_start == prefix_end
        if plain and i < len(rows) and rows[i][2:] == [start, end] and rows[i][0] == end:
            end = rows[i][1]  # the span that follows its own prefix
            i += 1
        keys = ((start, end),) if plain else ((prefix_start, prefix_end), (start, end))
        mask = None
        if not plain or (window is not None and end - start > window):
            key_positions = torch.cat([position_ids[a:b] for a, b in keys])
            mask = span_mask(position_ids[start:end], key_positions, window)
        calls.append(Call(start, end, keys, mask))
    return calls


def span_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:  # (q, k) bool
    """0 <= position_q - position_k < window: positions, never stream indices."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                    scale: float) -> Tensor:  # (n, H, D)
    K = k.shape[1]
    q = q.unflatten(1, (K, -1)).permute(1, 2, 0, 3)  # (K, H/K, n, D)
    # keys and values are not copied for each head, but read in place
    k, v = (x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    causal = mask is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def choose_attention(config: ModelConfig) -> Callable:
    """Return what computes one call of this model's attention."""
    if config.attn_softcap or config.sinks:
        from extras.decoder.explicit import explicit_attention

        return partial(explicit_attention, scale=config.attention_scale, cap=config.attn_softcap)
    return partial(fused_attention, scale=config.attention_scale)


def plan_attention(config: ModelConfig, spans: Tensor, position_ids: Tensor,
                   dtype: torch.dtype) -> dict[int | None, Callable]:
    """Return {window: plan} for one stream, and under "mixer" that of recurrent layers."""
    if config.mixer is not None:
        from extras.decoder.mixers import plan_mixer

        return plan_mixer(plan_attention, config, spans, position_ids, dtype)
    device = position_ids.device
    sizes = head_sizes(config)
    flash = [w for w in sizes if has_flash(device, dtype, sizes[w], config.attn_softcap)]
    plans: dict = plan_varlen(config, spans, device) if flash else {}
    attention = choose_attention(config)
    for window in sizes.keys() - flash:
        plans[window] = CallPlan(plan_calls(spans, position_ids, window), attention)
    return plans


# Modules


class Norm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * w (Gemma: 1 + w), or LayerNorm.

    Statistics are float32 at least. The result has the type that the matrix products after it run
    in, so that it is rounded once for all of them.
    """

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.layer = config.norm != "rms"
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        if self.layer:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).to(dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide) + 1 if self.offset else self.weight.to(wide)
        return rms_norm(x, weight, self.eps, dtype)


class Attention(nn.Module):
    """Multi-head attention with K <= H heads of keys and values (grouped queries)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.window = config.windows[layer]
        self.rope = config.rope_layers[layer]
        C = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        k_size = config.num_key_value_heads * config.head_dim
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(C, q_size + 2 * k_size, bias=config.qkv_bias)
        else:
            gates = q_size if config.output_gate else 0
            self.q_proj = nn.Linear(C, q_size + gates, bias=config.qkv_bias)
            self.k_proj = nn.Linear(C, k_size, bias=config.qkv_bias)
            self.v_proj = nn.Linear(C, k_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, C, bias=config.o_bias)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.sinks else None
        if config.qk_norm:
            full = config.qk_norm == "full"
            self.q_norm = Norm(q_size if full else config.head_dim, config)
            self.k_norm = Norm(k_size if full else config.head_dim, config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q (T, H, D), k (T, K, D), v (T, K, D), and the gate (T, H, D) if there is one."""
        c = self.config
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        gate = None
        if c.fused_qkv == "heads":
            return *self.qkv_proj(x).view(-1, H, 3, D).unbind(2), gate
        if c.fused_qkv:
            q, k, v = self.qkv_proj(x).split([H * D, K * D, K * D], -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.output_gate:
            q, gate = q.view(-1, H, 2 * D).chunk(2, -1)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(-1, H, D), k.view(-1, K, D), v.view(-1, K, D)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, gate

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        q, k, v, gate = self.project(x)
        if self.rope is not None:
            q, k = (rotate(x, *tables[self.rope]) for x in (q, k))
        if self.config.qk_norm == "rotated":
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = () if self.sinks is None else (self.sinks,)
        out = plans[self.window](q, k, v, *sinks)  # (T, H, D)
        out = out if gate is None else out * gate.sigmoid()
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        C = config.hidden_size
        bias = config.mlp_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.product = product
        self.gated = config.gated_mlp
        self.fused = config.fused_gate_up
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
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.product(self.act, gate, up))


def make_mlp(config: ModelConfig, layer: int) -> nn.Module:
    if config.moe is None or not config.moe["sparse"][layer]:
        return MLP(config, config.intermediate_size)
    from extras.decoder.moe import make_sparse

    return make_sparse(config, MLP)


def make_attention(config: ModelConfig, layer: int) -> nn.Module:
    if config.latent is None:
        return Attention(config, layer)
    from extras.decoder.latent import LatentAttention

    return LatentAttention(config, Norm)


class Block(nn.Module):
    """Norm, attention, norm, MLP, with residuals; the family says which of four norms exist."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.mixers: tuple[str, ...] = ("self_attn",)  # their results add up
        self.self_attn = make_attention(config, layer)
        self.mlp = make_mlp(config, layer)
        for name in filter(None, config.block_norms):
            self.add_module(name, Norm(config.hidden_size, config))
        if config.mixer is not None:
            from extras.decoder.mixers import remix

            remix(self, config, layer)

    def norm(self, which: int, x: Tensor) -> Tensor:
        name = self.config.block_norms[which]
        return x if name is None else getattr(self, name)(x)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (T, C), and the router's logits (T, experts) of a sparse layer."""
        scale = self.config.residual_scale
        mixed = (self.norm(0, x), tables, plans)
        out = reduce(torch.add, [getattr(self, name)(*mixed) for name in self.mixers])
        attended = torch.add(x, self.norm(1, out), alpha=scale)
        out = self.mlp(self.norm(2, x if self.config.parallel_residual else attended))
        out, router_logits = out if isinstance(out, tuple) else (out, None)
        return torch.add(attended, self.norm(3, out), alpha=scale), router_logits


def make_block(config: ModelConfig, layer: int) -> nn.Module:
    if config.per_layer is None and not config.single:
        return Block(config, layer)
    from extras.decoder.other_blocks import make_other_block

    return make_other_block(config, layer, Norm, make_attention, make_mlp)


def make_embedding(count: int, size: int) -> nn.Embedding:
    """Draw with the standard deviation 0.02 of transformers' models.

    Uniformly: a normal draw on the meta device imports PyTorch's compiler, which takes seconds.
    """
    bound = 0.02 * 3**0.5
    weight = torch.empty(count, size).uniform_(-bound, bound)
    return nn.Embedding(count, size, _weight=weight)


class Stack(nn.Module):
    """Embedding, blocks, last norm: stream in, hidden states out."""

    def __init__(self, config: ModelConfig, make_vision: Callable | None = None):
        super().__init__()
        self.config = config
        self.run_block: Callable = keep_all  # decides what a block keeps for its backward
        self.embed_tokens = make_embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = make_embedding(
                config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(make_block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config)
        self.vision = make_vision(config) if make_vision else None
        if config.per_layer is not None:
            from extras.decoder.per_layer import add_inputs

            add_inputs(self, make_embedding, partial(Norm, config=config))

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # (T, C)
        x = self.embed_tokens(input_ids)
        scale = self.config.embed_scale
        if scale != 1:
            # rounded to the type first, as Gemma was trained
            x = x * torch.tensor(scale, dtype=x.dtype).item()
        return x + self.embed_positions(position_ids) if self.config.learned_positions else x

    def forward(self, stream: Stream, cache=None) -> tuple[Tensor, list[Tensor]]:
        """Return hidden states (T, C), and the router's logits (T, experts) of sparse layers.

        A `cache` plans attention where a stream goes on (generate.py), or images see both ways.
        """
        c = self.config
        x = self.embed(stream.input_ids, stream.position_ids)
        tables = rotary_tables(c.ropes, stream.position_ids, x.dtype)
        deep = []  # what is added at pictures after the first layers: Qwen3-VL's DeepStack
        if self.vision is not None:
            x, tables, cache, deep = self.vision(
                x, tables, stream.pictures, self.run_block, cache)
        planned = (c, stream.spans, stream.position_ids, compute_dtype(x))
        plans = (cache.plan(*planned) if cache is not None
                 else [plan_attention(*planned)] * len(self.layers))
        if c.per_layer is not None:
            from extras.decoder.per_layer import run_layers

            return self.norm(run_layers(self, stream.input_ids, x, tables, plans)), []
        routed = []
        for i, (layer, plan) in enumerate(zip(self.layers, plans)):
            x, router_logits = self.run_block(layer, x, tables, plan)
            if i < len(deep):
                x = x.index_add(0, stream.pictures.place, deep[i])
            routed.append(router_logits)
        return self.norm(x), [logits for logits in routed if logits is not None]


class TokenLogps(NamedTuple):
    """Of each scored token; (N,), nats, float32 or wider; statistics not asked for are None."""

    logps: Tensor  # this and aux_loss alone carry gradients
    entropy: Tensor | None = None  # of the predicted distribution
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2, which WPO needs
    mean_logits: Tensor | None = None  # over the vocabulary
    is_top1: Tensor | None = None  # bool: the target is the likeliest token
    aux_loss: Tensor | None = None  # (): load balancing over experts, unscaled


class Decoder(nn.Module):
    """A causal language model on a flat stream, with its head.

    `make_vision(config)` makes what puts pictures into the stream, for models that read them.
    """

    def __init__(self, config: ModelConfig, make_vision: Callable | None = None):
        super().__init__()
        self.config = config
        self.model = Stack(config, make_vision)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        # how load_model found its files, so that save_model writes them the same way
        self.layout = {}
        self.carried = weights.Carried({})
        self.raw_config = {}
        self.generation_config: dict | None = None
        self.no_lora: tuple[str, ...] = ()  # beginnings of names that LoRA leaves alone
        self.four_bit: dict | None = None  # how its linear layers are quantized, where they are
        # (model, directory) -> None: writes it where safetensors of its parameters would not do
        self.writer: Callable | None = None

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def requires_grad_(self, requires_grad: bool = True) -> "Decoder":
        """As nn.Module's, but what never learns (names.FIXED) stays as it is."""
        super().requires_grad_(requires_grad)
        for name, p in self.named_parameters():
            p.requires_grad = p.requires_grad and not name.endswith(FIXED)
        return self

    def forward(self, batch: Stream, statistics: bool = True) -> TokenLogps:
        """Return log-probs of the batch's `targets` (N,) at its positions `score_index` (N,).

        Head and loss terms belong to the forward, so that DDP and FSDP see all parameters used.
        """
        hidden, routed = self.model(batch)
        terms = self.head_terms(hidden[batch.score_index])
        keep = KEPT if self.model.run_block is keep_all else 0
        out = token_logps(terms, batch.targets, self.config.final_softcap, keep, statistics)
        if not routed:
            return out
        from extras.decoder.moe import load_balancing_loss

        aux_loss = load_balancing_loss(routed, batch.spans, self.config.moe["per_token"])
        return out._replace(aux_loss=aux_loss)

    def head_terms(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return [(input, weight)] with logits = sum of input @ weight^T.

        A LoRA on the head is a second term, so that W + BA is never built.
        """
        hidden = hidden * self.config.logit_scale
        head = self.lm_head
        return head.terms(hidden) if hasattr(head, "terms") else [(hidden, head.weight)]

    def logits(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor,
               rows: Tensor | None = None, cache=None, pictures=None) -> Tensor:
        """Return logits (T, V) of all positions, or (len(rows), V), for generation and tests.

        Training never builds them.
        """
        hidden, _ = self.model(Stream(input_ids, position_ids, spans, pictures=pictures), cache)
        hidden = hidden if rows is None else hidden[rows]
        logits = sum(F.linear(x, w) for x, w in self.head_terms(hidden))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


# The head; its chunks are in parts/head.py


def token_logps(terms: list[tuple[Tensor, Tensor]], targets: Tensor, softcap: float | None = None,
                keep: int = KEPT, statistics: bool = True) -> TokenLogps:
    """log softmax(sum_k x_k w_k^T) at `targets` (N,), x_k (N, C_k), w_k (V, C_k), in chunks of N.

    Matrix products run in the autocast type if there is one, all after them in float32 or wider.
    """
    keep = keep if torch.is_grad_enabled() else None
    how = How(softcap, compute_dtype(terms[0][0]), HEAD_CHUNK, keep, statistics)
    with torch.autocast(targets.device.type, enabled=False):
        return TokenLogps(*chunked_logps(targets, how, *(t for term in terms for t in term)))


# LoRA; what is wrapped, and the other kinds of adapters, are in extras/lora


class LoraLinear(nn.Module):
    """base(x) + scaling * B A dropout(x) (arXiv:2106.09685); base maps x linearly.

    A is drawn as PEFT draws it, uniform on +-1/sqrt(in); B is zero, so training starts at the
    base. Both are at least float32 whatever the base is: their updates are smaller than what
    bfloat16 resolves.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base
        self.scaling = alpha / rank
        self.enabled = True
        self.dropout = nn.Dropout(dropout)
        weight = base.weight  # asked for once: in 4 bits it is made wide on the way
        place = dict(dtype=torch.promote_types(weight.dtype, torch.float32))
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.to(weight.device)  # drawn on the CPU, so that it is the same draw on every device

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def low_rank(self, x: Tensor) -> Tensor:  # (T, rank), the input of B
        return self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        A, B = self.lora_A.weight, self.lora_B.weight
        return add_low_rank(out, self.dropout(x), A, B, self.scaling) if self.enabled else out

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `Decoder.head_terms` has them."""
        base = (x, self.weight)
        return [base, (self.low_rank(x), self.lora_B.weight)] if self.enabled else [base]

    def delta(self) -> Tensor:
        """scaling * B A, what merging adds to the weight."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)


def lora_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return {name: wrapper} of all adapters, whatever their kind."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}


@contextmanager
def adapters_disabled(model: nn.Module):
    """Adapters inactive inside: `model` is its base, which is the reference of a LoRA run."""
    modules = list(lora_modules(model).values())
    for module in modules:
        module.enabled = False
    try:
        yield model
    finally:
        for module in modules:
            module.enabled = True


# Files


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
               max_length: int | None = None, build: Callable = Decoder) -> Decoder:
    """Return a Decoder with the directory's weights, cast to `dtype` while they are read.

    `max_length` is as in `read_config`; `build(config)` makes the model. Models that read pictures
    or are quantized are opened by extras/models/opening.py. Raises ValueError listing every
    missing, unexpected and misshaped tensor with its file, before any weight is read.
    """
    opened = weights.open_checkpoint(directory)
    try:
        config = read_config(opened.raw_config, max_length)
        layout = find_places(opened.files, config)
    except ValueError as error:
        raise ValueError(f"{opened.directory}: {error}") from None
    with torch.device("meta"):  # no memory yet: weights are assigned as they are read
        model = build(config)
    if config.vision is not None and model.model.vision is None:
        raise ValueError(f"{opened.directory}: a {config.model_type} model reads pictures; "
                         "load_model of extras/models/opening.py opens those")
    parameters = dict(model.named_parameters())  # a tied head is listed once
    weights.check_tensors(opened, layout, parameters, config)
    model.read = weights.Reader(opened, layout, parameters, dtype)
    model.load_state_dict(model.read(parameters, device), strict=False, assign=True)
    model.tie()
    weights.remember(model, opened, layout)
    return model.requires_grad_(True)


def save_model(model: Decoder, directory: str | Path, dtype: torch.dtype | None = None,
               whole: Callable = Tensor.detach) -> None:
    """Write the weights as they lay in the files read, cast to `dtype` if given.

    In shards of at most 5 GB; config.json says the type, and generation_config.json is written
    where there was one. LoRA is left out (merge it first); `whole` gathers a sharded parameter.
    """
    directory = Path(directory)
    if model.writer is not None:
        return model.writer(model, directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {n.replace(".base_layer.", "."): p
                  for n, p in model.named_parameters() if "lora_" not in n}
    names = [file_name(n, model.config) for n in parameters]
    layout = model.layout or find_places(names, model.config)
    dtype = dtype or next(iter(parameters.values())).dtype
    weights.save_shards(
        parameters, layout, directory, dtype, SHARD_BYTES, whole, weights.unlearned(model))
    key = "torch_dtype" if "torch_dtype" in model.raw_config else "dtype"
    weights.write_configs(model, directory, {key: str(dtype).removeprefix("torch.")})
