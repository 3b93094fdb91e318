"""Who rewrites or fills a text: a model behind an OpenAI-compatible endpoint, or a local one.

    ask(annotator, requests, cache)  ->  one reply for each request, in order

Every reply is a line of a file, written as soon as it comes and found again by what was asked: the annotator, the
prompt and the images, by content. So nothing is asked twice, and where a run is killed or its endpoint fails, nothing
is lost and the same command goes on from there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

import filelock
from pydantic import Field

from mmalign.config import NamedSection, Settings, parse_section
from mmalign.errors import UserError, nearest
from mmalign.media import Media
from mmalign.progress import Progress

if TYPE_CHECKING:
    from vlm.models import VisionLanguageModel

_LARGEST = 10 * 2**20  # bytes of a reply that are read
_LONGEST_WAIT = 60.0  # seconds between two tries
_GROUPS = 8  # batches that a local model answers before its replies are written
_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an annotator is asked: a prompt, and the images before it."""

    prompt: str
    images: tuple[Media, ...] = ()

    def key(self, identity: str) -> str:
        """SHA-256 (hex) of who is asked and what."""
        asked = [identity, self.prompt, [image.sha256() for image in self.images]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def where(self) -> str:
        return self.images[0].where if self.images else f"'{self.prompt[:40]}'"


@runtime_checkable
class Annotator(Protocol):
    """Somebody who replies to requests.

    Attributes:
        identity: names the model and every setting that changes its replies.
    """

    @property
    def identity(self) -> str: ...

    def replies(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """(which request, its reply), in any order, each as soon as it is known. "" is a reply of no use.

        Raises:
            UserError: it fails; what was known by then has been yielded.
        """
        ...


def ask(annotator: Annotator, requests: Sequence[Request], cache: Path, *, title: str) -> list[str]:
    """The reply to every request.

    Args:
        cache: the file of replies; made where there is none.
        title: of the progress that is shown.

    Raises:
        UserError: the annotator fails (the line says how many replies are kept), the file is damaged, or another run
            is writing it.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    keys = [request.key(annotator.identity) for request in requests]
    with _alone(cache):
        known = _read(cache)
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        names = list(new)
        done = len(set(keys)) - len(new)
        with (
            open(cache, "a", encoding="utf-8") as file,
            Progress(done + len(new), title, unit="reply", initial=done) as bar,
        ):
            try:
                for index, reply in annotator.replies(list(new.values())):
                    known[names[index]] = reply
                    file.write(json.dumps({"key": names[index], "reply": reply}) + "\n")
                    file.flush()
                    bar.update()
            except UserError as error:
                raise UserError(
                    f"{error.cause}; {bar.done} of {bar.total} replies are kept in {cache}",
                    place=error.place,
                    fix="The same command goes on from there",
                ) from error
    return [known[key] for key in keys]


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    lock = filelock.FileLock(f"{cache}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            "another run is writing these replies", place=str(cache), fix="Wait for it, or name another file"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read(cache: Path) -> dict[str, str]:
    """Key -> reply. What a killed run left behind the last complete line is cut off."""
    if not cache.exists():
        return {}
    data = cache.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(cache, whole)
        print(f"mmalign: {cache}: the last line was torn and is dropped", file=sys.stderr)
    found = {}
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            row = json.loads(line)
            key, reply = row["key"], row["reply"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError("no line of replies", place=f"{cache} line {number}", fix="Delete that line") from error
        found[str(key)] = str(reply)
    return found


# ------------------------------------------------------------------------------------------------ an endpoint


class EndpointSettings(Settings):
    """A model that somebody serves: OpenAI's interface, which vLLM, SGLang, llama.cpp and Ollama have too."""

    url: str = Field(description="up to /v1: https://api.openai.com/v1, http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="the name by which the endpoint knows it")
    key_env: str | None = Field(None, description="environment variable that holds the api key; null: none is sent")
    temperature: float | None = Field(0.0, ge=0, description="null: not sent, for models that refuse it")
    max_new_tokens: int | None = Field(512, gt=0, description="a reply cut short is not used; null: not sent")
    concurrency: int = Field(8, gt=0, description="requests under way at once")
    timeout: float = Field(120.0, gt=0, description="seconds until a request is given up and tried again")
    tries: int = Field(5, gt=0, description="of a request that fails by its network, its load or its server")
    backoff: float = Field(1.0, gt=0, description="seconds before the second try; doubled before every further one")
    cache: Annotated[Path, Field(strict=False)] = Field(description="file of replies, a line each")


class _Passing(Exception):
    """A failure that may be over in a moment.

    Args:
        seconds: when the server says to come again.
    """

    def __init__(self, cause: str, seconds: float | None = None) -> None:
        super().__init__(cause)
        self.seconds = seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the api key to another host."""

    def redirect_request(self, *args: Any, **named: Any) -> None:
        return None


class Endpoint:
    """Asks by `POST URL/chat/completions`, images as base64 data."""

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        self._url = settings.url.rstrip("/") + "/chat/completions"
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise UserError(
                "not an http or https address", place="annotator.url", fix="Such as http://127.0.0.1:8000/v1"
            )
        self._key = None
        if settings.key_env is not None:
            self._key = os.environ.get(settings.key_env, "").strip()
            if not self._key or not self._key.isascii() or not self._key.isprintable():
                raise UserError(
                    f"the environment variable {settings.key_env} holds no api key",
                    place="annotator.key_env",
                    fix=f"Run: export {settings.key_env}=...",
                )
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def identity(self) -> str:
        """Where, which model, and how it draws; how often and how fast it is asked changes nothing."""
        said = self._settings
        return f"{said.model} at {self._url}, temperature {said.temperature}, {said.max_new_tokens} tokens"

    def replies(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """After a failure nothing new is asked, and what is under way is waited for."""
        failure: UserError | None = None
        todo = iter(enumerate(requests))
        waiting: dict[Future[str], int] = {}
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            while True:
                while failure is None and len(waiting) < self._settings.concurrency:
                    index, request = next(todo, (-1, None))
                    if request is None:
                        break
                    waiting[pool.submit(self._reply, request)] = index
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    index = waiting.pop(future)
                    error = future.exception()
                    if isinstance(error, UserError):
                        failure = failure or error
                    else:
                        yield index, future.result()
        if failure is not None:
            raise failure

    def _reply(self, request: Request) -> str:
        body = json.dumps(self._body(request)).encode()
        seconds = self._settings.backoff
        for tries in range(1, self._settings.tries + 1):
            try:
                return self._once(body, request)
            except _Passing as error:
                if tries == self._settings.tries:
                    count = f"{tries} tries" if tries > 1 else "one try"
                    raise UserError(f"the annotator fails after {count}: {error}", place=self._url) from error
                time.sleep(min(seconds if error.seconds is None else error.seconds, _LONGEST_WAIT))
                seconds *= 2
        raise AssertionError("unreachable: the last try returns or raises")

    def _body(self, request: Request) -> dict[str, Any]:
        said = self._settings
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images]
        body: dict[str, Any] = {
            "model": said.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}],
        }
        optional = {"temperature": said.temperature, "max_tokens": said.max_new_tokens}
        return body | {name: value for name, value in optional.items() if value is not None}

    def _once(self, body: bytes, request: Request) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        post = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(post, timeout=self._settings.timeout) as response:
                data = response.read(_LARGEST)
        except urllib.error.HTTPError as error:
            with error:
                cause = self._without_key(f"HTTP {error.code} {error.reason}: {_text(error.read(2000))}")
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Passing(cause, _seconds(error.headers.get("Retry-After"))) from error
            raise UserError(f"the annotator refuses: {cause}", place=f"{self._url}, {request.where}") from error
        except OSError as error:  # no connection, a timeout; URLError is one
            raise _Passing(str(getattr(error, "reason", error)) or type(error).__name__) from error
        try:
            choice = json.loads(data)["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise _Passing(f"not a chat completion: {self._without_key(_text(data[:200]))}") from error
        return text.strip() if isinstance(text, str) and ended in (None, "stop") else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def data_url(image: Media) -> str:
    """An image's file as text; formats that endpoints may not know become PNG."""
    data = image.read()
    kind = next((kind for magic, kind in _TYPES.items() if data.startswith(magic)), None)
    if kind is None:
        data, kind = Media.from_image(image.open()).read(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _text(data: bytes) -> str:
    return " ".join(data.decode("utf-8", "replace").split())[:200]


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else max(float(header), 0.0)
    except ValueError:  # a date
        return None


# ------------------------------------------------------------------------------------------------ a local model


class LocalSettings(Settings):
    """A model on this machine."""

    path: str | None = Field(None, min_length=1, description="a folder of transformers or a hub id; null: the recipe's")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of a model with a path of its own")
    batch_size: int = Field(8, gt=0, description="replies made at once")
    max_new_tokens: int = Field(256, gt=0, description="a reply is cut here")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest reply")
    seed: int = Field(0, ge=0, description="of replies drawn with a temperature")
    cache: Annotated[Path, Field(strict=False)] = Field(description="file of replies, a line each")


class Local:
    """Asks a vision-language model of this machine."""

    def __init__(self, model: VisionLanguageModel, settings: LocalSettings) -> None:
        from vlm.fingerprints import model_identity

        self._model, self._settings = model, settings
        draws = f", seed {settings.seed}" if settings.temperature else ""
        self.identity = (
            f"{model_identity(model)}, temperature {settings.temperature}{draws}, {settings.max_new_tokens} tokens"
        )

    def replies(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """In order, some batches at a time."""
        from mmalign.randomness import key_seed
        from mmalign.records import Side
        from vlm.conversations import conversation
        from vlm.generation import answer

        said, size = self._settings, self._settings.batch_size * _GROUPS
        for start in range(0, len(requests), size):
            some = requests[start : start + size]
            talks = [conversation(Side(prompt=one.prompt, media=one.images), place=one.where) for one in some]
            seeds = [key_seed("reply", said.seed, one.key("")) for one in some]
            texts = answer(
                self._model,
                talks,
                batch_size=said.batch_size,
                max_new_tokens=said.max_new_tokens,
                temperature=said.temperature,
                seeds=seeds,
            )
            yield from enumerate(texts, start)


ANNOTATORS: dict[str, type[EndpointSettings] | type[LocalSettings]] = {
    "endpoint": EndpointSettings,
    "local": LocalSettings,
}


def open_annotator(
    section: NamedSection, model: Callable[[], VisionLanguageModel], *, place: str
) -> tuple[Annotator, Path]:
    """The annotator that a section of a recipe names, and its file of replies.

    Args:
        model: opens the recipe's own model.
        place: the section's key, for messages.

    Raises:
        UserError: no such annotator, settings that it has not, no api key, a model that does not open.
    """
    if section.name not in ANNOTATORS:
        raise UserError(f"no annotator '{section.name}'", place=f"{place}.name", fix=nearest(section.name, ANNOTATORS))
    settings = parse_section(ANNOTATORS[section.name], section, place)
    if isinstance(settings, EndpointSettings):
        return Endpoint(settings), settings.cache
    if settings.path is None:
        return Local(model(), settings), settings.cache
    from vlm.models import open_model
    from vlm.settings import VlmModelSettings

    opened = parse_section(VlmModelSettings, {"path": settings.path, "dtype": settings.dtype}, place)
    return Local(open_model(opened), settings), settings.cache
