"""What a cloud in memory holds, and how time passes for it. See `openstack_fake`."""

import uuid
from typing import Any

PROJECT = "p" * 32
KINDS = (
    "servers",
    "server_groups",
    "images",
    "ports",
    "security_groups",
    "security_group_rules",
    "volumes",
    "snapshots",
)
_LOOKS = 1  # how many looks pass until a change is there


class Refuse(Exception):  # noqa: N818  an answer, not a mistake
    """An HTTP error as an answer."""

    def __init__(self, status: int, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


class Objects:
    """Everything there is: kind -> id -> document. Fields that begin with `_` are not shown."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self._made = 0

    def _new(self, kind: str, document: dict[str, Any], identity: str = "") -> dict[str, Any]:
        identity = identity or str(uuid.uuid4())
        self._made += 1
        stamp = f"2026-01-01T00:{self._made // 60 % 60:02d}:{self._made % 60:02d}"
        made = {"id": identity, "created_at": stamp, "created": stamp, "project_id": PROJECT, **document}
        self.objects[kind][identity] = made
        return made

    def _get(self, kind: str, identity: str, code: int = 404) -> dict[str, Any]:
        if identity not in self.objects[kind]:
            raise Refuse(code, f"{kind} {identity} could not be found.")
        return self.objects[kind][identity]

    def _look(self, kind: str) -> None:
        """Time passes: what was begun is nearer its end."""
        for document in list(self.objects[kind].values()):
            after = document.get("_then")
            if after is None:
                continue
            document["_looks"] = document.get("_looks", _LOOKS) - 1
            if document["_looks"] < 0:
                del document["_then"], document["_looks"]
                after(document)

    @staticmethod
    def _shown(document: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in document.items() if not k.startswith("_")}

    def _listed(self, kind: str, query: dict[str, str], fields: tuple[str, ...]) -> list[dict[str, Any]]:
        found = list(self.objects[kind].values())
        for name in fields:
            if name in query:
                found = [d for d in found if str(d.get(name)) == query[name]]
        return [self._shown(d) for d in found]
