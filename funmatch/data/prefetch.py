"""Prepares batches ahead in threads."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from funmatch.data.loader import Batch, Batches
from funmatch.runtime.timing import timed

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
            with timed("waiting for views"):
                result = pending.popleft().result()
            # Submitted before the result is handed over, so that the threads work while the caller uses it.
            following = step + 2 * workers
            if following < stop:
                pending.append(pool.submit(compute, following))
            yield result
    finally:
        # Without waiting: after Ctrl-C nobody needs the batches that are under way.
        pool.shutdown(wait=False, cancel_futures=True)
