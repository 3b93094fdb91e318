"""What an evaluation found: each model's numbers, what was compared with what, and the sentence that says it.

Numbers and words only; `evaluators.report` writes them down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evaluators.overoptimisation import Look, first_verdict
from mmalign.errors import UserError
from mmalign.statistics import Interval, PairedReport, bootstrap_interval, wilson_interval

BASE = "base"  # the arm that every other one is compared with
_NOT_NUMBERS = {"arm", "label", "intervals", "per_prompt"}  # what else report.json says of an arm


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One of the models of an evaluation.

    Attributes:
        label: its name for people: "Diffusion-DPO".
        curves: metrics.jsonl of its training; None where it was not trained.
    """

    label: str
    curves: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What reports of every kind begin and end with.

    Attributes:
        method: what trained the aligned arm: "dpo".
        title: heading of the page.
        seed, seconds: of the whole run.
        versions: of the libraries that matter.
        config: the effective configuration, YAML.
        command: what to type to get this again.
        arms: name -> arm, in the order to show them; "base" is one of them.
        aligned: name of the arm that the report is about.
        notes: sentences on limits and negative results.

    Raises:
        ValueError: the base or the aligned arm is missing.
    """

    method: str
    title: str
    seed: int
    seconds: float
    versions: Mapping[str, str]
    config: str
    command: str
    arms: Mapping[str, Model]
    aligned: str
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if BASE not in self.arms or self.aligned not in self.arms or self.aligned == BASE:
            raise ValueError(f"arms {list(self.arms)} lack '{BASE}' or the aligned '{self.aligned}'")

    def head(self) -> dict[str, Any]:
        """What report.json says of every evaluation."""
        return {
            "method": self.method,
            "title": self.title,
            "seed": self.seed,
            "seconds": self.seconds,
            "versions": dict(self.versions),
            "config": self.config,
            "command": self.command,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm(Model):
    """One model on the evaluation prompts.

    Attributes:
        numbers: means over the units under their names in report.json: {"faithful": 0.54, "clip_mean": 0.31}.
        intervals: their 95 % intervals, of those that have one.
        per_prompt: score of each unit by the preference that was taught, in the same order for every arm.
        images: pictures of `Report.shown`, one for each.
        captions: what is said below each of these pictures; empty or one for each.
    """

    numbers: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    per_prompt: Sequence[float] = ()
    images: Sequence[Image.Image] = ()
    captions: Sequence[str] = ()


def measured(
    label: str,
    scores: Mapping[str, Sequence[float]],
    *,
    taught: str,
    prompts: Iterable[Hashable] | None = None,
    images: Sequence[Image.Image] = (),
    captions: Sequence[str] = (),
    curves: Path | None = None,
) -> Arm:
    """An arm from the scores of its units: means, and intervals that keep the units of one prompt together.

    Args:
        scores: a score per unit under each name: {"faithful": [1, 0, ...], "style_mean": [...]}. Numbers
            that are all 0 or 1 get Wilson's interval with prompts as the count, others the bootstrap over
            prompts.
        taught: the name of the taught preference among them.
        prompts: the prompt of each unit; None makes every unit its own.
        label, images, captions, curves: as for `Arm`.
    """
    named = None if prompts is None else list(prompts)
    intervals = {}
    for name, values in scores.items():
        if set(values) <= {0, 1}:
            count = len(values) if named is None else len(set(named))
            intervals[name] = wilson_interval(count * sum(values) / max(1, len(values)), count)
        else:
            intervals[name] = bootstrap_interval(values, named)
    return Arm(
        label=label,
        numbers={name: sum(values) / len(values) for name, values in scores.items()},
        intervals=intervals,
        per_prompt=scores[taught],
        images=images,
        captions=captions,
        curves=curves,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Report(Evaluation):
    """An evaluation of several models on the same held-out prompts and seeds.

    Attributes:
        preference: what was taught, and judges `paired`: "style".
        prompts: how many held-out prompts.
        paired: every other arm against the base, by the taught preference.
        faithful: the same by faithfulness, where that was measured.
        over: the aligned arm against others than the base, by the taught preference: what the method adds.
        shown: prompts of the picture grid, for which every arm has its image: the first ones, say, never
            those with the best result, for the page says so.

    Raises:
        ValueError: the parts do not fit one another.
    """

    preference: str
    prompts: int
    arms: Mapping[str, Arm]
    paired: Mapping[str, PairedReport]
    faithful: Mapping[str, PairedReport] = field(default_factory=dict)
    over: Mapping[str, PairedReport] = field(default_factory=dict)
    shown: Sequence[str] = ()

    def __post_init__(self) -> None:
        Evaluation.__post_init__(self)  # classes with slots cannot use super()
        others = set(self.arms) - {BASE}
        if set(self.paired) != others:
            raise ValueError(f"paired has {list(self.paired)}, the arms beside the base are {sorted(others)}")
        if not set(self.faithful) <= others or not set(self.over) <= others - {self.aligned}:
            raise ValueError("faithful or over compares an arm that is not there")
        if taken := others & (_KEYS | {"aligned"}) - {self.aligned}:
            raise ValueError(f"report.json says something else under {sorted(taken)}")
        for name, arm in self.arms.items():
            if len(arm.images) != len(self.shown) or len(arm.captions) not in (0, len(self.shown)):
                raise ValueError(f"{name}: {len(arm.images)} images for {len(self.shown)} prompts shown")
            if arm.per_prompt and len(arm.per_prompt) != self.paired[self.aligned].n:
                raise ValueError(f"{name}: {len(arm.per_prompt)} scores for {self.paired[self.aligned].n} units")
            if set(arm.numbers) & _NOT_NUMBERS:
                raise ValueError(f"{name}: a number is called one of {sorted(_NOT_NUMBERS)}")


# -------------------------------------------------------------------------------------------------- JSON


def as_json(report: Report, watches: Mapping[str, Sequence[Look]] | None = None) -> dict[str, Any]:
    """What report.json holds: finite numbers, lists, mappings and text only.

    `base` and `aligned` are arms (`aligned.arm` is its name), every other arm is under its name. `paired`
    compares aligned with base; `paired_arms`, `faithful_arms` and `over` are `Report.paired`, `.faithful` and
    `.over`. `watch` has, of each arm that was watched for over-optimisation, what was logged at each look, and
    why and when the rule fired first, or null.

    Args:
        watches: arm -> its looks.

    Raises:
        UserError: a number is not finite.
    """
    arms = {
        "aligned" if name == report.aligned else name: {
            **arm.numbers,
            "arm": name,
            "label": arm.label,
            "intervals": {key: list(interval) for key, interval in arm.intervals.items()},
            "per_prompt": list(arm.per_prompt),
        }
        for name, arm in report.arms.items()
    }
    said = {
        **report.head(),
        "preference": report.preference,
        "headline": headline(report),
        "prompts": report.prompts,
        "paired": asdict(report.paired[report.aligned]),
        "paired_arms": {name: asdict(pair) for name, pair in report.paired.items()},
        "faithful_arms": {name: asdict(pair) for name, pair in report.faithful.items()},
        "over": {name: asdict(pair) for name, pair in report.over.items()},
        "watch": {name: _watched(history) for name, history in (watches or {}).items()},
    }
    assert set(said) == _KEYS
    plain: dict[str, Any] = _plain({**said, **arms}, "report")
    return plain


_KEYS = {
    "method", "preference", "title", "headline", "prompts", "seed", "seconds", "versions", "config",
    "command", "paired", "paired_arms", "faithful_arms", "over", "notes", "watch",
}  # fmt: skip


def _watched(history: Sequence[Look]) -> dict[str, Any]:
    fired = first_verdict(history)
    return {
        "fired": None if fired is None else {"step": fired.step, "verdict": fired.verdict},
        "looks": [{"step": one.step, **one.metrics()} for one in history],
    }


def _plain(value: Any, place: str) -> Any:
    """The same in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, int)):
        return value
    number = float(value)  # of numpy too
    if not math.isfinite(number):
        raise UserError(
            f"a number of the report is {number}",
            place=place,
            fix="A scorer failed or the model diverged: look at the samples and the scores of this arm.",
        )
    return number


