"""Preference data: rows become pairs of token ids, pairs a store, and a batch one flat stream.

    row    {"prompt": ..., "chosen": ..., "rejected": ...}   text or conversations
    pair   prompt_ids, chosen_ids, rejected_ids              made by `make_pair`
    store  all pairs in memory-mapped arrays                 made by `build_store`, once
    batch  prompt0 chosen0 rejected0 prompt1 ...             no padding, every prompt once

To see the data as the trainer sees it (prompt dim, chosen green, rejected red), and what sharing
prompts saves:

    python data.py prefs.jsonl --model_name_or_path Qwen2-0.5B-Instruct -n 5

Token ids are TRL 1.16's for every row that has a meaning; a row without one (chosen equal to
rejected, an empty completion, an unknown role), on which TRL trains or crashes, is refused by file
and line. Reading files, checking rows and rendering conversations happen below, in parts/: rows.py,
turns.py, conversations.py.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parts.conversations import Renderer, RowTexts, load_templates, row_texts
from parts.data_checks import check_options
from parts.rooms import run_command
from parts.rows import DataError, DroppedPair, attempt, read_chunks, user_path
from parts.store import counted, find_or_write, read_store
from parts.tokenizer_files import copy_files, explained_types, files_digest, load_backend
from parts.turns import common_prefix_length

CHUNK_ROWS = 256  # rows tokenized at once: enough to keep all cores of the tokenizer busy


class Tokenizer:
    """tokenizer.json and the configuration beside it: encodes, decodes, renders conversations.

    Equal to PreTrainedTokenizerFast.from_pretrained. For Llama-2 alone transformers 5 rebuilds the
    pipeline and differs from tokenizer.json in the spaces after special tokens; this follows the
    file, as transformers 4 and others do.
    """

    def __init__(self, directory: str | Path, chat_template: str | None = None):
        self.directory = user_path(directory)
        self.backend, self.special_tokens = load_backend(self.directory)
        self.bos_token = self.special_tokens.get("bos_token")
        self.eos_token = self.special_tokens.get("eos_token")
        self.pad_token = self.special_tokens.get("pad_token")
        self.unk_token = self.special_tokens.get("unk_token")
        ids = {name: self.backend.token_to_id(t) for name, t in self.special_tokens.items()}
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        self.chat_template = chat_template
        self.pictures: Any = None  # set by extras/rows/pictures.py: it then tokenizes the rows
        self.digest = files_digest(self.directory, self.chosen_templates())

    @classmethod
    def load(cls, directory: str | Path, chat_template: str | None = None) -> "Tokenizer":
        """Load the tokenizer of a model directory. Raises DataError where it cannot be used."""
        with explained_types(directory):
            return cls(directory, chat_template)

    def __reduce__(self):
        """Pickle the directory's name, not megabytes of vocabulary: each process loads it once."""
        return loaded_once, (self.directory, self.chat_template), {"pictures": self.pictures}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids; special tokens are those of its own post-processor (mostly a BOS)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Encode many texts, on all cores."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [one.ids for one in encoded]

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        whole = [int(token) for token in ids]
        return self.backend.decode(whole, skip_special_tokens=skip_special_tokens)

    @cached_property
    def templates(self) -> dict[str, str]:
        """{name: source} of the chat templates; "default" is the one that is used."""
        return load_templates(self.directory, self.chat_template)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.templates, self.directory)

    def render(self, messages: list, add_generation_prompt=False, tools=None, **kwargs) -> str:
        """Render a conversation by the template, which sees `kwargs`. Raises DataError."""
        return self.render_all([(messages, add_generation_prompt)], tools=tools, **kwargs)[0]

    def render_all(self, conversations: list[tuple], /, tools=None, **kwargs) -> list[str]:
        """Render [(messages, add_generation_prompt)] by one request to the rendering process."""
        values = {"documents": None, **self.special_tokens, **kwargs, "tools": tools}
        return self.renderer.render(conversations, values)

    def chosen_templates(self) -> dict[str, str] | None:
        """The templates, where the user chose them with --chat_template."""
        return None if self.chat_template is None else self.templates

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files byte for byte; chosen templates replace its own."""
        copy_files(self.directory, Path(directory), self.chosen_templates())


@lru_cache(maxsize=1)
def loaded_once(directory: Path, chat_template: str | None) -> Tokenizer:
    return Tokenizer.load(directory, chat_template)


# From a row to a pair of token ids


class DataOptions(NamedTuple):
    """What changes the token ids of a pair, beside the tokenizer. Lengths in tokens, None: any."""

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"  # or "keep_end"
    need_rejected: bool = True  # False where only chosen is trained on (loss_type sft alone)


class Pair(NamedTuple):
    """One prompt with two completions, as int32 token ids."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    rejected_prompt_ids: np.ndarray | None = None  # None: the same prompt; else two whole sequences
    chosen_rating: float = math.nan  # the row's own score, where it has one
    rejected_rating: float = math.nan
    flags: tuple[str, ...] = ()  # what the report counts
    pictures: tuple = ()  # of extras/rows/pictures.py, in the order of the prompt


