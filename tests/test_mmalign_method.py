"""The method protocol, and methods found by the names of their files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import method as methods
from mmalign.errors import UserError
from mmalign.method import Method, Metrics, OneLoss


class Offline(OneLoss):
    def losses(self, batch: Any) -> Iterator[tuple[torch.Tensor, Metrics]]:
        yield torch.zeros(()), {}


def test_an_offline_method_needs_its_loss_alone() -> None:
    method = Offline()
    assert isinstance(method, Method)
    assert list(method.batches([1, 2])) == [1, 2]
    assert method.passes(None) == 1 == len(list(method.losses(None)))
    assert method.describe() == {} == method.state_dict()
    method.load_state_dict({})


def test_state_for_a_method_without_state_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match=r"Offline keeps no state, got \['baseline'\]"):
        Offline().load_state_dict({"baseline": 1.0})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "studio" / "methods"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "_helpers.py", "zeta.py"):
        (folder / name).write_text("")
    (folder / "dpo.py").write_text("NAME = 'mine'")
    (tmp_path / "studio" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "studio"
    for name in [name for name in sys.modules if name.partition(".")[0] == "studio"]:
        del sys.modules[name]


def test_a_method_is_the_file_of_its_name(package: str) -> None:
    assert methods.known(package) == ["dpo", "zeta"]
    assert methods.load(package, "dpo").NAME == "mine"


@pytest.mark.parametrize("name", ["dpp", "_helpers", "__init__", "../dpo", "dpo.x", ""])
def test_anything_else_is_refused(package: str, name: str) -> None:
    with pytest.raises(UserError, match=r"no method '.*' in studio \(method.name\)\. (Did you mean|Known:)"):
        methods.load(package, name)


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_methods_of_ours_have_options_and_build(name: str) -> None:
    module = methods.load("diffusion", name)
    assert module.Options().model_dump()
    assert callable(module.build)
    assert module.__doc__ and all(field.description for field in module.Options.model_fields.values())
