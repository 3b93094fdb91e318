"""Real diffusers pipelines, tiny and with random weights, for tests.

`full_size("sd15" | "sdxl" | "sdxl_turbo")` has the published configurations at full width and depth instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mmalign.shapes import words

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOKENS = 12
TEXT_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
TEXTS = {"sd15": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
CONFIGURATIONS = Path(__file__).parent / "configurations"
Pool = dict[tuple[torch.Size, torch.dtype, bool], torch.Tensor]


def tokenizer() -> Any:
    vocabulary, merges = words.vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def text_encoder(kind: Any, own: Any, *, width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return kind(
        CLIPTextConfig(
            vocab_size=len(own),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
    ).eval()


def autoencoder(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        force_upcast=True,
    ).eval()


def unet(*, cross_attention_dim: int, seed: int = 2, **extra: Any) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 24),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 3),
        norm_num_groups=8,
        **extra,
    ).eval()


def sd_pipeline() -> Any:
    """Stable Diffusion 1.x in small: 32 x 32 pixels, latents 8 x 8."""
    own = tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(CLIPTextModel, own, width=16, seed=3),
        tokenizer=own,
        unet=unet(cross_attention_dim=16),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> Any:
    """SDXL in small: two text encoders of different widths, pooled text and time ids."""
    own = tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(CLIPTextModel, own, width=16, seed=3),
        tokenizer=own,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, own, width=24, seed=4),
        tokenizer_2=own,
        unet=unet(
            cross_attention_dim=40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
        add_watermarker=False,
    )


def write(pipeline: Any, folder: Path, **options: Any) -> Path:
    pipeline.save_pretrained(folder, **options)
    return folder


def full_size(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", pool: Pool | None = None) -> Any:
    """The pipeline of `sd15`, `sdxl` or `sdxl_turbo` at full width and depth, in memory, with small random weights.

    Every layer is there, but weights of one shape are one tensor: SDXL's take 0.6 GB instead of 10, and are made in a
    second. Prompts are 12 tokens of a small vocabulary instead of 77 of CLIP's.

    Args:
        device: "meta" has no weights at all.
        pool: of the tensors; pipelines with the same pool share them, each with modules of its own.
    """
    classes = {"unet": UNet2DConditionModel.from_config, "vae": AutoencoderKL.from_config, **TEXT_CLASSES}
    family = name.removesuffix("_turbo")
    pool = {} if pool is None else pool
    parts: dict[str, Any] = {}
    for part, settings in json.loads((CONFIGURATIONS / f"{family}.json").read_text()).items():
        with torch.device("meta"):  # the usual start of billions of weights takes minutes, and is not needed
            parts[part] = classes[part](CLIPTextConfig(**settings) if part in TEXT_CLASSES else settings)
        parts[part].eval().requires_grad_(False)
        if dtype != torch.float32:
            parts[part].to(dtype)
        if device != "meta":
            _fill(parts[part], device, pool)
    options = {**SCHEDULE, "steps_offset": 1}
    if family == "sdxl":
        few: Any = EulerAncestralDiscreteScheduler(**options, timestep_spacing="trailing")
        return StableDiffusionXLPipeline(
            **parts,
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            scheduler=few if name == "sdxl_turbo" else EulerDiscreteScheduler(**options),
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def _fill(module: Any, device: str, pool: Pool) -> None:
    """Real weights for a module made on "meta": norms that do nothing, else small random numbers of mean 0."""
    generator = torch.Generator(device).manual_seed(0)
    buffers = {key: torch.arange(value.numel()).view(value.shape) for key, value in module.named_buffers()}
    module.to_empty(device=device)  # not touched, so it costs no memory
    state = {}
    for name, parameter in module.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        key = (parameter.shape, parameter.dtype, norm)
        if key not in pool:
            pool[key] = torch.full(parameter.shape, float(norm), dtype=parameter.dtype, device=device)
            if parameter.dim() > 1:
                bound = parameter[0].numel() ** -0.5
                pool[key].uniform_(-bound, bound, generator=generator)
            if parameter.dim() == 4:  # as training lays it out: it would be copied otherwise
                pool[key] = pool[key].contiguous(memory_format=torch.channels_last)
        state[name] = pool[key]
    module.load_state_dict(state, strict=False, assign=True)
    for name, value in module.named_buffers():  # position ids, the only ones there are
        value.copy_(buffers[name])
