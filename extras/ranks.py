"""What several ranks tell one another: what rank 0 found, and before they wait for one another that all run the same."""

import hashlib
import json
import threading
from contextlib import contextmanager
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

OWN = ("cache_dir", "output_dir", "model_name_or_path", "ref_model_name_or_path", "dataset_name", "eval_dataset_name",
       "disable_tqdm", "hub_token")  # paths may differ between hosts: what lies there is compared


def agree(ranks, what: dict) -> None:
    """Raise ValueError on every rank, naming the first difference, unless `what` is the same on all."""
    text = json.dumps(what, sort_keys=True, default=str).encode()
    mine = torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8, device=ranks.device)
    if all(torch.equal(mine, other) for other in gathered(ranks, mine)):
        return
    length = torch.tensor([len(text)], device=ranks.device)
    longest = max(int(n) for n in gathered(ranks, length))
    padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=ranks.device)
    found = [json.loads(bytes(t.tolist())) for t in gathered(ranks, padded)]
    rank, name = next((r, n) for r, other in enumerate(found) for n in sorted(found[0].keys() | other.keys())
                      if other.get(n) != found[0].get(n))
    raise ValueError(f"the ranks disagree: {name} is {found[rank].get(name)!r} on rank {rank} and "
                     f"{found[0].get(name)!r} on rank 0; start all with the same flags, data, model and code")


@contextmanager
def asking_for_patience(zero: Tensor, timeout: float):
    """Within, rank 0 broadcasts `zero` again and again, so that ranks that wait for it never give it up while it works.

    Tokenizing may take longer than --ddp_timeout; a process that died or hangs in the kernel does not ask."""
    done = threading.Event()

    def ask() -> None:
        while not done.wait(timeout / 4):
            try:
                dist.broadcast(zero, 0)
            except RuntimeError:
                return  # another rank has died: the broadcast that follows says so

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def gathered(ranks, tensor: Tensor) -> list[Tensor]:
    out = [torch.empty_like(tensor) for _ in range(ranks.world)]
    dist.all_gather(out, tensor)
    return out


def from_first(ranks, make: Callable[[], dict]) -> dict:
    """The JSON object that `make()` gives on rank 0, on every rank; a ValueError or OSError there is raised on all."""
    size = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    if ranks.first:
        with asking_for_patience(size, ranks.timeout):
            try:
                answer = json.dumps({"value": make()}).encode()
            except (ValueError, OSError) as error:
                answer = json.dumps({"error": str(error), "of_system": isinstance(error, OSError)}).encode()
        size += len(answer)
        dist.broadcast(size, 0)
    while not size:  # 0 says that rank 0 is still at work
        dist.broadcast(size, 0)
    body = torch.empty(int(size), dtype=torch.uint8, device=ranks.device)
    if ranks.first:
        body.copy_(torch.frombuffer(bytearray(answer), dtype=torch.uint8))
    dist.broadcast(body, 0)
    found = json.loads(bytes(body.cpu().numpy()))
    if "error" in found:
        raise (OSError if found["of_system"] else ValueError)(found["error"])
    return found["value"]
