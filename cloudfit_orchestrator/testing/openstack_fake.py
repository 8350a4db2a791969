"""An OpenStack in memory behind real HTTP: Keystone, Nova, Glance, Neutron and Cinder, as far as the driver asks.

It keeps their rules, asynchrony included: what is made or changed becomes so only after a few looks; a volume in use or
with a snapshot is not deleted; an address is given once; a security group that a port has stays; an action on a busy
server is a 409. Tests reach into `objects` to play a stranger or an administrator, and into `wrong` to make it fail.
"""

import ipaddress
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cloudfit_orchestrator.testing.openstack_fake_glance import Glance
from cloudfit_orchestrator.testing.openstack_objects import PROJECT, Refuse

USER, PASSWORD, REGION = "u" * 32, "the-secret-word", "Lisbon"
CIDR, GATEWAY = "127.77.0.0/24", "127.77.0.1"  # of loopback: this host has a route to it


@dataclass
class Wrong:
    """What fails, and how."""

    server_fault: str = ""  # every new server ends in ERROR with this text
    volume_error: bool = False  # every new volume ends in error
    error_deleting: bool = False  # no volume can be deleted
    deny: dict[str, tuple[int, str]] = field(default_factory=dict)  # "METHOD path-prefix" -> (status, message)
    snapshot_fails: int = 0  # so many server images end without a trace
    spoil_uploads: int = 0  # so many uploads arrive with other bytes
    revoked_after: int | None = None  # so many calls are still answered, then no credentials are good
    services: set[str] = field(default_factory=set)  # catalogue entries that are missing


