"""Preference pairs as latents and text embeddings, encoded once and kept on disk under what they depend on.

    <data.cache>/<key>/latents-512x512.npy   a row per picture and view: mean [c], or mean and deviation [2c]
                       sizes-512x512.npy     SDXL's true time ids of the same rows
                       embeds.npy pooled.npy a row per prompt
                       pairs.npy prompts.npy which rows belong to which pair

The key is a hash of the VAE, the text encoders, the transform and the content of every pair, so it is found again
from any path and never wrongly. It does not depend on which side is preferred: relabelled pairs, and the control
with shuffled labels, use the same encodings.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import arrays, transforms
from diffusion.conditioning import Conditioning
from diffusion.models import DiffusionModel
from diffusion.parts import Origin, PairBatch
from diffusion.settings import LatentSettings
from diffusion.transforms import Size, View
from mmalign.errors import UserError
from mmalign.fingerprints import module_fingerprint, tokenizer_fingerprint
from mmalign.media import Media
from mmalign.progress import progress
from mmalign.randomness import Draws, key_seed
from mmalign.records import Preference, Side

NUMPY = {"fp32": "<f4", "fp16": "<f2"}
AHEAD = 2  # batches of pictures decoded while one is being encoded
THREADS = 4
PROMPT_BATCH = 64


def prepare(
    model: DiffusionModel,
    preferences: Sequence[Preference],
    settings: LatentSettings,
    *,
    release_texts: bool = False,
) -> PairData:
    """Encode pairs, or find them encoded. Runs where the model is; needs its encoders.

    Args:
        release_texts: free the text encoders once prompts are encoded: they and the VAE at work are what a run with
            an adapter needs most memory for.

    Raises:
        UserError: no pairs, an id used twice, a tie without a probability, a response that is not a picture or not
            readable, a bucket that the model cannot take, a VAE that overflows, a cache that cannot be written.
    """
    pairs = _pairs(preferences)
    sizes = transforms.bucket_sizes(settings, model.resolution, model.multiple)
    key = _key(model, pairs, settings, sizes)

    def fill(folder: arrays.Folder) -> None:
        _encode(model, pairs, settings, sizes, folder, release_texts)

    contents = arrays.in_memory(fill) if settings.cache is None else arrays.on_disk(settings.cache, key, fill)
    return PairData(model, preferences, settings, sizes, key, pairs, contents)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A pair with its sides in an order that does not say which one is preferred.

    Args:
        sides: by content.
        digests: SHA-256 of their pictures.
        first: which of them is trained as the chosen one.
        confidence: probability that it is.
    """

    item: str
    sides: tuple[Side, Side]
    digests: tuple[str, str]
    first: int
    confidence: float

    def picture(self, side: int) -> Media:
        response = self.sides[side].response
        assert isinstance(response, Media)
        return response


def _pairs(preferences: Sequence[Preference]) -> list[_Pair]:
    if not preferences:
        raise UserError("there are no pairs to train on", place="data", fix="`mmalign data stats` shows what is there")
    known = all(isinstance(p.a.response, Media) and p.a.response.digest for p in preferences)
    pairs, seen = [], set()
    for preference in preferences if known else progress(preferences, "read pictures"):
        item = preference.item_id
        if item in seen:
            raise UserError(f"two pairs have the id '{item}'", place="data", fix="Give every pair an id of its own")
        seen.add(item)
        if preference.label == "tie" and preference.confidence is None:
            raise UserError(
                f"pair '{item}' is a tie", place="data.pairing.ties", fix="Use drop, or soft with a soft-label loss"
            )
        chosen, rejected, confidence = preference.ordered()
        digests = (_digest(chosen, item), _digest(rejected, item))
        turned = (digests[0], chosen.prompt) > (digests[1], rejected.prompt)
        pairs.append(
            _Pair(
                item=item,
                sides=(rejected, chosen) if turned else (chosen, rejected),
                digests=digests[::-1] if turned else digests,
                first=int(turned),
                confidence=confidence,
            )
        )
    return pairs


def _digest(side: Side, item: str) -> str:
    if not isinstance(side.response, Media):
        raise UserError(
            f"pair '{item}' prefers texts, not pictures", place="data.path", fix="Use it with `mmalign train vlm/...`"
        )
    return side.response.sha256()


