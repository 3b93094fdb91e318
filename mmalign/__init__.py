"""The shared core: losses, preferences, references, the training loop, statistics. Imports nothing heavy."""

from __future__ import annotations

__version__ = "0.1.0"
