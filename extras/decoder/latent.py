"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1): keys and values of all
heads are made from one short vector of each token.

    c, k_rope = x W_kva          the latent vector (T, latent), and a key for all heads (T, rope)
    k_nope, v = norm(c) W_kvb    of each head (T, H, nope), (T, H, value)
    q = norm(x W_qa) W_qb        of each head (T, H, nope + rope); or x W_q

The rope part of q and k_rope are rotated, and a head's key is k_nope beside k_rope. What follows is
ordinary attention over spans. Where queries and values differ in size, the smaller is padded with
zeros: they add nothing to a score, and what they add to the values is cut off again. So the same
plans and the same flash kernel compute it as for any other model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.kernels import rotation

NORM_EPS = 1e-6  # of the two norms here, whatever config.json says of the others


class LatentAttention(nn.Module):
    """Called as model.Attention is; `make_norm(size, config)` makes an RMSNorm."""

    def __init__(self, config: Any, make_norm: Callable[[int, Any], nn.Module]):
        super().__init__()
        with_eps = replace(config, norm_eps=NORM_EPS)
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim  # as it is computed, the larger one
        sizes = config.latent
        self.nope, self.rope, self.value = sizes["nope"], sizes["rope"], sizes["value"]
        self.latent = sizes["latent"]
        C = config.hidden_size
        q_size = self.heads * (self.nope + self.rope)
        self.q_rank = sizes["query"]
        if self.q_rank is None:
            self.q_proj = nn.Linear(C, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(C, self.q_rank, bias=config.qkv_bias)
            self.q_a_layernorm = make_norm(self.q_rank, with_eps)
            self.q_b_proj = nn.Linear(self.q_rank, q_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(C, self.latent + self.rope, bias=config.qkv_bias)
        self.kv_a_layernorm = make_norm(self.latent, with_eps)
        self.kv_b_proj = nn.Linear(
            self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, C, bias=config.o_bias)

    def forward(self, x: Tensor, tables: dict, plans: dict) -> Tensor:  # (T, C)
        q, k, v = (self.padded(t) for t in self.project(x, *tables["full_attention"]))
        out = plans[None](q, k, v)[..., : self.value]  # (T, H, value)
        return self.o_proj(out.flatten(1))

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k (T, H, nope + rope), v (T, H, value)."""
        H = self.heads
        if self.q_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(-1, H, self.nope + self.rope).split([self.nope, self.rope], -1)
        c, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c)).view(-1, H, self.nope + self.value)
        k_nope, v = kv.split([self.nope, self.value], -1)
        q_rope = rotation(q_rope, cos, sin, interleaved)
        k_rope = rotation(k_rope[:, None], cos, sin, interleaved).expand(-1, H, -1)
        q = torch.cat([q_nope.to(q_rope.dtype), q_rope], -1)
        return q, torch.cat([k_nope.to(k_rope.dtype), k_rope], -1), v

    def padded(self, x: Tensor) -> Tensor:  # (T, H, head_dim)
        """Pad each head with zeros."""
        missing = self.head_dim - x.shape[-1]
        return F.pad(x, (0, missing)) if missing else x
