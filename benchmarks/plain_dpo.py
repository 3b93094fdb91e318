"""Diffusion-DPO as published (Wallace et al. 2023, arXiv 2311.12908, and the scripts that follow it), written out.

Every step encodes its pictures with the VAE and its prompts with the text encoders; a second UNet in memory is the
reference; chosen and rejected go through both UNets one after the other; the loss is logged with `.item()`. Only
what the procedure implies costs time: pictures and token ids are in memory, and nothing else is done twice.

`fused=True` puts both sides through each UNet in one forward, as the authors' own code does: the stronger baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

Text = tuple[Tensor, dict[str, Tensor] | None]  # token embeddings, and what SDXL adds


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainBatch:
    """Pairs as a data loader yields them.

    Attributes:
        chosen, rejected: [pairs, 3, height, width] in [-1, 1].
        ids: token ids of the prompts, [pairs, tokens] for each tokenizer.
    """

    chosen: Tensor
    rejected: Tensor
    ids: tuple[Tensor, ...]


class PlainDPO:
    """One training step after another.

    Args:
        pipeline: the models; its UNet is trained.
        rank: of a LoRA on `targets`; None trains the whole UNet.
        targets: layers that get an adapter, by the end of their names.
        dtype: of everything that is not trained; with bf16 or fp16 the trained forward runs under autocast.
        fused: see the module's docstring.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        rank: int | None,
        targets: Sequence[str],
        dtype: torch.dtype = torch.float32,
        beta: float = 5000.0,
        lr: float = 1e-5,
        fused: bool = False,
    ) -> None:
        self.vae, self.unet = pipeline.vae.to(dtype), pipeline.unet
        self.encoders = [pipeline.text_encoder.to(dtype)]
        if getattr(pipeline, "text_encoder_2", None) is not None:
            self.encoders.append(pipeline.text_encoder_2.to(dtype))
        self.reference = copy.deepcopy(self.unet).to(dtype)
        if rank is None:
            self.unet.requires_grad_(True)
        else:
            self.unet.to(dtype).add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
            for parameter in self.unet.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.unet.train()
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.dtype, self.beta, self.fused = dtype, beta, fused
        self.device = self.parameters[0].device
        self.losses: list[float] = []

    def step(self, batch: PlainBatch) -> None:
        """One update."""
        latents, text = self.encode(batch)
        pairs = len(latents) // 2
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (pairs,), device=self.device).repeat(2)
        loss = self.loss(latents, noise, t, text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @torch.no_grad()
    def encode(self, batch: PlainBatch) -> tuple[Tensor, Text]:
        """Latents [2 * pairs, c, h, w], chosen first; text embeddings [pairs, tokens, width]."""
        pixels = torch.cat([batch.chosen, batch.rejected]).to(self.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
        if len(self.encoders) == 1:
            return latents, (self.encoders[0](batch.ids[0])[0], None)
        outs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.encoders, batch.ids, strict=True)]
        embeds = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        height, width = batch.chosen.shape[-2:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)
        return latents, (embeds, {"text_embeds": outs[1].text_embeds, "time_ids": sizes.repeat(len(embeds), 1)})

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, text: Text) -> Tensor:
        """-log sigmoid(-beta / 2 (e_w - e_l - (e_w^ref - e_l^ref))), mean over pairs; rows: chosen, then rejected."""
        noisy = self.scheduler.add_noise(latents, noise, t)
        epsilon = self.scheduler.config.prediction_type == "epsilon"
        target = noise if epsilon else self.scheduler.get_velocity(latents, noise, t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            policy = self.errors(self.unet, noisy, target, t, text)
        with torch.no_grad():
            reference = self.errors(self.reference, noisy, target, t, text)
        chosen, rejected = (policy - reference).chunk(2)
        return -functional.logsigmoid(-0.5 * self.beta * (chosen - rejected)).mean()

    def errors(self, unet: Any, noisy: Tensor, target: Tensor, t: Tensor, text: Text) -> Tensor:
        """Mean squared errors of the prediction, one per row."""
        embeds, added = text
        if self.fused:
            twice = None if added is None else {name: value.repeat(2, 1) for name, value in added.items()}
            predicted = unet(noisy, t, embeds.repeat(2, 1, 1), added_cond_kwargs=twice).sample
        else:
            sides = zip(noisy.chunk(2), t.chunk(2), strict=True)
            predicted = torch.cat([unet(side, steps, embeds, added_cond_kwargs=added).sample for side, steps in sides])
        errors: Tensor = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        return errors
