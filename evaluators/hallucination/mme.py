"""MME (Fu et al. 2306.13394): two yes/no questions about each picture, in 14 tasks.

    accuracy    answers that are right                                     of questions
    accuracy+   pictures whose two answers are both right                  of pictures
    score       100 (accuracy + accuracy+)        at most 200 a task; perception is 10 tasks, cognition 4

Answers are files as the published evaluation reads them: a folder with TASK.txt for each task, and in it a line per
question: image TAB question TAB true answer TAB the model's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluators.hallucination import files
from evaluators.hallucination.estimate import Estimate, share
from mmalign.errors import UserError, nearest
from mmalign.statistics import bootstrap_interval

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question about a picture, its true answer, and what the model said."""

    image: str
    question: str
    truth: bool
    answer: str

    @property
    def right(self) -> bool:
        """Whether it was read as the true answer."""
        return parse(self.answer) is self.truth


def parse(answer: str) -> bool | None:
    """The published rule: yes or no within the first four characters, in any case; yes before no; else None."""
    begin = answer.lower().strip()[:4]
    return True if "yes" in begin else False if "no" in begin else None


def read_task(path: Path) -> list[Answered]:
    """The lines of one task.

    Raises:
        UserError: a line without four fields, a true answer that is none, or a picture without its two questions.
    """
    found = []
    counts: dict[str, int] = {}
    for number, line in enumerate(files.decoded(path).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        fields = line.split("\t")
        if len(fields) != 4:
            raise UserError(f"expected image, question, true answer and answer, got {len(fields)} fields", place=place)
        image, question, truth, answer = fields
        said = {"yes": True, "no": False}.get(truth.strip().lower())
        if said is None:
            raise UserError(f"true answer: expected Yes or No, got {truth!r}", place=place)
        counts[image] = counts.get(image, 0) + 1
        found.append(Answered(image=image, question=question, truth=said, answer=answer))
    for image, count in counts.items():
        if count != 2:
            raise UserError(f"'{image}' has {count} questions instead of two", place=str(path))
    if not found:
        raise UserError("the file has no rows", place=str(path))
    return found


def measure(tasks: Mapping[str, Sequence[Answered]]) -> dict[str, Estimate]:
    """Accuracies of each task with intervals by picture, the tasks' scores, and the sums of the two groups.

    Scores have intervals from resampling the pictures of a task; the sums have none, as they add up tasks of unequal
    size.
    """
    numbers: dict[str, Estimate] = {}
    scores: dict[str, float] = {}
    for task, rows in tasks.items():
        both: dict[str, list[bool]] = {}
        for row in rows:
            both.setdefault(row.image, []).append(row.right)
        numbers[f"{task}/accuracy"] = share((row.image, row.right) for row in rows)
        numbers[f"{task}/accuracy+"] = share((image, all(found)) for image, found in both.items())
        numbers[f"{task}/unparsed"] = share((row.image, parse(row.answer) is None) for row in rows)
        points = [
            100 * (sum(found) / 2 + all(found)) for found in both.values()
        ]  # of a picture; their mean is the score
        scores[task] = sum(points) / len(points)
        interval = bootstrap_interval(points) if len(points) > 1 else None
        numbers[f"{task}/score"] = Estimate(value=scores[task], ci95=interval, n=len(rows), images=len(both))
    for group, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [task for task in names if task in tasks]
        if len(there) == len(names):
            count = sum(len(tasks[task]) for task in there)
            images = sum(len({row.image for row in tasks[task]}) for task in there)
            total = sum(scores[task] for task in there)
            numbers[group] = Estimate(value=total, ci95=None, n=count, images=images)
    return numbers


def measure_files(folder: Path) -> dict[str, Estimate]:
    """The numbers of a folder of answers; tasks that are not there are left out.

    Raises:
        UserError: no file of a task, or one of none.
    """
    found = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not found:
        raise UserError("there is no TASK.txt here", place=str(folder), fix=f"Tasks: {', '.join(TASKS)}.")
    for file in found:
        if file.stem not in TASKS:
            raise UserError(f"no task '{file.stem}'", place=str(file), fix=nearest(file.stem, TASKS))
    return measure({file.stem: read_task(file) for file in found})
