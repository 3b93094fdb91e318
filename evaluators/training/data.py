"""What a scorer is trained on: pictures of a prompt and the pairs among them, out of a preference store.

An item is one pair, or all pairs of one prompt. Every pair has a weight: with `prompt_weights` 1 / n, where n pairs
have its prompt, so that every prompt counts the same however often it was voted on (PickScore's), otherwise 1; divided
by the mean over items of the data, so that accumulating batches equals a larger batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluators.preprocess import Preprocess
from evaluators.recipe import HeldOutSettings, TrainConfig
from mmalign import config as configuration
from mmalign.ahead import ahead
from mmalign.errors import UserError
from mmalign.loop import Loop, processes
from mmalign.media import Media
from mmalign.order import Pick
from mmalign.pairdata import read_pairs, shuffled
from mmalign.progress import Progress
from mmalign.randomness import key_seed
from mmalign.records import Preference

READERS = 8  # threads that decode pictures: Pillow lets go of the interpreter while it does
WAITING = 1024  # pictures that are given to them at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Pictures of one prompt.

    Attributes:
        pairs: preferred picture and the other, by their place.
        confidence: of each pair, the probability that its label is right.
        gaps: of each pair how much better the score of the preferred one is, where scores made it.
    """

    prompt: str
    pictures: tuple[Media, ...]
    pairs: tuple[tuple[int, int], ...]
    confidence: tuple[float, ...]
    gaps: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureBatch:
    """Some items, in tensors.

    Attributes:
        prompts: of the items.
        owner: which item a picture is of.
        pairs: rows of `pixels`: the preferred picture and the other.
        confidence: probability that the first of a pair is preferred.
        gap: by how much its score is better; None where labels did not come from scores.
        counts: of each pair how many pairs of the data have its prompt.
        items: how many.
    """

    prompts: tuple[str, ...]
    tokens: Int[Tensor, "items tokens"]
    pixels: Float[Tensor, "pictures 3 size size"]
    owner: Int[Tensor, " pictures"]
    pairs: Int[Tensor, "pairs 2"]
    confidence: Float[Tensor, " pairs"]
    gap: Float[Tensor, " pairs"] | None
    counts: Float[Tensor, " pairs"]

    @property
    def items(self) -> int:
        return len(self.prompts)


def divided(config: TrainConfig) -> tuple[list[Preference], list[Preference], str]:
    """Pairs to train on, pairs that are held out, and a line about them. No prompt is in both.

    Raises:
        UserError: no such store or split, pairs of texts, sides with different prompts, or nothing left on a side.
    """
    seed, held = config.loop.seed, config.held_out
    true = config.data.model_copy(update={"shuffle_labels": False})  # the control too is judged by these
    pairs, note = read_pairs(true, seed)
    _require_pictures(pairs, str(true.path))
    judged: list[Preference] = []
    if held is None:
        kept = pairs
    elif held.split is None:
        out = {prompt for prompt in {pair.a.prompt for pair in pairs} if _drawn(prompt, held)}
        kept = [pair for pair in pairs if pair.a.prompt not in out]
        judged = [pair for pair in pairs if pair.a.prompt in out]
    else:
        where = true.model_copy(update={"path": held.path or true.path, "split": held.split})
        kept, judged = pairs, read_pairs(where, seed)[0]
        _require_pictures(judged, str(where.path))
        if both := {pair.a.prompt for pair in kept} & {pair.a.prompt for pair in judged}:
            raise UserError(
                f"{len(both)} prompts are trained on and held out, the first {min(both)[:60]!r}",
                place=f"held_out.split={held.split}",
                fix="Split by prompt, or leave held_out.split out: prompts are drawn then.",
            )
    sided = sum(pair.label != "tie" for pair in judged)
    if held is not None and not (kept and sided):
        raise UserError(
            f"{len(kept)} pairs are trained on and {sided} with a preferred side held out",
            place="held_out",
            fix="Change held_out.share, or say held_out=null to train on everything.",
        )
    if held is not None:
        note += f"; {len(judged)} pairs held out"
    return (shuffled(kept, seed) if config.data.shuffle_labels else kept), judged, note


def _drawn(prompt: str, held: HeldOutSettings) -> bool:
    return key_seed("held out", held.seed, prompt) % 1_000_003 < held.share * 1_000_003


def _require_pictures(pairs: Sequence[Preference], place: str) -> None:
    for pair in pairs:
        if not isinstance(pair.a.response, Media) or not isinstance(pair.b.response, Media):
            raise UserError(f"{pair.item_id} compares texts; this trains scorers of pictures", place=place)
        if pair.a.prompt != pair.b.prompt:
            raise UserError(f"{pair.item_id} compares pictures of different prompts", place=place)


