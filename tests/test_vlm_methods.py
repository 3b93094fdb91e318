"""Losses of the vision-language methods against the specification's vectors and their limits, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign import losses
from mmalign.errors import UserError
from vlm.batch import Row
from vlm.comparison import Comparison, ComparisonOptions
from vlm.conversations import Conversation
from vlm.methods import mdpo, povid, realign_rdpo, rrpo, tdpo
from vlm.parts import Pair, PairBatch, Parts

# lp of chosen and rejected under policy and reference, tokens of each; beta 0.1 (so z = 1.5)
POLICY, REFERENCE, COUNTS = (-20.0, -24.0), (-21.0, -23.5), (10, 8)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def pair_loss(loss: Mapping[str, Any], *, lengths: str = "sum", gap: float | None = None) -> float:
    """The golden pair through the comparison that every method uses."""
    options = ComparisonOptions.model_validate({"loss": dict(loss), "lengths": lengths})
    comparison = Comparison(options)
    batch = PairBatch(
        views={"chosen": (), "rejected": ()},
        device=torch.device("cpu"),
        gap=None if gap is None else torch.tensor([gap], dtype=torch.float64),
    )
    policy, counts = column(*POLICY), torch.tensor(COUNTS)[:, None]
    rewards = comparison.rewards(policy, column(*REFERENCE), counts)
    return float(comparison.loss(batch, rewards[0], rewards[1], policy, counts))


@pytest.mark.parametrize(
    ("loss", "lengths", "gap", "expected"),
    [
        ({"sigmoid": 1.0}, "sum", None, 0.620957),
        ({"conservative": {"flip_rate": 0.1}}, "sum", None, 0.635957),
        ({"robust": {"flip_rate": 0.1}}, "sum", None, 0.602207),
        ({"hinge": 1.0}, "sum", None, 0.85),
        ({"ipo": {"tau": 0.1}}, "mean", None, 23.401406),
        ({"ipo": {"tau": 0.1}}, "sum", None, 12.25),
        ({"exo": {"flip_rate": 1e-3}}, "sum", None, 2.505517),
        ({"sigmoid": 1.0}, "mean", None, 0.685055),
        ({"length": {"alpha": 0.05}}, "sum", None, 0.575939),
        ({"sigmoid": 1.0, "sft": 1.0}, "sum", None, 2.620957),
        ({"offset": 1.0}, "sum", 0.2, 0.718460),
    ],
)
def test_golden_pair(loss: Mapping[str, Any], lengths: str, gap: float | None, expected: float) -> None:
    assert abs(pair_loss(loss, lengths=lengths, gap=gap) - expected) < 1e-6


def test_golden_pair_without_a_reference() -> None:
    simpo = losses.sigmoid(2.0 * (column(-2.0) - column(-3.0))[0] - 1.0)  # beta 2, gamma 1
    assert abs(float(simpo) - 0.313262) < 1e-6
    cpo = losses.sigmoid(0.1 * (column(-20.0) - column(-24.0))[0])
    assert abs(float(cpo) - 0.513015) < 1e-6
    assert abs(float(losses.odds_ratio(column(-2.0)[0], column(-3.0)[0])) - 0.288751) < 1e-6


class Fixed:
    """Scores of given numbers: what a method does with log-probs, without a model."""

    def __init__(self, policy: Tensor, reference: Tensor, counts: Tensor) -> None:
        self._policy, self._reference, self.counts = policy, reference, counts

    def policy(self, also: object = None) -> Tensor:
        return self._policy

    def reference(self) -> Tensor:
        return self._reference[0]

    def reference_also(self, also: object) -> Tensor:
        return self._reference


def of_method(module: Any, monkeypatch: pytest.MonkeyPatch, policy: Tensor, reference: Tensor, **options: Any) -> float:
    """The method's loss on fixed log-probs [kinds, views, 1]."""
    fixed = Fixed(policy, reference, torch.full((policy.shape[1], 1), 10))
    monkeypatch.setattr(module, "Scores", lambda *given: fixed)
    given = module.Options.model_validate(options)
    parts = Parts.__new__(Parts)  # no model: nothing else of them is asked for
    object.__setattr__(parts, "exact_reference", True)
    method = module.build(given, parts)
    batch = PairBatch(views={"chosen": ()}, device=torch.device("cpu"))
    if module is povid:
        monkeypatch.setattr(method, given.form, lambda _: (fixed, policy[0], reference[0]))
    (loss, _), *more = method.losses(batch)
    assert not more
    return float(loss)


THREE = torch.stack([column(-20.0, -24.0, -26.0)]), torch.stack([column(-21.0, -23.5, -25.0)])
NOISED = torch.stack([column(-20.0, -24.0, -22.0)]), torch.stack([column(-21.0, -23.5, -22.5)])


