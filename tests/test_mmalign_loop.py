"""The training loop on a tiny network: exact resume, equal gradients however a batch is cut, guards, signals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign import checkpoint
from mmalign.config import LoopSettings, OptimSettings
from mmalign.errors import UserError
from mmalign.loop import Hooks, Loop, check_machine, check_zero_margin, shards_weights, trainable, weights_layout
from mmalign.memory import peak_gb
from mmalign.method import Metrics, OneLoss
from mmalign.order import Order, share
from mmalign.randomness import Draws, key_seed

ITEMS = 7
TIMED = ("time", "throughput/pairs_per_second", "memory/peak_gb")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of the first `Accelerator` of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Killed(BaseException):
    """Ends the run where it stands, as SIGKILL would."""


Batch = list[tuple[int, int]]  # (item, visit)


class Regression(OneLoss):
    """(module(x) - y)^2 where x is an item's own number with noise drawn for this visit."""

    def __init__(self, module: nn.Module, passes: int = 1, scale: Callable[[int], float] = lambda _: 1.0) -> None:
        self.module, self.many, self.scale = module, passes, scale
        self.batches_seen = 0

    def passes(self, batch: Batch) -> int:
        return self.many

    def losses(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        draws = Draws([key_seed("x", item, visit) for item, visit in batch])
        numbers = torch.tensor([[item + 1.0] for item, _ in batch])
        x = numbers + 0.1 * draws.normal([3])
        error = (self.module(x) - numbers.sin()).square().mean() * self.scale(self.batches_seen)
        self.batches_seen += 1
        for index in range(self.many):
            loss = error / self.many
            yield loss if index + 1 == self.many else loss.detach() + 0 * error, {"error": loss.detach()}
            error = (self.module(x) - numbers.sin()).square().mean()


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def settings(folder: Path, **changes: Any) -> LoopSettings:
    base = {"steps": 6, "batch_size": 2, "accumulation": 2, "output_dir": folder, "trackers": ("jsonl",)}
    return LoopSettings(**{**base, **changes})


def make(
    folder: Path, *, dropout: float = 0.0, optim: Mapping[str, Any] | None = None, **changes: Any
) -> tuple[Loop, nn.Module]:
    module = network(dropout)
    return Loop(module, settings(folder, **changes), OptimSettings(**{"lr": 0.05, **(optim or {})})), module


def save_model(module: nn.Module) -> Callable[[Path, Any], None]:
    def save(folder: Path, state: Any) -> None:
        assert state is None  # nothing is sharded here
        tensors = {name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}
        save_file(tensors, folder / "net.safetensors")

    return save


def hooks(module: nn.Module, **changes: Any) -> Hooks:
    base: dict[str, Any] = {
        "save_model": save_model(module),
        "load_model": lambda folder: module.load_state_dict(load_file(folder / "net.safetensors")),
        "summary": {"seed": 0},
    }
    return Hooks(**{**base, **changes})


def batches(loop: Loop, spy: Callable[[int, int], None] = lambda update, forward: None) -> Any:
    """Items in the core's order; `spy` is told before each forward and may send signals."""
    order = Order([list(range(ITEMS))], loop.pairs_per_update, loop.settings.seed)

    def source(start: int) -> Iterator[Batch]:
        update = start
        while True:
            picks = order.update(update)
            for forward in range(loop.settings.accumulation):
                spy(update, forward)
                size = loop.settings.batch_size
                mine = share(picks, forward=forward, rank=0, world=1, batch_size=size)
                yield [(pick.item, pick.visit) for pick in mine]
            update += 1

    return source


def run(
    folder: Path,
    *,
    spy: Callable[[int, int], None] = lambda update, forward: None,
    hook: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    name: str = "regression",
    **changes: Any,
) -> tuple[int, nn.Module, Loop]:
    loop, module = make(folder, **changes)
    code = loop.run(Regression(loop.module, **(method or {})), name, batches(loop, spy), hooks(module, **(hook or {})))
    return code, module, loop


def at(update: int, forward: int, act: Callable[[], None]) -> Callable[[int, int], None]:
    return lambda u, f: act() if (u, f) == (update, forward) else None


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def final(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """All tensors of the newest checkpoint's models, and its state."""
    path = checkpoint.latest(folder).path
    assert path is not None
    models = {f"{file.parent.name}/{k}": v for file in path.glob("*/*.safetensors") for k, v in load_file(file).items()}
    return models, checkpoint.load(path).state


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through trees."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# ------------------------------------------------------------------------------------------------ exact resume

# Everything that has state at once: dropout (torch's generator), an average, a schedule, clipping, spike history.
RICH: dict[str, Any] = {
    "dropout": 0.2,
    "optim": {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5},
    "checkpoint_every": 2,
    "skip_spikes": 50.0,
    "steps": 7,  # an epoch of 7 items has 2 updates of 4 pairs: 3.5 epochs
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, **RICH)[0] == 0
    return folder


@pytest.mark.parametrize(
    ("spy", "code", "newest"),
    [
        pytest.param(at(3, 1, sigterm), 143, 4, id="SIGTERM on the last forward of a window: the update is finished"),
        pytest.param(at(3, 0, sigterm), 143, 3, id="SIGTERM inside a window: its gradients are dropped"),
        pytest.param(at(2, 0, sigterm), 143, 2, id="SIGTERM as an epoch begins"),
        pytest.param(at(0, 0, sigterm), 143, 0, id="SIGTERM inside the first window"),
        pytest.param(at(5, 1, kill), None, 4, id="killed between checkpoints"),
        pytest.param(at(1, 1, kill), None, None, id="killed before the first checkpoint"),
    ],
)
def test_resumed_equals_uninterrupted(
    uninterrupted: Path, tmp_path: Path, spy: Callable[[int, int], None], code: int | None, newest: int | None
) -> None:
    with contextlib.suppress(Killed):
        assert run(tmp_path, spy=spy, **RICH)[0] == code
        assert code is not None
    found = checkpoint.latest(tmp_path).path
    assert (found.name if found else None) == (None if newest is None else f"checkpoint-{newest:08d}")

    assert run(tmp_path, **RICH)[0] == 0
    assert same(final(tmp_path), final(uninterrupted))
    assert any(name.startswith("model_ema/") for name in final(tmp_path)[0])
    assert lines(tmp_path) == lines(uninterrupted)  # so no step is there twice


def test_killed_while_a_checkpoint_is_written(uninterrupted: Path, tmp_path: Path) -> None:
    loop, module = make(tmp_path, **RICH)
    calls: list[Path] = []

    def save(folder: Path, state: Any) -> None:
        calls.append(folder)
        if len(calls) == 4:  # the second checkpoint's average; its state and its model are written
            (folder / "net.safetensors").write_bytes(b"half")
            raise Killed
        save_model(module)(folder, state)

    with pytest.raises(Killed):
        loop.run(Regression(loop.module), "regression", batches(loop), hooks(module, save_model=save))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert run(tmp_path, **RICH)[0] == 0
    assert same(final(tmp_path), final(uninterrupted))
    assert lines(tmp_path) == lines(uninterrupted)


def test_three_interruptions_in_a_row_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    for spy in (at(1, 0, sigterm), at(2, 1, sigterm), at(5, 0, sigterm)):
        assert run(tmp_path, spy=spy, **RICH)[0] == 143
    assert run(tmp_path, **RICH)[0] == 0
    assert same(final(tmp_path), final(uninterrupted))
    assert lines(tmp_path) == lines(uninterrupted)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "checkpoint-" in str(path)}
    log = lines(tmp_path)
    assert run(tmp_path)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert lines(tmp_path) == log


def test_moments_keep_the_memory_layout_of_their_weights(tmp_path: Path) -> None:
    """Fused optimizers walk memory, and files hold contiguous tensors: channels-last weights need care."""

    def train(folder: Path, steps: int) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 1))
        module.to(memory_format=torch.channels_last)
        loop = Loop(module, settings(folder, steps=steps), OptimSettings(lr=0.05))
        loop.run(Regression(loop.module), "regression", batches(loop), hooks(module))

    train(tmp_path / "whole", 4)
    train(tmp_path / "half", 2)
    train(tmp_path / "half", 4)
    assert same(final(tmp_path / "half"), final(tmp_path / "whole"))


