"""Requests to one HTTP origin, and to where it redirects as far as that is allowed.

Knows hosts, addresses, credentials and time limits; knows nothing of files and ranges. Every request is sent once.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from sllm_actor.errors import (
    SllmError,
    SourceChanged,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.addresses import CheckedResolver, is_private, is_private_host
from sllm_actor.sources.http_url import is_reachable, is_same_origin, place_of
from sllm_actor.sources.netrc_login import basic
from sllm_actor.sources.source import SourceOptions

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 3600.0
READ_BYTES = 2**20
_REDIRECTS = (301, 302, 303, 307, 308)
_LOCATION = re.compile(r"[\x21-\x7e]{1,8000}")
_SECONDS = re.compile(r"[0-9]{1,9}")

Credentials = Callable[[], Awaitable[str]]


async def no_credentials() -> str:
    """Return no value for the Authorization header."""
    return ""


class HttpClient:
    """Sends requests to the origin of `base`, with credentials, and follows its redirects, without.

    `credentials` gives the value of the Authorization header, or nothing; it is asked once. `hint` tells people where
    credentials are taken from. With `any_host` a redirect may lead to every public host. The resolver and the notion
    of a private address are given by tests only.
    """

    def __init__(
        self,
        base: URL,
        options: SourceOptions,
        *,
        credentials: Credentials = no_credentials,
        hint: str = "",
        any_host: bool = False,
        resolver: AbstractResolver | None = None,
        private: Callable[[str], bool] = is_private,
    ) -> None:
        self._base = base
        self._options = options
        self._credentials = credentials
        self._hint = hint
        self._any_host = any_host
        self._resolver = resolver
        self._private = private
        self._allow_private = options.allow_private_redirects or is_private_host(base.raw_host or "", private)
        self._authorization: str | None = None
        self._tls: ssl.SSLContext | None = None
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        # Where a request was led to the last time, so that not every range asks for the way anew.
        self._led_to: dict[tuple[str, URL], URL] = {}
        self._closed = False

    async def send(self, method: str, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """Send a request and return the answer, whatever its status; the caller closes it.

        Raises:
            SourceRefused: a redirect that is not followed, or a certificate that is not trusted.
            SourceUnreachable: no connection, no answer in time, or a broken one.
            SourceViolation: an answer that is none, or one that is encoded.
        """
        assert is_same_origin(url, self._base), "only what is of the origin is asked for"
        target = self._led_to.get((method, url))
        if target is not None:
            response = await self._send_known(method, url, target, headers)
            if response is not None:
                return response
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send_once(method, target, headers)
            if response.status not in _REDIRECTS:
                if target != url and response.status < 300:
                    self._led_to[method, url] = target
                return response
            response.close()
            target = self._follow(target, response.headers.get("Location", ""))
        raise SourceViolation(f"{place_of(url)} redirects more than {MAX_REDIRECTS} times")

    async def _send_known(
        self, method: str, url: URL, target: URL, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse | None:
        """Send a request to where an earlier one was led; None where that way holds no more."""
        holds = False
        try:
            response = await self._send_once(method, target, headers)
            holds = response.status < 300
        finally:
            # Another request may have found a new way meanwhile.
            if not holds and self._led_to.get((method, url)) == target:
                del self._led_to[method, url]
        if holds:
            return response
        response.close()
        return None

    async def close(self) -> None:
        """Close every connection; requests that are under way fail."""
        self._closed = True
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
        if self._resolver is not None:
            await self._resolver.close()

    async def _send_once(self, method: str, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        if url.scheme == "https" and self._tls is None:
            # It reads the trusted certificates, from SSL_CERT_FILE too.
            self._tls = await asyncio.get_running_loop().run_in_executor(None, ssl.create_default_context)
        if self._authorization is None:
            self._authorization = await self._credentials()
        sent = {"Accept-Encoding": "identity", **headers}
        if self._authorization and is_same_origin(url, self._base):
            sent["Authorization"] = self._authorization
        if self._closed:
            raise SourceUnreachable(f"{place_of(self._base)} has been closed")
        proxy, proxy_headers = _proxy_for(url)
        session = self._session(guarded=self._is_guarded(url) and proxy is None)
        with translated(url, self._options):
            response = await session.request(
                method, url, headers=sent, allow_redirects=False, proxy=proxy, proxy_headers=proxy_headers,
                ssl=self._tls or True,
            )  # fmt: skip
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            response.close()
            raise SourceViolation(f"{place_of(url)} is sent encoded, which it was asked not to be")
        return response

    def _is_guarded(self, url: URL) -> bool:
        return not self._allow_private and not is_same_origin(url, self._base)

    def _session(self, guarded: bool) -> aiohttp.ClientSession:
        if guarded not in self._sessions:
            if self._resolver is None:
                self._resolver = aiohttp.ThreadedResolver()
            resolver = CheckedResolver(self._resolver, self._private) if guarded else self._resolver
            self._sessions[guarded] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, resolver=resolver, use_dns_cache=False),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(
                    total=None, connect=self._options.connect_timeout_s, sock_read=self._options.stall_timeout_s
                ),
                headers={"User-Agent": "sllm-node"},
                auto_decompress=False,
                read_bufsize=READ_BYTES,
            )
        return self._sessions[guarded]

    def _follow(self, url: URL, location: str) -> URL:
        """Return where a redirect leads to, if that is allowed."""
        origin = place_of(self._base.origin())
        try:
            led = URL(location, encoded=True) if _LOCATION.fullmatch(location) else URL("none:")
            target = url.join(led)
            readable = is_reachable(target) and (led.raw_host is not None or not led.scheme)
        except ValueError:
            readable = False
        if not readable:
            raise SourceViolation(f"{origin} redirects to nothing that can be asked")
        if url.scheme == "https" and target.scheme == "http":
            raise SourceRefused(f"{origin} redirects from https to {place_of(target.origin())}, which is not encrypted")
        if is_same_origin(target, self._base):
            return target
        host = target.raw_host or ""
        if target.raw_user is not None or target.raw_password is not None:
            raise SourceRefused(f"{origin} redirects to {host} with credentials in the URL")
        allowed = {allowed.lower() for allowed in self._options.redirect_hosts}
        if not self._any_host and not allowed & {host, f"{host}:{target.port}"}:
            raise SourceRefused(
                f"{origin} redirects to {place_of(target.origin())}, which is not among the hosts allowed"
            )
        if not self._allow_private and is_private_host(host, self._private):
            raise SourceRefused(f"{origin} redirects to the private address {host}")
        return target

    def refusal(self, response: aiohttp.ClientResponse, url: URL) -> SllmError:
        """Return the error that an answer's status stands for."""
        status, place = response.status, place_of(url)
        if status in (401, 403):
            how = "refuses the credentials that were sent" if self._authorization else "wants credentials"
            return SourceRefused(f"{place} {how} (status {status}){self._hint}")
        if status in (404, 410):
            return SourceMissing(f"{place} is not there (status {status})", param="source")
        if status == 416:
            return SourceChanged(f"{place} has no such range any more")
        if status in (408, 429) or status >= 500:
            return SourceUnreachable(f"{place} answers with status {status}", retry_after_s=_retry_after_s(response))
        return SourceViolation(f"{place} answers with status {status}")


