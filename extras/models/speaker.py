"""Load a model with all that it needs to answer; encode what it is asked, decode what it says."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from data import Tokenizer
from extras.decoder.generate import Sampling, check_sampling, end_tokens
from extras.models.opening import (
    four_bit_of,
    is_adapter,
    load_adapted,
    match_processor,
    model_directory,
    run_options,
    tokenizer_home,
)
from extras.rows.pictures import open_tokenizer
from extras.rows.prompts import Asked, Encoded, encode_asked
from model import Decoder
from parts.config import DPOConfig
from parts.precision import Precision, choose_precision
from parts.rows import DataError

FROM_CONFIG = ("temperature", "top_k", "top_p", "repetition_penalty")
# Options of generation_config.json that would change the text and are not supported, each with the
# value at which it does nothing.
UNKNOWN = {
    **dict.fromkeys(
        ("min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "min_length",
         "min_new_tokens"), 0),
    **dict.fromkeys(
        ("typical_p", "num_beams", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "top_h",
         "penalty_alpha", "forced_bos_token_id", "forced_eos_token_id", "force_words_ids",
         "constraints"), None)}


class Speaker(NamedTuple):
    """A model with all that it needs to answer: weights, adapter, tokenizer, sampling options."""

    name: str
    model: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    raw: bool
    precision: Precision = Precision(torch.float32, half=None, sums=torch.float32)

    def autocast(self) -> torch.autocast:
        """Return a context in which the model computes as in the run that trained it."""
        return self.precision.autocast(next(self.model.parameters()).device)


# Loading


def load(name: str, args: argparse.Namespace) -> Speaker:
    """Load a checkpoint, or an adapter on the base that it names. Raises ValueError.

    The adapter of a QLoRA run gets the base that it was trained on: in the run's 4 bits. Without
    --dtype, what a run trained computes in the run's types: its weights' and its autocast's.
    """
    directory = model_directory(name)
    run = run_options(directory)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    precision = precision_of(run, args.dtype, torch.device(device))
    model, _ = load_adapted(
        directory, precision.weights, args.max_length, device=device,
        four_bit=four_bit_of(run) if is_adapter(directory) else None)
    tokenizer = open_tokenizer(tokenizer_home(directory), args.chat_template)
    match_processor(model, tokenizer)
    raw = args.raw or not tokenizer.templates
    if raw and args.system is not None:
        raise ValueError(
            f"--system: {name} is not asked through a chat template, which alone could place it")
    sampling = read_sampling(model, tokenizer, args)
    return Speaker(
        name, model=model.eval(), tokenizer=tokenizer, sampling=sampling, raw=raw,
        precision=precision)


def precision_of(run: dict[str, Any], asked: str | None, device: torch.device) -> Precision:
    """Return the types that were asked for, else the run's, else the device's usual one."""
    if asked or "dtype" not in run:
        usual = "bfloat16" if device.type == "cuda" else "float32"
        weights = getattr(torch, asked or usual)
        return Precision(weights, half=None, sums=torch.float32)
    types = {name: run[name] for name in ("dtype", "bf16", "fp16") if name in run}
    return choose_precision(DPOConfig(**types), device)


def read_sampling(model: Decoder, tokenizer: Tokenizer, args: argparse.Namespace) -> Sampling:
    """Read generation_config.json; the command line wins.

    Raises ValueError for an option of the file that is not supported.
    """
    file: dict[str, Any] = model.generation_config or {}
    given = {} if args.no_generation_config else file
    odd = [f"{k} = {given[k]!r}" for k, neutral in UNKNOWN.items()
           if given.get(k) not in (None, neutral)]
    if odd:
        raise ValueError(
            f"generation_config.json: {', '.join(odd)}: not supported here; with "
            "--no_generation_config only the end tokens of that file are read")
    chosen = {}
    for name in FROM_CONFIG:
        asked = getattr(args, name)
        value = given.get(name) if asked is None else asked
        if value is not None:
            chosen[name] = value
    if args.greedy:
        chosen["temperature"] = 0.0
    sampling = Sampling(
        **chosen, seed=args.seed, max_new_tokens=args.max_new_tokens,
        stop_ids=end_tokens(model, tokenizer.eos_token_id))
    check_sampling(sampling)
    return sampling


# Prompts and answers


def encode_prompt(speaker: Speaker, asked: Asked, system: str | None = None) -> Encoded:
    """Encode a conversation up to the assistant's turn, or a text to continue. Raises DataError."""
    prompt = asked.prompt
    if not (isinstance(prompt, str) and speaker.raw):
        if isinstance(prompt, str) and asked.images and "<image>" not in prompt:
            raise DataError(  # in training it would have no place, either
                f"{asked.where}: the prompt is a text, and names no place for its images; write "
                "<image> where each goes")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        has_system = messages[0]["role"] == "system" or "system" in asked.more
        if system is not None and not has_system:
            messages = [{"role": "system", "content": system}, *messages]
        asked = asked._replace(prompt=messages)
    return encode_asked(speaker.tokenizer, asked)


def decode(speaker: Speaker, tokens: list[int]) -> str:
    return speaker.tokenizer.decode(tokens, skip_special_tokens=True)


def pieces(speaker: Speaker, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text piece by piece; a character waits until all of its bytes have come."""
    so_far = []
    text = ""
    shown = ""
    for token in tokens:
        so_far.append(token)
        text = decode(speaker, so_far)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown):]
            shown = text
    yield text[len(shown):]
