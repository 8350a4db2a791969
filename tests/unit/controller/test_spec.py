import base64
import json
from pathlib import Path

import pytest

from cloudfit_orchestrator.bft.messages import MAX_PEER_FRAME, Signed, encode
from cloudfit_orchestrator.bft.pbft.messages import Prepared, ViewChange
from cloudfit_orchestrator.controller.placement import place
from cloudfit_orchestrator.controller.spec import (
    SpecError,
    from_json,
    json_schema,
    parse_spec,
    read_spec,
    to_json,
)
from cloudfit_orchestrator.controller.spec_rules import MAX_WINDOW_VOTES
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import MAX_MEMBERS

GOOD = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: lisbon, libvirt: {uri: "qemu:///system", network: 10.84.3.0/24}}
  - {name: passau, libvirt: {uri: "qemu+ssh://root@passau/system"}, agent: {socket: /run/cloudfit/agent.sock}}
  - {name: ulm, process: {}}
recovery: {every: 6h, lease: 8h, on_suspicion: true, keep_evidence: 3}
"""


def problems(text: str) -> list[tuple[int, int, str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "spec.yaml")
    return [(p.line, p.column, p.message, p.hint) for p in caught.value.problems]


def test_good_spec_is_checked_and_placed() -> None:
    spec = parse_spec(GOOD, "spec.yaml")
    assert (spec.n, spec.f, spec.k, spec.image) == (3, 1, 0, "replica")
    assert spec.placement == (("r0", "lisbon"), ("r1", "passau"), ("r2", "ulm"))
    assert spec.recovery.every_s == 6 * 3600
    assert spec.cloud_of("r1").agent_socket == "/run/cloudfit/agent.sock"
    assert [c.local for c in spec.clouds] == [True, False, True]
    assert spec.not_tolerated == ()
    assert from_json(to_json(spec)) == spec


@pytest.mark.parametrize(("f", "k", "n"), [(1, 0, 4), (2, 0, 7), (1, 1, 6)])
def test_without_a_wormhole_more_replicas_are_needed(f: int, k: int, n: int) -> None:
    clouds = "".join(f"  - {{name: c{i}, process: {{}}}}\n" for i in range(n))
    text = f"apiVersion: cloudfit/v1\ngroup: g\nservice: kv\nalgorithm: pbft\nf: {f}\nk: {k}\nclouds:\n{clouds}"
    assert parse_spec(text, "x").n == n
    few = problems(text.replace(f"f: {f}", f"f: {f}\nreplicas: {n - 1}"))
    assert [(message, hint) for _, _, message, hint in few] == [
        (f"{n - 1} replicas are too few for f={f}, k={k}", f"at least 3f+2k+1 = {n}")
    ]


def test_all_mistakes_are_reported_at_once_with_positions() -> None:
    text = """\
apiVersion: cloudfit/v2
grup: ledger
service: kv
f: 1
f: 2
replicas: 2
algorithm: pbft
clouds:
  - {name: a, process: {}}
  - {name: a, process: {}, libvirt: {uri: "qemu:///system"}}
  - {name: b, libvirt: {url: x}}
recovery: {every: 6 hours}
adversary: [r9]
"""
    found = problems(text)
    where = [(line, column) for line, column, _, _ in found]
    assert where == sorted(where)
    by_line = {line: (message, hint) for line, _, message, hint in found}
    assert by_line[2] == ("unknown key 'grup'", "did you mean 'group'?")
    assert by_line[5] == ("key 'f' stands here again", "first on line 4")
    assert by_line[6] == ("2 replicas are too few for f=1, k=0", "at least 3f+2k+1 = 4")
    assert "a duration is" in by_line[12][0]
    assert "allow_adversary" in by_line[13][1]
    messages = [m for _, _, m, _ in found]
    assert any("group is missing" in m for m in messages)
    assert any("apiVersion" in m for m in messages)
    assert ("unknown key 'url'", "did you mean 'uri'?") in [(m, h) for _, _, m, h in found]


def test_cloud_mistakes() -> None:
    text = """\
apiVersion: cloudfit/v1
group: g
service: kv
f: 1
clouds:
  - {name: a, libvirt: {uri: "qemu:///system", network: 10.84.0.0/23}}
  - {name: a, libvirt: {uri: "qemu:///system", network: 10.84.1.0/24}}
  - {name: b, libvirt: {uri: "qemu+ssh://h/system"}}
  - {name: c}
