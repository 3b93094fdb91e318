"""Charts as inline SVG: no script, no font, no colour of their own: report.css gives `.c-...` a look.

Coordinates are those of the view box, in which text is 11 units high; a chart fills the width it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # margins: room for the axes' words
MOST_POINTS = 300  # drawn per line: a long run is averaged in bins of steps

Number = int | float  # said outright: tests check types at run time, where an int is no float
Point = tuple[Number, Number]


def lines(points: Sequence[Point], *, name: str, zero: Number | None = None, style: str = "arm-1") -> str:
    """A value over steps: every logged value faintly, their moving mean boldly.

    Args:
        points: (step, value), at least one, steps rising.
        name: what is drawn, for those who hear the page.
        zero: a value that means "nothing learned", drawn dashed: 0.5 for an accuracy.
        style: class of the lines.
    """
    raw = _binned(points)
    smooth = _moving_mean(raw)
    values = [value for _, value in raw] + ([] if zero is None else [zero])
    x = _Axis(raw[0][0], raw[-1][0], LEFT, WIDTH - RIGHT, whole=True)
    y = _Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, room=0.06)
    parts = [_frame(x, y, across="step")]
    if zero is not None:
        parts.append(_line(LEFT, y(zero), WIDTH - RIGHT, y(zero), "c-zero"))
    for path, kind in ((raw, "c-raw"), (smooth, "c-smooth")):
        if len(path) == 1:
            parts.append(f'<circle class="c-dot {style}" cx="{_n(x(path[0][0]))}" cy="{_n(y(path[0][1]))}" r="3"/>')
        else:
            places = " ".join(f"{_n(x(a))},{_n(y(b))}" for a, b in path)
            parts.append(f'<polyline class="{kind} {style}" points="{places}"/>')
    first, last = smooth[0][1], smooth[-1][1]
    return _svg(parts, f"{name}: from {label(first)} to {label(last)} over {len(points)} logged steps", HEIGHT)


def tracks(
    series: Sequence[tuple[str, Sequence[Point], str]],
    *,
    name: str,
    zero: Number | None = None,
    mark: Number | None = None,
) -> str:
    """Several values over the same steps, each logged value a dot, with a legend below.

    Args:
        series: (label, (step, value) with steps rising, class), at least one, each with at least one point.
        name: what is drawn, for those who hear the page.
        zero: a value to compare with, drawn dashed.
        mark: a step to point out, drawn as a dashed upright line.
    """
    steps = [step for _, points, _ in series for step, _ in points] + ([] if mark is None else [mark])
    values = [value for _, points, _ in series for _, value in points] + ([] if zero is None else [zero])
    x = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT, whole=True)
    y = _Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, room=0.06)
    parts = [_frame(x, y, across="step")]
    if zero is not None:
        parts.append(_line(LEFT, y(zero), WIDTH - RIGHT, y(zero), "c-zero"))
    if mark is not None:
        parts.append(_line(x(mark), TOP, x(mark), HEIGHT - BOTTOM, "c-zero"))
    for index, (row, points, style) in enumerate(series):
        places = [f"{_n(x(step))},{_n(y(value))}" for step, value in points]
        parts.append(f'<polyline class="c-smooth {style}" points="{" ".join(places)}"/>')
        for place in places:
            across, up = place.split(",")
            parts.append(f'<circle class="c-dot {style}" cx="{across}" cy="{up}" r="2.5"/>')
        if len(series) > 1:
            middle = HEIGHT + 8 + 16 * index
            parts.append(f'<circle class="c-dot {style}" cx="{LEFT + 4}" cy="{middle}" r="4"/>')
            parts.append(_text(LEFT + 14, middle + 4, row if len(row) <= 44 else row[:43] + "…", "start", "c-name"))
    told = "; ".join(f"{row} from {label(points[0][1])} to {label(points[-1][1])}" for row, points, _ in series)
    marked = "" if mark is None else f"; stopped at step {label(mark)}"
    return _svg(parts, f"{name}: {told}{marked}", HEIGHT + (16 * len(series) + 4 if len(series) > 1 else 0))


def forest(
    rows: Sequence[tuple[str, Number, Point, str]],
    *,
    blind: Number,
    name: str,
    across: str = "win rate against the base",
) -> str:
    """Win rates with their intervals around one half, on an axis from 0 to 100 %.

    Args:
        rows: (label, win rate, interval, class), top to bottom.
        blind: win rates this near to one half are too small to be found with this many prompts; shaded.
        name: what is drawn, for those who hear the page.
        across: the words below the axis.
    """
    step, foot = 44, 34
    height = step * len(rows) + foot + 6
    floor = height - foot
    x = _Axis(0.0, 1.0, 24, WIDTH - 24)
    low, high = x(max(0.0, 0.5 - blind)), x(min(1.0, 0.5 + blind))
    parts = [f'<rect class="c-blind" x="{_n(low)}" y="4" width="{_n(high - low)}" height="{_n(floor - 4)}"/>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(x(tick), 4, x(tick), floor, "c-zero" if tick == 0.5 else "c-grid"))
        parts.append(_text(x(tick), floor + 14, f"{100 * tick:.0f} %", "middle"))
    parts.append(_text(WIDTH / 2, height - 5, across, "middle", "c-name"))
    for index, (row, rate, (lower, upper), style) in enumerate(rows):
        middle = 6 + step * index + 29
        shown = row if len(row) <= 44 else row[:43] + "…"
        parts.append(_text(26, middle - 13, shown, "start", "c-name"))
        parts.append(_line(x(lower), middle, x(upper), middle, f"c-whisker {style}"))
        parts += [_line(x(end), middle - 5, x(end), middle + 5, f"c-whisker {style}") for end in (lower, upper)]
        parts.append(f'<circle class="c-dot {style}" cx="{_n(x(rate))}" cy="{_n(middle)}" r="4.5"/>')
    told = "; ".join(f"{row} {100 * rate:.1f} % ({100 * a:.1f} to {100 * b:.1f})" for row, rate, (a, b), _ in rows)
    return _svg(parts, f"{name}: {told}", height)


def shifts(rows: Sequence[tuple[str, Number, Point, str]], *, across: str, name: str) -> str:
    """Changes with their intervals around none.

    Args:
        rows: (label, change, interval, class), top to bottom, at least one.
        across: the words below the axis.
        name: what is drawn, for those who hear the page.
    """
    step, foot = 44, 34
    height = step * len(rows) + foot + 6
    floor = height - foot
    ends = [end for _, _, interval, _ in rows for end in interval]
    x = _Axis(min(0.0, *ends), max(0.0, *ends), 24, WIDTH - 24, room=0.04)
    parts = []
    for tick in x.ticks():
        parts.append(_line(x(tick), 4, x(tick), floor, "c-zero" if tick == 0 else "c-grid"))
        parts.append(_text(x(tick), floor + 14, label(tick), "middle"))
    parts.append(_text(WIDTH / 2, height - 5, across, "middle", "c-name"))
    for index, (row, change, (lower, upper), style) in enumerate(rows):
        middle = 6 + step * index + 29
        parts.append(_text(26, middle - 13, row if len(row) <= 44 else row[:43] + "…", "start", "c-name"))
        parts.append(_line(x(lower), middle, x(upper), middle, f"c-whisker {style}"))
        parts += [_line(x(end), middle - 5, x(end), middle + 5, f"c-whisker {style}") for end in (lower, upper)]
        parts.append(f'<circle class="c-dot {style}" cx="{_n(x(change))}" cy="{_n(middle)}" r="4.5"/>')
    told = "; ".join(f"{row} {label(change)} ({label(a)} to {label(b)})" for row, change, (a, b), _ in rows)
    return _svg(parts, f"{name}: {told}", height)


def histogram(differences: Sequence[Number], *, name: str, across: str, style: str = "arm-1") -> str:
    """How much better or worse each unit became: bars around a bin that is centred on no change.

    Args:
        differences: tuned minus base, at least one.
        name: what is drawn, for those who hear the page.
        across: the words below the axis.
        style: class of the bars where the tuned one is better.
    """
    reach = max(map(abs, differences)) or 1.0
    side = 12  # bins on either side of the middle one
    width = 2 * reach / (2 * side)
    counts = [0] * (2 * side + 1)
    for difference in differences:
        counts[side + max(-side, min(side, round(difference / width)))] += 1
    edge = (side + 0.5) * width
    x = _Axis(-edge, edge, LEFT, WIDTH - RIGHT)
    y = _Axis(0, max(counts), HEIGHT - BOTTOM, TOP, room=0.06, whole=True)
    parts = [_frame(x, y, across=across)]
    for index, count in enumerate(counts):
        if count:
            left, right = x((index - side - 0.5) * width), x((index - side + 0.5) * width)
            kind = "c-worse" if index < side else "c-same" if index == side else f"c-better {style}"
            parts.append(
                f'<rect class="{kind}" x="{_n(left + 0.5)}" y="{_n(y(count))}" '
                f'width="{_n(right - left - 1)}" height="{_n(y(0) - y(count))}"/>'
            )
    parts.append(_line(x(0), TOP, x(0), HEIGHT - BOTTOM, "c-zero"))
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    told = f"{name}: {better} better, {worse} worse, {len(differences) - better - worse} the same"
    return _svg(parts, told, HEIGHT)


def label(value: Number) -> str:
    """A number as short as an axis wants it, with a true minus: 0.05, −1500, 2e−6."""
    rounded = 0.0 if abs(value) < 1e-12 else value
    text = f"{rounded:.0f}" if 1000 <= abs(rounded) < 1e6 else f"{rounded:.3g}"
    return text.replace("e+0", "e").replace("e-0", "e-").replace("-", "\u2212")


def ticks(low: Number, high: Number, most: int = 5, *, whole: bool = False) -> list[Number]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `most` + 1 of them."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(size for factor in (1, 2, 5, 10) if (size := factor * power) >= span / most * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """A map from values to view-box units, with room beyond the extremes as a share of the span."""

    def __init__(
        self, low: Number, high: Number, start: Number, end: Number, *, room: Number = 0.0, whole: bool = False
    ) -> None:
        if high == low:
            spread = abs(low) * 0.1 or 1.0
            low, high = (0.0, high + spread) if whole else (low - spread, high + spread)
        extra = room * (high - low)
        self.low, self.high = (low if whole else low - extra), high + extra
        self._start, self._end, self._whole = start, end, whole

    def __call__(self, value: Number) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self, most: int = 5) -> list[Number]:
        return ticks(self.low, self.high, most, whole=self._whole)


def _frame(x: _Axis, y: _Axis, *, across: str) -> str:
    """Axes, grid and their numbers."""
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks():
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "c-grid"))
        parts.append(_text(LEFT - 5, y(tick) + 4, label(tick), "end"))
    for tick in x.ticks():
        parts.append(_line(x(tick), floor, x(tick), floor + 4, "c-axis"))
        parts.append(_text(x(tick), floor + 15, label(tick), "middle"))
    parts.append(_line(LEFT, floor, WIDTH - RIGHT, floor, "c-axis"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, across, "middle", "c-name"))
    return "".join(parts)


def _binned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def _moving_mean(points: Sequence[Point]) -> list[Point]:
    """Centred, over about a tenth of the points; at the ends over those of them that there are."""
    reach = len(points) // 20
    smooth = []
    for index, (step, _) in enumerate(points):
        window = points[max(0, index - reach) : index + reach + 1]
        smooth.append((step, fmean(value for _, value in window)))
    return smooth


def _svg(parts: Sequence[str], told: str, height: Number) -> str:
    box = f'viewBox="0 0 {WIDTH} {_n(height)}"'
    return f'<svg {box} role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'


def _line(x1: Number, y1: Number, x2: Number, y2: Number, style: str) -> str:
    return f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _text(x: Number, y: Number, text: str, anchor: str, style: str = "c-tick") -> str:
    return f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _n(value: Number) -> str:
    return f"{value:.1f}".removesuffix(".0")
