"""The agent's controller socket, line by line: one line of JSON comes back, and no order ends in an internal error."""

import asyncio
import base64
import json

from cloudfit_orchestrator.wormhole import host as host_module
from cloudfit_orchestrator.wormhole.agent import MachineRef
from cloudfit_orchestrator.wormhole.control import CODES, MAX_LINE_BYTES, Control
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.measure import NO_IMAGE, Measured
from tests.unit.bft.house import CONTROLLER, House, public_bytes

LOOP = asyncio.new_event_loop()
KNOWN_CODES = {code for _, code in CODES} | {"measurement"}
HOUSE = House()
TEXT = base64.b64encode(HOUSE.prepared).decode()


def _measured(machine: MachineRef, _: object, *, attach: bool) -> Measured:
    """Every machine is what it says; nothing of this computer is looked at."""
    return Measured(host_module._machine_id(machine), NO_IMAGE, "/nonexistent/socket", isolated=False)


def run(data: bytes) -> None:
    """Lines to one agent."""
    LOOP.run_until_complete(_lines(data.split(b"\n")[:8]))


async def _lines(lines: list[bytes]) -> None:
    real, host_module._measure = host_module._measure, _measured
    agent = HostAgent("a", CONTROLLER, controller_keys=[public_bytes(CONTROLLER)], image_keys=[])
    control = Control(agent)
    try:
        for line in lines:
            if b'"wait_s"' in line:
                continue  # waiting is what it is for
            answer = await control._answer(line + b"\n")
            assert answer.endswith(b"\n")
            assert answer.count(b"\n") == 1
            assert len(answer) <= MAX_LINE_BYTES + 4096
            doc = json.loads(answer)
            assert doc["ok"] is True or doc["code"] in KNOWN_CODES, doc
        assert not agent.counters["control-internal"]
    finally:
        await agent.stop()
        host_module._measure = real


def seeds() -> list[bytes]:
    """Each order once."""
    who = {"group": "ledger", "replica": "r0", "incarnation": 1}
    machine = {"driver": "process", "pid": 4242, "socket": "/x"}
    orders = [
        {"op": "status"},
        {"op": "admit", **who, "role": "replica", "machine": machine, "manifest": "", "lease_s": 9.5, "welcome": {}},
        {"op": "prepare", **who, "c": 1},
        {"op": "install", "group": "ledger", "envelope": "e30="},
        {"op": "freeze", **who, "c": 1},
        {"op": "command", **who, "body": {"op": "base"}},
        {"op": "reports", "since": 0},
        {"op": "close", **who, "c": 1},
        {"op": "evict", **who},
    ]
    lines = [json.dumps({"id": i, **order}).encode() for i, order in enumerate(orders)]
    return [b"\n".join(lines[:8]), *(b"\n".join((lines[1], line)) for line in lines[2:])]
