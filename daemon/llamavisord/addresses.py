"""Addresses that something listens on: who reaches them, and which of them are in each other's way."""

from __future__ import annotations

import ipaddress

LOOPBACK = ("127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of a name that is not "localhost" that is not known."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listened_on(host: str) -> tuple[str, ...]:
    """The addresses that are meant: of loopback both, 127.0.0.1 and ::1, whichever is named."""
    return LOOPBACK if host in {*LOOPBACK, "localhost"} else (host,)


def overlap(one: str, other: str) -> bool:
    """Whether one port on both hosts is the same port: a name or a wildcard may be any address."""
    try:
        addresses = ipaddress.ip_address(one), ipaddress.ip_address(other)
    except ValueError:
        return True
    return addresses[0] == addresses[1] or any(address.is_unspecified for address in addresses)
