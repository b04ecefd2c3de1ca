"""Fetch models and preference data from the Hugging Face Hub, and push trained models to it.

    client.local_model("Qwen/Qwen2-0.5B-Instruct")           -> directory with all it needs
    client.local_dataset("trl-lib/ultrafeedback_binarized")  -> files of its train split
    client.push(directory, "me/Qwen2-0.5B-DPO")              -> address of the commit

`huggingface_hub` does the transfer, with its cache (HF_HOME) and tokens (`hf auth login`,
HF_TOKEN); HF_HUB_OFFLINE=1 uses the cache alone, HF_ENDPOINT names another server. Version 2
resumes a broken download. This file decides which files are needed, and explains errors to the
person who reads them.
"""

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from parts.configs import check_supported
from parts.files import read_json
from parts.rows import names_in, on_hub, user_path
from parts.splits import DATA_FILE, local_split, read_card, split_files
from parts.tokenizer_files import TOKENIZER_FILES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# All files of a model repository but the weights: fnmatch patterns. One without a wildcard matches
# at the top level alone.
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    *TOKENIZER_FILES,
]


def is_hub_id(name: str) -> bool:
    """Tell whether `name` may be a repository: no path that exists, no data file's name."""
    return (
        bool(HUB_ID.fullmatch(name))
        and not DATA_FILE.search(name)
        and not user_path(name).exists()
    )


def check_id(name: str, kind: str) -> None:
    """Raise ValueError for a name that is neither here nor a hub id; `kind`: model or dataset."""
    if not is_hub_id(name):
        local = "directory" if kind == "model" else "file, directory or glob"
        raise ValueError(
            f"{name}: no such {local} here, and not the id of a {kind} on the hub, "
            "which is owner/name"
        )


@contextmanager
def explained(name: str, kind: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors into a ValueError that says what to do; `kind`: model or dataset."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise ValueError(f"{name}: {explain(error, name, kind, revision)}") from error


def explain(error: Exception, name: str, kind: str, revision: str | None) -> str:
    """Say what a client's error means and what to do about it."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    cause = error.__cause__ or error
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"a gated {kind}: ask for access at {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such path here and no such {kind} on {endpoint}; if it is private, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; {page}/tree/main lists its branches and tags"
    not_cached = isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled))
    if constants.HF_HUB_OFFLINE and not_cached:
        return (
            f"not in the cache {constants.HF_HUB_CACHE}, or not all of it, and HF_HUB_OFFLINE is "
            "set; fetch it once with HF_HUB_OFFLINE=0"
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"this needs a token; {login}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{endpoint} refused it ({status}): the token is invalid or lacks the right; {login}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        return f"not in the cache, and {endpoint} cannot be reached: {reason}"
    if status is None and isinstance(error, (errors.HTTPError, ConnectionError)):
        return f"{endpoint} cannot be reached: {type(error).__name__}: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def fetch(name: str, kind: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files that match into the client's cache; a directory named after the commit."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))


# Models


def local_model(name: str, revision: str | None = None) -> Path:
    """Find a model or an adapter: the directory `name`, else the hub's, fetched or from the cache.

    Only configuration, tokenizer and safetensors are fetched: no pickles, no copies of the weights
    in other formats. The directory is named after the commit, so local_model(name, path.name)
    gives another process the same one. Raises ValueError for a model that does not exist, is gated
    or private, cannot be reached, or has no safetensors.
    """
    path = user_path(name)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{name} is a directory; a revision ({revision}) is for models on the hub"
            )
        return path
    check_id(name, "model")
    with explained(name, "model", revision):
        directory = fetch(name, "model", revision, SMALL_FILES)
        weights = weight_files(directory)
        check_config(name, directory)
        fetch(name, "model", directory.name, [glob.escape(file) for file in weights])
        missing = [file for file in weights if not (directory / file).exists()]
        if missing:
            raise ValueError(f"{name}: {why_missing(name, directory.name, missing)}")
    return directory


def check_config(name: str, directory: Path) -> None:
    """Raise ValueError for a model that cannot be trained, before gigabytes of it are fetched."""
    path = directory / "config.json"
    if not path.exists() or (directory / "adapter_config.json").exists():
        return
    raw = read_json(path)
    if "model_type" in raw:  # else it is no model, which its other files tell better
        try:
            check_supported(raw)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def same_model(name: str, revision: str | None, ranks: Any) -> Path:
    """Call `local_model` on every rank, at the commit that rank 0 fetched; `ranks` may be None."""
    check_id(name, "model")  # before the ranks wait for one another
    if ranks is not None:
        revision = ranks.from_first(lambda: {"commit": local_model(name, revision).name})["commit"]
    return local_model(name, revision)


def weight_files(directory: Path) -> list[str]:
    """List the weight files that the small files imply: an index's, an adapter's, or one file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        return ["adapter_config.json", "adapter_model.safetensors"]
    return ["config.json", "model.safetensors"]


def why_missing(name: str, commit: str, missing: list[str]) -> str:
    """Say why a repository has no weights that can be loaded."""
    from huggingface_hub import list_repo_files

    names = list_repo_files(name, revision=commit)
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and "/" not in n]
    if pickled and "config.json" in names:
        return (
            f"its weights are pickled ({pickled[0]}), and pickles are never read; transformers' "
            "save_pretrained(..., safe_serialization=True) turns them into safetensors"
        )
    return (
        f"not a model that can be loaded: {', '.join(missing)} missing among its {len(names)} files"
    )


