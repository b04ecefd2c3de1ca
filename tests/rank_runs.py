"""Several training runs in one process group: torchrun --nproc_per_node=N rank_runs.py runs.json

runs.json is a list of DPOConfig's options. Starting the ranks costs seconds, a run of the tiny model costs one.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dpo  # noqa: E402
from parts.ranks import ending_ranks  # noqa: E402

RUNS = json.loads(Path(sys.argv[1]).read_text())
with ending_ranks():
    for options in RUNS:
        dpo.DPOTrainer(args=dpo.DPOConfig(**options)).train()

# A thread of gloo's that outlives the group may abort this process while Python ends. After FSDP they do: DTensor's
# caches keep its mesh, which keeps the group.
threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name] or any(options.get("fsdp") for options in RUNS), threads
