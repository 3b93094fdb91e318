"""One round of an online method: ours, the published procedure, and the floor below which no round can go.

    python -m benchmarks.rollout_round --size 150m              PSO and PRDP with LoRA, on this machine's CPU (or GPU)
    python -m benchmarks.rollout_round --size shapes --methods prdp --steps 20 --passes 2

A round draws pictures of some prompts, scores them and trains on every step of their chains. Same model, prompts,
pictures, steps, batch and precision in one process; the variants take turns, one round each. Decoding and scoring cost
the same whoever does them and are timed apart. One JSON object goes to stdout, progress to stderr.

    plain         benchmarks/plain_rollout.py: one UNet call per picture of a pair, model and branch of guidance
    plain_fused   the same with both pictures, or both branches, in one call
    ours          the trainer's own round: `Rounds.batch`, the method's losses, `Loop._update`
    floor         nothing but the UNet's forwards and backwards of a round of ours, as often and with as many rows

`work` counts them for each, by what they are for; in `forward_units` a row's forward is 1 and with its backward 3. Peak
memory of PRDP's training is measured at several numbers of steps, each in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image

from benchmarks.dpo_step import RESOLUTION, in_child, take_turns
from benchmarks.harness import log, machine, seconds, spread, versions
from benchmarks.plain_rollout import PlainPRDP, PlainPSO
from benchmarks.sizes import Precision, build_pipeline
from diffusion import adapters
from diffusion.feeds import RolloutFeed
from diffusion.methods import prdp, pso
from diffusion.models import DiffusionModel
from diffusion.pipelines import DTYPES
from diffusion.recipe import RolloutSettings, TrainConfig
from diffusion.rollout import roll_out
from diffusion.settings import LoraSettings, ModelSettings
from diffusion.train import assemble
from diffusion.trajectories import OnlineParts, Turn
from evaluators.rewards import RewardSettings, TermSettings
from mmalign.config import LoopSettings, NamedSection, OptimSettings
from mmalign.loop import trainable
from mmalign.memory import peak_gb, resident_gb
from mmalign.prompts import read_prompts

Name = Literal["pso", "prdp"]
P = ParamSpec("P")
R = TypeVar("R")

WARM_UP = 1  # rounds that are not counted
VARIANTS = ("plain", "plain_fused", "ours")
SOURCE = "shapes:train"
PSO: dict[str, Any] = {"beta": 50.0, "clip": 0.1}
PRDP: dict[str, Any] = {"beta": 3e-5, "clip": 1e-4}
LR = 1e-5
KERNELS: dict[Name, Literal["euler_ancestral", "ddpm"]] = {"pso": "euler_ancestral", "prdp": "ddpm"}
PSO_STEPS, PSO_IMAGES = 4, 2
GUIDANCE = 5.0  # of PRDP; PSO's models have none
PROMPTS = {"pso": {"shapes": 16}, "prdp": {"shapes": 4}}  # per round, where nothing is said; else:
FEW_PROMPTS = {"pso": 2, "prdp": 1}


def brightness(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """The reward: mean of all channels, in [0, 1]. What a reward is costs nothing here."""
    return [float(np.asarray(image, dtype=np.float64).mean()) / 255 for image in images]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is the same for every variant.

    Attributes:
        prompts: in a round.
        batch: prompts trained on at once.
        images: pictures per prompt.
        steps: of the sampler, of which all but the last are random and trained.
        passes: how often a round is trained on.
    """

    method: Name
    size: str
    prompts: int
    batch: int
    images: int
    steps: int
    passes: int
    resolution: int | None
    precision: Precision
    rank: int
    gradient_checkpointing: bool
    device: torch.device

    @property
    def guidance_scale(self) -> float:
        return GUIDANCE if self.method == "prdp" else 0.0

    @property
    def branches(self) -> int:
        """UNet rows per picture and step."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def trained(self) -> int:
        return self.steps - 1

    def pipeline(self) -> Any:
        """A new one."""
        return build_pipeline(self.size, self.device, self.precision, full=False)

    def words(self) -> list[str]:
        """The prompts of every round."""
        return read_prompts(SOURCE, self.prompts)


# ------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """UNet calls of one kind in a round.

    Attributes:
        calls: how many.
        rows: of each.
        backward: whether each is followed by its backward.
    """

    calls: int
    rows: int
    backward: bool = False

    @property
    def units(self) -> int:
        """In forwards of one row; a backward is two."""
        return self.calls * self.rows * (3 if self.backward else 1)


def work(case: Case, variant: str) -> dict[str, Calls]:
    """The UNet calls of a round, by what they are for.

    draw        the policy, on every step
    reference   the reference's scores: while drawing, once and for all (ours), or whenever a batch is trained on
    value       the policy's scores that PRDP's loss is differentiated at; ours knows them until the policy moves
    old         those of the policy that drew: kept from drawing (ours), or computed once they are not the policy's
    train       the policy, with gradients
    """
    turns = case.passes * (case.prompts // case.batch)
    moved = turns - turns // case.passes  # those after the first pass; a pass is one update
    values = case.method == "prdp"
    split = 2 if variant == "plain" else 1  # a picture of a pair, or a branch of guidance, at a time
    drawn, rows = (prompts * case.images * case.branches // split for prompts in (case.prompts, case.batch))

    def on_every_step(turns: int, rows: int, *, backward: bool = False) -> Calls:
        return Calls(calls=case.trained * turns * split, rows=rows, backward=backward)

    if variant == "ours":
        found = {"reference": on_every_step(1, drawn), "value": on_every_step(values * moved, rows)}
    else:
        found = {
            "reference": on_every_step(turns, rows),
            "value": on_every_step(values * turns, rows),
            "old": on_every_step(values * moved, rows),
        }
    found |= {
        "draw": Calls(calls=case.steps * split, rows=drawn),
        "train": on_every_step(turns, rows, backward=True),
    }
    return {name: calls for name, calls in found.items() if calls.calls}


def units(found: dict[str, Calls]) -> int:
    """Of a whole round."""
    return sum(calls.units for calls in found.values())


# ------------------------------------------------------------------------------------------------ the variants


class Meter:
    """Seconds of decoding and scoring in every round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def begin(self) -> None:
        """A round."""
        self.rounds.append({"decode": 0.0, "score": 0.0})

    def timed(self, name: str, job: Callable[P, R], device: torch.device) -> Callable[P, R]:
        """The same, timed."""

        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            out: list[R] = []
            self.rounds[-1][name] += seconds(lambda: out.append(job(*args, **kwargs)), device)
            return out[0]

        return measured


