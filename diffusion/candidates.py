"""Makes a preference store where there is none: pictures sampled from a model, scored by a scorer or set against
target pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.models import DiffusionModel
from diffusion.recipe import CandidateSettings
from evaluators import scorer as scorers
from mmalign import importers
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.preferences import Store
from mmalign.prompts import read_prompts
from mmalign.records import Candidate, Record, Vote
from mmalign.unpaired import decided

TARGET = "target"


def make_store(model: DiffusionModel, settings: CandidateSettings, path: Path) -> Store:
    """Sample `per_prompt` pictures for each prompt or target, and write the store at `path`.

    With prompts, every picture is scored. With targets there is a record for each: the target, and samples of its
    caption that it wins over, vote by vote.

    Picture k of prompt or target i has noise seed `seed * 10^9 + i * 1000 + k`, stored with it.
    """
    if settings.targets is not None:
        return _against_targets(model, settings, read_targets(settings.targets, settings.count, settings.seed), path)
    assert settings.prompts is not None and settings.scorer is not None  # by the settings' own check
    scorer = scorers.load(settings.scorer.name, settings.scorer.options())
    prompts = read_prompts(settings.prompts, settings.count, settings.seed)
    images, seeds = _sample(model, settings, prompts)
    scores = scorer.score_images([prompt for prompt in prompts for _ in range(settings.per_prompt)], images)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A picture to move towards, and the record it is from."""

    prompt: str
    picture: Media
    record: Record


def read_targets(source: str, count: int | None = None, seed: int = 0) -> list[Target]:
    """The pictures of any source that `mmalign data import` reads: all of a record without votes, else its winners.

    Args:
        source: a folder of captioned pictures, a store, ...
        count: how many; None for all.
        seed: which ones.

    Raises:
        UserError: no such source, a picture that does not open or has no caption, a text, too few of them.
    """
    targets = []
    for record in importers.read(source, decode=True):
        winners = {winner for winner, _ in decided(record)}
        for candidate in record.candidates:
            if record.votes and candidate.candidate_id not in winners:
                continue
            if candidate.image is None:
                raise UserError(
                    "a target is a text, not a picture", place=record.where, fix="Give pictures with captions"
                )
            prompt = record.prompt if candidate.prompt is None else candidate.prompt
            targets.append(Target(prompt=prompt, picture=candidate.image, record=record))
    if not targets or (count is not None and count > len(targets)):
        asked = "targets" if count is None else f"{count} targets"
        raise UserError(f"{asked} asked for, there are {len(targets) or 'none'}", place=source)
    if count is None:
        return targets
    order = np.random.default_rng([seed, 7]).permutation(len(targets))
    return [targets[index] for index in order[:count]]


def _against_targets(
    model: DiffusionModel, settings: CandidateSettings, targets: Sequence[Target], path: Path
) -> Store:
    images, seeds = _sample(model, settings, [target.prompt for target in targets])

    def records() -> Iterator[Record]:
        for index, target in enumerate(targets):
            rows = range(index * settings.per_prompt, (index + 1) * settings.per_prompt)
            samples = [
                Candidate(
                    candidate_id=str(k), image=Media.from_image(images[row]), model=model.identity, seed=seeds[row]
                )
                for k, row in enumerate(rows)
            ]
            yield Record(
                record_id=f"{index:06d}",
                prompt=target.prompt,
                candidates=(Candidate(candidate_id=TARGET, image=target.picture), *samples),
                votes=tuple(Vote(a=TARGET, b=sample.candidate_id, label="a", rater="targets") for sample in samples),
                split="train",
                licence=target.record.licence,
                source=f"{target.record.source or 'targets'}, against samples from {model.identity}",
                context={"target": target.record.record_id},
            )

    return Store.write(records(), path)


def _sample(
    model: DiffusionModel, settings: CandidateSettings, prompts: Sequence[str]
) -> tuple[list[Image.Image], list[int]]:
    """(pictures, seeds), `per_prompt` of them for each prompt."""
    numbers = range(settings.per_prompt)
    seeds = [settings.seed * 10**9 + index * 1000 + k for index in range(len(prompts)) for k in numbers]
    images = model.sample(
        [prompt for prompt in prompts for _ in numbers],
        seeds=seeds,
        steps=settings.sampler.steps,
        guidance_scale=settings.sampler.guidance_scale,
        batch_size=settings.sampler.batch_size,
        label="candidates",
    )
    return images, seeds
