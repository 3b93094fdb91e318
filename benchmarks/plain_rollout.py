"""Rounds of online methods as published, on diffusers alone: what ours are compared with.

PSO as the authors' online script has it: two trajectories of every prompt are sampled one after the other and stored,
decoded and scored; then for every stochastic step four UNet calls, policy and reference for either picture, two
log-densities are subtracted, and the step is backpropagated by itself.

PRDP has no published script, only its loss. This is a plain reading of the paper that keeps no whole graph:
trajectories are sampled and stored; when they are trained on, log-densities under the policy that drew them and under
the reference are computed by forwards over all steps, the loss is differentiated by the policy's log-densities, and
then step by step these are computed again with a graph. Conditional and unconditional predictions are separate calls.
Nothing is computed twice that is known to be equal: in the first update the policy is the one that drew the pictures.

`fused=True` has one forward for both pictures or both branches of guidance instead: the stronger baseline. Written for
models that predict noise.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.nn import functional

Score = Callable[[Sequence[str], Sequence[Image.Image]], Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What the UNet is told: token embeddings [rows, tokens, width], and what SDXL adds."""

    embeds: Tensor
    added: dict[str, Tensor] | None = None

    def rows(self, of: Tensor) -> Text:
        """Some rows."""
        added = None if self.added is None else {name: value[of] for name, value in self.added.items()}
        return Text(embeds=self.embeds[of], added=added)

    def then(self, other: Text) -> Text:
        """These rows and then the other's."""
        added = None
        if self.added is not None and other.added is not None:
            added = {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()}
        return Text(embeds=torch.cat([self.embeds, other.embeds]), added=added)


