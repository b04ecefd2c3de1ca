"""LoRA on an embedding, and adapters in PEFT's files: adapter_config.json and adapter_model.safetensors."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import file_name, lora_modules, open_safetensors, read_json, write_json

# Settings of adapter_config.json that make an adapter more than scaling * B A.
BEYOND_LORA = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices",
               "layer_replication", "alora_invocation_tokens")


class LoraEmbedding(nn.Module):
    """base(ids) + scaling * (A[:, ids])^T B^T, with PEFT's parameter names; A starts at zero, B is normal."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / rank, True
        place = dict(device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, **place))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, **place))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        out = self.base_layer(ids)
        if not self.enabled:
            return out
        low_rank = F.embedding(ids, self.lora_embedding_A.T) * self.scaling
        return out + (low_rank @ self.lora_embedding_B.T).to(out.dtype)

    def delta(self) -> Tensor:
        """What merging adds to the weight."""
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{PEFT's name: parameter} of the LoRA."""
    return {f"base_model.model.{file_name(name, model.config)}.{n}": p for name, module in lora_modules(model).items()
            for n, p in module.named_parameters() if n.startswith("lora_")}


def save_adapter(model: nn.Module, directory: Path, settings: dict) -> None:
    """Write both files; `target_modules` is filled in."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().to("cpu", torch.float32).contiguous() for n, p in adapter_tensors(model).items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "fan_in_fan_out": model.config.model_type == "gpt2", **settings,
        "target_modules": target_modules(model)})


def target_modules(model: nn.Module) -> list[str]:
    """Last parts of the wrapped modules' names, where PEFT would find no other module by them; else the full names."""
    wrapped = {file_name(name, model.config) for name in lora_modules(model)}
    short = {name.rpartition(".")[2] for name in wrapped}
    plain = {file_name(n, model.config).rpartition(".")[2] for n, m in model.named_modules()
             if isinstance(m, (nn.Linear, nn.Embedding)) and "base_layer" not in n and "lora_" not in n}
    return sorted(wrapped if short & plain or model.config.moe else short)


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Fill the LoRA parameters of `model`.

    Raises ValueError where the adapter has other modules, rank or scaling, or is more than a plain LoRA. Copies of
    base weights, which PEFT stores beside a LoRA on the embedding or the head, are skipped.
    """
    path = directory / "adapter_model.safetensors"
    check_settings(read_json(directory / "adapter_config.json"), model, directory)
    opened, ours = open_safetensors(path), adapter_tensors(model)
    odd = ours.keys() ^ {n for n in opened.keys() if ".lora_" in n}
    if odd:
        raise ValueError(f"{path}: its tensors are not those of this LoRA; first difference: {min(odd)}")
    for name, parameter in ours.items():
        tensor = opened.get_tensor(name)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, this LoRA has {tuple(parameter.shape)}")
        parameter.data.copy_(tensor)


def read_settings(directory: Path) -> dict:
    """r, lora_alpha, lora_dropout, use_rslora, target_modules, base_model_name_or_path of an adapter's directory.

    The base may be a path relative to the adapter. Raises ValueError for what is more than a plain LoRA.
    """
    config = read_json(directory / "adapter_config.json")
    check_plain(config, directory)
    base, targets = config.get("base_model_name_or_path"), config.get("target_modules")
    if not base:
        raise ValueError(f"{directory / 'adapter_config.json'}: base_model_name_or_path is missing")
    if not Path(base).exists() and (directory / base).exists():
        base = str(directory / base)
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f"{directory / 'adapter_config.json'}: target_modules is a pattern, {targets!r}; "
                         "list the modules")
    return {"r": config["r"], "lora_alpha": config["lora_alpha"], "lora_dropout": config.get("lora_dropout", 0.0),
            "use_rslora": bool(config.get("use_rslora")), "base_model_name_or_path": base,
            "target_modules": [targets] if isinstance(targets, str) else targets}


def check_plain(config: dict, directory: Path) -> None:
    """Raises ValueError, by name, for settings that make the adapter more than scaling * B A."""
    extra = [f"{k} = {config[k]!r}" for k in BEYOND_LORA if config.get(k)]
    extra += [f"bias = {config['bias']!r}"] if config.get("bias", "none") != "none" else []
    if extra or config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{directory}: not a plain LoRA: {', '.join(extra) or config['peft_type']}")
    missing = [k for k in ("r", "lora_alpha") if not config.get(k)]
    if missing:
        raise ValueError(f"{directory / 'adapter_config.json'}: {', '.join(missing)}: missing")


def check_settings(config: dict, model: nn.Module, directory: Path) -> None:
    check_plain(config, directory)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    for module in lora_modules(model).values():
        if not math.isclose(module.scaling, scaling):
            raise ValueError(f"{directory}: its LoRA is scaled by {scaling:g}, this one by {module.scaling:g}")
