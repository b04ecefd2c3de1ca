"""Train models that are passed as objects: transformers' PreTrainedModel and PEFT's PeftModel.

    DPOTrainer(model=AutoModelForCausalLM.from_pretrained(...), ...).train()

Such an object becomes a Decoder by the way that its files would: its configuration and tensors are
a checkpoint in memory, so the run is, to the bit, that of the saved files. What was trained is
written back into the object whenever the model is saved, and at once where both have the same type,
device and layout: the object's parameters are then those of the Decoder.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from extras.lora import peft_files
from extras.lora.adapters import load_named
from extras.models.opening import load_model
from model import Decoder, lora_modules
from parts.files import read_json, write_json
from parts.names import Place
from parts.weights import Checkpoint, InMemory


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def check_object(name: str, model: Any) -> None:
    """Raise ValueError for an object that is no model of transformers or PEFT, or has no weights
    that can be read, saying what to give."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "to_json_string"):
        raise ValueError(
            f"{name} is a {type(model).__name__}; give a directory, a hub id, a model.Decoder, or "
            "a model of transformers or PEFT")
    if getattr(model, "is_loaded_in_8bit", False):
        raise ValueError(
            f"{name} is loaded in 8 bits, in which a pair's log-probs depend on the other pairs of "
            "its batch; load it with BitsAndBytesConfig(load_in_4bit=True), or unquantized")
    if getattr(model, "_hf_peft_config_loaded", False) and not is_peft(model):
        raise ValueError(
            f"{name} has adapters that transformers loaded; give a peft.PeftModel, such as "
            "peft.AutoPeftModelForCausalLM.from_pretrained(DIRECTORY) makes")
    is_merged = lambda module: getattr(module, "merged", False) is True
    merged = next((n for n, module in model.named_modules() if is_merged(module)), None)
    if merged is not None:
        raise ValueError(
            f"{name}: its adapter is merged into {merged}; call unmerge_adapter() before, or "
            "merge_and_unload() for a model without adapters")
    absent = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"{name}: {absent} is on the meta device (offloaded by device_map?); load the model "
            "without device_map, or give its directory")


def object_name(model: Any) -> str | None:
    """Return the directory or hub id that the object was loaded from; None where it was made."""
    return getattr(model.config, "_name_or_path", None) or None


# Its tensors, as those of a directory


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return {name in the files: parameter} of the model without its adapters.

    Of a model in 4 bits these are the tensors that bitsandbytes writes.
    """
    base = model.get_base_model() if is_peft(model) else model
    found = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        is_adapter = "lora_" in name or ".modules_to_save." in name
        if not is_adapter:
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            found[plain] = tensor
    return found


def in_memory(model: nn.Module) -> Checkpoint:
    """Return the checkpoint that save_pretrained would write, without its adapters."""
    base = model.get_base_model() if is_peft(model) else model
    raw = json.loads(base.config.to_json_string())
    raw["architectures"] = raw.get("architectures") or [type(base).__name__]
    generation = getattr(base, "generation_config", None)
    tensors = base_tensors(model)
    return Checkpoint(
        directory=Path(object_name(base) or type(base).__name__),
        files=dict.fromkeys(tensors, "memory"), raw_config=raw,
        generation_config=generation and json.loads(generation.to_json_string()),
        memory=InMemory(tensors))


# Opening


def from_object(
    model: nn.Module, base: str, named: str | None, options: dict[str, Any],
) -> Decoder:
    """Return a Decoder with the object's weights, and with its adapters, the one `named` active (by
    default the one that is active there).

    `base` is what its adapters call their base if the object does not know; `options` are those of
    opening.load_adapted. Raises ValueError.
    """
    checkpoint = in_memory(model)
    device = options["device"]
    if device != "meta" or options["ranks"].first:  # where it is, so that they can share memory
        device = str(next(model.parameters()).device)
    decoder = load_model(checkpoint, options["dtype"], device, options["max_length"])
    adapter = ""
    if is_peft(model):
        adapter = active_adapter(model, named)
        add_adapters(decoder, model, adapter, base)
    decoder.source = Source(model, checkpoint, decoder, adapter)
    return decoder


def active_adapter(model: nn.Module, named: str | None) -> str:
    """Return the name of the adapter to train: `named`, else the one that is active."""
    active = model.active_adapters if named is None else [named]
    if len(active) != 1:
        raise ValueError(
            f"the PeftModel has {len(active)} active adapters ({', '.join(active)}); activate one "
            "with set_adapter, or give DPOConfig(model_adapter_name=NAME)")
    if active[0] not in model.peft_config:
        known = ", ".join(model.peft_config)
        raise ValueError(f"--model_adapter_name {active[0]}: the model has {known}")
    return active[0]


def add_adapters(decoder: Decoder, model: nn.Module, first: str, base: str) -> None:
    """Load all adapters of a PeftModel under their names; `first` is active."""
    others = [name for name in model.peft_config if name != first]
    with tempfile.TemporaryDirectory() as scratch:
        for name in [first, *others]:
            write_adapter(model, name, Path(scratch) / name, base)
            load_named(decoder, scratch, name)


def write_adapter(model: nn.Module, name: str, home: Path, base: str) -> None:
    """Write PEFT's two files of one adapter."""
    from peft import get_peft_model_state_dict

    model.peft_config[name].save_pretrained(home)
    path = home / "adapter_config.json"
    settings = read_json(path)
    write_json(path, settings | {
        "base_model_name_or_path": settings.get("base_model_name_or_path") or base})
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = {n: t.detach().cpu().contiguous().clone() for n, t in state.items()}
    save_file(state, home / "adapter_model.safetensors", metadata={"format": "pt"})


