"""Compare ours with TRL 1.16 on pairs with images: speed of training and of the tower, memory.

    python bench/vision.py --pairs 16 --batch 4 --rounds 3

A LLaVA with random weights (by default a 21 M tower on 224 x 224 pixels and a 21 M decoder) in
float32, every weight trained, the same pairs in the same order, each side in a fresh process. TRL
has no precomputed reference for images: its frozen copy runs beside the policy; ours runs once
before training, and its time counts. `training` lasts from the opened trainer to the last step;
`tower` is the policy's tower forward alone (the reference's is left out on both sides). Seconds are
the process's CPU time, which other processes hardly change: with one thread it is the wall-clock
time of an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In place of bench/: its file names hide some of Python's own modules.
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
WORDS = (
    "the a cat dog sun moon sees likes eats red blue big small and runs sleeps today why not yes no"
).split()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", type=int, default=224, help="of the images, pixels")
    parser.add_argument("--hidden", type=int, default=384, help="of tower and decoder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", help="write everything here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Make a checkpoint with its processor, images of noise, and pairs.jsonl."""
    import torch
    import transformers as hf
    from vision_tiny import OUTER, make_tokenizer

    image = make_tokenizer("llava", folder)
    size = dict(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=6,
    )
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            **size, image_size=args.side, patch_size=14, projection_dim=16
        ),
        text_config=hf.LlamaConfig(**size, vocab_size=320, num_key_value_heads=2),
        image_token_index=image,
        image_token_id=image,
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="CLIPImageProcessor",
                size={"shortest_edge": args.side},
                crop_size={"height": args.side, "width": args.side},
            )
        )
    )
    (folder / "processor_config.json").write_text(json.dumps(OUTER["llava"] | {"patch_size": 14}))
    write_pairs(folder, args.pairs)


def write_pairs(folder: Path, count: int) -> None:
    """Write pairs.jsonl, each pair about an image of noise."""
    import random

    import numpy as np
    from PIL import Image

    rng = random.Random(0)
    text = lambda: [{"type": "text", "text": " ".join(rng.choices(WORDS, k=rng.randint(4, 16)))}]
    rows = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((320, 240)).save(folder / f"{i}.png")
        rows.append(
            {
                "images": [f"{i}.png"],
                "prompt": [{"role": "user", "content": [{"type": "image"}, *text()]}],
                "chosen": [{"role": "assistant", "content": text()}],
                "rejected": [{"role": "assistant", "content": text()}],
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed(tower, is_reference=lambda: False) -> list[float]:
    """Time each forward of the policy's tower, seconds; the list fills as it runs."""
    seconds, began = [], []

    def end(*_):
        took = time.process_time() - began.pop()
        if not is_reference():
            seconds.append(took)

    tower.register_forward_pre_hook(lambda *_: began.append(time.process_time()))
    tower.register_forward_hook(end)
    return seconds


def ours(folder: Path, args: argparse.Namespace) -> dict:
    import torch

    import dpo

    config = dpo.DPOConfig(
        model_name_or_path=str(folder),
        dataset_name=str(folder / "pairs.jsonl"),
        output_dir=str(folder / "ours"),
        cache_dir=tempfile.mkdtemp(dir=folder),
        use_cpu=True,
        bf16=False,
        shuffle_dataset=False,
        freeze_vision_tower=False,
        max_length=None,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        num_train_epochs=1,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = dpo.DPOTrainer(args=config)
    tower = timed(trainer.model.model.vision.tower, lambda: not torch.is_grad_enabled())
    trainer.save_model = lambda *_: None
    return measure(trainer.train, tower, args)


def trl(folder: Path, args: argparse.Namespace) -> dict:
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoProcessor
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in open(folder / "pairs.jsonl")]
    for row in rows:
        row["images"] = [Image.open(folder / name).convert("RGB") for name in row["images"]]
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=args.batch,
        num_train_epochs=1,
    )
    trainer = DPOTrainer(
        model=str(folder),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    model = getattr(trainer.model, "model", trainer.model)
    return measure(trainer.train, timed(model.vision_tower), args)


def measure(train, tower: list[float], args: argparse.Namespace) -> dict:
    started = time.process_time()
    train()
    seconds = time.process_time() - started
    peak = next(
        int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith("VmHWM")
    )
    return {
        "seconds": seconds,
        "pictures_per_s": args.pairs / seconds,
        "tower_pictures_per_s": args.pairs / sum(tower),
        "peak_mib": peak,
    }


def run_child(name: str, folder: Path) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(parse().threads)},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parse()
    if args.child:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps({"ours": ours, "trl": trl}[args.child[0]](Path(args.child[1]), args)))
        return
    results = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        make_inputs(Path(scratch), args)
        for i in range(args.rounds):
            for name in results:
                results[name].append(run_child(name, Path(scratch)))
                print(f"round {i + 1} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        for name, runs in results.items()
    }
    ratio = {k: medians["ours"][k] / medians["trl"][k] for k in medians["ours"]}
    for name, row in (medians | {"ratio": ratio}).items():
        print(f"{name:6}" + "".join(f"  {k} {v:.3f}" for k, v in row.items()))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), "runs": results, "ratio": ratio}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
