"""What a run is rewarded for: a recipe's `reward` section, and the object that scores pictures by it.

    reward = sum over terms of weight (value - mean) / std

A term's value is a number of any scorer of `evaluators`, or of the user's own function. A term without `mean` and
`std` is standardised with those of the first round (population deviation), which are kept from then on; a reward of
one such term is that value as it is, times its weight. `mean: 0` with `std: 1` keeps a term's own unit, as the
published sums of several rewards do.

    reward:
      terms:
        - {name: style, scorer: {name: shapes}, number: style}
        - {name: clip, scorer: {name: clip}, weight: 0.5}
        - {name: mine, function: "my_rewards:brightness", weight: 0.2}

A function is called with lists of prompts and of pictures and returns a number for each; a picture's number must not
depend on the others, for they come in batches. Its module is imported from what is installed or, when there is no
such module, from the current folder, and runs with all the rights of whoever starts the run: read a recipe that is
not your own before you run it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from evaluators.functions import FunctionScorer
from evaluators.scorer import Scorer, load
from mmalign.config import NamedSection, Settings
from mmalign.errors import UserError, nearest

Key = int | str
Parts = Mapping[str, Sequence[float]]
_Source = tuple[str, str]  # a scorer's name or a function, and its options

LARGEST = 1e100  # values beyond this are a failure like inf, and their squares would not be numbers

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


# ---------------------------------------------------------------------------------------------------- settings


class TermSettings(Settings):
    """One term of the reward: a number of a scorer, or a function of the user's own."""

    name: str = Field(min_length=1, description="of the term, in logs and messages")
    scorer: NamedSection | None = Field(None, description="a file of evaluators/scorers, with its options")
    number: str | None = Field(None, description="which of the scorer's numbers; null: its main one")
    function: str | None = Field(None, description="module:function instead of a scorer; runs the user's own code")
    weight: float = Field(1.0, description="factor in the sum; below 0 the term is a cost")
    mean: float | None = Field(None, description="taken off the value; null: the first round's")
    std: float | None = Field(None, gt=0, description="the value is divided by it; null: the first round's")

    @model_validator(mode="after")
    def _one_source(self) -> TermSettings:
        if (self.scorer is None) == (self.function is None):
            raise ValueError("a term needs a scorer or a function, and not both")
        if self.function is not None and not _FUNCTION.fullmatch(self.function):
            raise ValueError(f"function should be module:function, got '{self.function}'")
        if self.function is not None and self.number is not None:
            raise ValueError("number chooses among those of a scorer; a function returns only one")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both or neither")
        if self.weight == 0:
            raise ValueError("weight 0 rewards nothing; leave the term out")
        return self


