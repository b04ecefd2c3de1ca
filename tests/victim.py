"""dpo.py, slowed where it is to be killed, and telling where it is: python victim.py DIRECTORY flags of dpo.py

DIRECTORY/rank-R holds the process id, the phase that rank R is in, and how many times it has come to it.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dpo  # noqa: E402
from parts import checkpoints, store  # noqa: E402
from parts.reference import PrecomputedReference  # noqa: E402

PHASES = {"tokenizing": (store, "write_pairs"), "precomputing": (PrecomputedReference, "run"),
          "stepping": (dpo.DPOTrainer, "update"), "saving": (checkpoints, "sync"), "evaluating": (dpo.DPOTrainer, "score_all"),
          "finishing": (dpo.DPOTrainer, "write_model")}
NOTE = Path(sys.argv[1]) / f"rank-{os.environ.get('RANK', 0)}"


def tell(phase: str, owner, name: str) -> None:
    keep, times = getattr(owner, name), [0]

    def slow(*arguments, **options):
        times[0] += 1
        scratch = NOTE.with_suffix(".new")
        scratch.write_text(f"{os.getpid()} {phase} {times[0]}")
        os.replace(scratch, NOTE)
        time.sleep(0.01)
        result = keep(*arguments, **options)
        time.sleep(0.01)
        return result

    setattr(owner, name, slow)


for phase, place in PHASES.items():
    tell(phase, *place)
sys.exit(dpo.main(sys.argv[2:]))
