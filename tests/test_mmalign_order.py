"""Which items an update trains on: a pure function of its number, every item once an epoch, whatever the cut."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.order import Order, Pick, share

GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def grouped(sizes: list[int]) -> list[list[int]]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 6), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_takes_every_item_and_never_mixes_groups(
    sizes: list[int], per_update: int, seed: int, epoch: int
) -> None:
    groups = grouped(sizes)
    order = Order(groups, per_update, seed)
    updates = [order.update(epoch * order.updates_per_epoch + n) for n in range(order.updates_per_epoch)]
    taken = Counter(pick.item for picks in updates for pick in picks)
    for group in groups:
        counts = [taken[item] for item in group]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1  # filling up takes nobody twice before all were taken
    for picks in updates:
        assert len(picks) == per_update
        assert sum(any(pick.item in group for pick in picks) for group in groups) == 1


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.integers(1, 6), st.integers(0, 3))
def test_no_item_is_ever_visited_twice_under_one_number(sizes: list[int], per_update: int, seed: int) -> None:
    order = Order(grouped(sizes), per_update, seed)
    picks = [pick for number in range(4 * order.updates_per_epoch) for pick in order.update(number)]
    assert len(set(picks)) == len(picks)


def test_an_update_depends_on_its_number_and_the_seed_alone() -> None:
    first, second = (Order(grouped([5, 3]), 2, seed=1) for _ in range(2))
    forwards = [first.update(number) for number in range(20)]
    assert [second.update(number) for number in reversed(range(20))] == forwards[::-1]
    assert forwards != [Order(grouped([5, 3]), 2, seed=2).update(number) for number in range(20)]


def test_epochs_differ_and_mix_the_groups() -> None:
    order = Order(grouped([8, 8]), 2, seed=0)
    epochs = [[order.update(epoch * 8 + n) for n in range(8)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    of_first_group = ["".join("ab"[picks[0].item >= 8] for picks in epoch) for epoch in epochs]
    assert any(text not in ("aaaabbbb", "bbbbaaaa") for text in of_first_group)


def test_one_item_fills_an_update_with_visits_of_its_own() -> None:
    order = Order([[0]], 3, seed=0)
    assert order.update(0) == [Pick(0, 0), Pick(0, 1), Pick(0, 2)]
    assert order.update(1) == [Pick(0, 3), Pick(0, 4), Pick(0, 5)]


@pytest.mark.parametrize(
    ("world", "accumulation", "batch_size"), [(1, 1, 8), (1, 8, 1), (2, 4, 1), (2, 1, 4), (4, 2, 1)]
)
def test_forwards_and_processes_share_the_picks_of_an_update(world: int, accumulation: int, batch_size: int) -> None:
    picks = [Pick(item, 0) for item in range(8)]
    shares = [
        share(picks, forward=forward, rank=rank, world=world, batch_size=batch_size)
        for forward in range(accumulation)
        for rank in range(world)
    ]
    assert [pick for part in shares for pick in part] == picks


@pytest.mark.parametrize(("groups", "per_update"), [([], 1), ([[0], []], 1), ([[0]], 0)])
def test_nothing_to_order(groups: list[list[int]], per_update: int) -> None:
    with pytest.raises(ValueError, match="an order needs items"):
        Order(groups, per_update, 0)
