"""How nodes prove that they belong together."""

from __future__ import annotations

import ssl
from typing import Any

import msgspec

from sllm_actor.errors import ConfigInvalid
from sllm_actor.runtime.handshake import MIN_SECRET_BYTES


class Security(msgspec.Struct, frozen=True, kw_only=True):
    """How nodes prove that they belong together: by a shared secret, by mutual TLS, or by both.

    `secret` has 16 bytes at least, and better 32 random ones. With TLS, the node id must be one of the DNS names of the
    node's certificate. A secret keeps strangers out but hides nothing; on a network that others can read, use TLS.
    """

    secret: bytes = b""
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if self.secret and len(self.secret) < MIN_SECRET_BYTES:
            raise ConfigInvalid(f"a cluster secret has {MIN_SECRET_BYTES} bytes at least", param="secret")
        if (self.server_tls is None) != (self.client_tls is None):
            raise ConfigInvalid("TLS is for both directions or for none", param="server_tls")

    @property
    def is_secured(self) -> bool:
        """Tell whether strangers are kept out."""
        return bool(self.secret) or self.server_tls is not None

    @classmethod
    def with_tls(cls, *, certificate: str, key: str, authority: str, secret: bytes = b"") -> Security:
        """Read PEM files for mutual TLS 1.3: this node's certificate and key, and the authority of all nodes.

        Raises:
            ConfigInvalid: they can't be read or do not belong together.
        """
        try:
            server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client.check_hostname = False
            for context in (server, client):
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_cert_chain(certificate, key)
                context.load_verify_locations(authority)
        except (OSError, ValueError) as error:
            raise ConfigInvalid(f"the TLS files can't be used: {error}", param="certificate") from error
        return cls(secret=secret, server_tls=server, client_tls=client)


def certified_names(tls: ssl.SSLObject | ssl.SSLSocket) -> frozenset[str]:
    """Give the DNS names of the peer's certificate, which are node ids here."""
    certificate: Any = tls.getpeercert() or {}
    return frozenset(value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")
