"""Losses against published vectors, hand arithmetic, finite differences and the identities between them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign import losses
from mmalign.errors import UserError
from mmalign.losses import PairTerms, weighted_sum

LOG2 = math.log(2)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-6) -> None:
    """Agreement to `tolerance`: absolute up to 1 in size, relative above."""
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    excess = (actual - expected).abs() - tolerance * expected.abs().clamp(min=1)
    assert excess.max() <= 0, f"{actual.tolist()} against {expected.tolist()}"


# The errors that the diffusion vectors share: per-image means of squared errors.
CHOSEN, REJECTED = f64(0.1000, 0.2000, 0.3000, 0.0500), f64(0.1204, 0.1800, 0.3000, 0.0890)
REF_CHOSEN, REF_REJECTED = f64(0.1002, 0.1998, 0.3001, 0.0500), f64(0.1202, 0.1801, 0.2998, 0.0889)


def margins(beta: float, convention: str = "mean_half") -> Tensor:
    scale = losses.logit_scale(beta, convention, 16384)
    chosen = losses.implicit_rewards(CHOSEN, REF_CHOSEN, scale)
    return chosen - losses.implicit_rewards(REJECTED, REF_REJECTED, scale)


MARGIN = f64(-3.0, -1.0, -0.2, 0.0, 0.4, 1.3, 5.0)  # away from the kink of the hinge at 1
PAIRWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": losses.sigmoid,
    "soft": lambda h: losses.soft(h, torch.full_like(h, 0.7)),
    "smoothed": lambda h: losses.smoothed(h, torch.full_like(h, 0.7), strength=3.0),
    "conservative": lambda h: losses.conservative(h, flip_rate=0.1),
    "robust": lambda h: losses.robust(h, flip_rate=0.1),
    "exo": lambda h: losses.exo(h, flip_rate=0.2),
    "offset": lambda h: losses.offset(h, torch.full_like(h, 0.6), strength=2.0),
    "length": lambda h: losses.length(h, torch.full_like(h, -3.0), alpha=0.1),
    "ipo": lambda h: losses.ipo(h, 2.0, tau=0.8),
    "hinge": losses.hinge,
    "reward_difference": lambda h: losses.reward_difference(h, torch.full_like(h, 0.6), temperature=0.3),
}


class TestScale:
    def test_conventions_put_a_published_beta_on_one_scale(self) -> None:
        assert losses.logit_scale(5000.0, "mean_half") == 2500.0
        assert losses.logit_scale(2500.0, "mean") == 2500.0
        assert losses.logit_scale(2500.0 / 16384, "sum", 16384) == pytest.approx(2500.0, rel=1e-12)

    @pytest.mark.parametrize(
        ("beta", "elements", "as_sum"),
        [
            (5000.0, 16384, 0.15259),
            (2000.0, 16384, 0.06104),
            (5000.0, 65536, 0.03815),
            (5000.0, 262144, 0.00954),
        ],
    )
    def test_equivalents_match_the_published_conversions(self, beta: float, elements: int, as_sum: float) -> None:
        found = losses.equivalents(losses.logit_scale(beta, "mean_half"), elements)
        assert found["mean_half"] == beta
        assert found["mean"] == beta / 2
        assert found["sum"] == pytest.approx(as_sum, abs=5e-6)

    @pytest.mark.parametrize("convention", ["mean_half", "mean", "sum"])
    def test_equivalents_invert_logit_scale(self, convention: str) -> None:
        beta = losses.equivalents(731.5, 4096)[convention]
        assert losses.logit_scale(beta, convention, 4096) == pytest.approx(731.5, rel=1e-12)

    def test_sum_and_mean_reduction_give_identical_logits(self) -> None:
        difference = torch.randn(5, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        reference = torch.zeros(5, dtype=torch.float64)
        by_mean = losses.implicit_rewards(difference.square().flatten(1).mean(1), reference, 2500.0)
        beta = losses.equivalents(2500.0, 256)["sum"]
        by_sum = losses.implicit_rewards(difference.square().flatten(1).sum(1), reference, beta)
        close(by_sum, by_mean, 1e-12)

    def test_a_mistyped_convention_names_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"Unknown beta convention 'mean_haf'.*Did you mean 'mean_half'"):
            losses.logit_scale(5000.0, "mean_haf")

    @pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
    def test_an_impossible_beta_is_refused(self, beta: float) -> None:
        with pytest.raises(UserError, match="beta is"):
            losses.logit_scale(beta, "mean")

    def test_sum_needs_the_number_of_elements(self) -> None:
        with pytest.raises(ValueError, match="number of latent elements"):
            losses.logit_scale(1.0, "sum")

    def test_policy_equal_to_reference_has_reward_exactly_zero(self) -> None:
        errors = torch.rand(8)
        assert torch.equal(losses.implicit_rewards(errors, errors.clone(), 2500.0), torch.zeros(8))

    def test_a_better_prediction_than_the_reference_is_a_positive_reward(self) -> None:
        close(losses.implicit_rewards(f64(0.1, 0.3), f64(0.2, 0.1), 10.0), f64(1.0, -2.0))


class TestDiffusionVectors:
    """Vectors T1, T2, ... computed independently from the formulas in the authors' code and papers."""

    def test_t1_diffusion_dpo(self) -> None:
        h = margins(5000.0)
        close(h, f64(1, -0.75, 0.75, 0.25))
        loss = losses.sigmoid(h)
        close(loss, f64(0.3132616875, 1.136871006, 0.3868710061, 0.5759394199))
        close(loss.mean(), 0.6032357799)
        assert losses.accuracy(h).mean() == 0.75

    def test_t1_gradient_with_respect_to_the_errors(self) -> None:
        chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
        rewards = (
            losses.implicit_rewards(chosen, REF_CHOSEN, 2500.0),
            losses.implicit_rewards(rejected, REF_REJECTED, 2500.0),
        )
        losses.sigmoid(rewards[0] - rewards[1]).mean().backward()
        expected = f64(168.0883884, 424.486687, 200.513313, 273.6396869)
        assert chosen.grad is not None and rejected.grad is not None
        close(chosen.grad, expected)
        close(rejected.grad, -expected)

    def test_t2_beta_2000(self) -> None:
        close(margins(2000.0), f64(0.4, -0.3, 0.3, 0.1))
        close(losses.sigmoid(margins(2000.0)).mean(), 0.6415306004)

    def test_t3_the_mean_is_taken_after_the_logarithm(self) -> None:
        misplaced = losses.sigmoid(margins(5000.0).mean(0, keepdim=True))
        close(misplaced, f64(0.5490548623))
        assert abs(losses.sigmoid(margins(5000.0)).mean() - misplaced) > 0.05

    def test_t4_other_conventions_and_losses(self) -> None:
        h = margins(2500.0, "mean")
        assert torch.equal(h, margins(5000.0))
        close(losses.hinge(h).mean(), 0.6875)
        raw = losses.ipo(h, 2500.0, tau=2500.0)
        close(raw.mean() / 7.75e-8, 1.0)  # relative: the value itself is below the absolute tolerance
        close(raw.mean() * 2500.0**2, 0.484375)

    def test_t5_label_noise(self) -> None:
        close(losses.conservative(margins(5000.0), flip_rate=0.1).mean(), 0.6344857799)
        close(losses.robust(margins(5000.0), flip_rate=0.1).mean(), 0.5641732799)

    def test_t7_kto(self) -> None:
        errors, reference = f64(0.1, 0.2, 0.3, 0.05), f64(0.1004, 0.1997, 0.3001, 0.0506)
        desirable = torch.tensor([True, False, True, False])
        for beta, expected in [(5000.0, 0.4620140026), (1000.0, 0.4878433798)]:
            rewards = losses.implicit_rewards(errors, reference, losses.logit_scale(beta, "mean"))
            baseline = losses.kto_baseline(rewards)
            close(baseline / beta, 2e-4, 1e-9)
            close(losses.kto(rewards, desirable, baseline).mean(), expected)
            if beta == 5000.0:
                utility = f64(0.7310585786, 0.92414182, 0.3775406688, 0.119202922)
                close(1 - losses.kto(rewards, desirable, baseline), utility)
                close(losses.kto(rewards, desirable, baseline, utility="loss_averse").mean(), 1.8732891043)
                close(losses.kto(rewards, desirable, baseline, utility="risk_seeking").mean(), -0.1232891043)

    def test_t10_drawn_labels_with_the_sft_anchor(self) -> None:
        terms = PairTerms(margin=margins(1.0, "mean"), scale=1.0, confidence=f64(1, 0, 1, 1), chosen_errors=CHOSEN)
        close(weighted_sum({"soft": 1.0})(terms).mean(), 0.693009691497)
        close(weighted_sum({"soft": 1.0, "sft": 1.0})(terms).mean(), 0.855509691497)

    def test_t14_ddpo(self) -> None:
        log_ratio = f64(-1.0001, -0.9998, -1.0) - f64(-1.0, -1.0, -1.0)
        loss = losses.policy_gradient(log_ratio, f64(1.5, -7, 0.3), clip=1e-4)
        close(loss.mean(), 1.0670500308, 1e-9)

    def test_t11_pso_dreambooth(self) -> None:
        close(losses.sigmoid(margins(200.0, "mean")).mean(), 0.6810845933)
        loser_cancels = losses.hinge(-5 * (CHOSEN - 0.1 * REJECTED)) + 0.5 * REJECTED
        close(loser_cancels.mean(), 1.8125)
        close(loser_cancels, 1 + 5 * CHOSEN)


