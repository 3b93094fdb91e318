"""Do 95 % intervals hold the truth 95 times in 100, and do tests reject 5 in 100 where there is nothing to find?

    python -m benchmarks.coverage > coverage.json

Synthetic experiments whose truth is known: scores of two models on prompts with several seeds each, where a prompt's
units resemble each other. Of every experiment the intervals and tests of `mmalign.statistics` as `mmalign compare`
reports them, and beside them what they replace: the plain percentile bootstrap, and units taken for independent.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from mmalign.progress import Progress
from mmalign.statistics import (
    Values,
    bootstrap_interval,
    permutation_test,
    share_interval,
    sign_test,
    wilson_interval,
    win_scores,
)

NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """How differences come about: prompt effect + unit effect, scaled and moved.

    Attributes:
        shift: mean difference in units of its deviation.
        shared: share of the variance that a prompt's units have in common.
        skew: 0 for normal differences; else exp(skew * normal), centred: a few prompts gain a lot.
        tie: differences up to this size are ties.
        uneven: prompts have 1 to `seeds` units instead of `seeds`.
    """

    prompts: int
    seeds: int = 4
    shift: float = 0.0
    shared: float = 0.5
    skew: float = 0.0
    tie: float = 0.0
    uneven: bool = False

    def draw(self, generator: np.random.Generator) -> tuple[Values, Values]:
        """(differences, prompt of each)."""
        common = generator.normal(0, math.sqrt(self.shared), (self.prompts, 1))
        noise = common + generator.normal(0, math.sqrt(1 - self.shared), (self.prompts, self.seeds))
        values = np.exp(self.skew * noise) - math.exp(self.skew**2 / 2) if self.skew else noise
        prompts = np.repeat(np.arange(self.prompts), self.seeds)
        kept = np.ones(len(prompts), dtype=bool)
        if self.uneven:
            kept = (np.arange(self.seeds) < generator.integers(1, self.seeds + 1, (self.prompts, 1))).ravel()
        return (self.shift + values.ravel())[kept], prompts[kept].astype(np.float64)

    def win_rate(self) -> float:
        """The true win rate, ties half."""

        def above(bound: float) -> float:  # P(difference > bound)
            value = bound - self.shift
            if not self.skew:
                return 1 - NORMAL.cdf(value)
            value += math.exp(self.skew**2 / 2)
            return 1.0 if value <= 0 else 1 - NORMAL.cdf(math.log(value) / self.skew)

        return (above(self.tie) + above(-self.tie)) / 2


WORLDS = {
    "null": World(prompts=100),
    "null, one seed": World(prompts=200, seeds=1),
    "effect, ties": World(prompts=100, shift=0.3, tie=0.2),
    "effect, uneven": World(prompts=100, shift=0.5, uneven=True),
    "strong clusters": World(prompts=100, shift=0.2, shared=0.9),
    "20 prompts": World(prompts=20, shift=0.3),
    "20 prompts, nearly always won": World(prompts=20, shift=1.8),
    "20 prompts, one seed, nearly always won": World(prompts=20, seeds=1, shift=1.8),
    "500 prompts": World(prompts=500, shift=0.15),
    "skewed": World(prompts=200, shift=0.2, skew=0.5),
}


def experiment(
    world: World, runs: int, *, seed: int = 0, resamples: int = 1000, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Shares over `runs` experiments: how often intervals held the truth, how often tests rejected at 5 %."""
    generator = np.random.default_rng([seed, world.prompts, world.seeds])
    counts: dict[str, int] = {}

    def count(name: str, hit: bool) -> None:
        counts[name] = counts.get(name, 0) + hit

    true = world.win_rate()
    for run in range(runs):
        differences, prompts = world.draw(generator)
        wins = win_scores(np.zeros_like(differences), differences, tolerance=world.tie)

        def holds(interval: Sequence[float], truth: float) -> bool:
            return interval[0] <= truth <= interval[1]

        count("win rate", holds(share_interval(wins, prompts), true))
        interval = bootstrap_interval(differences, prompts, resamples=resamples, seed=run)
        count("mean difference", holds(interval, world.shift))
        count("plain percentile, win rate", holds(_percentile(wins, prompts, resamples, run), true))
        count(
            "plain percentile, mean difference", holds(_percentile(differences, prompts, resamples, run), world.shift)
        )
        count("units taken for independent, win rate", holds(wilson_interval(float(wins.sum()), len(wins)), true))
        count("sign test rejects", sign_test(wins - 0.5, prompts) < 0.05)
        count("permutation test rejects", permutation_test(differences, prompts, resamples=499, seed=run) <= 0.05)
        advance()
    return {name: hits / runs for name, hits in counts.items()}


def _percentile(values: Values, prompts: Values, resamples: int, seed: int) -> tuple[float, float]:
    """The plain percentile bootstrap over prompts."""
    member = prompts.astype(int)
    sums, sizes = np.bincount(member, values), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the shares of every world as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="experiments per world (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), metavar="WORLD")
    said = parser.parse_args(argv)
    found: dict[str, Any] = {}
    with Progress(said.runs * len(said.worlds), "experiments", unit="experiment") as shown:
        for name in said.worlds:
            world = WORLDS[name]
            found[name] = {
                "win_rate": world.win_rate(),
                "shift": world.shift,
                **experiment(world, said.runs, resamples=said.resamples, advance=shown.update),
            }
    print(json.dumps({"benchmark": "coverage", "runs": said.runs, "resamples": said.resamples, "worlds": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