"""
    found = problems(text)
    assert [(line, column) for line, column, _, _ in found] == [(7, 12), (7, 57), (8, 5), (9, 5)]
    assert "overlaps the network of 'a'" in found[1][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("f: 1\nreplicas: 2", "2 replicas are too few for f=1, k=0"),
        ("f: 1\nk: 1", "4 replicas do not fit on 3 clouds with at most 1 on each"),
        ("f: 2", None),
        ("f: 40", "needs 81 replicas, the limit is 64"),
        ("f: -1", "f: Input should be greater than or equal to 0"),
        ("f: '1'", "f: Input should be a valid integer"),
        ("f: 1\nallow_adversary: true\nadversary: [r0, r1]", "2 adversaries, but f=1"),
        ("f: 1\nallow_adversary: true\nadversary: [r3]", "there is no replica 'r3'"),
        ("f: 1\nadversary: [r2]", "allow_adversary is not set"),
        ("f: 1\nparameters: {window: 64}", "window 64 is below checkpoint_period 128"),
        ("f: 1\nparameters: {window: 21846}", "what 3 replicas say of 21846 slots in a view change does not fit"),
        ("f: 1\nparameters: {window: 1024}", "takes 256 MiB of a machine's 384: more than half"),
    ],
)
def test_bound_is_refused_not_warned_about(change: str, message: str | None) -> None:
    text = GOOD.replace("f: 1", change)
    if message is None:
        assert parse_spec(text, "x").n == 5
    else:
        assert any(message in m for _, _, m, _ in problems(text))


def test_raising_the_limit_says_what_is_given_up() -> None:
    spec = parse_spec(GOOD.replace("f: 1", "f: 1\nreplicas: 4\nplacement: {max_per_cloud: 2}"), "x")
    assert spec.placement[3] == ("r3", "lisbon")
    assert spec.not_tolerated == ("the loss of cloud 'lisbon': it holds 2 replicas, more than f=1",)


def test_place_refuses_more_than_the_limit() -> None:
    with pytest.raises(BadInputError, match="2 replicas on cloud 'a'"):
        place(3, 1, ["a", "b"], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a spec is a mapping"),
        ("- 1", "a spec is a mapping"),
        ("a: [", "not YAML"),
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("a: !!python/object:os.system {}", "unknown key 'a'"),
        ("[" * 5000, "nested deeper"),
        ("a: {" + "b: {" * 40 + "}" * 41, "nested deeper"),
        ("? [1]\n: 2", "a key must be text"),
        ("x: \x00", "not YAML"),
        ("a: " + "x" * (300 << 10), "larger than"),
    ],
)
def test_what_is_no_spec_is_said_with_a_position(text: str, message: str) -> None:
    found = problems(text)
    assert any(message in m for _, _, m, _ in found), found


def test_unreadable_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot read spec"):
        read_spec(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"group: \xff")
    with pytest.raises(BadInputError, match="not UTF-8"):
        read_spec(tmp_path / "latin.yaml")


def test_error_text_has_file_line_column_and_next_command() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace("group:", "grop:"), "ledger.yaml")
    assert "ledger.yaml:2:1: unknown key 'grop' (did you mean 'group'?)" in str(caught.value)
    assert "next: correct ledger.yaml" in str(caught.value)


def test_json_schema_names_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert {"apiVersion", "group", "clouds", "replicas", "adversary"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


OPENSTACK = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: lisbon, openstack: {cloud: lisbon, flavor: m1.small, network: replicas, agent: {}}}
  - name: passau
    openstack:
      cloud: passau
      region: RegionOne
      flavor: m1.small
      network: replicas
      availability_zone: nova
      volume_type: fast
      clients: [192.0.2.0/24]
      boot: uefi
      images: {hidden: true, signature: {certificate: 0b9c8a1e-6f0f-4f0e-9d53-6f0c8f2b7a10, key: images.pem}}
      agent: {ssh: root@compute.passau, socket: /run/cloudfit/agent.sock}
  - {name: ulm, process: {}}
"""


def test_an_openstack_cloud_goes_through_the_journal():
    spec = parse_spec(OPENSTACK, "spec.yaml")
    lisbon, passau, _ = spec.clouds
    assert (lisbon.driver, lisbon.local, lisbon.openstack.hypervisor) == ("openstack", True, "qemu:///system")
    assert (passau.local, passau.uri) == (False, "openstack+ssh://root@compute.passau")
    assert passau.agent_socket == "/run/cloudfit/agent.sock"
    assert passau.openstack.clients == ("192.0.2.0/24",)
    assert (lisbon.openstack.boot, lisbon.openstack.hidden, lisbon.openstack.certificate) == ("kernel", False, "")
    assert (passau.openstack.boot, passau.openstack.hidden, passau.openstack.protected) == ("uefi", True, False)
    assert passau.openstack.certificate == "0b9c8a1e-6f0f-4f0e-9d53-6f0c8f2b7a10"
    assert passau.openstack.signing_key == "images.pem"
    assert from_json(to_json(spec)) == spec


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (", agent: {}", "", "'lisbon' has no agent: nobody measures what boots there"),
        (", socket: /run/cloudfit/agent.sock", "", "a remote agent is not started by the controller"),
        ("agent: {}", "agent: {sokcet: /x}", "did you mean 'socket'"),
        ("192.0.2.0/24", "192.0.2.7/24", "an IPv4 network is written 192.0.2.0/24"),
        ("      flavor: m1.small\n", "", "clouds.1.openstack.flavor is missing"),
        ("agent: {}}", "agent: {}}, agent: {socket: /run/x}", "names its agent inside openstack"),
        ("network: replicas, ", "netwrok: replicas, ", "did you mean 'network'"),
        ("boot: uefi", "boot: bios", "clouds.1.openstack.boot: .*'kernel' or 'uefi'"),
        ("hidden: true", "hiden: true", "did you mean 'hidden'"),
        ("hidden: true", "hidden: maybe", "clouds.1.openstack.images.hidden: "),
        (", key: images.pem", "", "signature.key is missing"),
        ("key: images.pem", "key: /etc/key", "signature.key: has not the right form"),
        ("certificate: 0b9c", "certificate: 0b9", "signature.certificate: has not the right form"),
        ("agent: {}", "agent: {key: short}", "openstack.agent.key: has not the right form"),
    ],
)
def test_mistakes_in_an_openstack_cloud(old, new, said):
    assert old in OPENSTACK
    with pytest.raises(SpecError, match=said):
        parse_spec(OPENSTACK.replace(old, new, 1), "spec.yaml")


