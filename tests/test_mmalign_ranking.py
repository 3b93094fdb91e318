"""Bradley-Terry with ties: known optima, invariances, intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmalign.errors import UserError
from mmalign.ranking import bradley_terry

TRUE = np.array([0.0, 0.5, 1.2])


def play(generator: np.random.Generator, strengths: np.ndarray, nu: float, games: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(strengths)
    wins, ties = np.zeros((count, count)), np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1, count):
            weights = np.exp([strengths[i], strengths[j], math.log(nu) + (strengths[i] + strengths[j]) / 2])
            won, lost, tied = generator.multinomial(games, weights / weights.sum())
            wins[i, j], wins[j, i] = won, lost
            ties[i, j] = ties[j, i] = tied
    return wins, ties


def test_two_models_without_ties_have_the_log_odds() -> None:
    ranking = bradley_terry([[0, 3000], [1000, 0]])
    assert ranking.strengths[0] - ranking.strengths[1] == pytest.approx(math.log(3), abs=2e-3)
    assert ranking.win_rate(0, 1) == pytest.approx(0.75, abs=1e-3)
    assert ranking.ties == 0 and ranking.games == (4000, 4000) and ranking.order == (0, 1)


def test_ties_between_equals_give_davidsons_parameter() -> None:
    ranking = bradley_terry([[0, 2000], [2000, 0]], [[0, 1000], [1000, 0]])
    assert ranking.strengths == pytest.approx((0, 0), abs=1e-9)
    assert ranking.ties / (2 + ranking.ties) == pytest.approx(0.2, abs=1e-3)


def test_known_strengths_are_found_again() -> None:
    wins, ties = play(np.random.default_rng(0), TRUE, 0.3, 20_000)
    ranking = bradley_terry(wins, ties)
    assert np.array(ranking.strengths) == pytest.approx(TRUE - TRUE.mean(), abs=0.03)
    assert ranking.ties == pytest.approx(0.3, abs=0.01)
    assert sum(ranking.elo) / 3 == pytest.approx(1500)
    assert ranking.elo[2] - ranking.elo[0] == pytest.approx(400 / math.log(10) * 1.2, abs=8)


def test_models_may_come_in_any_order() -> None:
    wins, ties = play(np.random.default_rng(1), TRUE, 0.5, 60)
    order = [2, 0, 1]
    plain, moved = bradley_terry(wins, ties), bradley_terry(wins[order][:, order], ties[order][:, order])
    assert [plain.strengths[i] for i in order] == pytest.approx(moved.strengths)
    assert np.array([plain.intervals[i] for i in order]) == pytest.approx(np.array(moved.intervals))


def test_winning_every_time_is_a_finite_place_with_a_wide_interval() -> None:
    ranking = bradley_terry([[0, 50], [0, 0]])
    low, high = ranking.intervals[0]
    assert 1 < ranking.strengths[0] < 6 and high - low > 2
    clustered = bradley_terry(np.array([[[0, 1], [0, 0]]] * 50))
    assert clustered.intervals[0][1] - clustered.intervals[0][0] >= high - low


def test_intervals_cover_and_clusters_widen_them() -> None:
    generator = np.random.default_rng(2)
    covered = independent = 0
    runs = 300
    for _ in range(runs):
        wins, ties = [], []
        for _ in range(60):  # prompts, on each of which one model or another is at its best
            some = play(generator, TRUE + generator.normal(0, 1.0, 3), 0.3, 4)
            wins.append(some[0])
            ties.append(some[1])
        ranking = bradley_terry(np.array(wins), np.array(ties))
        naive = bradley_terry(np.sum(wins, 0), np.sum(ties, 0))
        # what the mixture's games say when there are very many of them
        low, high = ranking.intervals[2]
        covered += low <= MARGINAL <= high
        low, high = naive.intervals[2]
        independent += low <= MARGINAL <= high
    assert 0.92 <= covered / runs <= 0.98
    assert independent / runs < covered / runs - 0.05


def marginal() -> float:
    """Strength of the last model where the strengths differ from prompt to prompt, from very many prompts."""
    generator = np.random.default_rng(3)
    strengths = TRUE + generator.normal(0, 1.0, (200_000, 3))
    wins, ties = np.zeros((3, 3)), np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            if i != j:
                gap = (strengths[:, i] - strengths[:, j]) / 2
                total = np.exp(gap) + np.exp(-gap) + 0.3
                wins[i, j] = (np.exp(gap) / total).sum()
                ties[i, j] = (0.3 / total).sum()
    return bradley_terry(wins, (ties + ties.T) / 2).strengths[2]


MARGINAL = marginal()


def test_what_cannot_be_ranked_is_one_line() -> None:
    wins = np.zeros((3, 3))
    wins[0, 1] = 5
    with pytest.raises(UserError, match="nothing connects tuned with base"):
        bradley_terry(wins, names=["base", "other", "tuned"])
    with pytest.raises(UserError, match="nothing to rank"):
        bradley_terry([[0]])
    with pytest.raises(ValueError, match="symmetric"):
        bradley_terry(np.zeros((2, 2)), [[0, 1], [0, 0]])
    with pytest.raises(ValueError, match="same models"):
        bradley_terry(np.zeros((2, 3)))
