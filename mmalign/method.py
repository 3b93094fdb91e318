"""What a method is, and how one is found: by the name of its file in `<package>/methods/`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError, nearest
from mmalign.losses import accuracy

Metrics: TypeAlias = Mapping[str, Tensor]
"""Named 0-d tensors, detached, left on their device: nothing is copied to the host until a line is logged."""


@runtime_checkable
class Method(Protocol):
    """An alignment method. It makes losses; the loop alone backpropagates, clips, steps, logs and saves.

    A method's file defines `Options`, a `mmalign.config.Settings`, and `build(options, parts) -> Method`, where
    `parts` is what its package's trainer offers (policy, reference, noise schedule, ...).
    """

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start: what the options come to."""
        ...

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The batches to train on. Offline methods pass the source through; online ones roll out, score and replay."""
        ...

    def passes(self, batch: Any) -> int:
        """How many losses `losses` will yield: known beforehand so that processes synchronise on the last only."""
        ...

    def losses(self, batch: Any) -> Iterator[tuple[Tensor, Metrics]]:
        """One loss, or several whose gradients add up; each is backpropagated before the next is made."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart besides weights and optimizer: snapshots, buffers, running baselines."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        ...


def reward_metrics(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> dict[str, Tensor]:
    """Means of implicit rewards under the field's names."""
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = chosen - rejected
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": margin.mean(),
        "rewards/margins_abs": margin.abs().mean(),
        "rewards/accuracies": accuracy(margin).mean(),
    }


class OneLoss:
    """The part of the protocol that is the same for every offline method with one loss and no state of its own."""

    def describe(self) -> dict[str, str]:
        return {}

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        return iter(source)

    def passes(self, batch: Any) -> int:
        return 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


def known(package: str) -> list[str]:
    """The methods of a package: the names of the files in its `methods` folder."""
    spec = importlib.util.find_spec(f"{package}.methods")
    folders = spec.submodule_search_locations if spec else None
    return sorted(path.stem for folder in folders or () for path in Path(folder).glob("[a-z]*.py"))


def load(package: str, name: str) -> Any:
    """The module of a method: `load("diffusion", "dpo")` is `diffusion/methods/dpo.py`.

    Raises:
        UserError: there is no such file.
    """
    if name not in known(package):
        raise UserError(f"no method '{name}' in {package}", place="method.name", fix=nearest(name, known(package)))
    return importlib.import_module(f"{package}.methods.{name}")
