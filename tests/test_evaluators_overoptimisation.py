"""The watch for over-optimisation: when the rule fires and when not, its file, and what the report shows of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluators_report import Page, coordinates, make, write_metrics

from evaluators import charts
from evaluators.diversity import distances, within
from evaluators.looks import look
from evaluators.overoptimisation import (
    FILE,
    Look,
    WatchSettings,
    add,
    deviations,
    difference,
    due,
    first_verdict,
    read_history,
    verdict,
    write_history,
)
from evaluators.report import write_report
from evaluators.scorer import load, main_scores
from mmalign.config import parse_section
from mmalign.errors import UserError
from mmalign.shapes.render import render
from mmalign.shapes.scenes import draw_scenes
from mmalign.statistics import bootstrap_interval

N = 24


def settings(**changes: Any) -> WatchSettings:
    given: dict[str, Any] = {"scorers": {"clip": {"name": "clip"}}}
    return parse_section(WatchSettings, {**given, **changes}, "watch")


def seen(step: int, proxy: float = 0.0, clip: float = 0.0, *, spread: float = 0.02, **changes: Any) -> Look:
    """A look in which the means differ from the base's by so much, and prompts by noise."""
    base, moved = np.random.default_rng(1).normal(size=N), np.random.default_rng(step + 2).normal(size=N)
    noise = spread * (moved - moved.mean())
    fields: dict[str, Any] = {
        "step": step,
        "proxy": (base + proxy + noise).tolist(),
        "held_out": {"clip": (base[::-1] + clip + noise).tolist()},
        "diversity": 0.4,
        "degenerate": 0.02,
        "kl": None if step == 0 else 0.01 * step,
    }
    return Look(**{**fields, **changes})


BASE = seen(0)


# -------------------------------------------------------------------------------------------------------- rule


def test_a_healthy_run_goes_on() -> None:
    history = [BASE, *(seen(step, proxy=step / 100, clip=step / 200) for step in (50, 100, 150, 200))]
    assert [verdict(history[:count], settings()) for count in range(len(history) + 1)] == [None] * 6


def test_the_base_alone_is_never_judged() -> None:
    bad = seen(0, degenerate=0.9)
    assert verdict([bad], settings(patience=1)) is None
    assert verdict([], settings()) is None


def test_a_falling_scorer_under_a_rising_proxy_stops_the_run_after_patience() -> None:
    history = [BASE, seen(50, 0.5, 0.1), seen(100, 1.0, -0.4), seen(150, 1.2, -0.5)]
    assert verdict(history[:3], settings()) is None
    said = verdict(history, settings())
    assert said is not None
    assert re.match(
        r"step 150: the reward rose by 1\.2 while held-out 'clip' fell by 0\.5 \(95 % interval 0\.4\d* to 0\.5\d*\), "
        r"in 2 looks in a row$",
        said,
    )
    assert verdict(history[:3], settings(patience=1)) is not None
    assert verdict(history, settings(patience=3)) is None


def test_a_recovery_begins_the_count_anew() -> None:
    history = [BASE, seen(50, 1.0, -0.4), seen(100, 1.0, 0.0), seen(150, 1.0, -0.4)]
    assert verdict(history, settings()) is None
    assert verdict([*history, seen(200, 1.0, -0.4)], settings()) is not None


def test_a_fall_without_a_rising_proxy_is_not_over_optimisation() -> None:
    assert verdict([BASE, seen(50, -0.1, -0.4), seen(100, -0.1, -0.4)], settings()) is None


def test_a_fall_within_the_tolerance_or_the_noise_does_not_count() -> None:
    unit = float(np.std(BASE.held_out["clip"]))
    history = [BASE, seen(50, 1.0, -0.3), seen(100, 1.0, -0.3)]
    assert verdict(history, settings(tolerance=0.31 / unit)) is None
    assert verdict(history, settings(tolerance=0.29 / unit)) is not None
    noisy = [BASE, seen(50, 1.0, -0.3, spread=3.0), seen(100, 1.0, -0.3, spread=3.0)]
    assert difference(BASE, noisy[2], "clip")[1][1] > 0
    assert verdict(noisy, settings(tolerance=0.0)) is None