def make_pair(ids: list[list[int]], ratings: tuple[float, float], options: DataOptions) -> Pair:
    """Make a pair of the token ids of prompt, prompt + chosen, prompt + rejected: the masking.

    A completion begins at the first token where they differ (TRL's rule). That may be before the
    prompt's end: its last token can merge with the completion's first, and a template can render
    the prompt alone differently.
    """
    head, *wholes = ids
    length = min(common_prefix_length(head, whole) for whole in wholes)
    if any(len(whole) <= max(length, 1) for whole in wholes):
        what = "a completion adds no token that could be scored"
        raise DataError(f"{what}; remove the row, or check the chat template")
    if len(wholes) == 2 and wholes[0] == wholes[1]:
        what = "chosen and rejected are the same tokens"
        raise DataError(f"{what}; there is no preference to learn, remove the row")
    sequences = truncate(head[:length], [whole[length:] for whole in wholes], options)
    flags = {
        "unclean_prefix": length < len(head),
        "truncated": any(len(p) + len(c) < len(w) for (p, c), w in zip(sequences, wholes)),
        "same_after_truncation": len(wholes) == 2 and sequences[0] == sequences[1],
    }
    prompt, chosen = sequences[0]
    other_prompt, rejected = sequences[-1] if options.need_rejected else (prompt, [])
    own_prompt = None if prompt == other_prompt else np.asarray(other_prompt, np.int32)
    return Pair(
        prompt_ids=np.asarray(prompt, np.int32),
        chosen_ids=np.asarray(chosen, np.int32),
        rejected_ids=np.asarray(rejected, np.int32),
        rejected_prompt_ids=own_prompt,
        chosen_rating=ratings[0],
        rejected_rating=ratings[1],
        flags=tuple(name for name, is_so in flags.items() if is_so),
    )


def truncate(prompt: list[int], completions: list[list[int]],
             options: DataOptions) -> list[tuple[list[int], list[int]]]:
    """Return [(prompt, completion)] after max_prompt_length, max_completion_length and max_length.

    max_prompt_length keeps the prompt's last tokens, max_completion_length a completion's first, as
    in TRL 0.18; max_length the first or the last of both together, by truncation_mode. Raises
    DroppedPair.
    """
    keeps_start = options.truncation_mode == "keep_start"
    limit = options.max_length or sys.maxsize
    prompt = prompt[-(options.max_prompt_length or sys.maxsize) :]
    if keeps_start and len(prompt) >= limit:
        raise DroppedPair("the prompt alone fills max_length")
    sequences = []
    for completion in completions:
        whole = prompt + completion[: options.max_completion_length]
        begin = 0 if keeps_start else max(0, len(whole) - limit)
        border = max(begin, len(prompt))
        sequences.append((whole[begin:border], whole[border : begin + limit]))
    if any(len(prompt) + len(completion) < 2 for prompt, completion in sequences):
        raise DroppedPair("truncation leaves nothing to score")
    return sequences


def tokenize_rows(rows: list, tokenizer: Tokenizer, options: DataOptions) -> list[Pair | DataError]:
    """Turn rows into pairs; an error stands in its row's place."""
    if tokenizer.pictures is not None:
        return tokenizer.pictures.tokenize_rows(rows, tokenizer, options)
    render = partial(row_texts, tokenizer=tokenizer, need_rejected=options.need_rejected)
    texts = [row if isinstance(row, DataError) else attempt(render, row) for row in rows]
    return encode_texts(texts, tokenizer, options)


def encode_texts(rows: list[RowTexts | DataError], tokenizer: Tokenizer,
                 options: DataOptions) -> list[Pair | DataError]:
    """Turn texts into pairs by two calls of the tokenizer, which uses all cores in each."""
    outcomes: list = list(rows)
    for special in (True, False):
        sound = [i for i, row in enumerate(rows) if isinstance(row, RowTexts)]
        chosen = [i for i in sound if rows[i].add_special_tokens == special]
        texts = [text for i in chosen for text in rows[i].texts]
        encoded = iter(tokenizer.encode_batch(texts, special))
        for i in chosen:
            ids = list(islice(encoded, len(rows[i].texts)))
            outcomes[i] = attempt(make_pair, ids, rows[i].ratings, options)
    return outcomes


