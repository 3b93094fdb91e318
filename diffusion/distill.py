"""Distils the embedded base into a four-step model: `mmalign build 4step`.

The teacher is the base with guidance. From a noised picture at one of the student's timesteps it goes down to the clean
latents with DDIM, deterministically, so that there is one right answer; the student learns to give it in one step:

    x_t = a x0 + s eps at t in {999, 749, 499, 249};  target = DDIM(x_t, t -> 0, teacher, guidance 3)
    loss = mean over C, H, W of (x0_student(x_t, t, prompt) - target)^2, no guidance

It is progressive distillation taken in one stride (Salimans & Ho 2202.00512; Luhman & Luhman 2101.02388). Sampled as
SDXL-Turbo is: Euler-ancestral steps at those timesteps, no guidance.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion.build import cosine_to_zero, encode_all, faithfulness
from mmalign.progress import progress
from mmalign.shapes import scenes

TIMESTEPS = (999, 749, 499, 249)
SUBSTEPS = {999: 12, 749: 9, 499: 6, 249: 3}  # of the teacher, from each timestep to the clean end
GUIDANCE = 3.0
TEACHER_BATCH = 128


def few_step_scheduler(config: Any) -> Any:
    """Sampling as SDXL-Turbo does: Euler-ancestral at the end of each of equal stretches."""
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        timestep_spacing="trailing",
        steps_offset=1,  # trailing steps have no offset, but Stable Diffusion's pipeline warns of any other
    )


@torch.no_grad()
def teach(
    unet: Any,
    signal: Float[Tensor, " steps"],
    x: Float[Tensor, "batch c h w"],
    t: int,
    text: Float[Tensor, "batch tokens width"],
    without: Float[Tensor, "1 tokens width"],
) -> Float[Tensor, "batch c h w"]:
    """The teacher's clean latents from x at t: deterministic DDIM with guidance."""
    both = torch.cat([without.expand_as(text), text])
    clean = x
    levels = torch.linspace(t, 0, SUBSTEPS[t] + 1).round().long()
    for here, there in itertools.pairwise(levels):
        empty, prompted = unet(x.repeat(2, 1, 1, 1), here, both).sample.chunk(2)
        noise = empty + GUIDANCE * (prompted - empty)
        clean = (x - (1 - signal[here]).sqrt() * noise) / signal[here].sqrt()
        x = signal[there].sqrt() * clean + (1 - signal[there]).sqrt() * noise
    return clean


def build_4step(out: Path, base: Path, *, samples: int, steps: int, batch: int, seed: int) -> None:
    """Make the student and write its `unet` and `scheduler`; all else is the base's.

    Args:
        base: folder of the base pipeline.
        samples: teacher's answers to learn from, spread evenly over the timesteps.
    """
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
    pipeline.to(torch.float32)
    teacher = pipeline.unet.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    drawn = scenes.draw_scenes(samples, split="train", seed=seed + 31)
    texts, without, row = _texts(pipeline, [scene.caption for scene in drawn])
    signal = pipeline.scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(seed)
    latents = encode_all(pipeline.vae, drawn)
    t = torch.tensor(TIMESTEPS).repeat(samples // len(TIMESTEPS) + 1)[:samples]
    a = signal[t].view(-1, 1, 1, 1)
    x = a.sqrt() * latents + (1 - a).sqrt() * torch.randn(latents.shape, generator=generator)
    answers = torch.empty_like(x)
    for level in TIMESTEPS:
        chosen = (t == level).nonzero().flatten()
        for part in progress(chosen.split(TEACHER_BATCH), f"teacher from {level}", unit="batch"):
            answers[part] = teach(teacher, signal, x[part], level, texts[row[part]], without)

    student: Any = copy.deepcopy(teacher).requires_grad_(True).train()
    average = _train(student, x, answers, t, texts[row], signal, steps=steps, batch=batch, generator=generator)
    scheduler = few_step_scheduler(pipeline.scheduler.config)
    plain = copy.deepcopy(average).half().to(memory_format=torch.contiguous_format)
    plain.register_to_config(_name_or_path=None)  # else the folder of the base on this machine
    plain.save_pretrained(out / "unet")
    scheduler.save_pretrained(out / "scheduler")
    pipeline.unet, pipeline.scheduler = average, scheduler
    print(json.dumps(faithfulness(pipeline, steps=len(TIMESTEPS), guidance_scale=0.0)), flush=True)


def _texts(pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor, Int64[Tensor, " captions"]]:
    """Embeddings of the different captions, of the empty one, and which caption has which."""
    distinct = {caption: index for index, caption in enumerate(sorted(set(captions)))}
    with torch.no_grad():
        ids = pipeline.tokenizer([*distinct, ""], padding="max_length", return_tensors="pt").input_ids
        embeds = torch.cat([pipeline.text_encoder(part)[0] for part in ids.split(TEACHER_BATCH)])
    return embeds[:-1], embeds[-1:], torch.tensor([distinct[caption] for caption in captions])


def _train(
    student: Any,
    x: Float[Tensor, "samples c h w"],
    answers: Float[Tensor, "samples c h w"],
    t: Int64[Tensor, " samples"],
    texts: Float[Tensor, "samples tokens width"],
    signal: Float[Tensor, " steps"],
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> Any:
    """Regression on the teacher's answers. Returns the average of the student's weights."""
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    schedule = cosine_to_zero(optimizer, steps, warmup=100)
    average = copy.deepcopy(student).requires_grad_(False).eval()
    bar = progress(range(steps), "student")
    for step in bar:
        pick = torch.randint(len(x), (batch,), generator=generator)
        a = signal[t[pick]].view(-1, 1, 1, 1)
        noisy = x[pick].contiguous(memory_format=torch.channels_last)
        noise = student(noisy, t[pick], texts[pick]).sample
        clean = (noisy - (1 - a).sqrt() * noise) / a.sqrt()
        loss = (clean - answers[pick]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(
            list(average.parameters()), [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step))
        )
        if step % 200 == 0:
            print(json.dumps({"step": step, "loss": round(loss.item(), 4)}), flush=True)
    return average
