"""The guest's one interface, configured over rtnetlink: no DHCP, no tools (rtnetlink(7), netlink(7)).

Addresses come in WELCOME. Repeating a call with the same values is no error.
"""

import errno
import ipaddress
import os
import socket
import struct

_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ERROR = struct.Struct("=i")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change mask
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, dst len, src len, tos, table, protocol, scope, type, flags
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400
_NLMSG_ERROR, _RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 2, 16, 20, 24
_IFA_ADDRESS, _IFA_LOCAL, _RTA_OIF, _RTA_GATEWAY = 1, 2, 4, 5
_IFF_UP = 0x1
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST = 254, 4, 1
ANSWER_TIMEOUT_S = 5.0  # the kernel answers at once


def up(interface: str) -> None:
    """Set `interface` up. Raises OSError naming it."""
    index = _index(interface)
    _ask(_RTM_NEWLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP), f"set {interface} up")


def configure(interface: str, address: str, prefix: int, gateway: str | None) -> None:
    """Give `interface` its IPv4 or IPv6 `address`/`prefix`, set it up, and route the rest over `gateway` (if any).

    Raises ValueError for an address that is none, OSError naming what the kernel refused.
    """
    own = ipaddress.ip_interface(f"{address}/{prefix}")
    via = ipaddress.ip_address(gateway) if gateway else None
    if via is not None and via.version != own.version:
        raise ValueError(f"gateway {via} and address {own} are of different IP versions")
    family = socket.AF_INET if own.version == 4 else socket.AF_INET6
    index = _index(interface)
    attributes = _attribute(_IFA_LOCAL, own.ip.packed) + _attribute(_IFA_ADDRESS, own.ip.packed)
    body = _ADDRESS.pack(family, prefix, 0, 0, index) + attributes
    _ask(_RTM_NEWADDR, _CREATE | _REPLACE, body, f"give {interface} the address {own}")
    up(interface)
    if via is not None:
        head = _ROUTE.pack(family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, _RTN_UNICAST, 0)
        attributes = _attribute(_RTA_GATEWAY, via.packed) + _attribute(_RTA_OIF, struct.pack("=I", index))
        _ask(_RTM_NEWROUTE, _CREATE | _REPLACE, head + attributes, f"route over {via}")


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError as error:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), interface) from error


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _ask(kind: int, flags: int, body: bytes, what: str) -> None:
    """Send one request and wait for the kernel's acknowledgement."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(ANSWER_TIMEOUT_S)
        netlink.bind((0, 0))
        netlink.send(_MESSAGE.pack(_MESSAGE.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
        answer = netlink.recv(65536)
    _, answer_kind, _, _, _ = _MESSAGE.unpack_from(answer)
    if answer_kind != _NLMSG_ERROR:
        raise OSError(errno.EPROTO, f"unexpected netlink answer {answer_kind}", what)
    number = -_ERROR.unpack_from(answer, _MESSAGE.size)[0]
    if number:
        raise OSError(number, os.strerror(number), what)
