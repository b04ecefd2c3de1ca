"""Find, check, read and write directories of safetensors."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from parts.files import open_safetensors, read_json, write_json, write_tensors
from parts.names import (
    BIAS,
    Place,
    carried_names,
    file_name,
    find_places,
    may_be_turned,
    without_prefix,
)

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATS = tuple(DTYPE_NAMES.values())


class Checkpoint(NamedTuple):
    """A Hugging Face directory: its configuration, and which file has each tensor."""

    directory: Path
    files: dict[str, str]  # tensor name in the file -> file name
    raw_config: dict
    generation_config: dict | None
    memory: Any = None  # an InMemory, where the tensors are an object's and not in files

    def open(self, file: str) -> Any:
        return self.memory or open_safetensors(self.directory / file)


class InMemory:
    """Tensors of an object, read as those of a safetensors file are."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    offset_keys = keys

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name].detach()

    def get_slice(self, name: str) -> "Header":
        tensor = self.tensors[name]
        return Header(tuple(tensor.shape), DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))


class Carried:
    """Tensors of the files that are no parameters here, such as those of a tower.

    They are mapped into memory, not read, until they are saved as they were. A copy of the model
    has the same ones.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __deepcopy__(self, memo: dict) -> "Carried":
        return self


class Header(NamedTuple):
    """What a safetensors file says of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


def open_checkpoint(directory: str | Path | Checkpoint) -> Checkpoint:
    """Find the weight files of a directory. Raises ValueError naming what is missing or damaged."""
    if isinstance(directory, Checkpoint):
        return directory
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    generation_config = read_json(generation) if generation.exists() else None
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        files = read_index(index)
    elif single.exists():
        files = {name: single.name for name in open_safetensors(single).keys()}
    else:
        raise ValueError(f"{directory}: no model.safetensors and no model.safetensors.index.json; "
                         "pickled weights (pytorch_model.bin) are never read")
    return Checkpoint(directory, files, raw, generation_config)


def is_plain(directory: str | Path) -> bool:
    """Tell whether model.load_model opens it: no adapter, not quantized, reads only text.

    A directory that cannot be read counts as plain: load_model says what is wrong with it.
    """
    directory = Path(directory)
    if (directory / "adapter_config.json").exists():
        return False
    try:
        raw = read_json(directory / "config.json")
    except ValueError:
        return True
    return not raw.get("quantization_config") and "vision_config" not in raw


def read_index(index: Path) -> dict[str, str]:
    """Return {tensor: file} of a sharded checkpoint; ValueError for a file that is missing."""
    files = read_json(index).get("weight_map")
    plain = lambda file: isinstance(file, str) and Path(file).name == file
    if not isinstance(files, dict) or not all(map(plain, files.values())):
        raise ValueError(
            f"{index}: no \"weight_map\" from tensors to files of this directory in it")
    missing = sorted({f for f in files.values() if not (index.parent / f).exists()})
    if missing:
        raise ValueError(f"{index}: names {', '.join(missing)}, which the directory lacks; "
                         "download it again")
    return files


def each_tensor(checkpoint: Checkpoint, layout: dict[str, Place]) -> Iterator[tuple]:
    """Yield (name, Place, file, opened file) of every tensor, in their order on disk."""
    for file in sorted(set(checkpoint.files.values())):
        opened = checkpoint.open(file)
        for name in opened.offset_keys():
            if name in layout and checkpoint.files.get(name) == file:
                yield name, layout[name], file, opened


def check_tensors(
    checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict, config: Any,
) -> None:
    """Raise ValueError listing missing, unexpected and misshaped tensors; reads only headers.

    Corrects the layout of matrices that files keep either way round.
    """
    problems = []
    found = dict.fromkeys(parameters, 0)  # values of each parameter that the files have
    absent = dict(layout)
    for name, place, file, opened in each_tensor(checkpoint, layout):
        del absent[name]
        header = opened.get_slice(name)
        shape = tuple(header.get_shape())
        if place.name not in parameters:
            problems.append(f"unexpected {name} {shape} in {file}")
            continue
        expected = tuple(place.view(parameters[place.name]).shape)
        if shape == (*expected[:-2], *expected[:-3:-1]) and may_be_turned(name, config):
            if shape != expected:  # square ones lie as transformers has them
                layout[name] = place._replace(transposed=not place.transposed)
            expected = shape
        found[place.name] += torch.Size(expected).numel()
        if shape != expected:
            problems.append(f"{name} in {file} is {shape}, config.json says {expected}")
        elif header.get_dtype() not in FLOATS:
            problems.append(f"{name} in {file} is quantized ({header.get_dtype()})")
    for name in absent:
        problems.append(f"missing {name} in {checkpoint.files[name]}, where the index says it is")
    told = {place.name for place in absent.values()}
    for name, parameter in parameters.items():
        if found[name] < parameter.numel() and name not in told:
            some = "parts of " if found[name] else ""
            problems.append(f"missing {some}{file_name(name, config)}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{checkpoint.directory}: {'; '.join(problems[:10])}{more}")


