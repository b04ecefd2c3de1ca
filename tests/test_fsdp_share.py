"""Under --fsdp each of two ranks holds half, and what is predicted for it is what its tensors take."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_rows, make_tiny
from safetensors.torch import save_file
from test_ranks import COMMON, LORA

import model as models

COUNT = """
import json, os, sys, weakref
sys.path[:0] = [{root!r}, {tests!r}]
import dpo
from extras.run import forecast
from parts.ranks import ending_ranks
from test_plan import Counting

class Exact(Counting):  # FSDP frees what it gathered by making its storage small
    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live and tensor.device.type != "meta":
            self.live[storage._cdata] = weakref.ref(storage)
            weakref.finalize(storage, self.live.pop, storage._cdata)

    def __torch_dispatch__(self, *args, **kwargs):
        out = super().__torch_dispatch__(*args, **kwargs)
        self.peak = max(self.peak, sum(storage.nbytes() for r in list(self.live.values()) if (storage := r()) is not None))
        return out

local = lambda t: t.to_local() if hasattr(t, "to_local") else t
size = lambda tensors: sum(t.untyped_storage().nbytes() for t in {{local(t).untyped_storage()._cdata: local(t) for t in tensors}}.values())
with ending_ranks():
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(**json.load(open(sys.argv[1]))))
    keep = dpo.DPOTrainer.train_step
    def step(self):
        moments = [t for s in self.optimizer.state.values() for t in s.values() if t.dim()]
        models = [m for m in (self.model, self.reference.model) if m is not None]
        held = [local(p) for m in models for p in m.parameters()] + [b for m in models for b in m.buffers()]
        with Exact(*held, *map(local, moments)) as counting:
            done = keep(self)
        found.update(peak=counting.peak, moments=size(moments), weights=size(self.model.parameters()))
        return done
    found = {{}}
    dpo.DPOTrainer.train_step = step
    predicted = forecast.memory(trainer.model.config, forecast.run_of(trainer))
    trainer.train()
    line = json.dumps(found | {{"predicted": predicted, "rank": trainer.ranks.rank}})
    os.write(2, (line + "\\n").encode())  # in one write: the other rank's line may come at the same time
"""


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A model whose weights are no small change beside its activations: (directory, pairs)."""
    home = tmp_path_factory.mktemp("wider")
    make_tiny(home)
    config = json.loads((home / "config.json").read_text()) | dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4)
    (home / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file({n: torch.randn(p.shape) * 0.1 for n, p in models.Decoder(models.read_config(config)).named_parameters()},
              home / "model.safetensors", metadata={"format": "pt"})
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_rows(32, seed=3)))
    return home


@pytest.mark.parametrize("kind", ["all weights", "LoRA"])
def test_each_of_two_ranks_holds_half_and_takes_what_was_predicted(wider, tmp_path, kind):
    options = COMMON | dict(model_name_or_path=str(wider), dataset_name=str(wider / "pairs.jsonl"), output_dir=str(tmp_path / "out"),
                            cache_dir=str(tmp_path / "c"), per_device_train_batch_size=8, fsdp="full_shard", num_train_epochs=1.0)
    options |= LORA | dict(lora_target_modules=["all-linear"]) if kind == "LoRA" else {}
    (tmp_path / "options.json").write_text(json.dumps(options))
    (tmp_path / "count.py").write_text(COUNT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(tmp_path / "count.py"), str(tmp_path / "options.json")], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"peak"')]
    assert done.returncode == 0 and len(found) == 2, done.stderr[-3000:]
    for rank in found:
        print(rank)
        assert rank["weights"] == pytest.approx(rank["predicted"]["weights"], rel=0.02)
        assert rank["moments"] == pytest.approx(rank["predicted"]["moments"], rel=0.02)
        assert rank["peak"] == pytest.approx(rank["predicted"]["total"], rel=0.15)
