"""What a cloud changes on the host outside the lab's directory: a wire into its flat network, iptables chains, a mount.

All of it is gone after `down`.
"""

import json
from itertools import pairwise
from pathlib import Path

from tests.openstack.lab.console import LabError, run
from tests.openstack.lab.layout import Cloud, Lab

_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_SHARED_CHAINS = ("neutron-filter-top", "neutron-postrouting-bottom")  # made unprefixed by each agent that has rules


def share_home(lab: Lab) -> None:
    """Make the directory a shared mount, so that volumes mounted by Nova reach the libvirtds' mount namespaces.

    Under systemd everything is shared already; without it `/` is private.
    """
    if not _is_mounted(lab.home):
        run(["mount", "--bind", lab.home, lab.home])
        run(["mount", "--make-shared", lab.home])


def unshare_home(lab: Lab) -> None:
    """Undo `share_home`, after unmounting whatever is below."""
    for target in reversed(_mounts()):
        if target.is_relative_to(lab.home):
            run(["umount", "--lazy", target])


def wire_up(cloud: Cloud) -> None:
    """Have the pair of links: the host's end with the gateway's address, the other one for Neutron's bridge."""
    links = _links()
    if cloud.host_link not in links:
        run(["ip", "link", "add", cloud.host_link, "type", "veth", "peer", "name", cloud.cloud_link])
    prefix = cloud.subnet.partition("/")[2]
    run(["ip", "addr", "replace", f"{cloud.host_address}/{prefix}", "dev", cloud.host_link])
    for link in (cloud.host_link, cloud.cloud_link):
        run(["ip", "link", "set", link, "up"])
    if _IP_FORWARD.read_text().strip() == "0":  # machines of one cloud reach those of another through the host
        _IP_FORWARD.write_text("1\n")


def wire_down(cloud: Cloud) -> None:
    """Remove links, bridge and DHCP name spaces of the cloud's network, and the chains of its agent."""
    links = _links()
    bridge = links.get(cloud.cloud_link, {}).get("master")
    for link in (bridge, cloud.host_link):
        if link in links:
            run(["ip", "link", "del", link])
    for network in (cloud.home / "neutron/dhcp").glob("*/"):
        name = f"qdhcp-{network.name}"
        if Path("/run/netns", name).exists():
            run(["ip", "netns", "del", name])
    remove_chains(cloud.chain_prefix)


def remove_chains(prefix: str) -> None:
    """Remove an agent's iptables chains with the rules that lead to them, and the shared ones if no rule is in them."""
    for save, restore in (("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore")):
        orders = removal(run([save]), prefix)
        if orders:
            # Single removals and not a table without them: others, such as libvirt, may be writing to it right now.
            run([restore, "--noflush", "--wait"], stdin=orders)


def removal(saved: str, prefix: str) -> str:
    """What takes the chains named `prefix-…` out of the tables that iptables-save printed; empty if there are none.

    The shared chains go with the last agent's rules.
    """
    orders = []
    for table in saved.split("*")[1:]:
        lines = table.splitlines()
        chains = [line[1:].split()[0] for line in lines if line.startswith(":")]
        rules = [line for line in lines if line.startswith("-A ")]
        doomed = [chain for chain in chains if chain.startswith(f"{prefix}-")]
        if not doomed:
            continue
        left = [rule for rule in rules if not _names_one(rule, doomed)]
        doomed += [c for c in chains if c in _SHARED_CHAINS and not any(r.startswith(f"-A {c} ") for r in left)]
        orders += [f"*{lines[0]}", *(f":{chain} - [0:0]" for chain in doomed)]  # named so, a chain is emptied
        orders += [f"-D {r[3:]}" for r in rules if r.split()[1] not in doomed and _names_one(r, doomed)]
        orders += [*(f"-X {chain}" for chain in doomed), "COMMIT"]
    return "".join(order + "\n" for order in orders)


def _names_one(rule: str, chains: list[str]) -> bool:
    """Whether the rule is in one of the chains, or leads to one."""
    words = rule.split()
    return any(word in chains and before in ("-A", "-j", "-g") for before, word in pairwise(words))


def _links() -> dict[str, dict[str, str]]:
    return {link["ifname"]: link for link in json.loads(run(["ip", "-json", "link", "show"]))}


def _mounts() -> list[Path]:
    return [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _is_mounted(path: Path) -> bool:
    if " " in str(path):
        raise LabError(f"the lab's directory {path} has a blank in its name; name another by --home")
    return path in _mounts()
