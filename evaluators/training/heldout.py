"""How good a trained scorer is on pairs that it never saw: accuracy by every definition, and calibration.

What the labels allow is said beside it: how often the best judge there could be agrees with them. A label that is right
with probability p agrees with him in max(p, 1 - p) of cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from evaluators import accuracy
from evaluators.accuracy import Share
from evaluators.calibration import Calibration, calibration
from evaluators.training.data import Item, PictureFeed, items_of
from evaluators.training.model import PreferenceModel
from mmalign.apart import write_json
from mmalign.pairdata import best_agreement
from mmalign.progress import progress
from mmalign.records import Preference

FILE = "held_out.json"
BATCH = 32  # prompts embedded at once


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """What is held out, ready to be judged by.

    Attributes:
        confidence, prompts: of each pair.
        allowed: the accuracy that the labels allow.
    """

    items: tuple[Item, ...]
    confidence: accuracy.Values
    prompts: tuple[str, ...]
    allowed: float

    @staticmethod
    def of(pairs: Sequence[Preference]) -> HeldOut:
        """Of pairs, by prompt."""
        items = items_of(pairs, "prompts")
        best = [best_agreement(pair) for pair in pairs if pair.label != "tie"]
        return HeldOut(
            items=tuple(items),
            confidence=np.array([confidence for item in items for confidence in item.confidence]),
            prompts=tuple(item.prompt for item in items for _ in item.pairs),
            allowed=float(np.mean(best)) if best else 0.5,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Of a scorer on what was held out."""

    pairs: int
    allowed: float
    strict: Share
    rank: Share
    pickscore: Share
    tie_threshold: float
    calibration: Calibration

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {
            "held_out/accuracy": self.strict.value,
            "held_out/log_loss": self.calibration.log_loss,
            "held_out/ece": self.calibration.ece,
        }


def report(before: Judgement, after: Judgement, folder: Path) -> list[str]:
    """Lines for people; all numbers go to held_out.json."""
    write_json(folder / FILE, {"before": asdict(before), "after": asdict(after)})
    rows = [
        ("accuracy, strict", str(before.strict), str(after.strict)),
        ("accuracy, mean over prompts", str(before.rank), str(after.rank)),
        ("accuracy with ties", str(before.pickscore), f"{after.pickscore}, threshold {after.tie_threshold:.2f}"),
        ("log loss", f"{before.calibration.log_loss:.3f}", f"{after.calibration.log_loss:.3f}"),
        ("Brier", f"{before.calibration.brier:.3f}", f"{after.calibration.brier:.3f}"),
        ("ECE", f"{before.calibration.ece:.3f}", f"{after.calibration.ece:.3f}"),
        ("temperature", f"{before.calibration.temperature:.2f}", f"{after.calibration.temperature:.2f}"),
    ]
    head = f"held out: {after.pairs} pairs of {after.rank.count} prompts; the labels allow {after.allowed:.3f}"
    return [head, *(f"  {name:<28} {old:<22} -> {new}" for name, old, new in rows)]


@torch.no_grad()
def margins(model: PreferenceModel, feed: PictureFeed, held: HeldOut, device: torch.device) -> accuracy.Values:
    """Of each pair the score of the preferred picture minus that of the other."""
    found: list[float] = []
    for start in progress(range(0, len(held.items), BATCH), "held out", unit="batch"):
        batch = feed.batch(held.items[start : start + BATCH], device)
        scores = model(batch.tokens, batch.pixels, batch.owner)[0]
        found += (scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]]).tolist()
    return np.array(found)


def judged(found: accuracy.Values, held: HeldOut) -> Judgement:
    """A scorer by its margins."""
    thresholds = _thresholds(found, held)
    return Judgement(
        pairs=len(found),
        allowed=held.allowed,
        strict=accuracy.strict(found, held.confidence, held.prompts),
        rank=accuracy.rank(found, held.confidence, held.prompts),
        pickscore=accuracy.pickscore(found, held.confidence, held.prompts, thresholds),
        tie_threshold=float(thresholds.mean()),
        calibration=calibration(found, held.confidence),
    )


def _thresholds(found: accuracy.Values, held: HeldOut) -> accuracy.Values:
    """For each pair the threshold that fits the other half of the prompts."""
    half = np.array([hashlib.sha256(prompt.encode()).digest()[0] % 2 for prompt in held.prompts])
    fits = [accuracy.tie_threshold(found[half != side], held.confidence[half != side]) for side in (0, 1)]
    chosen: accuracy.Values = np.array(fits)[half]
    return chosen
