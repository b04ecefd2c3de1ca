"""Layers with the gated delta rule (arXiv:2412.06464) in place of attention: Qwen3-Next, Qwen3.5.

Each value head has a state S (dk, dv), which every token lets decay and corrects:

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         o_t = S_t^T q_t

It is computed a chunk of tokens at a time (section 3.3), as extras/decoder/chunks.py lays them out.

Sizes: T tokens, N chunks of n tokens, K key heads, r value heads of each, H = K r, dk and dv of a
head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from extras.decoder.chunks import CHUNK, ChunkPlan, Convolution
from parts.kernels import ACTIVATIONS, rms_norm, swiglu

NAME = "linear_attn"
# What a layer, which runs in float32, saves for its backward: bytes per token and unit of (q, k and
# v side by side; its values).
SAVED = {"float32": (12, 16), "bf16": (12, 14), "bfloat16": (12, 14)}


def make(config: Any) -> nn.Module:
    return GatedDelta(config)


def saved(c: dict, kind: str, frozen: int) -> int:
    """Return the bytes per token kept for the backward (extras/decoder/mixers.py)."""
    values = c["value_heads"] * c["value_size"]
    mixed = values + 2 * c["key_heads"] * c["key_size"]
    of_mixed, of_values = SAVED[kind]
    return mixed * of_mixed + values * (of_values - frozen)


def passing(c: dict) -> int:
    """Return the bytes per token that come and go in the backward: four times a chunk's rows."""
    return 4 * (8 * CHUNK) * c["value_heads"]


def operations(c: dict) -> int:
    """Count the operations per token of the rule itself, in chunks of n tokens."""
    dk, dv = c["key_size"], c["value_size"]
    return c["value_heads"] * (2 * CHUNK * (2 * dk + 2 * dv) + 2 * 3 * dk * dv)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, plan: ChunkPlan,
    state: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return o (T, H, dv), and the states (chunks, K, r, dk, dv) after each step.

    q and k are (T, K, dk), v is (T, H, dv), g and beta (T, H). `state` is what the chunks of the
    first step start from, None for zeros.
    """
    K = k.shape[1]
    q, k = (plan.chunked(x).transpose(1, 2)[:, :, None] for x in (q, k))  # (N, K, 1, n, dk)
    v = plan.chunked(v).unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)  # (N, K, r, n, dv)
    g, beta = (  # (N, K, r, n)
        plan.chunked(x).unflatten(2, (K, -1)).permute(0, 2, 3, 1) for x in (g, beta))
    total = g.cumsum(-1)
    # what is left at i of what was written at j, 0 for j > i
    later = torch.ones(plan.size, plan.size, dtype=torch.bool, device=g.device).triu(1)
    left = total[..., :, None] - total[..., None, :]
    left = left.masked_fill(later, -torch.inf).exp()  # (N, K, r, n, n)
    # of what a token would write, which earlier tokens of its chunk have written already (equations
    # 8 to 10): (1 + strictly lower part)^-1
    system = (k @ k.mT) * left * beta[..., None]
    one = torch.eye(plan.size, dtype=g.dtype, device=g.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    inverse = inverse * beta[..., None, :]
    within = (q @ k.mT) * left
    since = total.exp()[..., None]  # what is left of the chunk's first state
    until = (total[..., -1:] - total).exp()[..., None]  # ... at its end, of what a token wrote
    outs = []
    states = []
    parts = (x.split(plan.steps) for x in (q, k, v, inverse, within, since, until))
    for i, (q, k, v, inverse, within, since, until) in enumerate(zip(*parts)):
        if i > 0:
            state = states[-1][plan.parents[i - 1]]
        new = inverse @ (v if state is None else v - since * (k @ state))
        out = within @ new
        outs.append(out if state is None else out + since * (q @ state))
        written = k.mT @ (until * new)
        states.append(written if state is None else since[..., -1:, :] * state + written)
    out = torch.cat(outs).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)  # (N n, H, dv)
    return out[plan.place], states


class GatedNorm(nn.Module):
    """RMSNorm(x) * weight * silu(gate), over each head."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return swiglu(gate, rms_norm(x, self.weight.to(x.dtype), self.eps, x.dtype))