def test_it_must_be_the_same_scorer_in_all_looks() -> None:
    def two(step: int, clip: float, other: float) -> Look:
        found = seen(step, 1.0, clip)
        return replace(found, held_out={**found.held_out, "other": seen(step, 0.0, other).held_out["clip"]})

    history = [two(0, 0.0, 0.0), two(50, -0.5, 0.0), two(100, 0.0, -0.5)]
    history[0] = replace(history[0], proxy=BASE.proxy)
    assert verdict(history, settings()) is None
    said = verdict([*history, two(150, 0.0, -0.5)], settings())
    assert said is not None and "held-out 'other'" in said


def test_kl_degenerate_pictures_and_diversity_have_their_bounds() -> None:
    assert verdict([BASE, seen(50, kl=9.0)], settings()) is None  # no bound unless one is given
    assert verdict([BASE, seen(50, kl=9.0)], settings(max_kl=9.0)) is None
    assert verdict([BASE, seen(50, kl=9.1)], settings(max_kl=9.0)) == "step 50: implicit KL 9.1 exceeds max_kl 9"
    assert verdict([BASE, seen(50, kl=None)], settings(max_kl=9.0)) is None
    assert verdict([BASE, seen(50, degenerate=0.12)], settings()) is None
    said = verdict([BASE, seen(50, degenerate=0.13)], settings())
    assert said is not None and "13 % of the pictures are degenerate, 2 % of the base's" in said
    assert verdict([BASE, seen(50, degenerate=1.0)], settings(max_degenerate=None)) is None
    assert verdict([BASE, seen(50, diversity=0.2)], settings()) is None
    said = verdict([BASE, seen(50, diversity=0.19)], settings())
    assert said == "step 50: diversity is 0.47 of the base's, below min_diversity 0.5"
    assert verdict([BASE, seen(50, diversity=0.0)], settings(min_diversity=None)) is None
    assert verdict([seen(0, diversity=0.0), seen(50, diversity=0.0)], settings()) is None


def test_only_the_last_look_is_judged_by_bounds() -> None:
    assert verdict([BASE, seen(50, degenerate=0.9), seen(100)], settings()) is None


def test_the_interval_is_the_paired_one_over_prompts() -> None:
    later = seen(50, 0.0, -0.2)
    moved = [after - before for before, after in zip(BASE.held_out["clip"], later.held_out["clip"], strict=True)]
    assert difference(BASE, later, "clip") == (pytest.approx(-0.2), bootstrap_interval(moved))


def test_looks_of_other_prompts_or_scorers_are_not_compared() -> None:
    fewer = replace(seen(50), proxy=[0.0, 1.0], held_out={"clip": [0.0, 1.0]})
    other = replace(seen(50), held_out={"style": BASE.held_out["clip"]})
    for wrong in (fewer, other):
        with pytest.raises(ValueError, match="cannot be compared"):
            verdict([BASE, wrong], settings())


def test_a_look_is_due_once() -> None:
    assert due([], 0, settings())
    assert not due([BASE], 0, settings())
    assert [step for step in range(1, 201) if due([BASE], step, settings(every=50))] == [50, 100, 150, 200]
    assert not due([BASE, seen(50)], 50, settings(every=50))


@pytest.mark.parametrize("change", [{"proxy": [math.nan] * N}, {"diversity": math.inf}, {"kl": math.nan}])
def test_what_is_not_finite_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"saw '{next(iter(change))}' that is no finite number \(step 50\)"):
        seen(50, **change)


def test_a_look_has_a_number_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="a number for each prompt"):
        seen(50, held_out={"clip": [1.0]})


def test_a_watch_without_held_out_scorers_is_refused() -> None:
    with pytest.raises(UserError, match=r"watch\.scorers"):
        settings(scorers={})


# ------------------------------------------------------------------------------------------------ taking a look


