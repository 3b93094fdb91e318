"""The arena as people meet it: its server as a process, and its page in a headless Chromium where there is one."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_arena
import tiny_browser
from PIL import Image
from tiny_arena import Server, credentials, serving
from tiny_browser import Browser

pytestmark = pytest.mark.slow

needs_browser = pytest.mark.skipif(
    tiny_browser.find() is None, reason="no Chromium on the path; MMALIGN_CHROMIUM=PATH names one"
)
NASTY = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script> ${window.hacked = 1} {{hacked}}'
PROMPTS = (NASTY, *(f"prompt {number}" for number in range(29)))
ROOM = "document.querySelector('[data-token]')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folders = tiny_arena.draw(tmp_path_factory.mktemp("pictures"), ("base", "tuned"), PROMPTS, seeds=(0, 1), size=64)
    with serving("--images", *folders) as server:
        yield server


def kept(votes: Path, rater: str) -> dict[str, str]:
    """token -> answer of every vote of a rater that was not taken back."""
    with contextlib.closing(sqlite3.connect(votes)) as connection:
        rows = connection.execute(
            "SELECT token, answer FROM votes JOIN shown USING (rater, trial) "
            "WHERE rater = ? AND vote NOT IN (SELECT vote FROM retractions) ORDER BY vote",
            (rater,),
        )
        return dict(rows)


# ------------------------------------------------------------------------------------------------- without a page


def test_the_server_refuses_what_the_page_does_not_ask_for(server: Server) -> None:
    pair = server.call("next", {"rater": "Zoe"})["pair"]
    vote = {"rater": "Zoe", "token": pair["token"], "answer": "left", "milliseconds": 5}
    for ask in (None, [], "next", {}, {"path": "/etc/passwd"}, {**vote, "model": "tuned"}, {**vote, "url": "http://x"}):
        assert "error" in server.call("vote", ask)
    for wrong in ({"token": "../../etc/passwd"}, {"token": "A" * 24}, {"answer": "winner"}, {"milliseconds": -5}):
        assert "error" in server.call("vote", {**vote, **wrong})
    assert server.call("vote", vote)["done"] == 1
    assert "you have voted" in server.call("vote", vote)["error"]
    assert kept(server.votes, "Zoe") == {pair["token"]: "left"}

    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/login"):
        assert server.ask(path, b"{}")[0] == 404
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=votes.sqlite",
        "/gradio_api/proxy=http://127.0.0.1/",
    ):
        assert server.ask(path)[0] == 404
    assert server.ask("/gradio_api/component_server", b"x" * 20_000)[0] == 413
    assert server.ask("/", Origin="http://example.org")[0] == 403
    assert server.ask("/", Host="rebound.example.org")[0] == 421
    assert b"tuned" not in server.ask("/config")[1]
    for name in ("__init__", "get_config", "postprocess", "store"):  # of the component, but not for the page
        body = json.dumps({"data": {}, "component_id": 3, "fn_name": name, "session_hash": "x"}).encode()
        assert server.ask("/gradio_api/component_server", body, **{"Content-Type": "application/json"})[0] == 404


def test_with_a_password_raters_have_the_name_that_they_gave_with_it(tmp_path: Path) -> None:
    folders = tiny_arena.draw(tmp_path, ("base", "tuned"))
    with serving("--images", *folders, password="correct horse") as server:
        assert server.ask("/")[0] == 401
        assert server.ask("/config", **credentials("Ada", "wrong horse"))[0] == 401
        ada = credentials("Ada", "correct horse")
        reply = server.call("next", {"rater": "Mallory"}, **ada)
        assert reply["rater"] == "Ada"
        server.call("vote", {"token": reply["pair"]["token"], "answer": "tie", "milliseconds": 1}, **ada)
        forged = {"token": reply["pair"]["token"], "answer": "left", "milliseconds": 1}
        assert "not shown to you" in server.call("vote", forged, **credentials("Ben", "correct horse"))["error"]
        assert list(kept(server.votes, "Ada").values()) == ["tie"]
        assert "1 vote by 1 rater" in server.stop()


# ---------------------------------------------------------------------------------------------------- with a page


def _new(other_than: str) -> str:
    """Whether the page shows another pair than one."""
    return f"{ROOM} && {ROOM}.dataset.mode === 'voting' && {ROOM}.dataset.token !== {json.dumps(other_than)}"


class Voter:
    """Somebody at the page, who writes down what they voted."""

    def __init__(self, browser: Browser, server: Server, name: str) -> None:
        self.browser, self.server, self.name = browser, server, name
        self.voted: dict[str, str] = {}

    def enter(self) -> None:
        """Open the page and give a name."""

        def name() -> None:
            self.browser.open(self.server.url)
            self.browser.wait(f"document.querySelector('.door:not([hidden])') || {_new('')}")
            if self.browser.run("Boolean(document.querySelector('.door:not([hidden])'))"):
                self.browser.click("[name=rater]")
                self.browser.write(self.name)
                self.browser.press("Enter")

        self.insist(name)

    def insist(self, act: Callable[[], None], other_than: str = "") -> None:
        """Do something until there is a new pair: a busy machine's browser loses a key or a click now and then."""
        for patience in (15, 15):
            act()
            with contextlib.suppress(AssertionError):
                self.browser.wait(_new(other_than), patience)
                return
        act()
        self.token(other_than)

    def token(self, other_than: str = "") -> str:
        """That of the pair on the page, as soon as there is one."""
        self.browser.wait(_new(other_than))
        return str(self.browser.run(f"{ROOM}.dataset.token"))

    def vote(self, answer: str, *, mouse: bool) -> None:
        """Vote and wait for the next pair."""
        token = self.token()
        key = {"left": "1", "right": "2", "tie": "t", "bad": "b", "skip": "s"}[answer]
        click = f"[data-answer={answer}]"
        self.insist(lambda: self.browser.click(click) if mouse else self.browser.press(key), token)
        self.voted[token] = answer

    def undo(self, *, mouse: bool) -> None:
        """Take the last vote back; its pair is there again."""
        token, answer = self.voted.popitem()
        if mouse:
            self.browser.click("[data-act=undo]")
        else:
            self.browser.press("u")
        self.browser.wait(f"{ROOM}.dataset.token === {json.dumps(token)}")
        assert answer


