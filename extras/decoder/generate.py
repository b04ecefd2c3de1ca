"""Completions: the stream of training goes on, one token per sequence at a time, with a cache.

A sequence being written is a span, as in training, of which only the last token is new; the keys
and values of the rest, and of the prompt that is its prefix, are cached. Samples of one prompt
share it as the two completions of a pair do. A recurrent layer keeps a state of each sequence
instead, and of each prompt, from which its samples go on. A prompt with images is read by itself,
and in a conversation whole at every turn. What a sequence draws depends on the seed
and on its own number, not on what is written beside it (up to rounding).

Sizes: S sequences, V vocabulary, T new tokens, K kv heads, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from extras.decoder.chunked import plan_chunked, tuned
from extras.decoder.chunks import plan_chunks
from extras.decoder.mixers import attends, recurs
from model import Call, CallPlan, Decoder, ModelConfig, choose_attention, span_mask
from parts.configs import check_length
from parts.varlen import has_flash, head_sizes, plan_varlen


class Sampling(NamedTuple):
    """How tokens are chosen and when to stop, with transformers' meaning of each name.

    temperature 0 is greedy; top_k 0 and top_p 1 leave out nothing. They are applied in the order
    repetition penalty, temperature, top_k, top_p. `stop_ids` end a sequence and are its last token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()


