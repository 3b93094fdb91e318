"""Pictures with questions and true answers, from which preference data are made.

shapes:train   scenes of the embedded world with its habit: the pictures that the embedded model was taught on
shapes:even    scenes whose things could all stand in training, drawn evenly, so that companions are mostly missing
PATH           whatever `mmalign data import` reads: answers to prompts with images (the preferred ones where some are),
               or pictures with captions
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from mmalign import importers
from mmalign.config import Settings
from mmalign.errors import UserError, nearest
from mmalign.media import Media
from mmalign.progress import progress
from mmalign.records import Candidate, Record, Vote
from mmalign.shapes import render, talk
from mmalign.shapes.scenes import RELATIONS, Scene
from mmalign.unpaired import decided

WORLDS = ("shapes:train", "shapes:even")
DESCRIBE = "Describe the picture."
_THINGS = {str(thing): thing for thing in talk.THINGS}
SCENE = "scene"  # in a record's context: what its picture of the shapes world shows


class SourceSettings(Settings):
    """Which pictures, questions and true answers."""

    source: str = Field("shapes:train", min_length=1, description="shapes:train, shapes:even, a store or other data")
    count: int | None = Field(None, gt=0, description="pictures, or records of other data; null: all, and 2000 scenes")
    questions: int = Field(
        1, ge=0, description="of each scene, kinds of yes/no questions: one of yes and one of no each"
    )
    seed: int = Field(0, ge=0, description="of what is drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question about one picture or several, and a true answer.

    Args:
        key: unique among the examples.
        media: the pictures.
        truths: all true answers about the same pictures, this one included.
        scene: what the picture shows, in the shapes world.
        group: what must stay in one split: the pictures.
        licence, origin, split, context: of the record it is from.
    """

    key: str
    prompt: str
    media: tuple[Media, ...]
    answer: str
    truths: tuple[str, ...]
    group: str
    scene: Scene | None = None
    licence: str | None = None
    origin: str | None = None
    split: str = "train"
    context: Mapping[str, Any] = field(default_factory=dict)

    def pair(self, rejected: Candidate, *, by: str, made: Mapping[str, Any]) -> Record:
        """The record in which the true answer wins over a candidate.

        Args:
            by: the maker's name.
            made: how the candidate came about, kept in the record's context.
        """
        chosen = Candidate(candidate_id="chosen", text=self.answer)
        vote = Vote(a="chosen", b=rejected.candidate_id, label="a", rater=by)
        return self.record([chosen, rejected], [vote], by, made)

    def record(
        self, candidates: Sequence[Candidate], votes: Sequence[Vote], by: str, made: Mapping[str, Any]
    ) -> Record:
        """A record about this example's pictures."""
        context = {**self.context, "group": self.group, "made": {"maker": by, **made}}
        if self.scene is not None:
            context[SCENE] = scene_as_json(self.scene)
        return Record(
            record_id=self.key,
            prompt=self.prompt,
            media=self.media,
            candidates=tuple(candidates),
            votes=tuple(votes),
            split=self.split,
            licence=self.licence,
            source=self.origin,
            context=context,
        )


def read_examples(settings: SourceSettings) -> list[Example]:
    """The examples of a source, those of one picture side by side.

    Raises:
        UserError: no such source or fewer pictures than asked for; data without pictures or answers.
    """
    if settings.source in WORLDS:
        return list(_scenes(settings))
    if settings.source.startswith("shapes:"):
        raise UserError(f"no world '{settings.source}'", place="make.source", fix=nearest(settings.source, WORLDS))
    examples = list(_imported(settings))
    truths: dict[str, list[str]] = {}
    for example in examples:
        truths.setdefault(example.group, []).append(example.answer)
    return [replace(example, truths=tuple(dict.fromkeys(truths[example.group]))) for example in examples]


def true_answers(source: str) -> list[str]:
    """What is truly said about the pictures of a source; of a world, the descriptions."""
    settings = SourceSettings(source=source)
    if source in WORLDS:
        return [talk.describe(scene) for scene in _drawn(settings)]
    return [example.answer for example in read_examples(settings)]


# ------------------------------------------------------------------------------------------------ the shapes world


def answer_about(scene: Scene, prompt: str) -> str | None:
    """The true answer to a prompt of the shapes world; None where it is no question about this scene."""
    if prompt.lower() == talk.DESCRIBE:
        return talk.describe(scene)
    return next((question.label for question in talk.questions(scene) if question.text == prompt), None)


def is_false(example: Example, text: str) -> bool:
    """Whether a text is another answer than the true one, and in the shapes world a false one."""
    if text.strip() == example.answer.strip() or not text.strip():
        return False
    if example.scene is None:
        return True
    said, true = yes_or_no(text), yes_or_no(example.answer)
    if true is not None and said is not None and said is not true:
        return True
    return not talk.named(text) <= set(example.scene.things)


def yes_or_no(text: str) -> bool | None:
    """What an answer begins with; None for neither."""
    first = text.strip().lower().split(" ", 1)[0].strip(".,!")
    return {"yes": True, "no": False}.get(first)


def _scenes(settings: SourceSettings) -> Iterator[Example]:
    for index, scene in enumerate(progress(_drawn(settings), "draw pictures", unit="picture")):
        # another seed than the pictures of evaluations and of the model's own lessons have
        pixels = render.render(scene, talk.picture_seed(settings.seed + 7001, index, split="train"))
        media = (Media.from_image(Image.fromarray(pixels), place=f"picture {index} of {settings.source}").loaded(),)
        asked = _questions(scene, settings.questions, [settings.seed, index])
        turns = [(talk.DESCRIBE, talk.describe(scene)), *((question.text, question.label) for question in asked)]
        for number, (prompt, answer) in enumerate(turns):
            yield Example(
                key=f"{index:06d}-{number}",
                prompt=prompt,
                media=media,
                answer=answer,
                truths=tuple(answer for _, answer in turns),
                group=f"{settings.source}/{settings.seed}/{index}",
                scene=scene,
                origin=settings.source,
            )


