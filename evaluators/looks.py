"""Takes a look for the watch: judges pictures of held-out prompts. The rule itself needs none of what this imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from PIL import Image

from evaluators.diversity import ImageFeatures, degenerate, distances, diversity
from evaluators.overoptimisation import Look
from evaluators.scorer import Scorer, main_scores


def look(
    step: int,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    proxy: Sequence[float],
    scorers: Mapping[str, Scorer],
    *,
    features: ImageFeatures | None = None,
    kl: float | None = None,
) -> Look:
    """Judges the pictures of a look.

    Args:
        step: updates done.
        prompts: the prompt of each picture.
        images: the pictures; those of one prompt need not be together.
        proxy: the reward of each picture.
        scorers: those that the run is not rewarded by.
        features: in whose space diversity is measured; None: by pixels.
        kl: implicit KL from the reference.
    """
    return Look(
        step=step,
        proxy=_by_prompt(proxy, prompts),
        held_out={name: _by_prompt(main_scores(one, prompts, images), prompts) for name, one in scorers.items()},
        diversity=diversity(distances(images, features), prompts),
        degenerate=degenerate(images, prompts).share,
        kl=kl,
    )


def _by_prompt(values: Sequence[float], prompts: Sequence[str]) -> list[float]:
    """Mean over the pictures of each prompt, prompts in order of first appearance."""
    found: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        found.setdefault(prompt, []).append(value)
    return [fmean(some) for some in found.values()]