class RewardSettings(Settings):
    """What rollouts are rewarded for."""

    terms: tuple[TermSettings, ...] = Field(min_length=1, description="summed, each standardised and weighted")
    batch_size: int = Field(64, gt=0, description="pictures per call of a scorer or function")
    shuffle: bool = Field(False, description="the control: rewards dealt at random among the pictures of a prompt")
    tied_rounds: int = Field(3, gt=0, description="rounds in a row in which all rewards tie, before the run is stopped")

    @model_validator(mode="after")
    def _names_differ(self) -> RewardSettings:
        names = [term.name for term in self.terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two terms are called '{twice[0]}'")
        return self


# ------------------------------------------------------------------------------------------------------ reward


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the terms' sources say of pictures.

    Attributes:
        parts: term -> its value of each picture, in its own unit and without its weight.
        numbers: of each picture all numbers that the sources gave: {"shapes/faithful": 1.0, "mine": 0.3}.
    """

    parts: dict[str, list[float]]
    numbers: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardScores:
    """`Measured`, and the reward of each picture."""

    total: list[float]
    parts: dict[str, list[float]]
    numbers: list[dict[str, float]]


class Reward:
    """The reward of a recipe. On several processes:

        measured = reward.measure(prompts, images)     # this process's pictures
        reward.fit(gathered parts)                     # of all processes' first round, so that all agree
        total = reward.combine(measured.parts)
        warning = reward.note_round(gathered totals, gathered prompts)

    Attributes:
        identity: every term with its weight and the version of what measures it; for manifests.
        weights: term -> weight; the sign says which direction is better.

    Raises:
        UserError: an unknown scorer, option or number; a function that cannot be imported.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self.weights = {term.name: term.weight for term in settings.terms}
        self._sources: dict[_Source, Scorer] = {}  # terms that ask the same of the same scorer share its one forward
        self._labels: dict[_Source, str] = {}  # what a source's numbers are called
        self._terms: dict[str, tuple[_Source, str]] = {}  # term -> its source, its number
        for index, term in enumerate(settings.terms):
            try:
                source = self._source(term)
                number = term.number or self._sources[source].main
                if number not in (known := self._sources[source].numbers):
                    raise UserError(f"{self._sources[source].identity} has no '{number}'", fix=nearest(number, known))
            except UserError as error:
                place = f"reward.terms[{index}], '{term.name}'"
                raise UserError(
                    error.cause, place=f"{place}, {error.place}" if error.place else place, fix=error.fix
                ) from error
            self._terms[term.name] = source, number
        self.identity = " + ".join(self._describe(term) for term in settings.terms)
        self._statistics = self._given()
        self._tied = 0

    def _source(self, term: TermSettings) -> _Source:
        """Makes the scorer that measures a term, unless an earlier term did; its key among the sources."""
        if term.function is not None:
            key = term.function, ""
            if key not in self._sources:
                self._sources[key], self._labels[key] = FunctionScorer(term.function), term.name
            return key
        assert term.scorer is not None  # the settings have one of the two
        name, options = term.scorer.name, term.scorer.options()
        key = name, json.dumps(options, sort_keys=True)
        if key not in self._sources:
            same = sum(other == name for other, _ in self._sources)
            self._sources[key] = load(name, options)
            self._labels[key] = f"{name}-{same + 1}" if same else name
        return key

    def _describe(self, term: TermSettings) -> str:
        source, number = self._terms[term.name]
        unit = "" if term.mean is None else f" less {term.mean} over {term.std}"
        return f"{term.name}: {term.weight} {self._sources[source].identity} {number}{unit}"

    def _given(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the terms for which they are known before any picture was seen."""
        alone = len(self.settings.terms) == 1
        known = {t.name: (t.mean, t.std) for t in self.settings.terms if t.mean is not None and t.std is not None}
        return known or ({self.settings.terms[0].name: (0.0, 1.0)} if alone else {})

    # -------------------------------------------------------------------------------------------------- scoring

    def measure(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Measured:
        """The terms' values of pictures, each with its prompt.

        Raises:
            UserError: a function raised, or something else than a finite number came back for a picture.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} pictures")
        rows = {key: self._rows(key, prompts, images) for key in self._sources}
        parts = {
            term: [self._value(term, row, index, prompts) for index, row in enumerate(rows[source])]
            for term, (source, _) in self._terms.items()
        }
        merged = [
            {self._label(key, name): float(value) for key in rows for name, value in rows[key][index].items()}
            for index in range(len(images))
        ]
        return Measured(parts=parts, numbers=merged)

    def _rows(self, key: _Source, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        scorer, rows = self._sources[key], []
        for start in range(0, len(images), self.settings.batch_size):
            some = slice(start, start + self.settings.batch_size)
            asked = list(prompts[some])
            place = f"pictures {start} to {start + len(asked) - 1}, the first {asked[0][:80]!r}"
            try:
                given = scorer.score_images(asked, list(images[some]))
            except UserError as error:
                raise UserError(
                    error.cause, place=f"{error.place}, {place}" if error.place else place, fix=error.fix
                ) from error
            if len(given) != len(asked):
                raise UserError(
                    f"{scorer.identity} returned {len(given)} scores for {len(asked)} pictures", place=place
                )
            rows += given
        return rows

    def _value(self, term: str, row: Mapping[str, float], index: int, prompts: Sequence[str]) -> float:
        source, number = self._terms[term]
        identity, place = self._sources[source].identity, f"picture {index}: {prompts[index][:80]!r}"
        if number not in row:
            raise UserError(
                f"term '{term}': {identity} gave no '{number}' for this prompt",
                place=place,
                fix=f"Leave such prompts out, or choose a number that it always gives: {', '.join(sorted(row))}.",
            )
        value = float(row[number])
        if not abs(value) < LARGEST:  # nor for nan
            raise UserError(
                f"term '{term}': {identity} returned {value}", place=place, fix="A reward must be a finite number."
            )
        return value

    def _label(self, source: _Source, number: str) -> str:
        """What a number of a source is called among all: `scorer/number`; a function's is called as its term."""
        if isinstance(self._sources[source], FunctionScorer):
            return self._labels[source]
        return f"{self._labels[source]}/{number}"

    @property
    def fitted(self) -> bool:
        """Whether every term has its mean and deviation."""
        return set(self._statistics) == set(self.weights)

    def fit(self, parts: Parts) -> None:
        """Takes mean and deviation of the terms that lack them; does nothing once all have them.

        Args:
            parts: `Measured.parts` of the first round, of all processes. Their order changes nothing, bit for bit.

        Raises:
            UserError: a term has one value throughout, which leaves nothing to standardise.
        """
        found: dict[str, tuple[float, float]] = {}
        for term in self.weights:
            if term in self._statistics:
                continue
            values = parts[term]
            mean = math.fsum(values) / max(1, len(values))
            std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values)))
            if std <= 1e-9 * abs(mean):  # one value, but for rounding
                raise UserError(
                    f"term '{term}' is {mean:.6g} for all {len(values)} pictures of the "
                    "first round and cannot be standardised",
                    place="reward.terms",
                    fix="See what measures it, or give the term's mean and std.",
                )
            found[term] = mean, std
        self._statistics |= found

    def combine(self, parts: Parts) -> list[float]:
        """The reward of each picture: the weighted sum of its standardised values.

        Raises:
            ValueError: a term has no mean and deviation yet; `fit` comes first.
        """
        if not self.fitted:
            raise ValueError(f"fit comes first: {sorted(self.weights.keys() - self._statistics.keys())}")
        columns = []
        for term, weight in self.weights.items():
            mean, std = self._statistics[term]
            columns.append([weight * (value - mean) / std for value in parts[term]])
        return [math.fsum(values) for values in zip(*columns, strict=True)]

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> RewardScores:
        """`measure` and `combine`, for a reward that is fitted."""
        measured = self.measure(prompts, images)
        return RewardScores(total=self.combine(measured.parts), parts=measured.parts, numbers=measured.numbers)

    # ---------------------------------------------------------------------------------------------------- rounds

    def note_round(self, total: Sequence[float], groups: Sequence[Key]) -> str | None:
        """Counts rounds in a row in which there was nothing to prefer. Ties inside single prompts are normal.

        Args:
            total: rewards of the whole round, of all processes.
            groups: the prompt of each; in a round with one picture per prompt, all are compared with one another.

        Returns:
            A warning when all rewards tied within every prompt.

        Raises:
            UserError: that was so for `tied_rounds` rounds in a row.
        """
        by_prompt: dict[Key, list[float]] = {}
        for value, group in zip(total, groups, strict=True):
            by_prompt.setdefault(group, []).append(value)
        compared = list(by_prompt.values()) if len(by_prompt) < len(total) else [list(total)]
        if not total or any(min(values) != max(values) for values in compared):
            self._tied = 0
            return None
        self._tied += 1
        everywhere = min(total) == max(total)
        what = f"all {len(total)} rewards are {total[0]:.6g}" if everywhere else "all rewards tie within every prompt"
        if self._tied >= self.settings.tied_rounds:
            raise UserError(
                f"{what}, in round {self._tied} in a row: there is nothing to learn from",
                place=f"reward, {self.identity}",
                fix="See what the reward measures; more pictures per prompt tie less often.",
            )
        return f"{what}: this round teaches nothing ({self._tied} of {self.settings.tied_rounds} before the run stops)"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to give the same rewards."""
        return {
            "identity": self.identity,
            "statistics": {term: list(pair) for term, pair in self._statistics.items()},
            "tied": self._tied,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` left off.

        Raises:
            UserError: the state is of another reward.
        """
        if state["identity"] != self.identity:
            raise UserError(
                f"the checkpoint was rewarded by '{state['identity']}', the recipe says '{self.identity}'",
                place="reward",
                fix="Resume with the reward and the versions of the run, or start a new run from its weights.",
            )
        self._statistics = {term: (float(mean), float(std)) for term, (mean, std) in state["statistics"].items()}
        self._tied = int(state["tied"])


# ----------------------------------------------------------------------------------------------------- control


def permutation(groups: Sequence[Key], key: Sequence[Key]) -> list[int]:
    """For every item another one (or itself) of its group, drawn uniformly by (key, group): a new order of each.

    The draw of a group depends on its members' order, not on what else there is.
    """
    from mmalign.randomness import key_seed  # here: it brings torch, which reading a recipe does without

    members: dict[Key, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    taken = [0] * len(groups)
    for group, places in members.items():
        order = np.random.default_rng(key_seed(*key, group)).permutation(len(places))
        for place, source in zip(places, order, strict=True):
            taken[place] = places[source]
    return taken


def shuffled(values: Sequence[float], groups: Sequence[Key], key: Sequence[Key]) -> list[float]:
    """The random-reward control: values dealt anew among the pictures of each prompt, which teaches nothing.

    The rewards stay those that there were, so whatever is learned from their size alone is learned still.

    Args:
        values: a reward per picture.
        groups: the prompt of each.
        key: of the draw: (run seed, "reward", round). The same key deals several terms' values alike.
    """
    return [values[index] for index in permutation(groups, key)]
