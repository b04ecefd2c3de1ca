"""QLoRA's base model (arXiv:2305.14314): weights in 4 bits, dequantized for one product at a time.

A block of 64 values shares its largest magnitude, absmax. A value is stored as the number of the
nearest of 16 levels times absmax. NF4's levels are quantiles of a normal distribution, FP4's those
of a 4-bit float. Nested ("double") quantization stores the absmax values themselves, less their
mean, in 8 bits: 4.13 instead of 4.5 bits a weight.

Quantizing float32, float16 and bfloat16 weights equals the CPU build of bitsandbytes 0.50 bit for
bit. Its CUDA kernels round otherwise in a matrix's last block where that is incomplete, in FP4
(thresholds of 6 digits; the sign of a zero), in blocks of zeros, and in nested codes: CUDA takes
the nearest of 256 levels, the CPU build that of one of 65536 equal bins, so 1 code in 600 differs
by one. Reading files is exact, whichever wrote them.

Dequantizing a weight costs memory traffic that does not depend on the number of tokens: on one CPU
core as much as the product itself with some 50 tokens (a weight of 1536 x 576) to 200 (4096 x
4096). Long streams hide it.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from extras.decoder.moe import Experts
from model import Decoder, read_config
from parts.kernels import compute_dtype as usual_dtype
from parts.kernels import takes_triton
from parts.names import carried_names, find_places
from parts.weights import Checkpoint, Reader, check_tensors, read_tensors, remember, write_configs

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)
# In units of 1/12; the bits are sign, exponent, mantissa.
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
# Code numbers in the order of their levels; of FP4's two zeros, number 0 takes what is not above 0.
ORDER = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
NESTED_BLOCK = 256
WIDE = ("float32", "float16", "bfloat16")  # types that a weight may have had
TINY = 1e-38  # the smallest absmax that is divided by
# Values dequantized at once: what a CPU's cache holds; on a GPU more, for few kernel launches.
CPU_CHUNK = 2**18
GPU_CHUNK = 2**24


class Quantized(NamedTuple):
    """A weight in 4 bits: bitsandbytes' packed weight and QuantState."""

    packed: Tensor  # (ceil(values / 2),) uint8; the first of two values is the high half
    absmax: Tensor  # (blocks,) float32; nested: uint8
    code: Tensor  # (16,) float32: the levels
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before it was quantized
    quant_type: str
    block_size: int
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) float32
    nested_code: Tensor | None = None  # (256,) float32
    nested_offset: Tensor | None = None  # () float32


