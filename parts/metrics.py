"""TRL's metrics, from sums over the pairs of a global batch.

Every rank adds up its own pairs in float64, and the sums of all ranks are added. A mean is divided
once, by all pairs or by all tokens, so no metric depends on ranks or micro-batches.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import losses

# What a forward measures of each pair besides its log-probs: sums over tokens.
STATS = (
    "entropy", "top1", "chosen_logits", "rejected_logits", "chosen_tokens", "rejected_tokens")
PAIR_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "kl")
SUMS = ("loss", *PAIR_METRICS, *STATS, "aux_loss")


class Scored(NamedTuple):
    """What one forward says of B pairs, in their order.

    Only `logps`, `chosen_nll`, `aux_loss` carry gradients.
    """

    logps: Tensor  # (B, 2) chosen, rejected: sums over the completion, by LD-DPO if ld_alpha is set
    chosen_nll: Tensor  # (B,) -log pi(chosen), always the plain sum
    wpo: Tensor  # (B,) WPO weights; ones without use_weighting
    stats: Tensor  # (B, 6) see STATS
    aux_loss: Tensor | None = None  # () load balancing of a mixture of experts, unscaled

    def table(self) -> Tensor:  # (B, 10)
        """Return all but the auxiliary loss, one row a pair: what ranks exchange."""
        return torch.cat(
            [self.logps, self.chosen_nll[:, None], self.wpo[:, None], self.stats], 1)

    @classmethod
    def from_table(cls, table: Tensor) -> "Scored":
        logps, nll, wpo, stats = table.split(COLUMNS, 1)
        return cls(logps=logps, chosen_nll=nll[:, 0], wpo=wpo[:, 0], stats=stats)


COLUMNS = (2, 1, 1, len(STATS))  # of Scored.table: logps, chosen_nll, wpo, stats

class Sums:
    """Sums of SUMS over the forwards of a step."""

    def __init__(self, beta: float, device: torch.device):
        self.beta = beta
        self.total = torch.zeros(len(SUMS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: losses.PairLogps, scored: Scored, values: Tensor, share: float) -> None:
        """Add one forward.

        `share` is its part of the global batch, by which the auxiliary loss counts.
        """
        pair = losses.pair_metrics(x, self.beta)
        columns = [values, *(pair[name] for name in PAIR_METRICS), *scored.stats.unbind(1)]
        sums = [column.detach().to(self.total).sum() for column in columns]
        aux = self.total.new_zeros(())
        if scored.aux_loss is not None:
            aux = scored.aux_loss.detach().to(self.total) * share
        self.total += torch.stack([*sums, aux])


def metrics_of(sums: dict[str, float], pairs: int) -> dict[str, Any]:
    """Divide sums over a global batch by its pairs, or by the tokens they are about."""
    per_token = lambda name, tokens: sums[name] / tokens if tokens else 0.0
    chosen = sums["chosen_tokens"]
    rejected = sums["rejected_tokens"]
    metrics = {"loss": sums["loss"] / pairs}
    metrics |= {name: sums[name] / pairs for name in PAIR_METRICS}
    metrics["logits/chosen"] = per_token("chosen_logits", chosen)
    metrics["logits/rejected"] = per_token("rejected_logits", rejected)
    metrics["entropy"] = per_token("entropy", chosen + rejected)
    metrics["mean_token_accuracy"] = per_token("top1", chosen)
    if sums["aux_loss"]:
        metrics["aux_loss"] = sums["aux_loss"]
    return metrics


# The names that an evaluation may be judged by.
METRICS = tuple(metrics_of(dict.fromkeys(SUMS, 0.0), 1))


@torch.no_grad()
def length_bias(x: losses.PairLogps) -> float:
    """Correlate, over pairs, the margin r_w - r_l with the length difference n_w - n_l (tokens).

    0 where the implicit reward does not ask for length, 1 where it asks for nothing else; 0 too
    where either is the same for all pairs.
    """
    margins = x.chosen_logratios - x.rejected_logratios
    longer = x.chosen_lengths - x.rejected_lengths
    if len(margins) < 2:
        return 0.0
    r = torch.corrcoef(torch.stack([margins, longer]).double())[0, 1]
    return float(r.nan_to_num())
