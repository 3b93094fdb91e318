"""The server: Gradio's page behind the guard, on a socket that is bound already."""

from __future__ import annotations

import contextlib
import socket
import warnings

import fastapi
import gradio as gr
import uvicorn

from evaluators.arena import page
from evaluators.arena.guard import LOOPBACK, App, Guard
from evaluators.arena.server import Arena

SPACE = (
    ".gradio-container { padding: 8px 12px !important; } .tabitem { padding: 10px 0 !important; border: 0 !important; }"
)


def application(arena: Arena, *, password: str | None, loopback: bool) -> App:
    """The page as an ASGI application.

    Args:
        loopback: whether it is reached under the names of this machine alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about libraries
        blocks = page.build(arena, named=password is not None)
        mounted = gr.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None),
            blocks,
            path="/",
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=SPACE,
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            max_file_size=1,
            show_error=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
    return Guard(mounted, password=password, hosts=LOOPBACK if loopback else None)


def serve(arena: Arena, bound: socket.socket, *, password: str | None, loopback: bool) -> None:
    """Serve until the process is told to stop (Ctrl-C or SIGTERM)."""
    app = application(arena, password=password, loopback=loopback)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
    )
    with contextlib.suppress(KeyboardInterrupt):  # raised again after everything was closed
        uvicorn.Server(settings).run(sockets=[bound])
