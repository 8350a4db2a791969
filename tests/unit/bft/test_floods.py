"""Forged and repeated without measure: each is refused for a counted reason, and costs no memory that grows."""

import base64
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.bft.messages import (
    BatchMessage,
    Beacon,
    Bundle,
    BundleBody,
    Chunk,
    FetchBatches,
    Forward,
    Named,
    Overloaded,
    Request,
    StateIndex,
    StatementMessage,
    WedgeSet,
    bundle_bytes,
    decode_client,
    encode,
)
from cloudfit_orchestrator.bft.pool import MAX_BYTES_OF_CLIENT, MAX_OF_CLIENT
from cloudfit_orchestrator.bft.usig.messages import (
    Discarded,
    EpochEndMessage,
    Fetch,
    LogProof,
    Prepare,
    StreamMessage,
)
from cloudfit_orchestrator.model.orders import Retire, seal_retire
from cloudfit_orchestrator.model.record import Algorithm, Status, record_hash, seal_record
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.services.counter import add
from tests.unit.bft.house import CONTROLLER, GROUP, House, replace_certificate
from tests.unit.bft.machine import Machine

FAULTY = "r2#3"
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x63")


def counters(machine: Machine) -> dict[str, int]:
    found: dict[str, int] = machine.core.status["counters"]
    return found


# ----- forged
def bundles(house: House) -> dict[str, bytes]:
    alice, bob = house.client_keys
    body = encode(BundleBody(house.record.life, alice.public, (Request(1, add(1)),)))
    good = encode(Bundle(body, alice.sign(bundle_bytes(body))))
    other = encode(BundleBody("another", alice.public, (Request(1, add(1)),)))
    unknown = encode(BundleBody(house.record.life, bytes(32), (Request(1, add(1)),)))
    return {
        "no signature": encode(Bundle(body, b"")),
        "a wrong signature": encode(Bundle(body, bytes(64))),
        "another client's signature": encode(Bundle(body, bob.sign(bundle_bytes(body)))),
        "the signature of other bytes": encode(Bundle(body, alice.sign(body))),
        "another group": encode(Bundle(other, alice.sign(bundle_bytes(other)))),
        "a client that nobody admitted": encode(Bundle(unknown, bob.sign(bundle_bytes(unknown)))),
        "bytes behind the end": good + b"x",
        "a body of no kind": encode(Bundle(b"\xc1", alice.sign(bundle_bytes(b"\xc1")))),
    }


@pytest.mark.parametrize("name", bundles(House(clients=2)))
@pytest.mark.parametrize("forwarded", [False, True])
def test_a_forged_bundle_waits_nowhere_and_is_counted(name: str, forwarded: bool) -> None:  # noqa: FBT001
    house = House(clients=2)
    machine = Machine(house, "r0")
    data = bundles(house)[name]
    if forwarded:
        machine.hear(Forward(data), sender=FAULTY)
    else:
        machine.client(data)
    assert counters(machine) == {"bad_bundle": 1}
    assert machine.core.status["pool"] == 0
    assert not machine.answers


def test_a_client_cannot_send_in_the_name_of_another() -> None:
    house = House(clients=2)
    machine = Machine(house, "r0")
    machine.client(house.bundle([(1, add(1))], client=0), client=1)
    assert counters(machine) == {"bad_bundle": 1}
    assert machine.core.status["pool"] == 0


def uis(house: House) -> dict[str, StreamMessage]:
    good, later = house.prepare("r2", 0, 2), house.prepare("r2", 0, 5)
    return {
        "no certificate": replace_certificate(good, b""),
        "a wrong certificate": replace_certificate(good, bytes(64)),
        "the certificate of another message": replace_certificate(good, later.certificate),
        "another counter": msgspec.structs.replace(good, cv=2),
        "another replica": msgspec.structs.replace(good, replica="r1"),
        "another payload": msgspec.structs.replace(good, payload=b"x"),
        "another member's key": replace_certificate(good, house.certify("r1", 1, good.digest)),
        "a stranger": msgspec.structs.replace(good, replica="r9"),
    }


