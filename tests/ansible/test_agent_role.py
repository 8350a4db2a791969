"""The role `agent` on a real Debian 12 host with systemd, sshd and libvirtd: applied, applied again, used, upgraded.

One target serves all tests, in their order: it is the life of a host. `make test-ansible` installs what they need.
"""

import dataclasses
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import testinfra
from testinfra.host import Host as Remote

from cloudfit_orchestrator.clouds.base import MachineSpec, Ownership
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import Files, Host, domain_xml, machine_uuid
from cloudfit_orchestrator.controller.agents import GuestRef, MeasurementError, libvirt_machine
from cloudfit_orchestrator.controller.spec import parse_spec
from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.image import Manifest, Role, open_launch, seal_manifest
from tests.ansible import collection
from tests.ansible.operator import SOCKET, Operator, Outcome
from tests.ansible.target import Target, running
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]

MAX_EXPOSURE = 1.5  # of `systemd-analyze security`, from 0 (safe) to 10; 0.8 with systemd 252
CONNECT_S = 120.0  # the agent tries again every second
RELEASES = "/opt/cloudfit-agent/releases"
UNIT = "/etc/systemd/system/cloudfit-agent.service"
RUN = "Have the agent run by it, now and at boot"
ENROL = [
    "Make the directory of enrolled agents",
    "Keep the public key",
    "Write the host's entry for the specs of groups",
]
OPENSTACK = {"cloud": "lisbon", "flavor": "m1.small", "network": "replicas"}
# All that the role may touch, by name, size and time of change.
STATE = (
    "find /etc /opt /usr/bin /var/lib/dpkg/status /var/lib/cloudfit-agent -xdev -printf '%p %m %u %s %T@\n' 2>/dev/null"
    " | sort | sha256sum"
)
NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"
PLACE = Path("/var/lib/cloudfit/machines/t")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running(tmp_path_factory.mktemp("target")) as target:
        yield target


