"""`prune --live`: a page on this machine alone that follows a run. It reads the run folder and changes nothing."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

from efficientllm.errors import ConfigError
from efficientllm.report.history import read_run
from efficientllm.report.page import render, waiting_page
from efficientllm.report.samples import stored_texts

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # anything else was led here by another site's name
REFRESH = 5  # seconds, at the least
SHARE = 0.02  # of the time that pages may take from the run, which computes in the same process


@contextmanager
def followed(run: str, port: int | None) -> Iterator[None]:
    """Serves the page of a run folder, there yet or not, while the block runs; nothing without a port.

    Args:
        port: 0 for any free one.

    Raises:
        ConfigError: if the port is taken.
    """
    if port is None:
        yield
        return
    try:
        server = Server(Path(run).expanduser(), port)
    except OSError as error:
        raise ConfigError(
            f"--live {port}: cannot serve a page on this port ({error.strerror}); omit the number"
        ) from None
    print(f"live page: {server.url}", flush=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class Server(ThreadingHTTPServer):
    """Serves one page; however many look at it, it is made once in a while."""

    def __init__(self, run: Path, port: int) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.run = run
        self._lock = Lock()
        self._page = b""
        self._refresh = REFRESH
        self._fresh_until = 0.0

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def page(self) -> bytes:
        """Returns the page as the run stands, or as it stood a moment ago."""
        with self._lock:
            if time.monotonic() >= self._fresh_until:
                start = time.monotonic()
                self._page = self._make()
                end = time.monotonic()
                self._refresh = max(REFRESH, math.ceil((end - start) / SHARE))
                self._fresh_until = end + self._refresh / 2
            return self._page

    def _make(self) -> bytes:
        try:
            run = read_run(self.run)
        except ConfigError:
            return waiting_page(self.run.name, self._refresh).encode()
        return render([run], [stored_texts(run)], self._refresh).encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # someone has closed the window
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.path != "/" or host not in NAMES:
            self.send_error(404 if host in NAMES else 403)
            return
        page = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the run's."""
