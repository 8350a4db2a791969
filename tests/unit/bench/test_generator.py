import asyncio
import random

import pytest

from cloudfit_orchestrator.bench.etcd_client import field, fields, frame, varint
from cloudfit_orchestrator.bench.generator import MAX_ERRORS, Callers, Load, value_for
from cloudfit_orchestrator.bench.ordering import Parameters, shares
from cloudfit_orchestrator.model.errors import BadInputError, TemporaryError


class Clock:
    """Moves with the operations of `Memory`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Memory:
    """Takes one second of the clock for each operation."""

    def __init__(self, clock: Clock, *, lies: bool = False, refuses: bool = False) -> None:
        self.clock, self.lies, self.refuses = clock, lies, refuses
        self.state: dict[bytes, bytes] = {}
        self.puts = self.gets = 0

    async def put(self, key: bytes, value: bytes) -> None:
        if self.refuses:
            raise TemporaryError("not today")
        self.puts += 1
        self.clock.now_s += 1
        self.state[key] = value

    async def get(self, key: bytes) -> bytes | None:
        self.gets += 1
        self.clock.now_s += 1
        return b"x" * 32 if self.lies else self.state.get(key)


def drive(memory: Memory, *, reads: int = 0, marks: tuple[float, ...] = (10, 20, 25)) -> dict:
    load = Load(callers=1, marks=marks, payload=32, keys=3, reads=reads, seed=1)
    return asyncio.run(Callers(load, memory, memory.clock).run())


def test_operations_count_where_they_end_and_warm_up_does_not() -> None:
    memory = Memory(Clock())
    found = drive(memory)
    assert [p["operations"] for p in found["phases"]] == [10, 5]
    assert found["phases"][0]["latencies_us"] == {1_000_000: 10}
    assert memory.puts == 25
    assert found["errors"] == 0


def test_reads_are_checked() -> None:
    honest, liar = Memory(Clock()), Memory(Clock(), lies=True)
    assert drive(honest, reads=50)["errors"] == 0
    assert honest.gets > 0
    assert honest.puts > 0
    found = drive(liar, reads=50)
    assert found["errors"] == liar.gets > 0
    assert "nobody wrote" in found["first_error"]


def test_a_target_that_refuses_is_not_asked_for_ever() -> None:
    found = drive(Memory(Clock(), refuses=True))
    assert found["errors"] == MAX_ERRORS
    assert found["first_error"] == "not today"


@pytest.mark.parametrize("size", [0, 3, 12, 100])
def test_values_have_their_size_and_say_whose_they_are(size: int) -> None:
    value = value_for(b"key-00000001", size, random.Random(1))
    assert len(value) == size
    assert value.startswith(b"key-00000001"[:size])


def test_shares_are_equal_as_can_be() -> None:
    assert shares(10, 3) == [4, 3, 3]
    assert shares(1, 3) == [1, 0, 0]


def test_protobuf_as_the_specification_encodes_it() -> None:
    assert varint(150) == b"\x96\x01"  # the encoding guide's own example
    assert field(2, b"testing") == b"\x12\x07testing"
    assert fields(b"\x08\x96\x01\x12\x07testing\x12\x01x") == {1: [150], 2: [b"testing", b"x"]}
    for bad in (b"\x12\x07test", b"\x08", b"\x0d\x00\x00\x00\x00"):
        with pytest.raises(ValueError, match="protobuf"):
            fields(bad)


def test_frame_header_is_nine_bytes() -> None:
    assert frame(0, 1, 5, b"abc") == b"\x00\x00\x03\x00\x01\x00\x00\x00\x05abc"


@pytest.mark.parametrize(
    "wrong",
    [
        {"sweep": (0,)}, {"sweep": ()}, {"duration_s": 0.0}, {"repeat": 0}, {"reads": 101}, {"payload": 1 << 20},
        {"stop_slowest": True}, {"against": "etcd", "wan": "a-b:1ms"}, {"wan": "a-b:1ms", "sweep": (1,)},
        {"wan": "a-b:1ms", "processes": 1}, {"processes": 0},
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(wrong: dict) -> None:
    with pytest.raises(BadInputError):
        Parameters(**wrong).check()
