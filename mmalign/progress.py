"""How far, how fast, how much longer: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """A bar with rate and remaining time on stderr; a line now and then where stderr is no terminal.

    Args:
        total: how many there are to do.
        description: what is being done: "train".
        unit: what is counted: "step".
        initial: how many were done before; the rate counts from here.
        enabled: False on all processes but one.
        interval: seconds between lines where stderr is no terminal, as in a CI log.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        unit: str = "step",
        initial: int = 0,
        enabled: bool = True,
        interval: float = 10.0,
    ) -> None:
        self.total, self.done = total, initial
        self._initial, self._description, self._unit = initial, description, unit
        self._enabled, self._interval = enabled, interval
        self._start = self._last = time.monotonic()
        self._shown: dict[str, str] = {}
        self._closed = False
        self._bar = (
            tqdm(
                total=total,
                desc=description,
                unit=unit,
                initial=initial,
                dynamic_ncols=True,
            )
            if enabled and sys.stderr.isatty()
            else None
        )

    def update(self, count: int = 1, **shown: float | int | str) -> None:
        """Counts `count` more as done, and shows values beside: `update(loss=0.69)`."""
        self.done += count
        self._shown |= {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in shown.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last >= self._interval:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self._last = now
        rate = (self.done - self._initial) / max(now - self._start, 1e-9)
        parts = [f"{self._description}: {self.done}/{self.total}"]
        if self.total:
            parts[0] += f" ({100 * self.done // self.total} %)"
        if rate > 0:
            parts.append(f"{rate:.3g} {self._unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self._unit}")
            if self.done < self.total:
                parts.append(f"{_clock((self.total - self.done) / rate)} left")
            else:
                parts.append(f"took {_clock(now - self._start)}")
        parts += [f"{name} {value}" for name, value in self._shown.items()]
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar, or prints the last line; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self.done > self._initial:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def progress(items: Iterable[T], description: str, *, total: int | None = None, **options: Any) -> Iterator[T]:
    """The items, with their progress shown: `for batch in progress(batches, "encode", unit="batch")`.

    Args:
        items: what to go through.
        description: what is being done.
        total: how many there are; by default their length.
        options: as for `Progress`.
    """
    count = len(items) if total is None else total  # type: ignore[arg-type]  # without a length, total is due
    with Progress(count, description, **options) as shown:
        for item in items:
            yield item
            shown.update()


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
