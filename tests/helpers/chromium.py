"""A real headless Chromium, spoken to over a pipe (its DevTools protocol): pages, screenshots, the console."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0  # seconds


class Chromium:
    """One browser with one page; `console` holds every message, error and exception of the page."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        mine = [os.pipe(), os.pipe()]
        (read_commands, self._commands), (self._answers, write_answers) = mine
        # the browser reads from 3 and writes to 4; numbers above stay clear of both while they are moved
        ends = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (read_commands, write_answers)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += ["--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking", "about:blank"]
        moved = 'exec "$@" 3<&{} 4>&{}'.format(*ends)
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", CHROMIUM, *flags],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (read_commands, write_answers, *ends):
            os.close(each)
        os.set_blocking(self._answers, False)
        self._number, self._buffer, self._session = 0, b"", ""
        self.console: list[str] = []
        self._events: list[str] = []
        (target,) = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the result of one command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, url: str, width: int, *, phone: bool = False, dark: bool = False, script: bool = True) -> None:
        """Loads a page in a window of `width` pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self._events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._note(self._next())

    def evaluate(self, expression: str) -> Any:
        """Returns what a JavaScript expression gives, as JSON knows it; works on pages that may run no script."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> bytes:
        """Writes the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path.read_bytes()

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._events.append(method)
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(json.dumps(params))
        if method == "Network.requestWillBeSent":
            self._events.append(f"request {params['request']['url']}")

    @property
    def requests(self) -> list[str]:
        """Addresses that the last page has asked for, its own included."""
        return [event.removeprefix("request ") for event in self._events if event.startswith("request ")]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert time.monotonic() < end and self._process.poll() is None, "the browser does not answer"
            try:
                self._buffer += os.read(self._answers, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))
