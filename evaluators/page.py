"""The page report.html: style, charts and pictures inside, no script, nothing fetched from elsewhere.

A content security policy says so to the browser too. All text of other people's making is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from evaluators import charts
from evaluators.overoptimisation import Look, deviations, first_verdict
from evaluators.results import BASE, Evaluation, Report, percent, points, sentences, signed
from mmalign.statistics import Interval, PairedReport

OPEN_ROWS = 12  # of the picture grid; the others are folded away
PIXEL_ART = 96  # pixels: pictures up to this size are enlarged with hard edges
LARGEST = 384  # pixels: larger pictures are reduced before they go into the page

Curves = Mapping[str, Sequence[charts.Point]]

# Known numbers: their words, an explanation, and whether they are shares.
_NUMBERS: dict[str, tuple[str, str, bool]] = {
    "faithful": ("Faithful", "pictures that show all the prompt says and nothing else", True),
    "reward_mean": ("Reward", "how much of the prompt is right, 0 to 1", False),
    "clip_mean": ("CLIP", "similarity of prompt and picture", False),
    "style_mean": ("Style", "how much of the taught style a picture has", False),
}
_OTHERS = ("arm-2", "arm-3", "arm-0")  # classes of the scorers that a watched run is not rewarded by
# Curves drawn where a run logged them: title, and the value that means nothing was learned.
_CURVES: dict[str, tuple[str, float | None]] = {
    "loss": ("loss", None),
    "rewards/margins": ("reward margin", 0.0),
    "rewards/accuracies": ("pairs ranked right", 0.5),
}


def render(report: Report, curves: Mapping[str, Curves], watches: Mapping[str, Sequence[Look]] | None = None) -> str:
    """The page as HTML.

    Args:
        curves: for the arms that were trained, the points of each logged number.
        watches: for those that were watched for over-optimisation, what was seen.
    """
    pair = report.paired[report.aligned]
    found = "good" if pair.ci95[0] > 0.5 else "worse" if pair.ci95[1] < 0.5 else "none"
    facts = {
        "Taught": report.preference,
        "Held-out prompts": str(report.prompts),
        "Pictures per model": str(pair.n),
    }
    body = [
        _grid(report),
        _table(report),
        _differences(report),
        training(report, curves),
        _watches(report, watches or {}),
    ]
    return page(report, found, sentences(report), facts, body)


def page(report: Evaluation, found: str, said: Sequence[str], facts: Mapping[str, str], body: Sequence[str]) -> str:
    """A report's page.

    Args:
        found: "good", "worse" or "none".
        said: sentences on what was found, the most important first.
        facts: about this kind of evaluation, to stand among those that every one has.
        body: between header and notes.
    """
    about = {"Method": report.method, **facts, "Seed": str(report.seed), "Took": clock(report.seconds)}
    head, tail = header(report.title, found, said, about), again(report.command, report.versions, report.config)
    return document(report.title, [head, *body, notes(report.notes), tail])


def document(title: str, body: Sequence[str]) -> str:
    """A whole page: head, style and the parts of the body that are not empty."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def header(title: str, found: str, said: Sequence[str], facts: Mapping[str, str]) -> str:
    """The title, what was found, its first sentence loudest, and facts about the run.

    Args:
        found: "good", "worse" or "none", which gives it its colour.
    """
    first, *rest = said
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<header><h1>{escape(title)}</h1>\n<div class="lead {found}"><p><strong>{escape(first)}</strong></p>'
        + "".join(f"<p>{escape(sentence)}</p>" for sentence in rest)
        + f'</div>\n<dl class="facts">{items}</dl>\n</header>'
    )


def _grid(report: Report) -> str:
    """A row per prompt with a picture of each arm; the rows after OPEN_ROWS are folded."""
    if not report.shown:
        return ""
    rows = [_row(report, index) for index in range(len(report.shown))]
    wide = f'<div class="rows" style="--row: {24 + 100 * len(report.arms)}px">'
    folded = rows[OPEN_ROWS:]
    more = f"<details><summary>{len(folded)} more prompts</summary>{wide}{''.join(folded)}</div></details>"
    return (
        "<section><h2>Same prompt, same noise</h2>"
        '<p class="quiet">The first of the held-out prompts, none chosen by its result.</p>'
        f"{wide}{''.join(rows[:OPEN_ROWS])}</div>{more if folded else ''}</section>"
    )


def _row(report: Report, index: int) -> str:
    cells = []
    for arm in report.arms.values():
        below = f"{escape(arm.captions[index])}" if arm.captions else ""
        shown = picture(arm.images[index], f"{arm.label}: {report.shown[index]}")
        cells.append(f"<figure>{shown}<figcaption><b>{escape(arm.label)}</b>{below}</figcaption></figure>")
    return (
        f'<figure class="row"><figcaption dir="auto">{escape(report.shown[index])}</figcaption>'
        f'<div class="cells">{"".join(cells)}</div></figure>'
    )


