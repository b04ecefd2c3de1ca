"""Rotary position embeddings: from config.json the frequencies of each kind, and the rotation.

Stretched contexts: linear, dynamic, Llama 3, YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from parts.kernels import rotation


class Rope(NamedTuple):
    """How one kind of layer rotates: radians per position of each pair of dims."""

    frequencies: tuple[float, ...]
    factor: float = 1.0  # on cos and sin
    limit: int | None = None  # tokens; a longer sequence would need other numbers
    interleaved: bool = False  # the pairs of dims are (2i, 2i + 1), not (i, i + D/2)


ROPE_KEYS = {  # rope_type -> the keys it reads besides those of all
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "proportional": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "truncate", "llama_4_scaling_beta", "max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor")}
ORIGINAL = "original_max_position_embeddings"
POSITIVE = ("rope_theta", "factor", "attention_factor", ORIGINAL)
KINDS = ("full_attention", "sliding_attention")  # of layers, where they rotate differently


def read_ropes(c: dict, max_length: int | None, interleaved: bool = False) -> dict[str, Rope]:
    """Read `rope_parameters` or the older keys.

    Returns {"full_attention": Rope}, with "sliding_attention" where those layers differ.
    """
    given = c["rope_scaling"] or c["rope_parameters"] or {}
    ropes = {k: v for k, v in given.items() if isinstance(v, dict)} or {"full_attention": given}
    odd = sorted(ropes.keys() - {*KINDS})
    if odd or "full_attention" not in ropes:
        raise ValueError(f"config.json: rope_parameters name {', '.join(odd) or 'no full_attention'}; "
                         f"of layers, {' and '.join(KINDS)} are known")
    # Gemma 3: layers with a window have a base of their own; OLMo 3: they are not stretched
    if "rope_local_base_freq" in c:
        ropes = {"sliding_attention": {"rope_theta": c["rope_local_base_freq"]}} | ropes
    # Gemma 4: layers without a window have other heads
    sizes = {"full_attention": c.get("global_head_dim") or c["head_dim"]}
    return {name: read_rope(rope, c, max_length, sizes.get(name, c["head_dim"]))._replace(
                interleaved=interleaved)
            for name, rope in ropes.items()}


def read_rope(given: dict, c: dict, max_length: int | None, head_dim: int) -> Rope:
    """Read one Rope. Raises ValueError for an unknown kind or key, and for a missing one."""
    longest = c["max_position_embeddings"]
    rope = {"rope_theta": c["rope_theta"], "partial_rotary_factor": c["partial_rotary_factor"],
            ORIGINAL: longest}
    kind = given.get("rope_type") or given.get("type") or "default"
    if "long_factor" in given:  # Phi-3's first files call it "su" or "yarn"
        kind = "longrope"
    known = {*rope, "type", "rope_type", *ROPE_KEYS.get(kind, ())}
    odd = sorted(given.keys() - known)
    if kind not in ROPE_KEYS or odd:
        raise ValueError(
            f"config.json: rope_type {kind!r}{' with ' if odd else ''}{', '.join(odd)} is not "
            f"supported; supported are {', '.join(ROPE_KEYS)}")
    rope |= {k: v for k, v in given.items() if v is not None}
    rope |= {ORIGINAL: c[ORIGINAL] or rope[ORIGINAL], "max_position_embeddings": longest}
    check_numbers(rope, kind)
    dim = int(head_dim * rope["partial_rotary_factor"])
    is_odd = head_dim % 2 or kind != "proportional" and dim % 2
    if is_odd or not 0 <= dim <= head_dim:
        raise ValueError(f"config.json: {dim} dims of each head's {head_dim} rotate: expected an "
                         "even number of them, as they turn in pairs")
    if kind == "proportional":
        return finite(proportional(rope, dim, head_dim), kind)
    try:
        return finite(make_rope(kind, rope, dim, max_length), kind)
    except KeyError as error:
        raise ValueError(f"config.json: rope_type {kind!r} needs {error}") from None


def check_numbers(rope: dict, kind: str) -> None:
    """Raise ValueError for a value that is no number, and for one that must be above 0 and is not.
    """
    for key in rope.keys() - {"type", "rope_type", "truncate", "short_factor", "long_factor"}:
        value = rope[key]
        is_number = type(value) in (int, float) and abs(value) < 1e30
        if not is_number or key in POSITIVE and value <= 0:
            wanted = "a number above 0" if key in POSITIVE else "a number"
            raise ValueError(f"config.json: {key} = {value!r:.60} of rope_type {kind!r}: expected "
                             f"{wanted}")


def finite(rope: Rope, kind: str) -> Rope:
    """Return the Rope. Raises ValueError where a value of config.json makes it no number."""
    if not all(abs(x) < 1e30 for x in (rope.factor, *rope.frequencies)):
        raise ValueError(f"config.json: the values of rope_type {kind!r} make frequencies that are "
                         "not finite")
    return rope


def make_rope(kind: str, rope: dict, dim: int, max_length: int | None) -> Rope:
    """Compute theta^(-2i/dim), stretched as `kind` says; float32, as the models were trained.

    `dynamic` only acts beyond max_position_embeddings and depends on the length there, so it is
    `default` with a limit.
    """
    if not rope["rope_theta"] > 0:
        raise ValueError(f"config.json: rope_theta = {rope['rope_theta']}: it must be above 0")
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)  # (dim/2,)
    if kind == "yarn":
        return yarn(rope, freq)
    if kind == "longrope":
        return longrope(rope, freq, max_length)
    if kind == "linear":
        freq = freq / rope["factor"]
    if kind == "llama3":
        freq = llama3(rope, freq)
    limit = rope["max_position_embeddings"] if kind == "dynamic" else None
    return Rope(tuple(freq.tolist()), limit=limit)


def proportional(rope: dict, dim: int, head_dim: int) -> Rope:
    """Rotate the first `dim` dims at the frequencies of a full rotation, the rest at frequency 0."""
    freq = torch.zeros(head_dim // 2)
    steps = torch.arange(0, dim // 2 * 2, 2).float() / head_dim
    freq[:len(steps)] = 1.0 / rope["rope_theta"] ** steps
    return Rope(tuple((freq / rope.get("factor", 1.0)).tolist()))


def llama3(rope: dict, freq: Tensor) -> Tensor:  # (dim/2,)
    """Divide long wavelengths by `factor`, keep short ones, with a smooth ramp between."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    smooth = ((rope[ORIGINAL] / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / rope["factor"] + smooth * freq


