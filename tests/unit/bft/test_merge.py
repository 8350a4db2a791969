"""EBAWA's merge (protocol §5): a pure function of votes; what is missing is said, never guessed."""

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.bft.messages import NOOP, Named
from cloudfit_orchestrator.bft.usig.judge import StreamState
from cloudfit_orchestrator.bft.usig.merge import Merged, Missing, Proposal, Vote, merge
from cloudfit_orchestrator.bft.usig.messages import Choice, NewView
from cloudfit_orchestrator.model.record import Algorithm, ConfigRecord
from tests.unit.bft.house import House

RECORD = House(3, window=16, period=4).record
MINBFT = House(3, window=16, period=4, algorithm=Algorithm.MINBFT).record
FIVE = House(5, f=2, window=16, period=4).record
A, B, X = b"a" * 32, b"b" * 32, b"x" * 32


class Known:
    """The holder of the streams: all is here and sound, but for what is said."""

    def __init__(self, *, invalid=(), absent=(), fallen=(), unread=(), views=None) -> None:
        self.invalid, self.absent, self.fallen, self.unread = invalid, absent, fallen, unread
        self.views = views or {}

    def batch_valid(self, digest):
        return None if digest in self.absent else digest not in self.invalid

    def stands(self, replica, cv):
        return None if (replica, cv) in self.unread else (replica, cv) not in self.fallen

    def new_view(self, g):
        return self.views.get(g)


def vote(replica: str, *proposals: Proposal, views=(), retires=(), **state) -> Vote:
    told = {"h": 0, "v": 0, "e": 0, "p": 0, "blacklist": (), "retired": (), **state}
    return Vote(Named(replica, 9, bytes(32)), StreamState(**told), proposals, tuple(views), tuple(retires), ())


def prop(s: int, batch: bytes = A, g: int = 0, proposer: str | None = None, cv: int | None = None) -> Proposal:
    return Proposal(g, s, proposer or f"r{s % 3}", cv or s, batch)


def done(votes: list[Vote], known: Known | None = None, record: ConfigRecord = RECORD) -> Merged:
    outcome = merge(record, votes, known or Known())
    assert isinstance(outcome, Merged), outcome
    return outcome


def test_without_proposals_nothing_is_chosen() -> None:
    m = done([vote("r0", h=4), vote("r1", h=8)])
    assert (m.h, m.s_max, m.choices) == (8, 8, ())


def test_the_highest_view_wins_and_gaps_become_no_ops() -> None:
    views = {2: (NewView(1, 2, 0, 0, (), ()), ())}
    votes = [vote("r0", prop(1, A), prop(3, A)), vote("r1", prop(3, B, g=2, cv=7), e=2, v=2, views=[(2, 0)])]
    m = done(votes, Known(views=views))
    assert m.choices == (Choice(1, 0, A), Choice(2, 0, NOOP), Choice(3, 2, B))
    assert (m.h, m.s_max) == (0, 3)


def test_slots_up_to_the_highest_stable_one_are_settled() -> None:
    m = done([vote("r0", prop(1), prop(2)), vote("r1", h=2)])
    assert (m.h, m.s_max, m.choices) == (2, 2, ())


def test_a_new_views_choices_count_like_proposals_of_its_view() -> None:
    choices = (Choice(1, 0, A), Choice(2, 0, NOOP))
    views = {1: (NewView(1, 1, 0, 2, (), ()), choices)}
    m = done([vote("r0", prop(2, B)), vote("r1", views=[(1, 2)], e=1, v=1, p=2)], Known(views=views))
    assert m.choices == (Choice(1, 1, A), Choice(2, 1, NOOP)), "view 1 says no-op for slot 2"


def test_what_does_not_stand_is_ineligible() -> None:
    m = done([vote("r0", prop(1, A), prop(2, B)), vote("r1")], Known(fallen=[("r2", 2)]))
    assert (m.s_max, m.choices) == (1, (Choice(1, 0, A),))


def test_an_invalid_batch_is_ineligible_and_a_lower_view_shows_through() -> None:
    votes = [vote("r0", prop(1, A)), vote("r1", prop(1, X, g=1, proposer="r2", cv=9), e=1, v=1, views=[(1, 0)])]
    views = {1: (NewView(1, 1, 0, 0, (), ()), ())}
    assert done(votes, Known(invalid=[X], views=views)).choices == (Choice(1, 0, A),)


def test_missing_is_not_invalid() -> None:
    votes = [vote("r0", prop(1, A), prop(2, B)), vote("r1")]
    assert merge(RECORD, votes, Known(absent=[B])) == Missing(batches=(B,))
    assert merge(RECORD, votes, Known(unread=[("r2", 2)])) == Missing(streams=(("r2", 2),))
    assert merge(RECORD, [vote("r0", views=[(1, 2)], e=1), vote("r1")], Known()) == Missing(views=(1,))


def test_a_missing_batch_below_the_stable_slot_does_not_matter() -> None:
    assert done([vote("r0", prop(1, A)), vote("r1", h=1)], Known(absent=[A])).s_max == 1