class GatedDelta(nn.Module):
    """Convolution over a few tokens, the delta rule, a gated norm."""

    def __init__(self, config: Any):
        super().__init__()
        c = config.mixer
        C = config.hidden_size
        self.heads = (c["key_heads"], c["value_heads"])
        self.sizes = (c["key_size"], c["value_size"])
        keys = c["key_heads"] * c["key_size"]
        values = c["value_heads"] * c["value_size"]
        self.split = [keys, keys, values]
        self.fused = c["fused"]
        if self.fused:
            self.in_proj_qkvz = nn.Linear(C, 2 * keys + 2 * values, bias=False)
            self.in_proj_ba = nn.Linear(C, 2 * c["value_heads"], bias=False)
        else:
            self.in_proj_qkv = nn.Linear(C, 2 * keys + values, bias=False)
            self.in_proj_z = nn.Linear(C, values, bias=False)
            self.in_proj_b = nn.Linear(C, c["value_heads"], bias=False)
            self.in_proj_a = nn.Linear(C, c["value_heads"], bias=False)
        channels = sum(self.split)
        self.act = ACTIVATIONS[config.hidden_act]
        self.conv1d = nn.Conv1d(channels, channels, c["width"], groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(c["value_heads"]))
        self.A_log = nn.Parameter(torch.zeros(c["value_heads"]))
        self.norm = GatedNorm(c["value_size"], config.norm_eps)
        self.out_proj = nn.Linear(values, C, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v side by side (T, D), the output's gate (T, H dv), b and a (T, H)."""
        if not self.fused:
            return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
        K, H = self.heads
        dk, dv = self.sizes
        values = H // K * dv
        mixed = self.in_proj_qkvz(x).unflatten(1, (K, -1)).split([dk, dk, values, values], 2)
        q, k, v, z = (part.flatten(1) for part in mixed)
        b, a = self.in_proj_ba(x).unflatten(1, (K, 2, -1)).unbind(2)
        return torch.cat([q, k, v], 1), z, b.flatten(1), a.flatten(1)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        plan, memory = plans["mixer"]
        qkv, z, b, a = self.project(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            qkv, z, b, a = (t.to(wide) for t in (qkv, z, b, a))
            out = self.mix(qkv, b, a, plan, memory)  # (T, H, dv)
            out = self.norm(out, z.view_as(out)).to(x.dtype)
        return self.out_proj(out.flatten(1))

    def mix(self, qkv: Tensor, b: Tensor, a: Tensor, plan: ChunkPlan, memory: Any) -> Tensor:
        """Return o (T, H, dv). `memory` has what lies before the stream, None is nothing."""
        K, H = self.heads
        dk, dv = self.sizes
        before, state = qkv.new_zeros(plan.tails.numel(), qkv.shape[1]), None
        if memory is not None:
            before, state = memory.starts(before, qkv.new_zeros(K, H // K, dk, dv))
        weight = self.conv1d.weight[:, 0].to(qkv.dtype)
        mixed = self.act(Convolution.apply(qkv, weight, before, plan))
        g = -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))
        inputs = (mixed, g, b.sigmoid(), plan, state)
        if memory is None:
            # computed again in backward: what it would keep is several times as large as all else
            return checkpoint(self.rule, *inputs, use_reentrant=False, preserve_rng_state=False)[0]
        out, states = self.rule(*inputs)
        memory.keep(torch.cat([qkv, before])[plan.tails], [states[i][j] for i, j in plan.ends])
        return out

    def rule(
        self, mixed: Tensor, g: Tensor, beta: Tensor, plan: ChunkPlan, state: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what delta_rule does, of q, k and v side by side."""
        dk, dv = self.sizes
        q, k, v = (x.unflatten(1, (-1, size)) for x, size in zip(
            mixed.split(self.split, 1), (dk, dk, dv)))
        return delta_rule(unit(q) * dk**-0.5, unit(k), v, g, beta, plan, state)


def unit(x: Tensor) -> Tensor:
    """Divide by the length, as the models were trained."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
