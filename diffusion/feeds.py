"""What a method is fed with: pairs out of a store, or rollouts of its own. A method's file says which in FEED.

A feed is made before anything is prepared for training, since what it encodes depends on frozen weights alone; then it
gives the trainer the method's parts, the reference, and the batches from a given update on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion import cache
from diffusion.candidates import make_store
from diffusion.conditioning import Conditioning
from diffusion.kernels import Kernel, make_kernel
from diffusion.models import DiffusionModel, to_pictures
from diffusion.parts import PairBatch, Parts
from diffusion.recipe import RolloutSettings, TrainConfig
from diffusion.rollout import Guided
from diffusion.rounds import Places, Rounds, Studio, turns
from diffusion.settings import DataSettings
from diffusion.trajectories import OnlineParts
from diffusion.watching import Watch
from evaluators.rewards import Reward
from mmalign import config as configuration
from mmalign.errors import UserError
from mmalign.loop import Loop, processes
from mmalign.pairdata import read_pairs
from mmalign.prompts import read_prompts
from mmalign.records import Preference
from mmalign.reference import Cached, Reference


@runtime_checkable
class Feed(Protocol):
    """See the module's docstring.

    Attributes:
        unit: what an epoch is made of: pairs or prompts.
        key: of the data: equal keys mean equal batches for equal seeds.
        size: pairs or prompts in an epoch.
    """

    unit: str
    key: str
    size: int

    def notes(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        ...

    def reference(self, loop: Loop, plain: Reference) -> tuple[Reference, Callable[[], None] | None]:
        """The reference as this feed uses it, and what saves it with every checkpoint."""
        ...

    def parts(self, loop: Loop, reference: Reference) -> Parts:
        """What the method is built from."""
        ...

    def source(self, loop: Loop) -> Callable[[int], Iterator[Any]]:
        """A function from an update's number to what this process is fed with from there on."""
        ...

    def watch(self, loop: Loop, parts: Parts) -> Callable[[int], str | None] | None:
        """What looks at the run for over-optimisation, if the recipe asks for it."""
        ...

    def example(self, device: torch.device, rows: int) -> tuple[Tensor, Conditioning]:
        """Latents and conditioning of a forward, for measuring how long one takes."""
        ...

    def forwards(self) -> float:
        """What a turn costs, in forwards of that size: a backward is two."""
        ...


# -------------------------------------------------------------------------------------------------- pairs


class PairFeed:
    """Pairs, encoded.

    Args:
        note: how they were made.
        forwards: what a turn costs: reference, policy and its backward, unless a method says otherwise.
    """

    unit = "pairs"

    def __init__(
        self,
        config: TrainConfig,
        model: DiffusionModel,
        pairs: Sequence[Preference],
        note: str = "",
        forwards: float = 4.0,
    ) -> None:
        self._config, self._model, self._note, self._forwards = config, model, note, forwards
        self._settings = pair_settings(config)
        samples = bool(config.loop.sample_every and config.validation.prompts)
        self.data = cache.prepare(model, pairs, self._settings, release_texts=not samples)
        if not samples:
            model.release_encoders()
        self.key, self.size = self.data.key, len(self.data)

    def notes(self) -> dict[str, str]:
        return {"data": self._note}

    def reference(self, loop: Loop, plain: Reference) -> tuple[Reference, Callable[[], None] | None]:
        config = self._config
        if config.reference.cache is None:
            return plain, None
        # what a reference error depends on: the base, the pairs and their draws, and what the method draws and compares
        key = configuration.digest(
            {
                "base": self._model.identity,
                "pairs": self.key,
                "seed": config.loop.seed,
                "precision": config.loop.precision,
                "prompt_dropout": self._settings.prompt_dropout,
                "method": config.method.model_dump(),
            }
        )
        place, accelerator = config.reference.cache / key[:16], loop.accelerator
        cached = Cached(plain, place, device=accelerator.device, rank=accelerator.process_index)
        return cached, cached.save

    def parts(self, loop: Loop, reference: Reference) -> Parts:
        return Parts(
            module=loop.module,
            predict=self._model.predict,
            schedule=self._model.schedule.to(loop.accelerator.device),
            reference=reference,
            elements=self.data.elements,
            data=self.data,
            base=f"{self._model.identity} {self._config.model.dtype} {self._config.loop.precision}",
        )

    def source(self, loop: Loop) -> Callable[[int], Iterator[PairBatch]]:
        config, data = self._config, self.data
        seed, device = config.loop.seed, loop.accelerator.device
        cycle = config.reference.draws if config.reference.cache else None

        def batches(start: int) -> Iterator[PairBatch]:
            for picks in loop.picks(list(data.buckets.values()), start):
                visits = [pick.visit if cycle is None else pick.visit % cycle for pick in picks]
                yield data.batch([pick.item for pick in picks], visits, seed=seed, device=device)

        return batches

    def watch(self, loop: Loop, parts: Parts) -> None:
        return None

    def example(self, device: torch.device, rows: int) -> tuple[Tensor, Conditioning]:
        size = min(rows, self.size)
        first = list(next(iter(self.data.buckets.values())))[:size]
        batch = self.data.batch(first, [0] * len(first), seed=0, device=device)
        return batch.latents, batch.conditioning

    def forwards(self) -> float:
        return self._forwards


