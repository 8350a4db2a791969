"""One OpenStack cloud's APIs: connections by clouds.yaml, and every request with its errors in our words.

All requests of the driver pass `Api.request`; nothing else talks to a cloud. A request that may be repeated is
repeated here, with growing pauses or as `Retry-After` says. One that makes something is never repeated here: whether
it was carried out is unclear after a lost connection, a 5xx or a spoilt answer, and UnclearError tells the caller to
look before it asks again. Secrets stay in openstacksdk: no error and no log line of ours holds a request's body.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import keystoneauth1.exceptions
import openstack.config.loader
import openstack.exceptions
import requests
import yaml
from openstack.connection import Connection

from cloudfit_orchestrator.clouds.openstack_answers import (
    FINAL_CONFLICTS,
    advice,
    error_of,
    next_page,
    retry_after,
    said_in,
    tls_trouble,
)
from cloudfit_orchestrator.clouds.shared_calls import SharedCalls
from cloudfit_orchestrator.model.errors import (
    BadInputError,
    CloudfitError,
    LockedOutError,
    PermanentError,
    TemporaryError,
)

MAX_CONNECTIONS = 4  # a cloud and process: replicas of one group on one cloud are few, and APIs limit rates
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0  # nova-api waits up to 60 s for its own conductor
REPEAT_FOR_S = 60.0  # how long one request is repeated: a service that restarts is back by then
SILENT_FOR_S = 300.0  # a cloud that gave no answer for REPEAT_FOR_S: a change without it asks it several times more
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 4.0
MAX_PAGES = 200  # of a listing: no project has that many, an API that repeats its marker for ever might
COMPUTE_VERSION = "2.64"  # server groups with one policy; Rocky (2018). Also gives tags at creation (2.52)
VOLUME_VERSION = "3.3"  # Newton (2016): Cinder tells its users why a volume failed
SERVICES = {"compute": "compute", "image": "image", "network": "network", "volume": "block_storage"}
_VERSIONS = {"compute": COMPUTE_VERSION, "volume": VOLUME_VERSION}
_ALIASES = {"volume": ("volumev3", "block-storage", "volume")}
_JSON = "application/json"
_HEADERS = {"PATCH": {"Content-Type": "application/openstack-images-v2.1-json-patch"}}  # only Glance is asked for one
_T = TypeVar("_T")


class UnclearError(TemporaryError):
    """Nobody knows whether the request was carried out: look before asking again."""


class BusyError(TemporaryError):
    """The object is in the middle of something (409): look, and ask again if still needed."""


class LimitedError(TemporaryError):
    """Too many calls for the cloud's liking; not carried out. It answers, so it is not silent."""


class RejectedError(PermanentError):
    """The cloud understood and said no. `status`: HTTP; `kind`: the API's own name of the error, if it has one."""

    def __init__(self, fact: str, *, status: int, kind: str = "", next_command: str = "") -> None:
        """See the class."""
        super().__init__(fact, next_command=next_command)
        self.status = status
        self.kind = kind


def find_config(files: Sequence[Path] | None = None) -> Path:
    """The clouds.yaml that counts: OS_CLIENT_CONFIG_FILE, or the first of openstacksdk's places. BadInputError."""
    named = os.environ.get("OS_CLIENT_CONFIG_FILE")
    places = files or ([Path(named)] if named else [Path(p) for p in openstack.config.loader.CONFIG_FILES])
    for place in places:
        if place.is_file():
            return place
    raise BadInputError(
        f"there is no clouds.yaml: looked for {', '.join(str(p) for p in dict.fromkeys(places))}",
        next_command="put one in ~/.config/openstack/clouds.yaml, or name it by OS_CLIENT_CONFIG_FILE",
    )