class TestLanguageVectors:
    """Log-probs -20, -24 (reference -21, -23.5) over 10 and 8 tokens, beta 0.1: log-ratios 1 and -0.5."""

    H = f64(0.15)
    H_PER_TOKEN = f64(0.1 * (1 / 10 + 0.5 / 8))

    @pytest.mark.parametrize(
        ("margin", "expected"),
        [
            pytest.param(0.15, 0.620957, id="dpo"),
            pytest.param(0.1 * (1 / 10 + 0.5 / 8), 0.685055, id="length-normalised"),
            pytest.param(2 * (-2 + 3) - 1, 0.313262, id="simpo beta 2 gamma 1"),
            pytest.param(0.1 * (-20 + 24), 0.513015, id="cpo, reference-free"),
            pytest.param(0.15 + 0.05 * (10 - 8), 0.575939, id="length-penalised alpha 0.05"),
            pytest.param(0.15 - 0.2, 0.718460, id="offset 0.2"),
            pytest.param(0.1 * (4 - 2.5), 0.620957, id="reference margin 2.5"),
            pytest.param(0.1 * (4 + 2.5 - 2.5), 0.513015, id="optimistic reference only: hypo"),
            pytest.param(0.1 * (4 + 2.5), 0.420055, id="reference margin -2.5"),
            pytest.param(0.1 * 1 - 0.05 * -0.5 - 0.05 * 0.5, 0.644397, id="povid, paper form"),
        ],
    )
    def test_sigmoid(self, margin: float, expected: float) -> None:
        close(losses.sigmoid(f64(margin)), f64(expected))

    def test_other_losses(self) -> None:
        close(losses.conservative(self.H, flip_rate=0.1), f64(0.635957))
        close(losses.robust(self.H, flip_rate=0.1), f64(0.602207))
        close(losses.hinge(self.H), f64(0.85))
        close(losses.ipo(self.H, 0.1, tau=0.1), f64(12.25))
        close(losses.ipo(self.H_PER_TOKEN, 0.1, tau=0.1), f64(23.401406))

    def test_sums_of_losses(self) -> None:
        nll = PairTerms(margin=self.H, scale=0.1, chosen_errors=f64(20 / 10))
        close(weighted_sum({"sigmoid": 1.0, "sft": 1.0})(nll), f64(2.620957))  # iterative-reasoning RPO, alpha 1
        image_margin = f64(0.1 * ((-20 + 26) - (-21 + 25)))
        close(losses.sigmoid(self.H) + losses.sigmoid(image_margin), f64(1.219096))  # DPO + vDPO
        anchor = losses.sigmoid(f64(0.1 * 1))
        close(losses.sigmoid(self.H) + losses.sigmoid(image_margin) + anchor, f64(1.863493))  # mDPO
        noisy_margin = f64(0.1 * ((-20 + 22) - (-21 + 22.5)))
        close(0.5 * losses.sigmoid(noisy_margin) + 0.5 * losses.sigmoid(self.H), f64(0.644708))  # POVID, code

    def test_losses_with_a_divergence(self) -> None:
        chosen, rejected = f64(0.8), f64(1.1)
        close(losses.tdpo1(self.H, chosen, rejected, 0.1), f64(0.634946))
        close(
            losses.tdpo2(self.H, chosen, rejected, 0.1, alpha=0.5), f64(math.log1p(math.exp(-0.15 + 0.5 * 0.1 * 0.3)))
        )
        close(losses.rrpo(self.H, chosen, alpha=0.01), f64(0.628957))

    def test_values_where_policy_equals_reference(self) -> None:
        zero = f64(0.0)
        close(losses.sigmoid(zero), f64(LOG2))
        close(losses.hinge(zero), f64(1.0))
        close(losses.ipo(zero, 0.1, tau=0.1), f64(1 / (4 * 0.1**2)))
        close(losses.tdpo1(zero, zero, zero, 0.1), f64(LOG2))
        close(losses.tdpo2(zero, zero, zero, 0.1, alpha=0.5), f64(LOG2))
        close(losses.rrpo(zero, zero, alpha=0.01), f64(LOG2))
        for desirable in (True, False):
            close(losses.kto(zero, torch.tensor([desirable]), torch.zeros((), dtype=torch.float64)), f64(0.5))


