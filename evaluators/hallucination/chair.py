"""CHAIR (Rohrbach et al. 1809.02156): objects that captions name and pictures do not have.

    CHAIRs = captions with an object that is not there / captions
    CHAIRi = mentions of objects that are not there / mentions of objects          mentions count with repetition
    recall = sum over captions of |named and there| / sum of |there|               sets, as later harnesses report

What is there: the categories of the picture's instances and every object that its reference captions name. An object
is found by the authors' rules: lower-case words, made singular, two-word compounds joined ("hot dog" is no dog, "baby
elephant" no person), "seat" dropped beside "toilet"; each word of the synonym file stands for the first of its line.

The annotations (COCO's instances and captions files) and the synonym file are given by the user. Singular forms come
from rules instead of pattern.en: a word of the synonym file is left as it is, and of the rules' forms the first that
the file knows is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.hallucination import files
from evaluators.hallucination.estimate import Estimate, share
from mmalign.errors import UserError

NUMBERS = ("chair_s", "chair_i", "recall")

_COMPOUNDS = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light"),
    *("fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove"),
    *("tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier"),
    *("potted plant", "bow tie", "laptop computer", "home plate"),
)
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"},
    **{"feet": "foot", "teeth": "tooth", "oxen": "ox", "sheep": "sheep", "knives": "knife", "loaves": "loaf"},
    **{"calves": "calf", "wolves": "wolf", "leaves": "leaf", "shelves": "shelf", "buses": "bus", "skis": "ski"},
}
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """What a model said about a picture."""

    image: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A caption's objects, in order and with repetition, and which of them are not there."""

    image: str
    named: tuple[str, ...]
    false: tuple[str, ...]
    there: frozenset[str]


