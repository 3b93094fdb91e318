"""What scorers are trained by and judged by, against numbers that come from elsewhere."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evaluators import accuracy
from evaluators.calibration import calibration, log_loss, temperature
from evaluators.methods import pickscore
from evaluators.training.data import PictureBatch
from evaluators.training.objectives import _Gather, among, gather, picked, plackett_luce
from evaluators.training.parts import Parts

DOUBLE = torch.float64


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


# --------------------------------------------------------------------------------------------- PickScore


def test_picked_at_its_closed_forms() -> None:
    margin, sure = doubles(0, 0, math.log(3), 2), doubles(1, 0.5, 0.75, 1)
    expected = doubles(math.log(2), 0, 0, math.log1p(math.exp(-2)))
    torch.testing.assert_close(picked(margin, sure), expected, rtol=0, atol=1e-12)


def test_picked_is_the_authors_on_their_labels() -> None:
    """Written with the softmax and the constant of clip_criterion.py, on labels 1, 0 and 1/2."""
    logits = torch.randn(9, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * 3
    label = doubles(1, 0, 0.5).repeat(3)
    log_softmax = logits.log_softmax(-1)
    theirs = -(label * log_softmax[:, 0] + (1 - label) * log_softmax[:, 1])
    theirs = theirs + (label == 0.5).double() * math.log(0.5)
    torch.testing.assert_close(picked(logits[:, 0] - logits[:, 1], label), theirs, rtol=0, atol=1e-12)


def test_picked_is_a_divergence_with_the_right_slope() -> None:
    margin = doubles(-1.5, 0.2, 3).requires_grad_()
    sure = doubles(0.9, 0.3, 0.6)
    model = torch.stack([torch.sigmoid(margin), torch.sigmoid(-margin)], -1)
    label = torch.stack([sure, 1 - sure], -1)
    torch.testing.assert_close(
        picked(margin, sure), functional.kl_div(model.log(), label, reduction="none").sum(-1), rtol=0, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda h: picked(h, sure), margin)
    (slope,) = torch.autograd.grad(picked(margin, sure).sum(), margin)
    torch.testing.assert_close(slope, torch.sigmoid(margin.detach()) - sure)


# ------------------------------------------------------------------------------------------------ rankings


def ranking(order: tuple[int, ...]) -> Tensor:
    """All (better, worse) pairs of an order, best first."""
    return torch.tensor(list(itertools.combinations(order, 2)))


def test_rankings_are_a_distribution() -> None:
    scores = doubles(0.3, -1.2, 2.0, 0.9)
    total = 0.0
    for order in itertools.permutations(range(4)):
        pairs = ranking(order)
        loss = plackett_luce(scores, pairs, torch.ones(len(pairs), dtype=torch.bool))
        weights = scores.exp()
        by_hand = math.prod(float(weights[i] / weights[list(order[k:])].sum()) for k, i in enumerate(order))
        assert math.exp(-loss.sum().item()) == pytest.approx(by_hand, rel=1e-12)
        assert loss[order[-1]] == 0  # the last beats none
        total += by_hand
    assert total == pytest.approx(1)


def test_a_ranking_of_two_is_bradley_and_terrys() -> None:
    scores = doubles(0.4, 1.7)
    loss = plackett_luce(scores, torch.tensor([[1, 0]]), torch.tensor([True]))
    assert loss.tolist() == pytest.approx([0, math.log1p(math.exp(0.4 - 1.7))])


def test_ties_and_other_prompts_do_not_compete() -> None:
    scores = doubles(0.4, 1.7, -0.3, 5)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    loss = plackett_luce(scores, pairs, torch.tensor([False, True, True]))
    expected = [math.log1p(math.exp(-0.7)), math.log1p(math.exp(-2)), 0, 0]
    assert loss.tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ negatives


def test_texts_are_found_among_all_but_their_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = functional.normalize(torch.randn(3, 8, dtype=DOUBLE, generator=generator), dim=-1)
    pictures = functional.normalize(torch.randn(4, 8, dtype=DOUBLE, generator=generator), dim=-1)
    owner, scale = torch.tensor([0, 0, 1, 2]), doubles(5)[0]
    found = among(pictures, texts, scale, owner)
    for row in range(4):
        logits = [5 * float(pictures[row] @ texts[k]) for k in range(3)]
        own = int(owner[row])
        assert found[row].item() == pytest.approx(math.log(sum(map(math.exp, logits))) - logits[own])
    left_out = torch.zeros(4, 3, dtype=torch.bool)
    left_out[0, 1] = True
    kept = among(pictures, texts, scale, owner, left_out)
    logits = [5 * float(pictures[0] @ texts[k]) for k in (0, 2)]
    assert kept[0].item() == pytest.approx(math.log(sum(map(math.exp, logits))) - logits[0])
    assert kept[3] == found[3]


class Fixed(torch.nn.Module):
    """A model whose vectors are given."""

    def __init__(self, texts: Tensor, pictures: Tensor, scale: float) -> None:
        super().__init__()
        self.texts, self.pictures, self.scale = texts, pictures, doubles(scale)[0]

    def forward(self, tokens: Tensor, pixels: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = self.scale * (self.texts[owner] * self.pictures).sum(-1)
        return scores, self.texts, self.pictures, self.scale


def batch_of_pairs(tokens: list[int], labels: Tensor, counts: Tensor) -> PictureBatch:
    """Pictures 2 i and 2 i + 1 belong to text i."""
    count = len(tokens)
    return PictureBatch(
        prompts=tuple(map(str, tokens)),
        tokens=torch.tensor(tokens)[:, None],
        pixels=torch.zeros(2 * count, 3, 1, 1),
        owner=torch.arange(2 * count) // 2,
        pairs=torch.arange(2 * count).reshape(count, 2),
        confidence=labels,
        gap=None,
        counts=counts,
    )


def pickscore_loss(batch: PictureBatch, model: Fixed, **options: Any) -> float:
    parts = Parts(module=model, head=False, ties=False, mean_weight=lambda weighted: 0.4 if weighted else 1.0)
    method = pickscore.build(pickscore.Options(**options), parts)
    return next(iter(method.losses(batch)))[0].item()


def test_in_batch_negatives_as_the_authors_have_them() -> None:
    """Written out pair by pair from clip_criterion.py's loss: every picture and text of the batch competes."""
    generator = torch.Generator().manual_seed(1)
    texts, pictures = (
        functional.normalize(torch.randn(rows, 8, dtype=DOUBLE, generator=generator), dim=-1) for rows in (3, 6)
    )
    labels, counts = doubles(1, 0.5, 1), doubles(1, 4, 2)
    batch, model = batch_of_pairs([1, 2, 1], labels, counts), Fixed(texts, pictures, 4.0)
    cosines = 4 * texts @ pictures.T  # [texts, pictures]
    to_picture, to_text = -cosines.log_softmax(1), -cosines.log_softmax(0)
    total, weights = 0.0, (1 / counts / (1 / counts).sum()).tolist()
    for i in range(3):
        p, own = labels[i].item(), (2 * i, 2 * i + 1)
        text = p * to_picture[i, own[0]] + (1 - p) * to_picture[i, own[1]] + (math.log(0.5) if p == 0.5 else 0)
        image = p * to_text[i, own[0]] + (1 - p) * to_text[i, own[1]]
        total += weights[i] * (text + image).item() / 2
    # theirs takes log 2 off the text's half of a tie; the divergence does as much, halved with the rest
    assert pickscore_loss(batch, model, in_batch_negatives=True, compat="pickscore") == pytest.approx(total, abs=1e-12)


