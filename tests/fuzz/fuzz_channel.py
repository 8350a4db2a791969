"""Both ends of the wormhole channel on raw bytes: the agent refuses by counted reason, the guest by BadError."""

from collections import Counter

from cloudfit_orchestrator.guest.channel import Channel, Handlers
from cloudfit_orchestrator.guest.ports import Port
from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    MAX_AGENT_FRAME,
    MAX_GUEST_FRAME,
    RECENT,
    SIGN_HEAD,
    UI_CERT,
    ErrorCode,
    FrameKind,
    FrameReader,
    frame,
    hello,
)
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.wormhole.refusal import Malformed
from tests.fuzz.choices import Choices
from tests.unit.wormhole.world import Pure

ASKED = (FrameKind.CREATE_UI, FrameKind.SIGN, FrameKind.REPORT, FrameKind.OPEN_SESSION)
WORLD = Pure()
WORLD.activate()


class _NoPort(Port):
    async def open(self) -> int:
        raise OSError


def run(data: bytes) -> None:
    """The first byte chooses the end, the second the pieces in which the bytes arrive."""
    choices = Choices(data)
    (_agent if choices.byte() & 1 else _guest)(choices)


def _pieces(choices: Choices) -> list[bytes]:
    size = 1 + choices.byte()
    rest = choices.rest()
    return [rest[i : i + size] for i in range(0, len(rest), size)]


def _agent(choices: Choices) -> None:
    WORLD.reports.clear()
    guest = WORLD.guest("r0")
    epoch = guest.epochs[1]
    before, reader, served = epoch.cv, FrameReader(MAX_GUEST_FRAME, stale=True), Counter[int]()
    limit = MAX_GUEST_FRAME + 4096
    try:
        for piece in _pieces(choices):
            for kind, request, body in reader.feed(piece):
                answer = WORLD.desks[guest.identity].answer(kind, request, body)
                ((answered, repeated, content),) = FrameReader(MAX_AGENT_FRAME).feed(answer)
                assert repeated == request
                assert answered != FrameKind.ERROR or ErrorCode(int.from_bytes(content[:2], "big"))
                served[answered] += 1
            assert len(reader._buffer) <= limit, "half a frame is held beyond the largest frame"
    except (BadError, Malformed) as error:
        assert str(error)
    assert epoch.cv - before == served[FrameKind.UI_CERT], "a counter moved without an answer that says so"
    assert len(WORLD.reports) == served[FrameKind.OK]


class _Sink:
    """Takes what the guest writes."""

    def write(self, data: bytes) -> None:
        assert data


def _guest(choices: Choices) -> None:
    pushed: list[object] = []
    answers: list[object] = []
    channel = Channel(_NoPort(), Handlers(pushed.append, lambda: None, pushed.append, pushed.append))
    channel._stream = _Sink()  # type: ignore[assignment]
    for kind in ASKED:
        assert channel.ask(kind, b"", answers.append)
    reader = FrameReader(MAX_AGENT_FRAME)
    try:
        for piece in _pieces(choices):
            for kind, request, body in reader.feed(piece):
                channel._frame(kind, request, body)
    except BadError as error:
        assert str(error)
    channel._forget()
    assert len(answers) == len(ASKED), "a question that nobody answers any more, or that was answered twice"


def seeds() -> list[bytes]:
    """A session of a guest, the answers to one, and both cut short."""
    asked = hello(7) + b"".join(
        (
            frame(FrameKind.OPEN_SESSION, 1, EPOCH.pack(1)),
            frame(FrameKind.CREATE_UI, 2, CREATE_UI.pack(1, 1, 1, bytes(32))),
            frame(FrameKind.RECENT, 3, RECENT.pack(1, 1)),
            frame(FrameKind.SIGN, 4, SIGN_HEAD.pack(1, 4) + bytes(8)),
            frame(FrameKind.REPORT, 5, b'{"topic":"x"}'),
            frame(FrameKind.ISSUE, 6, bytes(44)),
            frame(FrameKind.END_EPOCH, 7, EPOCH.pack(1)),
        )
    )
    answers = b"".join(
        (
            frame(FrameKind.RECORD, 0, b"{}"),
            frame(FrameKind.COMMAND, 0, b'{"op":"base"}'),
            frame(FrameKind.UI_CERT, 1, UI_CERT.pack(1, bytes(64))),
            frame(FrameKind.SIGNATURE, 2, bytes(64)),
            frame(FrameKind.OK, 3),
            frame(FrameKind.ERROR, 4, b"\0\2no epoch"),
        )
    )
    return [b"\1\xff" + asked, b"\0\xff" + answers, b"\1\x07" + asked[:90] + hello(9), b"\0\x09" + answers[5:]]
