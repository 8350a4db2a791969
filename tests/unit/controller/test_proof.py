"""The placement proof: domains that hold at most f replicas are survived, and it says which are not."""

from dataclasses import replace

from cloudfit_orchestrator.controller.proof import malicious_cloud, proof
from tests.unit.controller.worlds import spec

OPENSTACK = "{cloud: %s, region: %s, flavor: small, network: replicas, availability_zone: one, agent: {%s}}"
HEAD = "apiVersion: cloudfit/v1\ngroup: ledger\nservice: kv\nf: 1\nclouds:\n"
REMOTE = "ssh: root@%s, socket: /run/a.sock"


def found(text):
    return {(d.kind, d.name): (d.replicas, d.survived) for d in proof(spec(text))}


def test_clouds_on_one_host_survive_each_cloud_and_not_the_host():
    domains = found(HEAD + "".join(f"  - {{name: {n}, libvirt: {{uri: 'qemu:///system'}}}}\n" for n in "abc"))
    assert domains["cloud", "a"] == (("r0",), True)
    assert domains["host", "this host"] == (("r0", "r1", "r2"), False)
    assert domains["image", "replica"] == (("r0", "r1", "r2"), False)
    assert not [kind for kind, _ in domains if kind in ("account", "zone")]


def test_two_entries_of_one_account_are_one_account():
    places = [OPENSTACK % ("lisbon", "r", REMOTE % "h1"), OPENSTACK % ("lisbon", "r", REMOTE % "h2")]
    text = HEAD + "".join(f"  - {{name: c{i}, openstack: {p}}}\n" for i, p in enumerate(places))
    domains = found(text + "  - {name: ulm, libvirt: {uri: 'qemu:///system'}}\n")
    assert domains["account", "lisbon r"] == (("r0", "r1"), False)
    assert domains["zone", "lisbon one"] == (("r0", "r1"), False)
    assert domains["host", "h1"] == (("r0",), True)
    assert domains["host", "this host"] == (("r2",), True)


def test_a_reserve_is_no_domain_until_it_holds_a_replica():
    text = HEAD + "".join(f"  - {{name: {n}, process: {{}}}}\n" for n in "abc")
    assert ("cloud", "d") not in found(text + "  - {name: d, process: {}, reserve: true}\n")


def test_a_malicious_cloud_counts_within_f_only_where_nobody_at_it_is_trusted():
    clouds = "".join(f"  - {{name: {n}, process: {{}}}}\n" for n in "abcd")
    pbft = HEAD.replace("f: 1\n", "f: 1\nalgorithm: pbft\n")
    assert malicious_cloud(spec(pbft + clouds)).endswith("a host whose root is malicious is NOT survived")
    untrusted = spec(pbft.replace("f: 1\n", "f: 1\ntrust: none\n") + clouds)
    assert malicious_cloud(untrusted).endswith("each holds at most 1, so it counts within f=1")
    crowded = replace(untrusted, placement=(*untrusted.placement[:3], ("r3", "a")))
    assert malicious_cloud(crowded).endswith("a holds 2, more than f=1: NOT survived")


def test_several_entries_of_one_cloud_are_one_malicious_cloud():
    head = HEAD.replace("f: 1\n", "f: 1\ntrust: none\nalgorithm: pbft\n") + "  - {name: c, process: {}}\n"
    regions = "".join(
        f"  - {{name: r{n}, openstack: {{cloud: lisbon, region: {n}, flavor: m, network: n}}}}\n" for n in "ab"
    )
    ulm = "  - {name: %s, libvirt: {uri: 'qemu+ssh://root@ulm/system', network: %s}}\n"
    hosts = ulm % ("ha", "10.8.1.0/24") + ulm % ("hb", "10.8.2.0/24")
    rest = "".join(f"  - {{name: p{n}, process: {{}}}}\n" for n in "abc")
    assert malicious_cloud(spec(head + regions + rest)).endswith("lisbon holds 2, more than f=1: NOT survived")
    assert malicious_cloud(spec(head + hosts + rest)).endswith("ulm holds 2, more than f=1: NOT survived")


def test_nobody_knows_on_which_hosts_a_cloud_without_agents_puts_its_machines():
    text = HEAD.replace("f: 1\n", "f: 1\ntrust: none\nalgorithm: pbft\n")
    places = "".join(f"  - {{name: {n}, openstack: {{cloud: {n}, flavor: m, network: n}}}}\n" for n in "abcd")
    kinds = {kind for kind, _ in found(text + places)}
    assert kinds == {"cloud", "account", "image"}
