"""Reads that are not ordered, at the client: which answers are believed (protocol §7)."""

import asyncio

from cloudfit_orchestrator.bft.messages import Read, ReadReply, Seen, decode_client, seen_digest
from cloudfit_orchestrator.gateway.reads import Reads
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from cloudfit_orchestrator.services.counter import add
from tests.unit.bft.house import GROUP, House
from tests.unit.guest.helpers import scenario


class Asked:
    """One client's read under way, and its configuration, which may change meanwhile."""

    def __init__(self, house: House) -> None:
        self.record = house.record
        self.key = house.client_keys[0].public
        self.sent: list[Read] = []
        self.reads = Reads(self.key, house.keys, lambda: self.record, self._send)
        self.answer = self.reads.ask(add(0))

    def _send(self, data: bytes) -> None:
        message = decode_client(data)
        assert isinstance(message, Read)
        self.sent.append(message)

    def reply(self, house: House, replica: str, result: bytes, slot: int = 5) -> None:
        """`replica` answers, under the configuration of `house`."""
        (read,) = self.sent
        seen = (Seen(slot, result),)
        body = LAYOUT[Kind.READ].pack(self.key, read.number, slot, seen_digest(read.operations, seen))
        signature = house.kss[replica].sign(statement_bytes(Kind.READ, GROUP, replica, house.record.c, body))
        self.reads.take(ReadReply(replica, house.record.c, read.number, slot, seen, signature))


@scenario
async def _mixed() -> None:
    old = House(5, f=2)
    new = House(3, f=1, c=2, keys=old.keys)
    asked = Asked(old)
    await asyncio.sleep(0)
    for replica in ("r3", "r4"):  # correct, and cut off: they have not heard of c=2, where all was written since
        asked.reply(old, replica, b"old")
    asked.record = new.record  # the client has
    asked.reply(new, "r0", b"old")  # the one faulty member of c=2
    assert await asked.answer is None, "it is to be ordered"


def test_answers_under_two_configurations_are_never_counted_together() -> None:
    """A read that was under way while the client followed a reconfiguration took R of the new configuration from
    members of both: two honest stragglers of the old one and one liar showed a value that was overwritten long ago.
    """
    _mixed()


@scenario
async def _equal() -> None:
    house = House(3)
    asked = Asked(house)
    await asyncio.sleep(0)
    asked.reply(house, "r0", b"value")
    asked.reply(house, "r0", b"value")
    asked.reply(house, "r1", b"value")
    assert not asked.answer.done()
    asked.record = House(3, f=1, c=2, keys=house.keys).record  # what it was asked under goes on counting
    asked.reply(house, "r2", b"value")
    assert await asked.answer == b"value"


def test_equal_answers_of_a_read_quorum_are_believed() -> None:
    _equal()
