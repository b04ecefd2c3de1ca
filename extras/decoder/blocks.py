"""Options of how the decoder's blocks compute: compiled, with less kept for the backward pass."""

import torch

from extras.decoder.compiled import compile_blocks
from extras.decoder.memory import save_memory
from model import Decoder
from parts import activations
from parts.config import DPOConfig


def change_blocks(model: Decoder, c: DPOConfig, device: torch.device) -> None:
    """Change a model's blocks in place; names of modules and parameters stay.

    Raises ValueError for what this device gains nothing from.
    """
    if activations.are_special(c):
        save_memory(model, c.gradient_checkpointing, c.activation_offloading, device)
    if c.torch_compile:
        compile_blocks(model)
