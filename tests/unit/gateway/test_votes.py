"""Whose word a client takes: f+1 equal proved results under one configuration, and who is convicted by them."""

import os
from multiprocessing import get_context

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.bft.clients import Executed, reply_tree
from cloudfit_orchestrator.bft.messages import Replies, Result
from cloudfit_orchestrator.bft.voting import MAX_PATH, Votes
from cloudfit_orchestrator.gateway.numbers import BLOCK, FileNumbers
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import NO_DIGEST, Algorithm, ConfigRecord, Member, Parameters
from cloudfit_orchestrator.model.signing import Ed25519Verifier, public_bytes
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes

ME = b"m" * 32
KSS = {(r, c): Ed25519PrivateKey.generate() for r in ("r0", "r1", "r2") for c in (1, 2, 3)}


def record(c: int) -> ConfigRecord:
    members = tuple(
        Member(r, i + 1, "cloud", "h:1", os.urandom(32), public_bytes(KSS[r, c]), b"", "", "")
        for i, r in enumerate(("r0", "r1", "r2"))
    )
    return ConfigRecord("g", c, c - 1 or None, members, (), "kv", 1, 0, Algorithm.EBAWA, Parameters(), NO_DIGEST)


def reply(replica: str, results: dict[int, bytes], *, c: int = 1, slot: int = 5, signer: str | None = None) -> Replies:
    mine = tuple(Result(n, r) for n, r in results.items())
    others = [Executed(bytes([i]) * 32, (Result(1, b"theirs"),)) for i in range(3)]
    root, paths = reply_tree([others[0], Executed(ME, mine), *others[1:]])
    message = statement_bytes(Kind.REPLY, "g", replica, c, LAYOUT[Kind.REPLY].pack(slot, root))
    return Replies(replica, c, slot, mine, paths[1], KSS[signer or replica, c].sign(message))


def votes(*numbers: int) -> Votes:
    made = Votes(ME, Ed25519Verifier())
    made.learn(record(1))
    for number in numbers:
        made.expect(number)
    return made


def test_two_equal_replies_of_three_are_an_answer_and_only_one_is_not():
    v = votes(1, 2)
    assert v.take("r0", reply("r0", {1: b"a", 2: b"b"})) == {}
    assert v.take("r0", reply("r0", {1: b"a", 2: b"b"})) == {}  # the same replica twice is one vote
    assert v.take("r2", reply("r2", {2: b"b"}, slot=9)) == {2: b"b"}
    assert v.take("r1", reply("r1", {1: b"a"})) == {1: b"a"}
    assert v.take("r2", reply("r2", {1: b"a"})) == {}
    assert v.lies.total() == 0


def test_a_lie_is_attributed_whether_it_comes_first_or_last():
    v = votes(1, 2)
    v.take("r1", reply("r1", {1: b"lie"}))
    v.take("r0", reply("r0", {1: b"a", 2: b"b"}))
    assert v.take("r2", reply("r2", {1: b"a", 2: b"b"})) == {1: b"a", 2: b"b"}
    assert v.lies == {"r1": 1}
    v.take("r1", reply("r1", {2: b"lie"}))
    assert v.lies == {"r1": 2}


def test_what_is_not_signed_convicts_nobody():
    v = votes(1)
    v.take("r1", reply("r1", {1: b"lie"}, signer="r2"))
    v.take("r1", reply("r0", {1: b"lie"}, signer="r1"))
    good = reply("r0", {1: b"a"})
    v.take("r1", Replies("r0", 1, 5, (Result(1, b"changed"),), good.path, good.signature))
    v.take("r1", Replies("nobody", 1, 5, good.results, good.path, good.signature))
    v.take("r1", Replies("r0", 1, -1, good.results, good.path, good.signature))
    v.take("r1", Replies("r0", 1, 5, good.results, good.path * MAX_PATH, good.signature))
    assert v.unsigned == {"r1": 6}
    assert v.lies.total() == 0
    v.take("r0", good)
    assert v.take("r2", reply("r2", {1: b"a"})) == {1: b"a"}


def test_replies_of_two_configurations_do_not_add_up():
    v = votes(1)
    v.take("r0", reply("r0", {1: b"a"}))
    assert v.take("r1", reply("r1", {1: b"a"}, c=2)) == {}
    assert v.unknown_c == 2
    v.learn(record(2))
    v._records[2] = record(2)
    assert v.take("r1", reply("r1", {1: b"a"}, c=2)) == {}
    assert v.take("r2", reply("r2", {1: b"a"}, c=2)) == {1: b"a"}
    v.learn(record(3))
    assert set(v._records) == {2, 3}


def test_what_nobody_waits_for_is_nothing():
    v = votes(1)
    v.give_up(1)
    for replica in ("r0", "r1", "r2"):
        assert v.take(replica, reply(replica, {1: b"a", 7: b"x"})) == {}
    assert v._open == {}


def test_numbers_never_repeat_over_restarts_and_are_given_back(tmp_path):
    path = tmp_path / "numbers"
    first = FileNumbers(path)
    assert [first.next() for _ in range(3)] == [1, 2, 3]
    first.close()
    second = FileNumbers(path)
    assert second.next() == 4
    third = FileNumbers(path)  # while the second one runs
    assert third.next() == 4 + BLOCK
    second.close()  # cannot give back: the third one's block is behind
    third.close()
    assert FileNumbers(path).next() == 5 + BLOCK
    path.write_text("not a number")
    with pytest.raises(BadInputError, match="not a request number"):
        FileNumbers(path).next()


def _take(path, count):
    numbers = FileNumbers(path)
    taken = [numbers.next() for _ in range(count)]
    numbers.close()
    return taken


def test_programs_that_share_a_key_share_no_number(tmp_path):
    with get_context("spawn").Pool(3) as pool:
        taken = pool.starmap(_take, [(tmp_path / "n", 200)] * 6)
    everything = [number for numbers in taken for number in numbers]
    assert len(set(everything)) == len(everything) == 1200


class Anything:
    """Believes all signatures."""

    def verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        return True


said = st.tuples(
    st.sampled_from(["r0", "r1", "r2"]),
    st.dictionaries(st.integers(1, 3), st.sampled_from([b"a", b"b"]), min_size=1, max_size=3),
)


@given(st.lists(said, max_size=12))
def test_whatever_company_results_come_in_the_first_word_of_each_member_counts(messages):
    v = Votes(ME, Anything())
    v.learn(record(1))
    for number in (1, 2, 3):
        v.expect(number)
    answers: dict[int, bytes] = {}
    first: dict[tuple[str, int], bytes] = {}
    for replica, results in messages:
        mine = tuple(Result(n, r) for n, r in sorted(results.items()))
        got = v.take(replica, Replies(replica, 1, 5, mine, (), b""))
        for number, result in results.items():
            first.setdefault((replica, number), result)
        for number, result in got.items():
            assert number not in answers
            answers[number] = result
        for number in (1, 2, 3):
            words = [first[r, number] for r in ("r0", "r1", "r2") if (r, number) in first]
            due = {word for word in words if words.count(word) > 1}
            assert due == ({answers[number]} if number in answers else set())
