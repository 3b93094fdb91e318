"""One training step of Diffusion-DPO: ours, the published procedure, and the floor below which no step can go.

    python -m benchmarks.dpo_step --size 150m                  LoRA on this machine's CPU (or GPU if there is one)
    python -m benchmarks.dpo_step --size shapes --batch 16 --repeats 30
    python -m benchmarks.dpo_step --size sdxl --train full --precision bf16 --gradient-checkpointing

Same model, pictures, prompts, batch and precision in one process; the variants take turns, one step each, so that
whatever else the machine does meets all of them. Peak memory is measured in a process of its own per variant, from
its start: encoding the data included. One JSON object goes to stdout, progress to stderr.

    plain         benchmarks/plain_dpo.py: encoders every step, second UNet, one forward per side
    plain_fused   the same with both sides in one forward, as the authors' own code has it
    ours          the trainer's own update: encoded data, reference as the trainer makes it, one forward for both sides
    ours_cached   the same with reference errors kept from earlier visits (reference.cache)
    floor         nothing but the UNet's work in a step of ours: the reference's forward, the policy's and its backward
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import log, machine, seconds, spread, versions
from benchmarks.plain_dpo import PlainBatch, PlainDPO
from benchmarks.sizes import Precision, build_pipeline
from diffusion import adapters
from diffusion.feeds import PairFeed
from diffusion.methods import dpo
from diffusion.models import DiffusionModel
from diffusion.parts import Parts
from diffusion.pipelines import DTYPES
from diffusion.recipe import ReferenceSettings, TrainConfig
from diffusion.settings import DataSettings, LoraSettings, ModelSettings
from diffusion.train import assemble
from mmalign.config import LoopSettings, NamedSection, OptimSettings
from mmalign.loop import trainable
from mmalign.media import Media
from mmalign.memory import peak_gb, resident_gb
from mmalign.method import Method
from mmalign.records import Preference, Side
from mmalign.shapes import scenes

ROOT = Path(__file__).parent.parent
UPDATES_PER_EPOCH = 2
WARM_UP = UPDATES_PER_EPOCH  # steps that are not counted: a whole epoch, after which reference errors repeat
VARIANTS = ("plain", "plain_fused", "ours", "ours_cached")
RESOLUTION = {"150m": 256, "sd15": 512, "sdxl": 1024}  # pixels; shapes and folders have their own
BETA, LR = 5000.0, 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is the same for every variant."""

    size: str
    train: Literal["lora", "full"]
    batch: int
    resolution: int | None
    precision: Precision
    rank: int
    gradient_checkpointing: bool
    device: torch.device

    def pipeline(self) -> Any:
        """A new one."""
        return build_pipeline(self.size, self.device, self.precision, full=self.train == "full")

    @property
    def adapter(self) -> LoraSettings | None:
        return LoraSettings(rank=self.rank) if self.train == "lora" else None


class Ours:
    """The trainer's update, put together as `diffusion.train` does."""

    def __init__(
        self,
        case: Case,
        folder: Path,
        *,
        cached: bool = False,
        config: TrainConfig | None = None,
        build: Callable[[Parts], Method] = lambda parts: dpo.build(dpo.Options(beta=BETA), parts),
    ) -> None:
        config = config or recipe(case, folder, cached)
        self.model = DiffusionModel(case.pipeline(), config.model)
        adapters.set_attention(self.model.unet, "sdpa")
        feed = PairFeed(config, self.model, preferences(case, self.model.resolution))
        self.data = feed.data
        self.loop, self.parts, _ = assemble(config, self.model, feed)
        self.method = build(self.parts)
        self.batches = feed.source(self.loop)(0)
        self.losses: list[float] = []

    def step(self) -> None:
        metrics = self.loop._update(self.method, self.batches, len(self.losses))
        assert metrics is not None  # only a signal ends an update early
        self.losses.append(metrics["loss"].item())


class Plain:
    """`plain_dpo.PlainDPO` with the same pictures and prompts."""

    def __init__(self, case: Case, folder: Path, *, fused: bool = False) -> None:
        pipeline = case.pipeline()
        resolution = case.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        if case.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        self.trainer = PlainDPO(
            pipeline,
            rank=None if case.adapter is None else case.adapter.rank,
            targets=adapters.ATTENTION,
            dtype=DTYPES[case.precision],
            beta=BETA,
            lr=LR,
            fused=fused,
        )
        chosen, rejected = (pixels(case, resolution, side).to(case.device) for side in (0, 1))
        tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
        ids = [
            tokenizer(prompts(case), padding="max_length", truncation=True, return_tensors="pt").input_ids
            for tokenizer in tokenizers
            if tokenizer is not None
        ]
        self.batches = [
            PlainBatch(chosen=chosen[rows], rejected=rejected[rows], ids=tuple(i[rows].to(case.device) for i in ids))
            for rows in torch.arange(len(chosen)).split(case.batch)
        ]

    @property
    def losses(self) -> list[float]:
        return self.trainer.losses

    def step(self) -> None:
        self.trainer.step(self.batches[len(self.losses) % len(self.batches)])


