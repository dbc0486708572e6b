"""Where an etcd cluster is and how one proves oneself to it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

from yarl import URL

from sllm_actor.errors import ConfigInvalid

MAX_ENDPOINTS = 16
SCHEMES = {"etcd": "http", "etcds": "https"}


@dataclass(frozen=True, kw_only=True)
class EtcdAddress:
    """The endpoints of one cluster, whom to trust, and the user that asks: nobody in particular where that is empty."""

    endpoints: tuple[URL, ...]
    tls: ssl.SSLContext | None = None
    user: str = ""
    password: str = field(default="", repr=False)


def parse_endpoints(text: str) -> tuple[URL, ...]:
    """Read `etcd://HOST:PORT,HOST:PORT`; `etcds` stands for TLS.

    Raises:
        ConfigInvalid: it is something else, or has more than 16 endpoints.
    """
    scheme, _, hosts = text.partition("://")
    listed = hosts.split(",")
    if scheme not in SCHEMES or not 1 <= len(listed) <= MAX_ENDPOINTS:
        raise _invalid(text)
    return tuple(_endpoint(SCHEMES[scheme], host, text) for host in listed)


def _endpoint(scheme: str, host: str, text: str) -> URL:
    try:
        url = URL(f"{scheme}://{host}")
        whole = (
            url.raw_host and url.explicit_port and url == URL.build(scheme=scheme, host=url.host or "", port=url.port)
        )
    except ValueError:
        whole = False
    if not whole:
        raise _invalid(text)
    return url


def _invalid(text: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"metadata: {text[:120]!r} is not etcd://HOST:PORT or etcds://HOST:PORT, with commas between up to "
        f"{MAX_ENDPOINTS} of them",
        param="metadata",
    )


def client_tls(authority: str, certificate: str = "", key: str = "") -> ssl.SSLContext:
    """Read PEM files: the authority to trust (the machine's own ones where it is empty) and a certificate, if any.

    Raises:
        ConfigInvalid: they can't be read or do not belong together.
    """
    try:
        context = ssl.create_default_context(cafile=authority or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate:
            context.load_cert_chain(certificate, key or None)
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"the TLS files of etcd can't be used: {error}", param="metadata") from error
    return context
