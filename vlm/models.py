"""LLaVA, LLaVA-NeXT, Qwen-VL, SmolVLM and InternVL behind encode, collate, encode_images and logps.

A conversation becomes a `Row`, rows a `VlmBatch`, a batch log-probabilities. Vision tower and projector see every
distinct image of a batch once, however many rows look at it; log-probabilities never need the logits of a whole row.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn

from mmalign.errors import UserError, reason
from mmalign.fingerprints import module_fingerprint
from vlm.attention import cannot_share, share
from vlm.batch import ImageInput, PaddingSide, Row, VlmBatch, collate
from vlm.conversations import Conversation, choose_template, render
from vlm.families import Family, process
from vlm.logprobs import Distributions, TokenLogps, compared_at, logps_at, strongest, token_logps
from vlm.opening import DTYPES, open_network
from vlm.packing import Answers, apart, shared
from vlm.settings import VlmModelSettings

RECENT = 8  # pictures kept as tensors: the sides of a pair mostly share theirs


class TooLongError(UserError):
    """A row is longer than the model can read. Trainers leave such rows out and count them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFeatures:
    """What the vision tower and the projector made of a batch's distinct images.

    Args:
        pooled: for each image [tokens, width], the embeddings that take its placeholders' place.
        deep: for each further injection point (Qwen3-VL), the same again.
    """

    pooled: tuple[Tensor, ...]
    deep: tuple[tuple[Tensor, ...], ...] = ()


def open_model(settings: VlmModelSettings, *, train_full: bool = False) -> VisionLanguageModel:
    """Open a model on the CPU, with nothing trainable.

    Args:
        train_full: the model's own weights will be trained, so they are fp32 whatever `settings.dtype` says.

    Raises:
        UserError: see `open_network` and `choose_template`.
    """
    dtype = torch.float32 if train_full else DTYPES[settings.dtype]
    network, processor, family = open_network(settings, dtype=dtype)
    return VisionLanguageModel(network, processor, family, settings)


