"""The controller's journal: intent and generated names on stable storage before a cloud call, its result right after.

The process may die at any instruction. An operation that was open is found again by what it is about, its finished
steps return their results without acting, and a step that had only its intent written acts again with the same names:
so whatever acts must be safe to repeat. Never in here: credentials, private keys.
"""

import ipaddress
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.config_store.database import Database
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS groups (
  name TEXT PRIMARY KEY, spec TEXT NOT NULL, state TEXT NOT NULL,
  next_incarnation INTEGER NOT NULL DEFAULT 1, next_c INTEGER NOT NULL DEFAULT 1) STRICT;
CREATE TABLE IF NOT EXISTS operations (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, grp TEXT NOT NULL, subject TEXT NOT NULL, state TEXT NOT NULL,
  arguments TEXT NOT NULL, result TEXT NOT NULL DEFAULT '{}', began_s REAL NOT NULL, ended_s REAL) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_open ON operations (grp) WHERE state = 'open';
CREATE TABLE IF NOT EXISTS steps (
  operation TEXT NOT NULL REFERENCES operations (id), name TEXT NOT NULL, intent TEXT NOT NULL, result TEXT,
  began_s REAL NOT NULL, ended_s REAL, PRIMARY KEY (operation, name)) STRICT;
CREATE TABLE IF NOT EXISTS machines (
  grp TEXT NOT NULL, replica TEXT NOT NULL, incarnation INTEGER NOT NULL, role TEXT NOT NULL, cloud TEXT NOT NULL,
  operation TEXT NOT NULL, host TEXT NOT NULL, port INTEGER NOT NULL, machine_id TEXT NOT NULL DEFAULT '',
  state TEXT NOT NULL, launch TEXT NOT NULL DEFAULT '', PRIMARY KEY (grp, incarnation),
  UNIQUE (operation, replica, role)) STRICT;