class TestIdentities:
    @pytest.mark.parametrize("name", sorted(PAIRWISE))
    def test_autograd_agrees_with_finite_differences(self, name: str) -> None:
        assert torch.autograd.gradcheck(PAIRWISE[name], MARGIN.clone().requires_grad_())

    def test_divergences_move_the_margin_and_which_of_them_are_learnt(self) -> None:
        chosen, rejected = MARGIN.square(), 0.5 + MARGIN.abs()
        given = tuple(t.clone().requires_grad_() for t in (MARGIN, chosen, rejected))
        # TDPO2's chosen divergence is a constant, which finite differences would not know
        assert torch.autograd.gradcheck(lambda h, w, r: losses.tdpo1(h, w, r, 0.7), given)
        assert torch.autograd.gradcheck(lambda h, r: losses.tdpo2(h, chosen, r, 0.7, alpha=0.3), (given[0], given[2]))
        assert torch.autograd.gradcheck(lambda h, w: losses.rrpo(h, w, alpha=0.3), given[:2])
        losses.tdpo2(*given, 0.7, alpha=0.3).sum().backward()
        assert given[1].grad is None
        margin, _, drift = (t.grad for t in given)
        assert margin is not None and drift is not None
        close(drift, -0.3 * 0.7 * margin, 1e-12)
        assert torch.equal(losses.tdpo2(MARGIN, chosen, rejected, 0.7, alpha=0.0), losses.sigmoid(MARGIN))
        assert torch.equal(losses.rrpo(MARGIN, chosen, alpha=0.0), losses.sigmoid(MARGIN))
        whole = losses.tdpo2(MARGIN, chosen, rejected, 0.7, alpha=1.0)
        close(whole, losses.tdpo1(MARGIN, chosen, rejected, 0.7), 1e-12)

    def test_label_certainty_is_dpo(self) -> None:
        dpo = losses.sigmoid(MARGIN)
        assert torch.equal(losses.conservative(MARGIN, flip_rate=0.0), dpo)
        assert torch.equal(losses.robust(MARGIN, flip_rate=0.0), dpo)
        assert torch.equal(losses.soft(MARGIN, torch.ones_like(MARGIN)), dpo)
        assert torch.equal(losses.soft(MARGIN, torch.zeros_like(MARGIN)), losses.sigmoid(-MARGIN))

    def test_smoothing_scales_the_margin_by_how_sure_the_label_is(self) -> None:
        # p = softmax of two normalised scores 0.9 and 0.4, constant 10, h = 0.03: as SmPO's code has it
        p = math.exp(0.9) / (math.exp(0.9) + math.exp(0.4))
        expected = math.log1p(math.exp(-10 * (2 * p - 1) * 0.03))
        close(losses.smoothed(f64(0.03), f64(p)), f64(expected), 1e-12)
        assert torch.equal(losses.smoothed(MARGIN, torch.ones_like(MARGIN), strength=1.0), losses.sigmoid(MARGIN))
        assert torch.equal(losses.smoothed(MARGIN, torch.zeros_like(MARGIN), strength=1.0), losses.sigmoid(-MARGIN))
        tie = losses.smoothed(MARGIN, torch.full_like(MARGIN, 0.5))
        close(tie, torch.full_like(MARGIN, math.log(2)), 1e-12)
        with pytest.raises(UserError, match="strength is 0"):
            losses.smoothed(MARGIN, torch.ones_like(MARGIN), strength=0.0)

    def test_conservative_is_a_soft_label_of_one_minus_the_flip_rate(self) -> None:
        close(
            losses.conservative(MARGIN, flip_rate=0.2),
            losses.soft(MARGIN, torch.full_like(MARGIN, 0.8)),
            1e-12,
        )

    def test_a_soft_label_of_one_half_does_not_know_the_sides(self) -> None:
        half = torch.full_like(MARGIN, 0.5)
        close(losses.soft(MARGIN, half), losses.soft(-MARGIN, half), 1e-12)
        margin = f64(0.0).requires_grad_()
        losses.soft(margin, f64(0.5)).sum().backward()
        assert margin.grad is not None and margin.grad.item() == 0

    def test_swapping_the_sides_negates_the_margin_and_its_gradient(self) -> None:
        def gradient(chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor], p: float) -> Tensor:
            policy = chosen[0].clone().requires_grad_()
            rewards = losses.implicit_rewards(policy, chosen[1], 2500.0)
            margin = rewards - losses.implicit_rewards(rejected[0], rejected[1], 2500.0)
            losses.soft(margin, torch.full_like(margin, p)).sum().backward()
            assert policy.grad is not None
            return policy.grad

        # DPO on (w, l) and the certain soft label 0 on (l, w) are the same statement about the first image.
        first, second = (CHOSEN, REF_CHOSEN), (REJECTED, REF_REJECTED)
        close(gradient(first, second, 1.0), -2500.0 * -torch.sigmoid(-margins(5000.0)))
        close(gradient(second, first, 0.0), -2500.0 * torch.sigmoid(-margins(5000.0)))

    def test_the_difference_of_the_loss_and_its_swap_is_the_margin(self) -> None:
        close(losses.sigmoid(-MARGIN) - losses.sigmoid(MARGIN), MARGIN, 1e-12)

    def test_sigmoid_gradient_is_minus_the_probability_of_being_wrong(self) -> None:
        margin = MARGIN.clone().requires_grad_()
        losses.sigmoid(margin).sum().backward()
        assert margin.grad is not None
        close(margin.grad, -torch.sigmoid(-MARGIN), 1e-12)

    def test_robust_is_unbiased_under_its_flip_rate(self) -> None:
        for rate in (0.05, 0.1, 0.3, 0.45):
            clean = (1 - rate) * losses.robust(MARGIN, flip_rate=rate)
            flipped = rate * losses.robust(-MARGIN, flip_rate=rate)
            close(clean + flipped, losses.sigmoid(MARGIN), 1e-9)

    @pytest.mark.parametrize(
        ("loss", "minimum"),
        [
            pytest.param(PAIRWISE["conservative"], math.log(0.9 / 0.1), id="conservative: sigmoid(h) = 1 - f"),
            pytest.param(PAIRWISE["soft"], math.log(0.7 / 0.3), id="soft: sigmoid(h) = p"),
            pytest.param(PAIRWISE["exo"], math.log(0.8 / 0.2), id="exo: sigmoid(h) = 1 - f"),
            pytest.param(PAIRWISE["ipo"], 2.0 / (2 * 0.8), id="ipo: h / k = 1 / (2 tau)"),
            pytest.param(PAIRWISE["reward_difference"], 0.6 / 0.3, id="reward difference: h = gap / temperature"),
        ],
    )
    def test_the_gradient_vanishes_at_the_stated_minimum_and_changes_sign(
        self, loss: Callable[[Tensor], Tensor], minimum: float
    ) -> None:
        margin = f64(minimum - 0.1, minimum, minimum + 0.1).requires_grad_()
        loss(margin).sum().backward()
        assert margin.grad is not None
        below, at, above = margin.grad.tolist()
        assert below < 0 < above
        assert abs(at) < 1e-12

    def test_hinge_stops_at_one(self) -> None:
        margin = f64(-2.0, 0.5, 1.5).requires_grad_()
        losses.hinge(margin).sum().backward()
        assert margin.grad is not None
        close(margin.grad, f64(-1.0, -1.0, 0.0))

    def test_reward_difference_with_target_one_half_is_scaled_ipo(self) -> None:
        close(
            losses.reward_difference(MARGIN, torch.full_like(MARGIN, 0.5)),
            losses.ipo(MARGIN, 2.0, tau=2.0) * 2.0**2,
            1e-12,
        )

    @pytest.mark.parametrize("name", sorted(PAIRWISE))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_margins_stay_finite_with_their_gradients(self, name: str, dtype: torch.dtype) -> None:
        margin = torch.tensor([-1e6, -1e4, -100.0, 100.0, 1e4, 1e6], dtype=dtype, requires_grad=True)
        loss = PAIRWISE[name](margin)
        assert loss.dtype == dtype
        assert loss.isfinite().all()
        loss.sum().backward()
        assert margin.grad is not None and margin.grad.isfinite().all()

    def test_a_lost_pair_still_pulls_with_full_strength(self) -> None:
        margin = torch.tensor([-1e4], requires_grad=True)
        loss = losses.sigmoid(margin)
        loss.sum().backward()
        close(loss, [1e4])
        assert margin.grad is not None and margin.grad.item() == -1.0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", sorted(PAIRWISE))
    def test_dtype_is_kept(self, name: str, dtype: torch.dtype) -> None:
        assert PAIRWISE[name](MARGIN.to(dtype)).dtype == dtype

    @pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0, math.nan])
    def test_an_impossible_flip_rate_is_refused(self, rate: float) -> None:
        for loss in (losses.conservative, losses.robust):
            with pytest.raises(UserError, match="flip_rate is"):
                loss(MARGIN, flip_rate=rate)

    def test_impossible_strengths_are_refused(self) -> None:
        with pytest.raises(UserError, match="tau is 0"):
            losses.ipo(MARGIN, 1.0, tau=0.0)
        with pytest.raises(UserError, match="temperature is -1"):
            losses.reward_difference(MARGIN, MARGIN, temperature=-1.0)