def _key(model: DiffusionModel, pairs: Sequence[_Pair], settings: LatentSettings, sizes: Sequence[Size]) -> str:
    """Hash of all that the encodings depend on."""
    pipeline = model.pipeline
    texts = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    tokens = [name for name in ("tokenizer", "tokenizer_2") if getattr(pipeline, name, None) is not None]
    basis = {
        "version": transforms.VERSION,
        "vae": module_fingerprint(model.vae),
        "text": [module_fingerprint(getattr(pipeline, name)) for name in texts],
        "tokens": [tokenizer_fingerprint(getattr(pipeline, name)) for name in tokens],
        "sizes": list(sizes),
        "views": settings.views,
        # with one view nothing is drawn, and the encodings do not depend on how pairs are called
        "drawn": [settings.crop, settings.flip, settings.seed] if settings.views > 1 else None,
        "posterior": settings.posterior,
        "dtype": settings.dtype,
    }
    digest = hashlib.sha256(json.dumps(basis, sort_keys=True).encode())
    for pair in pairs:
        prompts = [side.prompt for side in pair.sides]
        line = [pair.item if settings.views > 1 else "", *pair.digests, *prompts]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Job:
    """One picture to encode in one view."""

    media: Media
    item: str
    view: View
    size: Size

    def load(self) -> tuple[Any, tuple[int, ...]]:
        """(the picture, its time ids)."""
        with _of_pair(self.item):
            image = self.media.open()
        fitted, crop = transforms.fit(image, self.size, self.view)
        width, height = self.size
        return fitted, (image.height, image.width, *crop, height, width)


class _of_pair:
    """Errors inside are about a picture of this pair."""

    def __init__(self, item: str) -> None:
        self._item = item

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            raise UserError(
                f"pair '{self._item}': {error.cause}",
                place=error.place,
                fix=error.fix or "`mmalign data check` lists every such row",
            ) from error


def _encode(
    model: DiffusionModel,
    pairs: Sequence[_Pair],
    settings: LatentSettings,
    sizes: Sequence[Size],
    folder: arrays.Folder,
    release_texts: bool,
) -> None:
    """Fill a folder: every picture once per view, every prompt once."""
    jobs: dict[Size, list[_Job]] = {size: [] for size in sizes}
    rows: dict[tuple[str, Size, View], int] = {}
    table = np.empty((len(pairs), 1 + 2 * settings.views), np.int64)
    for index, pair in enumerate(pairs):
        size = sizes[0]
        if len(sizes) > 1:
            with _of_pair(pair.item):
                size = transforms.nearest_bucket([transforms.size_of(pair.picture(s)) for s in (0, 1)], sizes)
        table[index, 0] = sizes.index(size)
        for number, view in enumerate(transforms.views_of(settings, pair.item)):
            for side in (0, 1):
                what = (pair.digests[side], size, view)
                if what not in rows:
                    rows[what] = len(jobs[size])
                    jobs[size].append(_Job(pair.picture(side), pair.item, view, size))
                table[index, 1 + 2 * number + side] = rows[what]
    folder.add("pairs", table)
    _encode_prompts(model, pairs, settings, folder)
    if release_texts:
        model.release_texts()
    for size, wanted in jobs.items():
        if wanted:
            _encode_pictures(model, wanted, size, settings, folder)


def _encode_prompts(
    model: DiffusionModel, pairs: Sequence[_Pair], settings: LatentSettings, folder: arrays.Folder
) -> None:
    distinct = list(dict.fromkeys(side.prompt for pair in pairs for side in pair.sides))
    number = {prompt: index for index, prompt in enumerate(distinct)}
    table = [[number[side.prompt] for side in pair.sides] for pair in pairs]
    folder.add("prompts", np.array(table, np.int64))
    files: dict[str, arrays.Rows] = {}
    for start in progress(range(0, len(distinct), PROMPT_BATCH), "encode prompts", unit="batch"):
        text = model.encode_prompts(distinct[start : start + PROMPT_BATCH])
        for name, values in (("embeds", text.embeds), ("pooled", text.pooled)):
            if values is not None:
                if name not in files:
                    shape = (len(distinct), *values.shape[1:])
                    files[name] = folder.rows(name, shape, NUMPY[settings.dtype])
                files[name].append(values.cpu().numpy())


