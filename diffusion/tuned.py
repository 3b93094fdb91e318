"""Finds what was trained, given a run's folder or one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion import models, weights
from diffusion.models import DiffusionModel
from diffusion.recipe import TrainConfig
from mmalign import checkpoint as checkpoints
from mmalign import config as configuration
from mmalign import manifest
from mmalign.errors import UserError
from mmalign.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """A verified checkpoint of a run.

    Attributes:
        config: of the run; its model is the base that the weights belong to.
        checkpoint: folder of the checkpoint.
        manifest: what it says about itself.
        weights: folder in it: of the averaged weights where there are, which is what is judged and shared.
    """

    config: TrainConfig
    checkpoint: Path
    manifest: Manifest
    weights: Path

    @property
    def full(self) -> bool:
        """Whether the whole UNet was trained."""
        return self.config.adapter is None


def read_config(run: Path) -> TrainConfig:
    """The effective configuration that a run wrote when it started.

    Raises:
        UserError: there is none.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError("not the folder of a run: it has no config.yaml", place=str(run))
    return configuration.load(TrainConfig, file)


def find_tuned(path: Path, *, base: str | None = None) -> Tuned:
    """The checkpoint at `path`, or the newest good one of the run at `path`, every hash checked.

    Args:
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
    config = read_config(folder.parent)
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    chosen = inside if inside.parent == folder else folder / "model_ema"
    return Tuned(
        config=config,
        checkpoint=folder,
        manifest=manifest.read(folder),
        weights=chosen if chosen.is_dir() else folder / "model",
    )


def open_base(tuned: Tuned) -> DiffusionModel:
    """The base that the weights were trained on.

    Raises:
        UserError: what is at its path is another model.
    """
    model = models.load_model(tuned.config.model, train_full=tuned.full)
    if tuned.config.loop.init_from:
        weights.start_from(model, Path(tuned.config.loop.init_from))
    trained_on = str(tuned.manifest.summary.get("base", ""))
    # By content alone: a model may be moved or renamed.
    if trained_on.rpartition("@")[2] != model.identity.rpartition("@")[2]:
        raise UserError(
            f"trained on {trained_on}, but this base is {model.identity}",
            place=tuned.config.model.path,
            fix="Give the base it was trained on with --model.",
        )
    return model


def open_tuned(tuned: Tuned) -> DiffusionModel:
    """The base with the trained weights on it."""
    model = open_base(tuned)
    weights.open_weights(model, tuned.weights)
    return model
