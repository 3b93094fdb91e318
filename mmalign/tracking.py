"""What a run writes down while it goes: metrics and sample pictures.

    run/metrics.jsonl              a line per logged step: {"step": 10, "time": 1712.3, "loss": 0.69, ...}
    run/tensorboard/               event files
    run/samples/<name>-<step>.png  grids with captions

One process writes; on the others a `Tracker` is made with `enabled=False` and does nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from PIL import Image

from mmalign.errors import UserError, nearest
from mmalign.pictures import grid

TRACKERS = ("jsonl", "tensorboard", "wandb")
METRICS = "metrics.jsonl"

Value = float | int | str | None


class _Sink(Protocol):
    def log(self, step: int, values: Mapping[str, Value]) -> None: ...

    def image(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes metrics and pictures to every tracker asked for.

    Args:
        directory: folder of the run; made if need be.
        trackers: any of `TRACKERS`; metrics.jsonl is written in any case.
        resume_step: the step of the checkpoint that the run goes on from: lines of later steps are taken
            back, for those will be logged again. None for a new run; the log of an earlier one is renamed.
        config: the effective configuration, for trackers that show it.
        enabled: False on all processes but one.

    Raises:
        UserError: a tracker is unknown or not installed, or the log that is to go on is damaged.
    """

    def __init__(
        self,
        directory: Path,
        trackers: Sequence[str] = ("jsonl", "tensorboard"),
        resume_step: int | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.directory = directory
        self._sinks: list[_Sink] = []
        self._enabled = enabled
        for name in trackers:
            if name not in TRACKERS:
                raise UserError(f"unknown tracker '{name}'", place="loop.trackers", fix=nearest(name, TRACKERS))
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        try:
            # The log comes last: it is not touched for a run that another tracker keeps from starting.
            if "wandb" in trackers:
                self._sinks.append(_WandB(directory, resume_step, config or {}))
            if "tensorboard" in trackers:
                self._sinks.append(_TensorBoard(directory, resume_step))
            self._sinks.append(_JsonLines(directory, resume_step))
        except BaseException:
            self.close()
            raise

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers (or tensors of one element, or text) of a step."""
        if self._enabled:
            plain = {name: _plain(value) for name, value in values.items()}
            for sink in self._sinks:
                sink.log(step, plain)

    def images(
        self, step: int, name: str, images: Sequence[Image.Image], captions: Sequence[str] | None = None
    ) -> Path | None:
        """Writes pictures as one grid, `samples/<name>-<step>.png`, and hands it to the other trackers.

        Returns:
            The file; None where the tracker is not enabled.
        """
        if not self._enabled:
            return None
        sheet = grid(images, captions)
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).lstrip('.')}-{step:08d}.png"
        sheet.save(path)
        for sink in self._sinks:
            sink.image(step, name, sheet)
        return path

    def close(self) -> None:
        """Ends every tracker; a second call does nothing."""
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: Any) -> Value:
    if value is None or isinstance(value, (str, int)):
        return value
    return float(value)


class _JsonLines:
    def __init__(self, directory: Path, resume_step: int | None) -> None:
        path = directory / METRICS
        if resume_step is not None:
            rewind(path, resume_step)
        elif path.exists():
            number = 1
            while (earlier := path.with_name(f"metrics-earlier-{number}.jsonl")).exists():
                number += 1
            path.rename(earlier)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        # JSON has no nan: null, rather than a line that only some readers take.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        self._file.close()


def rewind(path: Path, step: int) -> None:
    """Takes back the lines of later steps from a metrics file, and a last line that was cut short.

    Raises:
        UserError: a line that is not the last is not one of ours.
    """
    if not path.exists():
        return
    kept: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            logged = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # the process died while it wrote
                break
            raise UserError(
                "not a line of metrics",
                place=f"{path}:{number}",
                fix="Move the file away; a new one is begun.",
            ) from error
        if logged <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class _TensorBoard:
    def __init__(self, directory: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tensorboard is not installed",
                place="loop.trackers",
                fix="Run `pip install tensorboard`, or leave it out: loop.trackers=[jsonl].",
            ) from error
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, directory: Path, resume_step: int | None, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb is not installed",
                place="loop.trackers",
                fix="Run `pip install wandb`, or leave it out: loop.trackers=[jsonl,tensorboard].",
            ) from error
        self._wandb = wandb
        kept = directory / "wandb-run"  # the run's id, so that a resumed run is the same one there
        known = kept.read_text().strip() if resume_step is not None and kept.is_file() else None
        try:
            self._run = wandb.init(
                project="mmalign", name=directory.name, dir=str(directory), id=known, resume="allow",
                config=dict(config),
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(
                f"wandb would not start: {error}",
                place="loop.trackers",
                fix="Run `wandb login`, set WANDB_MODE=offline, or leave wandb out.",
            ) from error
        kept.write_text(self._run.id)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
