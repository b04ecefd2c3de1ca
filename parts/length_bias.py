"""Does the implicit reward ask for length? One number for each evaluation."""

import torch

from losses import PairLogps


@torch.no_grad()
def length_bias(x: PairLogps) -> float:
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
