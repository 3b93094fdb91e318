"""A vision-language model as judge between two pictures of one prompt, asked in both orders.

    a and b, then b and a        a wins when both answers say so; a tie when both do, or when they disagree

A judge that prefers whichever picture comes first is caught by the second order: its answers disagree, and its wins
become ties. An answer that cannot be read is counted and leaves the comparison without a verdict; it never becomes a
loss, a tie or a zero.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from evaluators.backends import Backend
from mmalign.errors import UserError

Winner = Literal["a", "b", "tie"]

QUESTION = (
    'Both images were made for this text: "{prompt}". Which of them shows the text better and looks better? '
    'Answer with exactly one of these and nothing else: "Image 1 is better.", "Image 2 is better.", '
    '"Both images are equally good."'
)
UNPARSED = 0.02  # share of answers that may be unreadable

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
_BETTER = re.compile(r"\b(?:image|picture)\s*([12])\W+is\W+(?:the\W+)?better\b", re.IGNORECASE)
_EQUAL = re.compile(r"\b(?:equally\s+good|(?:a|it'?s\s+a)\s+tie)\b", re.IGNORECASE)
_BARE = re.compile(r"\W*(?:image|picture)?\s*([12])\W*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A comparison.

    Attributes:
        winner: "a", "b" or "tie"; None where an answer could not be read.
        consistent: both orders say the same; None where an answer could not be read.
        said: the answers to (a, b) and to (b, a), as they came.
    """

    winner: Winner | None
    consistent: bool | None
    said: tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """All comparisons of a judge.

    Attributes:
        judge: who, and with which question.
        unparsed: answers that could not be read, of two for each comparison.
        position_consistency: share of readable comparisons whose orders agree; None without any.
        first_position: share of the answers for one picture that are for the one shown first: 0.5 for a judge
            without a habit; None without any.
    """

    judge: str
    verdicts: tuple[Verdict, ...]
    unparsed: int
    position_consistency: float | None
    first_position: float | None

    def scores(self) -> list[float | None]:
        """1 where a wins, 0 where b does, 0.5 for ties, None without a verdict."""
        value = {"a": 1.0, "tie": 0.5, "b": 0.0}
        return [None if verdict.winner is None else value[verdict.winner] for verdict in self.verdicts]


def parse(answer: str) -> Literal[1, 2, 0] | None:
    """The picture that an answer is for, 0 for neither; None when it says nothing, or two things.

    What stands between <think> tags is not the answer.
    """
    text = _THOUGHT.sub(" ", answer).strip()
    bare = _BARE.fullmatch(text)
    found = {int(bare[1])} if bare else {int(number) for number in _BETTER.findall(text)}
    if _EQUAL.search(text):
        found.add(0)
    if len(found) != 1:
        return None
    one = found.pop()
    return 1 if one == 1 else 2 if one == 2 else 0


def compare(
    backend: Backend,
    prompts: Sequence[str],
    a: Sequence[Image.Image],
    b: Sequence[Image.Image],
    *,
    question: str = QUESTION,
    unparsed: float = UNPARSED,
) -> Judged:
    """Judges pairs of pictures, each pair twice.

    Args:
        question: with {prompt} where the prompt goes.
        unparsed: share of answers that may be unreadable; a single one always may.

    Raises:
        UserError: more than that are unreadable, or there are no answers to be had.
    """
    if not len(prompts) == len(a) == len(b):
        raise ValueError(f"{len(prompts)} prompts, {len(a)} and {len(b)} pictures")
    if "{prompt}" not in question:
        raise UserError("the question does not say where the prompt goes", fix="Write {prompt} there.")
    asked = [question.replace("{prompt}", prompt) for prompt in prompts]
    pictures = [*([x, y] for x, y in zip(a, b, strict=True)), *([y, x] for x, y in zip(a, b, strict=True))]
    said = backend.answers([*asked, *asked], pictures)
    read = [parse(answer) for answer in said]
    bad = [answer for answer, found in zip(said, read, strict=True) if found is None]
    if len(bad) > max(1, unparsed * len(said)):
        raise UserError(
            f"{len(bad)} of {len(said)} answers cannot be read, the first {bad[0][:100]!r}",
            place=backend.identity,
            fix="Use a model that follows instructions, or a question that it answers as asked.",
        )
    count = len(prompts)
    verdicts = tuple(_verdict(read[i], read[count + i], (said[i], said[count + i])) for i in range(count))
    agreed = [verdict.consistent for verdict in verdicts if verdict.consistent is not None]
    decided = [found for found in read if found in (1, 2)]
    digest = hashlib.sha256(question.encode()).hexdigest()[:8]
    return Judged(
        judge=f"pairwise@1#{digest} by {backend.identity}",
        verdicts=verdicts,
        unparsed=len(bad),
        position_consistency=sum(agreed) / len(agreed) if agreed else None,
        first_position=sum(found == 1 for found in decided) / len(decided) if decided else None,
    )


def _verdict(forth: int | None, back: int | None, said: tuple[str, str]) -> Verdict:
    if forth is None or back is None:
        return Verdict(winner=None, consistent=None, said=said)
    names: dict[int, Winner] = {1: "a", 2: "b", 0: "tie"}
    turned: dict[int, Winner] = {1: "b", 2: "a", 0: "tie"}
    first, second = names[forth], turned[back]
    return Verdict(winner=first if first == second else "tie", consistent=first == second, said=said)