@needs_browser
def test_fifty_votes_by_keyboard_and_mouse(server: Server, tmp_path: Path) -> None:
    answers = ("left", "right", "tie", "left", "bad", "right", "skip")
    with Browser() as browser:
        ada = Voter(browser, server, "Ada")
        ada.enter()
        for number in range(50):
            if number in (9, 27):  # the page is loaded again: the same pair, the same name
                before = ada.token()
                browser.reload()
                assert ada.token() == before
                assert "Voting as Ada" in browser.run("document.querySelector('.who').textContent")
            if number in (14, 15, 30):
                ada.undo(mouse=number == 15)
                ada.vote("tie", mouse=number != 15)
            if number == 20:  # the server dies while a vote is on its way
                token = ada.token()
                browser.press("2")
                server.kill()
                browser.wait("!document.querySelector('.alert').hidden")
                assert "does not answer" in browser.run("document.querySelector('.alert').textContent")
                server.start()
                browser.wait("document.querySelector('.alert').hidden")  # by itself
                if token in kept(server.votes, "Ada"):
                    assert kept(server.votes, "Ada")[token] == "right"
                    ada.voted[token] = "right"
                else:
                    assert ada.token() == token  # it was not counted, and the page says so
            ada.vote(answers[number % len(answers)], mouse=number % 2 == 0)
        assert kept(server.votes, "Ada") == ada.voted and len(ada.voted) in (50, 51)
        assert browser.run("document.querySelector('.count').textContent") == f"{len(ada.voted)} of 60"

        # a key that is held down is one vote, keys in a field are none
        before = len(ada.voted)
        ada.vote("left", mouse=False)
        for _ in range(3):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key="1", code="Digit1", text="1", autoRepeat=True)
        time.sleep(0.3)
        assert len(kept(server.votes, "Ada")) == before + 1

        # which was which, after the vote; from then on it stands
        last = list(ada.voted)[-1]
        browser.press("r")
        browser.wait(f"{ROOM}.dataset.mode === 'revealed'")
        names = browser.run("[...document.querySelectorAll('.name')].map(name => name.textContent)")
        assert sorted(names) == ["base", "tuned"]
        assert browser.run("document.querySelector('[data-act=undo]').disabled")
        browser.press("u")
        browser.press("1")
        browser.press(" ")
        ada.token(other_than=last)
        assert kept(server.votes, "Ada") == ada.voted

        # to the end
        while len(ada.voted) < 60:
            token = ada.token()
            browser.press("2")
            ada.voted[token] = "right"
            browser.wait(f"{ROOM}.dataset.token !== {json.dumps(token)}")
        browser.wait("!document.querySelector('.over').hidden")
        assert kept(server.votes, "Ada") == ada.voted
        assert not browser.run("window.hacked || 0")
        own = (server.url, "data:image/png;base64,", "about:")
        assert [url for url in browser.requested if not url.startswith(own)] == []


