"""Envelopes inside stream messages: a faulty member signs its message, and nobody the envelope in it."""

import base64
import json

import pytest

from cloudfit_orchestrator.bft.usig.messages import Wedge
from cloudfit_orchestrator.model import envelope as module
from cloudfit_orchestrator.model.envelope import key_id, open_envelope
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import RECORD_TYPE
from cloudfit_orchestrator.model.signing import public_bytes
from tests.unit.bft.house import CONTROLLER, House
from tests.unit.bft.machine import Machine

FAULTY = "r2#3"


def envelope(*signatures: object, **change: object) -> bytes:
    payload = base64.b64encode(b"{}").decode()
    doc = {"payloadType": RECORD_TYPE, "payload": payload, "signatures": signatures, **change}
    return json.dumps(doc).encode()


HOSTILE = {
    "a list for a key id": envelope({"keyid": [], "sig": ""}),
    "an object for a key id": envelope({"keyid": {}, "sig": ""}),
    "a number for a key id": envelope({"keyid": 7, "sig": ""}),
    "signatures that are no list": envelope(signatures=5),
    "a signature that is no object": envelope(5),
    "a payload that is no text": envelope(payload=[]),
    "nested without end": b"[" * 100_000,
    "another type": envelope(payloadType=["x"] * 1000),
    "nothing": b"",
    "a list": b"[]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wedge_around_a_hostile_envelope_ends_its_senders_stream_and_stops_nobody(name: str) -> None:
    house = House()
    machine = Machine(house, "r0")
    machine.hear(house.say("r2", Wedge(1, HOSTILE[name])), sender=FAULTY)
    assert [body["replica"] for topic, body in machine.reports if topic == "liar"] == ["r2"]
    machine.hear(house.prepare("r1", 0, 1))
    assert machine.core.status["slot"] == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_envelope_is_refused_by_one_error(name: str) -> None:
    with pytest.raises(BadError) as caught:
        open_envelope(HOSTILE[name], RECORD_TYPE, [public_bytes(CONTROLLER)])
    assert len(str(caught.value)) < 500


def test_an_envelope_full_of_wrong_signatures_costs_no_more_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    real = module.Ed25519Verifier.verify
    monkeypatch.setattr(module.Ed25519Verifier, "verify", lambda *a: checked.append(1) or real(*a))
    known = {"keyid": key_id(public_bytes(CONTROLLER)), "sig": base64.b64encode(bytes(64)).decode()}
    with pytest.raises(BadError):
        open_envelope(envelope(*[known] * 5000), RECORD_TYPE, [public_bytes(CONTROLLER)])
    assert len(checked) <= module.MAX_SIGNATURES