def test_a_look_at_pictures_keeps_prompts_together() -> None:
    scenes = list({scene.caption: scene for scene in draw_scenes(12, split="heldout", seed=5)}.values())[:4]
    pictures = [Image.fromarray(render(scene, seed)) for seed in (1, 2) for scene in scenes]
    prompts = [scene.caption for scene in scenes] * 2
    checker = load("shapes", {"main": "style"})
    found = look(7, prompts, pictures, [float(index) for index in range(8)], {"style": checker}, kl=0.5)
    assert found.proxy == [2.0, 3.0, 4.0, 5.0]  # pictures 0 and 4, 1 and 5, ...
    style = main_scores(checker, prompts, pictures)
    assert found.held_out["style"] == pytest.approx([(style[k] + style[k + 4]) / 2 for k in range(4)])
    assert found.diversity == within(distances(pictures), prompts)
    assert (found.step, found.degenerate, found.kl, found.verdict) == (7, 0.0, 0.5, None)
    assert set(found.metrics()) == {"watch/proxy", "watch/style", "watch/diversity", "watch/degenerate", "watch/kl"}
    assert found.metrics()["watch/proxy"] == 3.5
    assert "watch/kl" not in replace(found, kl=None).metrics()


# -------------------------------------------------------------------------------------------------------- file


def exploited() -> list[Look]:
    history: list[Look] = []
    for index, clip in enumerate([0.0, 0.1, -0.3, -0.5, -0.7]):
        history = add(history, seen(50 * index, proxy=0.4 * index, clip=clip), settings())
    return history


def test_the_history_is_the_whole_state(tmp_path: Path) -> None:
    path, history = tmp_path / FILE, exploited()
    assert read_history(path) == []
    write_history(path, history)
    assert read_history(path) == history
    assert [one.step for one in read_history(path, 100)] == [0, 50, 100]
    resumed = read_history(path, 100)
    for one in history[3:]:
        resumed = add(resumed, replace(one, verdict=None), settings())
    assert resumed == history
    write_history(path, resumed)
    assert list(tmp_path.iterdir()) == [path]
    found = first_verdict(history)
    assert found is not None and found.step == 150
    assert first_verdict(history[:3]) is None