CREATE TABLE IF NOT EXISTS networks (cloud TEXT PRIMARY KEY, cidr TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS heads (grp TEXT PRIMARY KEY, head BLOB NOT NULL) STRICT;
"""
MAX_HOSTS = 254
FIRST_HOST = 10  # below: gateway and what an operator puts there by hand


class GroupState(StrEnum):
    """Of a group as a whole."""

    APPLYING = "applying"
    ACTIVE = "active"
    CHANGING = "changing"  # its spec then names the clouds of before and after
    DESTROYING = "destroying"
    GONE = "gone"  # kept for its counters: an incarnation or configuration number is never used twice


class MachineStage(StrEnum):
    """What the journal knows of a machine; what the cloud says of it is another matter."""

    PLANNED = "planned"
    CREATED = "created"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group."""

    name: str
    spec: str
    state: GroupState


@dataclass(frozen=True, slots=True)
class MachineRow:
    """A machine that was planned. `host` and `port`: where peers and clients reach it."""

    group: str
    replica: str
    incarnation: int
    role: str
    cloud: str
    operation: str
    host: str
    port: int
    machine_id: str
    stage: MachineStage
    launch: str  # launch certificate, once admitted

    @property
    def peer_id(self) -> str:
        """`replica#incarnation`."""
        return f"{self.replica}#{self.incarnation}"

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step as journalled; times are seconds since the epoch, information only."""

    name: str
    intent: dict[str, Any]
    result: dict[str, Any] | None
    began_s: float
    ended_s: float | None


class Operation:
    """An open operation; `steps` of earlier runs count."""

    def __init__(self, journal: "Journal", row: tuple[str, str, str, str, str]) -> None:
        self._journal = journal
        self.id, self.kind, self.group, self.subject, arguments = row
        self.arguments: dict[str, Any] = json.loads(arguments)

    def step(
        self,
        name: str,
        act: Callable[[dict[str, Any]], dict[str, Any] | None],
        propose: Callable[[], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Do `act(intent)` once. `propose` generates the intent, which is durable before `act` sees it."""
        found = self._journal.find_step(self.id, name)
        if found is None:
            self._journal.begin_step(self.id, name, propose() if propose else {})
            found = self._journal.find_step(self.id, name)
            assert found is not None
        if found.result is not None:
            return found.result
        result = act(found.intent) or {}
        self._journal.end_step(self.id, name, result)
        return result

    def find(self, name: str) -> StepRow | None:
        """The step of that name, or None."""
        return self._journal.find_step(self.id, name)

    def steps(self) -> list[StepRow]:
        """All steps so far, in the order in which they began."""
        return self._journal.steps(self.id)

    def close(self, result: dict[str, Any] | None = None, *, state: str = "done") -> None:
        """End it."""
        self._journal.close_operation(self.id, result or {}, state)


class Journal:
    """One file, used by all threads of one process."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open or create (0600)."""
        self._db = Database(path, _SCHEMA)
        self._clock = clock

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._db.write() as db:
            yield db

    @property
    def deployment(self) -> str:
        """The name of this home in ownership tags; made once."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('deployment', ?)", ("d" + uuid.uuid4().hex[:7],))
            row: tuple[str] = db.execute("SELECT value FROM meta WHERE key='deployment'").fetchone()
        return row[0]

    # --- groups

    def group(self, name: str) -> GroupRow | None:
        """The group, unless there is none or it is gone."""
        return next((g for g in self.groups() if g.name == name), None)

    def groups(self, *, gone: bool = False) -> list[GroupRow]:
        """All groups, by name; those that are gone only if asked for."""
        with self._db.read() as db:
            rows = db.execute("SELECT name, spec, state FROM groups ORDER BY name").fetchall()
        found = [GroupRow(name, spec, GroupState(state)) for name, spec, state in rows]
        return [g for g in found if gone or g.state is not GroupState.GONE]

    def put_group(self, name: str, state: GroupState, spec: str | None = None) -> None:
        """Insert or change it; `spec` None keeps the stored one."""
        with self._write() as db:
            if spec is not None:
                db.execute(
                    "INSERT INTO groups (name, spec, state) VALUES (?, ?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET spec=excluded.spec, state=excluded.state",
                    (name, spec, state.value),
                )
            else:
                db.execute("UPDATE groups SET state=? WHERE name=?", (state.value, name))

    def next_c(self, group: str) -> int:
        """A configuration number that the group never had."""
        with self._write() as db:
            row = db.execute("UPDATE groups SET next_c=next_c+1 WHERE name=? RETURNING next_c-1", (group,)).fetchone()
        if row is None:
            raise PermanentError(f"group {group} is not in the journal", next_command="cloudfit group list")
        c: int = row[0]
        return c

    # --- operations and steps

    def open_operation(self, kind: str, group: str, subject: str, arguments: dict[str, Any]) -> Operation:
        """The open operation of that kind and subject, or a new one. RefusedError if another is open on the group."""
        with self._write() as db:
            query = "SELECT id, kind, grp, subject, arguments FROM operations WHERE grp=? AND state='open'"
            row = db.execute(query, (group,)).fetchone()
            if row is None:
                row = (uuid.uuid4().hex[:12], kind, group, subject, json.dumps(arguments, sort_keys=True))
                db.execute(
                    "INSERT INTO operations (id, kind, grp, subject, state, arguments, began_s) "
                    "VALUES (?, ?, ?, ?, 'open', ?, ?)",
                    (*row, self._clock()),
                )
        operation = Operation(self, row)
        if (operation.kind, operation.subject) != (kind, subject):
            raise RefusedError(
                f"{kind} of {group}: {operation.kind} {operation.subject} was begun and is not finished",
                next_command=_resume_command(operation),
            )
        return operation

    def open_of(self, group: str) -> Operation | None:
        """The operation that is open on `group`, or None."""
        with self._db.read() as db:
            query = "SELECT id, kind, grp, subject, arguments FROM operations WHERE grp=? AND state='open'"
            row = db.execute(query, (group,)).fetchone()
        return Operation(self, row) if row else None

    def close_operation(self, operation: str, result: dict[str, Any], state: str) -> None:
        """End an operation as `done`, `put-off` or `abandoned`."""
        with self._write() as db:
            db.execute(
                "UPDATE operations SET state=?, result=?, ended_s=? WHERE id=? AND state='open'",
                (state, json.dumps(result, sort_keys=True), self._clock(), operation),
            )

    def closed(self, kind: str, group: str, subject: str) -> list[tuple[str, dict[str, Any]]]:
        """(state, result) of all ended operations of that kind and subject, oldest first."""
        with self._db.read() as db:
            query = (
                "SELECT state, result FROM operations WHERE kind=? AND grp=? AND subject=? AND state<>'open' "
                "ORDER BY began_s"
            )
            rows = db.execute(query, (kind, group, subject)).fetchall()
        return [(state, json.loads(result)) for state, result in rows]

    def find_step(self, operation: str, name: str) -> StepRow | None:
        """The step, or None."""
        return next((s for s in self.steps(operation) if s.name == name), None)

    def steps(self, operation: str) -> list[StepRow]:
        """All steps of an operation in the order in which they began."""
        with self._db.read() as db:
            query = "SELECT name, intent, result, began_s, ended_s FROM steps WHERE operation=? ORDER BY rowid"
            rows = db.execute(query, (operation,)).fetchall()
        return [StepRow(n, json.loads(i), json.loads(r) if r else None, b, e) for n, i, r, b, e in rows]

    def begin_step(self, operation: str, name: str, intent: dict[str, Any]) -> None:
        """Make an intent durable."""
        with self._write() as db:
            db.execute(
                "INSERT INTO steps (operation, name, intent, began_s) VALUES (?, ?, ?, ?)",
                (operation, name, json.dumps(intent, sort_keys=True), self._clock()),
            )

    def end_step(self, operation: str, name: str, result: dict[str, Any]) -> None:
        """Make a result durable."""
        with self._write() as db:
            db.execute(
                "UPDATE steps SET result=?, ended_s=? WHERE operation=? AND name=?",
                (json.dumps(result, sort_keys=True), self._clock(), operation, name),
            )

    # --- machines and networks

    def plan_machine(
        self, operation: Operation, replica: str, role: str, cloud: str, place: Callable[[set[str]], tuple[str, int]]
    ) -> MachineRow:
        """The machine that this operation wants for `replica` in `role`; planned with a new incarnation if need be.

        `place(taken)` returns its host and port; `taken` holds all `host:port` in use.
        """
        with self._write() as db:
            where = "operation=? AND replica=? AND role=?"
            row = db.execute(f"{_MACHINES} WHERE {where}", (operation.id, replica, role)).fetchone()
            if row is None:
                query = "SELECT host || ':' || port FROM machines WHERE state<>'gone'"
                host, port = place({a for (a,) in db.execute(query)})
                (incarnation,) = db.execute(
                    "UPDATE groups SET next_incarnation=next_incarnation+1 WHERE name=? RETURNING next_incarnation-1",
                    (operation.group,),
                ).fetchone()
                db.execute(
                    "INSERT INTO machines (grp, replica, incarnation, role, cloud, operation, host, port, state) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'planned')",
                    (operation.group, replica, incarnation, role, cloud, operation.id, host, port),
                )
                row = db.execute(f"{_MACHINES} WHERE {where}", (operation.id, replica, role)).fetchone()
        return _machine(row)

    def machines(self, group: str | None = None, *, gone: bool = False) -> list[MachineRow]:
        """Machines of one or all groups; those that are gone only if asked for."""
        with self._db.read() as db:
            rows = db.execute(f"{_MACHINES} ORDER BY grp, incarnation").fetchall()
        found = [_machine(r) for r in rows]
        return [m for m in found if group in (None, m.group) and (gone or m.stage is not MachineStage.GONE)]

    def machine(self, group: str, incarnation: int) -> MachineRow | None:
        """That machine, also if it is gone."""
        return next((m for m in self.machines(group, gone=True) if m.incarnation == incarnation), None)

    def machine_created(self, row: MachineRow, machine_id: str) -> None:
        """The cloud gave it an id."""
        self._set_machine(row, "machine_id=?, state='created'", machine_id)

    def move_machine(self, row: MachineRow, host: str) -> None:
        """It gets another address; only while it is planned."""
        self._set_machine(row, "host=?", host)

    def machine_admitted(self, row: MachineRow, launch: str) -> None:
        """An agent measured it: its launch certificate (envelope)."""
        self._set_machine(row, "launch=?", launch)

    def machine_gone(self, row: MachineRow) -> None:
        """It was destroyed, with all that belongs to it."""
        self._set_machine(row, "state='gone'")

    def _set_machine(self, row: MachineRow, change: str, *values: str) -> None:
        with self._write() as db:
            query = f"UPDATE machines SET {change} WHERE grp=? AND incarnation=?"  # noqa: S608  our own constants
            db.execute(query, (*values, row.group, row.incarnation))

    def plan_network(self, cloud: str, wanted: str, pool: str, taken: Collection[str]) -> str:
        """The CIDR of this deployment's network in `cloud`: the remembered one, `wanted`, or a free /24 of `pool`."""
        with self._write() as db:
            rows = dict(db.execute("SELECT cloud, cidr FROM networks").fetchall())
            if cloud in rows:
                remembered: str = rows[cloud]
                return remembered
            used = [ipaddress.IPv4Network(x) for x in (*rows.values(), *taken)]
            cidr = wanted or _free(pool, used)
            db.execute("INSERT INTO networks VALUES (?, ?)", (cloud, cidr))
        return cidr

    def forget_network(self, cloud: str) -> None:
        """The network was deleted."""
        with self._write() as db:
            db.execute("DELETE FROM networks WHERE cloud=?", (cloud,))

    def networks(self) -> dict[str, str]:
        """CIDR by cloud."""
        with self._db.read() as db:
            return dict(db.execute("SELECT cloud, cidr FROM networks").fetchall())

    # --- the remembered head of each record chain

    def remember_head(self, group: str, head: bytes) -> None:
        """Remember how far the chain of `group` had come."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?)", (group, head))

    def head(self, group: str) -> bytes | None:
        """The head seen last, or None."""
        with self._db.read() as db:
            row = db.execute("SELECT head FROM heads WHERE grp=?", (group,)).fetchone()
        return row[0] if row else None

    def forget_head(self, group: str) -> None:
        """The chain was archived."""
        with self._write() as db:
            db.execute("DELETE FROM heads WHERE grp=?", (group,))


_MACHINES = (
    "SELECT grp, replica, incarnation, role, cloud, operation, host, port, machine_id, state, launch FROM machines"
)


def _machine(row: tuple[Any, ...]) -> MachineRow:
    group, replica, incarnation, role, cloud, operation, host, port, machine_id, stage, launch = row
    return MachineRow(
        group, replica, incarnation, role, cloud, operation, host, port, machine_id, MachineStage(stage), launch
    )


def _free(pool: str, used: list[ipaddress.IPv4Network]) -> str:
    for candidate in ipaddress.IPv4Network(pool).subnets(new_prefix=24):
        if not any(candidate.overlaps(u) for u in used):
            return str(candidate)
    raise PermanentError(f"no /24 of {pool} is free", next_command="name a network in the spec: libvirt: {network: …}")


def _resume_command(operation: Operation) -> str:
    if operation.kind == "recover":
        return f"cloudfit recovery start {operation.group} {operation.subject}"
    if operation.kind == "destroy":
        return f"cloudfit group destroy {operation.group}"
    return "cloudfit group apply with the same spec"
