"""Count the bytes a weight and the peak of a step for each way of holding weights and moments, beside the forecast.

    python bench/memory.py                    a random model of Qwen2-0.5B's shape, on the CPU: minutes, 12 GiB
    python bench/memory.py --layers 2         a smaller one

The peak is of tensors alive at once in the second step of two pairs, not of the process. Models of 8B and 70B, which are not
made, have their forecast alone.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from compare import SHAPES  # noqa: E402
from test_plan import Counting, batches_of  # noqa: E402

import dpo  # noqa: E402
import model as models  # noqa: E402
from extras import plan  # noqa: E402
from extras.run import small_adamw  # noqa: E402
from parts.schedule import make_optimizer, small_kind  # noqa: E402

MODES = {
    "float32, AdamW": {}, "float32, adamw_8bit": dict(optim="adamw_8bit"), "bfloat16, stochastic rounding": dict(dtype="bfloat16"),
    "bfloat16, adamw_8bit": dict(optim="adamw_8bit", dtype="bfloat16"), "float32, adafactor": dict(optim="adafactor"),
    "bfloat16, adafactor": dict(optim="adafactor", dtype="bfloat16"), "float32, muon": dict(optim="muon"),
    "bfloat16, muon": dict(optim="muon", dtype="bfloat16")}
COMMON = dict(max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=1e6)
LARGE = {
    "8B": dict(COMMON, model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
               num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32),
    "70B": dict(COMMON, model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672,
                num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80)}


def forecast(raw: dict, options: dict, batch) -> dict:
    c = dpo.DPOConfig(**options)
    run = plan.Run(len(batch.input_ids), len(batch.targets), weights=c.dtype, optimizer=small_kind(c, {}))
    return plan.memory(models.read_config(raw), run)


def counted(raw: dict, options: dict, batch) -> tuple[int, int, int]:
    """Return (weights, bytes of weights, gradients and moments, peak) of a second step."""
    c = dpo.DPOConfig(**options)
    model = models.Decoder(models.read_config(raw)).to(getattr(torch, c.dtype)).requires_grad_(True)
    parameters = list(model.parameters())
    make = small_adamw.make if small_kind(c, {}) else make_optimizer
    optimizer = make(c, list(model.named_parameters()))
    for _ in range(2):
        state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        with Counting(*parameters, *model.buffers(), *state, *getattr(optimizer, "codes", ())) as counting:
            (-model(batch).logps.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    held = sum(t.untyped_storage().nbytes() for t in state) + 2 * sum(p.nbytes for p in parameters)
    return sum(p.numel() for p in parameters), held, counting.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the model that is made")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="all, unless named")
    args = parser.parse_args()
    raw = SHAPES["qwen2-0.5b"] | dict(num_hidden_layers=args.layers)
    batch = batches_of(2, 1, raw["vocab_size"])[0]
    print(f"{'mode':30} {'bytes a weight':>14} {'peak, GiB':>10} {'forecast':>9} {'ratio':>6}" + "".join(f" {n:>7}" for n in LARGE))
    for name in args.modes:
        options = MODES[name]
        weights, held, peak = counted(raw, options, batch)
        total = forecast(raw, options, batch)["total"]
        larger = [forecast(large, options, batch)["total"] / 2**30 for large in LARGE.values()]
        print(f"{name:30} {held / weights:14.2f} {peak / 2**30:10.2f} {total / 2**30:9.2f} {total / peak:6.2f}"
              + "".join(f" {x:7.0f}" for x in larger), flush=True)


if __name__ == "__main__":
    main()