class TestKTO:
    REWARDS = f64(1.2, -0.4, 0.3, 2.0, -1.0)
    DESIRABLE = torch.tensor([True, False, False, True, True])

    def test_matches_the_textbook_form(self) -> None:
        baseline = torch.tensor(0.42, dtype=torch.float64)
        good = 1.5 * (1 - torch.sigmoid(self.REWARDS - baseline))
        bad = 0.5 * (1 - torch.sigmoid(baseline - self.REWARDS))
        actual = losses.kto(self.REWARDS, self.DESIRABLE, baseline, desirable_weight=1.5, undesirable_weight=0.5)
        close(actual, torch.where(self.DESIRABLE, good, bad), 1e-12)

    def test_default_weights_are_one(self) -> None:
        baseline = torch.zeros((), dtype=torch.float64)
        weighted = losses.kto(self.REWARDS, self.DESIRABLE, baseline, desirable_weight=1.0, undesirable_weight=1.0)
        assert torch.equal(losses.kto(self.REWARDS, self.DESIRABLE, baseline), weighted)

    def test_autograd_agrees_with_finite_differences(self) -> None:
        baseline = torch.tensor(0.42, dtype=torch.float64)

        def loss(rewards: Tensor) -> Tensor:
            return losses.kto(rewards, self.DESIRABLE, baseline, desirable_weight=1.3, undesirable_weight=0.9)

        assert torch.autograd.gradcheck(loss, self.REWARDS.clone().requires_grad_())

    def test_desirable_items_are_pulled_up_and_undesirable_ones_down(self) -> None:
        rewards = self.REWARDS.clone().requires_grad_()
        losses.kto(rewards, self.DESIRABLE, torch.zeros((), dtype=torch.float64)).sum().backward()
        assert rewards.grad is not None
        assert torch.equal(rewards.grad < 0, self.DESIRABLE)

    def test_no_gradient_flows_through_the_baseline(self) -> None:
        rewards = self.REWARDS.clone().requires_grad_()
        baseline = losses.kto_baseline(rewards)
        assert not baseline.requires_grad
        close(baseline, self.REWARDS.mean(), 1e-12)
        losses.kto(rewards, self.DESIRABLE, baseline).sum().backward()
        constant = self.REWARDS.clone().requires_grad_()
        losses.kto(constant, self.DESIRABLE, self.REWARDS.mean()).sum().backward()
        assert rewards.grad is not None and constant.grad is not None
        close(rewards.grad, constant.grad, 1e-12)

    def test_the_baseline_is_detached_whatever_the_reduction(self) -> None:
        rewards = self.REWARDS.clone().requires_grad_()
        assert not losses.kto_baseline(rewards, torch.mean).requires_grad

    def test_the_baseline_is_never_negative(self) -> None:
        assert losses.kto_baseline(-self.REWARDS).item() == 0

    def test_the_reduction_may_be_given(self) -> None:
        assert losses.kto_baseline(self.REWARDS, torch.amax).item() == 2.0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_extreme_rewards_stay_finite(self, dtype: torch.dtype) -> None:
        rewards = torch.tensor([-5e4, 5e4], dtype=dtype, requires_grad=True)
        for desirable in (True, False):
            loss = losses.kto(rewards, torch.tensor([desirable] * 2), losses.kto_baseline(rewards))
            assert loss.dtype == dtype and loss.isfinite().all()

    def test_the_mean_of_many_half_precision_values_does_not_overflow(self) -> None:
        mean = losses.mean_across_ranks(torch.full((70_000,), 2.0, dtype=torch.float16))
        assert mean.dtype == torch.float16 and mean.item() == 2.0

    def test_no_items_have_mean_zero(self) -> None:
        assert losses.mean_across_ranks(torch.zeros(0)).item() == 0
        assert losses.mean_across_ranks(torch.ones(2), torch.zeros(2)).item() == 0

    def test_items_count_by_their_weights(self) -> None:
        values, weights = f64(1.0, 2.0, 7.0), f64(0.25, 0.5, 0.0)
        close(losses.mean_across_ranks(values, weights), 5 / 3)
        assert torch.equal(losses.mean_across_ranks(values), losses.mean_across_ranks(values, torch.ones(3)))

    @pytest.mark.slow
    def test_two_processes_share_one_baseline(self, tmp_path: Path) -> None:
        """Ranks with three items and one item agree on the mean of all four."""
        worker = (
            "import sys, datetime, torch, torch.distributed as dist\n"
            "from mmalign import losses\n"
            "rank, store = int(sys.argv[1]), sys.argv[2]\n"
            "dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2,\n"
            "                        timeout=datetime.timedelta(seconds=120))\n"
            "rewards = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])][rank].requires_grad_()\n"
            "print(losses.kto_baseline(rewards).item(), losses.kto_baseline(-rewards).item())\n"
            "dist.destroy_process_group()\n"
        )
        root = str(Path(losses.__file__).parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        command = [sys.executable, "-c", worker]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / "store")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                output, errors = process.communicate(timeout=180)
                assert process.returncode == 0, errors
                assert output.split() == ["4.0", "0.0"]
        finally:
            for process in processes:
                process.kill()


