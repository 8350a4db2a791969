"""A virtio-serial port has no connections: every cut of the stream must be survived, in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.model.channel import (
    END,
    MAX_AGENT_FRAME,
    MAX_GUEST_FRAME,
    RESYNC,
    FrameKind,
    FrameReader,
    frame,
    hello,
)
from cloudfit_orchestrator.model.errors import BadError

CREATE = frame(FrameKind.CREATE_UI, 7, bytes(range(56)))


def read_all(reader, data, chunk):
    return [f for i in range(0, len(data), chunk) for f in reader.feed(data[i : i + chunk])]


def test_a_frame_end_is_no_byte_of_resync_and_resync_has_no_zero_byte():
    assert END[0] not in RESYNC
    assert 0 not in RESYNC
    assert len(RESYNC) == 32
    with pytest.raises(UnicodeDecodeError):
        RESYNC.decode()


@given(cut=st.integers(0, len(CREATE)), chunk=st.integers(1, 200), whole=st.integers(0, 3))
def test_a_killed_guests_half_frame_is_never_completed_by_its_successors_hello(cut, chunk, whole):
    reader = FrameReader(MAX_GUEST_FRAME, stale=True)
    data = hello(1) + CREATE * whole + CREATE[:cut] + hello(2) + CREATE
    got = read_all(reader, data, chunk)
    create = (FrameKind.CREATE_UI, 7, bytes(range(56)))
    halves = [create] if cut == len(CREATE) else []
    assert got == [(FrameKind.HELLO, 1, b"\1"), *[create] * whole, *halves, (FrameKind.HELLO, 2, b"\1"), create]


@given(cut=st.integers(0, 70), chunk=st.integers(1, 100), request=st.integers(1, 2**32 - 1))
def test_a_guest_reads_nothing_before_the_welcome_that_answers_its_own_hello(cut, chunk, request):
    stale = frame(FrameKind.UI_CERT, 9, bytes(72)) + RESYNC + frame(FrameKind.WELCOME, request - 1, b"{}") * 2
    wanted = RESYNC + frame(FrameKind.WELCOME, request, b"{}") + frame(FrameKind.RECORD, 0, b"x")
    reader = FrameReader(MAX_AGENT_FRAME, welcome=request)
    got = read_all(reader, stale[cut:] + wanted, chunk)
    assert got == [(FrameKind.WELCOME, request, b"{}"), (FrameKind.RECORD, 0, b"x")]


@given(st.binary(max_size=400), st.integers(1, 400))
def test_random_bytes_before_the_greeting_are_discarded_and_counted(noise, chunk):
    reader = FrameReader(MAX_GUEST_FRAME, stale=True)
    assert read_all(reader, noise + hello(5), chunk) == [(FrameKind.HELLO, 5, b"\1")]
    assert reader.discarded == len(noise)


@given(st.binary(max_size=400), st.integers(1, 64))
def test_random_bytes_after_the_greeting_end_in_frames_or_bad_error_only(noise, chunk):
    reader = FrameReader(MAX_GUEST_FRAME)
    try:
        got = read_all(reader, noise, chunk)
    except BadError:
        return
    assert all(noise.count(body) for _, _, body in got)


@given(st.binary(max_size=300), st.integers(1, 64))
def test_the_chunks_in_which_bytes_arrive_do_not_matter(noise, chunk):
    data = hello(1) + CREATE + noise + hello(2) + CREATE[:20] + hello(3)

    def outcome(size):
        reader, got = FrameReader(MAX_GUEST_FRAME, stale=True), []
        try:
            for i in range(0, len(data), size):
                got.extend(reader.feed(data[i : i + size]))
        except BadError:
            got.append("bad")
        return got

    assert outcome(chunk) == outcome(1)


def test_a_frame_of_1_gib_is_refused_at_its_fourth_byte():
    with pytest.raises(BadError, match="1073741824"):
        list(FrameReader(MAX_GUEST_FRAME).feed((1 << 30).to_bytes(4, "big")))


def test_a_thousand_cut_frames_in_one_chunk_do_not_exhaust_the_reader():
    reader = FrameReader(MAX_GUEST_FRAME, stale=True)
    assert list(reader.feed((b"\0\0" + RESYNC) * 5000 + CREATE)) == [(FrameKind.CREATE_UI, 7, bytes(range(56)))]
