"""Does a vision-language model invent things? Measures on held-out pictures of the embedded world.

Every model gets the same exam: describe each picture, answer a balanced set of yes/no questions about it, and POPE's
questions in its three splits. What is true is known (`Scene.things`), so no model judges another.

    description     chair_s, chair_i, recall, planted, empty (see `evaluators.hallucination.shapes`); mentions, the
                    mean number of things that a description names
    garbled         descriptions that are no sentence of this world, "a yellowred": they name nothing false and say
                    nothing true, and a model may seem cured by them
    wrong           descriptions that name something false or are garbled
    yes_no/...      balanced questions: accuracy, accuracy/KIND, yes_ratio, ...
    pope_SPLIT/...  accuracy, f1, yes_ratio, ...
    sight           log p(true description | picture) - log p(the same | another picture), nats: how much of what the
                    model says hangs on what it sees
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluators.hallucination import shapes as measures
from evaluators.hallucination.changes import Tally, tally
from evaluators.hallucination.estimate import Estimate, share
from mmalign.progress import Progress
from mmalign.shapes import render, talk
from mmalign.shapes.scenes import Scene
from mmalign.shapes.talk import Question
from vlm.conversations import Conversation
from vlm.generation import answer
from vlm.models import VisionLanguageModel

LONGEST = 40  # tokens of an answer; a description of three things has 15
PARSER = "strict"  # the embedded model says "yes" or "no"; anything else is neither


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exam:
    """What every model is asked.

    Attributes:
        scenes, pictures: of each index.
        questions: by set, (index of the picture, question), pictures in their order.
        seed: of scenes, pictures and questions.
    """

    scenes: tuple[Scene, ...]
    pictures: tuple[Image.Image, ...]
    questions: Mapping[str, tuple[tuple[int, Question], ...]]
    seed: int

    def __len__(self) -> int:
        return len(self.scenes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One model's answers.

    Attributes:
        described: of every picture.
        said: by set, the answers to `Exam.questions`.
        sight: of every picture, nats.
    """

    described: tuple[str, ...]
    said: Mapping[str, tuple[str, ...]]
    sight: tuple[float, ...]


def make_exam(count: int, *, seed: int) -> Exam:
    """`count` held-out pictures and the questions about them."""
    scenes = talk.draw(count, split="heldout", seed=seed)
    pictures = [
        Image.fromarray(render.render(scene, talk.picture_seed(seed, index, split="heldout")))
        for index, scene in enumerate(scenes)
    ]
    asked: dict[str, list[list[Question]]] = {
        "yes_no": [talk.balanced(scene, seed=seed * 1_000_003 + index) for index, scene in enumerate(scenes)]
    }
    for negatives in talk.NEGATIVES:
        asked[f"pope_{negatives}"] = [
            talk.pope(scene, negatives=negatives, seed=seed * 1_000_003 + index) for index, scene in enumerate(scenes)
        ]
    return Exam(
        scenes=tuple(scenes),
        pictures=tuple(pictures),
        questions={
            name: tuple((index, question) for index, some in enumerate(of_each) for question in some)
            for name, of_each in asked.items()
        },
        seed=seed,
    )


# ------------------------------------------------------------------------------------------ the answers


def judge(exam: Exam, models: Mapping[str, Callable[[], VisionLanguageModel]], *, batch_size: int) -> dict[str, Judged]:
    """Every model's answers.

    Args:
        models: name -> how to open it; opened one at a time.
        batch_size: answers made at once; changes nothing in them.
    """
    judged = {}
    for name, opened in models.items():
        model = opened()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        judged[name] = examine(exam, model, batch_size=batch_size, title=f"judge {name}")
    return judged


def examine(exam: Exam, model: VisionLanguageModel, *, batch_size: int, title: str | None = None) -> Judged:
    """One model's answers, greedy. A question that several sets ask about a picture is asked once."""
    texts: list[dict[str, None]] = [{talk.DESCRIBE: None} for _ in exam.scenes]  # dicts for their order
    for asked in exam.questions.values():
        for index, question in asked:
            texts[index][question.text] = None
    keys = [(index, text) for index, some in enumerate(texts) for text in some]
    said = answer(
        model,
        [ask(text, exam.pictures[index], place=f"picture {index}") for index, text in keys],
        batch_size=batch_size,
        max_new_tokens=LONGEST,
        progress_title=title,
    )
    by_key = dict(zip(keys, said, strict=True))
    return Judged(
        described=tuple(by_key[index, talk.DESCRIBE] for index in range(len(exam))),
        said={
            name: tuple(by_key[index, question.text] for index, question in asked)
            for name, asked in exam.questions.items()
        },
        sight=tuple(_sight(exam, model, batch_size, title)),
    )