def end_tokens(model: Decoder, eos_token_id: int | None) -> frozenset[int]:
    """Return what ends an answer: the tokenizer's end, and all of generation_config.json.

    Without that file, config.json's: many chat models end a turn and a text with different tokens.
    Raises ValueError for what is no token.
    """
    file = model.generation_config or {}
    ends = file.get("eos_token_id", model.raw_config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    if not all(one is None or type(one) is int for one in ends):
        raise ValueError(
            f"generation_config.json or config.json: eos_token_id is {ends!r:.60}; expected the "
            "number of a token, or a list of them")
    return frozenset({*ends, eos_token_id} - {None})


def check_sampling(o: Sampling) -> None:
    """Raise ValueError for an option out of its range; some may be generation_config.json's."""
    for name in ("temperature", "top_p", "repetition_penalty", "top_k", "seed", "max_new_tokens"):
        value = getattr(o, name)
        takes_float = name in ("temperature", "top_p", "repetition_penalty")
        if type(value) is not int and not (takes_float and isinstance(value, float)):
            raise ValueError(f"--{name}, or that of generation_config.json, is {value!r:.60}: it "
                             "must be a number")
    rules = {
        "temperature": (o.temperature >= 0, "0 (greedy) or more"),
        "top_k": (o.top_k >= 0, "0 (all) or more"),
        "top_p": (0 < o.top_p <= 1, "above 0, at most 1"),
        "seed": (0 <= o.seed < 2**63, "0 or more, and below 2^63"),
        "repetition_penalty": (o.repetition_penalty > 0, "above 0 (1 is none)"),
        "max_new_tokens": (o.max_new_tokens >= 1, "at least 1")}
    for name, (is_allowed, rule) in rules.items():
        if not is_allowed:
            raise ValueError(f"--{name} {getattr(o, name)}: it must be {rule}")


# Choosing a token


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:  # (S, V)
    """Divide the logits of tokens a sequence has seen by the penalty; multiply negative ones.

    (arXiv:1909.05858 section 4.1, in the form for logits of either sign.)
    """
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def distribution(logits: Tensor, o: Sampling) -> Tensor:  # (S, V)
    """Return probabilities after temperature, top_k and top_p.

    Ties with the k-th token stay. top_p (arXiv:1904.09751) keeps the fewest of the likeliest
    tokens that together have that probability, and always one.
    """
    logits = logits / o.temperature
    if o.top_k:
        least = logits.topk(min(o.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if o.top_p < 1:
        ascending, order = logits.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - o.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return logits.softmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:  # (S,)
    """Draw one token per row of probs (S, V), by inversion at uniform (S,) in [0, 1)."""
    cumulative = probs.double().cumsum(-1)
    at = (uniform * cumulative[:, -1])[:, None]
    drawn = torch.searchsorted(cumulative, at, right=True).squeeze(1)
    return drawn.clamp(max=probs.shape[-1] - 1)  # rounding may put `at` beyond the last sum


# Sequences and their places in the stream


class CachedPlan(NamedTuple):
    """A plan over a layer's cached keys and values, to which the stream's are added first; or, with
    `is_own`, over the stream's alone."""

    plan: Callable
    keys: Tensor  # (places, K, D)
    values: Tensor  # (places, K, D)
    places: Tensor  # (T,) of this stream's tokens
    is_own: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:  # (T, H, D)
        keys = self.keys.index_copy_(0, self.places, k.to(self.keys.dtype))
        values = self.values.index_copy_(0, self.places, v)
        return self.plan(q, k, v, *sinks) if self.is_own else self.plan(q, keys, values, *sinks)


@dataclass
class Sequence:
    """One completion being written: the span [start, end) of the stream, after a prefix."""

    number: int  # prompt x samples + sample
    start: int
    end: int
    prefix: tuple[int, int]
    position: int  # of the next token
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)


class States(NamedTuple):
    """What a recurrent layer keeps of each sequence, by the position where that starts.

    The last inputs of its convolution, and its state.
    """

    kept: dict[int, tuple[Tensor, Tensor]]
    rows: list[list[int]]  # the spans of this stream, as Cache has them

    def starts(self, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each span goes on from: its own, its prefix's, or zeros like `before` of all
        spans and `state` of one."""
        nothing = (before.unflatten(0, (len(self.rows), -1))[0], state)
        found = []
        for start, end, prefix_start, prefix_end, new in self.rows:
            if new < end - start:
                found.append(self.kept[start])
            else:
                found.append(self.kept[prefix_start] if prefix_end > prefix_start else nothing)
        inputs, states = zip(*found)
        return torch.cat(inputs), torch.stack(states)

    def keep(self, inputs: Tensor, states: list[Tensor]) -> None:
        for row, *found in zip(self.rows, inputs, states):
            self.kept[row[0]] = tuple(found)


class Cache:
    """Keys and values of all layers for a stream of `size` places.

    Spans are rows (start, end, prefix_start, prefix_end, new): only the last `new` tokens of a
    span are in the input. `ids` are the cached tokens, where there is one sequence that starts at
    place 0.
    """

    def __init__(self, size: int):
        self.size = size
        self.ids: list[int] = []
        self.reads: tuple[int, ...] = ()  # whose keys and values each layer reads
        # of each that attends, keys and values; of each that recurs, States' `kept`
        self.layers: list[tuple[Tensor, Tensor] | None] = []
        self.states: list[dict | None] = []

    def allocate(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        usual = (config.num_key_value_heads, config.head_dim)
        empty = lambda own: torch.zeros(
            self.size, own.get("num_key_value_heads", usual[0]), own.get("head_dim", usual[1]),
            dtype=dtype, device=device)
        count = len(config.windows)
        sizes = config.per_layer["sizes"] if config.per_layer else ({},) * count
        self.reads = config.per_layer["reads"] if config.per_layer else tuple(range(count))
        made = [(empty(own), empty(own)) if has else None
                for has, own in zip(attends(config), sizes[:max(self.reads) + 1])]
        self.layers = [made[i] for i in self.reads]
        self.states = [{} if has else None for has in recurs(config)]
        self.position_ids = torch.zeros(self.size, dtype=torch.int64, device=device)

    def grow(self, size: int) -> None:
        """Make room for `size` places; what is cached stays."""
        if size > self.size:
            pad = lambda x: torch.cat([x, x.new_zeros(size - self.size, *x.shape[1:])])
            made = [layer and (pad(layer[0]), pad(layer[1]))
                    for layer in self.layers[:max(self.reads, default=-1) + 1]]
            self.layers = [made[i] for i in self.reads]
            self.position_ids = pad(self.position_ids) if self.layers else None
            self.size = size

    def plan(
        self, config: ModelConfig, spans: Tensor, position_ids: Tensor, dtype: torch.dtype,
        stream_plans: dict | None = None,
    ) -> list[dict]:
        """Return {window: plan} of each layer; model.Stack calls it with the new spans (S, 5).

        `stream_plans` are over the stream's own keys and values, and taken instead.
        """
        device = position_ids.device
        if not self.layers:
            self.allocate(config, dtype, device)
        rows = spans.tolist()
        places = torch.cat([torch.arange(row[1] - row[4], row[1]) for row in rows])
        # Counted, and not `position_ids`: where images have positions on several axes, those of the
        # text after them are lower, and a window counts tokens.
        counts = torch.cat([torch.arange(end - new, end) - start + prefix_end - prefix_start
                            for start, end, prefix_start, prefix_end, new in rows])
        places, counts = (x.to(device, non_blocking=True) for x in (places, counts))  # (T,)
        self.position_ids[places] = counts
        is_chunked = config.mixer is not None and config.mixer["kind"] == "chunked"
        make = partial(self.plan_keys, device=device, dtype=dtype)
        is_own = stream_plans is not None
        plans = stream_plans or (
            plan_chunked(make, config, spans) if is_chunked else make(config, spans))
        found: list[dict] = [
            {window: CachedPlan(plans[window], *layer, places, is_own)} if layer else {}
            for window, layer in zip(config.windows, self.layers)]
        if is_chunked:
            found = [tuned(config, plan, position_ids) for plan in found]
        if any(recurs(config)):
            ends = spans[:, 4].cumsum(0)
            alone = torch.stack([ends - spans[:, 4], ends, 0 * ends, 0 * ends], 1)
            chunks = plan_chunks(alone, config.mixer["width"], device)
            for plan, states in zip(found, self.states):
                if states is not None:
                    plan["mixer"] = (chunks, States(states, rows))
        return found

    def plan_keys(
        self, config: ModelConfig, spans: Tensor, device: torch.device, dtype: torch.dtype,
    ) -> dict:
        """Return {window: plan} over all cached keys and values."""
        sizes = head_sizes(config)
        flash = [w for w in sizes if has_flash(device, dtype, sizes[w], config.attn_softcap)]
        plans: dict = {}
        if flash:
            plans = plan_varlen(config, spans[:, :4], device, spans[:, 4])
        attention = choose_attention(config)
        for window in sizes.keys() - flash:
            plans[window] = CallPlan(self.calls(spans.tolist(), window), attention)
        return plans

    def calls(self, rows: list[list[int]], window: int | None) -> list[Call]:
        """Return the attention calls of the new tokens, for a path without varlen attention."""
        calls = []
        at = 0
        for start, end, prefix_start, prefix_end, new in rows:
            keys = ((start, end),)
            if prefix_end > prefix_start:
                keys = ((prefix_start, prefix_end), (start, end))
            length = sum(b - a for a, b in keys)
            mask = None
            # causal attention needs no mask for one token or for all; anything else does
            if new not in (1, length) or (window is not None and length > window):
                key_positions = torch.cat([self.position_ids[a:b] for a, b in keys])
                mask = span_mask(self.position_ids[end - new:end], key_positions, window)
            calls.append(Call(at, at + new, keys, mask))
            at += new
        return calls


def place(
    prompts: list[list[int]], o: Sampling, samples: int, first: int,
) -> tuple[list[Sequence], int]:
    """Lay out sequences with room for their tokens; return them and the stream's size.

    With one sample, the prompt is part of the sequence's span; with several, it is their prefix.
    """
    sequences = []
    at = 0
    for i, prompt in enumerate(prompts):
        end = at + len(prompt)
        for sample in range(samples):
            number = i * samples + sample
            own = end + sample * o.max_new_tokens
            key = np.array([o.seed, first + number], np.uint64)
            is_alone = samples == 1
            sequences.append(Sequence(
                number=number, start=at if is_alone else own, end=own,
                prefix=(0, 0) if is_alone else (at, end), position=len(prompt),
                random=np.random.Generator(np.random.Philox(key=key))))
        at = end + samples * o.max_new_tokens
    return sequences, at


# Writing


def forward(
    model: Decoder, ids: list[int], positions: list[int], spans: list[tuple], cache: Cache,
    pictures: Any = None,
) -> Tensor:  # (S, V)
    """Return the logits after the last new token of every span, in float32."""
    # with --fsdp "offload" the weights are elsewhere
    device = getattr(model, "device", next(model.parameters()).device)
    table = torch.tensor(spans, dtype=torch.int32)  # (S, 5)
    host = (torch.tensor(ids), torch.tensor(positions), table[:, 4].cumsum(0) - 1)
    input_ids, position_ids, last = (x.to(device, non_blocking=True) for x in host)
    pictures = pictures and pictures.to(device, non_blocking=True)
    return model.logits(input_ids, position_ids, table, last, cache, pictures).float()


def prefill(
    model: Decoder, prompts: list[list[int]], sequences: list[Sequence], cache: Cache,
    pictures: list | None = None,
) -> Tensor:  # (S, V)
    """Return the logits at the end of every sequence's prompt.

    For a single sequence, the beginning that is cached already is not read again. `pictures` are
    those of each prompt, a stream of its own, or None: each prompt is then read by itself.
    """
    samples = len(sequences) // len(prompts)
    firsts = sequences[::samples]
    if pictures is None:
        known = cached_beginning(model, prompts[0], cache) if len(sequences) == 1 else 0
        logits = prefill_stream(model, prompts, firsts, cache, known)
    else:
        cache.ids = []
        logits = torch.cat([
            prefill_stream(model, [prompt], [sequence], cache, pictures=images)
            for prompt, sequence, images in zip(prompts, firsts, pictures)])
        for sequence in sequences:
            images = pictures[sequence.number // samples]
            if images is not None and images.axes is not None:  # text goes on after the highest
                sequence.position = int(images.axes.max()) + 1
    return logits.repeat_interleave(samples, 0)


def cached_beginning(model: Decoder, prompt: list[int], cache: Cache) -> int:
    """Return how many tokens of a prompt are cached; the cache's `ids` become the prompt's."""
    same = [a == b for a, b in zip(cache.ids, prompt[:-1])]
    known = same.index(False) if False in same else len(same)
    if any(recurs(model.config)) and known < len(cache.ids):
        known = 0  # a state is that at its end, and of no earlier place
    cache.ids = list(prompt)
    return known


def prefill_stream(
    model: Decoder, prompts: list[list[int]], sequences: list[Sequence], cache: Cache,
    known: int = 0, pictures: Any = None,
) -> Tensor:  # (prompts, V)
    """Read prompts as one stream, each but its first `known` tokens; return the logits at the
    end of each. `sequences` are the first of each prompt."""
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    for prompt, sequence in zip(prompts, sequences):
        start = sequence.prefix[0] if sequence.prefix[1] else sequence.start
        spans.append((start, start + len(prompt), 0, 0, len(prompt) - known))
        ids += prompt[known:]
        positions += range(known, len(prompt))
    return forward(model, ids, positions, spans, cache, pictures)


def read_tokens(model: Decoder, sequences: list[Sequence], cache: Cache) -> Tensor:  # (S, V)
    """Read the last token of every sequence; return the logits after it."""
    positions = [s.position for s in sequences]
    for s in sequences:
        s.end += 1
        s.position += 1
    ids = [s.tokens[-1] for s in sequences]
    spans = [(s.start, s.end, *s.prefix, 1) for s in sequences]
    if cache.ids:
        cache.ids += ids
    return forward(model, ids, positions, spans, cache)


@torch.no_grad()
def generate(
    model: Decoder, prompts: list[list[int]], o: Sampling, samples: int = 1,
    cache: Cache | None = None, first: int = 0, pictures: list | None = None,
) -> Iterator[dict[int, int]]:
    """Yield {number of the sequence: its next token} until all have stopped.

    A sequence's number is prompt x samples + sample. `first` is added to it for the random draws,
    so that a list of prompts may come in pieces. The caller keeps `cache` between the turns of one
    conversation (one prompt, one sample). `pictures` has the images of each prompt, as
    extras/rows/pictures.py:of_prompt makes them, or None. Raises ValueError for a prompt without
    tokens, and where prompt and completion are longer than the model's positions reach.
    """
    check_sampling(o)
    if not all(prompts):
        raise ValueError("a prompt without a single token: there is nothing to continue")
    check_length(model.config, max(map(len, prompts)) + o.max_new_tokens)
    sequences, size = place(prompts, o, samples, first)
    cache = cache or Cache(size)
    cache.grow(size)
    has_pictures = any(images is not None for images in pictures or ())
    logits = prefill(model, prompts, sequences, cache, pictures if has_pictures else None)
    seen = None
    if o.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for s in sequences:
            seen[s.number, prompts[s.number // samples]] = True
    while sequences:
        rows = [s.number for s in sequences]
        if seen is not None:
            logits = penalize(logits, seen[rows], o.repetition_penalty)
        tokens = choose(logits, sequences, o)
        if hasattr(model, "agreed"):  # --fsdp
            tokens = model.agreed(tokens)
        if seen is not None:
            seen[rows, tokens] = True
        for s, token in zip(sequences, tokens):
            s.tokens.append(token)
        yield dict(zip(rows, tokens))
        sequences = [s for s in sequences
                     if s.tokens[-1] not in o.stop_ids and len(s.tokens) < o.max_new_tokens]
        logits = read_tokens(model, sequences, cache) if sequences else None


def choose(logits: Tensor, sequences: list[Sequence], o: Sampling) -> list[int]:
    """Choose one token for each sequence, from logits (S, V)."""
    if o.temperature == 0:
        return logits.argmax(-1).tolist()
    numbers = [s.random.random() for s in sequences]
    uniform = torch.tensor(numbers, dtype=torch.float64).to(logits.device, non_blocking=True)
    return draw(distribution(logits, o), uniform).tolist()


def complete(
    model: Decoder, prompts: list[list[int]], o: Sampling, samples: int = 1, first: int = 0,
    pictures: list | None = None,
) -> list[list[int]]:
    """Return the tokens of every sequence: prompt 0's samples, then prompt 1's, and so on."""
    written: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    for step in generate(model, prompts, o, samples, first=first, pictures=pictures):
        for number, token in step.items():
            written[number].append(token)
    return written
