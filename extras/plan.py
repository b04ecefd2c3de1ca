"""Compute the memory that models need in every mode, from config.json alone: no weights needed.

    python -m extras.plan DIR [DIR ...] --world 8
    python -m extras.plan DIR --world 1 --memory 24      what to turn on to train it in 24 GiB

`python dpo.py --dry_run ...` forecasts one run: memory, steps, tokens and time.
"""

import argparse
import sys
from pathlib import Path

import model as models
from extras.run.advice import lines_of
from extras.run.forecast import Run, gib, memory, table
from parts.configs import packed_in
from parts.files import read_json


def config_of(directory: str) -> models.ModelConfig:
    """Read config.json. Raises ValueError naming the directory."""
    raw = read_json(Path(directory) / "config.json")
    if packed_in(raw):
        del raw["quantization_config"]
    try:
        return models.read_config(raw)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 2 for a directory whose config.json cannot be read, with one message."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR")
    parser.add_argument("--world", type=int, default=8, help="ranks [8]")
    parser.add_argument("--tokens", type=int, default=4096, help="of one forward [4096]")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of a rank: say what to turn on to fit there")
    c = parser.parse_args(argv)
    base = Run(
        tokens=c.tokens,
        scored=c.tokens // 2,
        world=c.world,
        bf16=True,
        checkpointing=True,
        device="cuda",
    )
    lora = base._replace(rank=16, targets=("all-linear",), weights="bfloat16")
    modes = {
        "DDP": base,
        "FSDP": base._replace(fsdp=True),
        "LoRA": lora,
        "QLoRA": lora._replace(four_bit="nested"),
    }
    for directory in c.directories:
        try:
            config = config_of(directory)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if c.memory is not None:
            plain = base._replace(checkpointing=False)
            for line in lines_of(config, plain, c.tokens, c.memory * 2**30):
                print(f"{directory}  {line}")
            continue
        for name, run in modes.items():
            m = memory(config, run)
            print(f"{directory}  {name:6} {gib(m['total']):>11}: {table(m)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
