"""A page in a headless Chromium, driven over the DevTools protocol by a pipe: no package is needed beside the browser.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

#: Names of the browser in Debian and elsewhere.
NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update")  # fmt: skip


def browser() -> str | None:
    """Path of a browser; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _as_3_and_4(read: int, write: int) -> None:
    """Make two descriptors 3 and 4, from which the browser reads commands and to which it answers."""
    read, write = (fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (read, write))
    os.dup2(read, 3)
    os.dup2(write, 4)


class Page:
    """One page of one browser. ``events``: what the browser has reported, by method and parameters."""

    def __init__(self, profile: Path, *, javascript: bool = True) -> None:
        path = browser()
        assert path is not None
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        command = [path, *_OPTIONS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            command, pass_fds=(3, 4), stderr=subprocess.DEVNULL, preexec_fn=lambda: _as_3_and_4(read, write)
        )
        os.close(read)
        os.close(write)
        self._buffer, self._number = b"", 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if not javascript:
            self.call("Emulation.setScriptExecutionDisabled", value=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its result. Events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        if "method" in answer:
            self.events.append((answer["method"], answer["params"]))
        return answer

    def open(self, file: Path, *, width: int, dark: bool) -> None:
        """Load a file in a window of some width, and wait until it is drawn."""
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[look])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression, or of the promise that it makes."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self.events.clear()
        self._session = None
        self.call("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)
