"""Several adapters on one base, and the moving reference of TR-DPO.

An adapter here is {module name: wrapper}. One is active in a model; `swapped_in` swaps another in
for a while. So one adapter can be the reference of another without a second model.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from extras.lora import kinds
from extras.lora.peft_files import adapter_home, load_adapter, read_settings
from extras.lora.targets import add_lora, replace_module
from model import lora_modules
from parts.config import DPOConfig

PATTERN_SIGNS = set(r"\*+?()[]{}|^$")  # no name of a module has one


@contextmanager
def swapped_in(model: nn.Module, adapter: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Swap `adapter` in for the model's own; the model's own is swapped in again after."""
    own = lora_modules(model)
    swap(model, own, adapter)
    try:
        yield model
    finally:
        swap(model, adapter, own)


def swap(model: nn.Module, out: dict[str, nn.Module], into: dict[str, nn.Module]) -> None:
    """Take the wrappers of one adapter out and put those of another in."""
    for name, wrapper in out.items():
        replace_module(model, name, wrapper.base_layer)
    for name, wrapper in into.items():
        replace_module(model, name, wrapper)


def copy_adapter(adapter: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return a frozen copy on the same base."""
    copies = {}
    for name, wrapper in adapter.items():
        base = wrapper.base_layer
        twin = copy.deepcopy(wrapper, {id(base): base})  # the base itself is not copied
        copies[name] = twin.requires_grad_(False).eval()
    return copies


def load_beside(model: nn.Module, directory: Path) -> dict[str, nn.Module]:
    """Load another adapter on the same base, frozen, for `swapped_in`.

    The model's own adapter, random draws and trainable parameters stay as they are.
    """
    own = lora_modules(model)
    swap(model, own, {})
    try:
        with torch.random.fork_rng(devices=[]):
            add_lora(model, read_settings(directory))
        load_adapter(model, directory)
        return {n: w.requires_grad_(False).eval() for n, w in lora_modules(model).items()}
    finally:
        swap(model, lora_modules(model), own)


def load_named(model: nn.Module, directory: str, name: str) -> nn.Module:
    """Load an adapter under a name, into `model.adapters`; the first is active.

    Raises ValueError for a name in use.
    """
    if not hasattr(model, "adapters"):
        model.adapters = {}
    if name in model.adapters:
        raise ValueError(f"the model has an adapter named {name!r} already")
    home = Path(adapter_home(directory, name))
    settings = read_settings(home)
    adapter = load_beside(model, home)
    if not model.adapters:
        swap(model, {}, adapter)
    model.adapters[name] = adapter, settings
    return model


def fresh_settings(c: DPOConfig, more: dict) -> dict:
    """Return PEFT's settings of a new LoRA.

    `more` are those without a flag (rank_pattern ...); flags win over them.
    """
    return more | {
        "lora_alpha": c.lora_alpha,
        "lora_dropout": c.lora_dropout,
        "use_rslora": c.use_rslora,
        "use_dora": c.use_dora,
        "r": c.lora_r,
        "target_modules": targets_of(c.lora_target_modules),
        "target_parameters": c.lora_target_parameters,
        "modules_to_save": c.lora_modules_to_save,
        "base_model_name_or_path": c.model_name_or_path}


def targets_of(given: list[str] | str | None) -> list[str] | str | None:
    """Return names as a list, and one word with the signs of a pattern as PEFT's pattern, a str.

    A pattern must match the whole name of a module in the model's files. Raises ValueError for one
    that is no regular expression.
    """
    words = [given] if isinstance(given, str) else given
    if not words or len(words) > 1 or not set(words[0]) & PATTERN_SIGNS:
        return words
    try:
        re.compile(words[0])
    except re.error as error:
        raise ValueError(f"--lora_target_modules {words[0]}: no pattern ({error})") from None
    return words[0]


def activate_named(model: nn.Module, name: str | None) -> dict:
    """Activate the adapter of that name (without a name, keep the active one) and train it.

    Returns its settings. Raises ValueError for a name that was not loaded.
    """
    if name is not None and name not in model.adapters:
        raise ValueError(f"--model_adapter_name {name}: the model has {', '.join(model.adapters)}")
    active = lora_modules(model)
    name = name or next(n for n, (adapter, _) in model.adapters.items() if adapter == active)
    adapter, settings = model.adapters[name]
    swap(model, active, adapter)
    for module in adapter.values():
        for n, p in module.named_parameters():
            p.requires_grad_(n.startswith("lora_"))
    return settings


# TR-DPO


@torch.no_grad()
def dense_adapter(
    policy: dict[str, nn.Module], start: dict[str, nn.Module],
) -> dict[str, nn.Module]:
    """Return `start` with every update as a dense matrix, also on the policy's other modules.

    Only this can move towards the policy: mixing A and B is not mixing weights, since
    (a B + b B') (a A + b A') is not a B A + b B' A'.
    """
    dense = {}
    for name in [*policy, *(n for n in start if n not in policy)]:
        one = start.get(name)
        other = policy.get(name)
        if isinstance(one, kinds.SavedModule) or isinstance(other, kinds.SavedModule):
            if one is not None and type(one) is not type(other):
                raise ValueError(
                    f"--sync_ref_model: {name} is fully trained in one adapter and not in the "
                    "other")
            saved = copy_adapter({name: one})[name] if one else kinds.SavedModule(other.base_layer)
            dense[name] = saved.requires_grad_(False)
            continue
        zeros = {}
        for wrapper in (one, other):
            if wrapper is not None:
                zeros |= {n: torch.zeros_like(d) for n, d in kinds.deltas(wrapper).items()}
        deltas = zeros | (kinds.deltas(one) if one else {})
        dense[name] = kinds.DenseDelta((one or other).base_layer, deltas)
    return dense


@torch.no_grad()
def move_towards(
    ref: dict[str, nn.Module], policy: dict[str, nn.Module], alpha: float,
) -> None:
    """delta <- alpha (policy's delta) + (1 - alpha) delta, which mixes the weights likewise."""
    for name, module in ref.items():
        if isinstance(module, kinds.SavedModule):
            learned = policy[name].lora_saved
            for p, q in zip(module.lora_saved.parameters(), learned.parameters()):
                p.lerp_(q, alpha)
            continue
        towards = kinds.deltas(policy[name]) if name in policy else {}
        for child, delta in module.lora_delta.items():
            delta.lerp_(towards.get(child, torch.zeros_like(delta)), alpha)