NONE = """\
apiVersion: cloudfit/v1
group: g
service: kv
f: 1
trust: none
algorithm: pbft
clouds:
  - {name: a, openstack: {cloud: a, flavor: m, network: n}}
  - {name: b, libvirt: {uri: "qemu+ssh://h/system"}}
  - {name: c, process: {}}
  - {name: d, process: {}}
"""


def test_trust_none_needs_no_agent_anywhere() -> None:
    spec = parse_spec(NONE, "x")
    assert (spec.trust, spec.n, {c.trust for c in spec.clouds}) == ("none", 4, {"none"})
    assert from_json(to_json(spec)) == spec
    assert "none" not in to_json(parse_spec(GOOD, "x"))


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "message", "hint"),
    [
        ("pbft", "ebawa", 5, 8, "ebawa believes the counters of a wormhole", "algorithm: pbft"),
        ("algorithm: pbft\n", "", 5, 8, "ebawa believes the counters of a wormhole", "algorithm: pbft"),
        ("f: 1", "f: 0", 4, 4, "with f=0 a malicious cloud would have the group", "f: 1 or more"),
        ("f: 1", "f: 1\nreplicas: 3", 5, 11, "3 replicas are too few for f=1, k=0", "3f+2k+1 = 4"),
        (
            "f: 1",
            "f: 1\nplacement: {max_per_cloud: 2}",
            5,
            28,
            "would have 2 replicas, more than f=1",
            "max_per_cloud: f",
        ),
        ("network: n}", "network: n, agent: {}}", 8, 67, "has an agent, and trust: none uses none", "leave agent: out"),
        (
            "process: {}}",
            "process: {}, agent: {socket: /s}}",
            10,
            35,
            "has an agent, and trust: none",
            "leave agent: out",
        ),
        ("trust: none", "trust: some", 5, 8, "trust: Input should be 'hypervisor' or 'none'", ""),
        ("trust: none", "trust: hypervisor", 8, 26, "'a' has no agent: nobody measures", "trust: none with"),
    ],
)
def test_what_trust_none_does_not_go_with(old: str, new: str, line: int, column: int, message: str, hint: str) -> None:
    found = problems(NONE.replace(old, new, 1))
    fitting = [p for p in found if message in p[2] and hint in p[3]]
    assert fitting, found
    assert fitting[0][:2] == (line, column)


def test_the_enrolled_key_of_an_agent_goes_through_the_journal():
    key = base64.b64encode(bytes(range(32))).decode()
    spec = parse_spec(
        OPENSTACK.replace("agent.sock}", f"agent.sock, key: {key}}}").replace(
            "  - {name: ulm, process: {}}", f"  - {{name: ulm, process: {{}}, agent: {{socket: /run/a, key: {key}}}}}"
        ),
        "spec.yaml",
    )
    assert [cloud.agent_key for cloud in spec.clouds] == ["", key, key]
    assert from_json(to_json(spec)) == spec


@pytest.mark.parametrize("n", [4, 13, MAX_MEMBERS])
def test_a_view_change_over_the_widest_window_fits_into_a_frame(n: int) -> None:
    """PBFT's is the largest: a certificate of each slot."""
    quorum = n - (n - 1) // 3
    signed = Signed("r" * 8, bytes(64))
    slots = [
        Prepared(2**60 + s, 2**32, bytes(32), bytes(64), (signed,) * (quorum - 1)) for s in range(MAX_WINDOW_VOTES // n)
    ]
    vote = encode(ViewChange("r" * 8, 2**32, 2**60, bytes(32), (signed,) * quorum, tuple(slots)))
    assert len(vote) < MAX_PEER_FRAME * 3 // 4
