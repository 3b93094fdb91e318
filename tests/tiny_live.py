"""An arena whose pairs are drawn meanwhile, by painters of one colour each that can be held up.

python tests/tiny_live.py FOLDER --port PORT      draws "first", waits for FOLDER/go, draws "second", and fails
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from evaluators.arena.live import Live, Painter, Unit
from evaluators.arena.trials import Sources

NAMES = ("base", "tuned")


class Gate:
    """Painters that draw what they are let, and write down what they drew."""

    def __init__(self, pictures: int = 10**6) -> None:
        self._open = threading.Semaphore(pictures)
        self.drawn: list[tuple[str, Unit]] = []

    def let(self, pictures: int) -> None:
        """Let that many more pictures be drawn."""
        self._open.release(pictures)

    def painters(self, names: Sequence[str] = NAMES, steps: int = 4) -> list[Painter]:
        """One for each name."""

        def of(shade: int, name: str) -> Callable[[str, int], Image.Image]:
            def draw(prompt: str, seed: int) -> Image.Image:
                self._open.acquire()
                if prompt == "broken":
                    raise RuntimeError(f"{name} is out of memory")
                self.drawn.append((name, (prompt, seed)))
                return Image.new("RGB", (24, 24), (40 * shade + 10, len(prompt) % 256, seed % 256))

            return draw

        about = [{"model": f"{name}@123", "steps": steps} for name in names]
        return [Painter(name=name, about=about[shade], draw=of(shade, name)) for shade, name in enumerate(names)]


def sources(live: Live) -> Sources:
    """What the arena reads."""
    return Sources(root=live.root.resolve(), folders=live.folders)


def wait(true: Callable[[], bool]) -> None:
    """Until it is true."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "never true"
        time.sleep(0.005)


def _serve(folder: Path, words: Sequence[str]) -> None:
    from evaluators.arena import command
    from mmalign.cli import Parser

    parser = Parser()
    command.add_page(parser)
    said = parser.parse_args(words)
    said.seed = 0
    gate = Gate(len(NAMES))

    def release() -> None:
        while not (folder / "go").exists():
            time.sleep(0.02)
        gate.let(10**6)

    threading.Thread(target=release, daemon=True).start()
    live = Live(folder, gate.painters(), [("first", 0), ("second", 1), ("broken", 2)])
    with command.opened(said) as bound, live:
        command.hold(bound, sources(live), folder / "votes.sqlite", said, live)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2:])
