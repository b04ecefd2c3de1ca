"""Map a function over chunks of rows in several processes: --dataset_num_proc."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from parts.rows import DataError


def map_in_processes(function: Callable, chunks: Iterator[list], num_proc: int) -> Iterator[list]:
    """Yield function(chunk) of every chunk, in order, with at most 2 num_proc chunks in memory.

    The function is pickled with every chunk, so it should be small. Raises DataError where a
    process dies.
    """
    waiting: deque = deque()
    # spawn: the tokenizer has threads, and a forked copy of a process with threads may hang
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn")) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(function, chunk))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            what = "a tokenizing process died, perhaps out of memory"
            raise DataError(f"{what}; lower --dataset_num_proc") from None