def test_more_steps_go_on_where_a_finished_run_ended(tmp_path: Path) -> None:
    run(tmp_path / "short", steps=3)
    run(tmp_path / "short", steps=6)
    run(tmp_path / "long", steps=6)
    assert same(final(tmp_path / "short"), final(tmp_path / "long"))


def test_resume_none_starts_afresh_and_keeps_what_was_there(tmp_path: Path) -> None:
    run(tmp_path, steps=4, checkpoint_every=2)
    first = lines(tmp_path)
    run(tmp_path, steps=4, checkpoint_every=4, resume="none")
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-00000002.aside-1", "checkpoint-00000004", "checkpoint-00000004.aside-1"]
    assert lines(tmp_path) == first
    assert (tmp_path / "metrics-earlier-1.jsonl").is_file()


def test_resuming_from_an_older_checkpoint_sets_the_newer_one_aside(uninterrupted: Path, tmp_path: Path) -> None:
    run(tmp_path, **{**RICH, "keep_checkpoints": 9})
    older = str(tmp_path / "checkpoint-00000002")
    run(tmp_path, **{**RICH, "keep_checkpoints": 9, "resume": older})
    assert (tmp_path / "checkpoint-00000006.aside-1").is_dir()
    assert same(final(tmp_path), final(uninterrupted))
    assert lines(tmp_path) == lines(uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dpo"}, r"a checkpoint of method 'regression', but this run is 'dpo'"),
        ({"hook": {"summary": {"seed": 1}}}, r"the checkpoint has seed 0, but this run has seed 1"),
        ({"steps": 5}, r"the checkpoint is at update 6, past loop.steps=5"),
        ({"resume": "nowhere"}, r"no such checkpoint \(loop.resume=nowhere\)"),
    ],
)
def test_a_refused_resume_touches_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    started: list[int] = []
    changes = {**changes, "hook": {**changes.get("hook", {}), "started": lambda: started.append(1)}}
    with pytest.raises(UserError, match=message):
        run(tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not started


def test_started_comes_before_the_first_update(tmp_path: Path) -> None:
    events: list[str] = []
    run(
        tmp_path,
        spy=lambda update, forward: events.append("batch"),
        hook={"started": lambda: events.append("started"), "saved": lambda: events.append("saved")},
        steps=1,
    )
    assert events == ["started", "batch", "batch", "saved"]


# ------------------------------------------------------------------------------------- one update, cut differently


@pytest.mark.parametrize("cut", [(1, 8), (2, 4), (4, 2)])
def test_accumulated_forwards_equal_one_large_batch(tmp_path: Path, cut: tuple[int, int]) -> None:
    # Not bit for bit: a mean over eight rows is summed in another order than eight means are. In float64 the
    # difference drowns, and what is left would be a wrong weight on some forward.
    weights = []
    for batch_size, accumulation in ((8, 1), cut):
        loop, module = make(tmp_path / str(batch_size), batch_size=batch_size, accumulation=accumulation)
        module.double()
        method = Regression(loop.module)
        torch.set_default_dtype(torch.float64)
        try:
            loop.run(method, "regression", batches(loop), hooks(module))
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-9)
    whole, parts = (lines(tmp_path / str(size)) for size in (8, cut[0]))
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_losses_of_one_batch_add_up(tmp_path: Path) -> None:
    class Halves(Regression):
        """The same loss in two parts, each with its own graph."""

        def losses(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
            for _ in range(self.many):
                loss, metrics = next(Regression(self.module).losses(batch))
                yield loss / self.many, {"error": metrics["error"] / self.many}

    found = []
    for passes in (1, 2):
        loop, module = make(tmp_path / str(passes), accumulation=2)
        loop.run(Halves(loop.module, passes), "regression", batches(loop), hooks(module))
        found.append((final(tmp_path / str(passes)), lines(tmp_path / str(passes))))
    (one, log_one), (two, log_two) = found
    for name, tensor in one[0].items():
        torch.testing.assert_close(tensor, two[0][name], rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in log_one] == pytest.approx([row["loss"] for row in log_two], rel=1e-5)
    assert [row["error"] for row in log_one] == pytest.approx([row["loss"] for row in log_one], rel=1e-5)


def test_gradients_are_clipped_and_their_norm_is_logged_before_that(tmp_path: Path) -> None:
    norms = {}
    for limit in (1e-3, None):
        _, module, _ = run(tmp_path / str(limit), steps=1, optim={"max_grad_norm": limit, "lr": 1e-9})
        norms[limit] = lines(tmp_path / str(limit))[0]["grad_norm"]
    assert norms[1e-3] == pytest.approx(norms[None])
    assert norms[None] > 1e-2

    loop, module = make(tmp_path / "sgd", steps=1, optim={"max_grad_norm": 1e-3})
    loop.optimizer.optimizer = torch.optim.SGD(loop.parameters, lr=1.0)
    before = [p.detach().clone() for p in loop.parameters]
    # AdamW hides the size of a gradient; plain SGD with lr 0.05 (set by the loop) shows it
    loop.run(Regression(loop.module), "regression", batches(loop), hooks(module))
    moved = math.sqrt(sum(float((p - b).detach().square().sum()) for p, b in zip(loop.parameters, before, strict=True)))
    assert moved == pytest.approx(0.05 * 1e-3, rel=1e-3)


def test_the_average_is_what_its_formula_says(tmp_path: Path) -> None:
    history: list[list[Tensor]] = []
    loop, module = make(tmp_path, optim={"ema_decay": 0.5}, steps=4)
    expected = [p.detach().clone() for p in loop.parameters]
    history_hook = hooks(module, sample=lambda step: history.append([p.detach().clone() for p in loop.parameters]))
    loop.settings = loop.settings.model_copy(update={"sample_every": 1})
    loop.run(Regression(loop.module), "regression", batches(loop), history_hook)
    for step, weights in enumerate(history):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    models, _ = final(tmp_path)
    averaged = [models[f"model_ema/{name}"] for name, _ in module.named_parameters()]
    torch.testing.assert_close(averaged, expected)
    last = [models[f"model/{name}"] for name, _ in module.named_parameters()]
    assert same(last, history[-1])
    assert not same(last, averaged)


def test_bf16_forwards_with_fp32_weights(tmp_path: Path) -> None:
    loop, module = make(tmp_path, precision="bf16", steps=2)
    seen = []
    module[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    loop.run(Regression(loop.module), "regression", batches(loop), hooks(module))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in loop.parameters} == {torch.float32}


def test_compile_is_asked_for_only_when_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    make(tmp_path)
    assert compiled == []
    _, module = make(tmp_path, compile=True)
    assert compiled == [module]


def test_a_module_without_trainable_parameters_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        Loop(network().requires_grad_(False), settings(tmp_path), OptimSettings(lr=1.0))


# ------------------------------------------------------------------------------------------------------ guards


def explode(*forwards: int, by: float = math.nan) -> Callable[[int], float]:
    return lambda forward: by if forward in forwards else 1.0


def test_an_update_that_is_not_finite_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "good", steps=3, accumulation=1)
    code, *_ = run(tmp_path / "bad", steps=4, accumulation=1, method={"scale": explode(3)})
    assert code == 0
    good, bad = final(tmp_path / "good"), final(tmp_path / "bad")
    assert same(good[0], bad[0])  # weights
    assert same(good[1]["optimizer"]["state"], bad[1]["optimizer"]["state"])  # moments did not see the nan
    rows = lines(tmp_path / "bad")
    assert [row["updates/skipped"] for row in rows] == [0, 0, 0, 1]
    assert rows[3]["loss"] is None  # JSON has no nan
    assert "1 updates were left out" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "after"), [(40, 13), (4, 4)])
