"""What an evaluation of models that answer found: measures, how they changed, and answers with their faults marked.

Numbers and words only; `evaluators.answers_page` makes the page of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from evaluators.hallucination.changes import Change
from evaluators.hallucination.estimate import Estimate
from evaluators.results import Evaluation, Model, interval, percent, signed

ALLOWED = 0.03  # recall may fall by this much before fewer false things are no more than fewer things


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A part of an answer that is right or wrong: text[start:end]."""

    start: int
    end: int
    kind: Literal["right", "wrong"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One answer.

    Attributes:
        marks: in order, not overlapping.
        missing: what the answer should have named and did not.
    """

    text: str
    marks: Sequence[Mark] = ()
    missing: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question about a picture, its true answer, and every arm's."""

    question: str
    truth: str
    answers: Mapping[str, Said]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A picture of the page and what was asked about it."""

    picture: Image.Image
    asked: Sequence[Asked]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerArm(Model):
    """One model.

    Attributes:
        numbers: measures with intervals.
        changes: from the base; empty for the base itself.
    """

    numbers: Mapping[str, Estimate]
    changes: Mapping[str, Change] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerReport(Evaluation):
    """An evaluation of several models on the same held-out pictures and questions.

    Attributes:
        pictures: how many held-out pictures.
        shown: the first pictures, never those with the best result, for the page says so.

    Raises:
        ValueError: the parts do not fit one another.
    """

    pictures: int
    arms: Mapping[str, AnswerArm]
    shown: Sequence[Shown] = ()

    def __post_init__(self) -> None:
        Evaluation.__post_init__(self)  # classes with slots cannot use super()
        for one in (asked for shown in self.shown for asked in shown.asked):
            if set(one.answers) != set(self.arms):
                raise ValueError(f"answers of {sorted(one.answers)} for arms {sorted(self.arms)}")


def as_json(report: AnswerReport) -> dict[str, Any]:
    """What report.json holds: every arm's numbers and changes, without pictures."""
    return {
        **report.head(),
        "headline": " ".join(sentences(report)),
        "pictures": report.pictures,
        "aligned": report.aligned,
        "arms": {
            name: {
                "label": arm.label,
                "numbers": {key: one.as_json() for key, one in arm.numbers.items()},
                "changes": {key: one.as_json() for key, one in arm.changes.items()},
            }
            for name, arm in report.arms.items()
        },
    }


# -------------------------------------------------------------------------------------------------- words


def cured(found: Mapping[str, Change]) -> bool:
    """Whether fewer descriptions are false, for certain, and neither recall nor sense is what paid for it."""
    recall, wrong = found["recall"].value, found.get("wrong", found["chair_s"])
    return (wrong.value or 0) < 0 and wrong.certain and recall is not None and recall >= -ALLOWED


def sentences(report: AnswerReport) -> list[str]:
    """What was found, in sentences that claim no more than the intervals allow."""
    arm = report.arms[report.aligned]
    label, found = arm.label, arm.changes
    chair, recall = found["chair_s"], found["recall"]
    pictures = f"n {report.pictures} held-out pictures"
    said = _went(chair)
    if not chair.certain:
        first = f"No effect was found: o{pictures} the share of {label}'s descriptions with a false thing went {said}."
    elif (chair.value or 0) < 0:
        first = f"O{pictures} {label} lowered the share of descriptions that name a false thing {said}."
    else:
        first = f"It got worse: o{pictures} {label} raised the share of descriptions that name a false thing {said}."
    rest = []
    if "garbled" in found and found["garbled"].tuned:
        broken = f"{percent(found['garbled'].tuned)} of {label}'s descriptions are no sentences"
        rest.append(f"{broken}; with them among the false the share went {_went(found['wrong'])}.")
    if found["chair_i"].value is not None:
        rest.append(f"Of all mentions, the false ones went {_went(found['chair_i'])}.")
    paid = (
        ""
        if (recall.value or 0) >= -ALLOWED
        else "; so some false things went because descriptions say less"
        if (chair.value or 0) < 0
        else ""
    )
    rest.append(f"Of what there is, the share that is named went {_went(recall)}{paid}.")
    if "pope_adversarial/accuracy" in found:
        ratio = report.arms[report.aligned].numbers["pope_adversarial/yes_ratio"].value
        yes = "" if ratio is None else f"; it says yes to {percent(ratio)} of them, where half would be right"
        rest.append(f"Accuracy on POPE's adversarial questions went {_went(found['pope_adversarial/accuracy'])}{yes}.")
    return [first, *rest]


def _went(change: Change) -> str:
    if change.base is None or change.tuned is None or change.ci95 is None or change.value is None:
        return "nowhere: one of the models names nothing"
    if change.value == 0 and change.ci95[0] == change.ci95[1]:
        return f"nowhere: it is {percent(change.tuned)} before and after, picture by picture"
    moved = f"a change of {signed(change.value)} points ({interval(change.ci95, signed)})"
    chance = "" if change.certain else ", which may be chance"
    return f"from {percent(change.base)} to {percent(change.tuned)}, {moved}{chance}"
