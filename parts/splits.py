"""Find the files of a split, in a directory here or in a repository of the hub.

By the `configs` of its README.md, else by the names of its files, as the `datasets` package does for
repositories without code; a folder that its save_to_disk wrote, by what that wrote. A directory in
which nothing names a split is one data set, and so is a file or a glob.
"""

import importlib.util
import json
import re
from pathlib import Path, PurePosixPath

from parts.rows import NOT_DATA, find_files, matching_files, names_in, on_hub, user_path

DATA_FILE = re.compile(r"\.(?:(?:jsonl|json|csv)(?:\.gz)?|parquet)$")
READABLE = ".jsonl, .json, .csv, .gz of these, .parquet"
WHOLE = ("train", "test")  # the default splits: plain files may be either


# Here


def find_split(spec: str, config: str | None, split: str) -> list[Path]:
    """List the files of one split of a data set here, or of several with commas between them.

    Raises ValueError naming the splits there are.
    """
    found = [file for name in names_in(spec) for file in local_split(name, config, split)]
    return list(dict.fromkeys(found))


def local_split(name: str, config: str | None, split: str) -> list[Path]:
    path = user_path(name)
    if path.is_dir():
        return split_of_directory(path, config, split)
    if config is not None:
        raise ValueError(
            f"{name}: a config or a revision ({config}) is for data sets on the hub, and a config "
            "for directories laid out like them")
    found = find_files(name)
    check_whole(name, split)
    return found


def split_of_directory(path: Path, config: str | None, split: str) -> list[Path]:
    saved = saved_splits(path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    card = read_card(path)
    if config is None and not saved and not names_splits(names, card):
        check_whole(str(path), split)
        plain = matching_files(path) or [path / n for n in visible(names) if is_data(n)]
        one_kind(str(path), "it", [file.name for file in plain])
        return plain or find_files(path)  # which says what is missing
    if not saved:
        return [path / n for n in split_files(str(path), names, card, config, split)]
    if config is not None:
        raise ValueError(f"{path}: no config {config!r}; it is what save_to_disk wrote")
    if list(saved) == [None]:
        check_whole(str(path), split)
        split = None
    if split not in saved:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(map(repr, saved))}")
    check_arrow(str(path), "what save_to_disk wrote")
    return saved[split]


def check_whole(name: str, split: str) -> None:
    """Raise ValueError for a split of plain files: an option that nothing would read."""
    if split not in WHOLE:
        raise ValueError(f"{name}: no split {split!r}; nothing there names splits, it is all one")


def is_here(spec: str, revision: str | None) -> bool:
    """Tell whether data sets are on this machine, so that the hub need not be asked."""
    return not on_hub(spec) and revision is None


def has_splits(spec: str) -> bool:
    """Tell whether data sets may have a test split: repositories, and directories that name one."""
    return all(on_hub(name) or directory_has_splits(Path(name)) for name in names_in(spec))


def directory_has_splits(path: Path) -> bool:
    path = user_path(path)
    if not path.is_dir():
        return False
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return bool(set(saved_splits(path)) - {None}) or names_splits(names, read_card(path))


def names_splits(names: list[str], card: dict) -> bool:
    """Tell whether a directory's card, or the names of its files, name splits.

    Files that lie in it and name none are one data set, whatever its folders hold.
    """
    names = [n for n in visible(names) if is_data(n)]
    inside = [n for n in names if "/" not in n]
    return bool(card.get("configs")) or bool(named_splits(inside or names, ""))


def saved_splits(path: Path) -> dict[str | None, list[Path]]:
    """Read {split: files} of a folder that `datasets` saved to disk; {} for any other.

    The split of a single data set is None.
    """
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        return {split: saved_files(path / split) for split in splits}
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        return {None: saved_files(path)}
    return {}


def saved_files(path: Path) -> list[Path]:
    """List the files that state.json names. Raises ValueError where one is gone."""
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        files = [path / one["filename"] for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what save_to_disk wrote ({error!r}); save it again") from None
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: no such file, but state.json names it; save it again")
    return files


def read_card(directory: Path) -> dict:
    """Read the YAML at the head of README.md; {} without one."""
    path = directory / "README.md"
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if not head:
        return {}
    import yaml  # comes with huggingface_hub, which tokenizers requires

    try:
        card = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path}: broken YAML at its head ({first})") from None
    return card if isinstance(card, dict) else {}


# Anywhere: only names are read


def split_files(
    name: str, names: list[str], card: dict, config: str | None, split: str
) -> list[str]:
    """Choose the files of a split from `names`, all files of the data set `name`.

    Raises ValueError naming the splits there are, or why the files cannot be read.
    """
    names = visible(names)
    configs = card.get("configs") or []
    if configs:
        splits = card_splits(name, names, configs, config)
    else:
        splits = directory_splits(name, names, config)
    chosen = splits.get(split)
    if not chosen:
        files = ", ".join([n for n in names if not n.endswith(".md")][:3]) or "none"
        there = f"its files ({files} ...) are none that can be read: {READABLE}"
        if splits:
            there = f"it has {', '.join(map(repr, sorted(splits)))}"
        where = f" in config {config!r}" if config else ""
        raise ValueError(f"{name}: no split {split!r}{where}; {there}")
    one_kind(name, f"the split {split!r}", chosen)
    check_shards(name, chosen)
    return chosen


