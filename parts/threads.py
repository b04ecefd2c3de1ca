"""How many threads compute, and how they wait. OpenMP reads both when torch is loaded, so dpo.py
imports this before torch; what the user's environment says wins.

A thread that is done spins until the others are, with GNU OpenMP for milliseconds. Where other
programs run too, the thread that it waits for may be off its core meanwhile, and a run takes up to
twice the CPU time that it needs. Here threads sleep after a tenth of that, still longer than the
gap between two operations: less would cost time where nothing else runs.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds, of how many


def set_threads(environment: MutableMapping[str, str], quota: Path, cores: int) -> None:
    """Set what the environment leaves open; threads are at most what a container's quota allows."""
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = "30000"
    allowed = granted_cores(quota)
    if "OMP_NUM_THREADS" not in environment and allowed is not None and allowed < cores:
        environment["OMP_NUM_THREADS"] = str(allowed)


def granted_cores(quota: Path) -> int | None:
    """Return the cores' worth of time that the quota grants, rounded up; None without one."""
    try:
        most, period = quota.read_text().split()
        return math.ceil(int(most) / int(period))
    except (OSError, ValueError):  # no container, or "max"
        return None


set_threads(os.environ, QUOTA, os.cpu_count() or 1)
