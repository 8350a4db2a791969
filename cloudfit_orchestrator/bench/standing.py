"""`bench ordering --group`: the same closed loop on a group that stands already, on whatever machines; see `run`.

Its members tell nothing to who measures from outside, so messages, bytes and syncs are not known. CPU time is that of
the processes on this host that are their machines: QEMU's, or replicas themselves.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.bench.generator import group_order
from cloudfit_orchestrator.bench.ordering import AVERAGED, SEED, Parameters, Report, common_figures, drive, medians
from cloudfit_orchestrator.bench.processes import Worker, machine_facts
from cloudfit_orchestrator.clouds.base import Machine
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.model.errors import BadInputError, CloudfitError, PermanentError
from cloudfit_orchestrator.model.record import ConfigRecord, open_record

CONNECT_S = 120.0  # machines without KVM shake hands slowly


def check(parameters: Parameters) -> None:
    """Raises BadInputError for what only a group of the measurement's own allows."""
    parameters.check()
    own = {
        "--against": parameters.against is not None,
        "--wan": parameters.wan is not None,
        "--stop-slowest": parameters.stop_slowest,
        "--profile": parameters.profile,
        "--processes": parameters.processes not in (None, 1),
    }
    if wrong := [name for name, asked in own.items() if asked]:
        raise BadInputError(
            f"{', '.join(wrong)} cannot be had with --group: it needs a group of the measurement's own",
            next_command="leave out one of the two",
        )


def host_process(machine: Machine, processes: Path = Path("/proc")) -> int | None:
    """The process on this host that is that machine, if there is one."""
    pid = machine.reference.get("pid")
    if isinstance(pid, int):
        return pid
    wanted = b"\0-uuid\0" + machine.id.encode() + b"\0"  # as libvirt starts QEMU
    for entry in processes.glob("[0-9]*/cmdline"):
        try:
            if wanted in entry.read_bytes():
                return int(entry.parent.name)
        except OSError:
            continue  # it has ended
    return None


def machines(context: Context, record: ConfigRecord) -> dict[str, int]:
    """Processes on this host, by replica, of all members that have one here. A cloud that does not answer has none."""
    row = context.journal.group(record.group)
    members = {(m.replica, m.incarnation) for m in record.members}
    found = {}
    for cloud in spec_file.from_json(row.spec).clouds if row is not None else ():
        try:
            there = context.sites.cloud(cloud).machines(context.journal.deployment)
        except CloudfitError:
            continue
        for machine in there:
            who = machine.owner
            if who.group == record.group and (who.replica, who.incarnation) in members:
                pid = host_process(machine)
                if pid is not None:
                    found[who.replica] = pid
    return found


def run(context: Context, home: Home, group: str, parameters: Parameters, report: Report) -> dict[str, Any]:
    """A report as `ordering.run` gives it. The keys of the load stay in the group's state.

    `cpu_ms_per_op` is null unless all members' machines are on this host. Raises CloudfitError.
    """
    check(parameters)
    envelope = context.store.active(group)
    if envelope is None:
        raise PermanentError(f"group {group} has no ACTIVE configuration", next_command="cloudfit group list")
    record = open_record(envelope, context.trusted)
    servers = machines(context, record)
    operator = home.client().name
    order = group_order(home, operator, envelope, context.trusted, numbers=home.client_numbers(group, operator))
    with Worker("load generator", "cloudfit_orchestrator.bench.generator", order) as load:
        load.answer(CONNECT_S)
        points = []
        for clients in parameters.sweep:
            rounds = []
            all_here = len(servers) == len(record.members)
            for i in range(parameters.repeat):
                report(Progress("bench", "round", group, f"{clients} clients, round {i + 1} of {parameters.repeat}"))
                rounds.append(_round(load, clients, parameters, servers, seed=SEED + i, all_here=all_here))
            ours = medians(rounds, AVERAGED)
            by_process = medians([r["cpu_ms_per_op_by_process"] for r in rounds], (*servers, "load0"))
            errors = sum(r["errors"] for r in rounds)
            points.append(
                {"clients": clients, **ours, "cpu_ms_per_op_by_process": by_process, "errors": errors}
                | {"rounds": [{"ours": r} for r in rounds]}
            )
    errors = sum(p["errors"] for p in points)
    asked = {**asdict(parameters), "algorithm": record.algorithm, "n": len(record.members), "group": group}
    doc = {"bench": "ordering", "good": errors == 0, "errors": errors, "machine": machine_facts(home.root)}
    return {**doc, "parameters": asked, **(points[0] if len(points) == 1 else {}), "errors": errors, "points": points}


def _round(
    load: Worker, clients: int, parameters: Parameters, servers: dict[str, int], *, seed: int, all_here: bool
) -> dict[str, Any]:
    processes = {**servers, "load0": load.pid}
    window = drive([load], clients, parameters, processes, lambda: None, seed=seed)
    found = common_figures(window, parameters, list(servers))
    client = window.answers[0]["client"]
    unknown: dict[str, Any] = dict.fromkeys(("msgs_per_op", "bytes_per_op", "fsyncs_per_s"))
    bundled = round(client["answered"] / max(1, client["bundles"]), 1)
    known = {} if all_here else {"cpu_ms_per_op": None}
    return {**found, **unknown, **known, "ops_per_bundle": bundled, "clients": [client]}
