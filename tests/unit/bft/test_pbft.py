"""PBFT, rule by rule (Castro and Liskov, OSDI'99 §4): who says two things, forged certificates, restarts."""

from dataclasses import replace

import msgspec
import pytest

from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.journal import entry_decoder
from cloudfit_orchestrator.bft.messages import (
    NOOP,
    Bundle,
    BundleBody,
    Frozen,
    Named,
    Request,
    Signed,
    bundle_bytes,
    encode,
    peer_decoder,
)
from cloudfit_orchestrator.bft.pbft.changes import new_view
from cloudfit_orchestrator.bft.pbft.journal import ENTRIES, LogPrepared
from cloudfit_orchestrator.bft.pbft.messages import (
    MESSAGES,
    WEDGE,
    Change,
    Decided,
    FetchSlots,
    NewView,
    Phase,
    Prepared,
    Stable,
    ViewChange,
    Vote,
    change_statement,
    vote_statement,
)
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.errors import BadError, BadInputError
from cloudfit_orchestrator.model.quorum import Quorums, quorums_without_wormhole
from cloudfit_orchestrator.model.record import open_record, seal_record
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.statement import Kind
from tests.conformance.group import CONTROLLER, Group, Node
from tests.conformance.properties import decided

EMPTY = StateStore().root()


def group_of(n: int = 4, **more: int) -> Group:
    return Group("pbft", n=n, f=(n - 1) // 3, **more)


def node(group: Group, replica: str) -> Node:
    return next(found for found in group.nodes.values() if found.replica == replica)


def signature(group: Group, replica: str, statement: bytes) -> bytes:
    return node(group, replica).wormhole.sign(group.active.c, Kind.PBFT, statement)


def vote(group: Group, replica: str, phase: Phase, g: int, s: int, digest: bytes, batch: bytes = b"") -> Vote:
    signed = signature(group, replica, vote_statement(phase, g, s, digest))
    return Vote(group.active.c, replica, phase, g, s, digest, signed, batch)


def change(group: Group, replica: str, body: ViewChange | NewView) -> Change:
    data = encode(body)
    return Change(group.active.c, replica, data, signature(group, replica, change_statement(data)))


def view_change(group: Group, replica: str, target: int, *prepared: Prepared, h: int = 0) -> Change:
    return change(group, replica, ViewChange(replica, target, h, EMPTY, (), prepared))


def prepared(group: Group, s: int, g: int, digest: bytes) -> Prepared:
    names = [found.replica for found in group.nodes.values()]
    backups = [name for name in names if name != names[g % len(names)]][: group.active.quorums.commit - 1]
    return Prepared(
        s, g, digest, vote(group, names[g % len(names)], Phase.PRE_PREPARE, g, s, digest).signature,
        tuple(Signed(name, vote(group, name, Phase.PREPARE, g, s, digest).signature) for name in backups),
    )  # fmt: skip


def batch(group: Group, number: int) -> bytes:
    group.issued += [n.to_bytes(4, "big") for n in range(len(group.issued) + 1, number + 1)]
    body = encode(BundleBody(group.active.life, group.client.public, (Request(number, number.to_bytes(4, "big")),)))
    return make_batch([encode(Bundle(body, group.client.sign(bundle_bytes(body))))])


def tell(group: Group, to: str, *messages: Frozen, sender: str = "r0#1") -> None:
    for message in messages:
        node(group, to).core.receive(sender, encode(message))
        node(group, to).run()


def ordering(group: Group, replica: str):
    return node(group, replica).core._at.ordering


def liars(group: Group) -> set[tuple[str, str]]:
    return {(body["replica"], body["kind"]) for _, topic, body in group.reports if topic == "liar"}


# ----- quorums
@pytest.mark.parametrize(
    ("n", "f", "k", "quorum"), [(1, 0, 0, 1), (4, 1, 0, 3), (5, 1, 0, 4), (6, 1, 1, 4), (7, 2, 0, 5), (10, 3, 0, 7)]
)
def test_two_quorums_share_a_correct_member_and_one_is_left_without_the_faulty(n, f, k, quorum):
    assert quorums_without_wormhole(n, f, k) == Quorums(quorum, quorum)
    assert 2 * quorum - n >= f + 1
    assert quorum <= n - f - k


@pytest.mark.parametrize(("n", "f", "k"), [(3, 1, 0), (5, 1, 1), (6, 2, 0), (4, -1, 0)])
def test_too_few_members_are_refused(n, f, k):
    with pytest.raises(BadInputError):
        quorums_without_wormhole(n, f, k)


def test_a_record_of_three_members_is_none():
    group = group_of()
    record = replace(group.records[0], members=group.records[0].members[:3])
    with pytest.raises((BadError, BadInputError), match="3f"):
        open_record(seal_record(record, CONTROLLER), [public_bytes(CONTROLLER)])


# ----- the normal case
def test_a_slot_takes_three_phases_and_a_quorum_in_each():
    group = group_of()
    for name in ("r0", "r3"):
        node(group, name).down = True
    data = batch(group, 1)
    digest = batch_digest(data)
    r1 = ordering(group, "r1")
    tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, 1, digest, data))
    assert (0, 1, Phase.PREPARE) in r1.voice.said
    assert (0, 1, Phase.COMMIT) not in r1.voice.said
    tell(group, "r1", vote(group, "r2", Phase.PREPARE, 0, 1, digest))
    assert (0, 1, Phase.COMMIT) in r1.voice.said, "PRE-PREPARE and 2f PREPAREs, its own among them"
    tell(group, "r1", vote(group, "r0", Phase.COMMIT, 0, 1, digest))
    assert r1.decision(1) is None
    tell(group, "r1", vote(group, "r2", Phase.COMMIT, 0, 1, digest))
    assert r1.decision(1) == digest


