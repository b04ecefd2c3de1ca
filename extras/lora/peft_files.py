"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors, read and written."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from extras.lora import kinds, targets
from model import lora_modules
from parts.files import open_safetensors, read_json, write_json
from parts.names import TRANSPOSED, file_name
from parts.rows import on_hub

# Settings of adapter_config.json that are read, with the types they may have.
PATTERN, NAMES = (dict, type(None)), (list, str, type(None))
READ = dict(
    r=int, lora_alpha=(int, float), lora_dropout=(int, float), use_rslora=bool, use_dora=bool, rank_pattern=PATTERN,
    alpha_pattern=PATTERN, target_modules=NAMES, target_parameters=(list, type(None)), exclude_modules=NAMES,
    modules_to_save=(list, type(None)), layers_to_transform=(list, int, type(None)), layers_pattern=NAMES)
# Those that change no number of an adapter that is there.
HARMLESS = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
            "peft_version", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
NOTHING = (None, False, 0, "", [], {})
# How A and B were first drawn; the others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base or the method.
DRAWN = (True, False, "gaussian", "eva", "orthogonal")


# Settings


def read_settings(directory: Path) -> dict:
    """The settings of an adapter's directory, targets.DEFAULTS where the file has none, and its base.

    The base may be a path relative to the adapter. Raises ValueError, by name, for what is not understood.
    """
    config = read_json(directory / "adapter_config.json")
    settings, base = check_settings(config, directory / "adapter_config.json"), config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{directory / 'adapter_config.json'}: base_model_name_or_path is missing")
    if not Path(base).exists() and (directory / base).exists():
        base = str(directory / base)
    return settings | {"base_model_name_or_path": base, "revision": config.get("revision")}


def check_settings(config: dict, where) -> dict:
    """The settings that `add_lora` reads; ValueError, by name, for others that could change a number."""
    odd = {k: v for k, v in config.items() if k not in READ and k not in HARMLESS and v not in NOTHING}
    if odd.get("bias") == "none":
        del odd["bias"]
    if odd.get("init_lora_weights") in DRAWN:
        del odd["init_lora_weights"]
    if odd or config.get("peft_type", "LORA") != "LORA":
        odd = odd or {"peft_type": config["peft_type"]}
        named = ", ".join(f"{k} = {v!r}" for k, v in odd.items())
        raise ValueError(f"{where}: {named}: not understood, and it may change the adapter's numbers")
    settings = targets.DEFAULTS | {k: v for k, v in config.items() if k in READ}
    for name, kind in READ.items():
        value = settings.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            missing = name not in settings or value is None
            raise ValueError(f"{where}: {name}: missing" if missing else f"{where}: {name} = {value!r} has no meaning")
    numbers = [settings["r"], *(settings["rank_pattern"] or {}).values()]
    if not all(isinstance(r, int) and r > 0 for r in numbers):
        raise ValueError(f"{where}: ranks are whole numbers above 0, found {numbers}")
    check_patterns(settings, where)
    return settings


def check_patterns(settings: dict, where) -> None:
    """Raise ValueError for a name that is none, or a pattern that does not compile."""
    for name in ("target_modules", "target_parameters", "modules_to_save", "exclude_modules", "layers_pattern",
                 "rank_pattern", "alpha_pattern"):
        value = settings[name]
        for pattern in [value] if isinstance(value, str) else value or ():
            try:
                re.compile(pattern)
            except (re.error, TypeError):
                raise ValueError(f"{where}: {name}: {pattern!r} is no name or pattern") from None


def find_base(settings: dict, ranks: Any = None) -> str:
    """The directory of an adapter's base; the revision that the adapter names is one on the hub."""
    base = settings["base_model_name_or_path"]
    if not on_hub(base):
        return base
    from extras.hub.client import same_model

    return str(same_model(base, settings.get("revision"), ranks))


def adapter_home(directory: str, name: str | None) -> str:
    """Where an adapter lies: in `directory`, or as PEFT saves several, in the folder of its name.

    Raises ValueError where a name is given and there is no adapter.
    """
    if name is None:
        return directory
    if Path(name).name != name:
        raise ValueError(f"the adapter name {name!r} is no plain name")
    for home in (Path(directory) / name, Path(directory)):
        if (home / "adapter_config.json").exists():
            return str(home)
    raise ValueError(f"{directory}: neither an adapter (no adapter_config.json) nor a folder with one named {name!r}")


