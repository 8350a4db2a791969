"""The agents inside guests as the controller sees them: each may be the guest's intruder, and says what it likes."""

import contextlib
import json
import socket
import threading
import time

import pytest

from cloudfit_orchestrator.controller import agents as agents_module
from cloudfit_orchestrator.controller import inside
from cloudfit_orchestrator.controller.agents import Dialer, GuestRef, NotAdmittedError
from cloudfit_orchestrator.controller.inside import InsideAgents
from cloudfit_orchestrator.controller.journal import MachineRow, MachineStage
from cloudfit_orchestrator.controller.secrets import GuestSecrets
from cloudfit_orchestrator.model.errors import BadError, RefusedError, UnknownError

SECRETS = GuestSecrets(bytes(range(32)), "dep")


def row(replica, incarnation, *, cloud="lisbon", group="ledger", role="replica", machine="m"):
    return MachineRow(
        group, replica, incarnation, role, cloud, "op", "127.0.0.1", 7000, machine, MachineStage.CREATED, ""
    )


class Guest(Dialer):
    """What a guest answers, line by line: `answers` maps an op to what follows `"ok": true`, or to raw bytes."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def dial(self):
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return ours

    def _serve(self, stream):
        with stream, stream.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                self.asked.append(request["op"])
                answer = self.answers.get(request["op"], {})
                if callable(answer):
                    answer = answer(request)
                if isinstance(answer, dict):
                    answer = json.dumps({"id": request["id"], "ok": True} | answer).encode() + b"\n"
                stream.sendall(answer)

    def __str__(self):
        return "a guest"


class Gone(Dialer):
    """Nobody is there; it takes a while to find out."""

    def __init__(self):
        self.dialled = 0

    def dial(self):
        self.dialled += 1
        raise TimeoutError("no route")

    def __str__(self):
        return "nowhere"


class Secrets:
    def __init__(self, guests):
        self._guests = guests

    def dialer(self, r):
        return self._guests[r.peer_id]


@pytest.fixture
def agents():
    """Makes the agents of a cloud from guests by `replica#incarnation`."""
    made = []

    def make(guests, rows=None, records=lambda group: []):
        rows = rows or [row(name.partition("#")[0], int(name.partition("#")[2])) for name in guests]
        made.append(InsideAgents("lisbon", lambda: rows, Secrets(guests), records))
        return made[-1]

    yield make
    for each in made:
        each.close()


R1, R2 = GuestRef("ledger", "r1", 2), GuestRef("ledger", "r2", 3)
STATUS = {
    "guests": [{"image": "sha256:0", "connected": True, "greeted": True, "epochs": [], "counters": {}, "group": "x"}],
    "groups": {},
}


def report(seq, topic, **who):
    return {"seq": seq, "group": "ledger", "replica": "r2", "incarnation": 3, "topic": topic, "body": {}} | who


def test_what_a_guest_says_is_about_itself_whatever_it_puts_there(agents):
    liar = Guest(status=STATUS, reports={"reports": [report(1, "confirm")], "next": 1})
    found = agents({"r1#2": liar})
    assert [(g["group"], g["replica"], g["incarnation"]) for g in found.status()["guests"]] == [("ledger", "r1", 2)]
    (heard,), _ = found.reports(0)
    assert (heard.guest, heard.topic) == (R1, "confirm")


@pytest.mark.parametrize(
    "nonsense",
    [
        {"guests": []}, {"guests": 7}, {"guests": [{}], "groups": {}}, {"guests": [[]], "groups": None},
        STATUS | {"groups": {"ledger": 3}}, STATUS | {"guests": [STATUS["guests"][0] | {"epochs": [{"c": "x"}]}]},
    ],
)  # fmt: skip
def test_nonsense_makes_one_guest_silent_and_nothing_else(agents, nonsense):
    found = agents({"r1#2": Guest(status=nonsense), "r2#3": Guest(status=STATUS)}).status()
    assert [g["replica"] for g in found["guests"]] == ["r2"]
    assert found["silent"] == ["ledger/r1#2"]


@pytest.mark.parametrize(
    "raw", [b"not JSON\n", b"[]\n", b'{"id": 99, "ok": true}\n', b"\xff\n", b"[" * 100_000 + b"\n"]
)
def test_no_line_of_a_guest_ends_in_an_error_that_nobody_expects(agents, raw):
    found = agents({"r1#2": Guest(status=raw, reports=raw, prepare=raw, freeze=raw, close=raw)})
    assert found.status() == {"guests": [], "silent": ["ledger/r1#2"]}
    assert found.reports(0) == ([], 0)
    for call in (found.prepare, found.freeze, found.close_epoch):
        with pytest.raises((BadError, UnknownError)):
            call(R1, 1)


def test_an_answer_that_drips_is_as_late_as_none(agents, monkeypatch):
    monkeypatch.setattr(agents_module, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(agents_module.AgentClient._call, "__defaults__", (0.3,))

    class Dripping(Guest):
        def _serve(self, stream):
            with stream, contextlib.suppress(OSError):
                while True:
                    stream.sendall(b" ")
                    time.sleep(0.05)

    began = time.monotonic()
    assert agents({"r1#2": Dripping()}).status()["silent"] == ["ledger/r1#2"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("keys", [{}, {"usig_key": "AA==", "kss_key": "AA=="}, {"usig_key": 7, "kss_key": []}])
def test_keys_that_are_none_are_refused(agents, keys):
    with pytest.raises(BadError, match="nonsense"):
        agents({"r1#2": Guest(prepare=keys)}).prepare(R1, 1)


def test_a_silent_guest_keeps_nobody_from_the_others_and_is_left_alone_for_a_while(agents):
    gone, told = Gone(), Guest(status=STATUS, reports={"reports": [report(1, "ready")], "next": 1})
    found = agents({"r1#2": gone, "r2#3": told})
    found.install("ledger", b"record")
    assert told.asked == ["install"]
    assert len(found.reports(0)[0]) == 1
    for _ in range(5):
        assert [g["replica"] for g in found.status()["guests"]] == ["r2"]
    assert gone.dialled == 1
    with pytest.raises(UnknownError):
        agents({"r1#2": gone}).install("ledger", b"record")


def test_one_that_refuses_a_record_keeps_it_from_nobody(agents):
    refusing = Guest(install=b'{"id": 1, "ok": false, "code": "refused", "error": "never"}\n')
    told = Guest()
    agents({"r1#2": refusing, "r2#3": told}).install("ledger", b"record")
    assert told.asked == ["install"]
    with pytest.raises(RefusedError):
        agents({"r1#2": refusing}).install("ledger", b"record")


def test_a_flood_of_reports_displaces_its_own_only(agents, monkeypatch):
    monkeypatch.setattr(inside, "MAX_REPORT_BYTES", 4000)

    def flood(request):
        first = request["since"] + 1
        return {"reports": [report(n, "found") for n in range(first, first + 100)], "next": first + 99}

    quiet = Guest(reports=lambda request: {"reports": [report(1, "ready")] if request["since"] < 1 else [], "next": 1})
    found = agents({"r1#2": Guest(reports=flood), "r2#3": quiet})
    for _ in range(5):
        heard, last = found.reports(0)
    assert [r.topic for r in heard if r.guest == R2] == ["ready"]
    assert len(heard) < 20
    assert last == 501


def test_reports_after_a_restart_of_the_guest_are_heard(agents):
    seen = [report(n, "learner") for n in (1, 2, 3)]
    guest = Guest(
        reports=lambda request: {"reports": [r for r in seen if r["seq"] > request["since"]], "next": len(seen)}
    )
    found = agents({"r1#2": guest})
    assert len(found.reports(0)[0]) == 3
    del seen[1:]
    found.reports(3)
    assert len(found.reports(3)[0]) == 1


def test_whom_the_journal_does_not_know_is_asked_nothing(agents):
    found = agents({"r1#2": Guest()}, rows=[row("r1", 2, cloud="passau"), row("r1", 2, machine="")])
    assert found.status() == {"guests": [], "silent": []}
    with pytest.raises(NotAdmittedError):
        found.prepare(R1, 1)


def test_a_machine_that_boots_is_waited_for(agents, monkeypatch):
    monkeypatch.setattr(inside, "BOOT_RETRY_S", 0.01)
    up_s = time.monotonic() + 0.1

    class Booting(Guest):
        def dial(self):
            if time.monotonic() < up_s:
                raise ConnectionRefusedError
            return super().dial()

    how = {"role": inside.Role.REPLICA, "machine": {}, "manifest": b"", "lease_s": 1.0, "welcome": {}}
    assert agents({"r1#2": Booting(admit={"launch": "AAAA"})}).admit(R1, **how) == bytes(3)
    monkeypatch.setattr(inside, "ADMIT_TIMEOUT_S", 0.05)
    with pytest.raises(UnknownError, match="did not come up"):
        agents({"r1#2": Gone()}).admit(R1, **how)


def test_seeds_differ_by_machine_and_home_and_show_nowhere():
    a, b = row("r1", 2), row("r1", 3)
    other = GuestSecrets(bytes(32), "dep")
    assert len({SECRETS.seed(a), SECRETS.seed(b), other.seed(a), SECRETS.seed(row("r1", 2, role="recovery"))}) == 4
    assert SECRETS.seed(a) == GuestSecrets(bytes(range(32)), "dep").seed(a)
    assert repr(SECRETS) == "GuestSecrets('dep')"
