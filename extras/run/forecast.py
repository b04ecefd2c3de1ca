"""How much memory a rank needs, and how long a run takes, before it is started (--dry_run,
extras.plan).

Memory is that of tensors, in bytes per rank: what stays between steps (weights, moments, a live
reference) and what a step adds (gradients, activations, the head's chunk). Parameters are counted
on a model without storage. Activations follow a formula, whose coefficients were counted for gated
MLPs, on the CPU's paths (`PER_TOKEN`) and with flash attention (`FLASH`). Not included: what the
allocator wastes, the CUDA context (about 0.5 GiB), NCCL's buffers, and the program itself.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import model as models
from extras.decoder.mixers import KINDS, attends, recurs
from extras.decoder.moe import Experts
from extras.decoder.vision import freeze
from extras.lora.targets import add_lora
from extras.models.opening import build
from extras.run.eight_bits import BLOCK
from extras.run.rules import is_hidden
from extras.run.small_adamw import AT_ONCE, PER_ELEMENT, SMALLEST
from parts import c_layers
from parts.checks import needs_reference, precomputes_reference
from parts.head import KEPT, chunk_rows, group_rows
from parts.schedule import small_kind

# What a block saves for its backward: bytes per token and unit of (hidden, all query heads, all kv
# heads, MLP). float32: x and its norm, twice; q, q rotated, the heads' output; k, k rotated, v;
# gate, up and their product. bf16 is autocast; in bfloat16, weights and all else are.
PER_TOKEN = {
    "float32": (16, 12, 12, 12), "bf16": (12, 11, 11, 6), "bfloat16": (8, 10, 11, 6)}
# With the flash kernel on a GPU; there the log-sum-exp comes on top, 4 bytes per token and head.
FLASH = {"bf16": (12, 4, 4, 6), "bfloat16": (8, 4, 4, 6)}
# What a frozen linear layer saves less: its input.
FROZEN = {"float32": (4, 4, 0, 4), "bf16": (4, 2, 0, 2), "bfloat16": (2, 2, 0, 2)}
# What --gradient_checkpointing selective computes again: both norms, and gate * up.
CHEAP = {"float32": (8, 0, 0, 4), "bf16": (4, 0, 0, 2), "bfloat16": (4, 0, 0, 2)}

USUAL = ("q_proj", "v_proj")  # or what a family has in their place


class Run(NamedTuple):
    """What memory depends on, besides the model."""

    tokens: int  # of the longest stream of one forward
    scored: int  # tokens of it that are predicted
    forwards: int = 1  # in one step
    world: int = 1
    fsdp: bool = False  # weights, gradients, moments and reference are cut into `world` parts
    weights: str = "float32"
    bf16: bool = False  # autocast
    checkpointing: bool | str = False
    offloading: bool = False  # of what blocks save, two blocks' are on the device
    live_ref: bool = False  # a copy of the weights
    rank: int = 0  # of a LoRA; 0 trains all weights
    targets: tuple[str, ...] = USUAL
    patches: int = 0  # that the image encoder reads for one forward
    masked: int = 0  # (query, key) of its attention, where images are seen both ways
    tower_learns: bool = False  # the image encoder is trained too
    four_bit: str | None = None  # "plain" or "nested" absmax
    optimizer: str | None = None  # what parts.schedule.small_kind says
    device: str = "cpu"


def bits_of(run: Run, name: str, module: torch.nn.Module) -> float:
    """Return the bits of one weight of a frozen module."""
    is_linear = isinstance(module, torch.nn.Linear) and "lora_" not in name and name != "lm_head"
    if run.four_bit and is_linear:
        return 4 + (32 / 64 if run.four_bit == "plain" else 8 / 64 + 32 / (64 * 256))
    return 8 * getattr(torch, run.weights).itemsize


def count(config: models.ModelConfig, run: Run) -> dict[str, int]:
    """Count a model without storage: bytes of "weights", of those that learn ("learns"), of their
    "moments".

    And elements: of the largest "block"; of the largest parameter that is stepped "in_pieces" or
    "by_rule" (of_step); of the "matrices" that multiply each token. "first" is the block below
    which no gradient goes.
    """
    with torch.device("meta"):
        model = build(config)
        if config.vision is not None:
            freeze(model, not run.tower_learns)
        if run.rank:
            targets = None if run.targets == USUAL else run.targets
            targets = targets if isinstance(targets, str) else list(targets or ())
            add_lora(model, {"r": run.rank, "lora_alpha": run.rank, "target_modules": targets})
    width = 4 if run.rank else getattr(torch, run.weights).itemsize
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kind = str(run.optimizer)
    largest = {False: 0, True: 0}  # parameter, by whether it is stepped by a rule
    for name, p in learning:
        has = has_rule(kind, name, p)
        largest[has] = max(largest[has], p.numel())
    moe = config.moe or (config.per_layer or {}).get("moe") or {}
    idle = 0  # of experts that a token is not sent to
    for experts in model.modules():
        if isinstance(experts, Experts):
            held = sum(p.numel() for p in experts.parameters())
            idle += held // moe["experts"] * (moe["experts"] - moe["per_token"])
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    learns_in = [any(p.requires_grad for p in part.parameters())
                 for part in (model.model.embed_tokens, *model.model.layers)]
    first = max(0, learns_in.index(True) - 1) if True in learns_in else 0
    return {
        "weights": held_weights(model, run), "learns": width * sum(p.numel() for _, p in learning),
        "moments": sum(moments_of(kind, name, p, width) for name, p in learning),
        "block": max(blocks), "in_pieces": largest[False], "by_rule": largest[True],
        "matrices": sum(blocks) - idle, "first": first}


def held_weights(model: torch.nn.Module, run: Run) -> int:
    """Return the bytes of all weights, a tied one once."""
    held = 0
    seen = set()
    for name, module in model.named_modules():
        bits = 32 if "lora_" in name else bits_of(run, name, module)
        for p in module.parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                held += int(p.numel() * bits / 8)
    return held


def has_rule(kind: str, name: str, p: torch.nn.Parameter) -> bool:
    """Tell whether a parameter is stepped whole, by a rule of extras/run/rules.py."""
    return "Adafactor" in kind or "Muon" in kind and is_hidden(name, p)


def moments_of(kind: str, name: str, p: torch.nn.Parameter, width: int) -> int:
    """Return the bytes that an optimizer holds of a parameter, whose gradient has `width` each."""
    n = p.numel()
    if "Adafactor" in kind:
        return 4 * (n if p.dim() < 2 else n // p.shape[-1] + n // p.shape[-2])
    if "8 bits" in kind:
        return 8 * n if n < SMALLEST else 2 * n + 8 * -(-n // BLOCK)
    return width * n * (1 if has_rule(kind, name, p) else 2)


def of_step(counted: dict[str, int], run: Run, parts: int) -> int:
    """Return the bytes that come and go in the step of an optimizer of extras/run.

    It computes in float32, a piece of a parameter at a time, or a whole one where a rule steps it.
    """
    at_once = AT_ONCE.get(run.device, AT_ONCE["cpu"])
    matrix = counted["by_rule"] // parts
    by_rule = 12 * matrix
    if run.weights == "bfloat16":  # also copies in float32; then random bits
        by_rule = max(18 * matrix, 4 * matrix + 24 * min(matrix, at_once))
    return max(by_rule, PER_ELEMENT * min(counted["in_pieces"] // parts, at_once))


def mlp_size(c: models.ModelConfig) -> int:
    """Return the inner size of an MLP that keeps as much per token as the mean layer's.

    A sparse one keeps, of each expert that a token is sent to, what an MLP of its size does, its
    input and its output; and the router's logits. Without gates two states are kept, not three.
    """
    kept = 3 if c.gated_mlp else 2
    if c.moe is None:
        return c.intermediate_size * kept // 3
    ends = 2 * (c.moe.get("inner") or c.hidden_size)
    chosen = c.moe["per_token"] * (kept * c.moe["size"] + ends)
    sparse = chosen + kept * (c.moe["shared_size"] or 0) + 3 * c.moe["experts"]
    sizes = [sparse if is_sparse else kept * c.intermediate_size for is_sparse in c.moe["sparse"]]
    return sum(sizes) // (3 * len(sizes))


def layers_of(c: models.ModelConfig) -> list[models.ModelConfig]:
    """Return each layer's own configuration; one that reads another's keys has 0 heads of them, and
    one that is a mixer alone has an MLP of size 0."""
    found = []
    if c.single:
        for i, mixes in enumerate(map(any, zip(attends(c), recurs(c)))):
            moe = c.moe and c.moe | {"sparse": c.moe["sparse"][i : i + 1]}
            size = 0 if mixes else c.intermediate_size
            found.append(replace(c, intermediate_size=size, moe=moe))
        return found
    if c.per_layer is None:
        return [c] * c.num_hidden_layers
    for i, (own, read) in enumerate(zip(c.per_layer["sizes"], c.per_layer["reads"])):
        found.append(replace(c, **own) if read == i else replace(c, **own, num_key_value_heads=0))
    return found


def beside(c: models.ModelConfig, kind: str, selective: bool) -> int:
    """Return the bytes per token that a block of extras/decoder/per_layer.py keeps besides.

    What its norms of q, k and v read; act(gate); what becomes of its own input; and what its
    experts keep.
    """
    width = 4 if kind == "float32" else 2
    p = c.per_layer
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    kept = heads * c.head_dim
    kept += 0 if selective else c.intermediate_size
    if p["input_size"]:
        kept += 2 * c.hidden_size + (6 if kind == "bf16" else 4) * p["input_size"]
    if p["moe"]:
        each = 2 * c.hidden_size + (3 if selective else 4) * p["moe"]["size"]
        kept += 4 * c.hidden_size + p["moe"]["per_token"] * each
    return width * kept


def block_activations(
    c: models.ModelConfig, run: Run, block: int, attending: bool = True, recurrent: bool = False,
) -> int:
    """Return the bytes that one block's forward on `run.tokens` keeps for its backward.

    The last two say what mixes its tokens (extras/decoder/mixers.py).
    """
    kind = "bf16" if run.bf16 else "bfloat16" if run.weights == "bfloat16" else "float32"
    narrow = 4 if kind == "float32" else 2
    stream = c.hidden_size // 2 if c.single else c.hidden_size  # one norm, or two
    sizes = (
        stream, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim,
        mlp_size(c))
    learns_all = not run.rank or "all-linear" in run.targets
    less = (0, 0, 0, 0) if learns_all else FROZEN[kind]
    if run.rank and c.moe is not None:  # all-linear leaves out experts
        less = (*less[:3], FROZEN[kind][3])
    cheap = CHEAP[kind] if run.checkpointing == "selective" else (0, 0, 0, 0)
    per_token = 0
    if recurrent:
        frozen = 0 if learns_all else FROZEN[kind][0]
        per_token = KINDS[c.mixer["kind"]].saved(c.mixer, kind, frozen)
    if not attending:
        sizes = (stream, 0, 0, mlp_size(c))
    if c.latent is not None:
        # q, k, v and the heads' output, and that without its padding; both norms with their inputs
        wide = narrow if run.device == "cuda" else 4
        heads = 4 * c.head_dim * wide + c.latent["value"] * narrow
        norms = 2 * narrow * ((c.latent["query"] or 0) + c.latent["latent"])
        per_token += c.num_attention_heads * heads + norms
        sizes = (c.hidden_size, 0, 0, mlp_size(c))
    bytes_saved = PER_TOKEN[kind]
    of_lora = 16 * len(run.targets)
    if run.device == "cuda" and kind in FLASH and c.attn_softcap is None and c.head_dim <= 256:
        bytes_saved = FLASH[kind]
        less = (less[0], 0, 0, less[3])  # the kernel's backward needs its result anyway
        per_token += 4 * c.num_attention_heads if attending else 0
        of_lora = 2 * (7 if "all-linear" in run.targets else len(run.targets))  # x a^T
    for size, saved, frozen, again in zip(sizes, bytes_saved, less, cheap, strict=True):
        per_token += size * (saved - max(frozen, again))
    if c.per_layer:
        per_token += beside(c, kind, run.checkpointing == "selective")
    # a norm after a sublayer keeps its input
    more_norms = sum(name is not None for name in c.block_norms) - 2
    per_token += narrow * sizes[0] * max(0, more_norms)
    per_token += narrow * (sizes[1] + sizes[2]) * bool(c.qk_norm)  # q and k before
    per_token += run.rank * of_lora
    casts = 2 * block if run.bf16 else 0  # autocast keeps the weights that it cast
    return run.tokens * per_token + casts


def activations(
    c: models.ModelConfig, run: Run, block: int, first: int = 0,
) -> tuple[int, int]:
    """Return the bytes held for the backward, and the most that comes and goes meanwhile.

    The latter is the head's chunk of logits with its gradients, or a block's gradients (with
    checkpointing also what the block saves when it is run again).
    """
    wide = 4 if run.bf16 else getattr(torch, run.weights).itemsize
    ends = wide * (c.hidden_size * (run.tokens + run.scored) + 2 * c.head_dim * run.tokens)
    if c.per_layer:  # another rotation; what the norm of the layers' own inputs reads
        sizes = 2 * max(own.head_dim for own in layers_of(c))
        sizes += c.num_hidden_layers * c.per_layer["input_size"]
        ends += wide * sizes * run.tokens
    kinds = list(zip(attends(c), recurs(c)))[first:]
    kept_in_each = [block_activations(own, run, block, *kind)
                    for own, kind in zip(layers_of(c)[first:], kinds)]
    kept_in_blocks = sum(kept_in_each)
    again = run.tokens * KINDS[c.mixer["kind"]].passing(c.mixer) if any(recurs(c)) else 0
    chunk = chunk_rows(c.vocab_size, run.device, models.HEAD_CHUNK)
    saves = run.rank or run.checkpointing or run.offloading
    kept = 0 if saves else min(run.scored, KEPT * chunk)
    rows = min(run.scored - kept, chunk)
    few = min(run.scored, group_rows(c.vocab_size, run.device, models.HEAD_CHUNK))
    narrow = 2 if run.bf16 else wide
    if narrow == 2 and c_layers.serves(torch.bfloat16, torch.device(run.device)):
        few = 0  # the scores are computed in place
    logits = c.vocab_size * (narrow * rows + 12 * few)  # a few rows in float32, three times
    ends += c.vocab_size * narrow * kept  # logits, as their gradients
    head = logits + 4 * c.hidden_size * (run.scored + (0 if run.rank else c.vocab_size))
    each = (5 if narrow == 2 else 10) * run.tokens
    passing = [max(each * mlp_size(own), again * recurrent)
               for own, (_, recurrent) in zip(layers_of(c)[first:], kinds)]
    held = min(2, c.num_hidden_layers) if run.offloading else c.num_hidden_layers  # blocks
    if run.checkpointing is True:
        inputs = held * wide * c.hidden_size * run.tokens
        return ends + inputs, max(head, *map(sum, zip(kept_in_each, passing)))
    if run.offloading:
        return ends + min(kept_in_blocks, 2 * max(kept_in_each)), max(head, *passing)
    # what later blocks kept is gone by the time of a block's backward
    gone = [sum(kept_in_each[i + 1:]) for i in range(len(kept_in_each))]
    return ends + kept_in_blocks, max(head, *(now - kept for now, kept in zip(passing, gone)))


def of_images(config: models.ModelConfig, run: Run) -> tuple[int, int]:
    """Return the bytes held for a forward's images, and the most that comes and goes meanwhile.

    Held are the pixels and, where it learns, what the encoder keeps: of each layer both norms with
    their inputs, q, k, v, the heads' output, the MLP's inner states before and after its function.
    Gemma 4's has more norms, a gate, and bounds: what is clamped is kept as it was and as it is;
    12B's, which has no layers, is counted as one. Masks are there for layers with and without a
    window, or with one alone.
    """
    c = config.vision
    if c is None or not run.patches:
        return 0, 0
    size = c.get("size") or c["hidden_size"]
    inner = c.get("intermediate_size") or int(size * c["mlp_ratio"])
    layers = c.get("depth") or c.get("num_hidden_layers", 1)
    width = 2 if run.bf16 else getattr(torch, run.weights).itemsize
    channels = c.get("in_channels") or c.get("num_channels", 3)
    pixels = 4 * c["patch_size"] ** 2 * channels * c.get("temporal_patch_size", 1)
    # under autocast the norms' inputs are float32, and q, k and v have a cast of theirs each
    outer, within = (12 if run.bf16 else 8), 2
    if c["kind"] == "gemma4":
        outer, within = (24, 7) if c["use_clipped_linears"] else (13, 4)
    layer = run.patches * width * (outer * size + within * inner)
    passing = run.patches * width * (5 * size + 2 * inner)
    # each layer's call turns its mask of bools into numbers
    each = 2 if run.bf16 and run.device != "cpu" else 4
    seeing = [w for w in config.windows if w is not None or c.get("both_ways") != "windows"]
    masks = run.masked * (2 + each * (1 if run.checkpointing is True else len(seeing)))
    held = run.patches * pixels + masks
    if not run.tower_learns:
        return held, passing
    if run.checkpointing is True:
        return held + layers * run.patches * width * size, layer
    return held + layers * layer, 0


def memory(
    config: models.ModelConfig, run: Run, counted: dict[str, int] | None = None,
) -> dict[str, int]:
    """Return the bytes per rank by purpose, and "total" at the highest point of a step."""
    counted = counted or count(config, run)
    parts = run.world if run.fsdp else 1
    has_own_reference = run.live_ref and not run.rank
    m = {
        "weights": counted["weights"] // parts,
        "moments": counted["moments"] // parts,
        "reference": counted["weights"] // parts if has_own_reference else 0,
        "gradients": counted["learns"] // parts}
    m["activations"], m["passing"] = activations(
        config, run, counted["block"], counted["first"])
    images, encoding = of_images(config, run)
    m["activations"] += images
    before = sum(m.values()) - m["activations"] - m["passing"] + images + encoding
    is_ddp = run.world > 1 and not run.fsdp
    if is_ddp:
        m["exchange"] = counted["learns"]  # DDP's buckets
    if run.fsdp:
        # two unsharded blocks: weights, and gradients where they learn
        width = 2 if run.bf16 else getattr(torch, run.weights).itemsize
        m["exchange"] = 2 * counted["block"] * width * (1 if run.rank else 2)
    at_most = sum(m.values())
    first = at_most - m["gradients"]  # with one forward in a step, gradients come as activations go
    last = at_most - m["activations"] - m["passing"]
    if run.optimizer:
        last += of_step(counted, run, parts)
    if config.tie_word_embeddings and not run.rank:
        # the head's part of the gradient waits for the embedding's, and their sum is a third
        width = getattr(torch, run.weights).itemsize
        tied = 2 * config.vocab_size * config.hidden_size * width
        last = max(last, at_most - m["activations"] - m["passing"] + tied)
    # DDP's buckets hold all gradients throughout
    last = max(last, before)
    return m | {"total": max(last, at_most if run.forwards > 1 or is_ddp else first)}


def flops(
    config: models.ModelConfig, run: Run, tokens: int, scored: int, length: float,
    references: float,
) -> float:
    """Count the operations of training on `tokens`.

    2 per weight and token forward, and twice that backward, less where weights are frozen.
    """
    passes = (2 if run.rank else 3) + (1 if run.checkpointing is True else 0) + references
    heads = sum(own.num_attention_heads * own.head_dim
                for own, has in zip(layers_of(config), attends(config)) if has)
    per_token = 2 * count(config, run)["matrices"] + 2 * heads * length
    if any(recurs(config)):
        kind = KINDS[config.mixer["kind"]]
        per_token += sum(recurs(config)) * kind.operations(config.mixer)
    return passes * (per_token * tokens + 2 * config.vocab_size * config.hidden_size * scored)


def matmul_rate(
    config: models.ModelConfig, device: torch.device, dtype: torch.dtype, seconds: float = 0.3,
) -> float:
    """Measure the floating-point operations per second of the MLP's product.

    The best of the products that fit in `seconds` counts.
    """
    x = torch.randn(1024, config.hidden_size, device=device, dtype=dtype)
    w = torch.randn(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
    sync: Callable = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        x @ w
        sync()
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * w.shape[1] / best


def run_of(trainer: Any) -> Run:
    """Return a trainer's Run, by the largest forward of its first hundred steps."""
    c = trainer.args
    store = trainer.train_store
    sizes = []
    most = 0
    patches = masked = 0
    for step in range(min(100, trainer.schedule.total_steps)):
        forwards = trainer.forwards(store, trainer.pairs_of(step), c.per_device_train_batch_size)
        for rows in forwards:
            if trainer.images is not None:
                vision = trainer.model.config.vision
                patches = max(patches, trainer.images.patches(store, rows, vision))
                if vision.get("both_ways"):
                    p, chosen, rejected = store.lengths[rows].astype(np.int64).T
                    masked = max(masked, int(((p + chosen) ** 2 + rejected * (p + rejected)).sum()))
            here = (store.tokens[rows].sum(), store.lengths[rows, 1:].sum())
            sizes.append(tuple(-(-int(n) // trainer.ranks.context) for n in here))
        most = max(most, len(forwards))
    tokens, scored = max(sizes)
    four_bit = None
    if c.load_in_4bit:
        four_bit = "nested" if c.use_bnb_nested_quant else "plain"
    targets = trainer.lora.get("target_modules") or USUAL
    return Run(
        tokens=tokens, scored=scored, forwards=most, world=trainer.ranks.world,
        fsdp=trainer.place.is_sharded, weights=c.dtype,
        bf16=trainer.precision.half is torch.bfloat16, checkpointing=c.gradient_checkpointing,
        offloading=c.activation_offloading,
        live_ref=trainer.reference.model is not None, rank=trainer.lora.get("r", 0),
        optimizer=small_kind(c, trainer.lora), patches=patches, masked=masked,
        tower_learns=patches > 0 and not c.freeze_vision_tower,
        targets=targets if isinstance(targets, str) else tuple(targets), four_bit=four_bit,
        device=trainer.ranks.device.type)


def describe(trainer: Any) -> list[str]:
    """Return lines about a run: pairs, steps, tokens, memory per rank and time."""
    c = trainer.args
    store = trainer.train_store
    run = run_of(trainer)
    config = trainer.model.config
    schedule = trainer.schedule
    pairs = len(trainer.train_pairs)
    epochs = schedule.epoch(schedule.total_steps)
    tokens = int(store.tokens[trainer.train_pairs].sum())
    scored = int(store.lengths[trainer.train_pairs, 1:].sum())
    m = memory(config, run)
    references = 0.0  # passes of the reference per epoch
    if needs_reference(c):
        references = min(1.0, 1 / epochs) if precomputes_reference(c) else 1.0
    work = epochs * flops(config, run, tokens, scored, tokens / pairs / 2, references)
    dtype = torch.bfloat16 if run.bf16 else getattr(torch, c.dtype)
    rate = matmul_rate(config, trainer.ranks.device, dtype)
    minutes = work / rate / run.world / 60
    return [
        f"{pairs:,} pairs of {tokens:,} tokens ({scored:,} scored); {schedule.total_steps:,} steps "
        f"of {schedule.global_batch} pairs, {epochs:.3g} epochs, on {run.world} "
        f"rank{'s' if run.world > 1 else ''}",
        f"memory per rank: at most {gib(m['total'])}: {table(m)} (forwards of {run.tokens:,} "
        "tokens)",
        f"time: {minutes:,.1f} minutes or more: {work:.3g} operations at {rate / 1e9:,.0f} GFLOP/s "
        "a rank, measured on one product of this model's size; all else comes on top, often as "
        "much again"]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def table(m: dict[str, int]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in m.items() if size and name != "total")
