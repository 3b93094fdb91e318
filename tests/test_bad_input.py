"""What a user can give us wrong, and the one line that each gets. `pytest -s` prints the table as Markdown.

Every line is driven through the console command in this process. After each, everything that was there before is
there still, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_runs import Tiny, contents, lines, newest

from mmalign import cli
from mmalign.media import Media
from mmalign.preferences import Store
from mmalign.records import Candidate, Record

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Place:
    """A folder with a tiny model, a store, a finished run and a recipe that would go on with it."""

    def __init__(self, tiny: Tiny, run: Path, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.run = folder / "run"
        shutil.copytree(run, self.run)
        self.recipe = tiny.recipe(self.run, loop={"steps": 2, "checkpoint_every": 1})

    def jsonl(self, *rows: object) -> Path:
        for shade, name in ((0, "black.png"), (255, "white.png")):
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(self.folder / name)
        path = self.folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    def tied(self) -> Path:
        def picture(shade: int) -> Media:
            return Media.from_image(Image.new("RGB", (32, 32), (shade, 0, 0)))

        candidates = tuple(Candidate(candidate_id=str(k), image=picture(k), scores={"taste": k // 2}) for k in range(4))
        records = [
            Record(record_id=f"r{k}", prompt="a red circle", candidates=candidates[2 * k : 2 * k + 2]) for k in (0, 1)
        ]
        Store.write(records, self.folder / "tied")
        return self.folder / "tied"

    @property
    def newest(self) -> Path:
        return newest(self.run)

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


def row(**changes: object) -> dict[str, object]:
    """A row of a source that has no fault."""
    candidates = [{"id": "x", "image": "black.png"}, {"id": "y", "image": "white.png"}]
    votes = [{"a": "x", "b": "y", "label": "a"}]
    return {"id": "one", "prompt": "p", "candidates": candidates, "votes": votes} | changes


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


Words = Callable[[Place, pytest.MonkeyPatch], list[object]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One wrong input.

    Attributes:
        what: the situation.
        words: makes it, and returns the command's words after `mmalign`.
        says: the line after `mmalign: error: `, with {here} for the folder, {model} for the model's.
        changes: files that the run, once it was accepted, goes on writing.
        keeps: a file that must have appeared: work done before the error, for the next try.
    """

    what: str
    words: Words
    says: str
    changes: tuple[str, ...] = ()
    keeps: str | None = None


def train(*changes: str) -> Words:
    return lambda place, _: ["train", place.recipe, *(change.format(here=place.folder) for change in changes)]


def without(what: str, change: str) -> Words:
    """As on a machine where `what` is false."""

    def words(place: Place, patch: pytest.MonkeyPatch) -> list[object]:
        patch.setattr(what, lambda: False)
        return ["train", place.recipe, change]

    return words


def imported(*rows: object) -> Words:
    return lambda place, _: ["data", "import", place.jsonl(*rows), "--out", place.folder / "store"]


def with_environment(name: str, value: str) -> Words:
    def words(place: Place, patch: pytest.MonkeyPatch) -> list[object]:
        patch.setenv(name, value)
        return ["train", place.recipe]

    return words


def corrupt_image(place: Place, _: pytest.MonkeyPatch) -> list[object]:
    source = place.jsonl(row())
    overwrite(place.folder / "white.png", lambda data: data[:40])
    return ["data", "import", source, "--out", place.folder / "store"]


def tied(place: Place, _: pytest.MonkeyPatch) -> list[object]:
    return ["train", place.recipe, f"data.path={place.tied()}", f"loop.output_dir={place.folder / 'other'}"]


def damaged(name: str, change: Callable[[bytes], bytes]) -> Words:
    def words(place: Place, _: pytest.MonkeyPatch) -> list[object]:
        overwrite(place.newest / name, change)
        return ["train", place.recipe, f"loop.resume={place.run / 'checkpoint-00000002'}"]

    return words


def every_checkpoint_damaged(place: Place, _: pytest.MonkeyPatch) -> list[object]:
    for path in place.run.glob("checkpoint-*"):
        (path / "state.json").unlink()
    return ["train", place.recipe]


def disk_full(place: Place, patch: pytest.MonkeyPatch) -> list[object]:
    patch.setattr("os.fsync", no_space)
    return ["train", place.recipe, "loop.steps=3"]


