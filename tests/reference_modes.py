"""Runs in this process, one after another: `torchrun --nproc_per_node=N tests/reference_modes.py RUNS.json`.

RUNS.json is a list of DPOConfig's fields; the metrics of each run lie in its output_dir.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import dpo  # noqa: E402
from parts.ranks import ending_ranks  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    with ending_ranks():
        for options in json.loads(Path(sys.argv[1]).read_text()):
            dpo.DPOTrainer(args=dpo.DPOConfig(**options)).train()
