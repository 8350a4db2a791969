"""The role `agent` on a real Debian 12 host with systemd, sshd and libvirtd: applied, applied again, used, upgraded.

One target serves all tests, in their order: it is the life of a host. `make test-ansible` installs what they need.
"""

import dataclasses
import hashlib
import json
import re
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
import testinfra
import yaml
from testinfra.host import Host as Remote

from cloudfit_orchestrator.clouds.base import MachineSpec, Ownership
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import Files, Host, domain_xml, machine_uuid
from cloudfit_orchestrator.controller.agents import (
    AgentClient,
    GuestRef,
    MeasurementError,
    StreamlocalTransport,
    libvirt_machine,
)
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.spec import parse_spec
from cloudfit_orchestrator.model.image import Role, open_launch, seal_manifest
from tests.ansible import collection
from tests.ansible.target import ROLE_PACKAGES, Target, running
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]

PLAY_TIMEOUT_S = 1800.0  # a minute on an idle machine; the target has no hardware virtualization
MAX_EXPOSURE = 1.5  # of `systemd-analyze security`, from 0 (safe) to 10; 0.8 with systemd 252
CONNECT_S = 120.0  # the agent tries again every second
SOCKET = "/run/cloudfit/agent.sock"
RECAP = re.compile(r"^target\s*: (.*)$", re.MULTILINE)
NEVER_S = 10 * 365 * 86400  # the target's package lists are as old as its disk, and no mirror is in reach


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run of the playbook did on the target."""

    code: int
    counts: dict[str, int]  # ok, changed, failed, …; empty if it did not come so far
    output: str


class Operator:
    """Someone at the control node: a data directory of cloudfit, a wheel, an inventory, the installed collection."""

    def __init__(self, work: Path, target: Target) -> None:
        self.work, self.target = work, target
        self.home = Home(work / "home")
        self.enrolled = work / "enrolled"
        collection.install(work)
        self.wheel = collection.build_wheel(work)
        self.wheelhouse = work / "wheelhouse"
        collection.fetch_wheels(self.wheelhouse, "cryptography>=41")
        host = {
            "ansible_host": "127.0.0.1",
            "ansible_port": target.port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(target.key),
            "ansible_ssh_common_args": " ".join(target.ssh_options),
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_pipelining": True,
        }
        (work / "hosts.yml").write_text(json.dumps({"hypervisors": {"hosts": {"target": host}}}))

    def play(self, *words: str, **variables: object) -> Outcome:
        """Apply the collection's playbook with `words` on the command line."""
        settings = {
            "agent_wheel": str(self.wheel),
            "agent_wheelhouse": str(self.wheelhouse),
            "agent_controller_keys": [str(self.home.public_file("controller"))],
            "agent_image_keys": [str(self.home.public_file("image"))],
            "agent_enrolment_dir": str(self.enrolled),
            "agent_apt_cache_s": NEVER_S,
        } | variables
        done = subprocess.run(
            [
                collection.program("ansible-playbook"), "-i", self.work / "hosts.yml", "-e", json.dumps(settings),
                "cloudfit.orchestrator.site", *words,
            ],
            cwd=self.work, env=collection.environment(self.work), capture_output=True, text=True, check=False,
            timeout=PLAY_TIMEOUT_S,
        )  # fmt: skip
        recap = RECAP.search(done.stdout)
        counts = {k: int(v) for k, v in (word.split("=") for word in recap[1].split())} if recap else {}
        return Outcome(done.returncode, counts, done.stdout + done.stderr)

    def ssh(self) -> paramiko.SSHClient:
        """A connection as the controller makes it."""
        client = paramiko.SSHClient()
        client.load_host_keys(str(self.target.known_hosts))
        client.connect(
            "127.0.0.1", self.target.port, "root", key_filename=str(self.target.key), look_for_keys=False,
            allow_agent=False, timeout=60, banner_timeout=60, auth_timeout=60, transport_factory=StreamlocalTransport,
        )  # fmt: skip
        return client


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    work = tmp_path_factory.mktemp("ansible")
    with running(work) as target:
        yield Operator(work, target)


@pytest.fixture(scope="module")
def host(operator: Operator) -> Remote:
    target = operator.target
    config = operator.work / "ssh_config"
    config.write_text(
        f"Host target\n  HostName 127.0.0.1\n  Port {target.port}\n  User root\n  IdentityFile {target.key}\n"
        f"  UserKnownHostsFile {target.known_hosts}\n  IdentitiesOnly yes\n"
    )
    return testinfra.get_host("ssh://target", ssh_config=str(config))


