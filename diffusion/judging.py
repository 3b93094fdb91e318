"""Draws the same prompts with the same noise from several models and scores every picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from diffusion.models import DiffusionModel
from diffusion.recipe import EvaluationSettings
from evaluators import scorer as scorers
from mmalign.prompts import read_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One model's pictures of the evaluation prompts, and every scorer's numbers for each."""

    prompts: list[str]
    pictures: list[Image.Image]
    scores: list[dict[str, float]]

    def column(self, name: str) -> list[float]:
        """One number for every prompt; only for numbers that every prompt has."""
        return [row[name] for row in self.scores]

    def complete(self) -> list[str]:
        """The numbers that every picture has."""
        return [name for name in self.scores[0] if all(name in row for row in self.scores)]


def judge(settings: EvaluationSettings, models: Mapping[str, Callable[[], DiffusionModel]]) -> dict[str, Judged]:
    """Sample and score every model on the evaluation prompts.

    Args:
        settings: prompts, how many, which noise, the sampler and the scorers.
        models: name -> how to open it; opened one at a time.
    """
    distinct = read_prompts(settings.prompts, settings.count, settings.seed)
    prompts = [prompt for prompt in distinct for _ in range(settings.per_prompt)]
    seeds = [(settings.seed + 1) * 10**12 + index for index in range(len(prompts))]
    judges = [scorers.load(section.name, section.options()) for section in settings.scorers]
    judged = {}
    for name, opened in models.items():
        pictures = opened().sample(
            prompts,
            seeds=seeds,
            steps=settings.sampler.steps,
            guidance_scale=settings.sampler.guidance_scale,
            batch_size=settings.sampler.batch_size,
            label=f"sample {name}",
        )
        rows: list[dict[str, float]] = [{} for _ in prompts]
        for scorer in judges:
            for row, numbers in zip(rows, scorer.score_images(prompts, pictures), strict=True):
                row.update(numbers)
        judged[name] = Judged(prompts=prompts, pictures=pictures, scores=rows)
    return judged
