"""The story of `cloudfit demo`: a group over three clouds is lied to, loses a cloud, and is cleansed.

It runs on a home and deployment of its own, which it removes again, and takes images and their key from the operator's
home. Nothing in it is simulated: what it prints was measured in this run.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cloudfit_orchestrator.controller.agents import GuestRef
from cloudfit_orchestrator.controller.apply import active_record, apply
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.doctor import examine
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.launch import network_name
from cloudfit_orchestrator.controller.local import LocalSites, agent_pid, open_context
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.controller.recover import Recovered, recover
from cloudfit_orchestrator.controller.spec import parse_spec
from cloudfit_orchestrator.launcher.build import build_image
from cloudfit_orchestrator.launcher.sil import find_image, verify_image
from cloudfit_orchestrator.model.errors import BadError, BadInputError, CloudfitError, PermanentError, RefusedError
from cloudfit_orchestrator.model.record import Parameters
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.spec import GroupSpec

GROUP = "ledger"
CLOUDS = ("lisbon", "passau", "ulm")
TAKEN_OVER, LOST = "r2", "r1"  # the replica that lies, and the one whose cloud is lost
WRITES = 1000
MORE_WRITES = 200  # in each later act
IMAGES = ("replica", "recovery", "adversary")
PARAMETERS = Parameters(checkpoint_period=8, window=32)  # so that a thousand writes in few batches make checkpoints
MAX_CHUNKS_SHOWN = 12
MISBEHAVIOUR = ("replies", "digests", "disk")


class KvSession(Protocol):
    """What the story needs of a client."""

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    @property
    def lies(self) -> dict[str, int]: ...


def local_spec(driver: str) -> GroupSpec:
    """The story's group on three clouds of this host: `libvirt`, or `process` without machines."""
    kind = 'libvirt: {uri: "qemu:///system"}' if driver == "libvirt" else "process: {}"
    clouds = "\n".join(f"  - {{name: {name}, {kind}}}" for name in CLOUDS)
    text = f"apiVersion: cloudfit/v1\ngroup: {GROUP}\nservice: kv\nf: 1\nclouds:\n{clouds}\n"
    return told_on(parse_spec(text, "demo.yaml"))


def told_on(spec: GroupSpec) -> GroupSpec:
    """The story's group on the clouds of `spec`. Raises BadInputError if they are not three with a replica each."""
    if (spec.f, spec.n, len(spec.clouds)) != (1, len(CLOUDS), len(CLOUDS)):
        raise BadInputError(
            f"the demo needs f=1 and three clouds with one replica each; {spec.group} has f={spec.f} and {spec.n} "
            f"replicas on {len(spec.clouds)} clouds",
            next_command="name a spec with f: 1 and three clouds",
        )
    return replace(
        spec, group=GROUP, service="kv", parameters=PARAMETERS, allow_adversary=True, adversary=(TAKEN_OVER,),
        protect=False, image="replica",
    )  # fmt: skip


