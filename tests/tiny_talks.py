"""A store of answers to small pictures, and vision-language recipes of seconds on a tiny random LLaVA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny_runs import merged

from mmalign.media import Media
from mmalign.preferences import Store
from mmalign.records import Candidate, Record, Vote

RECIPE: dict[str, Any] = {
    "package": "vlm",
    "model": {"path": ""},
    "adapter": {"rank": 2},
    "data": {"path": ""},
    "method": {"name": "dpo"},
    # a large eps: steps proportional to gradients, so that ways to compute them compare (see tiny_runs)
    "optim": {"lr": 1.0e-2, "eps": 1.0e-2},
    "loop": {"steps": 3, "batch_size": 2, "output_dir": "", "trackers": ["jsonl"]},
}
ANSWERS = (
    ("a red circle", "a red circle and a blue square"),
    ("yes", "no"),
    ("there are two things here", "nothing"),
    ("a dog", "a cat, a dog"),
    ("it is blue", "it is a blue one indeed"),
)


def picture(number: int) -> Media:
    coarse = np.random.default_rng([7, number]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Media.from_image(Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC))


def records() -> Iterator[Record]:
    """The rejected answer comes with a picture of its own in every second record."""
    for index, (good, bad) in enumerate(ANSWERS):
        other = (picture(100 + index),)
        yield Record(
            record_id=f"{index:02d}",
            prompt=("what is it?", "what else?")[index % 2],
            media=(picture(index),),
            candidates=(
                Candidate(candidate_id="good", text=good),
                Candidate(candidate_id="bad", text=bad, media=other),
            ),
            votes=(Vote(a="good", b="bad", label="a"),),
        )


class Talk:
    """A folder with a model and a store, and the recipes on them."""

    def __init__(self, folder: Path, family: str = "llava") -> None:
        from tiny_vlms import write

        self.folder = folder
        self.model = write(family, folder / "model")
        self.store = folder / "store"
        Store.write(records(), self.store)

    def recipe(self, out: Path, **changes: Any) -> Path:
        """A recipe's file, training into `out`."""
        own = {"model": {"path": str(self.model)}, "data": {"path": str(self.store)}, "loop": {"output_dir": str(out)}}
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.parent / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump(merged(merged(RECIPE, own), changes)))
        return file

    def train(self, out: Path, **changes: Any) -> int:
        """Train in this process."""
        from vlm.train import main

        return main([str(self.recipe(out, **changes))])
