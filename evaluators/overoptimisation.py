"""Does the reward still measure what is wanted? Looks at held-out prompts during a run, and the rule that stops it.

A look is taken before training (the base) and every so many updates, with the same prompts and the same noise. A run
is over-optimised, and `verdict` says so, when

    the mean of a held-out scorer lies below the base's by more than `tolerance` of the base's deviation over prompts,
    the paired 95 % interval of the difference excludes zero, and the rewarded proxy lies above its base, for
    `patience` looks in a row with the same scorer;
    or the implicit KL exceeds `max_kl`;
    or the degenerate share exceeds the base's by more than `max_degenerate`;
    or diversity falls below `min_diversity` times the base's.

Pure logic: what was seen is `watch.jsonl` in the run's folder, a line per look, which is all the state there is. Many
looks at the same prompts are many chances to be misled; patience is there for that, and the interval is per look.

Sources: Gao et al. 2210.10760 (proxy against gold reward over KL); `mmalign.statistics` for the intervals.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from pydantic import Field

from mmalign.config import NamedSection, Settings
from mmalign.errors import UserError
from mmalign.statistics import Interval, bootstrap_interval

FILE = "watch.jsonl"
LARGEST = 10_000_000  # bytes of that file: thousands of looks


class WatchSettings(Settings):
    """The watch for over-optimisation: what is looked at, how often, and when the run is stopped."""

    prompts: str = Field("shapes:heldout", description="as in candidates; never trained on")
    count: int = Field(32, ge=2, description="prompts used, drawn by the seed; fewer are misled more easily")
    per_prompt: int = Field(2, ge=1, description="pictures per prompt; with 2 or more, diversity is within prompts")
    seed: int = Field(0, ge=0, description="of the prompts and the noise, the same at every look")
    every: int = Field(50, gt=0, description="updates between looks; the first is before training")
    scorers: dict[str, NamedSection] = Field(
        min_length=1,
        description="name -> scorer that the run is not rewarded by; its main number is watched",
    )
    features: NamedSection | None = Field(
        None, description="scorer in whose space diversity is measured: {name: clip}; null: by pixels"
    )
    tolerance: float = Field(
        0.1, ge=0, description="how far a held-out scorer may fall, in deviations of the base over prompts"
    )
    patience: int = Field(2, gt=0, description="looks in a row that must find it")
    max_kl: float | None = Field(None, gt=0, description="implicit KL, in the unit of kl in the log; null: any")
    max_degenerate: float | None = Field(0.1, ge=0, le=1, description="share beyond the base's; null: any")
    min_diversity: float | None = Field(0.5, ge=0, le=1, description="share of the base's; null: any")
    stop: bool = Field(True, description="end the run when the rule says so; false: only say it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What was seen of the model after some updates.

    Attributes:
        step: updates done; the first look of a run is the base.
        proxy: the reward that is trained, of each held-out prompt (mean of its pictures).
        held_out: scorer -> its main number of each of the same prompts.
        diversity: see `evaluators.diversity`.
        degenerate: share of pictures.
        kl: implicit KL from the reference; None where the method has none, and of the base.
        verdict: why the run should stop; None as long as it should not.

    Raises:
        UserError: a number is not finite.
        ValueError: a scorer has not one number per prompt.
    """

    step: int
    proxy: Sequence[float]
    held_out: Mapping[str, Sequence[float]]
    diversity: float
    degenerate: float
    kl: float | None = None
    verdict: str | None = None

    def __post_init__(self) -> None:
        if not self.proxy or any(len(values) != len(self.proxy) for values in self.held_out.values()):
            raise ValueError(f"step {self.step}: every scorer needs a number for each prompt")
        said = {"proxy": self.proxy, **self.held_out}
        single = {"diversity": self.diversity, "degenerate": self.degenerate, "kl": self.kl}
        said |= {name: [value] for name, value in single.items() if value is not None}
        for name, values in said.items():
            if not all(map(math.isfinite, values)):
                raise UserError(
                    f"the look at over-optimisation saw '{name}' that is no finite number",
                    place=f"step {self.step}",
                    fix="The model diverged or a scorer failed: go back to an earlier checkpoint.",
                )

    def metrics(self) -> dict[str, float]:
        """For the log: means over prompts and what else was seen."""
        numbers = {"watch/proxy": fmean(self.proxy)}
        numbers |= {f"watch/{name}": fmean(values) for name, values in self.held_out.items()}
        numbers |= {"watch/diversity": self.diversity, "watch/degenerate": self.degenerate}
        return numbers if self.kl is None else {**numbers, "watch/kl": self.kl}


# ------------------------------------------------------------------------------------------------------- rule


def due(history: Sequence[Look], step: int, settings: WatchSettings) -> bool:
    """Whether a look is to be taken after `step` updates: not one that a resumed run has already."""
    return step % settings.every == 0 and (not history or history[-1].step < step)


def add(history: Sequence[Look], found: Look, settings: WatchSettings) -> list[Look]:
    """The history with one look more, which says the verdict on it."""
    return [*history, replace(found, verdict=verdict([*history, found], settings))]


