"""Runs a suite of methods at equal budget and sets their results side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from diffusion.feeds import ensure_store
from diffusion.judging import Judged, judge
from diffusion.models import load_model
from diffusion.recipe import EvaluationSettings, TrainConfig
from diffusion.tuned import find_tuned, open_base, open_tuned
from evaluators.diversity import degenerate, distances, diversity
from evaluators.scorers.clip import build as build_clip
from mmalign import config as configuration
from mmalign.apart import COST, RESULT, read_json, train_apart, write_json
from mmalign.config import Settings
from mmalign.errors import UserError, nearest
from mmalign.progress import progress
from mmalign.prompts import read_prompts
from mmalign.statistics import paired_report


class ArmSettings(Settings):
    """One method on one model."""

    label: str = Field(description="in the table")
    recipe: str = Field(description="a recipe, by name or file")
    set: tuple[str, ...] = Field((), description="key=value on top of it")
    rows_per_pair: float | None = Field(
        None, gt=0, description="UNet rows of a pair and update, for methods fed with pairs"
    )
    rows_per_prompt: float = Field(0, ge=0, description="UNet rows spent once for each prompt: InPO's inversions")
    control: bool = Field(False, description="should teach nothing")
    only: tuple[str, ...] = Field((), description="preferences that it is run on; none: all")


class PreferenceSettings(Settings):
    """What is taught."""

    number: str = Field(description="of the scorers, that decides which of two pictures wins")
    pairs: tuple[str, ...] = Field(description="key=value for arms fed with pairs")
    rollouts: tuple[str, ...] = Field(description="key=value for arms that draw for themselves")
    budget: float = Field(gt=0, description="UNet rows of a run")


class SuiteSettings(Settings):
    """A comparison."""

    seeds: tuple[int, ...] = Field(min_length=1, description="of training and of the noise that results are drawn from")
    preferences: dict[str, PreferenceSettings]
    arms: dict[str, ArmSettings]
    evaluation: dict[str, tuple[str, ...]] = Field(description="model path -> key=value of how it is drawn and judged")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One arm, preference and seed."""

    preference: str
    arm: str
    seed: int
    folder: Path
    config: TrainConfig
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.preference}/{self.arm}/{self.seed}"


