"""Makes things ahead of their use in threads, and keeps the latest for several users."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


class SharedCache:
    """The last things that were made, for those who ask for the same a little later; from several threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.things: dict[Any, Future] = {}
        self.lock = Lock()

    def __call__(self, name: Any, make: Callable[[], Made]) -> Made:
        """What was made by this name, or what `make` makes; who asks while it is made waits."""
        mine: Future = Future()
        with self.lock:
            found = self.things.setdefault(name, mine)
            while len(self.things) > self.most:
                del self.things[next(iter(self.things))]
        if found is mine:
            try:
                mine.set_result(make())
            except BaseException as error:
                mine.set_exception(error)
                raise
        return found.result()


def prefetch_map(make: Callable[[int], Made], start: int, stop: int, workers: int) -> Generator[Made]:
    """`make(start)` … `make(stop − 1)` in order, made ahead by threads."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers, "views", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for step in range(start, stop):
            if not waiting:
                waiting.extend(pool.submit(make, s) for s in range(step, min(step + 2 * workers, stop)))
            made = waiting.popleft().result()
            following = step + 2 * workers
            if following < stop:
                waiting.append(pool.submit(make, following))
            yield made
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