def test_a_run_of_bad_updates_ends_with_one_line_and_an_intact_checkpoint(
    tmp_path: Path, steps: int, after: int
) -> None:
    first = 3 if steps == 40 else 0
    with pytest.raises(UserError) as caught:
        run(
            tmp_path,
            steps=steps,
            accumulation=1,
            checkpoint_every=3,
            method={"scale": lambda forward: math.nan if forward >= first else 1.0},
        )
    assert str(caught.value) == (
        f"loss or gradient was not finite for {after - first} updates in a row (last loss nan) (update {after}). "
        "Lower optim.lr or method.beta, or use loop.precision=bf16; the last checkpoint is untouched."
    )
    if first:
        found = checkpoint.latest(tmp_path)
        assert found.path is not None and not found.warnings
        assert all(tensor.isfinite().all() for tensor in final(tmp_path)[0].values())


def test_a_spike_is_left_out_once_there_is_a_history(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 60, "accumulation": 1, "optim": {"lr": 1e-3}}
    spikes = {"scale": explode(10, 55, by=1000.0)}
    run(tmp_path / "guarded", **options, skip_spikes=20.0, method=spikes)
    run(tmp_path / "open", **options, method=spikes)
    guarded, unguarded = lines(tmp_path / "guarded"), lines(tmp_path / "open")
    assert guarded[:55] == unguarded[:55]  # the first came before anything was known to be normal
    assert [row["updates/skipped"] for row in guarded[54:57]] == [0, 1, 1]
    assert unguarded[-1]["updates/skipped"] == 0


