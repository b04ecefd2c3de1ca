"""Mamba-2 layers (arXiv:2405.21060): Granite 4 H, Nemotron-H, and Falcon-H1, where they stand
beside attention.

Each head has a state S (s, p), which every token lets decay and adds to:

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T         y_t = S_t^T C_t + D x_t

It is computed a chunk of tokens at a time (section 6), as extras/decoder/chunks.py lays them out:
inside a chunk it is linear attention with C as queries, B as keys, and the decay from key to query
as its mask.

Sizes: T tokens, N chunks of n tokens, G groups of heads that share B and C, r heads of each,
H = G r, p channels of a head, s of its state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from extras.decoder.chunks import CHUNK, ChunkPlan, Convolution
from parts.kernels import ACTIVATIONS, swiglu

NAME = "mamba"


def make(config: Any) -> nn.Module:
    return Mamba(config)


def widths(c: dict) -> list[int]:
    """Return the sizes of what in_proj makes side by side: gate, x, B, C, dt."""
    inner = c["heads"] * c["head_size"]
    state = c["groups"] * c["state_size"]
    return [inner, inner, state, state, c["heads"]]


def saved(c: dict, kind: str, frozen: int) -> int:
    """Return the bytes per token kept for the backward (extras/decoder/mixers.py).

    Only what in_proj made and what out_proj reads; all between is computed again.
    """
    size = 4 if kind == "float32" else 2
    return size * sum(widths(c)) + max(0, size - frozen) * widths(c)[0]


def passing(c: dict) -> int:
    """Return the bytes per token that come and go in the backward.

    About six times a chunk's rows, and six times what in_proj made, in float32.
    """
    return 4 * 6 * (CHUNK * c["heads"] + sum(widths(c)))


def operations(c: dict) -> int:
    """Count the operations per token besides the projections'."""
    s, p = c["state_size"], c["head_size"]
    return 2 * CHUNK * (c["groups"] * s + c["heads"] * p) + 2 * 2 * c["heads"] * s * p


