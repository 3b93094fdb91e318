"""The README's way from a folder of one's own photographs to a LoRA file, command by command.

Photographs that scikit-image ships are cut into pieces; each piece beside a blurred or strongly compressed copy.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageFilter

PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "rocket", "retina")
PIECES = 24  # of each photograph
SIDE = 64  # pixels
README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.slow


def spoiled(piece: Image.Image, how: int) -> Image.Image:
    """A worse copy: blurred, or compressed until it shows."""
    if how % 2:
        return piece.filter(ImageFilter.GaussianBlur(2.5))
    squeezed = io.BytesIO()
    piece.save(squeezed, "JPEG", quality=4)
    return Image.open(squeezed).convert("RGB")


def cut(folder: Path) -> None:
    """Pieces of every photograph as NAME-NUMBER_w.png and NAME-NUMBER_l.png."""
    folder.mkdir()
    for name in PHOTOS:
        file = next(Path(skimage.__file__).parent.glob(f"data/{name}.*"))
        photo = Image.open(file).convert("RGB")
        generator = np.random.default_rng(len(name))
        for number in range(PIECES):
            x, y = (int(generator.integers(extent - SIDE)) for extent in photo.size)
            piece = photo.crop((x, y, x + SIDE, y + SIDE))
            piece.save(folder / f"{name}-{number:02d}_w.png")
            spoiled(piece, number).save(folder / f"{name}-{number:02d}_l.png")


def readme_commands() -> list[list[str]]:
    """The `mmalign` commands of the README's section on one's own pictures, as a shell would split them."""
    section = README.read_text(encoding="utf-8").split("## Your own pictures")[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "mmalign"]


def test_the_readme_takes_a_folder_of_photographs_to_a_lora_file(tmp_path: Path) -> None:
    cut(tmp_path / "photos")
    commands = readme_commands()
    assert [words[1] for words in commands] == ["data", "data", "data", "data", "train", "accuracy", "export"]
    said = {}
    for words in commands:
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        said[words[1]] = done.stdout
    found = re.search(r"accuracy ([\d.]+) \[([\d.]+), ([\d.]+)\]", said["accuracy"])
    assert found is not None, said["accuracy"]
    print(said["accuracy"])
    assert float(found[2]) > 0.5, f"held-out photographs: {found[0]}"
    assert (tmp_path / "runs/photos/lora.safetensors").stat().st_size > 100_000