def pair_settings(config: TrainConfig) -> DataSettings:
    """The recipe's `data` section.

    Raises:
        UserError: it has none, or a `rollout` section that its method would not read.
    """
    if config.data is None:
        raise UserError(
            f"the method {config.method.name} is fed with pairs and the recipe has no data section", place="data"
        )
    if config.rollout is not None or config.watch is not None:
        raise UserError(
            f"the method {config.method.name} is fed with pairs and draws nothing itself",
            place="watch" if config.rollout is None else "rollout",
            fix="Leave the section out.",
        )
    return config.data


def ensure_store(config: TrainConfig, model: DiffusionModel) -> None:
    """Make the preference store from candidates when the recipe says how and it is not there yet."""
    if config.data is None or config.candidates is None or config.data.path.exists():
        return
    with processes().main_process_first():
        if not config.data.path.exists():
            model.to(processes().device)
            make_store(model, config.candidates, config.data.path)


# ------------------------------------------------------------------------------------------------ rollouts


class RolloutFeed:
    """Rounds of rollouts, and the turns in which they are trained on."""

    unit = "prompts"

    def __init__(self, config: TrainConfig, model: DiffusionModel, *, needs_reference: bool) -> None:
        settings = rollout_settings(config)
        self._config, self._model, self._settings = config, model, settings
        self._needs_reference = needs_reference
        self._prompts = read_prompts(settings.prompts, settings.count, config.loop.seed)
        self.kernel = make_kernel(
            settings.kernel, model.schedule, model.pipeline.scheduler, settings.steps, eta=settings.eta
        )
        self.reward = Reward(settings.reward)
        self.shape = model.latent_shape(model.resolution, model.resolution)
        self.size = len(self._prompts)
        self.key = configuration.digest(
            {"prompts": self._prompts, "rollout": settings.model_dump(mode="json"), "reward": self.reward.identity}
        )[:32]

    def notes(self) -> dict[str, str]:
        return {}

    def reference(self, loop: Loop, plain: Reference) -> tuple[Reference, Callable[[], None] | None]:
        if self._config.reference.cache is not None:
            raise UserError(
                "rollouts are new in every round: there is nothing to keep",
                place="reference.cache",
                fix="Leave it out; their reference scores are kept with them.",
            )
        return plain, None

    def parts(self, loop: Loop, reference: Reference) -> OnlineParts:
        model, settings, accelerator = self._model, self._settings, loop.accelerator
        device = accelerator.device
        guided = Guided(
            predict=model.predict,
            empty=model.without_prompt().to(device),
            guidance_scale=settings.guidance_scale,
        )
        kernel: Kernel = self.kernel.to(device)
        elements = math.prod(self.shape)
        studio = Studio(
            settings,
            module=loop.module,
            guided=guided,
            kernel=kernel,
            reference=reference if self._needs_reference or settings.policy == "reference" else None,
            reward=self.reward,
            encode=model.encode_prompts,
            decode=lambda latents: to_pictures(model.decode(latents)),
            shape=self.shape,
            seed=loop.settings.seed,
            device=device,
            undisturbed=loop.undisturbed,
        )
        rounds = Rounds(
            studio, self._prompts, self._places(loop), seed=loop.settings.seed, elements=elements, device=device
        )
        return OnlineParts(
            module=loop.module,
            predict=model.predict,
            schedule=model.schedule.to(device),
            reference=reference,
            elements=elements,
            guided=guided,
            kernel=kernel,
            rounds=rounds,
        )

    def _places(self, loop: Loop) -> Places:
        places = Places(
            rank=loop.accelerator.process_index,
            world=loop.accelerator.num_processes,
            batch_size=loop.settings.batch_size,
            accumulation=loop.settings.accumulation,
            gather=loop.accelerator.gather,
        )
        if self._settings.prompts_per_round % places.per_update:
            raise UserError(
                f"{self._settings.prompts_per_round} prompts are no whole number of updates of {places.per_update}",
                place="rollout.prompts_per_round",
                fix="Choose a multiple of loop.batch_size x loop.accumulation x processes.",
            )
        return places

    def source(self, loop: Loop) -> Callable[[int], Iterator[Any]]:
        return lambda start: turns(start, loop.settings.accumulation)

    def watch(self, loop: Loop, parts: Parts) -> Watch | None:
        if self._config.watch is None:
            return None
        assert isinstance(parts, OnlineParts)  # it made them
        rounds = parts.rounds
        return Watch(
            self._config.watch,
            self._settings,
            self._model,
            self.reward,
            trained_on=self._prompts,
            kl=lambda: rounds.kl,
            undisturbed=loop.undisturbed,
            folder=loop.settings.output_dir,
            main=bool(loop.accelerator.is_main_process),
        )

    def example(self, device: torch.device, rows: int) -> tuple[Tensor, Conditioning]:
        prompts: Sequence[str] = [self._prompts[index % self.size] for index in range(rows * self._settings.per_prompt)]
        return torch.zeros(len(prompts), *self.shape, device=device), self._model.encode_prompts(prompts).to(device)

    def forwards(self) -> float:
        settings = self._settings
        drawing = settings.steps * (2 if self._needs_reference else 1) / settings.passes
        return (drawing + 3 * self.kernel.trained) * (2 if settings.guidance_scale > 1 else 1)


