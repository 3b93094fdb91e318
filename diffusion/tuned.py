"""Opens what was trained, given a run's folder or one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from diffusion import models, weights
from diffusion.models import DiffusionModel
from diffusion.recipe import TrainConfig
from mmalign import runs

Tuned = runs.Tuned[TrainConfig]


def read_config(run: Path) -> TrainConfig:
    """The effective configuration that a run wrote when it started; see `mmalign.runs.read_config`."""
    return runs.read_config(TrainConfig, run)


def find_tuned(path: Path, *, base: str | None = None) -> Tuned:
    """The checkpoint at `path`, or the newest good one of the run at `path`; see `mmalign.runs.find`."""
    return runs.find(TrainConfig, path, base=base)


def open_base(tuned: Tuned) -> DiffusionModel:
    """The base that the weights were trained on.

    Raises:
        UserError: what is at its path is another model.
    """
    model = models.load_model(tuned.config.model, train_full=tuned.config.adapter is None)
    if tuned.config.loop.init_from:
        weights.start_from(model, Path(tuned.config.loop.init_from))
    runs.check_base(tuned, model.identity)
    return model


def open_tuned(tuned: Tuned) -> DiffusionModel:
    """The base with the trained weights on it."""
    model = open_base(tuned)
    weights.open_weights(model, tuned.weights)
    return model
