"""mmalign eval t2i: images that depend on prompt and seed alone, resume, replay, processes, the demo's own numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from PIL import Image

from diffusion import weights
from diffusion.adapters import add_lora
from diffusion.evaluation import main
from diffusion.models import load_model
from diffusion.protocols import PROTOCOLS, Protocol, units
from diffusion.settings import LoraSettings, ModelSettings
from evaluators.scorefile import read_scores
from mmalign import checkpoint
from mmalign.cli import run_entry
from mmalign.errors import UserError

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "2", "--guidance-scale", "2", "--scorer", "shapes", "--numbers", "shapes/style"]
EVALUATION = {
    "prompts": "shapes:heldout",
    "count": 3,
    "sampler": {"steps": 2, "guidance_scale": 2.0, "batch_size": 2},
    "scorers": [{"name": "shapes"}],
    "preference": "style",
    "arms": {"run": []},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.sd_pipeline(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter acts."""
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    folder.mkdir()
    model = load_model(ModelSettings(path=str(base)))
    add_lora(model.unet, LoraSettings(rank=2))
    for name, parameter in model.unet.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.5
    recipe = {
        "model": {"path": str(base)},
        "adapter": {"rank": 2},
        "data": {"path": "nowhere", "cache": None},
        "method": {"name": "dpo"},
        "optim": {"lr": 1e-4},
        "loop": {"steps": 3, "output_dir": str(folder)},
        "evaluation": EVALUATION,
    }
    (folder / "config.yaml").write_text(json.dumps(recipe))
    writers = {"model": lambda into: weights.save_weights(model.unet, into)}
    checkpoint.save(folder, 3, {}, keep=1, method="dpo", summary={"base": model.identity}, writers=writers)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle\ntwo blue squares\na green triangle\nthree red squares\na blue circle\n")
    return file


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def pixels(folder: Path, name: str) -> dict[str, Any]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((folder / name / "images").iterdir())}


def test_pictures_scores_manifest_and_comparison(
    trained: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trained, "--prompts", prompts, "--per-prompt", 2, "--out", tmp_path / "eval", *QUICK) == 0
    out = tmp_path / "eval"
    names = {"base", "dpo", "manifest.json", "comparison.json", "comparison.md", "comparison.html"}
    assert {path.name for path in out.iterdir()} == names
    base, tuned = (read_scores(out / name) for name in ("base", "dpo"))
    assert base.header.digest == tuned.header.digest and base.header.protocol["steps"] == 2
    assert list(base.rows) == list(tuned.rows) == [f"{i:05d}-{k}" for i in range(5) for k in range(2)]
    assert len({row.seed for row in base.rows.values()}) == 10
    assert all(row.image and (out / "base" / row.image).is_file() for row in base.rows.values())
    assert any((pixels(out, "base")[name] != picture).any() for name, picture in pixels(out, "dpo").items())
    found = json.loads((out / "comparison.json").read_text())
    assert found["samples"] == 10 and found["prompts"] == 5
    assert [one["number"] for one in found["compared"]] == ["shapes/style"]
    assert "win rate" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["prompts"] == prompts.read_text().splitlines() and set(manifest["pictures"]) == {"base", "dpo"}
    assert (out / "comparison.html").read_text().count("data:image/png") == 10


