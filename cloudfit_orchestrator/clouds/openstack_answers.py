"""What OpenStack's APIs say in their answers: errors, pauses, next pages. Their forms differ by service."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import requests

MAX_RETRY_AFTER_S = 30.0  # a cloud that wants more gets its error shown instead
UNREADABLE_RETRY_S = 4.0  # where `Retry-After` is a date
MAX_SAID = 300  # characters of an API's own words in an error
# 409 that waiting does not mend: Neutron's names of them.
FINAL_CONFLICTS = frozenset({"OverQuota", "IpAddressInUse", "IpAddressInUseClient", "MacAddressInUse"})


def advice(status: int, kind: str, path: str) -> str:
    """The next command after a refusal."""
    if status == 413 or kind == "OverQuota":
        return "openstack quota show; ask the operator of the cloud for more, or destroy a group"
    if status == 403:
        return "openstack role assignment list --names, openstack quota show: a role or a quota is missing"
    if kind.startswith("IpAddressInUse"):
        return "openstack port list"
    return f"see what the cloud says; the call was {path.partition('?')[0]}"


def retry_after(response: requests.Response) -> float:
    """Seconds until the cloud wants to be asked again, bounded."""
    try:
        return min(max(float(response.headers.get("Retry-After", "1")), 0.1), MAX_RETRY_AFTER_S)
    except ValueError:  # a date
        return UNREADABLE_RETRY_S


def error_of(response: requests.Response) -> tuple[str, str]:
    """(the API's name of the error, its words)."""
    try:
        document: Any = response.json()
    except ValueError:
        return "", said_in(re.sub(r"<[^>]*>", " ", response.text))
    if isinstance(document, dict):
        inner = next((v for v in document.values() if isinstance(v, dict) and "message" in v), document)
        return str(inner.get("type", "")), said_in(str(inner.get("message", "")))
    return "", said_in(json.dumps(document))


def tls_trouble(text: str) -> str:
    """What TLS found wrong, if that is what an error of keystoneauth is about: it wraps and repeats the cause."""
    if "SSLError" not in text:
        return ""
    found = re.search(r"\[SSL[^\]]*\] ([^(\"']+)", text)
    return found[1].strip() if found else said_in(text)


def said_in(text: str) -> str:
    """An API's words on one line, cut."""
    return " ".join(text.split())[:MAX_SAID] or "nothing"


def next_page(document: Mapping[str, Any], key: str) -> dict[str, str] | None:
    """The query of the next page: Nova, Cinder and Neutron give links, Glance a path."""
    links = document.get(f"{key}_links") or []
    url = next((x.get("href") for x in links if isinstance(x, dict) and x.get("rel") == "next"), document.get("next"))
    if not isinstance(url, str):
        return None
    return dict(parse_qsl(urlsplit(url).query))
