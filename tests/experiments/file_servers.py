"""A web server on this machine that behaves badly on request: what downloads are tested against."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """How one request is answered.

    Attributes:
        content: the file at that time.
        status: another status than 200 or 206, with no body.
        ranges: whether Range is honoured.
        conditions: whether If-Range is.
        shift: the part that is sent begins so many bytes earlier than asked for.
        cut: the connection ends after so many bytes of the body.
        etag, modified: validators, empty for none.
        length: whether Content-Length is sent.
        chunked: body in chunks, with no length.
        delay: seconds before the body.
        drip: seconds between single bytes of the body.
        location: redirect to this address.
        retry_after: header of that name.
    """

    content: bytes = b""
    status: int = 0
    ranges: bool = True
    conditions: bool = True
    shift: int = 0
    cut: int | None = None
    etag: str = ""
    modified: str = ""
    length: bool = True
    chunked: bool = False
    delay: float = 0.0
    drip: float = 0.0
    location: str = ""
    retry_after: str = ""


@dataclass
class Server:
    """Answers in turn, the last one for good; remembers the requests."""

    answers: list[Answer]
    url: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0

    def next(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    """A server on a free port of 127.0.0.1."""
    record = Server(list(answers))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with lock:
                answer = record.next()
                record.requests.append(dict(self.headers) | {"path": self.path})
            self.close_connection = True
            with suppress(BrokenPipeError, ConnectionResetError):
                self._answer(answer)

        def _answer(self, answer: Answer) -> None:
            start, status = 0, 200
            if answer.status or answer.location:
                self.send_response(answer.status or 302)
                if answer.location:
                    self.send_header("Location", answer.location)
                if answer.retry_after:
                    self.send_header("Retry-After", answer.retry_after)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wanted = self.headers.get("Range")
            if wanted and answer.ranges:
                condition = self.headers.get("If-Range")
                if condition is None or not answer.conditions or condition in (answer.etag, answer.modified):
                    start, status = int(wanted.removeprefix("bytes=").removesuffix("-")) - answer.shift, 206
            if status == 206 and start >= len(answer.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(answer.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = answer.content[start:]
            self.send_response(status)
            for name, value in (("ETag", answer.etag), ("Last-Modified", answer.modified)):
                if value:
                    self.send_header(name, value)
            if status == 206:
                last = len(answer.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(answer.content)}")
            if answer.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif answer.length:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.flush()
            time.sleep(answer.delay)
            shown = body if answer.cut is None else body[: answer.cut]
            if answer.chunked:
                for at in range(0, len(shown), 1000):
                    piece = shown[at : at + 1000]
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                if answer.cut is None:
                    self.wfile.write(b"0\r\n\r\n")
            elif answer.drip:
                for at in range(len(shown)):
                    self.wfile.write(shown[at : at + 1])
                    self.wfile.flush()
                    time.sleep(answer.drip)
            else:
                self.wfile.write(shown)
            record.sent += len(shown)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    record.url = f"http://127.0.0.1:{server.server_address[1]}/data.bin"
    try:
        yield record
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