class Ours:
    """The trainer's rounds, put together as `diffusion.train` does.

    All pictures of a round are drawn at once, so that nothing is drawn while they are scored and the seconds of a round
    are those of its parts.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        config = recipe(case, folder)
        self.case, self.meter = case, Meter()
        self.model = DiffusionModel(case.pipeline(), config.model)
        adapters.set_attention(self.model.unet, "sdpa")
        feed = RolloutFeed(config, self.model, needs_reference=True)
        self.loop, parts, _ = assemble(config, self.model, feed)
        assert isinstance(parts, OnlineParts)  # the feed of rollouts makes them
        self.parts = parts
        if parts.kernel.trained != case.trained:
            raise ValueError(f"{parts.kernel.trained} steps are trained, not {case.trained}")
        studio = parts.rounds._studio
        studio._decode = self.meter.timed("decode", studio._decode, case.device)
        reward = studio.reward
        reward.measure = self.meter.timed("score", reward.measure, torch.device("cpu"))
        self.method = self.build(parts)
        self.batches = self.method.batches(feed.source(self.loop)(0))
        self.losses: list[float] = []

    def build(self, parts: OnlineParts) -> pso.PairwiseSampleOptimisation | prdp.ProximalRewardDifference:
        """The method, on these parts."""
        if self.case.method == "pso":
            return pso.build(pso.Options(**PSO), parts)
        return prdp.build(prdp.Options(**PRDP), parts)

    def step(self) -> None:
        """A round: drawn with its first update."""
        self.meter.begin()
        for _ in range(self.parts.rounds.updates):
            metrics = self.loop._update(self.method, self.batches, len(self.losses))
            assert metrics is not None  # only a signal ends an update early
            self.losses.append(metrics["loss"].item())


class Plain:
    """`plain_rollout`'s rounds on the same prompts."""

    def __init__(self, case: Case, folder: Path, *, fused: bool = False) -> None:
        pipeline = case.pipeline()
        if case.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        self.case, self.meter = case, Meter()
        settings: dict[str, Any] = {
            "score": self.meter.timed("score", brightness, torch.device("cpu")),
            "rank": case.rank,
            "targets": adapters.ATTENTION,
            "dtype": DTYPES[case.precision],
            "lr": LR,
            "steps": case.steps,
            "size": case.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
            "batch": case.batch,
            "passes": case.passes,
            "fused": fused,
        }
        self.trainer: PlainPSO | PlainPRDP
        if case.method == "pso":
            self.trainer = PlainPSO(pipeline, **settings, **PSO)
        else:
            settings |= {"images": case.images, "guidance_scale": case.guidance_scale}
            self.trainer = PlainPRDP(pipeline, **settings, **PRDP)
        decode = self.meter.timed("decode", self.trainer.decode, case.device)
        self.trainer.decode = decode  # type: ignore[method-assign]  # the clock around it
        self.prompts = case.words()

    @property
    def losses(self) -> list[float]:
        return self.trainer.losses

    def step(self) -> None:
        """A round."""
        self.meter.begin()
        self.trainer.round(self.prompts)