def verdict(history: Sequence[Look], settings: WatchSettings) -> str | None:
    """Why the run should stop after the last look, in one line; None when it should not.

    Args:
        history: every look so far, the base first.

    Raises:
        ValueError: looks of different prompts or scorers.
    """
    if len(history) < 2:
        return None
    base, last = history[0], history[-1]
    if any(set(one.held_out) != set(base.held_out) or len(one.proxy) != len(base.proxy) for one in history):
        raise ValueError("looks at different prompts or scorers cannot be compared")
    if settings.max_kl is not None and last.kl is not None and last.kl > settings.max_kl:
        return f"step {last.step}: implicit KL {last.kl:.4g} exceeds max_kl {settings.max_kl:g}"
    if settings.max_degenerate is not None and last.degenerate > base.degenerate + settings.max_degenerate:
        return (
            f"step {last.step}: {100 * last.degenerate:.0f} % of the pictures are degenerate, "
            f"{100 * base.degenerate:.0f} % of the base's are; "
            f"max_degenerate allows {100 * settings.max_degenerate:g} points more"
        )
    if settings.min_diversity is not None and last.diversity < settings.min_diversity * base.diversity:
        return (
            f"step {last.step}: diversity is {last.diversity / base.diversity:.2f} of the base's, "
            f"below min_diversity {settings.min_diversity:g}"
        )
    if len(history) - 1 < settings.patience:
        return None
    recent = history[-settings.patience :]
    for name in base.held_out:
        if all(_fell(base, one, name, settings.tolerance) for one in recent):
            change, (low, high) = difference(base, last, name)
            looks = f"{settings.patience} looks in a row" if settings.patience > 1 else "this look"
            return (
                f"step {last.step}: the reward rose by {fmean(last.proxy) - fmean(base.proxy):.3g} while held-out "
                f"'{name}' fell by {-change:.3g} (95 % interval {-high:.3g} to {-low:.3g}), in {looks}"
            )
    return None


def first_verdict(history: Sequence[Look]) -> Look | None:
    """The look at which the rule fired first, if it did."""
    return next((one for one in history if one.verdict is not None), None)


def difference(base: Look, later: Look, name: str) -> tuple[float, Interval]:
    """How a held-out scorer's mean changed from the base, with the paired 95 % interval over prompts."""
    moved = [after - before for before, after in zip(base.held_out[name], later.held_out[name], strict=True)]
    return fmean(moved), bootstrap_interval(moved)


def deviations(history: Sequence[Look], name: str | None) -> list[float]:
    """How far the mean of a held-out scorer, or of the proxy for None, lies above the base's at each look.

    In deviations of the base over prompts, so that scorers compare; in the scorer's unit where the base has none.
    """
    columns = [one.proxy if name is None else one.held_out[name] for one in history]
    unit = pstdev(columns[0]) or 1.0
    return [(fmean(values) - fmean(columns[0])) / unit for values in columns]


def _fell(base: Look, later: Look, name: str, tolerance: float) -> bool:
    if fmean(later.proxy) <= fmean(base.proxy):
        return False
    change, (_, high) = difference(base, later, name)
    return change < -tolerance * pstdev(base.held_out[name]) and high < 0


# ------------------------------------------------------------------------------------------------------- file


def write_history(path: Path, history: Sequence[Look]) -> None:
    """Writes every look, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    text = "".join(json.dumps(asdict(one), allow_nan=False) + "\n" for one in history)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write what the watch saw: {error.strerror}", place=str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_history(path: Path, step: int | None = None) -> list[Look]:
    """The looks of a run, none where there is no file.

    Args:
        path: `watch.jsonl` in the run's folder.
        step: of the checkpoint that the run goes on from; later looks will be taken again and are left out.

    Raises:
        UserError: the file cannot be read, or a line is not a look.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError("too large for what the watch saw (over 10 MB)", place=str(path))
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read what the watch saw: {error}", place=str(path)) from error
    history: list[Look] = []
    for number, line in enumerate(lines, start=1):
        try:
            found = _look(json.loads(line))
            if history and found.step <= history[-1].step:
                raise ValueError("steps do not rise")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, UserError) as error:
            raise UserError(
                "not a look of the watch",
                place=f"{path}:{number}",
                fix="Move the file away; the watch then begins anew.",
            ) from error
        history.append(found)
    return [one for one in history if step is None or one.step <= step]


_NAMES = {field.name for field in fields(Look)}


def _look(data: dict[str, Any]) -> Look:
    if set(data) != _NAMES or type(data["step"]) is not int or not isinstance(data["verdict"], str | None):
        raise ValueError("other fields than a look's")
    return Look(
        step=data["step"],
        proxy=[float(value) for value in data["proxy"]],
        held_out={name: [float(value) for value in values] for name, values in data["held_out"].items()},
        diversity=float(data["diversity"]),
        degenerate=float(data["degenerate"]),
        kl=None if data["kl"] is None else float(data["kl"]),
        verdict=data["verdict"],
    )
