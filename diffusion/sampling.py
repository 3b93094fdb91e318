"""Draws pictures into a folder, with what is needed to draw each of them again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusion.models import DiffusionModel
from diffusion.recipe import SamplerSettings
from mmalign.errors import UserError
from mmalign.pictures import grid
from mmalign.prompts import is_list, read_prompts

INDEX, SHEET = "index.jsonl", "sheet.png"
SHOWN = 64  # pictures on the contact sheet


def gather_prompts(sources: Sequence[str], count: int | None = None, seed: int = 0) -> list[str]:
    """Prompts given as text, as files, or as the embedded world's captions, in this order.

    Args:
        sources: lists as `mmalign.prompts` reads them, by their names' endings; all else is text.
        count: how many to draw, by the seed, from each file or world; None for all.
    """
    prompts: list[str] = []
    for source in sources:
        prompts += read_prompts(source, count, seed) if is_list(source) else [source]
    return prompts


def draw(
    model: DiffusionModel,
    name: str,
    prompts: Sequence[str],
    out: Path,
    *,
    seed: int,
    sampler: SamplerSettings,
    batch_size: int,
) -> None:
    """Write a picture per prompt, `index.jsonl` and a contact sheet to `out`, all of it or nothing.

    Args:
        model: draws them.
        name: of the model, for the index.
        prompts: prompt i is drawn from the noise of seed + i.
        out: a new or an empty folder.

    Raises:
        UserError: the folder has something in it, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists and is not empty", place=str(out), fix="Give a new folder with --out.")
    seeds = [seed + index for index in range(len(prompts))]
    pictures = model.sample(
        prompts,
        seeds=seeds,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        batch_size=batch_size,
        label="sample",
    )
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        with (temporary / INDEX).open("w", encoding="utf-8") as index:
            for number, (prompt, own, picture) in enumerate(zip(prompts, seeds, pictures, strict=True)):
                file = f"{number:05d}.png"
                picture.save(temporary / file)
                row = {"file": file, "prompt": prompt, "seed": own, "model": name, **dict(sampler)}
                index.write(json.dumps(row, ensure_ascii=False) + "\n")
        grid(pictures[:SHOWN], list(prompts[:SHOWN])).save(temporary / SHEET)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write the pictures: {error.strerror}", place=str(out)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
