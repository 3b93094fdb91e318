"""The pairwise judge: both orders, answers read or counted, servers that fail, answers kept."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
from PIL import Image

from evaluators import backends
from evaluators.backends import Backend, Cached, Endpoint, Local
from evaluators.chat import ChatModel
from evaluators.pairwise import compare, parse
from mmalign.errors import UserError

WORDS = ["Image 1 is better.", "Image 2 is better.", "Both images are equally good."]


def shade(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


class Judge:
    """Prefers the lighter picture, or as it is told."""

    identity = "lighter"

    def __init__(self, rule: Any = None) -> None:
        self.rule, self.asked = rule, 0

    def answers(self, questions: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> list[str]:
        self.asked += len(questions)
        return [self.rule(q, p) if self.rule else self.lighter(p) for q, p in zip(questions, pictures, strict=True)]

    @staticmethod
    def lighter(pictures: Sequence[Image.Image]) -> str:
        first, second = (one.getpixel((0, 0))[0] for one in pictures)  # type: ignore[index]  # RGB
        return WORDS[2] if first == second else WORDS[0 if first > second else 1]


A, B = [shade(200), shade(10), shade(50), shade(90)], [shade(100), shade(20), shade(50), shade(80)]
PROMPTS = ["light", "dark", "the same", "light too"]


# -------------------------------------------------------------------------------------------------------- verdicts


def test_both_orders_are_asked_and_agree() -> None:
    judged = compare(Judge(), PROMPTS, A, B)
    assert [verdict.winner for verdict in judged.verdicts] == ["a", "b", "tie", "a"]
    assert judged.scores() == [1.0, 0.0, 0.5, 1.0]
    assert (judged.position_consistency, judged.first_position, judged.unparsed) == (1.0, 0.5, 0)
    assert judged.verdicts[0].said == (WORDS[0], WORDS[1])
    assert judged.judge.startswith("pairwise@1#") and judged.judge.endswith("by lighter")


def test_a_judge_of_places_wins_nothing() -> None:
    judged = compare(Judge(lambda question, pictures: WORDS[0]), PROMPTS, A, B)
    assert [verdict.winner for verdict in judged.verdicts] == ["tie"] * 4
    assert (judged.position_consistency, judged.first_position) == (0.0, 1.0)


def test_an_answer_that_cannot_be_read_is_counted_and_is_no_number() -> None:
    def rule(question: str, pictures: Sequence[Image.Image]) -> str:
        odd = "light too" in question and pictures[0].getpixel((0, 0)) == (80, 80, 80)
        return "I cannot tell." if odd else Judge.lighter(pictures)

    judged = compare(Judge(rule), PROMPTS, A, B)
    assert judged.unparsed == 1 and judged.scores() == [1.0, 0.0, 0.5, None]
    assert judged.verdicts[3].consistent is None and judged.verdicts[3].said[1] == "I cannot tell."
    assert judged.position_consistency == 1.0


def test_a_judge_that_answers_nonsense_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=r"8 of 8 answers cannot be read, the first 'bla\\nbla' \(lighter\)") as caught:
        compare(Judge(lambda question, pictures: "bla\nbla"), PROMPTS, A, B)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="where the prompt goes"):
        compare(Judge(), PROMPTS, A, B, question="which?")
    assert compare(Judge(), [], [], []).position_consistency is None


ANSWERS = {
    "Image 1 is better.": 1,
    "image 2 is better": 2,
    '"Image 2 is better."': 2,
    "**Image 1** is better.": 1,
    "Picture 1 is the better one": 1,
    "Both images are equally good.": 0,
    "It's a tie.": 0,
    "2": 2,
    " Image 1. ": 1,
    "<think>Image 1 is better. No.</think>Image 2 is better.": 2,
    "<think>Image 1 is better": None,
    "Image 1 is better. Image 2 is better.": None,
    "Image 1 is better, or both are equally good": None,
    "": None,
    "12": None,
    "Image 3 is better.": None,
    "better": None,
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.items(), ids=range(len(ANSWERS)))
def test_answers_are_read(answer: str, expected: int | None) -> None:
    assert parse(answer) == expected


# --------------------------------------------------------------------------------------------------------- answers kept


def test_answers_are_asked_for_once(tmp_path: Path) -> None:
    judge = Judge()
    cached = Cached(judge, tmp_path / "answers" / "a.sqlite")
    first = compare(cached, PROMPTS, A, B)
    # seven: the third pair is twice the same picture, so its two orders are one question
    assert judge.asked == 7 and first == compare(cached, PROMPTS, A, B)
    again = Cached(judge, tmp_path / "answers" / "a.sqlite")
    assert compare(again, PROMPTS, A, B) == first and judge.asked == 7
    compare(again, PROMPTS[:1], [shade(201)], B[:1])
    assert judge.asked == 9  # other pixels
    compare(again, PROMPTS[:1], A[:1], A[:1])
    assert judge.asked == 10


def test_a_kill_loses_one_batch_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BATCH", 3)
    judge = Judge()

    def fails(question: str, pictures: Sequence[Image.Image]) -> str:
        if judge.asked > 6:
            raise KeyboardInterrupt
        return Judge.lighter(pictures)

    judge.rule = fails
    with pytest.raises(KeyboardInterrupt):
        compare(Cached(judge, tmp_path / "a.sqlite"), PROMPTS, A, B)
    fresh = Judge()
    assert compare(Cached(fresh, tmp_path / "a.sqlite"), PROMPTS, A, B).scores() == [1.0, 0.0, 0.5, 1.0]
    assert fresh.asked == 1


def test_a_file_that_is_none_of_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_text("nothing of the kind, and long enough to be looked at" * 20)
    with pytest.raises(UserError, match="the answers cannot be kept"):
        Cached(Judge(), tmp_path / "a.sqlite")


# --------------------------------------------------------------------------------------------------------- a server


class Handler(BaseHTTPRequestHandler):
    """Replies as the server's `plan` says: (status, body) for each request, then as the judge of shades."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            status, reply = server.plan.pop(0) if server.plan else (200, None)
        if reply is None:
            content = body["messages"][0]["content"]
            urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
            reply = json.dumps({"choices": [{"message": {"content": Judge.lighter(pictures)}}]})
        data = reply.encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(backends, "PAUSE", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    own: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.plan, own.requests, own.lock = [], [], threading.Lock()
    own.url = f"http://127.0.0.1:{own.server_port}/v1"
    thread = threading.Thread(target=own.serve_forever, daemon=True)
    thread.start()
    yield own
    own.shutdown()
    own.server_close()
    thread.join()


def test_any_server_of_the_protocol_judges(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Endpoint(server.url, "some-vlm", key_from="JUDGE_KEY")
    assert isinstance(judge, Backend)
    judged = compare(judge, PROMPTS, A, B)
    assert judged.scores() == [1.0, 0.0, 0.5, 1.0]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("some-vlm", 0)
    assert "secret" not in judged.judge and judged.judge.endswith("by some-vlm@127.0.0.1-64")


def test_a_passing_fault_is_tried_again(server: Any) -> None:
    server.plan = [(503, "busy"), (429, "slow down")]
    assert Endpoint(server.url, "m", workers=1).answers(["q"], [[A[0], B[0]]]) == [WORDS[0]]
    assert len(server.requests) == 3


FAULTS: dict[str, tuple[list[tuple[int, str]], str]] = {
    "key": ([(401, "no")], r"the key is refused \(401\) .*Set OPENAI_API_KEY"),
    "model": ([(404, "no")], r"no such model or path \(404\)"),
    "elsewhere": ([(302, "")], r"the server sends us elsewhere \(302\)"),
    "refusal": ([(400, "too\nlarge")], r"the server refuses \(400\): too large"),
    "busy": ([(503, "busy")] * 4, r"the server refuses \(503\): busy"),
    "page": ([(200, "<html>hello")], "the reply is none of a chat: <html>hello"),
    "empty": ([(200, "{}")], "the reply is none of a chat"),
}


@pytest.mark.parametrize(("plan", "said"), FAULTS.values(), ids=FAULTS)
def test_a_server_that_does_not_answer_is_a_line(server: Any, plan: list[tuple[int, str]], said: str) -> None:
    server.plan = list(plan)
    with pytest.raises(UserError, match=said) as caught:
        Endpoint(server.url, "m", workers=1).answers(["q"], [[A[0], B[0]]])
    assert "\n" not in str(caught.value) and server.url in str(caught.value)


def test_no_server_is_a_line(server: Any) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"no answer after 4 tries: .*refused"):
        Endpoint(server.url, "m").answers(["q"], [[A[0]]])


def test_a_key_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(UserError, match="the key would travel in the clear") as caught:
        Endpoint("http://example.org/v1", "m")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="a key does not belong into a URL") as caught:
        Endpoint("https://me:secret@example.org/v1", "m")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="not the URL of a server"):
        Endpoint("localhost:8000", "m")


# ------------------------------------------------------------------------------------------------------- a local model


def test_a_local_model_answers_and_a_random_one_is_nonsense(tmp_path: Path) -> None:
    local = Local(ChatModel(tiny_vlms.write("qwen2_vl", tmp_path / "m"), device="cpu"), max_new_tokens=4)
    assert isinstance(local, Backend) and local.identity.startswith("local#")
    said = local.answers(["which?", "which one is it?"], [[A[0], B[0]], [A[1], B[1]]])
    assert len(said) == 2 and said[1:] == local.answers(["which one is it?"], [[A[1], B[1]]])
    with pytest.raises(UserError, match="8 of 8 answers cannot be read"):
        compare(local, PROMPTS, A, B)
