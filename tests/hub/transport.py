"""HTTP below the loopback Hub: bodies, ranges, and connections that break on demand."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote


@dataclass
class Fault:
    """The next `times` requests of this method whose path contains `part` fail: an answer with `status`, or cut off after `cut` bytes.

    page: the answer is HTML, as proxies send it.
    late: the request is carried out, and the answer is what fails. do: runs before the request is looked at.
    """

    method: str
    part: str
    status: int = 0
    cut: int = -1
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False
    page: bool = False
    do: Callable[[], Any] | None = None


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class Cut(Exception):
    pass


class FaultyHandler(BaseHTTPRequestHandler):
    """Answers with route(body), unless a fault was injected."""

    hub: Any  # .lock, .log, .ranges, .faults
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, Cut):  # the other side went away, or was cut off
            super().handle_one_request()
            return
        self.close_connection = True

    # One request

    def serve(self) -> None:
        self.raw, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        with self.hub.lock:
            self.hub.log.append((self.command, unquote(self.raw)))
            self.hub.ranges += [wanted] if (wanted := self.headers.get("Range")) else []
            fault = next((f for f in self.hub.faults if f.times and f.method == self.command and f.part in unquote(self.raw)), None)
            if fault:
                fault.times -= 1
        if fault and fault.do:
            fault.do()
        self.cut_after = fault.cut if fault and self.command == "GET" else -1
        body = self._body(fault.cut if fault and self.command != "GET" and not fault.late else -1)
        status, reply = 200, b""
        headers: dict[str, str] = {}
        try:
            if fault and fault.status and not fault.late:
                raise Refused(fault.status, "injected")
            with self.hub.lock:
                status, reply, headers = self.route(body)
            if fault and fault.late:
                if fault.cut >= 0:
                    self._break()
                raise Refused(fault.status, "injected")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            headers |= fault.headers if fault else {}
            status, reply = refused.status, json.dumps({"error": refused.message, **refused.body}).encode()
            reply = b"<html>" if fault and fault.page else reply
        self._reply(status, reply, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def _body(self, cut: int) -> bytes:
        content = bytearray()
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                content += self.rfile.read(size)
                self.rfile.readline()
                if 0 <= cut <= len(content):
                    self._break()
            self.rfile.readline()
            return bytes(content)
        length = int(self.headers.get("Content-Length") or 0)
        if cut >= 0:
            self.rfile.read(min(cut, length))
            self._break()
        return self.rfile.read(length)

    def _break(self) -> None:
        """Reset the connection, as a router that dies would."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        raise Cut

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if status == 200 else None
        total = len(content)
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or total - 1)
            status, content = 206, content[first : last + 1]
            headers = {**headers, "Content-Range": f"bytes {first}-{min(last, total - 1)}/{total}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if 0 <= self.cut_after < len(content):
            self.wfile.write(content[: self.cut_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            raise Cut
        self.wfile.write(content)

    def route(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        raise NotImplementedError