@needs_browser
def test_an_answer_that_gets_lost_does_not_hold_the_page(server: Server) -> None:
    with Browser() as browser:
        fay = Voter(browser, server, "Fay")
        fay.enter()
        fay.vote("left", mouse=False)
        browser.run(
            "window.was = fetch; window.fetch = () => { window.fetch = window.was; return new Promise(() => {}) }; 1"
        )
        browser.press("2")
        browser.wait("document.querySelector('.alert').textContent.includes('does not answer')")
        browser.wait("document.querySelector('.alert').hidden && !document.querySelector('.busy')")
        assert kept(server.votes, "Fay") == fay.voted and fay.token()  # it never reached the server; a pair is there
        fay.vote("tie", mouse=False)
        assert list(kept(server.votes, "Fay").values()) == ["left", "tie"]


@needs_browser
def test_the_views_the_prompt_and_the_standings(server: Server, tmp_path: Path) -> None:
    with Browser() as browser:
        eve = Voter(browser, server, "Eve")
        eve.enter()
        seen = False
        for _ in range(60):
            if browser.run("document.querySelector('.prompt').textContent").startswith("<img"):
                seen = True
                break
            eve.vote("skip", mouse=False)
        assert seen and browser.run("document.querySelector('.prompt').textContent") == NASTY
        assert browser.run("document.querySelector('.prompt').children.length") == 0
        assert not browser.run("window.hacked || 0")

        def style(selector: str, name: str) -> str:
            return str(browser.run(f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}"))

        browser.wheel(".pane.left .window", -500)  # both are zoomed, about the same place
        browser.wait(
            "getComputedStyle(document.querySelector('.pane.left img')).transform !== 'matrix(1, 0, 0, 1, 0, 0)'"
        )
        assert style(".pane.left img", "transform") == style(".pane.right img", "transform")
        before = style(".pane.right img", "transform")
        browser.drag(".pane.right .window", 30)
        assert style(".pane.left img", "transform") == style(".pane.right img", "transform") != before
        browser.press("0")
        assert style(".pane.left img", "transform") == "matrix(1, 0, 0, 1, 0, 0)"

        browser.press("v")
        assert browser.run("document.querySelector('.stage').dataset.view") == "slider"
        cut = style(".pane.right .window", "clipPath")
        browser.drag(".pane.left .window", -60)
        assert style(".pane.right .window", "clipPath") != cut
        browser.press("v")
        first = browser.run("document.querySelector('.stage').classList.contains('second')")
        browser.wait(f"document.querySelector('.stage').classList.contains('second') !== {json.dumps(first)}")
        browser.press("v")
        assert style(".pane.right", "mixBlendMode") == "difference"
        browser.press("v")
        assert browser.run("document.querySelector('.stage').dataset.view") == "side"

        for name, width, height, dark in (
            ("wide", 1280, 860, False),
            ("narrow", 390, 844, False),
            ("dark", 1280, 860, True),
        ):
            browser.resize(width, height, dark=dark)
            time.sleep(0.3)
            wide = browser.run("document.documentElement.scrollWidth")
            assert wide <= width, f"{name}: the page is {wide} pixels wide"
            shot = tmp_path / f"{name}.png"
            browser.screenshot(shot)
            with Image.open(shot) as picture:
                assert picture.size == (width, height) and len(picture.convert("RGB").getcolors(2**24) or ()) > 20
            low = browser.run("document.querySelector('[data-answer=right]').getBoundingClientRect().bottom")
            assert low <= height, f"{name}: the buttons are below the window"

        for _ in range(3):
            eve.vote("left", mouse=True)
        browser.click(".always input")  # every vote is revealed: the names stand on its own pair
        token = eve.token()
        browser.press("1")
        browser.wait(f"{ROOM}.dataset.mode === 'revealed'")
        assert browser.run(f"{ROOM}.dataset.token") == token
        assert browser.run("document.querySelector('.chosen b').textContent") == "1"
        browser.press(" ")
        eve.token(other_than=token)

        tab = "[...document.querySelectorAll('button[role=tab]')].find(tab => tab.textContent.trim() === 'Standings')"
        browser.run(f"{tab}.click()")
        browser.wait("document.querySelector('.board table')")
        text = browser.run("document.querySelector('.board').textContent")
        assert "tuned against base" in text and "mmalign train diffusion/dpo_own" in text and "Left side chosen" in text
        browser.press("1")  # not a vote: the pair is in the other tab
        time.sleep(0.3)
        assert list(kept(server.votes, "Eve").values()).count("left") == 4
        assert browser.console == []


@needs_browser
def test_answers_are_text_and_their_differences_are_marked(tmp_path: Path) -> None:
    said: dict[str, list[str]] = {"base": [f"a dog {NASTY} on grass"] * 2, "dpo": [f"a wolf {NASTY} on snow"] * 2}
    files = tiny_arena.answer(tmp_path, said)
    with serving("--answers", *files) as server, Browser() as browser:
        ada = Voter(browser, server, "Ada")
        ada.enter()
        texts: Any = browser.run("[...document.querySelectorAll('.text')].map(text => text.textContent)")
        assert sorted(texts) == sorted(text[0] for text in said.values())
        assert browser.run("document.querySelectorAll('.text *').length") == 0
        assert browser.run("document.querySelector('.asked img').naturalWidth") == 24
        browser.press("v")
        browser.wait("document.querySelectorAll('mark').length")
        marked = browser.run("[...document.querySelectorAll('mark')].map(mark => mark.textContent)")
        assert sorted(marked) == ["dog", "grass", "snow", "wolf"]
        ada.vote("left", mouse=False)
        assert list(kept(server.votes, "Ada").values()) == ["left"]
        assert not browser.run("window.hacked || 0") and browser.console == []


@needs_browser
def test_who_waits_for_a_pair_sees_that_it_is_drawn_and_why_there_are_no_more(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("tiny_live.py"))
    folder = tmp_path / "live"
    with serving(folder, program=(program,)) as server, Browser() as browser:
        ada = Voter(browser, server, "Ada")
        ada.enter()
        token = ada.token()
        assert browser.run("document.querySelector('.count').textContent") == "0 of 3"
        browser.press("1")
        browser.wait(f"{ROOM}.dataset.mode === 'drawing' && !document.querySelector('.drawing').hidden")
        assert browser.run("document.querySelector('.over').hidden && document.querySelector('.stage').hidden")
        browser.press("1")  # there is nothing to vote on
        browser.screenshot(tmp_path / "drawing.png")
        (folder / "go").touch()
        second = ada.token(other_than=token)  # by itself
        assert browser.run("document.querySelector('.drawing').hidden")
        assert browser.run("document.querySelector('.prompt').textContent") == "second"
        browser.press("t")
        browser.wait(f"{ROOM}.dataset.mode === 'over'")
        browser.wait("!document.querySelector('.alert').hidden")
        assert "drawn (RuntimeError)" in browser.run("document.querySelector('.alert').textContent")
        assert "memory" not in browser.run("document.body.textContent")  # that would name the model
        with contextlib.closing(sqlite3.connect(folder / "votes.sqlite")) as connection:
            assert connection.execute("SELECT answer FROM votes ORDER BY vote").fetchall() == [("left",), ("tie",)]
        assert second != token and browser.console == []


@needs_browser
def test_who_leaves_while_waiting_is_at_the_door(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("tiny_live.py"))
    leave = (  # while the page asks whether the pair is there
        f"new Promise(left => {{ const at = {ROOM}, again = setInterval(() => {{ "
        "if (!at.classList.contains('busy')) return; clearInterval(again); "
        "document.querySelector('[data-act=leave]').click(); left(true); }, 1); })"
    )
    idle = f"!{ROOM}.classList.contains('busy')"
    with serving(tmp_path / "live", program=(program,)) as server, Browser() as browser:
        ada = Voter(browser, server, "Ada")
        ada.enter()
        browser.wait("document.activeElement === document.body")  # no longer where the name was written
        browser.press("1")
        browser.wait(f"{ROOM}.dataset.mode === 'drawing'")
        assert browser.run(leave)
        browser.wait(idle)
        door = "!document.querySelector('.door').hidden && document.querySelector('.room').hidden"
        assert browser.run(f"new Promise(done => setTimeout(() => done({door}), 1500))")
        browser.write("Ben")
        browser.press("Enter")
        assert browser.wait(f"{ROOM}.dataset.mode === 'voting'")
        assert "Voting as Ben" in browser.run("document.querySelector('.who').textContent")
