"""Protocol §2, rule by rule, on the pure part of the agent."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    EPOCH_END,
    RECENT,
    RECENT_ITEM,
    UI_CERT,
    ErrorCode,
    FrameKind,
)
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.record import confirm_body, open_record, seal_record
from cloudfit_orchestrator.model.signing import Ed25519Verifier, public_bytes
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from cloudfit_orchestrator.model.ui import EpochEnd, epoch_end_bytes, ui_bytes
from cloudfit_orchestrator.wormhole.epoch import TRANSITIONS, Epoch, State
from cloudfit_orchestrator.wormhole.guests import MAX_COMMANDS, MAX_EPOCHS, NoEpochError, NotAdmittedError
from cloudfit_orchestrator.wormhole.refusal import Malformed
from tests.unit.wormhole.world import DIGEST, GROUP, Pure, active_envelope, identity, member, record_of

verify = Ed25519Verifier().verify


@pytest.fixture
def w():
    return Pure()


@pytest.fixture
def active(w):
    w.activate()
    return w


# USIG


def test_counter_starts_at_1_and_its_certificate_verifies_against_the_record(active):
    session = active.session("r0")
    kind, body = active.create("r0", session, 1)
    assert kind is FrameKind.UI_CERT
    cv, certificate = UI_CERT.unpack(body)
    record = active.table.records(GROUP).active.record
    assert cv == 1
    assert verify(record.member("r0").usig_key, ui_bytes(GROUP, "r0", 1, 1, DIGEST), certificate)
    assert not verify(record.member("r1").usig_key, ui_bytes(GROUP, "r0", 1, 1, DIGEST), certificate)


def test_no_counter_is_certified_twice_or_skipped(active):
    session = active.session("r0")
    for wrong in (0, 2, 1 << 63):
        assert active.create("r0", session, wrong) is ErrorCode.WRONG_COUNTER
    assert active.create("r0", session, 1)[0] is FrameKind.UI_CERT
    assert active.create("r0", session, 1, digest=bytes(32)) is ErrorCode.WRONG_COUNTER
    assert active.create("r0", session, 3) is ErrorCode.WRONG_COUNTER
    assert active.create("r0", session, 2)[0] is FrameKind.UI_CERT


def test_freeze_amid_pipelined_calls_certifies_none_of_the_later_ones(active):
    guest = active.guest("r0")
    session = active.session("r0")
    assert active.create("r0", session, 1)[0] is FrameKind.UI_CERT
    assert guest.epoch(1).freeze() == 1
    assert active.create("r0", session, 2) is ErrorCode.FROZEN  # refused; 3 and 4 are on their way already
    assert guest.epoch(1).thaw() == 1
    assert active.create("r0", session, 3) is ErrorCode.WRONG_COUNTER
    assert active.create("r0", session, 4) is ErrorCode.WRONG_COUNTER
    assert active.create("r0", session, 2)[0] is FrameKind.UI_CERT  # asked for again, in order
    assert active.create("r0", session, 3)[0] is FrameKind.UI_CERT


def test_opening_a_session_invalidates_the_older_one(active):
    old = active.session("r0")
    new = active.session("r0")
    assert active.create("r0", old, 1) is ErrorCode.STALE_SESSION
    assert active.ask("r0", FrameKind.RECENT, RECENT.pack(old, 1)) is ErrorCode.STALE_SESSION
    assert active.create("r0", new, 1)[0] is FrameKind.UI_CERT


def test_hello_makes_sessions_stale_until_one_is_opened_and_numbers_never_repeat(active):
    old = active.session("r0")
    active.guest("r0").greeted()
    assert active.create("r0", old, 1) is ErrorCode.STALE_SESSION
    assert active.session("r0") != old


def test_recent_returns_the_last_64_oldest_first(active):
    session = active.session("r0")
    certificates = [active.create("r0", session, cv, digest=cv.to_bytes(32, "big"))[1] for cv in range(1, 71)]
    session = active.session("r0")
    kind, body = active.ask("r0", FrameKind.RECENT, RECENT.pack(session, 1))
    items = list(RECENT_ITEM.iter_unpack(body))
    assert kind is FrameKind.RECENT_UIS
    assert [cv for cv, _, _ in items] == list(range(7, 71))
    assert all(digest == cv.to_bytes(32, "big") for cv, digest, _ in items)
    assert [UI_CERT.pack(cv, certificate) for cv, _, certificate in items] == certificates[6:]


def test_sessions_count_on_where_the_epoch_is(active):
    session = active.session("r0")
    active.create("r0", session, 1)
    _, body = active.ask("r0", FrameKind.OPEN_SESSION, EPOCH.pack(1))
    assert int.from_bytes(body[8:], "big") == 2


def test_unknown_epoch_is_no_epoch(active):
    assert active.ask("r0", FrameKind.OPEN_SESSION, EPOCH.pack(9)) is ErrorCode.NO_EPOCH
    assert active.sign("r0", Kind.REQ, bytes(8), c=9) is ErrorCode.NO_EPOCH
    assert active.create("r0", 1, 1, c=9) is ErrorCode.NO_EPOCH


def test_the_lease_of_an_incarnation_silences_create_ui_and_kss_but_not_epoch_end(active):
    session = active.session("r0")
    active.clock.time_s += 999
    assert active.create("r0", session, 1)[0] is FrameKind.UI_CERT
    active.clock.time_s += 1
    assert active.create("r0", session, 2) is ErrorCode.LEASE_OVER
    assert active.sign("r0", Kind.REQ, bytes(8)) is ErrorCode.LEASE_OVER
    assert active.ask("r0", FrameKind.ISSUE, b"") is ErrorCode.LEASE_OVER
    active.table.install(GROUP, active.prepared(2, 1))
    assert active.ask("r0", FrameKind.END_EPOCH, EPOCH.pack(1))[0] is FrameKind.EPOCH_END


def test_a_new_configuration_gives_no_longer_lease(active):
    active.clock.time_s += 600
    active.activate(2, 1)
    session = active.session("r0", 2)
    active.clock.time_s += 400
    assert active.create("r0", session, 1, c=2) is ErrorCode.LEASE_OVER


# KSS


def test_kss_signs_typed_statements_with_the_wormholes_own_prefix(active):
    record = active.table.records(GROUP).active.record
    for kind in Kind:
        body = bytes(range(LAYOUT[kind].size))
        answer, signature = active.sign("r1", kind, body)
        assert answer is FrameKind.SIGNATURE
        assert verify(record.member("r1").kss_key, statement_bytes(kind, GROUP, "r1", 1, body), signature)
        for other in set(Kind) - {kind}:
            if LAYOUT[other].size == len(body):
                assert not verify(record.member("r1").kss_key, statement_bytes(other, GROUP, "r1", 1, body), signature)


def test_a_guest_cannot_claim_anothers_identity(active):
    """There is no field for it: whatever the body says, the statement is r0's and under r0's key."""
    record = active.table.records(GROUP).active.record
    body = b"r1".ljust(40, b"\0")
    _, signature = active.sign("r0", Kind.DECIDED, body)
    assert verify(record.member("r0").kss_key, statement_bytes(Kind.DECIDED, GROUP, "r0", 1, body), signature)
    for key in (record.member("r0").kss_key, record.member("r1").kss_key):
        assert not verify(key, statement_bytes(Kind.DECIDED, GROUP, "r1", 1, body), signature)
    session = active.session("r1")
    assert active.create("r0", session, 1) is ErrorCode.STALE_SESSION  # r1's session is nothing on r0's channel


def test_before_active_only_confirm_is_signed(w):
    w.table.install(GROUP, w.prepared(1, None))
    for kind in set(Kind) - {Kind.CONFIRM}:
        assert w.sign("r0", kind, bytes(LAYOUT[kind].size)) is ErrorCode.NOT_ACTIVE
    assert w.sign("r0", Kind.CONFIRM, bytes(LAYOUT[Kind.CONFIRM].size))[0] is FrameKind.SIGNATURE
    assert w.ask("r0", FrameKind.OPEN_SESSION, EPOCH.pack(1)) is ErrorCode.NOT_ACTIVE
    assert w.create("r0", 1, 1) is ErrorCode.NOT_ACTIVE


@pytest.mark.parametrize("kind", list(Kind))
def test_a_statement_of_another_size_is_malformed(active, kind):
    for wrong in (LAYOUT[kind].size - 1, LAYOUT[kind].size + 1):
        with pytest.raises(Malformed, match="statement-body"):
            active.sign("r0", kind, bytes(wrong))


def test_epoch_end_cannot_be_forged_through_the_kss(active):
    """No KSS statement has EPOCH-END's tag, and there is no kind of which a guest could choose the tag."""
    record = active.table.records(GROUP).active.record
    end = EpochEnd("r0", 1, 5, DIGEST, bytes(64), bytes(64))
    for kind in Kind:
        _, signature = active.sign("r0", kind, epoch_end_bytes(GROUP, end)[: LAYOUT[kind].size])
        for key in (record.member("r0").usig_key, record.member("r0").kss_key):
            assert not verify(key, epoch_end_bytes(GROUP, end), signature)
    with pytest.raises(Malformed, match="statement-kind"):
        active.sign("r0", max(Kind) + 1, bytes(40))


