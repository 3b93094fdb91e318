"""Metrics, pictures and progress: what is on the disk and on the screen, also after a resume."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmalign import progress as progress_module
from mmalign.errors import UserError
from mmalign.pictures import grid
from mmalign.progress import Progress, progress
from mmalign.tracking import Tracker, rewind


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


# ----------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_a_line_per_step_is_on_the_disk_at_once(tmp_path: Path) -> None:
    with Tracker(tmp_path / "new" / "run", ["jsonl"]) as tracker:
        tracker.log(1, {"loss": torch.tensor(0.5), "rewards/margins": 1, "note": "é", "none": None})
        (line,) = lines(tmp_path / "new" / "run" / "metrics.jsonl")  # before anything is closed
        assert line.pop("time") > 1e9
        assert line == {"step": 1, "loss": 0.5, "rewards/margins": 1, "note": "é", "none": None}
        tracker.log(2, {"loss": float("nan"), "grad_norm": float("inf")})
    assert (tmp_path / "new" / "run" / "metrics.jsonl").read_text().count("NaN") == 0
    assert lines(tmp_path / "new" / "run" / "metrics.jsonl")[1]["loss"] is None


def test_resuming_takes_back_what_will_be_logged_again(tmp_path: Path) -> None:
    with Tracker(tmp_path, ["jsonl"]) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with Tracker(tmp_path, ["jsonl"], resume_step=4) as tracker:
        tracker.log(5, {"loss": 2.0})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert lines(tmp_path / "metrics.jsonl")[-1]["loss"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_from_step_0_or_without_a_log_begins_at_the_beginning(tmp_path: Path) -> None:
    Tracker(tmp_path, ["jsonl"], resume_step=3).close()
    with Tracker(tmp_path, ["jsonl"], resume_step=3) as tracker:
        tracker.log(4, {})
    with Tracker(tmp_path, ["jsonl"], resume_step=0) as tracker:
        tracker.log(1, {})
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_a_new_run_keeps_the_earlier_log(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        with Tracker(tmp_path, ["jsonl"]) as tracker:
            tracker.log(step, {})
    assert steps(tmp_path / "metrics-earlier-1.jsonl") == [1]
    assert steps(tmp_path / "metrics-earlier-2.jsonl") == [2]
    assert steps(tmp_path / "metrics.jsonl") == [3]


@pytest.mark.parametrize("bad", ["{oops", "[1]", '{"loss": 1}', "3"])
def test_a_damaged_log_is_named_by_line_and_left_alone(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"not a line of metrics \(.*metrics\.jsonl:2\)"):
        rewind(path, 1)
    assert path.read_text().count("\n") == 3


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", enabled=False) as tracker:
        tracker.log(1, {"loss": 1.0})
        assert tracker.images(1, "samples", [Image.new("RGB", (8, 8))]) is None
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_named_on_every_process(tmp_path: Path) -> None:
    for enabled in (True, False):
        with pytest.raises(UserError, match=r"unknown tracker 'tensorbord'.*Did you mean 'tensorboard'\?"):
            Tracker(tmp_path, ["tensorbord"], enabled=enabled)


# ----------------------------------------------------------------------------------------------------
# TensorBoard and W&B


def test_tensorboard_gets_scalars_and_pictures_and_forgets_what_a_resume_takes_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": step / 2, "note": "text"})
        tracker.images(3, "validation", [Image.new("RGB", (8, 8), "red")])
    with Tracker(tmp_path, resume_step=2) as tracker:
        tracker.log(3, {"loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert events.Tags()["images"] == ["validation"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    Tracker(tmp_path, ["jsonl"]).close()
    with pytest.raises(UserError, match=rf"{name} is not installed \(loop\.trackers\)\. Run `pip install {name}`"):
        Tracker(tmp_path, [name])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # the earlier log is where it was


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.finished = options, [], False
        self.id = options["id"] or "abc"

    logged: list[tuple[dict[str, Any], int]]

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("wandb")
    module.runs = []
    module.Error = type("Error", (Exception,), {})
    module.Image = lambda image: ("image", image.size)

    def init(**options: Any) -> FakeRun:
        module.runs.append(FakeRun(**options))
        return module.runs[-1]  # type: ignore[no-any-return]  # a module made up on the spot has no types

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_the_same_run_again_after_a_resume(tmp_path: Path, wandb: Any) -> None:
    with Tracker(tmp_path / "mine", ["wandb"], config={"lr": 1e-4}) as tracker:
        tracker.log(1, {"loss": torch.tensor(0.5)})
        tracker.images(1, "samples", [Image.new("RGB", (256, 256))])
    first = wandb.runs[0]
    assert (first.options["id"], first.options["name"], first.options["config"]) == (
        None,
        "mine",
        {"lr": 1e-4},
    )
    assert first.logged == [({"loss": 0.5}, 1), ({"samples": ("image", (264, 264))}, 1)]
    assert first.finished
    Tracker(tmp_path / "mine", ["wandb"], resume_step=1).close()
    assert wandb.runs[1].options["id"] == "abc"
    Tracker(tmp_path / "mine", ["wandb"]).close()
    assert wandb.runs[2].options["id"] is None  # another run
    assert steps(tmp_path / "mine" / "metrics-earlier-1.jsonl") == [1]  # JSON lines are written whatever is asked


def test_wandb_that_will_not_start_is_one_line(tmp_path: Path, wandb: Any) -> None:
    def init(**_: Any) -> None:
        raise wandb.Error("no API key")

    wandb.init = init
    with pytest.raises(UserError, match=r"wandb would not start: no API key.*Run `wandb login`"):
        Tracker(tmp_path, ["wandb"])


# ----------------------------------------------------------------------------------------------------
# Pictures


def test_a_grid_is_written_under_a_safe_name(tmp_path: Path) -> None:
    with Tracker(tmp_path, ["jsonl"]) as tracker:
        path = tracker.images(30, "../base: before", [Image.new("RGB", (16, 16), "red")] * 3, ["a", "b", "c" * 500])
    assert path == tmp_path / "samples" / "-base-before-00000030.png"
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"


def test_the_grid_shows_every_picture_in_reading_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (80, 0, 80)]
    sheet = grid([Image.new("RGB", (32, 32), colour) for colour in colours], columns=3, cell=64)
    assert sheet.size == (3 * 68 + 4, 2 * 68 + 4)
    centres = [(36 + 68 * (index % 3), 36 + 68 * (index // 3)) for index in range(5)]
    assert [sheet.getpixel(centre) for centre in centres] == colours
    assert sheet.getpixel((36 + 68 * 2, 36 + 68)) == (255, 255, 255)


def test_small_pictures_grow_by_whole_pixels_and_large_ones_shrink() -> None:
    checker = Image.new("RGB", (2, 2))
    checker.putpixel((0, 0), (255, 255, 255))
    assert {colour for _, colour in grid([checker], cell=7).crop((4, 4, 10, 10)).getcolors() or []} == {
        (0, 0, 0),
        (255, 255, 255),
    }
    assert grid([Image.new("L", (1000, 10))], cell=100).size == (108, 9)
    assert grid([Image.new("RGBA", (4, 4)), Image.new("RGB", (2, 8))], cell=8).size == (2 * 12 + 4, 16)


def test_captions_are_drawn_below_their_picture_whatever_they_say() -> None:
    black = [Image.new("RGB", (64, 64), "white")] * 2
    sheet = grid(black, ["", "赤い円 a red circle \u2028 and more " * 9], columns=2, cell=64)
    left, right = sheet.crop((0, 69, 70, sheet.height)), sheet.crop((72, 69, sheet.width, sheet.height))
    assert left.getcolors() == [(left.width * left.height, (255, 255, 255))]
    assert len(right.getcolors(10_000) or []) > 1


def test_a_grid_of_nothing_or_of_too_few_captions_is_a_bug() -> None:
    with pytest.raises(ValueError, match="0 images"):
        grid([])
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        grid([Image.new("RGB", (4, 4))], ["a", "b"])


# ----------------------------------------------------------------------------------------------------
# Progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_a_log_gets_a_line_now_and_then_with_rate_and_remaining_time(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(120, "train", initial=20, interval=10.0) as bar:
        for _ in range(50):
            clock.now += 0.5
            bar.update(loss=0.6931471)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "train: 40/120 (33 %), 2 step/s, 0:40 left, loss 0.6931",
        "train: 60/120 (50 %), 2 step/s, 0:30 left, loss 0.6931",
        "train: 70/120 (58 %), 2 step/s, 0:25 left, loss 0.6931",
    ]


def test_slow_work_is_shown_in_seconds_each_and_hours(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(1000, "train")
    clock.now += 20
    bar.update(2, note="warm")
    assert capsys.readouterr().err == "train: 2/1000 (0 %), 10 s/step, 2:46:20 left, note warm\n"


def test_the_last_line_says_how_long_it_took(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(4), "encode", unit="batch"):
        clock.now += 1
    assert capsys.readouterr().err == "encode: 4/4 (100 %), 1 batch/s, took 0:04\n"


def test_other_processes_show_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(iter("abc"), "train", total=3, enabled=False):
        clock.now += 100
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(3, "train") as bar:
        bar.update(3, loss=0.5)
    assert "train: 100%" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()
