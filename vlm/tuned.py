"""Opens what was trained, given a run's folder or one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from mmalign import runs
from vlm import weights
from vlm.models import VisionLanguageModel, open_model
from vlm.recipe import TrainConfig

Tuned = runs.Tuned[TrainConfig]


def find_tuned(path: Path, *, base: str | None = None) -> Tuned:
    """The checkpoint at `path`, or the newest good one of the run at `path`; see `mmalign.runs.find`."""
    return runs.find(TrainConfig, path, base=base)


def open_base(tuned: Tuned) -> VisionLanguageModel:
    """The base that the weights were trained on.

    Raises:
        UserError: what is at its path is another model.
    """
    model = open_model(tuned.config.model, train_full=tuned.config.adapter is None)
    if tuned.config.loop.init_from:
        weights.start_from(model, Path(tuned.config.loop.init_from))
    runs.check_base(tuned, model.identity)
    return model


def open_tuned(tuned: Tuned) -> VisionLanguageModel:
    """The base with the trained weights on it."""
    model = open_base(tuned)
    weights.open_weights(model, tuned.weights)
    return model