@pytest.fixture(scope="module")
def operator(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return Operator(tmp_path_factory.mktemp("o"), target)


@pytest.fixture(scope="module")
def host(operator: Operator) -> Remote:
    target = operator.target
    config = operator.work / "ssh_config"
    options = [word.replace("=", " ", 1) for word in target.ssh_options[3::2]]
    lines = ["HostName 127.0.0.1", f"Port {target.port}", "User root", f"IdentityFile {target.key}", *options]
    config.write_text("Host target\n" + "".join(f"  {line}\n" for line in lines))
    return testinfra.get_host("ssh://target", ssh_config=str(config))


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.output
    return outcome


def starts(host: Remote) -> list[str]:
    """The agent's processes so far, as the journal has them."""
    log = host.check_output("journalctl -q -o cat --no-pager -u cloudfit-agent")
    return [line for line in log.splitlines() if '"message": "started"' in line]


def agent_pid(host: Remote) -> int:
    return int(host.check_output("systemctl show -P MainPID cloudfit-agent"))


def setup_of(host: Remote, path: str) -> str:
    return re.search(r"CLOUDFIT_AGENT_SETUP=([0-9a-f]{16})", host.check_output(f"tr '\\0' '\\n' <{path}"))[1]


# ---- the first runs


def test_check_mode_on_a_fresh_host_foretells_what_the_first_run_does(operator: Operator, host: Remote) -> None:
    before = host.check_output(STATE)
    foretold = succeeded(operator.play("--check", "--diff"))
    assert host.check_output(STATE) == before
    assert not host.user("cloudfit-agent").exists
    assert not operator.enrolled.exists()
    assert f"+ExecStart={RELEASES}/" in foretold.output
    first = succeeded(operator.play())
    assert first.changed == foretold.changed
    assert [*first.changed[-4:]] == [RUN, *ENROL]
    assert len(starts(host)) == 1


def test_the_second_run_changes_nothing(operator: Operator, host: Remote) -> None:
    before, pid = host.check_output(STATE), agent_pid(host)
    second = succeeded(operator.play("--diff"))
    assert second.counts["changed"] == 0, second.output
    assert "+++" not in second.output
    assert (host.check_output(STATE), agent_pid(host), len(starts(host))) == (before, pid, 1)


def test_nor_does_check_mode_find_anything_to_change(operator: Operator) -> None:
    foretold = succeeded(operator.play("--check", "--diff"))
    assert foretold.counts["changed"] == 0, foretold.output
    assert "+++" not in foretold.output


# ---- what the runs have made


def test_the_service_runs_hardened_and_starts_at_boot(host: Remote) -> None:
    service = host.service("cloudfit-agent")
    assert service.is_running
    assert service.is_enabled
    assert host.check_output("systemctl show -P NRestarts cloudfit-agent") == "0"
    process = host.process.get(pid=agent_pid(host))
    assert process.user == "cloudfit-agent"
    status = dict(line.split(":\t", 1) for line in host.file(f"/proc/{process.pid}/status").content_string.splitlines())
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 1 << 2, "CAP_DAC_READ_SEARCH and no other"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    host.run_expect([0], f"systemd-analyze verify {UNIT}")
    lines = host.check_output("systemd-analyze security --no-pager cloudfit-agent.service").splitlines()
    exposure = float(re.search(r"Overall exposure level for cloudfit-agent.service: ([\d.]+)", lines[-1])[1])
    assert exposure <= MAX_EXPOSURE, "\n".join(lines)


def test_each_file_belongs_to_whom_it_should(host: Remote) -> None:
    expected = {
        "/var/lib/cloudfit-agent": "cloudfit-agent 700",
        "/var/lib/cloudfit-agent/identity.key": "cloudfit-agent 600",
        "/run/cloudfit": "cloudfit-agent 700",
        SOCKET: "cloudfit-agent 600",
        "/etc/cloudfit-agent": "root 755",
        UNIT: "root 644",
        "/opt/cloudfit-agent": "root 755",
        RELEASES: "root 755",
    }
    assert host.check_output(f"stat -c '%n %U %a' {' '.join(expected)}").splitlines() == [
        f"{path} {owner}" for path, owner in expected.items()
    ]
    keys = host.check_output("stat -c '%n %U %a' /etc/cloudfit-agent/*").splitlines()
    assert [re.sub(r"-[0-9a-f]{16}\.", ".", line) for line in keys] == [
        "/etc/cloudfit-agent/controller.pub root 644",
        "/etc/cloudfit-agent/image.pub root 644",
    ]
    assert host.run("runuser -u cloudfit-agent -- find /opt/cloudfit-agent /etc/cloudfit-agent -writable").stdout == ""


def test_the_agent_is_enrolled_and_its_entry_is_fit_for_a_spec(operator: Operator) -> None:
    with operator.agent() as client:
        status = client.status()
    assert status["agent"] == "target"
    assert (operator.enrolled / "target.pub").read_text() == status["key"] + "\n"
    entry = (operator.enrolled / "target.cloud.yaml").read_text()
    spec = parse_spec(f"apiVersion: cloudfit/v1\ngroup: g\nservice: kv\nf: 0\nclouds:\n{entry}", "spec")
    (cloud,) = spec.clouds
    assert (cloud.name, cloud.agent_socket, cloud.agent_key) == ("target", SOCKET, status["key"])
    assert cloud.uri == f"qemu+ssh://root@127.0.0.1:{operator.target.port}/system"


def test_enrolment_can_be_done_by_itself(operator: Operator) -> None:
    files = [operator.enrolled / name for name in ("target.pub", "target.cloud.yaml")]
    before = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    assert succeeded(operator.play("--tags", "enrol")).changed == ENROL[1:]
    assert [file.read_text() for file in files] == before


def test_another_identity_under_an_enrolled_name_is_refused(operator: Operator, host: Remote) -> None:
    enrolled = operator.enrolled / "target.pub"
    right = enrolled.read_text()
    enrolled.write_text(operator.home.public_file("image").read_text())
    before = host.check_output(STATE)
    outcome = operator.play()
    enrolled.write_text(right)
    assert (outcome.counts["failed"], outcome.counts["changed"]) == (1, 0)
    assert "another key is enrolled for target" in outcome.text
    assert host.check_output(STATE) == before


# ---- at work


def guest(replica: str) -> Ownership:
    return Ownership("t", "g", replica, 1, Role.REPLICA, "op")


def definition(owner: Ownership, host: Remote) -> tuple[str, Manifest]:
    """A machine as the libvirt driver defines it, of a tiny image that lies on the host."""
    image = tiny_image()
    manifest = tiny_manifest(image)
    manifest = dataclasses.replace(
        manifest, parts=(*manifest.parts, dataclasses.replace(manifest.part("root"), name="verity"))
    )
    capabilities = host.check_output("virsh -c qemu:///system capabilities")
    label = re.search(r"<model>dac</model>.*?<baselabel type='qemu'>(.*?)</baselabel>", capabilities, re.DOTALL)[1]
    names = ("vmlinuz", "initramfs", "root.img", f"{owner.replica}.sock", f"{owner.replica}.log")
    files = Files(*(PLACE / name for name in names))
    return domain_xml(
        MachineSpec(owner, image, manifest, 128, 1, None), Host("qemu", label), files, None, None
    ), manifest


def of_nova(xml: str) -> str:
    """The same as Nova defines it: its own metadata, without our channel, with files that libvirt gives to QEMU."""
    domain = ET.fromstring(xml)
    ET.SubElement(domain.find("metadata"), f"{{{NOVA}}}instance")
    domain.remove(domain.find("seclabel"))
    devices = domain.find("devices")
    devices.remove(devices.find("channel"))
    ET.SubElement(devices, "controller", type="virtio-serial", index="0")
    return ET.tostring(domain, "unicode")


def create(operator: Operator, xml: str) -> None:
    """Start it, paused: a guest in a guest without hardware virtualization has no time to run."""
    (operator.work / "domain.xml").write_text(xml)
    operator.target.copy(operator.work / "domain.xml", to="/root/")
    operator.target.run("virsh -c qemu:///system create --paused /root/domain.xml", timeout_s=900.0)


def admitted(operator: Operator, owner: Ownership, manifest: Manifest) -> str:
    """Have it measured, wait until its channel is connected, and give it keys; the machine of its certificate."""
    ref, machine = GuestRef(owner.group, owner.replica, 1), libvirt_machine("qemu:///system", machine_uuid(owner))
    order = {"role": Role.REPLICA, "machine": machine, "lease_s": 3600.0, "welcome": {}}
    key = operator.home.image_key()
    with operator.agent() as client:
        root, wrong = manifest.part("root"), hashlib.sha256(b"another root").hexdigest()
        parts = tuple(dataclasses.replace(p, sha256=wrong) if p == root else p for p in manifest.parts)
        bad = dataclasses.replace(manifest, parts=parts)
        with pytest.raises(MeasurementError, match="root"):
            client.admit(ref, **order, manifest=seal_manifest(bad, key))
        launch = client.admit(ref, **order, manifest=seal_manifest(manifest, key))
        certificate = open_launch(launch, [collection.raw_key(operator.enrolled / "target.pub")])
        deadline = time.monotonic() + CONNECT_S
        while not client.status()["guests"][-1]["connected"]:
            assert time.monotonic() < deadline, "the agent does not reach the machine's channel"
            time.sleep(1)
        client.prepare(ref, 1)
    assert certificate.isolated
    return certificate.machine


def test_the_agent_measures_a_machine_of_the_hosts_libvirt(operator: Operator, host: Remote) -> None:
    """Through all that the unit forbids: libvirt's socket, root's image files, the machine's channel."""
    target, image, owner = operator.target, tiny_image(), guest("r0")
    target.run(f"mkdir -p {PLACE} && chown libvirt-qemu {PLACE}")
    target.copy(*(image / name for name in ("vmlinuz", "initramfs", "root.img")), to=f"{PLACE}/")
    target.run(f"chmod 0600 {PLACE}/root.img && chown libvirt-qemu {PLACE}/root.img && chmod 0711 {PLACE}")
    xml, manifest = definition(owner, host)
    create(operator, xml)
    assert admitted(operator, owner, manifest) == machine_uuid(owner)


# ---- a change: other code, one more trusted key, and a place in an OpenStack cloud


@pytest.fixture(scope="module")
def change(operator: Operator) -> dict[str, object]:
    keys = [str(operator.home.public_file(name)) for name in ("controller", "client-operator")]
    return {"agent_wheel": str(operator.later_wheel()), "agent_controller_keys": keys, "agent_openstack": OPENSTACK}


def test_a_change_is_foretold_and_held_back_until_it_may_restart(
    operator: Operator, host: Remote, change: dict[str, object]
) -> None:
    before, pid = host.check_output(STATE), agent_pid(host)
    foretold = succeeded(operator.play("--check", "--diff", agent_restart=False, **change))
    assert host.check_output(STATE) == before
    assert "+    --controller-key /etc/cloudfit-agent/controller-" in foretold.output
    held = succeeded(operator.play(agent_restart=False, **change))
    assert held.changed == foretold.changed
    assert "target: the agent still runs with its former set-up" in held.text
    assert "ends the epochs of all replicas on this host, now g/r0#1;" in held.text
    assert agent_pid(host) == pid, "agent_restart: false, and yet it was restarted"


def test_what_is_held_back_is_said_until_it_is_done(
    operator: Operator, host: Remote, change: dict[str, object]
) -> None:
    pid = agent_pid(host)
    again = succeeded(operator.play(agent_restart=False, **change))
    assert again.counts["changed"] == 0, again.output
    assert "target: the agent still runs with its former set-up" in again.text
    # nor would it be restarted in a run that has ended epochs on another host
    after_another = operator.foretold("agent_service", {"setup": "other", "restart": "idle", "socket": SOCKET})
    assert (after_another["pending"], after_another["serving"], after_another["ended"]) == (True, ["g/r0#1"], [])
    tidied = succeeded(operator.play(playbook="tidy"))
    assert tidied.counts["changed"] == 0, "both set-ups are in use: one by the process, one by its next start"
    assert agent_pid(host) == pid
    assert setup_of(host, f"/proc/{pid}/environ") != setup_of(host, UNIT)


def test_it_is_restarted_once(operator: Operator, host: Remote, change: dict[str, object]) -> None:
    """The runs above have left what a run that died before the restart leaves: all files, and the old process."""
    pid = agent_pid(host)
    done = succeeded(operator.play("--diff", **change))
    assert done.changed == [RUN]
    assert "the restart has ended the epochs of g/r0#1" in done.text
    assert "still runs" not in done.text
    assert len(starts(host)) == 2
    now = agent_pid(host)
    assert now != pid
    assert setup_of(host, f"/proc/{now}/environ") == setup_of(host, UNIT)
    release = re.search(rf"{RELEASES}/[0-9a-f]{{16}}", host.check_output(f"tr '\\0' ' ' </proc/{now}/cmdline"))[0]
    assert host.file(f"{release}/venv/lib/python3.11/site-packages/cloudfit_orchestrator/later.py").exists


def test_the_host_of_an_openstack_cloud_is_enrolled_as_such(operator: Operator) -> None:
    entry = (operator.enrolled / "target.cloud.yaml").read_text()
    spec = parse_spec(f"apiVersion: cloudfit/v1\ngroup: g\nservice: kv\nf: 0\nclouds:\n{entry}", "spec")
    (cloud,) = spec.clouds
    assert (cloud.driver, cloud.uri) == ("openstack", f"openstack+ssh://root@127.0.0.1:{operator.target.port}")
    assert (cloud.agent_socket, cloud.agent_key + "\n") == (SOCKET, (operator.enrolled / "target.pub").read_text())
    assert cloud.openstack.flavor == "m1.small"


def test_beside_nova_the_agent_attaches_its_channel(operator: Operator, host: Remote) -> None:
    """As its own account, which may give orders to libvirt by nothing but the rule."""
    operator.target.run("virsh -c qemu:///system destroy " + machine_uuid(guest("r0")))
    owner = guest("r1")
    xml, manifest = definition(owner, host)
    create(operator, of_nova(xml))
    live = "virsh -c qemu:///system dumpxml " + machine_uuid(owner)
    assert PORT_NAME not in host.check_output(live)
    assert admitted(operator, owner, manifest) == machine_uuid(owner)
    assert PORT_NAME in host.check_output(live)


# ---- the end


def test_what_is_no_more_in_use_is_tidied_away(operator: Operator, host: Remote) -> None:
    before, pid = host.check_output(STATE), agent_pid(host)
    foretold = succeeded(operator.play("--check", "--diff", playbook="tidy"))
    assert host.check_output(STATE) == before
    (removed,) = re.findall(rf"^-({RELEASES}/.*)$", foretold.output, re.MULTILINE)
    assert succeeded(operator.play(playbook="tidy")).changed == foretold.changed
    (left,) = host.file(RELEASES).listdir()
    assert left != Path(removed).name
    assert f"{RELEASES}/{left}/" in host.file(UNIT).content_string
    assert len(host.file("/etc/cloudfit-agent").listdir()) == 3, "all three keys are trusted now"
    assert agent_pid(host) == pid


def test_it_is_taken_off_only_if_it_serves_nobody(operator: Operator, host: Remote) -> None:
    pid = agent_pid(host)
    refused = operator.play(playbook="uninstall")
    assert (refused.counts["failed"], refused.counts["changed"]) == (1, 0)
    assert "the agent serves g/r1#1" in refused.text
    assert agent_pid(host) == pid
    with operator.agent() as client:
        client.evict(GuestRef("g", "r1", 1))
    foretold = succeeded(operator.play("--check", "--diff", playbook="uninstall"))
    assert agent_pid(host) == pid
    done = succeeded(operator.play(playbook="uninstall"))
    assert done.changed == foretold.changed
    assert not host.user("cloudfit-agent").exists
    assert host.run("find / -xdev -name '*cloudfit-agent*' -not -path '/var/log/*'").stdout == ""
    assert host.check_output("systemctl show -P LoadState cloudfit-agent") == "not-found"
    assert not list(operator.enrolled.iterdir())
    assert succeeded(operator.play(playbook="uninstall")).counts["changed"] == 0
