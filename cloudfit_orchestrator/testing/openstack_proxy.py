"""A reverse proxy before OpenStack's APIs that records every call and, on demand, spoils one of them.

Clients are given its own address for Keystone; it writes its own addresses over those in catalogues and version
documents, so that every further call comes by here too. Under each fault the cloud stays real: a call that is cut after
it was carried out *was* carried out.
"""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

UPSTREAM_TIMEOUT_S = 300.0  # an API of a small machine under load
STALL_S = 120.0  # a stalled answer; the client gives up before
_ID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}")
_PLACE = re.compile(r"^/@([\d.]+):(\d+)(/.*)?$")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding", "date", "server"}


class Fault(StrEnum):
    """What becomes of one call. The first three are not carried out, the others are, once or twice."""

    REFUSED = "502 before"  # the load balancer has nobody to ask
    LIMITED = "429"  # with Retry-After
    EXPIRED = "401"  # the token has expired
    FAILED = "500 after"  # carried out, then the answer is an error
    UNAVAILABLE = "503 after"  # the same with Retry-After
    CONFLICT = "409 before"  # another task has the object at the moment; not carried out
    CUT = "cut after"  # carried out, then the connection ends without an answer
    DOUBLED = "sent twice"  # a proxy in between repeats the request; the second answer is given
    STALLED = "stall after"  # carried out, and no answer comes
    SPOILT = "HTML after"  # 200 with a page of HTML
    EMPTY = "other JSON after"  # 200 with a document that is none of this call
    HALF = "half after"  # the answer breaks off in the middle of its body


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as it came."""

    number: int  # from 1, of those that are counted
    method: str
    service: str  # host:port of the real API
    path: str  # with {id} for ids, without the query
    microversion: str
    status: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class _Plan:
    at: int
    fault: Fault


class Proxy:
    """The proxy on a free port of loopback. `keystone`: URL of the real one."""

    def __init__(self, keystone: str) -> None:
        self._keystone = keystone
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._plan: _Plan | None = None
        self._count = 0
        self.calls: list[Call] = []
        self.spoilt: Call | None = None
        self.address = ""

    @property
    def keystone(self) -> str:
        """Keystone's URL by way of the proxy."""
        return self._own(self._keystone)

    def spoil(self, at: int, fault: Fault) -> None:
        """Spoil the call number `at` from now on, once."""
        with self._lock:
            self._plan, self._count, self.spoilt, self.calls = _Plan(at, fault), 0, None, []

    def watch(self) -> None:
        """Spoil nothing; count from now on."""
        with self._lock:
            self._plan, self._count, self.spoilt, self.calls = None, 0, None, []

    def _own(self, url: str) -> str:
        parts = urlsplit(url)
        return f"http://{self.address}/@{parts.hostname}:{parts.port or 80}{parts.path}"

    @contextmanager
    def serving(self) -> Iterator["Proxy"]:
        """Serve until the block ends."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one packet

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
                del format, args

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client went away: many faults make it
                    self.close_connection = True

            def _serve(self) -> None:
                proxy._serve(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _serve  # noqa: N815

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.address = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._released.set()
            server.shutdown()
            thread.join()
            server.server_close()

    # One call

    def _serve(self, client: BaseHTTPRequestHandler) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        place = _PLACE.match(client.path)
        if place is None:
            client.send_error(404, "not a path of the proxy")
            return
        where, path = f"{place[1]}:{place[2]}", place[3] or "/"
        call, fault = self._note(client, where, path)
        before = {
            Fault.REFUSED: (502, {}), Fault.LIMITED: (429, {"Retry-After": "0.2"}), Fault.EXPIRED: (401, {}),
            Fault.CONFLICT: (409, {}),
        }  # fmt: skip
        if fault in before:
            status, headers = before[fault]
            self._answer(client, status, {"error": {"message": str(fault), "code": status}}, headers)
            return
        status, headers, answer = self._forward(client, where, path, body)
        if fault is Fault.DOUBLED:
            status, headers, answer = self._forward(client, where, path, body)
        self._noted(call, status)
        self._spoil(client, fault, status, headers, answer)

    def _note(self, client: BaseHTTPRequestHandler, where: str, path: str) -> tuple[Call, Fault | None]:
        """Count the call, unless it is Keystone's or a version document: those carry no object of ours."""
        plain = _ID.sub("{id}", urlsplit(path).path)
        version = client.headers.get("OpenStack-API-Version", "")
        with self._lock:
            counted = f":{urlsplit(self._keystone).port}" not in where or urlsplit(self._keystone).path not in path
            counted = counted and re.fullmatch(r"(/\w+)?(/v[\d.]+)?(/\{id\}|/p{32})?/?", plain) is None
            self._count += counted
            call = Call(self._count if counted else 0, str(client.command), where, plain, version)
            self.calls.append(call)
            if self._plan is not None and counted and self._plan.at == self._count:
                fault, self._plan, self.spoilt = self._plan.fault, None, call
                return call, fault
        return call, None

    def _noted(self, call: Call, status: int) -> None:
        with self._lock:
            self.calls = [
                Call(c.number, c.method, c.service, c.path, c.microversion, status) if c is call else c
                for c in self.calls
            ]

    def _forward(
        self, client: BaseHTTPRequestHandler, where: str, path: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        headers = {k: v for k, v in client.headers.items() if k.lower() not in _HOP}
        upstream = http.client.HTTPConnection(where, timeout=UPSTREAM_TIMEOUT_S)
        try:
            upstream.request(str(client.command), path, body or None, headers)
            response = upstream.getresponse()
            answer = response.read()
            found = {k: v for k, v in response.getheaders() if k.lower() not in _HOP}
        finally:
            upstream.close()
        if b"http" in answer and "json" in found.get("Content-Type", "json"):
            answer = re.sub(rb"http://([\d.]+:\d+)", lambda m: b"http://%b/@%b" % (self.address.encode(), m[1]), answer)
        return response.status, found, answer

    def _spoil(
        self, client: BaseHTTPRequestHandler, fault: Fault | None, status: int, headers: dict[str, str], answer: bytes
    ) -> None:
        if fault in (Fault.FAILED, Fault.UNAVAILABLE):
            number = 500 if fault is Fault.FAILED else 503
            more = {"Retry-After": "0.2"} if number == 503 else {}
            self._answer(client, number, {"error": {"message": str(fault), "code": number}}, more)
        elif fault in (Fault.CUT, Fault.STALLED):
            if fault is Fault.STALLED:
                self._released.wait(STALL_S)
            client.close_connection = True
        elif fault is Fault.SPOILT:
            self._raw(client, 200, {"Content-Type": "text/html"}, b"<html>welcome</html>")
        elif fault is Fault.EMPTY:
            self._answer(client, 200, {"welcome": True}, {})
        elif fault is Fault.HALF:
            self._raw(client, status, headers, answer[: len(answer) // 2], max(len(answer), 2))
            client.close_connection = True
        else:
            self._raw(client, status, headers, answer)

    def _answer(
        self, client: BaseHTTPRequestHandler, status: int, document: dict[str, object], headers: dict[str, str]
    ) -> None:
        self._raw(client, status, {**headers, "Content-Type": "application/json"}, json.dumps(document).encode())

    @staticmethod
    def _raw(
        client: BaseHTTPRequestHandler, status: int, headers: dict[str, str], answer: bytes, length: int | None = None
    ) -> None:
        client.send_response(status)
        for name, value in headers.items():
            client.send_header(name, value)
        if status != 204:
            client.send_header("Content-Length", str(len(answer) if length is None else length))
        client.end_headers()
        if status != 204 and client.command != "HEAD":
            client.wfile.write(answer)
        client.wfile.flush()
