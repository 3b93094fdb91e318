"""What the votes say so far: win rates, whether sides matter, whether raters agree, and a ranking of several models.

The unit is a vote; votes on one prompt resemble each other, so every interval goes by prompts. A tie and a "both bad"
count half for each side. Sides are drawn by chance for every rater and pair, so a left share away from one half is a
habit of the raters', not a property of the models; by the same chance it cancels in the win rates.

Agreement is Krippendorff's alpha for nominal data, which takes any number of raters and pairs that not all of them saw:

    alpha = 1 - D_o / D_e        D_o: observed, D_e: expected disagreement of two votes; values: first, second, neither

1 is perfect agreement and 0 is what chance gives. Source: Krippendorff 2011, Computing Krippendorff's Alpha.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.arena.votes import Judgement
from mmalign.errors import UserError
from mmalign.ranking import Ranking, bradley_terry
from mmalign.statistics import Interval, share_interval, sign_test


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One contestant against another.

    Attributes:
        first, second: their names; the win rate is the first one's.
        wins, losses, ties, bad: votes; `bad` are those for neither.
        prompts: how many prompts they are on.
        interval: of the win rate at 95 %; None with one prompt.
        p_value: of the sign test with one vote per prompt.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    bad: int
    prompts: int
    interval: Interval | None
    p_value: float

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties + self.bad

    @property
    def rate(self) -> float:
        """Win rate of the first, ties half."""
        return (self.wins + (self.ties + self.bad) / 2) / self.votes


@dataclass(frozen=True, slots=True, kw_only=True)
class Standings:
    """All of it.

    Attributes:
        contestants: in the order in which they were given.
        left: share of the decided votes that went to the left side, its interval, and how many were decided.
        agreement: Krippendorff's alpha, and the share of equal votes among all pairs of votes on one trial; None where
            no trial has two votes.
        shared: trials with votes of two or more raters.
        ranking: Bradley-Terry with ties, of three contestants or more that votes connect.
        unranked: why there is none, where that needs saying.
        raters: votes by each.
        seconds: the median time of a vote.
    """

    contestants: tuple[str, ...]
    votes: int
    matches: tuple[Match, ...]
    left: tuple[float, Interval | None, int] | None
    agreement: tuple[float, float] | None
    shared: int
    ranking: Ranking | None
    unranked: str | None
    raters: tuple[tuple[str, int], ...]
    seconds: float | None


def standings(judgements: Sequence[Judgement], contestants: Iterable[str] = ()) -> Standings:
    """Standings from votes.

    Args:
        contestants: their order, the base first: a match is a later one against an earlier one. Those that are not
            listed come last.
    """
    names = list(dict.fromkeys([*contestants, *sorted({name for vote in judgements for name in (vote.a, vote.b)})]))
    matches = []
    for base, tuned in itertools.combinations(names, 2):
        votes = [vote for vote in judgements if {vote.a, vote.b} == {base, tuned}]
        if votes:
            matches.append(_match(tuned, base, votes))
    ranking = unranked = None
    if len(names) > 2 and judgements:
        try:
            ranking = bradley_terry(*_games(judgements, names), names=names)
        except UserError as error:
            unranked = error.cause
    decided = [vote for vote in judgements if vote.verdict in ("a", "b")]
    left = [float(vote.verdict == vote.left) for vote in decided]
    return Standings(
        contestants=tuple(names),
        votes=len(judgements),
        matches=tuple(matches),
        left=(sum(left) / len(left), _interval(left, [vote.prompt for vote in decided]), len(left)) if left else None,
        agreement=agreement(judgements),
        shared=sum(count > 1 for count in Counter(vote.trial for vote in judgements).values()),
        ranking=ranking,
        unranked=unranked,
        raters=tuple(Counter(vote.rater for vote in judgements).most_common()),
        seconds=statistics.median(vote.milliseconds for vote in judgements) / 1000 if judgements else None,
    )


def _match(first: str, second: str, votes: Sequence[Judgement]) -> Match:
    scores = [0.5 if vote.verdict in ("tie", "bad") else float(_winner(vote) == first) for vote in votes]
    prompts = [vote.prompt for vote in votes]
    neither = Counter(vote.verdict for vote in votes)
    return Match(
        first=first,
        second=second,
        wins=sum(score == 1.0 for score in scores),
        losses=sum(score == 0.0 for score in scores),
        ties=neither["tie"],
        bad=neither["bad"],
        prompts=len(set(prompts)),
        interval=_interval(scores, prompts),
        p_value=sign_test(np.array(scores) - 0.5, prompts),
    )


def _winner(vote: Judgement) -> str:
    return vote.a if vote.verdict == "a" else vote.b


def _interval(values: Sequence[float], prompts: Sequence[str]) -> Interval | None:
    return share_interval(values, prompts) if len(set(prompts)) > 1 else None


def _games(judgements: Sequence[Judgement], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Wins and ties, [prompts, contestants, contestants]."""
    place = {name: index for index, name in enumerate(names)}
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(vote.prompt for vote in judgements))}
    wins = np.zeros((len(prompts), len(names), len(names)))
    ties = np.zeros_like(wins)
    for vote in judgements:
        games, a, b = prompts[vote.prompt], place[vote.a], place[vote.b]
        if vote.verdict in ("tie", "bad"):
            ties[games, a, b] += 1
            ties[games, b, a] += 1
        else:
            first, second = (a, b) if vote.verdict == "a" else (b, a)
            wins[games, first, second] += 1
    return wins, ties


