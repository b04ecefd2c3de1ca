"""Layers that differ in size, and that read what others made (Gemma 4).

Layers without a window may have heads of another size and number, and one projection for keys and
values. The last layers have neither keys nor values of their own: each reads those of the last
layer before them of its kind. Every layer may get an input of its own, from a second embedding of
the token; and experts whose result is added to the MLP's.

`config.per_layer` says which: "sizes" of each layer, the fields of ModelConfig that differ in it;
"reads", whose keys and values it reads (its own number: its own); "same", whether its values are
its keys, before either is normalized; "input_size" and "vocab_size" of the second embedding, whose
size is 0 where there is none; "moe", the experts. Keys and values go from layer to layer as
arguments and results, so that whatever runs a block, checkpointing say, sees them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.decoder.moe import Experts, mix, probabilities
from parts.kernels import ACTIVATIONS, compute_dtype, product, rms_norm
from parts.ropes import rotate

Shared = tuple[Tensor, Tensor]  # keys and values, (T, K, D) each


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps): RMSNorm without a weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = torch.ones(x.shape[-1], dtype=wide, device=x.device)
    return rms_norm(x, weight, eps, compute_dtype(x))


class SharingAttention(nn.Module):
    """Attention of normalized queries on normalized keys and values, its own or another layer's."""

    def __init__(self, config: Any, layer: int, norm: Callable):
        super().__init__()
        self.window = config.windows[layer]
        self.rope = config.rope_layers[layer]
        self.head_dim = config.head_dim
        self.eps = config.norm_eps
        C = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        k_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, q_size, bias=config.qkv_bias)
        self.q_norm = norm(config.head_dim)
        self.makes = config.per_layer["reads"][layer] == layer
        self.has_values = self.makes and not config.per_layer["same"][layer]
        if self.makes:
            self.k_proj = nn.Linear(C, k_size, bias=config.qkv_bias)
            self.k_norm = norm(config.head_dim)
        if self.has_values:
            self.v_proj = nn.Linear(C, k_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, C, bias=config.o_bias)

    def make(self, x: Tensor, table: tuple) -> Shared:
        """Return this layer's own keys, rotated, and values."""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)) if self.has_values else k
        return rotate(self.k_norm(k), *table), unit_norm(v, self.eps)

    def forward(
        self, x: Tensor, tables: dict, plans: dict, read: Shared | None,
    ) -> tuple[Tensor, Shared]:
        """Return (T, C), and the keys and values attended to."""
        table = tables[self.rope]
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k, v = self.make(x, table) if read is None else read
        out = plans[self.window](rotate(q, *table), k, v)  # (T, H, D)
        return self.o_proj(out.flatten(1)), (k, v)


