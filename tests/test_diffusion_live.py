"""`mmalign arena live` with real pipelines: their pictures are those of `mmalign sample`."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from PIL import Image

from diffusion import live, sample
from evaluators.arena.command import main as arena
from evaluators.arena.live import Live
from mmalign.arena import main
from mmalign.errors import UserError

PROMPTS = ["a red circle", "two blue squares"]
QUICK = ["--steps", "2", "--guidance-scale", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write(tiny_models.sd_pipeline(), folder / "plain")
    other = tiny_models.sd_pipeline()
    for parameter in other.unet.parameters():
        parameter.data *= 1.2
    tiny_models.write(other, folder / "other")
    return folder


def asked(folder: Path, **changed: Any) -> argparse.Namespace:
    words = {"models": [str(folder / "other")], "base": str(folder / "plain"), "names": None, "steps": 2}
    return argparse.Namespace(**{**words, "guidance_scale": 2.0, **changed})


def test_the_pictures_are_those_of_sample(folder: Path, tmp_path: Path) -> None:
    painters = live.painters(asked(folder))
    assert [painter.name for painter in painters] == ["base", "other"]
    with Live(tmp_path / "live", painters, [(prompt, 5 + n) for n, prompt in enumerate(PROMPTS)]) as drawn:
        drawn._thread.join(60)
    for name, model in (("base", "plain"), ("other", "other")):
        words = ["--model", str(folder / model), "--prompts", *PROMPTS, "--seed", "5", "--batch-size", "1", *QUICK]
        assert sample.main([*words, "--out", str(tmp_path / model)]) == 0
        ours = [json.loads(line) for line in (tmp_path / "live" / name / "index.jsonl").read_text().splitlines()]
        theirs = [json.loads(line) for line in (tmp_path / model / "index.jsonl").read_text().splitlines()]
        for one, other in zip(ours, theirs, strict=True):
            assert one.items() <= other.items() and one["model"].startswith(f"{model}@")
            first, second = (
                np.asarray(Image.open(place / row["file"]))
                for place, row in ((tmp_path / "live" / name, one), (tmp_path / model, other))
            )
            assert np.array_equal(first, second)


def test_mistakes_are_one_line_before_a_model_is_opened(tmp_path: Path) -> None:
    words = ["live", "nowhere", "--base", "nowhere", "--out", str(tmp_path / "out"), "--prompts", "a circle"]
    for more, message in (
        (["--steps", "0"], "--steps must be at least 1"),
        (["--host", "0.0.0.0"], "needs a password"),
        (["--votes", str(tmp_path / "elsewhere" / "votes.sqlite")], "not below the folder of the votes"),
        (["--port", "0", "--prompts", "missing.txt"], "cannot read prompts"),
        (["--port", "0"], "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            main([*words, *more])
    with pytest.raises(UserError, match="nothing to compare with"):
        main(["live", "nowhere", *words[4:]])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="is in use"):
            main([*words, "--port", str(taken.getsockname()[1])])
    assert not (tmp_path / "out").exists()


def test_all_else_is_the_arena_of_what_there_is() -> None:
    for entry in (main, arena):
        with pytest.raises(UserError, match="nothing to compare"):
            entry([])
