"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors, read and written."""

import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from extras.lora import kinds, targets
from model import ModelConfig, lora_modules
from parts.files import open_safetensors, read_json, write_json
from parts.names import TRANSPOSED, file_name
from parts.rows import on_hub
from parts.vision_configs import GEMMA4_KINDS
from parts.weights import file_names

# Settings of adapter_config.json that are read, with the types they may have.
PATTERN = (dict, type(None))
NAMES = (list, str, type(None))
READ: dict[str, Any] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": PATTERN,
    "alpha_pattern": PATTERN,
    "target_modules": NAMES,
    "target_parameters": (list, type(None)),
    "exclude_modules": NAMES,
    "modules_to_save": (list, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": NAMES}
# Settings that change no number of an adapter that is already trained.
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "peft_version", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "runtime_config"}
# Models with layers that PEFT cannot wrap, and fails on where a short name chooses them too; or with
# layers that are not ours, of their audio
ODD_TOWERS = GEMMA4_KINDS
LARGEST = 1e30  # of alphas
NOTHING = (None, False, 0, "", [], {})
# How A and B were first drawn. Others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base or the
# method.
DRAWN = (True, False, "gaussian", "eva", "orthogonal")


# Settings


def read_settings(directory: Path) -> dict:
    """Read the settings of an adapter's directory and the name of its base.

    targets.DEFAULTS fill in what the file lacks. The base may be a path relative to the adapter.
    Raises ValueError naming what is not understood.
    """
    path = directory / "adapter_config.json"
    config = read_json(path)
    settings = check_settings(config, path)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path is missing")
    if not Path(base).exists() and (directory / base).exists():
        base = str(directory / base)
    return settings | {"base_model_name_or_path": base, "revision": config.get("revision")}


def check_settings(config: dict, where: Path) -> dict:
    """Return the settings that `add_lora` reads.

    Raises ValueError naming others that could change a number.
    """
    check_known(config, where)
    settings = targets.DEFAULTS | {k: v for k, v in config.items() if k in READ}
    for name, kind in READ.items():
        value = settings.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            is_missing = name not in settings or value is None
            what = ": missing" if is_missing else f" = {value!r} has no meaning"
            raise ValueError(f"{where}: {name}{what}")
    numbers = [settings["r"], *(settings["rank_pattern"] or {}).values()]
    if not all(isinstance(r, int) and r > 0 for r in numbers):
        raise ValueError(f"{where}: ranks are whole numbers above 0, found {numbers}")
    alphas = [settings["lora_alpha"], *(settings["alpha_pattern"] or {}).values()]
    # more than any scaling that float32 can compute with
    if not all(isinstance(a, (int, float)) and abs(a) < LARGEST for a in alphas):
        raise ValueError(f"{where}: alphas are finite numbers, found {alphas}")
    if not 0 <= settings["lora_dropout"] <= 1:
        raise ValueError(
            f"{where}: lora_dropout = {settings['lora_dropout']!r}; expected a number from 0 to 1")
    check_patterns(settings, where)
    return settings


def check_known(config: dict, where: Path) -> None:
    """Raise ValueError for settings that are not understood and say something."""
    odd = {k: v for k, v in config.items()
           if k not in READ and k not in HARMLESS and v not in NOTHING}
    if odd.get("bias") == "none":
        del odd["bias"]
    if odd.get("init_lora_weights") in DRAWN:
        del odd["init_lora_weights"]
    if odd or config.get("peft_type", "LORA") != "LORA":
        odd = odd or {"peft_type": config["peft_type"]}
        named = ", ".join(f"{k} = {v!r}" for k, v in odd.items())
        raise ValueError(
            f"{where}: {named}: not understood, and it may change the adapter's numbers")


def check_patterns(settings: dict, where: Path) -> None:
    """Raise ValueError for a name that is not a string, or a pattern that does not compile."""
    for name in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules",
                 "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = settings[name]
        for pattern in [value] if isinstance(value, str) else value or ():
            try:
                re.compile(pattern)
            except (re.error, TypeError):
                raise ValueError(f"{where}: {name}: {pattern!r} is no name or pattern") from None


def find_base(settings: dict, ranks: Any = None) -> str:
    """Return the directory of an adapter's base.

    A base on the hub is fetched, at the revision that the adapter names.
    """
    base = settings["base_model_name_or_path"]
    if not on_hub(base):
        return base
    from extras.hub.client import same_model

    return str(same_model(base, settings.get("revision"), ranks))


def adapter_home(directory: str, name: str | None) -> str:
    """Return `directory`, or, as PEFT saves several adapters, the folder of its name in it.

    Raises ValueError where a name is given and there is no adapter.
    """
    if name is None:
        return directory
    if Path(name).name != name:
        raise ValueError(f"the adapter name {name!r} is not a plain name")
    for home in (Path(directory) / name, Path(directory)):
        if (home / "adapter_config.json").exists():
            return str(home)
    raise ValueError(
        f"{directory}: neither an adapter (no adapter_config.json) nor a folder with one named "
        f"{name!r}")


