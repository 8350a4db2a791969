"""What a faulty replica may answer a client: no request is believed answered by fewer than f+1 members."""

from cloudfit_orchestrator.bft.messages import Replies, Result, decode_client, encode, reply_leaf
from cloudfit_orchestrator.bft.voting import Votes
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from tests.fuzz.choices import Choices
from tests.unit.bft.house import GROUP, House

HOUSE = House(3)
CLIENT = HOUSE.client_keys[0].public
FAULTY = "r2"
MAX_STEPS = 8


def run(data: bytes) -> None:
    """Frames of the one faulty member of three: none of them alone answers anything."""
    choices = Choices(data)
    votes = Votes(CLIENT, HOUSE.keys)
    votes.learn(HOUSE.record)
    for number in range(4):
        votes.expect(number)
    for _ in range(MAX_STEPS):
        try:
            message = decode_client(choices.raw(choices.byte()) if choices.byte() & 1 else _reply(choices))
        except BadError:
            continue
        if isinstance(message, Replies):
            assert votes.take(FAULTY, message) == {}
    assert len(votes._open) == 4
    assert set(votes.unsigned) <= {FAULTY}


def _reply(choices: Choices) -> bytes:
    message = choices.build(Replies)
    if choices.byte() & 3:  # one that proves itself
        results = tuple(Result(choices.integer(), choices.octets()) for _ in range(choices.byte() % 4))
        slot = choices.byte()
        body = LAYOUT[Kind.REPLY].pack(slot, reply_leaf(CLIENT, results))
        signature = HOUSE.kss[FAULTY].sign(statement_bytes(Kind.REPLY, GROUP, FAULTY, 1, body))
        message = Replies(FAULTY, 1, slot, results, (), signature)
    return encode(message)


def seeds() -> list[bytes]:
    """Proved and unproved ones."""
    return [bytes(range(i, i + 60)) for i in (0, 40, 90)]
