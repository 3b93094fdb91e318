"""Makes a preference store where there is none: pictures sampled from a model, scored by a scorer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffusion.models import DiffusionModel
from diffusion.recipe import CandidateSettings
from evaluators import scorer as scorers
from mmalign.media import Media
from mmalign.preferences import Store
from mmalign.prompts import read_prompts
from mmalign.records import Candidate, Record


def make_store(model: DiffusionModel, settings: CandidateSettings, path: Path) -> Store:
    """Sample `per_prompt` pictures for each prompt, score them, and write the store at `path`.

    Picture k of prompt i has noise seed `seed * 10^9 + i * 1000 + k`, stored with it.
    """
    scorer = scorers.load(settings.scorer.name, settings.scorer.options())
    prompts = read_prompts(settings.prompts, settings.count, settings.seed)
    repeated = [prompt for prompt in prompts for _ in range(settings.per_prompt)]
    seeds = [
        settings.seed * 10**9 + index * 1000 + k for index in range(len(prompts)) for k in range(settings.per_prompt)
    ]
    images = model.sample(
        repeated,
        seeds=seeds,
        steps=settings.sampler.steps,
        guidance_scale=settings.sampler.guidance_scale,
        batch_size=settings.sampler.batch_size,
        label="candidates",
    )
    scores = scorer.score(repeated, images)

    def records() -> Iterator[Record]:
        for index, prompt in enumerate(prompts):
            rows = range(index * settings.per_prompt, (index + 1) * settings.per_prompt)
            yield Record(
                record_id=f"{index:06d}",
                prompt=prompt,
                candidates=tuple(
                    Candidate(
                        candidate_id=str(k),
                        image=Media.from_image(images[row]),
                        scores=scores[row],
                        model=model.identity,
                        seed=seeds[row],
                    )
                    for k, row in enumerate(rows)
                ),
                split="train",
                source=f"sampled from {model.identity}",
            )

    return Store.write(records(), path, scorers=dict.fromkeys(scores[0], scorer.identity))