class Floor:
    """The forwards and the backward that a step of ours cannot do without, on its own modules and inputs."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.batch = ours, next(ours.batches)
        rows = len(self.batch.latents)
        self.t = torch.full((rows,), 500, device=self.batch.latents.device)
        with torch.no_grad():
            self.gradient = torch.full_like(self.policy(), 1e-6)

    def reference(self) -> None:
        # keys that were never seen: nothing is found in a cache
        keys = [f"floor {row}" for row in range(len(self.t))]
        self.ours.parts.reference.score(keys, self.predict)

    def policy(self) -> Tensor:
        return self.predict(self.ours.loop.module)

    def predict(self, module: nn.Module) -> Tensor:
        return self.ours.parts.predict(module, self.batch.latents, self.t, self.batch.conditioning)

    def backward(self) -> None:
        self.policy().backward(self.gradient)

    def step(self) -> None:
        self.reference()
        self.backward()
        self.ours.loop.optimizer.zero_grad(set_to_none=True)


MAKE: dict[str, Callable[[Case, Path], Ours | Plain]] = {
    "plain": Plain,
    "plain_fused": lambda case, folder: Plain(case, folder, fused=True),
    "ours": Ours,
    "ours_cached": lambda case, folder: Ours(case, folder, cached=True),
}

# ------------------------------------------------------------------------------------------------ data


def recipe(case: Case, folder: Path, cached: bool) -> TrainConfig:
    """What a user would write to train like this."""
    return TrainConfig(
        model=ModelSettings(
            path=case.size, dtype=case.precision, resolution=case.resolution, time_ids="constant", offline=True
        ),
        adapter=case.adapter,
        data=DataSettings(path=folder, cache=None, encode_batch=2 * case.batch),
        method=NamedSection(name="dpo"),
        reference=ReferenceSettings(cache=folder if cached else None, draws=1),
        optim=OptimSettings(lr=LR, weight_decay=1e-2),
        loop=LoopSettings(
            steps=10**6,
            batch_size=case.batch,
            precision=case.precision,
            gradient_checkpointing=case.gradient_checkpointing,
            output_dir=folder,
        ),
    )


def prompts(case: Case) -> list[str]:
    """One per pair."""
    return [scene.caption for scene in scenes.draw_scenes(UPDATES_PER_EPOCH * case.batch, split="train", seed=0)]


def pictures(case: Case, resolution: int, side: int) -> Tensor:
    """Noise, [pairs, 3, resolution, resolution] in 0 to 255: what a picture shows costs nothing."""
    generator = torch.Generator().manual_seed(side)
    shape = (UPDATES_PER_EPOCH * case.batch, 3, resolution, resolution)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def pixels(case: Case, resolution: int, side: int) -> Tensor:
    """The same in [-1, 1]."""
    return pictures(case, resolution, side).float() / 127.5 - 1


def preferences(case: Case, resolution: int) -> list[Preference]:
    """The same as the trainer takes them."""
    both = [pictures(case, resolution, side).permute(0, 2, 3, 1).numpy() for side in (0, 1)]

    def make(side: int, row: int, prompt: str) -> Side:
        return Side(prompt=prompt, response=Media.from_image(Image.fromarray(both[side][row])))

    return [
        Preference(item_id=f"{row:04d}", a=make(0, row, prompt), b=make(1, row, prompt), label="a")
        for row, prompt in enumerate(prompts(case))
    ]


# ------------------------------------------------------------------------------------------------ measuring


def measure(case: Case, wanted: Sequence[str], repeats: int, command: Sequence[str]) -> dict[str, Any]:
    """All variants of one way of training: seconds in turns, where ours spends its own, peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, Any] = {}
        for name in wanted:
            log(f"{case.train}: building {name}")
            running[name] = MAKE[name](case, Path(folder))
            for _ in range(WARM_UP):
                running[name].step()
        ours: Ours | None = running.get("ours")
        if ours:
            running["floor"] = Floor(ours)
            running["floor"].step()
        taken = take_turns(running, repeats, case.device)
        about = describe(ours) if ours else {}
        rest = own_parts(ours, running["floor"], repeats, case.device) if ours else {}
        losses = {name: running[name].losses for name in wanted}
        ours = None
        running.clear()
        gc.collect()
    variants: dict[str, Any] = {}
    for name in wanted:
        log(f"{case.train}: memory of {name}")
        variants[name] = {
            "seconds_per_step": spread(taken[name]),
            "pairs_per_second": case.batch / spread(taken[name])["median"],
            "first_loss": losses[name][0],  # log 2 for all of them: policy equals reference
            "last_loss": losses[name][-1],
            **in_child([*command, "--child", f"{case.train}:{name}"]),
        }
    report = {"model": about, "variants": variants}
    if rest:
        report["floor"] = {"seconds_per_step": spread(taken["floor"])}
        report["rest"] = rest
    return {**report, "ratios": ratios(report)}


