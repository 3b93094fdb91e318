"""Asks a vision-language model, or what a run made of it.

    mmalign generate shapes-vlm --image picture.png --prompt "describe the picture."
    mmalign generate runs/povid/povid --file rows.jsonl --out answers.jsonl
    mmalign generate Qwen/Qwen2.5-VL-3B-Instruct --adapter FOLDER --image a.png --image b.png --prompt "What changed?"

MODEL is a hub id, a folder of transformers, a run's folder (its newest checkpoint) or a checkpoint. Rows of a file are
{"image": "below/the/file's/folder.png" or a list of them, "prompt": "...", "id": "..."}, the id left out for the row's
number. The same command again answers the rows that --out does not have yet, and changes none that it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mmalign.cli import Parser
from mmalign.errors import UserError
from mmalign.precision import Precision

if TYPE_CHECKING:
    from mmalign.records import Side
    from vlm.models import VisionLanguageModel

_RUN = ("manifest.json", "config.yaml")  # a checkpoint's and a run's


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A row to answer.

    Args:
        name: its id, as text.
        number: of its row, which its draw is seeded with.
        images: as the row names them.
        place: what to call it in a message.
    """

    name: str
    number: int
    side: Side
    images: tuple[str, ...]
    place: str


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign generate MODEL (--prompt TEXT [--image FILE ...] | --file ROWS) [--out ANSWERS]`."""
    parser = Parser(prog="mmalign generate", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, run or checkpoint; shapes-vlm is embedded")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter of peft to put on the model")
    parser.add_argument("--prompt", metavar="TEXT", help="one question; <image> places an image, else they are first")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="again for more")
    parser.add_argument("--file", type=Path, metavar="ROWS", help="JSON lines of {image, prompt, id?}")
    parser.add_argument("--out", type=Path, metavar="ANSWERS", help="JSON lines, appended to (default: printed)")
    parser.add_argument(
        "--dtype", choices=get_args(Precision), default="fp32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; row i has seed + i (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="answers made at once (default: %(default)s)")
    said = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0), ("batch_size", 1)):
        if not getattr(said, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(said, name)}")
    if (said.prompt is None) == (said.file is None):
        raise UserError("expected one of --prompt and --file", fix="Give a question, or a file of them.")
    if said.file and said.image:
        raise UserError("--image is for --prompt", fix="Name the images in the rows of the file.")

    questions = list(read_questions(said.file)) if said.file else [single(said.prompt, said.image)]
    known = read_answers(said.out) if said.out else {}
    for question in questions:
        if question.name in known and known[question.name] != question.side.prompt:
            raise UserError(
                f"row '{question.name}' was another question when it was answered",
                place=str(said.out),
                fix="Give another --out.",
            )
    waiting = [question for question in questions if question.name not in known]
    if not waiting:
        print(f"all {len(questions)} answers are in {said.out}")
        return 0

    import torch

    from mmalign.progress import Progress
    from vlm.conversations import conversation
    from vlm.generation import answer

    model = open_any(said.model, said.adapter, said.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(len(questions), "generate", unit="answer", initial=len(questions) - len(waiting)) as bar:
        for start in range(0, len(waiting), said.batch_size):
            some = waiting[start : start + said.batch_size]
            texts = answer(
                model,
                [conversation(question.side, place=question.place) for question in some],
                batch_size=said.batch_size,
                max_new_tokens=said.max_new_tokens,
                temperature=said.temperature,
                seeds=[said.seed + question.number for question in some],
            )
            put(said.out, some, texts, plain=said.file is None)
            bar.update(len(some))
    if said.out:
        print(f"{len(waiting)} answers of {said.model} added to {said.out}")
    return 0


# ---------------------------------------------------------------------------------------------- the model


def open_any(path: str, adapter: Path | None, dtype: Precision = "fp32") -> VisionLanguageModel:
    """A model, or what a run made of it, with an adapter on top where one is given.

    Args:
        dtype: of the model's weights; a run has its own.

    Raises:
        UserError: nothing there, an adapter for another model, or one where a run's own weights are.
    """
    from vlm.models import open_model
    from vlm.settings import VlmModelSettings
    from vlm.tuned import find_tuned, open_tuned
    from vlm.weights import open_weights

    folder = Path(path)
    whole = (folder / "config.json").is_file()
    trained = folder.is_dir() and not whole and _is_run(folder)
    if trained and adapter is not None:
        raise UserError("a run has its own weights", place="--adapter", fix="Give its base model with the adapter.")
    if trained:
        return open_tuned(find_tuned(folder))
    if not whole and (folder / "adapter_config.json").is_file():
        raise UserError("an adapter, not a model", place=path, fix="Give its base as MODEL and this as --adapter.")
    model = open_model(VlmModelSettings(path=path, dtype=dtype))
    if adapter is not None:
        open_weights(model, adapter)
    return model


def _is_run(folder: Path) -> bool:
    near = (folder, folder.resolve().parent)
    return any((place / _RUN[0]).is_file() for place in near) or (folder / _RUN[1]).is_file()


# ------------------------------------------------------------------------------------------- rows and answers


def single(prompt: str, images: Sequence[Path]) -> Question:
    """The question of the command line.

    Raises:
        UserError: an empty prompt, or an image that is not there.
    """
    from mmalign.media import Media
    from mmalign.records import Side

    if not prompt.strip():
        raise UserError("the question is empty", place="--prompt")
    for image in images:
        if not image.is_file():
            raise UserError("there is no such image", place=f"--image {image}")
    media = tuple(Media(path=image.name, root=str(image.parent), place=str(image)) for image in images)
    return Question(
        name="0",
        number=0,
        side=Side(prompt=prompt, media=media),
        images=tuple(map(str, images)),
        place="the question",
    )


def read_questions(file: Path) -> Iterator[Question]:
    """The rows of a file; images stay below its folder.

    Raises:
        UserError: no such file, a field that is missing or wrong, an image that is not there, an id that comes twice.
    """
    from evaluators.hallucination.files import identifier, rows_of, text
    from mmalign.records import Side
    from mmalign.sources import Fault, images_of

    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(rows_of(file)):
        name = identifier(row, "id", place) if "id" in row else str(number)
        if name in seen:
            raise UserError(f"id '{name}' comes twice, first in {seen[name]}", place=place)
        seen[name] = place
        prompt = text(row, "prompt", place)
        if not prompt.strip():
            raise UserError("the question is empty", place=place)
        try:
            media = images_of(file.parent, row.get("image"), "image", place)
        except Fault as fault:
            raise UserError(f"{fault.name}: expected {fault.expected}, got {fault.got}", place=place) from fault
        images = row.get("image")
        named = tuple(images) if isinstance(images, list) else () if images is None else (str(images),)
        yield Question(name=name, number=number, side=Side(prompt=prompt, media=media), images=named, place=place)


def read_answers(out: Path) -> dict[str, str]:
    """(id, question) of every answer that is there; a last line that was cut short is taken away.

    Raises:
        UserError: the file is something else.
    """
    from evaluators.hallucination.files import content, identifier, rows_of, text

    if not out.exists():
        return {}
    whole = content(out)
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        out.write_bytes(kept)
    if not kept.strip():
        return {}
    return {identifier(row, "id", place): text(row, "prompt", place) for place, row in rows_of(out)}


def put(out: Path | None, questions: Sequence[Question], answers: Sequence[str], *, plain: bool) -> None:
    """Append answers to a file, or print them.

    Args:
        plain: print the text alone.
    """
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        images: Any = question.images[0] if len(question.images) == 1 else list(question.images)
        row = {"id": question.name, "image": images, "prompt": question.side.prompt, "answer": answer}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if out is None:
        print("\n".join(answers) if plain else "".join(lines), end="\n" if plain else "", flush=True)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", place=str(out)) from error
