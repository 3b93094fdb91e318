"""Draws that belong to an item, not to a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.randomness import Draws, key_seed


def test_seeds_are_the_same_on_every_machine() -> None:
    assert key_seed("noise", 0, "item:3") == 1497791119505393474
    assert 0 <= key_seed() < 2**63


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers() | st.text(), max_size=4),
    st.lists(st.integers() | st.text(), max_size=4),
)
def test_different_keys_have_different_seeds(one: list[int | str], other: list[int | str]) -> None:
    assert (key_seed(*one) == key_seed(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), ("1",)),
        (("a", "b"), ("ab",)),
        (("a", ""), ("a",)),
        ((1, 2), (12,)),
        (("a\x1fstr:b",), ("a", "b")),
        (("a\x1f", "b"), ("a", "\x1fb")),
        (("a\x1f\x1fstr:b",), ("a\x1f", "b")),
    ],
)
def test_keys_that_look_alike_are_different(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert key_seed(*one) != key_seed(*other)


def draw(seeds: list[int]) -> list[torch.Tensor]:
    draws = Draws(seeds)
    return [draws.normal([2, 3]), draws.uniform(), draws.integers(1000), draws.normal([4])]


def test_an_item_draws_the_same_alone_and_in_any_batch() -> None:
    batch = draw([7, 8, 9])
    for row, seed in enumerate([7, 8, 9]):
        for together, alone in zip(batch, draw([seed]), strict=True):
            assert torch.equal(together[row], alone[0])
    for forwards, backwards in zip(batch, draw([9, 8, 7]), strict=True):
        assert torch.equal(forwards.flip(0), backwards)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw([3])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, draw([3])))


def test_draws_have_the_promised_distributions() -> None:
    draws = Draws(list(range(4000)))
    assert len(draws) == 4000
    normal, uniform, integers = draws.normal([8]), draws.uniform(), draws.integers(5)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02
    assert abs(uniform.mean() - 0.5) < 0.02 and uniform.min() >= 0 and uniform.max() < 1
    counts = torch.bincount(integers, minlength=5)
    assert len(counts) == 5 and counts.min() > 700
    assert (normal.dtype, integers.dtype) == (torch.float32, torch.int64)
