"""How good a trained scorer is on pairs that it never saw: accuracy by every definition, and calibration.

What the labels allow is said beside it: how often the best judge there could be agrees with them. A label that is right
with probability p agrees with him in max(p, 1 - p) of cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from evaluators import accuracy
from evaluators.accuracy import Published
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
    accuracy: Published
    calibration: Calibration

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {
            "held_out/accuracy": self.accuracy.strict.value,
            "held_out/log_loss": self.calibration.log_loss,
            "held_out/ece": self.calibration.ece,
        }


def report(before: Judgement, after: Judgement, folder: Path) -> list[str]:
    """Lines for people; all numbers go to held_out.json."""
    write_json(folder / FILE, {"before": asdict(before), "after": asdict(after)})
    old, new = before.accuracy, after.accuracy
    rows = [
        ("accuracy, strict", str(old.strict), str(new.strict)),
        ("accuracy, mean over prompts", str(old.rank), str(new.rank)),
        ("accuracy with ties", str(old.pickscore), f"{new.pickscore}, threshold {new.threshold:.2f}"),
        ("log loss", f"{before.calibration.log_loss:.3f}", f"{after.calibration.log_loss:.3f}"),
        ("Brier", f"{before.calibration.brier:.3f}", f"{after.calibration.brier:.3f}"),
        ("ECE", f"{before.calibration.ece:.3f}", f"{after.calibration.ece:.3f}"),
        ("temperature", f"{before.calibration.temperature:.2f}", f"{after.calibration.temperature:.2f}"),
    ]
    head = f"held out: {after.pairs} pairs of {new.rank.count} prompts; the labels allow {after.allowed:.3f}"
    return [head, *(f"  {name:<28} {was:<22} -> {now}" for name, was, now in rows)]


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
    return Judgement(
        pairs=len(found),
        allowed=held.allowed,
        accuracy=accuracy.published(found, held.confidence, held.prompts),
        calibration=calibration(found, held.confidence),
    )