# Data sets


def local_dataset(
    name: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> list[Path]:
    """List the files of one split: here (parts/splits.py), else the hub's, fetched or in the cache.

    Several names have commas between them. The files of a split are found as `datasets` finds
    them: by the `configs` in README.md, else by names such as data/train-00000-of-00002.parquet,
    train.jsonl, train/...; `config` names one of the configs or, without them, a directory. Raises
    ValueError for a data set that does not exist, is gated or private, cannot be reached, is in
    another format, or is parquet without pyarrow.
    """
    names = names_in(name)
    if len(names) > 1:
        found = [local_dataset(one, config, split, revision) for one in names]
        return [file for files in found for file in files]
    if not on_hub(name):
        if revision is not None:
            raise ValueError(
                f"{name}: a config or a revision ({revision}) is for data sets on the hub")
        return local_split(name, config, split)
    check_id(name, "dataset")
    with explained(name, "dataset", revision):
        # One of the two always exists, so that this finds the commit.
        directory = fetch(name, "dataset", revision, ["README.md", ".gitattributes"])
        chosen = split_files(name, list_files(name, directory), read_card(directory), config, split)
        fetch(name, "dataset", directory.name, [glob.escape(file) for file in chosen])
    return [directory / file for file in chosen]


def list_files(name: str, directory: Path) -> list[str]:
    """List the data set's paths at the commit of `directory`; from the cache without the hub."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.list_repo_files(name, repo_type="dataset", revision=directory.name)
    except errors.HfHubHTTPError:
        raise
    except (errors.HTTPError, OSError):
        if hasattr(huggingface_hub, "get_cached_repo_tree"):  # version 2 on caches the list
            with suppress(errors.CachedRepoTreeNotFoundError):
                tree = huggingface_hub.get_cached_repo_tree(
                    name, repo_type="dataset", revision=directory.name
                )
                return [file.path for file in tree]
        raise ValueError(
            f"{name}: the cache has no list of its files, so part of them might be taken for all; "
            "fetch it once online with huggingface_hub 2 or later, or give the path of its files"
        ) from None


# Back to the hub

# Files of an output directory that are not uploaded: fnmatch patterns.
LEFT_OUT = ["checkpoint-*/*", "runs/*", "dpo_config.json", "loggers.json", ".*", "*/.*"]


def create(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Create the model repository if it is missing; return its full id.

    Called before training, so that a missing right shows before hours are spent. `repo_id` without
    an owner is the token owner's; `private` None is the owner's default. An existing repository is
    not changed. Raises ValueError without a token, or with one that may not write there.
    """
    from huggingface_hub import HfApi

    with explained(repo_id, "model"):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push(
    directory: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Trained with DPO",
) -> str:
    """Upload an output directory without checkpoints and hidden files; return the commit's address.

    `revision` is a branch, created if it is missing. Raises ValueError if the upload is refused or
    the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = create(repo_id, private, token)
    with explained(repo_id, "model", revision):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(LEFT_OUT),  # a copy: the client appends to it
        )
    return done.commit_url
