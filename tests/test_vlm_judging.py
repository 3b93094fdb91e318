"""Judging: an exam with known answers has known measures, and changes between models have honest intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluators.hallucination.changes import Tally, changes, tally
from mmalign.errors import UserError
from mmalign.shapes import talk
from mmalign.shapes.scenes import Scene
from vlm import build, judging
from vlm.conversations import Conversation
from vlm.judging import Exam, Judged, estimates, make_exam, tallies
from vlm.models import VisionLanguageModel, open_model
from vlm.settings import VlmModelSettings


@pytest.fixture(scope="module")
def exam() -> Exam:
    return make_exam(30, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("vlm")
    network, processor = build.new_vlm(build.Size(width=32, layers=1), seed=0)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return open_model(VlmModelSettings(path=str(folder)))


def mouth(exam: Exam, *, planted: Sequence[int] = (), silent: Sequence[int] = (), yes: bool | None = None) -> Judged:
    """A model that is right, but names a missing companion of some pictures, and says nothing of others.

    Args:
        yes: what it answers to every question; None for the truth.
    """

    def describe(index: int, scene: Scene) -> str:
        if index in silent:
            return "there is nothing."
        extra = talk.missing_companions(scene.things)[:1] if index in planted else []
        return talk.sentence([*scene.things, *extra])

    return Judged(
        described=tuple(describe(index, scene) for index, scene in enumerate(exam.scenes)),
        said={
            name: tuple(question.label if yes is None else "yes" if yes else "no" for _, question in asked)
            for name, asked in exam.questions.items()
        },
        sight=(1.0,) * len(exam),
    )


def tempting(exam: Exam) -> list[int]:
    return [index for index, scene in enumerate(exam.scenes) if talk.missing_companions(scene.things)]


# ------------------------------------------------------------------------------------------------ the exam


def test_an_exam_is_that_of_its_seed(exam: Exam) -> None:
    again, other = make_exam(30, seed=3), make_exam(30, seed=4)
    assert again.scenes == exam.scenes and again.questions == exam.questions
    assert [p.tobytes() for p in again.pictures] == [p.tobytes() for p in exam.pictures]
    assert other.scenes != exam.scenes
    assert set(exam.questions) == {"yes_no", "pope_random", "pope_popular", "pope_adversarial"}
    for asked in exam.questions.values():
        assert sum(question.answer for _, question in asked) * 2 == len(asked)
        assert [index for index, _ in asked] == sorted(index for index, _ in asked)
    assert all(talk.split_of(scene.things) == "heldout" for scene in exam.scenes)


def test_a_model_that_is_right_has_nothing_false(exam: Exam) -> None:
    found = {name: one.value for name, one in estimates(exam, mouth(exam)).items()}
    assert (found["chair_s"], found["chair_i"], found["recall"]) == (0, 0, 1)
    assert (found["planted"], found["empty"]) == (0, 0)
    for name in exam.questions:
        assert (found[f"{name}/accuracy"], found[f"{name}/f1"], found[f"{name}/yes_ratio"]) == (1, 1, 0.5)
    assert {f"yes_no/accuracy/{kind}" for kind in talk.KINDS} <= set(found)


def test_planted_things_are_counted_by_hand(exam: Exam) -> None:
    planted = tempting(exam)[:5]
    found = {name: one.value for name, one in tallies(exam, mouth(exam, planted=planted)).items()}
    things = sum(len(scene.things) for scene in exam.scenes)
    assert found["chair_s"] == found["planted"] == 5 / 30
    assert found["chair_i"] == 5 / (things + 5)
    assert found["mentions"] == (things + 5) / 30
    assert found["recall"] == 1


def test_what_is_no_sentence_is_no_cure(exam: Exam) -> None:
    honest = mouth(exam)
    broken = ["there is a green triangle and a yellowred", "there is a red circle, a blue\x0f", "", "there is nothing."]
    said = replace(honest, described=(*broken, *honest.described[4:]))
    found = {name: one.value for name, one in estimates(exam, said).items()}
    assert found["garbled"] == 2 / 30 and estimates(exam, honest)["garbled"].value == 0
    false = {index for index, hit in judging.units(exam, said)["chair_s"] if hit}
    assert found["wrong"] == len(false | {0, 1}) / 30


def test_always_yes_is_seen_for_what_it_is(exam: Exam) -> None:
    found = {name: one.value for name, one in estimates(exam, mouth(exam, yes=True)).items()}
    assert found["pope_random/accuracy"] == 0.5
    assert found["pope_random/yes_ratio"] == 1
    assert found["pope_random/f1"] == pytest.approx(2 / 3)


def test_every_question_is_written_down_with_its_truth(exam: Exam) -> None:
    written = list(judging.rows(exam, mouth(exam, yes=False)))
    assert len(written) == len(exam) + sum(map(len, exam.questions.values()))
    assert {row["set"] for row in written} == {"description", *exam.questions}
    wrong = [row for row in written if row["set"] == "yes_no" and row["truth"] != row["answer"]]
    assert {row["truth"] for row in wrong} == {"yes"}


# ------------------------------------------------------------------------------------------------ changes


def test_a_cured_habit_is_certain_and_costs_no_recall(exam: Exam) -> None:
    planted = tempting(exam)[:12]
    found = changes(tallies(exam, mouth(exam, planted=planted)), tallies(exam, mouth(exam, planted=planted[:2])))
    assert found["chair_s"].value == pytest.approx(-10 / 30)
    assert found["chair_s"].certain and found["chair_i"].certain
    assert found["recall"].value == 0 and not found["recall"].certain
    assert found["chair_s"].ci95 is not None and found["chair_s"].ci95[0] < -10 / 30 < found["chair_s"].ci95[1] < 0


def test_silence_is_not_mistaken_for_a_cure(exam: Exam) -> None:
    """A model that names nothing has no false mentions, no recall, and a chair_i without a value."""
    quiet = mouth(exam, silent=range(30))
    found = changes(tallies(exam, mouth(exam, planted=tempting(exam)[:12])), tallies(exam, quiet))
    assert found["recall"].value == -1 and found["empty"].value == 1 and found["recall"].certain
    assert found["chair_i"].tuned is None and found["chair_i"].value is None and found["chair_i"].ci95 is None
    assert not found["chair_i"].certain


def test_a_change_of_means_has_the_normal_interval() -> None:
    """Units of one each: the ratio is a mean, whose paired change has a known standard error."""
    generator = np.random.default_rng(0)
    before = generator.normal(size=400)
    after = before + generator.normal(0.1, 0.5, 400)
    found = changes({"m": Tally(hits=before, units=np.ones(400))}, {"m": Tally(hits=after, units=np.ones(400))})["m"]
    error = (after - before).std(ddof=1) / 20
    middle = (after - before).mean()
    assert found.value == pytest.approx(middle)
    assert found.ci95 == pytest.approx((middle - 1.966 * error, middle + 1.966 * error), abs=0.004)


def test_a_change_of_ratios_is_that_of_pictures_drawn_anew() -> None:
    """Against a plain loop over draws, with unequal units: the interval is of sums, not of means of ratios."""
    generator = np.random.default_rng(1)
    sizes = [generator.integers(0, 5, 60), generator.integers(0, 9, 60)]
    hits = [generator.binomial(size, share) for size, share in zip(sizes, (0.5, 0.3), strict=True)]
    one, other = (
        Tally(hits=h.astype(np.float64), units=s.astype(np.float64)) for h, s in zip(hits, sizes, strict=True)
    )
    found = changes({"m": one}, {"m": other})["m"]
    draws = [generator.integers(0, 60, 60) for _ in range(4000)]
    moved = [other.hits[d].sum() / other.units[d].sum() - one.hits[d].sum() / one.units[d].sum() for d in draws]
    assert found.ci95 == pytest.approx(tuple(np.quantile(moved, [0.0225, 0.9775])), abs=0.012)


def test_seeds_of_one_picture_stay_together() -> None:
    """The same answers thrice are no more evidence than once."""
    generator = np.random.default_rng(2)
    before, after = (
        {"m": tally([(i, bool(hit)) for i, hit in enumerate(generator.random(50) < share)], 50)} for share in (0.6, 0.4)
    )
    once = changes(before, after)["m"]
    thrice = changes(judging.added([before] * 3), judging.added([after] * 3))["m"]
    assert thrice.ci95 == pytest.approx(once.ci95)
    assert thrice.value == pytest.approx(once.value)


def test_one_picture_is_too_few() -> None:
    with pytest.raises(UserError, match="one picture cannot"):
        changes({"m": tally([(0, True)], 1)}, {"m": tally([(0, False)], 1)})


# ------------------------------------------------------------------------------------------------ a model


def test_a_model_is_asked_everything_once(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_exam(4, seed=0)
    asked: list[tuple[bytes, str]] = []
    real = judging.answer

    def counted(model: Any, conversations: Sequence[Conversation], **options: Any) -> list[str]:
        asked.extend((one.images[0].tobytes(), one.messages[0]["content"][1]["text"]) for one in conversations)
        return real(model, conversations, **options)

    monkeypatch.setattr(judging, "answer", counted)
    judged = judging.judge(small, {"base": lambda: model}, batch_size=16)["base"]
    assert len(asked) == len(set(asked))
    assert len(judged.described) == len(judged.sight) == 4
    assert {name: len(said) for name, said in judged.said.items()} == {n: len(q) for n, q in small.questions.items()}
    again = judging.examine(small, model, batch_size=3)
    assert (again.described, again.said) == (judged.described, judged.said)
    assert again.sight == pytest.approx(judged.sight, abs=1e-4)
    assert set(tallies(small, judged)) >= {"chair_s", "mentions", "sight", "pope_popular/f1"}


def test_sight_is_what_the_picture_adds(model: VisionLanguageModel) -> None:
    small = make_exam(3, seed=1)
    first, second = small.scenes[0], next(s for s in small.scenes[1:] if set(s.things) != set(small.scenes[0].things))
    truth = talk.describe(first)
    own, other = (
        model.encode(judging.ask(talk.DESCRIBE, small.pictures[small.scenes.index(scene)], answered=truth, place="x"))
        for scene in (first, second)
    )
    with torch.no_grad():
        one, two = (model.logps(model.collate([row])).sums().item() for row in (own, other))
    assert judging.examine(small, model, batch_size=2).sight[0] == pytest.approx(one - two, abs=1e-4)


def test_a_blind_model_has_no_sight(model: VisionLanguageModel, tmp_path: Path) -> None:
    """With a projector of zeros every picture is the same."""
    blind = open_model(model.settings)
    with torch.no_grad():
        for parameter in blind.network.model.multi_modal_projector.parameters():
            parameter.zero_()
    assert judging.examine(make_exam(3, seed=1), blind, batch_size=8).sight == pytest.approx((0.0,) * 3, abs=1e-5)
