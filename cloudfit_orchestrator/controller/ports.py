"""What the controller's operations need of the world, and one object that hands it to them.

The operations know these few interfaces only, so they run against real clouds and agents and against the fakes of
`testing/cloud.py` alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.clouds.base import Cloud
from cloudfit_orchestrator.config_store.base import ConfigStore
from cloudfit_orchestrator.controller.agents import GuestRef, Report
from cloudfit_orchestrator.controller.journal import Journal
from cloudfit_orchestrator.controller.secrets import GuestSecrets
from cloudfit_orchestrator.model.errors import UnknownError
from cloudfit_orchestrator.model.image import Manifest, Role
from cloudfit_orchestrator.model.record import Client
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.spec import CloudSpec
from cloudfit_orchestrator.model.ui import EpochEnd

NETWORK_POOL = "10.84.0.0/16"  # each local libvirt cloud gets a /24 of it
REPLICA_PORT = 7000
RECOVERY_IMAGE = "recovery"  # its name in the image store


class Agent(Protocol):
    """The agent of one cloud, as `agents.AgentClient` reaches it. Calls block; from any thread.

    Each raises UnknownError if the agent does not answer. `inside`: it is the agents inside the guests, whose words are
    worth no more than theirs; then each call may also raise any other CloudfitError, for whatever a guest makes up.
    """

    @property
    def inside(self) -> bool: ...

    def key_of(self, guest: GuestRef) -> bytes: ...

    def status(self) -> dict[str, Any]: ...

    def admit(
        self,
        guest: GuestRef,
        *,
        role: Role,
        machine: dict[str, Any],
        manifest: bytes,
        lease_s: float,
        welcome: dict[str, Any],
        image_dir: Path | None = None,
        allow_adversary: bool = False,
    ) -> bytes: ...

    def prepare(self, guest: GuestRef, c: int) -> tuple[bytes, bytes]: ...

    def install(self, group: str, envelope: bytes) -> None: ...

    def freeze(self, guest: GuestRef, c: int) -> int: ...

    def thaw(self, guest: GuestRef, c: int) -> int: ...

    def close_epoch(self, guest: GuestRef, c: int) -> EpochEnd: ...

    def command(self, guest: GuestRef, body: dict[str, Any]) -> None: ...

    def reports(self, since: int, wait_s: float = 0.0, group: str | None = None) -> tuple[list[Report], int]: ...

    def evict(self, guest: GuestRef) -> None: ...


class Sites(Protocol):
    """Clouds and their agents, opened when first asked for."""

    def cloud(self, spec: CloudSpec) -> Cloud:
        """The driver for that cloud."""
        ...

    def agent(self, spec: CloudSpec, *, start: bool) -> Agent:
        """Its agent; a local one is started if `start`. Raises UnknownError if there is none that answers, and BadError
        if the one that does has another key than the spec says.
        """
        ...

    def stop_agent(self, spec: CloudSpec) -> None:
        """End a local agent that was started from this home; none is no error."""
        ...

    def taken_networks(self, spec: CloudSpec) -> list[str]:
        """CIDRs that are in use on that cloud's host and must not be chosen."""
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """A verified image."""

    digest: str  # sha256:… of the manifest's envelope
    envelope: bytes
    manifest: Manifest
    directory: Path


class Images(Protocol):
    """The image store behind the SIL."""

    def verified(self, reference: str, driver: str, *, allow_adversary: bool) -> Image:
        """The image named `name` or `name@sha256:…`, every byte verified. Raises BadError or BadInputError."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that was begun or done, for the eye and for machines."""

    operation: str
    stage: str
    subject: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Context:
    """One controller process at work on one home."""

    journal: Journal
    store: ConfigStore
    sites: Sites
    images: Images
    key: Ed25519PrivateKey
    clients: tuple[Client, ...]
    report: Callable[[Progress], None]
    secrets: GuestSecrets | None = None  # for groups with trust: none
    cancelled: Event = field(default_factory=Event)

    @property
    def trusted(self) -> list[bytes]:
        """Public keys of controllers."""
        return [public_bytes(self.key)]

    def check_cancelled(self) -> None:
        """Raises UnknownError once somebody wants to stop; called before each act on the world."""
        if self.cancelled.is_set():
            raise UnknownError("interrupted", next_command="run the same command again: it goes on where it stopped")
