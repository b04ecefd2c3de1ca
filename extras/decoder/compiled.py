"""Norms and MLPs through torch.compile, for --torch_compile: fuse what lies between the products.

Attention is left alone: its calls differ from stream to stream, and each new plan would be a new
graph. A layer is compiled once for all lengths and all layers, with and without gradients. On a
CPU this needs a C++ compiler.
"""

from torch import nn

from model import MLP, Decoder, Norm


def compile_blocks(model: Decoder, backend: str = "inductor") -> None:
    """Compile in place; names of modules and parameters do not change."""
    for module in model.model.layers.modules():
        if isinstance(module, (Norm, MLP)):
            nn.Module.compile(module, backend=backend, dynamic=True)
