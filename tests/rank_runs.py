"""Several training runs in one process group: torchrun --nproc_per_node=N rank_runs.py runs.json

runs.json is a list of DPOConfig's options. Starting the ranks costs seconds, a run of the tiny model costs one.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dpo  # noqa: E402
from parts.ranks import ending_ranks  # noqa: E402

with ending_ranks():
    for options in json.loads(Path(sys.argv[1]).read_text()):
        dpo.DPOTrainer(args=dpo.DPOConfig(**options)).train()
names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
print(f"threads of gloo's left: {sum('gloo' in name for name in names)}")
