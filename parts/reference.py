"""A reference that runs once, before training, and is then read from a file; and none at all.

The reference never changes (except in TR-DPO), so its log-probs are constants of the pairs: running
it once saves a forward in every later epoch, and the memory of a second model in every step.
dpo.Reference is the live one.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parts import c_layers, ref_cache
from parts.faults import check_weights, naming
from parts.log import Waiting
from parts.output import cache_directory
from parts.place import tensors_of


class NoReference:
    """For losses without a reference: its log-probs count as 0."""

    model = None
    adapter: dict = {}
    is_live = False

    def sums(self, batch: Any) -> Tensor:  # (B, 2, 2)
        return batch.ratings.new_zeros(len(batch.lengths), 2, 2)

    def attach(self, batch: Any, store: Any) -> Any:
        return batch

    def prepare(self, *sets: tuple) -> None:
        pass

    def move_if_due(self, step: int) -> None:
        pass

    def needs_policy(self, store: Any) -> bool:
        return False


class PrecomputedReference:
    """Run `live` once over the pairs that no earlier run visited, and keep the sums on disk.

    The file is found again by what the reference says of given tokens: its weights, to the bit, and
    how it computes. It does not depend on the loss, beta, the batch size or the ranks. The pass is
    cut into blocks by pair number, so an interrupted pass computes what an uninterrupted one does.
    """

    is_live = False

    def __init__(self, trainer: Any, live: Any):
        self.trainer = trainer
        self.live = live
        self.had_model = False  # besides the policy, before its memory was freed
        self.tables: dict[str, np.memmap] = {}  # digest of a store -> its sums

    @property
    def model(self) -> nn.Module | None:
        """Return the model that `live` holds besides the policy; None once it has run."""
        return self.live.model

    def sums(self, batch: Any) -> Tensor:  # (B, 2, 2)
        assert batch.ref_logps is not None, "prepare() runs the reference before any batch is made"
        return batch.ref_logps

    def attach(self, batch: Any, store: Any) -> Any:
        """Return the batch with its pairs' sums; unchanged while they are still being computed."""
        if store.digest not in self.tables:
            return batch
        sums = ref_cache.take_sums(self.tables[store.digest], batch.pair_ids.numpy())
        return batch._replace(ref_logps=torch.from_numpy(sums))

    def move_if_due(self, step: int) -> None:
        pass

    def needs_policy(self, store: Any) -> bool:
        return store.digest not in self.tables and self.live.needs_policy(store)

    # The pass

    def prepare(self, *sets: tuple) -> None:
        """Compute the sums of all pairs that the run visits, and those of `sets` of (store, pairs),
        unless the cache has them.

        Raises ValueError for a set that comes after the reference is gone.
        """
        trainer = self.trainer
        visits = [(store, pairs) for store, pairs in sets if not self.knows(store, pairs)]
        if self.tables:
            self.check_there(visits)
        else:
            own = [(trainer.train_store, self.visited()), *trainer.eval_sets.values()]
            visits = own + visits
        if not visits:
            return
        tensors = self.tensors()
        held = [tensor for _, tensor in tensors.values()]
        digest = trainer.place.from_first(partial(self.digest, tensors), held)["digest"]
        for store, pairs in visits:
            self.tables[store.digest] = self.fill_table(store, pairs, digest)
        self.had_model = self.had_model or self.live.model is not None
        self.live.model = None  # no longer needed; free its memory

    def knows(self, store: Any, pairs: np.ndarray) -> bool:
        """Tell whether the sums of these pairs are there."""
        table = self.tables.get(store.digest)
        return table is not None and not np.isnan(ref_cache.take_sums(table, pairs)).any()

    def check_there(self, visits: list) -> None:
        """Raise ValueError if there are pairs to visit, and the reference can no longer be run."""
        has_trained = self.trainer.position.step > 0 and not self.trainer.lora
        if visits and (self.had_model or has_trained):
            raise ValueError(
                "the reference has been run and is no longer in memory, so it cannot be run over "
                "other pairs; give them as eval_dataset when the trainer is made, or keep the "
                "reference with --no_precompute_ref_log_probs")

    def visited(self) -> np.ndarray:
        """Return the training pairs that the run's steps touch, sorted."""
        trainer = self.trainer
        if trainer.schedule.total_steps >= trainer.schedule.steps_per_epoch:
            return trainer.train_pairs
        pairs = [trainer.pairs_of(step) for step in range(trainer.schedule.total_steps)]
        return np.sort(np.concatenate([np.arange(0), *pairs]))

    def fill_table(self, store: Any, pairs: np.ndarray, digest: str) -> np.memmap:
        """Return the table of a store, complete for `pairs`."""
        trainer = self.trainer
        name = hashlib.sha256(f"{store.digest} {digest}".encode()).hexdigest()[:32]
        path = cache_directory(trainer.args.cache_dir) / f"ref-{name}.bin"
        dtype = np.dtype(str(trainer.precision.sums).removeprefix("torch."))
        table = ref_cache.open_sums(path, len(store), dtype)
        missing = pairs[self.missing(path, table, pairs)]
        total = len(missing) // trainer.ranks.world
        with Waiting(trainer.log, "reference, once before training", total) as bar:
            for block in ref_cache.blocks_of(missing):
                sums = self.run(store, block, bar)
                if trainer.ranks.first:
                    ref_cache.write_sums(path, table, block, sums)
        trainer.ranks.barrier()
        return table

    def missing(self, path: Path, table: np.memmap, pairs: np.ndarray) -> np.ndarray:  # (P,) bool
        """Return which pairs' sums rank 0 does not find in the cache."""
        trainer = self.trainer
        missing = np.zeros(len(pairs), bool)
        if trainer.ranks.first:
            missing, damaged = ref_cache.missing_sums(table, pairs)
            for number in damaged:
                trainer.log.say(
                    f"{path}: damaged in block {number}; the reference is run again over its pairs")
        shared = torch.from_numpy(missing.astype(np.uint8)).to(trainer.ranks.device)
        return trainer.ranks.sum(shared).cpu().numpy() > 0

    def run(self, store: Any, pairs: np.ndarray, bar: Any) -> np.ndarray:  # (P, 2, 2)
        """Run the reference over `pairs`, sorted, divided among the ranks; return their sums."""
        trainer = self.trainer
        sums = torch.zeros(len(pairs), 2, 2, dtype=torch.float64, device=trainer.ranks.exact)
        for rows in trainer.forwards(store, pairs, trainer.args.per_device_eval_batch_size):
            batch = trainer.batch(store, rows)
            with naming(batch):
                at = torch.from_numpy(np.searchsorted(pairs, batch.pair_ids.numpy()))
                at = at.to(sums.device, non_blocking=True)
                sums.index_copy_(0, at, self.live.sums(batch).to(sums))
            bar.update(len(rows))
        found = trainer.ranks.sum(sums).to(trainer.precision.sums).cpu().numpy()
        if not np.isfinite(found).all():
            check_weights(trainer, "the reference's pass over the pairs")
        return found

    def tensors(self) -> dict[str, tuple[torch.Size, Tensor]]:
        """Return {name: (shape, tensor)} of the reference's weights, by name.

        A fresh LoRA on the policy, which is off, does not count.
        """
        own = self.live.model
        found = {}
        for name, shape, tensor in tensors_of(self.trainer.model if own is None else own):
            if own is not None or "lora_" not in name:
                found[name.replace(".base_layer.", ".")] = (shape, tensor)
        for name, wrapper in self.live.adapter.items():
            for part, p in wrapper.named_parameters():
                if part.startswith("lora_"):
                    found[f"{name}.{part}"] = (p.shape, p)
        return dict(sorted(found.items()))

    def digest(self, tensors: dict[str, tuple[torch.Size, Tensor]], whole: Callable) -> dict:
        """Hash all that changes what the reference says of given tokens.

        `whole` returns a tensor, unsharded, on the CPU.
        """
        trainer = self.trainer
        c = trainer.args
        model = trainer.model if self.live.model is None else self.live.model
        compute_dtype = (model.four_bit or {}).get("compute_dtype")
        half = "fp16" if c.fp16 else trainer.precision.half is torch.bfloat16
        pixels = trainer.tokenizer.pictures if trainer.images else ""  # how images are scaled
        first = next(model.parameters())
        in_c = c_layers.serves(trainer.precision.half or first.dtype, first.device)
        layers = " in C" if in_c else ""  # they round otherwise than PyTorch's
        text = f"3 {half} {c.dtype} {compute_dtype} {model.config}{pixels}{layers}"
        h = hashlib.sha256(text.encode())
        for name, (shape, tensor) in tensors.items():
            h.update(f"{name} {tensor.dtype} {tuple(shape)}".encode())
            h.update(whole(tensor).contiguous().view(-1).view(torch.uint8).numpy().data)
        wrappers = self.live.adapter
        if self.live.model is not None:
            wrappers = {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}
        for name, wrapper in wrappers.items():
            h.update(f"{name} {getattr(wrapper, 'scaling', None)}".encode())
        return {"digest": h.hexdigest()}
