"""Compare tokens per second with transformers.generate: greedy, one prompt and a batch of them.

    python bench/generate.py --model DIR [--tokens 200] [--batch 8] [--rounds 3] [--json FILE]

Both take turns in one process, and generate exactly --tokens tokens (end tokens are ignored) on as
many threads as torch uses, in float32. The first round of each warms up; the median of the others
is printed. If other programs share the machine, read the ratio of processor seconds. "equal tokens"
counts how many of each completion's tokens agree, from the first on.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as models  # noqa: E402
from data import Tokenizer  # noqa: E402
from extras.decoder.generate import Sampling, complete  # noqa: E402

PROMPTS = [
    "Once upon a time, in a village by the sea,",
    "The three most important inventions are",
    "Dear Sir or Madam,",
    "def fibonacci(n):",
    "Water boils at",
    "My favourite recipe begins with",
    "In 1969, two men",
    "To be or not to be,",
]


def their_tokens(theirs, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Run transformers' generate on the prompts, padded on the left as it expects."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = theirs.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
        )
    return out[:, longest:].tolist()


def timed(run) -> tuple[tuple[float, float], list]:
    """Return (wall-clock seconds, processor seconds), and what `run` returns."""
    clock, processor = time.perf_counter(), time.process_time()
    out = run()
    return (time.perf_counter() - clock, time.process_time() - processor), out


def compare(ours, theirs, prompts: list[list[int]], count: int, rounds: int) -> dict:
    """Measure both: median tokens per second, and how many leading tokens agree."""
    runs = {
        "ours": lambda: complete(ours, prompts, Sampling(temperature=0.0, max_new_tokens=count)),
        "transformers": lambda: their_tokens(theirs, prompts, count),
    }
    seconds, found = {name: [] for name in runs}, {}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            took, found[name] = timed(run)
            seconds[name].append(took)
    agree = [
        next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), count)
        for a, b in zip(found["ours"], found["transformers"])
    ]
    speed = lambda name, kind: (
        len(prompts) * count / statistics.median(s[kind] for s in seconds[name][1:])
    )
    ratio = {
        kind: speed("ours", i) / speed("transformers", i)
        for i, kind in enumerate(("clock", "processor"))
    }
    return {
        "prompts": len(prompts),
        "tokens": count,
        "tokens/s": {name: speed(name, 0) for name in runs},
        "ratio": ratio,
        "clock and processor seconds": seconds,
        "equal tokens": agree,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32
    ).eval()
    theirs.generation_config.eos_token_id = None
    ours, tokenizer = models.load_model(args.model).eval(), Tokenizer.load(args.model)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    results = []
    for batch in sorted({1, args.batch}):
        asked = [prompts[i % len(prompts)] for i in range(batch)]
        results.append(compare(ours, theirs, asked, args.tokens, args.rounds))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        machine = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }
        Path(args.json).write_text(
            json.dumps({"model": Path(args.model).name, **machine, "results": results}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