class ScaledRouter(nn.Module):
    """Choose experts from x / rms(x), scaled; what is chosen has a learned factor of its own."""

    def __init__(self, hidden_size: int, moe: dict, eps: float):
        super().__init__()
        self.per_token = moe["per_token"]
        self.eps = eps
        self.proj = nn.Linear(hidden_size, moe["experts"], bias=False)
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(moe["experts"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and numbers of the chosen experts, (T, per_token) each."""
        x = unit_norm(x, self.eps) * self.scale * x.shape[-1] ** -0.5
        weights, chosen = probabilities(self.proj(x)).topk(self.per_token, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        # an embedding, because its gradient is summed in the same order every time
        factors = F.embedding(chosen, self.per_expert_scale[:, None]).squeeze(-1)
        return weights * factors, chosen


class PerLayerBlock(nn.Module):
    """Norm, attention, norm, MLP, with a norm after each; experts beside the MLP; own input."""

    def __init__(self, config: Any, layer: int, norm: Callable, mlp: nn.Module):
        super().__init__()
        C = config.hidden_size
        size, moe = config.per_layer["input_size"], config.per_layer["moe"]
        self.act = ACTIVATIONS[config.hidden_act]
        self.self_attn = SharingAttention(config, layer, norm)
        self.mlp = mlp
        self.input_layernorm = norm(C)
        self.post_attention_layernorm = norm(C)
        self.pre_feedforward_layernorm = norm(C)
        self.post_feedforward_layernorm = norm(C)
        # as in transformers it never learns: model.Decoder.requires_grad_
        self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)
        if size:
            self.per_layer_input_gate = nn.Linear(C, size, bias=False)
            self.per_layer_projection = nn.Linear(size, C, bias=False)
            self.post_per_layer_input_norm = norm(C)
        self.has_experts = moe is not None
        if self.has_experts:
            self.router = ScaledRouter(C, moe, config.norm_eps)
            self.experts = Experts(C, moe, self.act)
            self.post_feedforward_layernorm_1 = norm(C)
            self.pre_feedforward_layernorm_2 = norm(C)
            self.post_feedforward_layernorm_2 = norm(C)

    def feedforward(self, x: Tensor) -> Tensor:
        """Return the MLP's result and, added to it, the experts'."""
        out = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.has_experts:
            return out
        weights, chosen = self.router(x)
        given = self.pre_feedforward_layernorm_2(x)
        mixed = mix(self.experts, len(self.router.per_expert_scale), given, weights, chosen)
        return self.post_feedforward_layernorm_1(out) + self.post_feedforward_layernorm_2(mixed)

    def forward(
        self, x: Tensor, tables: dict, plans: dict, own: Tensor | None, read: Shared | None,
    ) -> tuple[Tensor, Shared | None]:
        """Return hidden states (T, C), and the keys and values that the layer made.

        `own` (T, input_size) is the layer's own input; `read` are another layer's keys and values.
        """
        out, shared = self.self_attn(self.input_layernorm(x), tables, plans, read)
        x = x + self.post_attention_layernorm(out)
        x = x + self.post_feedforward_layernorm(self.feedforward(x))
        if own is not None:
            gated = product(self.act, self.per_layer_input_gate(x), own)
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar, shared if read is None else None


# The stack of them


def add_inputs(stack: Any, make_embedding: Callable, norm: Callable) -> None:
    """Give a model.Stack what makes the layers' own inputs, under transformers' names."""
    c = stack.config
    size = c.per_layer["input_size"]
    if size:
        width = c.num_hidden_layers * size
        stack.embed_tokens_per_layer = make_embedding(c.per_layer["vocab_size"], width)
        stack.per_layer_model_projection = nn.Linear(c.hidden_size, width, bias=False)
        stack.per_layer_projection_norm = norm(size)


def own_inputs(stack: Any, input_ids: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    """Return each layer's own input (T, input_size): (E[token] sqrt(size) + norm(W x)) / sqrt(2).

    x (T, C) are the embeddings that the first layer gets. Where they are features of images, the
    token is the padding, whose row does not learn, as transformers has it.
    """
    c = stack.config
    size = c.per_layer["input_size"]
    if not size:
        return (None,) * c.num_hidden_layers
    if c.vision is not None:
        placeholders = torch.tensor(c.vision["placeholders"], dtype=input_ids.dtype)
        unread = torch.isin(input_ids, placeholders.to(input_ids.device, non_blocking=True))
        input_ids = input_ids.masked_fill(unread, c.vision["padding"])
    told = stack.embed_tokens_per_layer(input_ids)
    if c.vision is not None:
        told = torch.where(unread[:, None], told.detach(), told)
    # rounded to the type first, as Gemma was trained
    told = told * torch.tensor(size**0.5, dtype=told.dtype).item()
    seen = stack.per_layer_model_projection(x) * c.hidden_size**-0.5
    seen = stack.per_layer_projection_norm(seen.unflatten(-1, (-1, size)))
    return ((seen + told.view(seen.shape)) * 2**-0.5).unbind(1)


def run_layers(stack: Any, input_ids: Tensor, x: Tensor, tables: dict, plans: list) -> Tensor:
    """Run a stack's layers on embeddings x (T, C), handing on keys and values."""
    reads = stack.config.per_layer["reads"]
    made: dict[int, Shared] = {}
    inputs = own_inputs(stack, input_ids, x)
    for i, (layer, plan, own) in enumerate(zip(stack.layers, plans, inputs)):
        x, shared = stack.run_block(layer, x, tables, plan, own, made.get(reads[i]))
        if i in reads[i + 1:]:
            made[i] = shared
    return x
