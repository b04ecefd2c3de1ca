"""Find the files of a split in a data set's repository: by its README.md, else by their names.

The rules are those of the `datasets` package for repositories without code. Only names are read.
"""

import importlib.util
import re
from pathlib import PurePosixPath

DATA_FILE = re.compile(r"\.(jsonl|json|jsonl\.gz|json\.gz|parquet)$")


def split_files(
    name: str, names: list[str], card: dict, config: str | None, split: str
) -> list[str]:
    """Choose the files of a split from `names`, all files of the data set `name`.

    Raises ValueError naming the splits there are, or why the files cannot be read.
    """
    names = sorted(n for n in names if not re.search(r"(^|/)[._]", n))
    configs = card.get("configs") or []
    if configs:
        splits = card_splits(name, names, configs, config)
    else:
        splits = directory_splits(name, names, config)
    chosen = splits.get(split)
    if not chosen:
        files = ", ".join([n for n in names if not n.endswith(".md")][:3]) or "none"
        readable = ".jsonl, .json, .gz of these, .parquet"
        there = f"its files ({files} ...) are none that can be read: {readable}"
        if splits:
            there = f"it has {', '.join(map(repr, sorted(splits)))}"
        where = f" in config {config!r}" if config else ""
        raise ValueError(f"{name}: no split {split!r}{where}; {there}")
    kinds = sorted({(DATA_FILE.search(n) or ["a kind that is not read"])[0] for n in chosen})
    if len(kinds) > 1 or kinds[0].startswith("a kind"):
        raise ValueError(
            f"{name}: the split {split!r} is {', '.join(chosen[:4])} ({', '.join(kinds)}); "
            "one of .jsonl, .json, .jsonl.gz, .json.gz, .parquet can be read: "
            "download what you mean and give its path"
        )
    if kinds == [".parquet"] and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{name}: its files are parquet, which needs pyarrow: pip install pyarrow")
    check_shards(name, chosen)
    return chosen


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
NOT_DATA = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}


def guess_splits(names: list[str], root: str) -> dict[str, list[str]]:
    """Guess {split: files} from names below `root`.

    Shards name their split; else a keyword in a folder's or file's name does; else all is train.
    """
    names = [n for n in names if DATA_FILE.search(n) and PurePosixPath(n).name not in NOT_DATA]
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
    return {"train": names} if names else {}
