"""The page: two tabs of Gradio, each one component whose script calls the functions of `evaluators.arena.server`.

Nothing of Gradio's queue, files or uploads takes part: a call is one small request, and pictures are in its answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and again at its start

import gradio as gr

from evaluators.arena import hint, tables
from evaluators.arena.guard import RATER_NAMED
from evaluators.arena.server import Arena
from mmalign.errors import UserError

_KEYS = {
    "next": (),
    "vote": ("token", "answer", "milliseconds"),
    "undo": ("token",),
    "reveal": ("token",),
}


def build(arena: Arena, *, named: bool) -> gr.Blocks:
    """The page.

    Args:
        named: raters are known by the name that they gave with the password, and are not asked for another.
    """
    page = gr.Blocks(title="mmalign arena", analytics_enabled=False, fill_width=True)
    with page, gr.Tabs():
        with gr.Tab("Vote"):
            gr.HTML(
                html_template=_read("page.html"),
                css_template=_read("page.css"),
                js_on_load=_read("page.js"),
                apply_default_css=False,
                server_functions=[_call(arena, name, named=named) for name in _KEYS],
                named=named,
            )
        with gr.Tab("Standings"):
            gr.HTML(
                html_template='<div class="board"></div>',
                css_template=_read("standings.css"),
                js_on_load=_read("standings.js"),
                apply_default_css=False,
                server_functions=[_board(arena)],
            )
    return page


def _call(arena: Arena, name: str, *, named: bool) -> Callable[[Any], dict[str, Any]]:
    """A function of the arena as the page's script calls it: an object in, an object out, a refusal as its sentence."""
    function, keys = getattr(arena, name), _KEYS[name]

    def call(ask: Any) -> dict[str, Any]:
        if not isinstance(ask, dict) or not set(ask) <= {"rater", *keys} or not set(keys) <= set(ask):
            return {"error": "this is not a request of the page"}
        rater = RATER_NAMED.get() if named else ask.get("rater")
        try:
            return {**function(rater, *(ask[key] for key in keys)), "rater": rater}
        except UserError as error:
            return {"error": str(error)}

    call.__name__ = name
    return call


def _board(arena: Arena) -> Callable[[Any], dict[str, Any]]:
    steps = hint.steps(arena.store.path, arena.sources, arena.programme)

    def board(ask: Any) -> dict[str, Any]:
        return {"html": tables.render(arena.standings(), steps)}

    return board


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