@pytest.mark.parametrize("name", uis(House()))
def test_a_forged_ui_reaches_no_log_and_is_counted(name: str) -> None:
    house = House()
    forged = uis(house)[name]
    machine = Machine(house, "r0")
    before = len(machine.log)
    machine.hear(forged, sender=FAULTY, batches=False)
    assert counters(machine)["bad_ui"] == 1
    assert len(machine.log) == before
    assert machine.core.status["live"]


def statements(house: House) -> dict[str, StatementMessage]:
    checkpoint = house.statement("r2", Kind.CHECKPOINT, 2, bytes(32))
    req = house.statement("r2", Kind.REQ, 1)
    return {
        "CHECKPOINT without a signature": msgspec.structs.replace(checkpoint, signature=b""),
        "CHECKPOINT of another member": msgspec.structs.replace(checkpoint, replica="r1"),
        "CHECKPOINT for another slot": msgspec.structs.replace(
            checkpoint, body=LAYOUT[Kind.CHECKPOINT].pack(4, bytes(32))
        ),
        "CHECKPOINT cut short": msgspec.structs.replace(checkpoint, body=checkpoint.body[:-1]),
        "REQ of another member": msgspec.structs.replace(req, replica="r1"),
        "REQ for another view": msgspec.structs.replace(req, body=LAYOUT[Kind.REQ].pack(2)),
        "a REQ's signature on a CHECKPOINT": msgspec.structs.replace(checkpoint, signature=req.signature),
        "a CONFIRM, which no peer is told": msgspec.structs.replace(req, kind=Kind.CONFIRM),
    }


@pytest.mark.parametrize("name", statements(House(period=2, window=4)))
def test_a_forged_statement_counts_for_nobody(name: str) -> None:
    house = House(period=2, window=4)
    machine = Machine(house, "r0")
    machine.hear(statements(house)[name], sender=FAULTY)
    assert counters(machine) == {"bad_statement": 1}


def records(house: House) -> dict[str, bytes]:
    active = replace(house.record, c=2, base=1, prepared=record_hash(house.successor()))
    return {
        "a stranger's key": seal_record(replace(house.record, c=2, base=1), STRANGER),
        "ACTIVE that nobody confirmed": seal_record(replace(active, confirmations=()), CONTROLLER),
        "ACTIVE with the confirmations of another": seal_record(active, CONTROLLER),
        "another group": seal_record(replace(house.record, group="another", c=2, base=1), CONTROLLER),
        "one byte changed": house.successor().replace(b"A", b"B", 1),
        "nothing": b"",
    }


@pytest.mark.parametrize("name", records(House()))
def test_a_forged_record_changes_nothing(name: str) -> None:
    house = House()
    machine = Machine(house, "r0")
    machine.core.record(records(house)[name])
    machine.serve()
    assert counters(machine) == {"bad_record": 1}
    assert [topic for topic, _ in machine.reports if topic == "bad_record"]
    assert machine.core.status["c"] == 1


def test_a_forged_retire_order_asks_for_no_view() -> None:
    house = House()
    machine = Machine(house, "r0")
    order = seal_retire(Retire(GROUP, 1, "r1"), STRANGER)
    machine.core.command({"op": "retire", "order": base64.b64encode(order).decode()})
    machine.serve()
    assert counters(machine) == {"bad_command": 1}
    assert not [m for _, m in machine.sent if isinstance(m, StatementMessage)]


@pytest.mark.parametrize("change", [{"signature": bytes(64)}, {"cv_end": 5}, {"replica": "r1"}, {"last_digest": b""}])
def test_a_forged_end_of_an_epoch_ends_none_and_is_counted(change: dict[str, Any]) -> None:
    house = House()
    machine = Machine(house, "r0")
    end = house.epoch_end("r2")
    message = EpochEndMessage(1, "r2", end.cv_end, end.last_digest, end.last_certificate, end.signature)
    machine.hear(msgspec.structs.replace(message, **change), sender=FAULTY)
    assert counters(machine) == {"bad_end": 1}
    machine.hear(message, sender=FAULTY)
    assert counters(machine) == {"bad_end": 1}


