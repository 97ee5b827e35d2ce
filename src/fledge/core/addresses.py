"""Which network addresses a fetch may go to: public ones, unless the user says otherwise.

A URL found on the web may point at the machine's own services, at a cloud's metadata address or at a printer.
`refuse_private` resolves a name and gives the addresses it checked; connect to one of *those*, not to the name:
a second look-up may answer otherwise (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))  # RFC 6052, RFC 8215


class RefusedAddress(FledgeError):
    """A host that lies, or whose name leads, inside: loopback, private, link-local, multicast, reserved."""


class UnknownHost(FledgeError):
    """A name that has no address."""


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is one of the public internet; an IPv4 one inside counts as itself."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and (any(ip in network for network in NAT64) or int(ip) >> 32 == 0):  # or IPv4-compatible
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return ip not in NAT64[1] and is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def resolve_host(host: str) -> list[str]:
    """Every address of a name (or of an address in any of its spellings), in the order of the resolver's answer."""
    try:
        found = socket.getaddrinfo(host.strip("[]").rstrip("."), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnknownHost(Problem(t("the host {host} cannot be found", host=host), found=str(error))) from error
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def refuse_private(host: str, allow: bool = False) -> list[str]:
    """The addresses of `host`, every one checked. One that is not public refuses the host: `RefusedAddress`.

    `allow` resolves without checking. A name without an address raises `UnknownHost`.
    """
    addresses = resolve_host(host)
    inside = [address for address in addresses if not is_public(address)]
    if inside and not allow:
        raise RefusedAddress(
            Problem(
                t("{host} is not on the public internet", host=host),
                found=", ".join(inside),
                fix=t("allow private addresses if you mean to read from your own network"),
            )
        )
    return addresses
