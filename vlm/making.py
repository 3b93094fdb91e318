"""Makes a recipe's preference store where there is none: `mmalign data make RECIPE [key=value ...]`.

The recipe's `make` section names a file of `vlm/makers`; training makes the store too, when it is not there yet.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmalign import config as configuration
from mmalign.cli import Parser, run_entry
from mmalign.config import NamedSection
from mmalign.errors import UserError, nearest
from mmalign.loop import processes
from mmalign.preferences import Store
from vlm.models import VisionLanguageModel, open_model
from vlm.recipe import TrainConfig


def known() -> list[str]:
    """The makers: the names of the files in `vlm/makers`."""
    return sorted(path.stem for path in (Path(__file__).parent / "makers").glob("[a-z]*.py"))


def load(name: str) -> Any:
    """The module of a maker.

    Raises:
        UserError: there is no such file.
    """
    if name not in known():
        raise UserError(f"no way to make data is called '{name}'", place="make.name", fix=nearest(name, known()))
    return importlib.import_module(f"vlm.makers.{name}")


def ensure_store(config: TrainConfig, model: Callable[[], VisionLanguageModel]) -> None:
    """Make the preference store when the recipe says how and it is not there yet.

    Args:
        model: opens the recipe's model; called where the maker needs one.
    """
    if config.make is None or config.data.path.exists():
        return
    with processes().main_process_first():
        if not config.data.path.exists():
            make_store(config.make, config.data.path, model)


def make_store(section: NamedSection, path: Path, model: Callable[[], VisionLanguageModel]) -> Store:
    """Write the store at `path`; complete or not at all.

    Raises:
        UserError: no such maker, wrong options, or what the maker itself refuses.
    """
    maker = load(section.name)
    options = configuration.parse_section(maker.Options, section, "make")

    @functools.cache
    def opened() -> VisionLanguageModel:
        found = model()
        found.network.to(processes().device)
        return found

    return Store.write(maker.records(options, opened), path, scorers=getattr(maker, "SCORERS", None))


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign data make`, `python -m vlm.making`."""
    parser = Parser(prog="mmalign data make", description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that ships")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a setting: make.count=500")
    said = parser.parse_args(argv)
    config = configuration.load(TrainConfig, said.recipe, said.overrides)
    if config.make is None:
        raise UserError(
            "the recipe does not say how its data are made",
            place="make",
            fix=f"Add make.name; known: {', '.join(known())}",
        )
    store = make_store(config.make, config.data.path, functools.partial(open_model, config.model))
    print(f"{store.path}: {len(store)} records made by {config.make.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