def tournament(suite: str, out: Path, *, only: Sequence[str], seeds: Sequence[int] | None, jobs: int) -> int:
    """Run what is not finished, judge it, write `table.md` and `table.json`. Returns the exit code."""
    settings = configuration.load(SuiteSettings, suite)
    runs = list(planned(settings, out, only, tuple(seeds) if seeds else settings.seeds))
    waiting = [run for run in runs if not (run.folder / RESULT).is_file()]
    untrained = [run for run in waiting if not (run.folder / COST).is_file()]
    for run in untrained:  # before several need them at once
        ensure_store(run.config, load_model(run.config.model))
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for run, cost in zip(untrained, pool.map(trained, untrained), strict=True):
            write_json(run.folder / COST, cost)
            print(f"{run.name}: {cost['seconds']:.0f} s", flush=True)
    bases: dict[str, Judged] = {}
    for run in progress(waiting, "judge", unit="run"):
        write_json(run.folder / RESULT, judged(settings, run, bases))
    rows = [read_json(run.folder / RESULT) for run in runs]
    table = summary(settings, rows)
    write_json(out / "table.json", {"runs": rows, "table": table})
    text = markdown(table)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def planned(settings: SuiteSettings, out: Path, only: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """All runs of a suite, or those named PREFERENCE/ARM."""
    names = [
        f"{p}/{a}" for p in settings.preferences for a, arm in settings.arms.items() if not arm.only or p in arm.only
    ]
    for name in only:
        if name not in names:
            raise UserError(f"the suite has no '{name}'", place="--only", fix=nearest(name, names))
    for name in only or names:
        preference, _, arm = name.partition("/")
        taught, method = settings.preferences[preference], settings.arms[arm]
        for seed in seeds:
            folder = out / preference / arm / str(seed)
            first = configuration.load(TrainConfig, method.recipe, [*method.set, f"loop.output_dir={folder}"])
            words = list(taught.pairs if first.rollout is None else taught.rollouts)
            words += settings.evaluation.get(first.model.path, ())  # else refused: steps that the model cannot draw in
            words += [*method.set, f"loop.seed={seed}", f"loop.output_dir={folder}"]  # an arm's own word is the last
            if first.rollout is None:
                store = out / preference / f"store-{Path(first.model.path).name}"
                words += [f"data.path={store}", f"data.cache={out / 'cache'}"]
            config = configuration.load(TrainConfig, method.recipe, words)
            steps = int((taught.budget - rows_before(config, method)) // rows_per_update(config, method))
            if steps < 1:
                raise UserError(f"the budget pays for no update of {name}", place=f"preferences.{preference}.budget")
            words.append(f"loop.steps={steps}")
            yield Run(
                preference=preference,
                arm=arm,
                seed=seed,
                folder=folder,
                config=configuration.load(TrainConfig, method.recipe, words),
                words=(method.recipe, *words),
            )


def rows_before(config: TrainConfig, arm: ArmSettings) -> float:
    """UNet rows spent before the first update."""
    drawn = config.candidates
    if drawn is None:
        return 0
    if drawn.prompts is None:
        raise UserError(f"how many candidates does {arm.label} draw?", place="arms", fix="Use candidates.prompts.")
    prompts = len(read_prompts(drawn.prompts, drawn.count, drawn.seed))
    guided = 2 if drawn.sampler.guidance_scale > 1 else 1
    return prompts * (drawn.per_prompt * drawn.sampler.steps * guided + arm.rows_per_prompt)


def rows_per_update(config: TrainConfig, arm: ArmSettings) -> float:
    """UNet rows of an update of one process; a backward counts as two."""
    prompts = config.loop.batch_size * config.loop.accumulation
    drawn = config.rollout
    if drawn is None:
        if arm.rows_per_pair is None:
            raise UserError(f"how many rows does a pair of {arm.label} cost?", place="arms", fix="Set rows_per_pair.")
        return arm.rows_per_pair * prompts
    guided = 2 if drawn.guidance_scale > 1 else 1
    trained = drawn.steps if drawn.kernel in ("ddim", "ddpm") else drawn.steps - 1
    reference = 0 if config.method.name == "ddpo" else trained
    kept = min(drawn.per_prompt, 2) if config.method.name in ("pso", "d3po") else drawn.per_prompt
    drawing = (drawn.steps + reference) * drawn.per_prompt / drawn.passes
    return prompts * guided * (drawing + 3 * trained * kept)


def trained(run: Run) -> dict[str, float]:
    """What a run's training cost; see `train_apart`."""
    return train_apart("diffusion", run.words, run.folder, run.name)


def judged(settings: SuiteSettings, run: Run, bases: dict[str, Judged]) -> dict[str, Any]:
    """One run against its base on held-out prompts."""
    found = find_tuned(run.folder)
    path = run.config.model.path
    words = settings.evaluation.get(path)
    if words is None:
        raise UserError(f"the suite does not say how to judge {path}", place="evaluation")
    evaluation = evaluation_settings([*words, f"evaluation.seed={run.seed}"], run.words[0])
    key = f"{path}/{run.seed}"
    if key not in bases:
        bases[key] = judge(evaluation, {"base": lambda: open_base(found)})["base"]
    base, tuned = bases[key], judge(evaluation, {"tuned": lambda: open_tuned(found)})["tuned"]
    number = settings.preferences[run.preference].number
    cost = read_json(run.folder / COST)
    clip = build_clip()
    result: dict[str, Any] = {"preference": run.preference, "arm": run.arm, "seed": run.seed, "model": path, **cost}
    result["updates"] = run.config.loop.steps
    result["prompts"] = base.prompts
    for name, column in (("taught", number), ("faithful", "faithful"), ("clip", "clip")):
        result[name] = {"base": base.column(column), "tuned": tuned.column(column)}
    for who, pictures in (("base", base.pictures), ("tuned", tuned.pictures)):
        result[f"diversity_{who}"] = diversity(distances(pictures, clip), base.prompts)
        result[f"degenerate_{who}"] = degenerate(pictures, base.prompts).share
    return result


def evaluation_settings(words: Sequence[str], recipe: str) -> EvaluationSettings:
    """The evaluation section of a recipe with changes."""
    config = configuration.load(TrainConfig, recipe, words)
    if config.evaluation is None:
        raise UserError("a recipe of the suite has no evaluation section", place=recipe)
    return config.evaluation


def summary(settings: SuiteSettings, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per preference and arm, seeds together: intervals resample prompts with all their seeds."""
    lines = []
    for preference in settings.preferences:
        for arm, about in settings.arms.items():
            own = [row for row in rows if row["preference"] == preference and row["arm"] == arm]
            if not own:
                continue
            prompts = [prompt for row in own for prompt in row["prompts"]]

            def column(name: str, who: str, own: Sequence[Mapping[str, Any]] = own) -> list[float]:
                return [value for row in own for value in row[name][who]]

            taught = paired_report(column("taught", "base"), column("taught", "tuned"), prompts)
            faithful = paired_report(column("faithful", "base"), column("faithful", "tuned"), prompts)
            clip = paired_report(column("clip", "base"), column("clip", "tuned"), prompts)
            lines.append(
                {
                    "preference": preference,
                    "arm": about.label,
                    "model": own[0]["model"],
                    "control": about.control,
                    "seeds": [row["seed"] for row in own],
                    "updates": own[0]["updates"],
                    "win_rate": taught.win_rate,
                    "win_rate_ci95": list(taught.ci95),
                    "by_seed": [
                        paired_report(row["taught"]["base"], row["taught"]["tuned"], row["prompts"]).win_rate
                        for row in own
                    ],
                    "taught_base": mean(column("taught", "base")),
                    "taught": mean(column("taught", "tuned")),
                    "faithful_base": mean(column("faithful", "base")),
                    "faithful": mean(column("faithful", "tuned")),
                    "faithful_change": faithful.mean_difference,
                    "faithful_change_ci95": list(faithful.mean_difference_ci95),
                    "clip_change": clip.mean_difference,
                    "clip_change_ci95": list(clip.mean_difference_ci95),
                    "diversity_base": mean([row["diversity_base"] for row in own]),
                    "diversity": mean([row["diversity_tuned"] for row in own]),
                    "degenerate": mean([row["degenerate_tuned"] for row in own]),
                    "seconds": mean([row["seconds"] for row in own]),
                    "peak_gb": max(row["peak_gb"] for row in own),
                }
            )
    return lines


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table as people read it."""
    head = (
        "| taught | model | method | taught number | win rate against base | by seed | faithful, points | CLIP "
        "| diversity | CPU seconds | peak GB |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in table:
        faithful, clip = row["faithful_change_ci95"], row["clip_change_ci95"]
        cells = [
            row["preference"],
            row["model"],
            row["arm"] + (" (control)" if row["control"] else ""),
            f"{row['taught_base']:.3f} → {row['taught']:.3f}",
            f"{row['win_rate']:.3f} [{row['win_rate_ci95'][0]:.3f}, {row['win_rate_ci95'][1]:.3f}]",
            ", ".join(f"{rate:.2f}" for rate in row["by_seed"]),
            f"{100 * row['faithful_change']:+.1f} [{100 * faithful[0]:.1f}, {100 * faithful[1]:.1f}]",
            f"{row['clip_change']:+.3f} [{clip[0]:.3f}, {clip[1]:.3f}]",
            f"{row['diversity_base']:.3f} → {row['diversity']:.3f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_gb']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    return head + "".join(lines)
