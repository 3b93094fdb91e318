"""Sampling into a folder: what is written can be drawn again, and nothing is written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from PIL import Image

from diffusion import weights
from diffusion.adapters import add_lora
from diffusion.models import load_model
from diffusion.sample import main
from diffusion.settings import LoraSettings, ModelSettings
from mmalign import checkpoint
from mmalign.errors import UserError

QUICK = ["--steps", "2", "--guidance-scale", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.sd_pipeline(), tmp_path_factory.mktemp("base") / "tiny")


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(folder: Path, number: int) -> Any:
    return np.asarray(Image.open(folder / f"{number:05d}.png"))


def test_pictures_index_and_sheet(base: Path, tmp_path: Path) -> None:
    listed = tmp_path / "prompts.jsonl"
    listed.write_text('{"prompt": "a blue square"}\n{"prompt": "two red circles"}\n')
    out = tmp_path / "pictures"
    assert run("--model", base, "--prompts", "a grün circle", listed, "--seed", 5, "--out", out, *QUICK) == 0
    files = ["00000.png", "00001.png", "00002.png"]
    assert sorted(path.name for path in out.iterdir()) == [*files, "index.jsonl", "sheet.png"]
    index = rows(out)
    assert [row["prompt"] for row in index] == ["a grün circle", "a blue square", "two red circles"]
    assert [(row["seed"], row["file"]) for row in index] == list(zip([5, 6, 7], files, strict=True))
    assert {(row["steps"], row["guidance_scale"]) for row in index} == {(2, 2.0)}
    assert all(row["model"].startswith("tiny@") for row in index)

    again = tmp_path / "again"  # one of them alone, from its row
    run("--model", base, "--prompts", "two red circles", "--seed", 7, "--batch-size", 1, "--out", again, *QUICK)
    assert np.abs(pixels(again, 0).astype(int) - pixels(out, 2)).max() <= 1
    model = load_model(ModelSettings(path=str(base)))
    (picture,) = model.sample(["two red circles"], seeds=[7], steps=2, guidance_scale=2.0)
    assert np.array_equal(np.asarray(picture), pixels(again, 0))


def test_a_checkpoint_draws_what_was_trained(base: Path, tmp_path: Path) -> None:
    model = load_model(ModelSettings(path=str(base)))
    identity = model.identity
    add_lora(model.unet, LoraSettings(rank=2))
    for name, parameter in model.unet.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.5
    folder = tmp_path / "run"
    recipe = {
        "model": {"path": str(base)},
        "adapter": {"rank": 2},
        "data": {"path": "nowhere", "cache": None},
        "method": {"name": "dpo"},
        "optim": {"lr": 1e-4},
        "loop": {"steps": 3, "output_dir": str(folder)},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(recipe))
    writers = {"model": lambda into: weights.save_weights(model.unet, into)}
    checkpoint.save(folder, 3, {}, keep=1, method="dpo", summary={"base": identity}, writers=writers)

    tuned, plain = tmp_path / "tuned", tmp_path / "plain"
    tuned.mkdir()  # an empty folder will do
    run(folder, "--prompts", "a red circle", "--out", tuned, *QUICK)
    run("--model", base, "--prompts", "a red circle", "--out", plain, *QUICK)
    (expected,) = model.sample(["a red circle"], seeds=[0], steps=2, guidance_scale=2.0)
    assert np.abs(pixels(tuned, 0).astype(int) - np.asarray(expected)).max() <= 1
    assert np.abs(pixels(tuned, 0).astype(int) - pixels(plain, 0)).max() > 2
    assert rows(tuned)[0]["model"] == f"{identity} + run/checkpoint-00000003/model"


def test_captions_of_the_embedded_world(base: Path, tmp_path: Path) -> None:
    run("--model", base, "--prompts", "shapes:heldout", "--count", 3, "--out", tmp_path / "a", *QUICK)
    assert len({row["prompt"] for row in rows(tmp_path / "a")}) == 3


def test_several_of_a_prompt_differ_and_become_its_candidates(base: Path, tmp_path: Path) -> None:
    from evaluators import label
    from mmalign.preferences import Store

    some = ("--prompts", "a red circle", "a blue square", "--per-prompt", 3)
    run("--model", base, *some, "--out", tmp_path / "a", *QUICK)
    assert [(row["prompt"], row["seed"]) for row in rows(tmp_path / "a")] == [
        *(("a red circle", seed) for seed in (0, 1, 2)),
        *(("a blue square", seed) for seed in (3, 4, 5)),
    ]
    assert np.abs(pixels(tmp_path / "a", 0).astype(int) - pixels(tmp_path / "a", 1)).max() > 2
    label.main([str(tmp_path / "a"), "--scorer", "shapes", "--out", str(tmp_path / "store")])
    assert [len(record.candidates) for record in Store.open(tmp_path / "store").records()] == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "a circle"], "nothing to draw from"),
        (["--model", "BASE", "--prompts", "missing.txt"], "cannot read prompts"),
        (["--model", "BASE", "--prompts", "a circle", "--steps", "0"], "--steps must be at least 1, got 0"),
        (
            ["--model", "BASE", "--prompts", "a circle", "--guidance-scale", "nan"],
            "--guidance-scale must be at least 0",
        ),
        (["missing", "--prompts", "a circle"], "no such checkpoint"),
        (["--model", "missing", "--prompts", "a circle"], "no such folder"),
    ],
)
def test_mistakes(words: list[str], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(*(str(base) if word == "BASE" else word for word in words), "--out", tmp_path / "pictures")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(base: Path, tmp_path: Path) -> None:
    precious = tmp_path / "pictures" / "precious.png"
    precious.parent.mkdir()
    precious.write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        run("--model", base, "--prompts", "a circle", "--out", precious.parent, *QUICK)
    assert [path.name for path in precious.parent.iterdir()] == ["precious.png"]
