"""The processes that train one model together: joining them, sums over them, and broadcasts.

A rank is one process with one device. Ranks agree on flags, data and model before the first step,
since ranks that differ would wait for one another forever, or train on wrong averages.
"""

import atexit
import ctypes
import gc
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  see leave_ranks
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

# Options that may differ between ranks: paths on their own hosts (their content is compared
# instead).
OWN = ("cache_dir", "output_dir", "model_name_or_path", "ref_model_name_or_path", "dataset_name",
       "datasets", "eval_dataset_name", "disable_tqdm", "hub_token")
DETERMINISM: Any = torch.utils.deterministic  # mypy cannot see its properties


class Ranks(NamedTuple):
    """This process among the others that train the same model."""

    rank: int
    world: int
    device: torch.device
    timeout: int = 1800  # of a collective, seconds
    context: int = 1  # neighbouring ranks that share a stream: extras/run/context.py
    cut: Callable = lambda batch: batch  # what this rank computes of its group's batch

    @property
    def groups(self) -> int:
        """Return how many groups there are: each has pairs of its own."""
        return self.world // self.context

    @property
    def group(self) -> int:
        return self.rank // self.context

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def exact(self) -> torch.device:
        """Return where float64 sums are kept: Apple's GPUs have no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], dict]) -> dict:
        """Run `make()` on rank 0 and hand its JSON object to all ranks.

        A ValueError or OSError there is raised on every rank.
        """
        return make() if self.world == 1 else broadcast_object(self, make)

    def first_error(self, error: str) -> str:
        """Return the first of the ranks' errors, on every rank; "" where none has one."""
        if self.world == 1:
            return error
        return next(filter(None, gathered_texts(self, error)), "")

    def first_asking(
        self, make: Callable[[Callable[[int], Any]], dict], give: Callable[[int], Any],
    ) -> dict:
        """Do `from_first` with a `make(ask)` that needs the other ranks' help.

        Where it calls ask(number), every rank calls give(number), together.
        """
        if self.world == 1:
            return make(give)
        return broadcast_object(self, make, give)


# Joining and leaving


def start_ranks(use_cpu: bool, timeout: int, deterministic: bool = False) -> Ranks:
    """Join the other processes of torchrun or accelerate, if there are any.

    `deterministic` has every operation give the same bits each time, or raise RuntimeError.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        # else all fresh memory would be filled, to show up what reads it unwritten
        DETERMINISM.fill_uninitialized_memory = False
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available() and not use_cpu
    on_mac = torch.backends.mps.is_available() and not use_cpu and world == 1
    if on_gpu:
        device = torch.device("cuda", local)
        reuse_memory()
        torch.cuda.set_device(device)
    elif on_mac:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        keep_freed_memory()
        # Saturated losses have gradients of 1e-40, which CPUs multiply 50 times slower than others.
        torch.set_flush_denormal(True)
    if world > 1 and not dist.is_initialized():
        wait = timedelta(seconds=timeout)
        store, _, _ = next(rendezvous("env://", rank, world, timeout=wait))
        # torchrun keeps its store when it restarts workers. A prefix of their own keeps the new
        # ones from finding the addresses of the old.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"start {attempt}", store)
        dist.init_process_group(
            backend_of(device), timeout=wait, rank=rank, world_size=world, store=store,
            device_id=device if on_gpu else None)
    return Ranks(rank, world, device, timeout)


def backend_of(device: torch.device) -> str:
    """Return what carries sums and broadcasts: of tensors on this device, and always on the CPU.

    FSDP sums on the CPU what it keeps there.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def reuse_memory() -> None:
    """Have CUDA's memory handed out in segments that grow, unless the user has set otherwise.

    No two streams are equally long, so blocks of fixed sizes would leave gaps that nothing fits.
    """
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    if sys.platform == "linux" and torch.version.hip is None and not names & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read at the first tensor


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory.

    By default it returns freed tensors to the kernel, which then clears every page anew: 8 % of a
    CPU step.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass  # another libc


@contextmanager
def ending_ranks() -> Iterator[None]:
    """Leave the other processes after what is inside, and restore this one's settings.

    After an error they are not taken leave of: they may wait in an exchange, and leaving would wait
    for them. This process ends, and they notice.
    """
    mode = torch.get_deterministic_debug_mode()
    fills = DETERMINISM.fill_uninitialized_memory
    try:
        yield
        leave_ranks()
    except SystemExit:  # told to leave, as all are
        leave_ranks()
        raise
    finally:
        torch.set_flush_denormal(False)
        if torch.get_deterministic_debug_mode() != mode:  # setting it imports PyTorch's compiler
            torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
        DETERMINISM.fill_uninitialized_memory = fills


def leave_ranks() -> None:
    """Leave the group, and end gloo's threads, which live until nothing refers to the group.

    One that still ran while Python ends would now and then abort the process. A trainer refers to
    it, so those of no use any more are collected. The default arguments of
    torch.distributed.nn.functional, which DDP imports, would refer to a group that was there
    already; so this module imports it first.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def end_if_others_wait(status: int) -> None:
    """End this process, after an error, if it is one of several.

    It has not left their group, and gloo's threads could abort it while Python ends: so Python
    does not end, only what was to happen at exit happens.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def among_ranks(main: Callable[..., int]) -> Callable[..., int]:
    """Run a command inside `ending_ranks`; an exit status that is not 0 counts as an error."""

    class Failed(Exception):
        pass

    @wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            with ending_ranks():
                status = main(argv)
                if status:
                    raise Failed
        except Failed:
            pass
        except KeyboardInterrupt:  # where nothing is to be saved first, or pressed twice
            print("stopped by Ctrl-C", file=sys.stderr)
            status = 128 + signal.SIGINT
        if status:
            end_if_others_wait(status)
        return status

    return run