def test_equal_prompts_are_no_negatives() -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = functional.normalize(torch.randn(8, 8, dtype=DOUBLE, generator=generator), dim=-1)
    ones, counts = doubles(1, 1), doubles(2, 2)
    alike = batch_of_pairs([7, 7], ones, counts)
    model = Fixed(vectors[[0, 0]], vectors[2:6], 4.0)
    plain = pickscore_loss(alike, model) * 2  # nothing but the pairs is left; each picture's only text is its own
    assert pickscore_loss(alike, model, in_batch_negatives=True) == pytest.approx(plain / 4, abs=1e-12)
    apart = batch_of_pairs([7, 8], ones, counts)
    assert pickscore_loss(apart, model, in_batch_negatives=True) > plain / 4


def test_prompts_weigh_the_same_over_the_data_or_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = functional.normalize(torch.randn(9, 8, dtype=DOUBLE, generator=generator), dim=-1)
    model = Fixed(vectors[:3], vectors[3:], 4.0)
    batch = batch_of_pairs([1, 2, 3], doubles(1, 1, 0.5), doubles(1, 4, 2))
    each = picked(model(batch.tokens, batch.pixels, batch.owner)[0].reshape(3, 2) @ doubles(1, -1), batch.confidence)
    assert pickscore_loss(batch, model, prompt_weights=False) == pytest.approx(each.mean().item())
    of_data = (each * doubles(1, 0.25, 0.5)).sum().item() / 0.4 / 3
    assert pickscore_loss(batch, model) == pytest.approx(of_data)
    of_batch = (each * doubles(1, 0.25, 0.5)).sum().item() / 1.75
    assert pickscore_loss(batch, model, compat="pickscore") == pytest.approx(of_batch)


