"""Direct Preference Optimization (arXiv:2305.18290): raise the odds of chosen over rejected
answers, relative to a reference model.

    python dpo.py                              the bundled demo, a minute or two on a laptop
    python dpo.py --model_name_or_path DIR --dataset_name prefs.jsonl --output_dir OUT
    torchrun --nproc_per_node=8 dpo.py ...     one machine, eight GPUs (gloo where there is no GPU)
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dpo.py ...
    python dpo.py --help                       every flag, its default and what it does

A step takes per_device_train_batch_size x ranks x gradient_accumulation_steps pairs. Its loss is
the sum of the pairs' losses over their number, however they are cut into forwards and dealt to
ranks: that changes the speed, never the result (but for the experts' balancing loss, and dropout).

Reading order: `DPOTrainer.train`, `train_step`, `pair_logps`, losses.py; then data.py, model.py.
"""

import copy  # noqa: I001  parts.threads comes before torch
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import parts.threads  # noqa: F401  sets what torch reads when it is loaded
import numpy as np
import torch
from torch import Tensor, nn

import data
import losses
import model as models
from parts import activations, checks, faults, opened
from parts.checkpoints import Checkpoints, fingerprint, trained
from parts.cli import ROOT, parse_config
from parts.config import DPOConfig
from parts.log import Log, state_of
from parts.metrics import COLUMNS, SUMS, Scored, Sums, length_bias, metrics_of
from parts.output import cache_directory, replace_model
from parts.place import Place, eval_mode
from parts.position import Position
from parts.precision import Precision, Scaler, choose_precision
from parts.ranks import Ranks, agree, among_ranks, common_settings, start_ranks
from parts.reference import NoReference, PrecomputedReference
from parts.schedule import make_optimizer, make_schedule, small_kind
from parts.splits import find_split, has_splits, is_here
from parts.store import describe
from parts.weights import overwrite

# What one forward measures


def score(model: nn.Module, batch: data.Batch, c: DPOConfig) -> Scored:
    """Run the policy on a batch; sum log-probs and statistics over each completion's tokens."""
    out = model(batch)
    lengths = batch.lengths
    plain = losses.completion_sums(out.logps, lengths)  # (B, 2)
    logps = losses.completion_sums(out.logps, lengths, c.ld_alpha)
    with torch.no_grad():
        per_token = (out.entropy, out.is_top1.to(out.entropy.dtype), out.mean_logits)
        entropy, top1, logits = (losses.completion_sums(t, lengths) for t in per_token)
        tokens = lengths.to(logits.dtype)
        stats = [entropy.sum(1), top1[:, 0], *logits.unbind(1), *tokens.unbind(1)]  # STATS
        wpo = torch.ones_like(entropy[:, 0])
        if c.use_weighting:
            wpo = losses.wpo_weights(out.logps, out.log_sum_sq_probs, lengths, c.wpo_clamp)
    stats = torch.stack(stats, 1)  # (B, 6)
    return Scored(logps, chosen_nll=-plain[:, 0], wpo=wpo, stats=stats, aux_loss=out.aux_loss)


# The reference


