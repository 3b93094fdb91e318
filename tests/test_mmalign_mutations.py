"""Would the tests notice? Every loss gets a sign flipped and a factor changed, and its tests have to fail.

    pytest -m slow -s tests/test_mmalign_mutations.py      prints which test caught which mutation

All mutants run in one other process (torch loads once): a copy of `losses.py` with one fragment changed takes
the module's place and the tests of the losses run against it until the first one fails.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mmalign

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(mmalign.__file__).with_name("losses.py")
TESTS = Path(__file__).with_name("test_mmalign_losses.py")

# (loss, fragment, what becomes of it). A fragment stands exactly once in the source.
MUTATIONS = [
    ("logit_scale", '"mean_half": 0.5', '"mean_half": 1.0'),
    ("logit_scale", "return beta * per_beta[convention]", "return beta / per_beta[convention]"),
    ("equivalents", "scale / per_beta for", "scale * per_beta for"),
    ("implicit_rewards", "return -scale * (errors", "return scale * (errors"),
    ("implicit_rewards", "errors - reference_errors)", "errors + reference_errors)"),
    ("implicit_rewards", "return -scale * (errors", "return -2 * scale * (errors"),
    ("sigmoid", "return -F.logsigmoid(margin)", "return F.logsigmoid(margin)"),
    ("sigmoid", "return -F.logsigmoid(margin)", "return -F.logsigmoid(-margin)"),
    ("sigmoid", "return -F.logsigmoid(margin)", "return -F.logsigmoid(0.5 * margin)"),
    ("sigmoid", "return -F.logsigmoid(margin)", "return -torch.log(torch.sigmoid(margin))"),
    ("soft", "return confidence * sigmoid(margin) +", "return confidence * sigmoid(margin) -"),
    ("soft", "(1 - confidence) * sigmoid(-margin)", "(1 - confidence) * sigmoid(margin)"),
    ("soft", "(1 - confidence) * sigmoid(-margin)", "confidence * sigmoid(-margin)"),
    ("smoothed", "(2 * confidence - 1) * margin", "(1 - 2 * confidence) * margin"),
    ("smoothed", "(2 * confidence - 1) * margin", "(confidence - 1) * margin"),
    ("smoothed", "(2 * confidence - 1) * margin", "confidence * margin"),
    (
        "conservative",
        "return (1 - flip_rate) * sigmoid(margin) +",
        "return (1 - flip_rate) * sigmoid(margin) -",
    ),
    ("conservative", "return (1 - flip_rate) * sigmoid(margin) +", "return sigmoid(margin) +"),
    ("robust", "return ((1 - flip_rate) * sigmoid(margin) -", "return ((1 - flip_rate) * sigmoid(margin) +"),
    ("robust", "/ (1 - 2 * flip_rate)", "/ (1 - flip_rate)"),
    ("ipo", "margin / scale - 1 / (2 * tau)", "margin / scale + 1 / (2 * tau)"),
    ("ipo", "margin / scale - 1 / (2 * tau)", "margin / scale - 1 / tau"),
    ("ipo", "margin / scale - 1 / (2 * tau)", "margin - 1 / (2 * tau)"),
    ("exo", "p * (F.logsigmoid(margin) - math.log1p", "p * (F.logsigmoid(margin) + math.log1p"),
    ("exo", "q * (F.logsigmoid(-margin) - math.log(flip_rate))", "p * (F.logsigmoid(-margin) - math.log(flip_rate))"),
    ("offset", "sigmoid(margin - strength * gap)", "sigmoid(margin + strength * gap)"),
    ("offset", "sigmoid(margin - strength * gap)", "sigmoid(margin - gap)"),
    ("length", "sigmoid(margin + alpha * longer)", "sigmoid(margin - alpha * longer)"),
    ("length", "sigmoid(margin + alpha * longer)", "sigmoid(margin + longer)"),
    ("tdpo1", "margin - scale * (rejected_kl - chosen_kl)", "margin + scale * (rejected_kl - chosen_kl)"),
    ("tdpo1", "margin - scale * (rejected_kl - chosen_kl)", "margin - (rejected_kl - chosen_kl)"),
    ("tdpo1", "margin - scale * (rejected_kl - chosen_kl)", "margin - scale * (rejected_kl - chosen_kl.detach())"),
    ("tdpo2", "margin - alpha * scale * (rejected_kl", "margin + alpha * scale * (rejected_kl"),
    ("tdpo2", "margin - alpha * scale * (rejected_kl", "margin - scale * (rejected_kl"),
    ("tdpo2", "rejected_kl - chosen_kl.detach()", "rejected_kl - chosen_kl"),
    ("rrpo", "sigmoid(margin) + alpha * chosen_kl", "sigmoid(margin) - alpha * chosen_kl"),
    ("rrpo", "sigmoid(margin) + alpha * chosen_kl", "sigmoid(margin) + chosen_kl"),
    ("hinge", "F.relu(1 - margin)", "F.relu(1 + margin)"),
    ("hinge", "F.relu(1 - margin)", "F.relu(2 - margin)"),
    ("reward_difference", "(margin - gap / temperature)", "(margin + gap / temperature)"),
    ("reward_difference", "(margin - gap / temperature)", "(margin - gap * temperature)"),
    ("reward_difference", "(margin - gap / temperature)", "(margin - 2 * gap / temperature)"),
    ("sft", "return chosen_errors", "return -chosen_errors"),
    ("sft", "return chosen_errors", "return 0.5 * chosen_errors"),
    ("kto", "torch.sigmoid(-gain)", "torch.sigmoid(gain)"),
    ("kto", "(rewards - baseline)", "(rewards + baseline)"),
    ("kto", "torch.sigmoid(-gain)", "torch.sigmoid(-2 * gain)"),
    ("kto", "weight * (1 - F.logsigmoid(gain))", "weight * (1 + F.logsigmoid(gain))"),
    ("kto", "weight * (1 + F.logsigmoid(-gain))", "weight * (1 + F.logsigmoid(gain))"),
    ("kto", "+ undesirable_weight * (1 - good)", "+ desirable_weight * (1 - good)"),
    ("kto_baseline", "reduce_mean(rewards.detach())", "reduce_mean(-rewards.detach())"),
    ("kto_baseline", "reduce_mean(rewards.detach())", "reduce_mean(rewards)"),
    ("kto_baseline", ".clamp(min=0)\n", "\n"),
    ("mean_across_ranks", "torch.where(total[1] > 0, total[1], 1)", "(1 + total[1])"),
    ("mean_across_ranks", "(weights * values.detach().to(dtype)).sum()", "values.detach().to(dtype).sum()"),
    ("proximal_reward_difference", "(free - target)", "(free + target)"),
    ("proximal_reward_difference", "(clipped - target)", "(clipped + target)"),
    ("proximal_reward_difference", "clamp(old - clip, old + clip)", "clamp(old - 2 * clip, old + 2 * clip)"),
    ("proximal_reward_difference", "clamp(old - clip, old + clip)", "clamp(-clip, clip)"),
    ("proximal_reward_difference", "target = gap / temperature", "target = gap * temperature"),
    ("proximal_reward_difference", "loss = torch.maximum(", "loss = torch.minimum("),
    ("proximal_reward_difference", "~(gap <= 0)", "~(gap < 0)"),
    ("proximal_reward_difference", "old = old_log_ratios.detach()", "old = old_log_ratios"),
    ("proximal_reward_difference", '{"mean": torch.mean,', '{"mean": torch.sum,'),
    ("clipped_log_ratio", "math.log1p(-clip), math.log1p(clip)", "-clip, clip"),
    ("clipped_log_ratio", "math.log1p(-clip), math.log1p(clip)", "-math.inf, math.log1p(clip)"),
    ("clipped_log_ratio", "math.log1p(-clip), math.log1p(clip)", "math.log1p(-clip), math.inf"),
    ("step_preference", "return -F.logsigmoid(beta *", "return -F.logsigmoid(-beta *"),
    ("step_preference", "return -F.logsigmoid(beta *", "return -F.logsigmoid(0.5 * beta *"),
    ("step_preference", "- clipped_log_ratio(rejected, clip)", "- rejected"),
    ("policy_gradient", "torch.maximum(-bounded", "torch.minimum(-bounded"),
    ("policy_gradient", "-bounded * ratio,", "bounded * ratio,"),
    ("policy_gradient", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 - 2 * clip, 1 + clip)"),
    ("policy_gradient", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 - clip, 1 + 2 * clip)"),
    ("policy_gradient", "advantages.detach().clamp(-advantage_clip", "advantages.detach().clamp(-2 * advantage_clip"),
    ("policy_gradient", "bounded = advantages.detach()", "bounded = advantages"),
    ("advantages", "correction=0", "correction=1"),
    ("advantages", "shifted - shifted.mean(", "shifted + shifted.mean("),
    ("advantages", "shifted = exact - exact[..., :1]", "shifted = rewards"),
    ("advantages", "keepdim=True) + 1e-6)", "keepdim=True) + 0)"),
    ("dominance", "(rewards >= others).all(-1)", "(rewards >= others).any(-1)"),
    ("dominance", "- other.to(rewards.dtype)", "+ other.to(rewards.dtype)"),
    ("dominance", "& (rewards > others).any(-1)", "& (rewards > others).all(-1)"),
    ("dominance", ".any(-1), math.nan, sign)", ".any(-1), 0.0, sign)"),
    ("accuracy", "torch.tensor(0.5, dtype=margin.dtype", "torch.tensor(0.0, dtype=margin.dtype"),
    ("accuracy", "torch.heaviside(margin.detach()", "torch.heaviside(-margin.detach()"),
    ("weighted_mean", "(weights * loss).sum()", "loss.sum()"),
    ("weighted_mean", "torch.where(total > 0, total, 1)", "weights.numel()"),
    ("weighted_sum", "return weight * function(", "return -weight * function("),
    ("weighted_sum", "return weight * function(", "return function("),
]


@pytest.mark.slow
def test_every_mutation_of_a_loss_is_caught(tmp_path: Path) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    names = {mutation[0] for mutation in MUTATIONS}
    for name in names:
        assert f"\ndef {name}(" in source, f"the table mutates {name}, which is no longer in losses.py"
    folders = ["unchanged"]
    _write(tmp_path / "unchanged", source)
    for index, (loss, fragment, replacement) in enumerate(MUTATIONS):
        assert source.count(fragment) == 1, f"{loss}: {fragment!r} stands {source.count(fragment)} times in losses.py"
        folders.append(f"{index:02}")
        _write(tmp_path / folders[-1], source.replace(fragment, replacement))

    command = [sys.executable, __file__, *(str(tmp_path / folder) for folder in folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    results = dict(
        json.loads(line.removeprefix("caught ")) for line in run.stdout.splitlines() if line.startswith("caught ")
    )
    assert list(results) == folders

    assert results["unchanged"] is None, f"the unchanged losses fail {results['unchanged']}"
    caught = [(*mutation, results[folder]) for folder, mutation in zip(folders[1:], MUTATIONS, strict=True)]
    for loss, fragment, replacement, test in caught:
        print(f"\n{loss}: {fragment.strip()}  ->  {replacement.strip()}\n    {test or 'SURVIVED'}", end="")
    assert [entry for entry in caught if entry[-1] is None] == []


def test_every_loss_has_a_mutation() -> None:
    from mmalign.losses import PAIR_LOSSES

    covered = [mutation[0] for mutation in MUTATIONS]
    on_steps = ["proximal_reward_difference", "step_preference", "policy_gradient", "advantages", "dominance"]
    with_a_divergence = ["tdpo1", "tdpo2", "rrpo"]
    for loss in [*PAIR_LOSSES, "kto", *on_steps, *with_a_divergence]:
        assert covered.count(loss) >= 2, f"{loss} wants a flipped sign and a changed factor"


def _write(folder: Path, source: str) -> None:
    folder.mkdir()
    (folder / "losses.py").write_text(source, encoding="utf-8")


class _FirstFailure:
    """A pytest plugin that remembers the test which failed; an error outside a test's body does not count."""

    test: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.failed and self.test is None:
            self.test = report.nodeid.partition("::")[2]


@contextmanager
def _losses_from(folder: Path) -> Iterator[None]:
    """`mmalign.losses` is the file in `folder`, found by the ordinary import, its shapes checked as ever."""
    stale = [name for name in sys.modules if name == "mmalign.losses" or name.endswith(TESTS.stem)]
    for name in stale:
        del sys.modules[name]
    vars(mmalign).pop("losses", None)
    mmalign.__path__.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        mmalign.__path__.remove(str(folder))


def _run(folders: list[Path]) -> int:
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow", str(TESTS)]
    for folder in folders:
        with _losses_from(folder):
            first = _FirstFailure()
            code = pytest.main(options, plugins=[first])
            used = Path(sys.modules["mmalign.losses"].__file__ or "").parent
        if used != folder or code != (pytest.ExitCode.TESTS_FAILED if first.test else pytest.ExitCode.OK):
            return 1  # another module was tested, or something other than a test failed
        print("\ncaught", json.dumps([folder.name, first.test]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_run([Path(argument) for argument in sys.argv[1:]]))
