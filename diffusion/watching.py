"""The watch for over-optimisation in a run: draws held-out prompts every so often, judges them, and says when to stop.

The rule is `evaluators.overoptimisation`'s. Pictures are drawn as rollouts are, by the pipeline's own sampler, with the
same noise at every look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from diffusion.models import DiffusionModel
from diffusion.recipe import RolloutSettings
from evaluators import scorer as scorers
from evaluators.diversity import ImageFeatures
from evaluators.looks import look
from evaluators.overoptimisation import FILE, Look, WatchSettings, add, due, read_history, write_history
from evaluators.rewards import Reward
from mmalign.config import NamedSection
from mmalign.errors import UserError
from mmalign.prompts import read_prompts


class Watch:
    """Looks at a run.

    Args:
        settings: the recipe's `watch` section.
        drawn: how rollouts are drawn.
        trained_on: prompts that must not be looked at.
        reward: what is trained; fitted on the first look where it is not yet.
        kl: the newest estimate of the implicit KL, if any.
        undisturbed: eval mode and untouched generators inside.
        folder: of the run; its `watch.jsonl` is the history.
        main: whether this process writes it.

    Raises:
        UserError: a watched prompt is trained on; an unknown scorer.
    """

    def __init__(
        self,
        settings: WatchSettings,
        drawn: RolloutSettings,
        model: DiffusionModel,
        reward: Reward,
        *,
        trained_on: Sequence[str],
        kl: Callable[[], float | None],
        undisturbed: Callable[[], AbstractContextManager[None]],
        folder: Path,
        main: bool,
    ) -> None:
        self._settings, self._drawn, self._model, self._reward = settings, drawn, model, reward
        self._kl, self._file, self._main, self._undisturbed = kl, folder / FILE, main, undisturbed
        distinct = read_prompts(settings.prompts, settings.count, settings.seed)
        if shared := set(distinct) & set(trained_on):
            raise UserError(
                f"{len(shared)} watched prompts are trained on, the first {sorted(shared)[0]!r}",
                place="watch.prompts",
                fix="Give prompts that are not among rollout.prompts.",
            )
        self._prompts = [prompt for prompt in distinct for _ in range(settings.per_prompt)]
        self._scorers = {name: _load(section) for name, section in settings.scorers.items()}
        features = None if settings.features is None else _load(settings.features)
        if features is not None and not isinstance(features, ImageFeatures):
            raise UserError(
                f"{features.identity} has no feature space", place="watch.features", fix="Use clip or null."
            )
        self._features = features
        self._history: list[Look] | None = None

    def __call__(self, step: int) -> str | None:
        """Look if it is time after `step` updates. Returns why the run should stop, if it should."""
        if self._history is None:
            self._history = read_history(self._file, step)
        if due(self._history, step, self._settings):
            self._history = add(self._history, self._look(step), self._settings)
            if self._main:
                write_history(self._file, self._history)
        return self._history[-1].verdict if self._history and self._settings.stop else None

    def _look(self, step: int) -> Look:
        with self._undisturbed():
            pictures = self._pictures()
        measured = self._reward.measure(self._prompts, pictures)
        self._reward.fit(measured.parts)
        proxy = self._reward.combine(measured.parts)
        kl = self._kl() if step else None
        return look(step, self._prompts, pictures, proxy, self._scorers, features=self._features, kl=kl)

    def _pictures(self) -> list[Image.Image]:
        seeds = [(self._settings.seed + 1) * 10**12 + index for index in range(len(self._prompts))]
        return self._model.sample(
            self._prompts,
            seeds=seeds,
            steps=self._drawn.steps,
            guidance_scale=self._drawn.guidance_scale,
            batch_size=self._drawn.batch_size,
        )


def _load(section: NamedSection) -> scorers.Scorer:
    return scorers.load(section.name, section.options())
