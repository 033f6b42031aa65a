"""Computes batches ahead of their use in threads, and shares recent results among several users."""

from collections import deque
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class SharedCache:
    """Keeps the most recent results of expensive calls, for several threads that need the same ones.

    Args:
        size: how many results are kept; the oldest makes way.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.results: dict[Hashable, Future[Any]] = {}
        self.lock = Lock()

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Returns the result stored under a key, computing it on first use.

        Args:
            key: identifies the result.
            compute: called without arguments if the result is missing. Threads that ask meanwhile wait for it.

        Raises:
            whatever `compute` raises, in every thread that asked for this key.
        """
        mine: Future[T] = Future()
        # Only the bookkeeping is under the lock; results of different keys are computed at the same time.
        with self.lock:
            future = self.results.setdefault(key, mine)
            # The oldest first, since dicts keep the order of insertion. Whoever waits for it holds its future.
            while len(self.results) > self.size:
                del self.results[next(iter(self.results))]
        if future is mine:
            try:
                mine.set_result(compute())
            except BaseException as error:
                # Also for KeyboardInterrupt: the threads that wait would wait forever.
                mine.set_exception(error)
                raise
        return future.result()


def prefetch_map(compute: Callable[[int], T], start: int, stop: int, workers: int) -> Generator[T]:
    """Yields `compute(start)` … `compute(stop − 1)` in order, computed ahead by threads.

    Args:
        compute: called with a step's number, in any thread and order; it must not depend on earlier calls.
        start, stop: range of the steps.
        workers: number of threads; up to twice as many results wait in memory.
    """
    pending: deque[Future[T]] = deque()
    # One torch thread in each worker: the workers are the parallelism, more threads than cores slow each other down.
    pool = ThreadPoolExecutor(workers, "views", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for step in range(start, stop):
            if not pending:
                pending.extend(pool.submit(compute, s) for s in range(step, min(step + 2 * workers, stop)))
            result = pending.popleft().result()
            # Submitted before the result is handed over, so that the threads work while the caller uses it.
            following = step + 2 * workers
            if following < stop:
                pending.append(pool.submit(compute, following))
            yield result
    finally:
        # Without waiting: after Ctrl-C nobody needs the batches that are under way.
        pool.shutdown(wait=False, cancel_futures=True)