def tokenize_pair(row: dict, tokenizer: Tokenizer, options: DataOptions) -> Pair:
    """Turn one row into a pair. Raises DataError; DroppedPair where truncation leaves nothing."""
    (outcome,) = tokenize_rows([row], tokenizer, options)
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


# The store


class PairStore:
    """All pairs of a data set, in memory-mapped arrays, opened from the directory of `build_store`.

    Raises DataError where the store is damaged.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        meta, arrays = read_store(self.directory)
        self.files = meta["files"]
        self.digest = meta["digest"]  # of the pairs, wherever the rows lay
        self.report = meta["report"]
        self.pictures = meta.get("pictures")  # read by extras/rows/pictures.py
        self.stream = arrays["tokens"]  # (all tokens, 1) pair after pair, each as in a Batch
        self.lengths = arrays["lengths"][:, :3]  # (n, 3) of prompt, chosen, rejected
        self.rejected_prompt_lengths = arrays["lengths"][:, 3]  # (n,) -1: shares the prompt
        self.ratings = arrays["ratings"]  # (n, 2)
        self.places = arrays["places"]  # (n, 2) file, line
        # Kept, though the lengths imply them: opening a store need not sum millions of lengths.
        self.ends = arrays["ends"][:, 0]  # (n,)
        self.tokens = np.diff(self.ends, prepend=0)  # (n,) of the pair in a stream

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Pair:
        begin = self.ends[index] - self.tokens[index]
        ids = np.asarray(self.stream[begin : self.ends[index], 0])
        prompt, chosen, rejected = self.lengths[index].tolist()
        pieces = np.split(ids, [prompt, prompt + chosen, len(ids) - rejected])
        shares_prompt = self.rejected_prompt_lengths[index] < 0
        return Pair(
            prompt_ids=pieces[0],
            chosen_ids=pieces[1],
            rejected_ids=pieces[3],
            rejected_prompt_ids=None if shares_prompt else pieces[2],
            chosen_rating=float(self.ratings[index, 0]),
            rejected_rating=float(self.ratings[index, 1]),
        )

    def where(self, index: int) -> str:
        """Return file and line of a pair, for messages."""
        file, line = self.places[index]
        return f"{self.files[file]}:{line}"

    def prompt_lengths(self, pairs=slice(None)) -> np.ndarray:  # (P, 2)
        """Tokens of the prompt before chosen, and of the one before rejected."""
        prompt = self.lengths[pairs, 0]
        own = self.rejected_prompt_lengths[pairs]
        return np.stack([prompt, np.where(own < 0, prompt, own)], 1)

    def scored_lengths(self, pairs=slice(None)) -> np.ndarray:  # (P, 2)
        """Scored tokens of chosen and rejected: all, or all but the first, without a prompt."""
        unpredicted = self.prompt_lengths(pairs) == 0
        return np.maximum(self.lengths[pairs, 1:] - unpredicted, 0)

    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and completion."""
        return int((self.prompt_lengths() + self.lengths[:, 1:]).max())


def build_store(files: list[Path], tokenizer: Tokenizer, options: DataOptions,
                cache_dir: str | Path, on_bad_row: str = "stop", num_proc: int | None = None,
                progress: Callable[[int], None] | None = None) -> PairStore:
    """Tokenize files into a store inside cache_dir, or open the one of this content and options.

    One process calls this; others open `store.directory`. The tokenizer itself uses all cores, the
    rest one; `num_proc` processes share out all of it. `progress` gets the number of rows done.
    Raises DataError: at the first bad row (on_bad_row "stop"; "skip" counts and lists them), and
    when no pair is left.
    """
    check_options(options)
    assert on_bad_row in ("stop", "skip"), on_bad_row
    work = partial(tokenize_chunk, tokenizer=tokenizer, options=options)
    chunks = read_chunks(files, CHUNK_ROWS)
    tokenized: Iterator[list] = map(work, chunks)  # lazy: nothing is read where the store exists
    if num_proc is not None and num_proc > 1:
        from extras.rows.workers import map_in_processes

        tokenized = map_in_processes(work, chunks, num_proc)
    directory = find_or_write(
        cache_dir=Path(cache_dir),
        files=files,
        recipe=(tokenizer.digest, tuple(options), on_bad_row),
        outcomes=counted(tokenized, progress),
        stop=on_bad_row == "stop",
        pictures=tokenizer.pictures,
    )
    return PairStore(directory)