def ask(text: str, picture: Image.Image, *, answered: str | None = None, place: str) -> Conversation:
    """A question about one picture."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Conversation(
        messages=({"role": "user", "content": content},), images=(picture,), answer=answered, place=place
    )


@torch.no_grad()
def _sight(exam: Exam, model: VisionLanguageModel, batch_size: int, title: str | None) -> Iterator[float]:
    """How much likelier the true description is with its picture than with the next scene that has other things."""
    pairs = []
    for index, scene in enumerate(exam.scenes):
        others = [*range(index + 1, len(exam)), *range(index)]
        other = next((i for i in others if set(exam.scenes[i].things) != set(scene.things)), index)
        truth = talk.describe(scene)
        pairs += [ask(talk.DESCRIBE, exam.pictures[i], answered=truth, place=f"picture {i}") for i in (index, other)]
    found: list[float] = []
    with Progress(len(pairs), f"{title}: sight", unit="row", enabled=title is not None) as bar:
        for start in range(0, len(pairs), batch_size):
            rows = [model.encode(one) for one in pairs[start : start + batch_size]]
            found += model.logps(model.collate(rows).to(model.device)).sums().tolist()
            bar.update(len(rows))
    for own, swapped in zip(found[::2], found[1::2], strict=True):
        yield own - swapped


# ------------------------------------------------------------------------------------------ the numbers


def units(exam: Exam, judged: Judged) -> dict[str, list[tuple[int, bool]]]:
    """What each share is the share of: (picture, hit)."""
    pictures = list(range(len(exam)))
    found = measures.description_units([scene.things for scene in exam.scenes], judged.described, pictures)
    said = [text.strip() for text in judged.described]
    found["garbled"] = [
        (index, bool(text) and text != talk.sentence(talk.mentions(text))) for index, text in enumerate(said)
    ]
    either = zip(found["chair_s"], found["garbled"], strict=True)
    found["wrong"] = [(index, false or garbled) for (index, false), (_, garbled) in either]
    for name, asked in exam.questions.items():
        questions, of = [question for _, question in asked], [index for index, _ in asked]
        by_set = measures.answer_units(questions, judged.said[name], of, parser=PARSER)
        found |= {f"{name}/{number}": some for number, some in by_set.items()}
    return found


def estimates(exam: Exam, judged: Judged) -> dict[str, Estimate]:
    """Every share with its interval."""
    return {name: share(some) for name, some in units(exam, judged).items()}


def tallies(exam: Exam, judged: Judged) -> dict[str, Tally]:
    """Sums by picture of every measure, the two that are no shares among them: for comparisons."""
    count = len(exam)
    found = {name: tally(some, count) for name, some in units(exam, judged).items()}
    found["mentions"] = Tally(hits=found["chair_i"].units, units=np.ones(count))
    found["sight"] = Tally(hits=np.array(judged.sight), units=np.ones(count))
    return found


def rows(exam: Exam, judged: Judged) -> Iterator[dict[str, Any]]:
    """Every question, its truth and the answer: what is written beside a report."""
    for index, (scene, said) in enumerate(zip(exam.scenes, judged.described, strict=True)):
        truth = talk.describe(scene)
        yield {"picture": index, "set": "description", "question": talk.DESCRIBE, "truth": truth, "answer": said}
    for name, asked in exam.questions.items():
        for (index, question), said in zip(asked, judged.said[name], strict=True):
            yield {
                "picture": index,
                "set": name,
                "kind": question.kind,
                "question": question.text,
                "truth": question.label,
                "answer": said,
            }


def added(several: Sequence[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Several seeds' tallies on the same pictures as one: a picture keeps all its seeds."""
    first, *others = several
    total = dict(first)
    for one in others:
        total = {name: total[name] + one[name] for name in total}
    return total