def test_a_batch_that_is_not_valid_or_not_here_is_not_prepared():
    group = group_of()
    bad = make_batch([b"no bundle"])
    tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, 1, batch_digest(bad), bad))
    tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, 2, b"?" * 32))
    assert not ordering(group, "r1").voice.said
    assert ordering(group, "r1").wanted == {b"?" * 32}


@pytest.mark.parametrize("s", [0, 17, 1 << 40])
def test_votes_outside_the_watermarks_count_for_nothing(s):
    group = group_of(window=16)
    tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, s, NOOP))
    assert not ordering(group, "r1").book.proposals()


def test_a_backup_that_proposes_and_a_leader_that_prepares_are_blamed():
    group = group_of()
    tell(group, "r1", vote(group, "r2", Phase.PRE_PREPARE, 0, 1, NOOP), vote(group, "r0", Phase.PREPARE, 0, 1, NOOP))
    assert liars(group) == {("r2", "phase"), ("r0", "phase")}
    assert not ordering(group, "r1").book.proposals()


def test_who_hands_on_what_is_not_signed_is_blamed_and_not_who_is_named():
    group = group_of()
    forged = msgspec.structs.replace(vote(group, "r0", Phase.PRE_PREPARE, 0, 1, NOOP), s=2)
    tell(group, "r1", forged, sender="r3#4")
    assert liars(group) == {("r3", "signature")}


# ----- equivocation
def test_an_equivocating_primary_gets_neither_of_two_batches_decided_without_a_quorum():
    group = group_of()
    node(group, "r0").silent = True
    one, two = batch(group, 1), batch(group, 2)
    tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, 1, batch_digest(one), one))
    for name in ("r2", "r3"):
        tell(group, name, vote(group, "r0", Phase.PRE_PREPARE, 0, 1, batch_digest(two), two))
    group.deliver_all()
    for name in ("r1", "r2", "r3"):
        assert ordering(group, name).voice.said.keys() == {(0, 1, Phase.PREPARE)} or name in ("r2", "r3")
        assert ordering(group, name).decision(1) is None
    for name in ("r1", "r2", "r3"):  # it helps both sides, and shows both to all
        for data in (one, two):
            digest = batch_digest(data)
            tell(group, name, vote(group, "r0", Phase.COMMIT, 0, 1, digest))
            tell(group, name, vote(group, "r0", Phase.PRE_PREPARE, 0, 1, digest, data))
    group.deliver_all()
    assert ("r0", "equivocation") in liars(group)
    decided(group)
    assert group.finish()
    assert {ordering(group, name).e for name in ("r1", "r2", "r3")} != {0}