class FakeOpenStack(Glance):
    """One cloud with one project. All state is in `objects`: kind -> id -> document."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.wrong = Wrong()
        self.flavors = [
            {"id": "f1", "name": "small", "ram": 384, "vcpus": 1, "disk": 1, "OS-FLV-EXT-DATA:ephemeral": 0, "swap": ""}
        ]
        self.networks = [{"id": "n1", "name": "replicas", "shared": False, "project_id": PROJECT,
                          "port_security_enabled": True, "mtu": 1450, "status": "ACTIVE"}]  # fmt: skip
        self.subnets = [{"id": "s1", "network_id": "n1", "cidr": CIDR, "gateway_ip": GATEWAY, "ip_version": 4,
                         "enable_dhcp": True}]  # fmt: skip
        self.volume_types = [{"id": "t1", "name": "replicas", "is_public": True}]
        self.limits = {"maxTotalInstances": 10, "totalInstancesUsed": 0, "maxTotalCores": 20, "totalCoresUsed": 0,
                       "maxTotalRAMSize": 51200, "totalRAMUsed": 0, "maxServerGroups": 10,
                       "totalServerGroupsUsed": 0}  # fmt: skip
        self.volume_limits = {"maxTotalVolumes": 10, "totalVolumesUsed": 0, "maxTotalSnapshots": 10,
                              "totalSnapshotsUsed": 0, "maxTotalVolumeGigabytes": 100,
                              "totalGigabytesUsed": 0}  # fmt: skip
        self.max_microversion = "2.93"
        self.image_formats = ["aki", "ari", "raw", "qcow2", "iso"]
        self.roles = ["member"]
        self.expired: set[str] = set()
        self.url = ""
        self._addresses = (str(a) for a in list(ipaddress.IPv4Network(CIDR))[10:250])

    # HTTP

    @contextmanager
    def serving(self, tls: ssl.SSLContext | None = None) -> Iterator["FakeOpenStack"]:
        """Serve on a free port of loopback, over TLS if it is given; `url` is Keystone's."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one packet: two would wait for each other's acknowledgement

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
                del format, args

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(_chunks(self.rfile))
                status, document, headers = fake.answer(self.command, self.path, dict(self.headers), body)
                raw = b"" if document is None else json.dumps(document).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        # A client that does not like our certificate says nothing.
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def clouds_yaml(self, url: str = "", password: str = PASSWORD) -> dict[str, Any]:
        """Content for a clouds.yaml; `url`: another way to here."""
        auth = {"auth_url": f"{url or self.url}/identity/v3", "username": "operator", "password": password}
        auth |= {"project_name": "operator", "user_domain_name": "Default", "project_domain_name": "Default"}
        return {"clouds": {"lisbon": {"auth": auth, "region_name": REGION, "identity_api_version": "3"}}}

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        """(status, document, headers) of one request."""
        parts = urlsplit(target)
        service, _, path = parts.path.lstrip("/").partition("/")
        query = dict(parse_qsl(parts.query))
        with self.lock:
            try:
                if service == "identity":
                    return self._identity(method, body)
                if path.strip("/") in ("", "v2.1", "v3", "v2", "v2.0"):
                    return 200, self._discovery(service), {}
                path = "/" + re.sub(r"^v[\d.]+/", "", path).removeprefix(f"{PROJECT}/")
                self._check(method, f"{service}:{path}", headers)
                raw = headers.get("Content-Type") == "application/octet-stream"
                act: Callable[..., tuple[int, Any]] = getattr(self, f"_{service}")
                return *act(method, path, query, json.loads(body) if body and not raw else {}, body), {}
            except Refuse as refused:
                inner = {"message": refused.message, "code": refused.status} | (
                    {"type": refused.kind} if refused.kind else {}
                )
                return refused.status, {"NeutronError" if service == "network" else "error": inner}, {}

    def _check(self, method: str, where: str, headers: dict[str, str]) -> None:
        left = self.wrong.revoked_after
        if left is not None:
            self.wrong.revoked_after = max(0, left - 1)
        if left == 0 or headers.get("X-Auth-Token", "") in {"", *self.expired}:
            raise Refuse(401, "The request you have made requires authentication.")
        self.calls.append(f"{method} {where}")
        for prefix, (status, message) in self.wrong.deny.items():
            if f"{method} {where}".startswith(prefix):
                raise Refuse(status, message)

    def _identity(self, method: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if method == "GET":
            return 200, {"version": {"id": "v3.14", "status": "stable",
                                     "links": [{"rel": "self", "href": f"{self.url}/identity/v3"}]}}, {}  # fmt: skip
        password = json.loads(body)["auth"]["identity"]["password"]["user"]["password"]
        if password != PASSWORD or self.wrong.revoked_after == 0:
            raise Refuse(401, "The request you have made requires authentication.")
        token = uuid.uuid4().hex
        places = {"compute": "compute/v2.1", "image": "image", "network": "network",
                  "volumev3": f"volume/v3/{PROJECT}"}  # fmt: skip
        catalogue = [
            {"type": kind, "name": kind, "id": kind, "endpoints": [
                {"id": kind, "interface": "public", "region": REGION, "region_id": REGION,
                 "url": f"{self.url}/{place}"}]}
            for kind, place in places.items() if kind not in self.wrong.services
        ]  # fmt: skip
        document = {
            "token": {
                "methods": ["password"], "expires_at": "2099-01-01T00:00:00.000000Z",
                "issued_at": "2026-01-01T00:00:00.000000Z", "user": {"id": USER, "name": "operator"},
                "project": {"id": PROJECT, "name": "operator", "domain": {"id": "default", "name": "Default"}},
                "roles": [{"id": r, "name": r} for r in self.roles], "catalog": catalogue,
            }
        }  # fmt: skip
        return 201, document, {"X-Subject-Token": token}

    def _discovery(self, service: str) -> Any:
        ends = {"compute": ("v2.1", "v2.1", self.max_microversion), "image": ("v2.15", "v2/", ""),
                "network": ("v2.0", "v2.0/", ""), "volume": ("v3.0", f"v3/{PROJECT}", "3.70")}  # fmt: skip
        number, place, newest = ends[service]
        version = {"id": number, "status": "CURRENT", "version": newest, "min_version": "2.1" if newest else "",
                   "links": [{"rel": "self", "href": f"{self.url}/{service}/{place}"}]}  # fmt: skip
        return {"version": version} if service == "compute" else {"versions": [version]}

    # Nova

    def _compute(self, method: str, path: str, query: dict[str, str], body: Any, _: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if path == "/flavors/detail":
            return 200, {"flavors": self.flavors}
        if path == "/limits":
            return 200, {"limits": {"absolute": self.limits}}
        if path == "/os-availability-zone":
            return 200, {"availabilityZoneInfo": [{"zoneName": "nova", "zoneState": {"available": True}}]}
        if parts[0] == "os-server-groups":
            return self._server_groups(method, parts, body)
        self._look("servers")
        if method == "GET" and path in ("/servers", "/servers/detail"):
            found = [self._shown(s) for s in self.objects["servers"].values()]
            if "tags" in query:
                found = [s for s in found if set(query["tags"].split(",")) <= set(s["tags"])]
            if "name" in query:
                found = [s for s in found if re.search(query["name"], s["name"])]
            if "status" in query:
                found = [s for s in found if s["status"] == query["status"]]
            brief = path == "/servers"
            return 200, {"servers": [{"id": s["id"], "name": s["name"]} for s in found] if brief else found}
        if method == "POST" and path == "/servers":
            return 202, {"server": {"id": self._boot(body)["id"]}}
        server = self._get("servers", parts[1])
        if method == "GET":
            return 200, {"server": self._shown(server)}
        if method == "DELETE":
            server["OS-EXT-STS:task_state"] = "deleting"
            server["_then"] = self._server_gone
            return 204, None
        if parts[2] == "os-volume_attachments":
            volume = self._volume_for(body["volumeAttachment"]["volumeId"])
            server["os-extended-volumes:volumes_attached"].append({"id": volume["id"]})
            volume["status"], volume["_then"] = "attaching", lambda v: v.update(status="in-use")
            return 200, {"volumeAttachment": {"id": volume["id"]}}
        if "createImage" in body:
            return 202, {"image_id": self._server_image(server, body["createImage"])}
        return self._action(server, next(iter(body)))

    def _server_image(self, server: dict[str, Any], wanted: dict[str, Any]) -> str:
        """What its image says stays, but for what the caller says; the driver resets kernel and ramdisk in the end."""
        if server["OS-EXT-STS:task_state"] or server["status"] not in ("ACTIVE", "PAUSED", "SHUTOFF"):
            raise Refuse(409, f"Cannot 'createImage' instance while it is in {server['status']}")
        base = {k: v for k, v in server["_properties"].items() if k not in ("id", "name", "tags", "created_at")}
        made = self._new(
            "images", {**base, **wanted["metadata"], "name": wanted["name"], "status": "queued", "tags": []}
        )
        server["OS-EXT-STS:task_state"] = "image_snapshot"

        def done(s: dict[str, Any]) -> None:
            s["OS-EXT-STS:task_state"] = None
            image = self.objects["images"].get(made["id"])
            if self.wrong.snapshot_fails > 0:
                self.wrong.snapshot_fails -= 1
                self.objects["images"].pop(made["id"], None)
            elif image is not None:
                image.update(status="active", **{k: base[k] for k in ("kernel_id", "ramdisk_id")})

        server["_then"] = done
        return str(made["id"])

    def _boot(self, body: Any) -> dict[str, Any]:
        wanted = body["server"]
        if wanted["flavorRef"] not in [f["id"] for f in self.flavors]:
            raise Refuse(400, "Flavor could not be found.")
        image = self._get("images", wanted["imageRef"], 400)
        named = () if image.get("hw_firmware_type") == "uefi" else ("kernel_id", "ramdisk_id")
        if image["status"] != "active" or any(image[k] not in self.objects["images"] for k in named):
            raise Refuse(400, "Image is not active.")
        ports = [self._get("ports", n["port"], 400) for n in wanted["networks"]] if wanted["networks"] != "none" else []
        for port in ports:
            if port["device_id"]:
                raise Refuse(409, f"Port {port['id']} is still in use.")
        ids = [d["uuid"] for d in wanted["block_device_mapping_v2"] if d["source_type"] == "volume"]
        volumes = [self._volume_for(v) for v in ids]
        made = self._new(
            "servers",
            {
                "name": wanted["name"], "status": "BUILD", "OS-EXT-STS:task_state": "spawning",
                "OS-SRV-USG:launched_at": None, "metadata": wanted["metadata"], "tags": wanted["tags"],
                "image": {"id": image["id"]}, "_properties": dict(image), "hostId": "h1",
                "_ports": [p["id"] for p in ports],
                "os-extended-volumes:volumes_attached": [{"id": v["id"]} for v in volumes], "_then": self._booted,
                "config_drive": "True" if wanted["config_drive"] else "", "_user_data": wanted.get("user_data"),
            },
        )  # fmt: skip
        for port in ports:
            port["device_id"] = made["id"]
        for volume in volumes:
            volume["status"] = "reserved"
        self._get("server_groups", body["os:scheduler_hints"]["group"], 400)["members"].append(made["id"])
        return made

    def _booted(self, server: dict[str, Any]) -> None:
        server["OS-EXT-STS:task_state"] = None
        if self.wrong.server_fault:
            server.update(status="ERROR", fault={"message": self.wrong.server_fault, "code": 500})
            return
        server.update(status="ACTIVE", **{"OS-SRV-USG:launched_at": "2026-01-01T00:00:00"})
        for attached in server["os-extended-volumes:volumes_attached"]:
            self.objects["volumes"][attached["id"]]["status"] = "in-use"

    def _volume_for(self, identity: str) -> dict[str, Any]:
        volume = self._get("volumes", identity, 400)
        if volume["status"] != "available":
            raise Refuse(400, f"Invalid volume: status is {volume['status']}")
        return volume

    def _server_gone(self, server: dict[str, Any]) -> None:
        self.objects["servers"].pop(server["id"], None)
        for identity in server["_ports"]:
            if identity in self.objects["ports"]:
                self.objects["ports"][identity]["device_id"] = ""
        for attached in server["os-extended-volumes:volumes_attached"]:
            if attached["id"] in self.objects["volumes"]:
                self.objects["volumes"][attached["id"]]["status"] = "available"
        for group in self.objects["server_groups"].values():
            group["members"] = [m for m in group["members"] if m != server["id"]]

    def _action(self, server: dict[str, Any], action: str) -> tuple[int, Any]:
        table = {
            "pause": (("ACTIVE",), "PAUSED"), "unpause": (("PAUSED",), "ACTIVE"),
            "os-stop": (("ACTIVE", "ERROR"), "SHUTOFF"), "os-start": (("SHUTOFF",), "ACTIVE"),
        }  # fmt: skip
        allowed, then = table[action]
        if server["OS-EXT-STS:task_state"] or server["status"] not in allowed:
            raise Refuse(409, f"Cannot '{action}' instance while it is in {server['status']}")
        server["OS-EXT-STS:task_state"] = action

        def done(s: dict[str, Any]) -> None:
            s.update({"status": then, "OS-EXT-STS:task_state": None})

        server["_then"] = done
        return 202, None

    def _server_groups(self, method: str, parts: list[str], body: Any) -> tuple[int, Any]:
        if method == "GET":
            return 200, {"server_groups": self._listed("server_groups", {}, ())}
        if method == "POST":
            return 200, {"server_group": self._new("server_groups", {**body["server_group"], "members": []})}
        self._get("server_groups", parts[1])
        del self.objects["server_groups"][parts[1]]
        return 204, None

    # Neutron

    def _network(self, method: str, path: str, query: dict[str, str], body: Any, _: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if path in ("/networks", "/subnets"):
            listed = self.networks if path == "/networks" else self.subnets
            wanted = {k: v for k, v in query.items() if k in ("name", "id", "network_id", "ip_version")}
            return 200, {parts[0]: [n for n in listed if all(str(n.get(k)) == v for k, v in wanted.items())]}
        if path == "/extensions":
            names = ("security-group", "port-security", "standard-attr-description")
            return 200, {"extensions": [{"alias": a} for a in names]}
        if parts[0] == "quotas":
            limit = {"limit": 50, "used": 0, "reserved": 0}
            return 200, {"quota": {"port": limit, "security_group": limit, "security_group_rule": limit}}
        kind = parts[0].replace("-", "_")
        single = kind.removesuffix("s")
        if method == "GET" and len(parts) == 1:
            fields = ("network_id", "security_group_id", "direction", "name", "description")
            listed = self._listed(kind, query, fields)
            if address := query.get("fixed_ips", "").removeprefix("ip_address="):
                listed = [p for p in listed if _address(p) == address]
            return 200, {kind: listed}
        if method == "POST":
            make = getattr(self, f"_make_{single}")
            if kind in body:
                return 201, {kind: [self._shown(make(wanted)) for wanted in body[kind]]}
            return 201, {single: self._shown(make(body[single]))}
        found = self._get(kind, parts[1])
        if method == "PUT":
            found.update(body[single])
        elif method == "DELETE":
            if kind == "security_groups" and any(
                parts[1] in p["security_groups"] for p in self.objects["ports"].values()
            ):
                raise Refuse(409, "Security Group in use.", "SecurityGroupInUse")
            del self.objects[kind][parts[1]]
            rules = self.objects["security_group_rules"]  # they go with their group
            self.objects["security_group_rules"] = {
                i: r for i, r in rules.items() if r["security_group_id"] in self.objects["security_groups"]
            }
            return 204, None
        return 200, {single: self._shown(found)}

    def _make_port(self, wanted: dict[str, Any]) -> dict[str, Any]:
        address = wanted["fixed_ips"][0].get("ip_address") or next(self._addresses)
        if any(_address(p) == address for p in self.objects["ports"].values()):
            raise Refuse(409, f"IP address {address} already allocated.", "IpAddressAlreadyAllocated")
        for group in wanted["security_groups"]:
            self._get("security_groups", group)
        fixed = [{"subnet_id": "s1", "ip_address": address}]
        return self._new("ports", {**wanted, "fixed_ips": fixed, "device_id": ""})

    def _make_security_group(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return self._new("security_groups", wanted)

    def _make_security_group_rule(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self._get("security_groups", wanted["security_group_id"])
        for rule in self.objects["security_group_rules"].values():
            if all(rule.get(k) == v for k, v in wanted.items()):
                raise Refuse(409, "Security group rule already exists.", "SecurityGroupRuleExists")
        return self._new("security_group_rules", wanted)

    # Cinder

    def _volume(self, method: str, path: str, query: dict[str, str], body: Any, _: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        kind, single = parts[0], parts[0].removesuffix("s")
        if path == "/types":
            return 200, {"volume_types": self.volume_types}
        if path == "/limits":
            return 200, {"limits": {"absolute": self.volume_limits}}
        if path == "/os-availability-zone":
            return 200, {"availabilityZoneInfo": [{"zoneName": "volumes", "zoneState": {"available": True}}]}
        if kind == "messages":
            return 200, {"messages": [{"user_message": "schedule allocate volume: no back end has room"}]}
        self._look(kind)
        if method == "GET" and parts[1:] == ["detail"]:
            return 200, {kind: self._listed(kind, query, ())}
        if method == "POST":
            return 202, {single: self._shown(getattr(self, f"_make_{single}")(body[single]))}
        found = self._get(kind, parts[1])
        if method == "DELETE":
            self._delete_volume(kind, found)
            return 202, None
        return 200, {single: self._shown(found)}

    def _make_volume(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted.get("volume_type") and wanted["volume_type"] not in [t["name"] for t in self.volume_types]:
            raise Refuse(404, f"Volume type with name {wanted['volume_type']} could not be found.")
        if "imageRef" in wanted:
            self._get("images", wanted["imageRef"], 400)
        if "snapshot_id" in wanted and self._get("snapshots", wanted["snapshot_id"])["status"] != "available":
            raise Refuse(400, "Invalid snapshot: status must be available")
        end = "error" if self.wrong.volume_error else "available"
        return self._new("volumes", {**wanted, "status": "creating", "_then": lambda v: v.update(status=end)})

    def _make_snapshot(self, wanted: dict[str, Any]) -> dict[str, Any]:
        volume = self._get("volumes", wanted["volume_id"])
        if volume["status"] != "available" and not (volume["status"] == "in-use" and wanted["force"]):
            raise Refuse(400, f"Invalid volume: Volume status must be available, it is {volume['status']}")
        wanted = {**wanted, "size": volume["size"], "status": "creating"}
        return self._new("snapshots", {**wanted, "_then": lambda v: v.update(status="available")})

    def _delete_volume(self, kind: str, found: dict[str, Any]) -> None:
        if found["status"] not in ("available", "error"):
            raise Refuse(400, f"Invalid volume: status must be available or error, it is {found['status']}")
        if kind == "volumes" and any(s["volume_id"] == found["id"] for s in self.objects["snapshots"].values()):
            raise Refuse(400, "Invalid volume: Volume still has 1 dependent snapshots")
        found["status"] = "deleting"
        if self.wrong.error_deleting:
            found["_then"] = lambda v: v.update(status="error_deleting")
        else:
            found["_then"] = lambda v: self.objects[kind].pop(v["id"], None)


def _address(port: dict[str, Any]) -> str:
    return str(port["fixed_ips"][0]["ip_address"])


def _chunks(stream: Any) -> Iterator[bytes]:
    while size := int(stream.readline().split(b";")[0], 16):
        yield stream.read(size)
        stream.readline()
    stream.readline()
