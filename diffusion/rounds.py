"""Rounds of an online method: which prompts, their pictures, their rewards; drawn when due, kept until used up.

A round is a pure function of (weights at its start, its number). A checkpoint written between two rounds therefore
keeps nothing of them; one written inside a round keeps its trajectories, so that a resumed run trains on the very same
ones. With `policy: reference` the pictures come from the model that training started from and repeat after `pool`
rounds: the offline form. Then a round's old scores are those of the policy at its start, from a pass over the steps
without gradients.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Shaped
from PIL import Image
from torch import Tensor, nn

from diffusion.conditioning import Conditioning
from diffusion.kernels import Kernel
from diffusion.recipe import RolloutSettings
from diffusion.rollout import Guided, Trajectories, in_batches, roll_out, step_scores
from diffusion.trajectories import Batch, Groups, Turn
from evaluators.rewards import Measured, Reward, permutation
from mmalign.method import Metrics
from mmalign.order import Order, share
from mmalign.progress import progress
from mmalign.reference import Reference

Advantages = Callable[[Float[Tensor, "prompts images"], Sequence[str]], Float[Tensor, "prompts images"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where this process stands among all of them, and how an update is cut.

    Args:
        rank, world: of the processes.
        batch_size: prompts per forward turn and process.
        accumulation: forward turns per update.
        gather: all processes' rows, in the order of their ranks.
    """

    rank: int
    world: int
    batch_size: int
    accumulation: int
    gather: Callable[[Tensor], Tensor]

    @property
    def per_update(self) -> int:
        """Prompts per update, over all processes."""
        return self.batch_size * self.accumulation * self.world

    def mine(self, round_size: int, rank: int | None = None) -> list[int]:
        """Positions in a round of the prompts that a process rolls out and trains on, in the order of its turns."""
        positions = []
        for start in range(0, round_size, self.per_update):
            update = range(start, start + self.per_update)
            for forward in range(self.accumulation):
                here = self.rank if rank is None else rank
                positions += share(update, forward=forward, rank=here, world=self.world, batch_size=self.batch_size)
        return positions


