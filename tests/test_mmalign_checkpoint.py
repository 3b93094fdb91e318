"""Checkpoints: exact, atomic under SIGKILL, and refused when anything about them is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmalign import checkpoint, manifest
from mmalign.errors import UserError

ROOT = Path(__file__).parent.parent
STATE: dict[str, Any] = {"weights": torch.arange(1000.0), "position": 7}


def save(directory: Path, step: int, keep: int = 100, **options: Any) -> Path:
    return checkpoint.save(directory, step, options.pop("state", STATE), keep=keep, method="dpo", **options)


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, **options)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------
# Exactness


class Run:
    """A small run whose every source of state matters for what comes next."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 4))
        parameters = self.model.parameters()
        optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
            "adamw fused": lambda: torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), fused=True),
            "sgd": lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
            "adafactor": lambda: torch.optim.Adafactor(parameters, lr=1e-2),
        }
        self.optimizer = optimizers[optimizer]()
        schedulers = torch.optim.lr_scheduler
        self.schedule = schedulers.SequentialLR(
            self.optimizer,
            [
                schedulers.LambdaLR(self.optimizer, lambda step: (step + 1) / 4),
                schedulers.CosineAnnealingLR(self.optimizer, 10),
            ],
            milestones=[3],
        )
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.model, avg_fn=lambda average, new, _: 0.9 * average + 0.1 * new
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 6) * torch.rand(()) + torch.rand(())
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
            self.ema.update_parameters(self.model)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load_state_dict(state["ema"])
        torch.set_rng_state(state["rng"])


@pytest.fixture
def rng() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw fused", "sgd", "adafactor"])
@pytest.mark.parametrize("interrupted", [1, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    optimizer: str, interrupted: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    run = Run(optimizer)
    run.train(interrupted)
    state = run.state()
    path = save(tmp_path, interrupted, state=state)
    run.train(6)
    expected = run.state()

    resumed = Run(optimizer)
    resumed.train(3)  # whatever it did before must not matter
    loaded = checkpoint.load(path)
    assert loaded.step == interrupted
    resumed.restore(loaded.state)
    resumed.train(6)

    for part in ("model", "ema"):
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, resumed.state()[part][name]), name
    assert resumed.schedule.get_last_lr() == run.schedule.get_last_lr()
    assert resumed.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]


# ----------------------------------------------------------------------------------------------------
# Layout


def write_model(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"\x00" * 100)


def test_layout_manifest_and_writers(tmp_path: Path) -> None:
    summary = {"rank": 8, "targets": ("q", "k")}
    path = save(tmp_path / "new" / "run", 100, summary=summary, writers={"model": write_model})
    assert path == tmp_path / "new" / "run" / "checkpoint-00000100"
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    files = sorted(item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file())
    model = ["model/unet/config.json", "model/weights.safetensors"]
    assert files == ["manifest.json", *model, "state.json", "state.safetensors"]
    read = json.loads((path / "manifest.json").read_text())
    assert (read["format"], read["step"], read["method"], read["summary"]["rank"]) == (1, 100, "dpo", 8)
    assert set(read["files"]) == set(files) - {"manifest.json"}
    assert read["files"]["model/weights.safetensors"]["bytes"] == 100
    loaded = checkpoint.load(path, expect_method="dpo", expect=summary)
    assert torch.equal(loaded.state["weights"], STATE["weights"])
    assert loaded.manifest.summary["targets"] == ["q", "k"]


def test_a_writer_that_makes_a_pickle_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pickles.*model/adapter\.bin"):
        save(tmp_path, 1, writers={"model": lambda folder: (folder / "adapter.bin").touch()})
    assert list(tmp_path.iterdir()) == []