class Floor:
    """The UNet calls of a round of ours, on its own modules."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.work = ours, work(ours.case, "ours")
        texts = ours.model.encode_prompts(ours.case.words()).to(ours.case.device)
        generator = torch.Generator().manual_seed(0)
        self.inputs = {}
        for rows in {calls.rows for calls in self.work.values()}:
            of = torch.arange(rows, device=ours.case.device) % len(texts)
            x = torch.randn(
                rows, *ours.model.latent_shape(ours.model.resolution, ours.model.resolution), generator=generator
            )
            t = torch.full((rows,), 500, device=ours.case.device)
            self.inputs[rows] = x.to(ours.case.device), t, texts.select(of)
        with torch.no_grad():
            shape = self.predict(self.work["train"].rows, ours.loop.module).shape
        self.gradient = torch.full(shape, 1e-6, device=ours.case.device)

    def predict(self, rows: int, module: torch.nn.Module) -> torch.Tensor:
        return self.ours.parts.predict(module, *self.inputs[rows])

    def enter(self, kind: str) -> None:
        """The mode that calls of a kind run in; it takes a while to reach every layer, so not before each of them."""
        self.ours.loop.module.train(kind in ("value", "train"))

    def one(self, kind: str) -> None:
        """One call of a kind."""
        rows, module = self.work[kind].rows, self.ours.loop.module
        if kind == "train":
            self.predict(rows, module).float().backward(self.gradient)
        elif kind == "reference":
            self.ours.parts.reference.run(lambda at: self.predict(rows, at))
        else:
            with torch.no_grad():
                self.predict(rows, module)

    def step(self) -> None:
        for kind, calls in self.work.items():
            self.enter(kind)
            for _ in range(calls.calls):
                self.one(kind)
        self.ours.loop.optimizer.zero_grad(set_to_none=True)


MAKE: dict[str, Callable[[Case, Path], Ours | Plain]] = {
    "plain": Plain,
    "plain_fused": lambda case, folder: Plain(case, folder, fused=True),
    "ours": Ours,
}


def recipe(case: Case, folder: Path) -> TrainConfig:
    """What a user would write to train like this."""
    return TrainConfig(
        model=ModelSettings(
            path=case.size, dtype=case.precision, resolution=case.resolution, time_ids="constant", offline=True
        ),
        adapter=LoraSettings(rank=case.rank),
        rollout=RolloutSettings(
            prompts=SOURCE,
            count=case.prompts,
            prompts_per_round=case.prompts,
            per_prompt=case.images,
            passes=case.passes,
            kernel=KERNELS[case.method],
            steps=case.steps,
            guidance_scale=case.guidance_scale,
            batch_size=case.prompts * case.images,
            reward=RewardSettings(
                terms=(TermSettings(name="brightness", function="benchmarks.rollout_round:brightness"),)
            ),
        ),
        method=NamedSection(name=case.method),
        optim=OptimSettings(lr=LR, weight_decay=1e-2),
        loop=LoopSettings(
            steps=10**6,
            batch_size=case.batch,
            accumulation=case.prompts // case.batch,
            precision=case.precision,
            gradient_checkpointing=case.gradient_checkpointing,
            output_dir=folder,
        ),
    )


# ------------------------------------------------------------------------------------------------ measuring


def measure(case: Case, wanted: Sequence[str], repeats: int) -> dict[str, Any]:
    """All variants of one method: seconds in turns, the UNet work of each, where ours spends its own."""
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, Any] = {}
        for name in wanted:
            log(f"{case.method}: building {name}")
            running[name] = MAKE[name](case, Path(folder))
            for _ in range(WARM_UP):
                running[name].step()
        ours: Ours | None = running.get("ours")
        if ours:
            running["floor"] = Floor(ours)
            running["floor"].step()
        taken = take_turns(running, repeats, case.device)
        about = describe(ours) if ours else {}
        rest = own_parts(ours, running["floor"], repeats) if ours else {}
        meters = {name: running[name].meter.rounds[WARM_UP:] for name in wanted}
        losses = {name: running[name].losses for name in wanted}
        ours = None
        running.clear()
        gc.collect()
    variants = {
        name: {
            **spreads(taken[name], meters[name]),
            "first_loss": losses[name][0],  # of PSO log 2 for all of them: policy equals reference
            "last_loss": losses[name][-1],
            "work": counted(work(case, name)),
        }
        for name in wanted
    }
    report: dict[str, Any] = {"round": {**settings_of(case), **about}, "variants": variants}
    if rest:
        report["floor"] = {"seconds_per_round": spread(taken["floor"])}
        report["rest"] = rest
    return {**report, "ratios": ratios(report)}


def spreads(taken: Sequence[float], meter: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of a variant's rounds: all of it, decoding, scoring, and what is left without these two."""
    decode, score = ([one[name] for one in meter] for name in ("decode", "score"))
    left = [a - b - c for a, b, c in zip(taken, decode, score, strict=True)]
    return {
        "seconds_per_round": spread(taken),
        "decode": spread(decode),
        "score": spread(score),
        "without_decode_and_score": spread(left),
    }


