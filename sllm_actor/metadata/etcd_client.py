"""Calls to an etcd cluster's JSON gateway: endpoints in turn, a deadline, a token, and what the refusals mean.

Knows nothing of keys. A call is tried again until it is answered or its deadline has passed; an attempt after which
nobody can say whether it was carried out is told to the next one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from random import Random
from typing import TypeVar

import aiohttp
import msgspec

from sllm_actor.errors import (
    AlreadyThere,
    LeaseLost,
    MetadataCompacted,
    MetadataFailed,
    MetadataInvalid,
    MetadataRefused,
    MetadataUnavailable,
    MetadataUncertain,
    SllmError,
)
from sllm_actor.metadata.etcd_address import EtcdAddress
from sllm_actor.metadata.etcd_wire import Body, Refusal, Token
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.runtime import Clock

T = TypeVar("T")
PIECE_BYTES = 256 * 1024
MAX_AUTHENTICATIONS = 3
# gRPC's codes, as the gateway repeats them.
INVALID, NOT_FOUND, DENIED, EXHAUSTED, EXISTS, OUT_OF_RANGE, UNAUTHENTICATED = 3, 5, 7, 8, 9, 11, 16
# What a member that can't go on answers with: another may, or this one later.
PASSING = (429, 500, 502, 503, 504)
# The same of gRPC's codes: cancelled (by a gateway that is leaving), too late, aborted, unavailable.
PASSING_CODES = (1, 4, 10, 14)
STALE_TOKEN = ("invalid auth token", "revision of auth store is old", "auth: revision in header is old")
NO_USER = ("user name is empty", "invalid user ID or password", "authentication is not enabled")
REFUSED_BEFORE = ("no leader", "too many requests")
# So that a member that has lost its leader ends a watch, which would else be silent.
NEEDS_LEADER = {"Grpc-Metadata-hasleader": "true"}


class AnswerTooLong(Exception):
    """An answer over the bound; the cause of a `MetadataFailed`."""


class Passing(Exception):
    """An attempt that failed in a way that another may not; `made` where it may have been carried out."""

    def __init__(self, reason: str, made: bool) -> None:
        super().__init__(reason)
        self.made = made


class StaleToken(Exception):
    """A token that the store no longer takes; nothing was carried out."""


BROKEN = (aiohttp.ClientError, TimeoutError, OSError)


class EtcdClient:
    """Belongs to one event loop."""

    def __init__(self, address: EtcdAddress, clock: Clock, random: Random, limits: StoreLimits) -> None:
        self._address = address
        self._clock = clock
        self._random = random
        self._limits = limits
        self._at = random.randrange(len(address.endpoints))
        self._turns = asyncio.Semaphore(limits.calls_at_once)
        self._session: aiohttp.ClientSession | None = None
        self._token = ""
        self._authenticating = asyncio.Lock()

    async def call(self, path: str, make_body: Callable[[bool], Body], answer: type[T], *, writes: bool = False) -> T:
        """Send what `make_body` gives until it is answered. It is told whether an earlier one may have been made.

        Raises:
            MetadataUnavailable: no answer within the deadline; its subclass `MetadataUncertain` where it writes and may
                have been carried out.
            MetadataFailed, MetadataInvalid: the answer is a refusal.
        """
        deadline_s = self._clock.monotonic_s() + self._limits.call_timeout_s
        made, failures, authentications = False, 0, 0
        while True:
            left_s = deadline_s - self._clock.monotonic_s()
            try:
                if left_s <= 0:
                    raise Passing("nobody answers", made)
                return await self._attempt(path, make_body(made), answer, min(left_s, self._limits.attempt_timeout_s))
            except StaleToken as stale:
                authentications += 1
                if authentications > MAX_AUTHENTICATIONS:
                    raise MetadataRefused(f"etcd refuses each token that it gives: {stale}") from None
            except AnswerTooLong as error:
                raise MetadataFailed(str(error)) from error
            except Passing as passing:
                made, failures = made or passing.made, failures + 1
                pause_s = self.pause_s(failures)
                if deadline_s - self._clock.monotonic_s() <= pause_s:
                    kind = MetadataUncertain if made and writes else MetadataUnavailable
                    raise kind(f"etcd: {passing}", retry_after_s=self._limits.retry_last_s) from passing
                await self._clock.sleep(pause_s)

    def pause_s(self, failures: int) -> float:
        """Give the pause after so many failures in a row: none until every endpoint has had its turn."""
        rounds, within = divmod(failures, len(self._address.endpoints))
        if within:
            return 0.0
        longest_s = min(self._limits.retry_first_s * float(1 << min(rounds - 1, 16)), self._limits.retry_last_s)
        return longest_s * (0.5 + self._random.random() / 2)

    @asynccontextmanager
    async def stream(self, path: str, body: Body) -> AsyncIterator[aiohttp.StreamReader]:
        """Open an answer that goes on. The connection closes with the block, and the next opens at the next endpoint.

        Raises:
            Passing, StaleToken: nobody answers, the connection breaks, or the token has become stale.
            MetadataFailed, MetadataInvalid: a refusal.
        """
        at = self._at
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(self._limits.attempt_timeout_s):
                token = await self._token_of(at)
                response = await self._send(at, path, body, token)
                raw = b"" if response.status == 200 else await self._read(response)
            if response.status != 200:
                raise self._refusal(response.status, raw, token)
            yield response.content
        except BROKEN as error:
            raise self._translated(error, at) from error
        finally:
            self._turn_from(at)
            if response is not None:
                response.close()

    def forget_token(self) -> bool:
        """Log in anew before the next request; false where nobody logs in."""
        self._token = ""
        return bool(self._address.user)

    async def close(self) -> None:
        """Close every connection; calls that are under way fail."""
        if self._session is not None:
            await self._session.close()

    def _turn_from(self, at: int) -> None:
        if self._at == at:
            self._at = (at + 1) % len(self._address.endpoints)

    async def _attempt(self, path: str, body: Body, answer: type[T], timeout_s: float) -> T:
        at = self._at
        try:
            async with asyncio.timeout(timeout_s), self._turns:
                token = await self._token_of(at)
                return await self._ask(at, path, body, answer, token)
        except BROKEN as error:
            self._turn_from(at)
            raise self._translated(error, at) from error
        except Passing:
            self._turn_from(at)
            raise

    async def _ask(self, at: int, path: str, body: Body, answer: type[T], token: str) -> T:
        response = await self._send(at, path, body, token)
        try:
            raw = await self._read(response)
        finally:
            response.release()
        if response.status != 200:
            raise self._refusal(response.status, raw, token)
        try:
            return msgspec.json.decode(raw, type=answer, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MetadataFailed(f"{self._name(at)} does not answer as etcd does: {error}") from None

    async def _send(self, at: int, path: str, body: Body, token: str) -> aiohttp.ClientResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._address.tls or True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_timeout_s),
                headers={"User-Agent": "sllm-node", **NEEDS_LEADER},
                read_bufsize=PIECE_BYTES,
            )
        return await self._session.post(
            self._address.endpoints[at].with_path(path),
            data=BytesIO(msgspec.json.encode(body)),
            headers={"Authorization": token} if token else {},
            allow_redirects=False,
        )

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        raw = bytearray()
        async for piece in response.content.iter_any():
            raw += piece
            if len(raw) > self._limits.answer_bytes:
                response.close()
                raise AnswerTooLong(f"etcd answers with more than {self._limits.answer_bytes} bytes")
        return bytes(raw)

    async def _token_of(self, at: int) -> str:
        """Give the token to ask with, or nothing where nobody in particular asks."""
        if not self._address.user:
            return ""
        async with self._authenticating:
            if not self._token:
                login = {"name": self._address.user, "password": self._address.password}
                self._token = (await self._ask(at, "/v3/auth/authenticate", login, Token, "")).token
            return self._token

    def _refusal(self, status: int, raw: bytes, token: str) -> Exception:
        """Say what a refusal means."""
        try:
            refusal = msgspec.json.decode(raw, type=Refusal)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            refusal = Refusal(message=f"status {status} from something that is no etcd")
        message = f"etcd: {refusal.message}"
        if refusal.code == UNAUTHENTICATED or any(text in refusal.message for text in STALE_TOKEN):
            if self._token == token:
                self._token = ""
            return StaleToken(refusal.message) if self._address.user else MetadataRefused(message)
        if refusal.code == DENIED or any(text in refusal.message for text in NO_USER):
            return MetadataRefused(message)
        if refusal.code == EXHAUSTED and "space exceeded" in refusal.message:
            return MetadataFailed(message)
        if status in PASSING or refusal.code in PASSING_CODES:
            # A member without a leader, or with too much to do, says so before it does anything; others lose patience.
            return Passing(refusal.message, made=not refusal.message.endswith(REFUSED_BEFORE))
        return REFUSALS.get(refusal.code, MetadataFailed)(message)

    def _name(self, at: int) -> str:
        url = self._address.endpoints[at]
        return f"{url.host}:{url.port}"

    def _translated(self, error: BaseException, at: int) -> Exception:
        """Say what a broken attempt means: whether it may have been carried out, or can't be by anybody."""
        name = self._name(at)
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return MetadataRefused(f"the certificate of {name} is not trusted: {error.certificate_error}")
        if isinstance(error, ssl.SSLError) or isinstance(getattr(error, "os_error", None), ssl.SSLError):
            return MetadataRefused(f"{name} refuses TLS: {error}")
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return Passing(f"{name} can't be reached", made=False)
        if isinstance(error, TimeoutError):
            return Passing(f"{name} does not answer in time", made=True)
        return Passing(f"{name} broke off: {error}", made=True)


REFUSALS: dict[int, type[SllmError]] = {
    INVALID: MetadataInvalid,
    NOT_FOUND: LeaseLost,
    EXISTS: AlreadyThere,
    OUT_OF_RANGE: MetadataCompacted,
}