# Back


class Source:
    """The object that a Decoder was made of."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, decoder: Decoder, adapter: str):
        self.model = model
        self.tensors = checkpoint.memory.tensors
        self.layout = decoder.layout
        self.adapter = adapter
        self.is_four_bit = decoder.four_bit is not None
        self.share(decoder)

    def __deepcopy__(self, memo: dict) -> "Source":
        return self  # a copy of the Decoder, such as a reference, is no copy of the object

    def share(self, decoder: Decoder) -> None:
        """Make the object's parameters those of the Decoder where type, device and layout are the
        same, which frees their own memory."""
        for theirs, place, ours in self.pairs(decoder):
            is_same = theirs.dtype == ours.dtype and theirs.device == ours.device
            if is_same and place.index == () and not place.transposed:
                theirs.data = ours.data

    def pairs(self, decoder: Decoder) -> Iterator[tuple[Tensor, Place, Tensor]]:
        """Yield (parameter of the object, where it is in the Decoder, the Decoder's parameter)."""
        if self.is_four_bit:  # never trained itself
            return
        plain = (item for item in decoder.named_parameters() if "lora_" not in item[0])
        ours = {name.replace(".base_layer.", "."): p for name, p in plain}
        for name, place in self.layout.items():
            yield self.tensors[name], place, ours[place.name]

    @torch.no_grad()
    def update(self, decoder: Decoder, lora: dict) -> None:
        """Write what was trained into the object: the weights, or the LoRA of settings `lora`."""
        if lora_modules(decoder):
            return self.update_adapter(decoder, lora)
        for theirs, place, ours in self.pairs(decoder):
            if not ours.is_meta and theirs.data_ptr() != ours.data_ptr():
                theirs.data.copy_(place.view(ours.detach()))

    def update_adapter(self, decoder: Decoder, lora: dict) -> None:
        """Write the LoRA into the PeftModel; a plain model gets it as PEFT would add it."""
        found = peft_files.adapter_tensors(decoder)
        if importlib.util.find_spec("peft") is None or any(p.is_meta for p in found.values()):
            return
        import peft

        if not is_peft(self.model):
            with tempfile.TemporaryDirectory() as scratch:
                peft_files.save_adapter(decoder, scratch, lora)
                self.model = peft.PeftModel.from_pretrained(self.model, scratch)
            return
        state = {name: p.detach() for name, p in found.items()}
        peft.set_peft_model_state_dict(self.model, state, adapter_name=self.adapter)