def prdp_plainly(rho: Tensor, old: Tensor, rewards: Tensor, temperature: float, clip: float, over_steps: str) -> Tensor:
    """One prompt, pair by pair, as the paper writes it."""
    count = rho.shape[0]
    total, pairs = rho.new_zeros(()), 0
    for i in range(count):
        for j in range(count):
            if rewards[i] > rewards[j]:
                near = torch.minimum(torch.maximum(rho, old - clip), old + clip)
                free, close_ = (rho[i] - rho[j]).sum(), (near[i] - near[j]).sum()
                if over_steps == "mean":
                    free, close_ = free / rho.shape[1], close_ / rho.shape[1]
                target = (rewards[i] - rewards[j]) / temperature
                total = total + torch.maximum((free - target) ** 2, (close_ - target) ** 2)
                pairs += 1
    return total / pairs if pairs else total


class TestProximalRewardDifference:
    @staticmethod
    def example(images: int = 5, steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        old = torch.randn(images, steps, dtype=torch.float64, generator=generator)
        rho = old + 0.3 * torch.randn(images, steps, dtype=torch.float64, generator=generator)
        return rho, old, f64(0.3, 0.9, 0.3, -0.2, 0.5)[:images]

    def test_by_hand(self) -> None:
        """Two images, two steps: a = (0.4, 0.1), clipped to within 0.1 of old = 0: c = (0.1, 0.05)."""
        rho, old = torch.stack([f64(0.6, 0.2), f64(0.2, 0.0)]), torch.zeros(2, 2, dtype=torch.float64)
        rewards = f64(1.0, 0.5)

        def loss(**settings: Any) -> Tensor:
            return losses.proximal_reward_difference(rho, old, rewards, **settings)

        close(loss(temperature=0.5), (0.3 - 1.0) ** 2)
        close(loss(temperature=0.5, clip=0.1), (0.05 - 1.0) ** 2)
        close(loss(temperature=0.5, over_steps="sum"), (0.6 - 1.0) ** 2)
        close(loss(temperature=0.5, clip=0.1, over_steps="sum"), (0.1 - 1.0) ** 2)

    @pytest.mark.parametrize("over_steps", ["mean", "sum"])
    @pytest.mark.parametrize("clip", [0.05, 0.2, math.inf])
    def test_matches_the_definition_with_its_gradient(self, clip: float, over_steps: Any) -> None:
        rho, old, rewards = self.example()
        ours, plain = rho.clone().requires_grad_(), rho.clone().requires_grad_()
        actual = losses.proximal_reward_difference(
            ours, old, rewards, temperature=0.7, clip=clip, over_steps=over_steps
        )
        expected = prdp_plainly(plain, old, rewards, 0.7, clip, over_steps)
        close(actual, expected, 1e-12)
        actual.backward()
        expected.backward()
        assert ours.grad is not None and plain.grad is not None
        close(ours.grad, plain.grad, 1e-12)

    def test_autograd_agrees_with_finite_differences(self) -> None:
        rho, old, rewards = self.example()

        def loss(values: Tensor) -> Tensor:
            return losses.proximal_reward_difference(values, old, rewards, temperature=0.7, clip=0.2)

        assert torch.autograd.gradcheck(loss, rho.requires_grad_())

    def test_without_the_clip_a_pair_is_plain_regression(self) -> None:
        rho, old, rewards = self.example(images=2)
        actual = losses.proximal_reward_difference(rho, old, rewards, temperature=0.7, over_steps="sum")
        gap = rewards[1] - rewards[0]
        margin = rho.sum(-1)[1] - rho.sum(-1)[0]
        close(actual, losses.reward_difference(margin[None], gap[None], temperature=0.7)[0], 1e-12)

    def test_the_clip_only_raises_the_loss(self) -> None:
        rho, old, rewards = self.example()
        free = losses.proximal_reward_difference(rho, old, rewards, temperature=0.7)
        tight = losses.proximal_reward_difference(rho, old, rewards, temperature=0.7, clip=0.01)
        assert tight > free

    def test_the_clip_is_inactive_at_the_policy_that_drew_the_images(self) -> None:
        _, old, rewards = self.example()
        gradients = []
        for clip in (1e-6, math.inf):
            rho = old.clone().requires_grad_()
            losses.proximal_reward_difference(rho, old, rewards, temperature=0.7, clip=clip).backward()
            gradients.append(rho.grad)
        close(gradients[0], gradients[1], 1e-12)
        assert gradients[0].abs().max() > 0

    def test_the_gradient_stops_once_every_step_left_the_trust_region_the_good_way(self) -> None:
        rho = torch.stack([f64(0.5, 0.5), f64(-0.5, -0.5)]).requires_grad_()
        old, rewards = torch.zeros(2, 2, dtype=torch.float64), f64(1.0, 0.0)
        losses.proximal_reward_difference(rho, old, rewards, temperature=0.1, clip=0.1).backward()
        assert rho.grad is not None and rho.grad.abs().max() == 0
        # Moved the wrong way, the same distance is not clipped.
        rho = (-rho).detach().requires_grad_()
        losses.proximal_reward_difference(rho, old, rewards, temperature=0.1, clip=0.1).backward()
        assert rho.grad is not None and rho.grad[0].max() < 0 < rho.grad[1].min()

    def test_no_gradient_flows_into_the_old_policy(self) -> None:
        rho, old, rewards = self.example()
        rho.requires_grad_()
        old.requires_grad_()
        losses.proximal_reward_difference(rho, old, rewards, temperature=0.7, clip=0.05).backward()
        assert rho.grad is not None and rho.grad.abs().max() > 0
        assert old.grad is None

    def test_prompts_that_tie_throughout_cost_nothing_and_teach_nothing(self) -> None:
        rho, old, rewards = self.example()
        both = torch.stack([rho, rho]).requires_grad_()
        loss = losses.proximal_reward_difference(
            both, torch.stack([old, old]), torch.stack([rewards, torch.ones_like(rewards)]), temperature=0.7
        )
        assert loss.shape == (2,) and loss[1] == 0 and loss[0] > 0
        loss.sum().backward()
        assert both.grad is not None
        assert both.grad[1].abs().max() == 0 and both.grad[0].abs().max() > 0

    def test_prompts_do_not_mix(self) -> None:
        rho, old, rewards = self.example()
        both = losses.proximal_reward_difference(
            torch.stack([rho, rho.flip(0)]),
            torch.stack([old, old.flip(0)]),
            torch.stack([rewards, 2 * rewards.flip(0)]),
            temperature=0.7,
            clip=0.2,
        )
        close(both[0], losses.proximal_reward_difference(rho, old, rewards, temperature=0.7, clip=0.2), 1e-12)
        close(
            both[1],
            losses.proximal_reward_difference(rho, old, 2 * rewards, temperature=0.7, clip=0.2),
            1e-12,
        )

    def test_a_nan_reward_does_not_pass_for_a_tie(self) -> None:
        rho, old, _ = self.example(images=2)
        assert losses.proximal_reward_difference(rho, old, f64(1.0, math.nan), temperature=1.0).isnan()

    def test_the_gradient_may_be_taken_step_by_step(self) -> None:
        """dL/d(log-ratio) as a constant, times each step's own graph, adds up to the whole gradient."""
        _, old, rewards = self.example()
        inputs = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        weight = f64(0.3, -0.2, 0.5).requires_grad_()

        def loss(log_ratios: Tensor) -> Tensor:
            return losses.proximal_reward_difference(log_ratios, old, rewards, temperature=0.7, clip=0.4)

        (whole,) = torch.autograd.grad(loss(torch.tanh(inputs @ weight)), weight)
        leaf = torch.tanh(inputs @ weight).detach().requires_grad_()
        (per_step,) = torch.autograd.grad(loss(leaf), leaf)
        parts = torch.zeros_like(weight)
        for step in range(4):
            surrogate = (per_step[:, step] * torch.tanh(inputs[:, step] @ weight)).sum()
            parts += torch.autograd.grad(surrogate, weight)[0]
        close(parts, whole, 1e-12)

    @pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 1.0, "clip": 0.0}])
    def test_impossible_settings_are_refused(self, setting: dict[str, float]) -> None:
        with pytest.raises(UserError, match="is 0"):
            losses.proximal_reward_difference(*self.example(), **setting)


