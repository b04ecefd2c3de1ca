"""Tokenizing in several processes."""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache

from data import DataError, DataOptions, Outcome, Tokenizer, tokenize_chunk

load = lru_cache(maxsize=1)(Tokenizer.load)  # once per process


def work(chunk: list, directory, chat_template: str | None, options: DataOptions) -> list[Outcome]:
    return tokenize_chunk(chunk, load(directory, chat_template), options)


def tokenize_in_workers(
    chunks: Iterator[list], tokenizer: Tokenizer, options: DataOptions, num_proc: int
) -> Iterator[list[Outcome]]:
    """tokenize_chunk of every chunk, in order, with at most 2 num_proc chunks in memory."""
    waiting: deque = deque()
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn")) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk, tokenizer.directory, tokenizer.chat_template, options))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a tokenizing process died, perhaps for want of memory; lower --dataset_num_proc") from None