def agreement(judgements: Sequence[Judgement]) -> tuple[float, float] | None:
    """(Krippendorff's alpha, share of equal votes) over trials with two votes or more; None where there is none."""
    values = ("a", "b", "neither")
    trials: dict[str, Counter[str]] = {}
    for vote in judgements:
        said = vote.verdict if vote.verdict in ("a", "b") else "neither"
        trials.setdefault(vote.trial, Counter())[said] += 1
    shared = [counts for counts in trials.values() if counts.total() > 1]
    if not shared:
        return None
    # coincidences: every ordered pair of votes on a trial, weighted so that a trial counts as often as it has votes
    matrix = np.zeros((3, 3))
    equal = pairs = 0.0
    for counts in shared:
        number = np.array([counts[value] for value in values], dtype=np.float64)
        total = number.sum()
        met = np.outer(number, number) - np.diag(number)
        matrix += met / (total - 1)
        equal += float(np.trace(met))
        pairs += float(met.sum())
    sums, everything = matrix.sum(1), matrix.sum()
    observed = everything - np.trace(matrix)
    expected = (everything**2 - (sums**2).sum()) / (everything - 1)
    alpha = 1.0 if expected == 0 else 1.0 - float(observed / expected)  # all votes alike: nothing to disagree about
    return alpha, equal / pairs


def lines_of(found: Standings) -> list[str]:
    """The standings as lines for a terminal."""
    lines = [f"{_many(found.votes, 'vote')} by {_many(len(found.raters), 'rater')}"]
    for match in found.matches:
        lines.append(
            f"{match.first} against {match.second}: win rate {match.rate:.3f}{_span(match.interval)}, "
            f"p {match.p_value:.2g} ({match.wins} won, {match.losses} lost, {match.ties} ties, {match.bad} both bad; "
            f"{_many(match.prompts, 'prompt')})"
        )
    if found.left is not None:
        share, interval, count = found.left
        lines.append(f"left side chosen in {share:.3f}{_span(interval)} of {_many(count, 'decided vote')}")
    if found.agreement is not None:
        alpha, equal = found.agreement
        shared = _many(found.shared, "shared pair")
        lines.append(f"agreement on {shared}: Krippendorff's alpha {alpha:.2f}, {equal:.0%} of votes equal")
    if found.ranking is not None:
        for index in found.ranking.order:
            low, high = found.ranking.elo_intervals[index]
            place = f"{found.ranking.elo[index]:.0f} [{low:.0f}, {high:.0f}]"
            lines.append(f"{found.contestants[index]}: {place} on the Elo scale (Bradley-Terry)")
    return lines


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _span(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
