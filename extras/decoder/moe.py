"""Mixtures of experts: a router sends every token to a few of many MLPs (Switch Transformer,
arXiv:2101.03961).

Tokens are sorted by expert, so that each expert multiplies its own rows once and sees no token
that was not sent to it.
"""

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.kernels import ACTIVATIONS, product


class Router(nn.Module):
    """Choose `per_token` experts for each token, and their weights.

    Weights are the softmax's probabilities; with moe["scales_input"] sigmoids of the logits, as
    Llama 4's.
    """

    def __init__(self, hidden_size: int, moe: dict):
        super().__init__()
        self.per_token = moe["per_token"]
        self.normalize = moe["normalize"]
        self.scales_input = moe.get("scales_input", False)
        self.in_features = hidden_size
        self.out_features = moe["experts"]
        self.weight = nn.Parameter(torch.zeros(moe["experts"], hidden_size))
        self.bias = nn.Parameter(torch.zeros(moe["experts"])) if moe.get("clamp") else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (T, experts); weights and indices of the chosen, (T, per_token) each."""
        return self.route(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.scales_input:
            best, chosen = logits.topk(self.per_token, dim=-1)
            return logits, best.to(torch.promote_types(best.dtype, torch.float32)).sigmoid(), chosen
        weights, chosen = probabilities(logits).topk(self.per_token, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen


class GroupRouter(Router):
    """The routers of DeepSeek-V3 and GLM (arXiv:2412.19437 section 2.1.2), and of DeepSeek-V2.

    Scores are sigmoids of the logits. The choice is by score + correction bias, among the experts
    of the groups whose two best are best. The weights are the chosen scores alone, normalized,
    times `scale`. With moe["scores"] "softmax" there is no bias, and a group counts by its best.

    In pretraining the bias is moved by the experts' loads, not by a gradient. Here it is a buffer:
    nothing moves it, and it keeps the type of the files, since a choice may hang on its last digit.
    """

    def __init__(self, hidden_size: int, moe: dict):
        super().__init__(hidden_size, moe)
        self.groups = moe["groups"]
        self.groups_kept = moe["groups_kept"]
        self.scale = moe["scale"]
        self.biased = moe["scores"] == "sigmoid"
        if self.biased:
            self.register_buffer("e_score_correction_bias", torch.zeros(moe["experts"]))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Move to another device, or cast all but the bias: what .to(...) calls."""
        before = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if before is not None and self.e_score_correction_bias.dtype != before.dtype:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self

    def logits(self, x: Tensor) -> Tensor:
        """Return them in float32 or wider, under autocast too."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.sigmoid() if self.biased else probabilities(logits)
        with torch.no_grad():
            chosen = self.choose(scores)
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scale, chosen

    def choose(self, scores: Tensor) -> Tensor:  # (T, per_token)
        if self.biased:
            scores = scores + self.e_score_correction_bias
        if self.groups > 1:
            grouped = scores.unflatten(1, (self.groups, -1))  # (T, groups, experts of a group)
            best = grouped.topk(2 if self.biased else 1, dim=-1).values.sum(-1)
            kept = best.topk(self.groups_kept, dim=-1).indices
            left_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            scores = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(1)
        return scores.topk(self.per_token, dim=-1).indices


def probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of each expert, with matrices stacked as in transformers 5.

    With moe["clamp"] they are gpt-oss's: with biases, `clamped_product` for act(gate) * up, and the
    rows of gate and up in turn in gate_up_proj. Nemotron-H's have no gate: down(act(up(x))).
    `first` names the stack before the activation.
    """

    def __init__(self, hidden_size: int, moe: dict, act: Callable):
        super().__init__()
        self.act = act
        self.product = product
        self.gated = moe.get("gated", True)
        self.first = "gate_up_proj" if self.gated else "up_proj"
        count = moe["experts"]
        rows = (2 if self.gated else 1) * moe["size"]
        setattr(self, self.first, nn.Parameter(torch.zeros(count, rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.zeros(count, hidden_size, moe["size"]))
        self.clamp = moe.get("clamp")  # (alpha, limit)
        if self.clamp:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(count, 2 * moe["size"]))
            self.down_proj_bias = nn.Parameter(torch.zeros(count, hidden_size))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert to its rows of x: the first counts[0] are expert 0's, and so on."""
        inner = self.combine(self.project(self.first, x, counts))
        return self.project("down_proj", inner, counts)

    def project(self, name: str, x: Tensor, counts: Tensor) -> Tensor:
        """Return the product with one stack, `first` or "down_proj"."""
        out = grouped_linear(x, getattr(self, name), counts)
        if not self.clamp:
            return out
        numbers = torch.arange(len(counts), device=x.device)
        expert = numbers.repeat_interleave(counts, output_size=len(x))  # of each row
        # an embedding, because its gradient is summed in the same order every time
        return out + F.embedding(expert, getattr(self, f"{name}_bias").to(out.dtype))

    def combine(self, gate_up: Tensor) -> Tensor:  # (n, size)
        if not self.gated:
            return self.act(gate_up)
        if self.clamp:
            return clamped_product(gate_up[:, ::2], gate_up[:, 1::2], *self.clamp)
        return self.product(self.act, *gate_up.chunk(2, -1))


def clamped_product(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """g sigmoid(alpha g) (u + 1), with g = min(gate, limit) and u = up within +-limit."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:  # (n, out)
    """Multiply the rows of each expert e by weight[e]^T.

    x (n, in), sorted by expert; weight (experts, out, in); counts (experts,) rows of each.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    # grouped_mm accepts only rows of a multiple of 16 bytes
    is_aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.bfloat16 and is_aligned and len(x):
        # and no matrices whose numbers lie apart, as those of a LoRA do
        whole = weight.contiguous().transpose(1, 2)
        return F.grouped_mm(x, whole, offs=counts.cumsum(0).int())
    parts = [part @ w.T for part, w in zip(x.split(counts.tolist()), weight)]
    return torch.cat(parts)


def mix(
    experts: nn.Module, count: int, x: Tensor, weights: Tensor, chosen: Tensor,
    scales_input: bool = False,
) -> Tensor:  # (T, C)
    """Return the sum of what each token's `chosen` of the `count` experts make of it.

    `weights` and `chosen` are (T, per_token); weights scale what the experts read, or what they
    return.
    """
    order = chosen.flatten().argsort(stable=True)  # (T * per_token,) sorted by expert
    # not by bincount, which waits for the device
    counts = torch.zeros(count, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
    sent = x[order // chosen.shape[1]]
    if scales_input:
        sent = sent * weights.flatten()[order, None].to(sent.dtype)
    out = experts(sent, counts)
    numbers = torch.arange(len(order), device=order.device)
    back = torch.empty_like(order).scatter_(0, order, numbers)
    out = out[back].unflatten(0, chosen.shape)  # (T, per_token, C)
    return out.sum(1) if scales_input else (out * weights.to(out.dtype)[..., None]).sum(1)


def make_sparse(config: Any, make_mlp: Callable[[Any, int], nn.Module]) -> nn.Module:
    """Make the MLP of a sparse layer; `make_mlp(config, size)` makes a dense one."""
    size = config.moe["shared_size"]
    shared = make_mlp(config, size) if size else None
    sparse = SparseMLP(config.hidden_size, config.moe, ACTIVATIONS[config.hidden_act], shared)
    inner = config.moe.get("inner")
    if inner:
        sparse.fc1_latent_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        sparse.fc2_latent_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)
    return sparse


class SparseMLP(nn.Module):
    """Router and experts, and the expert that sees every token: Qwen2-MoE's through a gate,
    DeepSeek's as it is ("shared_experts", since several are one larger), and Llama 4's and
    Granite's. Llama 4's router scales what its experts read, the others' what they return. The
    largest of Nemotron-H have experts on moe["inner"] channels, between two projections.
    """

    def __init__(self, hidden_size: int, moe: dict, act: Callable, shared: nn.Module | None):
        super().__init__()
        is_grouped = "groups" in moe
        self.gate = GroupRouter(hidden_size, moe) if is_grouped else Router(hidden_size, moe)
        self.experts = Experts(moe.get("inner") or hidden_size, moe, act)
        self.fc1_latent_proj = self.fc2_latent_proj = nn.Identity()
        self.scales_input = moe.get("scales_input", False)
        self.is_balanced = moe["router_aux_loss_coef"] is not None
        self.shared_name = "shared_experts" if is_grouped else "shared_expert"
        self.add_module(self.shared_name, shared)
        self.shared_expert_gate = None
        if shared is not None and not is_grouped and moe.get("shared_gate", True):
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return hidden states (T, C), and the router's logits (T, experts) if its experts have a
        balancing loss."""
        logits, weights, chosen = self.gate(x)
        given = self.fc1_latent_proj(x)
        out = mix(self.experts, logits.shape[1], given, weights, chosen, self.scales_input)
        out = self.fc2_latent_proj(out)
        shared = getattr(self, self.shared_name)
        if self.shared_expert_gate is not None:
            out = out + self.shared_expert_gate(x).sigmoid() * shared(x)
        elif shared is not None:
            out = out + shared(x)
        return (out, logits) if self.is_balanced else out


def load_balancing_loss(
    router_logits: list[Tensor], spans: Tensor, per_token: int,
) -> Tensor:  # ()
    """experts * sum_e f_e P_e (arXiv:2101.03961 eq. 4).

    f_e is the share of tokens sent to e, times per_token; P_e is its mean probability. Both are
    over the tokens of all layers of this forward together, as transformers computes it.

    A token counts once for every completion whose sequence holds it: a shared prompt counts
    twice, as in two padded sequences. The loss of a batch is therefore not the mean of its parts'
    losses; it is computed per forward.
    """
    weight = token_weights(spans).to(router_logits[0].device, non_blocking=True)  # (T,)
    sent = torch.zeros((), device=weight.device)
    probability = torch.zeros((), device=weight.device)
    for logits in router_logits:
        p = probabilities(logits)  # (T, experts)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(per_token, dim=-1).indices, 1.0)
        sent = sent + weight.to(p.dtype) @ chosen
        probability = probability + weight.to(p.dtype) @ p
    total = weight.sum() * len(router_logits)
    return len(sent) * ((sent / total) * (probability / total)).sum()


def token_weights(spans: Tensor) -> Tensor:  # (T,)
    """Count the completions whose sequence holds each token.

    For a prompt these are the spans that it is a prefix of; for any other token, 1.
    """
    start, end, prefix_start, prefix_end = spans.cpu().unbind(1)
    holds = (prefix_start[None] <= start[:, None]) & (end[:, None] <= prefix_end[None])
    holds &= prefix_end[None] > prefix_start[None]  # (S, S) whether span i lies in prefix j
    return holds.sum(1).clamp(min=1).repeat_interleave(end - start)
