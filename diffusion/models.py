"""Stable Diffusion and SDXL behind encode, decode, predict and sample.

Everything a method needs of a model and nothing of how diffusers arranges it. Prompts are encoded by the
pipeline's own `encode_prompt` and pictures are made by the pipeline itself, so both are what diffusers gives.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn

from diffusion import schedulers
from diffusion.conditioning import Conditioning
from diffusion.overlays import fuse_lora
from diffusion.pipelines import DTYPES, FAMILIES, Family, embedded_model, open_pipeline
from diffusion.schedule import NoiseSchedule
from diffusion.settings import ModelSettings
from mmalign import hub
from mmalign.errors import UserError
from mmalign.fingerprints import module_fingerprint
from mmalign.progress import progress

PROMPT_BATCH = 64
OVERFLOW = "SDXL's own VAE overflows in fp16: set model.vae to an fp16-safe one, or model.dtype to bf16"


def load_model(settings: ModelSettings, *, train_full: bool = False) -> DiffusionModel:
    """Open a model on the CPU.

    Args:
        train_full: the UNet's own weights will be trained, so they are fp32 whatever `settings.dtype` says.

    Raises:
        UserError: see `open_pipeline`, `NoiseSchedule.from_scheduler` and `fuse_lora`.
    """
    if settings.distilled_steps is None and (embedded := embedded_model(settings)) is not None:
        settings = settings.model_copy(update={"distilled_steps": embedded.distilled_steps})
    unet_dtype = torch.float32 if train_full else DTYPES[settings.dtype]
    model = DiffusionModel(open_pipeline(settings, unet_dtype=unet_dtype), settings)
    if settings.lora is not None:
        fused = fuse_lora(model.pipeline, settings.lora, offline=hub.is_offline(settings.offline))
        # Of what was fused into what, not of the sum: its last digits differ from machine to machine.
        name, _, own = model.identity.partition("@")
        model.identity = f"{name}@{hashlib.sha256(f'{own} {fused}'.encode()).hexdigest()[:12]}"
    return model


class DiffusionModel:
    """A pipeline and its noise schedule.

    Attributes:
        pipeline: the diffusers pipeline; its scheduler is for sampling alone.
        family: sd or sdxl.
        schedule: for training, on the CPU.
        resolution: pixels of a side, as set or as the model was made for.
        identity: "name@fingerprint" of the UNet as it was opened, or of the weights that a run started from.
        distilled_steps: of a few-step model, at how many timesteps it was distilled; None for any other.
    """

    def __init__(self, pipeline: Any, settings: ModelSettings) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.family: Family = FAMILIES[type(pipeline).__name__]
        self.schedule = NoiseSchedule.from_scheduler(
            pipeline.scheduler,
            zero_terminal_snr=settings.zero_terminal_snr,
            prediction_type=settings.prediction_type,
        )
        self.distilled_steps = schedulers.distilled_steps(pipeline.scheduler, settings.distilled_steps)
        self.identify()
        size = pipeline.unet.config.sample_size
        own = (size if isinstance(size, int) else max(size)) * self.scale
        self.resolution = settings.resolution or own
        if self.resolution % self.multiple:
            raise UserError(
                f"resolution {self.resolution} is not a multiple of {self.multiple}",
                place="model.resolution",
                fix=f"The nearest is {max(1, round(self.resolution / self.multiple)) * self.multiple}",
            )
        self._empty: dict[bool, Conditioning] = {}

    def identify(self) -> None:
        """Set `identity` from the UNet as it is now."""
        self.identity = f"{Path(self.settings.path).name}@{module_fingerprint(self.pipeline.unet)[:12]}"

    @property
    def unet(self) -> Any:
        """The UNet2DConditionModel, unwrapped."""
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        """The AutoencoderKL."""
        if self.pipeline.vae is None:
            raise ValueError("the VAE was released")
        return self.pipeline.vae

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        parameter: Tensor = next(self.unet.parameters())
        return parameter.device

    @property
    def scale(self) -> int:
        """Pixels per latent, along a side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def multiple(self) -> int:
        """Picture sides must be multiples of it, so that every level of the UNet has whole sizes."""
        levels: int = len(self.unet.config.down_block_types)
        return self.scale << (levels - 1)

    def distilled_timesteps(self, steps: int | None = None) -> tuple[int, ...]:
        """The timesteps, from noise to clean, at which a few-step model was distilled.

        Args:
            steps: of sampling: those that it visits; None: all of them.

        Raises:
            UserError: nothing says that this is a few-step model, or it has fewer steps.
        """
        if self.distilled_steps is None:
            raise UserError(
                "the timesteps that this model was distilled at are not known",
                place="model.distilled_steps",
                fix="Set it: 4 for SDXL-Turbo and DMD2, 50 for LCM; or use a few-step model, as shapes-4step is",
            )
        count = self.distilled_steps if steps is None else steps
        self.require_steps(count)
        return schedulers.visited_timesteps(self.pipeline.scheduler, count)

    def require_steps(self, steps: int, place: str = "sampler.steps") -> None:
        """Raises a UserError if this model cannot be sampled in so many steps."""
        if self.distilled_steps is not None and steps > self.distilled_steps:
            raise UserError(
                f"{steps} steps of a model that was distilled at {self.distilled_steps} timesteps",
                place=place,
                fix=f"Take at most {self.distilled_steps}, and guidance_scale 0",
            )
        if steps > len(self.schedule):
            raise UserError(f"{steps} steps of {len(self.schedule)} timesteps", place=place)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture."""
        return int(self.unet.config.in_channels), height // self.scale, width // self.scale

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Move all that is left of the pipeline."""
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    # ------------------------------------------------------------------------------------------------
    # Pictures

    @torch.no_grad()
    def encode_images(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch c h w"]]:
        """Mean and deviation of the VAE's posterior, scaled as the UNet wants its latents, fp32.

        Args:
            pixels: RGB in [-1, 1].

        Raises:
            UserError: the VAE overflows in its dtype.
        """
        vae = self.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        self._require_finite(mean)
        return mean * vae.config.scaling_factor, deviation * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch 3 height width"]:
        """RGB in [-1, 1], fp32.

        Raises:
            UserError: the VAE overflows in its dtype, or the latents are not finite.
        """
        vae = self.vae
        unscaled = latents.to(vae.device, torch.float32) / vae.config.scaling_factor
        pixels: Tensor = vae.decode(unscaled.to(vae.dtype)).sample.float()
        self._require_finite(pixels)
        return torch.clamp(pixels, -1, 1)

    def _require_finite(self, values: Tensor) -> None:
        if not values.isfinite().all():
            half = self.vae.dtype != torch.float32
            raise UserError(
                f"the VAE gives values that are not finite in {str(self.vae.dtype).removeprefix('torch.')}",
                place="model.vae" if half else "model.path",
                fix=OVERFLOW if half else "The weights of the model or of the VAE are broken",
            )

    # ------------------------------------------------------------------------------------------------
    # Prompts

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt, fp32; SDXL's with the time ids of an uncropped picture of the resolution.

        Raises:
            ValueError: no prompts, or the text encoders were released.
        """
        if self.pipeline.text_encoder is None or not prompts:
            raise ValueError("nothing to encode, or the text encoders were released")
        device = next(self.pipeline.text_encoder.parameters()).device
        parts = []
        for start in range(0, len(prompts), PROMPT_BATCH):
            encoded = self.pipeline.encode_prompt(
                prompt=list(prompts[start : start + PROMPT_BATCH]),
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            pooled = encoded[2].float() if self.family == "sdxl" else None
            parts.append(Conditioning(embeds=encoded[0].float(), pooled=pooled))
        return self._with_constant_ids(Conditioning.cat(parts))

    def empty(self) -> Conditioning:
        """The one row that dropped prompts become in training: encoded or zeros, as `empty_prompt` says."""
        choice = self.settings.empty_prompt
        return self._without_prompt(self._zeros_by_default if choice is None else choice == "zeros")

    def without_prompt(self) -> Conditioning:
        """The one row of guidance's branch without a prompt, as the pipeline makes it when no negative is given."""
        return self._without_prompt(self._zeros_by_default)

    @property
    def _zeros_by_default(self) -> bool:
        """What the pipeline's own guidance uses when no negative prompt is given."""
        return bool(self.family == "sdxl" and self.pipeline.config.force_zeros_for_empty_prompt)

    def _without_prompt(self, zeros: bool) -> Conditioning:
        if zeros not in self._empty:
            row = self.encode_prompts([""])
            if zeros:
                pooled = None if row.pooled is None else torch.zeros_like(row.pooled)
                row = Conditioning(embeds=torch.zeros_like(row.embeds), pooled=pooled, time_ids=row.time_ids)
            self._empty[zeros] = row
        return self._empty[zeros]

    def _with_constant_ids(self, text: Conditioning) -> Conditioning:
        if self.family == "sd":
            return text
        size = (self.resolution, self.resolution)
        ids = self.time_ids(original=size, crop=(0, 0), target=size).to(text.embeds.device)
        return text.with_time_ids(ids.repeat(len(text), 1))

    def time_ids(
        self, *, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> Float[Tensor, "1 6"]:
        """SDXL's size conditioning, in pixels: (height, width), (top, left), (height, width)."""
        return torch.tensor([[*original, *crop, *target]], dtype=torch.float32)

    def release_texts(self) -> None:
        """Free the text encoders; the empty prompt is kept."""
        for zeros in {self._zeros_by_default, self.settings.empty_prompt == "zeros"}:
            self._without_prompt(zeros)
        self._release("text_encoder", "text_encoder_2")

    def release_encoders(self) -> None:
        """Free the text encoders and the VAE."""
        if self.pipeline.text_encoder is not None:
            self.release_texts()
        self._release("vae")

    def _release(self, *names: str) -> None:
        for name in names:
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------
    # The UNet

    def predict(
        self,
        unet: nn.Module,
        x_t: Float[Tensor, "batch c h w"],
        t: Int64[Tensor, " batch"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "batch c h w"]:
        """The UNet's answer at x_t, in its native space and whatever dtype it comes out.

        Args:
            unet: this model's, a copy of it, or either as wrapped for several processes.
        """
        dtype = next(unet.parameters()).dtype
        added = None
        if conditioning.pooled is not None and conditioning.time_ids is not None:
            # As integers: wrappers for half precision cast every floating input, and 1023 becomes 1024.
            ids = conditioning.time_ids.round().long()
            added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": ids}
        out: Tensor = unet(
            x_t.to(dtype),
            t,
            encoder_hidden_states=conditioning.embeds.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Conditioning,
        *,
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        batch_size: int = 8,
        unet: Any = None,
        size: tuple[int, int] | None = None,
        label: str | None = None,
    ) -> list[Image.Image]:
        """Pictures, by the pipeline itself with its own scheduler.

        Every picture has a generator of its own: neither batch size nor order changes it beyond rounding. The
        global generators, the UNet's mode and the training schedule are left as they were.

        Args:
            prompts: or their conditioning, once the text encoders are released.
            seeds: one per prompt.
            guidance_scale: 1 or less is without guidance.
            unet: another UNet than the pipeline's (unwrapped), say an average of it.
            size: (width, height) in pixels; None for the resolution.
            label: of a progress bar; None shows none.

        Raises:
            UserError: more steps than the model has.
        """
        self.require_steps(steps)
        rows = prompts if isinstance(prompts, Conditioning) else self.encode_prompts(prompts)
        if len(rows) != len(seeds):
            raise ValueError(f"{len(rows)} prompts and {len(seeds)} seeds")
        width, height = size or (self.resolution, self.resolution)
        pictures: list[Image.Image] = []
        starts = range(0, len(seeds), batch_size)
        with self._sampling(self.unet if unet is None else unet):
            for start in starts if label is None else progress(starts, label):
                stop = min(start + batch_size, len(seeds))
                latents = self._denoise(
                    rows.select(slice(start, stop)), seeds[start:stop], steps, guidance_scale, width, height
                )
                pictures.extend(to_pictures(self.decode(latents)))
        return pictures

    def _denoise(
        self,
        rows: Conditioning,
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        width: int,
        height: int,
    ) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        rows = rows.to(self.device, dtype)
        text = {"prompt_embeds": rows.embeds}
        if rows.pooled is not None:
            text["pooled_prompt_embeds"] = rows.pooled
        if guidance_scale > 1:
            without = self.without_prompt().to(self.device, dtype).repeat(len(rows))
            text["negative_prompt_embeds"] = without.embeds
            if without.pooled is not None:
                text["negative_pooled_prompt_embeds"] = without.pooled
        latents: Tensor = self.pipeline(
            **text,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            output_type="latent",
            return_dict=False,
        )[0]
        return latents

    @contextlib.contextmanager
    def _sampling(self, unet: Any) -> Iterator[None]:
        """`unet` in the pipeline's place and in eval mode; afterwards everything as it was."""
        own = self.pipeline.unet
        training = [module for module in unet.modules() if module.training]
        dtype = DTYPES[self.settings.dtype]
        half = dtype != torch.float32 and next(unet.parameters()).dtype == torch.float32
        try:
            self.pipeline.unet = unet.eval()
            with torch.autocast(self.device.type, dtype=dtype, enabled=half):
                yield
        finally:
            self.pipeline.unet = own
            for module in training:
                module.training = True


def to_pictures(pixels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """PIL images of RGB in [-1, 1]."""
    array = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]