GOOD_LINE = json.dumps(
    {"step": 1, "proxy": [1], "held_out": {"a": [1]}, "diversity": 1, "degenerate": 0, "kl": None, "verdict": None}
)
DAMAGED = {
    "cut": GOOD_LINE[:30],
    "list": "[1]",
    "missing": '{"step": 1}',
    "more": GOOD_LINE.replace('"kl"', '"x": 1, "kl"'),
    "nan": GOOD_LINE.replace('"diversity": 1', '"diversity": NaN'),
    "text": GOOD_LINE.replace('"diversity": 1', '"diversity": "x"'),
    "step": GOOD_LINE.replace('"step": 1', '"step": 1.5'),
    "verdict": GOOD_LINE.replace('"verdict": null', '"verdict": 3'),
    "prompts": GOOD_LINE.replace('"a": [1]', '"a": [1, 2]'),
    "scorers": GOOD_LINE.replace('{"a": [1]}', "3"),
    "deep": "[" * 100_000,
    "large": GOOD_LINE.replace('"diversity": 1', '"diversity": 1' + "0" * 400),
    "twice": GOOD_LINE + "\n" + GOOD_LINE,
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / FILE
    path.write_text(GOOD_LINE.replace('"step": 1', '"step": 0') + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"not a look of the watch \(.*{FILE}:[23]\)") as caught:
        read_history(path)
    assert "\n" not in str(caught.value)


def test_a_good_line_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(GOOD_LINE + "\n")
    assert read_history(tmp_path / FILE)[0].held_out == {"a": [1.0]}


def test_files_that_are_no_history_are_named(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read what the watch saw"):
        read_history(path)
    path.write_text(" " * 10_000_001)
    with pytest.raises(UserError, match="too large"):
        read_history(path)
    with pytest.raises(UserError, match=r"cannot write what the watch saw: .*nowhere"):
        write_history(tmp_path / "nowhere" / FILE, [BASE])


# ------------------------------------------------------------------------------------------------------ report


def watched(folder: Path, history: Sequence[Look]) -> tuple[dict[str, Any], Page, str]:
    """The report of an aligned arm whose run kept this history."""
    run = folder / "run"
    run.mkdir()
    write_history(run / FILE, history)
    report = make()
    arm = replace(report.arms["dpo"], curves=write_metrics(run / "metrics.jsonl"))
    page = write_report(folder, replace(report, arms={**report.arms, "dpo": arm})).read_text(encoding="utf-8")
    return json.loads((folder / "report.json").read_text()), Page(page), page


def test_the_report_shows_what_was_watched(tmp_path: Path) -> None:
    data, page, source = watched(tmp_path, exploited())
    assert "Over-optimisation" in page.text
    assert "5 looks; the rule fired: step 150: the reward rose by" in page.text
    told = [svg["aria-label"] or "" for svg in page.named("svg")]
    charted = [label for label in told if "stopped at step 150" in label]
    assert [label.split(":")[1].strip() for label in charted] == [
        "reward and held-out scorers", "implicit KL", "diversity", "degenerate pictures",
    ]  # fmt: skip
    assert "held out: clip from 0 to \u2212" in charted[0]
    assert source.count("held out: clip</text>") == 1  # the legend
    assert data["watch"]["dpo"]["fired"]["step"] == 150
    looks = data["watch"]["dpo"]["looks"]
    assert [one["step"] for one in looks] == [0, 50, 100, 150, 200]
    assert looks[4]["watch/proxy"] - looks[0]["watch/proxy"] == pytest.approx(1.6)
    assert "watch/kl" not in looks[0] and looks[1]["watch/kl"] == 0.5


def test_a_run_that_went_well_says_so(tmp_path: Path) -> None:
    data, page, _ = watched(tmp_path, [BASE, seen(50, 0.4, 0.1, kl=None)])
    assert "2 looks; the rule did not fire." in page.text
    assert data["watch"]["dpo"]["fired"] is None
    assert not [svg for svg in page.named("svg") if "implicit KL" in (svg["aria-label"] or "")]


def test_a_report_without_a_watch_has_no_such_section(tmp_path: Path) -> None:
    page = write_report(tmp_path, make()).read_text(encoding="utf-8")
    assert "Over-optimisation" not in page
    assert json.loads((tmp_path / "report.json").read_text())["watch"] == {}


def test_names_of_scorers_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    history = [replace(one, held_out={name: one.held_out["clip"]}) for one in (BASE, seen(50))]
    _, page, _ = watched(tmp_path, history)
    assert not page.named("script")
    assert name in page.text


def test_deviations_compare_scorers_of_any_unit() -> None:
    later = seen(50, 0.5, -0.3)
    proxy, clip = (deviations([BASE, later], name) for name in (None, "clip"))
    assert proxy == [0.0, pytest.approx(0.5 / np.std(BASE.proxy))]
    assert clip == [0.0, pytest.approx(-0.3 / np.std(BASE.held_out["clip"]))]
    thousand = [replace(one, held_out={"clip": [1000 * v for v in one.held_out["clip"]]}) for one in (BASE, later)]
    assert deviations(thousand, "clip") == pytest.approx(clip)
    constant = [replace(BASE, held_out={"clip": [1.0] * N}), replace(BASE, held_out={"clip": [0.5] * N})]
    assert deviations(constant, "clip") == [0.0, -0.5]


def test_tracks_share_their_axes() -> None:
    series = [("up", [(0, 0.0), (10, 2.0)], "arm-1"), ("down", [(0, 0.0), (10, -1.0)], "arm-2")]
    svg = charts.tracks(series, name="x", zero=0.0, mark=5)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = coordinates(svg)
    assert (x0, y0, x1) == (x2, y2, x3)
    assert y1 < y0 < y3  # the origin is at the top
    assert y0 - y1 == pytest.approx(2 * (y3 - y0), abs=0.2)
    upright = re.search(r'c-zero" x1="([\d.]+)" y1="[\d.]+" x2="\1"', svg)
    assert upright is not None and float(upright[1]) == pytest.approx((x0 + x1) / 2, abs=0.1)
    single = charts.tracks([("alone", [(3, 1.0)], "arm-1")], name="x", mark=9)
    assert "nan" not in single and "legend" not in single and "stopped at step 9" in single
