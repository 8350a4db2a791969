"""The suite can fail: for each property an engine, or a core, that is broken in just that, and is found out."""

from collections.abc import Callable

import pytest

from cloudfit_orchestrator.bft import replica as core
from cloudfit_orchestrator.bft.batch import Checked
from cloudfit_orchestrator.bft.batches import _Held
from cloudfit_orchestrator.bft.checkpoints import Certificate
from cloudfit_orchestrator.bft.engines import engine
from cloudfit_orchestrator.bft.messages import NOOP, BundleBody, Request
from cloudfit_orchestrator.bft.ordering import AgreementError, Final, Ordering, ProtocolError
from cloudfit_orchestrator.bft.pbft.journal import LogSaid
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from tests.conformance.properties import PROPERTIES

Mutation = Callable[[type[Ordering]], type[Ordering]]
FORGED = b"f" * 32


def disagrees(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def decision(self, s):
            found = super().decision(s)
            return NOOP if found is not None and s == 2 and self._at.me == "r2" else found

    return Mutant


def decides_early(base: type[Ordering]) -> type[Ordering]:
    """What the leader proposes is decided by who hears it: no quorum, so a change of view loses it."""

    class Mutant(base):  # type: ignore[misc,valid-type]
        def decision(self, s):
            found = super().decision(s)
            if found is not None:
                return found
            if hasattr(self, "book"):
                return self.book.proposal(s)
            slot = self.configuration.slots._slots.get(s)
            return next((proposal.batch for proposal in slot.proposals.values()), None) if slot else None

    return Mutant


def swaps(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def decision(self, s):
            if self._at.me == "r0" and s in (3, 4) and None not in (super().decision(3), super().decision(4)):
                return super().decision(7 - s)
            return super().decision(s)

    return Mutant


def creates(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def decision(self, s):
            found = super().decision(s)
            if found is None or s != 2:
                return found
            body = BundleBody(self.record.life, self.record.clients[0].key, (Request(200, b"forged"),))
            self.batches._held[FORGED] = _Held(b"\x90", valid=True, checked=Checked(FORGED, (body,)), slot=s)
            return FORGED

    return Mutant


def never_suspects(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def suspect(self):
            pass

    return Mutant


def never_wedges(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def wedge(self, prepared):
            pass

    return Mutant


def goes_on_after_its_wedge(base: type[Ordering]) -> type[Ordering]:
    """Says a last word, and then decides what waits by itself."""

    class Mutant(base):  # type: ignore[misc,valid-type]
        def speak(self, take_batch):
            super().speak(take_batch)
            slot = self._at.execution.slot + 1
            if self.wedged and self.decision(slot) is None:
                digest = take_batch(slot)
                if digest is not None:
                    self.decided(slot, digest)

        def close(self, end):
            pass

    return Mutant


def two_last_words(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def wedges(self):
            return [*super().wedges(), *super().wedges()[:1]]

    return Mutant


def loses_what_was_chosen(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def final(self, names):
            found = super().final(names)
            return found and Final(found.h, found.s_max, tuple((s, NOOP) for s, _ in found.choices))

    return Mutant


def computes_its_own_final(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def final(self, names):
            found = super().final(names)
            if found is None or not found.choices or self._at.me != "r1":
                return found
            return Final(found.h, found.s_max, (*found.choices[:-1], (found.s_max, NOOP)))

    return Mutant


def believes_any_checkpoint(base: type[Ordering]) -> type[Ordering]:
    class Mutant(base):  # type: ignore[misc,valid-type]
        def __init__(self, *arguments):
            super().__init__(*arguments)
            statements, add = self.statements, self.statements.add

            def believe(message, above):
                if message.kind != Kind.CHECKPOINT:
                    return add(message, above)
                statements.certify(Certificate(*LAYOUT[Kind.CHECKPOINT].unpack(message.body), ()))
                return True

            statements.add = believe

    return Mutant


def forgets(base: type[Ordering]) -> type[Ordering]:
    """Nothing of the log is restored; of PBFT's, only what it said itself is not."""

    class Mutant(base):  # type: ignore[misc,valid-type]
        def restore(self, entry):
            if hasattr(self, "book") and not isinstance(entry, LogSaid):
                super().restore(entry)

        def fetch(self):
            if hasattr(self, "book"):
                super().fetch()

    return Mutant


MUTANTS: list[tuple[str, Mutation]] = [
    ("agreement", disagrees),
    ("agreement", decides_early),
    ("total_order", swaps),
    ("no_creation", creates),
    ("liveness", never_suspects),
    ("wedge", never_wedges),
    ("wedge", goes_on_after_its_wedge),
    ("wedge", two_last_words),
    ("final", loses_what_was_chosen),
    ("final", computes_its_own_final),
    ("install", loses_what_was_chosen),
    ("checkpoint", believes_any_checkpoint),
    ("restart", forgets),
]


@pytest.mark.parametrize("algorithm", ["ebawa", "pbft"])
@pytest.mark.parametrize(("name", "mutation"), MUTANTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_broken_engine_is_found(name: str, mutation: Mutation, algorithm: str, monkeypatch) -> None:
    mutants = {found: mutation(engine(found)) for found in ("ebawa", "minbft", "pbft")}
    monkeypatch.setattr(core, "engine", mutants.__getitem__)
    with pytest.raises((AssertionError, AgreementError, ProtocolError)):
        PROPERTIES[name](algorithm)


@pytest.mark.parametrize("algorithm", ["ebawa", "pbft"])
def test_a_core_that_believes_any_record_is_found(algorithm: str, monkeypatch) -> None:
    monkeypatch.setattr(core, "check_confirmations", lambda *_: None)
    with pytest.raises(AssertionError, match="too few confirmed"):
        PROPERTIES["activate"](algorithm)


def test_every_property_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} | {"activate"} == PROPERTIES.keys()
