"""How good a trained scorer is on pairs that it never saw: accuracy by every definition, and calibration.

What the labels allow is said beside it: how often the best judge there could be agrees with them. A label that is right
with probability p agrees with him in max(p, 1 - p) of cases.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from evaluators import accuracy
from evaluators.accuracy import Published
from evaluators.calibration import Calibration, calibration
from evaluators.training.data import Item, PictureFeed, items_of
from evaluators.training.model import PreferenceModel
from mmalign.apart import write_json
from mmalign.loop import processes
from mmalign.media import Media
from mmalign.pairdata import best_agreement
from mmalign.progress import progress
from mmalign.records import Preference

FILE = "held_out.json"
BATCH = 64  # pictures embedded at once, however many a prompt has


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
    """Of each pair the score of the preferred picture minus that of the other.

    Processes share the work: all of them must come here, and all get all margins.
    """
    here = processes()
    pictures = [(item.prompt, picture) for item in held.items for picture in item.pictures]
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    own = batches[here.process_index :: here.num_processes]
    found = [
        _scores(model, feed, batch, device)
        for batch in progress(own, "held out", unit="batch", enabled=here.is_main_process)
    ]
    ranks = [found] if here.num_processes == 1 else gather_object([found])
    taken = (ranks[index % here.num_processes][index // here.num_processes] for index in range(len(batches)))
    scores = itertools.chain.from_iterable(taken)
    of_items = [(item, list(itertools.islice(scores, len(item.pictures)))) for item in held.items]
    return np.array([of[i] - of[j] for item, of in of_items for i, j in item.pairs])


def _scores(
    model: PreferenceModel, feed: PictureFeed, pictures: Sequence[tuple[str, Media]], device: torch.device
) -> list[float]:
    """Of pictures for their prompts; those of a prompt stand side by side and share its text."""
    parts = [
        Item(prompt=prompt, pictures=tuple(picture for _, picture in part), pairs=(), confidence=(), gaps=())
        for prompt, part in itertools.groupby(pictures, operator.itemgetter(0))
    ]
    batch = feed.batch(parts, device)
    scores: list[float] = model(batch.tokens, batch.pixels, batch.owner)[0].tolist()
    return scores


def judged(found: accuracy.Values, held: HeldOut) -> Judgement:
    """A scorer by its margins."""
    return Judgement(
        pairs=len(found),
        allowed=held.allowed,
        accuracy=accuracy.published(found, held.confidence, held.prompts, held.prompts),
        calibration=calibration(found, held.confidence),
    )
