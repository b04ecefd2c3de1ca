"""Make everything in demo/: a corpus, a tokenizer, a base model, and ranked pairs of its answers.

    python -m demo.make        from the repository's root; a few minutes on a CPU

It needs only the trainer's four packages.

1. `write_review` draws short reviews of meals, films and books from a grammar: an opening, two or
   three sentences of praise or blame, a closing that fits them. Half are praise, half blame.
2. The openings are prompts, the rest completions. A byte-level BPE of a few hundred tokens is
   trained on both, then a small Llama from random weights, by this project's own trainer with
   `--loss_type sft`. That is the base, demo/model.
3. The base answers each prompt twice. The answer with the higher `net_praise` (words of praise
   minus words of blame) is chosen, the other rejected; ties are left out. That is demo/train.jsonl
   and, with prompts of its own, demo/eval.jsonl.

All draws come from fixed seeds, on one thread, so two runs on one machine write the same files.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

import dpo
import model as models
from data import Tokenizer
from extras.watch.demo import OPINIONS, answers, net_praise
from parts.files import write_json

DEMO = Path(__file__).resolve().parent
SEED = 2305
REVIEWS = 60_000  # that the base model learns from
PROMPTS = {"eval.jsonl": 240, "train.jsonl": 2400}  # distinct ones, answered twice each
PROMPTS_AT_ONCE = 128  # in one forward of sampling
VOCAB_SIZE = 944  # 256 bytes, the words of the grammar, and the pieces they are merged from
END = "<|endoftext|>"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


# The grammar


class Kind(NamedTuple):
    """One kind of review: reasons for (praise, blame), closings for (praise, both, blame)."""

    opening: str
    subjects: list[tuple[str, str]]  # what is reviewed, and the OPINIONS that fit it
    reasons: tuple[list[str], list[str]]
    closings: tuple[list[str], list[str], list[str]]


WHEN = (
    "Last night",
    "On Sunday",
    "After work",
    "On my birthday",
    "One rainy evening",
    "In the holidays",
)
WHO = ("I", "we", "my sister and I", "my father and I", "an old friend and I")
PLACES = ("Blue Door", "Old Mill", "Green Kettle", "Corner Table", "Copper Pan", "Station Hotel")
DISHES = {
    "onion soup": "broth bread",
    "fish stew": "broth sauce",
    "apple pie": "filling sauce",
    "beef noodles": "broth noodles",
    "mushroom noodles": "sauce noodles",
    "lamb pie": "filling bread",
    "pea soup": "broth bread",
    "plum cake": "filling",
}
TITLES = [
    f"The {first} {second}"
    for first in ("Silver", "Last", "Quiet", "Paper", "Winter", "Hidden")
    for second in ("Lantern", "Harbour", "Orchard", "Letter", "Garden", "Train")
]
KINDS = (
    Kind(
        "{when}, {who} had the {subject} at the {place}.",
        [(dish, f"{aspects} waiter room") for dish, aspects in DISHES.items()],
        (
            ["I asked for more", "nobody said a word", "I thanked the cook"],
            ["I left half of it", "I paid and left", "I only drank water"],
        ),
        (
            ["I will be back soon.", "Go there hungry."],
            ["I might try something else next time.", "It will do on a cold day."],
            ["I will eat at home next time.", "Once was enough."],
        ),
    ),
    Kind(
        "{when}, {who} saw {subject} at the old cinema.",
        [(title, "story ending actors songs pictures jokes") for title in TITLES],
        (
            ["I forgot the time", "the whole row cheered", "I saw it again the next day"],
            ["I looked at my watch", "two people fell asleep", "I thought about my shopping"],
        ),
        (
            ["See it with someone you love.", "I hummed all the way home."],
            ["It will pass a wet afternoon.", "I am still making up my mind."],
            ["I want my evening back.", "Save your money."],
        ),
    ),
    Kind(
        "{when}, {who} read {subject} by the fire.",
        [(title, "story ending characters pages jokes") for title in TITLES],
        (
            ["I missed my supper", "I read it aloud to the cat", "I stayed up until morning"],
            ["I put it down twice", "I skipped a chapter", "I fed it to the fire"],
        ),
        (
            ["I have lent it to everyone I know.", "It stays by my bed."],
            ["I may read it again one day.", "Borrow it first."],
            ["I gave it away the next day.", "It now holds up a table."],
        ),
    ),
)


def write_opening(rng: random.Random) -> tuple[Kind, str, list[str]]:
    """Draw the kind of a review, its first sentence, and the aspects it may mention."""
    kind = rng.choice(KINDS)
    subject, aspects = rng.choice(kind.subjects)
    opening = kind.opening.format(
        when=rng.choice(WHEN), who=rng.choice(WHO), subject=subject, place=rng.choice(PLACES)
    )
    return kind, opening, aspects.split()


def write_clause(aspect: str, side: int, count: int, rng: random.Random) -> str:
    """Write "the broth was rich and clear": words of praise (side 0) or of blame (side 1)."""
    words = OPINIONS[aspect][side].split()
    words = [words[i] for i in sorted(rng.sample(range(len(words)), count))]
    return f"the {aspect} {'were' if aspect.endswith('s') else 'was'} {' and '.join(words)}"


def write_sentence(kind: Kind, aspects: list[str], sides: list[int], rng: random.Random) -> str:
    """Write one or two clauses, joined by "and" or "but"; a single one may give its reason."""
    clauses = [write_clause(a, s, rng.choice((1, 1, 2)), rng) for a, s in zip(aspects, sides)]
    if len(clauses) == 2:
        text = f", {'and' if sides[0] == sides[1] else 'but'} ".join(clauses)
    elif rng.random() < 0.5:
        text = (
            write_clause(aspects[0], sides[0], 1, rng)
            .replace(" was ", " was so ")
            .replace(" were ", " were so ")
        )
        text += f" that {rng.choice(kind.reasons[sides[0]])}"
    else:
        text = clauses[0]
    return text[0].upper() + text[1:] + "."


def write_review(rng: random.Random) -> dict:
    """Write a review as {"prompt": opening, "chosen": the rest}, which sft trains on."""
    kind, opening, aspects = write_opening(rng)
    blame = rng.choice((0.1, 0.5, 0.9))  # how often this reviewer complains
    counts = rng.choice(((1, 1), (2,), (2, 1), (1, 2)))
    aspects = rng.sample(aspects, min(len(aspects), sum(counts)))
    sides = [int(rng.random() < blame) for _ in aspects]
    sentences = []
    at = 0
    for count in counts:
        sentences.append(
            write_sentence(kind, aspects[at : at + count], sides[at : at + count], rng)
        )
        at += count
    mood = sum(sides) * 2 - len(sides)
    closing = rng.choice(kind.closings[0 if mood < 0 else 1 if mood == 0 else 2])
    return {"prompt": opening, "chosen": "".join(" " + s for s in [*sentences, closing])}


# The tokenizer and the base model


def train_tokenizer(texts: list[str], directory: Path) -> None:
    """Train a byte-level BPE, and write the two files that transformers reads too."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": LLAMA["max_position_embeddings"],
        },
    )


