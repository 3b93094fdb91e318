"""Re-Align's data: the true answer with its facts filled in from another picture, and that other picture.

What the answer takes from the picture is masked; pictures that look alike to the model are tried, the most similar
first; the masks are filled by what that picture shows. A filled answer is accepted where it says something else,

    similarity(true answer, filled answer) < tau,

else the next picture is tried; an example without an acceptable one is left out. The rejected side has the filled
answer and the retrieved picture. A similar picture changes a yes into a no more often than a no into a yes, so the
surplus is left out as well.

Who fills: a model that looks at the retrieved picture, or, in the shapes world, a rule that describes it truly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from mmalign.config import NamedSection
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.records import Candidate, Record
from mmalign.shapes import talk
from mmalign.shapes.scenes import Scene
from vlm.annotators import Request, ask, open_annotator
from vlm.examples import Example, SourceSettings, answer_about, evened, is_false, read_examples
from vlm.fingerprints import model_identity
from vlm.makers.injected import vocabulary_of
from vlm.masking import MASK, Masked, mask, masking_prompt, read_masked, refill_prompt
from vlm.models import VisionLanguageModel
from vlm.retrieval import ImageIndex, vision_encoder
from vlm.similarity import similarity

NAME = "refilled"


class Options(SourceSettings):
    """How masks are placed and filled, and what is accepted."""

    tau: float = Field(0.95, gt=0, le=1, description="accepted below this similarity to the true answer")
    neighbours: int = Field(10, gt=0, description="pictures tried, the most similar first")
    encoder: str | None = Field(
        None, description="folder or hub id of a sentence encoder whose cosine is the similarity; null: shared words"
    )
    masks: NamedSection | None = Field(None, description="endpoint or local: who places masks; null: rules")
    refill: NamedSection | None = Field(None, description="endpoint or local: who fills them; null: rules, for shapes")
    index: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="file that keeps the pictures' vectors"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """One example and the picture that may fill its masks."""

    example: Example
    masked: Masked
    picture: Media
    cosine: float


_Fill: TypeAlias = Callable[[Sequence[_Try]], list[str]]
_Opener: TypeAlias = Callable[[], VisionLanguageModel]


def records(options: Options, model: _Opener) -> Iterator[Record]:
    """A record for each answer with masks that some similar picture fills differently."""
    examples = read_examples(options)
    masks = _masks(options, examples, model)
    fill, who = _filler(options, examples, model)
    alike = similarity(options.encoder)
    opened = model()
    pictures = {media.sha256(): media for example in examples for media in example.media}
    index = ImageIndex.build(
        list(pictures.values()), vision_encoder(opened), file=options.index, encoder=model_identity(opened)
    )
    near: dict[str, list[tuple[str, float]]] = {}
    for example in examples:
        own = example.media[0].sha256()
        if own not in near:
            near[own] = index.search(index.vector(own), options.neighbours, exclude={own})
    accepted: dict[int, Record] = {}
    waiting = [number for number, masked in enumerate(masks) if masked is not None]
    for rank in range(options.neighbours):
        tries = {}
        for number in waiting:
            found, masked = near[examples[number].media[0].sha256()], masks[number]
            if rank < len(found) and masked is not None:
                digest, cosine = found[rank]
                tries[number] = _Try(example=examples[number], masked=masked, picture=pictures[digest], cosine=cosine)
        texts = fill(list(tries.values()))
        scores = alike([one.example.answer for one in tries.values()], texts)
        for (number, one), text, score in zip(tries.items(), texts, scores, strict=True):
            if score < options.tau and MASK not in text and is_false(one.example, text):
                accepted[number] = _record(one, text, {"by": who, "similarity": score, "rank": rank})
        waiting = [number for number in tries if number not in accepted]
        if not waiting:
            break
    kept = evened([accepted[number] for number in sorted(accepted)])
    yield from kept
    left = len(examples) - len(kept)
    print(f"mmalign: {len(kept)} answers are filled from similar pictures, {left} are left out", file=sys.stderr)


def _record(one: _Try, text: str, made: dict[str, Any]) -> Record:
    rejected = Candidate(
        candidate_id="rejected", text=text, media=(one.picture,), model=None if made["by"] == "rules" else made["by"]
    )
    about = {**made, "masked": one.masked.text, "cosine": one.cosine, "retrieved": one.picture.sha256()}
    if made["by"] != "rules":
        about["prompt"] = refill_prompt(one.example.prompt, one.masked.text)
    return one.example.pair(rejected, by=NAME, made=about)


def _masks(options: Options, examples: list[Example], model: _Opener) -> list[Masked | None]:
    """Of each example; None where nothing is to be masked, or where another picture could not stand for several."""
    if options.masks is None:
        vocabulary = vocabulary_of(examples)
        found = [mask(example.answer, vocabulary) for example in examples]
    else:
        annotator, cache = open_annotator(options.masks, model, place="make.masks")
        asked = [Request(prompt=masking_prompt(example.prompt, example.answer)) for example in examples]
        replies = ask(annotator, asked, cache, title="mask")
        found = [read_masked(reply, one.answer) for reply, one in zip(replies, examples, strict=True)]
    return [masked if len(one.media) == 1 else None for masked, one in zip(found, examples, strict=True)]


def _filler(options: Options, examples: list[Example], model: _Opener) -> tuple[_Fill, str]:
    """What fills masks ("" where it cannot), and its name."""
    if options.refill is not None:
        annotator, cache = open_annotator(options.refill, model, place="make.refill")

        def by_model(tries: Sequence[_Try]) -> list[str]:
            asked = [
                Request(prompt=refill_prompt(one.example.prompt, one.masked.text), images=(one.picture,))
                for one in tries
            ]
            return ask(annotator, asked, cache, title="refill")

        return by_model, annotator.identity
    scenes = {one.media[0].sha256(): one.scene for one in examples if one.scene is not None}
    if any(example.scene is None for example in examples):
        raise UserError(
            "rules fill masks in the shapes world alone",
            place="make.refill",
            fix="Name an annotator: endpoint or local",
        )
    return lambda tries: [_by_rule(one, scenes[one.picture.sha256()]) for one in tries], "rules"


def _by_rule(one: _Try, retrieved: Scene) -> str:
    """The masks filled by what the retrieved picture truly shows; "" where it has not as many things."""
    masks = len(one.masked.segments)
    if one.example.prompt.lower() == talk.DESCRIBE:
        things = [str(thing) for thing in talk.in_order(retrieved)]
        return one.masked.filled(things) if len(things) == masks else ""
    answer = answer_about(retrieved, one.example.prompt)
    return one.masked.filled([answer]) if answer is not None and masks == 1 else ""