def test_one_process_gathers_its_own() -> None:
    rows = torch.randn(2, 3)
    gathered, first = gather(rows)
    assert gathered is rows and first == 0


def test_gradients_of_others_are_added_to_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    grad = torch.arange(6.0).reshape(3, 2)
    own, _ = _Gather.backward(SimpleNamespace(sizes=[1, 2]), grad)
    assert own.tolist() == [[4, 6], [8, 10]]
    assert grad.tolist() == [[0, 1], [2, 3], [4, 5]]  # autograd may hand the same tensor to somebody else


# ------------------------------------------------------------------------------------------------- accuracy

MARGINS = np.array([2.0, -1.0, 0.0, 0.1, 3.0, -0.05])
LABELS = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 1.0])
PROMPTS = ["a", "a", "a", "a", "b", "b"]


def test_three_accuracies_of_the_same_scores() -> None:
    assert accuracy.strict(MARGINS, LABELS, PROMPTS).value == 1 / 4
    assert accuracy.rank(MARGINS, LABELS, PROMPTS).value == pytest.approx((2 / 3 + 0) / 2)
    # sigmoid(h) - sigmoid(-h): 0.762, -0.462, 0, 0.05, 0.905, -0.025
    without = accuracy.pickscore(MARGINS, LABELS, PROMPTS, 0.0)
    assert without.value == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.5 + 0) / 6)  # equal scores are a tie
    with_ties = accuracy.pickscore(MARGINS, LABELS, PROMPTS, 0.1)
    assert with_ties.value == pytest.approx((1 + 0 + 0.5 + 1 + 0.5 + 0.5) / 6)
    each = accuracy.pickscore(MARGINS, LABELS, PROMPTS, np.array([0.1, 0.1, 0.1, 0.0, 0.1, 0.0]))
    assert each.value == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.5 + 0) / 6)


def test_the_threshold_is_the_one_with_most_right() -> None:
    assert accuracy.tie_threshold(MARGINS, np.ones(6)) == 0
    fits = accuracy.tie_threshold(MARGINS, LABELS)
    tried = {k / 10: accuracy.pickscore(MARGINS, LABELS, PROMPTS, k / 10).value for k in range(11)}
    assert tried[round(fits, 1)] == max(tried.values())
    assert all(value < tried[round(fits, 1)] for threshold, value in tried.items() if threshold < fits - 1e-9)


def test_intervals_keep_prompts_together() -> None:
    generator = np.random.default_rng(0)
    groups = [str(k // 20) for k in range(400)]
    margins = np.repeat(generator.choice([-1.0, 1.0], 20), 20)  # a prompt is all right or all wrong
    apart = accuracy.strict(margins, np.ones(400), [str(k) for k in range(400)]).ci95
    together = accuracy.strict(margins, np.ones(400), groups).ci95
    assert apart is not None and together is not None
    assert together[1] - together[0] > 3 * (apart[1] - apart[0])
    assert accuracy.strict(np.ones(2), np.ones(2), ["a", "a"]).ci95 is None


# ---------------------------------------------------------------------------------------------- calibration


def test_true_probabilities_are_calibrated_and_too_sure_ones_are_not() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0, 2, 40_000)
    wins = generator.random(40_000) < 1 / (1 + np.exp(-margins))
    signed = np.where(wins, margins, -margins)  # of the preferred picture minus the other
    true = calibration(signed, np.ones(40_000))
    assert true.ece < 0.01 and true.temperature == pytest.approx(1, abs=0.03)
    sure = calibration(3 * signed, np.ones(40_000))
    assert sure.ece > 0.05 and sure.temperature == pytest.approx(3, abs=0.1)
    assert sure.log_loss > true.log_loss and sure.brier > true.brier
    assert sum(one.pairs for one in true.bins) == 40_000 and len(true.bins) == 10
    assert [one.sure for one in true.bins] == sorted(one.sure for one in true.bins)


def test_log_loss_and_brier_by_hand() -> None:
    margins, sure = np.array([0.0, math.log(3), -math.log(3)]), np.array([1.0, 1.0, 0.75])
    expected = [math.log(2), -math.log(0.75), -0.75 * math.log(0.25) - 0.25 * math.log(0.75)]
    assert log_loss(margins, sure) == pytest.approx(np.mean(expected))
    assert calibration(margins, sure).brier == pytest.approx((0.25 + 0.0625 + 0.25) / 3)


def test_what_is_always_right_cannot_be_too_sure() -> None:
    assert temperature(np.array([1.0, 900.0]), np.ones(2)) == pytest.approx(0.01)
    assert temperature(np.array([-1.0, -900.0]), np.ones(2)) == pytest.approx(100)
    assert calibration(np.array([900.0, -900.0]), np.ones(2)).log_loss == pytest.approx(450)