class Studio:
    """Makes pictures from prompts with the policy, and scores them.

    Args:
        encode: prompts -> conditioning, on the CPU or where the model is.
        decode: latents -> pictures.
        undisturbed: eval mode and untouched generators inside.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        module: nn.Module,
        guided: Guided,
        kernel: Kernel,
        reference: Reference | None,
        reward: Reward,
        encode: Callable[[Sequence[str]], Conditioning],
        decode: Callable[[Tensor], list[Image.Image]],
        shape: tuple[int, int, int],
        seed: int,
        device: torch.device,
        undisturbed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.settings, self.kernel, self.reward = settings, kernel, reward
        self._module, self._guided, self._reference = module, guided, reference
        self._encode, self._decode, self._shape = encode, decode, shape
        self._seed, self._device, self._undisturbed = seed, device, undisturbed

    def draw(self, prompts: Sequence[str], keys: Sequence[str]) -> tuple[Trajectories, Conditioning, list[Measured]]:
        """`per_prompt` pictures of each prompt: their chains, the prompts' conditioning (both on the CPU), and scores.

        Pictures are scored on another thread while the next batch is drawn.

        Args:
            keys: one per prompt: names its draws.
        """
        settings = self.settings
        names = [f"{key}:{k}" for key in keys for k in range(settings.per_prompt)]
        starts = [
            f"{key}:0" if settings.shared_start else f"{key}:{k}" for key in keys for k in range(settings.per_prompt)
        ]
        repeated = [prompt for prompt in prompts for _ in range(settings.per_prompt)]
        scored: list[Future[Measured]] = []
        chains: list[Trajectories] = []
        with self._undisturbed(), ThreadPoolExecutor(1) as judge:
            texts = self._encode(prompts).to(self._device)
            of = torch.arange(len(prompts), device=self._device).repeat_interleave(settings.per_prompt)
            slices = list(in_batches(len(names), settings.batch_size))
            for rows in progress(slices, "roll out", unit="batch"):
                chain = roll_out(
                    self._module,
                    self._guided,
                    self.kernel,
                    texts.select(of[rows]),
                    keys=names[rows],
                    starts=starts[rows],
                    seed=self._seed,
                    shape=self._shape,
                    reference=self._reference,
                    sample_reference=settings.policy == "reference",
                )
                pictures = self._decode(chain.states[:, -1])
                scored.append(judge.submit(self.reward.measure, repeated[rows], pictures))
                chains.append(chain.to("cpu"))
            return Trajectories.cat(chains), texts.to("cpu"), [future.result() for future in scored]

    def rescore(self, trajectories: Trajectories, conditioning: Conditioning) -> Trajectories:
        """The same chains with `old` as the policy of now scores them."""
        images = len(trajectories) // len(conditioning)
        of = torch.arange(len(conditioning)).repeat_interleave(images)
        old = torch.empty_like(trajectories.old)
        with self._undisturbed():
            for rows in in_batches(len(trajectories), self.settings.batch_size):
                states = trajectories.states[rows].to(self._device)
                texts = conditioning.select(of[rows]).to(self._device)
                for step in range(self.kernel.trained):
                    steps = torch.full((len(states),), step, dtype=torch.int64, device=self._device)
                    old[rows, step] = step_scores(self._module, self._guided, self.kernel, states, steps, texts).to(
                        "cpu"
                    )
        return replace(trajectories, old=old)


class Rounds:
    """The rounds of a run.

    Args:
        studio: draws and scores.
        prompts: trained on.
        elements: numbers in the latents of a picture.
    """

    def __init__(
        self, studio: Studio, prompts: Sequence[str], places: Places, *, seed: int, elements: int, device: torch.device
    ) -> None:
        settings = studio.settings
        self._studio, self._settings, self._places = studio, settings, places
        self._prompts, self._seed, self._elements, self._device = prompts, seed, elements, device
        self._order = Order([range(len(prompts))], settings.prompts_per_round, seed)
        self._mine = places.mine(settings.prompts_per_round)
        self.updates = settings.passes * (settings.prompts_per_round // places.per_update)
        self._number: int | None = None
        self._groups: Groups | None = None
        self._news: Metrics = {}
        self._turn: Turn | None = None

    @property
    def kl(self) -> float | None:
        """Implicit KL from the reference that the newest round's pictures show, in nats."""
        return float(self._news["kl/sampled"]) if "kl/sampled" in self._news else None

    @property
    def images(self) -> int:
        """Pictures per prompt."""
        return self._settings.per_prompt

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        settings, kernel = self._settings, self._studio.kernel
        return {
            "rollouts": f"{settings.prompts_per_round} prompts x {settings.per_prompt} pictures a round, "
            f"of {len(self._prompts)} prompts, {self.updates} updates on each",
            "sampler": f"{settings.kernel}, {len(kernel.timesteps)} steps of which {kernel.trained} are trained, "
            f"guidance {settings.guidance_scale:g}",
            "reward": self._studio.reward.identity,
        }

    def batch(self, turn: Turn, advantages: Advantages) -> Batch:
        """The prompts of one turn."""
        number, update = divmod(turn.update, self.updates)
        if number != self._number:
            self._groups = None
            self._groups, self._news = self._collect(number, advantages)
            self._number = number
        assert self._groups is not None
        per_pass = self._settings.prompts_per_round // self._places.per_update
        first = (update % per_pass * self._places.accumulation + turn.forward) * self._places.batch_size
        self._turn = turn
        return Batch(
            groups=self._groups.select(torch.arange(first, first + self._places.batch_size)).to(self._device),
            unmoved=update == 0,
            news=self._news,
        )

    # ------------------------------------------------------------------------------------------- one round

    def _collect(self, number: int, advantages: Advantages) -> tuple[Groups, Metrics]:
        settings, studio = self._settings, self._studio
        picks = self._order.update(number % settings.pool if settings.pool else number)
        keys = [f"{pick.item}:{pick.visit}" for pick in picks]
        trajectories, conditioning, scored = studio.draw(
            [self._prompts[picks[place].item] for place in self._mine], [keys[place] for place in self._mine]
        )
        if settings.policy == "reference" and number:
            trajectories = studio.rescore(trajectories, conditioning)
        values = self._assembled(self._columns(scored))
        rewards, terms = self._rewarded(values, number, keys)
        weights = advantages(rewards, [self._prompts[pick.item] for pick in picks])
        mine = torch.tensor(self._mine)
        groups = Groups(
            trajectories=trajectories,
            conditioning=conditioning,
            rewards=rewards[mine],
            parts=terms[mine],
            advantages=weights[mine],
        )
        return groups, self._summary(rewards, values, trajectories)

    def _columns(self, scored: Sequence[Measured]) -> Float64[Tensor, "mine images terms"]:
        """This process's values of every term."""
        columns = [[value for some in scored for value in some.parts[name]] for name in self._studio.reward.weights]
        values = torch.tensor(columns, dtype=torch.float64).T
        return values.reshape(len(self._mine), self._settings.per_prompt, -1)

    def _rewarded(
        self, terms: Float64[Tensor, "prompts images terms"], number: int, keys: Sequence[str]
    ) -> tuple[Float[Tensor, "prompts images"], Float[Tensor, "prompts images terms"]]:
        """Rewards of the whole round, and its terms with the sign that makes more of each better."""
        reward, names = self._studio.reward, list(self._studio.reward.weights)
        flat = terms.flatten(0, 1)
        owners = [key for key in keys for _ in range(terms.shape[1])]
        if reward.settings.shuffle:
            flat = flat[permutation(owners, (self._seed, "reward", number))]
        parts = {name: flat[:, index].tolist() for index, name in enumerate(names)}
        reward.fit(parts)
        total = reward.combine(parts)
        warning = reward.note_round(total, owners)
        if warning and self._places.rank == 0:
            print(f"mmalign: warning: {warning}", file=sys.stderr)
        signs = torch.tensor([math.copysign(1.0, reward.weights[name]) for name in names])
        return torch.tensor(total).view(terms.shape[:2]), (flat * signs).float().view(terms.shape)

    def _assembled(self, mine: Shaped[Tensor, "mine ..."]) -> Shaped[Tensor, "prompts ..."]:
        """All processes' rows in the order of the round."""
        gathered = self._places.gather(mine.to(self._device)).cpu()
        size = self._settings.prompts_per_round
        order = [place for rank in range(self._places.world) for place in self._places.mine(size, rank)]
        out = torch.empty_like(gathered)
        out[torch.tensor(order)] = gathered
        return out

    def _summary(self, rewards: Tensor, values: Tensor, trajectories: Trajectories) -> Metrics:
        """Of the round: rewards, how many prompts tie, and the KL that its pictures show, in nats."""
        lines = {
            "reward/mean": rewards.mean(),
            "reward/std_within": rewards.std(1, correction=0).mean(),
            "reward/tied_prompts": (rewards == rewards[:, :1]).all(1).float().mean(),
        }
        for index, name in enumerate(self._studio.reward.weights):
            lines[f"reward/{name}"] = values[..., index].float().mean()
        if trajectories.ref is not None:
            lines["kl/sampled"] = trajectories.log_ratios().sum(1).mean() * self._elements
        return {name: value.to(self._device) for name, value in lines.items()}

    # ------------------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """The round that is being used, of all processes; nothing of it between two rounds."""
        state: dict[str, Any] = {"reward": self._studio.reward.state_dict()}
        if self._turn is None or self._groups is None or self._between():
            return state
        groups, chains = self._groups, self._groups.trajectories
        tensors = {"states": chains.states, "old": chains.old, "ref": chains.ref, "rewards": groups.rewards}
        tensors |= {"parts": groups.parts, "advantages": groups.advantages, "embeds": groups.conditioning.embeds}
        tensors |= {"pooled": groups.conditioning.pooled, "time_ids": groups.conditioning.time_ids}
        kept = {
            name: self._assembled(value.unflatten(0, (len(self._mine), -1)))
            for name, value in tensors.items()
            if value is not None
        }
        return {**state, "round": self._number, "tensors": kept, "news": dict(self._news)}

    def _between(self) -> bool:
        """Whether the next turn begins a round."""
        assert self._turn is not None
        complete = self._turn.forward + 1 == self._places.accumulation
        return self.updates == 1 or (complete and (self._turn.update + 1) % self.updates == 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off, on as many processes or on others."""
        self._studio.reward.load_state_dict(state["reward"])
        if "round" not in state:
            return
        mine = torch.tensor(self._mine)
        kept = {name: value[mine] for name, value in state["tensors"].items()}
        rows = {name: value.flatten(0, 1) for name, value in kept.items()}
        self._number = state["round"]
        self._groups = Groups(
            trajectories=Trajectories(states=rows["states"], old=rows["old"], ref=rows.get("ref")),
            conditioning=Conditioning(embeds=rows["embeds"], pooled=rows.get("pooled"), time_ids=rows.get("time_ids")),
            rewards=kept["rewards"].flatten(1),
            parts=kept["parts"].flatten(0, 1),
            advantages=kept["advantages"].flatten(1),
        )
        self._news = {name: value.to(self._device) for name, value in state["news"].items()}
        self._turn = None


def turns(start: int, accumulation: int) -> Iterator[Turn]:
    """The turns from an update on."""
    update = start
    while True:
        yield from (Turn(update, forward) for forward in range(accumulation))
        update += 1
