"""Where the reference policy's scores come from: adapters switched off, a frozen copy, or a cache of either.

A *score* is what a method compares between policy and reference, one row per item: an error per picture, a
log-probability per token. `score(keys, compute)` returns the reference's rows; `compute(module)` makes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign.errors import UserError

Compute = Callable[[nn.Module], Tensor]
Made = TypeVar("Made")


@runtime_checkable
class Reference(Protocol):
    """A source of reference scores."""

    def score(self, keys: Sequence[str], compute: Compute) -> Tensor:
        """The reference's scores, one row per key, without a graph.

        Args:
            keys: names what each row is a score of, draws included; equal keys mean equal scores.
            compute: makes all the rows from a module with the reference's weights.
        """
        ...

    def run(self, compute: Callable[[nn.Module], Made]) -> Made:
        """Whatever else the reference makes, without a graph; nothing of it is kept."""
        ...


@contextlib.contextmanager
def layers_disabled(layers: Sequence[Any]) -> Iterator[None]:
    """The base model inside the block, the adapted one again after it, whatever happens there.

    Args:
        layers: peft's adapter layers of the model.

    Raises:
        ValueError: there are none, so that the "reference" would be the policy.
    """
    if not layers:
        raise ValueError("the model has no adapter to disable")
    # Not peft's enable_adapters: it also flips requires_grad, under the feet of DDP, FSDP and the optimizer.
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


class AdaptersOff:
    """The trained module itself with its adapters switched off: no second copy of the weights.

    Args:
        module: as the policy calls it (possibly wrapped for several processes).
        disabled: switches the adapters off inside its block and back on whatever happens there.
    """

    def __init__(self, module: nn.Module, disabled: Callable[[], AbstractContextManager[None]]) -> None:
        self._module, self._disabled = module, disabled

    def score(self, keys: Sequence[str], compute: Compute) -> Tensor:
        return self.run(compute)

    def run(self, compute: Callable[[nn.Module], Made]) -> Made:
        with torch.no_grad(), self._disabled():
            return compute(self._module)


class FrozenCopy:
    """A second module that never changes: for full fine-tuning.

    Args:
        module: with the reference's weights.
        autocast: puts its forwards under the precision that the policy's run in, so that equal weights score equally.
    """

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        self._module, self._autocast = module.requires_grad_(False).eval(), autocast

    def score(self, keys: Sequence[str], compute: Compute) -> Tensor:
        return self.run(compute)

    def run(self, compute: Callable[[nn.Module], Made]) -> Made:
        with torch.no_grad(), self._autocast():
            return compute(self._module)


class Cached:
    """Scores of another reference, kept in memory and on disk.

    Exact, because a key names every draw its score depends on. Rows that are missing are computed with their batch,
    so a first pass costs what it costs without a cache and every later pass, in this run or another, costs nothing.

    Args:
        inner: computes what is not here yet.
        folder: holds one file per process; its name must identify base weights, data and draws.
        device: where scores are kept and returned.
        rank: of this process: each writes a file of its own and reads everybody's.
    """

    def __init__(self, inner: Reference, folder: Path, *, device: torch.device | str = "cpu", rank: int = 0) -> None:
        self._inner, self._folder, self._rank = inner, folder, rank
        self._rows: dict[str, Tensor] = {}
        self.hits, self.misses = 0, 0
        for file in sorted(folder.glob("scores-*.safetensors")):
            self._rows.update(_read(file, torch.device(device)))
        self._saved = len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def score(self, keys: Sequence[str], compute: Compute) -> Tensor:
        if all(key in self._rows for key in keys):
            self.hits += len(keys)
            return torch.stack([self._rows[key] for key in keys])
        self.misses += len(keys)
        rows = self._inner.score(keys, compute).detach()
        self._rows.update(zip(keys, rows, strict=True))
        return rows

    def run(self, compute: Callable[[nn.Module], Made]) -> Made:
        return self._inner.run(compute)

    def save(self) -> None:
        """Write what is new, aside and renamed. The trainer calls it with every checkpoint.

        Raises:
            UserError: it cannot be written.
        """
        if len(self._rows) == self._saved:
            return
        keys = sorted(self._rows)
        final = self._folder / f"scores-{self._rank:04d}.safetensors"
        aside = final.with_suffix(f".tmp-{os.getpid()}")
        table = torch.stack([self._rows[key].cpu() for key in keys])
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({"scores": table}, aside, metadata={"keys": json.dumps(keys)})
            aside.replace(final)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise UserError(
                f"cannot keep the reference scores: {error}",
                place=str(self._folder),
                fix="Free some space or train without reference.cache; the run's checkpoint is written.",
            ) from error
        self._saved = len(self._rows)


def _read(file: Path, device: torch.device) -> dict[str, Tensor]:
    """The rows of one cache file; none when it is damaged, since they can be computed again."""
    try:
        with safe_open(file, framework="pt") as opened:
            keys = json.loads(opened.metadata()["keys"])
            table = opened.get_tensor("scores").to(device)
        return dict(zip(keys, table, strict=True))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"mmalign: warning: {file} is damaged and is made again: {error}", file=sys.stderr)
        return {}