KvFactory = Callable[[Context, Home, str], AbstractContextManager[KvSession]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Writes and reads of one act; every read was compared."""

    writes: int
    reads: int
    writes_per_s: float
    reads_per_s: float


class Demo:
    """One run."""

    def __init__(
        self, home: Home, *, spec: GroupSpec, keep: bool, kv: KvFactory, report: Callable[[Progress], None]
    ) -> None:
        """`home`: the operator's, for images. `kv` makes a client of a group of the demo's own home."""
        self._operator = home
        self._spec = spec
        self._isolated = all(cloud.driver != "process" for cloud in spec.clouds)
        self._keep = keep
        self._kv = kv
        self._report = report
        self._began_s = time.monotonic()
        self._expected: dict[bytes, bytes] = {}
        drivers = "+".join(sorted({cloud.driver for cloud in spec.clouds}))
        self.figures: dict[str, Any] = {"demo": 1, "driver": drivers, "good": False, "stages_s": {}}

    def run(self) -> dict[str, Any]:
        """The whole story. The figures say `good` if every promise held, and else what went wrong; what it made is gone
        afterwards.
        """
        try:
            self._run()
            self.figures["promises"] = self._promises()
            self.figures["good"] = all(self.figures["promises"].values())
        except CloudfitError as error:
            self.figures |= {"error": error.fact, "next": error.next_command}
        self.figures["total_s"] = round(time.monotonic() - self._began_s, 1)
        return self.figures

    def _run(self) -> None:
        with self._act("images"):
            self._images()
        with self._act("doctor"):
            self._doctor()
        root = Path(tempfile.mkdtemp(prefix="cfdemo", dir="/var/tmp"))
        root.chmod(0o711)  # the hypervisor's user passes through
        home = self._demo_home(root)
        context = open_context(home, self._report)
        self.figures["home"] = str(root)
        try:
            self._story(context, home)
        finally:
            if not self._keep:
                with self._act("tear-down"):
                    self.figures["left_behind"] = self._tear_down(context, home)
            if isinstance(context.sites, LocalSites):
                context.sites.close()
            context.journal.close()
            if not self._keep and not self.figures.get("left_behind"):
                shutil.rmtree(root)

    def _promises(self) -> dict[str, bool]:
        """What the story is told for, each as a fact of this run."""
        figures, traffic = self.figures, ("traffic", "under_attack", "cloud_lost")
        lies = figures["lies"]
        extracted = figures["recovery"]["transfer"]
        promises = {
            "every answer was right": all(figures[act]["reads"] > 0 for act in traffic),
            "the client counted the lies, of the liar only": set(lies["seen_by_client"]) == {TAKEN_OVER},
            "the replicas named the liar, and nobody else": set(lies["seen_by_replicas"]) == {TAKEN_OVER},
            "the recovery machine's disk was checked chunk by chunk": bool(extracted.get("corrupt"))
            and sum(extracted.get("fetched", {}).values()) > 0,
            "writes went on without the lost cloud": figures["cloud_lost"]["writes"] == MORE_WRITES,
            "all values are there, all records verify": figures["checked"]["wrong"] == 0,
        }
        if self._isolated:
            promises["the launcher refuses an adversary image"] = figures.get("adversary_refused_by_default", False)
        if not self._keep:
            promises["nothing of ours is left"] = not figures["left_behind"]
        return promises

    def _story(self, context: Context, home: Home) -> None:
        spec = self._spec
        with self._act("apply"):
            applied = apply(context, spec)
            self.figures["group"] = {"n": len(applied.members), "f": spec.f, "clouds": len(spec.clouds)}
        with self._kv(context, home, GROUP) as kv:
            with self._act("write and read"):
                self.figures["traffic"] = asdict(self._traffic(kv, "first", WRITES))
            with self._act("take-over"):
                self._take_over(context, spec)
                self.figures["under_attack"] = asdict(self._traffic(kv, "attacked", MORE_WRITES))
                self.figures["lies"] = {"seen_by_client": kv.lies, "seen_by_replicas": self._liars(context, spec)}
            with self._act("recovery"):
                cleansed = recover(context, GROUP, TAKEN_OVER, suspected=True)
                self.figures["recovery"] = self._recovered(cleansed)
            with self._act("lose a cloud"):
                self._destroy_cloud(context, spec)
                self.figures["cloud_lost"] = asdict(self._traffic(kv, "lost", MORE_WRITES))
            with self._act("replace"):
                self.figures["replacement"] = self._recovered(recover(context, GROUP, LOST))
            with self._act("check"):
                self.figures["checked"] = self._check_all(context, kv)

    # --- acts

    def _images(self) -> None:
        if not self._isolated:
            return
        trusted = [public_bytes(self._operator.image_key())]
        for name in IMAGES:  # what is unchanged comes from caches, in seconds, and has the same digest
            build_image(name, self._operator.images, self._operator.image_key(), lambda x: self._say("images", x))
            verify_image(find_image(self._operator.images, name), trusted, allow_adversary=True)
        try:
            verify_image(find_image(self._operator.images, "adversary"), trusted)
        except RefusedError:
            self.figures["adversary_refused_by_default"] = True
        else:
            raise BadError("the SIL accepted an adversary image that no spec allows")

    def _doctor(self) -> None:
        if not self._isolated:
            return
        failed = [c for c in examine(self._operator) if c.verdict == "fail"]
        for check in failed:
            self._say("doctor", f"{check.name}: {check.finding}; {check.fix}")
        if failed:
            raise PermanentError(f"{len(failed)} checks failed: {failed[0].name}", next_command="cloudfit doctor")

    def _demo_home(self, root: Path) -> Home:
        home = Home(root)
        if self._isolated:
            self._operator.image_key()
            for name in ("image.key", "image.pub"):
                (home.root / "keys" / name).symlink_to(self._operator.root / "keys" / name)
            home.images.rmdir()
            home.images.symlink_to(self._operator.images)
        return home

    def _traffic(self, kv: KvSession, label: str, count: int) -> Traffic:
        items = [(f"{label}-{i:05d}".encode(), f"value {i} of {label}".encode()) for i in range(count)]
        began = time.monotonic()
        kv.put_many(items)
        written = time.monotonic()
        values = kv.get_many([key for key, _ in items])
        read = time.monotonic()
        self._expected |= dict(items)
        wrong = sum(1 for (_, wanted), got in zip(items, values, strict=True) if wanted != got)
        if wrong:
            raise BadError(f"{wrong} of {count} answers were wrong")
        rates = count / (written - began), count / (read - written)
        self._say("traffic", f"{count} writes at {rates[0]:.0f}/s, {count} reads at {rates[1]:.0f}/s, all right")
        return Traffic(count, count, round(rates[0], 1), round(rates[1], 1))

    def _take_over(self, context: Context, spec: GroupSpec) -> None:
        member = active_record(context, GROUP).member(TAKEN_OVER)
        assert member is not None
        agent = context.sites.agent(spec.cloud_of(TAKEN_OVER), start=False)
        agent.command(GuestRef(GROUP, TAKEN_OVER, member.incarnation), {"op": "misbehave", "how": list(MISBEHAVIOUR)})
        self._say("take-over", f"{TAKEN_OVER} is taken over: it lies in {', '.join(MISBEHAVIOUR)}")

    def _liars(self, context: Context, spec: GroupSpec) -> dict[str, int]:
        """How often correct replicas reported a liar, by liar."""
        counts: dict[str, int] = {}
        for cloud in spec.clouds:
            for report in context.sites.agent(cloud, start=False).reports(0, 0.0, GROUP)[0]:
                if report.topic == "liar" and report.guest.replica != TAKEN_OVER:
                    name = str(report.body.get("replica"))
                    counts[name] = counts.get(name, 0) + 1
        return counts

    def _recovered(self, done: Recovered) -> dict[str, Any]:
        if done.outcome != "done":
            raise PermanentError(
                f"recovery of {done.replica} ended as {done.outcome}", next_command=f"cloudfit group show {GROUP}"
            )
        return {k: v for k, v in asdict(done).items() if k not in ("group", "outcome")}

    def _destroy_cloud(self, context: Context, spec: GroupSpec) -> None:
        """Machines, network and agent of one cloud, without a word to anybody."""
        cloud = spec.cloud_of(LOST)
        driver, deployment = context.sites.cloud(cloud), context.journal.deployment
        here = {m.incarnation for m in context.journal.machines(GROUP) if m.cloud == cloud.name}
        for machine in driver.machines(deployment):
            if machine.owner.incarnation in here:
                driver.destroy(machine)
        driver.delete_network(deployment, network_name(context, cloud.name))
        pid = agent_pid(Home(Path(self.figures["home"])), cloud.name)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._say("lose a cloud", f"{cloud.name} is gone: machine, disk, network and agent")

    def _check_all(self, context: Context, kv: KvSession) -> dict[str, Any]:
        keys = list(self._expected)
        values = kv.get_many(keys)
        wrong = sum(1 for key, got in zip(keys, values, strict=True) if self._expected[key] != got)
        verdict = context.store.verify(GROUP, context.journal.head(GROUP))
        if wrong or not verdict.good:
            raise BadError(f"{wrong} of {len(keys)} values are wrong; record chain: {verdict.reason or 'good'}")
        return {"values": len(keys), "wrong": wrong, "records": verdict.records, "active_c": verdict.active_c}

    def _tear_down(self, context: Context, home: Home) -> list[str]:
        """Destroy the group; whatever is left all the same, by name."""
        context.cancelled.clear()
        spec = self._spec
        try:
            destroy(context, GROUP)
        except CloudfitError as error:
            return [f"group {GROUP}: {error.fact}"]
        left = []
        for cloud in spec.clouds:
            found = context.sites.cloud(cloud).orphans(context.journal.deployment, [])
            left += [f"{o.kind.value} {o.name}" for o in found]
            pid = agent_pid(home, cloud.name)
            left += [f"agent of {cloud.name}, process {pid}"] if pid else []
        return sorted(set(left))

    @contextmanager
    def _act(self, name: str) -> Iterator[None]:
        self._say(name, "begins")
        began = time.monotonic()
        try:
            yield
        finally:
            took = round(time.monotonic() - began, 1)
            self.figures["stages_s"][name] = took
            self._say(name, f"took {took} s")

    def _say(self, stage: str, message: str) -> None:
        self._report(Progress("demo", stage, GROUP, message))


def print_summary(figures: dict[str, Any], table: Callable[[Sequence[str], Sequence[Sequence[object]]], None]) -> None:
    """The summary table, from the figures of a run."""
    times = ", ".join(f"{name} {took}" for name, took in figures["stages_s"].items())
    rows: list[list[object]] = [["time", f"{figures['total_s']} s: {times}"]]
    for act in ("traffic", "under_attack", "cloud_lost"):
        if act in figures:
            t = figures[act]
            said = f"{t['writes']} writes at {t['writes_per_s']}/s, {t['reads']} reads at {t['reads_per_s']}/s"
            rows.append([act.replace("_", " "), f"{said}, none wrong"])
    for seen, by in figures.get("lies", {}).items():
        rows.append([f"lies {seen.replace('_', ' ')}", ", ".join(f"{r}: {n}" for r, n in by.items()) or "none"])
    for act in ("recovery", "replacement"):
        if act in figures:
            rows += _recovery_rows(act, figures[act])
    promises = figures.get("promises", {})
    rows.append(["promises kept", f"{sum(promises.values())} of {len(promises)}"])
    rows += [["BROKEN", promise] for promise, kept in promises.items() if not kept]
    if "error" in figures:
        rows.append(["stopped by", figures["error"]])
    rows.append(["left behind", ", ".join(figures.get("left_behind", [])) or "nothing"])
    table(["figure", "value"], rows)
    corrupt = figures.get("recovery", {}).get("transfer", {}).get("corrupt", [])
    if corrupt:
        found = [
            [item["chunk"], item["source"], "does not match the certified root; fetched from peers"] for item in corrupt
        ]
        more = [["…", "", f"and {len(found) - MAX_CHUNKS_SHOWN} more"]] if len(found) > MAX_CHUNKS_SHOWN else []
        table(["chunk", "read from", "finding"], [*found[:MAX_CHUNKS_SHOWN], *more])


def _recovery_rows(act: str, figures: dict[str, Any]) -> list[list[object]]:
    transfer, corrupt = figures["transfer"], figures["transfer"].get("corrupt", [])
    sources: list[list[object]] = [
        [f"{act}: state", f"{transfer['fetched'][source]} chunks, {size} bytes from {source}"]
        for source, size in transfer.get("from", {}).items()
    ]
    if not sources:
        sources = [[f"{act}: state", "built from the members' streams"]]
    if corrupt:
        sources.append([f"{act}: corrupt", f"{len(corrupt)} chunks of the old disk, fetched from members instead"])
    out = [f"{name} {figures[key]} s" for name, key in (("replica", "replica_outage_s"), ("group", "group_outage_s"))]
    return [*sources, [f"{act}: time", f"{figures['total_s']} s; out: {', '.join(o for o in out if 'None' not in o)}"]]