def disk_full_elsewhere(place: Place, patch: pytest.MonkeyPatch) -> list[object]:
    patch.setattr("mmalign.tracking.Tracker.log", no_space)
    return ["train", place.recipe, "loop.steps=3"]


def preset_that_is_no_preset(place: Place, _: pytest.MonkeyPatch) -> list[object]:
    (place.folder / "preset.yaml").write_text("num_processes: [2\n")
    return ["train", place.recipe, "--accelerate", place.folder / "preset.yaml"]


TABLE = [
    Case(
        what="an unknown key",
        words=train("optim.learning_rate=1e-4"),
        says=("unknown key 'optim.learning_rate' (override 'optim.learning_rate=1e-4'). Did you mean 'optim.lr'?"),
    ),
    Case(
        what="a key of another section",
        words=train("lr=1e-4"),
        says="unknown key 'lr' (override 'lr=1e-4'). Did you mean 'optim.lr'?",
    ),
    Case(
        what="a key of the method that it does not have",
        words=train("method.bta=1"),
        says="unknown key 'method.bta'. Did you mean 'method.beta'?",
    ),
    Case(
        what="a mistyped value",
        words=train("optim.lr=fast"),
        says="optim.lr: expected a number, got 'fast' (text) (override 'optim.lr=fast')",
    ),
    Case(
        what="a missing recipe",
        words=lambda place, _: ["train", "diffusion/dpo_shape"],
        says="no recipe 'diffusion/dpo_shape'. Did you mean 'diffusion/dpo_shapes'?",
    ),
    Case(what="a mistyped verb", words=lambda place, _: ["trian"], says="unknown verb 'trian'. Did you mean 'train'?"),
    Case(
        what="an unknown method",
        words=train("method.name=dop"),
        says="no method 'dop' in diffusion (method.name). Did you mean 'dpo'?",
    ),
    Case(
        what="a missing model folder",
        words=train("model.path={here}/none"),
        says=("there is no such folder (model.path: {here}/none). Give a diffusers folder or a hub id owner/name"),
    ),
    Case(
        what="a missing store",
        words=train("data.path={here}/none"),
        says=(
            "no preference store here (data.path={here}/none). Make one with 'mmalign data import', or say in the "
            "recipe how it is made."
        ),
    ),
    Case(
        what="a corrupt image",
        words=corrupt_image,
        says=(
            "candidates[1].image: expected an image that opens, got 'cannot decode the image: cannot "
            "identify image file' (rows.jsonl row 0). `mmalign data check` lists every such row"
        ),
    ),
    Case(
        what="wrong columns",
        words=imported({"question": "p", "good": "a", "bad": "b"}),
        says=(
            "there is no column 'image', which the format 'rlaifv' needs ({here}/rows.jsonl). Known: "
            "bad, good, question."
        ),
    ),
    Case(
        what="empty data",
        words=imported(),
        says="the source holds no rows ({here}/rows.jsonl). Give a source with data in it",
    ),
    Case(
        what="data with ties only",
        words=tied,
        says=(
            "all 2 comparisons are ties. Nothing can be learned from them: collect votes or scores that tell "
            "candidates apart"
        ),
    ),
    Case(
        what="a prompt of the wrong type",
        words=imported(row(prompt=3)),
        says="prompt: expected text, got 3 (int) (rows.jsonl row 0). `mmalign data check` lists every such row",
    ),
    Case(
        what="duplicate ids",
        words=imported(row(), row(prompt="q")),
        says=(
            "record_id: expected an id used once, got 'one', already at rows.jsonl row 0 (rows.jsonl row 1). "
            "`mmalign data check` lists every such row"
        ),
    ),
    Case(
        what="a path that leaves the data folder",
        words=imported(row(candidates=[{"id": "x", "image": "../../secret.png"}, {"id": "y", "image": "white.png"}])),
        says=(
            "candidates[0].image: expected a file inside the data folder, got '../../secret.png', which "
            "leaves the data folder (rows.jsonl row 0). `mmalign data check` lists every such row"
        ),
    ),
    Case(
        what="a truncated checkpoint",
        words=damaged("state.safetensors", lambda data: data[:-10]),
        says=(
            "state.safetensors has {size} bytes of {size} ({here}/run/checkpoint-00000002). Resume from "
            "checkpoint-00000001 with loop.resume={here}/run/checkpoint-00000001, or start afresh with "
            "loop.resume=none."
        ),
    ),
    Case(
        what="a tampered checkpoint",
        words=damaged("model/pytorch_lora_weights.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        says=(
            "model/pytorch_lora_weights.safetensors was changed: its hash differs "
            "({here}/run/checkpoint-00000002). Resume from checkpoint-00000001 with "
            "loop.resume={here}/run/checkpoint-00000001, or start afresh with loop.resume=none."
        ),
    ),
    Case(
        what="no checkpoint left that is good",
        words=every_checkpoint_damaged,
        says=(
            "no good checkpoint: skipped checkpoint-00000002: state.json is missing; skipped "
            "checkpoint-00000001: state.json is missing ({here}/run). Start afresh with loop.resume=none."
        ),
    ),
    Case(
        what="a full disk while saving",
        words=disk_full,
        changes=("run/config.yaml", "run/metrics.jsonl"),
        says=(
            "disk full while saving checkpoint-00000003; the previous checkpoint checkpoint-00000002 is "
            "intact ({here}/run). Free some space, or point loop.output_dir elsewhere, and run the same "
            "command to go on."
        ),
    ),
    Case(
        what="a full disk while logging",
        words=disk_full_elsewhere,
        changes=("run/config.yaml", "run/metrics.jsonl"),
        says="disk full. Free some space and run the same command again.",
    ),
    Case(
        what="a checkpoint of another method",
        words=train("method={{name: sft}}"),
        says=(
            "a checkpoint of method 'dpo', but this run is 'sft' ({here}/run/checkpoint-00000002). Give "
            "another loop.output_dir, or start from its weights with loop.init_from."
        ),
    ),
    Case(
        what="a checkpoint of another LoRA rank",
        words=train("adapter.rank=8"),
        says=(
            "the checkpoint has adapter LoRA of rank 2, but this run has adapter LoRA of rank 8 "
            "({here}/run/checkpoint-00000002). Set adapter as it was, or give another loop.output_dir."
        ),
    ),
    Case(
        what="a checkpoint of an adapter for the whole UNet",
        words=train("adapter=null"),
        says=(
            "the checkpoint has adapter LoRA of rank 2, but this run has adapter none, the whole UNet "
            "({here}/run/checkpoint-00000002). Set adapter as it was, or give another loop.output_dir."
        ),
    ),
    Case(
        what="a checkpoint of other data",
        words=train("data.shuffle_labels=true"),
        says=(
            "the checkpoint has pairs {hash}, but this run has pairs {hash} "
            "({here}/run/checkpoint-00000002). Set pairs as it was, or give another loop.output_dir."
        ),
    ),
    Case(
        what="fewer steps than were trained",
        words=train("loop.steps=1"),
        says=(
            "the checkpoint is at update 2, past loop.steps=1 ({here}/run/checkpoint-00000002). Raise "
            "loop.steps or choose another loop.output_dir."
        ),
    ),
    Case(
        what="weights to start from that are not there",
        words=train("loop.init_from={here}/none"),
        says="no such folder of weights ({here}/none). Give a checkpoint or weights taken from one",
    ),
    Case(
        what="a folder that is a file",
        words=train("loop.output_dir={here}/run.yaml"),
        says="cannot make the run's folder: File exists (loop.output_dir={here}/run.yaml). Choose another.",
    ),
    Case(
        what="a list of GPUs that is none",
        words=with_environment("CUDA_VISIBLE_DEVICES", "abc"),
        says=(
            "CUDA_VISIBLE_DEVICES=abc is no list of GPUs ('abc' in the environment). Give numbers such as "
            "0,1 or ids such as GPU-..., or unset it."
        ),
    ),
    Case(
        what="fp16 without a GPU",
        words=without("torch.cuda.is_available", "loop.precision=fp16"),
        says="fp16 training needs a GPU (loop.precision). Use fp32 or bf16 on this machine.",
    ),
    Case(
        what="xformers where it cannot run",
        words=without("diffusers.utils.import_utils.is_xformers_available", "loop.attention=xformers"),
        says=(
            "xformers is not installed (loop.attention). pip install 'mmalign[xformers]'. Use "
            "loop.attention=sdpa, which is as fast on recent GPUs"
        ),
    ),
    Case(
        what="an unknown launch preset",
        words=lambda place, _: ["train", place.recipe, "--accelerate", "one_gpus"],
        says="no launch preset 'one_gpus' (--accelerate). Did you mean 'one_gpu'?",
    ),
    Case(
        what="a launch preset that is no YAML",
        words=preset_that_is_no_preset,
        says="not valid YAML: expected ',' or ']', but got '<stream end>' ({here}/preset.yaml:2)",
    ),
    Case(
        what="a loss that is not a number",
        words=train("method.beta=1e300", "loop.output_dir={here}/other"),
        says=(
            "loss or gradient was not finite for 2 updates in a row (last loss nan) (update 2). Lower "
            "optim.lr or method.beta, or use loop.precision=bf16; the last checkpoint is untouched."
        ),
    ),
    Case(
        what="a scorer that returns one constant value",
        words=train(
            "candidates={{prompts: 'shapes:train', count: 2, per_prompt: 2, sampler: {{steps: 1}}, "
            "scorer: {{name: shapes, main: faithful}}}}",
            "data.path={here}/sampled",
            "data.pairing.score=faithful",
            "loop.output_dir={here}/other",
        ),
        says=(
            "scorer 'faithful' gave one constant value 0 to all 4 candidates. Nothing can be learned from "
            "it: check the scorer or use another score"
        ),
        keeps="sampled/store.json",
    ),
    Case(
        what="a timestep that does not exist",
        words=train("method.timesteps=[1000]"),
        says="timestep 1000 does not exist (method.timesteps). They go from 0 to 999",
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert tiny.train(run, loop={"steps": 2, "checkpoint_every": 1}) == 0
    return run


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


SAID: dict[str, tuple[str, str]] = {}


def plain(text: str, place: Place) -> str:
    """A line without what changes from machine to machine."""
    for folder, name in ((place.folder, "{here}"), (place.tiny.folder, "{model}")):
        text = text.replace(str(folder), name)
    text = re.sub(r"\b[0-9a-f]{32}\b", "{hash}", text)
    return re.sub(r"has \d+ bytes of \d+", "has {size} bytes of {size}", text)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.what)
def test_one_line_and_nothing_lost(
    case: Case,
    tiny: Tiny,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = Place(tiny, finished, tmp_path)
    with monkeypatch.context() as patch:
        words = [str(word) for word in case.words(place, patch)]
        before = place.files()
        code = cli.main(words)
    error = capsys.readouterr().err.splitlines()
    line = plain(error[-1], place)
    SAID[case.what] = (plain(shlex.join(["mmalign", *words]), place), line)
    assert code == 2, error
    assert line == f"mmalign: error: {case.says}"
    assert sum(text.startswith("mmalign: error") for text in error) == 1 and "Traceback" not in "".join(error)

    after = place.files()
    changed = {str(path.relative_to(tmp_path)) for path in before if after.get(path) != before[path]}
    assert changed <= set(case.changes)
    assert case.keeps is None or tmp_path / case.keeps in after


def test_a_full_disk_loses_nothing(tiny: Tiny, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With space again the same command goes on to what it would have been."""
    assert tiny.train(tmp_path / "whole", loop={"steps": 3, "checkpoint_every": 1}) == 0
    (tmp_path / "full").mkdir()
    place = Place(tiny, finished, tmp_path / "full")
    with monkeypatch.context() as patch:
        words = [str(word) for word in disk_full(place, patch)]
        assert cli.main(words) == 2
    assert not [path for path in place.run.iterdir() if "tmp" in path.name]
    assert cli.main(words) == 0
    assert contents(place.run) == contents(tmp_path / "whole")
    assert lines(place.run) == lines(tmp_path / "whole")


def test_the_table_as_markdown(request: pytest.FixtureRequest) -> None:
    """Shown by `pytest -s tests/test_bad_input.py`."""
    rows = ["| situation | command | message |", "|---|---|---|"]
    rows += [f"| {what} | `{command}` | {line} |" for what, (command, line) in SAID.items()]
    print("\n" + "\n".join(rows))
    assert len(rows) == 2 + len(SAID)
    assert len(SAID) == len(TABLE) or request.config.getoption("keyword")  # the tests above filled it
