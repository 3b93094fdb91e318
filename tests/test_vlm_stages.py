"""The demo and the suite of vision-language models in miniature: pairs, arms, judging, report, table."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from evaluators.answers import AnswerArm, AnswerReport, Asked, Mark, Said, Shown, cured, sentences
from evaluators.answers_page import marked, write_answers
from evaluators.hallucination.changes import Change
from evaluators.hallucination.estimate import share
from mmalign import checkpoint
from mmalign.cli import main, run_entry
from mmalign.errors import UserError
from mmalign.shapes import render, talk
from vlm import arms, build, tournament
from vlm.judging import make_exam
from vlm.stages import answered, described

ARMS = {
    "povid": ["method={name: povid, stage: 2}", "loop.init_from=arm:povid_stage1"],
    "povid_stage1": ["method={name: povid, stage: 1}"],
    "sft": ["method={name: sft}"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained model and a recipe on it."""
    folder = tmp_path_factory.mktemp("world")
    network, processor = build.new_vlm(build.Size(width=32, layers=1), seed=0)
    network.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    recipe = {
        "package": "vlm",
        "model": {"path": str(folder / "model")},
        "adapter": {"rank": 2},
        "make": {"name": "injected", "source": "shapes:train", "count": 6, "questions": 0},
        "data": {"path": str(folder / "store")},
        "method": {"name": "povid", "stage": 1},
        "evaluation": {"count": 4, "shown": 2, "batch_size": 32, "arms": ARMS},
        "optim": {"lr": 1e-3},
        "loop": {"steps": 2, "batch_size": 2, "output_dir": str(folder / "out"), "trackers": ["jsonl"]},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def demo(world: Path) -> Path:
    """The folder of a finished demo."""
    assert main(["demo", str(world / "tiny.yaml")]) == 0
    return world / "out"


class Page(HTMLParser):
    """Marked parts of a page, and whatever could run or be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.marks: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._kind: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self._kind = found.get("class") if tag == "mark" else None
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._kind:
            self.marks.append((self._kind, data))
            self._kind = None


# ------------------------------------------------------------------------------------------------ the demo


def test_the_demo_trains_every_arm_and_says_what_changed(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    assert set(report["arms"]) == {"base", *ARMS}
    assert (report["method"], report["pictures"], report["aligned"]) == ("povid", 4, "povid")
    for name in ARMS:
        changes = report["arms"][name]["changes"]
        assert {"chair_s", "chair_i", "recall", "mentions", "sight", "pope_adversarial/f1"} <= set(changes)
        low, high = changes["sight"]["ci95"]
        assert low <= changes["sight"]["change"] <= high
        written = [json.loads(line) for line in (demo / "answers" / f"{name}.jsonl").read_text().splitlines()]
        assert {row["picture"] for row in written} == set(range(4))
    assert report["arms"]["base"]["changes"] == {}
    assert {"torch", "transformers", "peft"} <= set(report["versions"])
    page = Page((demo / "report.html").read_text())
    assert all(link.startswith("data:") for link in page.links) and "script" not in page.tags


def test_an_arm_starts_where_another_ended(demo: Path) -> None:
    stage1, stage2 = (checkpoint.latest(demo / name).path for name in ("povid_stage1", "povid"))
    assert stage1 is not None and stage2 is not None
    config = yaml.safe_load((demo / "povid" / "config.yaml").read_text())
    assert config["loop"]["init_from"] == str(stage1)
    assert config["method"] == {"name": "povid", "stage": 2}


def test_a_second_demo_trains_nothing_again(demo: Path, world: Path) -> None:
    def made() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in demo.glob("*/*/manifest.json")}

    before, first = made(), json.loads((demo / "report.json").read_text())
    assert len(before) == len(ARMS)
    assert main(["demo", str(world / "tiny.yaml")]) == 0
    assert made() == before
    again = json.loads((demo / "report.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "povidd"], "no recipe for the method 'povidd'"),
        (["--method", "dpo", "diffusion/dpo_shapes"], "both a recipe"),
        (["vlm/nowhere"], "no recipe 'vlm/nowhere'"),
    ],
)
def test_mistakes_of_the_demo(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_without_evaluation_is_for_training(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(world / "tiny.yaml"), "evaluation=null"]) == 2
    assert "no evaluation section" in capsys.readouterr().err


def test_the_demo_is_the_recipes_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mmalign demo` alone draws pictures; a method's name finds its recipe in either package."""
    from mmalign import demo as verb

    asked: list[tuple[str, str, list[str]]] = []

    def stages(target: str) -> Any:
        return lambda recipe, words: asked.append((target, recipe, list(words))) or 0

    monkeypatch.setattr(verb, "resolve", stages)
    verb.main([])
    verb.main(["optim.lr=1e-3"])
    verb.main(["--method", "inpo", "loop.steps=1"])
    assert asked == [
        ("diffusion.stages:demo", "diffusion/dpo_shapes", []),
        ("diffusion.stages:demo", "diffusion/dpo_shapes", ["optim.lr=1e-3"]),
        ("diffusion.stages:demo", "diffusion/inpo_shapes", ["loop.steps=1"]),
    ]


def test_arms_come_after_what_they_start_from() -> None:
    assert arms.ordered(ARMS) == ["povid_stage1", "povid", "sft"]
    with pytest.raises(UserError, match="no arm 'stage'"):
        arms.ordered({"a": ["loop.init_from=arm:stage"]})
    with pytest.raises(UserError, match="start from one another"):
        arms.ordered({"a": ["loop.init_from=arm:b"], "b": ["loop.init_from=arm:a"]})


# ------------------------------------------------------------------------------------------------ the report


def test_false_things_are_marked_and_missing_ones_listed() -> None:
    scene = make_exam(1, seed=0).scenes[0]
    other = next(thing for thing in talk.THINGS if thing not in scene.things)
    said = described(scene, f"There is a {scene.things[0]} and a {other}.")
    assert [(said.text[mark.start : mark.end], mark.kind) for mark in said.marks] == [
        (str(scene.things[0]), "right"),
        (str(other), "wrong"),
    ]
    assert said.missing == [str(thing) for thing in scene.things[1:]]
    question = talk.ask_object(scene.things[0], scene.things)
    assert [answered(question, text).marks[0].kind for text in ("yes", "no", "perhaps")] == ["right", "wrong", "wrong"]


def test_answers_are_escaped_wherever_they_stand() -> None:
    text = '<script>alert(1)</script> & "a red circle"'
    start = text.index("a red")
    html = marked(Said(text=text, marks=[Mark(start=start, end=start + 12, kind="wrong")]))
    page = Page(html)
    assert "script" not in page.tags and page.marks == [("wrong", "a red circle")]
    assert marked(Said(text="")) == '<span class="missing">(nothing)</span>'


def change(base: float, tuned: float, width: float = 0.05) -> Change:
    return Change(base=base, tuned=tuned, ci95=(tuned - base - width, tuned - base + width))


def report_of(**changed: Change) -> AnswerReport:
    changes = {"chair_s": change(0.4, 0.2), "chair_i": change(0.2, 0.1), "recall": change(0.8, 0.79)} | changed
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    said = {name: Said(text="<b>a red circle</b>", missing=["<i>x</i>"]) for name in ("base", "povid")}
    return AnswerReport(
        method="povid",
        title="<b>title</b>",
        pictures=40,
        seed=0,
        seconds=61.0,
        versions={"torch": "2"},
        config="a: <b>",
        command="mmalign demo '<b>'",
        arms={
            "base": AnswerArm(label="base", numbers={"chair_s": share([("a", True), ("b", False)])}),
            "povid": AnswerArm(label="<b>POVID</b>", numbers={"chair_s": share([("a", False)])}, changes=changes),
        },
        aligned="povid",
        shown=[Shown(picture=picture, asked=[Asked(question="<b>?</b>", truth="<b>", answers=said)])],
        notes=["<b>note</b>"],
    )


def test_the_headline_claims_no_more_than_the_intervals_allow() -> None:
    good = sentences(report_of())
    assert "lowered the share" in good[0] and "from 40.0" in good[0]
    assert cured(report_of().arms["povid"].changes)
    chance = report_of(chair_s=change(0.4, 0.38))
    assert sentences(chance)[0].startswith("No effect was found")
    assert not cured(chance.arms["povid"].changes)
    babble = report_of(garbled=change(0, 0.2), wrong=change(0.4, 0.4))
    assert "20.0\u00a0% of <b>POVID</b>'s descriptions are no sentences" in " ".join(sentences(babble))
    assert not cured(babble.arms["povid"].changes)
    silent = report_of(recall=change(0.8, 0.5), chair_i=Change(base=0.2, tuned=None, ci95=None))
    assert "descriptions say less" in " ".join(sentences(silent))
    assert not cured(silent.arms["povid"].changes)
    assert sentences(report_of(chair_s=change(0.2, 0.4)))[0].startswith("It got worse")


def test_nothing_of_others_making_becomes_markup(tmp_path: Path) -> None:
    page = write_answers(tmp_path, report_of()).read_text()
    found = Page(page)
    assert "i" not in found.tags and "<b>" not in page
    assert json.loads((tmp_path / "report.json").read_text())["arms"]["povid"]["changes"]["recall"]["base"] == 0.8


def test_parts_that_do_not_fit_are_a_bug() -> None:
    good = report_of()
    with pytest.raises(ValueError, match="aligned"):
        AnswerReport(**{**{name: getattr(good, name) for name in good.__dataclass_fields__}, "aligned": "sft"})


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium to draw the page with")
@pytest.mark.slow
def test_a_browser_draws_the_page(demo: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, "--window-size=1200,2000", f"--screenshot={shot}", (demo / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    colours = Image.open(shot).convert("RGB").resize((120, 200)).getcolors(24_000)
    assert colours is not None and len(colours) > 50


# ------------------------------------------------------------------------------------------------ the suite


def suite(world: Path, **changes: Any) -> Path:
    recipe = str(world / "tiny.yaml")
    content: dict[str, Any] = {
        "seeds": [0, 1],
        "exam": {"count": 4, "batch_size": 32},
        "arms": {
            "two": {"label": "both stages", "recipe": recipe, "set": ["loop.init_from=arm:one"]},
            "one": {"label": "stage one", "recipe": recipe},
            "blank": {"label": "blank", "recipe": recipe, "set": ["data.blank_images=true"], "control": True},
        },
    }
    content["arms"]["blank"]["against"] = "one"
    file = world / "suite.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return file


def in_this_process(package: str, words: list[str], folder: Path, name: str) -> dict[str, float]:
    from vlm.train import main as train

    assert package == "vlm" and run_entry(train, words) == 0
    assert f"loop.output_dir={folder}" in words
    return {"seconds": 1.5, "peak_gb": 0.5}


def test_the_suite_trains_judges_and_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tournament, "train_apart", in_this_process)
    words = ["bench", "hallucination", "--suite", str(suite(world)), "--out", str(tmp_path)]
    assert main([*words, "--only", "two", "--seeds", "0"]) == 0
    assert {folder.name for folder in tmp_path.iterdir() if folder.is_dir()} == {"one", "two", "bases", "pairs"}
    assert [line["arm"] for line in json.loads((tmp_path / "table.json").read_text())] == ["two"]
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*/result.json")}
    assert len(made) == 2

    assert main(words) == 0
    lines = json.loads((tmp_path / "table.json").read_text())
    assert [(line["arm"], line["seeds"], line["control"]) for line in lines] == [
        ("two", [0, 1], False),
        ("one", [0, 1], False),
        ("blank", [0, 1], True),
    ]
    assert all(file.stat().st_mtime_ns == when for file, when in made.items())
    assert len(list((tmp_path / "bases").iterdir())) == len(list((tmp_path / "pairs").iterdir())) == 1
    table = (tmp_path / "table.md").read_text()
    assert "| both stages |" in table and "| blank (control) |" in table
    assert "\nblank against stage one: false or garbled" in table
    assert [line["against"] for line in lines] == [None, None, "stage one"]
    capsys.readouterr()
    other = ["bench", "hallucination", "--suite", str(suite(world, exam={"count": 5})), "--out", str(tmp_path)]
    assert main(other) == 2
    assert "another exam" in capsys.readouterr().err


def test_the_suite_that_ships_is_one(tmp_path: Path) -> None:
    from mmalign import config

    settings = config.load(tournament.SuiteSettings, "bench/hallucination")
    assert len(settings.seeds) == 3
    controls = {name for name, arm in settings.arms.items() if arm.control}
    assert controls == {"shuffled", "blank"}
    assert {"sft", "dpo", "povid_stage1", "povid", "realign_rdpo", "mdpo"} <= set(settings.arms)
    runs = list(tournament.planned(settings, tmp_path, [], settings.seeds))  # every arm's recipe loads
    assert len(runs) == 3 * len(settings.arms)
    first, second = tournament.waves(runs)
    assert {run.arm for run in second} == {"povid"} and len(first) + len(second) == len(runs)
    by_arm = {run.arm: run.config() for run in runs}
    assert by_arm["povid"].method.options()["stage"] == 2
    assert by_arm["povid"].data.path == by_arm["mdpo"].data.path != by_arm["dpo"].data.path


def test_pictures_of_an_exam_are_those_of_the_world() -> None:
    exam = make_exam(2, seed=5)
    drawn = render.render(exam.scenes[1], talk.picture_seed(5, 1, split="heldout"))
    assert np.array_equal(np.asarray(exam.pictures[1]), drawn)
