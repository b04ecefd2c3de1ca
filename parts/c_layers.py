"""Norm, SwiGLU, rotation and the head's scores on a CPU by layers.c, which the machine's own C
compiler makes for its own processor when it is first needed, in a second or two. A leaf of
kernels.py and head.py.

Where there is no compiler, or OpenMP is another than PyTorch's, `library` is None, and the plain
forms of kernels.py compute the same.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parts.output import cache_directory

SOURCE = Path(__file__).with_name("layers.c")
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
BLOCK = 64  # rows whose gradients of a norm's weight are added first, in any number of threads
LETTERS = {torch.bfloat16: "b", torch.float32: "f"}


@lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions, from the cache or made now; None where that cannot be."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    try:
        made_of = [SOURCE.read_text("utf-8"), compiler, *OPTIONS, processor()]
        digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
        path = cache_directory(None) / f"layers-{digest}.so"
        if not path.exists():
            make(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # a home that is read-only, say
        return None


def processor() -> str:
    """Return what tells one kind of processor from another: a home may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join([platform.machine(), *[x for x in lines if x.startswith("flags")][:1]])


def make(compiler: str, path: Path) -> None:
    """Compile into `path`. Linked without OpenMP, so that it takes the threads that PyTorch has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        compiled, linked = f"{scratch}/layers.o", f"{scratch}/layers.so"
        run = partial(subprocess.run, check=True, capture_output=True)
        run([compiler, *OPTIONS, "-c", str(SOURCE), "-o", compiled])
        run([compiler, "-shared", compiled, "-o", linked])
        os.replace(linked, path)  # at once: other ranks may be at it too


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether layers.c computes beside products of this type.

    Beside bfloat16's alone: with float32 others compare digits, and a compiler shall change none.
    """
    return dtype == torch.bfloat16 and device.type == "cpu" and library() is not None


def computes(dtype: torch.dtype, x: Tensor, *wide: Tensor) -> bool:
    """Tell whether layers.c computes this from x, of a type that it knows, and `wide`, float32."""
    known = x.dtype in LETTERS and all(w.dtype == torch.float32 for w in wide)
    return known and serves(dtype, x.device)


def rows_of(x: Tensor) -> Tensor:
    """Return x as (R, C), without a copy where its rows lie at equal distances."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function of layers.c, whose last argument is the number of threads."""
    given = [as_c(argument) for argument in arguments]
    getattr(library(), name)(*given, c_int(torch.get_num_threads()))


def as_c(argument: Tensor | int | float) -> Any:
    """Return a tensor as its address, a whole number as int64, another as float."""
    if isinstance(argument, Tensor):
        return c_void_p(argument.data_ptr())
    return c_float(argument) if isinstance(argument, float) else c_int64(argument)


def score_chunk(logits: Tensor, targets: Tensor, how: Any, slopes: bool) -> list[list[Tensor]]:
    """As head.score_chunk."""
    fields = [torch.empty(len(targets), dtype=d) for d in (*[torch.float32] * 4, torch.bool)]
    call("score", logits, targets.contiguous(), *fields, *logits.shape,
         int(how.statistics), int(slopes), float(how.softcap or 0))
    return [fields if how.statistics else fields[:1]]


class RMSNorm(torch.autograd.Function):
    """As kernels.RMSNorm, rounded to bfloat16; x may be float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, w = rows_of(x), weight.contiguous()
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        rstd = torch.empty(len(rows))
        call(f"norm_{LETTERS[x.dtype]}", rows, w, y, rstd, *rows.shape, rows.stride(0), eps)
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, rstd = ctx.saved_tensors
        rows, grad = rows_of(x), grad.contiguous()
        dx, dw = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(w)
        sums = torch.empty(-(-len(rows) // BLOCK), len(w))
        call(f"norm_backward_{LETTERS[x.dtype]}", grad, rows, w, rstd, dx, dw, sums, BLOCK,
             *rows.shape, rows.stride(0))
        return dx, dw, None


class SwiGLU(torch.autograd.Function):
    """As kernels.SwiGLU; gate and up may be halves of one tensor."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        a, b = same_rows(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        call("swiglu", a, b, y, *a.shape, a.stride(0))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = same_rows(*ctx.saved_tensors)
        da, db = (torch.empty(grad.shape, dtype=grad.dtype) for _ in range(2))
        call("swiglu_backward", grad.contiguous(), a, b, da, db, *a.shape, a.stride(0))
        return da, db


def same_rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    a, b = rows_of(gate), rows_of(up)
    return (a, b) if a.stride() == b.stride() else (a.contiguous(), b.contiguous())


class Rotation(torch.autograd.Function):
    """As kernels.Rotation of halves, from x (T, H, D) and tables (T, 1, D) to float32."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn("rotation", x, cos, sin, 1.0, torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn("rotation_backward", grad, cos, sin, -1.0, torch.bfloat16), None, None


def turn(
    name: str, x: Tensor, cos: Tensor, sin: Tensor, sign: float, dtype: torch.dtype,
) -> Tensor:
    T, H, D = x.shape
    x = x if x.stride()[1:] == (D, 1) else x.contiguous()
    y = torch.empty(x.shape, dtype=dtype)
    call(name, x, cos, sin, y, T, H, D, x.stride(0), sign)
    return y
