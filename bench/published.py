"""Compute how long TRL's documented run would take here: python bench/published.py [--mfu 0.4]

TRL's page: Qwen2-0.5B-Instruct on UltraFeedback binarized (62,135 pairs), one epoch on 8 GPUs,
about 3 minutes. Nothing is measured by this script; it multiplies:

    FLOPs = 2 N per token for a forward, 4 N for its backward
            (N: parameters that multiply a token; attention is left out)
    time  = pairs x tokens of a pair x (6 + 2 for the reference) N / (GPUs x peak x MFU)

The tokens are means over 982 UltraFeedback pairs as plain text under Qwen2.5's tokenizer, cut at
max_length 1024, as `python data.py` prints them: as two sequences a pair, and as the stream with
every prompt once.
"""

import argparse

PAIRS = 62_135
N_BODY, N_HEAD = 357_900_000, 136_130_000  # Qwen2-0.5B: 24 blocks; 151,936 x 896, tied
PROMPT, COMPLETIONS = 147.1, 264.4 + 236.5
PEAK = {"A100": 312e12, "H100": 989e12}  # bf16, dense


def seconds(tokens: float, scored: float, gpus: int, peak: float, mfu: float) -> float:
    """Compute the time of one epoch with its reference pass; the head sees only scored tokens."""
    return PAIRS * 8 * (N_BODY * tokens + N_HEAD * scored) / (gpus * peak * mfu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached [0.4]"
    )
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--prompt", type=float, default=PROMPT)
    parser.add_argument(
        "--completions", type=float, default=COMPLETIONS, help="tokens of both together"
    )
    args = parser.parse_args()
    layouts = {
        "two sequences, head on all": (2 * args.prompt + args.completions,) * 2,
        "one stream, head on completions": (args.prompt + args.completions, args.completions),
    }
    for card, peak in PEAK.items():
        for layout, (tokens, scored) in layouts.items():
            minutes = seconds(tokens, scored, args.gpus, peak, args.mfu) / 60
            print(
                f"{args.gpus} x {card} at {args.mfu:.0%} of peak, {layout}: {minutes:.1f} minutes"
            )


if __name__ == "__main__":
    main()
