"""Pictures and answers of make-believe models for the arena's tests, and its server as a process of its own."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluators.arena.trials import Sources

PROMPTS = ("a red circle", "two blue squares", "a green triangle")


def draw(
    root: Path, models: Sequence[str], prompts: Sequence[str] = PROMPTS, seeds: Sequence[int] = (0,), size: int = 24
) -> tuple[Path, ...]:
    """A folder for each model as `mmalign sample` writes it. Metadata of the pictures name the model, as tools do."""
    folders = []
    for shade, model in enumerate(models):
        folder = root / model
        folder.mkdir(parents=True)
        rows = []
        for prompt in prompts:
            for seed in seeds:
                file = f"{len(rows):05d}.png"
                about = PngInfo()
                about.add_text("parameters", f"drawn by {model}")
                colour = (40 * shade + 10, (37 * len(rows)) % 256, (seed * 29) % 256)
                Image.new("RGB", (size, size), colour).save(folder / file, pnginfo=about)
                rows.append({"file": file, "prompt": prompt, "seed": seed, "model": f"{model}@123", "steps": 4})
        (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(folder)
    return tuple(folders)


def answer(root: Path, answers: Mapping[str, Sequence[str]]) -> tuple[Path, ...]:
    """A file of answers for each model, about pictures of one colour each."""
    root.mkdir(parents=True, exist_ok=True)
    files = []
    for model, texts in answers.items():
        rows = []
        for number, text in enumerate(texts):
            Image.new("RGB", (24, 24), (50 * number, 90, 120)).save(root / f"{number}.png")
            rows.append({"image": f"{number}.png", "prompt": "What is there?", "answer": text, "model": model})
        file = root / f"{model}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(file)
    return tuple(files)


def sources(root: Path, folders: Sequence[Path] = (), answers: Sequence[Path] = ()) -> Sources:
    """These folders and files, with paths relative to `root`."""
    return Sources(root=root.resolve(), folders=tuple(folders), answers=tuple(answers))


class Server:
    """`mmalign arena` as a process, on a port of its own choosing."""

    def __init__(
        self, *words: str | Path, password: str | None = None, program: Sequence[str] = ("-m", "mmalign", "arena")
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.words, self.password = [*program, *map(str, words)], password
        self.votes = Path(words[-1]).parent / "votes.sqlite"
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it again, and wait until it says where it is."""
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        if self.password is not None:
            environment["MMALIGN_ARENA_PASSWORD"] = self.password
        command = [sys.executable, *self.words, "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self.process.stdout is not None
        first = said = self.process.stdout.readline()
        while said and not said.startswith("Vote at http://"):  # pairs are drawn first, where they are drawn live
            said = self.process.stdout.readline()
        assert said, f"{first} ended"

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self) -> str:
        """End it as Ctrl-C does; what it said last."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0]

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of a request."""
        request = urllib.request.Request(f"{self.url}{path}", data=body, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def call(self, name: str, ask: Any, **headers: str) -> Any:
        """A function of the page, called as its script does."""
        status, page = self.ask("/config", **headers)
        assert status == 200, page
        found = re.search(rb'"id": ?(\d+), ?"type": ?"html"', page)
        assert found is not None
        body = json.dumps({"data": ask, "component_id": int(found[1]), "fn_name": name, "session_hash": "x"}).encode()
        headers = {"Content-Type": "application/json", **headers}
        status, reply = self.ask("/gradio_api/component_server", body, **headers)
        assert status == 200, (status, reply)
        return json.loads(reply)


@contextlib.contextmanager
def serving(*words: str | Path, **settings: Any) -> Iterator[Server]:
    """A server that is gone when this is left."""
    server = Server(*words, **settings)
    try:
        yield server
    finally:
        server.kill()


def credentials(name: str, password: str) -> dict[str, str]:
    """The header that a browser sends after it has asked for name and password."""
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}
