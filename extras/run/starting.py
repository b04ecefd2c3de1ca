"""What some flags leave open until the ranks have joined."""

from extras.models.opening import own_dtype
from extras.run.context import grouped
from parts.config import DPOConfig
from parts.ranks import Ranks


def settle(c: DPOConfig, ranks: Ranks) -> tuple[str, Ranks]:
    """Return the type of the weights (--dtype auto) and the ranks (--context_parallel_size).

    Raises ValueError for ranks that cannot be divided into groups.
    """
    dtype = own_dtype(c, ranks) if c.dtype == "auto" else c.dtype
    return dtype, grouped(ranks, c.context_parallel_size)
