"""Talk to a model: a checkpoint, an adapter, or a model on the hub.

    python -m extras.chat DIR                                    a conversation at the terminal
    echo "Why is the sky blue?" | python -m extras.chat DIR      one answer
    python -m extras.chat --compare BASE TUNED                   both answer the same, side by side
    python -m extras.chat DIR --image cat.jpg                    about an image
    python -m extras.chat DIR --prompts FILE --num_samples 4 --output FILE.jsonl

FILE has rows with a "prompt" (text or messages) and perhaps images; preference data will do. The
output has a row for each completion. Text is a user's turn if the tokenizer has a chat template;
--raw, or a model without a template, continues the text as it is. Sampling options that are not
given come from generation_config.json, else temperature 1 without top-k or top-p: the model's own
distribution.
At the terminal: /again samples another answer, /new starts a new conversation, /quit or Ctrl-D
quits, Ctrl-C stops an answer.
"""

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

from extras.decoder.generate import Cache, complete, generate
from extras.models.speaker import Speaker, decode, encode_prompt, load, pieces
from extras.rows.pictures import RowImage, open_image
from extras.rows.prompts import Asked, read_prompts
from extras.rows.written import mover, to_json, with_paths
from parts.output import check_apart
from parts.rows import find_files
from parts.screen import escape_unknown


def answer(
    speaker: Speaker,
    asked: Asked,
    system: str | None,
    show: bool,
    cache: Cache | None = None,
    turn: int = 0,
) -> str:
    """Generate one completion, printed as it comes if `show` is set. Ctrl-C ends it early."""
    encoded = encode_prompt(speaker, asked, system)
    tokens: list[int] = []
    started = time.perf_counter()
    steps = generate(
        speaker.model,
        [encoded.ids],
        speaker.sampling,
        cache=cache,
        first=turn,
        pictures=[encoded.pictures],
    )

    def stream() -> Iterator[int]:
        while True:
            with speaker.autocast():  # not around the yield, where other code runs
                step = next(steps, None)
            if step is None:
                return
            tokens.append(step[0])
            yield step[0]

    try:
        for piece in pieces(speaker, stream()):
            if show:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    if show:
        print()
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        print(
            f"\x1b[2m{len(tokens)} tokens, {len(tokens) / seconds:.1f} tokens/s\x1b[0m",
            file=sys.stderr,
        )
    return decode(speaker, tokens)


def printable(text: str) -> str:
    """Escape control characters: a model must not control the terminal."""
    is_safe = lambda c: c in "\n\t" or c.isprintable() or ord(c) >= 160
    return "".join(c if is_safe(c) else f"\\x{ord(c):02x}" for c in text)


def columns(names: list[str], texts: list[str], width: int) -> str:
    """Set texts side by side, each below its name."""
    wide = (width - 3 * (len(names) - 1)) // len(names)
    wrapped = []
    for text in map(printable, texts):
        paragraphs = [textwrap.wrap(part, wide) or [""] for part in text.split("\n")]
        wrapped.append([line for paragraph in paragraphs for line in paragraph])
    heads = [textwrap.shorten(name, wide, placeholder="...") for name in names]
    rows = [heads, ["-" * wide] * len(names), *zip_longest(*wrapped, fillvalue="")]
    return "\n".join(" | ".join(cell.ljust(wide) for cell in row).rstrip() for row in rows)


# The three ways to use it

Conversation = list[dict]


def question(speaker: Speaker, text: str, images: tuple[RowImage, ...]) -> dict:
    """Return a user's turn, its images first, or where the text says <image>.

    The text that a model without a template continues must say so.
    """
    if not images or speaker.raw or "<image>" in text:
        return {"role": "user", "content": text}
    parts = [{"type": "image"}] * len(images)
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def reply(
    speakers: list[Speaker],
    conversations: list[Conversation],
    caches: list[Cache],
    system: str | None,
    turn: int,
    images: tuple[RowImage, ...] = (),
) -> list[Conversation]:
    """Take one turn: every speaker answers its own conversation; return them with the answers."""
    texts = []
    alone = len(speakers) == 1
    for speaker, conversation, cache in zip(speakers, conversations, caches):
        prompt = conversation[-1]["content"] if speaker.raw else conversation
        texts.append(answer(speaker, Asked(prompt, images), system, alone, cache, turn))
    if not alone:
        width = shutil.get_terminal_size((100, 24)).columns
        print(columns([speaker.name for speaker in speakers], texts, width))
    return [[*c, {"role": "assistant", "content": text}] for c, text in zip(conversations, texts)]


def talk(speakers: list[Speaker], system: str | None, images: tuple[RowImage, ...]) -> None:
    """Hold a conversation at the terminal; a model without a template continues single texts."""
    import readline  # noqa: F401  line editing for input()

    empty = [[] for _ in speakers]
    conversations = empty
    caches = [Cache(0) for _ in speakers]
    turn = 0
    for speaker in speakers:
        kind = "continues each text as it is" if speaker.raw else "conversation"
        print(f"\x1b[2m{speaker.name}: {kind}; /again /new /quit\x1b[0m")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        command = line.strip()
        if command == "/quit":
            return None
        if command == "/new":
            conversations = empty
        if command in ("", "/new") or (command == "/again" and conversations == empty):
            continue
        again = command == "/again"
        turns = [
            c[:-1] if again else [*c, question(speaker, line, () if c else images)]
            for speaker, c in zip(speakers, conversations)
        ]
        try:
            conversations = reply(speakers, turns, caches, system, turn, images)
        except ValueError as error:  # too long for the model, or the template refuses it
            print(error)
        turn += 1