def scan(
    x: Tensor, g: Tensor, b: Tensor, c: Tensor, plan: ChunkPlan, state: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return S^T C (T, H, p), and the states (chunks, G, r, s, p) after each step.

    x (T, H, p) is what the tokens write, dt x; g (T, H) the logarithm of the decay, dt A; b and c
    are (T, G, s). `state` is what the chunks of the first step start from, None for zeros.
    """
    G = b.shape[1]
    b, c = (plan.chunked(t).transpose(1, 2)[:, :, None] for t in (b, c))  # (N, G, 1, n, s)
    x = plan.chunked(x).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # (N, G, r, n, p)
    g = plan.chunked(g).unflatten(2, (G, -1)).permute(0, 2, 3, 1)  # (N, G, r, n)
    total = g.cumsum(-1)  # log decay since the chunk's start
    # decay from token j to token i, 0 for j > i; of differences, since exp(-total) would overflow
    future = torch.ones(plan.size, plan.size, dtype=torch.bool, device=g.device).triu(1)
    decay = total[..., :, None] - total[..., None, :]
    decay = decay.masked_fill(future, -torch.inf).exp()  # (N, G, r, n, n)
    out = ((c @ b.mT) * decay) @ x
    to_end = (total[..., -1:] - total).exp()[..., None]  # decay from a token to the chunk's end
    written = (b.mT @ (to_end * x)).split(plan.steps)
    across = total[..., -1].exp()[..., None, None].split(plan.steps)  # decay over the whole chunk
    states: list[Tensor] = []
    starts = []
    for i, (kept, new) in enumerate(zip(across, written)):
        if i > 0:
            state = states[-1][plan.parents[i - 1]]
        starts.append(torch.zeros_like(new) if state is None else state.expand_as(new))
        states.append(new if state is None else kept * state + new)
    out = out + total.exp()[..., None] * (c @ torch.cat(starts))
    out = out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)  # (N n, H, p)
    return out[plan.place], states


class GatedNorm(nn.Module):
    """RMSNorm(x * silu(gate)) * weight in groups, or RMSNorm(x) * weight * silu(gate)."""

    def __init__(self, size: int, groups: int, eps: float, norm_first: bool):
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.norm_first = norm_first
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # (T, H p)
        x = x if self.norm_first else swiglu(gate, x)
        x = x.unflatten(1, (self.groups, -1))
        x = F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(1) * self.weight.to(x.dtype)
        return swiglu(gate, x) if self.norm_first else x


class Mamba(nn.Module):
    """Convolution over a few tokens, the states, a gated norm."""

    def __init__(self, config: Any):
        super().__init__()
        c = config.mixer
        C = config.hidden_size
        self.c = c
        self.widths = widths(c)
        inner, heads = self.widths[0], self.widths[-1]
        channels = sum(self.widths[1:4])
        self.act = ACTIVATIONS[c["act"]]
        self.conv1d = nn.Conv1d(
            channels, channels, c["width"], groups=channels, bias=c["conv_bias"])
        self.in_proj = nn.Linear(C, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = None
        if c["norm"]:
            self.norm = GatedNorm(inner, c["groups"], config.norm_eps, c["norm"] == "first")
        self.out_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        plan, memory = plans["mixer"]
        projected = self.in_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            if memory is None:
                # computed again in backward: what it would keep is many times as large
                out, *_ = checkpoint(
                    self.mix, projected, plan, None, use_reentrant=False, preserve_rng_state=False)
            else:
                out, tails, states = self.mix(projected, plan, memory)
                memory.keep(tails, [states[i][j] for i, j in plan.ends])
        return self.out_proj(out.to(x.dtype))

    def mix(
        self, projected: Tensor, plan: ChunkPlan, memory: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return what out_proj reads (T, H p), the convolution's last inputs of each span, and the
        states.

        `memory` (extras/decoder/generate.py) has what lies before the stream; None: nothing does.
        """
        c = self.c
        wide = torch.promote_types(projected.dtype, torch.float32)
        projected = projected.to(wide)
        if c["scales"]:
            sizes = zip(self.widths, c["scales"])
            projected = projected * torch.cat([projected.new_full((n,), s) for n, s in sizes])
        channels = sum(self.widths[1:4])
        gate, mixed, dt = projected.split([self.widths[0], channels, self.widths[-1]], 1)
        before, state = mixed.new_zeros(plan.tails.numel(), channels), None
        if memory is not None:
            shape = (c["groups"], c["heads"] // c["groups"], c["state_size"], c["head_size"])
            before, state = memory.starts(before, mixed.new_zeros(shape))
        tails = torch.cat([mixed, before])[plan.tails]
        mixed = Convolution.apply(mixed, self.conv1d.weight[:, 0].to(wide), before, plan)
        if self.conv1d.bias is not None:
            mixed = mixed + self.conv1d.bias.to(wide)
        x, b, c_ = self.act(mixed).split(self.widths[1:4], 1)
        x = x.unflatten(1, (c["heads"], -1))  # (T, H, p)
        b, c_ = (t.unflatten(1, (c["groups"], -1)) for t in (b, c_))  # (T, G, s)
        dt = F.softplus(dt + self.dt_bias.to(wide)).clamp(*c["dt_limit"])  # (T, H)
        g = -self.A_log.to(wide).exp() * dt
        out, states = scan(x * dt[..., None], g, b, c_, plan, state)
        out = (out + x * self.D.to(wide)[:, None]).flatten(1)
        out = swiglu(gate, out) if self.norm is None else self.norm(out, gate)
        return out * c.get("out_scale", 1.0), tails, states


# Falcon-H1's multipliers outside the mixer


def scale(block: Any, c: dict) -> None:
    """Scale what attention adds, the MLP's gate before its activation, and what the MLP adds."""
    block.self_attn.register_forward_hook(partial(scaled, factor=c["attention_out"]))
    gate, down = c["mlp_scales"]
    block.mlp.act = partial(scaled_act, act=block.mlp.act, before=gate, after=down)


def scaled(module: nn.Module, args: tuple, out: Tensor, factor: float) -> Tensor:
    return out * factor


def scaled_act(x: Tensor, act: Callable, before: float, after: float) -> Tensor:
    return act(x * before) * after
