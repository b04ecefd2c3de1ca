"""Losses that see the whole global batch at once: those that sort it (aot), those that move delta
before they use it, or any with --exact_global_loss.

All pairs are scored without gradients first. The derivative of the loss by each pair's log-probs is
then a constant, with which the micro-batches back-propagate one by one and give the exact gradient.
The price is one more forward. With dropout (--disable_dropout false) the two forwards draw
different masks, so the gradient is that of the loss at other masks, no longer exact. """

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def whole_batch_loss(trainer: Any, pairs: np.ndarray, batches: list) -> Callable:
    """Return f(x, scored, batch) -> (B,), in the place of `DPOTrainer.pair_losses`.

    The values are the losses of the batch's pairs within the global batch. Their gradient is that
    of a form that is linear in the pairs' log-probs, with the slopes that the global batch gives
    them.
    """
    values, slopes = losses_and_slopes(trainer, pairs, batches)
    row_of = {int(pair): row for row, pair in enumerate(pairs)}

    def loss_of(x: Any, scored: Any, batch: Any) -> Tensor:  # (B,)
        if not len(batch.pair_ids):
            return scored.chosen_nll
        rows = torch.tensor([row_of[pair] for pair in batch.pair_ids.tolist()])
        rows = rows.to(slopes.device, non_blocking=True)
        inputs = torch.cat([scored.logps, scored.chosen_nll[:, None]], 1)  # (B, 3)
        linear = (slopes[rows] * inputs).sum(1)
        return values[rows] + (linear - linear.detach())

    return loss_of


def losses_and_slopes(trainer: Any, pairs: np.ndarray, batches: list) -> tuple[Tensor, Tensor]:
    """Return the pairs' losses (P,) and slopes (P, 3).

    The slopes are d (sum of losses) / d (chosen logp, rejected logp, nll).
    """
    x, scored = trainer.score_all(trainer.train_store, pairs, batches)
    c = trainer.args
    if "bco_pair" in c.loss_type and c.bco_delta == "first":
        rewards = c.beta * (x.chosen_logratios + x.rejected_logratios).detach() / 2
        total = float(rewards.sum())
        if math.isfinite(total):  # a step that is skipped must not spoil all later ones
            trainer.add_rewards(total, len(rewards))
    logps = scored.logps.clone().requires_grad_()
    nll = scored.chosen_nll.clone().requires_grad_()
    x = x._replace(
        policy_chosen_logps=logps[:, 0], policy_rejected_logps=logps[:, 1], chosen_nll=nll)
    values = trainer.pair_losses(x, scored)
    grads = torch.autograd.grad(values.sum(), (logps, nll), allow_unused=True)
    by_logps, by_nll = (  # None: the loss reads only the other one
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, (logps, nll)))
    return values.detach(), torch.cat([by_logps, by_nll[:, None]], 1)