def random_model() -> models.Decoder:
    """Make the Llama of LLAMA with normal weights; norms stay at one."""
    torch.manual_seed(SEED)
    model = models.Decoder(models.read_config(LLAMA))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=LLAMA["initializer_range"])
    model.layout = {}
    model.raw_config = LLAMA
    model.generation_config = None
    return model


def train_base(directory: Path) -> None:
    """Train demo/model from random weights, with the trainer itself; scratch in `directory`."""
    rng = random.Random(SEED)
    reviews = [write_review(rng) for _ in range(REVIEWS)]
    write_rows(directory / "reviews.jsonl", reviews)
    models.save_model(random_model(), directory / "start")
    train_tokenizer([r["prompt"] + r["chosen"] for r in reviews], directory / "start")
    trainer = dpo.DPOTrainer(
        args=dpo.DPOConfig(
            model_name_or_path=str(directory / "start"),
            dataset_name=str(directory / "reviews.jsonl"),
            loss_type=["sft"],
            output_dir=str(directory / "base"),
            cache_dir=str(directory / "cache"),
            per_device_train_batch_size=16,
            num_train_epochs=1,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            adam_beta2=0.98,
            logging_steps=0.05,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            seed=SEED,
        )
    )
    trainer.train()
    # Half the size of float32; the rounding does not matter here.
    models.save_model(trainer.model, DEMO / "model", torch.bfloat16)
    trainer.tokenizer.save(DEMO / "model")


# The pairs


def make_pairs(prompts: list[str], model: models.Decoder, tokenizer: Tokenizer) -> list[dict]:
    """Answer each prompt twice; the answer with more praise is chosen. Ties are left out."""
    rows = []
    for at in range(0, len(prompts), PROMPTS_AT_ONCE):
        asked = prompts[at : at + PROMPTS_AT_ONCE]
        both = answers(model, tokenizer, asked + asked, SEED + at)
        for prompt, one, other in zip(asked, both, both[len(asked) :]):
            chosen, rejected = sorted((one, other), key=net_praise, reverse=True)
            if net_praise(chosen) > net_praise(rejected):
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def main() -> int:
    torch.set_num_threads(1)  # more threads would sum in another order, and so write other files
    with tempfile.TemporaryDirectory() as scratch:
        train_base(Path(scratch))
    model = models.load_model(DEMO / "model")
    tokenizer = Tokenizer.load(DEMO / "model")
    rng = random.Random(SEED + 1)
    openings = [write_opening(rng)[1] for _ in range(REVIEWS)]
    prompts = list(dict.fromkeys(openings))  # each once, in the order drawn
    for name, count in PROMPTS.items():
        write_rows(DEMO / name, make_pairs(prompts[:count], model, tokenizer))
        prompts = prompts[count:]  # no prompt is in both files
    return 0


if __name__ == "__main__":
    sys.exit(main())
