"""Who answers a question about pictures: a model here, or any server that speaks OpenAI's chat protocol.

    Local       a folder of transformers, greedy
    Endpoint    POST URL/chat/completions, temperature 0, pictures as PNG in the request itself
    Cached      either, with every answer kept in an SQLite file: asked once, and a kill loses one batch

An answer that cannot be had (no server, a refused key, a reply that is no reply) is an error, never an empty answer.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from PIL import Image

from mmalign.errors import UserError
from mmalign.progress import progress

if TYPE_CHECKING:
    from evaluators.chat import ChatModel

Pictures = Sequence[Image.Image]

BATCH = 32  # answers between two writes of the cache
TRIES, PAUSE = 4, 1.0  # seconds before the second try; doubled before each further one
AGAIN = (408, 409, 429, 500, 502, 503, 504)  # what may be otherwise next time
LARGEST = 1 << 22  # bytes of a reply


@runtime_checkable
class Backend(Protocol):
    """Answers questions; `identity` says who does, and changes when the answers may."""

    @property
    def identity(self) -> str: ...

    def answers(self, questions: Sequence[str], pictures: Sequence[Pictures]) -> list[str]:
        """One answer for each question with its pictures.

        Raises:
            UserError: there is no answer to be had.
        """
        ...


class Local:
    """A model of transformers; see `ChatModel`."""

    def __init__(self, model: ChatModel, *, max_new_tokens: int = 64) -> None:
        self._model, self._length = model, max_new_tokens
        self.identity = f"local#{model.fingerprint}-{max_new_tokens}"

    def answers(self, questions: Sequence[str], pictures: Sequence[Pictures]) -> list[str]:
        """See `Backend`."""
        return self._model.answers(questions, pictures, max_new_tokens=self._length)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *args: Any, **named: Any) -> None:
        return None


class Endpoint:
    """A server that speaks OpenAI's chat protocol.

    Args:
        url: up to and without /chat/completions: "http://127.0.0.1:8000/v1".
        model: its name there.
        key_from: the environment variable that has the key; a server that wants none is given none.
        max_tokens: of an answer.
        workers: requests at a time.
        timeout: seconds for one.

    Raises:
        UserError: not a URL, or one that the key would travel to in the clear.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_from: str = "OPENAI_API_KEY",
        max_tokens: int = 64,
        workers: int = 4,
        timeout: float = 120.0,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("not the URL of a server", place=url, fix="It looks like http://127.0.0.1:8000/v1.")
        if parts.username or parts.password:
            raise UserError("a key does not belong into a URL", place=parts.hostname, fix=f"Put it into ${key_from}.")
        self._key = os.environ.get(key_from, "")
        loopback = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        if self._key and parts.scheme == "http" and not loopback:
            raise UserError("the key would travel in the clear", place=url, fix=f"Use https, or unset {key_from}.")
        self._url, self._model, self._place = f"{url.rstrip('/')}/chat/completions", model, f"{model} at {url}"
        self._key_from, self._max_tokens, self._workers, self._timeout = key_from, max_tokens, workers, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.identity = f"{model}@{parts.hostname}-{max_tokens}"

    def answers(self, questions: Sequence[str], pictures: Sequence[Pictures]) -> list[str]:
        """See `Backend`."""
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._answer, questions, pictures))

    def _answer(self, question: str, pictures: Pictures) -> str:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data(one)}} for one in pictures]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        reply = self._ask(request)
        try:
            said = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"the reply is none of a chat: {_short(reply)}", place=self._place) from error
        return said.strip() if isinstance(said, str) else ""

    def _ask(self, request: urllib.request.Request) -> bytes:
        for attempt in range(1, TRIES + 1):
            try:
                with self._opener.open(request, timeout=self._timeout) as reply:
                    body: bytes = reply.read(LARGEST)
                    return body
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(LARGEST)
                if error.code not in AGAIN or attempt == TRIES:
                    raise self._refused(error.code, said) from error
            except (OSError, http.client.HTTPException) as error:
                if attempt == TRIES:
                    why = getattr(error, "reason", None) or error
                    raise UserError(f"no answer after {TRIES} tries: {why}", place=self._place) from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
        raise AssertionError("the last try returns or raises")

    def _refused(self, code: int, said: bytes) -> UserError:
        cause, fix = f"the server refuses ({code}): {_short(said)}", None
        if code in (401, 403):
            cause, fix = f"the key is refused ({code})", f"Set {self._key_from}."
        elif code == 404:
            cause, fix = "there is no such model or path (404)", "The URL often ends in /v1."
        elif 300 <= code < 400:
            cause, fix = f"the server sends us elsewhere ({code})", "Give that URL."
        return UserError(cause, place=self._place, fix=fix)


class Cached:
    """A backend whose answers are kept in a file; the same question about the same pixels is asked once.

    Raises:
        UserError: the file is not such a file, or cannot be written.
    """

    def __init__(self, backend: Backend, file: Path) -> None:
        self._backend, self._place, self.identity = backend, str(file), backend.identity
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(file)
            self._store.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._store.commit()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"the answers cannot be kept: {error}", place=self._place) from error

    def answers(self, questions: Sequence[str], pictures: Sequence[Pictures]) -> list[str]:
        """See `Backend`."""
        keys = [self._key(question, own) for question, own in zip(questions, pictures, strict=True)]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        known = {key: found for key in first if (found := self._known(key)) is not None}
        missing = [index for key, index in first.items() if key not in known]
        for start in progress(range(0, len(missing), BATCH), "judge", unit="batch"):
            some = missing[start : start + BATCH]
            said = self._backend.answers([questions[i] for i in some], [pictures[i] for i in some])
            fresh = dict(zip((keys[i] for i in some), said, strict=True))
            with self._store:
                self._store.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", fresh.items())
            known |= fresh
        return [known[key] for key in keys]

    def _known(self, key: str) -> str | None:
        row = self._store.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _key(self, question: str, pictures: Pictures) -> str:
        digest = hashlib.sha256(json.dumps([self.identity, question]).encode())
        for picture in pictures:
            digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
        return digest.hexdigest()


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _short(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:200]
