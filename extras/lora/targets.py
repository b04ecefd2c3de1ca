"""Which modules PEFT's settings choose, and with what rank and scaling they are wrapped (extras/lora/kinds.py)."""

import math
import re
from typing import Callable

from torch import nn

from extras.decoder.moe import Experts, Router
from extras.lora import kinds
from model import LoraLinear, replace_module
from parts.names import file_name

# Settings of a PEFT adapter that say what is wrapped and how, with what a file without them means.
DEFAULTS = dict(target_modules=None, target_parameters=None, modules_to_save=None, exclude_modules=None,
                layers_to_transform=None, layers_pattern=None, lora_dropout=0.0, use_rslora=False, use_dora=False,
                rank_pattern={}, alpha_pattern={})


def add_lora(model: nn.Module, settings: dict) -> list[str]:
    """Freeze `model` and wrap what PEFT's settings choose, by default q_proj and v_proj; returns the wrapped modules' names.

    Raises ValueError for a target that matches nothing. The draws follow the model's order.
    """
    if not (settings.get("target_modules") or settings.get("target_parameters")):
        settings = settings | {"target_modules": ["qkv_proj"] if model.config.fused_qkv else ["q_proj", "v_proj"]}
    settings = named_experts(DEFAULTS | settings, model.config)
    model.requires_grad_(False)
    chosen = choose(model, settings)
    for name, make in chosen.items():
        replace_module(model, name, make())
    return list(chosen)


def choose(model: nn.Module, settings: dict) -> dict[str, Callable]:
    """{module name: what makes its wrapper}, in the model's order."""
    modules, theirs = dict(model.named_modules()), lambda name: file_name(name, model.config)
    check_targets(model, settings)
    whole = settings["modules_to_save"] or []
    chosen = {n: (lambda n=n, m=m: saved(n, m)) for n, m in modules.items()
              if n and any(theirs(n).endswith(w) for w in whole)}
    for name, module in modules.items():
        if is_linear(name, model) and is_target(name, theirs(name), module, settings):
            chosen[name] = lambda name=name, m=module: wrap(m, theirs(name), settings)
        stacks = [n for n in own_parameters(module) if is_parameter_target(f"{name}.{n}", settings)]
        if stacks:
            chosen[name] = lambda name=name, m=module, stacks=stacks: wrap_parameters(m, name, stacks, settings)
    return {name: chosen[name] for name in modules if name in chosen}


def is_linear(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name), (nn.Linear, nn.Embedding)) and not name.startswith(model.no_lora)


def own_parameters(module: nn.Module) -> list[str]:
    """The parameters of experts and routers, which PEFT names in target_parameters."""
    if isinstance(module, Router):
        return ["weight"]
    is_experts = isinstance(module, Experts) or type(module).__name__ == "Experts4bit"
    return ["gate_up_proj", "down_proj"] if is_experts else []


def saved(name: str, module: nn.Module) -> kinds.SavedModule:
    if next(module.parameters(), None) is None or any(True for m in module.modules() if hasattr(m, "stored")):
        raise ValueError(f"--lora_modules_to_save: {name} has no weights that can be trained (in 4 bits it has none)")
    return kinds.SavedModule(module)


def wrap(module: nn.Module, key: str, settings: dict) -> nn.Module:
    rank, alpha = rank_and_alpha(key, settings)
    if isinstance(module, nn.Embedding):
        return kinds.LoraEmbedding(module, rank, alpha, settings["use_dora"])
    return (kinds.DoraLinear if settings["use_dora"] else LoraLinear)(module, rank, alpha, settings["lora_dropout"])


def wrap_parameters(module: nn.Module, name: str, stacks: list[str], settings: dict) -> nn.Module:
    if settings["use_dora"]:
        raise ValueError(f"--use_dora: it is for linear layers and embeddings; {name} is experts or their router")
    sizes = {n: rank_and_alpha(f"{name}.{n}", settings) for n in stacks}
    if isinstance(module, Router):
        return kinds.LoraRouter(module, *sizes["weight"], settings["lora_dropout"])
    return kinds.LoraExperts(module, sizes, settings["lora_dropout"])


def rank_and_alpha(key: str, settings: dict) -> tuple[int, float]:
    """Of one module; alpha is what is divided by the rank. rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(r)."""
    of = lambda patterns, default: next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", key)), default)
    rank = of(settings["rank_pattern"] or {}, settings["r"])
    alpha = of(settings["alpha_pattern"] or {}, settings["lora_alpha"])
    return rank, alpha * math.sqrt(rank) if settings["use_rslora"] else alpha


