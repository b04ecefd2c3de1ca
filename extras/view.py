"""Show preference data as the trainer sees it: python data.py FILE --model_name_or_path MODEL."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from data import DataOptions, PairStore, Tokenizer, build_store
from extras.rows.pictures import open_tokenizer
from parts.screen import escape_unknown
from parts.splits import find_split
from parts.store import describe


def show_pair(store: PairStore, index: int, tokenizer: Tokenizer, color: bool) -> str:
    """Decode a pair through its mask: prompt, trained towards, trained away from."""
    pair = store[index]
    parts = [("prompt", "2", pair.prompt_ids), ("chosen", "32", pair.chosen_ids)]
    if pair.rejected_prompt_ids is not None:
        parts.append(("prompt of rejected", "2", pair.rejected_prompt_ids))
    if len(pair.rejected_ids):
        parts.append(("rejected", "31", pair.rejected_ids))
    lines = [f"--- {store.where(index)}"]
    for name, style, ids in parts:
        text = tokenizer.decode(ids).replace("\x1b", "\\x1b")  # data must not control the terminal
        lines.append(
            f"[{name}: {len(ids)} tokens]\n" + (f"\x1b[{style}m{text}\x1b[0m" if color else text)
        )
    return "\n".join(lines)


def summarize(store: PairStore, batch_size: int = 8) -> list[str]:
    """Count the file's tokens as padded sequences, as sequences, and as a stream."""
    prompt, chosen, rejected = store.lengths.T.astype(np.int64)  # (n,) each
    prompts = store.prompt_lengths().astype(np.int64)  # (n, 2)
    prompts[:, 1] *= rejected > 0
    sequences = prompts + store.lengths[:, 1:]  # (n, 2)
    batches = [sequences[i : i + batch_size] for i in range(0, len(store), batch_size)]
    padded = sum(int(batch.max() * (batch > 0).sum()) for batch in batches)
    two = int(sequences.sum())
    stream = int(store.tokens.sum())
    means = (
        f"prompt {prompt.mean():.1f}, chosen {chosen.mean():.1f}, rejected {rejected.mean():.1f}"
    )
    return [
        f"{len(store):,} pairs; mean tokens: {means}; longest sequence {sequences.max()}",
        f"{padded:,} tokens as two padded sequences per pair "
        f"(file order, {batch_size} pairs per batch)",
        f"{two:,} tokens as two sequences per pair without padding",
        f"{stream:,} tokens as a stream: {1 - stream / two:.1%} less by sharing, "
        f"{1 - stream / padded:.1%} less in all",
    ]


def view(args: argparse.Namespace) -> Iterator[str]:
    """Yield what is printed: pairs, token counts, the store's report."""
    tokenizer = open_tokenizer(args.model_name_or_path, args.chat_template)
    options = DataOptions(
        **{name: value for name, value in vars(args).items() if name in DataOptions._fields}
    )
    with tempfile.TemporaryDirectory() as cache:
        files = [file for name in args.file for file in find_split(name, None, args.split)]
        store = build_store(list(dict.fromkeys(files)), tokenizer, options, cache, args.on_bad_row)
        for index in range(min(args.n, len(store))):
            yield show_pair(store, index, tokenizer, sys.stdout.isatty())
        yield from ["---", *summarize(store), *describe(store.report)]


def length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def main(argv: list[str] | None = None) -> int:
    """Return exit status 2, with one message, for unusable data."""
    parser = argparse.ArgumentParser(
        prog="data.py", description="Show preference data as the trainer sees it."
    )
    parser.add_argument("file", nargs="+", help="JSONL or JSON file, .gz of it, glob or directory")
    parser.add_argument("--model_name_or_path", required=True, help="directory with tokenizer.json")
    parser.add_argument("-n", type=int, default=3, help="number of pairs shown")
    parser.add_argument("--max_length", type=length, default=DataOptions().max_length)
    parser.add_argument("--max_prompt_length", type=length)
    parser.add_argument("--max_completion_length", type=length)
    parser.add_argument(
        "--truncation_mode", choices=["keep_start", "keep_end"], default="keep_start"
    )
    parser.add_argument("--split", default="train", help="of a directory that has several")
    parser.add_argument("--chat_template", help="a template: its file, its name or its text")
    parser.add_argument("--on_bad_row", choices=["stop", "skip"], default="stop")
    escape_unknown()
    try:
        for text in view(parser.parse_args(argv)):
            print(text)
    except ValueError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (`head`, say) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
