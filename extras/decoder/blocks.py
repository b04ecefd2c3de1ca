"""Options of how a decoder computes: compiled, with less kept for the backward pass, on a part of a
stream."""

import torch

from extras.decoder.compiled import compile_blocks
from extras.decoder.memory import save_memory
from extras.run.context import join
from model import Decoder
from parts.config import DPOConfig


def change_blocks(model: Decoder, c: DPOConfig, device: torch.device) -> None:
    """Change a model in place; names of modules and parameters stay.

    Raises ValueError for what this model cannot do, or what this device gains nothing from.
    """
    join(model, c.context_parallel_size)
    if c.gradient_checkpointing == "selective" or c.activation_offloading:
        save_memory(model, c.gradient_checkpointing, c.activation_offloading, device)
    if c.torch_compile:
        compile_blocks(model)
