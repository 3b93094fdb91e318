"""Work done a little early, in a thread of its own: data is read while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # results that wait


def ahead(make: Callable[[T], R], wanted: Iterator[T]) -> Iterator[R]:
    """`make` of all that is wanted, in order; an error comes when its turn does."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming: deque[Future[R]] = deque()
        for one in wanted:
            coming.append(pool.submit(make, one))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
