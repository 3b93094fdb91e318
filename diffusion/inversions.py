"""Inversions made once: the implied noise of every picture at every landing, kept beside its latents.

    <data.cache>/inversion-<key>/noise-512x512.npy    [rows, steps, c, h, w]; a row per picture, view and prompt

They are the reference's, so they never change while the policy is trained. The key is a hash of the reference's
weights and precision, of the pictures and prompts, the noise schedule and the grid: like encodings they are found
again from any path, and labels do not matter.

What is kept is the implied noise and not x_t, from which it would be a difference of nearly equal numbers: in fp16
the noise at t = 1 would be wrong by a percent. x_t follows from it exactly, see `NoiseSchedule.add_noise`.

A dropped prompt is another prompt: the noise that leads to a picture is the model's under what it is told, in the
inversion as in the loss. So where prompts are dropped (`data.prompt_dropout`) every picture is kept under the empty
prompt too, which doubles the work and the space.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion import arrays
from diffusion.conditioning import Conditioning
from diffusion.inversion import Denoise, Grid, climb
from diffusion.parts import Encodings, Origin, Parts, Predict
from diffusion.settings import LatentSettings
from mmalign.errors import UserError
from mmalign.progress import progress

VERSION = 1  # raise it with any change of what is computed
NUMPY = {"fp32": "<f4", "fp16": "<f2"}


class Inversions:
    """The implied noise of all the data; see the module.

    Made in the constructor unless they are there: by one process while the others wait, with a progress bar.

    Args:
        parts: the reference, and the data.
        grid: levels.
        renoise: average the noise over both ends of a step.

    Raises:
        UserError: latents are drawn anew at every use, weights are split over processes, or the disk is too small.
        ValueError: there is no data, or no name for the reference to keep the inversions under.
    """

    def __init__(self, parts: Parts, grid: Grid, *, renoise: bool) -> None:
        data = parts.data
        if data is None or (data.settings.cache and not parts.base):
            raise ValueError("inversions are of some data, and kept under a reference's name")
        _check(parts.module, data.settings)
        self.settings = data.settings
        self._origins = {origin.size: origin for origin in data.origins()}
        self._codes = {size: _codes(origin) for size, origin in self._origins.items()}

        def fill(folder: arrays.Folder) -> None:
            _require_space(self.settings, data, self._origins, len(grid))
            for origin in self._origins.values():
                _fill(parts, data, origin, grid, renoise, folder)

        if data.settings.cache is None:
            self._arrays = arrays.in_memory(fill)
        else:
            self._arrays = arrays.on_disk(data.settings.cache, _key(parts, data, grid, renoise), fill)

    def noise(self, origin: Origin, steps: Int64[Tensor, " rows"]) -> Float[Tensor, "rows c h w"]:
        """What leads from the latents of some rows to x at their landings, fp32, on the CPU.

        Args:
            origin: which rows.
            steps: of the grid, for each row: 0 is the first landing.
        """
        known, asked = self._codes[origin.size], _codes(origin)
        rows = np.searchsorted(known, asked)
        if (known[np.minimum(rows, len(known) - 1)] != asked).any():
            raise ValueError("a batch of other data")
        found = self._arrays[_name(origin)][rows, steps.numpy()]
        return torch.from_numpy(np.asarray(found, np.float32))

    def describe(self) -> str:
        """How many, how large, where."""
        count = sum(len(origin.pictures) for origin in self._origins.values())
        size = sum(array.nbytes for array in self._arrays.values())
        shown = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        return f"{count:,} rows (picture and prompt), {shown} in {self.settings.cache or 'memory'}"


def is_split(module: nn.Module) -> bool:
    """Whether weights are split over processes (FSDP2, ZeRO-3), so that one process alone cannot use them."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in module.parameters())


def denoiser(predict: Predict, module: nn.Module, conditioning: Conditioning) -> Denoise:
    """A module's answers to the rows of a batch."""
    return lambda x, t, rows: predict(module, x, t, conditioning.select(rows))


def _check(module: nn.Module, settings: LatentSettings) -> None:
    fix = "Set method.inversion=online"
    if settings.posterior != "mean":
        raise UserError(
            "inversions cannot be kept of latents that are drawn at every use",
            place="data.posterior=sample",
            fix=f"Use mean. Or: {fix}",
        )
    if is_split(module):
        raise UserError(
            "one process makes the inversions, and this UNet is split over several", place="method.inversion", fix=fix
        )


def _codes(origin: Origin) -> arrays.Array:
    """One number for each row, in the order that `Encodings.origins` has them in."""
    return np.array(origin.pictures, np.int64) << 32 | (np.array(origin.prompts, np.int64) + 1)


def _name(origin: Origin) -> str:
    return f"noise-{origin.size[0]}x{origin.size[1]}"


def _key(parts: Parts, data: Encodings, grid: Grid, renoise: bool) -> str:
    schedule = parts.schedule
    basis = {
        "version": VERSION,
        "base": parts.base,
        "inputs": data.inputs_key,
        "empty prompt": data.settings.prompt_dropout > 0,
        "dtype": data.settings.dtype,
        "prediction": schedule.prediction_type,
        "levels": [grid.before.alphas_cumprod.tolist(), grid.after.tolist()],
        "timesteps": [grid.told.tolist(), grid.landings.tolist()],
        "renoise": renoise,
    }
    return f"inversion-{hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:32]}"


def _require_space(
    settings: LatentSettings, data: Encodings, origins: dict[tuple[int, int], Origin], steps: int
) -> None:
    """Before hours of work: does it fit?"""
    if settings.cache is None:
        return
    needed = 0
    for origin in origins.values():
        (latents, _) = data.rows(Origin(size=origin.size, pictures=origin.pictures[:1], prompts=origin.prompts[:1]))
        needed += latents.numel() * len(origin.pictures) * steps * np.dtype(NUMPY[settings.dtype]).itemsize
    free = shutil.disk_usage(settings.cache).free
    if needed > free:
        raise UserError(
            f"the inversions need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            place=f"data.cache={settings.cache}",
            fix="Invert while training, method.inversion=online, or choose a folder on a larger disk",
        )


def _fill(parts: Parts, data: Encodings, origin: Origin, grid: Grid, renoise: bool, folder: arrays.Folder) -> None:
    """The implied noise of one size's rows, in their order."""
    device = parts.schedule.alphas_cumprod.device
    label, count, size = f"invert {origin.size[0]}x{origin.size[1]}", len(origin.pictures), data.settings.encode_batch
    file: arrays.Rows | None = None
    for start in progress(range(0, count, size), label, unit="batch"):
        some = slice(start, start + size)
        latents, conditioning = data.rows(
            Origin(size=origin.size, pictures=origin.pictures[some], prompts=origin.prompts[some])
        )
        latents, conditioning = latents.to(device), conditioning.to(device)

        def noises(module: nn.Module, latents: Tensor = latents, text: Conditioning = conditioning) -> Tensor:
            landed = climb(denoiser(parts.predict, module, text), latents, grid, renoise=renoise)
            found = [
                parts.schedule.implied_noise(x, latents, t.expand(len(x)))
                for x, t in zip(landed, grid.landings, strict=True)
            ]
            return torch.stack(found, dim=1)  # [rows, steps, c, h, w]

        noise = parts.reference.run(noises).cpu().numpy()
        if file is None:
            file = folder.rows(_name(origin), (count, *noise.shape[1:]), NUMPY[data.settings.dtype])
        file.append(noise)
