"""AdamW in fewer bytes: bfloat16 weights and moments that are rounded at random, and moments in
8 bits.

    bytes a weight                   weight  moments  gradient  together
    float32                             4        8        4        16
    --optim adamw_8bit                  4        2        4        10
    --dtype bfloat16                    2        4        2         8
    --dtype bfloat16, adamw_8bit        2        2        2         6

and 1/32 for the largest magnitudes of 8-bit blocks; rules.py has those of Adafactor and Muon. The
step is computed in float32, on a part of a tensor at a time, so that its temporaries stay small. A
second moment moves by 1/1000 of its distance; in bfloat16 it too would stand still if it were
rounded to nearest.

Every result is a function of whole tensors: the random bits of an element and the block that it
belongs to do not depend on how FSDP cuts the tensor.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from extras.run.eight_bits import BLOCK, decode, dynamic_code, encode, largest
from extras.run.rounding import draws, key_of, rounded
from extras.run.rules import rules_of
from parts.config import EIGHT_BIT, DPOConfig
from parts.schedule import groups_of, rounds_at_random

SMALLEST = 4096  # tensors with fewer elements keep float32 moments, as in bitsandbytes
AT_ONCE = {"cpu": 2**20, "cuda": 2**24}  # elements whose step is computed at a time
PER_ELEMENT = 36  # bytes that a step needs for each of them, meanwhile
MAXIMA = ("absmax1", "absmax2")


class Shard(NamedTuple):
    """The elements of a flattened tensor that this rank holds."""

    first: int
    count: int
    total: int
    cut: tuple[int, ...] = ()  # blocks that lie on more than one rank
    mesh: Any = None

    @property
    def blocks(self) -> range:
        """Return the blocks that have an element here."""
        return range(self.first // BLOCK, -(-(self.first + self.count) // BLOCK))


def shard_of(p: Any) -> Shard:
    """Return what this rank holds: all, or the rows that fully_shard gives it."""
    if not hasattr(p, "to_local"):
        return Shard(0, p.numel(), p.numel())
    ranks = p.device_mesh.size()
    row = p.numel() // p.shape[0]
    rows = -(-p.shape[0] // ranks)
    starts = [min(rank * rows, p.shape[0]) * row for rank in range(ranks + 1)]
    cut = sorted({start // BLOCK for start in starts[1:-1] if start % BLOCK})
    first = starts[p.device_mesh.get_local_rank()]
    return Shard(first, p.to_local().numel(), p.numel(), tuple(cut), p.device_mesh)


def flat(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a contiguous tensor, as one row, in the same memory."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().view(-1)


class Maxima:
    """The largest magnitudes of the blocks of a sharded tensor, of which each rank has its own.

    It has what a DTensor has that is saved in a checkpoint.
    """

    def __init__(self, values: Tensor, shard: Shard):
        self.values = values
        self.shard = shard
        self.shape = (-(-shard.total // BLOCK),)  # of the whole
        self.dtype = values.dtype

    def detach(self) -> "Maxima":
        return self

    def full_tensor(self) -> Tensor:
        """Return those of the whole tensor; every rank calls this."""
        mesh = self.shard.mesh
        whole = torch.zeros(self.shape, device=mesh.device_type)
        blocks = self.shard.blocks
        whole[blocks.start : blocks.stop] = self.values
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=mesh.get_group())
        return whole


class Piece(NamedTuple):
    """Some of this rank's elements of a tensor, and where they stand in it."""

    local: slice
    first: int  # in the whole tensor

    @property
    def lead(self) -> int:
        """Return the first element's position in its block."""
        return self.first % BLOCK


def pieces(shard: Shard, at_once: int) -> Iterator[Piece]:
    """Cut a shard; all cuts lie between two blocks."""
    start = 0
    while start < shard.count:
        end = min(shard.count, start + at_once - (shard.first + start) % BLOCK)
        yield Piece(slice(start, end), shard.first + start)
        start = end