class PlainRounds(ABC):
    """What the two procedures share.

    Args:
        pipeline: the models; a LoRA on its UNet is trained.
        score: prompts and pictures -> a reward each.
        targets: layers that get an adapter, by the end of their names.
        dtype: of everything that is not trained; with bf16 or fp16 the UNet runs under autocast.
        steps: of the sampler, of which the last is deterministic.
        size: of a picture's side, in pixels.
        batch: prompts trained on at once.
        passes: how often a round is trained on.
        fused: see the module's docstring.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        score: Score,
        rank: int,
        targets: Sequence[str],
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-5,
        steps: int,
        size: int,
        batch: int,
        passes: int = 1,
        fused: bool = False,
        beta: float,
        clip: float,
    ) -> None:
        self.pipeline, self.unet, self.vae, self.score = pipeline, pipeline.unet, pipeline.vae.to(dtype), score
        self.unet.to(dtype).add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
        self.parameters: list[Tensor] = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.dtype, self.device = dtype, self.parameters[0].device
        self.steps, self.trained, self.size, self.batch, self.passes = steps, steps - 1, size, batch, passes
        self.fused, self.beta, self.clip = fused, beta, clip
        self.timesteps: list[int] = []
        self.losses: list[float] = []

    # -------------------------------------------------------------------------------- the sampler, of each method

    start = 1.0  # deviation of the noise that sampling starts from

    @abstractmethod
    def predict(self, x: Tensor, step: int, text: Text, empty: Text | None) -> Tensor:
        """The UNet's noise, with guidance if there is an empty prompt."""

    @abstractmethod
    def mean_and_deviation(self, x: Tensor, noise: Tensor, step: int) -> tuple[Tensor, float]:
        """Of the state after a step."""

    # --------------------------------------------------------------------------------------------- what is shared

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, guided: bool) -> tuple[Text, Text | None]:
        """Prompts, and as many empty ones where there is guidance."""
        both = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )
        if len(both) == 2:
            return Text(embeds=both[0]), Text(embeds=both[1]) if guided else None
        ids = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=self.device)
        ids = ids.repeat(len(prompts), 1)
        plain = Text(embeds=both[0], added={"text_embeds": both[2], "time_ids": ids})
        return plain, Text(embeds=both[1], added={"text_embeds": both[3], "time_ids": ids}) if guided else None

    def call(self, x: Tensor, step: int, text: Text) -> Tensor:
        """One UNet call."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found: Tensor = self.unet(
                x,
                torch.tensor(self.timesteps[step], device=self.device),
                encoder_hidden_states=text.embeds,
                added_cond_kwargs=text.added,
            ).sample
        return found.float()

    @torch.no_grad()
    def sample(self, text: Text, empty: Text | None) -> Tensor:
        """States from noise to clean latents, [rows, steps + 1, c, h, w]."""
        side = self.size // self.pipeline.vae_scale_factor
        shape = (len(text.embeds), self.unet.config.in_channels, side, side)
        x = self.start * torch.randn(shape, device=self.device)
        states = [x]
        for step in range(self.steps):
            mean, deviation = self.mean_and_deviation(x, self.predict(x, step, text, empty), step)
            x = mean + deviation * torch.randn_like(mean)
            states.append(x)
        return torch.stack(states, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures."""
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in array]

    def log_density(self, states: Tensor, step: int, text: Text, empty: Text | None) -> Tensor:
        """log p(x after the step | x before it), mean over elements, per row."""
        x, after = states[:, step], states[:, step + 1]
        mean, deviation = self.mean_and_deviation(x, self.predict(x, step, text, empty), step)
        density = -((after - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=(1, 2, 3))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the UNet is what it was, and there are no gradients."""
        self.unet.disable_adapters()
        with torch.no_grad():
            yield
        self.unet.enable_adapters()

    def update(self, loss: Tensor) -> None:
        """One optimizer step."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


class PlainPSO(PlainRounds):
    """Pairs from an Euler-ancestral sampler, without guidance. Noise levels in units of sigma."""

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(self.steps)
        self.timesteps, self.sigmas = [int(t) for t in scheduler.timesteps], scheduler.sigmas.tolist()
        self.start = float(scheduler.init_noise_sigma)

    def predict(self, x: Tensor, step: int, text: Text, empty: Text | None) -> Tensor:
        return self.call(x / math.sqrt(self.sigmas[step] ** 2 + 1), step, text)

    def mean_and_deviation(self, x: Tensor, noise: Tensor, step: int) -> tuple[Tensor, float]:
        here, there = self.sigmas[step], self.sigmas[step + 1]
        up = math.sqrt(there**2 * (here**2 - there**2) / here**2)
        return x + noise * (math.sqrt(there**2 - up**2) - here), up

    def round(self, prompts: Sequence[str]) -> None:
        """Sample and score two pictures of each prompt, then train on them."""
        self.unet.eval()
        text, _ = self.encode(prompts, guided=False)
        if self.fused:
            sides = list(self.sample(text.then(text), None).chunk(2))
            pictures = self.decode(torch.cat([states[:, -1] for states in sides]))
            scores = torch.tensor(self.score([*prompts, *prompts], pictures)).chunk(2)
        else:
            sides = [self.sample(text, None) for _ in range(2)]
            scores = tuple(torch.tensor(self.score(prompts, self.decode(states[:, -1]))) for states in sides)
        rewards = torch.stack(scores, 1).to(self.device)
        self.unet.train()
        for _ in range(self.passes):
            batches = torch.arange(len(prompts), device=self.device).split(self.batch)
            total = torch.zeros((), device=self.device)
            for rows in batches:
                for step in torch.randperm(self.trained).tolist():
                    loss = self.loss([states[rows] for states in sides], step, text.rows(rows), rewards[rows])
                    loss = loss / (len(batches) * self.trained)
                    loss.backward()
                    total += loss.detach()
            self.update(total)

    def loss(self, sides: Sequence[Tensor], step: int, text: Text, rewards: Tensor) -> Tensor:
        """-log sigmoid(beta (h_0 log clip(r_0) + h_1 log clip(r_1))), h = +-1 or 0, r = policy / reference of a step.

        Args:
            sides: states of either picture, [prompts, steps + 1, c, h, w].
            rewards: [prompts, 2].
        """
        if self.fused:
            states, texts = torch.cat(list(sides)), text.then(text)
            with self.reference():
                reference = self.log_density(states, step, texts, None)
            log_ratios = (self.log_density(states, step, texts, None) - reference).chunk(2)
        else:
            with self.reference():
                references = [self.log_density(states, step, text, None) for states in sides]
            policies = [self.log_density(states, step, text, None) for states in sides]
            log_ratios = tuple(policy - reference for policy, reference in zip(policies, references, strict=True))
        first, second = (log_ratio.exp().clamp(1 - self.clip, 1 + self.clip).log() for log_ratio in log_ratios)
        sign = torch.sign(rewards[:, 0] - rewards[:, 1])
        return -functional.logsigmoid(self.beta * (sign * first - sign * second)).mean()


class PlainPRDP(PlainRounds):
    """Several pictures per prompt from DDPM's own sampler, with guidance.

    Args:
        images: per prompt.
        guidance_scale: above 1.
    """

    def __init__(self, pipeline: Any, *, images: int, guidance_scale: float, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        self.images, self.guidance_scale = images, guidance_scale
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(self.steps)
        self.timesteps = scheduler.timesteps.tolist()
        self.levels = [*scheduler.alphas_cumprod.double()[scheduler.timesteps].tolist(), 1.0]

    def predict(self, x: Tensor, step: int, text: Text, empty: Text | None) -> Tensor:
        assert empty is not None  # this method has guidance
        if self.fused:
            without, prompted = self.call(torch.cat([x, x]), step, empty.then(text)).chunk(2)
        else:
            without, prompted = self.call(x, step, empty), self.call(x, step, text)
        return without + self.guidance_scale * (prompted - without)

    def mean_and_deviation(self, x: Tensor, noise: Tensor, step: int) -> tuple[Tensor, float]:
        here, there = self.levels[step], self.levels[step + 1]
        clean = (x - math.sqrt(1 - here) * noise) / math.sqrt(here)
        alpha = here / there
        mean = (math.sqrt(there) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - there) * x) / (1 - here)
        return mean, math.sqrt((1 - there) / (1 - here) * (1 - alpha))

    def round(self, prompts: Sequence[str]) -> None:
        """Sample and score pictures of each prompt, then train on them."""
        self.unet.eval()
        repeated = [prompt for prompt in prompts for _ in range(self.images)]
        text, empty = self.encode(repeated, guided=True)
        assert empty is not None  # as asked for
        states = self.sample(text, empty)
        rewards = torch.tensor(self.score(repeated, self.decode(states[:, -1])), device=self.device)
        self.unet.train()
        snapshot = [parameter.detach().clone() for parameter in self.parameters]
        for number in range(self.passes):
            batches = torch.arange(len(repeated), device=self.device).split(self.batch * self.images)
            total = torch.zeros((), device=self.device)
            for rows in batches:
                total += self.backward(
                    states[rows],
                    text.rows(rows),
                    empty.rows(rows),
                    rewards[rows],
                    None if number == 0 else snapshot,
                    share=1 / len(batches),
                )
            self.update(total)

    def backward(
        self,
        states: Tensor,
        text: Text,
        empty: Text,
        rewards: Tensor,
        snapshot: Sequence[Tensor] | None,
        *,
        share: float = 1.0,
    ) -> Tensor:
        """Adds the gradients of `share` of the loss of some pictures, prompt by prompt; returns that much of it.

        Args:
            snapshot: weights that drew the pictures; None where they are still the policy's.
        """
        with self.reference():
            reference = self.all_steps(states, text, empty)
        with torch.no_grad():
            now = self.all_steps(states, text, empty)
            old = now if snapshot is None else self.under(snapshot, states, text, empty)
        leaf = now.clone().requires_grad_()
        loss = share * self.loss(leaf, old, reference, rewards)
        (slope,) = torch.autograd.grad(loss, leaf)
        for step in range(self.trained):
            (slope[:, step] * self.log_density(states, step, text, empty)).sum().backward()
        return loss.detach()

    def all_steps(self, states: Tensor, text: Text, empty: Text) -> Tensor:
        """Log-densities, [rows, trained steps]."""
        return torch.stack([self.log_density(states, step, text, empty) for step in range(self.trained)], 1)

    def under(self, snapshot: Sequence[Tensor], states: Tensor, text: Text, empty: Text) -> Tensor:
        """The same under other weights."""
        current = [parameter.data for parameter in self.parameters]
        for parameter, weights in zip(self.parameters, snapshot, strict=True):
            parameter.data = weights
        found = self.all_steps(states, text, empty)
        for parameter, weights in zip(self.parameters, current, strict=True):
            parameter.data = weights
        return found

    def loss(self, now: Tensor, old: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
        """Appendix G of the paper, mean over prompts; log-densities are [rows, trained steps]."""
        per_prompt = []
        for lp, lp_old, lp_ref, r in zip(
            *(values.split(self.images) for values in (now, old, reference, rewards)), strict=True
        ):
            ratio, ratio_old = lp - lp_ref, lp_old - lp_ref
            clipped = torch.clamp(ratio, ratio_old - self.clip, ratio_old + self.clip)
            a, c = ratio.mean(1), clipped.mean(1)
            gap = r[:, None] - r
            free, bound = ((v[:, None] - v - gap / self.beta) ** 2 for v in (a, c))
            better = gap > 0
            per_prompt.append(torch.where(better, torch.maximum(free, bound), 0).sum() / better.sum().clamp(min=1))
        return torch.stack(per_prompt).mean()