class TestStepPreference:
    RATIO = f64(-2.0, -0.12, -0.05, 0.0, 0.03, 0.12, 3.0)  # away from the band's edges, log 0.9 and log 1.1

    def test_clipped_ratio_by_its_definition(self) -> None:
        expected = self.RATIO.exp().clamp(0.9, 1.1).log()
        close(losses.clipped_log_ratio(self.RATIO, 0.1), expected, 1e-12)

    def test_the_clip_stops_the_gradient_on_both_sides(self) -> None:
        ratio = self.RATIO.clone().requires_grad_()
        losses.clipped_log_ratio(ratio, 0.1).sum().backward()
        assert ratio.grad is not None and ratio.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]

    def test_a_ratio_beyond_floating_point_stays_finite(self) -> None:
        ratio = torch.tensor([-1e4, 1e4], requires_grad=True)
        clipped = losses.clipped_log_ratio(ratio, 0.1)
        close(clipped, f64(math.log(0.9), math.log(1.1)))
        clipped.sum().backward()
        assert ratio.grad is not None and ratio.grad.abs().max() == 0

    def test_by_hand(self) -> None:
        """PSO's numbers: beta 50, ratios 1.02 and 0.97, then 1.3 (clipped to 1.1) and 0.97."""
        chosen, rejected = f64(1.02, 1.3).log(), f64(0.97, 0.97).log()
        margin = f64(50 * math.log(1.02 / 0.97), 50 * math.log(1.1 / 0.97))
        close(losses.step_preference(chosen, rejected, beta=50.0, clip=0.1), (1 + (-margin).exp()).log(), 1e-12)

    def test_policy_equal_to_reference_costs_log_two(self) -> None:
        zero = torch.zeros(3, 4)
        assert torch.allclose(losses.step_preference(zero, zero, beta=50.0, clip=0.1), torch.full((3, 4), LOG2))

    def test_inside_the_band_it_is_dpo_on_the_ratios(self) -> None:
        chosen, rejected = f64(0.02, -0.01, 0.05), f64(-0.03, 0.04, 0.05)
        actual = losses.step_preference(chosen, rejected, beta=20.0, clip=0.1)
        close(actual, losses.sigmoid(20.0 * (chosen - rejected)), 1e-12)

    def test_autograd_agrees_with_finite_differences(self) -> None:
        def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
            return losses.step_preference(chosen, rejected, beta=5.0, clip=0.1)

        inputs = (self.RATIO.clone().requires_grad_(), self.RATIO.flip(0).requires_grad_())
        assert torch.autograd.gradcheck(loss, inputs)

    def test_chosen_goes_up_and_rejected_down(self) -> None:
        chosen, rejected = f64(0.01).requires_grad_(), f64(0.02).requires_grad_()
        losses.step_preference(chosen, rejected, beta=5.0, clip=0.1).sum().backward()
        assert chosen.grad is not None and rejected.grad is not None
        assert chosen.grad.item() < 0 < rejected.grad.item()
        close(chosen.grad, -rejected.grad, 1e-12)

    def test_a_side_outside_the_band_leaves_the_other_its_gradient(self) -> None:
        chosen, rejected = f64(0.5).requires_grad_(), f64(0.02).requires_grad_()
        losses.step_preference(chosen, rejected, beta=5.0, clip=0.1).sum().backward()
        assert chosen.grad is not None and rejected.grad is not None
        assert chosen.grad.item() == 0 and rejected.grad.item() > 0

    def test_the_loss_of_d3po_hardly_moves(self) -> None:
        best = losses.step_preference(f64(9.0), f64(-9.0), beta=0.1, clip=0.1)
        worst = losses.step_preference(f64(-9.0), f64(9.0), beta=0.1, clip=0.1)
        assert LOG2 - 0.011 < best.item() < worst.item() < LOG2 + 0.011

    @pytest.mark.parametrize("clip", [0.0, 1.0, -0.1, math.inf, math.nan])
    def test_an_impossible_clip_is_refused(self, clip: float) -> None:
        zero = f64(0.0)
        with pytest.raises(UserError, match="clip is"):
            losses.step_preference(zero, zero, beta=1.0, clip=clip)
        with pytest.raises(UserError, match="clip is"):
            losses.policy_gradient(zero, zero, clip=clip)

    def test_an_impossible_beta_is_refused(self) -> None:
        with pytest.raises(UserError, match="beta is 0"):
            losses.step_preference(f64(0.0), f64(0.0), beta=0.0, clip=0.1)