def succeeded(outcome: Outcome) -> dict[str, int]:
    assert outcome.code == 0, outcome.output
    return outcome.counts


def agent_pid(host: Remote) -> int:
    return int(host.check_output("systemctl show -P MainPID cloudfit-agent"))


def test_the_collection_passes_the_linter_as_production_code(tmp_path: Path) -> None:
    collection.install(tmp_path)
    done = subprocess.run(
        [collection.program("ansible-lint"), "--offline", "--strict", "--profile", "production"],
        cwd=collection.SOURCE, env=collection.environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_target_has_in_its_cache_what_the_role_installs() -> None:
    defaults = yaml.safe_load((collection.SOURCE / "roles/agent/defaults/main.yml").read_text())
    assert set(defaults["agent_packages"]) == set(ROLE_PACKAGES)


def test_check_mode_on_a_fresh_host_foretells_and_changes_nothing(operator: Operator, host: Remote) -> None:
    before = host.check_output("find /etc /opt /var/lib/dpkg /usr/bin -xdev -printf '%p %s %T@\n' | sort | sha256sum")
    outcome = operator.play("--check", "--diff")
    assert succeeded(outcome)["changed"] > 5
    assert "+ExecStart=/opt/cloudfit-agent/current/bin/python" in outcome.output
    assert not host.file("/opt/cloudfit-agent").exists
    assert not host.user("cloudfit-agent").exists
    assert not operator.enrolled.exists()
    after = host.check_output("find /etc /opt /var/lib/dpkg /usr/bin -xdev -printf '%p %s %T@\n' | sort | sha256sum")
    assert after == before


def test_the_first_run_installs_and_the_second_changes_nothing(operator: Operator, host: Remote) -> None:
    assert succeeded(operator.play())["changed"] > 5
    pid = agent_pid(host)
    second = operator.play("--diff")
    assert succeeded(second)["changed"] == 0, second.output
    assert agent_pid(host) == pid


def test_the_service_runs_hardened_and_starts_at_boot(host: Remote) -> None:
    service = host.service("cloudfit-agent")
    assert service.is_running
    assert service.is_enabled
    assert host.check_output("systemctl show -P NRestarts cloudfit-agent") == "0"
    process = host.process.get(pid=agent_pid(host))
    assert process.user == "cloudfit-agent"
    status = dict(line.split(":\t", 1) for line in host.file(f"/proc/{process.pid}/status").content_string.splitlines())
    assert int(status["CapEff"], 16) == 1 << 2, "CAP_DAC_READ_SEARCH and nothing else"
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    host.run_expect([0], "systemd-analyze verify /etc/systemd/system/cloudfit-agent.service")
    lines = host.check_output("systemd-analyze security --no-pager cloudfit-agent.service").splitlines()
    exposure = float(re.search(r"Overall exposure level for cloudfit-agent.service: ([\d.]+)", lines[-1])[1])
    assert exposure <= MAX_EXPOSURE, "\n".join(lines)


@pytest.mark.parametrize(
    ("path", "owner", "mode"),
    [
        ("/var/lib/cloudfit-agent", "cloudfit-agent", 0o700),
        ("/var/lib/cloudfit-agent/identity.key", "cloudfit-agent", 0o600),
        ("/run/cloudfit", "cloudfit-agent", 0o700),
        ("/run/cloudfit/agent.sock", "cloudfit-agent", 0o600),
        ("/etc/cloudfit-agent", "root", 0o755),
        ("/etc/cloudfit-agent/controller-0.pub", "root", 0o644),
        ("/etc/cloudfit-agent/image-0.pub", "root", 0o644),
        ("/etc/systemd/system/cloudfit-agent.service", "root", 0o644),
        ("/opt/cloudfit-agent", "root", 0o755),
    ],
)
def test_each_file_belongs_to_whom_it_should(host: Remote, path: str, owner: str, mode: int) -> None:
    file = host.file(path)
    assert (file.user, file.mode) == (owner, mode)


def test_the_agent_is_enrolled_and_its_entry_is_fit_for_a_spec(operator: Operator) -> None:
    ssh = operator.ssh()
    try:
        with AgentClient.ssh(ssh, SOCKET) as client:
            status = client.status()
    finally:
        ssh.close()
    assert status["agent"] == "target"
    assert (operator.enrolled / "target.pub").read_text() == status["key"] + "\n"
    entry = (operator.enrolled / "target.cloud.yaml").read_text()
    spec = parse_spec(f"apiVersion: cloudfit/v1\ngroup: g\nservice: kv\nf: 0\nclouds:\n{entry}", "spec")
    (cloud,) = spec.clouds
    assert cloud.name == "target"
    assert cloud.uri == f"qemu+ssh://root@127.0.0.1:{operator.target.port}/system"
    assert cloud.agent_socket == SOCKET


def test_the_agent_measures_a_machine_of_the_hosts_libvirt(operator: Operator, host: Remote) -> None:
    """Through all that the unit forbids: libvirt's socket, root's image files, the machine's channel."""
    image, place = tiny_image(), Path("/var/lib/cloudfit/machines/t")
    target = operator.target
    target.run(f"mkdir -p {place} && chown libvirt-qemu {place}")
    target.copy(*(image / name for name in ("vmlinuz", "initramfs", "root.img")), to=f"{place}/")
    target.run(f"chmod 0600 {place}/root.img && chown libvirt-qemu {place}/root.img && chmod 0711 {place}")
    capabilities = host.check_output("virsh -c qemu:///system capabilities")
    label = re.search(r"<model>dac</model>.*?<baselabel type='qemu'>(.*?)</baselabel>", capabilities, re.DOTALL)[1]
    manifest = tiny_manifest(image)
    parts = (*manifest.parts, dataclasses.replace(manifest.part("root"), name="verity"))
    manifest = dataclasses.replace(manifest, parts=parts)
    owner = Ownership("t", "g", "r0", 1, Role.REPLICA, "op")
    files = Files(*(place / n for n in ("vmlinuz", "initramfs", "root.img", "channel.sock", "console.log")))
    xml = domain_xml(MachineSpec(owner, image, manifest, 128, 1, None), Host("qemu", label), files, None, None)
    (operator.work / "domain.xml").write_text(xml)
    target.copy(operator.work / "domain.xml", to="/root/")
    target.run("virsh -c qemu:///system create --paused /root/domain.xml", timeout_s=600.0)
    ssh = operator.ssh()
    try:
        with AgentClient.ssh(ssh, SOCKET) as client:
            uuid, key = machine_uuid(owner), operator.home.image_key()
            order = {"role": Role.REPLICA, "machine": libvirt_machine("qemu:///system", uuid), "lease_s": 60.0}
            wrong = dataclasses.replace(parts[2], sha256=hashlib.sha256(b"another root").hexdigest())
            bad = dataclasses.replace(manifest, parts=(*parts[:2], wrong, parts[3]))
            with pytest.raises(MeasurementError, match="root"):
                client.admit(GuestRef("g", "r0", 1), **order, manifest=seal_manifest(bad, key), welcome={})
            launch = client.admit(GuestRef("g", "r0", 1), **order, manifest=seal_manifest(manifest, key), welcome={})
            certificate = open_launch(launch, [collection.raw_key(operator.enrolled / "target.pub")])
            assert (certificate.machine, certificate.isolated) == (uuid, True)
            deadline = time.monotonic() + CONNECT_S
            while not client.status()["guests"][0]["connected"]:
                assert time.monotonic() < deadline, "the agent does not reach the machine's channel"
                time.sleep(1)
            client.evict(GuestRef("g", "r0", 1))
    finally:
        ssh.close()
        target.run("virsh -c qemu:///system destroy " + machine_uuid(owner))


def test_another_identity_under_an_enrolled_name_is_refused(operator: Operator) -> None:
    enrolled = operator.enrolled / "target.pub"
    right = enrolled.read_text()
    enrolled.write_text(operator.home.public_file("image").read_text())
    outcome = operator.play("--tags", "enrol")
    enrolled.write_text(right)
    assert outcome.counts["failed"] == 1
    assert "another key is enrolled for target" in outcome.output


def test_an_upgrade_restarts_the_agent_only_if_it_may(operator: Operator, host: Remote) -> None:
    former, before = agent_pid(host), host.file("/opt/cloudfit-agent/current").linked_to
    later = operator.work / "later" / operator.wheel.name
    later.parent.mkdir()
    later.write_bytes(operator.wheel.read_bytes())
    with zipfile.ZipFile(later, "a") as wheel:
        wheel.writestr("cloudfit_orchestrator/later.py", "")
    held = operator.play(agent_wheel=str(later), agent_restart=False)
    assert succeeded(held)["changed"] > 0
    assert "ends the epochs of all replicas" in held.output
    current = host.file("/opt/cloudfit-agent/current").linked_to
    assert current != before
    assert agent_pid(host) == former, "agent_restart: false, and yet it was restarted"
    back = operator.play()
    assert succeeded(back)["changed"] > 0
    assert host.file("/opt/cloudfit-agent/current").linked_to == before
    assert agent_pid(host) != former
    assert host.service("cloudfit-agent").is_running
