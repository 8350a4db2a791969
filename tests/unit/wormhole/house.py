"""A real agent process, its keys and files, and a guest that speaks to it without an event loop."""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.controller.agents import (
    GuestRef,
    process_machine,
)
from cloudfit_orchestrator.model.channel import (
    MAX_AGENT_FRAME,
    SIGN_HEAD,
    FrameKind,
    FrameReader,
    frame,
    hello,
)
from cloudfit_orchestrator.model.image import Role, open_launch
from cloudfit_orchestrator.model.record import Member, seal_record
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.statement import Kind
from tests.unit.wormhole.world import GROUP, active_envelope, record_of

R0 = GuestRef(GROUP, "r0", 1)


class BlockingGuest:
    """A guest's end of its channel, blocking: the tests here have no event loop of their own."""

    def __init__(self, path):
        self.path = path
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._server.settimeout(20)
        self.stream = None
        self._request = 0

    def accept(self):
        if self.stream:
            self.stream.close()
        self.stream, _ = self._server.accept()
        self.stream.settimeout(20)

    def greet(self, request=5):
        self._frames, self._inbox = FrameReader(MAX_AGENT_FRAME, welcome=request), []
        self.stream.sendall(hello(request))
        return self.read()

    def read(self):
        while not self._inbox:
            data = self.stream.recv(1 << 16)
            if not data:
                raise EOFError
            self._inbox.extend(self._frames.feed(data))
        return self._inbox.pop(0)

    def ask(self, kind, body=b""):
        self._request += 1
        self.stream.sendall(frame(kind, self._request, body))
        while True:
            kind, request, answer = self.read()
            if request == self._request:
                return kind, answer

    def confirm(self, c, body):
        kind, signature = self.ask(FrameKind.SIGN, SIGN_HEAD.pack(c, Kind.CONFIRM) + body)
        assert kind == FrameKind.SIGNATURE
        return signature

    def close(self):
        self._server.close()
        if self.stream:
            self.stream.close()


class House:
    """Keys, files and the agent's process."""

    def __init__(self, folder):
        self.folder = folder
        self.controller, self.image_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        for name, key in (("controller", self.controller), ("image", self.image_key)):
            (folder / name).write_bytes(base64.b64encode(public_bytes(key)) + b"\n")
        self.socket = folder / "a" / "socket"
        self.log = folder / "log"
        self.process = None

    def arguments(self, **change):
        options = {
            "name": "a1",
            "socket": self.socket,
            "identity": self.folder / "a" / "identity",
            "controller-key": self.folder / "controller",
            "image-key": self.folder / "image",
            "log": self.log,
        } | change
        flat = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "cloudfit_orchestrator.wormhole.main", *flat]

    def start(self):
        self.process = subprocess.Popen(self.arguments(), stderr=subprocess.PIPE)
        while True:  # the log's first line says that it listens
            with contextlib.suppress(OSError):
                probe = socket.socket(socket.AF_UNIX)
                try:
                    probe.connect(str(self.socket))
                    return
                finally:
                    probe.close()
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(self.process.stderr.read())

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(20)
        self.process.stderr.close()
        return code

    def admit(self, client, guest, ref=R0, **change):
        options = {
            "role": Role.REPLICA,
            "machine": process_machine(os.getpid(), guest.path),
            "manifest": b"",
            "lease_s": 600.0,
            "welcome": {"port": 7000},
        } | change
        return client.admit(ref, **options)

    def open_epoch(self, client, guest, launch, c=1, base=None):
        """prepare, install PREPARED, the guest confirms, install ACTIVE; the member."""
        usig, kss = client.prepare(R0, c)
        certificate = open_launch(launch, [base64.b64decode(client.status()["key"])])
        ca = base64.b64decode(certificate.channel_ca)
        member = Member("r0", 1, "lisbon", "10.0.0.1:7000", usig, kss, ca, certificate.image, "sha256:0")
        prepared = seal_record(record_of(c, base, [member], f=0), self.controller)
        client.install(GROUP, prepared)
        confirm = lambda _replica, c, body: guest.confirm(c, body)  # noqa: E731
        client.install(GROUP, active_envelope(prepared, confirm, self.controller, count=1))
        return member