def test_a_spike_in_half_precision_does_not_confuse_the_loss_scale(tmp_path: Path) -> None:
    loop, module = make(tmp_path, steps=60, accumulation=1, skip_spikes=20.0, optim={"lr": 1e-3})
    # as accelerate sets itself up for fp16 on a GPU
    loop.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop.accelerator.native_amp, loop.accelerator.state._mixed_precision = True, "fp16"
    loop.optimizer = AcceleratedOptimizer(loop.optimizer.optimizer, scaler=loop.accelerator.scaler)
    loop.accelerator._optimizers = [loop.optimizer]
    code = loop.run(Regression(loop.module, scale=explode(55, by=1000.0)), "regression", batches(loop), hooks(module))
    assert code == 0
    assert lines(tmp_path)[-1]["updates/skipped"] == 1


def test_first_margins_must_be_zero() -> None:
    check_zero_margin({"loss": torch.tensor(0.69)})
    check_zero_margin({"rewards/margins_abs": torch.tensor(1e-4)})
    with pytest.raises(UserError, match=r"the first margins are 0\.002, not 0: .* \(update 1\)"):
        check_zero_margin({"rewards/margins_abs": torch.tensor(2e-3)})


# --------------------------------------------------------------------------------------- signals, samples, lines


def test_the_signal_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[Any] = []
    run(tmp_path, spy=lambda u, f: inside.append(signal.getsignal(signal.SIGTERM)), steps=1)
    assert inside[0] is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_trains_without_handling_signals(tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(tmp_path, steps=1)[0]))
    thread.start()
    thread.join()
    assert codes == [0]


