"""Statistics against hand numbers, scipy, published values, and their behaviour on simulated data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mmalign import statistics
from mmalign.errors import UserError

TUNED_WINS_EIGHT_OF_TEN = ([0.0] * 10, [1.0] * 8 + [-1.0] * 2)


class TestWilson:
    def test_eight_of_ten_by_hand(self) -> None:
        assert statistics.wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)

    @pytest.mark.parametrize(("wins", "n"), [(0, 1), (1, 1), (0, 20), (3, 20), (10, 20), (250, 500), (500, 500)])
    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    def test_agrees_with_scipy(self, wins: int, n: int, confidence: float) -> None:
        expected = scipy.stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
        found = statistics.wilson_interval(wins, n, confidence=confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_solves_the_score_equation(self) -> None:
        """Each end is a proportion whose own normal test just rejects 12.5 of 40; ties make halves."""
        for end in statistics.wilson_interval(12.5, 40):
            z = (12.5 / 40 - end) / math.sqrt(end * (1 - end) / 40)
            assert abs(z) == pytest.approx(1.959963985, abs=1e-8)

    def test_swapping_the_models_mirrors_the_interval(self) -> None:
        low, high = statistics.wilson_interval(13.5, 40)
        assert statistics.wilson_interval(26.5, 40) == pytest.approx((1 - high, 1 - low), abs=1e-12)

    def test_it_stays_a_probability_and_never_has_zero_width(self) -> None:
        low, high = statistics.wilson_interval(256, 256)
        assert 0.98 < low < 1 and high == pytest.approx(1)
        assert statistics.wilson_interval(0, 3)[0] == pytest.approx(0)

    def test_nothing_to_compare(self) -> None:
        with pytest.raises(UserError, match="nothing to compare"):
            statistics.wilson_interval(0, 0)

    def test_more_wins_than_comparisons_is_a_bug(self) -> None:
        with pytest.raises(ValueError, match="11 wins out of 10"):
            statistics.wilson_interval(11, 10)


class TestBootstrap:
    def test_large_samples_give_the_normal_interval(self) -> None:
        values = np.random.default_rng(1).normal(0.3, 2.0, 2000)
        low, high = statistics.bootstrap_interval(values, resamples=4000)
        error = values.std() / math.sqrt(2000)
        assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)

    def test_agrees_with_scipy(self) -> None:
        values = np.random.default_rng(2).exponential(1.0, 60)
        low, high = statistics.bootstrap_interval(values, resamples=20_000)
        # of 60 units the 2.5 % of the plain method become Phi(-sqrt(60 / 59) t_59)
        tail = scipy.stats.norm.cdf(-math.sqrt(60 / 59) * scipy.stats.t.ppf(0.975, 59))
        theirs = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="percentile", confidence_level=1 - 2 * tail, rng=3
        )
        interval = theirs.confidence_interval
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=0.012)

    def test_the_seed_decides(self) -> None:
        values = np.random.default_rng(0).normal(size=50)
        first = statistics.bootstrap_interval(values, seed=0)
        assert statistics.bootstrap_interval(values, seed=0) == first
        assert statistics.bootstrap_interval(values, seed=1) != first

    def test_chunks_do_not_change_the_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.random.default_rng(0).normal(size=50)
        whole = statistics.bootstrap_interval(values, resamples=500)
        monkeypatch.setattr(statistics, "_CHUNK", 130)
        assert statistics.bootstrap_interval(values, resamples=500) == whole

    def test_repeating_a_unit_within_its_prompt_adds_no_certainty(self) -> None:
        values = np.random.default_rng(5).normal(size=40)
        once = statistics.bootstrap_interval(values)
        prompts = np.repeat(np.arange(40), 8)
        assert statistics.bootstrap_interval(np.repeat(values, 8), prompts) == pytest.approx(once, abs=1e-12)
        naive = statistics.bootstrap_interval(np.repeat(values, 8))
        assert naive[1] - naive[0] < 0.5 * (once[1] - once[0])

    def test_prompts_of_different_size_weigh_by_their_units(self) -> None:
        """Resampling {sum 1 of 1 unit, sum 0 of 3 units} gives means 1, 1/4 and 0 only."""
        values, prompts = [1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"]
        assert statistics.bootstrap_interval(values, prompts, confidence=0.9, resamples=2000) == (0.0, 1.0)
        middle = statistics.bootstrap_interval(values, prompts, confidence=0.2, resamples=2000)
        assert middle == (0.25, 0.25)

    def test_the_interval_of_clustered_units_covers_the_truth_at_its_level(self) -> None:
        """200 experiments of 60 prompts with two seeds each; within a prompt differences correlate 0.5."""
        generator = np.random.default_rng(11)
        prompts = np.repeat(np.arange(60), 2)
        covered = 0
        for experiment in range(200):
            shared, own = generator.normal(size=60), generator.normal(size=120)
            values = 0.3 + shared[prompts] + own
            low, high = statistics.bootstrap_interval(values, prompts, resamples=400, seed=experiment)
            covered += low < 0.3 < high
        assert 0.90 <= covered / 200 <= 0.98

    def test_one_prompt_has_no_interval(self) -> None:
        with pytest.raises(UserError, match="One prompt cannot give an interval"):
            statistics.bootstrap_interval([1.0, 2.0, 3.0], ["a", "a", "a"])


class TestShareInterval:
    def test_independent_outcomes_give_wilsons_with_students_t(self) -> None:
        """n - 1 of n since the scatter is estimated; 1,999 degrees of freedom are nearly the normal distribution."""
        values = [1.0] * 300 + [0.0] * 1700
        expected = statistics.wilson_interval(300, 2000)
        assert statistics.share_interval(values) == pytest.approx(expected, abs=2e-4)

    def test_a_repeated_unit_adds_no_certainty(self) -> None:
        values = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0]
        eightfold = statistics.share_interval(np.repeat(values, 8), np.repeat(np.arange(6), 8))
        assert eightfold == pytest.approx(statistics.share_interval(values), abs=1e-12)

    def test_it_mirrors_and_stays_a_share(self) -> None:
        values = np.array([1.0] * 29 + [0.0])
        low, high = statistics.share_interval(values)
        assert 0.8 < low < 29 / 30 < high < 1
        assert statistics.share_interval(1 - values) == pytest.approx((1 - high, 1 - low))

    def test_clusters_that_ended_alike_are_one_outcome_each(self) -> None:
        assert statistics.share_interval([1.0] * 40, np.arange(40) // 4) == statistics.wilson_interval(10, 10)

    def test_bad_values(self) -> None:
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
            statistics.share_interval([0.5, 1.5])
        with pytest.raises(UserError, match="One prompt cannot"):
            statistics.share_interval([1.0, 0.0], ["a", "a"])


class TestStudent:
    @pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 49, 500, 9999])
    @pytest.mark.parametrize("probability", [0.3, 0.5, 0.6, 0.975, 0.9995])
    def test_agrees_with_scipy(self, degrees: int, probability: float) -> None:
        expected = scipy.stats.t.ppf(probability, degrees)
        assert statistics.student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)

    def test_no_limit_is_the_normal_distribution(self) -> None:
        assert statistics.student_quantile(0.975, None) == pytest.approx(1.959963985)


class TestHolm:
    def test_by_hand(self) -> None:
        """Sorted 0.01, 0.02, 0.04, 0.3: times 4, 3, 2, 1, never falling."""
        assert statistics.holm([0.04, 0.01, 0.3, 0.02]) == pytest.approx([0.08, 0.04, 0.3, 0.06])
        assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
        assert statistics.holm([0.03]) == [0.03] and statistics.holm([]) == []


class TestEffectSize:
    def test_independent_units_by_hand(self) -> None:
        values = [1.0, 2.0, 3.0, 6.0]
        assert statistics.cluster_deviation(values) == pytest.approx(np.std(values, ddof=1))
        assert statistics.effect_size(values) == pytest.approx(3.0 / np.std(values, ddof=1))

    def test_seeds_of_a_prompt_are_averaged(self) -> None:
        values, prompts = np.array([1.0, 3.0, 2.0, 6.0, 0.0, 0.0]), [1, 1, 2, 2, 3, 3]
        assert statistics.cluster_deviation(values, prompts) == pytest.approx(np.std([2.0, 4.0, 0.0], ddof=1))

    def test_the_same_change_everywhere_has_no_scale(self) -> None:
        assert statistics.effect_size([0.5, 0.5]) is None


class TestSignTest:
    def test_eight_of_ten_by_hand(self) -> None:
        differences = np.subtract(TUNED_WINS_EIGHT_OF_TEN[1], TUNED_WINS_EIGHT_OF_TEN[0])
        assert statistics.sign_test(differences) == pytest.approx(2 * (1 + 10 + 45) / 1024, rel=1e-12)

    @pytest.mark.parametrize(("wins", "losses"), [(1, 0), (5, 5), (0, 9), (37, 60), (300, 245), (2900, 3100)])
    def test_agrees_with_scipy(self, wins: int, losses: int) -> None:
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue
        found = statistics.sign_test([1.0] * wins + [-1.0] * losses)
        assert found == pytest.approx(expected, rel=1e-9)

    def test_ties_are_dropped(self) -> None:
        assert statistics.sign_test([1.0, 1.0, 1.0, 0.0, 0.0]) == pytest.approx(0.25)
        assert statistics.sign_test([0.0, 0.0]) == 1.0

    def test_a_prompt_has_one_vote(self) -> None:
        """Three units of a for, one against; two of b for; c undecided: two votes, both for."""
        differences = [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0]
        assert statistics.sign_test(differences, list("aaaabbcc")) == pytest.approx(0.5)

    def test_overwhelming_evidence_does_not_underflow_to_an_error(self) -> None:
        assert 0 <= statistics.sign_test([1.0] * 5000) < 1e-300


class TestPermutation:
    def test_three_units_by_hand(self) -> None:
        """Of the eight sums +-1 +-2 +-3 only +6 and -6 reach 6."""
        assert statistics.permutation_test([1.0, 2.0, 3.0]) == 2 / 8
        assert statistics.permutation_test([1.0, 2.0, -3.0]) == 1.0

    def test_agrees_with_scipy_where_it_enumerates(self) -> None:
        differences = np.random.default_rng(6).normal(0.5, 1.0, 12)
        theirs = scipy.stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert statistics.permutation_test(differences) == pytest.approx(theirs.pvalue, abs=1e-12)

    def test_sampling_approaches_enumeration(self) -> None:
        differences = np.random.default_rng(7).normal(0.4, 1.0, 12)
        exact = statistics.permutation_test(differences)
        assert statistics.permutation_test(differences, resamples=4000) == pytest.approx(exact, abs=0.03)
        assert statistics.permutation_test(differences, resamples=4000) != exact

    def test_a_sampled_p_value_is_never_zero(self) -> None:
        assert statistics.permutation_test(np.arange(1.0, 41.0), resamples=999) == 1 / 1000

    def test_equal_magnitudes_make_it_the_sign_test(self) -> None:
        differences = [1.0] * 9 + [-1.0] * 3 + [0.0] * 4
        assert statistics.permutation_test(differences) == pytest.approx(statistics.sign_test(differences), rel=1e-9)

    @pytest.mark.parametrize("tenths", [(-7, -3, 7), (-7, -7, -3, -1), (-7, -7, -3, -1, -1)])
    def test_rounding_does_not_hide_equal_sums(self, tenths: tuple[int, ...]) -> None:
        """The observed sum, added up in another order, is a rounding away from itself."""
        in_tenths = statistics.permutation_test([float(value) for value in tenths])
        assert statistics.permutation_test([value / 10 for value in tenths]) == in_tenths > 0

    def test_units_of_a_prompt_flip_together(self) -> None:
        assert statistics.permutation_test([1.0, 1.0, 1.0, 1.0], ["a", "a", "b", "b"]) == 2 / 4

    def test_the_seed_decides(self) -> None:
        differences = np.random.default_rng(8).normal(0.2, 1.0, 50)
        first = statistics.permutation_test(differences, seed=0)
        assert statistics.permutation_test(differences, seed=0) == first
        assert statistics.permutation_test(differences, seed=1) != first

    def test_identical_models_give_one(self) -> None:
        assert statistics.permutation_test([0.0, 0.0, 0.0]) == 1.0

    @pytest.mark.parametrize("seeds_per_prompt", [1, 3])
    def test_without_an_effect_it_rejects_at_its_level(self, seeds_per_prompt: int) -> None:
        generator = np.random.default_rng(9)
        prompts = np.repeat(np.arange(20), seeds_per_prompt)
        rejected = 0
        for experiment in range(400):
            values = generator.normal(size=20)[prompts] + 0.5 * generator.normal(size=len(prompts))
            rejected += statistics.permutation_test(values, prompts, resamples=199, seed=experiment) <= 0.05
        assert 0.02 <= rejected / 400 <= 0.085


class TestPower:
    @pytest.mark.parametrize(("n", "expected"), [(500, 6.26), (553, 5.95), (1632, 3.47), (3200, 2.47)])
    def test_published_win_rates_in_points(self, n: int, expected: float) -> None:
        assert 100 * statistics.minimum_detectable_win_rate(n) == pytest.approx(expected, abs=0.01)

    def test_by_hand(self) -> None:
        expected = (1.959963985 + 0.841621234) * 2.0 / 10
        assert statistics.minimum_detectable_difference(2.0, 100) == pytest.approx(expected, rel=1e-8)

    def test_the_effect_is_found_as_often_as_promised(self) -> None:
        generator = np.random.default_rng(10)
        effect = statistics.minimum_detectable_difference(1.0, 100, power=0.7, alpha=0.1)
        z = generator.normal(effect, 1.0, (4000, 100)).mean(1) * 10
        assert (np.abs(z) > 1.6449).mean() == pytest.approx(0.7, abs=0.025)

    def test_nothing_to_compare(self) -> None:
        with pytest.raises(UserError, match="nothing to compare"):
            statistics.minimum_detectable_win_rate(0)


class TestPairedReport:
    def test_eight_of_ten(self) -> None:
        report = statistics.paired_report(*TUNED_WINS_EIGHT_OF_TEN)
        assert (report.n, report.prompts, report.ties) == (10, 10, 0)
        assert report.win_rate == 0.8
        assert report.p_value == pytest.approx(112 / 1024)
        assert report.mean_difference == pytest.approx(0.6)
        assert report.ci95[0] <= 0.8 <= report.ci95[1]
        assert report.ci95 == statistics.share_interval([1.0] * 8 + [0.0] * 2)
        assert report.mean_difference_ci95[0] <= 0.6 <= report.mean_difference_ci95[1]
        assert report.mde == statistics.minimum_detectable_win_rate(10)

    def test_ties_count_half(self) -> None:
        report = statistics.paired_report([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 2.0, 0.0])
        assert (report.ties, report.win_rate, report.p_value) == (2, 0.5, 1.0)
        assert statistics.win_scores([1.0, 1.0, 1.0], [1.0, 2.0, 0.0]).tolist() == [0.5, 1.0, 0.0]

    def test_differences_within_the_tolerance_are_ties(self) -> None:
        scores = statistics.win_scores([0.0] * 5, [0.2, 0.1, 0.0, -0.1, -0.2], tolerance=0.1)
        assert scores.tolist() == [1.0, 0.5, 0.5, 0.5, 0.0]
        assert statistics.paired_report([0.0] * 3, [0.2, 0.1, -0.1], tolerance=0.1).ties == 2

    def test_swapping_the_models_mirrors_the_report(self) -> None:
        generator = np.random.default_rng(12)
        base, tuned = generator.normal(size=64), generator.normal(0.4, 1.0, 64)
        prompts = [f"a scene {i // 2}" for i in range(64)]
        ours = statistics.paired_report(base, tuned, prompts)
        theirs = statistics.paired_report(tuned, base, prompts)
        assert theirs.win_rate == pytest.approx(1 - ours.win_rate)
        assert theirs.p_value == pytest.approx(ours.p_value)
        assert theirs.ci95 == pytest.approx((1 - ours.ci95[1], 1 - ours.ci95[0]), abs=1e-9)
        assert theirs.mean_difference_ci95 == pytest.approx([-end for end in reversed(ours.mean_difference_ci95)])

    def test_seeds_of_one_prompt_are_one_cluster(self) -> None:
        generator = np.random.default_rng(13)
        base, tuned = np.zeros(40), generator.normal(0.5, 1.0, 40)
        alone = statistics.paired_report(base, tuned)
        eightfold = statistics.paired_report(np.repeat(base, 8), np.repeat(tuned, 8), np.repeat(np.arange(40), 8))
        assert (eightfold.n, eightfold.prompts) == (320, 40)
        for field in ("win_rate", "ci95", "p_value", "mean_difference", "mean_difference_ci95", "mde"):
            assert getattr(eightfold, field) == pytest.approx(getattr(alone, field), abs=1e-12)

    @pytest.mark.parametrize(("tuned", "rate"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
    def test_a_clean_sweep_is_not_certainty(self, tuned: float, rate: float) -> None:
        report = statistics.paired_report([0.0] * 30, [tuned] * 30)
        assert report.win_rate == rate
        assert report.ci95 == statistics.wilson_interval(30 * rate, 30)

    def test_order_of_the_prompts_is_free(self) -> None:
        generator = np.random.default_rng(14)
        base, tuned, prompts = generator.normal(size=30), generator.normal(size=30), np.arange(30) % 10
        order = np.argsort(prompts, kind="stable")
        ours = statistics.paired_report(base, tuned, prompts)
        sorted_ = statistics.paired_report(base[order], tuned[order], prompts[order])
        assert sorted_.ci95 == ours.ci95 and sorted_.p_value == ours.p_value

    def test_prompts_may_come_from_an_iterator(self) -> None:
        args = ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0])
        assert statistics.paired_report(*args, iter("aab")) == statistics.paired_report(*args, list("aab"))

    @pytest.mark.parametrize(
        ("base", "tuned", "prompts", "message"),
        [
            ([], [], None, "There is nothing to compare"),
            ([1.0, 2.0], [1.0], None, r"2 base scores against 1 tuned scores"),
            ([1.0, 2.0], [2.0, 1.0], ["a"], r"1 prompts for 2 values"),
            (
                [1.0, math.nan, math.nan],
                [1.0] * 3,
                None,
                r"2 of 3 base scores are not finite.*\(base score 1\)",
            ),
            ([1.0, 2.0], [math.inf, 0.0], None, r"1 of 2 tuned scores are not finite, the first is inf"),
            ([1.0, 2.0], [2.0, 1.0], ["a", "a"], "One prompt cannot give an interval"),
        ],
    )
    def test_bad_input_is_one_line(self, base: Any, tuned: Any, prompts: Any, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            statistics.paired_report(base, tuned, prompts)
        assert "\n" not in str(caught.value)

    def test_a_table_of_scores_is_a_bug(self) -> None:
        with pytest.raises(ValueError, match="one-dimensional"):
            statistics.paired_report(np.zeros((2, 2)), np.ones((2, 2)))

    @pytest.mark.parametrize("name", ["bootstrap_interval", "sign_test", "permutation_test"])
    @pytest.mark.parametrize("values", [[], [0.0, math.nan]])
    def test_every_function_refuses_nothing_and_nan(self, name: str, values: list[float]) -> None:
        with pytest.raises(UserError):
            getattr(statistics, name)(values)