def test_state_of_the_wrong_kind_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="position"):
        save(tmp_path, 1, state={"position": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 1, state={"second": True})
    assert checkpoint.load(path).state == {"second": True}
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------
# What is refused


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def dangle(path: Path) -> None:
    (path / "state.json").unlink()
    (path / "state.json").symlink_to("nowhere")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("tensors changed", lambda c: flip(c / "state.safetensors", -1), "state.safetensors was changed"),
    ("state changed", lambda c: flip(c / "state.json", 5), "state.json was changed: its hash differs"),
    ("weights changed", lambda c: flip(c / "model/weights.safetensors", 0), "safetensors was changed"),
    ("truncated", lambda c: os.truncate(c / "state.safetensors", 500), "state.safetensors has 500 bytes of"),
    ("emptied", lambda c: os.truncate(c / "state.json", 0), "state.json has 0 bytes of"),
    ("missing", lambda c: (c / "state.json").unlink(), "state.json is missing"),
    ("model missing", lambda c: shutil.rmtree(c / "model"), "unet/config.json is missing"),
    ("pickle", lambda c: (c / "model/pytorch_model.bin").touch(), "a file that may hold a pickle"),
    ("added", lambda c: (c / "model/adapter.safetensors").touch(), "move it out"),
    ("dangling", dangle, "state.json is missing"),
    ("no manifest", lambda c: (c / "manifest.json").unlink(), "no manifest.json: not a checkpoint"),
    ("manifest cut", lambda c: os.truncate(c / "manifest.json", 50), "manifest.json is damaged"),
    ("manifest list", lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ("manifest deep", lambda c: (c / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    (
        "manifest changed",
        lambda c: (c / "manifest.json").write_text((c / "manifest.json").read_text().replace("dpo", "ipo")),
        "manifest.json was changed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_named_with_the_way_out_and_skipped_by_latest(
    damage: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    broken = save(tmp_path, 1, writers={"model": write_model})
    damage(broken)
    only = refused(broken)
    assert said in only
    assert "Start afresh with loop.resume=none." in only
    with pytest.raises(UserError, match="no good checkpoint: skipped checkpoint-00000001: "):
        checkpoint.choose("auto", tmp_path)

    good = save(tmp_path, 0)
    assert f"Resume from checkpoint-00000000 with loop.resume={good}" in refused(broken)
    found = checkpoint.choose("auto", tmp_path)
    assert found.path == good
    assert len(found.warnings) == 1
    assert said in found.warnings[0]


def reseal(path: Path, **changes: Any) -> None:
    """What somebody would do who knows how manifests are made."""
    read = json.loads((path / "manifest.json").read_text())
    for name, said in read["files"].items():
        said["bytes"], said["sha256"] = (path / name).stat().st_size, manifest._sha256(path / name)
    read.pop("sha256")
    read |= changes
    (path / "manifest.json").write_text(json.dumps(read | {"sha256": manifest._digest(read)}))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b'{"weights": {"$": "tensor", "name": "other"}}'),
        ("state.json", b'{"weights": {"$": "pickle", "data": "x"}}'),
        ("state.json", b"[" * 100_000),
        ("state.json", b"\xff"),
        ("state.safetensors", b"\x80\x04not safetensors"),
        ("state.safetensors", (2**60).to_bytes(8, "little")),
    ],
)
def test_a_forged_state_is_refused_without_a_traceback(file: str, content: bytes, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / file).write_bytes(content)
    reseal(path)
    assert "the state is malformed" in refused(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "checkpoint format 2, but this mmalign reads format 1"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0"}}}, "was not written with the checkpoint"),
        ({"files": []}, "manifest.json is damaged"),
        ({"step": "1"}, "manifest.json is damaged"),
        ({"surprise": 1}, "manifest.json is damaged"),
    ],
    ids=str,
)
def test_a_forged_manifest_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reseal(path, **changes)
    assert said in refused(path)


def test_a_checkpoint_of_another_method_or_rank_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, summary={"rank": 8})
    said = refused(path, expect_method="ipo")
    assert said.startswith(f"a checkpoint of method 'dpo', but this run is 'ipo' ({path}). Give another")
    said = refused(path, expect_method="dpo", expect={"rank": 16})
    assert said.startswith(f"the checkpoint has rank 8, but this run has rank 16 ({path}). Set rank as it was")
    assert "has base None" in refused(path, expect={"base": "sd15"})


# ----------------------------------------------------------------------------------------------------
# Which one


def test_choosing_what_to_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert checkpoint.choose("auto", run).path is None  # a first start
    assert checkpoint.choose("none", run).path is None
    first, second = save(run, 9), save(run, 10)
    copied = Path(shutil.copytree(first, tmp_path / "best"))
    assert checkpoint.choose("auto", run).path == second
    assert checkpoint.choose("none", run).path is None
    assert checkpoint.choose(str(first), tmp_path / "other").path == first
    assert checkpoint.choose(str(run), tmp_path / "other").path == second
    assert checkpoint.choose(str(copied), run).path == copied
    with pytest.raises(UserError, match=r"no such checkpoint \(loop\.resume=nowhere\)"):
        checkpoint.choose("nowhere", run)
    with pytest.raises(UserError, match="no good checkpoint: there is none"):
        checkpoint.choose(str(tmp_path), run)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_keep_removes_the_oldest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-00000015", "checkpoint-100000000"]


def test_keep_counts_only_good_ones_and_never_removes_the_last_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    for step in (3, 4):
        path = save(tmp_path, step)
        os.truncate(path / "state.safetensors", 10)
    flip(save(tmp_path, 5) / "state.safetensors", -1)  # right in size, wrong in content
    checkpoint.prune(tmp_path, 1)
    assert "checkpoint-00000002" in names(tmp_path)
    assert "checkpoint-00000001" not in names(tmp_path)
    assert checkpoint.latest(tmp_path).path == tmp_path / "checkpoint-00000002"