# ---------------------------------------------------------------------------------------------------------- blacklist
def test_the_proposer_of_the_lowest_slot_without_a_proposal_is_blamed() -> None:
    assert done([vote("r0", prop(1), prop(2)), vote("r1")]).blacklist == ("r0",)  # slot 3 is r0's
    assert done([vote("r0", prop(2)), vote("r1")]).blacklist == ("r1",)  # slot 1 is r1's
    assert done([vote("r0", h=4), vote("r1")]).blacklist == ("r2",)  # slot 5


def test_only_proposals_of_the_highest_view_entered_count_against_blame() -> None:
    views = {1: (NewView(1, 1, 0, 0, (), ()), ())}
    m = done([vote("r0", prop(1, g=0)), vote("r1", e=1, v=1, views=[(1, 0)])], Known(views=views))
    assert m.blacklist == ("r1",), "slot 1 has a proposal of view 0, none of view 1"


def test_a_vote_too_few_shifts_no_blame() -> None:
    """Counting votes was broken: faulty r2 left its vote for slot 1 out; r1, which proposed there, is not
    to be blamed for it.
    """
    m = done([vote("r1", prop(1)), vote("r2", prop(2))])
    assert m.blacklist == ("r0",)


def test_the_blacklist_is_first_in_first_out_and_holds_f() -> None:
    views = {3: (NewView(1, 3, 0, 0, (), ()), ())}
    known = Known(views=views)
    m = done([vote("r0", e=3, v=3, blacklist=("r0",), views=[(3, 0)]), vote("r1")], known)
    assert m.blacklist == ("r2",), "the proposers of view 3 are r1, r2; slot 1 is r2's; r0 goes out"
    five = done([vote(r, e=3, v=3, blacklist=("r4", "r0"), views=[(3, 0)]) for r in ("r0", "r1", "r2")], known, FIVE)
    assert five.blacklist == ("r0", "r2")
    again = done([vote(r, e=3, v=3, blacklist=("r2", "r0"), views=[(3, 0)]) for r in ("r0", "r1", "r3")], known, FIVE)
    assert again.blacklist == ("r0", "r3")


def test_with_one_proposer_there_is_no_blacklist() -> None:
    assert done([vote("r0", prop(1, proposer="r0")), vote("r1")], record=MINBFT).blacklist == ()


def test_the_blacklist_is_that_of_the_highest_view_entered() -> None:
    views = {2: (NewView(1, 2, 0, 0, (), ()), ()), 1: (NewView(1, 1, 0, 0, (), ()), ())}
    votes = [
        vote("r0", e=1, v=2, blacklist=("r1", "r2"), views=[(1, 0)]),
        vote("r1", e=2, v=2, blacklist=("r4", "r3"), views=[(2, 0)]),
        vote("r2"),
    ]
    assert done(votes, Known(views=views), FIVE).blacklist == ("r3", "r1"), "Ag of view 2 is r0, r1, r2; slot 1 is r1's"


# ------------------------------------------------------------------------------------------------------------ retired
def test_the_retired_are_never_forgotten() -> None:
    views = {1: (NewView(1, 1, 0, 0, (), ()), ())}
    votes = [vote("r0", retires=["r2"]), vote("r1", e=1, v=1, retired=("r0",), views=[(1, 0)])]
    assert done(votes, Known(views=views)).retired == ("r0", "r2")


# ------------------------------------------------------------------------------------------------------------- purity
proposals = st.builds(
    prop, st.integers(1, 8), st.sampled_from([A, B, NOOP]), st.just(0), st.none(), st.integers(1, 9)
)  # fmt: skip


@given(st.lists(st.lists(proposals, max_size=6), min_size=3, max_size=3), st.integers(0, 3))
def test_the_order_of_votes_does_not_matter(logs: list[list[Proposal]], h: int) -> None:
    # One standing proposal a slot and view (R3): of two that a log claims, the first is taken for the one.
    first: dict[int, Proposal] = {}
    for log in logs:
        for p in log:
            first.setdefault(p.s, p)
    votes = [
        vote(f"r{i}", *(first[p.s] for p in log), h=h * (i == 1)) for i, log in enumerate(logs)
    ]  # fmt: skip
    outcomes = {done(list(order)) for order in permutations(votes)}
    assert len(outcomes) == 1


@given(st.integers(0, 3))
def test_what_a_log_says_of_settled_slots_does_not_matter(h: int) -> None:
    """So judges who start at different anchors compute the same S."""
    whole = vote("r0", prop(1, A), prop(2, B), prop(3, A), prop(5, B), h=h)
    cut = replace(whole, proposals=tuple(p for p in whole.proposals if p.s > h))
    other = vote("r1", prop(1, A))
    assert done([whole, other]) == done([cut, other])


@pytest.mark.parametrize("order", [0, 1])
def test_votes_of_one_view_agree_on_its_company(order: int) -> None:
    views = {1: (NewView(1, 1, 0, 0, ("r2",), ("r0",)), ())}
    votes = [vote(r, e=1, v=1, blacklist=("r2",), retired=("r0",), views=[(1, 0)]) for r in ("r0", "r1")]
    m = done(votes[::-1] if order else votes, Known(views=views))
    assert (m.blacklist, m.retired) == (("r1",), ("r0",))
