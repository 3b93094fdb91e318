"""Finds what was trained, given a run's folder or one of its checkpoints: the same for every package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmalign import checkpoint as checkpoints
from mmalign import config as configuration
from mmalign import manifest
from mmalign.config import LoopSettings, Settings
from mmalign.errors import UserError
from mmalign.launch import package_of
from mmalign.manifest import Manifest

C = TypeVar("C", bound=Settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned(Generic[C]):
    """A verified checkpoint of a run.

    Attributes:
        config: of the run; its model is the base that the weights belong to.
        checkpoint: folder of the checkpoint.
        manifest: what it says about itself.
        weights: folder in it: of the averaged weights where there are, which is what is judged and shared.
    """

    config: C
    checkpoint: Path
    manifest: Manifest
    weights: Path


def read_config(cls: type[C], run: Path) -> C:
    """The effective configuration that a run wrote when it started.

    Raises:
        UserError: there is none.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError("not the folder of a run: it has no config.yaml", place=str(run))
    return configuration.load(cls, file)


def package(path: Path) -> str:
    """Which package trained what is at `path`: a run's folder, a checkpoint, or the `model` folder in one.

    Raises:
        UserError: no run.
    """
    inside = path.resolve()
    for folder in (inside, *inside.parents[:2]):
        if path.is_dir() and (folder / "config.yaml").is_file():
            return package_of(folder / "config.yaml")
    cause = "not the folder of a run: it has no config.yaml" if path.is_dir() else "no such folder"
    raise UserError(cause, place=str(path), fix="Give a run's folder or a checkpoint in it.")


def find(cls: type[C], path: Path, *, base: str | None = None) -> Tuned[C]:
    """The checkpoint at `path`, or the newest good one of the run at `path`, every hash checked.

    Args:
        cls: of the package's recipes, with a `model` section.
        path: a run's folder, a checkpoint, or the `model` folder in one.
        base: where the base model is now, if not where it was during training.

    Raises:
        UserError: nothing there, not a checkpoint, a damaged one, or one taken out of its run's folder.
    """
    if not path.exists():
        raise UserError("no such checkpoint", place=str(path), fix="Give a run's folder or a checkpoint in it.")
    if not path.is_dir():
        raise UserError("a file, not a checkpoint", place=str(path), fix="Give a run's folder or a checkpoint in it.")
    inside = path.resolve()
    folder = next((p for p in (inside, inside.parent) if (p / manifest.NAME).is_file()), None)
    if folder is None:
        found = checkpoints.latest(path)
        if found.path is None:
            why = "; ".join(found.warnings) or "not a checkpoint, and no run with checkpoints"
            raise UserError(why, place=str(path), fix="Give a run's folder or a checkpoint in it.")
        folder = found.path
    elif (problem := manifest.problem(folder)) is not None:
        raise UserError(problem, place=str(folder), fix="Use another checkpoint.")
    config: Any = read_config(cls, folder.parent)
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    chosen = inside if inside.parent == folder else folder / "model_ema"
    return Tuned(
        config=config,
        checkpoint=folder,
        manifest=manifest.read(folder),
        weights=chosen if chosen.is_dir() else folder / "model",
    )


def pinned(loop: LoopSettings) -> LoopSettings:
    """A run in `init_from` as that run's newest good checkpoint, whatever becomes of it later.

    Raises:
        UserError: the run has none.
    """
    if loop.init_from is None or not (Path(loop.init_from) / "config.yaml").is_file():
        return loop
    found = checkpoints.latest(Path(loop.init_from))
    if found.path is None:
        why = "; ".join(found.warnings) or "no checkpoint to start from"
        raise UserError(why, place=f"loop.init_from={loop.init_from}", fix="Train that run first.")
    return loop.model_copy(update={"init_from": str(found.path)})


def check_base(tuned: Tuned[Any], identity: str) -> None:
    """Refuse a base that the weights were not trained on.

    Args:
        identity: of the model at the base's path, `name@fingerprint`; compared by content, for a model may be moved
            or renamed.
    """
    trained_on = str(tuned.manifest.summary.get("base", ""))
    if trained_on.rpartition("@")[2] != identity.rpartition("@")[2]:
        raise UserError(
            f"trained on {trained_on}, but this base is {identity}",
            place=tuned.config.model.path,
            fix="Give the base it was trained on with --model.",
        )
