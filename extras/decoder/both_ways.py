"""Attention in which the tokens of an image see each other (Gemma); all others see what is before.

In layers with a window, an image's tokens see those after them however far, and those before them
within the window, as in transformers. In Gemma 4 only those layers do so.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

from model import Call, CallPlan, ModelConfig, choose_attention, plan_calls


class BothWays(NamedTuple):
    """Plans a stream with images; model.Stack asks it as it asks a cache.

    Flash attention has no mask of this kind, so the plan is that of calls with masks everywhere.
    """

    runs: list[list[int]]  # (start, end) in the stream of each image's tokens
    everywhere: bool = True  # in layers without a window too

    def plan(
        self, config: ModelConfig, spans: Tensor, position_ids: Tensor, dtype: torch.dtype,
    ) -> list[dict[int | None, Callable]]:
        """Return {window: plan} of each layer."""
        last_seen = position_ids.clone()
        for start, end in self.runs:
            last_seen[start:end] = position_ids[end - 1]
        attention = choose_attention(config)
        plans: dict[int | None, Callable] = {}
        for window in set(config.windows):
            calls = plan_calls(spans, position_ids, window)
            if self.everywhere or window is not None:
                calls = [self.seeing(call, position_ids, last_seen, window) for call in calls]
            plans[window] = CallPlan(calls, attention)
        return [plans] * config.num_hidden_layers

    def seeing(
        self, call: Call, position_ids: Tensor, last_seen: Tensor, window: int | None,
    ) -> Call:
        """Return a call whose queries see up to the end of their image, if they are of one."""
        if not any(call.start < end and start < call.end for start, end in self.runs):
            return call
        keys = torch.cat([position_ids[a:b] for a, b in call.keys])
        queries = slice(call.start, call.end)
        mask = keys <= last_seen[queries, None]
        if window is not None:
            mask &= keys > position_ids[queries, None] - window
        return call._replace(mask=mask)
