"""Every shipped recipe says what its header promises and loads."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from mmalign import method
from mmalign.config import load, parse_section
from mmalign.recipes import shipped

RECIPES = {name: path for name, path in shipped().items() if name.startswith(("diffusion/", "vlm/", "evaluators/"))}


def recipe_class(name: str) -> Any:
    return importlib.import_module(f"{name.partition('/')[0]}.recipe").TrainConfig


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_with_its_method_and_every_arm(name: str) -> None:
    package = name.partition("/")[0]
    config = load(recipe_class(name), name)
    assert config.package == package
    judged = getattr(config, "evaluation", None)
    arms = judged.arms.values() if judged else [()]
    for changes in arms:
        arm = load(recipe_class(name), name, [*changes, "loop.output_dir=elsewhere"])
        parse_section(method.load(package, arm.method.name).Options, arm.method, "method")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("vlm/")])
def test_a_vision_language_recipe_says_how_its_data_are_made_or_imported(name: str) -> None:
    from vlm import making

    config = load(recipe_class(name), name)
    header = Path(RECIPES[name]).read_text(encoding="utf-8")
    if config.make is None:
        assert "mmalign data import" in header
    else:
        parse_section(making.load(config.make.name).Options, config.make, "make")


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_names_paper_command_hardware_and_result(name: str) -> None:
    header = Path(RECIPES[name]).read_text(encoding="utf-8").split("\npackage:")[0]
    short = name.rpartition("/")[2].rpartition("_")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}", header)
    assert f"mmalign train {name}" in header or f"mmalign demo {name}" in header or f"demo --method {short}" in header
    assert "Hardware and time:" in header
    assert re.search(r"[Rr]esult", header)
