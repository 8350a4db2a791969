"""R0 and truncation (protocol §3, §4): FIFO, bounded waiting, jumps only forward, L kept behind the last STABLE."""

from cloudfit_orchestrator.bft.messages import encode
from cloudfit_orchestrator.bft.usig import stream as stream_module
from cloudfit_orchestrator.bft.usig.judge import StreamState, stated
from cloudfit_orchestrator.bft.usig.messages import Header, Prepare, Stable, StreamMessage
from cloudfit_orchestrator.bft.usig.stream import MAX_AHEAD, Kept, Stream, waiting

START = StreamState(0, 0, 0, 0, (), ())
WINDOW = 4


def message(cv: int, header: Header | None = None, payload: bytes = b"") -> StreamMessage:
    return StreamMessage(1, "r1", cv, encode(header or Prepare(1, 0, cv, bytes(32))), payload, b"")


def kept(cv: int, h: int | None = None) -> Kept:
    """A STABLE(h), or a PREPARE."""
    header = Prepare(1, 0, cv, bytes(32)) if h is None else Stable(1, h, bytes(32), (), 0, 0, 0, (), (), ())
    m = message(cv, header)
    return Kept(m, header, m.digest, stated(header) if isinstance(header, Stable) else START)


def stream_with(*stables: int | None) -> Stream:
    """Counters 1…: STABLE(h) for a number, a PREPARE for None."""
    stream = Stream("r1", START, b"start")
    for cv, h in enumerate(stables, 1):
        item = kept(cv, h)
        stream.accept(item if h is not None else Kept(item.message, item.header, item.digest, stream.state))
    return stream


def test_what_stands_is_what_was_read_before_the_end() -> None:
    stream = stream_with(None, None)
    assert [stream.stands(cv) for cv in (1, 2, 3)] == [True, True, None]
    stream.wait(waiting(message(4)))
    stream.end(waiting(message(3)), "R1")
    assert [stream.stands(cv) for cv in (2, 3, 10**9)] == [True, False, False]
    assert not stream.waiting
    assert not stream.wants(3), "nothing of an ended stream is of use"


def test_only_a_bounded_stretch_ahead_is_wanted() -> None:
    stream = stream_with(None)
    assert [stream.wants(cv) for cv in (0, 1, 2, 1 + MAX_AHEAD, 2 + MAX_AHEAD)] == [False, False, True, True, False]
    stream.wait(waiting(message(3)))
    assert not stream.wants(3)


def test_bytes_that_wait_are_bounded_but_the_next_message_always_has_room(monkeypatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_WAITING_BYTES", 500)
    stream = stream_with(None)
    assert stream.wait(waiting(message(3, payload=bytes(400))))
    assert not stream.wait(waiting(message(4, payload=bytes(400))))
    assert stream.wait(waiting(message(2, payload=bytes(4000))))
    stream.unwait(2)
    stream.unwait(3)
    assert stream.wait(waiting(message(4, payload=bytes(400))))


def test_a_jump_takes_over_the_stated_state_and_forgets_what_waits_behind() -> None:
    stream = stream_with(None)
    for cv in (3, 5, 7):
        stream.wait(waiting(message(cv)))
    anchor = kept(6, 8)
    stream.jump(anchor)
    assert (stream.cursor, stream.state.h, stream.base) == (6, 8, 5)
    assert set(stream.waiting) == {7}
    assert stream.anchor() == anchor
    assert stream.stands(2) is True, "what precedes an attested STABLE stands"
    assert stream.last_stable.cv == 6


def test_truncation_keeps_a_stable_l_or_more_behind_the_last() -> None:
    stream = stream_with(2, 4, 6, 8)
    stream.truncate(attested=4, window=WINDOW)
    anchor = stream.anchor()
    assert anchor is not None
    assert anchor.state.h == 4, "6 and 8 are nearer than L to the last STABLE(8)"
    assert sorted(stream.kept) == [2, 3, 4]
    assert stream.base_state.h == 4


def test_truncation_does_not_pass_what_is_attested() -> None:
    stream = stream_with(2, 4, 6, 8, 10, 12)
    stream.truncate(attested=2, window=WINDOW)
    assert min(stream.kept) == 2
    stream.truncate(attested=0, window=WINDOW)
    assert min(stream.kept) == 2
    stream.truncate(attested=10**9, window=WINDOW)  # a false vector names any counter
    assert min(stream.kept) == 4
    assert stream.cursor == 6


def test_truncation_without_a_permitted_anchor_keeps_everything() -> None:
    stream = stream_with(2, None, 4)
    stream.truncate(attested=3, window=WINDOW)
    assert sorted(stream.kept) == [1, 2, 3]
    assert stream.anchor() is None


def test_a_log_is_complete_from_the_start_or_from_l_behind() -> None:
    stream = stream_with(2, 4)
    assert stream.complete(WINDOW)
    stream.jump(kept(3, 6))
    assert not stream.complete(WINDOW), "read from STABLE(6), last STABLE(6)"
    for cv, h in ((4, 8), (5, 9)):
        stream.accept(kept(cv, h))
        assert not stream.complete(WINDOW)
    stream.accept(kept(6, 10))
    assert stream.complete(WINDOW)
