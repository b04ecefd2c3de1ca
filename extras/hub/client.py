"""Models and preference data from the Hugging Face Hub, and trained models back to it.

    client.local_model("Qwen/Qwen2-0.5B-Instruct")                 -> directory with its configuration, tokenizer, weights
    client.local_dataset("trl-lib/ultrafeedback_binarized")        -> files of its train split
    client.push(directory, "me/Qwen2-0.5B-DPO")                    -> address of the commit

The transfer is `huggingface_hub`'s: its cache (HF_HOME), its tokens (`hf auth login`, HF_TOKEN),
HF_HUB_OFFLINE=1 to use the cache alone, HF_ENDPOINT for another server; its version 2 takes a
broken connection up where it broke. What is decided here is which files are needed, and what an
error means to the person who reads it.
"""

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from extras.hub.splits import DATA_FILE, split_files
from parts.rows import find_files
from parts.tokenizer_files import TOKENIZER_FILES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Of a model repository, all but the weights; fnmatch patterns, in which only a wildcard crosses into folders.
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
    """Whether `name` may be a repository's: not something on this machine, nor the name of a file."""
    return (
        bool(HUB_ID.fullmatch(name))
        and not DATA_FILE.search(name)
        and not Path(name).expanduser().exists()
    )


def check_id(name: str, kind: str) -> None:
    if not is_hub_id(name):
        local = "directory" if kind == "model" else "file, directory or glob"
        raise ValueError(
            f"{name}: no such {local} here, and not the id of a {kind} on the hub, which is owner/name"
        )


@contextmanager
def explained(name: str, kind: str, revision: str | None = None) -> Iterator[None]:
    """What the client raises comes out as a ValueError that says what to do. `kind` is model or dataset."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise ValueError(f"{name}: {explain(error, name, kind, revision)}") from error


def explain(error: Exception, name: str, kind: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    endpoint, cause = constants.ENDPOINT, error.__cause__ or error
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"a gated {kind}: ask for access at {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such path here and no such {kind} on {endpoint}; if it is a private one, {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; {page}/tree/main lists its branches and tags"
    if constants.HF_HUB_OFFLINE and isinstance(
        error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    ):
        return (
            f"not in the cache {constants.HF_HUB_CACHE}, or not all of it, and HF_HUB_OFFLINE is set; fetch it "
            "once with HF_HUB_OFFLINE=0"
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"this needs a token; {login}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{endpoint} refused it ({status}): the token is invalid or lacks the right; {login}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"not in the cache, and {endpoint} cannot be reached: {type(cause).__name__}: {first_line(cause)}"
    if status is None and isinstance(error, (errors.HTTPError, ConnectionError)):
        return f"{endpoint} cannot be reached: {type(error).__name__}: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def fetch(name: str, kind: str, revision: str | None, patterns: list[str]) -> Path:
    """The repository's files that match, in the client's cache: a directory named after the commit."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))


# Models


def local_model(name: str, revision: str | None = None) -> Path:
    """The directory of a model or an adapter: `name` where it is one, else fetched from the hub, or found in its cache.

    Fetched are configuration, tokenizer and the safetensors that belong to them; no pickles, no
    copies of the weights in other forms. The directory is named after the commit: local_model(name,
    path.name) in another process is the same one. Raises ValueError for what is not there, gated,
    private, out of reach, or has no safetensors.
    """
    path = Path(name).expanduser()
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
        fetch(name, "model", directory.name, [glob.escape(file) for file in weights])
        missing = [file for file in weights if not (directory / file).exists()]
        if missing:
            raise ValueError(f"{name}: {why_missing(name, directory.name, missing)}")
    return directory


def same_model(name: str, revision: str | None, ranks: Any) -> Path:
    """`local_model` for all ranks, where there are any: at the commit that rank 0 found and fetched."""
    check_id(name, "model")  # before the ranks wait for one another
    if ranks is not None:
        revision = ranks.from_first(lambda: {"commit": local_model(name, revision).name})["commit"]
    return local_model(name, revision)


def weight_files(directory: Path) -> list[str]:
    """The files with the weights, by the small files beside them: an index, an adapter, or one file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        return ["adapter_config.json", "adapter_model.safetensors"]
    return ["config.json", "model.safetensors"]


def why_missing(name: str, commit: str, missing: list[str]) -> str:
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
    """Files of one split: those that a path or glob names; else fetched from the hub, or found in its cache.

    On the hub (and in a directory laid out as there) the files of a split are found as `datasets`
    finds them: by the `configs` in README.md, else by names such as
    data/train-00000-of-00002.parquet, train.jsonl, train/...; `config` names one of the configs or,
    without them, a directory. Raises ValueError for what is not there, gated, private, out of
    reach, in another format, and for parquet without pyarrow.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (
        config is not None or not any(map(DATA_FILE.search, map(str, path.glob("*"))))
    ):
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return [path / file for file in split_files(name, names, read_card(path), config, split)]
    if path.exists() or glob.has_magic(name):
        if config is not None or revision is not None:
            raise ValueError(
                f"{name}: a config or a revision ({config or revision}) is for data sets on the hub"
            )
        return find_files(name)
    check_id(name, "dataset")
    with explained(name, "dataset", revision):
        directory = fetch(
            name, "dataset", revision, ["README.md", ".gitattributes"]
        )  # one of them is always there
        chosen = split_files(name, list_files(name, directory), read_card(directory), config, split)
        fetch(name, "dataset", directory.name, [glob.escape(file) for file in chosen])
    return [directory / file for file in chosen]


def list_files(name: str, directory: Path) -> list[str]:
    """Paths in the data set at the commit of `directory`; from the cache where the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.list_repo_files(name, repo_type="dataset", revision=directory.name)
    except errors.HfHubHTTPError:
        raise
    except (errors.HTTPError, OSError):
        if hasattr(huggingface_hub, "get_cached_repo_tree"):  # clients from 2 on keep the list
            with suppress(errors.CachedRepoTreeNotFoundError):
                tree = huggingface_hub.get_cached_repo_tree(
                    name, repo_type="dataset", revision=directory.name
                )
                return [file.path for file in tree]
        raise ValueError(
            f"{name}: the cache has no list of its files, so part of them might be taken for all; fetch "
            "it once online with huggingface_hub 2 or later, or give the path of its files"
        ) from None


def read_card(directory: Path) -> dict:
    """The YAML at the head of README.md; {} without one."""
    import yaml

    path = directory / "README.md"
    head = (
        re.match(r"---\s*\n(.*?)\n---", path.read_text("utf-8"), re.DOTALL)
        if path.exists()
        else None
    )
    try:
        card = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: broken YAML at its head ({first_line(error)})") from None
    return card if isinstance(card, dict) else {}


# Back to the hub

LEFT_OUT = [
    "checkpoint-*/*",
    "runs/*",
    "dpo_config.json",
    ".*",
    "*/.*",
]  # of an output directory; fnmatch patterns


def create(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that the model repository exists; its full id. Before training, this finds what would fail after it.

    `repo_id` without an owner is the token's own; `private` None is the owner's default, and
    changes no repository that exists. Raises ValueError where there is no token, or it may not
    write there.
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
    """Upload an output directory, without its checkpoints and hidden files; the address of the commit.

    `revision` is a branch, made where there is none. Raises ValueError where it is refused or the
    hub is out of reach.
    """
    from huggingface_hub import HfApi

    api, repo_id = HfApi(token=token), create(repo_id, private, token)
    with explained(repo_id, "model", revision):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(LEFT_OUT),
        )  # a copy: the client appends to it
    return done.commit_url
