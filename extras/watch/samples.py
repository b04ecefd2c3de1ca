"""Answer the same prompts at each evaluation, with the same random draws: --generate_during_eval.

The draws depend on the seed and the prompt's number, so two evaluations differ by the model alone,
and training is the same with and without them. Answers are sampled at temperature 1.
"""

import contextlib
from itertools import islice
from typing import Any

import torch

from extras.decoder.generate import Sampling, complete, end_tokens
from extras.rows.pictures import images_of, of_prompt, one_mark_each
from extras.rows.prompts import Encoded, encode_asked, read_prompts
from model import ModelConfig
from parts.configs import check_length
from parts.place import eval_mode

PROMPTS = 8  # answered, of which SHOWN are printed
SHOWN = 2
MAX_NEW_TOKENS = 128


class Samples:
    """The prompts answered at each evaluation, at most PROMPTS."""

    def __init__(self, trainer: Any) -> None:
        """Take the prompts of --generate_prompts, else of the first evaluation pairs with one.

        Raises ValueError for rows that cannot be read and for prompts that leave the model no room.
        """
        found = given(trainer) if trainer.args.generate_prompts else held_out(trainer)
        self.prompts = [one for one in found if one.ids]
        if not self.prompts:
            raise ValueError(
                "--generate_during_eval: no prompt to answer; give --generate_prompts FILE"
            )
        longest = max(len(one.ids) for one in self.prompts)
        self.sampling = Sampling(
            seed=trainer.args.seed,
            max_new_tokens=room(trainer.model.config, longest),
            stop_ids=end_tokens(trainer.model, trainer.tokenizer.eos_token_id),
        )

    @torch.no_grad()
    def take(self, trainer: Any) -> dict:
        """Answer the prompts on rank 0, with --fsdp on all; return metrics on rank 0 alone.

        `eval_samples` is a list of {prompt, completion, tokens}, and
        `eval_completions/mean_length` their mean length, tokens.
        """
        is_sharded = trainer.place.is_sharded
        if not (trainer.ranks.first or is_sharded):
            return {}
        autocast = contextlib.nullcontext()
        if is_sharded:  # its weights are gathered in the narrow type
            autocast = trainer.precision.autocast(trainer.ranks.device)
        with eval_mode(trainer.model), autocast:
            ids = [one.ids for one in self.prompts]
            pictures = [one.pictures for one in self.prompts]
            written = complete(trainer.model, ids, self.sampling, pictures=pictures)
        if not trainer.ranks.first:
            return {}
        rows = []
        for one, tokens in zip(self.prompts, written):
            completion = trainer.tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append({"prompt": one.text, "completion": completion, "tokens": len(tokens)})
        for row in rows[:SHOWN]:
            line = f"{shown(row['prompt'])} => {shown(row['completion'], 160)}"
            trainer.log.say(f"step {trainer.position.step}: {line}")
        mean = sum(map(len, written)) / len(written)
        return {"eval_samples": rows, "eval_completions/mean_length": mean}


def held_out(trainer: Any) -> list[Encoded]:
    """Take the prompts of the first evaluation pairs, with their images."""
    found = []
    store, pairs = next(iter(trainer.eval_sets.values()))
    tokenizer = trainer.tokenizer
    for index in map(int, pairs[:PROMPTS]):
        ids = store[index].prompt_ids.tolist()
        shown_ids = ids
        pictures = None
        if images := images_of(store, index):
            pictures = of_prompt(ids, images, tokenizer.pictures, store.directory)
            shown_ids = one_mark_each(ids, images, tokenizer.pictures)
        found.append(Encoded(tokenizer.decode(shown_ids), ids, pictures))
    return found


def given(trainer: Any) -> list[Encoded]:
    """Read a file's prompts: text as it is, conversations through the chat template."""
    asked = islice(read_prompts(trainer.args.generate_prompts), PROMPTS)
    return [encode_asked(trainer.tokenizer, one) for one in asked]


def room(config: ModelConfig, longest: int) -> int:
    """Count the new tokens that fit after the longest prompt, at most MAX_NEW_TOKENS.

    The model's positions are the limit. Raises ValueError where not even one fits.
    """
    for new in range(MAX_NEW_TOKENS, 1, -1):
        with contextlib.suppress(ValueError):
            check_length(config, longest + new)
            return new
    check_length(config, longest + 1)
    return 1


def shown(text: str, most: int = 60) -> str:
    """Shorten a text to one printable line of at most `most` characters."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 3] + "..."
