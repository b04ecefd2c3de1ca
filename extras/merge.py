"""Merge an adapter into its base, for chat, for serving, or for DPO with a fresh LoRA.

    python -m extras.merge ADAPTER OUT                 weights + adapter, in the type of --dtype
    python -m extras.merge ADAPTER OUT --load_in_4bit  trained over 4 bits: dequantized and merged,
                                                       in bfloat16
    python -m extras.merge ADAPTER OUT --load_in_4bit --again    ... and quantized again, in
                                                       bitsandbytes' layout

An adapter that was trained over 4-bit weights fits those weights dequantized, not the original
ones. Give the flags of its training (--bnb_4bit_quant_type, --use_bnb_nested_quant); a base whose
files are in 4 bits needs none.
"""

import argparse
import sys
from pathlib import Path

import torch

from extras.lora.merging import merge_4bit, merge_lora
from extras.lora.peft_files import find_base
from extras.models.opening import load_adapted, model_directory, tokenizer_home
from extras.rows.pictures import open_tokenizer
from model import Decoder, save_model
from parts.output import check_apart


def merge(
    adapter: str,
    out: Path,
    dtype: torch.dtype = torch.float32,
    four_bit: dict | None = None,
    again: bool = False,
) -> Decoder:
    """Merge, write the model and its tokenizer to `out`, and return the model.

    Raises ValueError where there is nothing to merge.
    """
    directory = model_directory(adapter)
    tokenizer = open_tokenizer(tokenizer_home(directory))
    model, settings = load_adapted(directory, dtype, four_bit=four_bit)
    if not settings:
        raise ValueError(
            f"{adapter}: no adapter (no adapter_config.json), there is nothing to merge"
        )
    check_apart("OUT", out, (directory, find_base(settings)))
    if again and not model.four_bit:
        raise ValueError("--again: the base is not in 4 bits; give --load_in_4bit")
    if again:
        merge_4bit(model, again=True)
    else:
        merge_lora(model)
    save_model(model, out)
    tokenizer.save(out)
    return model


def main(argv: list[str] | None = None) -> int:
    """Return exit status 2, with one message, for what cannot be merged."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.merge",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", help="directory or hub id of an adapter")
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float64"),
        help="of the merged weights",
    )
    parser.add_argument(
        "--load_in_4bit", action="store_true", help="the adapter was trained over 4 bits"
    )
    parser.add_argument(
        "--bnb_4bit_quant_type", default="nf4", choices=("nf4", "fp4"), help="type of the 4 bits"
    )
    parser.add_argument("--use_bnb_nested_quant", action="store_true", help="with nested scales")
    parser.add_argument("--again", action="store_true", help="quantize the merged weights again")
    c = parser.parse_args(argv)
    four_bit = dict(quant_type=c.bnb_4bit_quant_type, nested=c.use_bnb_nested_quant)
    try:
        merge(
            c.adapter, c.out, getattr(torch, c.dtype), four_bit if c.load_in_4bit else None, c.again
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
