"""Losses that see the whole global batch at once: those that sort it (aot), that move delta before they use it, or where
--exact_global_loss asks for it.

All pairs are scored without gradients first; the loss's derivative by each pair's log-probs is then a constant, with which
the micro-batches back-propagate one by one and give the exact gradient. The price is one more forward.
"""

import numpy as np
import torch
from torch import Tensor


def global_losses(trainer, pairs: np.ndarray, batches: list) -> dict[int, tuple[Tensor, Tensor]]:
    """{pair id: (its loss, d sum of losses / d its (chosen logp, rejected logp, nll))}."""
    x, scored = trainer.score_all(trainer.train_store, pairs, batches)
    if "bco_pair" in trainer.args.loss_type and trainer.args.bco_delta == "first":
        rewards = trainer.args.beta * (x.chosen_logratios + x.rejected_logratios).detach() / 2
        trainer.add_rewards(float(rewards.sum()), len(rewards))
    logps, nll = scored.logps.clone().requires_grad_(), scored.chosen_nll.clone().requires_grad_()
    x = x._replace(policy_chosen_logps=logps[:, 0], policy_rejected_logps=logps[:, 1], chosen_nll=nll)
    values = trainer.pair_losses(x, scored)
    grads = torch.autograd.grad(values.sum(), (logps, nll), allow_unused=True)
    by_logps, by_nll = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, (logps, nll)))
    slopes = torch.cat([by_logps, by_nll[:, None]], 1)  # (P, 3)
    return {int(i): (values[at].detach(), slopes[at]) for at, i in enumerate(pairs)}


def from_whole(whole: dict[int, tuple[Tensor, Tensor]], scored, batch) -> tuple[Tensor, Tensor]:
    """A micro-batch's losses, and the linear form with the gradient that the whole global batch gives its pairs."""
    if not len(batch.pair_ids):
        return scored.chosen_nll, scored.chosen_nll
    rows = [whole[i] for i in batch.pair_ids.tolist()]
    values, slopes = torch.stack([v for v, _ in rows]), torch.stack([s for _, s in rows])
    return values, (slopes * torch.cat([scored.logps, scored.chosen_nll[:, None]], 1)).sum(1)
