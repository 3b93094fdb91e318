"""The report: what it claims, what it holds, and that a hostile prompt stays text."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from evaluators import charts
from evaluators.page import LARGEST, OPEN_ROWS
from evaluators.report import Arm, Report, headline, measured, read_metrics, write_report
from mmalign.errors import UserError
from mmalign.statistics import PairedReport, bootstrap_interval, paired_report, wilson_interval

N = 64


def picture(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write_metrics(path: Path, *, steps: int = 30) -> Path:
    lines = [
        {
            "step": step,
            "time": 1.0,
            "loss": 0.7 - step / 100,
            "rewards/margins": step / 10,
            "rewards/accuracies": 0.5 + step / 100,
        }
        for step in range(steps)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(gain: float = 0.5, *, shown: tuple[str, ...] = ("a red circle", "two blue squares"), **changes: Any) -> Report:
    """A report of three arms; the aligned one is better by `gain` standard deviations of the noise."""
    rng = np.random.default_rng(3)
    style = {"base": rng.normal(size=N)}
    style["dpo"] = style["base"] + gain + rng.normal(size=N)
    style["sft"] = style["base"] + gain / 4 + rng.normal(size=N)
    faithful = {name: (rng.random(N) < 0.5).astype(float) for name in style}
    arms = {
        name: measured(
            {"base": "Base", "dpo": "Diffusion-DPO", "sft": "Fine-tuned"}[name],
            {
                "faithful": faithful[name].tolist(),
                "clip_mean": rng.random(N).tolist(),
                "style_mean": values.tolist(),
            },
            taught="style_mean",
            images=[picture(seed=index) for index in range(len(shown))],
        )
        for name, values in style.items()
    }
    fields: dict[str, Any] = {
        "method": "dpo",
        "preference": "style",
        "title": "A title",
        "prompts": N,
        "seed": 0,
        "seconds": 391.2,
        "versions": {"torch": "2.15"},
        "config": "method:\n  beta: 5000\n",
        "command": "mmalign demo",
        "arms": arms,
        "aligned": "dpo",
        "paired": {name: paired_report(style["base"], style[name]) for name in ("dpo", "sft")},
        "faithful": {name: paired_report(faithful["base"], faithful[name]) for name in ("dpo", "sft")},
        "over": {"sft": paired_report(style["sft"], style["dpo"])},
        "shown": shown,
    }
    return Report(**{**fields, **changes})


class Page(HTMLParser):
    """Elements with their attributes, and the text, of a page whose tags must balance."""

    VOID = frozenset({"meta", "link", "img", "circle", "rect", "line", "polyline"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(report: Report, folder: Path) -> tuple[dict[str, Any], Page]:
    html = write_report(folder, report)
    assert html == folder / "report.html"
    return json.loads((folder / "report.json").read_text()), Page(html.read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------- JSON


def test_json_holds_what_was_promised(tmp_path: Path) -> None:
    report = make()
    data, _ = read(report, tmp_path)
    assert {
        "method", "preference", "prompts", "base", "aligned", "sft", "paired", "seconds", "versions", "seed",
        "config",
    } <= set(data)  # fmt: skip
    for arm in ("base", "aligned", "sft"):
        assert {"faithful", "clip_mean", "style_mean"} <= set(data[arm])
        assert len(data[arm]["per_prompt"]) == N
    pair = report.paired["dpo"]
    assert data["aligned"]["arm"] == "dpo"
    assert data["paired"]["win_rate"] == pair.win_rate
    assert data["paired"]["ci95"] == list(pair.ci95)
    assert data["paired"]["p_value"] == pair.p_value
    assert data["paired"]["ties"] == pair.ties
    assert data["headline"] == headline(report)


def test_json_alone_is_enough_to_do_the_comparison_again(tmp_path: Path) -> None:
    data, _ = read(make(), tmp_path)
    again = paired_report(data["base"]["per_prompt"], data["aligned"]["per_prompt"])
    assert [again.win_rate, list(again.ci95)] == [data["paired"]["win_rate"], data["paired"]["ci95"]]


def test_json_is_sorted_and_the_same_each_time(tmp_path: Path) -> None:
    write_report(tmp_path / "a", make())
    write_report(tmp_path / "b", make())
    text = (tmp_path / "a" / "report.json").read_text()
    assert text == (tmp_path / "b" / "report.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, bad: Any) -> None:
    report = make()
    sick = replace(report.arms["sft"], numbers={**report.arms["sft"].numbers, "clip_mean": float(bad)})
    with pytest.raises(UserError, match=r"report\.sft\.clip_mean"):
        write_report(tmp_path, replace(report, arms={**report.arms, "sft": sick}))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, make())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write the report: No space left on device"):
        write_report(tmp_path, make(0.0))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -------------------------------------------------------------------------------------------------- page


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    report = make()
    trained = replace(report.arms["dpo"], curves=write_metrics(tmp_path / "metrics.jsonl"))
    _, page = read(replace(report, arms={**report.arms, "dpo": trained}), tmp_path)
    assert not page.named("script")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r"base64,[^\"]*", "", source))
    policy = page.named("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in (policy["content"] or "")
    assert str(tmp_path) not in source


def test_no_text_of_other_people_becomes_markup(tmp_path: Path) -> None:
    evil = "</title></style></pre>\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\ud800"
    report = make(shown=(evil, "a red circle"))
    arms = {
        name: replace(arm, label=evil, captions=(evil, "fine"), numbers={**arm.numbers, evil: 1.0})
        for name, arm in report.arms.items()
    }
    arms["dpo"] = replace(arms["dpo"], curves=write_metrics(tmp_path / "metrics.jsonl"))
    clean = dict.fromkeys(("method", "preference", "title", "config", "command"), evil)
    report = replace(report, arms=arms, notes=(evil,), versions={evil: evil}, **clean)  # type: ignore[arg-type]
    _, page = read(report, tmp_path)
    assert not page.named("script")
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.named("img"))
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert page.text.count("<script>alert(1)</script>") >= 15  # seen as text, in all these places
    assert "&amp;?" in page.text  # escaped once and undone once; the lone surrogate has become a question mark


def test_every_prompt_has_a_row_with_a_picture_of_every_arm(tmp_path: Path) -> None:
    shown = tuple(f"prompt {index}" for index in range(OPEN_ROWS + 3))
    report = make(shown=shown)
    captions = tuple(f"score {index}" for index in range(len(shown)))
    aligned = replace(report.arms["dpo"], captions=captions)
    _, page = read(replace(report, arms={**report.arms, "dpo": aligned}), tmp_path)
    rows = [attributes for attributes in page.named("figure") if attributes.get("class") == "row"]
    assert len(rows) == len(shown)
    assert [image["alt"] for image in page.named("img")][:3] == [
        f"{label}: prompt 0" for label in ("Base", "Diffusion-DPO", "Fine-tuned")
    ]
    assert all(text in page.text for text in (*shown, *captions, "3 more prompts"))


def test_pictures_arrive_pixel_for_pixel_and_without_metadata(tmp_path: Path) -> None:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "a secret")
    packed = io.BytesIO()
    picture(seed=7).save(packed, format="PNG", pnginfo=told)
    small, large = Image.open(packed), picture(2 * LARGEST)
    report = make(shown=("small", "large"))
    arms = {name: replace(arm, images=(small, large)) for name, arm in report.arms.items()}
    _, page = read(replace(report, arms=arms), tmp_path)
    first, second = page.named("img")[0], page.named("img")[3]
    opened = [Image.open(io.BytesIO(base64.b64decode((image["src"] or "").split(",")[1]))) for image in (first, second)]
    assert np.array_equal(np.asarray(opened[0]), np.asarray(picture(seed=7)))
    assert not opened[0].info
    assert opened[1].size == (LARGEST, LARGEST)
    assert (first.get("class"), second.get("class")) == (
        "pixels",
        None,
    )  # hard edges only where they are meant
    assert large.size == (2 * LARGEST, 2 * LARGEST)  # the caller's picture is left alone


def test_the_table_shows_what_json_says(tmp_path: Path) -> None:
    data, page = read(make(), tmp_path)
    for arm in ("base", "aligned", "sft"):
        assert f"{100 * data[arm]['faithful']:.1f}\u00a0%" in page.text
        assert f"{data[arm]['style_mean']:.3f}".replace("-", "\u2212") in page.text
        low, high = data[arm]["intervals"]["clip_mean"]
        assert f"{low:.3f} to {high:.3f}" in page.text
    assert f"{data['paired']['ties']} of {N}" in page.text
    assert f"{100 * data['paired']['mde']:.1f}\u00a0points" in page.text
    assert "beta: 5000" in page.text
    assert "6 min 31 s" in page.text


def test_an_arm_may_lack_numbers_pictures_and_curves(tmp_path: Path) -> None:
    pair = make().paired["dpo"]
    bare = {
        "base": Arm(label="Base", numbers={"faithful": 0.5}),
        "dpo": Arm(label="D", numbers={"odd_thing": 2.0}),
    }
    report = make(shown=(), arms=bare, paired={"dpo": pair}, faithful={}, over={})
    data, page = read(report, tmp_path)
    assert data["aligned"]["odd_thing"] == 2.0
    assert "odd thing" in page.text
    assert not page.named("img")
    assert len(page.named("svg")) == 1  # the win rate; no scores to draw, no curves


@pytest.mark.parametrize(
    "changes",
    [
        {"aligned": "base"},
        {"aligned": "unknown"},
        {"paired": {}},
        {"shown": ("one prompt too few for the images",)},
        {"over": {"dpo": make().paired["dpo"]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make(**changes) if "shown" not in changes else replace(make(), **changes)


def test_an_arm_may_not_hide_another_entry_of_the_json() -> None:
    report = make()
    arms = {"base": report.arms["base"], "dpo": report.arms["dpo"], "paired": report.arms["sft"]}
    paired = {"dpo": report.paired["dpo"], "paired": report.paired["sft"]}
    with pytest.raises(ValueError, match="paired"):
        replace(report, arms=arms, paired=paired, faithful={}, over={})


# ------------------------------------------------------------------------------------------------- words


def test_an_effect_is_said_with_its_interval() -> None:
    report = make(2.0)
    pair = report.paired["dpo"]
    assert pair.ci95[0] > 0.5
    rate = f"{100 * pair.win_rate:.1f}\u00a0% (95\u00a0% interval {100 * pair.ci95[0]:.1f}\u00a0% to"
    assert headline(report).startswith(f"On {N} held-out prompts Diffusion-DPO wins {rate}")
    assert "Against Fine-tuned it wins" in headline(report)


def test_no_effect_is_said_to_be_none(tmp_path: Path) -> None:
    report = make(0.0)
    report = replace(report, over={"sft": report.paired["dpo"]})  # no difference either
    assert report.paired["dpo"].ci95[0] < 0.5 < report.paired["dpo"].ci95[1]
    assert headline(report).startswith("No effect was found: on")
    assert "no difference was found" in headline(report)
    assert f"an effect of {100 * report.paired['dpo'].mde:.1f}\u00a0points would have been seen" in headline(report)
    _, page = read(report, tmp_path)
    assert {"class": "lead none"} in page.named("div")


def test_harm_is_said_to_be_harm(tmp_path: Path) -> None:
    report = make(-2.0)
    assert headline(report).startswith("It got worse: on")
    assert "it loses" in headline(report)
    _, page = read(report, tmp_path)
    assert {"class": "lead worse"} in page.named("div")


def test_an_interval_that_touches_one_half_is_no_effect() -> None:
    report = make(2.0)
    pair = replace(report.paired["dpo"], ci95=(0.5, 0.9))
    assert headline(replace(report, paired={**report.paired, "dpo": pair})).startswith("No effect was found")


@pytest.mark.parametrize(
    ("bounds", "said"), [((-0.1, -0.01), "fell"), ((0.01, 0.1), "rose"), ((-0.05, 0.04), "may be chance")]
)
def test_faithfulness_falls_rises_or_stays(bounds: tuple[float, float], said: str) -> None:
    report = make()
    pair: PairedReport = replace(report.faithful["dpo"], mean_difference_ci95=bounds)
    words = headline(replace(report, faithful={"dpo": pair}))
    assert [word for word in ("fell", "rose", "may be chance") if word in words] == [said]
    assert f"{100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}".replace("-", "\u2212") in words


# ----------------------------------------------------------------------------------------------- numbers


def test_measured_keeps_the_units_of_a_prompt_together() -> None:
    values = [0.1, 0.2, 0.9, 0.8, 0.5, 0.4]
    hits = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    arm = measured(
        "x",
        {"style_mean": values, "faithful": hits},
        taught="style_mean",
        prompts=["a", "a", "b", "b", "c", "c"],
    )
    assert arm.numbers == pytest.approx({"style_mean": 2.9 / 6, "faithful": 0.5})
    assert arm.intervals["style_mean"] == bootstrap_interval(values, [1, 1, 2, 2, 3, 3])
    assert arm.intervals["faithful"] == wilson_interval(1.5, 3)  # three prompts, not six units
    assert list(arm.per_prompt) == values


def test_measured_gives_a_perfect_score_an_interval() -> None:
    arm = measured("x", {"faithful": [1.0] * 20}, taught="faithful")
    assert arm.intervals["faithful"][0] < 0.9


def test_metrics_are_read_by_name_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "time": 5, "loss": 1.5, "note": "x", "on": true}\n'
        '{"step": 2, "time": 6, "loss": null}\n'
        '{"step": 3, "loss": NaN, "lr": 1e-6}\n'
        '{"step": 4, "loss": 1e400}\n'
        '{"step": 5, "lo'
    )
    assert read_metrics(path) == {"loss": [(1, 1.5)], "lr": [(3, 1e-6)]}


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 1e400}', "[" * 100_000])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"not a line of metrics \(.*metrics\.jsonl:2\)"):
        read_metrics(path)


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    report = make()
    arm = replace(report.arms["dpo"], curves=tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="cannot read the metrics"):
        write_report(tmp_path / "out", replace(report, arms={**report.arms, "dpo": arm}))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ charts


def coordinates(svg: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for line in re.findall(r'points="([^"]*)"', svg)
        for x, y in (p.split(",") for p in line.split())
    ]


def test_curves_of_every_trained_arm_are_drawn(tmp_path: Path) -> None:
    report = make()
    path = write_metrics(tmp_path / "dpo.jsonl")
    plain = tmp_path / "sft.jsonl"
    plain.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n')
    arms = {
        **report.arms,
        "dpo": replace(report.arms["dpo"], curves=path),
        "sft": replace(report.arms["sft"], curves=plain),
    }
    _, page = read(replace(report, arms=arms), tmp_path)
    told = [svg["aria-label"] or "" for svg in page.named("svg")]
    assert [label.split(":")[0] for label in told[3:]] == ["Diffusion-DPO"] * 3 + ["Fine-tuned"]
    assert "over 30 logged steps" in told[3]


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
        [-3e6, 4e6, 1e6],
        [1e-9, 2e-9],
        list(np.random.default_rng(0).normal(size=2000)),
    ],
    ids=["one", "constant", "zero", "large", "small", "long"],
)
def test_lines_stay_inside_the_axes(values: list[float]) -> None:
    svg = charts.lines([(step, float(value)) for step, value in enumerate(values)], name="x", zero=0.0)
    places = coordinates(svg)
    assert len(places) == (
        0 if len(values) == 1 else 2 * min(len(values), math.ceil(len(values) / math.ceil(len(values) / 300)))
    )
    for x, y in places:
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
    assert "nan" not in svg
    assert svg.count('class="c-tick"') >= 2


def test_a_rising_value_is_a_rising_line() -> None:
    svg = charts.lines([(0, 0.0), (10, 1.0)], name="x")
    (x0, y0), (x1, y1), *_ = coordinates(svg)
    assert x0 < x1
    assert y0 > y1  # the origin is at the top


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 97, [20, 40, 60, 80]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.05"), (-1500, "\u22121500"), (2e-6, "2e\u22126"), (0, "0"), (1e-15, "0"), (3e7, "3e7")],
)
def test_labels_are_short(value: float, text: str) -> None:
    assert charts.label(value) == text


def test_the_histogram_counts_better_worse_and_the_same() -> None:
    svg = charts.histogram([1.0, 1.0, 1.0, 0.0, 0.0, -1.0], name="x", across="change")
    assert "3 better, 1 worse, 2 the same" in svg
    bars = re.findall(r'class="(c-\w+)[^"]*" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', svg)
    assert [kind for kind, _, _ in bars] == ["c-worse", "c-same", "c-better"]
    heights = [float(height) for _, _, height in bars]
    assert heights == pytest.approx([heights[0], 2 * heights[0], 3 * heights[0]], abs=0.2)
    assert "0 better" in charts.histogram([0.0, 0.0], name="x", across="change")


def test_the_win_rate_stands_where_the_axis_says() -> None:
    svg = charts.forest([("D", 0.75, (0.5, 1.0), "arm-1")], blind=0.1, name="x")
    dot = float(re.search(r'<circle[^>]* cx="([\d.]+)"', svg)[1])  # type: ignore[index]  # there is one
    ticks = {text: float(x) for x, text in re.findall(r'<text class="c-tick" x="([\d.]+)"[^>]*>([^<]*)<', svg)}
    assert dot == pytest.approx(ticks["75 %"])
    left, width = map(float, re.search(r'c-blind" x="([\d.]+)" y="4" width="([\d.]+)"', svg).groups())  # type: ignore[union-attr]  # the band is there
    assert left + width / 2 == pytest.approx(ticks["50 %"], abs=0.1)
    assert width == pytest.approx(0.2 * (ticks["100 %"] - ticks["0 %"]), abs=0.1)
