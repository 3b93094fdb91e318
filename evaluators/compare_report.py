"""A comparison as a table for a terminal, and as comparison.json, comparison.md and a self-contained page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from evaluators import charts
from evaluators.compare import Compared, Comparison, Summary
from evaluators.page import document, figure, picture
from evaluators.results import percent, points
from evaluators.scorefile import write_whole
from mmalign.media import Media

STEM = "comparison"
ARMS = ("arm-0", "arm-1", "arm-2", "arm-3")


def write_comparison(folder: Path, found: Comparison) -> Path:
    """Write the three files, each whole or not at all; returns the page.

    Raises:
        UserError: the folder cannot be written, or a picture does not open.
    """
    content = {
        "json": json.dumps(found.as_json(), allow_nan=False, indent=1) + "\n",
        "md": markdown(found) + "\n",
        "html": html(found),
    }
    for suffix, text in content.items():
        write_whole(folder / f"{STEM}.{suffix}", [text])
    return folder / f"{STEM}.html"


# -------------------------------------------------------------------------------------------------- markdown


def markdown(found: Comparison) -> str:
    """The tables as Markdown, which a terminal shows as well."""
    parts = [" against ".join([", ".join(found.models[1:]), found.models[0]]) + f": {_sizes(found)}"]
    parts.append(pipe_table(["", *found.models], [[number, *cells] for number, cells in _means(found)]))
    parts.append(pipe_table(*_against(found)))
    if found.rankings:
        parts.append("Strengths (Bradley-Terry with ties, Elo scale):")
        parts.append(pipe_table(["", *found.models], [[number, *cells] for number, cells in _elo(found)]))
    parts += [f"Note: {note}" for note in found.notes]
    return "\n\n".join(parts)


def _sizes(found: Comparison) -> str:
    return f"{found.samples} samples, {found.prompts} prompts, protocol {found.digest}"


def pipe_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown that is aligned in a terminal too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _bounds(interval: tuple[float, float], form: Callable[[float], str]) -> str:
    return f"[{form(interval[0])}, {form(interval[1])}]"


def _p(value: float, holm: float) -> str:
    def short(p: float) -> str:
        return "<0.0001" if p < 0.0001 else f"{p:.2g}"

    return short(value) if value == holm else f"{short(value)} ({short(holm)})"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + charts.label(value)


COLUMNS: Sequence[tuple[str, Callable[[Compared], str]]] = (
    ("win rate %", lambda one: f"{_share(one.report.win_rate)} {_bounds(one.report.ci95, _share)}"),
    ("ties", lambda one: str(one.report.ties)),
    ("sign p (Holm)", lambda one: _p(one.report.p_value, one.sign_holm)),
    (
        "mean difference",
        lambda one: f"{_signed(one.report.mean_difference)} {_bounds(one.report.mean_difference_ci95, _signed)}",
    ),
    ("permutation p (Holm)", lambda one: _p(one.permutation_p, one.permutation_holm)),
    ("d", lambda one: "–" if one.effect is None else f"{one.effect:+.2f}"),
    ("smallest seen", lambda one: f"{points(one.report.mde)}, {charts.label(one.smallest)}"),
)


def _means(found: Comparison) -> list[tuple[str, list[str]]]:
    def cell(one: Summary) -> str:
        return f"{charts.label(one.mean)} {_bounds(one.ci95, charts.label)}"

    return [(number, [cell(by[model]) for model in found.models]) for number, by in found.summaries.items()]


def _elo(found: Comparison) -> list[tuple[str, list[str]]]:
    def cell(value: float, interval: tuple[float, float]) -> str:
        return f"{value:.0f} {_bounds(interval, lambda end: f'{end:.0f}')}"

    return [
        (number, [cell(*pair) for pair in zip(one.elo, one.elo_intervals, strict=True)])
        for number, one in found.rankings.items()
    ]


def _against(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what was compared with the first model."""
    head = ["", "model", *(name for name, _ in COLUMNS)]
    return head, [[one.number, one.model, *(say(one) for _, say in COLUMNS)] for one in found.compared]


# ------------------------------------------------------------------------------------------------------ page


def html(found: Comparison) -> str:
    """The page: tables, win rates, how samples moved, pictures of the first prompts."""
    title = f"{', '.join(found.models[1:])} against {found.models[0]}"
    protocol = json.dumps(found.protocol, indent=1, ensure_ascii=False)
    scorers = "".join(f"<li>{escape(number)}: {escape(name)}</li>" for number, name in found.identities.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return document(
        title,
        [
            f'<header><h1>{escape(title)}</h1><p class="quiet">{escape(_sizes(found))}. Intervals are of 95 % and keep '
            "the samples of one prompt together; higher is better.</p></header>",
            _grid(found),
            _table("Numbers", ["", *found.models], [[number, *cells] for number, cells in _means(found)]),
            _table(
                "Against " + found.models[0],
                *_against(found),
                "p in brackets: corrected for all rows of this table (Holm). Smallest seen: what would be found four "
                "times in five, as win rate and as difference.",
            ),
            _charts(found),
            _table("Strengths", ["", *found.models], [[n, *cells] for n, cells in _elo(found)], "Elo scale.")
            if found.rankings
            else "",
            f"<section><h2>To keep in mind</h2><ul>{notes}</ul></section>" if notes else "",
            f"<section><h2>Protocol {escape(found.digest)}</h2><pre>{escape(protocol)}</pre>"
            f"<ul>{scorers}</ul></section>",
        ],
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], below: str = "") -> str:
    tops = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    small = f'<p class="quiet">{escape(below)}</p>' if below else ""
    return (
        f'<section><h2>{escape(title)}</h2>{small}<div class="wide"><table><thead><tr>{tops}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _charts(found: Comparison) -> str:
    styles = {model: ARMS[min(index, len(ARMS) - 1)] for index, model in enumerate(found.models)}
    figures = []
    for number in found.summaries:
        pairs = [one for one in found.compared if one.number == number]
        rows = [(one.model, one.report.win_rate, one.report.ci95, styles[one.model]) for one in pairs]
        told = f"{number}: win rates"
        figures.append(figure(told, charts.forest(rows, blind=pairs[0].report.mde, name=told)))
        for one in pairs:
            told = f"{number}: {one.model}"
            moved = found.differences[number, one.model]
            chart = charts.histogram(moved, name=told, across="change of a sample", style=styles[one.model])
            figures.append(
                figure(told, chart, f"Win rate {percent(one.report.win_rate)}. Right of the dashes is better.")
            )
    return f'<section><h2>Differences</h2><div class="charts">{"".join(figures)}</div></section>'


def _grid(found: Comparison) -> str:
    if not found.pictures:
        return ""
    rows = []
    for prompt, paths in found.pictures.items():
        cells = []
        for model, path in zip(found.models, paths, strict=True):
            image = Media(path=path.name, root=str(path.parent)).open()
            inside = picture(image, f"{model}: {prompt}")
            cells.append(f"<figure>{inside}<figcaption><b>{escape(model)}</b></figcaption></figure>")
        rows.append(
            f'<figure class="row"><figcaption dir="auto">{escape(prompt)}</figcaption>'
            f'<div class="cells">{"".join(cells)}</div></figure>'
        )
    return (
        '<section><h2>Same prompt, same noise</h2><p class="quiet">The first prompts, none chosen by its result.</p>'
        f'<div class="rows" style="--row: {24 + 100 * len(found.models)}px">{"".join(rows)}</div></section>'
    )
