"""A web server on this machine for tests: with ranges and tags, and with the faults of real ones."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer:
    """What the server has, how it behaves, and what was asked of it.

    Attributes:
        files: content by path.
        requests: (path, range, further headers) of each request.
        cuts: by path, how often it ends the connection after `cut_at` bytes of a response.
        statuses: by path, the status that it sends instead of the file.
        redirects: by path, where it leads.
        logins: by path, the value of the header Authorization that it wants.
        ranges, tags: whether it has them.
        on_request: called with the path before it responds.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.cuts: dict[str, int] = {}
        self.cut_at = 1000
        self.statuses: dict[str, int] = {}
        self.redirects: dict[str, str] = {}
        self.logins: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.more: dict[str, str] = {}
        self.ranges = self.tags = self.lengths = True
        self.on_request: Callable[[str], object] = str
        self.address = ""

    def bytes_asked(self) -> list[str]:
        """Returns the ranges of all requests that read more than a first byte."""
        return [asked for _, asked, _ in self.requests if asked != "bytes=0-0"]


def respond(server: WebServer, handler: BaseHTTPRequestHandler) -> None:
    path = handler.path.partition("?")[0]
    asked = handler.headers.get("Range", "")
    server.requests.append((handler.path, asked, dict(handler.headers)))
    server.on_request(path)
    if path in server.redirects:
        handler.send_response(302)
        handler.send_header("Location", server.redirects[path])
        handler.end_headers()
        return
    status = server.statuses.get(path, 200 if path in server.files else 404)
    if server.logins.get(path) not in (None, handler.headers.get("Authorization")):
        status = 401
    if status != 200:
        handler.send_error(status)
        return
    content = server.files[path]
    tag = f'"{hashlib.md5(content).hexdigest()}"'
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if server.ranges else None
    condition = handler.headers.get("If-Range")
    start, end = 0, len(content)
    if found and condition in (None, tag):
        start, end = int(found[1]), int(found[2]) + 1 if found[2] else len(content)
        handler.send_response(206 if start < len(content) else 416)
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
    else:
        handler.send_response(200)
    if server.tags:
        handler.send_header("ETag", tag)
    if server.lengths:
        handler.send_header("Content-Length", str(max(0, end - start)))
    handler.send_header("Content-Type", server.kinds.get(path, "application/octet-stream"))
    for name, value in server.more.items():
        handler.send_header(name, value)
    handler.end_headers()
    part = content[start:end]
    if server.cuts.get(path) and len(part) > server.cut_at:
        server.cuts[path] -= 1
        part = part[: server.cut_at]
    with suppress(OSError):  # the client needed its headers alone
        handler.wfile.write(part)
    handler.close_connection = True


@contextmanager
def serve(respond_otherwise: Callable[[BaseHTTPRequestHandler], None] | None = None) -> Iterator[WebServer]:
    """Runs a server at a free port; another function may respond in its place."""
    about = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond_otherwise(self) if respond_otherwise else respond(about, self)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    about.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield about
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
