"""The stages of `mmalign demo`: candidates, training of every arm, judging, report."""

from __future__ import annotations

import importlib.metadata
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from diffusion import models
from diffusion.feeds import ensure_store
from diffusion.judging import Judged, judge
from diffusion.recipe import TrainConfig
from diffusion.train import train
from diffusion.tuned import find_tuned, open_base, open_tuned
from evaluators.report import write_report
from evaluators.results import Report, measured
from mmalign import __version__
from mmalign import config as configuration
from mmalign.errors import UserError
from mmalign.statistics import PairedReport, paired_report

LABELS = {
    "base": "base",
    "dpo": "Diffusion-DPO",
    "lora": "Diffusion-DPO, LoRA",
    "inpo": "InPO",
    "kto": "Diffusion-KTO",
    "pso": "PSO",
    "pso_offline": "PSO, offline",
    "d3po": "D3PO",
    "prdp": "PRDP",
    "ddpo": "DDPO",
    "sft": "fine-tuning on the winners",
    "shuffled": "control: shuffled labels",
    "control": "control: shuffled rewards",
}
SHARES = ("faithful",)  # numbers that are 0 or 1 for a picture


def demo(recipe: str, overrides: Sequence[str]) -> int:
    """All stages of a recipe. Returns the exit code."""
    clock = time.perf_counter()
    config = configuration.load(TrainConfig, recipe, overrides)
    evaluation = config.evaluation
    if evaluation is None:
        raise UserError("this recipe has no evaluation section", place=recipe, fix="Train it with 'mmalign train'.")
    out = config.loop.output_dir
    if config.data and config.candidates:
        print(f"== candidates: {config.data.path}", flush=True)
        ensure_store(config, models.load_model(config.model))
    for arm, changes in evaluation.arms.items():
        print(f"\n== train {arm}", flush=True)
        code = train(configuration.load(TrainConfig, recipe, [*overrides, *changes, f"loop.output_dir={out / arm}"]))
        if code:
            return code
    print("\n== judge", flush=True)
    tuned = {arm: find_tuned(out / arm) for arm in evaluation.arms}
    opened = {"base": partial(open_base, next(iter(tuned.values())))}
    opened |= {arm: partial(open_tuned, found) for arm, found in tuned.items()}
    judged = judge(evaluation, opened)
    command = shlex.join(["mmalign", "demo", recipe, *overrides])
    page = report(config, judged, command, time.perf_counter() - clock)
    print(f"\nreport: {page}")
    return 0


def report(
    config: TrainConfig,
    judged: Mapping[str, Judged],
    command: str,
    seconds: float,
) -> Path:
    """Compare every arm with the base and write the report into the run's folder."""
    evaluation = config.evaluation
    assert evaluation is not None  # asked before anything was sampled
    base, aligned = judged["base"], next(iter(evaluation.arms))
    rows = shown_rows(base.prompts, evaluation.shown)
    arms = {}
    for name, found in judged.items():
        scores = {column(number): found.column(number) for number in found.complete()}
        arms[name] = measured(
            LABELS.get(name, name),
            scores,
            taught=column(evaluation.preference),
            prompts=found.prompts,
            images=[found.pictures[row] for row in rows],
            curves=None if name == "base" else config.loop.output_dir / name / "metrics.jsonl",
        )

    def against(number: str, first: str, second: str) -> PairedReport:
        return paired_report(judged[first].column(number), judged[second].column(number), base.prompts)

    tuned = list(evaluation.arms)
    judgeable = "faithful" in base.complete()
    return write_report(
        config.loop.output_dir,
        Report(
            method=config.method.name,
            preference=evaluation.preference,
            title=f"{config.method.name} on {config.model.path}: {evaluation.preference}",
            prompts=len(set(base.prompts)),
            seed=config.loop.seed,
            seconds=seconds,
            versions=versions(),
            config=configuration.dump(config),
            command=command,
            arms=arms,
            aligned=aligned,
            paired={name: against(evaluation.preference, "base", name) for name in tuned},
            faithful={name: against("faithful", "base", name) for name in tuned} if judgeable else {},
            over={name: against(evaluation.preference, name, aligned) for name in tuned if name != aligned},
            shown=[base.prompts[row] for row in rows],
        ),
    )


def column(number: str) -> str:
    """The name of a number in the report: a share keeps its name, the mean of a score says so."""
    return number if number in SHARES else f"{number}_mean"


def shown_rows(prompts: Sequence[str], count: int) -> list[int]:
    """The first picture of each of the first `count` prompts."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt, row)
    return list(first.values())[:count]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    libraries = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"mmalign": __version__, **{name: importlib.metadata.version(name) for name in libraries}}