def visible(names: list[str]) -> list[str]:
    return sorted(n for n in names if not re.search(r"(^|/)[._]", n))


def is_data(name: str) -> bool:
    return bool(DATA_FILE.search(name)) and PurePosixPath(name).name not in NOT_DATA


def one_kind(name: str, what: str, chosen: list[str]) -> None:
    """Raise ValueError where files cannot be read, or are of several kinds: perhaps copies."""
    kinds = sorted({(DATA_FILE.search(n) or ["a kind that is not read"])[0] for n in chosen})
    forms = {kind.removesuffix(".gz").replace(".jsonl", ".json") for kind in kinds}
    if len(forms) > 1 or kinds[:1] == ["a kind that is not read"]:
        raise ValueError(
            f"{name}: {what} is {', '.join(chosen[:4])} ({', '.join(kinds)}); "
            f"one of {READABLE} can be read: give the path of the files that you mean")
    if kinds == [".parquet"]:
        check_arrow(name, "parquet")


def check_arrow(name: str, what: str) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{name}: its files are {what}, which needs pyarrow: pip install pyarrow")


def check_shards(name: str, chosen: list[str]) -> None:
    """Raise ValueError unless all three of train-00000-of-00003 are there."""
    shards = [re.match(r"(.*)-\d{5}-of-(\d{5})", n) for n in chosen]
    for stem, count in {(m[1], m[2]) for m in shards if m}:
        found = sum(1 for m in shards if m and (m[1], m[2]) == (stem, count))
        if found < int(count):
            raise ValueError(
                f"{name}: {stem} has {found} of its {int(count)} files; fetch the rest of it"
            )


def card_splits(
    name: str, names: list[str], configs: list[dict], config: str | None
) -> dict[str, list[str]]:
    """Read {split: files} from README.md's entry for one config."""
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs}
    default = next((n for n, entry in by_name.items() if entry.get("default")), "default")
    wanted = config or (default if default in by_name or len(by_name) > 1 else next(iter(by_name)))
    if wanted not in by_name:
        asked = f"no config {config!r}" if config else "several configs, name one"
        raise ValueError(f"{name}: {asked}; it has {', '.join(by_name)}")
    entry = by_name[wanted]
    root = str(entry["data_dir"]).strip("./") + "/" if entry.get("data_dir") else ""
    files = entry.get("data_files")
    if files is None:
        return guess_splits([n for n in names if n.startswith(root)], root)
    if isinstance(files, (str, list)) and not any(isinstance(f, dict) for f in files):
        files = {"train": files}
    if isinstance(files, list):
        files = {f["split"]: f["path"] for f in files}
    as_list = lambda value: [value] if isinstance(value, str) else value
    found = {}
    for split, patterns in files.items():
        wholes = [root + pattern for pattern in as_list(patterns)]
        found[str(split)] = [n for n in names if any(matches(n, whole) for whole in wholes)]
    return found


def matches(name: str, pattern: str) -> bool:
    """Match a path against a glob: * stays within a folder, **/ crosses any number of them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./"))
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(wild.get(p, p if p.startswith("[") else re.escape(p)) for p in parts)
    return re.fullmatch(regex, name) is not None


def directory_splits(name: str, names: list[str], config: str | None) -> dict[str, list[str]]:
    """Guess {split: files} from the names of all files, or of those in the directory `config`."""
    root = f"{config.strip('/')}/" if config else ""
    inside = [n for n in names if n.startswith(root)]
    if not inside:
        folders = sorted({PurePosixPath(n).parts[0] for n in names if "/" in n})
        raise ValueError(
            f"{name}: no config {config!r}; its folders are {', '.join(folders) or 'none'}"
        )
    has_script = any(n.endswith(".py") and "/" not in n for n in names)
    if has_script and not any(map(DATA_FILE.search, inside)):
        raise ValueError(f"{name}: its rows are made by a script of its own, which is never run")
    return guess_splits(inside, root)


# The words that `datasets` takes as a split's name.
KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
def guess_splits(names: list[str], root: str) -> dict[str, list[str]]:
    """Guess {split: files} from names below `root`; where none names a split, all is train."""
    names = [n for n in names if is_data(n)]
    return named_splits(names, root) or ({"train": names} if names else {})


def named_splits(names: list[str], root: str) -> dict[str, list[str]]:
    """Find {split: files} where names say so: shards, else a keyword in a folder's or file's name."""
    names = [n for n in names if is_data(n)]
    shards: dict[str, list[str]] = {}
    for n in names:
        shard = re.match(r"(?:data/)?([^/]+?)-\d{5}-of-\d{5}", n.removeprefix(root))
        if shard:
            shards.setdefault(shard[1], []).append(n)
    if shards:
        return shards
    for part in ("parent", "name"):
        texts = {n: str(getattr(PurePosixPath(n.removeprefix(root)), part)) for n in names}
        found = {}
        for split, words in KEYWORDS.items():
            keyword = re.compile(rf"(?:^|[-._ /\d])(?:{words})(?:[-._ /\d]|$)")
            found[split] = [n for n in names if keyword.search(texts[n])]
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {}
