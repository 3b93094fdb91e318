"""`mmalign train RECIPE [--accelerate PRESET] [key=value ...]`: which trainer a recipe is for, and how it starts.

Without `--accelerate` the trainer runs in this process. With it, this process becomes
`accelerate launch --config_file configs/accelerate/PRESET.yaml -m PACKAGE.train RECIPE key=value ...`, and
that command is printed, so that it can be typed, changed or put into a batch script.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from mmalign.cli import Parser, resolve
from mmalign.errors import UserError, nearest

TRAINERS = {"diffusion": "diffusion.train:main", "vlm": "vlm.train:main"}


def config_roots() -> list[Path]:
    """Where a config may be named without its path: `configs` of the working directory, then those that ship."""
    package = Path(__file__).resolve().parent
    return [Path("configs"), package.parent / "configs", package / "configs"]  # in a checkout; in a wheel


def find(name: str, folder: str = "") -> Path:
    """A config file by path, or by its name below one of the `config_roots`.

    Args:
        name: `my/recipe.yaml`, `configs/diffusion/dpo_shapes.yaml`, `diffusion/dpo_shapes`, or `fsdp2`.
        folder: the folder of a root in which a bare name is looked for, e.g. "accelerate".

    Raises:
        UserError: no such file; names the nearest one that ships.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    known: dict[str, Path] = {}
    for root in config_roots():
        for place in (root / f"{stem}.yaml", root / folder / f"{stem}.yaml"):
            if place.is_file():
                return place
        for file in (root / folder).rglob("*.yaml"):
            known.setdefault(file.relative_to(root / folder).with_suffix("").as_posix(), file)
    names = [shown for shown in known if folder or not shown.startswith("accelerate/")]
    hint = nearest(stem, names) if names else "No configs ship with this installation."
    raise UserError(f"no config '{name}'", fix=hint)


def package_of(recipe: Path) -> str:
    """Which trainer a recipe is for: its `package` key, else its folder's name (`diffusion/`, `vlm/`)."""
    try:
        with recipe.open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except yaml.YAMLError as error:
        line = (
            error.problem_mark.line + 1
            if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
            else "?"
        )
        raise UserError(
            "not valid YAML", place=f"{recipe}, line {line}", fix="Check the indentation."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe: {error}", place=str(recipe)) from error
    if not isinstance(content, dict):
        raise UserError("a recipe is a mapping of keys to values", place=str(recipe))
    package = content.get("package", recipe.resolve().parent.name)
    if package in TRAINERS:
        return str(package)
    if "package" in content:
        raise UserError(
            f"unknown package '{package}'", place=str(recipe), fix=nearest(str(package), TRAINERS)
        )
    raise UserError(
        "cannot tell what this recipe trains",
        place=str(recipe),
        fix="Add 'package: diffusion' or 'package: vlm'.",
    )


def command(preset: Path, package: str, recipe: Path, overrides: list[str]) -> list[str]:
    """What `--accelerate` runs. `--quiet`: a user's mistake stays one line, without the launcher's traceback."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(preset)]
    return [*launch, "-m", f"{package}.train", str(recipe), *overrides]


def _replace(words: list[str]) -> NoReturn:
    print(f"mmalign: {shlex.join(words)}", file=sys.stderr, flush=True)
    os.execv(words[0], words)  # signals and the exit code are the launcher's own


def main(argv: list[str]) -> int | None:
    """Start the trainer that the recipe names, here or through accelerate."""
    parser = Parser(
        prog="mmalign train", description="Train a recipe.", epilog="key=value changes a setting."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that ships")
    parser.add_argument(
        "--accelerate", metavar="PRESET", help="one_gpu, ddp, fsdp2, zero2, zero3, or your file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    arguments, overrides = parser.parse_known_args(argv)

    recipe = find(arguments.recipe)
    package = package_of(recipe)
    if arguments.accelerate:
        words = command(find(arguments.accelerate, "accelerate"), package, recipe, overrides)
        if not arguments.dry_run:
            _replace(words)
    else:
        words = [sys.executable, "-m", f"{package}.train", str(recipe), *overrides]
    if arguments.dry_run:
        print(shlex.join(words))
        return 0
    return resolve(TRAINERS[package])([str(recipe), *overrides])
