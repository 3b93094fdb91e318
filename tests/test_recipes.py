"""Every shipped recipe says what its header promises and loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffusion.recipe import TrainConfig
from mmalign import method
from mmalign.config import load, parse_section, shipped

RECIPES = {name: path for name, path in shipped().items() if name.startswith("diffusion/")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_with_its_method_and_every_arm(name: str) -> None:
    config = load(TrainConfig, name)
    arms = config.evaluation.arms.values() if config.evaluation else [()]
    for changes in arms:
        arm = load(TrainConfig, name, [*changes, "loop.output_dir=elsewhere"])
        parse_section(method.load("diffusion", arm.method.name).Options, arm.method, "method")


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_names_paper_command_hardware_and_result(name: str) -> None:
    header = Path(RECIPES[name]).read_text(encoding="utf-8").split("\npackage:")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}", header)
    assert f"mmalign train {name}" in header or f"mmalign demo {name}" in header
    assert "Hardware and time:" in header
    assert re.search(r"[Rr]esult", header)
