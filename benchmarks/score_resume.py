"""100,000 small pictures scored with kills in the middle: nothing lost, nothing twice.

    python -m benchmarks.score_resume > score_resume.json

Writes tar shards, starts the engine of `mmalign score` on them, kills it without warning (SIGKILL) several times while
it works, lets the last start finish, and compares the table with the list of pictures. Exit code 1 when a picture is
missing, doubled, or has another picture's score.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import cpu_name, log
from mmalign.progress import progress

SIDE = 16


def write_shards(folder: Path, count: int, per_shard: int) -> None:
    """Tars of pictures whose prompt and whose colour say which they are."""
    folder.mkdir()
    for start in progress(range(0, count, per_shard), "write", unit="shard"):
        with tarfile.open(folder / f"{start // per_shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, count)):
                packed = io.BytesIO()
                Image.new("RGB", (SIDE, SIDE), colour(number)).save(packed, format="PNG")
                for suffix, data in (("png", packed.getvalue()), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for every picture below 2^24."""
    return number & 255, number >> 8 & 255, number >> 16 & 255


class Colour:
    """Reads a picture's number from its colour."""

    identity, main, numbers = "colour@1", "number", ("number",)

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        found = []
        for image in images:
            red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]  # RGB has three
            found.append({"number": float(red + (green << 8) + (blue << 16))})
        return found


def work(source: Path, out: Path) -> None:
    """What the killed process does: the engine of `mmalign score` with the scorer above."""
    from evaluators.samples import find
    from evaluators.score import finish, score_source
    from evaluators.scorefile import Header, described

    shards, scorers = find(source), {"colour": Colour()}
    header = Header(model="bench", protocol={}, scorers=described(scorers))
    print(json.dumps(score_source(shards, scorers, out, header, batch_size=256).as_json()), flush=True)
    finish(shards, out, header)


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    """The work in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.score_resume", "--work", str(source), str(out)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what became of the pictures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_resume")
    parser.add_argument("--pictures", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--per-shard", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args(argv)
    if said.work:
        work(*said.work)
        return 0

    from evaluators.scorefile import read_scores

    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "in", Path(temporary) / "out"
        write_shards(source, said.pictures, said.per_shard)
        shards = -(-said.pictures // said.per_shard)
        killed: list[int] = []
        for number in range(said.kills):
            process = start(source, out)
            goal = shards * (number + 1) // (said.kills + 1)
            while process.poll() is None and len(list(out.glob("parts/0*.jsonl"))) < goal:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed.append(len(list(out.glob("parts/0*.jsonl"))))
            log(f"killed with {killed[-1]} of {shards} shards")
        last = start(source, out)
        printed, _ = last.communicate()
        rows = read_scores(out).rows if last.returncode == 0 else {}
        wrong = sum(row.scores.get("colour/number") != int(row.prompt.split()[1]) for row in rows.values())
        numbers = {int(row.prompt.split()[1]) for row in rows.values()}
    report: dict[str, Any] = {
        "benchmark": "score_resume",
        "cpu": cpu_name(),
        "pictures": said.pictures,
        "shards_done_at_each_kill": killed,
        "rows": len(rows),
        "lost": said.pictures - len(numbers),
        "twice": len(rows) - len(numbers),
        "wrong": wrong,
        "last_start": json.loads(printed) if printed.strip() else None,
    }
    print(json.dumps(report))
    return 1 if report["lost"] or report["twice"] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