def rollout_settings(config: TrainConfig) -> RolloutSettings:
    """The recipe's `rollout` section.

    Raises:
        UserError: it has none, or sections that only pairs need, or asks for what contradicts itself.
    """
    settings = config.rollout
    if settings is None:
        raise UserError(
            f"the method {config.method.name} draws for itself and the recipe has no rollout section", place="rollout"
        )
    if config.data is not None or config.candidates is not None:
        section = "data" if config.data is not None else "candidates"
        raise UserError(
            f"the method {config.method.name} draws for itself and reads no pairs",
            place=section,
            fix="Leave the section out.",
        )
    if settings.pool and settings.policy == "current":
        raise UserError(
            "rounds repeat only where the model they are drawn from does not change",
            place="rollout.pool",
            fix="Set rollout.policy=reference or leave it out.",
        )
    return settings


def make_feed(module: Any, config: TrainConfig, model: DiffusionModel) -> Feed:
    """What a method's file asks for: FEED "pairs" or "rollouts"."""
    if module.FEED == "rollouts":
        return RolloutFeed(config, model, needs_reference=getattr(module, "REFERENCE", True))
    settings = pair_settings(config)
    ensure_store(config, model)
    return PairFeed(config, model, *read_pairs(settings, config.loop.seed), getattr(module, "FORWARDS", 4.0))
