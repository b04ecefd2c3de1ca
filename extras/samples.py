"""--generate_during_eval: what the model answers, at each evaluation, to the same prompts with the same draws.

The draws come from the seed and the prompt's number, so that two evaluations differ by the model alone, and training
is the same with and without them. Answers are drawn at temperature 1, as the model has them.
"""

import contextlib
from itertools import islice

import torch

import model as models
from extras.decoder.generate import Sampling, complete
from parts.configs import check_length

PROMPTS = 8  # of which SHOWN are printed
SHOWN = 2
MAX_NEW_TOKENS = 128


def prompts_of(trainer) -> list[tuple[str, list[int]]]:
    """(text, token ids) of the prompts of --generate_prompts, else of the first evaluation pairs that have one.

    Raises ValueError for rows that cannot be read and for prompts that leave the model no room.
    """
    if trainer.args.fsdp:
        raise ValueError(
            "--generate_during_eval with --fsdp: rank 0 alone does not hold the model; leave one of them out"
        )
    prompts = given(trainer) if trainer.args.generate_prompts else held_out(trainer)
    prompts = [(text, ids) for text, ids in prompts if ids]
    if not prompts:
        raise ValueError("--generate_during_eval: no prompt to answer; give --generate_prompts FILE")
    room(trainer.model.config, max(len(ids) for _, ids in prompts))
    return prompts


def held_out(trainer) -> list[tuple[str, list[int]]]:
    pairs = [trainer.eval_store[int(i)] for i in trainer.eval_pairs[:PROMPTS]]
    return [(trainer.tokenizer.decode(pair.prompt_ids), list(map(int, pair.prompt_ids))) for pair in pairs]


def given(trainer) -> list[tuple[str, list[int]]]:
    """Text as it stands; conversations through the chat template, as training has them."""
    from extras.chat import read_prompts

    tokenizer, found = trainer.tokenizer, []
    for prompt in islice(read_prompts(trainer.args.generate_prompts), PROMPTS):
        conversation = not isinstance(prompt, str)
        text = tokenizer.render(prompt, add_generation_prompt=True) if conversation else prompt
        ids = tokenizer.encode(text, add_special_tokens=not conversation)
        found.append((text, ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not conversation else ids))
    return found


def room(config: models.ModelConfig, longest: int) -> int:
    """New tokens behind the longest prompt, fewer than MAX_NEW_TOKENS where the model's positions end."""
    for new in range(MAX_NEW_TOKENS, 1, -1):
        with contextlib.suppress(ValueError):
            check_length(config, longest + new)
            return new
    check_length(config, longest + 1)
    return 1


@torch.no_grad()
def take(trainer) -> dict:
    """Metrics of an evaluation: `eval_samples`, a list of {prompt, completion, tokens}, and its mean length.
    Rank 0 alone."""
    if not trainer.ranks.first:
        return {}
    model, prompts, training = trainer.model, trainer.sample_prompts, trainer.model.training
    new = room(model.config, max(len(ids) for _, ids in prompts))
    ends = frozenset({trainer.tokenizer.eos_token_id} - {None})
    model.eval()
    written = complete(
        model, [ids for _, ids in prompts], Sampling(seed=trainer.args.seed, max_new_tokens=new, stop_ids=ends)
    )
    model.train(training)
    rows = [
        {
            "prompt": text,
            "completion": trainer.tokenizer.decode(tokens, skip_special_tokens=True),
            "tokens": len(tokens),
        }
        for (text, _), tokens in zip(prompts, written)
    ]
    for row in rows[:SHOWN]:
        trainer.say(f"step {trainer.step}: {shown(row['prompt'])} => {shown(row['completion'], 160)}")
    return {"eval_samples": rows, "eval_completions/mean_length": sum(map(len, written)) / len(written)}


def shown(text: str, most: int = 60) -> str:
    """One line of at most so many characters, from the end of a prompt or the beginning of an answer; printable."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 3] + "..."
