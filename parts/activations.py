"""What a block keeps from its forward for its backward: everything, or only its input.

Between the two, and elsewhere than on the GPU: extras/decoder/memory.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def keep_all(layer: nn.Module, *args: Any) -> Any:
    """Run a layer: PyTorch keeps what the backward pass needs."""
    return layer(*args)


def recompute(layer: nn.Module, *args: Any) -> Any:
    """Run a layer, keep its inputs alone, and run it once more in the backward pass."""
    if not torch.is_grad_enabled():
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False)


def chosen(c: Any) -> Callable:
    """Return the way to run a block that the flags ask for."""
    return recompute if c.gradient_checkpointing is True else keep_all


def changes_blocks(c: Any) -> bool:
    """Tell whether the flags ask for what extras/decoder/blocks.py does."""
    is_special = c.gradient_checkpointing == "selective" or c.activation_offloading
    return is_special or c.torch_compile or c.context_parallel_size > 1