async def next_piece(response: aiohttp.ClientResponse, url: URL, most_bytes: int, options: SourceOptions) -> bytes:
    """Return the next bytes of an answer, `most_bytes` at most; none at its end.

    Raises:
        SourceUnreachable, SourceViolation: none come in time, or the connection breaks.
    """
    with translated(url, options):
        # aiohttp's own limit ends with its parser: after a broken chunk it would wait for ever.
        async with asyncio.timeout(options.stall_timeout_s):
            return await response.content.read(min(most_bytes, READ_BYTES))


@contextmanager
def translated(url: URL, options: SourceOptions) -> Iterator[None]:
    """Raise what goes wrong on a connection as what it means for a source."""
    place = place_of(url)
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as wrong:
        raise SourceRefused(f"the certificate of {url.raw_host} is not trusted: {wrong.certificate_error}") from None
    except aiohttp.ConnectionTimeoutError:
        limit_s = options.connect_timeout_s
        raise SourceUnreachable(f"{place}: no connection to {url.raw_host} within {limit_s:g} s") from None
    except TimeoutError:
        raise SourceUnreachable(f"{place}: not a byte for {options.stall_timeout_s:g} s") from None
    except aiohttp.ClientHttpProxyError as wrong:
        raise SourceUnreachable(f"{place}: the proxy answers with status {wrong.status}") from None
    except (aiohttp.ClientResponseError, aiohttp.InvalidURL):
        raise SourceViolation(f"{place}: the answer is no HTTP") from None
    except (aiohttp.ClientError, OSError) as wrong:
        raise SourceUnreachable(f"{place}: {_reason(wrong)}") from None


def _reason(wrong: Exception) -> str:
    if isinstance(wrong, aiohttp.ClientConnectorError):
        return f"no connection to {wrong.host}: {wrong.os_error.strerror or wrong.os_error}"
    if isinstance(wrong, aiohttp.ClientPayloadError):
        return "the answer ends before it is whole"
    return str(wrong) or "the connection was closed"


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """Read Retry-After in seconds; its other form, a date, would need clocks that agree."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER_S) if _SECONDS.fullmatch(text) else None


def _proxy_for(url: URL) -> tuple[URL | None, dict[str, str]]:
    """Return the proxy that the environment names for a URL, by http_proxy, https_proxy and no_proxy, and its login."""
    named = getproxies().get(url.scheme, "")
    if not named or proxy_bypass(url.raw_host or ""):
        return None, {}
    try:
        proxy = URL(named if "://" in named else f"http://{named}")
    except ValueError:
        raise SourceRefused(f"the variable {url.scheme}_proxy names no proxy") from None
    # aiohttp sends it on as Proxy-Authorization.
    headers = {"Authorization": basic(proxy.user, proxy.password or "")} if proxy.user else {}
    return proxy.with_user(None), headers
