"""Which modules PEFT's settings choose, and with what rank and scaling they are wrapped
(extras/lora/kinds.py).

A module has two names: its own, and that in the model's files, which the settings use. Patterns
and names are matched as PEFT matches them.
"""

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from extras.decoder.moe import Experts, Router
from extras.lora import kinds
from model import LoraLinear, ModelConfig
from parts.names import file_name
from parts.weights import in_memory

# Families of whose Mamba layers PEFT refuses adapters on out_proj: transformers' fused kernel reads
# its weight and would pass the adapter by.
PASSED_BY = ("falcon_h1", "nemotron_h")
# Families whose stacks are (experts, in, out), which PEFT takes for (experts, out, in).
TURNED = ("llama4_text", "llama4")

# Settings of a PEFT adapter that say what is wrapped and how, with the defaults of those that a
# file lacks.
DEFAULTS: dict[str, Any] = {
    "target_modules": None,
    "target_parameters": None,
    "modules_to_save": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {}}


def add_lora(model: nn.Module, settings: dict) -> list[str]:
    """Freeze `model` and wrap what PEFT's settings choose, by default what makes q and v.

    Returns the wrapped modules' names. The random draws follow the model's order. Raises
    ValueError for a target that matches nothing.
    """
    if not (settings.get("target_modules") or settings.get("target_parameters")):
        settings = settings | {"target_modules": usual_targets(model.config)}
    settings = named_experts(DEFAULTS | settings, model.config)
    model.requires_grad_(False)
    chosen = choose(model, settings)
    for name, make in chosen.items():
        # DoRA and modules_to_save start from the weights; without --fsdp these are there
        reads = settings["use_dora"] or make.func is saved
        with in_memory(model, name, reads):
            replace_module(model, name, make())
    return list(chosen)


def usual_targets(config: ModelConfig) -> list[str]:
    """Return q_proj and v_proj, or what a family has in their place: Nemotron-H, whose layers with
    attention are few, all of it."""
    if config.single:
        return ["q_proj", "k_proj", "v_proj", "o_proj"]
    if config.latent is not None:
        return ["q_proj" if config.latent["query"] is None else "q_b_proj", "kv_b_proj"]
    return ["qkv_proj"] if config.fused_qkv else ["q_proj", "v_proj"]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def choose(model: nn.Module, settings: dict) -> dict[str, partial]:
    """Return {module name: function that makes its wrapper}, in the model's order."""
    check_targets(model, settings)
    chosen: dict[str, partial] = {}
    for name, module in model.named_modules():
        if not name:
            continue
        theirs = file_name(name, model.config)
        stacks = [n for n in own_parameters(module)
                  if named(f"{theirs}.{n}", settings["target_parameters"])
                  or named(f"{name}.{n}", settings["target_parameters"])]
        if stacks:
            turned = model.config.model_type in TURNED
            chosen[name] = partial(wrap_parameters, module, theirs, stacks, settings, turned)
        elif is_linear(name, model) and is_target(name, theirs, module, settings):
            chosen[name] = partial(wrap, module, theirs, settings)
        elif any(theirs.endswith(end) for end in settings["modules_to_save"] or []):
            chosen[name] = partial(saved, name, module)
    return chosen


def is_linear(name: str, model: nn.Module) -> bool:
    """Tell whether a module can be a target.

    Where PEFT takes some names for those of experts, it cannot reach a shared expert's layers; and
    it loads no adapter of Mamba's out_proj in a family whose fused kernel would pass it by.
    """
    is_kind = isinstance(model.get_submodule(name), (nn.Linear, nn.Embedding))
    last = name.rpartition(".")[2]
    is_taken = has_shared(model.config) and last in former_names(model.config)
    is_taken |= model.config.model_type in PASSED_BY and last == "out_proj"
    return is_kind and not is_taken and not name.startswith(model.no_lora)


def own_parameters(module: nn.Module) -> list[str]:
    """Return the parameters of experts and routers, which PEFT names in target_parameters."""
    if isinstance(module, Router):
        return ["weight"]
    is_experts = isinstance(module, Experts) or type(module).__name__ == "Experts4bit"
    return [module.first, "down_proj"] if is_experts else []


