"""Encoding in several processes: texts go in and ids come out in the same order, with a bounded number on the way."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Protocol, TypeVar

import numpy as np

from minillm.config import UserError


class HasText(Protocol):
    @property
    def text(self) -> str: ...


T = TypeVar("T", bound=HasText)
Encode = Callable[[list[str]], list[list[int]]]


def encoded(
    batches: Iterable[list[T]], encode: Encode, workers: int
) -> Iterator[tuple[list[T], list[np.ndarray] | ValueError]]:
    """(batch, the ids of its texts) in order; what `encode` raises as ValueError comes in place of the ids.

    Args:
        workers: processes, each with its own copy of `encode`, which must be picklable then. 1: this process.

    Raises `UserError` where one of the processes has died.
    """
    if workers == 1:
        for batch in batches:
            yield batch, _encode(encode, [item.text for item in batch])
        return
    # Spawned, not forked: a fork copies the locks of threads that it does not copy, and can wait for them for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker) as pool:
        waiting: deque = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, encode, [item.text for item in batch])))
                if len(waiting) > 2 * workers:
                    first, ids = waiting.popleft()
                    yield first, ids.result()
            while waiting:
                first, ids = waiting.popleft()
                yield first, ids.result()
        except BrokenProcessPool:
            raise UserError(
                f"one of {workers} tokenizing processes has died, perhaps for want of memory; take fewer of them "
                "(--workers 1, in training --data.workers 1)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _encode(encode: Encode, texts: list[str]) -> list[np.ndarray] | ValueError:
    try:
        return [np.array(ids, np.int32) for ids in encode(texts)]
    except ValueError as error:
        return ValueError(str(error))  # the error's own class need not be picklable


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone answers it
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:  # a parent killed by SIGKILL cannot stop its workers
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