def tokenize_chunk(chunk: list[tuple], tokenizer: Tokenizer, options: DataOptions) -> list[tuple]:
    """Turn [(place, row)] into [(place, Pair or DataError)]."""
    places = [place for place, _ in chunk]
    rows = [row for _, row in chunk]
    if tokenizer.pictures is not None:
        rows = tokenizer.pictures.open_rows(rows, places)
    return list(zip(places, tokenize_rows(rows, tokenizer, options), strict=True))


# Batches


class Batch(NamedTuple):
    """B pairs as one flat stream of T tokens in S spans, of which N are targets.

    A span attends to its prefix and causally to itself: prompts have no prefix, completions have
    their prompt, a pair whose prompts differ is two spans without prefix. Positions restart after
    the prompt, so that each completion is numbered as if it followed the prompt alone. The pairs of
    TRL's collator example, prompt 1 2 3, chosen 4 5, rejected 6, then prompt 7 8, chosen 9,
    rejected 10 11:

        input_ids     1 2 3 | 4 5 | 6 | 7 8 | 9 | 10 11
        position_ids  0 1 2 | 3 4 | 3 | 0 1 | 2 |  2  3
        spans         (0, 3, 0, 0) (3, 5, 0, 3) (5, 6, 0, 3) (6, 8, 0, 0) (8, 9, 6, 8) (9, 11, 6, 8)
        score_index   2 3 | 2 | 7 | 7 9          the stream position that predicts
        targets       4 5 | 6 | 9 | 10 11        the token that is predicted
        lengths       (2, 1) (1, 2)
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    spans: Tensor  # (S, 4) int32: start, end, prefix_start, prefix_end (0, 0: no prefix)
    score_index: Tensor  # (N,) int64: chosen of pair 0, rejected of pair 0, chosen of pair 1, ...
    targets: Tensor  # (N,) int64
    lengths: Tensor  # (B, 2) int64, scored tokens of chosen and rejected; they sum to N
    pair_ids: Tensor  # (B,) int64, index in the store
    num_tokens: int  # tokens as TRL counts them: the prompt twice, padding never
    ratings: Tensor  # (B, 2) float32, nan where absent
    ref_logps: Tensor | None = None  # (B, 2, 2), set by the trainer
    pictures: Any = None  # what a vision model reads, set by the trainer
    part: Any = None  # of a stream that several ranks share (extras/run/context.py)

    def to(self, device) -> "Batch":
        """Move the batch to a device, but what is read in Python: `spans` and `pair_ids`."""
        stay = ("spans", "pair_ids")
        fields = {k: v for k, v in self._asdict().items() if hasattr(v, "to") and k not in stay}
        return self._replace(**{k: v.to(device, non_blocking=True) for k, v in fields.items()})


class StreamBuilder:
    """A batch in the making: spans are added one after another, as arrays for Batch's fields."""

    def __init__(self):
        self.input_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.spans: list[tuple] = []
        self.score_index: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.size = 0

    def add_span(self, ids: np.ndarray, prefix: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Add tokens that follow a prefix, or none; return where they lie."""
        start = self.size
        self.size += len(ids)
        after = prefix[1] - prefix[0]
        self.input_ids.append(ids)
        self.position_ids.append(np.arange(after, after + len(ids)))
        self.spans.append((start, self.size, *prefix))
        return start, self.size

    def add_targets(self, predicted_by: np.ndarray, targets: np.ndarray) -> None:
        self.score_index.append(predicted_by)
        self.targets.append(targets)
        self.lengths.append(len(targets))

    def add_completion(self, ids: np.ndarray, prompt: tuple[int, int]) -> None:
        """Add a completion that shares its prompt, which lies before it."""
        start, end = self.add_span(ids, prefix=prompt)
        predicted_by = np.arange(start - 1, end - 1)  # each token by the one before it, but
        predicted_by[:1] = prompt[1] - 1  # the first of both completions by the prompt's last
        self.add_targets(predicted_by, ids)

    def add_sequence(self, prompt: np.ndarray, completion: np.ndarray) -> None:
        """Add prompt and completion as one span without prefix."""
        ids = np.concatenate([prompt, completion])
        _, end = self.add_span(ids)
        scored = min(len(completion), len(ids) - 1)  # nothing predicts the very first token
        self.add_targets(np.arange(end - 1 - scored, end - 1), ids[len(ids) - scored :])

    def add_pair(self, pair: Pair, share_prefix: bool) -> None:
        """Add a pair as prompt chosen rejected, or as two whole sequences."""
        if share_prefix and pair.rejected_prompt_ids is None and len(pair.prompt_ids):
            prompt = self.add_span(pair.prompt_ids)
            self.add_completion(pair.chosen_ids, prompt)
            if len(pair.rejected_ids):
                self.add_completion(pair.rejected_ids, prompt)
        else:
            self.add_sequence(pair.prompt_ids, pair.chosen_ids)
            own = pair.rejected_prompt_ids
            if len(pair.rejected_ids):
                self.add_sequence(pair.prompt_ids if own is None else own, pair.rejected_ids)
        if not len(pair.rejected_ids):  # chosen alone is trained on
            self.lengths.append(0)


def collate(pairs: list[Pair], pair_ids=None, share_prefix: bool = True) -> Batch:
    """Lay the pairs into one stream; without share_prefix, each as two whole sequences."""
    if not pairs:
        return empty_batch()
    stream = StreamBuilder()
    for pair in pairs:
        stream.add_pair(pair, share_prefix)
    shared = [p for p in pairs if p.rejected_prompt_ids is None and len(p.rejected_ids)]
    twice = sum(len(pair.prompt_ids) for pair in shared) if share_prefix else 0
    joined = lambda arrays: torch.from_numpy(np.concatenate(arrays).astype(np.int64))
    ids = range(len(pairs)) if pair_ids is None else pair_ids
    ratings = [(pair.chosen_rating, pair.rejected_rating) for pair in pairs]
    return Batch(
        input_ids=joined(stream.input_ids),
        position_ids=joined(stream.position_ids),
        spans=torch.tensor(stream.spans, dtype=torch.int32),
        score_index=joined(stream.score_index),
        targets=joined(stream.targets),
        lengths=torch.tensor(stream.lengths).view(-1, 2),
        pair_ids=torch.as_tensor(np.asarray(ids, np.int64)),
        num_tokens=stream.size + twice,
        ratings=torch.tensor(ratings, dtype=torch.float32),
    )


def empty_batch() -> Batch:
    """Make a stream without targets, for a rank that has no pair left when the others have.

    That rank runs a forward too, since the others would wait for it in DDP and FSDP; with one
    token, since kernels take no empty tensors.
    """
    none = np.zeros(0, np.int32)
    token = Pair(prompt_ids=none, chosen_ids=np.zeros(1, np.int32), rejected_ids=none)
    batch = collate([token])
    no_pair = {name: getattr(batch, name)[:0] for name in ("lengths", "pair_ids", "ratings")}
    return batch._replace(num_tokens=0, **no_pair)


# Order


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the order of n pairs in an epoch: (n,) int64, a function of seed and epoch alone."""
    if not shuffle:
        return np.arange(n)
    # The raw words of Philox are specified; a library's permutation may change with its version,
    # and a resumed run would then see other pairs.
    key = np.array([seed % 2**64, epoch], np.uint64)
    words = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable")


def hold_out(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pairs to train on, pairs to evaluate on) of n pairs, sorted; at least one is held out.

    Which ones follows from an order that no epoch has, since no run reaches epoch 2^32.
    """
    order = epoch_order(n, seed, 2**32, shuffle=True)
    count = max(1, round(fraction * n))
    return np.sort(order[count:]), np.sort(order[:count])


def deal(pairs: np.ndarray, tokens: np.ndarray, world: int) -> list[np.ndarray]:
    """Deal a global batch's pairs to ranks: the largest first, each to who has fewest tokens."""
    if world == 1:
        return [pairs]
    hands: list[list[int]] = [[] for _ in range(world)]
    load = np.zeros(world)
    for at in sorted(range(len(pairs)), key=lambda at: (-tokens[pairs[at]], at)):
        rank = int(load.argmin())
        hands[rank].append(at)
        load[rank] += tokens[pairs[at]]
    return [pairs[np.array(sorted(hand), dtype=np.int64)] for hand in hands]


def micro_batches(order: np.ndarray, tokens: np.ndarray, max_pairs: int,
                  max_tokens: int | None = None) -> list[np.ndarray]:
    """Cut `order` into forwards of at most max_pairs pairs and max_tokens stream tokens each.

    `tokens` are those of every pair of the store. A pair longer than max_tokens stands alone.
    """
    assert max_pairs > 0, f"max_pairs is {max_pairs}"
    batches = []
    begin = 0
    size = 0
    for at, index in enumerate(order):
        too_long = max_tokens is not None and size + tokens[index] > max_tokens
        if at > begin and (too_long or at - begin == max_pairs):
            batches.append(order[begin:at])
            begin = at
            size = 0
        size += int(tokens[index])
    return [*batches, order[begin:]] if len(order) else []


if __name__ == "__main__":
    sys.exit(run_command("extras.view"))
