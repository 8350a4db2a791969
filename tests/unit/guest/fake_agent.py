"""A wormhole that answers one guest over a unix socket: real keys, real frames, no checks."""

import asyncio
import datetime as dt
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.model import channel as ch
from cloudfit_orchestrator.model.channel import FrameKind, FrameReader, frame
from tests.unit.guest.helpers import until


class Authority:
    """A channel CA, as an incarnation's wormhole holds one."""

    def __init__(self, name: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ca {name}")])
        self.certificate = self._build(self.name, self.key.public_key(), ca=True)
        self.der = self.certificate.public_bytes(serialization.Encoding.DER)

    def issue(self, common_name: str, spki: bytes) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        made = self._build(subject, serialization.load_der_public_key(spki), ca=False)
        return made.public_bytes(serialization.Encoding.DER)

    def _build(self, subject, public, *, ca: bool):
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, None)
        )


class FakeAgent:
    """Connects to a guest's socket and answers until closed; `drop()` loses the connection, `dial()` makes it again."""

    def __init__(self, path: Path, welcome: dict, authority: Authority | None = None) -> None:
        self.path, self.welcome, self.authority = path, welcome, authority
        self.reports: list[dict] = []
        self.requests: list[tuple[int, bytes]] = []
        self.mute = False  # read, but answer nothing but HELLO
        self.errors: dict[int, tuple[int, str]] = {}
        self.certified: list[tuple[int, bytes, bytes]] = []
        self.session = 0
        self.greeted = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task | None = None

    async def dial(self) -> None:
        await until(self.path.exists)
        reader, self._writer = await asyncio.open_unix_connection(str(self.path))
        self.greeted.clear()
        self._task = asyncio.create_task(self._serve(reader, self._writer))
        async with asyncio.timeout(5):
            await self.greeted.wait()

    async def drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            await self._task

    def push(self, kind: FrameKind, body: bytes) -> None:
        self._writer.write(frame(kind, 0, body))

    def raw(self, data: bytes) -> None:
        self._writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader(ch.MAX_GUEST_FRAME, stale=True)
        try:
            while data := await reader.read(65536):
                for kind, request, body in frames.feed(data):
                    self.requests.append((kind, body))
                    if kind == FrameKind.HELLO:
                        writer.write(ch.RESYNC + frame(FrameKind.WELCOME, request, json.dumps(self.welcome).encode()))
                        self.greeted.set()
                    elif not self.mute:
                        if kind in self.errors:
                            code, text = self.errors[kind]
                            writer.write(frame(FrameKind.ERROR, request, code.to_bytes(2, "big") + text.encode()))
                        else:
                            writer.write(frame(*self._answer(kind, request, body)))
        except ConnectionError:
            pass
        finally:
            writer.close()

    def _answer(self, kind: int, request: int, body: bytes) -> tuple[FrameKind, int, bytes]:
        if kind == FrameKind.OPEN_SESSION:
            self.session += 1
            return FrameKind.SESSION, request, ch.SESSION.pack(self.session, len(self.certified) + 1)
        if kind == FrameKind.CREATE_UI:
            session, _, cv, digest = ch.CREATE_UI.unpack(body)
            if session != self.session or cv != len(self.certified) + 1:
                return FrameKind.ERROR, request, ch.ErrorCode.WRONG_COUNTER.to_bytes(2, "big") + b"wrong"
            self.certified.append((cv, digest, bytes([cv % 256]) * 64))
            return FrameKind.UI_CERT, request, ch.UI_CERT.pack(cv, self.certified[-1][2])
        if kind == FrameKind.RECENT:
            return FrameKind.RECENT_UIS, request, b"".join(ch.RECENT_ITEM.pack(*u) for u in self.certified[-64:])
        if kind == FrameKind.SIGN:
            return FrameKind.SIGNATURE, request, b"s" * 64
        if kind == FrameKind.ISSUE:
            name = "{group}/{replica}#{incarnation}".format(**self.welcome)
            return FrameKind.CERTIFICATE, request, self.authority.issue(name, body)
        if kind == FrameKind.REPORT:
            self.reports.append(json.loads(body))
            return FrameKind.OK, request, b""
        raise AssertionError(f"unexpected request {kind}")
