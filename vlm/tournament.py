"""Trains a suite of arms with several seeds, has all of them sit one exam, and sets their results side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from evaluators.answers import cured
from evaluators.hallucination.changes import Change, Tally, changes
from evaluators.scorefile import write_whole
from mmalign import config as configuration
from mmalign.apart import COST, RESULT, read_json, train_apart, write_json
from mmalign.config import Settings
from mmalign.errors import UserError, nearest
from mmalign.progress import progress
from vlm.arms import ordered, origin, resolved
from vlm.judging import Exam, added, judge, make_exam, tallies
from vlm.making import ensure_store
from vlm.models import VisionLanguageModel, open_model
from vlm.recipe import TrainConfig
from vlm.tuned import find_tuned, open_tuned

BASES = "bases"


class ArmSettings(Settings):
    """One method."""

    label: str = Field(description="in the table")
    recipe: str = Field(description="a recipe, by name or file")
    set: tuple[str, ...] = Field((), description="key=value on top; loop.init_from=arm:NAME starts where NAME ended")
    against: str | None = Field(None, description="another arm, on the same pairs, that it is set against too")
    control: bool = Field(False, description="should teach nothing")


class ExamSettings(Settings):
    """What every model is asked."""

    count: int = Field(400, ge=2, description="held-out pictures")
    batch_size: int = Field(64, gt=0, description="answers made at once; changes nothing in them")
    seed: int = Field(0, ge=0, description="of the pictures and the questions")


class SuiteSettings(Settings):
    """A comparison."""

    seeds: tuple[int, ...] = Field(min_length=1, description="of training")
    exam: ExamSettings = ExamSettings()
    arms: dict[str, ArmSettings]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One arm and seed."""

    arm: str
    seed: int
    folder: Path
    recipe: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.seed}"

    def config(self) -> TrainConfig:
        """Its recipe, whatever it starts from."""
        return configuration.load(TrainConfig, self.recipe, self.words)


def tournament(suite: str, out: Path, *, only: Sequence[str], seeds: Sequence[int] | None, jobs: int) -> int:
    """Run what is not finished, judge it, write `table.md` and `table.json`. Returns the exit code."""
    settings = configuration.load(SuiteSettings, suite)
    runs = list(planned(settings, out, only, tuple(seeds) if seeds else settings.seeds))
    for wave in waves(runs):
        untrained = [run for run in wave if not (run.folder / COST).is_file()]
        for run in untrained:  # before several need the same one
            config = run.config()
            ensure_store(config, partial(open_model, config.model))
        with ThreadPoolExecutor(jobs) as pool:
            for run, cost in zip(untrained, pool.map(partial(trained, out), untrained), strict=True):
                write_json(run.folder / COST, cost)
                print(f"{run.name}: {cost['seconds']:.0f} s", flush=True)
    judge_all(settings, runs, out)
    wanted = [run for run in runs if not only or run.arm in only]
    lines = list(summary(settings, wanted, out))
    write_json(out / "table.json", lines)
    text = markdown(lines)
    write_whole(out / "table.md", [text])
    print(text)
    return 0