def test_what_was_just_written_stays_even_below_later_steps(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["checkpoint-00000015", "checkpoint-00000030"]


def test_later_checkpoints_are_set_aside_not_lost(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    checkpoint.set_aside(tmp_path, 10)
    assert names(tmp_path) == [
        "checkpoint-00000010",
        "checkpoint-00000020.aside-1",
        "checkpoint-00000030.aside-1",
    ]
    save(tmp_path, 20)
    checkpoint.set_aside(tmp_path, 10)
    assert checkpoint.latest(tmp_path).path == tmp_path / "checkpoint-00000010"
    assert checkpoint.load(tmp_path / "checkpoint-00000020.aside-2").step == 20


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    pid, living = dead_pid(), os.getppid()
    (tmp_path / f".checkpoint-00000002.tmp-{pid}").mkdir()
    (tmp_path / f".checkpoint-00000002.tmp-{living}").mkdir()
    (tmp_path / "notes").mkdir()
    good.rename(tmp_path / f".checkpoint-00000001.old-{pid}")  # died between the two renames of a replacement
    assert checkpoint.latest(tmp_path).path is None  # looking changes nothing: another host may be saving
    assert checkpoint.choose("auto", tmp_path).path == good
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == [f".checkpoint-00000002.tmp-{living}", "checkpoint-00000001", "notes"]


# ----------------------------------------------------------------------------------------------------
# A full disk


def disk_is_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_full_disk(tmp_path: Path, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        save(tmp_path, 2, keep=1, **options)
    said = str(caught.value)
    assert said.startswith("disk full while saving checkpoint-00000002; the previous checkpoint ")
    assert "checkpoint-00000001 is intact" in said
    assert "Free some space" in said
    assert names(tmp_path) == ["checkpoint-00000001"]
    assert checkpoint.latest(tmp_path).path == tmp_path / "checkpoint-00000001"


@pytest.mark.parametrize(
    "call", ["os.fsync", "pathlib.Path.write_text", "mmalign.checkpoint._write", "pathlib.Path.rename"]
)
def test_a_full_disk_loses_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(call, disk_is_full)
        check_full_disk(tmp_path)
    assert save(tmp_path, 2, keep=1).name in names(tmp_path)  # with space again, the same call succeeds


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_that_really_refuses_the_bytes(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def write(folder: Path) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)

    check_full_disk(tmp_path, writers={"model": write})


def test_a_library_that_wraps_the_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def rust(*_: object) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", rust)
    check_full_disk(tmp_path)


def test_a_failed_replacement_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    rename = Path.rename

    def only_aside(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            disk_is_full()
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", only_aside)
        with pytest.raises(UserError, match="disk full"):
            save(tmp_path, 1, state={"second": True})
    assert names(tmp_path) == [path.name]
    assert checkpoint.load(path).state["position"] == 7


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"cannot save checkpoint-00000001: .*\(.*run"):
        save(tmp_path / "run" / "deep", 1)


# ----------------------------------------------------------------------------------------------------
# SIGKILL

# Forks a process that saves and saves, and kills it: at random times, and by its own hand just before and
# after the n-th of the calls that reach the disk. After each death the newest checkpoint must be whole and no
# step be lost that was reported as saved.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mmalign import checkpoint, manifest
import safetensors.torch

directory, rng = Path(sys.argv[1]), random.Random(0)

def state(step):
    data = torch.full((1 << 20,), step, dtype=torch.int32)
    return {"step": step, "data": data, "rng": torch.get_rng_state()}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def armed(owner, name, count, after):
    original, calls = getattr(owner, name), [0]
    def call(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == count and not after:
            die()
        result = original(*arguments, **keywords)
        if calls[0] == count and after:
            die()
        return result
    setattr(owner, name, call)

def saver(start, pipe, point, again):
    if point is not None:
        armed(*point)
    step = start
    while True:
        step += 1
        for _ in range(2 if again else 1):
            checkpoint.save(directory, step, state(step), keep=2, method="dpo")
        os.write(pipe, step.to_bytes(8, "little"))

points = [(os, "fsync", n, after) for n in (1, 3, 5) for after in (False, True)]
points += [(Path, "rename", n, after) for n in (1, 2, 3) for after in (False, True)]
points += [(safetensors.torch, "save_file", 2, True), (manifest, "seal", 2, False)]
points += [(checkpoint.shutil, "rmtree", 3, False)]
deaths = [(point, again) for point in points for again in (False, True)] + [(None, False)] * 12
done = 0
for point, again in deaths:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            saver(done, writer, point, again)
        finally:
            os._exit(1)  # an exception, not the signal
    os.close(writer)
    if point is None:
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, again, status)
    reported = os.read(reader, 1 << 16)
    os.close(reader)
    saved = int.from_bytes(reported[-8:], "little") if reported else done
    found = checkpoint.choose("auto", directory)
    assert found.warnings == [], (point, again, found.warnings)
    if found.path is None:
        assert saved == 0, (point, again)
        continue
    loaded = checkpoint.load(found.path)
    assert saved <= loaded.step <= saved + 1, (point, again, saved, loaded.step)
    assert loaded.state["step"] == loaded.step
    assert torch.equal(loaded.state["data"], state(loaded.step)["data"]), (point, again)
    done = loaded.step
checkpoint.prune(directory, 1)
assert len(list(directory.iterdir())) == 1, list(directory.iterdir())
print(len(deaths), "deaths,", done, "checkpoints")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "42 deaths" in result.stdout