def test_vectors_with_a_third_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(of_method(mdpo, monkeypatch, *THREE) - 1.863493) < 1e-6
    assert abs(of_method(realign_rdpo, monkeypatch, *THREE) - 1.219096) < 1e-6
    assert abs(of_method(povid, monkeypatch, *NOISED, form="authors") - 0.644708) < 1e-6
    assert abs(of_method(povid, monkeypatch, *NOISED, form="paper") - 0.644397) < 1e-6
    # without their extra terms they are DPO
    assert abs(of_method(mdpo, monkeypatch, *THREE, picture_weight=0.0, anchor_weight=0.0) - 0.620957) < 1e-6
    assert abs(of_method(realign_rdpo, monkeypatch, *THREE, picture_weight=0.0) - 0.620957) < 1e-6


def test_equal_models_cost_log_two_a_term(monkeypatch: pytest.MonkeyPatch) -> None:
    same = THREE[0], THREE[0]
    assert of_method(realign_rdpo, monkeypatch, *same) == pytest.approx(2 * math.log(2))
    assert of_method(mdpo, monkeypatch, *same) == pytest.approx(3 * math.log(2))
    for form in ("paper", "authors"):
        assert of_method(povid, monkeypatch, *same, form=form) == pytest.approx(math.log(2))


def test_provably_robust_dpo_is_unbiased() -> None:
    z = torch.linspace(-4, 4, 9, dtype=torch.float64)
    for rate in (0.0, 0.1, 0.4):
        mixed = (1 - rate) * losses.robust(z, flip_rate=rate) + rate * losses.robust(-z, flip_rate=rate)
        torch.testing.assert_close(mixed, losses.sigmoid(z))
    z.requires_grad_(True)
    losses.robust(z, flip_rate=0.1).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, -(torch.sigmoid(-z.detach()) + 0.1 / 0.8))


def test_odds_keep_their_digits_near_certainty() -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for value in (-1e-12, -1e-6, -0.1, -0.6931, -0.6932, -5.0, -40.0):
        x = Decimal(value)
        odds = x - (1 - x.exp()).ln()
        zero = torch.tensor([math.log(0.5)], dtype=torch.float64)  # whose odds are 1
        found = losses.odds_ratio(torch.tensor([value], dtype=torch.float64), zero)
        expected = math.log1p(math.exp(-float(odds)))
        assert float(found) == pytest.approx(expected, rel=1e-9)
    assert torch.isfinite(losses.odds_ratio(torch.zeros(1), torch.tensor([-1.0]))).all()


def test_exo_is_the_reverse_divergence() -> None:
    h = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    found = losses.exo(h, flip_rate=0.2)
    p = torch.sigmoid(h.detach())
    expected = p * (p / 0.8).log() + (1 - p) * ((1 - p) / 0.2).log()
    torch.testing.assert_close(found.detach(), expected)
    best = torch.tensor([math.log(4.0)], dtype=torch.float64, requires_grad=True)  # sigmoid = 0.8
    losses.exo(best, flip_rate=0.2).sum().backward()
    assert best.grad is not None and abs(float(best.grad)) < 1e-12
    with pytest.raises(UserError, match="flip_rate"):
        losses.exo(h, flip_rate=0.0)


class Tokens:
    """Scores of given numbers per token."""

    def __init__(self, *compared: Tensor) -> None:
        self._compared = compared

    def compared(self) -> tuple[Tensor, ...]:
        return self._compared


def answer(*ids: int) -> Row:
    """A row of a beginning and these answer tokens."""
    whole = torch.tensor([1, 2, 3, *ids])
    return Row(ids=whole, completion=torch.arange(len(whole)) >= 3, images=(), place="row")


def of_tokens(module: Any, monkeypatch: pytest.MonkeyPatch, batch: PairBatch, *compared: Tensor, **options: Any) -> Any:
    """(loss, metrics) of the method from each token's log-probs and divergence, [views, pairs, answer]."""
    monkeypatch.setattr(module, "Scores", lambda *given: Tokens(*compared))
    parts = Parts.__new__(Parts)
    object.__setattr__(parts, "exact_reference", True)
    ((loss, metrics),) = module.build(module.Options.model_validate(options), parts).losses(batch)
    return loss, metrics


def words(chosen: Row, rejected: Row) -> PairBatch:
    return PairBatch(views={"chosen": (chosen,), "rejected": (rejected,)}, device=torch.device("cpu"))


def spread(*sums: float) -> Tensor:
    """Answers of two tokens each with these sums, unevenly."""
    return torch.tensor([[[0.25 * one, 0.75 * one]] for one in sums], dtype=torch.float64)


