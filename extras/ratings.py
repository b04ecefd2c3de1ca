"""Losses that read the rows' own scores: the rows must have them."""

import numpy as np

from losses import READS_RATINGS


def check(trainer) -> None:
    """Raise ValueError for a pair without scores, or, since odpo takes the log of their gap, with chosen not above rejected."""
    reading = sorted(set(trainer.args.loss_type) & READS_RATINGS)
    log_gap = "odpo" in reading and trainer.args.odpo_margin == "log"
    for store in filter(None, (trainer.train_store, trainer.eval_store)):
        gap = store.ratings[:, 0] - store.ratings[:, 1]
        bad = np.flatnonzero(np.isnan(gap) | (gap <= 0) if log_gap else np.isnan(gap))
        if len(bad):
            found = "no chosen_score and rejected_score" if np.isnan(gap[bad[0]]) else "chosen_score <= rejected_score"
            raise ValueError(f"{store.where(int(bad[0]))}: {found}, which --loss_type {reading[0]} reads "
                             f"({len(bad)} such rows)")
