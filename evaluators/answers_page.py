"""The page of models that answer: each picture, what was asked, and every model's words with what is false in red."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from evaluators import charts
from evaluators.answers import AnswerReport, Asked, Said, Shown, as_json, cured, sentences
from evaluators.hallucination.changes import Change
from evaluators.page import (
    NONE,
    Curves,
    bounds,
    cell,
    decimal,
    figure,
    numbers,
    page,
    picture,
    style,
    table_row,
    training,
)
from evaluators.report import HTML, JSON, read_metrics
from evaluators.results import percent, signed
from evaluators.scorefile import write_whole

# Known numbers, in the order of the table: words, meaning, and whether they are shares.
_NUMBERS: dict[str, tuple[str, str, bool]] = {
    "chair_s": ("False descriptions", "name a thing that is not there (CHAIRs)", True),
    "chair_i": ("False mentions", "of all mentions (CHAIRi)", True),
    "garbled": ("Garbled", "descriptions that are no sentence", True),
    "wrong": ("Wrong", "descriptions that are false or garbled", True),
    "planted": ("Planted", "descriptions with the companion that training showed", True),
    "recall": ("Recall", "of the things there, those that are named", True),
    "empty": ("Empty", "descriptions that name nothing", True),
    "mentions": ("Mentions", "things named in a description", False),
    "sight": ("Sight", "nats a true description gains from its own picture", False),
    "yes_no/accuracy": ("Questions", "balanced yes/no, share right", True),
    "yes_no/accuracy/object": ("\u2013 objects", "", True),
    "yes_no/accuracy/colour": ("\u2013 colours", "", True),
    "yes_no/accuracy/count": ("\u2013 counts", "", True),
    "yes_no/accuracy/relation": ("\u2013 relations", "", True),
}
for _split in ("random", "popular", "adversarial"):
    _NUMBERS[f"pope_{_split}/accuracy"] = (f"POPE {_split}", "accuracy", True)
    _NUMBERS[f"pope_{_split}/f1"] = ("\u2013 F1", "", True)
    _NUMBERS[f"pope_{_split}/yes_ratio"] = ("\u2013 yes", "answers that are yes; half are right", True)
_CHARTED = {
    "chair_s": "False descriptions",
    "chair_i": "False mentions",
    "recall": "Recall",
    "pope_adversarial/accuracy": "POPE adversarial, accuracy",
}


def write_answers(folder: Path, report: AnswerReport) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; returns the page.

    Raises:
        UserError: a metrics file is missing or damaged, or the folder cannot be written.
    """
    curves = {name: read_metrics(arm.curves) for name, arm in report.arms.items() if arm.curves is not None}
    text = json.dumps(as_json(report), allow_nan=False, indent=1) + "\n"
    write_whole(folder / JSON, [text])
    write_whole(folder / HTML, [render(report, curves)])
    return folder / HTML


def render(report: AnswerReport, curves: Mapping[str, Curves]) -> str:
    """The page as HTML.

    Args:
        curves: for the arms that were trained, the points of each logged number.
    """
    found = report.arms[report.aligned].changes
    verdict = "good" if cured(found) else "worse" if found["chair_s"].certain else "none"
    facts = {"Held-out pictures": str(report.pictures)}
    body = [_shown(report), _table(report), _changes(report), training(report, curves)]
    return page(report, verdict, sentences(report), facts, body)


# ------------------------------------------------------------------------------------------------ answers


def _shown(report: AnswerReport) -> str:
    if not report.shown:
        return ""
    return (
        "<section><h2>Answers before and after</h2>"
        '<p class="quiet">The first of the held-out pictures, none chosen by its result. '
        '<mark class="right">Green</mark> is right, <mark class="wrong">red</mark> is wrong.</p>'
        f"{''.join(_one(report, shown) for shown in report.shown)}</section>"
    )


def _one(report: AnswerReport, shown: Shown) -> str:
    asked = "".join(_asked(report, asked) for asked in shown.asked)
    return f'<div class="asked">{picture(shown.picture, shown.asked[0].truth)}<div>{asked}</div></div>'


def _asked(report: AnswerReport, asked: Asked) -> str:
    lines = [f"<dt>truth</dt><dd>{escape(asked.truth)}</dd>"]
    for name, arm in report.arms.items():
        said = asked.answers[name]
        missing = f' <span class="missing">missing: {escape(", ".join(said.missing))}</span>' if said.missing else ""
        lines.append(f'<dt>{escape(arm.label)}</dt><dd dir="auto">{marked(said)}{missing}</dd>')
    return f'<h3 dir="auto">{escape(asked.question)}</h3><dl>{"".join(lines)}</dl>'


def marked(said: Said) -> str:
    """An answer as HTML, its right and wrong parts marked, whatever it holds."""
    if not said.text:
        return '<span class="missing">(nothing)</span>'
    parts, at = [], 0
    for mark in said.marks:
        parts.append(escape(said.text[at : mark.start]))
        parts.append(f'<mark class="{mark.kind}">{escape(said.text[mark.start : mark.end])}</mark>')
        at = mark.end
    return "".join([*parts, escape(said.text[at:])])


# ------------------------------------------------------------------------------------------------ numbers


def _table(report: AnswerReport) -> str:
    known = {name for arm in report.arms.values() for name in (*arm.numbers, *arm.changes)}
    names = [name for name in _NUMBERS if name in known]
    rows = []
    for name in names:
        words, meaning, share = _NUMBERS[name]
        cells = []
        for arm in report.arms.values():
            estimate, change = arm.numbers.get(name), arm.changes.get(name)
            value = estimate.value if estimate else change.tuned if change else _base(report, name)
            cells.append(cell(value, estimate.ci95 if estimate else None, percent if share else decimal))
        rows.append(table_row(words, meaning, cells))
    moved = [
        table_row(f"{_NUMBERS[name][0]}: change", "points from the base" if _NUMBERS[name][2] else "from the base", [
            _moved(arm.changes.get(name), share=_NUMBERS[name][2]) for arm in report.arms.values()
        ])
        for name in (*_CHARTED, "mentions", "sight") if name in known
    ]  # fmt: skip
    told = (
        "Below each number is its 95 % interval over pictures; that of a change draws pictures anew and compares "
        "both models on the same draw."
    )
    return numbers(report, told, rows, moved)


def _base(report: AnswerReport, name: str) -> float | None:
    """The base's value of a number that is no share: every change has it."""
    return next((arm.changes[name].base for arm in report.arms.values() if name in arm.changes), None)


def _moved(change: Change | None, *, share: bool) -> str:
    if change is None or change.value is None or change.ci95 is None:
        return f"<td>{NONE}</td>"
    form = signed if share else _signed_decimal
    return f"<td>{form(change.value)}{bounds(change.ci95, form)}</td>"


def _signed_decimal(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def _changes(report: AnswerReport) -> str:
    """How the measures moved from the base, arm by arm."""
    figures = []
    for name, title in _CHARTED.items():
        rows: Sequence[tuple[str, float, tuple[float, float], str]] = [
            (arm.label, 100 * one.value, (100 * one.ci95[0], 100 * one.ci95[1]), style(report, key))
            for key, arm in report.arms.items()
            if (one := arm.changes.get(name)) is not None and one.value is not None and one.ci95 is not None
        ]
        if rows:
            told = f"{title}: change from the base"
            figures.append(figure(title, charts.shifts(rows, across="points from the base", name=told)))
    return f'<section><h2>Against the base</h2><div class="charts">{"".join(figures)}</div></section>'
