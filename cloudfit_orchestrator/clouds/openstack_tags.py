"""How ownership stands on OpenStack's objects, from the instant of their creation.

Servers, volumes, snapshots and images carry it as metadata (`cloudfit_deployment`, …). Neutron's and Nova's other
objects have no metadata: there it is one label in the description of a port or security group, and in a server group's
name. A port is made before its machine has an incarnation; its label, `cloudfit:1 deployment/group/replica/0/role/
operation`, names the machine as well, since an operation wants one machine for a replica in a role, and stays for life:
to change a port costs Neutron as much as to make one. A tag that is set by a second request could be missing after a
death between the two, so Neutron's own tags are not used.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudfit_orchestrator.clouds.base import Ownership
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.image import Role

PREFIX = "cloudfit_"
LABEL = "cloudfit:1 "
KIND, FINGERPRINT, STATE_ON = "cloudfit_kind", "cloudfit_fingerprint", "cloudfit_state"
VOLUME, INSTANCE = "volume", "instance"  # of STATE_ON
_ANY = 0  # in the place of the incarnation


def metadata(owner: Ownership, **more: str) -> dict[str, str]:
    """The tag set as metadata; `more` without the prefix."""
    return {PREFIX + name: value for name, value in (owner.tags() | more).items()}


def owner_of(found: Mapping[str, Any] | None) -> Ownership | None:
    """Whose it is, by its metadata; None unless the tag set is complete and valid."""
    tags = {k.removeprefix(PREFIX): str(v) for k, v in (found or {}).items() if k.startswith(PREFIX)}
    try:
        return Ownership.from_tags(tags)
    except BadInputError:
        return None


def deployment_tag(deployment: str) -> str:
    """The server tag by which a deployment's servers are listed."""
    return f"cloudfit-{deployment}"


def group_tag(owner: Ownership) -> str:
    """The server tag by which a group's servers are listed, however many others the deployment has."""
    return f"cloudfit-{hashlib.sha256(json.dumps([owner.deployment, owner.group]).encode()).hexdigest()[:32]}"


def group_label(deployment: str, group: str) -> str:
    """The tag set of what belongs to a whole group."""
    return f"{LABEL}{deployment}/{group}"


def group_of_label(text: object) -> tuple[str, str] | None:
    """(deployment, group), the inverse of `group_label`; None for anything else."""
    parts = text.removeprefix(LABEL).split("/") if isinstance(text, str) and text.startswith(LABEL) else []
    return (parts[0], parts[1]) if len(parts) == 2 and all(parts) else None


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a port is for: the machine that this operation wants for `replica` in `role`."""

    deployment: str
    group: str
    replica: str
    role: Role
    operation: str

    @property
    def name(self) -> str:
        """The port's name for life, by which it is looked up among thousands; what counts is its label."""
        return f"{self.deployment}-{self.group}-{self.replica}-{self.role.value}"

    def label(self) -> str:
        """In the port's description."""
        return f"{LABEL}{self.deployment}/{self.group}/{self.replica}/{_ANY}/{self.role.value}/{self.operation}"

    @classmethod
    def of(cls, owner: Ownership) -> "Reservation":
        """The one of the machine `owner`."""
        return cls(owner.deployment, owner.group, owner.replica, owner.role, owner.operation)

    @classmethod
    def from_label(cls, text: object) -> "Reservation | None":
        """The inverse of `label`, whatever the incarnation; None for anything else."""
        parts = text.removeprefix(LABEL).split("/") if isinstance(text, str) and text.startswith(LABEL) else []
        try:
            deployment, group, replica, _, role, operation = parts
            return cls(deployment, group, replica, Role(role), operation)
        except ValueError:
            return None


def fresh_id() -> str:
    """An id that a client may choose (images): a repeated creation with it cannot make two."""
    return str(uuid.uuid4())