def saved(name: str, module: nn.Module) -> kinds.SavedModule:
    is_four_bit = any(hasattr(m, "stored") for m in module.modules())
    if is_four_bit or next(module.parameters(), None) is None:
        raise ValueError(
            f"--lora_modules_to_save: {name} has no weights that can be trained (in 4 bits it has "
            "none)")
    return kinds.SavedModule(module)


def wrap(module: nn.Module, key: str, settings: dict) -> nn.Module:
    rank, alpha = rank_and_alpha(key, settings)
    if isinstance(module, nn.Embedding):
        return kinds.LoraEmbedding(module, rank, alpha, settings["use_dora"])
    kind = kinds.DoraLinear if settings["use_dora"] else LoraLinear
    return kind(module, rank, alpha, settings["lora_dropout"])


def wrap_parameters(
    module: nn.Module, name: str, stacks: list[str], settings: dict, turned: bool,
) -> nn.Module:
    if settings["use_dora"]:
        raise ValueError(
            f"--use_dora: it is for linear layers and embeddings; {name} is experts or their "
            "router")
    sizes = {n: rank_and_alpha(f"{name}.{n}", settings) for n in stacks}
    if isinstance(module, Router):
        return kinds.LoraRouter(module, *sizes["weight"], settings["lora_dropout"])
    return kinds.LoraExperts(module, sizes, settings["lora_dropout"], turned)


def rank_and_alpha(key: str, settings: dict) -> tuple[int, float]:
    """Return rank and alpha of one module, whose update is scaled by alpha / rank.

    rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(r), so its alpha is made larger by sqrt(r).
    """

    def setting(patterns: dict | None, default: Any) -> Any:
        matching = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", key))
        return next(matching, default)

    rank = setting(settings["rank_pattern"], settings["r"])
    alpha = setting(settings["alpha_pattern"], settings["lora_alpha"])
    return rank, alpha * math.sqrt(rank) if settings["use_rslora"] else alpha


def is_target(name: str, theirs: str, module: nn.Module, settings: dict) -> bool:
    """Apply PEFT's rule to a module, by its own name and by that in the model's files."""
    targets = settings["target_modules"] or []
    saved_ends = settings["modules_to_save"] or []
    is_saved = any(re.match(rf"(^|.*\.){end}($|\..*)", theirs) for end in saved_ends)
    if is_saved or named(theirs, settings["exclude_modules"]):
        return False
    if "all-linear" in ([targets] if isinstance(targets, str) else targets):
        if isinstance(module, nn.Linear) and name != "lm_head":
            return True
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, theirs))
    if theirs in targets:
        return True
    return (named(theirs, targets) or named(name, targets)) and in_layers(theirs, settings)