# ------------------------------------------------------------------------------------------------- words


def headline(report: Report) -> str:
    """What was found, in sentences that claim no more than the intervals allow."""
    return " ".join(sentences(report))


def sentences(report: Report) -> list[str]:
    """The headline's sentences: against the base, against other arms, faithfulness."""
    tuned, pair = report.arms[report.aligned].label, report.paired[report.aligned]
    prompts = f"n {report.prompts} held-out prompts {tuned}"
    against = f"of the comparisons with the base model, judged by {report.preference}, the preference it was taught"
    low, high = pair.ci95
    if low > 0.5:
        said = [f"O{prompts} wins {_rate(pair)} {against}."]
    elif high < 0.5:
        said = [f"It got worse: o{prompts} wins only {_rate(pair)} {against}."]
    else:
        said = [
            f"No effect was found: o{prompts} wins {_rate(pair)} {against}; the interval holds 50\u00a0%.",
            f"With so many prompts, an effect of {points(pair.mde)} would have been seen four times in five.",
        ]
    said += [_over(report.arms[name].label, other) for name, other in report.over.items()]
    if report.aligned in report.faithful:
        said.append(_faithful(report, report.faithful[report.aligned]))
    return said


def _rate(pair: PairedReport) -> str:
    return f"{percent(pair.win_rate)} ({interval(pair.ci95, percent)})"


def _over(label: str, pair: PairedReport) -> str:
    if pair.ci95[0] > 0.5:
        return f"Against {label} it wins {_rate(pair)}."
    if pair.ci95[1] < 0.5:
        return f"Against {label} it loses: it wins only {_rate(pair)}."
    return f"Against {label} no difference was found: it wins {_rate(pair)}."


def _faithful(report: Report, pair: PairedReport) -> str:
    before, after = (report.arms[name].numbers.get("faithful") for name in (BASE, report.aligned))
    shares = f"from {percent(before)} to {percent(after)}, " if before is not None and after is not None else ""
    low, high = pair.mean_difference_ci95
    change = f"{shares}a change of {signed(pair.mean_difference)} points ({interval((low, high), signed)})"
    if low <= 0 <= high:
        return f"The share of faithful pictures went {change}, which may be chance."
    return f"The share of faithful pictures {'rose' if low > 0 else 'fell'} {change}."


def percent(share: float) -> str:
    """0.5 -> "50.0 %", with a space that does not break."""
    return f"{100 * share:.1f}\u00a0%"


def points(share: float) -> str:
    """0.088 -> "8.8 points"."""
    return f"{100 * share:.1f}\u00a0points"


def signed(share: float) -> str:
    """A difference of shares in points: -0.004 -> "−0.4"."""
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def interval(bounds: Interval, form: Callable[[float], str]) -> str:
    """A 95 % interval in words."""
    return f"95\u00a0% interval {form(bounds[0])} to {form(bounds[1])}"