def planned(settings: SuiteSettings, out: Path, only: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """All runs of a suite, or those of some arms and of what they start from.

    Raises:
        UserError: no such arm, or one starts from, or is set against, one that is not there.
    """
    words = {name: arm.set for name, arm in settings.arms.items()}
    for name, arm in settings.arms.items():
        if arm.against is not None and arm.against not in words:
            raise UserError(f"no arm '{arm.against}'", place=f"arms.{name}.against", fix=nearest(arm.against, words))
    for name in only:
        if name not in words:
            raise UserError(f"the suite has no '{name}'", place="--only", fix=nearest(name, words))
    order = ordered(words)
    wanted = set(only or order)
    for name in reversed(order):  # what an arm starts from stands before it
        before = origin(words[name]) if name in wanted else None
        wanted |= {before} if before else set()
    for name in (name for name in order if name in wanted):
        arm = settings.arms[name]
        for seed in seeds:
            own = [*arm.set, f"loop.seed={seed}", f"loop.output_dir={out / name / str(seed)}"]
            config = configuration.load(TrainConfig, arm.recipe, own)
            if config.make is not None:  # arms that are fed alike share their pairs
                own.append(f"data.path={out / 'pairs' / f'{config.make.name}-{configuration.digest(config.make)[:8]}'}")
            yield Run(arm=name, seed=seed, folder=out / name / str(seed), recipe=arm.recipe, words=tuple(own))


def waves(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that can be trained at once: after those that they start from."""
    depth: dict[str, int] = {}
    for run in runs:
        before = origin(run.words)
        depth[run.arm] = 0 if before is None else depth[before] + 1
    for level in range(max(depth.values(), default=-1) + 1):
        yield [run for run in runs if depth[run.arm] == level]


def trained(out: Path, run: Run) -> dict[str, float]:
    """What a run's training cost; see `train_apart`."""
    words = resolved(run.words, lambda arm: out / arm / str(run.seed))
    return train_apart("vlm", [run.recipe, *words], run.folder, run.name)


# --------------------------------------------------------------------------------------------- results


def judge_all(settings: SuiteSettings, runs: Sequence[Run], out: Path) -> None:
    """Have every run and every base sit the exam, unless they have; answers are kept by picture."""
    said = settings.exam
    exam: Exam | None = None
    for run in progress(runs, "judge", unit="run"):
        config = run.config()
        for file, name, opened in (
            (base_file(out, config), f"base of {run.arm}", partial(open_model, config.model)),
            (run.folder / RESULT, run.name, partial(_open_run, run)),
        ):
            if file.is_file():
                continue
            exam = exam or make_exam(said.count, seed=said.seed)
            found = tallies(exam, judge(exam, {name: opened}, batch_size=said.batch_size)[name])
            sums = {key: {"hits": one.hits.tolist(), "units": one.units.tolist()} for key, one in found.items()}
            write_json(file, {"exam": said.model_dump(exclude={"batch_size"}), "measures": sums})


def _open_run(run: Run) -> VisionLanguageModel:
    return open_tuned(find_tuned(run.folder))


def base_file(out: Path, config: TrainConfig) -> Path:
    """Where the answers of a recipe's model before training are kept."""
    return out / BASES / f"{configuration.digest(config.model)[:12]}.json"


def read_tallies(settings: SuiteSettings, file: Path) -> dict[str, Tally]:
    """What `judge_all` wrote.

    Raises:
        UserError: it was written for another exam.
    """
    content = read_json(file)
    if content["exam"] != settings.exam.model_dump(exclude={"batch_size"}):
        raise UserError("judged by another exam", place=str(file), fix="Remove it, or name another --out.")
    return {
        key: Tally(hits=np.array(one["hits"]), units=np.array(one["units"])) for key, one in content["measures"].items()
    }


def summary(settings: SuiteSettings, runs: Sequence[Run], out: Path) -> Iterator[dict[str, Any]]:
    """A line per arm, its seeds together: intervals draw pictures with all their seeds."""
    for name, about in settings.arms.items():
        own = [run for run in runs if run.arm == name]
        if not own:
            continue
        bases = [read_tallies(settings, base_file(out, run.config())) for run in own]
        tuned = [read_tallies(settings, run.folder / RESULT) for run in own]
        moved = changes(added(bases), added(tuned))
        others = [run for run in runs if run.arm == about.against]
        over = (
            changes(added([read_tallies(settings, run.folder / RESULT) for run in others]), added(tuned))
            if others
            else {}
        )
        costs = [read_json(run.folder / COST) for run in own]
        yield {
            "arm": name,
            "label": about.label,
            "control": about.control,
            "seeds": [run.seed for run in own],
            "changes": {key: one.as_json() for key, one in moved.items()},
            "by_seed": [
                {
                    key: one.as_json()
                    for key, one in changes(base, after).items()
                    if key in ("chair_s", "wrong", "recall")
                }
                for base, after in zip(bases, tuned, strict=True)
            ],
            "against": settings.arms[others[0].arm].label if others else None,
            "over": {key: one.as_json() for key, one in over.items()},
            "cured": cured(moved),
            "seconds": sum(cost["seconds"] for cost in costs) / len(costs),
            "peak_gb": max(cost["peak_gb"] for cost in costs),
        }


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table as people read it: the value after training, and its change in points with its interval."""
    shares = {
        "chair_s": "false descriptions",
        "garbled": "garbled",
        "wrong": "false or garbled",
        "chair_i": "false mentions",
        "recall": "recall",
        "pope_random/accuracy": "POPE random",
        "pope_popular/accuracy": "POPE popular",
        "pope_adversarial/accuracy": "POPE adversarial",
        "pope_adversarial/f1": "its F1",
        "pope_adversarial/yes_ratio": "its yes",
    }
    head = ["method", *shares.values(), "sight, nats", "CPU seconds", "peak GB"]
    table = [head, ["---"] * len(head)]
    if lines:
        before = lines[0]["changes"]
        base = [_percent(before[key]["base"]) for key in shares]
        table.append(["base", *base, f"{before['sight']['base']:.2f}", "", ""])
    for line in lines:
        found = {key: Change(**_change(line["changes"][key])) for key in (*shares, "sight")}
        cells = [f"{_percent(found[key].tuned)}, {_moved(found[key], 100, 1)}" for key in shares]
        sight = f"{found['sight'].tuned:.2f}, {_moved(found['sight'], 1, 2)}"
        label = line["label"] + (" (control)" if line["control"] else "")
        table.append([label, *cells, sight, f"{line['seconds']:.0f}", f"{line['peak_gb']:.2f}"])
    text = "".join("| " + " | ".join(row) + " |\n" for row in table)
    for line in lines:
        if line["against"]:
            over = {key: Change(**_change(line["over"][key])) for key in ("wrong", "recall", "sight")}
            text += (
                f"\n{line['label']} against {line['against']}: "
                f"false or garbled {_moved(over['wrong'], 100, 1)} points, "
                f"recall {_moved(over['recall'], 100, 1)}, sight {_moved(over['sight'], 1, 2)} nats.\n"
            )
    return text


def _change(content: Mapping[str, Any]) -> dict[str, Any]:
    ci95 = None if content["ci95"] is None else tuple(content["ci95"])
    return {"base": content["base"], "tuned": content["tuned"], "ci95": ci95}


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _moved(change: Change, scale: float, digits: int) -> str:
    if change.value is None or change.ci95 is None:
        return "no change to speak of"
    low, high = (scale * bound for bound in change.ci95)
    return f"{scale * change.value:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
