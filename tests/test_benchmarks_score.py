"""The benchmarks of scoring run and say what they measured. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coverage

ROOT = Path(__file__).parent.parent


def report(*words: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_kills_lose_nothing_and_double_nothing() -> None:
    found = report("benchmarks.score_resume", "--pictures", "3000", "--per-shard", "50", "--kills", "2")
    assert (found["rows"], found["lost"], found["twice"], found["wrong"]) == (3000, 0, 0, 0)
    assert len(found["shards_done_at_each_kill"]) == 2
    assert found["last_start"]["pictures"] == 3000 - 50 * found["shards_done_at_each_kill"][-1]


@pytest.mark.slow
def test_both_ways_of_scoring_give_the_same_numbers() -> None:
    found = report(
        "benchmarks.score_throughput", "--pictures", "8", "--rounds", "1", "--side", "256", "--device", "cpu"
    )
    assert found["largest_difference_of_a_score"] < 1e-4
    assert found["pictures_per_second"]["loop"]["min"] > 0 and found["ratio"]["median"] > 0
    (shares,) = found["ours"]
    assert shares["pictures"] == 8 and {"waiting", "computing", "writing"} == set(shares["shares"])


def test_the_worlds_of_the_coverage_benchmark_know_their_truth() -> None:
    """The win rate that a world states is that of very many draws."""
    import numpy as np

    for name in ("effect, ties", "skewed", "20 prompts, nearly always won"):
        world = coverage.WORLDS[name]
        generator = np.random.default_rng(0)
        draws = [world.draw(generator)[0] for _ in range(3000)]
        values = np.concatenate(draws)
        rate = ((values > world.tie).mean() + (values >= -world.tie).mean()) / 2
        assert rate == pytest.approx(world.win_rate(), abs=0.006)
        assert values.mean() == pytest.approx(world.shift, abs=0.01)


def test_the_coverage_benchmark_prints_a_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["--runs", "4", "--resamples", "50", "--worlds", "null"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 4 and 0 <= found["worlds"]["null"]["win rate"] <= 1