def picture(image: Image.Image, told: str) -> str:
    """A picture inside the page, reduced to LARGEST.

    Args:
        told: what it shows, for those who do not see it.
    """
    plain = image.convert("RGB")  # a new picture: metadata of the old one stays behind
    plain.info.clear()
    plain.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    plain.save(packed, format="PNG", optimize=True)
    data = base64.b64encode(packed.getvalue()).decode("ascii")
    kind = ' class="pixels"' if max(plain.size) <= PIXEL_ART else ""
    size = f'width="{plain.width}" height="{plain.height}"'
    return f'<img{kind} {size} alt="{escape(told)}" src="data:image/png;base64,{data}">'


# ----------------------------------------------------------------------------------------------- numbers


def _table(report: Report) -> str:
    """Numbers by arm, then the comparisons with the base."""
    names = list(dict.fromkeys(name for arm in report.arms.values() for name in arm.numbers))
    rows = []
    for name in names:
        words, meaning, share = _NUMBERS.get(name, (name.removesuffix("_mean").replace("_", " "), "", False))
        form = percent if share else decimal
        cells = [cell(arm.numbers.get(name), arm.intervals.get(name), form) for arm in report.arms.values()]
        rows.append(table_row(words, meaning, cells))
    compared: list[tuple[str, str, Callable[[PairedReport], str], Mapping[str, PairedReport]]] = [
        ("Wins against the base", f"by {report.preference}, ties count half", _rate, report.paired),
        ("p", "sign test over prompts", lambda pair: _p_value(pair.p_value), report.paired),
        ("Ties", "pictures without a winner", lambda pair: f"{pair.ties} of {pair.n}", report.paired),
        ("Smallest effect to be seen", "from 50 %, with 80 % power", lambda p: points(p.mde), report.paired),
        ("Faithful against the base", "difference in points", _change, report.faithful),
    ]
    last = [
        table_row(words, meaning, [f"<td>{say(pairs[a]) if a in pairs else NONE}</td>" for a in report.arms])
        for words, meaning, say, pairs in compared
        if pairs
    ]
    if report.over:
        label = report.arms[report.aligned].label
        cells = [f"<td>{_rate(report.over[a]) if a in report.over else NONE}</td>" for a in report.arms]
        last.append(table_row(f"{label} wins against it", f"by {report.preference}, ties count half", cells))
    return numbers(report, "Below each number is its 95 % interval over prompts.", rows, last)


def numbers(report: Evaluation, told: str, rows: Sequence[str], against: Sequence[str]) -> str:
    """The table of all arms.

    Args:
        told: what must be known to read it.
        rows: of numbers, see `table_row`.
        against: of comparisons with the base.
    """
    head = "".join(f'<th scope="col">{escape(arm.label)}</th>' for arm in report.arms.values())
    return (
        f'<section><h2>Numbers</h2><p class="quiet">{told}</p>'
        '<div class="wide"><table>'
        f'<thead><tr><th scope="col"><span hidden>number</span></th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody><tbody class="against">{"".join(against)}</tbody>'
        "</table></div></section>"
    )


NONE = "\u2013"


def table_row(words: str, meaning: str, cells: Sequence[str]) -> str:
    """A row of a table: its name, what that means in small letters, and its cells."""
    small = f"<small>{escape(meaning)}</small>" if meaning else ""
    return f'<tr><th scope="row">{escape(words)}{small}</th>{"".join(cells)}</tr>'


def cell(value: float | None, interval: Interval | None, form: Callable[[float], str]) -> str:
    """A cell of a table: a number with its interval below."""
    if value is None:
        return f"<td>{NONE}</td>"
    return f"<td>{form(value)}{bounds(interval, form) if interval is not None else ''}</td>"


def bounds(interval: Interval, form: Callable[[float], str]) -> str:
    """An interval in small letters."""
    low, high = (form(bound).removesuffix("\u00a0%") for bound in interval)
    return f"<small>{low} to {high}</small>"


def _rate(pair: PairedReport) -> str:
    return f"{percent(pair.win_rate)}{bounds(pair.ci95, percent)}"


def _change(pair: PairedReport) -> str:
    return f"{signed(pair.mean_difference)}{bounds(pair.mean_difference_ci95, signed)}"


def _p_value(p: float) -> str:
    return "&lt;\u00a00.0001" if p < 0.0001 else f"{p:.2g}"


def decimal(value: float) -> str:
    """A number with three decimals and a true minus."""
    return f"{value:.3f}".replace("-", "\u2212") if abs(value) < 100 else charts.label(value)


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


# ------------------------------------------------------------------------------------------------ charts


def style(report: Evaluation, name: str) -> str:
    """Class of an arm's colour: the base is grey, the aligned arm blue, the others share what is left."""
    if name in (BASE, report.aligned):
        return f"arm-{int(name == report.aligned)}"
    others = [other for other in report.arms if other not in (BASE, report.aligned)]
    return f"arm-{2 + others.index(name) % 2}"


def figure(title: str, chart: str, below: str = "") -> str:
    """A chart with its title, and a caption where there is one."""
    caption = f"<figcaption>{escape(below)}</figcaption>" if below else ""
    return f"<figure><h3>{escape(title)}</h3>{chart}{caption}</figure>"