class SmallAdamW:
    """AdamW with the attributes and methods of a torch.optim.Optimizer that a trainer uses.

    `names` gives each parameter the name that its random bits come from. `eight_bit` keeps moments
    in 8 bits; `rounds` rounds what is bfloat16 at random, else to nearest. A group may have a
    `rule` of extras/run/rules.py instead of AdamW's.
    """

    def __init__(
        self, groups: list[dict], names: dict[nn.Parameter, str], seed: int, eight_bit: bool,
        rounds: bool,
    ):
        self.param_groups = groups
        self.names = names
        self.seed = seed
        self.eight_bit = eight_bit
        self.rounds = rounds
        self.state: defaultdict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
        device = next(p.device for group in groups for p in group["params"])
        self.codes = tuple(dynamic_code(signed).to(device) for signed in (True, False))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        todo = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p, group in todo:
            if not self.state[p]:
                self.begin(p, group)
            self.adopt(p)
            self.state[p]["step"] += 1
        common = self.common_maxima(todo)
        for p, group in todo:
            if "rule" in group:
                self.follow(p, group)
            else:
                self.update(p, group, common.get(p))

    def begin(self, p: nn.Parameter, group: dict) -> None:
        """Set the state before the first step."""
        state = self.state[p]
        state["step"] = 0
        if "rule" in group:  # a rule makes its own state
            return
        if not self.eight_bit or p.numel() < SMALLEST:
            kind = torch.float32 if self.eight_bit else p.dtype
            state["exp_avg"] = torch.zeros_like(p, dtype=kind)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=kind)
            return
        zero = int(self.codes[0].abs().argmin()), int(self.codes[1].argmin())
        state["state1"] = torch.full_like(p, zero[0], dtype=torch.uint8)
        state["state2"] = torch.full_like(p, zero[1], dtype=torch.uint8)
        for name in MAXIMA:
            state[name] = torch.zeros(-(-p.numel() // BLOCK), device=flat(p).device)

    def adopt(self, p: nn.Parameter) -> None:
        """Keep of a whole tensor's largest magnitudes, new or from a checkpoint, this rank's."""
        shard = shard_of(p)
        state = self.state[p]
        for name in MAXIMA:
            if shard.mesh is not None and torch.is_tensor(state.get(name)):
                own = state[name][shard.blocks.start : shard.blocks.stop].clone()
                state[name] = Maxima(own, shard)

    def common_maxima(self, todo: list) -> dict[nn.Parameter, Tensor]:
        """Return, for blocks that lie on several ranks, the largest magnitudes of the new moments:
        (2, blocks) of each tensor that has such blocks."""
        found = {}
        for p, group in todo:
            shard = shard_of(p)
            if "state1" not in self.state[p] or not shard.cut:
                continue
            table = torch.zeros(2, len(shard.cut), device=flat(p).device)
            for i, block in enumerate(shard.cut):
                start = max(shard.first, block * BLOCK)
                end = min(shard.first + shard.count, (block + 1) * BLOCK)
                if start < end:
                    piece = Piece(slice(start - shard.first, end - shard.first), start)
                    for row, moment in zip(table, self.moments(p, group, piece)[:2]):
                        row[i] = moment.abs().max()
            found[p] = table
        if found:
            mesh = next(shard_of(p).mesh for p in found)
            together = torch.cat([t.view(-1) for t in found.values()]).to(mesh.device_type)
            dist.all_reduce(together, dist.ReduceOp.MAX, group=mesh.get_group())
            parts = together.split([t.numel() for t in found.values()])
            found = {p: part.view_as(t).to(t.device) for (p, t), part in zip(found.items(), parts)}
        return found

    def follow(self, p: nn.Parameter, group: dict) -> None:
        """Update a parameter by its group's rule, which sees the whole tensor."""
        wide = torch.promote_types(p.dtype, torch.float32)
        value = group["rule"](self.state[p], p.detach(), p.grad.to(wide), group).view(-1)
        key = key_of(self.seed, self.state[p]["step"], self.names[p])
        weights = flat(p)
        for piece in pieces(shard_of(p), AT_ONCE.get(weights.device.type, 2**20)):
            keep(weights[piece.local], value[piece.local], self.bits(p, key, piece), 0)

    def bits(self, p: nn.Parameter, key: int, piece: Piece) -> Tensor | None:
        """Return the random bits of a piece's elements, if they are to be rounded by any."""
        if not self.rounds or p.dtype != torch.bfloat16:
            return None
        return draws(key, piece.first, piece.local.stop - piece.local.start, flat(p).device)

    def update(self, p: nn.Parameter, group: dict, common: Tensor | None) -> None:
        """w <- (1 - lr decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""
        shard = shard_of(p)
        step = self.state[p]["step"]
        key = key_of(self.seed, step, self.names[p])
        weights = flat(p)
        unbias = 1 - group["betas"][0] ** step
        unbias_sq = (1 - group["betas"][1] ** step) ** 0.5
        for piece in pieces(shard, AT_ONCE.get(weights.device.type, 2**20)):
            m, v = self.moments(p, group, piece)
            w = weights[piece.local].to(m.dtype, copy=True)
            if group["weight_decay"]:
                w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(m, (v.sqrt() / unbias_sq).add_(group["eps"]), value=-group["lr"] / unbias)
            bits = self.bits(p, key, piece)
            keep(weights[piece.local], w, bits, 0)
            self.keep_moments(p, piece, (m, v), bits, common)

    def moments(self, p: nn.Parameter, group: dict, piece: Piece) -> tuple[Tensor, Tensor]:
        """Return the new moments m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2, float32."""
        state = self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        g = flat(p.grad.contiguous())[piece.local].to(wide)
        m, v = self.old_moments(state, piece, wide)
        b1, b2 = group["betas"]
        return m.mul_(b1).add_(g, alpha=1 - b1), v.mul_(b2).addcmul_(g, g, value=1 - b2)

    def old_moments(self, state: dict, piece: Piece, wide: torch.dtype) -> list[Tensor]:
        if "exp_avg" in state:
            names = ("exp_avg", "exp_avg_sq")
            return [flat(state[name])[piece.local].to(wide, copy=True) for name in names]
        found = []
        for i, code in enumerate(self.codes, 1):
            codes = flat(state[f"state{i}"])[piece.local]
            maxima, blocks = maxima_of(state[f"absmax{i}"], piece)
            found.append(decode(codes, maxima[blocks], code, piece.lead).to(wide))
        return found

    def keep_moments(
        self, p: nn.Parameter, piece: Piece, moments: tuple, bits: Tensor | None,
        common: Tensor | None,
    ) -> None:
        """Store the new moments as the state has them."""
        state = self.state[p]
        if "exp_avg" in state:
            for i, name in enumerate(("exp_avg", "exp_avg_sq")):
                keep(flat(state[name])[piece.local], moments[i], bits, i + 1)
            return
        for i, code in enumerate(self.codes, 1):
            moment = moments[i - 1].float()
            maxima, blocks = maxima_of(state[f"absmax{i}"], piece)
            maxima[blocks] = largest(moment, piece.lead)
            if common is not None:
                for block, value in zip(shard_of(p).cut, common[i - 1]):
                    at = block - piece.first // BLOCK
                    if 0 <= at < blocks.stop - blocks.start:
                        maxima[blocks][at] = value
            codes = encode(moment, maxima[blocks], code, piece.lead)
            flat(state[f"state{i}"])[piece.local] = codes


def maxima_of(kept: Tensor | Maxima, piece: Piece) -> tuple[Tensor, slice]:
    """Return this rank's largest magnitudes of a tensor, and which of them are a piece's."""
    start = piece.first // BLOCK
    end = -(-(piece.first + piece.local.stop - piece.local.start) // BLOCK)
    if torch.is_tensor(kept):
        return kept, slice(start, end)
    own = kept.shard.blocks.start
    return kept.values, slice(start - own, end - own)


def keep(target: Tensor, value: Tensor, bits: Tensor | None, lane: int) -> None:
    """Store `value` in the target's type, rounded at random if there are bits for it."""
    if bits is not None and target.dtype == torch.bfloat16:
        value = rounded(value, bits, lane)
    target.copy_(value)


def make(c: DPOConfig, named: list[tuple[str, nn.Parameter]]) -> SmallAdamW:
    """Return the optimizer that the flags ask for."""
    groups = []
    for rule, members in rules_of(c, named):
        found = groups_of(c, members)
        groups += [group | {"rule": rule} if rule else group for group in found]
    for group in groups:
        group["lr"] = c.learning_rate
        group["betas"] = (c.adam_beta1, c.adam_beta2)
        group["eps"] = c.adam_epsilon
    names = {p: name for name, p in named}
    return SmallAdamW(groups, names, c.seed, c.optim in EIGHT_BIT, rounds_at_random(c))