def test_neither_batch_size_nor_the_list_changes_a_picture(base: Path, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else\n" + "\n".join(reversed(prompts.read_text().splitlines())) + "\n")
    tiny = ["--base", base, base, "--names", "same"]
    for name, file, size in (("one", prompts, 1), ("four", prompts, 4), ("other", other, 3)):
        assert run(*tiny, "--prompts", file, "--batch-size", size, "--out", tmp_path / name, *QUICK) == 0
    one, four, reverse = (pixels(tmp_path / name, "base") for name in ("one", "four", "other"))
    for index in range(5):
        picture = one[f"{index:05d}-0.png"].astype(int)
        assert np.abs(picture - four[f"{index:05d}-0.png"]).max() <= 1  # rounding of other matrix sizes
        assert np.abs(picture - reverse[f"{5 - index:05d}-0.png"]).max() <= 1
    assert (pixels(tmp_path / "one", "same")["00000-0.png"] == one["00000-0.png"]).all()


@pytest.mark.slow
def test_two_processes_draw_the_bytes_of_one(trained: Path, prompts: Path, tmp_path: Path) -> None:
    words = [str(trained), "--prompts", str(prompts), "--per-prompt", "3", "--batch-size", "2", *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(out: str, **more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mmalign", "eval", "t2i", *words, "--out", str(tmp_path / out)]
        # pieces of two, so that there is something to share
        code = "import sys, diffusion.evaluation as e, mmalign.cli as c; e.PIECE = 2; sys.exit(c.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *command[3:]]
        return subprocess.Popen(command, env={**environment, **more}, stderr=subprocess.PIPE)

    processes = [start("one"), *(start("two", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1))]
    for process in processes:
        _, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint.decode()[-2000:]
    for name in ("base", "dpo"):
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert (one / "scores.jsonl").read_bytes() == (two / "scores.jsonl").read_bytes()
        files = sorted(path.name for path in (one / "images").iterdir())
        assert len(files) == 15 and files == sorted(path.name for path in (two / "images").iterdir())
        assert all((one / "images" / file).read_bytes() == (two / "images" / file).read_bytes() for file in files)
    first, second = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two"))
    assert first == second


def test_what_is_there_is_not_drawn_again_and_a_replay_is_exact(
    trained: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    words = [trained, "--prompts", prompts, "--batch-size", 2, "--out", out, *QUICK]
    assert run(*words) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert run(*words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    with pytest.raises(UserError, match="an evaluation with other protocol"):
        run(*words, "--seed", 4)

    again = tmp_path / "again"
    capsys.readouterr()
    assert run("--replay", out / "manifest.json", "--out", again) == 0
    assert "replay: 10 of 10 pictures are the same, byte for byte" in capsys.readouterr().out
    assert (again / "dpo" / "scores.jsonl").read_bytes() == (out / "dpo" / "scores.jsonl").read_bytes()

    manifest = json.loads((out / "manifest.json").read_text())
    manifest["models"]["dpo"]["identity"] = "another"
    (tmp_path / "changed.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"'dpo' is .*, the manifest's was another"):
        run("--replay", tmp_path / "changed.json", "--out", tmp_path / "third")


def test_a_run_alone_is_evaluated_as_its_demo_was(trained: Path, tmp_path: Path) -> None:
    """Prompts, noise, sampler and scorers of `diffusion.judging`, whose numbers come out."""
    from diffusion.judging import judge
    from diffusion.recipe import EvaluationSettings
    from diffusion.tuned import find_tuned, open_base, open_tuned

    assert run(trained, "--out", tmp_path / "eval") == 0
    tuned = find_tuned(trained)
    settings = tuned.config.evaluation
    assert isinstance(settings, EvaluationSettings)
    judged = judge(settings, {"base": lambda: open_base(tuned), "dpo": lambda: open_tuned(tuned)})
    for name, found in judged.items():
        rows = read_scores(tmp_path / "eval" / name).rows.values()
        assert [row.prompt for row in rows] == found.prompts
        for number in found.complete():
            assert [row.scores[f"shapes/{number}"] for row in rows] == found.column(number)
    compared = json.loads((tmp_path / "eval" / "comparison.json").read_text())["compared"]
    assert [one["number"] for one in compared] == ["shapes/style", "shapes/reward"]


def test_protocols_have_names_and_seeds_that_clash_nowhere() -> None:
    assert PROTOCOLS["spo"].scheduler == "ddim" and PROTOCOLS["geneval"].per_prompt == 4
    found = units(Protocol(steps=1, guidance_scale=1, per_prompt=3), [f"prompt {n}" for n in range(50)])
    assert len({unit.seed for unit in found}) == len({unit.id for unit in found}) == 150
    moved = units(Protocol(steps=1, guidance_scale=1, per_prompt=3, seed=1), ["prompt 0"])
    assert moved[0].seed != found[0].seed
    one, two = (Protocol(steps=steps, guidance_scale=1).as_json(["a"]) for steps in (1, 2))
    assert one != two and one != Protocol(steps=1, guidance_scale=1).as_json(["b"])


def test_a_scheduler_of_the_protocol_draws_other_pictures(base: Path, prompts: Path, tmp_path: Path) -> None:
    tiny = ["--base", base, base, "--names", "same", "--prompts", prompts, "--count", 2]
    assert run(*tiny, "--out", tmp_path / "own", *QUICK) == 0
    assert run(*tiny, "--out", tmp_path / "spo", "--protocol", "spo", *QUICK) == 0
    own, spo = (pixels(tmp_path / name, "base") for name in ("own", "spo"))
    assert read_scores(tmp_path / "spo" / "base").header.protocol["sampler"] == "ddim"
    assert set(own) == set(spo)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare with"),
        (["--base", "BASE", "--prompts", "P", "--scorer", "shapes"], "only one model"),
        (["BASE"], "nothing to compare with"),
        (["RUN", "--protocol", "spoo"], "no protocol 'spoo'.*'spo'"),
        (["RUN", "--count", "0"], "--count must be at least 1"),
        (["RUN", "RUN"], "two models have the same name"),
        (["RUN", "--names", "../x"], "cannot name a folder"),
        (["RUN", "--prompts", "none.txt"], "cannot read prompts"),
        (["--base", "BASE", "BASE", "--scorer", "shapes"], "there are no prompts"),
        (["--base", "BASE", "BASE", "--prompts", "P"], "nothing to score with"),
        (["--replay", "none.json"], "cannot read the manifest"),
        (["missing"], "nothing to compare with"),
    ],
)
def test_mistakes(words: list[str], message: str, base: Path, trained: Path, prompts: Path, tmp_path: Path) -> None:
    given = {"BASE": base, "RUN": trained, "P": prompts}
    with pytest.raises(UserError, match=message):
        run(*(given.get(word, word) for word in words), "--out", tmp_path / "eval")
    assert not list(tmp_path.iterdir())


def test_the_verb_finds_its_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    from mmalign.cli import resolve
    from mmalign.evaluation import KINDS
    from mmalign.evaluation import main as evaluate

    for kind, target in KINDS.items():
        with pytest.raises(SystemExit) as leaving:
            resolve(target)(["--help"])
        assert leaving.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: mmalign eval {kind}")
    assert run_entry(evaluate, ["t2j"]) == 2
    assert "Did you mean 't2i'?" in capsys.readouterr().err
    assert run_entry(evaluate, []) == 2
