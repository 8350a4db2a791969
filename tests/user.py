"""Someone at a shell who types `cloudfit` commands, with a home of their own."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CLOUDFIT = [sys.executable, "-m", "cloudfit_orchestrator.cli"]
COMMAND_TIMEOUT_S = 900
PATIENCE = ("--timeout", "300")  # a machine that starts again is needed for some answers: half a minute on a slow host


class User:
    """One operator of one group."""

    def __init__(self, home: Path, group: str, spec: str, **environment: str) -> None:
        self.home, self.group = home, group
        self.spec = home / "group.yaml"
        self.spec.write_text(spec)
        self.environment = {**os.environ, "CLOUDFIT_HOME": str(home), **environment}

    @classmethod
    @contextmanager
    def at_work(cls, group: str, spec: str, **environment: str) -> Iterator["User"]:
        """With a fresh home, which is gone afterwards, as is the group; one whose group cannot be destroyed stays."""
        home = Path(tempfile.mkdtemp(prefix="cfvm", dir="/var/tmp"))  # sockets need a short path, QEMU's user a way in
        home.chmod(0o711)
        someone = cls(home, group, spec, **environment)
        try:
            yield someone
        finally:
            groups = someone.json("group", "list")["groups"]
            if group in {g["group"] for g in groups}:
                someone.run("group", "destroy", group)
            shutil.rmtree(home)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*CLOUDFIT, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [*CLOUDFIT, *arguments], env=self.environment, capture_output=True, text=True, check=False,
            timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == code, f"cloudfit {' '.join(arguments)}: {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout

    def json(self, *arguments: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run(*arguments, "-f", "json"))
        assert document["schema"] == 1
        return document

    def stop_when(self, stage: str, number: signal.Signals, *arguments: str) -> int:
        """Run a command and send it a signal as soon as it says that it has reached `stage`."""
        process = self.start(*arguments)
        assert process.stderr is not None
        for line in process.stderr:
            if f'"stage": "{stage}"' in line:
                process.send_signal(number)
                break
        else:
            pytest.fail(f"cloudfit {' '.join(arguments)} never reached {stage}")
        process.communicate(timeout=120)
        return process.returncode

    def put(self, key: str, value: str) -> None:
        self.run("kv", "put", self.group, key, value, *PATIENCE)

    def get(self, key: str) -> str:
        document = self.json("kv", "get", self.group, key, *PATIENCE)
        return base64.b64decode(document["value_base64"]).decode()

    def members(self) -> dict[str, dict[str, Any]]:
        """By name of the replica, as `group show` tells."""
        return {m["replica"]: m for m in self.json("group", "show", self.group)["members"]}

    def incarnations(self) -> dict[str, int]:
        return {name: member["incarnation"] for name, member in self.members().items()}

    def agents(self) -> dict[str, int]:
        """Process id of each agent that runs, by cloud."""
        found = {}
        for place in (self.home / "agents").glob("*/agent.pid"):
            pid = json.loads(place.read_text().split()[0])
            if Path(f"/proc/{pid}").exists():
                found[place.parent.name] = pid
        return found
