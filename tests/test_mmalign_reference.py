"""Reference scores: without a graph, without a trace on the policy, and exact from a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.reference import AdaptersOff, Cached, Compute, FrozenCopy, Reference


class Adapted(nn.Module):
    """y = w x + (adapter if it is on)."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.base + self.adapter) if self.on else x * self.base

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True


X = torch.tensor([1.0, 2.0, 3.0])


def double(module: nn.Module) -> Tensor:
    return module(X)  # type: ignore[no-any-return]  # nn.Module's call is untyped


def test_adapters_are_off_for_the_reference_alone() -> None:
    module = Adapted()
    reference = AdaptersOff(module, module.disabled)
    scores = reference.score(["a", "b", "c"], double)
    assert torch.equal(scores, 2 * X)
    assert not scores.requires_grad
    assert torch.equal(double(module), 2.5 * X)
    assert double(module).requires_grad


def test_adapters_are_on_again_after_an_error() -> None:
    module = Adapted()

    def fail(_: nn.Module) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        AdaptersOff(module, module.disabled).score(["a"], fail)
    assert module.on


def test_a_frozen_copy_never_changes_and_runs_under_the_given_precision() -> None:
    module = Adapted()
    copy = Adapted().train()
    reference = FrozenCopy(copy, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    seen = []

    def compute(given: nn.Module) -> Tensor:
        seen.append((given is copy, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return double(given)

    module.base.data.fill_(9.0)
    assert torch.equal(reference.score(["a", "b", "c"], compute), 2.5 * X)
    assert seen == [(True, True, False)]


class Counting:
    """Scores each key by its number; counts the keys it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, keys: list[str], compute: Compute) -> Tensor:
        self.asked += keys
        return compute(nn.Identity())

    def run(self, compute: Compute) -> Tensor:
        return compute(nn.Identity())


def rows(*values: float) -> Compute:
    return lambda _: torch.tensor(values)


def test_a_cache_asks_once_for_each_key(tmp_path: Path) -> None:
    inner = Counting()
    cached = Cached(inner, tmp_path)
    assert isinstance(cached, Reference)
    assert cached.score(["a", "b"], rows(1.0, 2.0)).tolist() == [1, 2]
    assert cached.score(["b", "a"], rows(-1.0, -1.0)).tolist() == [2, 1]  # by key, not by place
    assert cached.score(["b", "c"], rows(2.0, 3.0)).tolist() == [2, 3]  # one is missing: the batch is computed
    assert inner.asked == ["a", "b", "b", "c"]
    assert (cached.hits, cached.misses, len(cached)) == (2, 4, 3)


def test_what_is_run_beside_the_scores_is_never_kept(tmp_path: Path) -> None:
    module = Adapted()
    cached = Cached(AdaptersOff(module, module.disabled), tmp_path)
    assert torch.equal(cached.run(double), 2 * X)
    assert torch.equal(cached.run(lambda given: -double(given)), -2 * X)
    assert (len(cached), cached.hits, cached.misses) == (0, 0, 0)


def test_a_cache_is_kept_bit_for_bit_and_shared_by_processes(tmp_path: Path) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    names = [f"item {index}:é:chosen" for index in range(50)]
    folder = tmp_path / "deep" / "cache"
    first, second = Cached(Counting(), folder, rank=0), Cached(Counting(), folder, rank=1)
    first.score(names[:30], lambda _: values[:30])
    second.score(names[30:], lambda _: values[30:])
    for cached in (first, second):
        cached.save()
        cached.save()  # nothing new
    assert sorted(path.name for path in folder.iterdir()) == ["scores-0000.safetensors", "scores-0001.safetensors"]

    inner = Counting()
    again = Cached(inner, folder, rank=0)
    assert torch.equal(again.score(names, rows()), values)
    assert inner.asked == []
    before = (folder / "scores-0000.safetensors").stat().st_mtime_ns
    again.save()
    assert (folder / "scores-0000.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", [b"", b"half a header", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_cache_is_said_and_made_again(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores-0000.safetensors").write_bytes(damage)
    cached = Cached(Counting(), tmp_path)
    assert "scores-0000.safetensors is damaged and is made again" in capsys.readouterr().err
    assert len(cached) == 0
    cached.score(["a"], rows(1.0))
    cached.save()
    assert len(Cached(Counting(), tmp_path)) == 1


def test_rows_and_keys_that_do_not_match_are_damage(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"scores": torch.ones(3)}, tmp_path / "scores-0000.safetensors", metadata={"keys": '["a"]'})
    assert len(Cached(Counting(), tmp_path)) == 0


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cached = Cached(Counting(), tmp_path / "file")
    cached.score(["a"], rows(1.0))
    with pytest.raises(UserError, match=r"cannot keep the reference scores: .*Free some space or train without"):
        cached.save()