def check_config(cloud: str, file: Path) -> None:
    """Raises BadInputError if `file` cannot be read or does not know `cloud`. Quotes nothing: it holds secrets."""
    try:
        document = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise BadInputError(f"cannot read {file}: {error.strerror}", next_command=f"ls -l {file}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise BadInputError(f"{file} is not YAML: line {line}", next_command=f"correct {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise BadInputError(f"{file} is not YAML", next_command=f"correct {file}") from None
    clouds = document.get("clouds") if isinstance(document, dict) else None
    if not isinstance(clouds, dict) or cloud not in clouds:
        known = ", ".join(sorted(map(str, clouds))) if isinstance(clouds, dict) and clouds else "none"
        raise BadInputError(
            f"{file} has no cloud {cloud!r}; it has {known}", next_command=f"correct the spec, or add it to {file}"
        )


_Objects = list[dict[str, Any]]  # as an annotation behind `Api.list`


class Api:
    """One cloud as one project sees it. Any thread may use it; at most `connections` work at a time."""

    def __init__(
        self,
        cloud: str,
        region: str = "",
        *,
        files: Sequence[Path] | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        repeat_for_s: float = REPEAT_FOR_S,
        connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Reads nothing and connects to nothing yet."""
        self.cloud, self.region = cloud, region
        self._files = files
        self._timeout = (CONNECT_TIMEOUT_S, read_timeout_s)
        self._repeat_for_s = repeat_for_s
        self._idle: queue.LifoQueue[Connection | None] = queue.LifoQueue()
        self._connections = connections
        for _ in range(connections):
            self._idle.put(None)  # a place for a connection that is opened when it is needed
        self._mine = threading.local()
        self._shared = SharedCalls()
        self._known: dict[tuple[str, ...], Any] = {}
        self._silent_s = 0.0  # until then the cloud counts as silent: one try a request is enough
        self._closed = False

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cloud}/{self.region}" if self.region else self.cloud

    def close(self) -> None:
        """Close idle connections; no request can be made any more."""
        self._closed = True
        for _ in range(self._connections):
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                return
            if connection is not None:
                connection.close()

    # Connections

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """The connection of this thread: one of a few that are handed around, never to two threads at once."""
        held: Connection | None = getattr(self._mine, "connection", None)
        if held is not None:
            yield held
            return
        if self._closed:
            raise RuntimeError(f"the connection to {self.name} is closed")
        taken = self._idle.get()
        try:
            taken = taken or self._open()
            self._mine.connection = taken
            yield taken
        except (keystoneauth1.exceptions.Unauthorized, LockedOutError):
            if taken is not None:
                taken.close()
                taken = None  # the next one reads clouds.yaml anew
            raise
        finally:
            self._mine.connection = None
            self._idle.put(taken)

    def _open(self) -> Connection:
        file = find_config(self._files)
        check_config(self.cloud, file)
        try:
            config = openstack.config.OpenStackConfig(config_files=[str(file)], load_envvars=False, app_name="cloudfit")
            changes: dict[str, Any] = {"region_name": self.region} if self.region else {}
            region = config.get_one(cloud=self.cloud, api_timeout=self._timeout[1], **changes)
            if region.get_auth_args().get("system_scope"):
                raise BadInputError(
                    f"cloud {self.cloud} of {file} has credentials of the whole system: machines belong to a project",
                    next_command="openstack application credential create cloudfit, as a member of a project",
                )
            return Connection(config=region)
        except openstack.exceptions.ConfigException as error:
            raise BadInputError(
                f"cloud {self.cloud} of {file}: {said_in(str(error))}", next_command=f"correct {file}"
            ) from None
        except keystoneauth1.exceptions.ClientException as error:  # options of the auth plugin; may quote values
            raise BadInputError(
                f"cloud {self.cloud} of {file}: its auth section is not complete ({type(error).__name__})",
                next_command=f"correct {file}",
            ) from None

    def project(self) -> str:
        """Id of the project that we act in. Errors as of `request`."""
        return str(self._asked("authenticate", lambda c: c.session.get_project_id()))

    def access(self) -> Any:
        """The token's document, keystoneauth's AccessInfo: roles, end, catalogue. Errors as of `request`."""

        def ask(connection: Connection) -> Any:
            auth: Any = connection.session.auth
            return auth.get_access(connection.session)

        return self._asked("authenticate", ask)

    def endpoint(self, service: str) -> str | None:
        """URL of a service (a key of SERVICES) in the catalogue; None if it has none, or clouds.yaml says so."""
        catalogue = self.access().service_catalog
        with self.connection() as connection:
            if not connection.config.has_service(SERVICES[service].replace("_", "-")):
                return None
            adapter = getattr(connection, SERVICES[service])
            aliases, region = [adapter.service_type, *_ALIASES.get(service, ())], connection.config.get_region_name()
        found = [
            catalogue.get_endpoint_data_list(service_type=t, interface="public", region_name=region) for t in aliases
        ]
        return next((str(e[0].url) for e in found if e), None)

    def _asked(self, tried: str, ask: Callable[[Connection], Any]) -> Any:
        """What only openstacksdk itself asks for; repeated as a GET is."""
        deadline, pause = self._deadline_s(), FIRST_PAUSE_S
        while True:
            try:
                with self.connection() as connection:
                    return ask(connection)
            except (keystoneauth1.exceptions.ClientException, openstack.exceptions.SDKException) as error:
                trouble = self._translate(error, tried, None)
                if not isinstance(trouble, TemporaryError):
                    raise trouble from None
                if time.monotonic() + pause > deadline:
                    self._silent_s = time.monotonic() + SILENT_FOR_S
                    raise trouble from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _deadline_s(self) -> float:
        """When a request that begins now is repeated no more: at once where the cloud has just been silent so long."""
        now_s = time.monotonic()
        return now_s if now_s < self._silent_s else now_s + self._repeat_for_s

    # Requests

    def get(self, service: str, path: str, tried: str, **query: str) -> dict[str, Any] | None:
        """The document at `path`, or None if there is none (404)."""
        return self.request(service, "GET", path, tried, params=query)

    def list(self, service: str, path: str, key: str, tried: str, **query: str) -> list[dict[str, Any]]:
        """All objects of a listing under `key`, over all its pages. Threads that ask for the same share one answer."""
        same = (service, path, *sorted(query.items()))
        return list(self._shared.ask(same, lambda: self._pages(service, path, key, tried, query)))

    def _pages(self, service: str, path: str, key: str, tried: str, query: dict[str, str]) -> _Objects:
        found: list[dict[str, Any]] = []
        seen: set[str] = set()
        for _ in range(MAX_PAGES):
            document = self.request(service, "GET", path, tried, params=query)
            if document is None:  # a whole collection that is not there: the service is not what it should be
                raise PermanentError(f"{tried}: {self.name} knows no {service}:{path}", next_command="cloudfit doctor")
            page = document.get(key)
            if not isinstance(page, list):
                raise TemporaryError(f"{tried}: the answer of {self.name} holds no {key}")
            found += [o for o in page if isinstance(o, dict) and (o.get("id") not in seen)]
            seen |= {str(o["id"]) for o in page if isinstance(o, dict) and "id" in o}
            following = next_page(document, key)
            if following is None or not page:
                return found
            query = {**query, **following}
        raise TemporaryError(f"{tried}: the listing of {key} at {self.name} has no end after {MAX_PAGES} pages")

    def make(self, service: str, path: str, body: Mapping[str, Any], tried: str) -> dict[str, Any]:
        """POST once. UnclearError if nobody knows what became of it; BusyError, RejectedError. Never repeated here."""
        return self.request(service, "POST", path, tried, body=body) or {}

    def put(self, service: str, path: str, body: Mapping[str, Any], tried: str) -> dict[str, Any] | None:
        """Set it so; None if it is gone."""
        return self.request(service, "PUT", path, tried, body=body)

    def patch(self, path: str, changes: Sequence[Mapping[str, Any]], tried: str) -> dict[str, Any] | None:
        """Change an image (RFC 6902); None if it is gone."""
        return self.request("image", "PATCH", path, tried, body=changes)

    def delete(self, service: str, path: str, tried: str) -> bool:
        """Ask for the end of it; False if it is gone already."""
        return self.request(service, "DELETE", path, tried) is not None

    def upload(self, path: str, open_file: Callable[[], BinaryIO], tried: str) -> None:
        """PUT a file's bytes into an image, once: after an UnclearError its state says what came of it."""
        with open_file() as file:
            self.request("image", "PUT", path, tried, data=file)

    def request(
        self,
        service: str,
        method: str,
        path: str,
        tried: str,
        *,
        body: Mapping[str, Any] | Sequence[Any] | None = None,
        data: BinaryIO | None = None,
        params: Mapping[str, str] | None = None,
    ) -> dict[str, Any] | None:
        """One request, repeated if it may be; the document, {} if it is empty, None for 404 of what may be gone.

        `tried` names the action and its object, for errors.
        """
        deadline, pause = self._deadline_s(), FIRST_PAUSE_S
        while True:
            try:
                answer = self._once(service, method, path, tried, body=body, data=data, params=params)
            except TemporaryError as error:
                sent = isinstance(error, BusyError | UnclearError)  # and perhaps carried out
                if isinstance(error, BusyError) or data is not None or (sent and method == "POST"):
                    raise
                wait = pause if sent else max(pause, error.retry_after_s)
                if time.monotonic() + wait > deadline:
                    if not isinstance(error, LimitedError):
                        self._silent_s = time.monotonic() + SILENT_FOR_S
                    raise
            else:
                self._silent_s = 0.0
                return answer
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _once(
        self,
        service: str,
        method: str,
        path: str,
        tried: str,
        *,
        body: Mapping[str, Any] | Sequence[Any] | None,
        data: BinaryIO | None,
        params: Mapping[str, str] | None,
    ) -> dict[str, Any] | None:
        keywords: dict[str, Any] = {"timeout": self._timeout, "headers": {"Accept": _JSON, **_HEADERS.get(method, {})}}
        if service in _VERSIONS:
            keywords["microversion"] = _VERSIONS[service]
        if body is not None:
            keywords["json"] = body
        if data is not None:
            keywords["data"] = data
            keywords["headers"] = {"Content-Type": "application/octet-stream"}
        if params:
            keywords["params"] = dict(params)
        try:
            with self.connection() as connection:
                adapter = getattr(connection, SERVICES[service])
                response = adapter.request(path, method, connect_retries=0, **keywords)
                return self._judge(response, method, path, tried)
        except (keystoneauth1.exceptions.ClientException, openstack.exceptions.SDKException) as error:
            raise self._translate(error, tried, service) from None
        except requests.RequestException as error:  # while the body was read
            raise UnclearError(f"{tried}: {self.name}: the answer broke off ({type(error).__name__})") from None

    def _judge(self, response: requests.Response, method: str, path: str, tried: str) -> dict[str, Any] | None:
        status = response.status_code
        if 200 <= status < 300:
            return self._document(response, tried)
        if status == 404 and method != "POST":
            return None
        kind, said = error_of(response)
        fact = f"{tried}: {self.name} answers {status}: {said}"
        if status in (429, 503) or (status == 413 and "retry-after" in response.headers and method == "GET"):
            trouble: type[TemporaryError] = LimitedError if status == 429 else UnclearError
            raise trouble(fact, retry_after_s=retry_after(response))
        if status >= 500 or status == 408:
            raise UnclearError(fact)
        if status == 409 and kind not in FINAL_CONFLICTS:
            raise BusyError(fact)
        if status == 401:  # with a token that openstacksdk has just renewed
            raise LockedOutError(fact, next_command=self._new_credentials())
        raise RejectedError(fact, status=status, kind=kind, next_command=advice(status, kind, path))

    def _document(self, response: requests.Response, tried: str) -> dict[str, Any]:
        if not response.content:
            return {}
        try:
            document = response.json()
        except ValueError:
            if _JSON in response.headers.get("Content-Type", _JSON) or response.content.lstrip()[:1] == b"<":
                raise UnclearError(f"{tried}: {self.name} answers {response.status_code} with no JSON") from None
            return {}  # a plain text that says it was accepted
        if not isinstance(document, dict):
            raise UnclearError(f"{tried}: {self.name} answers {response.status_code} with another document")
        return document

    def _translate(self, error: Exception, tried: str, service: str | None) -> CloudfitError:
        """Openstacksdk's and keystoneauth's errors in our words."""
        what, where = keystoneauth1.exceptions, f"{tried}: cloud {self.name}"
        doctor = "cloudfit doctor"
        if isinstance(error, what.Unauthorized):
            return LockedOutError(
                f"{where}: Keystone refuses the credentials of clouds.yaml", next_command=self._new_credentials()
            )
        trouble = tls_trouble(str(error)) or (said_in(str(error)) if isinstance(error, what.SSLError) else "")
        if trouble:
            return PermanentError(
                f"{where}: TLS: {trouble}", next_command="check cacert in clouds.yaml, and the certificate"
            )
        absent = openstack.exceptions.EndpointNotFound | openstack.exceptions.ServiceDisabledException
        if isinstance(error, what.EndpointNotFound | what.EmptyCatalog | absent):
            return PermanentError(
                f"{where}: the catalogue has no endpoint for {service or 'it'} in the region",
                next_command=f"openstack --os-cloud {self.cloud} catalog list",
            )
        if isinstance(error, openstack.exceptions.NotSupported):
            return PermanentError(f"{where}: {said_in(str(error))}", next_command=doctor)
        if isinstance(error, what.MissingRequiredOptions | what.NoMatchingPlugin | what.OptionError):
            return BadInputError(f"{where}: its auth section is not complete", next_command="correct clouds.yaml")
        if isinstance(error, what.HTTPClientError) and not isinstance(
            error, what.TooManyRequests | what.RequestTimeout
        ):
            return PermanentError(f"{where}: Keystone: {said_in(str(error))}", next_command=doctor)
        if isinstance(error, what.TooManyRequests):  # of a token: nothing was carried out
            return LimitedError(f"{where}: Keystone: {said_in(str(error))}")
        # No connection, a service in trouble, a discovery document that is none.
        return UnclearError(f"{where}: {said_in(str(error))}", next_command=doctor)

    def _new_credentials(self) -> str:
        return (
            f"openstack --os-cloud {self.cloud} token issue; if it fails, put a new application credential into "
            "clouds.yaml; then the same command again goes on where it stopped"
        )

    # Waiting

    def remembered(self, what: tuple[str, ...], look: Callable[[], _T]) -> _T:
        """What `look` found when `what` was asked for first: for what outlives single machines. See `until`."""
        known = self._known  # another thread may forget meanwhile: then this one is nobody's any more

        def find() -> _T:
            if what not in known:
                known[what] = look()
            found: _T = known[what]
            return found

        # Threads that want what is missing at the same time must not each make it: duplicates would have to be removed.
        return find() if what in known else self._shared.ask(("remembered", id(known), what), find)

    def forget(self) -> bool:
        """Look up everything anew from now on; False if nothing was remembered."""
        known, self._known = self._known, {}
        return bool(known)

    def until(self, tried: str, step: Callable[[], _T | None], timeout_s: float, pace: int = 0) -> _T:
        """Call `step` (look; act if need be) until it returns something, or raises what is not temporary.

        TemporaryError after `timeout_s`, with what was seen last. Polled, because these APIs announce nothing. A first
        refusal may be for something remembered that is gone by now: then it is looked up anew. `pace`: not more and
        more rarely, but each so many FIRST_PAUSE_S, at instants that all threads share.
        """
        deadline, pause, last, forgot = time.monotonic() + timeout_s, FIRST_PAUSE_S / 2, "", False
        while True:
            try:
                found = step()
                if found is not None:
                    return found
                last = ""
            except TemporaryError as error:
                last = f"; last: {error.fact}"
            except RejectedError as error:
                if forgot or not self.forget():
                    raise
                forgot, last = True, f"; last: {error.fact}"
            if time.monotonic() + pause > deadline:
                raise TemporaryError(
                    f"{tried}: {self.name}: not done after {timeout_s:.0f} s{last}",
                    next_command="run the same command again: it goes on where it stopped",
                    retry_after_s=LONGEST_PAUSE_S,
                )
            # Threads look at the same instants, so that they share what they list.
            grid = (pace or 1) * FIRST_PAUSE_S
            time.sleep(pause + -(time.monotonic() + pause) % grid)
            pause = pause if pace else min(1.5 * pause, LONGEST_PAUSE_S)