TENSORS = ("packed", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")
# Modules that hold weights in 4 bits -> the parameters that they replace.
STACKS = {"stored": "weight", "gate_up": "gate_up_proj", "down": "down_proj"}


def on_device(state: Quantized, device: str | torch.device) -> Quantized:
    tensors = {name: getattr(state, name) for name in TENSORS}
    return state._replace(**{n: t.to(device) for n, t in tensors.items() if t is not None})


# Quantization


def quantize(
    tensor: Tensor, quant_type: str = "nf4", block_size: int = 64, nested: bool = False,
) -> Quantized:
    """Store each value as the nearest level times the absmax of its block.

    Blocks run through the flattened tensor. A value half-way between two levels takes the lower.
    Raises ValueError for infinite and not-a-number values.
    """
    if quant_type not in ORDER:
        raise ValueError(f"quantization type {quant_type!r}; known are nf4 and fp4")
    device = tensor.device
    if quant_type == "nf4":
        code = torch.tensor(NF4, device=device)
    else:
        code = torch.tensor(FP4, device=device) / 12
    order = torch.tensor(ORDER[quant_type], device=device)
    chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK  # multiples of every block size
    values = tensor.detach().reshape(-1)
    parts = [quantize_blocks(part, code, order, block_size) for part in values.split(chunk)]
    packed, absmax = (torch.cat(column) for column in zip(*parts))
    if not (tensor.is_meta or torch.isfinite(absmax.mean() if nested else absmax.amax())):
        raise ValueError("a weight to be quantized has infinite, not-a-number or huge values")
    state = Quantized(
        packed=packed, absmax=absmax, code=code, shape=tuple(tensor.shape), dtype=tensor.dtype,
        quant_type=quant_type, block_size=block_size)
    return nest(state) if nested else state


def quantize_blocks(
    values: Tensor, code: Tensor, order: Tensor, block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return packed and absmax of values (n,).

    As in bitsandbytes, an incomplete last block is divided by its absmax, while the others are
    multiplied by the reciprocal.
    """
    short = -len(values) % block_size
    blocks = F.pad(values.float(), (0, short)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    if short:
        absmax[-1].clamp_(min=TINY)
    scaled = blocks * (1 / absmax.clamp(min=TINY))[:, None]
    if short:
        scaled[-1] = blocks[-1] / absmax[-1]
    # what is not finite is reported later, but must not become an index here
    scaled = scaled.clamp_(-1, 1).nan_to_num_(0).view(-1)
    levels = code[order]
    index = count_below(scaled, (levels[1:] + levels[:-1]) / 2)
    number = order.to(torch.uint8).index_select(0, index)[: len(values) + len(values) % 2]
    return number[0::2] << 4 | number[1::2], absmax


def count_below(x: Tensor, thresholds: Tensor) -> Tensor:  # (n,) int32
    """Count the sorted thresholds below each x in [-1, 1].

    Equals torch.bucketize, and is many times as fast on a CPU. Of 2049 bins each holds at most one
    threshold, and rounding keeps order: a value in an earlier bin than a threshold is below it, in
    a later bin above it, and only in the same bin are the two compared.
    """
    bins, place = (((t + 1) * 1024).int() for t in (x, thresholds))
    numbers = torch.arange(2049, device=x.device, dtype=torch.int32)
    earlier = torch.bucketize(numbers, place, out_int32=True)
    at = torch.full((2049,), torch.inf, device=x.device).scatter(0, place.long(), thresholds)
    return earlier.index_select(0, bins) + (x > at.index_select(0, bins))


def nest(state: Quantized) -> Quantized:
    """Return the same with absmax - mean(absmax) in 8 bits.

    Computed on the CPU: a GPU sums in another order, and a mean that is rounded otherwise changes
    codes. All before this is exact or rounded once, and has the same bits on every device.
    """
    device = state.absmax.device
    wide = state.absmax if device.type == "meta" else state.absmax.cpu()
    offset = wide.mean()
    code = dynamic_levels().to(wide.device)
    absmax, nested_absmax = quantize_8bit(wide - offset, code)
    return on_device(state._replace(
        absmax=absmax, nested_absmax=nested_absmax, nested_code=code, nested_offset=offset), device)


def dynamic_levels() -> Tensor:  # (256,)
    """Return the levels of the 8-bit "dynamic" type (arXiv:1511.04561).

    A sign, zeros that count the power of ten, then a linear fraction.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(found))


def quantize_8bit(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (n,) uint8 and the absmax of blocks of 256.

    A value takes the level nearest to the middle of its bin, one of 65536, as in bitsandbytes.
    """
    blocks = F.pad(values, (0, -len(values) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp(-1, 1)
    # in float64, so that it is rounded once, as by a fused multiply-add
    bins = ((1 + scaled).double() * 0.5 * 65535 + 0.5).float()
    middles = -1 + 2 * torch.arange(65536, device=values.device, dtype=torch.float32) / 65535
    nearest = torch.bucketize(middles, 0.5 * (code[1:] + code[:-1]), out_int32=True)
    # 0/0, where all absmax are equal: code 0, of absmax 0
    codes = nearest.to(torch.uint8)[bins.nan_to_num(0).long()]
    return codes.view(-1)[: len(values)], absmax


# And back


def block_scales(state: Quantized) -> Tensor:  # (blocks,) float32
    if state.nested_absmax is None:
        return state.absmax
    codes = state.nested_code[state.absmax.int()]
    blocks = F.pad(codes, (0, -len(codes) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scales = blocks * state.nested_absmax[:, None]
    return scales.view(-1)[: len(codes)] + state.nested_offset


def dequantize(state: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """level * absmax in float32, rounded to `dtype`, by default that of the original weight."""
    size = state.block_size
    device = state.packed.device
    if takes_triton(device):
        from extras.models import triton_nf4

        return triton_nf4.dequantize(state.packed, block_scales(state), state.code, size,
                                     state.shape, dtype or state.dtype)
    # a byte is the number of a pair of levels, which is copied as one 64-bit word
    pairs = torch.cartesian_prod(state.code, state.code).view(torch.int64).squeeze(1)  # (256,)
    scales = block_scales(state)
    packed = F.pad(state.packed, (0, len(scales) * size // 2 - len(state.packed)))
    wide = torch.empty(len(scales), size, dtype=dtype or state.dtype, device=device)
    count = (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // size
    chunks = zip(wide.split(count), packed.split(count * size // 2), scales.split(count))
    for rows, numbers, scale in chunks:
        values = pairs.index_select(0, numbers.int()).view(torch.float32).view(-1, size)
        rows.copy_(values.mul_(scale[:, None]))
    return wide.view(-1)[: torch.Size(state.shape).numel()].view(state.shape)


def requantize(state: Quantized, weight: Tensor) -> Quantized:
    """Quantize `weight` in the format of `state`."""
    is_nested = state.nested_absmax is not None
    return quantize(weight.to(state.dtype), state.quant_type, state.block_size, is_nested)


# bitsandbytes' tensors: `weight`, and beside it weight.absmax, weight.quant_map,
# weight.quant_state.bitsandbytes__nf4 ...

FILE_NAMES = {
    "absmax": "absmax",
    "code": "quant_map",
    "nested_absmax": "nested_absmax",
    "nested_code": "nested_quant_map"}
BESIDE = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|"
    r"quant_state\.bitsandbytes__(?:nf4|fp4))$")


def to_bnb_tensors(name: str, state: Quantized) -> dict[str, Tensor]:
    """Return a file's tensors for the weight `name` ("model.layers.0.self_attn.q_proj.weight")."""
    settings: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.block_size,
        "dtype": dtype_name(state.dtype),
        "shape": list(state.shape)}
    if state.nested_absmax is not None:
        settings |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": state.nested_offset.item()}
    tensors = {f"{name}.{theirs}": getattr(state, ours) for ours, theirs in FILE_NAMES.items()}
    encoded = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    tensors[name] = state.packed[:, None]
    tensors[f"{name}.quant_state.bitsandbytes__{state.quant_type}"] = encoded
    return {n: t for n, t in tensors.items() if t is not None}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_bnb_tensors(name: str, tensors: dict[str, Tensor]) -> Quantized:
    """Make the weight `name` from its tensor and those beside it.

    Raises ValueError where these are incomplete or do not fit together.
    """
    needed = {"absmax", "quant_map"}
    beside = {BESIDE.match(n)[2] for n in tensors if n != name}
    key = next((b for b in beside if b.startswith("quant_state")), None)
    s = {} if key is None else read_state(f"{name}.{key}", tensors[f"{name}.{key}"])
    if "nested_offset" in s:
        needed |= {"nested_absmax", "nested_quant_map"}
    is_known = s.get("quant_type") in ORDER and s.get("nested_blocksize", 256) == NESTED_BLOCK
    if beside != needed | {key} or not is_known:
        raise ValueError(
            f"{name}: not a 4-bit weight that is understood: beside it {sorted(beside)}, settings "
            f"{s}")
    # another bnb_4bit_quant_storage is only a view of the same bytes
    packed = tensors[name].contiguous().view(torch.uint8).reshape(-1)
    given = {ours: tensors.get(f"{name}.{theirs}") for ours, theirs in FILE_NAMES.items()}
    offset = None
    if "nested_offset" in s:
        offset = torch.tensor(s["nested_offset"], device=packed.device)
    state = Quantized(
        packed=packed, shape=tuple(s["shape"]), dtype=getattr(torch, s["dtype"]),
        quant_type=s["quant_type"], block_size=s["blocksize"], nested_offset=offset, **given)
    check_sizes(name, state)
    return state


def read_state(name: str, encoded: Tensor) -> dict:
    """Return a weight's settings, JSON in a tensor of bytes. Raises ValueError for anything else."""
    try:
        s = json.loads(bytes(encoded.tolist()))
        sizes = [s["blocksize"], *s["shape"]]
        is_whole = all(type(size) is int and size > 0 for size in sizes)
        is_known = is_whole and len(sizes) == 3 and s["dtype"] in WIDE
    except (ValueError, TypeError, KeyError, RecursionError):
        is_known = False
    if not is_known:
        raise ValueError(
            f"{name}: not the settings of a 4-bit weight (JSON with quant_type, blocksize, shape "
            "and dtype); download the file again")
    return s


def check_sizes(name: str, state: Quantized) -> None:
    """Raise ValueError for a tensor of `state` whose size or type does not follow from the rest."""
    count = torch.Size(state.shape).numel()
    blocks = -(-count // state.block_size)
    sizes = {
        "packed": -(-count // 2),
        "absmax": blocks,
        "code": 16,
        "nested_absmax": -(-blocks // NESTED_BLOCK),
        "nested_code": 256}
    for field, size in sizes.items():
        tensor = getattr(state, field)
        if tensor is not None and tensor.numel() != size:
            raise ValueError(
                f"{name}: {field} has {tensor.numel()} values; a weight of shape {state.shape} in "
                f"blocks of {state.block_size} needs {size}")
        is_byte = field == "packed" or field == "absmax" and state.nested_absmax is not None
        is_right = tensor is None or (
            tensor.dtype == torch.uint8 if is_byte else tensor.is_floating_point())
        if not is_right:
            wanted = "uint8" if is_byte else "a type of floats"
            raise ValueError(f"{name}: {field} is {dtype_name(tensor.dtype)}; expected {wanted}")


# Modules


class Stack4bit(nn.Module):
    """Quantized weights of one shape, in buffers that move with the module.

    Floats are stored as the integers of the same bits: `module.to(torch.bfloat16)` must not round
    an absmax.
    """

    def __init__(self, states: list[Quantized]):
        super().__init__()
        self.count = len(states)
        self.kind = states[0]._replace(**dict.fromkeys(TENSORS))
        self.shapes: dict[str, torch.Size] = {}  # of the stacked tensors
        for field in TENSORS:
            stacked = None
            if getattr(states[0], field) is not None:
                stacked = torch.stack([getattr(s, field) for s in states])
                if stacked.dtype != torch.uint8:
                    stacked = stacked.float().view(torch.int32)
                self.shapes[field] = stacked.shape
            self.register_buffer(field, stacked)

    def flatten(self) -> None:
        """Make the buffers parameters of one dimension, which --fsdp gathers block by block, and
        which it can cut anywhere."""
        for field in self.shapes:
            flat = nn.Parameter(self._buffers.pop(field).flatten(), requires_grad=False)
            self.register_parameter(field, flat)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Quantized:
        fields = {}
        for field in TENSORS:
            rows = getattr(self, field)
            if rows is not None:
                row = rows.view(self.shapes[field])[i]
                fields[field] = row if row.dtype == torch.uint8 else row.view(torch.float32)
        return self.kind._replace(**fields)


class Matmul4bit(torch.autograd.Function):
    """x W^T + b. W is dequantized in forward and again in backward; the graph keeps only 4 bits."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, state: Quantized) -> Tensor:
        ctx.state = state
        return F.linear(x, dequantize(state, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ dequantize(ctx.state, grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None


def linear4bit(
    x: Tensor, state: Quantized, bias: Tensor | None, compute_dtype: torch.dtype | None,
) -> Tensor:
    """x W^T + b in `compute_dtype`, by default the type nn.Linear would compute in.

    The result is in nn.Linear's type.
    """
    usual = usual_dtype(x)
    dtype = compute_dtype or usual
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return Matmul4bit.apply(x.to(dtype), bias, state).to(usual)


class Linear4bit(nn.Linear):
    """A frozen nn.Linear with its weight in 4 bits, which LoRA wraps like any other.

    `weight` is dequantized on every access.
    """

    def __init__(
        self, state: Quantized, bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight in full
        self.out_features, self.in_features = state.shape
        self.stored = Stack4bit([state])
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)

    @property
    def state(self) -> Quantized:
        return self.stored[0]

    @property
    def weight(self) -> Tensor:
        return dequantize(self.state, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear4bit(x, self.state, self.bias, self.compute_dtype)


class Experts4bit(nn.Module):
    """Experts of extras/decoder/moe.py, with every matrix quantized by itself.

    One expert at a time is dequantized.
    """

    def __init__(
        self, gate_up: list[Quantized], down: list[Quantized], act: Callable,
        compute_dtype: torch.dtype | None = None, gated: bool = True,
    ):
        super().__init__()
        self.gated = gated
        self.first = "gate_up_proj" if gated else "up_proj"
        self.gate_up = Stack4bit(gate_up)  # gate 0, up 0, gate 1, up 1 ..., or the ups alone
        self.down = Stack4bit(down)
        self.act = act
        self.compute_dtype = compute_dtype

    def linear(self, x: Tensor, state: Quantized) -> Tensor:
        return linear4bit(x, state, None, self.compute_dtype)

    def expert(self, number: int, x: Tensor) -> Tensor:
        if not self.gated:
            return self.linear(self.act(self.linear(x, self.gate_up[number])), self.down[number])
        gate = self.linear(x, self.gate_up[2 * number])
        up = self.linear(x, self.gate_up[2 * number + 1])
        return self.linear(self.act(gate) * up, self.down[number])

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert to its rows of x: the first counts[0] are expert 0's, and so on."""
        rows_of = enumerate(x.split(counts.tolist()))
        parts = [self.expert(number, rows) for number, rows in rows_of if len(rows)]
        return torch.cat(parts) if parts else x

    def project(self, name: str, x: Tensor, counts: Tensor) -> Tensor:
        """Return the product with one stack, `first` or "down_proj".

        A LoRA adds to it: `run_experts` of extras/lora/kinds.py.
        """
        stack = self.down if name == "down_proj" else self.gate_up
        each = 2 if name == "gate_up_proj" else 1  # matrices of an expert
        parts = []
        for number, rows in enumerate(x.split(counts.tolist())):
            if len(rows):
                own = range(each * number, each * (number + 1))
                parts.append(torch.cat([self.linear(rows, stack[i]) for i in own], -1))
        return torch.cat(parts) if parts else x.new_zeros(0, each * stack[0].shape[0])

    def combine(self, gate_up: Tensor) -> Tensor:
        if not self.gated:
            return self.act(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return self.act(gate) * up


def quantize_stack(
    weight: Tensor, parts: int, quant_type: str = "nf4", nested: bool = False,
) -> list[Quantized]:
    """Quantize every matrix of a stack (experts, parts * out, in) by itself, in stored order."""
    matrices = [matrix for expert in weight for matrix in expert.chunk(parts)]
    return [quantize(matrix, quant_type, nested=nested) for matrix in matrices]


# Models


def quantize_linears(
    model: nn.Module, quant_type: str | None = "nf4", nested: bool = False,
    compute_dtype: torch.dtype | None = None, skip: Iterable[str] = ("lm_head",),
    read: Callable[[list[str]], dict] | None = None,
) -> list[str]:
    """Put the linear layers and the experts of `model` in 4 bits, in place; return their names.

    Embeddings stay as they are, and so do modules whose dotted name has a part in `skip`. It goes
    block by block, so a model on the meta device is loaded without ever being in memory in full:
    `read(names)` then gives the parameters of one block by name, as tensors or as what a file has
    in 4 bits (Quantized; for a stack of experts a list of them). With quant_type None only the
    latter are in 4 bits.
    """
    done = []
    for block in parameter_blocks(model):
        values = None
        if read:
            values = read([n for own in block.values() for n in own])
        for name, names in block.items():
            module = model.get_submodule(name)
            own = {}
            for n in names:
                child = n.rpartition(".")[2]
                own[child] = values.pop(n) if read else model.get_parameter(n).detach()
            is_stored = any(not torch.is_tensor(v) for v in own.values())
            is_skipped = any(f".{s}." in f".{name}." for s in skip)
            is_wanted = is_stored or (quant_type is not None and not is_skipped)
            if is_wanted and (isinstance(module, nn.Linear) or is_experts(module)):
                narrow = in_4bit(name, module, own, quant_type, nested, compute_dtype)
                model.set_submodule(name, narrow)
                done.append(name)
            elif read:
                for child, value in own.items():
                    learns = getattr(module, child).requires_grad
                    setattr(module, child, nn.Parameter(value, learns))
    model.four_bit = {
        "quant_type": quant_type, "nested": nested, "compute_dtype": compute_dtype}
    model.writer = partial(save_4bit, compute_dtype=compute_dtype)
    return done


def parameter_blocks(model: nn.Module) -> list[dict[str, list[str]]]:
    """Return {module: its parameters' names} of each numbered block and of each module outside."""
    groups: dict[str, dict[str, list[str]]] = {}
    for name, _ in model.named_parameters():  # a tied head is not listed twice
        module = name.rpartition(".")[0]
        block = re.match(r".*?\.\d+(?=\.)", name)
        group = groups.setdefault(block[0] if block else module, {})
        group.setdefault(module, []).append(name)
    return list(groups.values())


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module has stacked matrices, as extras/decoder/moe.py has them."""
    stacks = (getattr(module, n, None) for n in (getattr(module, "first", ""), "down_proj"))
    return all(getattr(stack, "ndim", 0) == 3 for stack in stacks)


def in_4bit(
    name: str, module: nn.Module, own: dict, quant_type: str | None, nested: bool,
    compute_dtype: torch.dtype | None,
) -> nn.Module:
    """Make the counterpart of a linear layer or of experts, from their parameters `own`."""
    if "gate_up_proj_bias" in own:
        raise ValueError(
            f"{name}: gpt-oss's experts are not put in 4 bits; leave out --load_in_4bit (with "
            "--dtype bfloat16 and a LoRA, the model takes two bytes a weight)")
    states = {}
    for child, value in own.items():
        if child != "bias":
            shape = getattr(module, child).shape
            states[child] = as_states(f"{name}.{child}", value, shape, quant_type, nested)
    if is_experts(module):
        gate_up = states[module.first]
        return Experts4bit(gate_up, states["down_proj"], module.act, compute_dtype, module.gated)
    bias = None if module.bias is None else nn.Parameter(own["bias"], requires_grad=False)
    return Linear4bit(states["weight"][0], bias, compute_dtype)


def as_states(
    name: str, value: Any, shape: torch.Size, quant_type: str | None, nested: bool,
) -> list[Quantized]:
    """Return a parameter of this shape, or what a file has of it, as quantized matrices.

    Raises ValueError where those of a file do not make up the shape.
    """
    if torch.is_tensor(value):
        parts = 2 if name.endswith("gate_up_proj") else 1
        stack = value if value.ndim == 3 else value[None]
        return quantize_stack(stack, parts, quant_type, nested)
    states = [value] if isinstance(value, Quantized) else value
    rows = sum(s.shape[0] for s in states)
    if {s.shape[1:] for s in states} != {shape[-1:]} or rows * shape[-1] != shape.numel():
        raise ValueError(
            f"{name}: {len(states)} x {states[0].shape}; config.json says {tuple(shape)}")
    return states


def dequantize_linears(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Undo `quantize_linears`, in place, before writing a model that is no longer quantized."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Linear4bit, Experts4bit)):
            model.set_submodule(name, wide_module(module, dtype))
    model.four_bit = None
    model.writer = None


def wide_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a dequantized layer or experts; any other module as it is."""
    if isinstance(module, Linear4bit):
        return wide_linear(module, dtype)
    return wide_experts(module, dtype) if isinstance(module, Experts4bit) else module


def wide_linear(module: Linear4bit, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        wide = nn.Linear(module.in_features, module.out_features, bias=False)
    wide.weight = nn.Parameter(dequantize(module.state, dtype), requires_grad=False)
    bias = module.bias
    wide.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return wide


def wide_experts(module: Experts4bit, dtype: torch.dtype) -> nn.Module:
    size, hidden = module.gate_up[0].shape
    with torch.device("meta"):
        moe = {"experts": len(module.down), "size": size, "gated": module.gated}
        wide = Experts(hidden, moe, module.act)
    for child, stack in ((wide.first, module.gate_up), ("down_proj", module.down)):
        matrices = torch.stack([dequantize(stack[i], dtype) for i in range(len(stack))])
        shape = getattr(wide, child).shape
        setattr(wide, child, nn.Parameter(matrices.view(shape), requires_grad=False))
    return wide


# Checkpoints


def read_bnb_config(config: dict, asked: dict) -> torch.dtype:
    """Return compute_dtype of a config.json's "quantization_config".

    Which weights are quantized, and how, is told by the weights themselves. Raises ValueError
    unless the method is bitsandbytes' in 4 bits, and where `asked` wants another kind.
    """
    if not isinstance(config, dict):
        raise ValueError(
            f"config.json: quantization_config is {config!r:.60}; expected an object")
    method = config.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not config.get("load_in_4bit"):
        raise ValueError(
            f"the checkpoint is quantized ({config.get('quant_method', 'method unknown')}"
            f"{', 8 bits' if config.get('load_in_8bit') else ''}); of those only bitsandbytes' "
            "with 4 bits are read; use the original one in bf16, fp16 or float32")
    is_nested = bool(config.get("bnb_4bit_use_double_quant"))
    is_other = asked.get("quant_type", "nf4") not in ("nf4", config.get("bnb_4bit_quant_type"))
    if is_other or asked.get("nested", False) > is_nested:
        raise ValueError(
            f"the checkpoint is in 4 bits already ({config.get('bnb_4bit_quant_type')}"
            f"{', nested' if is_nested else ''}); for another --bnb_4bit_quant_type or "
            "--use_bnb_nested_quant, start from the original one in bf16, fp16 or float32")
    return getattr(torch, config.get("bnb_4bit_compute_dtype") or "float32")


def write_bnb_config(state: Quantized, compute_dtype: torch.dtype | None) -> dict:
    """Return the "quantization_config" with which transformers reads such weights."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": state.quant_type,
        "bnb_4bit_use_double_quant": state.nested_absmax is not None,
        "bnb_4bit_compute_dtype": dtype_name(compute_dtype or torch.float32)}


def find_beside(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return {a weight in 4 bits: the tensors beside it}. Raises ValueError for those alone."""
    beside: dict[str, list[str]] = {}
    for match in filter(None, map(BESIDE.match, checkpoint.files)):
        beside.setdefault(match[1], []).append(match[0])
    alone = beside.keys() - checkpoint.files.keys()
    if alone:
        raise ValueError(f"{beside[min(alone)][0]} is there, but {min(alone)} is missing")
    return beside


def load_4bit(
    checkpoint: Checkpoint, settings: dict | None, dtype: torch.dtype, device: str,
    max_length: int | None = None, build: Callable = Decoder,
) -> Decoder:
    """Load an opened checkpoint as model.load_model does, but in 4 bits.

    `settings` are those of `quantize_linears`. What a file has in 4 bits stays as it is, and then
    nothing else is quantized; of `settings` only compute_dtype counts. The result's raw_config
    does not say that it is quantized. Raises ValueError as model.load_model does.
    """
    raw = dict(checkpoint.raw_config)
    settings = dict(settings or {})
    beside: dict[str, list[str]] = {}
    stored = raw.pop("quantization_config", None)
    try:
        if stored:
            compute_dtype = read_bnb_config(stored, settings)
            compute_dtype = settings.get("compute_dtype") or compute_dtype
            settings = {"quant_type": None, "compute_dtype": compute_dtype}
            beside = find_beside(checkpoint)
        config = read_config(raw, max_length)
        tower = carried_names(beside, config)
        if tower:
            raise ValueError(f"{min(tower)} is in 4 bits, and is not part of the decoder; use a "
                             "checkpoint whose decoder alone is, or the original one")
        not_weights = {n for names in beside.values() for n in names}
        layout = find_places(checkpoint.files.keys() - not_weights, config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory}: {error}") from None
    with torch.device("meta"):
        model = build(config)
    in_bits = {layout[theirs].name for theirs in beside}
    plain = {n: place for n, place in layout.items() if n not in beside}
    parameters = {n: p for n, p in model.named_parameters() if n not in in_bits}
    check_tensors(checkpoint, plain, parameters, config)
    layout |= plain
    read = partial(read_block, checkpoint, layout, beside, model, dtype)
    try:
        quantize_linears(model, **settings, read=partial(read, device=device))
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory}: {error}") from None
    with torch.device("meta"):
        wide = build(config)
    read = partial(read_block, checkpoint, layout, beside, wide, dtype)
    model.read = Reader4bit(Reader(checkpoint, layout, {}, dtype), read, wide, model.four_bit)
    model.tie()
    remember(model, checkpoint._replace(raw_config=raw), layout)
    return model.requires_grad_(True)


def read_block(
    checkpoint: Checkpoint, layout: dict, beside: dict[str, list[str]], model: nn.Module,
    dtype: torch.dtype, names: list[str], device: str = "cpu",
) -> dict:
    """Read these parameters: cast to `dtype`, or as Quantized where the files have 4 bits."""
    layout = {theirs: place for theirs, place in layout.items() if place.name in names}
    files = {}
    for theirs in layout:
        for n in (theirs, *beside.get(theirs, ())):
            files[n] = checkpoint.files[n]
    plain = {theirs: place for theirs, place in layout.items() if theirs not in beside}
    parameters = {n: model.get_parameter(n) for n in names}
    values = read_tensors(checkpoint._replace(files=files), plain, parameters, dtype, device)
    opened = {f: checkpoint.open(f) for f in set(files.values())}
    pieces: dict[str, list[tuple]] = {}  # parameter -> [(which part of it, its state)]
    for theirs in layout.keys() - plain.keys():
        tensors = {}
        for n in (theirs, *beside[theirs]):
            tensors[n] = opened[files[n]].get_tensor(n)
        place = layout[theirs]
        state = on_device(from_bnb_tensors(theirs, tensors), device)
        pieces.setdefault(place.name, []).append((place.index, state))
    for name, found in pieces.items():
        found.sort(key=lambda piece: [i.start if isinstance(i, slice) else i for i in piece[0]])
        states = [state for _, state in found]
        module = model.get_submodule(name.rpartition(".")[0])
        # else a router, say, which other code has as a linear layer
        is_kept = isinstance(module, nn.Linear) or is_experts(module)
        values[name] = states if is_kept else dequantize(states[0], dtype)
    return values


class Reader4bit:
    """A parts.weights.Reader of a model in 4 bits: quantizes what the files have wide."""

    def __init__(self, reader: Reader, read: Callable, wide: nn.Module, settings: dict):
        self.digest = reader.digest
        self.read = read
        self.wide = wide  # the model before it was quantized, on the meta device
        self.settings = {"quant_type": settings["quant_type"], "nested": settings["nested"]}

    def __deepcopy__(self, memo: dict) -> "Reader4bit":
        return self

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return {name: tensor}: of parameters, and of what a Stack4bit stores."""
        plain = []
        stacks = {}
        for name in names:
            stack, _, field = name.rpartition(".")
            if field in TENSORS:
                module, _, kind = stack.rpartition(".")
                child = STACKS[kind]
                if kind == "gate_up":
                    child = self.wide.get_submodule(module).first
                stacks[stack] = f"{module}.{child}"
            else:
                plain.append(name)
        found = self.read(plain) if plain else {}
        for stack, name in stacks.items():
            shape = self.wide.get_parameter(name).shape
            states = as_states(name, self.read([name])[name], shape, **self.settings)
            found |= {f"{stack}.{n}": t for n, t in Stack4bit(states).named_buffers()}
        return found


def save_4bit(
    model: nn.Module, directory: Path, compute_dtype: torch.dtype | None = None,
) -> None:
    """Write a model in 4 bits as transformers does, in one file, without its LoRA.

    What is not in 4 bits is written as it is. transformers computes in `compute_dtype`, by default
    in float32. Raises ValueError for experts that the model's own files hold stacked:
    bitsandbytes' files have them one by one.
    """
    modules = {n.replace(".base_layer", ""): m for n, m in model.named_modules()}
    tensors: dict[str, Tensor] = {}
    last = None
    for theirs, place in model.layout.items():
        name, _, child = place.name.rpartition(".")
        state = stored_state(modules[name], child, place.index, theirs)
        if state:
            last = state
            found = to_bnb_tensors(theirs, state)
        else:
            found = {theirs: place.view(getattr(modules[name], child).detach())}
        tensors |= {n: t.cpu().contiguous() for n, t in found.items()}
    assert last is not None, "nothing in this model is in 4 bits"
    directory.mkdir(parents=True, exist_ok=True)
    tensors |= model.carried.tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"quantization_config": write_bnb_config(last, compute_dtype)}
    if model.carried.tensors:
        # as transformers names the modules, where some files lack "model."
        inside = {n.removeprefix("model.").partition(".")[0] for n in model.carried.tensors}
        config["quantization_config"]["llm_int8_skip_modules"] = [
            "lm_head", *(f"model.{name}" for name in sorted(inside))]
    write_configs(model, directory, config)


def stored_state(module: nn.Module, child: str, index: tuple, name: str) -> Quantized | None:
    """Return what a module has in 4 bits of a parameter, or of the part of it at `index`."""
    if isinstance(module, Linear4bit) and child == "weight":
        return module.state
    if not isinstance(module, Experts4bit):
        return None
    if not index:
        raise ValueError(f"{name}: bitsandbytes' files cannot hold stacked experts")
    if child == "down_proj":
        return module.down[index[0]]
    if not module.gated:
        return module.gate_up[index[0]]
    return module.gate_up[2 * index[0] + (index[1].start > 0)]