def _encode_pictures(
    model: DiffusionModel, jobs: Sequence[_Job], size: Size, settings: LatentSettings, folder: arrays.Folder
) -> None:
    label = f"{size[0]}x{size[1]}"
    channels, height, width = model.latent_shape(*size)
    parts = 2 if settings.posterior == "sample" else 1
    latents = folder.rows(f"latents-{label}", (len(jobs), parts * channels, height, width), NUMPY[settings.dtype])
    time_ids = folder.rows(f"sizes-{label}", (len(jobs), 6), "<f4")
    starts = range(0, len(jobs), settings.encode_batch)
    chunks = _loaded([jobs[start : start + settings.encode_batch] for start in starts])
    for loaded in progress(chunks, f"encode {label}", total=len(starts), unit="batch"):
        images, ids = zip(*loaded, strict=True)
        mean, deviation = model.encode_images(transforms.to_pixels(images))
        kept = torch.cat([mean, deviation], dim=1) if parts == 2 else mean
        latents.append(kept.cpu().numpy())
        time_ids.append(np.array(ids, np.float32))


def _loaded(chunks: Iterable[Sequence[_Job]]) -> Iterator[list[tuple[Any, tuple[int, ...]]]]:
    """Decoded chunks, a few of them ahead of their use."""
    waiting: deque[list[Future[tuple[Any, tuple[int, ...]]]]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for chunk in chunks:
            waiting.append([pool.submit(job.load) for job in chunk])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


class PairData:
    """Encoded pairs.

    Attributes:
        settings: how the pairs were encoded.
        key: of the pairs as they are labelled: equal keys mean equal batches for equal seeds.
        inputs_key: equal keys mean equal latents and conditioning, however the pairs are labelled.
        unrelated: share of the pairs whose sides have different prompts.
        buckets: (width, height) in pixels -> indices of the pairs of that size; only pairs of one size share a batch.
        elements: numbers in the latents of a picture, in the bucket with the most pairs.
        confidence: probability that the first side is the preferred one, per pair.
    """

    def __init__(
        self,
        model: DiffusionModel,
        preferences: Sequence[Preference],
        settings: LatentSettings,
        sizes: Sequence[Size],
        content: str,
        pairs: Sequence[_Pair],
        contents: dict[str, arrays.Array],
    ) -> None:
        self.settings, self._contents, self._sizes = settings, contents, list(sizes)
        self._constant_ids = model.settings.time_ids == "constant"
        self._sdxl = model.family == "sdxl"
        self.empty = model.empty().to("cpu")
        self.item_ids = [pair.item for pair in pairs]
        self._first = np.array([pair.first for pair in pairs])
        self.confidence = np.array([pair.confidence for pair in pairs], np.float32)
        gaps = [preference.gap for preference in preferences]
        self.gap = None if any(gap is None for gap in gaps) else np.array(gaps, np.float32)
        self.unrelated = float((contents["prompts"][:, 0] != contents["prompts"][:, 1]).mean())
        bucket = contents["pairs"][:, 0]
        self.buckets: dict[Size, list[int]] = {
            size: np.flatnonzero(bucket == number).tolist()
            for number, size in enumerate(self._sizes)
            if (bucket == number).any()
        }
        channels, height, width = model.latent_shape(*max(self.buckets, key=lambda size: len(self.buckets[size])))
        self.elements = channels * height * width
        labels = json.dumps([content, self.item_ids, self._first.tolist(), self.confidence.tolist()])
        self.key = hashlib.sha256(labels.encode()).hexdigest()[:32]
        empty = [text.numpy().tobytes().hex() for text in (self.empty.embeds, self.empty.pooled) if text is not None]
        inputs = json.dumps([content, self._constant_ids, empty])
        self.inputs_key = hashlib.sha256(inputs.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.item_ids)

    def batch(
        self, items: Sequence[int], visits: Sequence[int], *, seed: int, device: torch.device | str = "cpu"
    ) -> PairBatch:
        """Some pairs of one bucket.

        Everything that varies is a function of (seed, item, visit): the view is the visit modulo their number, a
        posterior is drawn anew at every visit, and a dropped prompt is dropped on both sides.

        Args:
            items: indices of pairs.
            visits: how often each was seen before.

        Raises:
            ValueError: pairs of different sizes.
        """
        chosen = np.asarray(items)
        table = self._contents["pairs"][chosen]
        numbers = set(table[:, 0].tolist())
        if len(numbers) != 1:
            raise ValueError("a batch needs pairs of one bucket")
        size = self._sizes[numbers.pop()]
        keys = tuple(f"{self.item_ids[item]}:{visit}" for item, visit in zip(items, visits, strict=True))
        view = 1 + 2 * (np.asarray(visits) % self.settings.views)
        first = self._first[chosen]
        here = np.arange(len(chosen))
        rows = np.concatenate([table[here, view + first], table[here, view + 1 - first]])
        prompts = self._contents["prompts"][chosen]
        texts = np.concatenate([prompts[here, first], prompts[here, 1 - first]])

        if self.settings.prompt_dropout:
            dropped = self._draws("prompt dropout", seed, keys).uniform() < self.settings.prompt_dropout
            texts = np.where(dropped.repeat(2).numpy(), -1, texts)
        return PairBatch(
            latents=self._latents(size, rows, seed, keys).to(device),
            conditioning=self._conditioning(size, rows, texts).to(device),
            keys=keys,
            seed=seed,
            confidence=torch.from_numpy(self.confidence[chosen]).to(device),
            gap=None if self.gap is None else torch.from_numpy(self.gap[chosen]).to(device),
            origin=Origin(size=size, pictures=tuple(rows.tolist()), prompts=tuple(texts.tolist())),
        )

    def origins(self) -> list[Origin]:
        """Every picture in every view under every prompt that a batch can have it with, one list for each size.

        Sorted by picture, then prompt, the empty one first: it is there if prompts are dropped.
        """
        found = []
        for size, items in self.buckets.items():
            pictures = self._contents["pairs"][items, 1:].reshape(len(items), self.settings.views, 2)
            texts = np.broadcast_to(self._contents["prompts"][items][:, None], pictures.shape)
            rows = np.stack([pictures.ravel(), texts.ravel()], axis=1)
            if self.settings.prompt_dropout:
                rows = np.concatenate([rows, np.stack([rows[:, 0], np.full(len(rows), -1)], axis=1)])
            rows = np.unique(rows, axis=0)
            found.append(Origin(size=size, pictures=tuple(rows[:, 0].tolist()), prompts=tuple(rows[:, 1].tolist())))
        return found

    def rows(self, origin: Origin) -> tuple[Tensor, Conditioning]:
        """(latents, conditioning) of some rows, on the CPU.

        Raises:
            ValueError: latents are drawn anew at every use.
        """
        if self.settings.posterior != "mean":
            raise ValueError("latents that are drawn at every use belong to a draw")
        pictures, texts = np.array(origin.pictures), np.array(origin.prompts)
        return self._latents(origin.size, pictures, 0, ()), self._conditioning(origin.size, pictures, texts)

    def _latents(self, size: Size, rows: arrays.Array, seed: int, keys: Sequence[str]) -> Tensor:
        stored = self._tensor(f"latents-{size[0]}x{size[1]}", rows)
        if self.settings.posterior == "mean":
            return stored
        mean, deviation = stored.chunk(2, dim=1)
        draws = self._draws("posterior", seed, keys)
        noise = torch.cat([draws.normal(mean.shape[1:]), draws.normal(mean.shape[1:])])
        return mean + deviation * noise

    def _conditioning(self, size: Size, rows: arrays.Array, texts: arrays.Array) -> Conditioning:
        """Of rows of pictures and prompts; prompt -1 is the empty one."""
        embeds = self._tensor("embeds", texts)
        if not self._sdxl:
            return self._emptied(Conditioning(embeds=embeds), texts)
        width, height = size
        if self._constant_ids:
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(len(rows), 1)
        else:
            time_ids = self._tensor(f"sizes-{width}x{height}", rows)
        text = Conditioning(embeds=embeds, pooled=self._tensor("pooled", texts), time_ids=time_ids)
        return self._emptied(text, texts)

    def _emptied(self, conditioning: Conditioning, texts: arrays.Array) -> Conditioning:
        empty = torch.from_numpy(texts == -1)
        return conditioning.replace_text(empty, self.empty) if empty.any() else conditioning

    def _tensor(self, name: str, rows: arrays.Array) -> Tensor:
        """Rows of an array as fp32, copied out of the memory map."""
        return torch.from_numpy(np.asarray(self._contents[name][rows], np.float32))

    @staticmethod
    def _draws(purpose: str, seed: int, keys: Sequence[str]) -> Draws:
        return Draws([key_seed(purpose, seed, key) for key in keys])