def yarn(rope: dict, freq: Tensor) -> Rope:
    """Stretch by parts (section 3.2), with the factor 0.1 ln(s) + 1 on cos and sin (eq. 15).

    Dims that turn more than `beta_fast` times within the pretraining length are kept, those that
    turn less than `beta_slow` times are divided by `factor`, with a linear ramp between.

    With `llama_4_scaling_beta` queries beyond the pretraining length have other scales. Up to it
    the scale is 1, so that length is the limit.
    """
    scale = rope["factor"]
    half = len(freq)

    def turning(times: float) -> float:  # the dim that turns so often within the pretraining length
        base = rope["rope_theta"]
        return half * math.log(rope[ORIGINAL] / (times * 2 * math.pi)) / math.log(base)

    low = turning(rope.get("beta_fast") or 32)
    high = turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(half, dtype=torch.float32) - low) / (high - low)
    stretched = ramp.clamp(0, 1)
    freq = freq / scale * stretched + freq * (1 - stretched)
    limit = rope[ORIGINAL] if rope.get("llama_4_scaling_beta") else None
    return Rope(tuple(freq.tolist()), yarn_factor(rope), limit)


def yarn_factor(rope: dict) -> float:
    """Return `attention_factor` if given, else DeepSeek's ratio of `mscale`s, else the paper's."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = lambda m: 0.1 * m * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return factor(rope["mscale"]) / factor(rope["mscale_all_dim"])
    return factor(1)


def longrope(rope: dict, freq: Tensor, max_length: int | None) -> Rope:
    """Stretch each dim by its own number: `short_factor` up to the pretraining length.

    Beyond it, `long_factor`.
    `max_length` decides for the whole run; None is short, and longer sequences are then refused.
    """
    original = rope[ORIGINAL]
    long = max_length is not None and max_length > original
    stretch = torch.tensor(rope["long_factor" if long else "short_factor"], dtype=torch.float32)
    if len(stretch) != len(freq):
        raise ValueError(f"config.json: longrope has {len(stretch)} factors for {len(freq)} "
                         "rotated pairs of dims")
    factor = rope.get("attention_factor")
    if factor is None:
        scale = rope.get("factor") or rope["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return Rope(tuple((freq / stretch).tolist()), factor, None if long else original)


# The rotation


def rotary_tables(ropes: dict[str, Rope], position_ids: Tensor,
                  dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Return {name: (cos, sin, whether dims are interleaved)}, each (T, 1, rotated dims).

    Angles are float32 whatever the model is: in bfloat16 positions beyond 256 would coincide.
    """
    tables = {}
    with torch.autocast(position_ids.device.type, enabled=False):
        for name, rope in ropes.items():
            freq = torch.tensor(rope.frequencies, dtype=torch.float32)
            freq = freq.to(position_ids.device, non_blocking=True)
            angles = position_ids.float()[:, None] * freq  # (T, D/2)
            angles = torch.cat([angles, angles], -1)[:, None]  # (T, 1, D)
            cos, sin = angles.cos() * rope.factor, angles.sin() * rope.factor
            tables[name] = (cos.to(dtype), sin.to(dtype), rope.interleaved)
    return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:  # (T, H, D)
    """Rotate the first `cos.shape[-1]` dims of each head: x cos + rotate_half(x) sin."""
    size = cos.shape[-1]
    rotated = rotation(x[..., :size], cos, sin, interleaved)
    rest = x[..., size:]
    return torch.cat([rotated, rest.to(rotated.dtype)], -1) if rest.shape[-1] else rotated