def named(key: str, names: list[str] | str | None) -> bool:
    """Tell whether a list has `key` or the end of it, or a pattern matches it."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, key))
    return any(f".{key}".endswith(f".{n}") for n in names or ())


def in_layers(key: str, settings: dict) -> bool:
    """Tell whether a module is in one of layers_to_transform, by the first number in its name."""
    layers = settings["layers_to_transform"]
    patterns = settings["layers_pattern"]
    if layers is None or layers == []:
        return True
    if isinstance(patterns, str):
        patterns = [patterns]
    forms = [r".*?\.[^.]*\.(\d+)\."]
    if patterns:
        forms = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns]
    found = next(filter(None, (re.match(form, key) for form in forms)), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def check_targets(model: nn.Module, settings: dict) -> None:
    """Raise ValueError for a target that is no module or parameter of this model."""
    modules = {n: m for n, m in model.named_modules() if n}
    theirs = {n: file_name(n, model.config) for n in modules}
    stacks = [f"{theirs[n]}.{p}" for n, m in modules.items() for p in own_parameters(m)]
    own = [f"{n}.{p}" for n, m in modules.items() for p in own_parameters(m)]
    check_modules(model, modules, theirs, settings, bool(stacks))
    for target in settings["target_parameters"] or []:
        if not any(named(stack, [target]) for stack in stacks + own):
            known = "this model has no experts"
            if stacks:
                ends = {".".join(stack.rsplit(".", 2)[1:]) for stack in stacks}
                known = f"this model has {' '.join(sorted(ends))}"
            raise ValueError(
                f"--lora_target_parameters {target}: no such parameter of experts or routers; "
                f"{known}")
    for target in settings["modules_to_save"] or []:
        if not any(name.endswith(target) for name in theirs.values()):
            raise ValueError(
                f"--lora_modules_to_save {target}: no such module; this model has "
                f"{last_parts(modules)}")


def check_modules(
    model: nn.Module, modules: dict[str, nn.Module], theirs: dict[str, str], settings: dict,
    has_experts: bool,
) -> None:
    """Raise ValueError for one of target_modules that chooses none, taken by itself."""
    linear = {n: m for n, m in modules.items() if is_linear(n, model)}
    targets = settings["target_modules"] or []
    others_off = {"exclude_modules": None, "layers_to_transform": None, "modules_to_save": None}
    for target in [targets] if isinstance(targets, str) else targets:
        one = target if isinstance(targets, str) else [target]
        alone = settings | others_off | {"target_modules": one}
        if not any(is_target(n, theirs[n], m, alone) for n, m in linear.items()):
            more = " (experts and routers: --lora_target_parameters)" if has_experts else ""
            raise ValueError(
                f"--lora_target_modules {target}: no such module; this model has "
                f"{last_parts(linear)}{more}")


def last_parts(names: Iterable[str]) -> str:
    return " ".join(sorted({name.rpartition(".")[2] for name in names}))


# Experts were linear layers before transformers 5: PEFT takes those names for the stacks they went
# into.
SWIGLU = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
FORMER = {
    "mixtral": {
        "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "gate.weight"},
    "qwen3_moe": SWIGLU | {"gate": "gate.weight"},
    "olmoe": SWIGLU | {"gate": "gate.weight"},
    "qwen3_next": SWIGLU | {"gate": "gate.weight"}}
FORMER |= dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "glm4_moe_lite"),
    SWIGLU | {"gate": "gate.weight"})


def former_names(config: ModelConfig) -> dict[str, str]:
    return FORMER.get(config.model_type, {})


def has_shared(config: ModelConfig) -> bool:
    return bool(config.moe and config.moe["shared_size"])


def named_experts(settings: dict, config: ModelConfig) -> dict:
    """Return `settings` with former names of experts as target_parameters.

    Gate and up are one stack now, which gets twice the rank. Raises ValueError where only one of
    them is named.
    """
    former = former_names(config)
    targets = settings["target_modules"]
    if isinstance(targets, str) or not targets:
        return settings
    old = {}  # target -> the last part of its name
    for target in targets:
        end = target.rpartition(".")[2]
        if end in former:
            old[target] = end
    if not old:
        return settings
    halves = {end for end in old.values() if former[end] == "gate_up_proj"}
    if len(halves) == 1:
        given = next(iter(halves))
        missing = next(n for n, stack in former.items() if stack == "gate_up_proj" and n != given)
        raise ValueError(
            f"--lora_target_modules {given}: the experts' {given} and {missing} are one matrix; "
            "name both, or neither")
    parameters = {*(settings["target_parameters"] or ()), *(former[end] for end in old.values())}
    # dense layers keep the names
    has_dense = not has_shared(config) and any(not sparse for sparse in config.moe["sparse"])
    kept = [t for t in targets if t not in old or (has_dense and old[t] != "gate")]
    ranks = settings["rank_pattern"] or {}
    alphas = settings["alpha_pattern"] or {}
    if halves:
        fused = r".*\.gate_up_proj"
        ranks = ranks | {fused: 2 * settings["r"]}
        alphas = alphas | {fused: 2 * settings["lora_alpha"]}
    return settings | {
        "target_modules": kept, "target_parameters": sorted(parameters), "rank_pattern": ranks,
        "alpha_pattern": alphas}