def test_of_an_equivocating_backup_the_first_vote_counts():
    group = group_of()
    data = batch(group, 1)
    digest = batch_digest(data)
    for name in ("r0", "r2"):
        node(group, name).down = True
    tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, 1, digest, data))
    for phase in (Phase.PREPARE, Phase.COMMIT):
        tell(group, "r1", vote(group, "r3", phase, 0, 1, NOOP), vote(group, "r3", phase, 0, 1, digest))
    tell(group, "r1", vote(group, "r0", Phase.COMMIT, 0, 1, digest))
    assert ordering(group, "r1").decision(1) is None, "r3's second votes must not make a quorum"
    assert ("r3", "equivocation") in liars(group)
    tell(group, "r1", vote(group, "r2", Phase.PREPARE, 0, 1, digest), vote(group, "r2", Phase.COMMIT, 0, 1, digest))
    assert ordering(group, "r1").decision(1) == digest


def test_a_commit_certificate_is_proof_by_itself_and_a_forged_one_is_none():
    group = group_of()
    commits = tuple(Signed(r, vote(group, r, Phase.COMMIT, 0, 1, NOOP).signature) for r in ("r0", "r2", "r3"))
    for bad in (commits[:2], (*commits[:2], commits[0]), (*commits[:2], Signed("r1", commits[2].signature))):
        tell(group, "r1", Decided(1, 0, 1, NOOP, bad), sender="r3#4")
        assert ordering(group, "r1").decision(1) is None
    assert ("r3", "signature") in liars(group)
    tell(group, "r1", Decided(1, 0, 1, NOOP, commits))
    assert ordering(group, "r1").decision(1) == NOOP


# ----- view changes
def test_of_several_prepared_slots_that_of_the_highest_view_is_chosen_and_gaps_are_no_ops():
    group = group_of(window=16)
    old, new = batch_digest(batch(group, 1)), batch_digest(batch(group, 2))
    votes = [
        ViewChange("r0", 3, 0, EMPTY, (), (prepared(group, 1, 0, old), prepared(group, 3, 0, old))),
        ViewChange("r1", 3, 0, EMPTY, (), (prepared(group, 1, 1, new),)),
        ViewChange("r2", 3, 0, EMPTY, (), ()),
    ]
    for order in (votes, votes[::-1]):
        final = new_view(order)
        assert final.choices == ((1, new), (2, NOOP), (3, old))
    later = ViewChange("r3", 3, 2, EMPTY, (), ())
    assert new_view([*votes[:2], later]).choices == ((3, old),), "what a checkpoint covers is settled"


def _forgeries(group: Group) -> dict[str, ViewChange]:
    digest = batch_digest(batch(group, 1))
    good = prepared(group, 1, 0, digest)
    change_ = msgspec.structs.replace
    leaders = vote(group, "r0", Phase.PREPARE, 0, 1, digest)
    checkpoint = tuple(Signed(r, bytes(64)) for r in ("r0", "r1", "r2"))

    def of(**fields) -> ViewChange:
        right = {"replica": "r3", "target": 1, "h": 0, "digest": EMPTY, "certificate": (), "prepared": (good,)}
        return ViewChange(**{**right, **fields})

    return {
        "another digest": of(prepared=(change_(good, digest=NOOP),)),
        "another slot": of(prepared=(change_(good, s=2),)),
        "too few": of(prepared=(change_(good, prepares=good.prepares[:-1]),)),
        "one twice": of(prepared=(change_(good, prepares=(good.prepares[0],) * 2),)),
        "the leader as a backup": of(
            prepared=(change_(good, prepares=(Signed("r0", leaders.signature), good.prepares[0])),)
        ),
        "one in another's name": of(
            prepared=(change_(good, prepares=(good.prepares[0], Signed("r3", good.prepares[1].signature))),)
        ),
        "a view that is still to come": of(prepared=(change_(good, g=1),)),
        "a digest that is none": of(prepared=(change_(good, digest=b"short"),)),
        "beyond the window": of(prepared=(prepared(group, 17, 0, digest),)),
        "a slot twice": of(prepared=(good, good)),
        "a checkpoint without a certificate": of(h=4, prepared=()),
        "a forged checkpoint": of(h=4, certificate=checkpoint, prepared=()),
        "another start": of(digest=bytes(32)),
        "in another's name": of(replica="r2"),
    }


