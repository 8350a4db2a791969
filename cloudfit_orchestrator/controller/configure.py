"""From one configuration to the next (protocol §6): keys, PREPARED, confirmations, compare-and-swap, ACTIVE.

Order, each step journalled under the operation that wants it:
1. every member's wormhole makes the keys of c' (made once, the same on repetition);
2. PREPARED(c') is sealed, its envelope journalled, then stored: from here base is wedged;
3. it is installed on all agents, members confirm; each confirmation is verified here, and again by every user;
4. ACTIVE(c') is sealed over f'+k'+1 equal confirmations, journalled, swapped in; installed everywhere.
A wormhole that lost its keys on the way, or another writer that was faster, makes c' useless: an attempt with a new
number on the same base follows.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.controller.agents import GuestRef, Report
from cloudfit_orchestrator.controller.journal import Operation
from cloudfit_orchestrator.controller.parallel import each, watch
from cloudfit_orchestrator.controller.ports import Agent, Context, Progress
from cloudfit_orchestrator.controller.survey import known_to
from cloudfit_orchestrator.model.errors import CloudfitError, PermanentError, RefusedError, UnknownError
from cloudfit_orchestrator.model.record import (
    ConfigRecord,
    Confirmation,
    Member,
    confirm_body,
    open_record,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, Ed25519Verifier, public_bytes
from cloudfit_orchestrator.model.statement import Kind, statement_bytes

MAX_ATTEMPTS = 8  # each lost one needs a crash of a wormhole or a rival controller
CONFIRM_TIMEOUT_S = 300.0  # software emulation replays slowly; running again goes on waiting
READY_TIMEOUT_S = 300.0
MAX_STATES = 8  # that one member confirms of one configuration: a correct one comes to another S a few times at most


@dataclass(frozen=True, slots=True)
class Seat:
    """A member to be: all but its keys. `agent` None: nobody can reach it, and it gets keys that nobody holds."""

    replica: str
    incarnation: int
    cloud: str
    address: str
    channel_ca: bytes
    image: str
    launch: str
    agent: Agent | None


Draft = Callable[[int, tuple[Member, ...], bytes], ConfigRecord]  # (c, members, previous) -> PREPARED record


class Configurer:
    """One reconfiguration of one group, under one operation."""

    def __init__(
        self,
        context: Context,
        operation: Operation,
        seats: list[Seat],
        draft: Draft,
        *,
        f: int,
        leaving: Mapping[str, Agent] | None = None,
    ) -> None:
        """`draft` makes the record from number, members and previous hash. `leaving`: agents, by cloud, of members of
        base that are none of the next configuration: they wedge too, and must hear that they are out.
        """
        self._x = context
        self._op = operation
        self._seats = seats
        self._draft = draft
        self._f = f
        self._agents = {**(leaving or {}), **{s.cloud: s.agent for s in seats if s.agent is not None}}
        self._verifier = Ed25519Verifier()

    def prepare(self) -> tuple[int, ConfigRecord]:
        """Steps 1 to 3, up to the installed PREPARED record. Returns the attempt's number and the record."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if self._op.find(f"superseded/{attempt}") is not None:
                continue
            if self._op.find(f"active/{attempt}") is not None:
                return attempt, self._prepared(attempt)  # sealed: whoever comes back here only finishes it
            members = self._members(attempt)
            if members is None:
                self.supersede(attempt, "a wormhole lost the keys of this configuration")
                continue
            try:
                self._store_prepared(attempt, members)
            except RefusedError as error:
                self.supersede(attempt, error.fact)
                continue
            record = self._prepared(attempt)
            envelope = self._prepared_envelope(attempt)
            self._install(envelope)
            self._say("prepare", f"PREPARED c={record.c} is installed on {len(self._agents)} agents")
            return attempt, record
        raise PermanentError(
            f"group {self._op.group}: {MAX_ATTEMPTS} configurations were prepared, none became ACTIVE",
            next_command=f"cloudfit config log {self._op.group}",
        )

    def confirm(self, attempt: int) -> None:
        """Wait for f'+k'+1 valid confirmations of one and the same state."""
        record, prepared = self._prepared(attempt), record_hash(self._prepared_envelope(attempt))
        heard: dict[tuple[int, bytes], dict[str, bytes]] = {}

        def handle(report: Report) -> bool:
            found = self._confirmation(report, record, prepared)
            if found is None:
                return False
            replica, state, signature = found
            if sum(replica in votes for votes in heard.values()) >= MAX_STATES:
                return False
            heard.setdefault(state, {})[replica] = signature
            return len(heard[state]) >= record.confirmations_needed

        def collect(_: dict[str, object]) -> dict[str, object]:
            def missing() -> str:
                best = max((len(v) for v in heard.values()), default=0)
                return f"confirmations of c={record.c}: {best} equal ones of {record.confirmations_needed} needed"

            watch(self._x, self._agents, record.group, handle, timeout_s=CONFIRM_TIMEOUT_S, waiting_for=missing)
            (h, digest), votes = max(heard.items(), key=lambda item: len(item[1]))
            return {"h": h, "digest": _text(digest), "votes": {r: _text(s) for r, s in sorted(votes.items())}}

        self._op.step(f"confirm/{attempt}", collect)
        self._say("confirm", f"c={record.c} is confirmed")

    def activate(self, attempt: int) -> ConfigRecord:
        """Compare-and-swap to ACTIVE and install it everywhere. RefusedError if another writer was faster."""
        record = self._prepared(attempt)
        confirmed = self._op.find(f"confirm/{attempt}")
        assert confirmed is not None
        assert confirmed.result is not None
        result = confirmed.result

        def propose() -> dict[str, object]:
            active = record.activated(
                prepared=record_hash(self._prepared_envelope(attempt)),
                previous=self._x.store.head(record.group),
                h=result["h"],
                digest=_raw(result["digest"]),
                confirmations=[Confirmation(r, _raw(s)) for r, s in result["votes"].items()],
            )
            return {"envelope": _text(seal_record(active, self._x.key))}

        def swap(intent: dict[str, str]) -> None:
            self._x.store.activate(_raw(intent["envelope"]))

        self._x.check_cancelled()
        self._op.step(f"active/{attempt}", swap, propose)
        step = self._op.find(f"active/{attempt}")
        assert step is not None
        envelope = _raw(step.intent["envelope"])
        self._x.journal.remember_head(record.group, self._x.store.head(record.group))
        self._op.step(f"install-active/{attempt}", lambda _: self._install(envelope))
        self._say("activate", f"c={record.c} is ACTIVE")
        return open_record(envelope, self._x.trusted)

    def ready(self, attempt: int) -> None:
        """Wait until every member that can be reached serves in the new configuration."""
        record = self._prepared(attempt)
        missing: dict[str, int] = {}

        def handle(report: Report) -> bool:
            who = report.guest
            meant = report.topic == "ready" and report.body.get("c") == record.c
            if meant and missing.get(who.replica) == who.incarnation:
                del missing[who.replica]
            return not missing

        def collect(_: dict[str, object]) -> None:
            missing.update({s.replica: s.incarnation for s in self._seats if self._can_serve(s, record.c)})
            watch(
                self._x, self._agents, record.group, handle, timeout_s=READY_TIMEOUT_S,
                waiting_for=lambda: f"{', '.join(missing)} to be ready in c={record.c}",
            )  # fmt: skip

        self._op.step(f"ready/{attempt}", collect)
        self._say("ready", f"all members serve in c={record.c}")

    def _can_serve(self, seat: Seat, c: int) -> bool:
        """Its machine is there and its agent holds the keys of c: who lacks one is out until it is recovered."""
        try:
            guest = known_to(seat.agent.status(), self._op.group, seat) if seat.agent is not None else None
        except UnknownError:
            self._x.check_cancelled()
            return False
        return guest is not None and guest["connected"] and any(e["c"] == c for e in guest["epochs"])

    def supersede(self, attempt: int, why: str) -> None:
        """Give this attempt up for good."""
        self._op.step(f"superseded/{attempt}", lambda _: {"why": why})
        self._say("prepare", f"attempt {attempt} is given up: {why}")

    def run(self, close: Callable[[], None] = lambda: None) -> ConfigRecord:
        """All steps, with new attempts where one is superseded. `close` ends the epochs of base's members: it comes
        after the confirmations, so no vote of theirs is missed, and before ACTIVE, so none of their words lasts.
        """
        for _ in range(MAX_ATTEMPTS):
            attempt, _record = self.prepare()
            self.confirm(attempt)
            close()
            try:
                record = self.activate(attempt)
            except RefusedError as error:
                self.supersede(attempt, error.fact)
                continue
            self.ready(attempt)
            return record
        raise RefusedError(f"group {self._op.group}: other controllers were faster {MAX_ATTEMPTS} times")

    def _members(self, attempt: int) -> tuple[Member, ...] | None:
        """The members with their keys of c'; None if a wormhole holds others than those journalled."""

        def make(intent: dict[str, int]) -> dict[str, object]:
            return {"members": self._keys(intent["c"])}

        name = f"keys/{attempt}"
        known = self._op.find(name) is not None
        result = self._op.step(name, make, lambda: {"c": self._x.journal.next_c(self._op.group)})
        if known:
            step = self._op.find(name)
            assert step is not None
            now = self._keys(step.intent["c"])
            reachable = {s.replica for s in self._seats if s.agent is not None}
            lost = [r for r in reachable if now.get(r) != result["members"].get(r)]
            # A guest's own agent may say what it likes: up to f of them must not keep the group from going on.
            inside = any(s.agent is not None and s.agent.inside for s in self._seats)
            if len(lost) > (self._f if inside else 0):
                return None
        return tuple(
            Member(
                s.replica, s.incarnation, s.cloud, s.address, _raw(k["usig_key"]), _raw(k["kss_key"]),
                _raw(k["channel_ca"]), s.image, s.launch,
            )
            for s in self._seats if (k := result["members"][s.replica])
        )  # fmt: skip

    def _keys(self, c: int) -> dict[str, object]:
        def ask(seat: Seat) -> dict[str, str]:
            keys = self._own_keys(seat, c)
            if keys is None:  # a crashed member: nobody holds the private halves
                keys = (public_bytes(Ed25519PrivateKey.generate()), public_bytes(Ed25519PrivateKey.generate()))
            usig, kss = (_text(key) for key in keys)
            return {"usig_key": usig, "kss_key": kss, "channel_ca": _text(seat.channel_ca)}

        return {s.replica: k for s, k in each(self._x, self._seats, ask).items()}

    def _own_keys(self, seat: Seat, c: int) -> tuple[bytes, bytes] | None:
        """What its agent makes; None if there is none, or one inside a guest that will not."""
        if seat.agent is None:
            return None
        try:
            return seat.agent.prepare(GuestRef(self._op.group, seat.replica, seat.incarnation), c)
        except CloudfitError as error:
            self._x.check_cancelled()
            if not seat.agent.inside:
                raise
            self._say("keys", f"{seat.replica}#{seat.incarnation} is out of c={c}: {error.fact}")
            return None

    def _store_prepared(self, attempt: int, members: tuple[Member, ...]) -> None:
        keys = self._op.find(f"keys/{attempt}")
        assert keys is not None

        def propose() -> dict[str, str]:
            record = self._draft(keys.intent["c"], members, self._x.store.head(self._op.group))
            return {"envelope": _text(seal_record(record, self._x.key))}

        def append(intent: dict[str, str]) -> None:
            self._x.store.append_prepared(_raw(intent["envelope"]))

        self._x.check_cancelled()
        self._op.step(f"prepared/{attempt}", append, propose)
        self._x.journal.remember_head(self._op.group, self._x.store.head(self._op.group))

    def _prepared_envelope(self, attempt: int) -> bytes:
        step = self._op.find(f"prepared/{attempt}")
        assert step is not None
        return _raw(step.intent["envelope"])

    def _prepared(self, attempt: int) -> ConfigRecord:
        return open_record(self._prepared_envelope(attempt), self._x.trusted)

    def _install(self, envelope: bytes) -> None:
        def install(cloud: str) -> None:
            self._agents[cloud].install(self._op.group, envelope)

        each(self._x, self._agents, install)

    def _confirmation(
        self, report: Report, record: ConfigRecord, prepared: bytes
    ) -> tuple[str, tuple[int, bytes], bytes] | None:
        """The confirmation in a report, if it is one of this record and its signature holds."""
        body, member = report.body, record.member(report.guest.replica)
        if report.topic != "confirm" or member is None:
            return None
        try:
            state = (int(body["h"]), _raw(body["digest"]))
            signature = _raw(body["signature"])
            if body["c"] != record.c or _raw(body["prepared"]) != prepared:
                return None
            if not 0 <= state[0] < 1 << 64 or len(state[1]) != DIGEST_BYTES:
                return None
            statement = confirm_body(prepared, *state)
        except (KeyError, ValueError, TypeError, OverflowError):
            return None  # a guest's own words: a malformed one confirms nothing
        message = statement_bytes(Kind.CONFIRM, record.group, member.replica, record.c, statement)
        return (member.replica, state, signature) if self._verifier.verify(member.kss_key, message, signature) else None

    def _say(self, stage: str, message: str) -> None:
        self._x.report(Progress(self._op.kind, stage, self._op.group, message))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
