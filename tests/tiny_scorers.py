"""Small random models in the containers that scorers are published in, made offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

PROMPTS = ["a photo of a cat", "two dogs on a beach, oil painting", "a photo of a cat", "Tokyo at night"]
ARCHITECTURE = "mmalign-tiny-clip"


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Smooth random colours of any size: unlike noise, they survive resizing."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


PHOTOS = [photo(0, 64, 64), photo(1, 97, 64), photo(2, 50, 81), photo(3, 160, 120)]


def pixels(image: Image.Image) -> Tensor:
    """[1, 3, height, width] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def larger(module: nn.Module, seed: int = 0) -> None:
    """Draws all weights so large that every part of a random model shows in what it gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 / parameter[0].numel() ** 0.5, generator=generator)
            elif "norm" not in name and "ln_" not in name and parameter.dim() == 1:
                parameter.normal_(std=0.3, generator=generator)


def write_clip(folder: Path, *, seed: int = 0, eos: int = 2, width: int = 32, side: int = 32) -> Any:
    """A folder with a transformers CLIP that reads CLIP's own tokens; returns the model."""
    from transformers import CLIPConfig, CLIPModel

    shared = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**shared, **text, "eos_token_id": eos},
        vision_config={**shared, "image_size": side, "patch_size": 8},
        projection_dim=width,
    )
    model = CLIPModel(config).eval()
    larger(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(float(np.log(100.0)))
    model.save_pretrained(folder)
    return model


def register_architecture(folder: Path) -> None:
    """Makes open_clip know ARCHITECTURE."""
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    file = folder / f"{ARCHITECTURE}.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)


def write_hps(file: Path, *, seed: int = 0) -> Any:
    """A checkpoint as HPSv2's: `{"state_dict": ...}` of open_clip. Returns the model."""
    import open_clip

    register_architecture(file.parent)
    model = open_clip.create_model(ARCHITECTURE, load_weights=False).eval()
    larger(model, seed)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, file)
    return model


def head(width: int = 768) -> nn.Sequential:
    """Five linear layers with dropout between, as the aesthetic predictor's and ImageReward's."""
    layers = nn.Sequential(
        nn.Linear(width, 40),
        nn.Dropout(0.2),
        nn.Linear(40, 24),
        nn.Dropout(0.2),
        nn.Linear(24, 12),
        nn.Dropout(0.1),
        nn.Linear(12, 6),
        nn.Linear(6, 1),
    )
    larger(layers, 7)
    return layers.eval()
