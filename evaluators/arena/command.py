"""Votes between models, blindly, in a browser; the votes are training data.

    mmalign arena --images pictures/base pictures/dpo              folders of `mmalign sample`, the base first
    mmalign arena --answers answers/base.jsonl answers/dpo.jsonl   lines {image, prompt, answer, model}
    mmalign arena live runs/dpo --prompts prompts.txt --out votes  pairs drawn while people vote
    mmalign data import pictures/votes.sqlite --out store          the votes as preferences

The page is at this machine alone unless --host says otherwise, which demands a password: each rater gives a name of
their own with it. Every vote is on the disk before the next pair is shown; the same command goes on where it was.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser, resolve
from mmalign.errors import UserError

if TYPE_CHECKING:
    from evaluators.arena.live import Live
    from evaluators.arena.trials import Sources

PASSWORD = "MMALIGN_ARENA_PASSWORD"
LEAST = 8  # characters of a password


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign arena --images FOLDER ... | --answers FILE ...`."""
    parser = Parser(prog="mmalign arena", description=__doc__)
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], metavar="FOLDER", help="what models drew, the base first"
    )
    parser.add_argument(
        "--answers", type=Path, nargs="+", default=[], metavar="FILE", help="what models answered, JSON lines"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of pairs and sides (default: %(default)s)")
    add_page(parser)
    said = parser.parse_args(argv)
    if bool(said.images) == bool(said.answers):
        raise UserError("nothing to compare, or two kinds of it", fix="Give --images FOLDER ... or --answers FILE ...")

    from evaluators.arena.trials import Sources, find_root

    with opened(said) as bound:
        found = find_root([*said.images, *said.answers])
        near = Path(os.path.relpath(found)) if found.is_relative_to(Path.cwd()) else found
        votes = said.votes or near / "votes.sqlite"
        sources = Sources(root=votes.parent.resolve(), folders=tuple(said.images), answers=tuple(said.answers))
        hold(bound, sources, votes, said)
    return 0


def add_page(parser: Parser) -> None:
    """Add where the page is and where its votes go."""
    parser.add_argument(
        "--votes", type=Path, help="where votes are kept (default: votes.sqlite in the folder of the sources)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--password", help=f"demanded of every rater; better in the environment as {PASSWORD}")


def opened(said: Any) -> socket.socket:
    """A socket that listens where the command line says.

    Raises:
        UserError: the place is taken, or reached by others without a password.
    """
    require_safe(said.host, _password(said))
    return listening(said.host, said.port)


def _password(said: Any) -> str | None:
    return said.password or os.environ.get(PASSWORD) or None


def require_page() -> None:
    """Refuse before anything that takes time is done.

    Raises:
        UserError: what serves the page is not installed, and which extra brings it.
    """
    resolve("evaluators.arena.web:serve")


def hold(bound: socket.socket, sources: Sources, votes: Path, said: Any, live: Live | None = None) -> None:
    """Serve the page until it is stopped, then say what the votes say.

    Args:
        votes: the file of the votes.
        live: what draws pairs into the sources meanwhile.

    Raises:
        UserError: the sources or the votes cannot be used.
    """
    from evaluators.arena.server import Arena
    from evaluators.arena.standings import lines_of

    if not votes.parent.is_dir():
        raise UserError("there is no such folder", place=str(votes.parent))
    with Arena(sources, votes, seed=said.seed, live=live) as arena:
        require_page()
        from evaluators.arena.web import serve

        shown = f"[{said.host}]" if ":" in said.host else said.host
        print(
            f"Vote at http://{shown}:{bound.getsockname()[1]}  ({arena.total} pairs of "
            f"{', '.join(arena.programme.contestants)}; votes in {votes}; Ctrl-C stops)",
            flush=True,
        )
        serve(arena, bound, password=_password(said), loopback=is_loopback(said.host))
        print(*lines_of(arena.standings()), sep="\n")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def require_safe(host: str, password: str | None) -> None:
    """An open page on a network is a page for everybody.

    Raises:
        UserError: there is no password where one is needed, or a short one.
    """
    if password is None and not is_loopback(host):
        raise UserError(
            f"'{host}' can be reached from other machines, which needs a password",
            place="--host",
            fix=f"Set {PASSWORD} or give --password, or listen at 127.0.0.1.",
        )
    if password is not None and len(password) < LEAST:
        raise UserError(f"the password is shorter than {LEAST} characters", place="--password")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the port is taken or not allowed, or the address is not one of this machine's.
    """
    if not 0 <= port < 65536:
        raise UserError(f"{port} is not a port", place="--port", fix="Use 1 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except (OSError, UnicodeError) as error:
        bound.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use", place=host, fix="Give another --port.") from error
        raise UserError(f"cannot listen at {host}:{port}: {error}", place="--host") from error
    return bound