@pytest.mark.parametrize("what", _forgeries(group_of(window=16)))
def test_a_view_change_with_a_forged_certificate_is_nobodys(what):
    group = group_of(window=16)
    tell(group, "r1", change(group, "r3", _forgeries(group)[what]), sender="r3#4")
    assert not ordering(group, "r1").changes.targets()
    assert "r3" in {replica for replica, _ in liars(group)}
    tell(group, "r1", view_change(group, "r3", 1, prepared(group, 1, 0, batch_digest(batch(group, 1)))))
    assert ordering(group, "r1").changes.targets() == {"r3": 1}, "the good one counts"


def test_f_members_cannot_make_others_change_views_and_f_plus_one_do():
    group = group_of()
    tell(group, "r1", view_change(group, "r3", 7))
    assert ordering(group, "r1").voice.v == 0
    tell(group, "r1", view_change(group, "r2", 5))
    assert ordering(group, "r1").voice.v == 5, "the lowest of those asked for"


def test_conflicting_view_changes_to_different_receivers_do_not_part_them():
    group = group_of()
    node(group, "r0").silent = node(group, "r3").silent = False
    node(group, "r0").down = True
    data = batch(group, 1)
    digest = batch_digest(data)
    for name in ("r1", "r2", "r3"):  # prepared at r2 and r3 only
        tell(group, name, vote(group, "r0", Phase.PRE_PREPARE, 0, 1, digest, data))
    group.flying.clear()
    for name in ("r2", "r3"):
        tell(group, name, *(vote(group, r, Phase.PREPARE, 0, 1, digest) for r in ("r1", "r2", "r3")))
    group.flying.clear()
    node(group, "r3").down = True
    shows, hides = view_change(group, "r3", 1, prepared(group, 1, 0, digest)), view_change(group, "r3", 1)
    tell(group, "r1", hides)
    tell(group, "r2", shows)
    ordering(group, "r1").suspect()
    ordering(group, "r2").suspect()
    for name in ("r1", "r2"):
        node(group, name).run()
    assert group.settle(lambda: ordering(group, "r1").e >= 1 and ordering(group, "r2").e >= 1, 20)
    assert ordering(group, "r1").choices == ordering(group, "r2").choices
    assert ordering(group, "r1").entered == ordering(group, "r2").entered


def test_a_new_view_by_another_than_its_leader_or_of_too_few_is_nobodys():
    group = group_of()
    votes = [view_change(group, r, 1) for r in ("r0", "r2", "r3")]
    names = tuple(Named(v.replica, 0, change_statement(v.body)) for v in votes)
    tell(group, "r2", *votes)
    for who, named in (("r3", names), ("r1", names[:2]), ("r1", (names[0], names[0], names[1]))):
        tell(group, "r2", change(group, who, NewView(who, 1, named)), sender="r3#4")
        assert ordering(group, "r2").e == 0
    wrong = (*names[:2], Named("r1", 0, names[2].digest))
    tell(group, "r2", change(group, "r1", NewView("r1", 1, wrong)))
    assert ordering(group, "r2").e == 0
    tell(group, "r2", change(group, "r1", NewView("r1", 1, names)))
    assert ordering(group, "r2").e == 1