@dataclass
class Reference:
    """A reference that runs a forward when asked: a model of its own, or the policy as it is, with
    its LoRA off, or with another in its place."""

    precision: Precision
    as_reference: Callable[[], AbstractContextManager]  # yields the policy as its own reference
    model: nn.Module | None = None  # a model of its own, used instead
    adapter: dict = field(default_factory=dict)  # a LoRA of its own, that `as_reference` swaps in
    move: Callable[[], None] | None = None  # TR-DPO: one move towards the policy
    move_every: int = 0  # steps
    is_live = True  # unless PrecomputedReference wraps it

    def active(self) -> AbstractContextManager:
        """The model whose log-probs are the reference's, inside."""
        return self.as_reference() if self.model is None else nullcontext(self.model)

    @torch.no_grad()
    def sums(self, batch: data.Batch) -> Tensor:  # (B, 2, 2)
        """[completion, (first l_p tokens, the rest)]: apart, so that ld_alpha may change later."""
        with self.active() as model, eval_mode(model):
            there = batch.to(next(model.parameters()).device)
            with self.precision.autocast(there.input_ids.device):
                logps = model(there, statistics=False).logps
            head = losses.completion_sums(logps, there.lengths, 0.0)
            rest = losses.completion_sums(logps, there.lengths) - head
            return torch.stack([head, rest], -1).to(batch.input_ids.device)

    def attach(self, batch: data.Batch, store: data.PairStore) -> data.Batch:
        """The batch with the sums that are known before its forward: here none."""
        return batch

    def prepare(self, *sets: tuple) -> None:
        """Do what comes before the first step, or an evaluation of these sets: here nothing."""

    def move_if_due(self, step: int) -> None:
        """Move, every `move_every` steps."""
        if self.move is not None and step % self.move_every == 0:
            self.move()

    def needs_policy(self, store: data.PairStore) -> bool:
        """Whether its log-probs of this store can only be computed by the policy's own weights."""
        return self.model is None


# Opening what a run is made of


def open_model(c: DPOConfig, ranks: Ranks, given: dict[str, Any]) -> opened.Opened:
    """The policy and its tokenizer: a plain checkpoint here, everything else in extras/models."""
    if isinstance(given["model"], nn.Module) or given["peft_config"] or not opened.is_plain(c):
        from extras.models.policy import open_policy

        return open_policy(c, ranks, given)
    tokenizer = given["processing_class"]
    tokenizer = tokenizer or data.Tokenizer.load(c.model_name_or_path, c.chat_template)
    device = str(opened.loading_device(c, ranks))
    model = models.load_model(
        c.model_name_or_path, getattr(torch, c.dtype), device, c.max_length)
    return opened.Opened(model, tokenizer, directory=Path(c.model_name_or_path))


def find_rows(dataset: Any, split: str, c: DPOConfig) -> list[Path]:
    """Files of pairs: of a split, here or on the hub, or rows of Python as a file."""
    if not isinstance(dataset, str):
        from extras.rows.objects import rows_file

        return rows_file(dataset, cache_directory(c.cache_dir))
    if is_here(dataset, c.dataset_revision):
        return find_split(dataset, c.dataset_config, split)
    from extras.hub import client

    return client.local_dataset(dataset, c.dataset_config, split, c.dataset_revision)


# The trainer


