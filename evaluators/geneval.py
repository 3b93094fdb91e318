"""GenEval's rules (Ghosh et al. 2310.11513) on what any detector found: is what the prompt asks for in the picture?

A requirement says what a picture must hold (`include`: a class, how many, and perhaps a colour or a position relative
to an earlier requirement) and must not hold (`exclude`: a class, and how many are too many). All of `include` must hold
and none of `exclude`.

    picture     1 where all holds                  task (tag)    mean over its pictures
    overall     mean over tasks, each counting alike

Detections come as JSON lines, a picture each, with the rules' own thresholds applied here:

    {"file": "00000/samples/0000.png", "tag": "position", "prompt": "a dog left of a bench",
     "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
     "detections": [{"class": "dog", "score": 0.93, "box": [x0, y0, x1, y1], "color": "brown"}]}

The published numbers come from Mask2Former's boxes and CLIP's colours. Another detector gives other numbers: name it
beside them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.hallucination import files
from evaluators.hallucination.estimate import Estimate, share
from mmalign.errors import UserError
from mmalign.records import is_number, shown

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence from which a box counts; of prompts about numbers
MOST = 16  # boxes of one class that are looked at
MARGIN = 0.1  # of two boxes' sizes, by which their centres must differ at least to be beside or above one another
POSITIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """A box: (left, top, right, bottom) in pixels, y downwards; its colour where somebody named it."""

    box: Box
    score: float
    color: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A requirement.

    Attributes:
        position: (how, which earlier requirement it is relative to).
    """

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What a picture should hold, and what was found in it."""

    prompt: str
    tag: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    found: Mapping[str, Sequence[Detection]]


# ------------------------------------------------------------------------------------------------------ rules


def relations(first: Box, second: Box, margin: float = MARGIN) -> set[str]:
    """How a box lies relative to another; empty where it overlaps too much to say.

    With centres c, sizes s and d = c1 - c2, what is left of each |d| after taking off margin (s1 + s2) is divided by
    the length of d; beyond 1/2 it counts.
    """
    offsets = [(first[i] + first[i + 2] - second[i] - second[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(first[i + 2] - first[i]) + abs(second[i + 2] - second[i]) for i in (0, 1)]
    left = [
        math.copysign(max(abs(offset) - margin * size, 0.0), offset)
        for offset, size in zip(offsets, sizes, strict=True)
    ]
    if all(abs(value) < 1e-3 for value in left):
        return set()
    length = math.hypot(*offsets)
    x, y = left[0] / length, left[1] / length
    said = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in said.items() if holds}


def correct(picture: Picture, *, margin: float = MARGIN) -> tuple[bool, list[str]]:
    """Whether a picture holds all that it should, and what it lacks."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for wanted in picture.include:
        there = list(picture.found.get(wanted.name, ()))[: wanted.count]
        matched = len(there) >= wanted.count
        if not matched:
            reasons.append(f"{len(there)} of {wanted.count} {wanted.name}")
        else:
            coloured = sum(one.color == wanted.color for one in there)
            if wanted.color is not None and coloured < wanted.count:
                reasons.append(f"{coloured} of {wanted.count} {wanted.color} {wanted.name}")
            if wanted.position is not None:
                how, which = wanted.position
                others = groups[which]
                if others is None:
                    reasons.append(f"nothing for {wanted.name} to be {how}")
                    matched = False
                elif not all(how in relations(one.box, other.box, margin) for one in there for other in others):
                    reasons.append(f"{wanted.name} is not {how} {picture.include[which].name}")
                    matched = False
        groups.append(there if matched else None)
    for wanted in picture.exclude:
        if len(picture.found.get(wanted.name, ())) >= wanted.count:
            reasons.append(f"{wanted.count} {wanted.name} or more")
    return not reasons, reasons


# ---------------------------------------------------------------------------------------------------- numbers