class VisionLanguageModel:
    """A network of transformers and its processor.

    Attributes:
        network: the `...ForConditionalGeneration`, unwrapped.
        family: how it is batched and where its parts are.
        template: the Jinja chat template in use.
        max_tokens: the longest row it reads, image tokens included.
        identity: "name@fingerprint" of the network as it was opened, or of the weights that a run started from.
        unshared: why rows do not share their beginnings; None where they do.
    """

    def __init__(self, network: Any, processor: Any, family: Any, settings: VlmModelSettings) -> None:
        self.network, self.processor, self.family, self.settings = network, processor, family, settings
        place = f"model.path: {settings.path}"
        self.template = choose_template(processor, wanted=settings.template, family=family.name, place=place)
        limit = network.config.get_text_config().max_position_embeddings
        self.max_tokens = min(limit, settings.max_tokens or limit)
        self.image_token_id = int(network.config.image_token_id)
        tokenizer = processor.tokenizer
        # Not `pad or eos`: a padding token of id 0 is one like any other.
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad is None:
            raise UserError("the tokenizer has neither a padding nor an end token", place=place)
        self.pad_id = int(pad)
        self.identity = f"{Path(settings.path).name}@{module_fingerprint(network)[:12]}"
        self.unshared = cannot_share(network, family, settings.attention)
        if self.unshared is None:
            share(network)
        self._recent: OrderedDict[str, tuple[ImageInput, str]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        parameter: Tensor = next(self.network.parameters())
        return parameter.device

    def to(self, device: torch.device | str) -> VisionLanguageModel:
        """The model itself, moved."""
        self.network.to(device)
        return self

    @property
    def language_model(self) -> nn.Module:
        """The language model without its head."""
        part: nn.Module = getattr(self.network.model, self.family.language)
        return part

    @property
    def trains_vision(self) -> bool:
        """Whether anything between pixels and image tokens is trained."""
        inside = f"{self.family.language}."
        return any(p.requires_grad for name, p in self.network.model.named_parameters() if not name.startswith(inside))

    # ------------------------------------------------------------------------------------------------
    # Conversations to rows

    def encode(self, conversation: Conversation) -> Row:
        """Tokens, completion mask and image tensors of one conversation.

        Raises:
            UserError: see `render`; placeholders in the text that are no image's, or a picture that its image
                processor refuses.
            TooLongError: more than `max_tokens` tokens.
        """
        place, placeholder = conversation.place, self.processor.image_token
        rendered = render(conversation, self.processor, self.template)
        prepared = [self._prepare(image, index, place) for index, image in enumerate(conversation.images)]
        pieces = rendered.prompt.split(placeholder)
        if len(pieces) - 1 != len(prepared) or placeholder in rendered.completion:
            found = len(pieces) - 1 + rendered.completion.count(placeholder)
            raise UserError(
                f"{found} placeholders {placeholder} in the rendered text, images in the row: {len(prepared)}",
                place=place,
                fix=f"Write no {placeholder} into prompts and answers: the chat template places the images",
            )
        prompt = pieces[0] + "".join(text + piece for (_, text), piece in zip(prepared, pieces[1:], strict=True))
        ids, answer_from = self._tokenize(prompt, rendered.completion)
        images = tuple(image for image, _ in prepared)
        self._check_row(ids, images, place)
        return Row(
            ids=torch.tensor(ids, dtype=torch.int64),
            completion=torch.arange(len(ids)) >= answer_from,
            images=images,
            place=place,
        )

    def collate(self, rows: Sequence[Row], *, side: PaddingSide = "right") -> VlmBatch:
        """Rows as one padded batch; see `vlm.batch`."""
        return collate(rows, pad_id=self.pad_id, side=side)

    def _prepare(self, image: Image.Image, index: int, place: str) -> tuple[ImageInput, str]:
        """(tensors, text that replaces the placeholder) of a picture, remembered for a while."""
        key = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
        if key not in self._recent:
            try:
                tensors, text = process(self.processor, self.family, image)
            except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
                raise UserError(
                    f"the model's image processor refuses a picture of {image.width} x {image.height}: {reason(error)}",
                    place=f"{place}, image {index}",
                ) from error
            tokens = text.count(self.processor.image_token)
            self._recent[key] = ImageInput(key=key, tensors=tensors, tokens=tokens), text
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    def _tokenize(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """(ids of both, where the completion begins)."""
        tokenizer = self.processor.tokenizer
        start = self._start(prompt)
        alone = start + self._ids(prompt)
        if not completion:
            return alone, len(alone)
        joint = start + self._ids(prompt + completion)
        if joint[: len(alone)] == alone:
            return joint, len(alone)
        # A token across the border ("ASSISTANT: " and "yes" make " yes") is one that the model could never have
        # begun its answer with: then the answer has tokens of its own, cut off behind a token nothing merges with.
        border = tokenizer.eos_token or tokenizer.pad_token
        return alone + self._ids(border + completion)[1:], len(alone)

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _start(self, prompt: str) -> list[int]:
        """The token a row begins with by the tokenizer's habit, unless the template wrote it already."""
        tokenizer = self.processor.tokenizer
        if tokenizer.bos_token is None or prompt.startswith(tokenizer.bos_token):
            return []
        usual = tokenizer("a")["input_ids"]
        return [int(tokenizer.bos_token_id)] if usual and usual[0] == tokenizer.bos_token_id else []

    def _check_row(self, ids: Sequence[int], images: Sequence[ImageInput], place: str) -> None:
        found, expected = ids.count(self.image_token_id), sum(image.tokens for image in images)
        if found != expected:
            raise UserError(f"{found} image tokens in the row, its images are {expected}", place=place)
        if len(ids) > self.max_tokens:
            raise TooLongError(
                f"the row has {len(ids)} tokens ({expected} of images), the limit is {self.max_tokens}",
                place=place,
                fix="Shorten it, use smaller pictures, or raise model.max_tokens if the model can read more",
            )

    # ------------------------------------------------------------------------------------------------
    # Batches to log-probabilities

    def encode_images(self, images: Sequence[ImageInput]) -> ImageFeatures | None:
        """Embeddings of each image; None for none. Without a graph unless vision tower or projector is trained.

        Raises:
            UserError: the model makes more or fewer embeddings than the processor made placeholders.
        """
        if not images:
            return None
        dtype: torch.dtype = self.network.dtype
        tensors = {
            name: torch.cat([image.tensors[name] for image in images]).to(self.device) for name in images[0].tensors
        }
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_vision):
            made = self.network.get_image_features(**tensors, return_dict=True)
        counts = [image.tokens for image in images]
        pooled = torch.cat(list(made.pooler_output))
        if len(pooled) != sum(counts):
            raise UserError(
                f"the model makes {len(pooled)} embeddings of images that have {sum(counts)} placeholders",
                place=f"model.path: {self.settings.path}",
                fix="Check patch_size and vision_feature_select_strategy in processor_config.json",
            )
        deep = [torch.cat(list(level)) for level in getattr(made, "deepstack_features", None) or ()]
        return ImageFeatures(pooled=pooled.split(counts), deep=tuple(level.split(counts) for level in deep))

    def inputs(self, batch: VlmBatch, features: ImageFeatures | None = None) -> dict[str, Any]:
        """What the network without its head is called with.

        Args:
            batch: on the network's device.
            features: of `batch.images`, where they are known already: a frozen vision tower's are the same for
                policy and reference.
        """
        arguments: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
        if features is None:
            features = self.encode_images(batch.images)
        arguments |= _encoded(self.family, features, [image for look in batch.looks for image in look])
        if self.family.token_types:
            return arguments | self._token_types(batch)
        return arguments | {"position_ids": (batch.attention.long().cumsum(dim=1) - 1).clamp(min=0)}

    def answers(self, rows: Sequence[Row]) -> Answers:
        """Rows for one forward; equal beginnings are computed once where the model can do that."""
        positions = self._positions(rows)
        return apart(rows, positions, pad_id=self.pad_id) if self.unshared else shared(rows, positions)

    def hidden_of(
        self, answers: Answers, features: ImageFeatures | None = None
    ) -> Float[Tensor, "sequences tokens width"]:
        """Last hidden states of all sequences."""
        if features is None:
            features = self.encode_images(answers.images)
        arguments: dict[str, Any] = {"input_ids": answers.ids, "position_ids": answers.positions, "use_cache": False}
        arguments |= _encoded(self.family, features, answers.looks)
        if answers.groups is None:
            arguments["attention_mask"] = answers.attention.long()
        else:
            # a mask of this rank is passed on as it is, so that none of tokens x tokens is made; nothing reads it
            arguments |= {"attention_mask": answers.ids.new_ones(1, 1, 1, 1), "groups": answers.groups}
        hidden: Tensor = self.network.model(**arguments).last_hidden_state
        return hidden

    def hidden_states(
        self, batch: VlmBatch, features: ImageFeatures | None = None
    ) -> Float[Tensor, "rows tokens width"]:
        """Last hidden states, from which the head makes logits; see `inputs`."""
        hidden: Tensor = self.network.model(**self.inputs(batch, features), use_cache=False).last_hidden_state
        return hidden

    def logps(self, batch: VlmBatch, features: ImageFeatures | None = None) -> TokenLogps:
        """Per-token log-probabilities of every row's completion; see `token_logps`."""
        hidden = self.hidden_states(batch, features)
        return token_logps(
            hidden,
            batch.ids,
            batch.completion,
            self.network.get_output_embeddings(),
            chunk=self.settings.logits_chunk,
        )

    def _positions(self, rows: Sequence[Row]) -> list[Int64[Tensor, "*axes tokens"]]:
        """Where the tokens of each row stand: counted, or on the axes of time, height and width."""
        if not self.family.token_types:
            return [torch.arange(len(row)) for row in rows]
        batch = self.collate(rows)
        types = self._token_types(batch)
        if not types:
            return [torch.arange(len(row)).expand(3, -1) for row in rows]
        found, _ = self.network.model.get_rope_index(batch.ids, attention_mask=batch.attention.long(), **types)
        return [found[:, number, : len(row)] for number, row in enumerate(rows)]

    def _token_types(self, batch: VlmBatch) -> dict[str, Tensor]:
        """What multi-axis rotary positions are made of: which tokens are of images, and each image's grid."""
        grids = [batch.images[i].tensors["image_grid_thw"] for look in batch.looks for i in look]
        if not grids:
            return {}
        types = (batch.ids == self.image_token_id).long()
        return {"mm_token_type_ids": types, "image_grid_thw": torch.cat(grids).to(batch.ids.device)}


def _encoded(family: Family, features: ImageFeatures | None, looks: Sequence[int]) -> dict[str, Any]:
    """Features of every run of placeholders, as transformers takes them."""
    if features is None:
        return {}
    return {
        "mm_encoder_outputs": {
            "image": SimpleNamespace(
                pooler_output=family.given([features.pooled[i] for i in looks]),
                deepstack_features=[[level[i] for i in looks] for level in features.deep],
            )
        }
    }


class Policy(nn.Module):
    """A model as one module whose forward is the log-probabilities: what a trainer wraps for several processes."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.network = model.network
        self._model = model

    def forward(
        self,
        answers: Answers,
        features: ImageFeatures | None = None,
        also: Int64[Tensor, "rows answer"] | Literal["strongest", "strongest other"] | Distributions | None = None,
        choose: bool = False,
        distributions: bool = False,
    ) -> Tensor | Distributions:
        """Log-probabilities of answer tokens, [kinds, rows, answer], fp32, 0 on padding.

        Args:
            features: of `answers.images`, where they are known already.
            also: other tokens to score at the same places, as a second kind: given ones, the likeliest, or the
                likeliest but the answer's own. No gradient flows through which token is the likeliest. Or another
                model's distributions at these places, which bring two more kinds; see `compared_at`.
            choose: return the likeliest tokens themselves, [rows, answer], instead.
            distributions: return what makes the distributions at all places of answer tokens, row by row, instead.
        """
        model, network = self._model, self.network
        head, chunk, there = network.get_output_embeddings(), model.settings.logits_chunk, answers.completion
        hidden = model.hidden_of(answers, features)
        states = hidden.flatten(0, 1)[answers.predictors[there]]
        if choose:
            best = strongest(states, head, chunk=chunk)
            return torch.zeros_like(answers.targets).masked_scatter(there, best)
        if distributions:
            return Distributions(states=states, head=head)
        said = answers.targets[there]
        if isinstance(also, Distributions):
            flat = compared_at(Distributions(states=states, head=head), also, said, chunk=chunk)
        else:
            kinds = [said]
            if isinstance(also, Tensor):
                kinds.append(also[there])
            elif also is not None:
                but = said if also == "strongest other" else None
                kinds.append(strongest(states.detach(), head, chunk=chunk, but=but))
            flat = logps_at(states, torch.stack(kinds), head, chunk=chunk)
        filled: Tensor = flat.new_zeros(len(flat), *there.shape).masked_scatter(there, flat)
        return filled