def test_validation_samples_leave_training_alone(tmp_path: Path) -> None:
    plain = {**RICH, "sample_every": 0}
    run(tmp_path / "plain", **plain)
    loop, module = make(tmp_path / "sampling", **{**plain, "sample_every": 1})
    seen = []

    def sample(step: int) -> None:
        seen.append((step, module.training, torch.is_grad_enabled(), float(torch.rand(()))))
        module(torch.randn(5, 3))

    loop.run(Regression(loop.module), "regression", batches(loop), hooks(module, sample=sample))
    assert [row[:3] for row in seen] == [(step, False, False) for step in range(1, 8)]
    assert module.training
    assert same(final(tmp_path / "plain"), final(tmp_path / "sampling"))


def test_lines_come_at_the_first_every_third_and_the_last_update(tmp_path: Path) -> None:
    run(tmp_path, steps=8, log_every=3, optim={"lr": 0.08, "schedule": "linear"})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6, 8]
    assert [row["lr"] for row in rows] == pytest.approx([0.08, 0.06, 0.03, 0.01])
    assert all(row["throughput/pairs_per_second"] > 0 and row["memory/peak_gb"] > 0 for row in rows)


def test_checkpoints_come_when_asked_and_the_newest_stay(tmp_path: Path) -> None:
    run(tmp_path, steps=7, checkpoint_every=2, keep_checkpoints=2)
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == ["6", "7"]


def test_only_fsdp_needs_contiguous_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert weights_layout() == torch.channels_last
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert weights_layout() == torch.contiguous_format


@pytest.mark.parametrize(
    ("library", "stage", "shards"),
    [("FSDP", "", True), ("DEEPSPEED", "3", True), ("DEEPSPEED", "2", False), ("", "3", False)],
)
def test_launches_that_shard_weights(library: str, stage: str, shards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, str(name.endswith(library) and bool(library)).lower())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    assert shards_weights() is shards


def test_sizes() -> None:
    assert trainable(list(network().parameters())) == 3 * 8 + 8 + 8 + 1
    assert 0.01 < peak_gb() < 1000


# ----------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize("good", ["", "0", "0,1", " 0, 1", "-1", "NoDevFiles", "GPU-8932f937-d72c", "MIG-1/2/3"])
def test_lists_of_gpus_that_cuda_reads(good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", good)
    check_machine(settings(tmp_path))


@pytest.mark.parametrize("bad", ["abc", "0,x", "0;1", "cuda:0", "all"])
def test_lists_of_gpus_that_cuda_takes_for_none(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", bad)
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={bad} is no list of GPUs"):
        check_machine(settings(tmp_path))