class DPOTrainer:
    """Trains `model` on pairs; see DPOConfig for every option, and docs/api.md for what is taken.

    Models are directories, hub ids or Decoders; data sets are paths, hub ids, PairStores or rows (a
    list of dicts, a datasets.Dataset). What is not given here, `args` names.
    """

    state = property(state_of)  # in transformers' names: trainer.state.log_history

    def __init__(
        self, model: Any = None, ref_model: Any = None, args: DPOConfig | None = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None,
        peft_config: Any = None, **others: Any,
    ):
        c = replace(args) if args else DPOConfig()  # a copy: the caller's stays as it is
        given = dict(
            others, model=model, ref_model=ref_model, processing_class=processing_class,
            train_dataset=train_dataset, eval_dataset=eval_dataset, peft_config=peft_config)
        if c.datasets or any(value is not None for value in given.values()):
            from extras.rows import objects

            c, given = objects.accept(c, given)
        checks.check_config(c)
        self.args = c
        self.ranks = start_ranks(c.use_cpu, c.ddp_timeout, c.full_determinism)
        agree(self.ranks, common_settings(vars(c)))
        if c.dtype == "auto" or c.context_parallel_size > 1:
            from extras.run import starting

            c.dtype, self.ranks = starting.settle(c, self.ranks)
        self.precision = choose_precision(c, self.ranks.device)
        self.log = Log(c, self.ranks.first, panel_maker(), given.get("on_log"))
        self.position = Position(scaling={"scale": 2.0**16 if c.fp16 else 1.0, "since": 0})
        self.order = (-1, np.arange(0))  # an epoch, and its pairs in order
        found = open_model(c, self.ranks, given)
        self.make_other = given.get("optimizers")  # args, parameters -> optimizer; None: the flags'
        self.make_ready(found)
        self.open_data(given["train_dataset"], given["eval_dataset"])
        live = self.open_reference(found, given["ref_model"])
        self.place = self.place_models(live)
        once = checks.precomputes_reference(c)
        self.reference = PrecomputedReference(self, live) if once else live
        self.plan_steps()
        self.open_output()

    # Setting up

    def make_ready(self, found: opened.Opened) -> None:
        """Take over the opened model, and set what its forwards do."""
        c = self.args
        self.tokenizer = found.tokenizer
        self.lora = found.lora  # PEFT's settings; {} where all weights are trained
        self.images = found.images
        self.model = opened.moved(found.model, c, self.ranks)
        self.model.train(not c.disable_dropout)
        self.model.model.run_block = activations.chosen(c)
        if activations.changes_blocks(c):
            from extras.decoder.blocks import change_blocks

            change_blocks(self.model, c, self.ranks.device)
        checks.check_model(c, self.model.config, self.model.raw_config)
        checks.check_optimizer(self)
        self.aux_coef = opened.aux_coef(c, self.model.config)
        self.max_tokens = opened.max_tokens(c, self.model.config, self.ranks.device)

    def open_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        """The training and evaluation pairs: stores, and which of their pairs are meant."""
        c = self.args
        self.train_store = self.open_store(train_dataset or c.dataset_name, c.dataset_train_split)
        self.train_pairs = np.arange(len(self.train_store))
        self.eval_sets = {}
        eval_dataset = eval_dataset or c.eval_dataset_name
        wants_eval = c.eval_strategy != "no" and not eval_dataset and not c.eval_fraction
        if wants_eval and train_dataset is None and has_splits(c.dataset_name):
            eval_dataset = c.dataset_name  # its other split
        if eval_dataset is not None:
            self.eval_sets = self.open_eval(eval_dataset)
        elif c.eval_fraction:
            self.train_pairs, held = data.hold_out(len(self.train_store), c.eval_fraction, c.seed)
            self.eval_sets = {"eval": (self.train_store, held)}
        checks.check_pairs(c, self.train_pairs, self.eval_sets)

    def open_eval(self, dataset: Any, prefix: str = "eval") -> dict:
        """{prefix of its metrics: (store, pairs)} of a data set, or of each in a dict by name."""
        named = {prefix: dataset}
        if isinstance(dataset, dict):
            named = {f"{prefix}_{name}": one for name, one in dataset.items()}
        stores = {n: self.open_store(d, self.args.dataset_test_split) for n, d in named.items()}
        return {name: (store, np.arange(len(store))) for name, store in stores.items()}

    def open_store(self, dataset: Any, split: str) -> data.PairStore:
        """The tokenized pairs: made, or found in the cache, by rank 0 and opened by all."""
        c = self.args

        def build() -> dict:
            files = find_rows(dataset, split, c)
            cuts = {n: getattr(c, n) for n in data.DataOptions._fields if hasattr(c, n)}
            options = data.DataOptions(need_rejected=set(c.loss_type) != {"sft"}, **cuts)
            store = data.build_store(
                files, self.tokenizer, options, cache_directory(c.cache_dir), c.on_bad_row,
                c.dataset_num_proc)
            name = dataset if isinstance(dataset, str) else f"{split} rows"
            for line in describe(store.report):
                self.log.say(f"{name}: {line}")
            return {"directory": str(store.directory)}

        is_open = isinstance(dataset, data.PairStore)
        store = dataset if is_open else data.PairStore(self.ranks.from_first(build)["directory"])
        checks.check_store(c, store, self.model.config, self.tokenizer.size)
        return store

    def open_reference(self, found: opened.Opened, ref_model: Any) -> Reference | NoReference:
        """Make the live reference; PrecomputedReference may wrap it."""
        c = self.args
        if not checks.needs_reference(c):
            return NoReference()
        # Precomputed, it runs before the first step, when the policy is its own reference.
        reference = Reference(self.precision, as_reference=lambda: nullcontext(self.model))
        named = c.ref_model_name_or_path or c.ref_adapter_name
        if ref_model is not None or named or found.continues:
            from extras.reference import choosing

            reference.model, reference.adapter = choosing.other_reference(self, found, ref_model)
        elif not self.lora and not checks.precomputes_reference(c):
            reference.model = copy.deepcopy(self.model)
        if self.lora:
            reference.as_reference = lambda: models.adapters_disabled(self.model)
        opened.hold_reference(c, self.ranks, reference.model)
        if c.sync_ref_model:
            from extras.reference import choosing

            choosing.make_moving(self, reference)
        if reference.adapter:
            from extras.lora.adapters import swapped_in

            reference.as_reference = lambda: swapped_in(self.model, reference.adapter)
        return reference

    def place_models(self, reference: Reference | NoReference) -> Place:
        """Put the policy where it computes: this process, DDP, or shards (--fsdp)."""
        c = self.args
        place = None
        if opened.is_sharded(c):
            from extras.run.fsdp import Shards

            place = Shards(self.model, self.ranks, c, self.precision, reference)
            self.model = place.model
        started = fingerprint(self.model)
        if place:  # ranks have different parts
            started = self.ranks.from_first(lambda: {"model": started})["model"]
        self.checkpoints = Checkpoints(self, started)
        agree(self.ranks, {
            "data": self.train_store.digest, "model": started, "torch": torch.__version__})
        return place or Place(self.model, self.ranks)

    def plan_steps(self, global_batch: int | None = None) -> None:
        """Count the steps; a resumed run may bring its own global batch."""
        self.schedule = make_schedule(
            self.args, len(self.train_pairs), self.ranks.groups, global_batch)

    def open_output(self) -> None:
        """Loggers, sampled answers, the output directory, and the checkpoint to go on from."""
        c = self.args
        self.hub = None
        if c.push_to_hub:  # before training: a missing token costs no run
            from extras.hub.pushing import Repository

            self.hub = Repository(c, self.log, self.ranks)
            self.checkpoints.when_saved = self.hub.saved
        if c.report_to != ["none"]:
            from extras.watch.loggers import make_loggers

            self.log.loggers += make_loggers(c)
        self.samples = None
        if c.generate_during_eval:
            from extras.watch.samples import Samples

            self.samples = Samples(self)
        self.ranks.from_first(self.log.claim)
        self.checkpoints.find(c.resume_from_checkpoint)

    # Batches

    def pairs_of(self, step: int) -> np.ndarray:
        """The global batch of a step: a slice of its epoch's order, by seed and step alone."""
        epoch, within = divmod(step, self.schedule.steps_per_epoch)
        if self.order[0] != epoch:
            c = self.args
            order = data.epoch_order(len(self.train_pairs), c.seed, epoch, c.shuffle_dataset)
            self.order = (epoch, self.train_pairs[order])
        size = self.schedule.global_batch
        return self.order[1][within * size : (within + 1) * size]

    def forwards(self, store: data.PairStore, pairs: np.ndarray, size: int) -> list[np.ndarray]:
        """This rank's micro-batches of a global batch.

        Every rank gets equally many, empty ones at the end: a rank with fewer forwards than the
        others would leave them waiting for its gradients.
        """
        hands = data.deal(pairs, store.tokens, self.ranks.groups)
        cuts = [data.micro_batches(hand, store.tokens, size, self.max_tokens) for hand in hands]
        mine = cuts[self.ranks.group]
        if self.images is not None:
            self.images.expect(store, mine)
        missing = max(map(len, cuts)) - len(mine)
        return mine + [np.arange(0)] * missing

    def batch(self, store: data.PairStore, rows: np.ndarray) -> data.Batch:
        """The stream of these pairs on the device, with their reference sums if those are known."""
        batch = data.collate([store[int(i)] for i in rows], rows)
        if self.images is not None and len(rows):
            batch = batch._replace(pictures=self.images.collect(batch, store, rows))
        return self.ranks.cut(self.reference.attach(batch, store)).to(self.ranks.device)

    # The loss

    def pair_logps(
        self, scored: Scored, lengths: Tensor, ratings: Tensor, ref_sums: Tensor,
        chosen_tokens_per_pair: Any,
    ) -> losses.PairLogps:
        """What the losses read, from the policy's sums and the reference's."""
        c = self.args
        dtype = scored.logps.dtype
        alpha = 1.0 if c.ld_alpha is None or not c.ld_apply_to_ref else c.ld_alpha
        ref = (ref_sums[..., 0] + alpha * ref_sums[..., 1]).to(dtype).detach()  # (B, 2)
        divergence = losses.F_DIVERGENCES[c.f_divergence_type]
        if c.f_divergence_type == "alpha_divergence":
            divergence = partial(divergence, f_alpha_divergence_coef=c.f_alpha_divergence_coef)
        return losses.PairLogps(
            policy_chosen_logps=scored.logps[:, 0], policy_rejected_logps=scored.logps[:, 1],
            ref_chosen_logps=ref[:, 0], ref_rejected_logps=ref[:, 1],
            chosen_lengths=lengths[:, 0].to(dtype), rejected_lengths=lengths[:, 1].to(dtype),
            chosen_ratings=ratings[:, 0].to(dtype), rejected_ratings=ratings[:, 1].to(dtype),
            chosen_nll=scored.chosen_nll, chosen_tokens_per_pair=chosen_tokens_per_pair,
            score=divergence)

    def pair_losses(self, x: losses.PairLogps, scored: Scored) -> Tensor:  # (B,)
        options = vars(self.args) | {"delta": self.position.delta}
        return losses.pair_losses(x, options, scored.wpo if self.args.use_weighting else None)

    def choose_loss(self, pairs: np.ndarray, batches: list[data.Batch]) -> Callable:
        """What gives a forward its losses (B,): `pair_losses`, or a form of it that has seen the
        whole global batch, for losses that sort it."""
        c = self.args
        couples = c.exact_global_loss
        if couples is None:
            couples = bool(set(c.loss_type) & losses.SORTS_THE_BATCH) or c.bco_delta == "first"
        if not couples:
            return lambda x, scored, batch: self.pair_losses(x, scored)
        from extras.run.whole_batch import whole_batch_loss

        return whole_batch_loss(self, pairs, batches)

    @torch.no_grad()
    def score_all(
        self, store: data.PairStore, pairs: np.ndarray, batches: Iterable[data.Batch],
    ) -> tuple[losses.PairLogps, Scored]:
        """PairLogps and Scored of all `pairs`, over every micro-batch and rank, without gradients.

        Each rank writes its pairs' rows into a table of zeros; the sum over ranks is the whole.
        """
        order = np.argsort(pairs)
        table = torch.zeros(
            len(pairs), sum(COLUMNS) + 4, dtype=torch.float64, device=self.ranks.exact)
        for batch in batches:
            with faults.naming(batch), self.precision.autocast(self.ranks.device):
                scored = score(self.model, batch, self.args)
            ref_sums = self.reference.sums(batch).flatten(1)  # (B, 4)
            rows = order[np.searchsorted(pairs, batch.pair_ids.numpy(), sorter=order)]
            rows = torch.from_numpy(rows).to(table.device, non_blocking=True)
            table[rows] = torch.cat([scored.table(), ref_sums], 1).to(table)
        table = self.ranks.sum(table).to(self.ranks.device, self.precision.sums)
        scored = Scored.from_table(table[:, :-4])
        ref_sums = table[:, -4:].reshape(-1, 2, 2)
        lengths = torch.from_numpy(store.scored_lengths(pairs)).to(table, non_blocking=True)
        ratings = torch.from_numpy(np.array(store.ratings[pairs])).to(table, non_blocking=True)
        return self.pair_logps(scored, lengths, ratings, ref_sums, lengths[:, 0].mean()), scored

    def add_rewards(self, total: float, count: int) -> None:
        """Add the sum of beta (r_w + r_l) / 2 over `count` pairs; BCO's delta is their mean."""
        self.position.delta_sum += total
        self.position.delta_count += count

    # One optimizer step

    def train_step(self) -> dict:
        """Loss, gradients and update of one global batch; return the step's metrics."""
        c = self.args
        store = self.train_store
        pairs = self.pairs_of(self.position.step)
        # Dropout is seeded by step and rank, so that a resume needs no state of the random numbers.
        seed = c.seed * 1_000_003 + self.position.step
        torch.manual_seed((seed * 65_537 + self.ranks.rank) % 2**63)
        rows = self.forwards(store, pairs, c.per_device_train_batch_size)
        batches = [self.batch(store, r) for r in rows]
        self.look_ahead()
        loss_of = self.choose_loss(pairs, batches)
        tokens_per_pair = float(store.scored_lengths(pairs)[:, 0].mean())
        sums = Sums(c.beta, self.ranks.exact)
        for i, batch in enumerate(batches, 1):
            share = len(batch.pair_ids) / len(pairs)
            with self.place.sync(last=i == len(batches)), faults.naming(batch, i, len(batches)):
                with self.precision.autocast(self.ranks.device):
                    scored = score(self.place.module, batch, c)
                ref_sums = self.reference.sums(batch)
                x = self.pair_logps(scored, batch.lengths, batch.ratings, ref_sums, tokens_per_pair)
                values = loss_of(x, scored, batch)  # (B,)
                loss = values.sum() / len(pairs)
                if self.aux_coef:
                    loss = loss + self.aux_coef * scored.aux_loss * share
                # Times the ranks: the loss is a sum over all pairs, and DDP and FSDP average.
                self.scaler.backward(loss * self.ranks.world)
            sums.add(x, scored, values, share)
        return self.update(sums, pairs, sum(batch.num_tokens for batch in batches))

    def look_ahead(self) -> None:
        """Have the next step's images decoded while this one computes."""
        step = self.position.step + 1
        if self.images is not None and step < self.schedule.total_steps:
            size = self.args.per_device_train_batch_size
            self.forwards(self.train_store, self.pairs_of(step), size)

    def update(self, sums: Sums, pairs: np.ndarray, tokens: int) -> dict:
        """Clip, step, and turn the sums over all ranks into metrics; {} for a skipped step."""
        c = self.args
        norm = self.place.whole(self.scaler.clip(c.max_grad_norm))
        own = torch.tensor([tokens, self.checkpoints.signal > 0])
        own = own.to(sums.total, non_blocking=True)
        names = (*SUMS, "num_tokens", "told_to_leave")  # one exchange, and one wait for the device
        totals = dict(zip(names, self.ranks.sum(torch.cat([sums.total, own])).tolist()))
        self.checkpoints.leaving = totals["told_to_leave"] > 0
        rate = self.schedule.learning_rate(c, self.position.step)
        metrics = metrics_of(totals, len(pairs)) | {"grad_norm": float(norm), "learning_rate": rate}
        metrics["loss"] += self.aux_coef * metrics.get("aux_loss", 0.0)  # all that is minimised
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.apply(totals, len(pairs), rate)
        else:
            self.skip(metrics, pairs)
            metrics = {}
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.num_tokens += int(totals["num_tokens"])
        self.position.pairs_done += len(pairs)
        self.reference.move_if_due(self.position.step)
        return metrics

    def apply(self, totals: dict[str, float], count: int, rate: float) -> None:
        """The optimizer's step, with what else moves with it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.scaler.adjust(finite=True)
        if "bco_pair" in self.args.loss_type and self.args.bco_delta == "running":
            self.add_rewards((totals["rewards/chosen"] + totals["rewards/rejected"]) / 2, count)

    def skip(self, metrics: dict, pairs: np.ndarray) -> None:
        """Leave out a step that is not finite, or raise FloatingPointError that names its pairs."""
        if self.scaler.overflowed(metrics["loss"]):
            self.log.say(
                f"step {self.position.step + 1}: overflow in float16, skipped; the loss is now "
                f"scaled by {self.position.scaling['scale']:g}")
            return
        self.position.skipped += 1
        rows = self.forwards(self.train_store, pairs, self.args.per_device_train_batch_size)
        batches = (self.batch(self.train_store, r) for r in rows)
        values = self.pair_losses(*self.score_all(self.train_store, pairs, batches)).tolist()
        bad = [int(pair) for pair, value in zip(pairs, values) if not math.isfinite(value)]
        faults.nonfinite_step(self, metrics, pairs, bad)

    def make_optimizer(self) -> None:
        make = self.make_other or make_optimizer
        if make is make_optimizer and small_kind(self.args, self.lora):
            from extras.run.small_adamw import make

        self.optimizer = make(self.args, trained(self.model))
        self.scaler = Scaler(self.args.fp16, self.model.parameters(), self.position)

    # The loop

    def train(self, resume_from_checkpoint: Any = None) -> dict:
        """Run all steps, log, evaluate, save checkpoints and the model; return the last metrics.

        Raises SystemExit, 128 + the signal, if told to leave by Ctrl-C, SIGTERM or SIGUSR1: after a
        checkpoint.
        """
        c = self.args
        now = self.position
        schedule = self.schedule
        self.checkpoints.start_from(resume_from_checkpoint)
        # Before resume(): by default the reference is the policy's own starting weights, which a
        # checkpoint overwrites.
        self.reference.prepare()
        self.make_optimizer()
        self.log.begin(c, self.checkpoints.resume())
        self.ranks.barrier()
        if (c.eval_on_start or c.generate_during_eval) and now.step == 0:
            self.evaluate()
        metrics = {}
        self.log.start(now, schedule.total_steps)
        with self.checkpoints.noticing_signals():
            while now.step < schedule.total_steps:
                measured = self.train_step()
                self.log.bar.update()
                now.pending += [measured] if measured else []
                if now.pending and schedule.logs_at(now.step, c.logging_first_step):
                    metrics = self.log.step(now, schedule)
                is_due = self.eval_sets and schedule.evaluates_at(now.step)
                evaluated = self.evaluate() if is_due else {}
                metrics |= evaluated
                if self.checkpoints.after(evaluated):
                    break
        self.log.stop()
        if self.checkpoints.leaving:
            self.checkpoints.leave()
        self.checkpoints.load_best()
        self.save_model()
        if c.push_to_hub:
            self.push_to_hub()
        return metrics

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Metrics over all pairs of `eval_dataset`, or else over the evaluation sets of the run, as
        `eval_...`, of several sets `eval_NAME_...`; each set's are also a line of metrics.jsonl."""
        sets = self.eval_sets
        if eval_dataset is not None:
            sets = self.open_eval(eval_dataset, metric_key_prefix)
        checks.check_evaluation(self.args, sets, self.lora, self.reference)
        self.reference.prepare(*sets.values())
        metrics = {}
        for prefix, (store, pairs) in sets.items():
            found = self.measure(store, pairs, prefix, samples=not metrics)
            self.log.evaluation(found, prefix, self.position, self.schedule)
            metrics |= found
        return metrics

    def measure(self, store: data.PairStore, pairs: np.ndarray, prefix: str, samples: bool) -> dict:
        """Metrics over pairs of a store, in eval mode, and the sampled answers if asked."""
        started = time.perf_counter()
        rows = self.forwards(store, pairs, self.args.per_device_eval_batch_size)
        batches = (self.batch(store, r) for r in self.log.progress(rows, "evaluation"))
        with eval_mode(self.model):
            x, scored = self.score_all(store, pairs, batches)
        sums = Sums(self.args.beta, self.ranks.exact)
        sums.add(x, scored, self.pair_losses(x, scored), share=0.0)  # no balancing loss
        totals = dict(zip(SUMS, sums.total.tolist()))
        found = metrics_of(totals, len(pairs)) | {"length_bias": length_bias(x)}
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        if samples and self.samples is not None:
            metrics |= self.samples.take(self)
        return metrics | {f"{prefix}_runtime": time.perf_counter() - started}

    # Files

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write what was trained, with the tokenizer: a whole checkpoint, or a PEFT adapter."""
        directory = Path(output_dir or self.log.directory)
        merges = self.args.merge_adapter and directory == self.log.directory
        model = self.place.gathered(self.model, trained_only=bool(self.lora) and not merges)
        if merges and self.ranks.first:
            from extras.lora.merging import merge_lora

            merge_lora(model)
        write = partial(self.write_model, model=model, dtype=opened.save_dtype(self.args, model))
        replace = lambda whole: replace_model(
            directory, partial(write, whole=whole), self.tokenizer.save)
        self.place.from_first(replace, model.parameters())
        opened.give_back(model, self.lora)
        if merges and not self.place.is_sharded:
            self.lora = {}  # it is in the weights now; with --fsdp, in those of the copy alone

    def write_model(
        self, directory: Path, model: nn.Module, whole: Callable, dtype: Any = None,
    ) -> None:
        if models.lora_modules(model):
            from extras.lora import peft_files

            peft_files.save_adapter(model, directory, self.lora)
        else:
            models.save_model(model, directory, dtype, whole)

    def read_model(self, directory: Path, model: nn.Module) -> None:
        """Overwrite what `write_model` writes; the rest of `model` stays. Every rank calls this."""
        if not models.lora_modules(model):
            return overwrite(model, directory, self.place)
        from extras.lora import peft_files

        peft_files.read_placed(model, directory, self.place)

    def push_to_hub(self, commit_message: str = "Trained with DPO", dataset_name: str = "") -> None:
        """Upload output_dir with a model card, which names `dataset_name` for rows of Python."""
        if self.hub is None:
            from extras.hub.pushing import Repository

            self.hub = Repository(self.args, self.log, self.ranks)
        self.hub.push(commit_message, dataset_name)


# The command


def panel_maker() -> Callable | None:
    """What draws the curves at a terminal, if this copy has extras/watch."""
    if not (ROOT / "extras" / "watch").is_dir():
        return None
    from extras.watch.live import Panel

    return Panel


@among_ranks
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 trained and saved; 2 unusable arguments or data, with one message; told to
    leave, after a checkpoint: 130 (Ctrl-C), 143 (SIGTERM), 138 (SIGUSR1); 1 else."""
    try:
        c = parse_config(sys.argv[1:] if argv is None else argv, __doc__)
        trainer = DPOTrainer(args=c)
        if c.dry_run:
            from extras.run import advice

            advice.tell(trainer)
            return 0
    except Exception as error:
        return faults.refuse(*faults.before_training(error))
    try:
        if c.model_name_or_path == str(ROOT / "demo" / "model") and not c.fsdp:
            from extras.watch import demo

            demo.train(trainer)
        else:
            trainer.train()
    except Exception as error:
        helps = ""
        if faults.is_out_of_memory(error) and (ROOT / "extras" / "run").is_dir():
            from extras.run import advice

            helps = advice.after_out_of_memory(trainer)
        return faults.refuse(faults.explained(error, trainer, helps), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
