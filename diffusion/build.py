"""Rebuilds the embedded text-to-image model: `mmalign build vae|base|4step|clip`.

The result is an ordinary diffusers pipeline folder (AutoencoderKL, UNet2DConditionModel, CLIP text encoder and
tokenizer, DDIM scheduler) that `StableDiffusionPipeline.from_pretrained` opens. Training is the plain published
recipe at toy size: a Kullback-Leibler autoencoder, then noise prediction on its latents with caption dropout.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmalign.progress import progress
from mmalign.shapes import render, scenes, words

TOKENS = 16  # longest caption, in tokens, begin and end included
LATENT_SIZE = 8  # pixels / 4
SCHEDULE = 9000  # steps of the cosine that the base's learning rate follows
BLEND = 0.55  # of the way from the weights half-way to those at the end


def pictures(drawn: list[scenes.Scene], seeds: range) -> Float[Tensor, "batch 3 32 32"]:
    """Rendered scenes as a batch in [-1, 1]."""
    array = np.stack([render.render(scene, seed) for scene, seed in zip(drawn, seeds, strict=True)])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_to_zero(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50) -> Any:
    """Learning rate factor: linear warm-up, then a cosine down to 1 % of the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_vae(out: Path, *, steps: int, batch: int, seed: int) -> None:
    """Train the autoencoder: L1 + squared error, a small KL weight, and noise on the latents.

    The noise makes the decoder forgiving, which the denoiser needs more than the last decimal of reconstruction.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=render.SIZE,
        mid_block_add_attention=False,
    )
    vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    schedule = cosine_to_zero(optimizer, steps)
    for step in progress(range(steps), "autoencoder"):
        drawn = scenes.draw_scenes(batch, split="train", seed=seed * 1_000_003 + step)
        x = pictures(drawn, range(step * batch, (step + 1) * batch)).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + torch.randn_like(posterior.mean) * (posterior.std**2 + 0.05**2).sqrt()
        y = vae.decode(z).sample
        rec = functional.l1_loss(y, x) + 2 * functional.mse_loss(y, x)
        loss = rec + 1e-5 * posterior.kl().mean() / LATENT_SIZE
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(json.dumps({"step": step + 1, "rec": round(rec.item(), 4), **reconstruction(vae)}), flush=True)
            save_vae(vae, out)


@torch.no_grad()
def reconstruction(vae: Any, count: int = 200) -> dict[str, float]:
    """Share of held-out pictures still faithful after a round trip, and the latents' deviation."""
    from mmalign.shapes import checker

    drawn = scenes.draw_scenes(count, split="heldout", seed=99)
    z = vae.encode(pictures(drawn, range(count))).latent_dist.mean
    back = ((vae.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    faithful = [checker.check(picture, scene).faithful for picture, scene in zip(back, drawn, strict=True)]
    return {"faithful": float(np.mean(faithful)), "latent_std": round(float(z.std()), 4)}


@torch.no_grad()
def save_vae(vae: Any, out: Path) -> None:
    """Write the autoencoder with the scaling factor that gives its latents unit deviation."""
    drawn = scenes.draw_scenes(1000, split="train", seed=98)
    deviation = vae.encode(pictures(drawn, range(1000))).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    copy.deepcopy(vae).to(memory_format=torch.contiguous_format).half().save_pretrained(out)


def new_pipeline(vae: Any, seed: int) -> Any:
    """A StableDiffusionPipeline around the autoencoder, UNet and text encoder still random."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    vocab, merges = words.vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    width = 96
    text_encoder: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet: Any = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=(2, 3),
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return as_pipeline(vae, text_encoder, tokenizer, unet, scheduler)


def as_pipeline(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> Any:
    """The parts as a StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_base(out: Path, vae: Path, *, steps: int, batch: int, seed: int) -> None:
    """Train UNet and text encoder together to predict the noise on cached latents; write the whole pipeline.

    A tenth of the captions are emptied so that guidance has an unconditional branch. Timesteps lean towards high
    noise (1000 u^0.75), where layout and number are decided. The learning rate follows a cosine laid out for
    SCHEDULE steps, and training stops long before: the base is meant to be flawed. What is written lies at BLEND
    between the average (EMA) half-way and the one at the end. Half-way shapes are still soft, at the end they are
    solved; between them the errors are spread. The order of two things ("left of" against "right of") stays at chance.
    """
    from diffusers import AutoencoderKL

    pipeline = new_pipeline(AutoencoderKL.from_pretrained(vae), seed)
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    unet.to(memory_format=torch.channels_last)
    drawn = scenes.draw_scenes(60_000, split="train", seed=seed + 1)
    latents = encode_all(pipeline.vae, drawn)
    captions = [scene.caption for scene in drawn]
    distinct = {caption: index for index, caption in enumerate(sorted(set(captions)))}
    ids = tokenizer([*distinct, ""], padding="max_length", return_tensors="pt").input_ids
    row = torch.tensor([distinct[caption] for caption in captions])

    both = nn.ModuleDict({"unet": unet, "text": text_encoder})
    parameters = list(both.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = cosine_to_zero(optimizer, SCHEDULE, warmup=200)
    average = copy.deepcopy(both).requires_grad_(False)
    half_way = average
    generator = torch.Generator().manual_seed(seed)
    signal = pipeline.scheduler.alphas_cumprod
    for step in progress(range(steps), "base model"):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        t = (1000 * torch.rand(batch, generator=generator) ** 0.75).long()
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        a = signal[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * latents[pick] + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        dropped = torch.rand(batch, generator=generator) < 0.1
        text = text_encoder(ids[torch.where(dropped, len(distinct), row[pick])])[0]
        loss = functional.mse_loss(unet(noisy, t, text).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in parameters], 1 - decay)
        if step + 1 == steps // 2:
            half_way = copy.deepcopy(average)
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(half_way.parameters()), 1 - BLEND)
    built = as_pipeline(pipeline.vae, average["text"], tokenizer, average["unet"], pipeline.scheduler)
    save_pipeline(built, out)
    print(json.dumps(faithfulness(built)), flush=True)


@torch.no_grad()
def encode_all(vae: Any, drawn: list[scenes.Scene], batch: int = 256) -> Float[Tensor, "scenes 4 8 8"]:
    """Scaled latents (posterior means) of rendered scenes."""
    parts = []
    for start in progress(range(0, len(drawn), batch), "latents"):
        stop = min(start + batch, len(drawn))
        x = pictures(drawn[start:stop], range(10_000_000 + start, 10_000_000 + stop))
        parts.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(parts)


@torch.no_grad()
def faithfulness(pipeline: Any, count: int = 200, *, steps: int = 20, guidance_scale: float = 3.0) -> dict[str, Any]:
    """Checker's verdict on held-out captions, in all and by kind of scene and part."""
    from mmalign.shapes import checker

    drawn = scenes.draw_scenes(count, split="heldout", seed=7) + scenes.draw_scenes(count // 2, split="train", seed=7)
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        [scene.caption for scene in drawn],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="np",
        generator=generator,
        height=render.SIZE,
        width=render.SIZE,
    ).images
    verdicts = [checker.check((image * 255).round().astype(np.uint8), s) for image, s in zip(out, drawn, strict=True)]
    report: dict[str, Any] = {"faithful": float(np.mean([v.faithful for v in verdicts[:count]]))}
    report["train"] = float(np.mean([v.faithful for v in verdicts[count:]]))
    for kind in scenes.SHARES:
        kept = [v.faithful for v, s in zip(verdicts, drawn, strict=True) if s.kind == kind]
        report[kind] = round(float(np.mean(kept)), 3)
    for part in ("count", "colour", "shape", "relation"):
        kept = [getattr(v, part) == 1 for v in verdicts[:count] if getattr(v, part) is not None]
        report[f"all {part}"] = round(float(np.mean(kept)), 3)
    return report


def save_pipeline(pipeline: Any, out: Path) -> None:
    """Write a pipeline in half precision, memory format back to plain."""
    for name in ("unet", "vae", "text_encoder"):
        module = copy.deepcopy(getattr(pipeline, name)).half()
        if name != "text_encoder":
            module = module.to(memory_format=torch.contiguous_format)
        module.save_pretrained(out / name)
    pipeline.tokenizer.save_pretrained(out / "tokenizer")
    pipeline.scheduler.save_pretrained(out / "scheduler")
    pipeline.save_config(out)