class TestPolicyGradient:
    RATIO = f64(-0.5, -0.15, -0.02, 0.03, 0.15, 0.5)

    @pytest.mark.parametrize(
        ("advantage", "alive"),
        [(1.5, [True, True, True, True, False, False]), (-1.5, [False, False, True, True, True, True])],
    )
    def test_the_gradient_stops_only_where_the_step_went_its_way(self, advantage: float, alive: list[bool]) -> None:
        ratio = self.RATIO.clone().requires_grad_()
        losses.policy_gradient(ratio, torch.full_like(self.RATIO, advantage), clip=0.1).sum().backward()
        assert ratio.grad is not None and (ratio.grad != 0).tolist() == alive
        expected = torch.where(torch.tensor(alive), -advantage * self.RATIO.exp(), 0.0)
        close(ratio.grad, expected, 1e-12)

    def test_by_hand(self) -> None:
        loss = losses.policy_gradient(f64(1.3, 1.3, 0.8, 0.8).log(), f64(2, -2, 2, -2), clip=0.2)
        close(loss, f64(-2 * 1.2, 2 * 1.3, -2 * 0.8, 2 * 0.8), 1e-12)

    def test_at_the_policy_that_drew_the_step_it_is_reinforce(self) -> None:
        ratio, advantage = torch.zeros(4, dtype=torch.float64, requires_grad=True), f64(1.0, -2.0, 0.0, 4.0)
        loss = losses.policy_gradient(ratio, advantage, clip=1e-4)
        close(loss, -advantage, 1e-12)
        loss.sum().backward()
        assert ratio.grad is not None
        close(ratio.grad, -advantage, 1e-12)

    def test_advantages_are_bounded_and_constant(self) -> None:
        advantage = f64(9.0, -9.0).requires_grad_()
        ratio = f64(0.0, 0.0).requires_grad_()
        close(losses.policy_gradient(ratio, advantage, clip=0.1), f64(-5.0, 5.0))
        loss = losses.policy_gradient(ratio, advantage, clip=0.1, advantage_clip=2.0)
        close(loss, f64(-2.0, 2.0))
        loss.sum().backward()
        assert ratio.grad is not None and advantage.grad is None

    def test_autograd_agrees_with_finite_differences(self) -> None:
        advantage = f64(1.5, -1.5, 0.3, -7.0, 2.0, -0.2)

        def loss(ratio: Tensor) -> Tensor:
            return losses.policy_gradient(ratio, advantage, clip=0.1)

        assert torch.autograd.gradcheck(loss, self.RATIO.clone().requires_grad_())

    def test_an_impossible_advantage_clip_is_refused(self) -> None:
        with pytest.raises(UserError, match="advantage_clip is 0"):
            losses.policy_gradient(f64(0.0), f64(0.0), clip=0.1, advantage_clip=0.0)


class TestAdvantages:
    def test_by_hand(self) -> None:
        """Mean 3, population deviation sqrt(2); the sample's, sqrt(2.5), would give other numbers."""
        rewards = f64(1.0, 2.0, 3.0, 4.0, 5.0)
        close(losses.advantages(rewards), f64(-2, -1, 0, 1, 2) / (math.sqrt(2) + 1e-6), 1e-12)

    def test_as_in_the_authors_numpy(self) -> None:
        rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(5)) * 0.01 + 0.2
        plain = rewards.double().numpy()
        expected = (plain - plain.mean(1, keepdims=True)) / (plain.std(1, keepdims=True) + 1e-6)
        actual = losses.advantages(rewards)
        assert actual.dtype == torch.float32
        close(actual, torch.from_numpy(expected), 1e-5)

    def test_groups_do_not_mix(self) -> None:
        rewards = torch.stack([f64(0.1, 0.9, 0.4), f64(10.0, -4.0, 3.0)])
        close(losses.advantages(rewards)[0], losses.advantages(rewards[0]), 1e-12)
        close(losses.advantages(rewards)[1], losses.advantages(rewards[1]), 1e-12)

    @pytest.mark.parametrize("images", [1, 3, 7])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_group_that_ties_has_no_advantage_at_all(self, images: int, dtype: torch.dtype) -> None:
        tied = torch.full((2, images), 0.1, dtype=dtype)
        assert losses.advantages(tied).abs().max() == 0

    def test_nearly_tied_rewards_are_not_blown_up(self) -> None:
        assert losses.advantages(f64(0.5, 0.5 + 1e-9)).abs().max() < 1e-3

    def test_a_nan_reward_surfaces_in_its_group_alone(self) -> None:
        found = losses.advantages(torch.stack([f64(0.1, math.nan), f64(0.1, 0.2)]))
        assert found.isnan().tolist() == [[True, True], [False, False]]


class TestDominance:
    def test_by_hand(self) -> None:
        first = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [0.0, 3.0]])
        other = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 1.0], [0.0, 4.0]])
        assert losses.dominance(first, other).tolist() == [1, 1, 0, 0, -1]

    def test_swapping_the_sides_swaps_the_sign(self) -> None:
        generator = torch.Generator().manual_seed(6)
        first = torch.randint(0, 3, (50, 2), generator=generator).float()
        other = torch.randint(0, 3, (50, 2), generator=generator).float()
        signs = losses.dominance(first, other)
        assert torch.equal(losses.dominance(other, first), -signs)
        assert set(signs.tolist()) == {-1, 0, 1}

    def test_one_reward_is_a_comparison(self) -> None:
        first, other = f64(0.2, 0.5, 0.5)[:, None], f64(0.3, 0.5, 0.1)[:, None]
        assert losses.dominance(first, other).tolist() == [-1, 0, 1]

    def test_a_nan_reward_does_not_pass_for_a_tie(self) -> None:
        first = torch.tensor([[1.0, math.nan], [1.0, 1.0], [1.0, 1.0]])
        other = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [0.0, 0.0]])
        assert losses.dominance(first, other).isnan().tolist() == [True, True, False]


