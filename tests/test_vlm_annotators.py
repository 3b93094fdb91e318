"""Annotators: what is sent, what is kept, and that a failure half-way loses nothing."""

from __future__ import annotations

import base64
import http.server
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import tiny_vlms
from PIL import Image

from mmalign.config import NamedSection
from mmalign.errors import UserError
from mmalign.media import Media
from vlm.annotators import Endpoint, EndpointSettings, Local, Request, ask, data_url, open_annotator
from vlm.models import VisionLanguageModel, open_model
from vlm.settings import VlmModelSettings

KEY = "sk-secret-0123"


class Server:
    """A chat endpoint on loopback. `respond(prompt, number)` gives (status, headers, body) of the number-th request."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = 0
        self.respond: Callable[[str, int], tuple[int, dict[str, str], bytes]] = lambda prompt, _: said(prompt.upper())
        lock, server = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    number = len(server.asked)
                    server.under_way += 1
                    server.most = max(server.most, server.under_way)
                status, headers, data = server.respond(body["messages"][0]["content"][-1]["text"], number)
                with lock:
                    server.under_way -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def said(text: str | None, ended: str = "stop") -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": ended}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


def settings(server: Server, tmp_path: Path, **changes: Any) -> EndpointSettings:
    values = {"url": server.url, "model": "m", "cache": tmp_path / "replies.jsonl", "backoff": 0.001, "concurrency": 1}
    return EndpointSettings(**{**values, **changes})


def requests(count: int) -> list[Request]:
    return [Request(prompt=f"prompt {index}") for index in range(count)]


def test_images_and_settings_are_sent_and_each_request_once(server: Server, tmp_path: Path) -> None:
    picture = Media.from_image(Image.new("RGB", (3, 2), (10, 20, 30)))
    bitmap = Media.from_image(Image.new("RGB", (3, 2), (10, 20, 30)), format="BMP")
    said_by = settings(server, tmp_path, temperature=0.5, max_new_tokens=7)
    asked = [Request(prompt="one", images=(picture, bitmap)), Request(prompt="two"), Request(prompt="two")]
    assert ask(Endpoint(said_by), asked, said_by.cache, title="ask") == ["ONE", "TWO", "TWO"]
    assert len(server.asked) == 2
    first = server.asked[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.5, 7)
    *images, text = first["messages"][0]["content"]
    assert text == {"type": "text", "text": "one"}
    for image in images:
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (10, 20, 30)
    assert "Authorization" not in server.headers[0]


def test_what_is_kept_is_not_asked_again_and_belongs_to_who_said_it(server: Server, tmp_path: Path) -> None:
    said_by = settings(server, tmp_path)
    for _ in range(2):
        assert ask(Endpoint(said_by), requests(3), said_by.cache, title="ask") == [f"PROMPT {i}" for i in range(3)]
    assert len(server.asked) == 3
    other = settings(server, tmp_path, temperature=1.0)
    ask(Endpoint(other), requests(3), said_by.cache, title="ask")
    assert len(server.asked) == 6
    faster = settings(server, tmp_path, concurrency=4, tries=2)  # changes no reply
    ask(Endpoint(faster), requests(3), said_by.cache, title="ask")
    assert len(server.asked) == 6


def test_an_endpoint_that_fails_half_way_loses_nothing(server: Server, tmp_path: Path) -> None:
    server.respond = lambda prompt, number: said(prompt.upper()) if number <= 4 else (500, {}, b"out of memory")
    said_by = settings(server, tmp_path, tries=2)
    with pytest.raises(UserError, match=r"out of memory.*4 of 10 replies are kept") as failure:
        ask(Endpoint(said_by), requests(10), said_by.cache, title="ask")
    assert "\n" not in str(failure.value)
    assert len(server.asked) == 6  # four good ones and two tries of the fifth
    server.respond = lambda prompt, number: said(prompt.upper())
    assert ask(Endpoint(said_by), requests(10), said_by.cache, title="ask") == [f"PROMPT {i}" for i in range(10)]
    assert len(server.asked) == 6 + 6


def test_replies_under_way_when_another_fails_are_kept(server: Server, tmp_path: Path) -> None:
    together = threading.Barrier(3)

    def respond(prompt: str, number: int) -> tuple[int, dict[str, str], bytes]:
        if number <= 3:
            together.wait(timeout=30)
        if prompt == "prompt 0":
            return 400, {}, b"no such model"
        threading.Event().wait(0.5)  # until after the failure
        return said(prompt)

    server.respond = respond
    said_by = settings(server, tmp_path, concurrency=3)
    with pytest.raises(UserError, match=r"HTTP 400.*no such model.*[2-8] of 9 replies are kept"):
        ask(Endpoint(said_by), requests(9), said_by.cache, title="ask")
    assert len(server.asked) < 9  # nothing new after the failure
    assert [body["messages"][0]["content"][-1]["text"] for body in server.asked].count("prompt 0") == 1  # a refusal


def test_passing_failures_are_tried_again(server: Server, tmp_path: Path) -> None:
    answers = [(503, {}, b""), (429, {"Retry-After": "0"}, b""), (200, {}, b"<html>"), said("at last")]
    server.respond = lambda prompt, number: answers[number - 1]
    said_by = settings(server, tmp_path)
    assert ask(Endpoint(said_by), requests(1), said_by.cache, title="ask") == ["at last"]


def test_concurrency_is_bounded(server: Server, tmp_path: Path) -> None:
    server.respond = lambda prompt, number: (threading.Event().wait(0.01), said(prompt))[1]
    said_by = settings(server, tmp_path, concurrency=3)
    ask(Endpoint(said_by), requests(12), said_by.cache, title="ask")
    assert 1 < server.most <= 3


def test_a_reply_cut_short_or_refused_is_of_no_use(server: Server, tmp_path: Path) -> None:
    answers = [said("half a sen", "length"), said(None, "content_filter")]
    server.respond = lambda prompt, number: answers[number - 1]
    said_by = settings(server, tmp_path)
    assert ask(Endpoint(said_by), requests(2), said_by.cache, title="ask") == ["", ""]


def test_the_key_comes_from_the_environment_and_is_never_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by = settings(server, tmp_path, key_env="MY_KEY", tries=1)
    with pytest.raises(UserError, match="MY_KEY holds no api key"):
        Endpoint(said_by)
    monkeypatch.setenv("MY_KEY", KEY)
    server.respond = lambda prompt, number: (401, {}, f"wrong key {KEY}".encode())
    with pytest.raises(UserError, match=r"wrong key \*\*\*") as failure:
        ask(Endpoint(said_by), requests(1), said_by.cache, title="ask")
    assert KEY not in str(failure.value) and KEY not in Endpoint(said_by).identity
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    server.respond = lambda prompt, number: (302, {"Location": f"{server.url}/elsewhere"}, b"")
    with pytest.raises(UserError, match="HTTP 302"):
        ask(Endpoint(said_by), requests(1), said_by.cache, title="ask")
    assert len(server.asked) == 2  # the key was carried nowhere


def test_nobody_listens(server: Server, tmp_path: Path) -> None:
    said_by = settings(server, tmp_path, url="http://127.0.0.1:9/v1", tries=2)
    with pytest.raises(UserError, match=r"after 2 tries.*0 of 1 replies are kept"):
        ask(Endpoint(said_by), requests(1), said_by.cache, title="ask")
    for url in ("file:///etc/passwd", "localhost:8000", "http://me:secret@host/v1"):
        with pytest.raises(UserError, match="not an http or https address"):
            Endpoint(settings(server, tmp_path, url=url))


def test_a_torn_last_line_is_dropped(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said_by = settings(server, tmp_path)
    ask(Endpoint(said_by), requests(3), said_by.cache, title="ask")
    data = said_by.cache.read_bytes()
    said_by.cache.write_bytes(data[:-5])
    ask(Endpoint(said_by), requests(3), said_by.cache, title="ask")
    assert "the last line was torn and is dropped" in capsys.readouterr().err
    assert len(server.asked) == 4
    assert said_by.cache.read_bytes() == data
    said_by.cache.write_bytes(b"{}\n" + data)
    with pytest.raises(UserError, match=r"no line of replies.*line 1"):
        ask(Endpoint(said_by), requests(3), said_by.cache, title="ask")


def test_two_runs_never_write_one_file(server: Server, tmp_path: Path) -> None:
    said_by = settings(server, tmp_path)
    with filelock.FileLock(f"{said_by.cache}.lock"), pytest.raises(UserError, match="another run is writing"):
        ask(Endpoint(said_by), requests(1), said_by.cache, title="ask")
    ask(Endpoint(said_by), requests(1), said_by.cache, title="ask")


def test_a_killed_run_keeps_what_it_had(server: Server, tmp_path: Path) -> None:
    stopped = threading.Event()

    def respond(prompt: str, number: int) -> tuple[int, dict[str, str], bytes]:
        if number == 4:
            stopped.set()
            threading.Event().wait(1)
        return said(prompt.upper())

    server.respond = respond
    cache = tmp_path / "replies.jsonl"
    program = (
        "from pathlib import Path\n"
        "from vlm.annotators import Endpoint, EndpointSettings, Request, ask\n"
        f"said = EndpointSettings(url={server.url!r}, model='m', cache=Path({str(cache)!r}), concurrency=1)\n"
        "ask(Endpoint(said), [Request(prompt=f'prompt {i}') for i in range(6)], said.cache, title='ask')\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    assert stopped.wait(60)
    run.kill()
    run.wait()
    assert len(cache.read_bytes().splitlines()) == 3
    server.respond = lambda prompt, number: said(prompt.upper())
    said_by = settings(server, tmp_path)
    assert ask(Endpoint(said_by), requests(6), cache, title="ask") == [f"PROMPT {i}" for i in range(6)]
    assert len(server.asked) == 4 + 3


def test_data_urls_name_what_they_hold() -> None:
    image = Image.new("RGB", (4, 4))
    assert data_url(Media.from_image(image, format="JPEG")).startswith("data:image/jpeg;base64,")
    assert data_url(Media.from_image(image, format="WEBP")).startswith("data:image/png;base64,")


# ------------------------------------------------------------------------------------------------ a local model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return open_model(VlmModelSettings(path=str(tiny_vlms.write("llava", tmp_path_factory.mktemp("tiny") / "llava"))))


def never() -> VisionLanguageModel:
    raise AssertionError("not the recipe's model")


def test_a_local_model_replies_and_its_weights_are_its_name(model: VisionLanguageModel, tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    section = NamedSection(name="local", cache=str(cache), max_new_tokens=4, batch_size=2, temperature=1.0)
    annotator, at = open_annotator(section, lambda: model, place="annotator")
    assert isinstance(annotator, Local) and at == cache
    picture = Media.from_image(tiny_vlms.picture(1))
    asked = [Request(prompt=f"is there {i}?", images=(picture,) * (i % 2)) for i in range(3)]
    replies = ask(annotator, asked, cache, title="ask")
    assert len(replies) == 3 and any(replies)
    assert ask(annotator, asked[::-1], tmp_path / "again.jsonl", title="ask") == replies[::-1]
    other = open_model(VlmModelSettings(path=str(tiny_vlms.write("llava", tmp_path / "llava", seed=1))))
    again = NamedSection(name="local", path=str(tmp_path / "llava"), cache=str(cache), temperature=1.0)
    assert open_annotator(again, never, place="annotator")[0].identity != annotator.identity
    assert open_annotator(section, lambda: other, place="annotator")[0].identity != annotator.identity


def test_unknown_annotators_and_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no annotator 'endpont'.*Did you mean 'endpoint'"):
        open_annotator(NamedSection(name="endpont"), never, place="make.annotator")
    with pytest.raises(UserError, match=r"make\.annotator\.cach"):
        open_annotator(NamedSection(name="local", cach="x"), never, place="make.annotator")
