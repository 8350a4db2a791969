"""Someone at the control node: a data directory of cloudfit, a wheel, an inventory, the installed collection."""

import contextlib
import dataclasses
import json
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import paramiko

from cloudfit_orchestrator.controller.agents import AgentClient, StreamlocalTransport
from cloudfit_orchestrator.controller.home import Home
from tests.ansible import collection
from tests.ansible.target import Target

PLAY_TIMEOUT_S = 2400.0  # two minutes on an idle machine; the target has no hardware virtualization
SOCKET = "/run/cloudfit/agent.sock"
NEVER_S = 10 * 365 * 86400  # the target's package lists are as old as its disk, and no mirror is in reach
RECAP = re.compile(r"^target\s*: (.*)$", re.MULTILINE)
TASK = re.compile(r"^TASK \[(?:[\w.]+ : )?(.*)\] \**$")
CHANGED = re.compile(r"^changed: \[target")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run of a playbook did on the target."""

    code: int
    counts: dict[str, int]  # ok, changed, failed, …; empty if it did not come so far
    output: str

    @property
    def text(self) -> str:
        """The output with single spaces, as Ansible breaks lines where it likes."""
        return " ".join(self.output.split())

    @property
    def changed(self) -> list[str]:
        """Names of the tasks that changed something, or would, in their order."""
        found, task = [], ""
        for line in self.output.splitlines():
            if begin := TASK.match(line):
                task = begin[1]
            elif CHANGED.match(line) and task not in found:
                found.append(task)
        return found


class Operator:
    """See the module."""

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
            "ansible_ssh_args": " ".join(target.ssh_options),
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_pipelining": True,
        }
        (work / "hosts.yml").write_text(json.dumps({"hypervisors": {"hosts": {"target": host}}}))

    def later_wheel(self) -> Path:
        """One of the same name with other code."""
        later = self.work / "later" / self.wheel.name
        later.parent.mkdir()
        later.write_bytes(self.wheel.read_bytes())
        with zipfile.ZipFile(later, "a") as wheel:
            wheel.writestr("cloudfit_orchestrator/later.py", "")
        return later

    def play(self, *words: str, playbook: str = "site", **variables: object) -> Outcome:
        """Apply one of the collection's playbooks with `words` on the command line."""
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
                f"cloudfit.orchestrator.{playbook}", *words,
            ],
            cwd=self.work, env=collection.environment(self.work), capture_output=True, text=True, check=False,
            timeout=PLAY_TIMEOUT_S,
        )  # fmt: skip
        recap = RECAP.search(done.stdout)
        counts = {k: int(v) for k, v in (word.split("=") for word in recap[1].split())} if recap else {}
        return Outcome(done.returncode, counts, done.stdout + done.stderr)

    def foretold(self, module: str, arguments: dict[str, object]) -> dict[str, object]:
        """What one of the collection's modules answers in check mode."""
        words = ["-i", self.work / "hosts.yml", "target", "--check", "-m", f"cloudfit.orchestrator.{module}"]
        done = subprocess.run(
            [collection.program("ansible"), *words, "-a", json.dumps(arguments)],
            cwd=self.work, env=collection.environment(self.work), capture_output=True, text=True, check=False,
            timeout=PLAY_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout[done.stdout.index("{") :])

    @contextlib.contextmanager
    def agent(self) -> Iterator[AgentClient]:
        """The agent, reached as the controller reaches it."""
        ssh = paramiko.SSHClient()
        ssh.load_host_keys(str(self.target.known_hosts))
        ssh.connect(
            "127.0.0.1", self.target.port, "root", key_filename=str(self.target.key), look_for_keys=False,
            allow_agent=False, timeout=60, banner_timeout=60, auth_timeout=60, transport_factory=StreamlocalTransport,
        )  # fmt: skip
        try:
            with AgentClient.ssh(ssh, SOCKET) as client:
                yield client
        finally:
            ssh.close()