def take_turns(running: dict[str, Any], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of each, one step a turn; who goes first changes with every round."""
    taken: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(running[name].step, device))
        log(f"round {turn + 1} of {repeats}: " + ", ".join(f"{name} {taken[name][-1]:.3g} s" for name in names))
    return taken


def own_parts(ours: Ours, floor: Floor, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of the floor's parts and of what a step of ours does besides, each alone."""
    loop, batch = ours.loop, floor.batch
    prediction = torch.zeros_like(batch.latents, requires_grad=True)
    parts = dataclasses.replace(ours.parts, predict=lambda *inputs: prediction)
    method = dpo.build(dpo.Options(beta=BETA), parts)  # the same code, with a UNet that costs nothing

    def losses() -> None:
        loss, _ = next(method.losses(batch))
        loss.backward()

    def without_graph() -> None:
        with torch.no_grad():
            floor.policy()

    alone: dict[str, Callable[[], Any]] = {
        "reference_forward": floor.reference,
        "policy_forward_without_graph": without_graph,
        "policy_forward_and_backward": floor.backward,
        "data": lambda: next(ours.batches),
        "draws_errors_and_loss": losses,
        "gradient_norm_and_clipping": lambda: loop.accelerator.clip_grad_norm_(loop.module.parameters(), 1.0),
        "optimizer": loop.optimizer.step,
    }
    return {name: spread([seconds(work, device) for _ in range(repeats)]) for name, work in alone.items()}


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """What is claimed: medians of ours against those of the others."""
    variants, found = report["variants"], {}
    for mine in ("ours", "ours_cached"):
        for other in ("plain", "plain_fused"):
            if mine in variants and other in variants:
                a, b = variants[mine], variants[other]
                found[f"pairs_per_second: {mine} / {other}"] = a["pairs_per_second"] / b["pairs_per_second"]
                found[f"peak_memory: {mine} / {other}"] = a["peak_gb"] / b["peak_gb"]
    if "floor" in report:
        step, least = variants["ours"]["seconds_per_step"], report["floor"]["seconds_per_step"]
        found["step: ours / floor"] = step["median"] / least["median"]
    return {name: round(value, 4) for name, value in found.items()}


def describe(ours: Ours) -> dict[str, Any]:
    """What was trained."""
    return {
        "unet_parameters": sum(p.numel() for name, p in ours.model.unet.named_parameters() if ".lora_" not in name),
        "trained_parameters": trainable(ours.loop.parameters),
        "resolution": ours.model.resolution,
        "latents": list(ours.model.latent_shape(ours.model.resolution, ours.model.resolution)),
        "pairs": len(ours.data),
    }


def in_child(command: Sequence[str]) -> dict[str, Any]:
    """What a process of its own prints as JSON."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peak_memory(case: Case, name: str) -> dict[str, float]:
    """Builds one variant and takes an epoch's steps, alone in this process."""
    before = resident_gb()
    with tempfile.TemporaryDirectory() as folder:
        variant = MAKE[name](case, Path(folder))
        for _ in range(WARM_UP):
            variant.step()
    return {"peak_gb": peak_gb(case.device), "imports_gb": before}


# ------------------------------------------------------------------------------------------------ command line


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="150m", help="shapes, 150m, sd15, sdxl, or a pipeline's folder")
    parser.add_argument("--train", nargs="+", choices=["lora", "full"], default=["lora"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7, help="steps measured of each variant")
    parser.add_argument("--batch", type=int, default=2, help="pairs per step")
    parser.add_argument("--resolution", type=int, help="pixels; default: 256, 512 or 1024 by size, or the model's own")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, on attention")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    said = read_arguments(arguments)
    device = torch.device(said.device)

    def case(train: Literal["lora", "full"]) -> Case:
        return Case(
            size=said.size,
            train=train,
            batch=said.batch,
            resolution=said.resolution or RESOLUTION.get(said.size),
            precision=said.precision,
            rank=said.rank,
            gradient_checkpointing=said.gradient_checkpointing,
            device=device,
        )

    if said.child:
        train, _, name = said.child.partition(":")
        print(json.dumps(peak_memory(case(train), name)))
        return 0
    command = [sys.executable, "-m", "benchmarks.dpo_step", *arguments]
    report = {
        "benchmark": "dpo_step",
        "arguments": {key: value for key, value in vars(said).items() if key != "child"},
        "machine": machine(device),
        "versions": versions(),
        **{train: measure(case(train), said.variants, said.repeats, command) for train in said.train},
    }
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
