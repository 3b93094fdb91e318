"""The embedded world: scenes of one to three coloured shapes, their captions, pictures, questions and a checker.

Numpy and Pillow only. `scenes` says what can be described, `render` draws it, `checker` reads it back from pixels.
"""

from __future__ import annotations

from pathlib import Path


def model_folder(name: str) -> Path:
    """Folder of an embedded model: `t2i` (a diffusers pipeline) or `clip` (a transformers CLIP)."""
    return Path(__file__).parent / "models" / name