def read_tensors(checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict,
                 dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Copy the weights out of the memory-mapped files one by one.

    They are cast on the way, so that memory never holds a second copy of the model.
    """
    state = {}
    for name, place, file, opened in each_tensor(checkpoint, layout):
        # a tied head that the files hold as well
        twice = place.name in state and place.index == ()
        if place.name not in state:
            shape = parameters[place.name].shape
            state[place.name] = torch.empty(shape, dtype=dtype, device=device)
        if device == "meta":  # FSDP: read when they are dealt to the ranks
            continue
        view = place.view(state[place.name])
        tensor = opened.get_tensor(name)
        if twice and not torch.equal(view, tensor.to(view)):
            raise ValueError(f"{checkpoint.directory}: config.json ties the head to the "
                             f"embedding, but {name} in {file} differs from it")
        view.copy_(tensor)
    return state


def remember(model: Any, checkpoint: Checkpoint, layout: dict[str, Place]) -> None:
    """Keep on the model what saving it needs: layout, carried tensors and JSON of its files."""
    model.layout = layout
    model.carried = carry(checkpoint, model.config)
    set_biases(model, checkpoint.directory)
    model.raw_config = checkpoint.raw_config
    model.generation_config = checkpoint.generation_config


def carry(checkpoint: Checkpoint, config: Any) -> Carried:
    """Find what is saved again as it is. Raises ValueError for what is not where the index says."""
    wanted = dict.fromkeys(carried_names(checkpoint.files, config))
    found = {n: opened.get_tensor(n) for n, _, _, opened in each_tensor(checkpoint, wanted)}
    for name in wanted.keys() - found.keys():
        raise ValueError(f"{checkpoint.directory}: missing {name} in {checkpoint.files[name]}, "
                         "where the index says it is")
    return Carried(found)


def unlearned(model: Any) -> dict[str, Tensor]:
    """Return what is saved beside the parameters.

    That is what was carried; of a model that was not read from files, the biases of its routers.
    """
    if model.layout:
        return model.carried.tensors
    return {n: b for n, b in model.named_buffers() if n.endswith(f".{BIAS}")}


def set_biases(model: Any, directory: Path) -> None:
    """Read the routers' correction biases from what is carried: they are used, but do not learn.

    Raises ValueError for one that is missing or misshaped.
    """
    device = next(model.parameters()).device
    carried = {without_prefix(name): tensor for name, tensor in model.carried.tensors.items()}
    for name, empty in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        if last != BIAS:
            continue
        found = carried.get(name)
        if found is None or found.shape != empty.shape or not found.is_floating_point():
            what = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise ValueError(f"{directory}: {name}: {what}; config.json says {tuple(empty.shape)}")
        there = "cpu" if device.type == "meta" else device  # under --fsdp; the files' type stays
        setattr(model.get_submodule(owner), BIAS, found.to(there, copy=True))


class Reader:
    """Reads parameters of a model from the files that it was opened from.

    A model under --fsdp keeps it: there the weights are read when they are dealt to the ranks.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: dict[str, Place], parameters: dict,
        dtype: torch.dtype,
    ):
        self.checkpoint = checkpoint
        self.layout = layout
        self.parameters = parameters
        self.dtype = dtype

    def __deepcopy__(self, memo: dict) -> "Reader":
        return self

    def __call__(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """Return {name: parameter}, whole. Raises ValueError as `read_tensors` does."""
        wanted = set(names)
        layout = {theirs: place for theirs, place in self.layout.items() if place.name in wanted}
        files = {theirs: self.checkpoint.files[theirs] for theirs in layout}
        checkpoint = self.checkpoint._replace(files=files)
        return read_tensors(checkpoint, layout, self.parameters, self.dtype, device)

    def digest(self) -> str:
        """Hash each tensor's header and first row: ranks that read different files train nothing
        that makes sense."""
        h = hashlib.sha256()
        for name, _, _, opened in each_tensor(self.checkpoint, self.layout):
            header = opened.get_slice(name)
            h.update(f"{name} {header.get_shape()} {header.get_dtype()}".encode())
            if header.get_shape():
                h.update(header[:1].contiguous().view(torch.uint8).numpy().data)
        return h.hexdigest()[:16]


def file_names(model: nn.Module) -> dict[int, str]:
    """Return {id of a tensor: its name without adapters, by which a Reader knows it}."""
    named = chain(model.named_parameters(), model.named_buffers())
    return {id(tensor): name.replace(".base_layer.", ".") for name, tensor in named}


@contextmanager
def in_memory(model: nn.Module, name: str, reads: bool) -> Iterator[None]:
    """Give a module that is on the meta device memory inside, with its weights in it if `reads`."""
    if torch.get_default_device().type == "meta":  # a model that is only counted
        yield
        return
    kept = []
    for module in model.get_submodule(name).modules():
        for store in (module._parameters, module._buffers):
            kept += [(store, key, t) for key, t in store.items() if t is not None and t.is_meta]
    names = file_names(model) if kept and reads else {}
    values = model.read(names[id(t)] for _, _, t in kept) if names else {}
    for store, key, t in kept:
        tensor = values[names[id(t)]] if names else torch.empty_like(t, device="cpu")
        store[key] = nn.Parameter(tensor, False) if isinstance(t, nn.Parameter) else tensor
    yield
    for store, key, t in kept:
        store[key] = t


def overwrite(model: nn.Module, directory: str | Path, place: Any) -> None:
    """Replace a model's weights by those of a checkpoint of the same shape; type and device stay.

    Rank 0 reads, one parameter at a time; every rank calls this. Raises ValueError listing every
    missing, unexpected and misshaped tensor.
    """
    parameters = dict(model.named_parameters())
    readers = []

    def check() -> dict:
        opened = open_checkpoint(directory)
        layout = find_places(opened.files, model.config)
        shapes = {n: torch.empty(p.shape, device="meta") for n, p in parameters.items()}
        check_tensors(opened, layout, shapes, model.config)
        readers.append(Reader(opened, layout, shapes, next(iter(parameters.values())).dtype))
        return {}

    place.ranks.from_first(check)
    for name, p in parameters.items():
        place.fill(p, readers[0]([name])[name] if readers else None)


def save_shards(
    parameters: dict[str, Tensor], layout: dict[str, Place], directory: Path, dtype: torch.dtype,
    shard_bytes: int, whole: Callable[[Tensor], Tensor], carried: dict[str, Tensor],
) -> None:
    """Write the parameters as `layout` has them, cast to `dtype`, and `carried` in its own types.

    One parameter at a time is in memory: `whole` fetches it.
    """
    kinds = {}
    for theirs, place in layout.items():
        like = torch.empty(parameters[place.name].shape, device="meta")
        kinds[theirs] = (tuple(place.view(like).shape), dtype)
    kinds |= {n: (tuple(t.shape), t.dtype) for n, t in carried.items()}
    sizes = {n: torch.Size(shape).numel() * kind.itemsize for n, (shape, kind) in kinds.items()}
    shards = cut_shards(sizes, shard_bytes)
    own = pieces_of(parameters, layout, dtype, whole)
    tensors = chain(own, (tensor.cpu() for tensor in carried.values()))
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        of_file = {name: kinds[name] for name in names}
        write_tensors(directory / file, of_file, (next(tensors) for _ in names))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def write_configs(model: Any, directory: Path, changed: dict) -> None:
    """Write config.json, updated by `changed`, and generation_config.json if there was one."""
    write_json(directory / "config.json", model.raw_config | changed)
    if model.generation_config is not None:
        write_json(directory / "generation_config.json", model.generation_config)


def pieces_of(
    parameters: dict[str, Tensor], layout: dict[str, Place], dtype: torch.dtype,
    whole: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Yield the tensors of the files, in order; a parameter is held until its last piece."""
    left = Counter(place.name for place in layout.values())
    held = {}
    for place in layout.values():
        if place.name not in held:
            held[place.name] = whole(parameters[place.name]).detach()
        yield place.view(held[place.name]).to("cpu", dtype)
        left[place.name] -= 1
        if not left[place.name]:
            del held[place.name]


def cut_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Divide names into groups of at most `shard_bytes`, in order; a larger tensor stands alone."""
    shards = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
