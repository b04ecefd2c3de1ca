"""Push a run to the hub: what each checkpoint trained, in the background, and the model at the end.

--hub_strategy every_save, transformers' default, and end.
"""

import os
import shutil
import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from extras.hub import card, client

# Files of a checkpoint that only a resume needs.
FOR_RESUMING = ("optimizer.safetensors", "trainer_state.json", "ref_*")


class Repository:
    """The repository of a run: --hub_model_id, else output_dir's name in one's own account."""

    def __init__(self, c: Any, log: Any, ranks: Any):
        """Create the repository if it is missing; only rank 0 asks the hub.

        `c` are the run's options (DPOConfig). Raises ValueError without the right to write there.
        """
        self.c = c
        self.log = log
        self.ranks = ranks
        name = c.hub_model_id or log.directory.resolve().name
        make = lambda: {"id": client.create(name, c.hub_private_repo, c.hub_token)}
        self.id = ranks.from_first(make)["id"]
        self.thread: threading.Thread | None = None

    def saved(self, checkpoint: Path) -> None:
        """Upload what a new checkpoint trained, while training goes on.

        A checkpoint is left out if the upload of an earlier one has not ended.
        """
        is_busy = self.thread is not None and self.thread.is_alive()
        if self.c.hub_strategy == "end" or is_busy or not self.ranks.first:
            return
        copy = link_files(checkpoint, checkpoint.with_name(".push"))
        message = f"Training in progress, step {checkpoint.name.rpartition('-')[2]}"
        self.thread = threading.Thread(target=self.upload, args=(copy, message), daemon=True)
        self.thread.start()

    def upload(self, copy: Path, message: str) -> None:
        """Upload the files of a checkpoint; a run does not end because the hub is away."""
        try:
            client.push(
                copy, self.id, revision=self.c.hub_revision, token=self.c.hub_token,
                message=message)
        except Exception as error:  # of the client, of the network
            self.log.say(f"not pushed ({message}): {error}")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def push(self, message: str, dataset_name: str | None = None) -> None:
        """Write the card and upload output_dir; the card names `dataset_name`, else the flag's."""
        if not self.ranks.first:
            return
        if self.thread is not None:
            self.thread.join()
        c = self.c
        settings = vars(c) | {"dataset_name": dataset_name or c.dataset_name}
        card.write_card(self.log.directory, settings, vars(type(c)()), self.id)
        address = client.push(
            self.log.directory, self.id, revision=c.hub_revision, token=c.hub_token,
            message=message)
        self.log.say(f"pushed to {address}")


def link_files(checkpoint: Path, copy: Path) -> Path:
    """Link a checkpoint's model, tokenizer and metrics into a folder; return the folder.

    --save_total_limit may remove the checkpoint before the upload has ended.
    """
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in checkpoint.iterdir():
        if path.is_dir() or any(fnmatch(path.name, pattern) for pattern in FOR_RESUMING):
            continue
        try:
            os.link(path, copy / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, copy / path.name)
    return copy
