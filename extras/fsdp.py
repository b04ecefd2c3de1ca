"""--fsdp: parameters, gradients, optimizer state and the reference copy in shards, one on each rank (arXiv:2304.11277).

torch's own fully_shard, block by block: a block's weights are gathered for its forward, dropped, gathered again for its
backward, and its gradients are reduced to their shards. With bf16 the blocks are gathered in bfloat16; the shards
("masters") and the reduction stay in float32, and so do embedding and head, so that the residual stream is what it is
without FSDP. Rank 0 alone loads the model; the others begin on the meta device and receive their shards from it.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from model import Decoder
from parts.files import whole

WORDS = {"true", "full_shard", "shard_grad_op", "auto_wrap", "offload"}  # transformers' words


def words(fsdp) -> set[str]:
    """The words of --fsdp; none where it is off. Blocks are always wrapped one by one. Raises ValueError."""
    found = set(str(fsdp or "").lower().split())
    if found - WORDS - {"false"}:
        raise ValueError(f"--fsdp {fsdp}: {', '.join(sorted(found - WORDS))} is not supported; known are "
                         f"{', '.join(sorted(WORDS))}")
    return found - {"false"}


def check_options(c) -> None:
    """Raise ValueError for what FSDP does not go with."""
    for name in ("load_in_4bit", "ref_model_device", "generate_during_eval"):
        if getattr(c, name, None):
            raise ValueError(f"--fsdp with --{name}: not supported; leave one of them out")


def shard(trainer) -> None:
    """Put the trainer's models in shards."""
    ranks, asked = trainer.ranks, words(trainer.args.fsdp)
    if trainer.ref_adapter:
        raise ValueError("--fsdp: the reference is a LoRA on the policy's own base (one that is continued, or moves), "
                         "which is not shared out; merge it into a model and give that as --ref_model_name_or_path")
    if not dist.is_initialized():  # one process, not started by torchrun
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    compute = trainer.half if trainer.bf16 or trainer.args.fp16 else None
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if "offload" in asked else OffloadPolicy()
    options = dict(mesh=mesh, reshard_after_forward="shard_grad_op" not in asked, offload_policy=offload)
    trainer.started_from = ranks.from_first(lambda: {"fingerprint": trainer.started_from})["fingerprint"]
    trainer.model = trainer.ddp = shard_model(trainer.model, ranks, compute, options)
    if trainer.ref_model is not None:
        trainer.ref_model = shard_model(trainer.ref_model, ranks, compute, options)


def shard_model(model: Decoder, ranks, compute, options: dict) -> Decoder:
    """A sharded copy of rank 0's model, which lies on the CPU (elsewhere on the meta device)."""
    reduce = torch.float32 if next(model.parameters()).dtype.itemsize < 4 or compute else None
    wide = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    sharded = meta_copy(model)
    for block in sharded.model.layers:
        fully_shard(block, mp_policy=narrow, **options)
    # the root would stay gathered after a forward without backward, and the next would see old weights
    fully_shard(sharded, mp_policy=wide, **options | dict(reshard_after_forward=True))
    sharded.to_empty(device="cpu" if isinstance(options["offload_policy"], CPUOffloadPolicy) else ranks.device)
    scatter(sharded, model, ranks)
    for target, source in zip(sharded.buffers(), model.buffers()):
        target.copy_(source if not source.is_meta else target)
        dist.broadcast(target, 0)
    sharded.skeleton = (meta_copy(model),)  # in a tuple: no module of its own
    return sharded


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules, without memory for their parameters and buffers; what is tied stays tied."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty | {id(b): b.to("meta") for b in model.buffers()})


@torch.no_grad()
def scatter(sharded: nn.Module, source: nn.Module, ranks) -> None:
    """Everyone's shards from rank 0's whole parameters; those that lie on the meta device there are left alone."""
    given = dict(source.named_parameters())
    for name, p in sharded.named_parameters():
        if ranks.from_first(lambda name=name: {"there": not given[name].is_meta})["there"]:
            fill(p, given[name] if ranks.first else None)


def fill(target: Any, whole: Tensor | None) -> None:
    """`target`'s shard of rank 0's whole tensor."""
    device = target.device_mesh.device_type
    source = torch.empty(target.shape, dtype=target.dtype, device=device) if whole is None else \
        whole.detach().to(device, target.dtype).contiguous()
    target.to_local().detach().copy_(distribute_tensor(source, target.device_mesh, target.placements).to_local())


@torch.no_grad()
def gather(sharded: nn.Module, ranks, trained_only: bool = False) -> Decoder:
    """A whole copy in rank 0's memory; elsewhere, and where only what is trained is gathered, on the meta device."""
    twin = copy.deepcopy(sharded.skeleton[0])
    state = {}
    for name, p in sharded.named_parameters():
        if p.requires_grad or not trained_only:
            tensor = whole(p)
            if ranks.first:
                state[name] = tensor.cpu()
    twin.load_state_dict(state, strict=False, assign=True)
    twin.tie()
    return twin