# Freeze, thaw, end


def test_freeze_refuses_like_the_end_and_can_be_undone(active):
    session = active.session("r0")
    active.guest("r0").epoch(1).freeze()
    assert active.create("r0", session, 1) is ErrorCode.FROZEN
    assert active.sign("r0", Kind.REQ, bytes(8)) is ErrorCode.FROZEN
    active.guest("r0").epoch(1).thaw()
    assert active.create("r0", session, 1)[0] is FrameKind.UI_CERT
    assert active.sign("r0", Kind.REQ, bytes(8))[0] is FrameKind.SIGNATURE


def test_epoch_end_destroys_the_keys_and_is_the_same_on_repetition(active):
    session = active.session("r0")
    _, first = active.create("r0", session, 1)
    epoch = active.guest("r0").epoch(1)
    end = active.table.close(identity("r0", 1), 1)
    assert end == active.table.close(identity("r0", 1), 1)
    assert (end.cv_end, end.last_digest, end.last_certificate) == (1, DIGEST, UI_CERT.unpack(first)[1])
    assert verify(epoch.usig_key, epoch_end_bytes(GROUP, end), end.signature)
    assert epoch._usig._key is None
    assert epoch._kss._key is None
    assert active.create("r0", session, 2) is ErrorCode.ENDED
    assert active.sign("r0", Kind.REQ, bytes(8)) is ErrorCode.ENDED
    with pytest.raises(RefusedError, match="cannot thaw"):
        epoch.thaw()


