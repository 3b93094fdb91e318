"""The model that becomes a scorer: a CLIP, whose scaled cosine is the score, with a head where it is not enough.

    score = exp(logit_scale) <text, picture> + head(text, picture)          in nats: a difference is a log odds

It is saved as a folder that transformers opens as a CLIPModel, with the head beside it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from evaluators.preprocess import Preprocess, of_folder
from evaluators.recipe import ClipSettings
from evaluators.towers import clip_tokens, unit
from evaluators.weights import Weights, find, fingerprint, load_strictly, open_pretrained, read_tensors
from mmalign import shapes
from mmalign.errors import UserError
from mmalign.randomness import key_seed

LARGEST_SCALE = math.log(100)  # of logit_scale, as in CLIP
WEIGHTS, HEAD = "model.safetensors", "head.safetensors"
BASE = Weights(name="clip", repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", gigabytes=3.9, licence="MIT")
# what makes texts and pictures into numbers, of whatever kind the base's are
BESIDE = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "preprocessor", "processor")


class Head(nn.Module):
    """What a cosine cannot say, of both vectors and their product; 0 before it is trained."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3 * width, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(
        self, texts: Float[Tensor, "rows width"], pictures: Float[Tensor, "rows width"]
    ) -> Float[Tensor, " rows"]:
        both = torch.cat([texts, pictures, texts * pictures], -1)
        with torch.autocast(both.device.type, enabled=False):  # scores differ by less than half precision tells
            scores: Tensor = self.outer(functional.gelu(self.inner(both))).squeeze(-1)
        return scores


class PreferenceModel(nn.Module):
    """See the module's docstring.

    Args:
        seed: of the head's first weights.

    Attributes:
        base: name and fingerprint of the CLIP before training.
        preprocess, tokens: what pictures and texts are read by.
    """

    def __init__(self, settings: ClipSettings, seed: int = 0) -> None:
        from transformers import CLIPModel

        super().__init__()
        embedded = settings.path == "shapes"
        self._folder = (
            shapes.model_folder("clip") if embedded else find(BASE, settings.path, download=settings.download)
        )
        self.clip: Any = open_pretrained(CLIPModel, self._folder, dtype=torch.float32)
        self.base = f"{Path(settings.path).name}@{fingerprint(self.clip)}"
        self.tokens = clip_tokens(self._folder, self.clip.config.text_config)
        self.preprocess: Preprocess = of_folder(self._folder, self.clip.config.vision_config.image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed("head", seed))
            self.head = Head(self.clip.config.projection_dim, settings.head) if settings.head else None
        choose_trained(self.clip, settings)

    def forward(
        self,
        tokens: Int[Tensor, "texts tokens"],
        pixels: Float[Tensor, "pictures 3 size size"],
        owner: Int[Tensor, " pictures"],
    ) -> tuple[
        Float[Tensor, " pictures"], Float[Tensor, "texts width"], Float[Tensor, "pictures width"], Float[Tensor, ""]
    ]:
        """Scores of pictures for their texts; the unit vectors of both; the scale.

        Args:
            owner: of each picture the row of its text.
        """
        self._clamp()
        texts = unit(self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output))
        pictures = unit(self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output))
        scale = self.clip.logit_scale.exp()
        scores = scale * (texts[owner] * pictures).sum(-1)
        if self.head is not None:
            scores = scores + self.head(texts[owner], pictures)
        return scores, texts, pictures, scale

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write CLIP, head, tokenizer and preprocessing.

        Args:
            state: this module's whole state dict where it is sharded over processes; None: its own.
        """
        self._clamp()
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in (state or self.state_dict()).items()}
        self.clip.save_pretrained(folder, state_dict=_under("clip.", tensors), max_shard_size="100GB")
        if self.head is not None:
            save_file(_under("head.", tensors), folder / HEAD, metadata={"format": "pt"})
        for file in sorted(self._folder.iterdir()):
            if file.name.startswith(BESIDE) and file.suffix in (".json", ".txt"):
                shutil.copyfile(file, folder / file.name)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, bit for bit.

        Raises:
            UserError: another model's weights, or a head on one side only.
        """
        load_strictly(self.clip, read_tensors(folder / WEIGHTS), place=str(folder))
        if self.head is None and (folder / HEAD).exists():
            raise UserError("these weights have a head", place=str(folder), fix="Say its width: model.head.")
        if self.head is not None:
            load_strictly(self.head, read_tensors(folder / HEAD), place=str(folder))

    @torch.no_grad()
    def _clamp(self) -> None:
        self.clip.logit_scale.clamp_(0, LARGEST_SCALE)


def open_head(folder: Path, width: int) -> Head | None:
    """The head that was saved in a folder, if there is one."""
    if not (folder / HEAD).is_file():
        return None
    state = read_tensors(folder / HEAD)
    inner = state.get("inner.bias")
    if inner is None or inner.dim() != 1:
        raise UserError("not the head of a scorer", place=str(folder / HEAD))
    head = Head(width, len(inner))
    load_strictly(head, state, place=str(folder / HEAD))
    return head.eval().requires_grad_(False)


def choose_trained(clip: Any, settings: ClipSettings) -> None:
    """Parameters that are trained require gradients, the others do not.

    Raises:
        UserError: a tower has fewer layers than are to be trained.
    """
    clip.requires_grad_(True)
    towers = (
        ("text_layers", settings.text_layers, clip.text_model, clip.text_model.final_layer_norm),
        ("vision_layers", settings.vision_layers, clip.vision_model, clip.vision_model.post_layernorm),
    )
    for key, wanted, tower, behind in towers:
        if wanted is None:
            continue
        layers = tower.encoder.layers
        if wanted > len(layers):
            raise UserError(f"the tower has {len(layers)} layers, not {wanted}", place=f"model.{key}")
        tower.requires_grad_(False)
        for layer in [*layers[len(layers) - wanted :], behind]:
            layer.requires_grad_(True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