def is_target(name: str, theirs: str, module: nn.Module, settings: dict) -> bool:
    """PEFT's rule, for a module by its own name and by that in the model's files."""
    whole, targets = settings["modules_to_save"] or [], settings["target_modules"] or []
    if any(re.match(rf"(^|.*\.){m}($|\..*)", theirs) for m in whole) or named(theirs, settings["exclude_modules"]):
        return False
    if "all-linear" in ([targets] if isinstance(targets, str) else targets):
        if isinstance(module, nn.Linear) and name != "lm_head":
            return True
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, theirs))
    return theirs in targets or ((named(theirs, targets) or named(name, targets)) and in_layers(theirs, settings))


def named(key: str, names: list[str] | str | None) -> bool:
    """Whether a list has `key` or the end of it, or a pattern matches it."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, key))
    return any(f".{key}".endswith(f".{n}") for n in names or ())


def in_layers(key: str, settings: dict) -> bool:
    """Whether a module is in one of layers_to_transform: by the first number in its name."""
    layers, patterns = settings["layers_to_transform"], settings["layers_pattern"]
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    forms = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(form, key) for form in forms)), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def is_parameter_target(key: str, settings: dict) -> bool:
    return named(key, settings["target_parameters"])


def check_targets(model: nn.Module, settings: dict) -> None:
    """Raise ValueError for a target that is no module or parameter of this model."""
    modules = {n: m for n, m in model.named_modules() if n}
    linear = {n: m for n, m in modules.items() if is_linear(n, model)}
    theirs = lambda n: file_name(n, model.config)
    stacks = [f"{n}.{p}" for n, m in modules.items() for p in own_parameters(m)]
    last = lambda names: " ".join(sorted({n.rpartition(".")[2] for n in names}))
    targets = settings["target_modules"] or []
    alone = {"exclude_modules": None, "layers_to_transform": None, "modules_to_save": None}
    for target in [targets] if isinstance(targets, str) else targets:
        one = settings | alone | {"target_modules": target if isinstance(targets, str) else [target]}
        if not any(is_target(n, theirs(n), m, one) for n, m in linear.items()):
            more = " (experts and routers: --lora_target_parameters)" if stacks else ""
            raise ValueError(f"--lora_target_modules {target}: no such module; this model has {last(linear)}{more}")
    for target in settings["target_parameters"] or []:
        if not any(named(s, [target]) for s in stacks):
            known = f"this model has {last(stacks)}, and weight of gate" if stacks else "this model has no experts"
            raise ValueError(f"--lora_target_parameters {target}: no such parameter of experts or routers; {known}")
    for target in settings["modules_to_save"] or []:
        if not any(theirs(n).endswith(target) for n in modules):
            raise ValueError(f"--lora_modules_to_save {target}: no such module; this model has {last(modules)}")


# Experts as the linear layers they were before transformers 5: PEFT takes those names for the stacks they went into.
FORMER = {"mixtral": dict(w1="gate_up_proj", w3="gate_up_proj", w2="down_proj", gate="gate.weight")}
FORMER |= dict.fromkeys(("qwen3_moe", "olmoe"), dict(gate_proj="gate_up_proj", up_proj="gate_up_proj",
                                                     down_proj="down_proj", gate="gate.weight"))


def named_experts(settings: dict, config) -> dict:
    """`settings` with former names of experts as target_parameters; gate and up lie in one stack, of twice the rank."""
    former, targets = FORMER.get(config.model_type, {}), settings["target_modules"]
    if isinstance(targets, str) or not targets:
        return settings
    old = {t: t.rpartition(".")[2] for t in targets if t.rpartition(".")[2] in former}
    halves = {n for n in old.values() if former[n] == "gate_up_proj"}
    if not old:
        return settings
    if len(halves) == 1:
        missing = next(n for n, stack in former.items() if stack == "gate_up_proj" and n not in halves)
        raise ValueError(f"--lora_target_modules {next(iter(halves))}: the experts' {next(iter(halves))} and {missing} "
                         f"are one matrix; name both, or neither")
    parameters = {*(settings["target_parameters"] or ()), *(former[n] for n in old.values())}
    fused = {r".*\.gate_up_proj": 2} if halves else {}
    dense = any(not sparse for sparse in config.moe["sparse"])  # layers without experts keep the names
    kept = [t for t in targets if t not in old or (dense and old[t] != "gate")]
    return settings | {
        "target_modules": kept, "target_parameters": sorted(parameters),
        "rank_pattern": (settings["rank_pattern"] or {}) | {k: v * settings["r"] for k, v in fused.items()},
        "alpha_pattern": (settings["alpha_pattern"] or {}) | {k: v * settings["lora_alpha"] for k, v in fused.items()}}
