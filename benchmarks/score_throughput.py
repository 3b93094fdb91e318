"""Pictures per second of `mmalign score` and of the published loops, and where the time goes.

    python -m benchmarks.score_throughput > score_throughput.json

A CLIP of random weights, four pictures per prompt, files on the disk on both sides. `loop` is what the published
scorers do, the model loaded once: a picture is opened, preprocessed and encoded alone, and its prompt encoded again
beside it. `ours` is the engine of `mmalign score`. One process, in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import log, machine, spread, versions

ARCHITECTURE = "ViT-B-32"
PER_PROMPT = 4


def make_pictures(folder: Path, count: int, side: int) -> list[tuple[Path, str]]:
    """(file, prompt) of smooth random JPEG pictures, prompts beside them."""
    folder.mkdir()
    found = []
    for number in range(count):
        coarse = np.random.default_rng([7, number]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = folder / f"{number:06d}.jpg"
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, quality=95)
        prompt = f"a photograph of thing number {number // PER_PROMPT} on a table beside a window"
        file.with_suffix(".txt").write_text(prompt)
        found.append((file, prompt))
    return found


def make_checkpoint(file: Path, architecture: str) -> None:
    """Random weights in a file."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(architecture, load_weights=False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, str(file))


class Loop:
    """The published way, as HPSv2's `score` has it but for the model, which it loads at every call."""

    def __init__(self, file: Path, architecture: str, device: torch.device) -> None:
        import open_clip
        from safetensors.torch import load_file

        model, _, self.preprocess = open_clip.create_model_and_transforms(
            architecture, load_weights=False, image_resize_mode="longest"
        )
        model.load_state_dict(load_file(str(file)))
        self.model, self.device = model.eval().to(device), device
        self.tokenizer = open_clip.get_tokenizer(architecture)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[tuple[Path, str]]) -> list[float]:
        scores = []
        for file, prompt in pictures:
            pixels = self.preprocess(Image.open(file)).unsqueeze(0).to(self.device)
            text = self.tokenizer([prompt]).to(self.device)
            image = torch.nn.functional.normalize(self.model.encode_image(pixels), dim=-1)
            words = torch.nn.functional.normalize(self.model.encode_text(text), dim=-1)
            scores.append(float((image @ words.T).diagonal()[0]))
        return scores


def ours(source: Any, scorer: Any, out: Path, batch_size: int) -> tuple[list[float], dict[str, Any]]:
    """Scores in order, and where the time went."""
    from evaluators.score import part_rows, score_source
    from evaluators.scorefile import Header, described

    scorers = {"hpsv2": scorer}
    header = Header(model="bench", protocol={}, scorers=described(scorers))
    shutil.rmtree(out, ignore_errors=True)
    scorer.tower.texts._rows.clear()  # remembered texts would make the next round too easy
    timing = score_source(source, scorers, out, header, batch_size=batch_size)
    rows = part_rows(out, len(source.shards))
    return [row.scores["hpsv2/hpsv2"] for row in rows], timing.as_json()


def main(argv: Sequence[str] | None = None) -> int:
    """Print both rates, their ratio and the shares of ours as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_throughput")
    parser.add_argument("--pictures", type=int, default=256, help="a multiple of four (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="of ours (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of open_clip (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    said = parser.parse_args(argv)

    from evaluators.samples import find
    from evaluators.scorer import load

    device = torch.device(said.device)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        file = place / "weights.safetensors"
        make_checkpoint(file, said.architecture)
        pictures = make_pictures(place / "pictures", said.pictures, said.side)
        options = {"path": str(file), "architecture": said.architecture, "device": said.device}
        loop, scorer = Loop(file, said.architecture, device), load("hpsv2", options)
        source = find(place / "pictures")
        loop(pictures[:2])
        rates: dict[str, list[float]] = {"loop": [], "ours": []}
        shares = []
        apart = 0.0
        for turn in range(said.rounds):
            for name in ("loop", "ours") if turn % 2 == 0 else ("ours", "loop"):
                start = time.perf_counter()
                if name == "loop":
                    plain = loop(pictures)
                else:
                    batched, timing = ours(source, scorer, place / "out", said.batch_size)
                    shares.append(timing)
                rates[name].append(len(pictures) / (time.perf_counter() - start))
                log(f"round {turn}, {name}: {rates[name][-1]:.2f} pictures/s")
            apart = max(apart, float(np.abs(np.subtract(plain, batched)).max()))
    report = {
        "benchmark": "score_throughput",
        "machine": machine(device),
        "versions": versions(),
        "settings": vars(said),
        "pictures_per_second": {name: spread(values) for name, values in rates.items()},
        "ratio": spread([mine / theirs for mine, theirs in zip(rates["ours"], rates["loop"], strict=True)]),
        "largest_difference_of_a_score": apart,
        "ours": shares,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