def test_an_epoch_that_was_never_used_ends_with_zeros(active):
    end = active.table.close(identity("r2", 3), 1)
    assert (end.cv_end, end.last_digest, end.last_certificate) == (0, bytes(32), bytes(64))


def test_after_a_restart_a_guest_still_learns_its_uis_of_an_ended_epoch(active):
    session = active.session("r0")
    active.create("r0", session, 1)
    active.table.close(identity("r0", 1), 1)
    session = active.session("r0")
    assert len(active.ask("r0", FrameKind.RECENT, RECENT.pack(session, 1))[1]) == RECENT_ITEM.size


def test_a_guests_word_alone_ends_no_epoch(active):
    assert active.ask("r0", FrameKind.END_EPOCH, EPOCH.pack(1)) is ErrorCode.FORBIDDEN
    active.table.install(GROUP, active.prepared(2, 1))
    kind, body = active.ask("r0", FrameKind.END_EPOCH, EPOCH.pack(1))
    assert kind is FrameKind.EPOCH_END
    assert active.ask("r0", FrameKind.END_EPOCH, EPOCH.pack(1)) == (kind, body)
    assert EPOCH_END.unpack(body)[0] == 0
    assert active.ask("r1", FrameKind.END_EPOCH, EPOCH.pack(2)) is ErrorCode.FORBIDDEN


