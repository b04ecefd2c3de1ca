"""References other than the policy's own start: another model, another adapter, one that moves (TR-
DPO).

dpo.py handles the plain ones itself: a copy of the policy, or the policy with its LoRA off.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from extras.lora import adapters
from extras.lora.peft_files import find_base, read_settings
from extras.models.objects import from_object
from extras.models.opening import is_adapter, load_adapted, model_directory
from extras.models.policy import loading_options
from extras.run.context import join
from model import Decoder, lora_modules
from parts.checks import check_tokens


def other_reference(
    trainer: Any, opened: Any, ref_model: nn.Module | None,
) -> tuple[Any, dict]:
    """Return (a model of its own or None, the adapter that is swapped in for the policy's or {}).

    Raises ValueError for an adapter that is not there.
    """
    model, adapter = find_other(trainer, opened, ref_model)
    if model is not None:
        join(model, trainer.ranks.context)
    return model, adapter


def find_other(
    trainer: Any, opened: Any, ref_model: nn.Module | None,
) -> tuple[Any, dict]:
    """Do `other_reference`'s work for one rank."""
    c = trainer.args
    if isinstance(ref_model, Decoder):
        return ref_model, {}
    if ref_model is not None:
        options = loading_options(c, trainer.ranks)
        model = from_object(ref_model, c.model_name_or_path, None, options)
        check_tokens(c, trainer.train_store, model.config.vocab_size, trainer.tokenizer.size)
        return model, {}
    named = c.ref_model_name_or_path or c.ref_adapter_name
    if not opened.lora:
        return (load_reference(trainer) if named else None), {}
    loaded = getattr(trainer.model, "adapters", {})
    if c.ref_adapter_name in loaded and not c.ref_model_name_or_path:
        return None, adapters.copy_adapter(loaded[c.ref_adapter_name][0])
    if not named:
        # A LoRA that is trained further: the reference is its start.
        continued = lora_modules(trainer.model) if opened.continues else {}
        return None, adapters.copy_adapter(continued)
    home = Path(find_reference(trainer))
    # two names for an adapter without folders are one adapter twice, as where PEFT loads it twice
    missing = c.model_adapter_name is None and c.ref_adapter_name not in (None, "default")
    if missing and not c.ref_model_name_or_path and home == opened.directory:
        raise ValueError(
            f"--ref_adapter_name {c.ref_adapter_name}: {home} has no folder of that name; without "
            "the flag, the adapter as it starts is the reference")
    is_same_base = opened.directory is not None and (
        base_directory(home, trainer.ranks) == base_directory(opened.directory, trainer.ranks))
    if not is_same_base:
        return load_reference(trainer), {}
    return None, adapters.load_beside(trainer.model, home) if is_adapter(home) else {}


def base_directory(directory: Path, ranks: Any) -> Path:
    """Return the directory of an adapter's base; for anything else, the directory itself."""
    base = find_base(read_settings(directory), ranks) if is_adapter(directory) else directory
    return Path(base).resolve()


def find_reference(trainer: Any) -> str:
    """Return the directory of the reference that the flags name."""
    c = trainer.args
    name = c.ref_model_name_or_path or c.model_name_or_path
    return model_directory(name, trainer.ranks, adapter=c.ref_adapter_name)


def load_reference(trainer: Any) -> Decoder:
    """Load the reference that the flags name, with the same options as the policy."""
    c = trainer.args
    model, _ = load_adapted(find_reference(trainer), **loading_options(c, trainer.ranks))
    check_tokens(c, trainer.train_store, model.config.vocab_size, trainer.tokenizer.size)
    return model


# TR-DPO (arXiv:2404.09656): ref <- alpha policy + (1 - alpha) ref


def make_moving(trainer: Any, reference: Any) -> None:
    """Give `reference` its `move`: towards the policy, by ref_model_mixup_alpha.

    Raises ValueError where the policy is a LoRA and the reference a model of its own.
    """
    alpha = trainer.args.ref_model_mixup_alpha
    reference.move_every = trainer.args.ref_model_sync_steps
    if not trainer.lora:
        reference.move = lambda: move_model(reference.model, trainer.model, alpha)
        return
    if reference.model is not None:
        raise ValueError(
            "--sync_ref_model with a LoRA: the reference is another model, which cannot move "
            "towards it")
    policy = lora_modules(trainer.model)
    reference.adapter = adapters.dense_adapter(policy, reference.adapter)
    reference.move = lambda: adapters.move_towards(
        reference.adapter, lora_modules(trainer.model), alpha)


@torch.no_grad()
def move_model(ref: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Move every weight: ref <- alpha policy + (1 - alpha) ref."""
    for p, q in zip(ref.parameters(), policy.parameters()):
        p.lerp_(q.to(p.dtype), alpha)
