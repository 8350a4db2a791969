"""What there is of the agent on this host: its unit as systemd has it, its process, and what it answers."""

import dataclasses
import json
import pathlib
import re
import socket
import time

SERVICE = "cloudfit-agent.service"
UNIT = pathlib.Path("/etc/systemd/system") / SERVICE
SETUP = "CLOUDFIT_AGENT_SETUP"  # in the environment that the unit gives the agent: the name of its whole set-up
MAX_ANSWER_BYTES = 2 << 20  # of a line of the agent's, see the project's docs/contracts.md
PAUSE_S = 0.5
PROPERTIES = ("LoadState", "ActiveState", "UnitFileState", "MainPID", "NeedDaemonReload", "Environment", "ExecStart")


@dataclasses.dataclass(frozen=True)
class Seen:
    """The unit and its process. `loaded` and `running`: names of the set-ups that these have, None if there is none."""

    enabled: bool
    loaded: str
    running: str
    pid: int
    stale: bool  # systemd has not read the unit's file as it is now
    commands: str  # what the loaded unit and the process are started by

    def state(self):
        """What a diff shows."""
        return {"enabled": self.enabled, "loaded": self.loaded, "running": self.running}


def see(module):
    """The present state. Fails the module if systemd does not answer."""
    _, out, _ = module.run_command(["systemctl", "show", f"--property={','.join(PROPERTIES)}", SERVICE], check_rc=True)
    shown = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    exists = shown.get("LoadState") == "loaded"
    pid = int(shown.get("MainPID") or 0)
    environment, command = _of_process(pid, "environ"), _of_process(pid, "cmdline")
    alive = bool(command) and shown.get("ActiveState") in ("active", "reloading", "deactivating")
    return Seen(
        enabled=exists and shown.get("UnitFileState") == "enabled",
        loaded=_setup(shown.get("Environment", "")) if exists else None,
        running=_setup(environment) if alive else None,
        pid=pid if alive else 0,
        stale=shown.get("NeedDaemonReload") == "yes",
        commands=f"{shown.get('ExecStart', '')}\n{command}",
    )


def _of_process(pid, name):
    """A file of /proc with its zeros as spaces; empty if there is no such process (any more)."""
    if not pid:
        return ""
    try:
        return pathlib.Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _setup(environment):
    """The name in it; `unnamed` if a unit of other make is there."""
    found = re.search(rf"(?:^|\s){SETUP}=(\S+)", environment)
    return found[1] if found else "unnamed"


def ask(path, wait_s=0.0):
    """`key` and `guests` of the agent's status. Raises OSError or ValueError if it says nothing within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as stream:
                stream.settimeout(max(wait_s, 10.0))
                stream.connect(path)
                stream.sendall(b'{"id": 1, "op": "status"}\n')
                with stream.makefile("rb") as answers:
                    answer = json.loads(answers.readline(MAX_ANSWER_BYTES))
                    return {"key": answer["key"], "guests": answer["guests"]}
        except KeyError as error:
            raise ValueError(f"its status has no {error}") from error  # it is no agent, or no longer one of this form
        except (OSError, ValueError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(PAUSE_S)


def serving(status):
    """Names of the guests with keys, which end with the agent's process: `group/replica#incarnation`."""
    return [
        f"{guest['group']}/{guest['replica']}#{guest['incarnation']}"
        for guest in status["guests"]
        if any(epoch["state"] != "ended" for epoch in guest["epochs"])
    ]
