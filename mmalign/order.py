"""Which items each update trains on: a pure function of the update's number, so that resuming needs nothing but it.

Items come in groups that can share a batch (one picture size each). Every epoch shuffles each group, cuts it into
updates of equal size and shuffles those; a group's last update is filled from its beginning.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pick:
    """An item to train on, and how often it was picked before: together the key of its random draws."""

    item: int
    visit: int


class Order:
    """The picks of every update.

    Args:
        groups: items by group; each item in one group, no group empty.
        per_update: items in an update, over all processes and accumulated forwards.
        seed: of the shuffles.
    """

    def __init__(self, groups: Sequence[Sequence[int]], per_update: int, seed: int) -> None:
        if not groups or not all(groups) or per_update < 1:
            raise ValueError("an order needs items and at least one item per update")
        self._groups = [np.asarray(group) for group in groups]
        self._per_update, self._seed = per_update, seed
        self._copies = max(math.ceil(self._chunks(len(group)) * per_update / len(group)) for group in groups)
        self.updates_per_epoch = sum(self._chunks(len(group)) for group in groups)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def update(self, number: int) -> list[Pick]:
        """The picks of one update, in the order in which forwards and processes take them."""
        epoch, chunk = divmod(number, self.updates_per_epoch)
        return self._epoch(epoch)[chunk]

    def _chunks(self, size: int) -> int:
        return math.ceil(size / self._per_update)

    def _shuffled(self, epoch: int) -> list[list[Pick]]:
        generator = np.random.default_rng([self._seed, 3, epoch])
        updates = []
        for group in self._groups:
            order = generator.permutation(len(group))
            for chunk in range(self._chunks(len(group))):
                places = np.arange(chunk * self._per_update, (chunk + 1) * self._per_update)
                copies, places = np.divmod(places, len(group))
                visits = epoch * self._copies + copies
                items = group[order[places]]
                updates.append([Pick(int(i), int(v)) for i, v in zip(items, visits, strict=True)])
        return [updates[index] for index in generator.permutation(len(updates))]


def share(picks: Sequence[T], *, forward: int, rank: int, world: int, batch_size: int) -> list[T]:
    """The picks of one forward on one process. Over all forwards and processes every pick is taken once."""
    start = (forward * world + rank) * batch_size
    return list(picks[start : start + batch_size])
