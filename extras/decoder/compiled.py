"""Norms and MLPs through torch.compile, for --torch_compile: what lies between the matrix products becomes one kernel.

Attention stays as it is: its calls differ from stream to stream, and each new plan would be a new graph. A layer is
compiled once for all lengths and all layers alike, with gradients and without. On a CPU it needs a C++ compiler.
"""

from torch import nn

from model import MLP, Decoder, Norm


def compile_blocks(model: Decoder, backend: str = "inductor") -> None:
    """In place; names of modules and parameters stay."""
    for module in model.model.layers.modules():
        if isinstance(module, (Norm, MLP)):
            nn.Module.compile(module, backend=backend, dynamic=True)