def _differences(report: Report) -> str:
    """Win rates with intervals, and how far each picture moved."""
    compared = [name for name in report.arms if name != BASE]
    rows = [
        (
            report.arms[name].label,
            report.paired[name].win_rate,
            report.paired[name].ci95,
            style(report, name),
        )
        for name in compared
    ]
    mde = report.paired[report.aligned].mde
    figures = [
        figure(
            "Win rate by what was taught",
            charts.forest(rows, blind=mde, name="win rates against the base"),
            f"Dot and 95 % interval. In the grey band ({points(mde)} around 50 %) an effect is too small "
            "to be seen reliably with this many prompts.",
        )
    ]
    base = report.arms[BASE].per_prompt
    for name in compared:
        arm = report.arms[name]
        if base and arm.per_prompt:
            moved = [after - before for before, after in zip(base, arm.per_prompt, strict=True)]
            across = f"{report.preference}: change from the base"
            chart = charts.histogram(moved, name=arm.label, across=across[:60], style=style(report, name))
            figures.append(
                figure(
                    f"{arm.label}: changes",
                    chart,
                    "Number of pictures by how they changed. Right of the dashed line is better.",
                )
            )
    return f'<section><h2>Against the base</h2><div class="charts">{"".join(figures)}</div></section>'


def training(report: Evaluation, curves: Mapping[str, Curves]) -> str:
    """The curves that runs logged.

    Args:
        curves: for the arms that were trained, the points of each logged number.
    """
    figures = []
    for name, arm in report.arms.items():
        logged = curves.get(name, {})
        for key, (title, zero) in _CURVES.items():
            if key in logged:
                told = f"{arm.label}: {title}"
                drawn = charts.lines(logged[key], name=told, zero=zero, style=style(report, name))
                figures.append(figure(told, drawn))
    if not figures:
        return ""
    return (
        '<section><h2>Training</h2><p class="quiet">Faint: what was logged. Bold: its moving mean. Dashed: '
        "nothing learned. Losses of different methods have different scales.</p>"
        f'<div class="charts">{"".join(figures)}</div></section>'
    )


def _watches(report: Report, watches: Mapping[str, Sequence[Look]]) -> str:
    """Of every watched arm, what the reward's rise cost, and where the rule fired."""
    if not watches:
        return ""
    said = []
    figures = []
    for name, history in watches.items():
        arm, fired = report.arms[name].label, first_verdict(history)
        found = f"the rule fired: {fired.verdict}" if fired else "the rule did not fire"
        said.append(f"<li><b>{escape(arm)}</b>: {len(history)} looks; {escape(found)}.</li>")
        figures += _watched(arm, history, None if fired is None else fired.step)
    return (
        '<section><h2>Over-optimisation</h2><p class="quiet">Looks at held-out prompts during training. A reward that '
        "rises while scorers it does not know fall is being exploited. Upright dashes: where the rule fired first.</p>"
        f'<ul>{"".join(said)}</ul><div class="charts">{"".join(figures)}</div></section>'
    )


def _watched(arm: str, history: Sequence[Look], mark: int | None) -> list[str]:
    steps = [one.step for one in history]

    def points(values: Sequence[float]) -> list[charts.Point]:
        return list(zip(steps, values, strict=True))

    others = list(history[0].held_out)
    told = f"{arm}: reward and held-out scorers"
    series = [("reward", points(deviations(history, None)), "arm-1")]
    series += [
        (f"held out: {other}", points(deviations(history, other)), _OTHERS[index % len(_OTHERS)])
        for index, other in enumerate(others)
    ]
    figures = [
        figure(
            told,
            charts.tracks(series, name=told, zero=0.0, mark=mark),
            "Change of the mean from the base, in deviations of the base over prompts.",
        )
    ]
    kl: list[charts.Point] = [(one.step, one.kl) for one in history if one.kl is not None]
    single: dict[str, tuple[list[charts.Point], str]] = {
        "implicit KL": (kl, "From the reference."),
        "diversity": (points([one.diversity for one in history]), "Mean distance of two pictures."),
        "degenerate pictures": (
            points([one.degenerate for one in history]),
            "Share that is flat, garish, noise, or a copy of another prompt's.",
        ),
    }
    for title, (values, below) in single.items():
        if values:
            told = f"{arm}: {title}"
            figures.append(figure(told, charts.tracks([(title, values, "arm-1")], name=told, mark=mark), below))
    return figures


# ------------------------------------------------------------------------------------------------- words


def notes(said: Sequence[str]) -> str:
    """Sentences on limits and negative results."""
    items = "".join(f"<li>{escape(note)}</li>" for note in said)
    return f"<section><h2>To keep in mind</h2><ul>{items}</ul></section>" if said else ""


def again(command: str, versions: Mapping[str, str], config: str) -> str:
    """How to get this again: command, versions, configuration."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"<section><h2>Again</h2><pre>{escape(command)}</pre>"
        f'<p class="quiet">With {escape(libraries)}.</p>'
        f"<details><summary>Effective configuration</summary><pre>{escape(config)}</pre></details>"
        "</section>"
    )
