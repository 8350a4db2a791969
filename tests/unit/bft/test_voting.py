"""The client's vote (protocol §3): f+1 equal replies under one c are an answer."""

from cloudfit_orchestrator.bft.clients import Executed, reply_tree
from cloudfit_orchestrator.bft.messages import Replies, Result
from cloudfit_orchestrator.bft.voting import Answered, Ballot
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from tests.unit.bft.house import GROUP, House

HOUSE = House()
NEXT = House(c=2, keys=HOUSE.keys)
ME = b"m" * 32


def replies(who: str, *results: tuple[int, bytes], house: House = HOUSE, slot: int = 3, signer: str = "") -> Replies:
    mine = tuple(Result(n, r) for n, r in results)
    root, paths = reply_tree([Executed(b"o" * 32, (Result(1, b"other"),)), Executed(ME, mine)])
    body = LAYOUT[Kind.REPLY].pack(slot, root)
    c = house.record.c
    signature = house.kss[signer or who].sign(statement_bytes(Kind.REPLY, GROUP, who, c, body))
    return Replies(who, c, slot, mine, paths[1], signature)


def ballot(*numbers: int) -> Ballot:
    b = Ballot(ME, HOUSE.keys)
    b.records = {1: HOUSE.record, 2: NEXT.record}
    for number in numbers:
        b.open(number)
    return b


def test_f_plus_1_equal_replies_are_an_answer() -> None:
    b = ballot(7)
    assert b.add("r0", replies("r0", (7, b"x"))) == []
    assert b.add("r0", replies("r0", (7, b"x"), slot=9)) == [], "one replica is one vote"
    assert b.add("r1", replies("r1", (7, b"x"), slot=4)) == [Answered(7, b"x", ())]
    assert b.add("r2", replies("r2", (7, b"x"))) == []
    assert b.lies.total() == 0


def test_replies_under_different_configurations_do_not_add_up() -> None:
    b = ballot(7)
    assert b.add("r0", replies("r0", (7, b"x"))) == []
    assert b.add("r1", replies("r1", (7, b"x"), house=NEXT)) == []
    assert b.add("r2", replies("r2", (7, b"x"), house=NEXT)) == [Answered(7, b"x", ())]


def test_a_liar_is_named_whether_early_or_late() -> None:
    b = ballot(7, 8)
    b.add("r2", replies("r2", (7, b"lie")))
    b.add("r0", replies("r0", (7, b"x"), (8, b"y")))
    assert b.add("r1", replies("r1", (7, b"x"), (8, b"y"))) == [Answered(7, b"x", ("r2",)), Answered(8, b"y", ())]
    b.add("r2", replies("r2", (8, b"late lie")))
    assert b.lies == {"r2": 2}


def test_what_is_not_signed_by_its_sender_counts_for_nothing_and_is_counted() -> None:
    b = ballot(7)
    good = replies("r1", (7, b"x"))
    b.add("r0", replies("r0", (7, b"x"), signer="r1"))
    b.add("r0", good)  # another's reply, handed on
    b.add("stranger", good)
    b.add("r1", Replies("r1", 9, 3, good.results, good.path, good.signature))
    b.add("r1", Replies("r1", 1, 3, (Result(7, b"forged"),), good.path, good.signature))
    b.add("r1", Replies("r1", 1, 3, good.results, good.path * 20, good.signature))
    assert b.unsigned == {"r0": 2, "stranger": 1, "r1": 3}
    assert b.add("r1", good) == []
    assert b.add("r2", replies("r2", (7, b"x"))) == [Answered(7, b"x", ())]


def test_answers_to_what_was_not_asked_are_dropped() -> None:
    b = ballot()
    for who in ("r0", "r1", "r2"):
        assert b.add(who, replies(who, (7, b"x"))) == []
