"""The command line: flags and --config files become a DPOConfig. parts/checks.py then checks the
combination."""

import argparse
import json
import math
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

from parts import trl_flags
from parts.config import DPOConfig
from parts.trl_flags import NO_EFFECT

ROOT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


# Values


def whole_number(value: Any) -> int:
    """Convert to int; neither 2.5 nor `true` is a whole number."""
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError(value)
    is_plain = isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit()
    return int(value) if is_plain else int(float(value))  # 1e3 is one too


def truth(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return words[str(value).lower()]


def number(value: Any) -> float:
    """Convert to float; neither `true` nor nan is a number."""
    if isinstance(value, bool) or math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


def json_object(value: Any) -> dict[str, Any]:
    """Take a dict of a config file, or a JSON object of the command line."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError(value)
    return found


def truth_or_word(value: Any) -> bool | str:
    """Take true and false as `truth` does, and any other word as it is."""
    try:
        return truth(value)
    except KeyError:
        return str(value)


PARSERS = {
    "bool | str": (truth_or_word, "true, false or a word"),
    "bool": (truth, "true or false"),
    "int": (whole_number, "a whole number"),
    "float": (number, "a number"),
    "str": (str, "a string"),
    "dict": (json_object, "a JSON object such as {\"power\": 2}"),
}


def parse_value(name: str, value: Any) -> Any:
    """Convert `value` (a string, or from a config file) to the type of DPOConfig's field `name`.

    Raises ValueError.
    """
    kind = str(DPOConfig.__dataclass_fields__[name].type)
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if "None" in kind and str(one).lower() in ("none", "null"):
        return None
    parse, wanted = next(PARSERS[k] for k in PARSERS if k in kind)
    if isinstance(value, (list, tuple)) and not value:
        return value  # an empty list of a file: DPOConfig takes it for the default
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        parsed = [parse(v) for v in values]
        if not parsed or ("list" not in kind and len(parsed) > 1):
            raise ValueError
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ValueError(f"--{name} {value}: expected {wanted}") from None
    return parsed if "list" in kind else parsed[0]


# The parser


def default_of(option: Field) -> Any:
    return option.default if option.default is not MISSING else option.default_factory()


def add_option(group: Any, option: Field) -> None:
    """Add one field of DPOConfig: `--x`, `--x true` and `--no_x` for booleans, words for lists."""
    kind = str(option.type)
    default = default_of(option)
    shown = "unset" if default is None else default
    text = f"{option.metadata['help']} [{shown}]".replace("%", "%%")
    if "bool" in kind:
        group.add_argument(
            f"--{option.name}", nargs="?", const="true", metavar="BOOL", help=text)
        group.add_argument(
            f"--no_{option.name}", dest=option.name, action="store_const", const="false",
            help=argparse.SUPPRESS)
        return
    bare = option.metadata["bare"]
    nargs = "+" if "list" in kind else "?" if bare else None
    group.add_argument(f"--{option.name}", nargs=nargs, const=bare, metavar="X", help=text)


def build_parser(description: str = "") -> Parser:
    """Make the parser of the command line: a flag for each field of DPOConfig, and TRL's others."""
    parser = Parser(
        prog="dpo.py", description=description, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", help="toml, json or yaml file with any of these; the command line wins")
    group = parser
    for option in fields(DPOConfig):
        if option.metadata["group"]:
            group = parser.add_argument_group(option.metadata["group"])
        add_option(group, option)
    for name in NO_EFFECT:
        for flag in (f"--{name}", f"--no_{name}"):
            parser.add_argument(flag, dest=name, nargs="*", help=argparse.SUPPRESS)
    return parser


def parse_text(path: str, text: str) -> Any:
    """Return the content of a toml, json or yaml file."""
    if path.endswith(".toml"):
        import tomllib

        return tomllib.loads(text)
    if path.endswith(".json"):
        return json.loads(text)
    import yaml  # comes with huggingface_hub, which tokenizers requires

    return yaml.safe_load(text) or {}


def read_config_file(path: str) -> dict[str, Any]:
    """Return the options in a toml, json or yaml file. Raises ValueError naming the file."""
    try:
        settings = parse_text(path, Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except Exception as error:  # each parser raises its own kind
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        kind = type(settings).__name__
        raise ValueError(
            f"--config {path}: found a {kind}; each entry must be an option's name and its value")
    return settings


def demo_settings() -> dict[str, Any]:
    """Return the settings of demo/config.toml, with absolute paths. Raises ValueError without it."""
    if not (ROOT / "demo").is_dir():
        raise ValueError(
            "nothing to train is named, and this copy of the program has no demo/; give "
            "--model_name_or_path MODEL --dataset_name prefs.jsonl")
    settings = read_config_file(str(ROOT / "demo" / "config.toml"))
    is_path = lambda name: name.endswith(("_path", "dataset_name"))
    return {k: str(ROOT / v) if is_path(k) else v for k, v in settings.items()}


def parse_config(argv: list[str], description: str = "") -> DPOConfig:
    """Return the DPOConfig of a command line.

    With neither a model nor a data set named, the demo's settings are the defaults. Raises
    ValueError.
    """
    parsed, words = build_parser(description).parse_known_args(argv)
    given = vars(parsed)
    path = given.pop("config", None)
    settings = ({} if path is None else read_config_file(path)) | given
    known = DPOConfig.__annotations__.keys() | NO_EFFECT
    if words or settings.keys() - known or "datasets" in settings:  # TRL's, or a mistake
        settings = trl_flags.settle(settings, words, known, path)
    if not {"model_name_or_path", "dataset_name", "datasets"} & settings.keys():
        settings = demo_settings() | settings
    trl_flags.name_silent([f"--{name}" for name in sorted(settings.keys() & NO_EFFECT)])
    return DPOConfig(**{k: parse_value(k, v) for k, v in settings.items() if k not in NO_EFFECT})
