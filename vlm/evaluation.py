"""`mmalign eval vlm MEASURE`: POPE, CHAIR, AMBER, MME and MMHal, of files of answers or of a model that answers.

    mmalign eval vlm pope answers.jsonl --questions coco_pope_random.json
    mmalign eval vlm pope --model runs/povid/povid --images val2014 --out answers \\
        --questions coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json
    mmalign eval vlm amber --model MODEL --images images --queries query_all.json --annotations annotations.json \\
        --words relation.json safe_words.txt --out answers
    mmalign eval vlm mme --model MODEL --images MME --out answers        MME/TASK.txt and MME/TASK/*.jpg
    mmalign eval vlm mmhal ratings.json                                  what a judge said of answers

With --model the questions are asked first, and the answers written in the benchmark's own format into --out; files that
are there already are not asked for again. MODEL is what `mmalign generate` takes. For MMHal the answers are written for
a judge of your choice, and measured when it has rated them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser
from mmalign.errors import UserError

if TYPE_CHECKING:
    import argparse

    from vlm.models import VisionLanguageModel

DESCRIBE = "Please describe this image in detail."
SHORT = "\nAnswer the question using a single word or phrase."
LENGTHS = {"pope": 16, "mme": 16, "chair": 512, "amber": 512, "mmhal": 512}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A question about a picture below the folder of images."""

    image: str
    prompt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A file of answers to be made: what is asked, and how the answers are written."""

    file: Path
    asks: list[Ask]
    lines: Callable[[Sequence[str]], Iterator[str]]


# ------------------------------------------------------------------------------------------------ questions


def sheets(said: argparse.Namespace) -> list[Sheet]:
    """The questions of a measure, by the files their answers go to.

    Raises:
        UserError: a file of questions is missing or wrong.
    """
    made: dict[str, Callable[[Any], list[Sheet]]] = {
        "pope": _pope,
        "chair": _chair,
        "amber": _amber,
        "mme": _mme,
        "mmhal": _mmhal,
    }
    return made[said.measure](said)


def _rows(rows: Sequence[dict[str, Any]], field: str) -> Callable[[Sequence[str]], Iterator[str]]:
    """Rows as JSON lines with the answer in a field of theirs."""

    def lines(answers: Sequence[str]) -> Iterator[str]:
        for row, answer in zip(rows, answers, strict=True):
            yield json.dumps({**row, field: answer}, ensure_ascii=False) + "\n"

    return lines


def _pope(said: argparse.Namespace) -> list[Sheet]:
    from evaluators.hallucination.pope import read_questions

    found = []
    for path in said.questions:
        questions = read_questions(path)
        rows = [{"question_id": one.question_id, "prompt": one.text} for one in questions]
        asks = [Ask(image=one.image, prompt=one.text + said.suffix) for one in questions]
        found.append(Sheet(file=said.out / f"{path.stem}.jsonl", asks=asks, lines=_rows(rows, "text")))
    return found


def _chair(said: argparse.Namespace) -> list[Sheet]:
    from mmalign.sources import files_below, is_image

    names = [name for name in files_below(said.images) if is_image(name)]
    rows, asks = [], []
    for name in names:
        digits = re.findall(r"\d+", Path(name).stem)
        if not digits:
            raise UserError("a picture's name has no number that could be its id", place=f"{said.images}/{name}")
        rows.append({"image_id": int(digits[-1])})  # COCO_val2014_000000000042.jpg
        asks.append(Ask(image=name, prompt=DESCRIBE))
    return [Sheet(file=said.out / "captions.jsonl", asks=asks, lines=_rows(rows, "caption"))]


def _amber(said: argparse.Namespace) -> list[Sheet]:
    from evaluators.hallucination import files

    if said.queries is None:
        raise UserError("a model needs the benchmark's questions", fix="Give its query file with --queries.")
    rows, asks = [], []
    for number, value in enumerate(_listed(said.queries)):
        place = f"{said.queries} query {number}"
        row = files.entry(value, place)
        rows.append({"id": int(files.identifier(row, "id", place))})
        asks.append(Ask(image=files.text(row, "image", place), prompt=files.text(row, "query", place)))
    return [Sheet(file=said.out / "amber.jsonl", asks=asks, lines=_rows(rows, "response"))]


def _mme(said: argparse.Namespace) -> list[Sheet]:
    from evaluators.hallucination.files import decoded
    from evaluators.hallucination.mme import TASKS

    found = []
    for task in TASKS:
        file = said.images / f"{task}.txt"
        if not file.is_file():
            continue
        heads, asks = [], []
        for number, line in enumerate(decoded(file).splitlines(), start=1):
            fields = line.split("\t")
            if len(fields) < 3:
                raise UserError("expected image, question and true answer", place=f"{file} line {number}")
            heads.append(fields[:3])
            asks.append(Ask(image=f"{task}/{fields[0]}", prompt=fields[1] + said.suffix))

        def lines(answers: Sequence[str], heads: Sequence[Sequence[str]] = tuple(heads)) -> Iterator[str]:
            for head, answer in zip(heads, answers, strict=True):
                yield "\t".join([*head, " ".join(answer.split())]) + "\n"

        found.append(Sheet(file=said.out / "mme" / f"{task}.txt", asks=asks, lines=lines))
    if not found:
        raise UserError("there is no TASK.txt here", place=str(said.images), fix=f"Tasks: {', '.join(TASKS)}.")
    return found


def _mmhal(said: argparse.Namespace) -> list[Sheet]:
    from evaluators.hallucination import files

    if said.questions is None:
        raise UserError("a model needs the benchmark's questions", fix="Give its file with --questions.")
    rows, asks = [], []
    for number, value in enumerate(_listed(said.questions)):
        place = f"{said.questions} question {number}"
        row = files.entry(value, place)
        image = row.get("image_path") or Path(files.text(row, "image_src", place)).name
        rows.append(dict(row))
        asks.append(Ask(image=str(image), prompt=files.text(row, "question", place)))
    return [Sheet(file=said.out / "mmhal.jsonl", asks=asks, lines=_rows(rows, "model_answer"))]


def _listed(path: Path) -> list[Any]:
    from evaluators.hallucination.files import value_of

    value = value_of(path)
    if not isinstance(value, list) or not value:
        raise UserError("expected a list of questions", place=str(path))
    return value


# -------------------------------------------------------------------------------------------------- answers


def make(sheet: Sheet, model: Callable[[], VisionLanguageModel], images: Path, *, batch_size: int, length: int) -> None:
    """Ask a model and write its answers, all of them or none.

    Raises:
        UserError: an image is not there or leaves its folder.
    """
    from evaluators.scorefile import write_whole
    from mmalign.media import Media
    from mmalign.records import Side
    from vlm.conversations import conversation
    from vlm.generation import answer

    if sheet.file.exists():
        return
    asked = [
        conversation(
            Side(prompt=one.prompt, media=(Media(path=one.image, root=str(images)),)), place=f"{images}/{one.image}"
        )
        for one in sheet.asks
    ]
    said = answer(
        model(), asked, batch_size=batch_size, max_new_tokens=length, progress_title=f"answer {sheet.file.stem}"
    )
    write_whole(sheet.file, sheet.lines(said))


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign eval vlm MEASURE [ANSWERS ...] [--model MODEL --images FOLDER --out FOLDER]`."""
    from evaluators.hallucination.command import add_measures, measured, said_of

    parser = Parser(prog="mmalign eval vlm", description=__doc__)
    for name, one in add_measures(parser).items():
        one.add_argument("--model", help="asked first: hub id, folder, run or checkpoint")
        one.add_argument("--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter of peft to put on the model")
        one.add_argument("--images", type=Path, metavar="FOLDER", help="that the questions' pictures are in")
        one.add_argument("--out", type=Path, metavar="FOLDER", help="for the answers")
        one.add_argument("--suffix", default=SHORT, help="put after yes/no questions (default: as published)")
        one.add_argument("--batch-size", type=int, default=8, help="answers made at once (default: %(default)s)")
        one.add_argument(
            "--max-new-tokens", type=int, default=LENGTHS[name], help="of an answer (default: %(default)s)"
        )
    said = parser.parse_args(argv)
    if said.model is not None:
        if said.answers:
            raise UserError("answers are there already", fix="Give a file of answers, or a --model that makes one.")
        if said.images is None or said.out is None:
            raise UserError("a model needs pictures and a place for its answers", fix="Give --images and --out.")
        said.answers = _ask(said)
        if said.measure == "mmhal":
            print(f"answers to be judged: {said.answers[0]}")
            return 0
    print(said_of(measured(said), as_json=said.json))
    return 0


def _ask(said: argparse.Namespace) -> list[Path]:
    """Make the files of answers that are missing; what the measure then reads."""
    todo = sheets(said)
    opened: list[VisionLanguageModel] = []

    def model() -> VisionLanguageModel:
        import torch

        from vlm.generate import open_any

        if not opened:
            opened.append(open_any(said.model, said.adapter).to("cuda" if torch.cuda.is_available() else "cpu"))
        return opened[0]

    for sheet in todo:
        make(sheet, model, said.images, batch_size=said.batch_size, length=said.max_new_tokens)
    return [said.out / "mme"] if said.measure == "mme" else [sheet.file for sheet in todo]
