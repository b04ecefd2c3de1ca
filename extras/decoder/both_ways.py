"""Attention in which the tokens of an image see each other (Gemma); all others see what is before.

In layers with a window, an image's tokens see those after them however far, and those before them
within the window; in Gemma 4 12B ("whole") those of the image however far. In other sizes of
Gemma 4 ("windows") only layers with a window let them. All of it is as in transformers.
"""

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from model import Call, CallPlan, ModelConfig, choose_attention, plan_calls


class BothWays(NamedTuple):
    """Plans a stream with images; model.Stack asks it as it asks a cache.

    Flash attention has no mask of this kind, so the plan is that of calls with masks everywhere.
    """

    runs: list[list[int]]  # (start, end) in the stream of each image's tokens
    how: str = "everywhere"  # parts/vision_configs.py: both_ways
    cache: Any = None  # generation's, which keeps the keys and values of a prompt

    def plan(
        self, config: ModelConfig, spans: Tensor, position_ids: Tensor, dtype: torch.dtype,
    ) -> list[dict[int | None, Callable]]:
        """Return {window: plan} of each layer. With a cache the stream is one prompt, whole."""
        if self.cache is not None:
            alone = torch.tensor([[0, len(position_ids), 0, 0]])
            own = self._replace(cache=None).plan(config, alone, position_ids, dtype)
            return self.cache.plan(config, spans, position_ids, dtype, own[0])
        seen = torch.stack([position_ids, position_ids])  # (2, T): first and last of an image
        for start, end in self.runs:
            seen[0, start:end] = position_ids[start]
            seen[1, start:end] = position_ids[end - 1]
        attention = choose_attention(config)
        plans: dict[int | None, Callable] = {}
        for window in set(config.windows):
            calls = plan_calls(spans, position_ids, window)
            if self.how != "windows" or window is not None:
                calls = [self.seeing(call, position_ids, seen, window) for call in calls]
            plans[window] = CallPlan(calls, attention)
        return [plans] * config.num_hidden_layers

    def seeing(
        self, call: Call, position_ids: Tensor, seen: Tensor, window: int | None,
    ) -> Call:
        """Return a call whose queries see up to the end of their image, if they are of one."""
        if not any(call.start < end and start < call.end for start, end in self.runs):
            return call
        keys = torch.cat([position_ids[a:b] for a, b in call.keys])
        queries = slice(call.start, call.end)
        first, last = seen[:, queries, None]
        mask = keys <= last
        if window is not None:
            near = keys > position_ids[queries, None] - window
            mask &= near | (keys >= first) if self.how == "whole" else near
        return call._replace(mask=mask)
