"""What `python dpo.py` without arguments prints around training: the same prompts answered before and after.

The rule is the reward of this demo, as a sentiment classifier is in the DPO paper's first experiment: words of praise
minus words of blame. demo/make.py ranked the pairs by it; the model never sees it, only which answer was preferred.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

# What reviews speak of, with words of praise and words of blame for it. demo/make.py writes its reviews with these.
OPINIONS = {
    "broth": ("rich clear fragrant", "thin salty lukewarm"),
    "bread": ("fresh crusty warm", "stale burnt dry"),
    "sauce": ("silky bright balanced", "greasy bitter lumpy"),
    "filling": ("juicy sweet generous", "sour watery scant"),
    "noodles": ("springy tender delicate", "soggy sticky overcooked"),
    "waiter": ("kind cheerful quick", "rude careless slow"),
    "room": ("cosy calm sunny", "noisy draughty cramped"),
    "story": ("clever gripping tender", "confusing dull predictable"),
    "ending": ("moving perfect wise", "flat rushed silly"),
    "actors": ("charming lively superb", "wooden stiff bored"),
    "songs": ("lovely haunting graceful", "dreary shrill endless"),
    "pictures": ("splendid glowing elegant", "murky shaky ugly"),
    "jokes": ("witty warm playful", "tired cruel stale"),
    "characters": ("vivid lovable believable", "shallow tiresome forgettable"),
    "pages": ("beautiful luminous graceful", "clumsy dense dull"),
}
PRAISE, BLAME = (frozenset(" ".join(words[side] for words in OPINIONS.values()).split()) for side in (0, 1))

EVAL = Path(__file__).resolve().parents[2] / "demo" / "eval.jsonl"
SAMPLES = 64  # answers behind each mean score
SHOWN = 4  # of them on the screen
SEED = 7


def score(text: str) -> float:
    """The rule: words of praise minus words of blame."""
    words = re.findall(r"[a-z]+", text.lower())
    return float(sum(word in PRAISE for word in words) - sum(word in BLAME for word in words))


def next_logits(model, texts: list[list[int]]) -> Tensor:  # (len(texts), V)
    """Logits of the token that follows each text; all of them are one stream, a span each."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in texts])
    ends = lengths.cumsum(0)
    spans = torch.stack([ends - lengths, ends, torch.zeros_like(ends), torch.zeros_like(ends)], 1).int()  # (S, 4)
    input_ids = torch.tensor([token for ids in texts for token in ids], device=device)  # (T,)
    position_ids = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
    return model.logits(input_ids, position_ids, spans)[ends.to(device) - 1]


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], seed: int, max_new_tokens: int = 96) -> list[str]:
    """One sampled continuation of each prompt, from the model's own distribution: temperature 1, nothing cut off.

    Each step reads the unfinished texts whole. A key/value cache would save work that texts this short do not have.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [tokenizer.encode(prompt) for prompt in prompts]
    starts = [len(ids) for ids in texts]
    unfinished = texts
    for _ in range(max_new_tokens):
        probs = next_logits(model, unfinished).float().softmax(-1).cpu()
        for ids, token in zip(unfinished, torch.multinomial(probs, 1, generator=generator).flatten().tolist()):
            ids.append(token)
        unfinished = [ids for ids in unfinished if ids[-1] != tokenizer.eos_token_id]
        if not unfinished:
            break
    return [tokenizer.decode(ids[start:], skip_special_tokens=True) for ids, start in zip(texts, starts)]


def sample(trainer) -> list[tuple[str, str]]:
    """(prompt, answer) for the first prompts of demo/eval.jsonl, on rank 0; nothing on other ranks."""
    if not trainer.ranks.first:
        return []
    prompts = [json.loads(line)["prompt"] for line in EVAL.read_text("utf-8").splitlines()[:SAMPLES]]
    training = trainer.model.training
    trainer.model.eval()
    texts = answers(trainer.model, trainer.tokenizer, prompts, SEED)
    trainer.model.train(training)
    return list(zip(prompts, texts))


def mean_score(samples: list[tuple[str, str]]) -> float:
    return sum(score(answer) for _, answer in samples) / len(samples)


def compare(before: list[tuple[str, str]], after: list[tuple[str, str]]) -> None:
    """Print both mean scores and the first few answers side by side; nothing where `sample` gave nothing."""
    for (prompt, old), (_, new) in list(zip(before, after))[:SHOWN]:
        print(f"\n{prompt}\n  before {score(old):+.0f} {old}\n  after  {score(new):+.0f} {new}")
    if before:
        print(f"\nwords of praise minus words of blame, mean of {len(before)} answers: "
              f"before {mean_score(before):+.2f}, after {mean_score(after):+.2f}")


def train(trainer) -> None:
    """Train, and answer the same prompts before and after."""
    before = sample(trainer)
    trainer.train()
    compare(before, sample(trainer))
