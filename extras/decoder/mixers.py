"""Token mixers whose state goes from token to token, in place of attention or beside it; and
attention of another kind in some layers (extras/decoder/chunked.py).

`config.mixer` says which: its "kind" names a file here, "recurs" and "attends" tell of each layer
whether it has a recurrent mixer and whether it has attention. A recurrent one's file offers

    NAME                         of its module in a block
    make(config)                 the module, called as attention is: x (T, C), tables, plans
    saved(mixer, kind, frozen)   bytes per token that a layer keeps for its backward, in the number
                                 type `kind`; a frozen linear layer keeps `frozen` bytes a unit less
    passing(mixer)               bytes per token that come and go in its backward
    operations(mixer)            floating-point operations per token, besides the projections'

and reads plans["mixer"]: how the stream is cut into chunks, and what lies before the stream.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from extras.decoder import gated_delta, mamba
from extras.decoder.chunked import plan_chunked, tuned
from extras.decoder.chunks import plan_chunks

KINDS: dict[str, Any] = {"gated_delta": gated_delta, "mamba": mamba}


def recurs(config: Any) -> tuple[bool, ...]:
    """Tell of each layer whether it keeps a state of each sequence."""
    return config.mixer["recurs"] if config.mixer else (False,) * config.num_hidden_layers


def attends(config: Any) -> tuple[bool, ...]:
    """Tell of each layer whether it has attention."""
    return config.mixer["attends"] if config.mixer else (True,) * config.num_hidden_layers


def remix(block: Any, config: Any, layer: int) -> None:
    """Replace a block's attention by the mixers of its layer, or add them beside it."""
    names = ("self_attn",) if attends(config)[layer] else ()
    if not names:
        del block.self_attn
    if recurs(config)[layer]:
        kind = KINDS[config.mixer["kind"]]
        block.add_module(kind.NAME, kind.make(config))
        names += (kind.NAME,)
    block.mixers = names
    if config.mixer.get("mlp_scales"):
        mamba.scale(block, config.mixer)


def plan_mixer(
    make: Callable, config: Any, spans: Tensor, position_ids: Tensor, dtype: torch.dtype,
) -> dict:
    """Return the plans of a stream without a cache; `make` is model.plan_attention."""
    plain = replace(config, mixer=None)
    attention = partial(make, position_ids=position_ids, dtype=dtype)
    if config.mixer["kind"] == "chunked":
        return tuned(config, plan_chunked(attention, config, spans), position_ids)
    chunks = plan_chunks(spans, config.mixer["width"], position_ids.device)
    return attention(plain, spans) | {"mixer": (chunks, None)}
