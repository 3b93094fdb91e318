"""What every test runs under: checked shapes and types, few threads, no network.

The import hook must be in place before any of our packages is imported, so it stands first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Before torch or a Hugging Face library is imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not burn the other core
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["MPLBACKEND"] = "Agg"

# Every annotated function of ours is checked at run time: shapes by jaxtyping, everything else by beartype,
# which takes an int for a float as every other type checker does.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["mmalign", "evaluators", "diffusion", "vlm"], CHECKER)


# The same examples in every run: a change is judged by what it changes, not by the luck of a draw.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


class NetworkUse(AssertionError):
    """A test reached for another machine."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = str(address[0])
    return host in ("", "localhost", "::1", socket.gethostname()) or host.startswith(("127.", "::ffff:127."))


def _guard(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(sock: socket.socket, address: Any) -> Any:
        if not _is_local(address):
            raise NetworkUse(f"a test tried to connect to {address!r}; tests use loopback only")
        return connect(sock, address)

    return guarded


def _resolve_local(host: Any, *rest: Any, **named: Any) -> Any:
    if host is not None and not _is_local((host if isinstance(host, str) else host.decode(), 0)):
        raise NetworkUse(f"a test tried to look up {host!r}; tests use loopback only")
    return _getaddrinfo(host, *rest, **named)


_getaddrinfo = socket.getaddrinfo
socket.getaddrinfo = _resolve_local
# Class attributes, so that every library that opens a socket in this process meets them.
socket.socket.connect = _guard(socket.socket.connect)  # type: ignore[method-assign]  # the point of the guard
socket.socket.connect_ex = _guard(socket.socket.connect_ex)  # type: ignore[method-assign]  # likewise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last, otherwise in their order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
