"""The standings and what to do with the votes, as HTML. Every name is escaped: models are called what files say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from evaluators.arena.standings import Match, Standings
from evaluators.charts import forest
from mmalign.statistics import Interval, minimum_detectable_win_rate

FEW = 20  # votes before which a rate is hardly worth a look


def render(found: Standings, steps: Sequence[tuple[str, str]]) -> str:
    """The tab's content.

    Args:
        steps: (what it does, the command), in order.
    """
    if not found.votes:
        return '<p class="quiet">No votes yet. They are counted here as they come in.</p>'
    parts = [_rates(found), _ranking(found), _raters(found), _train(steps)]
    return "".join(part for part in parts if part)


def _rates(found: Standings) -> str:
    few = f'<p class="quiet">Only {found.votes} votes so far: read the intervals.</p>' if found.votes < FEW else ""
    rows = [
        (f"{match.first} against {match.second}", match.rate, match.interval or (0.0, 1.0), "arm-1")
        for match in found.matches
    ]
    prompts = max(match.prompts for match in found.matches)
    chart = forest(rows, blind=minimum_detectable_win_rate(prompts), name="win rates", across="win rate")
    lines = "".join(_row(match) for match in found.matches)
    return (
        "<section><h3>Win rate</h3>"
        '<p class="quiet">A tie and a &ldquo;both bad&rdquo; count half. Intervals are 95&nbsp;%, by prompts; p is '
        "the sign test over prompts. In the grey band an effect is too small to be seen with this many prompts.</p>"
        f'{few}<div class="pair"><div class="chart">{chart}</div><div class="wide"><table><thead><tr><th></th>'
        "<th>win rate</th><th>won</th><th>lost</th><th>ties</th><th>both bad</th><th>prompts</th><th>p</th></tr>"
        f"</thead><tbody>{lines}</tbody></table></div></div></section>"
    )


def _row(match: Match) -> str:
    numbers = (match.wins, match.losses, match.ties, match.bad, match.prompts)
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return (
        f'<tr><th scope="row"><b>{escape(match.first)}</b> against {escape(match.second)}</th>'
        f"<td>{_percent(match.rate)}{_span(match.interval)}</td>{cells}<td>{_p(match.p_value)}</td></tr>"
    )


def _ranking(found: Standings) -> str:
    if found.unranked is not None:
        return f'<section><h3>Ranking</h3><p class="quiet">Not yet: {escape(found.unranked)}.</p></section>'
    if found.ranking is None:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(found.contestants[index])}</th><td>{found.ranking.elo[index]:.0f}'
        f"{_span(found.ranking.elo_intervals[index], _whole)}</td><td>{found.ranking.games[index]}</td></tr>"
        for index in found.ranking.order
    )
    return (
        '<section><h3>Ranking</h3><p class="quiet">Bradley-Terry with ties (Davidson), on the Elo scale: mean 1500, '
        "400 points for ten to one. The order of the votes does not matter.</p>"
        '<div class="wide"><table class="narrow"><thead><tr><th></th><th>strength</th><th>votes</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _raters(found: Standings) -> str:
    facts = []
    if found.left is not None:
        share, span, count = found.left
        verdict = "no habit to be seen"
        if span is not None and not span[0] <= 0.5 <= span[1]:
            verdict = f"the {'left' if share > 0.5 else 'right'} side is preferred whatever it shows"
        facts.append(("Left side chosen", f"{_percent(share)}{_span(span)}", f"of {count} decided votes; {verdict}"))
    if found.agreement is not None:
        alpha, equal = found.agreement
        said = f"on {found.shared} shared pairs; two votes are equal in {_percent(equal)}"
        facts.append(("Agreement", f"{alpha:.2f}", f"Krippendorff&rsquo;s alpha, nominal, {said}"))
    else:
        facts.append(("Agreement", "&ndash;", "no pair has votes of two raters yet"))
    if found.seconds is not None:
        facts.append(("Time for a vote", f"{found.seconds:.1f}&nbsp;s", "median"))
    names = ", ".join(f"{escape(name)} {count}" for name, count in found.raters)
    facts.append(("Raters", str(len(found.raters)), names))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><p>{note}</p></div>" for name, value, note in facts)
    return f'<section><h3>Raters</h3><dl class="facts">{cells}</dl></section>'


def _train(steps: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f'<span class="note"># {escape(note)}</span>\n{escape(command)}' for note, command in steps)
    return (
        '<section><h3>Train on these votes</h3><div class="code"><button type="button" class="copy">Copy</button>'
        f"<pre>{lines}</pre></div></section>"
    )


def _span(interval: Interval | None, form: Callable[[float], str] | None = None) -> str:
    if interval is None:
        return "<small>one prompt: no interval</small>"
    low, high = ((form or _percent)(end).removesuffix("&nbsp;%") for end in interval)
    return f"<small>{low} to {high}</small>"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%"


def _p(value: float) -> str:
    return "&lt;&nbsp;0.0001" if value < 0.0001 else f"{value:.2g}"