class Vocabulary:
    """The objects that can be named, and how a text names them.

    Args:
        lines: synonyms, one list per object; the first of each is the object's name.
        every_compound: join every two-word entry of the synonyms, not only the authors' compounds. For vocabularies
            other than COCO's.
    """

    def __init__(self, lines: Iterable[Sequence[str]], *, every_compound: bool = False) -> None:
        self.node = {word: line[0] for line in lines for word in line}
        self.compounds = {pair: pair for pair in _COMPOUNDS}
        self.compounds |= {f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")}
        self.compounds |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie"}
        self.compounds |= {"toilet seat": "toilet"}
        if every_compound:
            self.compounds = {word: word for word in self.node if word.count(" ") == 1} | self.compounds
        self._known = {*self.node, *(word for pair in self.compounds for word in pair.split())}

    def singular(self, word: str) -> str:
        """The singular of a lower-case word."""
        if word in self._known:
            return word
        forms = [_IRREGULAR[word]] if word in _IRREGULAR else _singular_forms(word)
        return next((form for form in forms if form in self._known), forms[0])

    def objects(self, text: str) -> list[str]:
        """The objects that a text names, by their names, in order and with repetition."""
        words = [self.singular(word) for word in _WORD.findall(text.lower())]
        joined = []
        position = 0
        while position < len(words):
            pair = " ".join(words[position : position + 2])
            joined.append(self.compounds.get(pair, words[position]))
            position += 2 if pair in self.compounds else 1
        if "toilet" in joined:  # the seat of a toilet is no chair
            joined = [word for word in joined if word != "seat"]
        return [self.node[word] for word in joined if word in self.node]


def _singular_forms(word: str) -> list[str]:
    """What a plural may come from, the likeliest first; the word itself where no rule applies."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return [word]
    if word.endswith("ies"):
        return [word[:-3] + "y", word[:-1]]
    if word.endswith("ves"):
        return [word[:-1], word[:-3] + "f", word[:-3] + "fe"]
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return [word[:-2], word[:-1]]
    if word.endswith("oes"):
        return [word[:-2], word[:-1]]
    return [word[:-1]]


# ------------------------------------------------------------------------------------------ numbers


def judge(captions: Sequence[Caption], there: Mapping[str, frozenset[str]], vocabulary: Vocabulary) -> list[Judged]:
    """Compare what each caption names with what is there."""
    judged = []
    for caption in captions:
        named = tuple(vocabulary.objects(caption.text))
        true = there[caption.image]
        false = tuple(name for name in named if name not in true)
        judged.append(Judged(image=caption.image, named=named, false=false, there=true))
    return judged


def measure(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """CHAIR's numbers with intervals from resampling images."""
    return {
        "chair_s": share((one.image, bool(one.false)) for one in judged),
        "chair_i": share((one.image, name not in one.there) for one in judged for name in one.named),
        "recall": share((one.image, name in one.named) for one in judged for name in sorted(one.there)),
    }


# -------------------------------------------------------------------------------------------- files


def read_synonyms(path: Path, *, every_compound: bool = False) -> Vocabulary:
    """The vocabulary of a synonym file: a line per object, its words separated by commas, its name first.

    Raises:
        UserError: the file names nothing.
    """
    text = files.decoded(path)
    lines = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError("the synonym file names no object", place=str(path))
    return Vocabulary(lines, every_compound=every_compound)


def read_captions(path: Path) -> list[Caption]:
    """Captions: COCO's results (a list of `{"image_id", "caption"}`), the same as JSON lines, or the authors' file with
    `{"imgToEval": {...}}`.

    Raises:
        UserError: a field is missing or wrong, or there are none.
    """
    if path.suffix == ".jsonl":
        rows: Sequence[tuple[str, Any]] = files.rows_of(path)
    else:
        value = files.value_of(path)
        if isinstance(value, Mapping):
            value = list(files.entry(value.get("imgToEval"), f"{path} imgToEval").values())
        if not isinstance(value, list):
            raise UserError("expected a list of captions or an object with 'imgToEval'", place=str(path))
        rows = [(f"{path} caption {number}", row) for number, row in enumerate(value)]
    if not rows:
        raise UserError("the file has no captions", place=str(path))
    found = []
    for place, value in rows:
        row = files.entry(value, place)
        found.append(Caption(image=files.identifier(row, "image_id", place), text=files.text(row, "caption", place)))
    return found


def read_annotations(paths: Sequence[Path], vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    """What is in each picture, by COCO's instances and captions files together.

    A picture that is listed under `images` and has no annotation has nothing in it.

    Raises:
        UserError: a field is missing or wrong, or a category is not in the synonym file.
    """
    there: dict[str, set[str]] = {}
    for path in paths:
        content = files.entry(files.value_of(path), str(path))
        names = _categories(content, path, vocabulary)
        for number, value in enumerate(content.get("images") or []):
            place = f"{path} image {number}"
            there.setdefault(files.identifier(files.entry(value, place), "id", place), set())
        for number, value in enumerate(files.listed(content, "annotations", str(path))):
            place = f"{path} annotation {number}"
            row = files.entry(value, place)
            objects = there.setdefault(files.identifier(row, "image_id", place), set())
            if "caption" in row:
                objects.update(vocabulary.objects(files.text(row, "caption", place)))
                continue
            category = files.identifier(row, "category_id", place)
            if category not in names:
                raise UserError(f"category_id {category} is not among the file's categories", place=place)
            objects.add(names[category])
    return {image: frozenset(objects) for image, objects in there.items()}


def _categories(content: files.Row, path: Path, vocabulary: Vocabulary) -> dict[str, str]:
    """Name of the object by category id."""
    names = {}
    for number, value in enumerate(content.get("categories") or []):
        place = f"{path} category {number}"
        row = files.entry(value, place)
        name = files.text(row, "name", place).lower()
        if name not in vocabulary.node:
            raise UserError(
                f"the synonym file has no '{name}'", place=place, fix="Add a line for it, with its synonyms."
            )
        names[files.identifier(row, "id", place)] = vocabulary.node[name]
    return names


def measure_files(
    captions: Path, annotations: Sequence[Path], synonyms: Path, *, every_compound: bool = False
) -> dict[str, Estimate]:
    """CHAIR's numbers of a captions file.

    Raises:
        UserError: a file is wrong, or a caption's picture is in no annotation file.
    """
    vocabulary = read_synonyms(synonyms, every_compound=every_compound)
    there = read_annotations(annotations, vocabulary)
    said = read_captions(captions)
    unknown = sorted({caption.image for caption in said} - set(there))
    if unknown:
        raise UserError(
            f"{len(unknown)} pictures of the captions are in no annotation file, the first is {unknown[0]}",
            place=str(captions),
            fix="Give the annotation files of these pictures' split.",
        )
    return measure(judge(said, there, vocabulary))
