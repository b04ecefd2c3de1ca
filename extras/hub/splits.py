"""Which files of a data set's repository hold a split: what its README.md declares, else what their names say.

The rules are those of the `datasets` package for repositories without code. Everything here works
on names alone.
"""

import importlib.util
import re
from pathlib import PurePosixPath

DATA_FILE = re.compile(r"\.(jsonl|json|jsonl\.gz|json\.gz|parquet)$")


def split_files(
    name: str, names: list[str], card: dict, config: str | None, split: str
) -> list[str]:
    """Which of the files `names` of the data set `name` hold the split. Raises ValueError naming what there is."""
    names = sorted(n for n in names if not re.search(r"(^|/)[._]", n))
    configs = card.get("configs") or []
    splits = (
        card_splits(name, names, configs, config)
        if configs
        else directory_splits(name, names, config)
    )
    chosen = splits.get(split)
    if not chosen:
        files = ", ".join([n for n in names if not n.endswith(".md")][:3]) or "none"
        there = (
            f"it has {', '.join(map(repr, sorted(splits)))}"
            if splits
            else f"its files ({files} ...) are none that can be read: .jsonl, .json, .gz of these, .parquet"
        )
        raise ValueError(
            f"{name}: no split {split!r}{f' in config {config!r}' if config else ''}; {there}"
        )
    kinds = sorted({(DATA_FILE.search(n) or ["a kind that is not read"])[0] for n in chosen})
    if len(kinds) > 1 or kinds[0].startswith("a kind"):
        raise ValueError(
            f"{name}: the split {split!r} is {', '.join(chosen[:4])} ({', '.join(kinds)}); one of .jsonl, "
            f".json, .jsonl.gz, .json.gz, .parquet can be read: download what you mean and give its path"
        )
    if kinds == [".parquet"] and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{name}: its files are parquet, which needs pyarrow: pip install pyarrow")
    check_shards(name, chosen)
    return chosen


def check_shards(name: str, chosen: list[str]) -> None:
    """Of train-00000-of-00003 all three must be there: part of a split is never taken for the whole."""
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
    """{split: files} as README.md declares them for one config."""
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
    return {
        str(split): [
            n for n in names if any(matches(n, root + pattern) for pattern in as_list(patterns))
        ]
        for split, patterns in files.items()
    }


def matches(name: str, pattern: str) -> bool:
    """Whether a path matches a glob in which * stays within a folder and **/ crosses any number of them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./"))
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(wild.get(p, p if p.startswith("[") else re.escape(p)) for p in parts)
    return re.fullmatch(regex, name) is not None


def directory_splits(name: str, names: list[str], config: str | None) -> dict[str, list[str]]:
    """{split: files} by their names, all of them or those in the directory `config`."""
    root = f"{config.strip('/')}/" if config else ""
    inside = [n for n in names if n.startswith(root)]
    if not inside:
        folders = sorted({PurePosixPath(n).parts[0] for n in names if "/" in n})
        raise ValueError(
            f"{name}: no config {config!r}; its folders are {', '.join(folders) or 'none'}"
        )
    if not any(map(DATA_FILE.search, inside)) and any(
        n.endswith(".py") and "/" not in n for n in names
    ):
        raise ValueError(f"{name}: its rows are made by a script of its own, which is never run")
    return guess_splits(inside, root)


# What `datasets` takes for a split's name.
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
    """{split: files} by names below `root`: shards of any name; else a keyword in a folder or file; else all train."""
    names = [n for n in names if DATA_FILE.search(n) and PurePosixPath(n).name not in NOT_DATA]
    shards: dict[str, list[str]] = {}
    for n in names:
        shard = re.match(r"(?:data/)?([^/]+?)-\d{5}-of-\d{5}", n.removeprefix(root))
        if shard:
            shards.setdefault(shard[1], []).append(n)
    if shards:
        return shards
    for part in ("parent", "name"):
        found = {
            split: [
                n
                for n in names
                if re.search(
                    rf"(?:^|[-._ /\d])(?:{words})(?:[-._ /\d]|$)",
                    str(getattr(PurePosixPath(n.removeprefix(root)), part)),
                )
            ]
            for split, words in KEYWORDS.items()
        }
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {"train": names} if names else {}