# Tensors


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{PEFT's name: parameter, or a view of it} of everything that the adapter holds."""
    tensors = {}
    for name, wrapper in lora_modules(model).items():
        for n, p in wrapper_tensors(name, wrapper, model.config).items():
            tensors[f"base_model.model.{n}"] = p
    return tensors


def wrapper_tensors(name: str, wrapper: nn.Module, config) -> dict[str, Tensor]:
    if isinstance(wrapper, kinds.SavedModule):
        files = {file_name(f"{name}.{n}", config): p for n, p in wrapper.lora_saved.named_parameters()}
        return {n: p.T if transposed(n, config) else p for n, p in files.items()}
    theirs = file_name(name, config)
    if isinstance(wrapper, kinds.LoraExperts):  # PEFT nests: the last of the stacks is the outermost
        depth = {stack: ".base_layer" * i for i, stack in enumerate(reversed(wrapper.lora_A))}
        return {f"{theirs}{inner}.{n}.weight": getattr(wrapper, n)[stack]
                for stack, inner in depth.items() for n in ("lora_A", "lora_B")}
    return {f"{theirs}.{n}": p for n, p in wrapper.named_parameters() if n.startswith("lora_")}


def transposed(name: str, config) -> bool:
    if not config.other_names or config.model_type != "gpt2":
        return False
    return bool(TRANSPOSED.search(name))


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Fill the adapter of `model`.

    Raises ValueError where the files have other modules, rank or scaling, or a tensor that is not understood. Copies of
    base weights, which PEFT stores beside a LoRA on the embedding or the head, must be those of the base.
    """
    directory = Path(directory)
    path = directory / "adapter_model.safetensors"
    check_scaling(check_settings(read_json(directory / "adapter_config.json"), directory), model, directory)
    opened, ours = open_safetensors(path), adapter_tensors(model)
    found = {n: opened.get_tensor(n) for n in opened.keys()}
    if model.config.moe:
        found = stack_experts(found, model.config.moe["experts"], path)
    bases = {n: found.pop(n) for n in [*found] if n.endswith(".base_layer.weight")}
    odd = ours.keys() ^ found.keys()
    if odd:
        raise ValueError(f"{path}: its tensors are not those of this LoRA; first difference: {min(odd)}")
    for name, parameter in ours.items():
        tensor = found[name]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, this LoRA has {tuple(parameter.shape)}")
        parameter.data.copy_(tensor)
    check_bases(bases, model, path)


def check_bases(bases: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raise ValueError where a copy of a base weight is not what the base has: the adapter belongs on another."""
    wrapped = {f"base_model.model.{file_name(n, model.config)}.base_layer.weight": w
               for n, w in lora_modules(model).items()}
    for name, tensor in bases.items():
        own = wrapped[name].weight if name in wrapped else None
        narrow = tensor.dtype if own is None or tensor.dtype.itemsize < own.dtype.itemsize else own.dtype
        if own is None or own.shape != tensor.shape or not torch.equal(own.to(narrow).cpu(), tensor.to(narrow)):
            raise ValueError(f"{path}: {name} is not the base's: the adapter was trained on other weights, or with a "
                             "vocabulary that had been resized")


def check_scaling(settings: dict, model: nn.Module, directory: Path) -> None:
    settings = targets.named_experts(settings, model.config)
    for name, wrapper in lora_modules(model).items():
        own = getattr(wrapper, "scaling", {})
        parts = own if isinstance(own, dict) else {"weight" if isinstance(wrapper, kinds.LoraRouter) else None: own}
        for part, scaling in parts.items():
            key = file_name(name, model.config) + (f".{part}" if part else "")
            rank, alpha = targets.rank_and_alpha(key, settings)
            if not math.isclose(scaling, alpha / rank):
                raise ValueError(f"{directory}: its LoRA on {key} is scaled by {alpha / rank:g}, "
                                 f"this one by {scaling:g}")


EXPERT = re.compile(r"(.*\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.(lora_[AB])\.weight$")
HALVES, DOWN = (("w1", "w3"), ("gate_proj", "up_proj")), ("w2", "down_proj")


def stack_experts(found: dict[str, Tensor], experts: int, path: Path) -> dict[str, Tensor]:
    """`found` with every expert's own LoRA, as files from before transformers 5 have them, stacked as PEFT does:
    A of gate and up one above the other, B block by block on the diagonal."""
    parts, rest = {}, {}
    for name, tensor in found.items():
        expert = EXPERT.match(name)
        if expert:
            layer, number, matrix, kind = expert.groups()
            parts.setdefault(layer, {})[int(number), matrix, kind] = tensor
        else:
            rest[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
    for layer, tensors in parts.items():
        halves = next((h for h in HALVES if (0, h[0], "lora_A") in tensors), None)
        down = next((d for d in DOWN if (0, d, "lora_A") in tensors), None)
        places = {".base_layer" if halves and down else "": halves} if halves else {}
        for depth, matrices in (places | ({"": (down,)} if down else {})).items():
            try:
                a = [torch.cat([tensors.pop((e, m, "lora_A")) for m in matrices]) for e in range(experts)]
                b = [torch.block_diag(*(tensors.pop((e, m, "lora_B")) for m in matrices)) for e in range(experts)]
            except (KeyError, RuntimeError):
                raise ValueError(f"{path}: {layer}mlp.experts: some experts have a LoRA that others lack") from None
            rest[f"{layer}mlp.experts{depth}.lora_A.weight"] = torch.cat(a)
            rest[f"{layer}mlp.experts{depth}.lora_B.weight"] = torch.stack(b, -1).flatten(1)
        if tensors:
            raise ValueError(f"{path}: {layer}mlp.experts: {min(tensors)} is not understood")
    return rest


# Writing


def save_adapter(model: nn.Module, directory: str | Path, settings: dict) -> None:
    """Write both files; what is wrapped is said so that PEFT wraps the same."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().cpu().contiguous() for n, p in adapter_tensors(model).items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    experts = any(isinstance(w, (kinds.LoraExperts, kinds.LoraRouter)) for w in lora_modules(model).values())
    settings = targets_of(model, targets.named_experts(targets.DEFAULTS | settings, model.config))
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "fan_in_fan_out": model.config.model_type == "gpt2", **settings,
        **({"lora_dropout": 0.0} if experts else {})})  # PEFT refuses dropout there


def targets_of(model: nn.Module, settings: dict) -> dict:
    """`settings` with target_modules and target_parameters as short as PEFT finds the wrapped ones and no others by."""
    adapter, config = lora_modules(model), model.config
    is_stack = lambda w: isinstance(w, (kinds.LoraExperts, kinds.LoraRouter))
    wrapped = {file_name(n, config) for n, w in adapter.items()
               if not is_stack(w) and not isinstance(w, kinds.SavedModule)}
    stacks = {f"{n}.{p}" for n, w in adapter.items() if is_stack(w)
              for p in (w.lora_A if isinstance(w, kinds.LoraExperts) else ["weight"])}
    last = lambda name: name.rpartition(".")[2]
    plain = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and "lora_" not in n}
    theirs = {file_name(n.replace(".base_layer", ""), config): m for n, m in plain.items()}
    short = settings | {"target_modules": sorted({last(n) for n in wrapped})}
    found = {n for n, m in theirs.items() if targets.is_target(n, n, m, short)}
    if found != wrapped or config.moe:  # in a mixture of experts PEFT takes short names for those of experts
        short = settings | {"target_modules": sorted(wrapped), "layers_to_transform": None, "layers_pattern": None}
    ends = sorted({".".join(s.rsplit(".", 2)[1:]) for s in stacks})
    every = {f"{n.replace('.base_layer', '')}.{p}" for n, m in model.named_modules() for p in targets.own_parameters(m)}
    ends = ends if {s for s in every if targets.named(s, ends)} == stacks else sorted(stacks)
    return short | {"target_parameters": ends or None}