# Agreeing, gathering, broadcasting


def common_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return what is equal on all ranks: the options that are not their OWN, and whether models are
    folders of each host's, since one that lacks a folder would look for it on the hub, alone."""
    common = {name: value for name, value in options.items() if name not in OWN}
    for name in ("model_name_or_path", "ref_model_name_or_path"):
        if value := options.get(name):
            is_here = os.path.isdir(os.path.expanduser(value))
            common[f"the folder of --{name}"] = "here" if is_here else "not here"
    return common


def agree(ranks: Ranks, what: dict[str, Any]) -> None:
    """Raise ValueError on every rank unless `what` is equal on all.

    The message names the first difference.
    """
    if ranks.world == 1:
        return
    text = json.dumps(what, sort_keys=True, default=str).encode()
    digest = list(hashlib.sha256(text).digest())
    mine = torch.tensor(digest, dtype=torch.uint8, device=ranks.device)
    if all(torch.equal(mine, other) for other in gathered(ranks, mine)):
        return
    found = [json.loads(text) for text in gathered_texts(ranks, text.decode())]
    rank, name = first_difference(found)
    raise ValueError(
        f"the ranks disagree: {name} is {found[rank].get(name)!r} on rank {rank} and "
        f"{found[0].get(name)!r} on rank 0; start all with the same flags, data, model and code")


def first_difference(found: list[dict]) -> tuple[int, str]:
    """Return (rank, name) of the first entry that differs from rank 0's."""
    for rank, other in enumerate(found):
        for name in sorted(found[0].keys() | other.keys()):
            if other.get(name) != found[0].get(name):
                return rank, name
    raise AssertionError("the ranks' digests differ, their content does not")


def gathered(ranks: Ranks, tensor: Tensor) -> list[Tensor]:
    """Return every rank's tensor, on every rank."""
    out = [torch.empty_like(tensor) for _ in range(ranks.world)]
    dist.all_gather(out, tensor)
    return out


def gathered_texts(ranks: Ranks, text: str) -> list[str]:
    """Return every rank's text, on every rank."""
    raw = text.encode()
    length = torch.tensor([len(raw)], device=ranks.device)
    lengths = [int(n) for n in gathered(ranks, length)]
    padded = torch.tensor(
        list(raw.ljust(max(lengths))), dtype=torch.uint8, device=ranks.device)
    return [bytes(t[:n].tolist()).decode() for t, n in zip(gathered(ranks, padded), lengths)]


@contextmanager
def keeping_others_waiting(zero: Tensor, timeout: float) -> Iterator[threading.Lock]:
    """Broadcast `zero` again and again while rank 0 works, so that waiting ranks do not time out.

    Tokenizing may take longer than --ddp_timeout. A rank 0 that died or hangs does not broadcast,
    so the others still time out. Whatever else rank 0 exchanges meanwhile, it does with the lock.
    """
    done = threading.Event()
    lock = threading.Lock()

    def broadcast() -> None:
        while not done.wait(timeout / 4):
            try:
                with lock:
                    dist.broadcast(zero, 0)
            except RuntimeError:
                return  # another rank has died: the broadcast that follows says so

    thread = threading.Thread(target=broadcast, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        done.set()
        thread.join()


def answer_of(make: Callable[[], dict]) -> bytes:
    """Return the object that `make()` returns, or its ValueError or OSError, as JSON."""
    try:
        answer: dict[str, Any] = {"value": make()}
    except (ValueError, OSError) as error:
        answer = {"error": str(error), "is_os_error": isinstance(error, OSError)}
    return json.dumps(answer).encode()


def broadcast_object(
    ranks: Ranks, make: Callable[..., dict], give: Callable[[int], Any] | None = None,
) -> dict:
    """Do `Ranks.from_first`, or with `give` `Ranks.first_asking`, over several processes.

    The length of rank 0's JSON is broadcast first, then the JSON. Before that may come 0, while
    rank 0 is still at work, and -1 - number, where it asks for a number.
    """
    size = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    answer = b""
    if ranks.first:
        with keeping_others_waiting(size, ranks.timeout) as lock:

            def ask(number: int) -> Any:
                with lock:
                    dist.broadcast(size - 1 - number, 0)
                    return give(number)

            answer = answer_of(partial(make, ask) if give else make)
        size += len(answer)
        dist.broadcast(size, 0)
    while size <= 0:
        dist.broadcast(size, 0)
        if size < 0:
            give(-1 - int(size))
    body = torch.empty(int(size), dtype=torch.uint8, device=ranks.device)
    if ranks.first:
        body.copy_(torch.frombuffer(bytearray(answer), dtype=torch.uint8))
    dist.broadcast(body, 0)
    found = json.loads(bytes(body.cpu().numpy()))
    if "error" in found:
        raise (OSError if found["is_os_error"] else ValueError)(found["error"])
    return found["value"]