def _drawn(settings: SourceSettings) -> list[Scene]:
    count = 2000 if settings.count is None else settings.count
    if settings.source == "shapes:train":
        return talk.draw(count, split="train", seed=settings.seed)
    return _even(count, settings.seed)


def _even(count: int, seed: int) -> list[Scene]:
    """Two or three things drawn evenly from the sets that may stand in training."""
    generator = np.random.default_rng([seed, 37])
    scenes: list[Scene] = []
    while len(scenes) < count:
        things = tuple(talk.THINGS[i] for i in generator.choice(len(talk.THINGS), generator.integers(2, 4), False))
        if talk.split_of(things) == "train":
            relation = RELATIONS[generator.integers(len(RELATIONS))] if len(things) == 2 else None
            scenes.append(Scene(things, relation))
    return scenes


def _questions(scene: Scene, kinds: int, seed: Sequence[int]) -> list[talk.Question]:
    """A question whose answer is yes and one whose answer is no, of each of some kinds.

    Of a thing that is not there, the one that habit would add is asked for, where there is one.
    """
    generator = np.random.default_rng([*seed, 41])
    drawn = int(generator.integers(2**31))
    pools: dict[str, list[talk.Question]] = {}
    for question in talk.balanced(scene, seed=drawn):
        pools.setdefault(question.kind, []).append(question)
    about_things = talk.pope(scene, negatives="adversarial", seed=drawn)
    first = 2 * int(generator.integers(len(scene.things)))
    pools["object"] = about_things[first : first + 2]
    names = sorted(pools)
    order = generator.permutation(len(names))[:kinds]
    return [question for index in sorted(order) for question in pools[names[index]]]


def scene_as_json(scene: Scene) -> dict[str, Any]:
    """A scene for a record's context."""
    return {"things": [str(thing) for thing in scene.things], "relation": scene.relation}


def scene_of(context: Mapping[str, Any], place: str) -> Scene | None:
    """The scene that a record's context tells of, if any.

    Raises:
        UserError: it tells of something else.
    """
    told = context.get(SCENE)
    if told is None:
        return None
    try:
        things = tuple(_THINGS[name] for name in told["things"])
        relation = told["relation"]
    except (TypeError, KeyError) as error:
        raise UserError("not a scene of the shapes world", place=f"{place}, context.{SCENE}") from error
    if not 1 <= len(things) <= 3 or relation not in (None, *RELATIONS) or (relation and len(things) != 2):
        raise UserError("not a scene of the shapes world", place=f"{place}, context.{SCENE}")
    return Scene(things, relation)


def evened(records: Sequence[Record]) -> list[Record]:
    """The records of pairs, those whose true answer is a bare yes as many as those of a bare no.

    Of the more frequent ones the last are left out: pairs in which yes mostly wins would teach to say yes.
    """
    answers = [(record.candidates[0].text or "").strip(" .!").lower() for record in records]
    room = dict.fromkeys(("yes", "no"), min(answers.count("yes"), answers.count("no")))
    kept = []
    for record, answer in zip(records, answers, strict=True):
        if answer in room:
            if not room[answer]:
                continue
            room[answer] -= 1
        kept.append(record)
    return kept


# ------------------------------------------------------------------------------------------------ other data


def _imported(settings: SourceSettings) -> Iterator[Example]:
    records = list(importers.read(settings.source, decode=True))
    if settings.count is not None:
        if settings.count > len(records):
            raise UserError(
                f"{settings.count} records asked for, there are {len(records)}",
                place=settings.source,
                fix="Lower count",
            )
        order = np.random.default_rng([settings.seed, 43]).permutation(len(records))[: settings.count]
        records = [records[index] for index in sorted(order)]
    for record in records:
        for candidate in _true(record):
            yield _example(record, candidate, settings.source)


def _true(record: Record) -> Iterable[Candidate]:
    """The candidates that are taken for true: winners where there are votes or scores, else all."""
    if record.votes:
        winners = {winner for winner, _ in decided(record)}
        return [candidate for candidate in record.candidates if candidate.candidate_id in winners]
    names = {name for candidate in record.candidates for name in candidate.scores}
    if len(record.candidates) > 1 and len(names) == 1:
        (name,) = names
        return [max(record.candidates, key=lambda candidate: candidate.scores.get(name, -np.inf))]
    return record.candidates


def _example(record: Record, candidate: Candidate, source: str) -> Example:
    prompt = record.prompt if candidate.prompt is None else candidate.prompt
    media = record.media if candidate.media is None else candidate.media
    answer = candidate.text
    if candidate.image is not None:  # a picture with a caption
        prompt, media, answer = DESCRIBE, (candidate.image,), prompt
    if not media or not answer or not answer.strip():
        raise UserError(
            "there is no picture" if not media else "there is no answer",
            place=record.where,
            fix="Give prompts with images and true answers, or pictures with captions",
        )
    known = {key: value for key, value in record.context.items() if key not in (SCENE, "made", "group")}
    pictures = hashlib.sha256("".join(image.sha256() for image in media).encode()).hexdigest()[:16]
    several = len(record.candidates) > 1
    return Example(
        key=f"{record.record_id}-{candidate.candidate_id}" if several else record.record_id,
        prompt=prompt,
        media=media,
        answer=answer,
        truths=(answer,),
        group=str(record.context.get("group", pictures)),
        scene=scene_of(record.context, record.where),
        licence=record.licence,
        origin=record.source or source,
        split=record.split,
        context=known,
    )
