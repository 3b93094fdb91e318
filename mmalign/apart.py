"""Runs of a suite of comparisons: each trained in a process of its own, each result written whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import UserError

RESULT, COST = "result.json", "cost.json"


def train_apart(package: str, words: Sequence[str], folder: Path, name: str) -> dict[str, float]:
    """Train in a process of its own on one core; what it cost: CPU seconds, and peak memory in GB.

    Args:
        package: whose trainer: "diffusion" or "vlm".
        words: recipe and key=value.
        folder: of the run, `loop.output_dir`.
        name: what to call it in a message.

    Raises:
        UserError: it failed; the last line of its log is the cause.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"{package}.train", *words]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{name} failed: {''.join(last)}", place=str(folder / "log.txt"))
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"seconds": used.ru_utime + used.ru_stime, "peak_gb": line["memory/peak_gb"]}


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
