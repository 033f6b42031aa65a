"""Prepares batches ahead in threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from funmatch.data.loader import Batch, Batches
from funmatch.runtime.timing import timed

S = TypeVar("S")
T = TypeVar("T")


def prefetch(
    batches: Batches, start: int, stop: int, *, workers: int = 1, finish: Callable[[Batch], Batch] | None = None
) -> Generator[Batch]:
    """Yields the batches of steps `start` … `stop` − 1 in order, made ahead by threads.

    Args:
        workers: number of threads; each uses one core.
        finish: applied to each batch in its thread, e.g. a copy into pinned memory.
    """

    def make(step: int) -> Batch:
        with timed("views"):
            batch = batches.batch_at(step)
            return finish(batch) if finish else batch

    return prefetch_map(make, start, stop, workers)


def prefetch_map(compute: Callable[[int], T], start: int, stop: int, workers: int) -> Generator[T]:
    """Yields `compute(start)` … `compute(stop − 1)` in order, computed ahead by threads; see `prefetch_items`."""
    return prefetch_items(compute, range(start, stop), workers)


def prefetch_items(compute: Callable[[S], T], items: Iterable[S], workers: int) -> Generator[T]:
    """Yields `compute(item)` of each item in order, computed ahead by threads.

    Args:
        compute: called in any thread and order; it must not depend on earlier calls.
        items: of any number; taken one by one in the caller's thread.
        workers: number of threads; up to twice as many results wait in memory.
    """
    waiting, pending = iter(items), deque[Future[T]]()
    # One torch thread in each worker: the workers are the parallelism, more threads than cores slow each other down.
    pool = ThreadPoolExecutor(workers, "views", initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending.extend(pool.submit(compute, item) for item in islice(waiting, 2 * workers))
        while pending:
            with timed("waiting for views"):
                result = pending.popleft().result()
            # Submitted before the result is handed over, so that the threads work while the caller uses it.
            pending.extend(pool.submit(compute, item) for item in islice(waiting, 1))
            yield result
    finally:
        # Without waiting: after Ctrl-C nobody needs the batches that are under way.
        pool.shutdown(wait=False, cancel_futures=True)