class TestReductions:
    def test_ties_count_half(self) -> None:
        found = losses.accuracy(torch.tensor([2.0, 0.0, -0.0, -1e-30, 1e-30], requires_grad=True))
        assert found.tolist() == [1.0, 0.5, 0.5, 0.0, 1.0]
        assert not found.requires_grad

    def test_weighted_mean(self) -> None:
        loss = f64(1.0, 2.0, 6.0)
        close(losses.weighted_mean(loss), 3.0)
        close(losses.weighted_mean(loss, f64(1.0, 1.0, 1.0)), 3.0)
        close(losses.weighted_mean(loss, f64(3.0, 1.0, 0.0)), 5 / 4)
        close(losses.weighted_mean(loss, f64(0.3, 0.1, 0.0)), 5 / 4)

    def test_weights_that_are_all_zero_teach_nothing(self) -> None:
        loss = f64(1.0, 2.0).requires_grad_()
        mean = losses.weighted_mean(loss, f64(0.0, 0.0))
        mean.backward()
        assert mean.item() == 0
        assert loss.grad is not None and loss.grad.abs().max() == 0


class TestWeightedSum:
    TERMS = PairTerms(
        margin=MARGIN[:4],
        scale=2.0,
        confidence=f64(1, 0.6, 0.5, 0),
        gap=f64(0.1, 0, 2, 3),
        chosen_errors=CHOSEN,
        longer=f64(3, -1, 0, 2),
    )

    @pytest.mark.parametrize(
        ("name", "settings", "expected"),
        [
            ("sigmoid", {}, lambda t: losses.sigmoid(t.margin)),
            ("soft", {}, lambda t: losses.soft(t.margin, t.confidence)),
            ("smoothed", {"strength": 2}, lambda t: losses.sigmoid(2 * (2 * t.confidence - 1) * t.margin)),
            ("conservative", {"flip_rate": 0.2}, lambda t: losses.conservative(t.margin, flip_rate=0.2)),
            ("robust", {"flip_rate": 0.2}, lambda t: losses.robust(t.margin, flip_rate=0.2)),
            ("exo", {"flip_rate": 0.2}, lambda t: losses.exo(t.margin, flip_rate=0.2)),
            ("offset", {"strength": 2}, lambda t: losses.sigmoid(t.margin - 2 * t.gap)),
            ("length", {"alpha": 0.1}, lambda t: losses.sigmoid(t.margin + 0.1 * t.longer)),
            ("ipo", {"tau": 3}, lambda t: (t.margin / 2 - 1 / 6) ** 2),
            ("hinge", {}, lambda t: losses.hinge(t.margin)),
            ("reward_difference", {"temperature": 0.5}, lambda t: (t.margin - t.gap / 0.5) ** 2),
            ("sft", {}, lambda t: t.chosen_errors),
        ],
    )
    def test_every_loss_by_name(
        self, name: str, settings: dict[str, float], expected: Callable[[PairTerms], Tensor]
    ) -> None:
        close(weighted_sum({name: settings})(self.TERMS), expected(self.TERMS), 1e-12)
        close(weighted_sum({name: {"weight": 0.25, **settings}})(self.TERMS), expected(self.TERMS) / 4, 1e-12)

    def test_every_pairwise_loss_is_tested_here(self) -> None:
        assert set(losses.PAIR_LOSSES) == {*PAIRWISE, "sft"}

    def test_losses_add_up(self) -> None:
        both = weighted_sum({"sigmoid": 1, "hinge": 0.5, "sft": 0.1})(self.TERMS)
        close(both, losses.sigmoid(MARGIN[:4]) + 0.5 * losses.hinge(MARGIN[:4]) + 0.1 * CHOSEN, 1e-12)

    def test_weight_zero_is_as_if_absent(self) -> None:
        only_margin = PairTerms(margin=MARGIN, scale=1.0)
        assert torch.equal(weighted_sum({"sigmoid": 1, "sft": 0})(only_margin), losses.sigmoid(MARGIN))

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ({"sigmiod": 1.0}, r"Unknown loss 'sigmiod' \(loss\)\. Did you mean 'sigmoid'\?"),
            ({"conservative": 1.0}, r"flip_rate is missing \(loss\.conservative\)\. Write conservative: \{"),
            ({"conservative": {"fliprate": 0.1}}, r"Unknown setting 'fliprate'.*Did you mean 'flip_rate'\?"),
            ({"conservative": {"flip_rate": 0.7}}, r"flip_rate is 0\.7 \(loss\.conservative\)\. Give a prob"),
            ({"ipo": {"tau": 0}}, r"tau is 0 \(loss\.ipo\)"),
            ({"sigmoid": {"weight": 1, "flip_rate": 0.1}}, r"Unknown setting 'flip_rate' \(loss\.sigmoid\)"),
            ({"sigmoid": "1e-3"}, r"weight is '1e-3' \(loss\.sigmoid\)\. Give a finite number"),
            ({"sigmoid": True}, r"weight is True"),
            ({"sigmoid": None}, r"weight is None"),
            ({"sigmoid": math.nan}, r"weight is nan"),
            ({"sigmoid": -1.0}, r"weight is -1 \(loss\.sigmoid\)\. Give 0 or more"),
            ({"sigmoid": 0.0}, r"No loss to minimise \(loss\)"),
            ({}, r"No loss to minimise \(loss\)"),
        ],
    )
    def test_mistakes_in_the_configuration_are_explained(self, spec: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            weighted_sum(spec)

    def test_losses_that_may_meet_ties(self) -> None:
        settings: dict[str, Any] = {
            **dict.fromkeys(losses.PAIR_LOSSES, 1.0),
            "conservative": {"flip_rate": 0.1},
            "robust": {"flip_rate": 0.1},
            "ipo": {"tau": 0.5},
            "length": {"alpha": 0.1},
        }
        fair = {name for name, given in settings.items() if losses.fair_to_ties(weighted_sum({name: given}))}
        assert fair == {"soft", "smoothed", "reward_difference"}
        assert not losses.fair_to_ties(weighted_sum({"soft": 1.0, "sigmoid": 0.1}))

    @pytest.mark.parametrize(
        ("name", "missing"), [("soft", "confidence"), ("reward_difference", "gap"), ("sft", "chosen_errors")]
    )
    def test_a_term_the_pairs_do_not_have_is_named(self, name: str, missing: str) -> None:
        total = weighted_sum({"sigmoid": 1.0, name: 0.5}, place="method.loss")
        with pytest.raises(UserError, match=rf"no {missing} \(method\.loss\.{name}\)\. .*another loss"):
            total(PairTerms(margin=MARGIN, scale=1.0))
