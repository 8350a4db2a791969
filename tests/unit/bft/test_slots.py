"""What decides a slot (protocol §3): Qc distinct members for the same (g, s, cv_p, D)."""

import pytest

from cloudfit_orchestrator.bft.messages import NOOP
from cloudfit_orchestrator.bft.ordering import AgreementError
from cloudfit_orchestrator.bft.usig.merge import Proposal
from cloudfit_orchestrator.bft.usig.messages import Choice
from cloudfit_orchestrator.bft.usig.slots import Slots

A, B = b"a" * 32, b"b" * 32


def test_qc_distinct_members_decide() -> None:
    slots = Slots(0, 3)
    p = Proposal(0, 1, "r1", 1, A)
    slots.propose(p)
    slots.propose(p)
    slots.vote(p, "r0")
    slots.vote(p, "r0")  # the same member twice is one vote
    assert slots.decision(1) is None
    slots.vote(p, "r2")
    assert slots.decision(1) == A
    assert slots.highest_decided == 1


def test_votes_of_different_views_do_not_add_up() -> None:
    slots = Slots(0, 3)
    for g, proposer in ((0, "r0"), (1, "r1"), (2, "r2")):
        slots.propose(Proposal(g, 1, proposer, 1, A))
    assert slots.decision(1) is None


def test_qc_members_of_a_new_view_decide_all_its_slots() -> None:
    slots = Slots(0, 2)
    choices = (Choice(1, 0, A), Choice(2, 0, NOOP))
    slots.vote_view(1, "r1", choices)
    slots.vote_view(1, "r1", choices)
    assert slots.decisions() == []
    slots.vote_view(1, "r0", choices)
    assert slots.decisions() == [(1, A), (2, NOOP)]


def test_two_values_for_one_slot_stop_everything() -> None:
    slots = Slots(0, 2)
    slots.decide(1, A)
    slots.decide(1, A)
    with pytest.raises(AgreementError, match="slot 1"):
        slots.decide(1, B)


def test_settled_slots_are_forgotten_and_stay_so() -> None:
    slots = Slots(0, 2)
    for s in (1, 2, 3):
        slots.decide(s, A)
    slots.settle(2)
    slots.decide(1, B)  # covered by a checkpoint: of no interest any more
    slots.propose(Proposal(0, 2, "r2", 1, B))
    slots.vote(Proposal(0, 2, "r2", 1, B), "r0")
    assert slots.decisions() == [(3, A)]
    assert slots.highest == 2
    slots.settle(1)
    assert slots.floor == 2


def test_the_top_of_a_view_is_its_highest_proposal() -> None:
    slots = Slots(0, 2)
    three, one = Proposal(0, 3, "r0", 1, A), Proposal(0, 1, "r1", 1, B)
    slots.propose(three)
    slots.propose(one)
    slots.propose(Proposal(1, 2, "r2", 1, B))
    assert [slots.top(g) for g in (0, 1, 2)] == [3, 2, 0]
    assert slots.highest == 3
    slots.settle(2)
    assert [slots.top(g) for g in (0, 1)] == [3, 0]
