"""Measure what a pair costs: time linear in tokens, memory that does not grow with the vocabulary.

    python bench/scaling.py [--json FILE]

A random Llama of 30M parameters on one thread; CPU seconds (user time) of forward and backward, the
better of two. Three tables: one pair of 64 to 4,096 tokens; the peak of resident memory over that
of 4,096 tokens and a vocabulary of 8,192, as the vocabulary grows, beside the (tokens, vocabulary)
logits that are never made; and 1 to 32 pairs of 256 tokens. Attention grows with the square of the
length: the first table also times the model without it, and shows its share of the FLOPs.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
from parts.ranks import keep_freed_memory  # noqa: E402

CONFIG = dict(
    model_type="llama",
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def make_batch(pairs: int, tokens: int, vocab_size: int) -> data.Batch:
    """Make pairs of `tokens` stream tokens: half prompt, a quarter chosen, a quarter rejected."""
    ids = torch.randint(
        vocab_size, (pairs, tokens), generator=torch.Generator().manual_seed(0)
    ).numpy()
    cut = tokens // 2, tokens * 3 // 4
    return data.collate(
        [data.Pair(r[: cut[0]], r[cut[0] : cut[1]], r[cut[1] :], None, 0.0, 0.0) for r in ids]
    )


def one_pass(model: models.Decoder, batch: data.Batch) -> None:
    model(batch).logps.sum().backward()


def cpu_seconds(model: models.Decoder, batch: data.Batch, rounds: int = 2) -> float:
    """Measure forward and backward of the sum of log-probs, user time, after a warm-up."""
    times = []
    for _ in range(rounds + 1):
        started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        one_pass(model, batch)
        times.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - started)
    return min(times[1:])


@contextmanager
def without_attention():
    """Replace attention: each token sees only its own value."""
    attend = models.CallPlan.__call__
    models.CallPlan.__call__ = lambda self, q, k, v: (
        q * 0 + v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    )
    try:
        yield
    finally:
        models.CallPlan.__call__ = attend


def attention_share(tokens: int) -> float:
    """Compute attention's share of the FLOPs of one pair."""
    half, quarter = tokens // 2, tokens // 4
    attended = half**2 / 2 + 2 * (quarter * half + quarter**2 / 2)
    c, layers = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
    blocks = 2 * tokens * layers * (3 * c * c + 3 * c * CONFIG["intermediate_size"])
    attention = 4 * c * layers * attended
    return attention / (attention + blocks + 2 * CONFIG["vocab_size"] * c * half)


def peak_mib(tokens: int, vocab_size: int) -> int:
    """Measure the peak resident memory of a process with one forward and backward."""
    command = [sys.executable, __file__, "--peak", str(tokens), str(vocab_size)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the tables here")
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    if args.peak:
        model = models.Decoder(models.read_config(CONFIG | {"vocab_size": args.peak[1]}))
        one_pass(model, make_batch(1, *args.peak))
        status = Path(
            "/proc/self/status"
        ).read_text()  # not ru_maxrss, which begins at the parent's
        print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
        return
    model = models.Decoder(models.read_config(CONFIG))
    tables = {"one pair": [], "vocabulary": [], "batch": []}
    for tokens in (64, 128, 256, 512, 1024, 2048, 4096):
        row = {
            "tokens": tokens,
            "ms": 1e3 * cpu_seconds(model, make_batch(1, tokens, CONFIG["vocab_size"])),
        }
        with without_attention():
            rest = 1e3 * cpu_seconds(model, make_batch(1, tokens, CONFIG["vocab_size"]))
        row |= {
            "ms_per_token": row["ms"] / tokens,
            "ms_per_token_without_attention": rest / tokens,
            "attention_flops": attention_share(tokens),
        }
        show(tables["one pair"], row)
    for tokens, vocab_size in (
        (1024, 8192),
        (1024, 131072),
        (4096, 8192),
        (4096, 32768),
        (4096, 131072),
    ):
        weights = vocab_size * CONFIG["hidden_size"] * 4 / 2**20
        row = {"tokens": tokens, "vocab_size": vocab_size, "peak_mib": peak_mib(tokens, vocab_size)}
        row |= {
            "embedding_and_gradients_mib": 3 * weights,
            "logits_never_made_mib": tokens / 2 * vocab_size * 4 / 2**20,
        }
        show(tables["vocabulary"], row)
    for pairs in (1, 2, 4, 8, 16, 32):
        ms = 1e3 * cpu_seconds(model, make_batch(pairs, 256, CONFIG["vocab_size"]))
        show(tables["batch"], {"pairs": pairs, "ms": ms, "ms_per_pair": ms / pairs})
    if args.json:
        setting = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "threads": 1,
            "config": CONFIG,
        }
        Path(args.json).write_text(json.dumps(setting | tables, indent=1) + "\n")


def show(table: list, row: dict) -> None:
    table.append(row)
    print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