def peeked(prompts: Iterator, path: str) -> Iterator:
    """Return the same prompts; before anything is written, raise ValueError if there are none."""
    for first in prompts:
        return chain([first], prompts)
    raise ValueError(f"{path}: no prompts")


def row_for(asked: Asked, folder: Path) -> dict:
    """Return a row with the prompt and what belongs to it, images by paths from `folder`."""
    source = Path(asked.where.rpartition(":")[0]).parent
    return with_paths({"prompt": asked.prompt, **asked.more}, mover(source, folder))


def write_completions(speaker: Speaker, args: argparse.Namespace) -> int:
    """Write a JSONL row for every completion, in the order of the prompts; return their number."""
    check_apart("--output", args.output, find_files(args.prompts))
    prompts = peeked(read_prompts(args.prompts), args.prompts)
    first = 0
    with open(args.output, "w", encoding="utf-8") as file:
        while batch := list(islice(prompts, max(1, args.batch_size // args.num_samples))):
            encoded = [encode_prompt(speaker, asked, args.system) for asked in batch]
            ids = [one.ids for one in encoded]
            pictures = [one.pictures for one in encoded]
            with speaker.autocast():
                written = complete(
                    speaker.model, ids, speaker.sampling, args.num_samples, first, pictures
                )
            for i, tokens in enumerate(written):
                text = decode(speaker, tokens)
                asked = batch[i // args.num_samples]
                is_chat = not isinstance(asked.prompt, str)
                row = {
                    **row_for(asked, Path(args.output).parent),
                    "sample": i % args.num_samples,
                    "tokens": len(tokens),
                    "completion": [{"role": "assistant", "content": text}] if is_chat else text,
                    "finished": tokens[-1] in speaker.sampling.stop_ids,
                }
                file.write(to_json(row) + "\n")
            first += len(batch) * args.num_samples
            file.flush()
            print(f"\r{first} completions", end="", file=sys.stderr)
    print(file=sys.stderr)
    return first


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extras.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", help="directory of a model or an adapter, or a hub id")
    add("--compare", nargs=2, metavar=("BASE", "TUNED"), help="two models instead")
    add("--system", help="system prompt of conversations that have none")
    greedy = "always the likeliest token; same as --temperature 0"
    add("--greedy", action="store_true", help=greedy)
    add("--temperature", type=float, help="logits are divided by it")
    add("--top_k", type=int, help="sample among the K likeliest tokens; 0: all")
    top_p = "sample among the likeliest tokens whose probabilities add up to this"
    add("--top_p", type=float, help=top_p)
    penalty = "above 1, tokens that occurred before become less likely"
    add("--repetition_penalty", type=float, help=penalty)
    add("--seed", type=int, default=0, help="of the sampling [0]")
    add("--max_new_tokens", type=int, default=512, help="longest completion, in tokens [512]")
    length = "longest sequence of the run: chooses LongRoPE's frequencies"
    add("--max_length", type=int, help=length)
    only_ends = "take only the end tokens from that file"
    add("--no_generation_config", action="store_true", help=only_ends)
    add("--chat_template", help="a template: its file, its name or its text")
    raw = "continue texts as they are, without the chat template"
    add("--raw", action="store_true", help=raw)
    dtypes = ["float32", "bfloat16", "float16"]
    usual = "[as in the run, where it is a run's; else bfloat16 on a GPU, float32 elsewhere]"
    add("--dtype", choices=dtypes, help=usual)
    add("--device", help="[cuda where there is one, else cpu]")
    image = "ask about images: they go before the first question, or where it says <image>"
    add("--image", nargs="+", default=[], metavar="FILE", help=image)
    add("--prompts", help="complete the prompts of this file instead")
    add("--num_samples", type=int, default=1, help="completions of each prompt [1]")
    add("--batch_size", type=int, default=16, help="completions generated at once [16]")
    add("--output", help="JSONL file for them")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags. Raises ValueError for those that do not fit together."""
    args = make_parser().parse_args(argv)
    fewest = min(args.num_samples, args.batch_size)
    greedy_and_warm = args.greedy and args.temperature is not None
    checks = {
        "give one model, or --compare BASE TUNED": bool(args.model) != bool(args.compare),
        "--prompts and --output belong together": bool(args.prompts) == bool(args.output),
        "--prompts takes one model": not (args.prompts and args.compare),
        "--image is not read with --prompts, whose rows name theirs": not (
            args.prompts and args.image
        ),
        "--num_samples and --batch_size must be at least 1": fewest >= 1,
        "--num_samples is read only with --prompts": bool(args.prompts) or args.num_samples == 1,
        "--greedy with --temperature: choose one": not greedy_and_warm,
    }
    for message, holds in checks.items():
        if not holds:
            raise ValueError(message)
    return args


def main(argv: list[str] | None = None) -> int:
    """Return exit status 2, with one message, for what cannot be read or run."""
    escape_unknown()
    try:
        args = parse(argv)
        images = tuple(open_image(path, Path()) for path in args.image)
        speakers = [load(name, args) for name in args.compare or [args.model]]
        if args.prompts:
            write_completions(speakers[0], args)
        elif sys.stdin.isatty():
            talk(speakers, args.system, images)
        else:
            text = sys.stdin.read().removesuffix("\n")
            turns = [[question(speaker, text, images)] for speaker in speakers]
            reply(speakers, turns, [Cache(0) for _ in speakers], args.system, 0, images)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
