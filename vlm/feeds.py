"""What a vision-language method is fed with: pairs out of a store, read, looked at and made rows of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from mmalign import config as configuration
from mmalign.ahead import ahead
from mmalign.errors import UserError
from mmalign.loop import Loop
from mmalign.order import Pick
from mmalign.progress import progress
from mmalign.randomness import key_seed
from mmalign.records import Preference
from vlm.batch import Row
from vlm.conversations import Conversation, conversations
from vlm.corruption import blank
from vlm.models import TooLongError, VisionLanguageModel
from vlm.parts import Pair, PairBatch, Viewer
from vlm.recipe import TrainConfig


class PairFeed:
    """Pairs that the model can read.

    Every pair is made rows of once before training, so that a broken picture, a wrong placeholder or a row that is too
    long is found before hours are spent. What is too long is left out and counted.

    Attributes:
        key: of the data: equal keys mean equal batches for equal seeds.
        size: pairs in an epoch.

    Raises:
        UserError: a pair that cannot be read, or none that the model could.
    """

    unit = "pairs"

    def __init__(
        self,
        config: TrainConfig,
        model: VisionLanguageModel,
        viewer: Viewer,
        pairs: Sequence[Preference],
        note: str,
        *,
        main: bool = True,
    ) -> None:
        self._config, self._model, self._viewer = config, model, viewer
        kept: list[Preference] = []
        self._longest, too_long = 0, 0
        for pair in progress(pairs, "look at pairs", unit="pair", enabled=main):
            try:
                rows = list(self._rows(pair, 0).values())
            except TooLongError:
                too_long += 1
                continue
            kept.append(pair)
            self._longest = max(self._longest, *(len(row) for row in rows))
        if not kept:
            raise UserError(
                f"the data has no pair that the model can read ({len(pairs)} pairs, {too_long} too long)",
                place=f"data.path={config.data.path}",
                fix="Check data.split and data.pairing, or raise model.max_tokens",
            )
        self._pairs, self.size = kept, len(kept)
        dropped = f", {too_long} left out: longer than {model.max_tokens} tokens" if too_long else ""
        self._note = f"{note}; longest row {self._longest} tokens{dropped}"
        self.key = configuration.digest(
            {"pairs": [_identity(pair) for pair in kept], "blank": config.data.blank_images}
        )

    def notes(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        apart = self._model.unshared
        shared = "computed once for all its answers" if apart is None else f"computed for each answer: {apart}"
        return {"data": self._note, "picture and question": shared}

    def source(self, loop: Loop) -> Callable[[int], Iterator[PairBatch]]:
        """A function from an update's number to this process's batches from there on."""
        device = loop.accelerator.device
        return lambda start: ahead(lambda picks: self.batch(picks, device), loop.picks([range(self.size)], start))

    def batch(self, picks: Sequence[Pick], device: torch.device) -> PairBatch:
        """Some pairs as rows of all the method's views."""
        cycle = self._config.reference.draws if self._config.reference.cache else None
        views: dict[str, list[Row]] = {}
        confidence, gaps = [], []
        for pick in picks:
            preference = self._pairs[pick.item]
            visit = pick.visit if cycle is None else pick.visit % cycle
            for name, row in self._rows(preference, visit).items():
                views.setdefault(name, []).append(row)
            confidence.append(preference.ordered()[2])
            gaps.append(preference.gap)
        return PairBatch(
            views={name: tuple(rows) for name, rows in views.items()},
            device=device,
            confidence=torch.tensor(confidence, device=device),
            gap=None if any(gap is None for gap in gaps) else torch.tensor(gaps, device=device),
        )

    def example(self) -> PairBatch:
        """The first pairs, for measuring how long a forward takes."""
        picks = [Pick(item, 0) for item in range(min(self.size, self._config.loop.batch_size))]
        return self.batch(picks, self._model.device)

    def _rows(self, preference: Preference, visit: int) -> dict[str, Row]:
        chosen, rejected = self._sides(preference)
        seed = key_seed("pair", self._config.loop.seed, preference.item_id, visit)
        asked = self._viewer.views(Pair(chosen=chosen, rejected=rejected, seed=seed))
        return {name: self._model.encode(view) for name, view in asked.items()}

    def _sides(self, pair: Preference) -> tuple[Conversation, Conversation]:
        sides = conversations(pair)
        if not self._config.data.blank_images:
            return sides
        first, second = (replace(side, images=tuple(blank(image) for image in side.images)) for side in sides)
        return first, second


def _identity(pair: Preference) -> list[object]:
    first, second, confidence = pair.ordered()
    media = [[one.sha256() for one in side.media] for side in (first, second)]
    return [pair.item_id, first.prompt, first.response, second.prompt, second.response, media, confidence, pair.gap]