def test_a_prepared_record_on_another_base_ends_no_epoch(active):
    active.table.install(GROUP, active.prepared(5, 4))
    assert active.ask("r0", FrameKind.END_EPOCH, EPOCH.pack(1)) is ErrorCode.FORBIDDEN


def test_an_abandoned_prepared_record_still_ends_its_base(active):
    active.table.install(GROUP, active.prepared(2, 1))
    active.table.install(GROUP, active.prepared(4, 3))
    assert active.ask("r0", FrameKind.END_EPOCH, EPOCH.pack(1))[0] is FrameKind.EPOCH_END


def test_active_of_a_later_configuration_closes_all_earlier_epochs_here(active):
    active.table.prepare(identity("r0", 1), 2)  # of an abandoned configuration
    session = active.session("r1")
    active.activate(3, 1)
    for replica in ("r0", "r1", "r2"):
        assert active.guest(replica).epoch(1).state is State.ENDED
        assert active.guest(replica).epoch(3).state is State.OPEN
    assert active.guest("r0").epoch(2).state is State.ENDED
    assert active.create("r1", session, 1) is ErrorCode.ENDED
    assert active.session("r1", 3) == 1


def test_active_also_closes_the_epochs_of_those_who_are_no_members_any_more(active):
    new = active.add(identity("r2", 9))
    leaving = active.guest("r2")
    active.activate(2, 1, members=[active.guest("r0"), active.guest("r1"), new])
    assert leaving.identity.incarnation == 3
    assert leaving.epoch(1).state is State.ENDED
    assert leaving.retired
    assert active.ask(leaving, FrameKind.ISSUE, spki()) is ErrorCode.ENDED
    assert active.ask(new, FrameKind.ISSUE, spki())[0] is FrameKind.CERTIFICATE


def test_a_closed_epoch_stays_closed_when_its_own_active_arrives(w):
    prepared = w.prepared(1, None)
    active = active_envelope(prepared, w.confirm, w.controller)
    w.table.close(identity("r0", 1), 1)
    w.table.install(GROUP, active)
    assert w.sign("r0", Kind.REQ, bytes(8)) is ErrorCode.ENDED


def test_every_transition_of_an_epoch_is_in_the_table():
    orders = ("activate", "freeze", "thaw", "end")
    for state in State:
        for order in orders:
            epoch = Epoch(GROUP, "r0", 1)
            epoch.state = state
            if (state, order) in TRANSITIONS:
                if state is State.ENDED and order == "end":
                    epoch._usig.end()
                getattr(epoch, order)()
                assert epoch.state is TRANSITIONS[state, order]
            else:
                with pytest.raises(RefusedError):
                    getattr(epoch, order)()


