"""One replica, and what a faulty member, its stream, and a faulty client may send it: it goes on, and holds no more."""

import msgspec

from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.messages import Bundle, BundleBody, Request, StatementMessage, bundle_bytes, encode
from cloudfit_orchestrator.bft.usig.messages import Header, PeerMessage, Prepare, ViewChange
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from tests.fuzz.choices import Choices
from tests.unit.bft.house import GROUP, House
from tests.unit.bft.machine import Machine

FAULTY, FAULTY_PEER = "r2", "r2#3"
MAX_STEPS = 12
HOUSE = House(3, window=4, period=2, clients=2)


def run(data: bytes) -> None:
    """A few steps of malice, then a correct member's proposal must be executed."""
    HOUSE.streams = {name: [] for name in HOUSE.names}
    HOUSE.order.clear()
    HOUSE.batches.clear()
    HOUSE._number = 1000
    choices = Choices(data)
    machine = Machine(HOUSE, "r0")
    for _ in range(MAX_STEPS):
        if not choices:
            break
        STEPS[choices.byte() % len(STEPS)](machine, choices)
    machine.ticks(0.3)
    status = machine.core.status
    assert status["live"], f"silenced: {status}"
    assert status["pool"] <= MAX_STEPS
    assert len(machine.core._out.counters) < 64, "counters are named by what came in"
    if status["slot"] == 0 and not any(isinstance(said, ViewChange) for said in machine.said()):
        machine.hear(HOUSE.prepare("r1", 0, 1))
        assert machine.core.status["slot"] >= 1, machine.core.status


def _raw(machine: Machine, choices: Choices) -> None:
    machine.core.receive(FAULTY_PEER, choices.raw(choices.byte()))
    machine.serve()


def _frame(machine: Machine, choices: Choices) -> None:
    machine.core.receive(FAULTY_PEER, encode(choices.build(PeerMessage)))
    machine.serve()


def _here(machine: Machine, choices: Choices) -> None:
    """A frame of this very configuration."""
    message = choices.build(PeerMessage)
    known = {"c": 1} if hasattr(message, "c") else {}
    machine.hear(msgspec.structs.replace(message, **known), sender=FAULTY_PEER, batches=False)


def _say(machine: Machine, choices: Choices) -> None:
    """Anything, certified: the next message of the faulty member's stream."""
    header, payload = choices.build(Header), choices.octets()
    if choices.byte() & 1:
        header = msgspec.structs.replace(header, c=1)
    machine.hear(HOUSE.say(FAULTY, header, payload), sender=FAULTY_PEER)


def _propose(machine: Machine, choices: Choices) -> None:
    """A batch of anything, at a place of the faulty member's choice."""
    batch = make_batch(
        [_bundle(choices) if choices.byte() & 1 else choices.octets() for _ in range(choices.byte() % 4)]
    )
    HOUSE.batches[batch_digest(batch)] = batch
    machine.hear(HOUSE.say(FAULTY, Prepare(1, choices.integer(), choices.integer(), batch_digest(batch))))


def _state(machine: Machine, choices: Choices) -> None:
    """A statement that the faulty member's KSS did sign."""
    kind = choices.pick(list(Kind))
    size = LAYOUT[kind].size
    body = (choices.raw(size) + bytes(size))[:size]
    signature = HOUSE.kss[FAULTY].sign(statement_bytes(kind, GROUP, FAULTY, 1, body))
    machine.hear(StatementMessage(1, FAULTY, kind, body, signature), sender=FAULTY_PEER)


def _client(machine: Machine, choices: Choices) -> None:
    machine.client(_bundle(choices) if choices.byte() & 1 else choices.raw(choices.byte()))


def _repeat(machine: Machine, choices: Choices) -> None:
    """Something that was said, said again, perhaps by another and with another word."""
    if HOUSE.order:
        message = choices.pick(HOUSE.order)
        change = choices.pick([{}, {"cv": choices.integer()}, {"payload": b"x"}, {"certificate": b""}, {"batch": b"x"}])
        machine.hear(msgspec.structs.replace(message, **change), sender=FAULTY_PEER, batches=False)


def _correct(machine: Machine, choices: Choices) -> None:
    """What a correct member says in between, while its slots last."""
    if not HOUSE.streams["r1"]:
        machine.hear(HOUSE.prepare("r1", 0, 1))


def _time(machine: Machine, choices: Choices) -> None:
    machine.ticks(0.05 * (1 + choices.byte() % 16))


def _bundle(choices: Choices) -> bytes:
    key = HOUSE.client_keys[choices.byte() & 1]
    body = choices.build(BundleBody)
    if choices.byte() & 3:
        requests = tuple(Request(1 + i, choices.octets()) for i in range(choices.byte() % 3))
        body = BundleBody(HOUSE.record.life, key.public, requests)
    data = encode(body)
    return encode(Bundle(data, key.sign(bundle_bytes(data)) if choices.byte() & 3 else choices.octets()))


STEPS = (_say, _frame, _here, _raw, _propose, _state, _client, _repeat, _correct, _time)


def seeds() -> list[bytes]:
    """Each step alone, and all of them."""
    alone = [bytes([i]) + bytes(range(i, i + 40)) for i in range(len(STEPS))]
    return [*alone, b"".join(alone)]
