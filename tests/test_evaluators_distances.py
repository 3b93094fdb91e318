"""Distances of sets against other ways to compute them, and what they must be by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from tiny_scorers import PHOTOS
from torch import Tensor

from evaluators import distances
from evaluators.distances import cmmd, features, fid, gaussian, kid, mmd2, polynomial, vendi
from evaluators.scorer import load
from mmalign.errors import UserError


def draw(seed: int, count: int, width: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return scale * torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + shift


X, Y = draw(0, 300, 8), draw(1, 250, 8, shift=0.7, scale=1.3)


def test_fid_is_the_formula_with_a_matrix_square_root() -> None:
    x, y = X.numpy(), Y.numpy()
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(sx @ sy)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root.real)
    assert fid(X, Y) == pytest.approx(expected, rel=1e-9)
    assert fid(X, X) == pytest.approx(0, abs=1e-9)
    assert fid(Y, X) == pytest.approx(fid(X, Y), rel=1e-9)


def test_fid_of_a_shift_and_of_a_scale_are_known() -> None:
    assert fid(X, X + 2) == pytest.approx(4 * 8)
    centred = X - X.mean(0)
    trace = float(torch.cov(centred.T).trace())
    assert fid(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * trace)
    assert fid(X[:, :1], X[:, :1] + 1) == pytest.approx(1)


def test_fid_holds_when_there_are_fewer_pictures_than_features() -> None:
    few = draw(3, 5, 40)
    assert fid(few, few) == pytest.approx(0, abs=1e-6)
    assert fid(few, few + 1) == pytest.approx(40, rel=1e-6)


def test_kid_is_the_unbiased_formula() -> None:
    kxx, kyy, kxy = ((a @ b.T / 8 + 1) ** 3 for a, b in ((X, X), (Y, Y), (X, Y)))
    n, m = len(X), len(Y)
    within = (kxx.sum() - kxx.trace()) / (n * (n - 1)) + (kyy.sum() - kyy.trace()) / (m * (m - 1))
    assert mmd2(X, Y, polynomial, unbiased=True) == pytest.approx(float(within - 2 * kxy.mean()), rel=1e-12)
    whole = kid(X[:250], Y)
    assert whole.std == 0 and whole.mean == pytest.approx(mmd2(X[:250], Y, polynomial, unbiased=True), rel=1e-9)
    parts = kid(X, Y, subsets=30, size=100, seed=1)
    assert parts == kid(X, Y, subsets=30, size=100, seed=1) != kid(X, Y, subsets=30, size=100, seed=2)
    assert parts.std > 0 and parts.mean == pytest.approx(mmd2(X, Y, polynomial, unbiased=True), rel=0.3)


def test_kid_is_zero_in_the_mean_for_one_distribution_and_the_biased_value_is_not() -> None:
    pairs = [(draw(2 * k, 40, 6), draw(2 * k + 1, 40, 6)) for k in range(60)]
    unbiased = np.array([mmd2(x, y, polynomial, unbiased=True) for x, y in pairs])
    biased = np.array([mmd2(x, y, polynomial, unbiased=False) for x, y in pairs])
    error = unbiased.std() / math.sqrt(len(pairs))
    assert abs(unbiased.mean()) < 3 * error
    assert unbiased.min() < 0 < biased.min() and biased.mean() > 10 * error


def test_cmmd_is_the_biased_formula_on_unit_rows() -> None:
    x, y = (s / s.norm(dim=-1, keepdim=True) for s in (X, Y))

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200).mean())

    assert cmmd(X, Y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6)
    assert cmmd(X, X) == pytest.approx(0, abs=1e-9) and cmmd(X, 5 * X) == pytest.approx(0, abs=1e-9)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 10**6))
def test_cmmd_is_symmetric_and_never_below_zero(n: int, m: int, seed: int) -> None:
    x, y = draw(seed, n, 5), draw(seed + 1, m, 5)
    assert cmmd(x, y) >= 0
    assert cmmd(x, y) == pytest.approx(cmmd(y, x), abs=1e-9)


def test_kernel_sums_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [mmd2(X, Y, kernel, unbiased=unbiased) for kernel in (polynomial, gaussian) for unbiased in (True, False)]
    monkeypatch.setattr(distances, "ROWS", 7)
    cut = [mmd2(X, Y, kernel, unbiased=unbiased) for kernel in (polynomial, gaussian) for unbiased in (True, False)]
    assert cut == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("width", [6, 40])
def test_vendi_counts_different_pictures(width: int) -> None:
    assert vendi(torch.ones(12, width)) == pytest.approx(1)
    assert vendi(torch.eye(width)) == pytest.approx(width)
    assert vendi(torch.eye(width)[[0, 0, 1, 1, 2, 2]] * 7) == pytest.approx(3)
    x = draw(5, 20, width)
    unit = x / x.norm(dim=-1, keepdim=True)
    values = np.linalg.eigvalsh((unit @ unit.T / 20).numpy())
    values = values[values > 1e-12]
    assert vendi(x) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-9)
    assert vendi(x[:1]) == pytest.approx(1)


def test_features_of_any_scorer_will_do() -> None:
    space = load("clip", {"device": "cpu"})
    found = features(space, PHOTOS)  # type: ignore[arg-type]  # CLIP has a feature space
    assert found.shape == (4, 96) and found.dtype == torch.float64
    assert 1 < vendi(found) < 4
    assert fid(found[:2], found[2:]) > 0


def test_sets_that_cannot_be_compared_are_a_line() -> None:
    with pytest.raises(UserError, match="the second set has 1 pictures"):
        fid(X, Y[:1])
    with pytest.raises(UserError, match="features of 8 and of 3 numbers"):
        kid(X, Y[:, :3])
    with pytest.raises(UserError, match="not finite"):
        cmmd(X, Y * math.nan)
    with pytest.raises(UserError, match="needs a picture"):
        vendi(X[:0])
