"""`mmalign train RECIPE [--accelerate PRESET] [key=value ...]`: which trainer a recipe is for, and its start.

Without `--accelerate` the trainer runs in this process. With it, this process becomes
`accelerate launch --config_file configs/accelerate/PRESET.yaml -m PACKAGE.train RECIPE key=value ...`, and
that command is printed, so that it can be typed, changed or put into a batch script.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmalign.cli import Parser, resolve
from mmalign.errors import UserError, nearest
from mmalign.recipes import find, shipped

TRAINERS = {"diffusion": "diffusion.train:main", "vlm": "vlm.train:main", "evaluators": "evaluators.train:main"}


def preset(name: str) -> Path:
    """A launch preset: a file of the user's, or one of `configs/accelerate/` by name.

    Raises:
        UserError: there is neither, or the file is no preset.
    """
    if Path(name).is_file():
        _mapping(Path(name), "launch preset")
        return Path(name)
    ours = {key.partition("/"): path for key, path in shipped().items()}
    known = {leaf: path for (folder, _, leaf), path in ours.items() if folder == "accelerate"}
    if name not in known:
        raise UserError(f"no launch preset '{name}'", place="--accelerate", fix=nearest(name, known))
    return known[name]


def _mapping(path: Path, what: str) -> tuple[dict[str, object], dict[str, str]]:
    """The keys of a YAML file, and where each stands."""
    from mmalign import yamltext

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what}: {error}", place=str(path)) from error
    content, places = yamltext.parse(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"a {what} is a mapping of keys to values", place=str(path))
    return content, places


def package_of(recipe: Path) -> str:
    """Which trainer a recipe is for: its `package` key, else the name of its folder."""
    content, places = _mapping(recipe, "recipe")
    package = content.get("package", recipe.resolve().parent.name)
    if isinstance(package, str) and package in TRAINERS:
        return package
    if "package" in content:
        hint = nearest(str(package), TRAINERS)
        raise UserError(f"unknown package '{package}'", place=places["package"], fix=hint)
    hint = f"Add the key 'package', one of {', '.join(TRAINERS)}."
    raise UserError("cannot tell what this recipe trains", place=str(recipe), fix=hint)


def command(launcher: Path, package: str, recipe: Path, overrides: list[str]) -> list[str]:
    """What `--accelerate` runs; `--quiet` keeps the launcher's traceback off a user's one-line mistake."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(launcher)]
    return [*launch, "-m", f"{package}.train", str(recipe), *overrides]


def _replace(words: list[str]) -> NoReturn:
    print(f"mmalign: {shlex.join(words)}", file=sys.stderr, flush=True)
    os.execv(words[0], words)  # signals and the exit code are the launcher's own


def train_recipe(cls: Any, train: Callable[[Any], int], about: str | None, argv: Sequence[str] | None) -> int:
    """What every trainer's own command does: `python -m PACKAGE.train RECIPE [key=value ...]`.

    Args:
        cls, train: the package's recipes, and what runs one.
        about: for the help page.
    """
    from mmalign import config as configuration

    parser = Parser(prog="mmalign train", description=about)
    parser.add_argument("recipe", help="a YAML file, or the short name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    said = parser.parse_args(argv)
    return train(configuration.load(cls, said.recipe, said.overrides))


def main(argv: list[str]) -> int | None:
    """Start the trainer that the recipe names, here or through accelerate."""
    parser = Parser(prog="mmalign train", description="Train a recipe.", epilog="key=value changes a setting.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one that ships")
    parser.add_argument("--accelerate", metavar="PRESET", help="one_gpu, ddp, fsdp2, zero2, zero3, or your file")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    arguments, overrides = parser.parse_known_args(argv)

    recipe = find(arguments.recipe)
    package = package_of(recipe)
    if arguments.accelerate:
        words = command(preset(arguments.accelerate), package, recipe, overrides)
        if not arguments.dry_run:
            _replace(words)
    else:
        words = [sys.executable, "-m", f"{package}.train", str(recipe), *overrides]
    if arguments.dry_run:
        print(shlex.join(words))
        return 0
    return resolve(TRAINERS[package])([str(recipe), *overrides])
