"""The stages of `mmalign demo` for vision-language models: pairs, training of every arm, judging, report."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from evaluators.answers import AnswerArm, AnswerReport, Asked, Mark, Said, Shown
from evaluators.answers_page import write_answers
from evaluators.hallucination import pope
from evaluators.hallucination.changes import changes
from evaluators.results import BASE
from evaluators.scorefile import write_whole
from mmalign import __version__
from mmalign import config as configuration
from mmalign.errors import UserError
from mmalign.shapes import talk
from mmalign.shapes.scenes import Scene
from mmalign.shapes.talk import Question
from vlm.arms import ordered, resolved
from vlm.judging import PARSER, Exam, Judged, estimates, judge, make_exam, rows, tallies
from vlm.making import ensure_store
from vlm.models import VisionLanguageModel, open_model
from vlm.recipe import TrainConfig
from vlm.train import train
from vlm.tuned import find_tuned, open_tuned
from vlm.weights import start_from

LABELS = {
    "base": "base",
    "sft": "fine-tuning on the chosen",
    "dpo": "DPO",
    "povid": "POVID",
    "povid_stage1": "POVID, stage 1",
    "realign_rdpo": "Re-Align rDPO",
    "mdpo": "mDPO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "tdpo": "TDPO",
    "rrpo": "RRPO",
    "words": "DPO on the words alone",
    "shuffled": "control: shuffled labels",
    "blank": "control: blank pictures",
}
TEMPTING = "pope_adversarial"  # of its questions, the report shows one whose answer is no


def demo(recipe: str, overrides: Sequence[str]) -> int:
    """All stages of a recipe. Returns the exit code."""
    clock = time.perf_counter()
    config = configuration.load(TrainConfig, recipe, overrides)
    evaluation = config.evaluation
    if evaluation is None:
        raise UserError("this recipe has no evaluation section", place=recipe, fix="Train it with 'mmalign train'.")
    out = config.loop.output_dir
    arms = ordered(evaluation.arms)
    print(f"== pairs: {config.data.path}", flush=True)
    ensure_store(config, partial(open_untrained, config))
    for arm in arms:
        print(f"\n== train {arm}", flush=True)
        words = [*overrides, *resolved(evaluation.arms[arm], out.joinpath), f"loop.output_dir={out / arm}"]
        code = train(configuration.load(TrainConfig, recipe, words))
        if code:
            return code
    print("\n== judge", flush=True)
    exam = make_exam(evaluation.count, seed=evaluation.seed)
    opened = {BASE: partial(open_untrained, config)}
    opened |= {arm: partial(open_tuned, find_tuned(out / arm)) for arm in evaluation.arms}
    judged = judge(exam, opened, batch_size=evaluation.batch_size)
    for name, found in judged.items():
        write_whole(out / "answers" / f"{name}.jsonl", (json.dumps(row) + "\n" for row in rows(exam, found)))
    command = shlex.join(["mmalign", "demo", recipe, *overrides])
    page = report(config, exam, judged, command, time.perf_counter() - clock)
    print(f"\nreport: {page}")
    return 0


def open_untrained(config: TrainConfig) -> VisionLanguageModel:
    """The model that a recipe starts from."""
    model = open_model(config.model)
    if config.loop.init_from:
        start_from(model, Path(config.loop.init_from))
    return model


# ---------------------------------------------------------------------------------------------- report


def report(config: TrainConfig, exam: Exam, judged: Mapping[str, Judged], command: str, seconds: float) -> Path:
    """Compare every arm with the base and write the report into the run's folder; returns the page."""
    evaluation = config.evaluation
    assert evaluation is not None  # asked before anything was trained
    base = tallies(exam, judged[BASE])
    out = config.loop.output_dir
    return write_answers(
        out,
        AnswerReport(
            method=config.method.name,
            title=f"{LABELS.get(config.method.name, config.method.name)} on {config.model.path}",
            pictures=len(exam),
            seed=config.loop.seed,
            seconds=seconds,
            versions=versions(),
            config=configuration.dump(config),
            command=command,
            arms={
                name: AnswerArm(
                    label=LABELS.get(name, name),
                    numbers=estimates(exam, found),
                    changes={} if name == BASE else changes(base, tallies(exam, found)),
                    curves=None if name == BASE else out / name / "metrics.jsonl",
                )
                for name, found in judged.items()
            },
            aligned=next(iter(evaluation.arms)),
            shown=[shown(exam, judged, index) for index in range(min(evaluation.shown, len(exam)))],
        ),
    )


def shown(exam: Exam, judged: Mapping[str, Judged], index: int) -> Shown:
    """A picture with every arm's description of it, and its answers to a question about what is not there."""
    scene = exam.scenes[index]
    asked = [
        Asked(
            question=talk.DESCRIBE,
            truth=talk.describe(scene),
            answers={name: described(scene, one.described[index]) for name, one in judged.items()},
        )
    ]
    for place, (picture, question) in enumerate(exam.questions[TEMPTING]):
        if picture == index and not question.answer:
            answers = {name: answered(question, one.said[TEMPTING][place]) for name, one in judged.items()}
            asked.append(Asked(question=question.text, truth=question.label, answers=answers))
            break
    return Shown(picture=exam.pictures[index], asked=asked)


def described(scene: Scene, text: str) -> Said:
    """A description with its things marked."""
    found = talk.located(text)
    marks = [Mark(start=m.start, end=m.end, kind="right" if m.thing in scene.things else "wrong") for m in found]
    named = {mention.thing for mention in found}
    return Said(text=text, marks=marks, missing=[str(thing) for thing in scene.things if thing not in named])


def answered(question: Question, text: str) -> Said:
    """A yes or no, marked whole."""
    right = pope.parser_of(PARSER)(text) is question.answer
    return Said(text=text, marks=[Mark(start=0, end=len(text), kind="right" if right else "wrong")])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    libraries = ("torch", "transformers", "peft", "accelerate")
    return {"mmalign": __version__, **{name: importlib.metadata.version(name) for name in libraries}}