calls = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.integers(-2, 2), st.integers(1, 6)),
        st.tuples(st.sampled_from(["freeze", "thaw", "session", "hello", "end", "activate"]), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(calls)
def test_in_any_order_of_calls_certified_counters_are_1_2_3_without_gap_or_repetition(sequence):
    w = Pure()
    w.table.install(GROUP, prepared := w.prepared(1, None))
    active = active_envelope(prepared, w.confirm, w.controller)
    epoch, certified, number = w.guest("r0").epoch(1), [], 0
    for what, shift, digest in sequence:
        if what == "create":
            cv = max(0, epoch.cv + 1 + shift)
            before = epoch.state
            answer = w.create("r0", number, cv, digest=bytes([digest]) * 32)
            if not isinstance(answer, ErrorCode):
                assert before is State.OPEN
                certified.append(UI_CERT.unpack(answer[1])[0])
        elif what == "session":
            answer = w.ask("r0", FrameKind.OPEN_SESSION, EPOCH.pack(1))
            number = number if isinstance(answer, ErrorCode) else int.from_bytes(answer[1][:8], "big")
        elif what == "hello":
            w.guest("r0").greeted()
        elif what == "activate":
            w.table.install(GROUP, active)
        else:
            try:
                getattr(epoch, what)()
            except RefusedError:
                assert (epoch.state, what) not in TRANSITIONS
    assert certified == list(range(1, len(certified) + 1))


# Records


def test_active_with_too_few_or_forged_confirmations_is_refused(w):
    prepared = w.prepared(1, None)
    for bad in (
        active_envelope(prepared, w.confirm, w.controller, count=1),
        active_envelope(prepared, lambda *_: bytes(64), w.controller),
    ):
        with pytest.raises(BadError, match="valid confirmations"):
            w.table.install(GROUP, bad)
    assert w.guest("r0").epoch(1).state is State.PREPARED


def test_a_record_that_no_controller_signed_is_refused(w):
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(BadError, match="none of which is trusted"):
        w.table.install(GROUP, w.prepared(1, None, key=stranger))


def test_a_record_of_another_group_is_refused(w):
    with pytest.raises(BadError, match="of group ledger"):
        w.table.install("other", w.prepared(1, None))


def test_active_that_names_keys_of_another_agent_is_refused_and_changes_nothing(active):
    """Two wormholes for one member: whoever made the keys is not this agent, so it opens nothing and closes nothing."""
    stranger = Epoch(GROUP, "r0", 2)
    guests = [active.guest(r) for r in ("r0", "r1", "r2")]
    epochs = [stranger, *(active.table.prepare(g.identity, 2) for g in guests[1:])]
    members = [member(g, e) for g, e in zip(guests, epochs, strict=True)]
    prepared = seal_record(record_of(2, 1, members), active.controller)
    active.table.prepare(identity("r0", 1), 2)
    by_name = dict(zip(("r0", "r1", "r2"), epochs, strict=True))
    envelope = active_envelope(
        prepared, lambda replica, _c, body: by_name[replica].sign(Kind.CONFIRM, body), active.controller
    )
    with pytest.raises(RefusedError, match="other keys"):
        active.table.install(GROUP, envelope)
    assert active.guest("r1").epoch(2).state is State.PREPARED
    assert active.guest("r1").epoch(1).state is State.OPEN
    assert active.table.records(GROUP).active.record.c == 1


def test_an_agent_that_lost_its_keys_opens_nothing(w):
    """A restart ends the epoch: the new process has the record but no key."""
    prepared = w.prepared(1, None)
    envelope = active_envelope(prepared, w.confirm, w.controller)
    for guest in w.table:
        guest.epochs.clear()
    with pytest.raises(RefusedError, match="made no keys"):
        w.table.install(GROUP, envelope)


def test_install_is_safe_to_repeat_and_never_goes_back(active):
    old_prepared = active.prepared(1, None)
    old_active = active.table.records(GROUP).active.envelope
    newer = active.activate(3, 1)
    assert active.table.install(GROUP, newer[1]) is None
    assert active.table.install(GROUP, newer[0]) is None
    for envelope in (old_active, old_prepared):
        with pytest.raises(RefusedError, match="not later"):
            active.table.install(GROUP, envelope)
    assert active.guest("r0").epoch(3).state is State.OPEN


def test_two_prepared_records_of_one_number_are_refused(active):
    active.table.install(GROUP, active.prepared(2, 1))
    other = active.prepared(2, 1, change=lambda r: record_of(2, 1, r.members[:3], f=0))
    with pytest.raises(RefusedError, match="not later"):
        active.table.install(GROUP, other)


def test_two_active_records_of_one_number_are_refused(w):
    prepared, _ = w.activate()
    other = active_envelope(prepared, w.confirm, w.controller, count=3)
    with pytest.raises(RefusedError, match="not later"):
        w.table.install(GROUP, other)


def test_a_group_without_guests_here_may_begin_anew(active):
    old = active.table.records(GROUP).active.envelope
    for guest in active.table:
        active.table.evict(guest.identity)
    assert active.table.records(GROUP).active is None
    assert active.table.install(GROUP, old) is not None
    again = Pure()
    again.controller = active.controller
    active.table.install(GROUP, again.prepared(1, None))  # no guests: nothing to protect
    assert active.table.records(GROUP).prepared is not None


def test_prepare_makes_keys_once_and_none_for_what_active_left_behind(active):
    first = active.table.prepare(identity("r0", 1), 2)
    assert active.table.prepare(identity("r0", 1), 2) is first
    active.activate(5, 1)
    with pytest.raises(RefusedError, match="not later than the ACTIVE 5"):
        active.table.prepare(identity("r0", 1), 4)
    with pytest.raises(BadInputError):
        active.table.prepare(identity("r0", 1), 0)


def test_epochs_of_a_guest_are_bounded(w):
    guest = w.guest("r0")
    for c in range(1, MAX_EPOCHS + 1):
        guest.prepare(c)
    with pytest.raises(RefusedError, match="have not ended"):
        guest.prepare(MAX_EPOCHS + 1)
    guest.epoch(3).end()
    guest.prepare(MAX_EPOCHS + 1)
    with pytest.raises(NoEpochError):
        guest.epoch(3)


def test_records_concern_members_of_base_and_of_the_new_configuration_and_no_recovery_machine(active):
    learner, observer = active.add(identity("r2", 9)), active.add(identity("r7", 10))
    recovery = active.add(identity("x", 11), role=Role.RECOVERY)
    members = [active.guest("r0"), active.guest("r1"), learner]
    active.table.install(GROUP, active.prepared(2, 1, members=members))
    records = active.table.records(GROUP)
    leaving = next(g for g in active.table if g.identity.incarnation == 3)
    everyone = [active.guest("r0"), leaving, learner, observer, recovery]
    assert [active.table.concerned(g, records.prepared) for g in everyone] == [True, True, True, False, False]
    assert [active.table.concerned(g, records.active) for g in everyone] == [True, True, True, True, False]


# Admission, eviction, roles, commands, reports


def test_evict_destroys_keys_and_unknown_is_no_error(active):
    guest = active.guest("r0")
    epoch = guest.epoch(1)
    active.table.evict(guest.identity)
    assert (epoch._usig._key, epoch._kss._key) == (None, None)
    assert active.table.evict(guest.identity) is None
    with pytest.raises(NotAdmittedError):
        active.table.get(guest.identity)


def test_a_second_machine_for_an_incarnation_and_a_second_identity_for_a_machine_are_refused(w):
    guest = w.guest("r0")
    assert w.table.check_admission(guest.identity, guest.machine, guest.image) is guest
    with pytest.raises(RefusedError, match="is admitted as machine"):
        w.table.check_admission(guest.identity, "another", guest.image)
    with pytest.raises(RefusedError, match="cannot be"):
        w.table.check_admission(identity("r9", 99), guest.machine, guest.image)


def test_recovery_machines_get_welcome_issue_and_report_only(active):
    guest = active.add(identity("x", 11), role=Role.RECOVERY)
    assert active.ask(guest, FrameKind.ISSUE, spki())[0] is FrameKind.CERTIFICATE
    assert active.ask(guest, FrameKind.REPORT, b'{"topic": "status"}') == (FrameKind.OK, b"")
    for kind, body in (
        (FrameKind.OPEN_SESSION, EPOCH.pack(1)),
        (FrameKind.CREATE_UI, CREATE_UI.pack(1, 1, 1, DIGEST)),
        (FrameKind.RECENT, RECENT.pack(1, 1)),
        (FrameKind.SIGN, bytes(17)),
        (FrameKind.END_EPOCH, EPOCH.pack(1)),
    ):
        assert active.ask(guest, kind, body) is ErrorCode.FORBIDDEN
    with pytest.raises(RefusedError, match="gets no keys"):
        active.table.prepare(guest.identity, 2)


def spki(key=None):
    key = key or Ed25519PrivateKey.generate()
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_issue_binds_the_guests_tls_key_to_its_peer_name(w):
    for key in (Ed25519PrivateKey.generate(), generate_ec(SECP256R1())):
        leaf = x509.load_der_x509_certificate(w.ask("r0", FrameKind.ISSUE, spki(key))[1])
        ca = x509.load_der_x509_certificate(w.guest("r0").ca.certificate)
        assert leaf.subject.rfc4514_string() == "CN=ledger/r0#1"
        assert leaf.issuer == ca.subject
        assert leaf.public_key() == key.public_key()
        leaf.verify_directly_issued_by(ca)
        with pytest.raises(ValueError, match="Issuer"):
            leaf.verify_directly_issued_by(x509.load_der_x509_certificate(w.guest("r1").ca.certificate))


def test_issue_refuses_what_is_no_accepted_key(w):
    weak = rsa.generate_private_key(65537, 2048)
    for body in (b"", b"\x30" * 44, bytes(2000), spki(weak)):
        with pytest.raises(Malformed, match="public-key"):
            w.ask("r0", FrameKind.ISSUE, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"topic": 1}',
        b'{"topic": "x", "v": NaN}',
        b"[" * 60000,
        b'{"topic":"' + b"x" * 65 + b'"}',
    ],
)
def test_a_report_that_is_none_is_malformed(w, body):
    with pytest.raises(Malformed, match="report"):
        w.ask("r0", FrameKind.REPORT, body)