def counted(found: dict[str, Calls]) -> dict[str, Any]:
    """For the report."""
    return {**{name: asdict(calls) for name, calls in found.items()}, "forward_units": units(found)}


def settings_of(case: Case) -> dict[str, Any]:
    """What a round is."""
    names = ("prompts", "batch", "images", "steps", "trained", "passes", "guidance_scale")
    return {name: getattr(case, name) for name in names}


def own_parts(ours: Ours, floor: Floor, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of one UNet call of each kind, and of what a round of ours does besides, each alone."""
    case, loop, parts = ours.case, ours.loop, ours.parts
    names = case.words()
    shape = ours.model.latent_shape(ours.model.resolution, ours.model.resolution)
    rows = case.prompts * case.images
    texts = ours.model.encode_prompts(names).to(case.device)
    repeated = texts.select(torch.arange(rows, device=case.device) // case.images)
    leaves = {
        n: torch.zeros(n, *shape, device=case.device, requires_grad=True)
        for n in (rows * case.branches, case.batch * case.images * case.branches)
    }
    free = dataclasses.replace(parts.guided, predict=lambda module, x, t, conditioning: leaves[len(x)])
    method = ours.build(dataclasses.replace(parts, guided=free))  # the same code, with a UNet that costs nothing
    batch = parts.rounds.batch(Turn(len(ours.losses) - 1, 0), method.advantages)  # of the newest round: draws nothing

    def draw() -> None:
        keys = [str(row) for row in range(rows)]
        kernel, reference = parts.kernel, parts.reference
        roll_out(loop.module, free, kernel, repeated, keys=keys, starts=keys, seed=0, shape=shape, reference=reference)

    def losses() -> None:
        for loss, _ in method.losses(batch):
            loss.backward()

    alone: dict[str, Callable[[], Any]] = {
        "prompts": lambda: ours.model.encode_prompts(names),
        "draws_steps_and_scores_without_unet": draw,
        "losses_of_a_turn_without_unet": losses,
        "gradient_norm_and_clipping": lambda: loop.accelerator.clip_grad_norm_(loop.module.parameters(), 1.0),
        "optimizer": loop.optimizer.step,
    }
    found = {}
    for kind in floor.work:
        floor.enter(kind)
        found[f"unet_{kind}"] = spread(
            [seconds(functools.partial(floor.one, kind), case.device) for _ in range(repeats)]
        )
    for name, job in alone.items():
        found[name] = spread([seconds(job, case.device) for _ in range(repeats)])
    return found


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """What is claimed: medians of ours against the floor, and those of the others against ours."""
    variants, found = report["variants"], {}
    ours = variants.get("ours")
    for name in ("plain", "plain_fused"):
        if ours and name in variants:
            for what in ("seconds_per_round", "without_decode_and_score"):
                found[f"{what}: {name} / ours"] = variants[name][what]["median"] / ours[what]["median"]
            found[f"forward_units: {name} / ours"] = (
                variants[name]["work"]["forward_units"] / ours["work"]["forward_units"]
            )
    if "floor" in report:
        least = report["floor"]["seconds_per_round"]["median"]
        found["without_decode_and_score: ours / floor"] = ours["without_decode_and_score"]["median"] / least
    return {name: round(value, 4) for name, value in found.items()}


def describe(ours: Ours) -> dict[str, Any]:
    """What was trained, and on what."""
    return {
        "kernel": KERNELS[ours.case.method],
        "unet_parameters": sum(p.numel() for name, p in ours.model.unet.named_parameters() if ".lora_" not in name),
        "trained_parameters": trainable(ours.loop.parameters),
        "resolution": ours.model.resolution,
        "latents": list(ours.model.latent_shape(ours.model.resolution, ours.model.resolution)),
    }


def peak_memory(case: Case) -> dict[str, float]:
    """Makes our trainer and takes a round, alone in this process."""
    before = resident_gb()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(case, Path(folder))
        made = peak_gb(case.device)
        ours.step()
    return {"peak_gb": peak_gb(case.device), "before_the_round_gb": made, "imports_gb": before}


def memory(steps: Sequence[int], command: Sequence[str]) -> dict[str, Any]:
    """Peak memory at several numbers of steps, and the largest against the least."""
    found = {}
    for count in sorted(steps):
        log(f"memory at {count} steps")
        found[count] = in_child([*command, "--child", str(count)])
    peaks = [found[count]["peak_gb"] for count in sorted(steps)]
    return {"steps": found, "ratio": round(peaks[-1] / peaks[0], 4)}


# ------------------------------------------------------------------------------------------------ command line


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_round", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="150m", help="shapes, 150m, sd15, sdxl, or a pipeline's folder")
    parser.add_argument("--methods", nargs="+", choices=["pso", "prdp"], default=["pso", "prdp"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds measured of each variant")
    parser.add_argument(
        "--prompts", type=int, help="in a round; default: 16 (PSO) and 4 (PRDP) of shapes, 2 and 1 of other sizes"
    )
    parser.add_argument("--batch", type=int, help="prompts trained on at once; default: all")
    parser.add_argument("--images", type=int, default=4, help="PRDP's pictures per prompt; PSO has 2")
    parser.add_argument("--steps", type=int, default=10, help="of PRDP's sampler; PSO has 4")
    parser.add_argument("--passes", type=int, default=1, help="how often a round is trained on")
    parser.add_argument(
        "--memory-steps", type=int, nargs="*", default=[10, 50], help="of PRDP, for peak memory; none: not measured"
    )
    parser.add_argument("--resolution", type=int, help="pixels; default: 256, 512 or 1024 by size, or the model's own")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, on attention")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    said = parser.parse_args(argv)
    if said.batch and said.prompts and said.prompts % said.batch:
        parser.error(f"{said.prompts} prompts are no whole number of batches of {said.batch}")
    return said


def make_case(said: argparse.Namespace, method: Name) -> Case:
    """The case of a method, from the command line."""
    prompts = said.prompts or PROMPTS[method].get(said.size, FEW_PROMPTS[method])
    return Case(
        method=method,
        size=said.size,
        prompts=prompts,
        batch=said.batch or prompts,
        images=said.images if method == "prdp" else PSO_IMAGES,
        steps=said.steps if method == "prdp" else PSO_STEPS,
        passes=said.passes,
        resolution=said.resolution or RESOLUTION.get(said.size),
        precision=said.precision,
        rank=said.rank,
        gradient_checkpointing=said.gradient_checkpointing,
        device=torch.device(said.device),
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    said = read_arguments(arguments)
    if said.child:
        print(json.dumps(peak_memory(dataclasses.replace(make_case(said, "prdp"), steps=said.child))))
        return 0
    command = [sys.executable, "-m", "benchmarks.rollout_round", *arguments]
    report: dict[str, Any] = {
        "benchmark": "rollout_round",
        "arguments": {key: value for key, value in vars(said).items() if key != "child"},
        "machine": machine(torch.device(said.device)),
        "versions": versions(),
        **{method: measure(make_case(said, method), said.variants, said.repeats) for method in said.methods},
    }
    if "prdp" in said.methods and said.memory_steps:
        report["prdp"]["memory"] = memory(said.memory_steps, command)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
