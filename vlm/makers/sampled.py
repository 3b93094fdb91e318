"""Plain DPO's data: of the model's own answers about a picture, the most truthful one wins over the least.

    better = fewer mentions of things that are not there, then more of the things that are; a right yes or no

The shapes world's own truth says so, so the pictures must be of it. Where all answers are equally good there is no
pair.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from pydantic import Field

from mmalign.errors import UserError
from mmalign.randomness import key_seed
from mmalign.records import Candidate, Record, Side, Vote
from mmalign.shapes import talk
from vlm.conversations import conversation
from vlm.examples import Example, SourceSettings, read_examples, yes_or_no
from vlm.fingerprints import model_identity
from vlm.generation import answer
from vlm.models import VisionLanguageModel

NAME = "sampled"
SCORERS = {"false": "shapes@1", "recall": "shapes@1"}


class Options(SourceSettings):
    """How answers are drawn."""

    per_prompt: int = Field(4, ge=2, description="answers to each question")
    temperature: float = Field(1.0, gt=0, description="of the draws")
    max_new_tokens: int = Field(48, gt=0, description="an answer is cut here")
    batch_size: int = Field(64, gt=0, description="answers made at once; changes nothing in them")


def records(options: Options, model: Callable[[], VisionLanguageModel]) -> Iterator[Record]:
    """A record for each question to which the answers are not equally good."""
    examples = read_examples(options)
    for example in examples:
        if example.scene is None:
            raise UserError(
                "nobody knows how truthful an answer about this picture is",
                place=example.key,
                fix="Sample about shapes:train or shapes:even, or have answers judged and import them",
            )
    opened = model()
    numbers = range(options.per_prompt)
    talks = [
        conversation(Side(prompt=example.prompt, media=example.media), example.context, place=example.key)
        for example in examples
    ]
    texts = answer(
        opened,
        [talk for talk in talks for _ in numbers],
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seeds=[key_seed(NAME, options.seed, example.key, number) for example in examples for number in numbers],
        progress_title="sample answers",
    )
    identity, made = model_identity(opened), 0
    for index, example in enumerate(examples):
        own = texts[index * options.per_prompt : (index + 1) * options.per_prompt]
        record = _ranked(example, own, identity, options)
        if record is not None:
            made += 1
            yield record
    left = len(examples) - made
    print(f"mmalign: {made} questions have a better and a worse answer, {left} are left out", file=sys.stderr)


def _ranked(example: Example, texts: list[str], identity: str, options: Options) -> Record | None:
    """All different answers with their scores, the best of them voted over the worst; None where they are equal."""
    candidates = [
        Candidate(candidate_id=str(number), text=text, scores=truthfulness(example, text), model=identity)
        for number, text in enumerate(dict.fromkeys(text for text in texts if text.strip()))
    ]
    if not candidates:
        return None
    best, worst = max(candidates, key=_rank), min(candidates, key=_rank)
    if _rank(best) == _rank(worst):
        return None
    vote = Vote(a=best.candidate_id, b=worst.candidate_id, label="a", rater="shapes")
    about = {"by": identity, "temperature": options.temperature, "of": options.per_prompt}
    return example.record(candidates, [vote], NAME, about)


def truthfulness(example: Example, text: str) -> dict[str, float]:
    """`false`: mentions of what is not there, or a wrong answer to a question; `recall`: share of what is there."""
    assert example.scene is not None
    true = yes_or_no(example.answer)
    if true is not None:
        wrong = yes_or_no(text) is not true
        return {"false": float(wrong), "recall": float(not wrong)}
    things, said = set(example.scene.things), talk.mentions(text)
    false = sum(thing not in things for thing in said)
    return {"false": float(false), "recall": len(things & set(said)) / len(things)}


def _rank(candidate: Candidate) -> tuple[float, float]:
    return -candidate.scores["false"], candidate.scores["recall"]
