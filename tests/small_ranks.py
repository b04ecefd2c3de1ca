"""The optimizers on shards: torchrun --nproc_per_node=N small_ranks.py

Each rank steps its shards of some tensors, and then the whole tensors, with the same gradients; weights and state must be
the same to the bit, and up to rounding where a step sums over the ranks.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras.run import small_adamw  # noqa: E402
from parts.config import DPOConfig  # noqa: E402

# Whole blocks on every rank; blocks on two ranks; more than two ranks in one block; fewer rows than ranks; a short one.
SHAPES = {"whole": (48, 256), "cut": (101, 47), "thin": (4800, 1), "long": (2, 5000), "norm": (576,), "flat": (5001,)}
MODES = {
    "bf16": dict(dtype="bfloat16"), "8 bits": dict(optim="adamw_8bit"), "both": dict(optim="adamw_8bit", dtype="bfloat16"),
    "Muon": dict(optim="muon"), "Muon, bf16": dict(optim="muon", dtype="bfloat16"),
    "Adafactor": dict(optim="adafactor"), "Adafactor, float64": dict(optim="adafactor", dtype="float64")}
BOUNDS = {"Adafactor": 1e-6, "Adafactor, float64": 1e-14}  # its means are sums over the ranks


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def stepped(c: DPOConfig, place, steps: int = 3) -> dict[str, torch.Tensor]:
    """Weights and state after some steps; `place` puts a tensor where it is to be."""
    dtype = getattr(torch, c.dtype)
    named = {name: torch.nn.Parameter(place(t)) for name, t in tensors(0, dtype).items()}
    optimizer = small_adamw.make(c, list(named.items()))
    for step in range(steps):
        for name, gradient in tensors(step + 1, dtype).items():
            named[name].grad = place(gradient)
        optimizer.step()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    found = {name: whole(p.detach()) for name, p in named.items()}
    for name, p in named.items():
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[p].items() if key != "step"}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for mode, options in MODES.items():
        c = DPOConfig(learning_rate=1e-3, weight_decay=0.1, **options)
        one = stepped(c, lambda t: t.clone())
        many = stepped(c, lambda t: distribute_tensor(t.clone(), mesh, [Shard(0)]))
        assert one.keys() == many.keys()
        apart = {name: float((one[name].double() - many[name].double()).abs().max()) for name in one}
        if mode in BOUNDS:
            torch.testing.assert_close(many, one, rtol=0, atol=BOUNDS[mode])
            continue
        assert all(torch.equal(one[name], many[name]) for name in one), (mode, {n: d for n, d in apart.items() if d})
    dist.destroy_process_group()
