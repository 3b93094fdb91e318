"""What the page asks for: the next pair, a vote, undoing it, which model was which, the standings.

Every argument comes from a browser, so every argument is checked. A browser holds a random token for each pair that it
was shown; it never names a file, an address, a model or a trial, and is never told one before its vote.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evaluators.arena.live import Live
from evaluators.arena.standings import Standings, standings
from evaluators.arena.trials import Entry, Sources, Trial, choose, left_of, read_programme
from evaluators.arena.views import packed
from evaluators.arena.votes import ANSWERS, LONGEST, RATER, Cast, Shown, VoteStore
from mmalign.errors import UserError
from mmalign.records import shown as said

_TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")


class Arena:
    """The pairs, the votes, and who sees what. Its methods may be called from several threads.

    Args:
        sources: where the pairs come from.
        votes: the file of the votes, made if there is none.
        seed: of the order of pairs and of the sides.
        live: draws pairs into the sources meanwhile.

    Raises:
        UserError: the sources cannot be read or nothing in them can be compared; then no file is made.
    """

    def __init__(self, sources: Sources, votes: Path, *, seed: int = 0, live: Live | None = None) -> None:
        self.sources, self.seed, self.live = sources, seed, live
        self._lock = threading.RLock()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._damaged: set[str] = set()
        self._stamp, self.programme = sources.stamp(), read_programme(sources, seed=seed)
        self.store = VoteStore.open(votes)
        self._keep()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self.store.close()

    def _keep(self) -> None:
        self.store.add(self.programme.trials)
        self._known = {trial.trial_id: trial for trial in self.programme.trials}

    # -------------------------------------------------------------------------------------- what the page calls

    def next(self, rater: object) -> dict[str, Any]:
        """The pair that the rater is looking at, or the next one.

        Raises:
            UserError: this is no name for a rater.
        """
        name = rater_of(rater)
        while True:
            drawing = (
                self.live is not None and self.live.drawing
            )  # before looking: what is drawn meanwhile is found next
            with self._lock:
                found = self._give(name)
            if self.live is not None:
                # of its own: the file of the votes may know pairs of other models too
                self.live.looked_at(len(self.store.looked_at() & self._known.keys()))
            if found is None:
                return {"pair": None, **self._state(name), "drawing": drawing}
            shown, trial = found
            try:
                pair = self._pair(shown, trial)
            except UserError as error:  # a picture that was deleted or damaged since: nobody can vote on it
                print(f"left out: {error}", flush=True)
                self._damaged.add(trial.trial_id)
                continue
            self._ahead.submit(self._prepare, name, trial)
            return {"pair": pair, **self._state(name)}

    def vote(self, rater: object, token: object, answer: object, milliseconds: object) -> dict[str, Any]:
        """Write a vote down and go on to the next pair.

        Args:
            token: of the pair, as it was given to this rater.
            answer: left, right, tie, bad or skip.
            milliseconds: how long the rater looked.

        Raises:
            UserError: anything else than that, or a second vote on the same pair.
        """
        name = rater_of(rater)
        shown = self._of(name, token)
        known = next((one for one in ANSWERS if one == answer), None)
        if known is None:
            raise UserError(f"no such answer: {said(answer)}")
        if not isinstance(milliseconds, int) or isinstance(milliseconds, bool) or not 0 <= milliseconds <= LONGEST:
            raise UserError(f"no such time: {said(milliseconds)}")
        self.store.vote(shown, known, milliseconds)
        return self.next(name)

    def undo(self, rater: object, token: object) -> dict[str, Any]:
        """Take the rater's latest vote back and show its pair again.

        Raises:
            UserError: the token is not that vote's, or the rater knows already which model was which.
        """
        name = rater_of(rater)
        shown, last = self._of(name, token), self.store.last(name)
        if last is None or last.shown.token != shown.token:
            raise UserError("only the latest vote can be undone")
        self.store.retract(last)
        self.store.show(name, shown.trial, shown.left)  # the one looked at last: it is next
        return self.next(name)

    def reveal(self, rater: object, token: object) -> dict[str, Any]:
        """A pair that the rater has voted on, with the names of its models. The vote stands from now on.

        Raises:
            UserError: there is no vote of the rater on this pair.
        """
        name = rater_of(rater)
        shown = self._of(name, token)
        cast = self.store.cast(shown)
        trial = self._known.get(shown.trial)
        if cast is None or trial is None:
            raise UserError("the models are told after the vote", fix="Vote first.")
        self.store.reveal(cast)
        left, right = _sides(shown, trial)
        sides = {"left": left, "right": right}
        names = {side: {"name": entry.contestant, "model": entry.model or ""} for side, entry in sides.items()}
        return {"pair": self._pair(shown, trial), "answer": cast.answer, "names": names, **self._state(name)}

    @property
    def total(self) -> int:
        """Pairs, those that are still to be drawn among them."""
        return max(len(self._known), self.live.total if self.live else 0)

    def standings(self) -> Standings:
        """What all votes say so far."""
        return standings(self.store.judgements(), self.programme.contestants)

    # ------------------------------------------------------------------------------------------------ the rest

    def _of(self, rater: str, token: object) -> Shown:
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise UserError("this is not the token of a pair")
        shown = self.store.shown(token, rater)
        if shown is None:
            raise UserError("this pair was not shown to you", fix="Load the page again.")
        return shown

    def _give(self, rater: str) -> tuple[Shown, Trial] | None:
        done = self.store.done_by(rater) | self._damaged
        open_ones = [trial for trial in self.store.looking_at(rater) if trial in self._known and trial not in done]
        work = self.store.work_on(rater)
        trial = self._known[open_ones[0]] if open_ones else choose(self.programme.trials, done, work)
        if trial is None and self.sources.stamp() != self._stamp:  # something was drawn since
            try:
                stamp, programme = self.sources.stamp(), read_programme(self.sources, seed=self.seed)
                self._stamp, self.programme = stamp, programme
                self._keep()
            except UserError as error:  # a line that is being written: it is whole the next time
                print(f"not read yet: {error}", flush=True)
            trial = choose(self.programme.trials, done, work)
        if trial is None:
            return None
        return self.store.show(rater, trial.trial_id, left_of(trial.trial_id, rater, self.seed)), trial

    def _pair(self, shown: Shown, trial: Trial) -> dict[str, Any]:
        left, right = _sides(shown, trial)
        return {
            "token": shown.token,
            "prompt": trial.unit.prompt,
            "media": packed(trial.unit.media) if trial.unit.media else None,
            "left": _content(left),
            "right": _content(right),
        }

    def _state(self, rater: str) -> dict[str, Any]:
        last = self.store.last(rater)
        mine = self.store.done_by(rater) & self._known.keys()
        return {
            "last": None if last is None else _told(last),
            "done": len(mine),
            "total": self.total,
            "covered": len(self.store.voted_on() & self._known.keys()),
            "trouble": self.live.trouble if self.live else None,
        }

    def _prepare(self, rater: str, current: Trial) -> None:
        """Decode the pictures that will probably come next while the rater looks at the present ones."""
        done = self.store.done_by(rater) | self._damaged | {current.trial_id}
        coming = choose(self.programme.trials, done, self.store.work_on(rater))
        for media in (coming.unit.media, coming.a.image, coming.b.image) if coming else ():
            if media is not None:
                packed(media)


def rater_of(value: object) -> str:
    """A rater's name, checked: 1 to 40 characters, none of them a control character.

    Raises:
        UserError: anything else.
    """
    if not isinstance(value, str) or not RATER.fullmatch(value):
        raise UserError("a rater's name has 1 to 40 characters", fix="Give another name.")
    return value


def _sides(shown: Shown, trial: Trial) -> tuple[Entry, Entry]:
    return (trial.a, trial.b) if shown.left == "a" else (trial.b, trial.a)


def _content(entry: Entry) -> Mapping[str, str]:
    return {"text": entry.text or ""} if entry.image is None else {"image": packed(entry.image)}


def _told(cast: Cast) -> dict[str, Any]:
    return {"token": cast.shown.token, "answer": cast.answer, "revealed": cast.revealed}