def test_a_leader_that_proposes_against_its_new_view_is_blamed():
    group = group_of()
    good = prepared(group, 1, 0, batch_digest(batch(group, 1)))
    votes = [view_change(group, r, 1, good) for r in ("r0", "r2", "r3")]
    names = tuple(Named(v.replica, 0, change_statement(v.body)) for v in votes)
    tell(group, "r2", *votes, change(group, "r1", NewView("r1", 1, names)))
    tell(group, "r2", vote(group, "r1", Phase.PRE_PREPARE, 1, 1, NOOP))
    assert ("r1", "PRE-PREPARE against its NEW-VIEW") in liars(group)
    assert ordering(group, "r2").book.proposal(1) is None


# ----- succession
def test_two_wedges_of_one_member_are_two_sets_and_everyone_computes_both():
    group = group_of()
    for _ in range(3):
        group.submit()
    group.settle(lambda: False, 1)
    voice = ordering(group, "r0").voice
    shown = tuple(found for _, found in sorted(voice.prepared.items()))
    assert shown
    stable = voice.stable
    two = [
        change(group, "r3", ViewChange("r3", WEDGE, stable.slot, stable.digest, stable.signatures, of))
        for of in (shown, ())
    ]
    node(group, "r3").silent = True
    record = group.prepare()
    assert group.settle(lambda: all(ordering(group, r).wedged for r in ("r0", "r1", "r2")), 10)
    group.settle(lambda: False, 1)
    tell(group, "r0", two[0])
    tell(group, "r1", two[1])
    for wedge in two:
        own = [named for named in ordering(group, "r0").wedges() if named.replica in ("r0", "r1")]
        names = (*own, Named("r3", 0, change_statement(wedge.body)))
        for name in ("r0", "r1", "r2"):
            ordering(group, name).final(names)  # what it lacks it wants from now on
            tell(group, name, wedge)
        found = [ordering(group, name).final(names) for name in ("r0", "r1", "r2")]
        assert found[0] is not None
        assert found == found[:1] * 3
    assert group.settle(lambda: group.activate(record), 30)


def test_after_its_wedge_a_member_signs_nothing():
    group = group_of()
    group.submit()
    group.settle(lambda: False, 1)
    data = batch(group, 9)
    s = ordering(group, "r1").stable + 3
    late = vote(group, "r0", Phase.PRE_PREPARE, 0, s, batch_digest(data), data)
    group.prepare()
    assert group.settle(lambda: all(ordering(group, r).wedged for r in ("r0", "r1", "r2", "r3")), 10)
    said = {member.name: dict(member.said) for member in group.nodes.values()}
    assert all((1, "ViewChange", WEDGE) in words for words in said.values())
    for name in ("r1", "r2"):
        tell(group, name, late)
    group.settle(lambda: False, 2)
    assert {member.name: dict(member.said) for member in group.nodes.values()} == said


# ----- restarts
@pytest.mark.parametrize("seed", range(1, 6))
def test_whatever_was_sent_is_remembered_at_every_prefix_of_the_log(seed):
    group = group_of(seed=seed)
    member = node(group, "r1")
    seen: list[tuple[int, dict]] = []  # length of the log, what had been said
    say = member._say

    def watched(effect):
        say(effect)
        seen.append((len(member.log), dict(member.said)))

    member._say = watched
    group.storm(900)
    member._say = say
    lengths = sorted({length for length, _ in seen})
    assert len(lengths) > 8
    log = list(member.log)
    for length in lengths:
        said = [said for reached, said in seen if reached <= length][-1]
        member.log = log[:length]
        member.boot()
        voice = ordering(group, "r1").voice
        for c, kind, *key in said:
            if c != 1 or ordering(group, "r1").record.c != 1:
                continue
            if kind == "vote":
                phase, g, s = key
                gone = g < ordering(group, "r1").e or g < voice.v or s <= voice.stable.slot
                assert gone or voice.said[g, s, phase] == said[c, kind, phase, g, s]
            elif kind == "ViewChange":
                assert key[0] <= voice.v
            elif kind == "NewView":
                assert key[0] <= ordering(group, "r1").e or key[0] in voice._new_views or key[0] < voice.v
        for (g, s, phase), digest in voice.said.items():
            if phase is Phase.COMMIT and g == ordering(group, "r1").e:
                assert voice.prepared[s].digest == digest, "a COMMIT whose certificate is lost"


