"""Frames of one guest to answers (model/channel.py). Who asks is the channel's; no body names a replica. Pure."""

import json
from collections.abc import Callable
from typing import Any

from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    EPOCH_END,
    RECENT,
    RECENT_ITEM,
    RESYNC,
    SESSION,
    SIGN_HEAD,
    UI_CERT,
    VERSION,
    ErrorCode,
    FrameKind,
    frame,
)
from cloudfit_orchestrator.model.clock import Clock
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.wormhole.epoch import Epoch, State
from cloudfit_orchestrator.wormhole.guests import Guest, Table
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.refusal import Malformed, Refusal

MAX_TOPIC_CHARACTERS = 64
_KINDS = {int(kind): kind for kind in Kind}
_RECOVERY_MAY = frozenset({FrameKind.HELLO, FrameKind.ISSUE, FrameKind.REPORT})

ReportSink = Callable[[Identity, str, dict[str, Any], int], object]


class Desk:
    """Answers one guest."""

    def __init__(self, guest: Guest, table: Table, clock: Clock, report: ReportSink) -> None:
        """`report(identity, topic, body, size)` keeps a report for the controller."""
        self._guest = guest
        self.table = table
        self._clock = clock
        self._report = report
        self._answers: dict[int, Callable[[bytes], tuple[FrameKind, bytes]]] = {
            FrameKind.HELLO: self._hello,
            FrameKind.OPEN_SESSION: self._open_session,
            FrameKind.CREATE_UI: self._create_ui,
            FrameKind.RECENT: self._recent,
            FrameKind.SIGN: self._sign,
            FrameKind.ISSUE: self._issue,
            FrameKind.END_EPOCH: self._end_epoch,
            FrameKind.REPORT: self._keep_report,
        }

    def answer(self, kind: int, request: int, body: bytes) -> bytes:
        """The bytes of the answer; a refusal is an answer. Raises Malformed."""
        handler = self._answers.get(kind)
        if handler is None:
            raise Malformed("kind")
        if request == 0:
            raise Malformed("request")
        if self._guest.role is not Role.REPLICA and kind not in _RECOVERY_MAY:
            return error_frame(request, ErrorCode.FORBIDDEN, f"a {self._guest.role} machine may not ask for this")
        try:
            answer_kind, answer = handler(body)
        except Refusal as refusal:
            return error_frame(request, refusal.code, refusal.fact)
        prefix = RESYNC if answer_kind is FrameKind.WELCOME else b""
        return prefix + frame(answer_kind, request, answer)

    def _hello(self, body: bytes) -> tuple[FrameKind, bytes]:
        if body != bytes([VERSION]):
            raise Malformed("version")
        self._guest.greeted()
        identity = self._guest.identity
        welcome = {
            "network": {},
            "port": 0,
            "options": {},
            **self._guest.welcome,
            "group": identity.group,
            "replica": identity.replica,
            "incarnation": identity.incarnation,
            "role": self._guest.role.value,
        }
        return FrameKind.WELCOME, json.dumps(welcome).encode()

    def _open_session(self, body: bytes) -> tuple[FrameKind, bytes]:
        (c,) = _unpack(EPOCH.size, EPOCH.unpack, body)
        return FrameKind.SESSION, SESSION.pack(*self._epoch(c).open_session())

    def _create_ui(self, body: bytes) -> tuple[FrameKind, bytes]:
        session, c, cv, digest = _unpack(CREATE_UI.size, CREATE_UI.unpack, body)
        epoch = self._epoch(c)
        self._guest.lease.check(self._clock.now_s())
        return FrameKind.UI_CERT, UI_CERT.pack(cv, epoch.create_ui(session, cv, digest))

    def _recent(self, body: bytes) -> tuple[FrameKind, bytes]:
        session, c = _unpack(RECENT.size, RECENT.unpack, body)
        return FrameKind.RECENT_UIS, b"".join(RECENT_ITEM.pack(*item) for item in self._epoch(c).recent(session))

    def _sign(self, body: bytes) -> tuple[FrameKind, bytes]:
        c, number = _unpack(SIGN_HEAD.size, SIGN_HEAD.unpack, body[: SIGN_HEAD.size])
        kind = _KINDS.get(number)
        if kind is None:
            raise Malformed("statement-kind")
        epoch = self._epoch(c)
        self._guest.lease.check(self._clock.now_s())
        return FrameKind.SIGNATURE, epoch.sign(kind, body[SIGN_HEAD.size :])

    def _issue(self, body: bytes) -> tuple[FrameKind, bytes]:
        if self._guest.retired:
            raise Refusal(ErrorCode.ENDED, "the ACTIVE configuration has replaced this incarnation")
        self._guest.lease.check(self._clock.now_s())
        return FrameKind.CERTIFICATE, self._guest.ca.issue(body)

    def _end_epoch(self, body: bytes) -> tuple[FrameKind, bytes]:
        (c,) = _unpack(EPOCH.size, EPOCH.unpack, body)
        epoch = self._epoch(c)
        superseded = self.table.records(self._guest.identity.group).supersedes(c)
        if epoch.state is not State.ENDED and not superseded:
            raise Refusal(ErrorCode.FORBIDDEN, f"no record here supersedes configuration {c}")
        end = epoch.end()
        return FrameKind.EPOCH_END, EPOCH_END.pack(end.cv_end, end.last_digest, end.last_certificate, end.signature)

    def _keep_report(self, body: bytes) -> tuple[FrameKind, bytes]:
        try:
            doc = json.loads(body, parse_constant=_no_constant)
            topic = doc.pop("topic")
            size = len(json.dumps(doc))  # of what the controller will be sent, which may be longer than what came
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Malformed("report") from error
        if type(topic) is not str or len(topic) > MAX_TOPIC_CHARACTERS:
            raise Malformed("report")
        self._report(self._guest.identity, topic, doc, size)
        return FrameKind.OK, b""

    def _epoch(self, c: int) -> Epoch:
        epoch = self._guest.epochs.get(c)
        if epoch is None:
            raise Refusal(ErrorCode.NO_EPOCH, f"there is no epoch {c}")
        return epoch


def error_frame(request: int, code: ErrorCode, fact: str) -> bytes:
    """An ERROR frame's bytes."""
    return frame(FrameKind.ERROR, request, code.to_bytes(2, "big") + fact.encode())


def _unpack(size: int, unpack: Callable[[bytes], tuple[Any, ...]], body: bytes) -> tuple[Any, ...]:
    if len(body) != size:
        raise Malformed("body-size")
    return unpack(body)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