def test_reports_carry_the_channels_identity_whatever_they_say(w):
    w.ask("r0", FrameKind.REPORT, b'{"topic": "ready", "replica": "r1", "c": 1}')
    assert w.reports == [(identity("r0", 1), "ready", {"replica": "r1", "c": 1}, 25)]


@given(st.integers(0, 255), st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_frame_is_answered_or_malformed_and_never_an_accident(kind, body):
    try:
        answer = _SHARED.ask("r0", kind, body)
    except Malformed:
        return
    assert isinstance(answer, ErrorCode | tuple)


_SHARED = Pure()
_SHARED.activate()


def test_commands_are_kept_for_a_guest_in_bounds(w):
    for number in range(MAX_COMMANDS + 3):
        w.table.command(identity("r0", 1), {"n": number})
    assert next(iter(w.guest("r0").commands)) == b'{"n": 3}'
    assert len(w.guest("r0").commands) == MAX_COMMANDS
    with pytest.raises(BadInputError, match="limit"):
        w.table.command(identity("r1", 2), {"op": "x" * (1 << 20)})


def test_identities_that_would_not_fit_a_common_name_are_refused():
    for group, replica, incarnation in (
        ("", "r", 1),
        ("a/b", "r", 1),
        ("g", "r#1", 1),
        ("g" * 60, "r", 1),
        ("g", "r", 0),
    ):
        with pytest.raises(BadInputError):
            identity(replica, incarnation).__class__(group, replica, incarnation)


def test_the_confirmation_that_a_controller_counts_is_what_the_kss_signs(w):
    prepared = w.prepared(1, None)
    record = open_record(prepared, [public_bytes(w.controller)])
    body = confirm_body(bytes(32), 0, DIGEST)
    _, signature = w.sign("r2", Kind.CONFIRM, body)
    assert verify(record.member("r2").kss_key, statement_bytes(Kind.CONFIRM, GROUP, "r2", 1, body), signature)
