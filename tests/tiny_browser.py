"""A headless Chromium for tests, spoken to over a pipe in its DevTools protocol: no package, no driver, no port.

    with Browser() as browser:
        browser.open("http://127.0.0.1:7860")
        browser.wait("document.querySelector('button')")
        browser.click("button")
        browser.press("t")
        browser.screenshot(path)

`find()` says where a browser is, or None; MMALIGN_CHROMIUM names one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
PATIENCE = 60.0  # seconds; a busy machine takes its time


def find() -> str | None:
    """The path of a Chromium, or None."""
    return os.environ.get("MMALIGN_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, width: int = 1280, height: int = 860) -> None:
        program = find()
        assert program is not None, "there is no Chromium"
        self.folder = tempfile.mkdtemp(prefix="mmalign-chromium-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",  # tests often run as root in a container, where the sandbox cannot
            "--remote-debugging-pipe",
            f"--user-data-dir={self.folder}",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--no-proxy-server",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--hide-scrollbars",
            "about:blank",
        ]

        # The protocol's pipes are descriptors 3 and 4 of the browser: the shell puts them there.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', program, *flags],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._count, self._session = b"", 0, ""
        self.console: list[str] = []
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._send({"id": 0, "method": "Browser.close"})
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------- the protocol

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._send(message)
        while True:
            answer = self._receive()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            part = os.read(self._read, 2**20) if ready else b""
            assert part, "the browser says nothing"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        about = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.console.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
        elif message.get("method") == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.console.append(str([item.get("value", item.get("description")) for item in about["args"]]))
        elif message.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.console.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif message.get("method") == "Network.requestWillBeSent":
            self.requested.append(about["request"]["url"])
        return message

    # ------------------------------------------------------------------------------------------------ the page

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def reload(self) -> None:
        """Load the page again, and wait until the old one is gone."""
        self.run("window.stale = true")
        self.call("Page.reload")
        self.wait("!window.stale")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = PATIENCE) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):  # the page is being loaded
                value = self.run(f"(() => {{ const it = {script}; return it instanceof Node ? true : it; }})()")
                if value:
                    return value
            time.sleep(0.03)
        raise AssertionError(f"never true: {script}; the console says {self.console[-5:]}")

    def press(self, key: str) -> None:
        """A key, pressed and let go."""
        code = {" ": "Space", "Enter": "Enter"}.get(key, f"Key{key.upper()}")
        typed = {"code": code, "key": key, "windowsVirtualKeyCode": 13 if key == "Enter" else ord(key.upper())}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else key, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **typed)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The mouse's left button in the middle of an element."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def wheel(self, selector: str, delta: float) -> None:
        """The mouse's wheel over the middle of an element."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)

    def drag(self, selector: str, across: float) -> None:
        """The mouse's left button pressed in the middle of an element and let go elsewhere."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + across, y=y, button="left")
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + across, y=y, button="left", clickCount=1)

    def _middle(self, selector: str) -> tuple[float, float]:
        script = (
            "(selector) => { const found = document.querySelector(selector); found.scrollIntoView({block: 'nearest'}); "
            "const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }"
        )
        x, y = self.run(f"({script})({json.dumps(selector)})")
        return x, y

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and whether the person likes it dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path) -> None:
        """What is in the window, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