def test_what_is_prepared_is_in_the_log_before_the_commit_is():
    group = group_of()
    group.submit()
    group.settle(lambda: False, 1)
    decode = entry_decoder(ENTRIES)
    entries = [decode(data) for data in node(group, "r1").log[3:]]
    places = [i for i, entry in enumerate(entries) if isinstance(entry, LogPrepared)]
    commits = [i for i, e in enumerate(entries) if getattr(e, "phase", 0) == Phase.COMMIT]
    assert places
    assert commits
    assert places[0] < commits[0]


def test_a_member_whose_log_is_lost_says_so_and_nothing_else():
    group = group_of()
    for _ in range(3):
        group.submit()
    group.settle(lambda: False, 1)
    member = node(group, "r3")
    member.log, member.snapshots = [], {}
    member.boot()
    said = dict(member.said)
    member.lies = True  # it counts in f
    for _ in range(3):
        group.submit()
    group.settle(lambda: False, 5)
    assert ("r3#4", "amnesia") in [(name, topic) for name, topic, _ in group.reports]
    assert member.said == said
    assert not member.core.status["live"]
    assert group.finish(), "the others go on"
    assert sorted(member.operations) == sorted(group.issued), "it follows as a learner does"


def test_what_the_kss_refuses_for_a_time_is_asked_for_again():
    group = group_of()
    for name in ("r1", "r2"):
        node(group, name).wormhole.freeze(1)
    group.submit()
    group.settle(lambda: False, 0.4)
    assert not decided(group)
    for name in ("r1", "r2"):
        node(group, name).wormhole.thaw(1)
    assert group.settle(lambda: len(decided(group)) == 1, 3)


def test_what_was_confirmed_is_found_again_though_all_who_confirmed_it_start_again():
    group = group_of()
    for _ in range(3):
        group.submit()
    group.settle(lambda: len(decided(group)) > 0, 3)
    group.submit("r0")
    while group.flying:  # the tail is prepared, and decided by S alone
        message = peer_decoder(MESSAGES)(group.flying[0][2])
        if isinstance(message, Vote) and message.phase == Phase.COMMIT:
            group.flying.pop(0)
        else:
            group.deliver()
    before = {member.core.status["slot"] for member in group.nodes.values()}
    record = group.prepare()
    assert group.settle(lambda: any(len(s) >= 4 for s in group.confirmations(record).values()), 20)
    group.flying.clear()
    for member in group.nodes.values():
        member.boot()
    group.flying.clear()
    assert group.activate(record)
    assert group.active.h > max(before)
    for member in group.nodes.values():
        at = member.core._at
        assert at.installed, f"{member.name} cannot tell what it confirmed"
        assert at.execution.snapshots[record.c, group.active.h].root == group.active.digest


def test_a_certificate_that_one_member_withheld_from_another_is_handed_on():
    group = group_of(period=1)
    late = node(group, "r3")
    late.down = True
    group.submit()
    group.settle(lambda: ordering(group, "r1").stable >= 1, 5)
    newest = ordering(group, "r1").statements.newest
    late.down = False
    forged = Stable(1, newest.slot + 1, newest.digest, newest.signatures)
    tell(group, "r3", forged, sender="r0#1")
    assert ordering(group, "r3").statements.newest is None
    assert ("r0", "signature") in liars(group)
    group.flying.clear()
    tell(group, "r1", FetchSlots(1, 0, 1, 8), sender="r3#4")
    answer = [peer_decoder(MESSAGES)(body) for _, peer, body in group.flying if peer == "r3#4"]
    stable = [message for message in answer if isinstance(message, Stable)]
    assert stable
    tell(group, "r3", *stable, sender="r1#2")
    assert ordering(group, "r3").statements.newest.slot == newest.slot