# Tensors


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return {PEFT's name: parameter, or a view of it} of everything that the adapter holds."""
    tensors = {}
    for name, wrapper in lora_modules(model).items():
        for n, p in wrapper_tensors(name, wrapper, model.config).items():
            tensors[f"base_model.model.{n}"] = p
    return tensors


def wrapper_tensors(name: str, wrapper: nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    """Return the same for one wrapped module, without PEFT's common prefix."""
    found = {}
    if isinstance(wrapper, kinds.SavedModule):
        for n, p in wrapper.lora_saved.named_parameters():
            theirs = file_name(f"{name}.{n}", config)
            found[theirs] = p.T if transposed(theirs, config) else p
        return found
    theirs = file_name(name, config)
    if isinstance(wrapper, kinds.LoraExperts):
        # PEFT nests one wrapper per stack; the last of the stacks is the outermost
        for depth, stack in enumerate(reversed(wrapper.lora_A)):
            inner = theirs + ".base_layer" * depth
            found[f"{inner}.lora_A.weight"] = wrapper.lora_A[stack]
            found[f"{inner}.lora_B.weight"] = wrapper.lora_B[stack]
        return found
    return {f"{theirs}.{n}": p for n, p in wrapper.named_parameters() if n.startswith("lora_")}


def transposed(name: str, config: ModelConfig) -> bool:
    if not config.other_names or config.model_type != "gpt2":
        return False
    return bool(TRANSPOSED["gpt2"].search(name))


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Fill the adapter of `model`.

    Raises ValueError where the files have other modules, rank or scaling, or a tensor that is not
    understood. Copies of base weights, which PEFT stores beside a LoRA on the embedding or the
    head, must equal those of the base.
    """
    directory = Path(directory)
    path = directory / "adapter_model.safetensors"
    settings = check_settings(read_json(directory / "adapter_config.json"), directory)
    check_scaling(settings, model, directory)
    opened = open_safetensors(path)
    ours = adapter_tensors(model)
    found = {n: opened.get_tensor(n) for n in opened.keys()}
    if model.config.moe:
        found = stack_experts(found, model.config.moe["experts"], path, ours.keys())
    bases = {n: found.pop(n) for n in [*found] if n.endswith(".base_layer.weight")}
    odd = ours.keys() ^ found.keys()
    if odd:
        raise ValueError(
            f"{path}: its tensors are not those of this LoRA; first difference: {min(odd)}")
    for name, parameter in ours.items():
        tensor = found[name]
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}; expected a type of floats")
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, this LoRA has {tuple(parameter.shape)}")
        parameter.data.copy_(tensor)
    check_bases(bases, model, path)


def read_placed(model: nn.Module, directory: Path, place: Any) -> None:
    """Fill the adapter of a model wherever a trainer has placed it, from rank 0's file.

    Every rank calls this.
    """
    twin = place.gathered(model, trained_only=True)

    def read() -> dict:
        load_adapter(twin, directory)
        return {}

    place.ranks.from_first(read)
    for name, p in twin.named_parameters():
        if p.requires_grad:
            place.fill(model.get_parameter(name), p)


def check_bases(bases: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raise ValueError where a copy of a base weight differs from the base.

    The adapter then belongs on another base. The two are compared in the narrower of their types.
    """
    wrapped = {f"base_model.model.{file_name(n, model.config)}.base_layer.weight": w
               for n, w in lora_modules(model).items()}
    for name, tensor in bases.items():
        own = wrapped[name].weight if name in wrapped else None
        if own is not None and own.is_meta:  # --fsdp
            ours = file_names(model)[id(own)]
            own = model.read([ours])[ours]
        is_same = own is not None and own.shape == tensor.shape
        if is_same:
            narrow = min(own.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
            is_same = torch.equal(own.to(narrow).cpu(), tensor.to(narrow))
        if not is_same:
            raise ValueError(
                f"{path}: {name} is not the base's: the adapter was trained on other weights, or "
                "with a vocabulary that had been resized")


def check_scaling(settings: dict, model: nn.Module, directory: Path) -> None:
    """Raise ValueError where the settings scale a module otherwise than its wrapper does."""
    settings = targets.named_experts(settings, model.config)
    for name, wrapper in lora_modules(model).items():
        parts: Any = getattr(wrapper, "scaling", {})
        if not isinstance(parts, dict):
            parts = {"weight" if isinstance(wrapper, kinds.LoraRouter) else None: parts}
        for part, scaling in parts.items():
            key = file_name(name, model.config) + (f".{part}" if part else "")
            rank, alpha = targets.rank_and_alpha(key, settings)
            if not math.isclose(scaling, alpha / rank):
                raise ValueError(f"{directory}: its LoRA on {key} is scaled by {alpha / rank:g}, "
                                 f"this one by {scaling:g}")


# The LoRA of one expert's matrix, as files from before transformers 5 have it.
EXPERT = re.compile(
    r"(.*\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.(lora_[AB])\.weight$")
HALVES = (("w1", "w3"), ("gate_proj", "up_proj"))
DOWN = ("w2", "down_proj")


def stack_experts(
    found: dict[str, Tensor], experts: int, path: Path, known: Container[str],
) -> dict[str, Tensor]:
    """Return `found` with the LoRAs of single experts stacked; `known` names need no other.

    Raises ValueError where experts differ in what they have.
    """
    parts: dict[str, dict] = {}  # layer -> {(expert, matrix, "lora_A" or "lora_B"): tensor}
    rest = {}
    for name, tensor in found.items():
        expert = EXPERT.match(name)
        if expert:
            layer, number, matrix, kind = expert.groups()
            parts.setdefault(layer, {})[int(number), matrix, kind] = tensor
        else:
            rest[name if name in known else name.replace(".block_sparse_moe.", ".mlp.")] = tensor
    for layer, tensors in parts.items():
        for depth, matrices in stacks_of(tensors).items():
            try:
                a, b = stack_matrices(tensors, matrices, experts)
            except (KeyError, RuntimeError):
                raise ValueError(
                    f"{path}: {layer}mlp.experts: some experts have a LoRA that others lack"
                ) from None
            rest[f"{layer}mlp.experts{depth}.lora_A.weight"] = a
            rest[f"{layer}mlp.experts{depth}.lora_B.weight"] = b
        if tensors:
            raise ValueError(f"{path}: {layer}mlp.experts: {min(tensors)} is not understood")
    return rest


def stacks_of(tensors: dict) -> dict[str, tuple[str, ...]]:
    """Return {where PEFT nests the stack: the matrices that go into it} of one layer."""
    halves = next((h for h in HALVES if (0, h[0], "lora_A") in tensors), None)
    down = next((d for d in DOWN if (0, d, "lora_A") in tensors), None)
    stacks: dict[str, tuple[str, ...]] = {}
    if halves:
        stacks[".base_layer" if down else ""] = halves
    if down:
        stacks[""] = (down,)
    return stacks


def stack_matrices(
    tensors: dict, matrices: tuple[str, ...], experts: int,
) -> tuple[Tensor, Tensor]:
    """Take A and B of all experts out of `tensors`, and stack them as PEFT does.

    The A of gate and up go one above the other, their B block by block on the diagonal.
    """
    a = []
    b = []
    for expert in range(experts):
        a.append(torch.cat([tensors.pop((expert, m, "lora_A")) for m in matrices]))
    for expert in range(experts):
        b.append(torch.block_diag(*[tensors.pop((expert, m, "lora_B")) for m in matrices]))
    return torch.cat(a), torch.stack(b, -1).flatten(1)


# Writing


def save_adapter(model: nn.Module, directory: str | Path, settings: dict) -> None:
    """Write both files, with targets by which PEFT wraps the same modules."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().cpu().contiguous() for n, p in adapter_tensors(model).items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = targets.named_experts(targets.DEFAULTS | settings, model.config)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": model.config.model_type == "gpt2"}
    config |= targets_of(model, settings)
    if any(map(is_stack, lora_modules(model).values())):
        config["lora_dropout"] = 0.0  # PEFT refuses dropout on experts
    write_json(directory / "adapter_config.json", config)


def is_stack(wrapper: nn.Module) -> bool:
    return isinstance(wrapper, (kinds.LoraExperts, kinds.LoraRouter))


def targets_of(model: nn.Module, settings: dict) -> dict:
    """Return `settings` with the shortest targets that choose the wrapped modules and no others."""
    config = model.config
    wrapped = set()
    stacks = set()
    for name, wrapper in lora_modules(model).items():
        if isinstance(wrapper, kinds.LoraExperts):
            stacks |= {f"{file_name(name, config)}.{stack}" for stack in wrapper.lora_A}
        elif isinstance(wrapper, kinds.LoraRouter):
            stacks.add(f"{file_name(name, config)}.weight")
        elif not isinstance(wrapper, kinds.SavedModule):
            wrapped.add(file_name(name, config))
    short = settings | {"target_modules": sorted({n.rpartition(".")[2] for n in wrapped})}
    # in a mixture of experts PEFT takes short names for those of experts
    if config.moe or config.model_type in ODD_TOWERS or modules_chosen(model, short) != wrapped:
        short |= {
            "target_modules": sorted(wrapped), "layers_to_transform": None, "layers_pattern": None}
    return short | {"target_parameters": shortest_names(model, stacks) or None}


def modules_chosen(model: nn.Module, settings: dict) -> set[str]:
    """Return the names, in the files, of the modules that PEFT would wrap."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and "lora_" not in name:
            theirs = file_name(name.replace(".base_layer", ""), model.config)
            if targets.is_target(theirs, theirs, module, settings):
                found.add(theirs)
    return found


def shortest_names(model: nn.Module, stacks: set[str]) -> list[str]:
    """Return the ends of the stacks' names if no other parameter has them, else the full names."""
    ends = sorted({".".join(stack.rsplit(".", 2)[1:]) for stack in stacks})
    found = set()
    for name, module in model.named_modules():
        plain = file_name(name.replace(".base_layer", ""), model.config)
        parameters = [f"{plain}.{p}" for p in targets.own_parameters(module)]
        found |= {p for p in parameters if targets.named(p, ends)}
    return ends if found == stacks else sorted(stacks)
