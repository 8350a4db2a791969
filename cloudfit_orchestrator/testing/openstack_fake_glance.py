"""Glance of the cloud in memory: images that are created, filled once, changed and deleted."""

import hashlib
from typing import Any

from cloudfit_orchestrator.testing.openstack_objects import PROJECT, Objects, Refuse


class Glance(Objects):
    """What the fake answers to calls of Glance."""

    def _image(self: Any, method: str, path: str, query: dict[str, str], body: Any, raw: bytes) -> tuple[int, Any]:
        """(status, document) of one request, under the cloud's lock."""
        parts = path.strip("/").split("/")
        if method == "GET" and path == "/images":
            found = self._listed("images", query, tuple(k for k in query if k not in ("tag", "limit", "os_hidden")))
            found = [i for i in found if "tag" not in query or query["tag"] in i["tags"]]
            hidden = query.get("os_hidden", "false") == "true"
            return 200, {"images": [i for i in found if i.get("os_hidden", False) is hidden]}
        if path == "/schemas/image":
            return 200, {"properties": {"disk_format": {"enum": self.image_formats}}}
        if method == "POST":
            if body["id"] in self.objects["images"] or body["id"] in self.files:
                raise Refuse(409, "Image ID already exists!")
            more = {"status": "queued", "owner": PROJECT, "os_hidden": False, "protected": False}
            return 201, self._shown(self._new("images", {**more, **body}, body["id"]))
        image = self._get("images", parts[1])
        if method == "GET":
            return 200, self._shown(image)
        if method == "PATCH":
            for change in body:
                image[change["path"].removeprefix("/")] = change["value"]
            return 200, self._shown(image)
        if method == "DELETE":
            if image.get("protected"):
                raise Refuse(403, f"Image {parts[1]} is protected and cannot be deleted.")
            del self.objects["images"][parts[1]]
            self.files.setdefault(parts[1], b"")  # Glance gives no id twice
            return 204, None
        if image["status"] != "queued":
            raise Refuse(409, f"Image status transition from {image['status']} to saving is not allowed")
        if self.wrong.spoil_uploads > 0:
            self.wrong.spoil_uploads -= 1
            raw = raw[:-1] + b"?"
        self.files[parts[1]] = raw
        digest = hashlib.sha512(raw).hexdigest()
        image.update(status="active", size=len(raw), os_hash_algo="sha512", os_hash_value=digest)
        return 204, None