def items_of(pairs: Sequence[Preference], kind: Literal["pairs", "prompts"]) -> list[Item]:
    """Pairs as items, in the order in which they come first."""
    if kind == "pairs":
        return [_item([pair]) for pair in pairs]
    groups: dict[str, list[Preference]] = {}
    for pair in pairs:
        groups.setdefault(pair.a.prompt, []).append(pair)
    return [_item(group) for group in groups.values()]


def _item(group: Sequence[Preference]) -> Item:
    places: dict[str, int] = {}
    pictures: list[Media] = []

    def place(response: object) -> int:
        assert isinstance(response, Media)  # `_require_pictures`
        digest = response.sha256()
        if digest not in places:
            places[digest] = len(pictures)
            pictures.append(response)
        return places[digest]

    ordered = [pair.ordered() for pair in group]
    pairs = tuple((place(first.response), place(second.response)) for first, second, _ in ordered)
    return Item(
        prompt=group[0].a.prompt,
        pictures=tuple(pictures),
        pairs=pairs,
        confidence=tuple(confidence for _, _, confidence in ordered),
        gaps=tuple(pair.gap for pair in group),
    )


class PictureFeed:
    """Items, read by several threads a little before they are needed.

    Every picture is decoded once before training, each by one of the processes, so that a broken one is found before
    hours are spent.

    Args:
        pairs: to train on.
        held: other items that will be asked for.
        preprocess, tokens: what pictures and texts are read by.

    Attributes:
        key: of the data: equal keys mean equal batches for equal seeds.
        size: items in an epoch.
        counts: pairs by prompt.

    Raises:
        UserError: a picture that cannot be decoded.
    """

    def __init__(
        self,
        config: TrainConfig,
        pairs: Sequence[Preference],
        held: Sequence[Item],
        preprocess: Preprocess,
        tokens: Callable[[list[str]], Tensor],
    ) -> None:
        self._config, self._preprocess, self._tokens = config, preprocess, tokens
        self._items = items_of(pairs, config.data.items)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="pictures")
        self.counts = Counter(pair.a.prompt for pair in pairs)
        self.size = len(self._items)
        self._look([*self._items, *held])
        self.key = configuration.digest(
            {
                "items": [
                    [item.prompt, [p.sha256() for p in item.pictures], item.pairs, item.confidence, item.gaps]
                    for item in self._items
                ]
            }
        )

    def _look(self, items: Sequence[Item]) -> None:
        here = processes()
        every = {picture.sha256(): picture for item in items for picture in item.pictures}
        own = list(every.values())[here.process_index :: here.num_processes]
        with Progress(len(own), "look at pictures", unit="picture", enabled=here.is_main_process) as bar:
            for start in range(0, len(own), WAITING):
                for _ in self._pool.map(lambda picture: picture.open().size, own[start : start + WAITING]):
                    bar.update(1)

    def mean_weight(self, prompt_weights: bool) -> float:
        """What weights of pairs sum to in an item, on average over the data; see the module's docstring."""
        # n pairs of a prompt weigh 1 / n each: the sum counts prompts. It is asked for in every forward
        return (len(self.counts) if prompt_weights else self.counts.total()) / self.size

    def source(self, loop: Loop) -> Callable[[int], Iterator[PictureBatch]]:
        """A function from an update's number to this process's batches from there on."""
        device = loop.accelerator.device

        def made(picks: list[Pick]) -> PictureBatch:
            return self.batch([self._items[pick.item] for pick in picks], device)

        return lambda start: ahead(made, loop.picks([range(self.size)], start))

    def example(self, device: torch.device) -> PictureBatch:
        """The first items, for measuring how long a forward takes."""
        return self.batch(self._items[: self._config.loop.batch_size], device)

    def batch(self, items: Sequence[Item], device: torch.device) -> PictureBatch:
        """Items in tensors."""
        starts: list[int] = []
        owner: list[int] = []
        for number, item in enumerate(items):
            starts.append(len(owner))
            owner += [number] * len(item.pictures)
        pictures = [picture for item in items for picture in item.pictures]
        pixels = list(self._pool.map(lambda picture: self._preprocess.images([picture.open()])[0], pictures))
        pairs = [(start + i, start + j) for start, item in zip(starts, items, strict=True) for i, j in item.pairs]
        gaps = [gap for item in items for gap in item.gaps]
        return PictureBatch(
            prompts=tuple(item.prompt for item in items),
            tokens=self._tokens([item.prompt for item in items]).to(device),
            pixels=torch.stack(pixels).to(device),
            owner=torch.tensor(owner, device=device),
            pairs=torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2),
            confidence=torch.tensor([c for item in items for c in item.confidence], device=device),
            gap=None if None in gaps else torch.tensor(gaps, device=device),
            counts=torch.tensor([float(self.counts[item.prompt]) for item in items for _ in item.pairs], device=device),
        )
