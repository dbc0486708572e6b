"""Which addresses another machine may lead us to: public ones, and none that only this side of a network can reach."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult

from sllm_actor.errors import SourceRefused

_NAT64 = IPv6Network("64:ff9b::/96")


def is_private(address: str) -> bool:
    """Tell whether an IP address is anything but a public one: private, loopback, link-local, reserved, multicast.

    An IPv6 address that stands for an IPv4 one is judged by that.
    """
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address):
        if parsed.sixtofour is not None or parsed.teredo is not None:
            return True
        parsed = _embedded(parsed) or parsed
    return not parsed.is_global or parsed.is_multicast


def _embedded(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def is_address(host: str) -> bool:
    """Tell whether a host is given as an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_private_host(host: str, private: Callable[[str], bool] = is_private) -> bool:
    """Tell whether a host is private by its very name; nothing is resolved."""
    if is_address(host):
        return private(host)
    name = host.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")


class CheckedResolver(AbstractResolver):
    """Resolves the names that redirects lead to, and refuses one that has a private address.

    What it gives is what is connected to: a name can't be public when it is checked and private when it is used.
    """

    def __init__(self, inner: AbstractResolver, private: Callable[[str], bool] = is_private) -> None:
        self._inner = inner
        self._private = private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve, once.

        Raises:
            SourceRefused: one of the addresses is private.
        """
        found = await self._inner.resolve(host, port, family)
        for result in found:
            if self._private(result["host"]):
                raise SourceRefused(f"a redirect leads to {host}, which has the private address {result['host']}")
        return found

    async def close(self) -> None:
        """Do nothing: the resolver that was given stays its owner's."""
