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
from mmalign.shapes.scenes import Thing
from mmalign.shapes.talk import Question, mentions, missing_companions

NUMBERS = ("chair_s", "chair_i", "recall", "planted", "empty")


def descriptions(
    truths: Sequence[Collection[Thing]], answers: Sequence[str], images: Sequence[str]
) -> dict[str, Estimate]:
    """The numbers of free descriptions.

    Args:
        truths: the things in the picture of each answer: `Scene.things`, or `checker.shown` of its pixels.
        answers: what the model said.
        images: a name per picture; answers about the same one are a cluster.
    """
    rows = [(image, set(true), mentions(answer)) for image, true, answer in zip(images, truths, answers, strict=True)]
    return {
        "chair_s": share((image, not true.issuperset(said)) for image, true, said in rows),
        "chair_i": share((image, thing not in true) for image, true, said in rows for thing in said),
        "recall": share((image, thing in said) for image, true, said in rows for thing in sorted(true)),
        "planted": share((image, bool(set(missing_companions(true)) & set(said))) for image, true, said in rows),
        "empty": share((image, not said) for image, _, said in rows),
    }


def answers(
    questions: Sequence[Question], said: Sequence[str], images: Sequence[str], *, parser: str = "published"
) -> dict[str, Estimate]:
    """POPE's numbers, and `accuracy/KIND` of each kind of question that was asked."""
    labels = [question.answer for question in questions]
    numbers = pope.measure(labels, said, images, parser=parser)
    read = pope.parser_of(parser)
    for kind in sorted({question.kind for question in questions}):
        numbers[f"accuracy/{kind}"] = share(
            (image, read(answer) is question.answer)
            for image, answer, question in zip(images, said, questions, strict=True)
            if question.kind == kind
        )
    return numbers
