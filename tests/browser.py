"""Headless Chromium, driven over its DevTools pipe: no driver, no port, no package.

Protocol: JSON messages that end in a NUL byte, on file descriptors 3 (to the browser) and 4 (from it), where it is
started with --remote-debugging-pipe (https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT_SECONDS = 60.0


def find_chromium() -> str | None:
    """$CHROMIUM, or the first of the usual names on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here; set CHROMIUM to one")


class Browser:
    """One page. `errors` gathers what the page's scripts threw, and `requests` every address it asked for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            found = os.read(self._from, 1 << 20)
            assert found, "the browser has ended"
            self._buffer += found
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: Mapping[str, Any]) -> None:
        kind, what = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(what["exceptionDetails"]))
        elif kind == "Log.entryAdded":
            self.errors.append(what["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])

    def open(self, page: Path, width: int = 1000, height: int = 900, **media: str) -> None:
        """media: as prefers_color_scheme="dark"."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send("Page.navigate", url=page.absolute().as_uri())
        while self.run("document.readyState") != "complete":
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression in the page, through JSON. (DevTools may, where the page's policy lets no one.)"""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def place(self, selector: str) -> dict[str, float]:
        """x, y, width, height of an element, scrolled into view."""
        box = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const {x, y, width, height} = e.getBoundingClientRect();"
            " return {x, y, width, height}; })()"
        )
        return dict(self.run(box))

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """kind: mousePressed, mouseMoved or mouseReleased."""
        held = "none" if kind == "mouseMoved" and not clicks else "left"
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=held, buttons=int(clicks > 0), clickCount=clicks
        )

    def click(self, selector: str) -> None:
        box = self.place(selector)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, 1)
        self.mouse("mouseReleased", x, y, 1)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, whole: bool = True) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(shot["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def printed(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser whose profile lies in the folder; it ends with the block."""
    chromium = find_chromium()
    assert chromium is not None
    into, out = os.pipe(), os.pipe()
    started = (
        f'exec "$0" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --lang=en '
        f'--no-first-run --disable-background-networking --remote-debugging-pipe --user-data-dir="$1" '
        f"3<&{into[0]} 4>&{out[1]}"
    )
    process = subprocess.Popen(
        ["bash", "-c", started, chromium, str(profile)], pass_fds=(into[0], out[1]),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(into[0])
    os.close(out[1])
    try:
        yield Browser(into[1], out[0])
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(into[1])
        os.close(out[0])
