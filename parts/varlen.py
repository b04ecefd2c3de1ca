"""Attention over spans in one call of PyTorch's flash kernel, on CUDA in bfloat16 or float16."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class VarlenPlan(NamedTuple):
    """Attention in one call of the flash kernel; keys are gathered per span as prefix + self."""

    key_index: Tensor  # (sum of prefix + self lengths,) stream positions
    cu_queries: Tensor  # (S + 1,) int32
    cu_keys: Tensor  # (S + 1,) int32
    max_queries: int
    max_keys: int
    scale: float
    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (T, H, D)
        from torch.nn.attention.varlen import varlen_attn  # imports PyTorch's compiler: seconds

        q = q.to(v.dtype)
        k = k.to(v.dtype)[self.key_index]
        v = v[self.key_index]
        left = -1 if self.window is None else self.window - 1
        return varlen_attn(
            q, k, v, self.cu_queries, self.cu_keys, self.max_queries, self.max_keys,
            scale=self.scale, window_size=(left, 0), enable_gqa=True)


def plan_varlen(
    config: Any, spans: Tensor, device: torch.device, queries: Tensor | None = None,
) -> dict[int | None, VarlenPlan]:
    """Return {window: plan}.

    The queries are the last `queries` (S,) tokens of each span, by default all.
    """
    start, end, prefix_start, prefix_end = spans.long().unbind(1)
    keys = end - start + prefix_end - prefix_start
    queries = end - start if queries is None else queries
    index = []
    for a, b, c, d in spans.tolist():
        index += [torch.arange(c, d), torch.arange(a, b)]
    cumulative = lambda n: F.pad(n.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    plan = VarlenPlan(
        key_index=torch.cat(index).to(device, non_blocking=True), cu_queries=cumulative(queries),
        cu_keys=cumulative(keys), max_queries=int(queries.max()), max_keys=int(keys.max()),
        scale=config.attention_scale)
    return {window: plan._replace(window=window) for window in config.windows}


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int,
              softcap: float | None = None) -> bool:
    """Tell whether the flash kernel can compute attention of this kind on this device."""
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            and head_dim % 8 == 0 and head_dim <= 256
            and dtype in (torch.bfloat16, torch.float16) and softcap is None)
