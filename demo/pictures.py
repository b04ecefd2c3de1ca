"""Make an image demo: coloured shapes, captions from a grammar, and a tiny untrained vision model.

    python -m demo.pictures       from the repository's root; writes demo-pictures/; needs pillow
    python dpo.py --config demo-pictures/config.toml

Chosen is the true caption of an image, rejected the same one with another colour or another shape.
The model is a LLaVA of 150,000 random weights: all it knows of colours and shapes in the end, it
learned from the pairs.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers  # noqa: E402
import torch  # noqa: E402

import model as models  # noqa: E402
from extras.models.opening import build  # noqa: E402
from parts.files import write_json  # noqa: E402

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUESTIONS = ("what is this ?", "what do you see ?", "describe the picture .")
OPENINGS = ("this is a", "i see a", "there is a", "a")
SIDE = 32  # pixels
PATCH = 8


def draw(shape: str, colour: tuple, rng: random.Random) -> Any:
    """Draw a shape of that colour, large or small, near the middle of a light ground."""
    from PIL import Image, ImageDraw

    ground = tuple(rng.randint(215, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    size = rng.randint(16, 26)
    x, y = ((SIDE - size) // 2 + rng.randint(-2, 2) for _ in "xy")
    colour = tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in colour)
    pen = ImageDraw.Draw(image)
    box = (x, y, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
    else:
        third = size // 3
        pen.rectangle((x + third, y, x + size - third, y + size), fill=colour)
        pen.rectangle((x, y + third, x + size, y + size - third), fill=colour)
    return image


def write_row(folder: Path, name: str, rng: random.Random) -> dict:
    """Save an image to `folder` and return its pair."""
    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    draw(shape, COLOURS[colour], rng).save(folder / "png" / f"{name}.png")
    wrong = (rng.choice([c for c in COLOURS if c != colour]), shape)
    if rng.random() < 0.5:
        wrong = (colour, rng.choice([s for s in SHAPES if s != shape]))
    opening = rng.choice(OPENINGS)
    caption = lambda c, s: f" {opening} {c} {s} ."
    return {
        "images": [f"png/{name}.png"],
        "prompt": f"<image> {rng.choice(QUESTIONS)}",
        "chosen": caption(colour, shape),
        "rejected": caption(*wrong),
    }


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a tokenizer with one token a word; return its vocabulary."""
    texts = [*QUESTIONS, *OPENINGS, *COLOURS, *SHAPES, "."]
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "<image>",
        *dict.fromkeys(w for text in texts for w in text.split()),
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:4])
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    )
    return vocabulary


def write_model(folder: Path) -> None:
    """Write a small LLaVA that transformers reads too: configuration, random weights, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    tower = dict(
        model_type="clip_vision_model",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = dict(
        model_type="llama",
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
    )
    raw = dict(
        architectures=["LlavaForConditionalGeneration"],
        model_type="llava",
        image_token_index=vocabulary["<image>"],
        text_config=text,
        vision_config=tower,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = build(models.read_config(raw))
    model.raw_config = raw
    models.save_model(model, folder)
    write_processor(folder)


def write_processor(folder: Path) -> None:
    write_json(
        folder / "processor_config.json",
        dict(
            processor_class="LlavaProcessor",
            image_token="<image>",
            patch_size=PATCH,
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
        ),
    )
    write_json(
        folder / "preprocessor_config.json",
        dict(
            image_processor_type="CLIPImageProcessor",
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            resample=3,
        ),
    )


SETTINGS = """model_name_or_path = "{folder}/model"
dataset_name = "{folder}/train.jsonl"
eval_dataset_name = "{folder}/eval.jsonl"
output_dir = "{folder}/trained"
freeze_vision_tower = false
learning_rate = 3e-3
lr_scheduler_type = "cosine"
warmup_steps = 30
num_train_epochs = {epochs}
per_device_train_batch_size = 32
per_device_eval_batch_size = 64
logging_steps = 50
save_strategy = "no"
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="demo-pictures", type=Path)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(argv)
    (args.folder / "png").mkdir(parents=True, exist_ok=True)
    write_model(args.folder / "model")
    rng = random.Random(0)
    for name, count in (("train", args.pairs), ("eval", 300)):
        rows = [write_row(args.folder, f"{name}-{i:04d}", rng) for i in range(count)]
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.folder / "config.toml").write_text(
        SETTINGS.format(folder=args.folder.as_posix(), epochs=args.epochs)
    )
    print(
        f"{args.folder}: a model and {args.pairs:,} pairs; "
        f"python dpo.py --config {args.folder}/config.toml"
    )


if __name__ == "__main__":
    main()
