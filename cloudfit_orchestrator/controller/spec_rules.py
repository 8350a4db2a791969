"""What the fields of a spec mean together: quorums, placement, agents, bounds. Their form: `spec_form`."""

import ipaddress
from typing import Any

from cloudfit_orchestrator.controller import yaml_nodes
from cloudfit_orchestrator.controller.placement import Placed, members_needed, place
from cloudfit_orchestrator.controller.spec_form import CloudForm
from cloudfit_orchestrator.controller.yaml_nodes import Document, Problem
from cloudfit_orchestrator.model.record import MAX_MEMBERS, Algorithm
from cloudfit_orchestrator.model.spec import Trust

# Slots times members. A vote in a view change tells of each slot of the window what a quorum said: 130 bytes a member
# at most, of the 8 MiB of a frame (bft/messages.MAX_PEER_FRAME).
MAX_WINDOW_VOTES = 1 << 16


def check(document: Document, v: dict[str, Any], problems: list[Problem]) -> tuple[Placed] | None:
    """Append what is wrong with the sound fields `v`; return where replicas go, unless that cannot be said."""

    def wrong(path: yaml_nodes.Path, message: str, hint: str = "") -> None:
        problems.append(Problem(*document.where(path), message, hint))

    trust = v.get("trust")
    _check_clouds(v.get("clouds", []), trust, wrong)
    if trust == Trust.NONE:
        _check_untrusted(v, wrong)
    n = None
    if "f" in v and "k" in v and "replicas" in v:
        row = "3f+2k+1" if v.get("algorithm") == Algorithm.PBFT else "2f+k+1"
        needed = members_needed(v.get("algorithm", ""), v["f"], v["k"])
        n = needed if v["replicas"] is None else v["replicas"]
        if n < needed:
            where = ("replicas",)
            wrong(where, f"{n} replicas are too few for f={v['f']}, k={v['k']}", f"at least {row} = {needed}")
            n = None
        elif n > MAX_MEMBERS:
            wrong(("f",), f"f={v['f']}, k={v['k']} needs {n} replicas, the limit is {MAX_MEMBERS}")
            n = None
    _check_adversary(v, n, wrong)
    _check_bounds(v, n, wrong)
    if n is None or "placement" not in v or len({c.name for c in v.get("clouds", [])}) != len(v.get("clouds", [None])):
        return None
    limit = (v["f"] or n) if v["placement"].max_per_cloud == "f" else v["placement"].max_per_cloud
    names = [c.name for c in v["clouds"] if not c.reserve]
    if len(names) * limit < n:
        more = -(-n // limit)
        hint = f"name {more} clouds, reserves apart, or raise placement.max_per_cloud, which gives up the loss of one"
        wrong(("clouds",), f"{n} replicas do not fit on {len(names)} clouds with at most {limit} on each", hint)
        return None
    return (place(n, v["f"], names, limit),)


def _check_clouds(clouds: list[CloudForm], trust: str | None, wrong: Any) -> None:
    seen: set[str] = set()
    for i, cloud in enumerate(clouds):
        kinds = [k for k in ("libvirt", "process", "openstack") if getattr(cloud, k) is not None]
        if len(kinds) != 1:
            what = " and ".join(kinds) or "no kind"
            wrong(("clouds", i), f"cloud {cloud.name!r} has {what}", "exactly one of libvirt, process, openstack")
        if cloud.name in seen:
            wrong(("clouds", i, "name"), f"cloud {cloud.name!r} is named twice", "each cloud needs its own name")
        seen.add(cloud.name)
        if trust == Trust.HYPERVISOR:
            _check_agent(i, cloud, wrong)
        elif trust == Trust.NONE and (cloud.agent or (cloud.openstack and cloud.openstack.agent)):
            where = ("clouds", i, "agent") if cloud.agent else ("clouds", i, "openstack", "agent")
            hint = "leave agent: out, or with agents on all hosts say trust: hypervisor"
            wrong(where, f"cloud {cloud.name!r} has an agent, and trust: none uses none", hint)
    nets = [
        (i, ipaddress.IPv4Network(c.libvirt.network)) for i, c in enumerate(clouds) if c.libvirt and c.libvirt.network
    ]
    for at, (i, net) in enumerate(nets):
        for j, other in nets[:at]:
            if net.overlaps(other):
                wrong(("clouds", i, "libvirt", "network"), f"{net} overlaps the network of {clouds[j].name!r}")


def _check_agent(i: int, cloud: CloudForm, wrong: Any) -> None:
    """trust: hypervisor rests on a wormhole at the hypervisor, and that needs root on the compute hosts."""
    if cloud.libvirt and "+ssh://" in cloud.libvirt.uri and cloud.agent is None:
        hint = "add agent: {socket: /run/cloudfit/agent.sock}; without root there, trust: none"
        wrong(("clouds", i), f"cloud {cloud.name!r} is remote: the controller cannot start its agent", hint)
    if cloud.openstack is None:
        return
    agent = cloud.openstack.agent
    if cloud.agent is not None:
        wrong(("clouds", i, "agent"), "an openstack cloud names its agent inside openstack", "openstack: {agent: …}")
    if agent is None:
        hint = (
            "with root on its compute hosts run cloudfit-agent there and add agent: {ssh: root@host, socket: /run/…}, "
            "or agent: {} if the compute host is this one; without, say trust: none with algorithm: pbft"
        )
        wrong(("clouds", i, "openstack"), f"cloud {cloud.name!r} has no agent: nobody measures what boots there", hint)
    elif agent.ssh and not agent.socket:
        hint = "add socket: /run/cloudfit/agent.sock"
        wrong(("clouds", i, "openstack", "agent"), "a remote agent is not started by the controller", hint)


def _check_untrusted(v: dict[str, Any], wrong: Any) -> None:
    """Without a trusted component only PBFT stands, and a cloud that is malicious itself must count within f."""
    if v.get("algorithm", Algorithm.PBFT) != Algorithm.PBFT:
        hint = "algorithm: pbft, with 3f+1 replicas; or trust: hypervisor with an agent on every host"
        says = f"{v['algorithm']} believes the counters of a wormhole, and with trust: none there is none"
        wrong(("trust",), says, hint)
    if v.get("f") == 0:
        wrong(("f",), "with f=0 a malicious cloud would have the group", "f: 1 or more, on 3f+1 replicas")
    placement = v.get("placement")
    if placement is not None and "f" in v and placement.max_per_cloud != "f" and placement.max_per_cloud > v["f"] > 0:
        says = f"a malicious cloud would have {placement.max_per_cloud} replicas, more than f={v['f']}"
        wrong(("placement", "max_per_cloud"), says, f"max_per_cloud: f, which is {v['f']}")


def _check_bounds(v: dict[str, Any], n: int | None, wrong: Any) -> None:
    """What grows with the window must fit into memory and into frames."""
    p, machine = v.get("parameters"), v.get("machine")
    if p is None:
        return
    where = ("parameters", "window")
    if p.window < p.checkpoint_period:
        hint = "2 * checkpoint_period leaves room"
        wrong(where, f"window {p.window} is below checkpoint_period {p.checkpoint_period}", hint)
    if n is not None and p.window * n > MAX_WINDOW_VOTES:
        says = f"what {n} replicas say of {p.window} slots in a view change does not fit into a message"
        wrong(where, says, f"window: {MAX_WINDOW_VOTES // n} or less")
    mib = p.window * p.max_batch_bytes >> 20
    if machine is not None and mib > machine.memory_mib // 2:
        says = f"a window of {p.window} batches of {p.max_batch_bytes} bytes takes {mib} MiB of a machine's "
        says += f"{machine.memory_mib}: more than half"
        wrong(where, says, f"a smaller window or max_batch_bytes, or machine: {{memory_mib: {2 * mib}}}")


def _check_adversary(v: dict[str, Any], n: int | None, wrong: Any) -> None:
    names = v.get("adversary") or []
    if names and v.get("allow_adversary") is False:
        hint = "tests and demonstrations only: allow_adversary: true"
        wrong(("adversary",), "adversary names replicas, but allow_adversary is not set", hint)
    if n is None:
        return
    for i, name in enumerate(names):
        if name not in {f"r{j}" for j in range(n)}:
            wrong(("adversary", i), f"there is no replica {name!r}", f"replicas are r0 to r{n - 1}")
    if len(set(names)) > v["f"]:
        wrong(("adversary",), f"{len(set(names))} adversaries, but f={v['f']}", "name at most f replicas")
