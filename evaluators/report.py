"""Writes what an evaluation found: report.json for programs, report.html for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from evaluators.charts import Point
from evaluators.overoptimisation import FILE, read_history
from evaluators.page import render
from evaluators.results import Arm, Report, as_json, headline, measured
from mmalign.errors import UserError

__all__ = ["Arm", "Report", "headline", "measured", "write_report"]

JSON, HTML = "report.json", "report.html"
LARGEST = 1e100  # values of a curve beyond this are a divergence, which has no axis


def write_report(folder: Path, report: Report) -> Path:
    """Writes report.json and report.html into `folder`, each whole or not at all.

    What was seen of an arm's over-optimisation is read beside its `curves`, where the run had a watch.

    Returns:
        The page.

    Raises:
        UserError: a number is not finite, a metrics file is missing, it or a watch's is damaged, or the folder
            cannot be written.
    """
    watches = {name: read_history(arm.curves.with_name(FILE)) for name, arm in report.arms.items() if arm.curves}
    watches = {name: history for name, history in watches.items() if history}
    text = json.dumps(as_json(report, watches), allow_nan=False, indent=1, sort_keys=True) + "\n"
    curves = {name: read_metrics(arm.curves) for name, arm in report.arms.items() if arm.curves is not None}
    page = render(report, curves, watches)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / JSON, text)
        _write(folder / HTML, page)
    except OSError as error:
        raise UserError(
            f"cannot write the report: {error.strerror}",
            place=str(error.filename or folder),
            fix="Free some space or choose another folder.",
        ) from error
    return folder / HTML


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """(step, value) of every number in a metrics.jsonl, by name.

    Left out are a last line that was cut short, and values too large to draw.

    Raises:
        UserError: there is no such file, or a line is not one of ours.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the metrics of a run: {error.strerror}",
            place=str(path),
            fix="Train this arm again, or report it without curves.",
        ) from error
    logged: dict[str, list[Point]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values: dict[str, Any] = json.loads(line, parse_constant=lambda _: None)
            step = int(values["step"])
            numbers = {k: float(v) for k, v in values.items() if type(v) in (int, float)}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(
                "not a line of metrics",
                place=f"{path}:{number}",
                fix="Train this arm again, or report it without curves.",
            ) from error
        for name in numbers.keys() - {"step", "time"}:
            if abs(numbers[name]) < LARGEST:  # not for nan and infinity
                logged.setdefault(name, []).append((step, numbers[name]))
    return {name: sorted(values) for name, values in logged.items()}