# ----- too much
def flood(machine: Machine, size: int, count: int) -> list[int]:
    """New requests of client 0, each a bundle of its own; the numbers that were turned away."""
    for i in range(count):
        machine.client(machine.house.bundle([(i + 1, bytes(size))]))
    answers = [decode_client(data) for client, data in machine.answers if client == machine.house.client_keys[0].public]
    return [number for answer in answers if isinstance(answer, Overloaded) for number in answer.numbers]


@pytest.mark.parametrize(
    ("size", "room"), [(8, MAX_OF_CLIENT), (100_000, MAX_BYTES_OF_CLIENT // 100_300)], ids=["many", "large"]
)
def test_a_client_that_floods_is_told_so_at_once_and_others_still_find_room(size: int, room: int) -> None:
    house = House(clients=2, algorithm=Algorithm.MINBFT)
    machine = Machine(house, "r2")  # proposes nothing, and nobody else does: what comes waits
    turned_away = flood(machine, size, room + 50)
    assert turned_away == list(range(room + 1, room + 51))
    assert counters(machine)["overloaded"] == 50
    assert machine.core.status["pool"] == room
    machine.client(house.bundle([(1, bytes(size))], client=1), client=1)
    assert machine.core.status["pool"] == room + 1
    assert [client for client, _ in machine.answers if client == house.client_keys[1].public] == []


def test_a_faulty_member_that_gives_two_proofs_by_turns_is_reported_once_for_each() -> None:
    """Reports share the wormhole's channel with UIs: who could make others report could silence them."""
    house = House(period=2, window=4)
    machine = Machine(house, "r0")
    for digest in (bytes(32), b"x" * 32):
        for replica in ("r1", "r2"):
            machine.hear(house.statement(replica, Kind.CHECKPOINT, 2, digest), sender=FAULTY)
    forged = replace_certificate(house.prepare("r2", 0, 2), bytes(64))
    for i in range(200):
        machine.hear(forged, house.statement("r2", Kind.CHECKPOINT, 2, i.to_bytes(32, "big")), sender=FAULTY)
    assert len([topic for topic, _ in machine.reports if topic == "liar"]) <= 4


# ----- memory
OPAQUE = (type, ModuleType, FunctionType)


def deep_size(root: object) -> int:
    """Bytes of everything that `root` refers to."""
    seen: set[int] = set()
    todo, size = [root], 0
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, OPAQUE):
            continue
        seen.add(id(item))
        size += sys.getsizeof(item)
        todo += gc.get_referents(item)
    return size


def of_kind(house: House) -> dict[str, Callable[[int], msgspec.Struct]]:
    """For each kind of message one that a faulty member may send for ever, each time another."""
    proposal = house.prepare("r2", 0, 2)
    name = lambda i: i.to_bytes(32, "big")  # noqa: E731
    return {
        "stream": lambda i: msgspec.structs.replace(proposal, cv=i + 2, header=name(i)),
        "batch beside a proposal": lambda i: msgspec.structs.replace(proposal, batch=name(i)),
        "CHECKPOINT": lambda i: house.statement("r2", Kind.CHECKPOINT, 2 * i + 2, name(i)),
        "REQ": lambda i: house.statement("r2", Kind.REQ, i + 1),
        "forged REQ": lambda i: StatementMessage(1, "r2", Kind.REQ, LAYOUT[Kind.REQ].pack(i), bytes(64)),
        "FETCH": lambda i: Fetch(1, "r1", i, i + 5),
        "FETCH of batches": lambda i: FetchBatches((name(i),)),
        "DISCARDED": lambda i: Discarded(msgspec.structs.replace(proposal, cv=i + 2), (proposal,)),
        "LOG": lambda i: LogProof((msgspec.structs.replace(proposal, cv=i + 2),)),
        "batch": lambda i: BatchMessage(name(i) * 10),
        "index": lambda i: StateIndex(name(i), i, bytes(32 * 1024)),
        "chunk": lambda i: Chunk(name(i), i % 1024, name(i)),
        "wedge set": lambda i: WedgeSet(1, i + 2, (Named("r1", i + 1, name(i)), Named("r2", i + 1, name(i)))),
        "BEACON": lambda i: Beacon(1, i, i),
        "EPOCH-END": lambda i: EpochEndMessage(1, "r2", i, bytes(32), bytes(64), bytes(64)),
        "bundle": lambda i: Forward(house.bundle([(1, add(1))])[:-1] + bytes([i % 256])),
        "certified": lambda i: house.say("r2", Prepare(1, 0, 3 * i + 2, name(i))),
    }


FRAMES = 3000
SLACK = 128 << 10  # bytes: what is kept once for each of a few dozen messages


def sizes(machine: Machine, make: Callable[[int], msgspec.Struct]) -> Iterator[int]:
    for i in range(2 * FRAMES):
        machine.core.receive(FAULTY, encode(make(i)))
        machine.core.effects()
        if i % 50 == 0:
            machine.now_s += 0.05
            machine.core.tick(machine.now_s)
            machine.core.effects()
        if (i + 1) % FRAMES == 0:
            yield deep_size(machine.core)


def test_wedge_sets_without_end_fill_no_memory_while_a_reconfiguration_lasts() -> None:
    house = House(3, period=2, window=4)
    machine = Machine(house, "r0")
    machine.core.record(house.successor())
    machine.serve()
    first, second = sizes(machine, of_kind(house)["wedge set"])
    assert second - first < SLACK


@pytest.mark.parametrize("kind", of_kind(House()))
def test_no_kind_of_message_fills_the_memory(kind: str) -> None:
    house = House(3, period=2, window=4)
    machine = Machine(house, "r0")
    make = of_kind(house)[kind]
    first, second = sizes(machine, make)
    assert second - first < SLACK, f"{second - first} bytes more after {FRAMES} frames more"
    assert machine.core.status["live"]


@pytest.mark.parametrize("gap", range(12, 30))
def test_a_bundle_that_fits_into_no_batch_does_not_block_those_behind_it(gap: int) -> None:
    """Between what was taken in and what fitted into a batch lay eight bytes: one such bundle stopped the group."""
    limit = 2000
    house = House(clients=2, parameters={"max_batch_bytes": limit}, window=8, period=4)
    machine = Machine(house, "r0")
    size = limit
    while len(bundle := house.bundle([(1, bytes(size))])) > limit - gap:
        size -= 1
    assert len(bundle) == limit - gap
    machine.client(bundle)
    machine.client(house.bundle([(1, add(1))], client=1), client=1)
    machine.ticks(0.1)
    assert not machine.core._at.pool.unproposed
    assert [said for said in machine.said() if isinstance(said, Prepare)]


def test_a_bundle_that_a_new_configuration_has_no_batch_for_is_let_go() -> None:
    house = House(clients=2, algorithm=Algorithm.MINBFT)
    machine = Machine(house, "r2")
    machine.client(house.bundle([(1, bytes(5000))]))
    machine.client(house.bundle([(1, add(1))], client=1), client=1)
    assert machine.core.status["pool"] == 2
    prepared = replace(
        house.record, c=2, base=1, status=Status.PREPARED, h=0, digest=bytes(32), confirmations=(), prepared=bytes(32),
        parameters=replace(house.record.parameters, max_batch_bytes=2000),
    )  # fmt: skip
    _, active = house.activate(prepared, 0, house.record.digest)
    machine.core.record(active)
    assert machine.core.status["c"] == 2
    assert machine.core.status["pool"] == 1
