"""Saved weights as every package reads them: safetensors only, and an adapter that fits the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmalign.errors import UserError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        UserError: it is not there, damaged, or of another format.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights cannot be read: {error}", place=str(file), fix="Use an earlier checkpoint"
        ) from error


def check_adapter(config: Path, settings: Iterable[tuple[str, object, object]]) -> None:
    """Refuse an adapter that was saved with other settings.

    Args:
        config: its configuration file, for the message.
        settings: (name, as saved, as in this run) of each.
    """
    for name, there, here in settings:
        if there != here:
            raise UserError(
                f"the adapter was saved with {name} {there}, this run has {name} {here}",
                place=f"{config}, adapter.{name}",
                fix=f"Resume with adapter.{name} as saved, or start a new run with loop.init_from",
            )
