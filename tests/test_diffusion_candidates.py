"""Stores made by sampling: scored pictures, and targets that win over the model's own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from PIL import Image
from tiny_runs import write_store

from diffusion import candidates
from diffusion.models import DiffusionModel, load_model
from diffusion.recipe import CandidateSettings
from diffusion.settings import ModelSettings
from mmalign.config import parse_section
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.pairing import Pairing, make_pairs
from mmalign.preferences import Store

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    folder = tiny_models.write(tiny_models.sd_pipeline(), tmp_path_factory.mktemp("model") / "sd")
    return load_model(ModelSettings(path=str(folder)))


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    folder = tmp_path / "targets"
    folder.mkdir()
    for number, caption in enumerate(("a red circle", "a green square", "a red circle")):
        Image.new("RGB", (40, 32), (number, 200, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def settings(**given: Any) -> CandidateSettings:
    return parse_section(CandidateSettings, {"sampler": {"steps": 1, "guidance_scale": 0}, **given}, "candidates")


def test_each_target_wins_over_samples_of_its_caption(model: DiffusionModel, targets: Path, tmp_path: Path) -> None:
    candidates.make_store(model, settings(targets=str(targets), per_prompt=2, seed=3), tmp_path / "store")
    records = list(Store.open(tmp_path / "store").records(split="train"))
    assert [record.prompt for record in records] == ["a red circle", "a green square", "a red circle"]
    for number, record in enumerate(records):
        target, *samples = record.candidates
        assert target.image == Media(data=(targets / f"{number}.png").read_bytes())
        assert [sample.seed for sample in samples] == [3 * 10**9 + number * 1000 + k for k in range(2)]
        assert [sample.model for sample in samples] == [model.identity] * 2 and target.model is None
        assert record.context == {"target": f"{number}.png"}
        assert len({candidate.image for candidate in record.candidates}) == 3
    pairs = list(make_pairs(records, Pairing()))
    assert len(pairs) == 6
    for pair in pairs:
        assert pair.provenance["candidates"][0] == "target" and pair.chosen == pair.a
    drawn = model.sample(["a red circle"], seeds=[3 * 10**9 + 1], steps=1, guidance_scale=0.0)
    assert records[0].candidates[2].image == Media.from_image(drawn[0])


def test_targets_from_a_store_are_what_won_there(targets: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "scored", 2)
    assert len(candidates.read_targets(str(tmp_path / "scored"))) == 4  # no votes: all of them
    rows = [
        {"prompt": "p", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "q", "chosen": "2.png", "rejected": "0.png"},
    ]
    (targets / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = candidates.read_targets(str(targets / "a.jsonl"))
    assert [(target.prompt, target.picture.path) for target in found] == [("p", "0.png"), ("q", "2.png")]


def test_some_of_the_targets_by_the_seed(targets: Path) -> None:
    drawn = {
        seed: tuple(target.record.record_id for target in candidates.read_targets(str(targets), 2, seed))
        for seed in range(6)
    }
    assert all(len(set(names)) == 2 for names in drawn.values()) and len(set(drawn.values())) > 1
    assert drawn[0] == tuple(target.record.record_id for target in candidates.read_targets(str(targets), 2, 0))


def refusal(source: Path, count: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        candidates.read_targets(str(source), count)
    return str(error.value)


def test_targets_that_are_none(targets: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"there is no such file or folder ({tmp_path / 'none'})"
    assert refusal(targets, 9) == f"9 targets asked for, there are 3 ({targets})"
    texts = tmp_path / "a.jsonl"
    texts.write_text(json.dumps({"prompt": "p", "chosen": "yes", "rejected": "no"}))
    assert refusal(texts) == "a target is a text, not a picture (a.jsonl row 0). Give pictures with captions"
    (targets / "0.txt").unlink()
    assert refusal(targets).startswith("prompt: expected 0.txt, a line of metadata.jsonl or --prompt, got none")
    (targets / "0.txt").write_text("p")
    (targets / "1.png").write_bytes(b"\x89PNG broken")
    assert "cannot decode the image" in refusal(targets)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "candidates need prompts and a scorer, or targets"),
        ({"prompts": "shapes:train"}, "candidates need prompts and a scorer, or targets"),
        (
            {"targets": "folder", "scorer": {"name": "shapes"}},
            "targets have captions and win by themselves: leave out prompts and scorer",
        ),
        (
            {"prompts": "shapes:train", "scorer": {"name": "shapes"}, "per_prompt": 1},
            "there is nothing to choose from one picture: say per_prompt=2 or more",
        ),
    ],
)
def test_settings_that_do_not_say_where_pictures_come_from(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="candidates") as error:
        settings(**given)
    assert message in str(error.value)


def test_prompts_are_sampled_and_scored(model: DiffusionModel, tmp_path: Path) -> None:
    scored = settings(prompts="shapes:train", count=2, per_prompt=2, scorer={"name": "shapes"})
    store = candidates.make_store(model, scored, tmp_path / "store")
    assert [len(record.candidates) for record in store.records()] == [2, 2]
    assert all("style" in c.scores for record in store.records() for c in record.candidates)
