"""CHAIR's and POPE's measures in the shapes world, where what a picture shows is known.

chair_s     captions that name a thing which is not there
chair_i     of all mentions, those of things that are not there
recall      of the things that are there, those that are named
planted     captions that name a missing companion: the thing that training showed along with one of the picture's
empty       captions that name nothing, the way to hallucinate nothing

Yes/no answers have POPE's numbers over all questions, and the accuracy of each kind of question beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from evaluators.hallucination import pope
from evaluators.hallucination.estimate import Estimate, share
from evaluators.hallucination.pope import Name
from mmalign.shapes.scenes import Thing
from mmalign.shapes.talk import Question, mentions, missing_companions

NUMBERS = ("chair_s", "chair_i", "recall", "planted", "empty")


def description_units(
    truths: Sequence[Collection[Thing]], answers: Sequence[str], images: Sequence[Name]
) -> dict[str, list[tuple[Name, bool]]]:
    """What each number is the share of: (image, hit); arguments as of `descriptions`."""
    rows = [(image, set(true), mentions(answer)) for image, true, answer in zip(images, truths, answers, strict=True)]
    return {
        "chair_s": [(image, not true.issuperset(said)) for image, true, said in rows],
        "chair_i": [(image, thing not in true) for image, true, said in rows for thing in said],
        "recall": [(image, thing in said) for image, true, said in rows for thing in sorted(true)],
        "planted": [(image, bool(set(missing_companions(true)) & set(said))) for image, true, said in rows],
        "empty": [(image, not said) for image, _, said in rows],
    }


def answer_units(
    questions: Sequence[Question], said: Sequence[str], images: Sequence[Name], *, parser: str = "published"
) -> dict[str, list[tuple[Name, bool]]]:
    """POPE's units, and those of `accuracy/KIND` for each kind of question that was asked."""
    found = pope.units([question.answer for question in questions], said, images, parser=parser)
    by_kind: dict[str, list[tuple[Name, bool]]] = {kind: [] for kind in sorted({one.kind for one in questions})}
    for question, unit in zip(questions, found["accuracy"], strict=True):
        by_kind[question.kind].append(unit)
    return found | {f"accuracy/{kind}": units for kind, units in by_kind.items()}


def descriptions(
    truths: Sequence[Collection[Thing]], answers: Sequence[str], images: Sequence[str]
) -> dict[str, Estimate]:
    """The numbers of free descriptions.

    Args:
        truths: the things in the picture of each answer: `Scene.things`, or `checker.shown` of its pixels.
        answers: what the model said.
        images: a name per picture; answers about the same one are a cluster.
    """
    return {name: share(units) for name, units in description_units(truths, answers, images).items()}


def answers(
    questions: Sequence[Question], said: Sequence[str], images: Sequence[str], *, parser: str = "published"
) -> dict[str, Estimate]:
    """POPE's numbers, and `accuracy/KIND` of each kind of question that was asked."""
    return {name: share(units) for name, units in answer_units(questions, said, images, parser=parser).items()}