def test_vectors_with_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = words(answer(5, 6), answer(7, 8))
    compared = spread(*POLICY), spread(*REFERENCE), spread(0.8, 1.1)

    def loss(module: Any, **options: Any) -> float:
        return float(of_tokens(module, monkeypatch, batch, *compared, **options)[0])

    assert abs(loss(tdpo, form="tdpo1") - 0.634946) < 1e-6
    assert abs(loss(tdpo, form="tdpo2", alpha=1.0) - 0.634946) < 1e-6
    assert abs(loss(tdpo) - math.log1p(math.exp(-0.15 + 0.5 * 0.03))) < 1e-9
    assert abs(loss(rrpo) - 0.628957) < 1e-6
    # without their extra terms, and with every token in a phrase, they are DPO
    assert abs(loss(tdpo, alpha=0.0) - 0.620957) < 1e-6
    assert abs(loss(rrpo, alpha=0.0) - 0.620957) < 1e-6
    _, metrics = of_tokens(rrpo, monkeypatch, batch, *compared)
    assert float(metrics["rewards/margins"]) == pytest.approx(0.15)
    assert float(metrics["kl/chosen"]) == pytest.approx(0.8)


def test_only_phrases_that_differ_are_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    # two pairs: a word replaced in the middle, and words that only the rejected answer has; answers are padded to 6
    chosen = (answer(10, 11, 12, 13), answer(10, 11))
    rejected = (answer(10, 20, 21, 12, 13), answer(10, 30, 31, 32, 33, 11))
    batch = PairBatch(views={"chosen": chosen, "rejected": rejected}, device=torch.device("cpu"))
    marked = torch.tensor([[[0, 1, 0, 0, 0, 0], [0] * 6], [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]]).bool()
    assert torch.equal(rrpo.differing(batch, 1), marked)
    policy, reference = (torch.randn(2, 2, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    kl = torch.rand(2, 2, 6, generator=generator, dtype=torch.float64)
    policy.requires_grad_(True)
    kl.requires_grad_(True)
    loss, _ = of_tokens(rrpo, monkeypatch, batch, policy, reference, kl, alpha=0.3, beta=0.5)
    loss.backward()
    expected = 0.0
    ratios = (policy - reference).detach()
    for pair in range(2):
        reward = [sum(float(ratios[side, pair, t]) for t in range(6) if marked[side, pair, t]) for side in range(2)]
        drift = sum(float(kl[0, pair, t].detach()) for t in range(6))
        expected += math.log1p(math.exp(-0.5 * (reward[0] - reward[1]))) + 0.3 * drift
    assert float(loss.detach()) == pytest.approx(expected / 2, rel=1e-12)
    assert policy.grad is not None and kl.grad is not None
    assert torch.equal(policy.grad != 0, marked)  # what both say is left alone
    assert (kl.grad[0] == 0.15).all() and not kl.grad[1].any()


@pytest.mark.parametrize(
    ("chosen", "rejected", "agreement", "marks"),
    [
        ("abcd", "abcd", 1, ("....", "....")),
        ("abcd", "wxyz", 1, ("####", "####")),
        ("abXcd", "abcd", 1, ("..#..", "....")),
        ("abXaYcd", "abVaWcd", 1, ("..#.#..", "..#.#..")),
        ("abXaYcd", "abVaWcd", 2, ("..###..", "..###..")),
        ("yes.", "no.", 2, ("####", "###")),
    ],
)
def test_phrases_of_two_answers(chosen: str, rejected: str, agreement: int, marks: tuple[str, str]) -> None:
    found = rrpo.phrases([ord(c) for c in chosen], [ord(c) for c in rejected], agreement)
    assert tuple("".join(".#"[mark] for mark in side) for side in found) == marks


def test_frequent_tokens_of_long_answers_align_too() -> None:
    common = [1, 2, 1, 3] * 80  # difflib by itself takes what is frequent in 200 tokens and more for noise
    one, other = rrpo.phrases([*common, 7, *common], [*common, 8, *common], 1)
    assert one == other and one.count(True) == 1 and one[len(common)]


def test_what_divergences_cannot_do_is_one_line() -> None:
    said = Conversation(messages=(), images=(), answer="the same", place="row 7")
    parts = Parts.__new__(Parts)
    for module in (tdpo, rrpo):
        object.__setattr__(parts, "exact_reference", False)
        with pytest.raises(UserError, match=r"over the vocabulary, which its cache does not keep \(reference.cache\)"):
            module.build(module.Options(), parts)
    object.__setattr__(parts, "exact_reference", True)
    with pytest.raises(UserError, match=r"both answers have the same words.* \(row 7\)"):
        rrpo.build(rrpo.Options(), parts).views(Pair(chosen=said, rejected=said, seed=0))
