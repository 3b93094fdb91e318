"""Rebuilds the embedded CLIP scorer, `mmalign build clip`: a plain transformers CLIP, hard negatives in every batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mmalign.progress import progress
from mmalign.shapes import render, scenes, words

TOKENS = 16
HARD = 3  # hard negatives per picture


def clip_and_tokenizer() -> tuple[Any, Any]:
    """A random CLIP of about 1.4 M parameters and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    vocab, merges = words.vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    shared = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "projection_dim": 96}
    text = {
        "vocab_size": len(vocab),
        "num_hidden_layers": 3,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 4, "image_size": render.SIZE, "patch_size": 4}
    config = CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=96)
    return CLIPModel(config), tokenizer


def normalised(drawn: list[scenes.Scene], first_seed: int) -> Float[Tensor, "batch 3 32 32"]:
    """Rendered scenes in [-1, 1], the preprocessing that is saved with the model."""
    array = np.stack([render.render(scene, first_seed + index) for index, scene in enumerate(drawn)])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def embed(model: Any, tokenizer: Any, captions: list[str]) -> Float[Tensor, "captions width"]:
    """Unit text embeddings."""
    ids = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
    features = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return functional.normalize(features, dim=-1)


def look(model: Any, pixels: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch width"]:
    """Unit image embeddings."""
    features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return functional.normalize(features, dim=-1)


def build_clip(out: Path, *, steps: int, batch: int, seed: int) -> None:
    """Contrastive training: each picture against every caption of the batch and its own hard negatives.

    Captions that describe the same picture in other words ("B right of A" for "A left of B") are no negatives. A
    little blur and noise keeps the scorer calm on pictures that a model made.
    """
    from transformers import CLIPImageProcessor

    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model, tokenizer = clip_and_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in progress(range(steps), "CLIP scorer"):
        drawn = scenes.draw_scenes(batch, split="train", seed=seed * 1_000_003 + step)
        hard = []
        for scene in drawn:
            near = [n for _, n in scenes.negatives(scene) if n.split == "train"]
            hard += [near[i] for i in generator.choice(len(near), HARD, replace=len(near) < HARD)]
        said = [*drawn, *hard]
        x = normalised(drawn, step * batch)
        x = x + torch.randn_like(x) * 0.08 * torch.rand(batch, 1, 1, 1)
        soft = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.where(torch.rand(batch, 1, 1, 1) < 0.3, soft, x)
        logits = model.logit_scale.exp() * look(model, x) @ embed(model, tokenizer, [s.caption for s in said]).T
        meaning = [s.meaning for s in said]
        same = torch.tensor([[m == scene.meaning for m in meaning] for scene in drawn])
        same[range(batch), range(batch)] = False  # the caption itself stays
        target = torch.arange(batch)
        by_picture = functional.cross_entropy(logits.masked_fill(same, -1e4), target)
        by_caption = functional.cross_entropy(logits.T[:batch].masked_fill(same[:, :batch].T, -1e4), target)
        loss = by_picture + 0.5 * by_caption
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(
                json.dumps({"step": step + 1, "loss": round(loss.item(), 3), **accuracy(model, tokenizer)}),
                flush=True,
            )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessor(
        size={"shortest_edge": render.SIZE},
        crop_size={"height": render.SIZE, "width": render.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(out)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, count: int = 200) -> dict[str, float]:
    """Share of held-out (picture, hard negative) pairs where the true caption scores higher; ties count half."""
    model.eval()
    drawn = scenes.draw_scenes(count, split="heldout", seed=5)
    image = look(model, normalised(drawn, 77_000_000))
    hits: dict[str, list[float]] = {}
    for scene, feature in zip(drawn, image, strict=True):
        changed = list(scenes.negatives(scene))
        text = embed(model, tokenizer, [scene.caption, *(other.caption for _, other in changed)])
        score = text @ feature
        for (name, _), value in zip(changed, score[1:], strict=True):
            hits.setdefault(name, []).append(float(score[0] > value) + 0.5 * float(score[0] == value))
    model.train()
    by = {name: round(float(np.mean(values)), 3) for name, values in hits.items()}
    return {"pairwise": round(float(np.mean([hit for values in hits.values() for hit in values])), 4), **by}