def measure(pictures: Iterable[Picture]) -> dict[str, Estimate]:
    """Share of correct pictures by task, and the mean over tasks; intervals keep the pictures of a prompt together."""
    units: dict[str, list[tuple[Hashable, bool]]] = {}
    every: list[tuple[Hashable, bool]] = []
    for picture in pictures:
        hit = picture.prompt, correct(picture)[0]
        units.setdefault(picture.tag, []).append(hit)
        every.append(hit)
    numbers = {f"task/{tag}": share(hits) for tag, hits in units.items()}
    any_hit: dict[Hashable, bool] = {}
    for prompt, hit_ in every:
        any_hit[prompt] = any_hit.get(prompt, False) or hit_
    scores = [one.value for one in numbers.values() if one.value is not None]
    overall = sum(scores) / len(scores)
    images = len(any_hit)
    return {
        "overall": Estimate(value=overall, ci95=_overall_interval(units, overall), n=len(every), images=images),
        **numbers,
        "pictures": share(every),
        "prompts": share(any_hit.items()),
    }


def _overall_interval(
    units: Mapping[str, Sequence[tuple[Hashable, bool]]], overall: float
) -> tuple[float, float] | None:
    """Of the mean over tasks: tasks have prompts of their own, so their variances add up."""
    from mmalign.statistics import cluster_deviation, student_quantile

    variance, degrees = 0.0, 0
    for hits in units.values():
        prompts = [prompt for prompt, _ in hits]
        count = len(set(prompts))
        if count < 2:
            return None
        variance += cluster_deviation([float(hit) for _, hit in hits], prompts) ** 2 / count
        degrees += count - 1
    half = student_quantile(0.975, degrees) * math.sqrt(variance) / len(units)
    return max(0.0, overall - half), min(1.0, overall + half)


# ------------------------------------------------------------------------------------------------------ files


def read_pictures(path: Path, *, threshold: float = THRESHOLD, counting: float = COUNTING_THRESHOLD) -> list[Picture]:
    """Pictures with their detections: of each class those above the threshold, most confident first.

    Raises:
        UserError: a field is missing or wrong.
    """
    found = []
    for place, row in files.rows_of(path):
        tag = files.text(row, "tag", place)
        include = tuple(
            _wanted(value, index, f"{place} include[{index}]")
            for index, value in enumerate(files.listed(row, "include", place))
        )
        exclude = tuple(_wanted(value, 0, f"{place} exclude") for value in row.get("exclude") or ())
        least = counting if tag == COUNTING else threshold
        by_class: dict[str, list[Detection]] = {}
        for index, value in enumerate(files.listed(row, "detections", place)):
            name, one = _detection(value, f"{place} detections[{index}]")
            if one.score > least:
                by_class.setdefault(name, []).append(one)
        kept = {name: sorted(boxes, key=lambda one: -one.score)[:MOST] for name, boxes in by_class.items()}
        found.append(
            Picture(prompt=files.text(row, "prompt", place), tag=tag, include=include, exclude=exclude, found=kept)
        )
    return found


def _wanted(value: Any, index: int, place: str) -> Wanted:
    row = files.entry(value, place)
    count, color, position = row.get("count", 1), row.get("color"), row.get("position")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"count: expected a whole number from 1, got {shown(count)}", place=place)
    if not isinstance(color, str | None):
        raise UserError(f"color: expected text, got {shown(color)}", place=place)
    if position is not None:
        whole = isinstance(position, list) and len(position) == 2 and position[0] in POSITIONS
        if not whole or not isinstance(position[1], int) or not 0 <= position[1] < index:
            raise UserError(f"position: expected one of {POSITIONS} and an earlier index, got {position}", place=place)
        position = (position[0], position[1])
    return Wanted(name=files.text(row, "class", place), count=count, color=color, position=position)


def _detection(value: Any, place: str) -> tuple[str, Detection]:
    row = files.entry(value, place)
    box, score, color = row.get("box"), row.get("score"), row.get("color")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise UserError(f"box: expected four numbers, got {shown(box)}", place=place)
    if not is_number(score):
        raise UserError(f"score: expected a number, got {shown(score)}", place=place)
    if not isinstance(color, str | None):
        raise UserError(f"color: expected text, got {shown(color)}", place=place)
    left, top, right, bottom = map(float, box)
    one = Detection(box=(left, top, right, bottom), score=float(row["score"]), color=color)
    return files.text(row, "class", place), one
