"""The one training loop, on accelerate. It knows neither losses nor models: a method makes losses, a recorder saves.

An update is a pure function of (weights, optimizer state, update number): the learning rate is computed, not stepped;
the picks and draws come from the update's number; torch's global generators are re-seeded for each update. So a
resumed run needs the weights, the optimizer's state and a number, and equals the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from mmalign import checkpoint
from mmalign.config import LoopSettings, OptimSettings
from mmalign.errors import UserError
from mmalign.memory import peak_gb
from mmalign.method import Method
from mmalign.optimizers import Average, make_optimizer, rate
from mmalign.order import Order, Pick, share
from mmalign.progress import Progress
from mmalign.randomness import key_seed
from mmalign.tracking import Tracker

MAX_BAD_UPDATES = 10  # in a row, before the run is given up
SPIKE_HISTORY = 100  # gradient norms that say what is normal
SHOWN = {"loss": "loss", "accuracy": "rewards/accuracies"}  # beside the progress bar
ZERO_MARGIN = 1e-3  # largest margin that counts as zero at the start
GPU_ENTRY = re.compile(r"(?:\d+|-1|NoDevFiles|(?:GPU|MIG)-[\w/-]+)?")  # of CUDA_VISIBLE_DEVICES

Weights = dict[str, Tensor] | None  # gathered from all processes; None where each has them whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What the entry module knows and the loop does not.

    Attributes:
        save_model: writes the trained weights into a folder, in the layout of their library: the given ones where
            they were sharded, else the module's own. Called by the first process only.
        load_model: reads them back, bit for bit.
        started: called once nothing can refuse the run any more, before the first update.
        sample: validation samples at an update; may be None.
        look: called before the first update and after each, and leaves the training undisturbed; returns why the run
            should end here, or None.
        saved: called after each checkpoint, by every process (caches persist themselves here).
        summary: what identifies the run in a checkpoint's manifest: a checkpoint that differs is refused.
        config: the effective configuration, for trackers that show it.
    """

    save_model: Callable[[Path, Weights], None]
    load_model: Callable[[Path], None]
    started: Callable[[], None] | None = None
    sample: Callable[[int], None] | None = None
    look: Callable[[int], str | None] | None = None
    saved: Callable[[], None] | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class Loop:
    """Prepares a module for training, then runs a method on it.

    Args:
        module: what is trained: its parameters that require gradients.
        settings, optim: the recipe's sections.
    """

    def __init__(self, module: nn.Module, settings: LoopSettings, optim: OptimSettings) -> None:
        self.settings, self.optim = settings, optim
        self.accelerator = make_accelerator(settings)
        self.raw = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        if settings.compile:
            module.compile()
        self.module, self.optimizer = self.accelerator.prepare(module, make_optimizer(self.parameters, optim))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]  # sharded ones are new objects
        self.average = Average(self.parameters, optim.ema_decay) if optim.ema_decay else None
        self._norms: list[float] = []
        self._bad = 0
        self._skipped = 0
        self._stop: signal.Signals | None = None

    @property
    def pairs_per_update(self) -> int:
        settings = self.settings
        return settings.batch_size * settings.accumulation * int(self.accelerator.num_processes)

    def picks(self, groups: Sequence[Sequence[int]], start: int) -> Iterator[list[Pick]]:
        """What this process trains on from an update on, without end: the items of each forward.

        Args:
            groups: items that can share a batch; see `Order`.
        """
        settings, accelerator = self.settings, self.accelerator
        order = Order(groups, self.pairs_per_update, settings.seed)
        for update in itertools.count(start):
            picks = order.update(update)
            for forward in range(settings.accumulation):
                yield share(
                    picks,
                    forward=forward,
                    rank=accelerator.process_index,
                    world=accelerator.num_processes,
                    batch_size=settings.batch_size,
                )

    def run(self, method: Method, name: str, source: Callable[[int], Iterator[Any]], hooks: Hooks) -> int:
        """Train to the last update.

        Args:
            method: makes the losses.
            name: the method's, for the manifest.
            source: the batches of this process from a given update on, `accumulation` of them an update.
            hooks: see `Hooks`.

        Returns:
            0, or 143 when a SIGTERM ended the run early (a checkpoint is written first).
        """
        settings = self.settings
        resumed = self._resume(method, name, hooks)
        start = resumed or 0
        main = self.accelerator.is_main_process
        make_folder(settings.output_dir)
        self.tracker = Tracker(
            settings.output_dir, settings.trackers, resume_step=resumed, config=hooks.config, enabled=main
        )
        if hooks.started:
            hooks.started()
        bar = Progress(settings.steps, f"train {name}", unit="update", initial=start, enabled=main)
        with self._signals(), contextlib.closing(self.tracker), bar:
            batches = method.batches(source(start))
            clock, since = time.perf_counter(), start
            shown: dict[str, float] = {}
            verdict = self._look(hooks, start)
            for step in range(start, settings.steps if verdict is None else start):
                metrics = self._update(method, batches, step)
                if metrics is None:  # stopped inside the window: its gradients are dropped, nothing else happened
                    self._save(method, name, step, hooks)
                    break
                done = step + 1
                if done % settings.log_every == 0 or done == settings.steps or done == start + 1:
                    line = self._line(metrics, done, time.perf_counter() - clock, done - since)
                    clock, since = time.perf_counter(), done
                    self.tracker.log(done, line)
                    shown = {key: line[name] for key, name in SHOWN.items() if name in line}
                bar.update(1, **shown)
                if settings.sample_every and done % settings.sample_every == 0 and hooks.sample:
                    with self.undisturbed():
                        hooks.sample(done)
                    clock, since = time.perf_counter(), done
                verdict = self._look(hooks, done)
                last = done == settings.steps or verdict is not None
                stopping = self._agreed_to_stop()
                if last or stopping or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
                    self._save(method, name, done, hooks)
                if stopping or last:
                    break
        if verdict is not None:
            self.accelerator.print(f"mmalign: stopped: {verdict}")
        if self._skipped:
            self.accelerator.print(f"mmalign: warning: {self._skipped} updates were left out; see updates/skipped")
        if self._stop is not None:
            self.accelerator.print("stopped by a signal; the same command goes on from the checkpoint just written")
            return 128 + self._stop
        return 0

    def _look(self, hooks: Hooks, step: int) -> str | None:
        """What the run's watch says, the same on all processes."""
        if hooks.look is None:
            return None
        said = [hooks.look(step)]
        broadcast_object_list(said)
        return said[0]

    # ------------------------------------------------------------------------------------------- one update

    def _update(self, method: Method, batches: Iterator[Any], step: int) -> dict[str, Tensor] | None:
        """One optimizer step. None when a signal came before the window was full."""
        settings, accelerator = self.settings, self.accelerator
        torch.manual_seed(key_seed("update", settings.seed, step, accelerator.process_index))
        self.module.train()
        sums: dict[str, Tensor] = {}
        count = 0
        for forward in range(settings.accumulation):
            if self._stop is not None and accelerator.num_processes == 1:
                self.optimizer.zero_grad(set_to_none=True)
                return None
            batch = next(batches)
            passes = method.passes(batch)
            losses = method.losses(batch)
            for index in range(passes):
                whole = forward + 1 == settings.accumulation and index + 1 == passes
                with contextlib.nullcontext() if whole else accelerator.no_sync(self.module):
                    loss, metrics = next(losses)
                    accelerator.backward(loss)
                for key, value in metrics.items():
                    sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach().float()
                sums["loss"] = sums.get("loss", torch.zeros((), device=loss.device)) + loss.detach().float()
            count += 1
        means = {key: value / count for key, value in sums.items()}
        if step == 0:
            check_zero_margin(means)
        return self._step(means, step)

    def _step(self, means: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        accelerator, optim = self.accelerator, self.optim
        lr = rate(step, self.settings.steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = accelerator.clip_grad_norm_(self.module.parameters(), optim.max_grad_norm or math.inf)
        norm = torch.as_tensor(0.0 if norm is None else norm).detach().float()
        if self._is_normal(norm.item(), means["loss"], step):
            self.optimizer.step()
            if self.average:
                self.average.update(self.parameters, step)
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # it unscaled these gradients and must hear that they are done with
        self.optimizer.zero_grad(set_to_none=True)
        here = means["loss"].device
        return {
            **means,
            "grad_norm": norm.to(here),
            "lr": torch.tensor(lr, device=here),
            "updates/skipped": torch.tensor(float(self._skipped), device=here),
        }

    def _is_normal(self, norm: float, loss: Tensor, step: int) -> bool:
        """Whether to take this step: not when its gradient is not finite, or far larger than lately."""
        scaling = self.accelerator.scaler is not None  # fp16's scaler finds overflows itself and lowers its scale
        finite = math.isfinite(norm)
        factor = self.settings.skip_spikes
        spike = bool(
            finite
            and factor
            and len(self._norms) >= SPIKE_HISTORY // 2
            and norm > factor * statistics.median(self._norms)
        )
        if finite:
            self._norms = [*self._norms, norm][-SPIKE_HISTORY:]
        self._bad = 0 if finite else self._bad + 1
        self._skipped += (not finite) or spike
        if self._bad >= min(MAX_BAD_UPDATES, self.settings.steps):
            raise UserError(
                f"loss or gradient was not finite for {self._bad} updates in a row (last loss {loss.item():g})",
                place=f"update {step + 1}",
                fix="Lower optim.lr or method.beta, or use loop.precision=bf16; the last checkpoint is untouched.",
            )
        return not spike and (finite or scaling)

    def _line(self, metrics: Mapping[str, Tensor], step: int, seconds: float, updates: int) -> dict[str, float]:
        """The logged numbers: means over processes, one copy to the host for all of them."""
        names = sorted(metrics)
        values = torch.stack([metrics[name].float().reshape(()) for name in names])
        values = self.accelerator.reduce(values, reduction="mean")
        line = dict(zip(names, values.tolist(), strict=True))
        line["throughput/pairs_per_second"] = self.pairs_per_update * updates / max(seconds, 1e-9)
        line["memory/peak_gb"] = peak_gb()
        return line

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, anything may be sampled: modes, generators and gradients are as before afterwards."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            self.module.eval()
            try:
                yield
            finally:
                self.module.train()

    # ------------------------------------------------------------------------------------ saving and resuming

    def _save(self, method: Method, name: str, step: int, hooks: Hooks) -> None:
        state = {
            "optimizer": self._optimizer_state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "average": self.average.state_dict() if self.average else None,
            "guard": {"norms": self._norms, "bad": self._bad, "skipped": self._skipped},
            "method": method.state_dict(),
        }
        gathered = self.full_state()  # takes all processes, writing only the first
        writers = {"model": lambda folder: hooks.save_model(folder, gathered)}
        if self.average:
            with self.average.swapped_in(self.parameters):
                averaged = self.full_state()
            writers["model_ema"] = lambda folder: self._save_averaged(hooks, folder, averaged)
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.settings.output_dir,
                step,
                state,
                keep=self.settings.keep_checkpoints,
                method=name,
                summary=hooks.summary,
                writers=writers,
            )
        self.accelerator.wait_for_everyone()
        if hooks.saved:
            hooks.saved()

    def _save_averaged(self, hooks: Hooks, folder: Path, gathered: Weights) -> None:
        if gathered is not None or self.average is None:
            hooks.save_model(folder, gathered)
            return
        with self.average.swapped_in(self.parameters):
            hooks.save_model(folder, None)

    def _resume(self, method: Method, name: str, hooks: Hooks) -> int | None:
        """The update to start at, with everything restored; None for a run that begins."""
        settings = self.settings
        found = checkpoint.choose(settings.resume, settings.output_dir)
        for warning in found.warnings:
            self.accelerator.print(f"mmalign: warning: {warning}")
        if found.path is None:
            self._set_aside(after=-1)
            return None
        loaded = checkpoint.load(found.path, expect_method=name, expect=hooks.summary)
        if loaded.step > settings.steps:
            raise UserError(
                f"the checkpoint is at update {loaded.step}, past loop.steps={settings.steps}",
                place=str(found.path),
                fix="Raise loop.steps or choose another loop.output_dir.",
            )
        hooks.load_model(found.path / "model")
        self._load_optimizer_state(loaded.state["optimizer"])
        if self.accelerator.scaler and loaded.state["scaler"]:
            self.accelerator.scaler.load_state_dict(loaded.state["scaler"])
        if self.average and loaded.state["average"]:
            self.average.load_state_dict(loaded.state["average"])
        guard = loaded.state["guard"]
        self._norms, self._bad, self._skipped = list(guard["norms"]), guard["bad"], guard["skipped"]
        method.load_state_dict(loaded.state["method"])
        self._set_aside(after=loaded.step)
        self.accelerator.print(f"resumed from {found.path.name}")
        return loaded.step

    def _set_aside(self, after: int) -> None:
        """Keep checkpoints of a trajectory that is being left from being resumed later."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in checkpoint.set_aside(self.settings.output_dir, after=after):
                print(f"mmalign: set aside {path.name}", flush=True)
        self.accelerator.wait_for_everyone()

    def full_state(self) -> Weights:
        """The module's weights put together from all processes; None where every process has them whole."""
        return dict(self.accelerator.get_state_dict(self.module)) if self._sharded else None

    @property
    def _sharded(self) -> bool:
        return str(self.accelerator.distributed_type).endswith(("FSDP", "DEEPSPEED"))

    def _optimizer_state(self) -> dict[str, Any]:
        if not self._sharded:
            return dict(self.optimizer.state_dict())
        from torch.distributed.checkpoint import state_dict as sharded

        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(sharded.get_optimizer_state_dict(self.module, self.optimizer.optimizer, options=options))

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        if not self._sharded:
            self.optimizer.load_state_dict(state)
            match_layouts(self.optimizer.state)
            return
        from torch.distributed.checkpoint import state_dict as sharded

        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        sharded.set_optimizer_state_dict(self.module, self.optimizer.optimizer, state, options=options)

    # --------------------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM asks the run to save and end; handlers are put back afterwards."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = signal.Signals(number)

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _agreed_to_stop(self) -> bool:
        """Whether any process was asked to stop, known to all of them after the same update."""
        if self.accelerator.num_processes == 1:
            return self._stop is not None
        asked = torch.tensor([float(self._stop or 0)], device=self.accelerator.device)
        signal_number = int(self.accelerator.gather(asked).max().item())
        if signal_number:
            self._stop = signal.Signals(signal_number)
        return bool(signal_number)


def check_machine(settings: LoopSettings) -> None:
    """Refuse what this machine cannot do, before time is spent on anything else.

    Raises:
        UserError: fp16 without a GPU, or a list of GPUs that CUDA cannot read and would take for none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    for entry in visible.split(","):
        if not GPU_ENTRY.fullmatch(entry.strip()):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible} is no list of GPUs",
                place=f"'{entry}' in the environment",
                fix="Give numbers such as 0,1 or ids such as GPU-..., or unset it.",
            )
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("fp16 training needs a GPU", place="loop.precision", fix="Use fp32 or bf16 on this machine.")


def processes() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started, and its device.

    Accelerate itself takes each of several processes without a GPU for a run of its own, unless it is told.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def weights_layout() -> torch.memory_format:
    """The memory layout to train convolutions in: channels last is faster, but FSDP2 takes contiguous weights only."""
    return torch.contiguous_format if _launched_with("FSDP") else torch.channels_last


def shards_weights() -> bool:
    """Whether this was launched to split weights over processes: FSDP, or DeepSpeed's third stage."""
    third = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return _launched_with("FSDP") or (_launched_with("DEEPSPEED") and third)


def _launched_with(library: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{library}", "false").lower() == "true"  # accelerate launch says it so


def make_accelerator(settings: LoopSettings) -> Accelerator:
    """Accelerate set up from the recipe; see `check_machine`."""
    check_machine(settings)
    processes()
    return Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[settings.precision],
        gradient_accumulation_steps=settings.accumulation,
        step_scheduler_with_optimizer=False,
    )


def make_folder(path: Path) -> None:
    """The run's folder.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the run's folder: {error.strerror}", place=f"loop.output_dir={path}", fix="Choose another."
        ) from error


def match_layouts(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Lay out every moment in memory as its parameter is, say channels last.

    Files hold contiguous tensors, and fused optimizers walk parameter, gradient and moments in memory order without
    looking at strides: each weight would be updated with the moments of another one.
    """
    for parameter, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def check_zero_margin(means: Mapping[str, Tensor]) -> None:
    """Before the first step policy equals reference, so every margin is zero; otherwise they are not the same model."""
    margin = means.get("rewards/margins_abs")
    if margin is not None and margin.item() > ZERO_MARGIN:
        raise UserError(
            f"the first margins are {margin.item():.3g}, not 0: policy and reference differ before training",
            place="update 1",
            fix="Check that both use the same weights and precision.",
        )


def trainable(parameters: Sequence[nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters)
