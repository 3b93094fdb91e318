"""The arena's server: who is shown what, what is refused, and that nothing is told before the vote."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_arena
from PIL import Image

from evaluators.arena import command, hint, tables
from evaluators.arena.guard import LARGEST, LOOPBACK, RATER_NAMED, Guard
from evaluators.arena.server import Arena
from evaluators.arena.trials import choose, find_root, left_of, read_programme
from evaluators.arena.views import packed
from mmalign.errors import UserError


def arena_of(root: Path, *models: str, seeds: tuple[int, ...] = (0, 1), seed: int = 0) -> Arena:
    folders = tiny_arena.draw(root, models or ("base", "tuned"), seeds=seeds)
    return Arena(tiny_arena.sources(root, folders), root / "votes.sqlite", seed=seed)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    with arena_of(tmp_path) as arena:
        yield arena


def vote_on_all(arena: Arena, rater: str, answer: str = "left") -> list[str]:
    """Votes until there is nothing left; the tokens in order."""
    tokens = []
    reply = arena.next(rater)
    while reply["pair"] is not None:
        tokens.append(reply["pair"]["token"])
        reply = arena.vote(rater, tokens[-1], answer, 7)
    return tokens


# --------------------------------------------------------------------------------------------------- the trials


def test_pairs_are_what_all_made_of_the_same_prompt_and_seed(tmp_path: Path) -> None:
    folders = tiny_arena.draw(tmp_path, ("zebra", "base", "dpo"), seeds=(0, 1))
    lines = (folders[2] / "index.jsonl").read_text().splitlines()
    (folders[2] / "index.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # one picture fewer
    programme = read_programme(tiny_arena.sources(tmp_path, folders))
    assert programme.contestants == ("zebra", "base", "dpo")  # as given: the base may come first
    assert len(programme.trials) == 6 + 5 + 5
    for trial in programme.trials:
        assert trial.a.contestant < trial.b.contestant and trial.a.model == f"{trial.a.contestant}@123"
    again = read_programme(tiny_arena.sources(tmp_path, tuple(reversed(folders))))
    assert [t.trial_id for t in again.trials] == [t.trial_id for t in programme.trials]
    other = read_programme(tiny_arena.sources(tmp_path, folders), seed=1)
    assert {t.trial_id for t in other.trials} == {
        t.trial_id for t in programme.trials
    } and other.trials != programme.trials


def test_one_folder_may_hold_several_models(tmp_path: Path) -> None:
    (folder,) = tiny_arena.draw(tmp_path, ("grid",), seeds=(0,))
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    both = [{**row, "model": model} for row in rows for model in ("step 100", "step 200")]
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    programme = read_programme(tiny_arena.sources(tmp_path, (folder,)))
    assert programme.contestants == ("step 100", "step 200") and len(programme.trials) == 3


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first = tiny_arena.draw(tmp_path / "one", ("pictures",))
    second = tiny_arena.draw(tmp_path / "two", ("pictures",))
    programme = read_programme(tiny_arena.sources(tmp_path, first + second))
    assert programme.contestants == ("one/pictures", "two/pictures")


def test_sides_are_a_fair_coin_that_falls_the_same_way_again() -> None:
    sides = [left_of(f"trial {n}", rater, 0) for rater in ("Ada", "Ben") for n in range(500)]
    assert sides == [left_of(f"trial {n}", rater, 0) for rater in ("Ada", "Ben") for n in range(500)]
    assert 430 < sides.count("a") < 570
    assert 180 < sum(x == y for x, y in zip(sides[:500], sides[500:], strict=True)) < 320  # raters differ


def test_the_least_voted_comes_first(arena: Arena) -> None:
    trials = arena.programme.trials
    assert choose(trials, set(), {}) is trials[0]
    assert choose(trials, {trials[0].trial_id}, {trials[1].trial_id: 1}) is trials[2]
    assert choose(trials, {trial.trial_id for trial in trials}, {}) is None


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"file": "../other/00000.png"}, "leaves the data folder"),
    ({"file": "/etc/passwd"}, "absolute path"),
    ({"file": "http://example.org/a.png"}, "does not exist"),
    ({"file": "nowhere.png"}, "does not exist"),
    ({"file": 7}, "expected the path of a picture"),
    ({"seed": "0"}, "seed: expected a whole number"),
    ({"seed": None}, "seed: expected a whole number"),
    ({"prompt": ""}, "prompt: expected text"),
    ({"prompt": "x" * 10_001}, "10001 characters, the limit is 10000"),
    ({"prompt": "\ud800"}, "valid Unicode"),
    ({"model": ["base"]}, "model: expected text"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folders = tiny_arena.draw(tmp_path, ("base", "tuned"))
    index = folders[1] / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[1].update(change)
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message) as caught:
        read_programme(tiny_arena.sources(tmp_path, folders))
    assert "index.jsonl line 2" in str(caught.value)


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    first = tiny_arena.draw(tmp_path, ("base",), seeds=(0,))
    second = tiny_arena.draw(tmp_path, ("tuned",), seeds=(1,))
    with pytest.raises(UserError, match="base, tuned share no prompt and seed"):
        Arena(tiny_arena.sources(tmp_path, first + second), tmp_path / "votes.sqlite")
    assert not (tmp_path / "votes.sqlite").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no index\.jsonl"):
        read_programme(tiny_arena.sources(tmp_path, (*first, tmp_path / "empty")))
    index = first[0] / "index.jsonl"
    index.write_text(index.read_text() + index.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="'base' has the same prompt and seed twice"):
        read_programme(tiny_arena.sources(tmp_path, first + second))
    index.write_text("{broken\n")
    with pytest.raises(UserError, match="expected JSON"):
        read_programme(tiny_arena.sources(tmp_path, first + second))
    with pytest.raises(UserError, match="no such file or folder"):
        find_root([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="not below the folder of the votes"):
        tiny = tiny_arena.draw(tmp_path / "deep" / "one", ("a", "b"))
        read_programme(tiny_arena.sources(tmp_path / "deep" / "two", tiny))


# ---------------------------------------------------------------------------------------------- what is shown


def test_a_pair_tells_nothing_but_pixels_and_the_prompt(arena: Arena) -> None:
    reply = arena.next("Ada")
    text = json.dumps(reply)
    known = {t.trial_id for t in arena.programme.trials}
    for secret in ("base", "tuned", "123", "index", ".png", str(arena.store.path.parent), "seed", *known):
        if secret != "base":
            assert secret not in text.replace("image/png", ""), secret
    assert set(reply["pair"]) == {"token", "prompt", "media", "left", "right"}
    for side in ("left", "right"):
        head, _, data = reply["pair"][side]["image"].partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (24, 24) and not picture.info  # the file's metadata name the model


def test_the_pictures_are_on_the_sides_that_the_vote_says(arena: Arena) -> None:
    for rater in ("Ada", "Ben", "Cleo"):
        pair = arena.next(rater)["pair"]
        reds = []
        for side in ("left", "right"):
            data = base64.b64decode(pair[side]["image"].partition(",")[2])
            with Image.open(io.BytesIO(data)) as picture:
                reds.append(picture.getpixel((0, 0))[0])  # 10 for base, 50 for tuned
        arena.vote(rater, pair["token"], "left" if reds[0] == 50 else "right", 5)
    (match,) = arena.standings().matches
    assert (match.first, match.wins, match.losses) == ("tuned", 3, 0)


def test_reloading_shows_the_same_pair(arena: Arena) -> None:
    first = arena.next("Ada")["pair"]
    assert arena.next("Ada")["pair"] == first
    arena.vote("Ada", first["token"], "tie", 3)
    assert arena.next("Ada")["pair"]["token"] != first["token"]


def test_raters_do_not_do_the_same_work_while_there_is_other_work(tmp_path: Path) -> None:
    with arena_of(tmp_path) as arena:
        looking = {rater: arena.next(rater)["pair"] for rater in ("Ada", "Ben", "Cleo", "Dan", "Eve", "Fay")}
        shown = [arena.store.looking_at(rater)[0] for rater in looking]
        assert len(set(shown)) == 6  # six raters, six trials: nobody looks at another one's
        for rater, pair in looking.items():
            arena.vote(rater, pair["token"], "left", 5)
        assert arena.next("Gus")["covered"] == 6
        for rater in looking:
            vote_on_all(arena, rater)
        assert len(arena.store.judgements()) == 36
        assert arena.standings().shared == 6


def test_a_pair_left_lying_goes_to_another_after_its_time(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    first = arena.next("Ada")["pair"]["token"]
    trial = arena.store.looking_at("Ada")[0]
    assert arena.store.work_on("Ben")[trial] == 1
    monkeypatch.setattr("evaluators.arena.votes.time.time", lambda: 4e9)
    assert trial not in arena.store.work_on("Ben")
    assert arena.vote("Ada", first, "left", 5)["done"] == 1  # and the first one's vote still counts


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    with arena_of(tmp_path) as arena:
        first = arena.next("Ada")["pair"]["token"]
        arena.vote("Ada", first, "right", 5)
        waiting = arena.next("Ada")["pair"]
        folders = arena.sources.folders
    with Arena(tiny_arena.sources(tmp_path, folders), tmp_path / "votes.sqlite") as again:
        assert again.next("Ada")["pair"] == waiting and again.next("Ada")["done"] == 1
        again.vote("Ada", waiting["token"], "left", 5)
        assert len(again.store.judgements()) == 2


def test_what_is_drawn_later_is_found_when_nothing_is_left(arena: Arena) -> None:
    assert len(vote_on_all(arena, "Ada")) == 6
    for folder in arena.sources.folders:
        row = {"file": "00000.png", "prompt": "a later prompt", "seed": 9, "model": f"{folder.name}@123"}
        with open(folder / "index.jsonl", "a") as index:
            index.write(json.dumps(row) + "\n")
        if folder.name == "base":  # half of it: nothing to compare yet
            assert arena.next("Ada")["pair"] is None
    assert arena.next("Ada")["pair"]["prompt"] == "a later prompt"
    assert arena.next("Ada")["total"] == 7


def test_a_damaged_picture_costs_its_pair_alone(arena: Arena, capsys: pytest.CaptureFixture[str]) -> None:
    packed.cache_clear()
    (arena.sources.folders[0] / "00000.png").write_bytes(b"no picture")
    assert len(vote_on_all(arena, "Ada")) == 5
    assert "left out: the picture has changed" in capsys.readouterr().out


def test_answers_show_the_picture_that_was_asked_about(tmp_path: Path) -> None:
    files = tiny_arena.answer(tmp_path, {"base": ["a dog", "<b>cat</b>"], "dpo": ["a wolf", "a lynx"]})
    with Arena(tiny_arena.sources(tmp_path, answers=files), tmp_path / "votes.sqlite") as arena:
        pairs = [arena.next(rater)["pair"] for rater in ("Ada", "Ben")]
    assert {frozenset((pair["left"]["text"], pair["right"]["text"])) for pair in pairs} == {
        frozenset(("a dog", "a wolf")),
        frozenset(("<b>cat</b>", "a lynx")),
    }
    assert all(pair["media"].startswith("data:image/png") for pair in pairs)


# --------------------------------------------------------------------------------------------- undo and reveal


def test_undo_goes_back_step_by_step(arena: Arena) -> None:
    tokens = [arena.next("Ada")["pair"]["token"]]
    tokens.append(arena.vote("Ada", tokens[0], "left", 5)["pair"]["token"])
    reply = arena.vote("Ada", tokens[1], "skip", 5)
    assert reply["last"] == {"token": tokens[1], "answer": "skip", "revealed": False}
    with pytest.raises(UserError, match="only the latest"):
        arena.undo("Ada", tokens[0])
    assert arena.undo("Ada", tokens[1])["pair"]["token"] == tokens[1]
    assert arena.undo("Ada", tokens[0])["pair"]["token"] == tokens[0]
    with pytest.raises(UserError, match="only the latest"):
        arena.undo("Ada", tokens[0])
    assert arena.next("Ada")["last"] is None and arena.store.judgements() == []
    assert arena.vote("Ada", tokens[0], "right", 5)["done"] == 1


def test_models_are_told_after_the_vote_and_then_it_stands(arena: Arena) -> None:
    token = arena.next("Ada")["pair"]["token"]
    with pytest.raises(UserError, match="told after the vote"):
        arena.reveal("Ada", token)
    arena.vote("Ada", token, "left", 5)
    told = arena.reveal("Ada", token)
    assert {side["name"] for side in told["names"].values()} == {"base", "tuned"} and told["answer"] == "left"
    assert told["names"]["left"]["model"] == f"{told['names']['left']['name']}@123"
    with pytest.raises(UserError, match="have been shown"):
        arena.undo("Ada", token)
    with pytest.raises(UserError, match="not shown to you"):
        arena.reveal("Ben", token)


# ------------------------------------------------------------------------------------------------ what is refused


TOKENS: list[object] = [
    "",
    "../../etc/passwd",
    "http://example.org/picture.png",
    "file:///etc/passwd",
    "A" * 24,
    "A" * 100_000,
    "' OR 1=1 --",
    "<script>alert(1)</script>",
    None,
    7,
    ["a"],
    {"path": "/etc/passwd"},
]


@pytest.mark.parametrize("token", TOKENS)
def test_forged_tokens_are_refused(arena: Arena, token: object) -> None:
    arena.next("Ada")
    for refused in (
        lambda: arena.vote("Ada", token, "left", 5),
        lambda: arena.undo("Ada", token),
        lambda: arena.reveal("Ada", token),
    ):
        with pytest.raises(UserError, match=r"not the token of a pair|not shown to you"):
            refused()
    assert arena.store.judgements() == []


def test_tokens_are_random_and_of_their_rater_alone(arena: Arena) -> None:
    tokens = {arena.next(f"rater {n}")["pair"]["token"] for n in range(40)}
    assert len(tokens) == 40
    mine = arena.next("Ada")["pair"]["token"]
    with pytest.raises(UserError, match="not shown to you"):
        arena.vote("Ben", mine, "left", 5)


def test_a_second_vote_is_refused(arena: Arena) -> None:
    token = arena.next("Ada")["pair"]["token"]
    arena.vote("Ada", token, "left", 5)
    with pytest.raises(UserError, match="you have voted on this pair"):
        arena.vote("Ada", token, "right", 5)
    assert len(arena.store.judgements()) == 1


@pytest.mark.parametrize("answer", ["LEFT", "", None, 1, ["left"], {"left": 1}, "left; DROP TABLE votes"])
def test_other_answers_are_refused(arena: Arena, answer: object) -> None:
    token = arena.next("Ada")["pair"]["token"]
    with pytest.raises(UserError, match="no such answer"):
        arena.vote("Ada", token, answer, 5)


@pytest.mark.parametrize("time", [-1, 10**12, 1.5, "5", None, True, float("nan")])
def test_other_times_are_refused(arena: Arena, time: object) -> None:
    token = arena.next("Ada")["pair"]["token"]
    with pytest.raises(UserError, match="no such time"):
        arena.vote("Ada", token, "left", time)


@pytest.mark.parametrize("rater", ["", " ", " Ada", "x" * 41, "two\nlines", "nul\0", None, 7, ["Ada"]])
def test_other_names_are_refused(arena: Arena, rater: object) -> None:
    with pytest.raises(UserError, match="1 to 40 characters"):
        arena.next(rater)
    assert arena.next("Ada Løvelace, 3rd")["pair"] is not None


# ----------------------------------------------------------------------------------------------------- the door


def through(
    guard: Guard, path: str = "/", method: str = "GET", body: bytes = b"", **headers: str
) -> tuple[int, str, Any]:
    """(status, text, headers) of a request that the guard is asked to let through."""
    sent: list[Any] = []
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(parts)

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:7860", **{name.replace("_", "-"): value for name, value in headers.items()}}
    listed = [(name.encode(), value.encode()) for name, value in named.items()]
    asyncio.run(guard({"type": "http", "method": method, "path": path, "headers": listed}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode(), {k.decode(): v.decode() for k, v in sent[0]["headers"]}


async def behind(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{RATER_NAMED.get()} {len(body)}".encode()})


OPEN = Guard(behind, password=None, hosts=LOOPBACK)


def test_the_page_is_let_through_with_headers_that_keep_it_at_home() -> None:
    for path in ("/", "/config", "/assets/index-1.js", "/theme.css"):
        status, text, headers = through(OPEN, path)
        assert (status, text) == (200, "None 0")
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert through(OPEN, "/gradio_api/component_server/", "POST", b"{}")[:2] == (200, "None 2")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://example.org/a.png",
        "/gradio_api/proxy=http://example.org/",
        "/gradio_api/queue/join",
        "/gradio_api/run/predict",
        "/gradio_api/info",
        "/assets/../../etc/passwd",
        "/static/..%2f..%2fetc/passwd",
        "/monitoring",
        "/login",
        "/file=/etc/passwd",
    ],
)
def test_what_the_page_does_not_need_is_not_there(path: str) -> None:
    assert through(OPEN, path)[0] == 404
    assert through(OPEN, path, "POST")[0] == 404


def test_other_methods_sites_and_names_are_refused() -> None:
    call = "/gradio_api/component_server"
    assert through(OPEN, call, "DELETE")[0] == 404
    assert through(OPEN, "/", "POST")[0] == 405
    assert through(OPEN, call, "POST", origin="http://example.org")[0] == 403
    assert through(OPEN, call, "POST", origin="null")[0] == 403
    assert through(OPEN, call, "POST", origin="http://127.0.0.1:7860")[0] == 200
    for host in ("example.org", "example.org:7860", "127.0.0.1.example.org", "", "[::1"):
        assert through(OPEN, host=host)[0] == 421
    assert through(OPEN, host="localhost:7860")[0] == 200
    assert through(OPEN, host="[::1]:7860")[0] == 200
    assert through(Guard(behind, password=None, hosts=None), host="gpu7:7860")[0] == 200


def test_large_requests_are_refused_whatever_they_say_of_themselves() -> None:
    call = "/gradio_api/component_server"
    assert through(OPEN, call, "POST", b"x" * LARGEST)[0] == 200
    assert through(OPEN, call, "POST", b"x" * (LARGEST + 1))[0] == 413
    assert through(OPEN, call, "POST", b"", content_length="99999999")[0] == 413
    assert through(OPEN, call, "POST", b"x" * (LARGEST + 1), content_length="5")[0] == 413


def test_a_password_is_demanded_of_every_request_and_brings_the_name() -> None:
    guard = Guard(behind, password="correct horse", hosts=None)
    status, _, headers = through(guard)
    assert status == 401 and headers["www-authenticate"].startswith("Basic ")
    right = tiny_arena.credentials("Ada Ü.", "correct horse")["Authorization"]
    assert through(guard, authorization=right)[:2] == (200, "Ada Ü. 0")
    for name, password in (("Ada", "wrong"), ("Ada", ""), ("", "correct horse"), ("x" * 41, "correct horse")):
        wrong = tiny_arena.credentials(name, password)["Authorization"]
        assert through(guard, authorization=wrong)[0] == 401
    for nonsense in ("Basic", "Basic !!!", "Bearer abc", "Basic " + base64.b64encode(b"\xff\xfe").decode()):
        assert through(guard, authorization=nonsense)[0] == 401


# ------------------------------------------------------------------------------------------- commands and tables


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "gpu7", "example.org", "127x"])
def test_other_machines_need_a_password(host: str) -> None:
    with pytest.raises(UserError, match="which needs a password"):
        command.require_safe(host, None)
    with pytest.raises(UserError, match="shorter than 8"):
        command.require_safe(host, "short")
    command.require_safe(host, "long enough")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    command.require_safe(host, None)


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.PASSWORD, raising=False)
    folders = [str(folder) for folder in tiny_arena.draw(tmp_path, ("base", "tuned"))]
    with pytest.raises(UserError, match="nothing to compare"):
        command.main([])
    with pytest.raises(UserError, match="two kinds of it"):
        command.main(["--images", *folders, "--answers", "a.jsonl"])
    with pytest.raises(UserError, match="needs a password"):
        command.main(["--images", *folders, "--host", "0.0.0.0"])
    with pytest.raises(UserError, match="there is no such folder"):
        command.main(["--images", *folders, "--votes", str(tmp_path / "no" / "votes.sqlite")])
    with pytest.raises(UserError, match="is not a port"):
        command.main(["--images", *folders, "--port", "70000"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port \d+ is in use .*Give another --port"):
            command.main(["--images", *folders, "--port", str(taken.getsockname()[1])])
    with pytest.raises(UserError, match="cannot listen at"):
        command.listening("203.0.113.1", 7860)
    assert not (tmp_path / "votes.sqlite").exists()


def test_the_standings_escape_what_others_named(tmp_path: Path) -> None:
    with arena_of(tmp_path, "<img src=x onerror=alert(1)>", "b&b", "third") as arena:
        for rater in ("<script>alert(2)</script>", "Ben"):
            vote_on_all(arena, rater)
        page = tables.render(arena.standings(), [("a note <b>", "rm -rf '<i>'")])
    for raw in ("<img", "<script", "onerror=alert(1)>", "<b>\n", "<i>"):
        assert raw not in page
    assert "&lt;script&gt;alert(2)" in page and "Krippendorff" in page and "Bradley-Terry" in page and "b&amp;b" in page
    assert "No votes yet" in tables.render(Arena.standings(_empty(tmp_path / "other")), [])


def _empty(root: Path) -> Arena:
    return arena_of(root)


def test_the_hint_is_the_commands(arena: Arena, tmp_path: Path) -> None:
    steps = hint.steps(arena.store.path, arena.sources, arena.programme)
    lines = [line for _, command_ in steps for line in command_.splitlines()]
    assert lines[0] == f"mmalign data import {tmp_path}/votes.sqlite --out {tmp_path}/votes-preferences"
    assert lines[1].startswith("mmalign train diffusion/dpo_own data.path=") and lines[1].endswith(" model.path=base")
    assert [line.split()[1] for line in lines] == ["data", "train", "sample", "sample", "arena"]
    assert lines[-1].endswith(
        f"--images {tmp_path}/votes-before {tmp_path}/votes-after --votes {tmp_path}/votes-again.sqlite"
    )


def test_the_hint_for_answers_names_a_recipe_of_their_model(tmp_path: Path) -> None:
    files = tiny_arena.answer(tmp_path, {"shapes-vlm": ["a dog"], "tuned": [""]})  # silence is an answer
    with Arena(tiny_arena.sources(tmp_path, answers=files), tmp_path / "votes.sqlite") as arena:
        steps = hint.steps(arena.store.path, arena.sources, arena.programme)
        assert {arena.next("Ada")["pair"][side]["text"] for side in ("left", "right")} == {"a dog", ""}
    lines = [line for _, command_ in steps for line in command_.splitlines()]
    assert lines[1].startswith("mmalign train vlm/dpo_shapes data.path=") and "model.path" not in lines[1]
    assert [line.split()[1] for line in lines] == ["data", "train", "generate", "generate", "arena"]
    for line in lines[1:2]:
        recipe = Path(__file__).parent.parent / "configs" / f"{line.split()[2]}.yaml"
        assert recipe.is_file()


def test_answers_as_mmalign_generate_writes_them(tmp_path: Path) -> None:
    for name, text in (("base", "a dog"), ("tuned", "a cat")):
        rows = [{"id": "0", "image": [], "prompt": "Say something.", "answer": text}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (tmp_path / "base.jsonl", tmp_path / "tuned.jsonl")
    programme = read_programme(tiny_arena.sources(tmp_path, answers=files))
    assert programme.contestants == ("base", "tuned") and programme.trials[0].unit.media is None
    row = {"image": ["0.png", "1.png"], "prompt": "What changed?", "answer": "all"}
    files[0].write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="expected one picture, got 2"):
        read_programme(tiny_arena.sources(tmp_path, answers=files))
