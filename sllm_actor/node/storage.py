"""What moves a node's bytes: the disk's profile, the host pool, the SSD tier and the sources, put together."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sllm_actor.config import Config
from sllm_actor.domain.roles import Role, roles_of
from sllm_actor.errors import ConfigInvalid, SourceInvalid
from sllm_actor.loader.cards import Cards
from sllm_actor.loader.device_profile import DeviceProfile, read_profile
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.tiers import Tiers
from sllm_actor.loader.write_gate import WriteGate, allowed_bytes_per_s
from sllm_actor.runtime import ActorSystem, Clock
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.open import open_source
from sllm_actor.sources.peer import PeerSource, parse_peer_url
from sllm_actor.sources.source import Source, SourceOptions

log = logging.getLogger(__name__)

# Threads that read where nothing has been measured.
UNMEASURED_READING_THREADS = 4


class Storage(NamedTuple):
    """The tiers, and what holds background writes back while they read."""

    tiers: Tiers
    gate: WriteGate


async def open_storage(
    config: Config,
    folder: Path,
    clock: Clock,
    stack: AsyncExitStack,
    system: ActorSystem,
    members: Callable[[], Iterable[str]] = tuple,
) -> Storage:
    """Open all of it; `stack` closes it in the reverse order. `members` are nodes that may have a model, too, just now.

    Raises:
        ConfigInvalid, WriteFailed: the memory or the folder can't be had.
    """
    profile = await asyncio.get_running_loop().run_in_executor(None, _profile, folder)
    best_threads = UNMEASURED_READING_THREADS if profile is None else profile.reading_threads
    gate = WriteGate(allowed_bytes_per_s(profile, config.background_write_percent), clock)
    loader = await Loader.open(
        # Without the role nothing is loaded here.
        pool_bytes=config.host_pool_bytes if Role.WORKER in roles_of(config.roles) else config.chunk_bytes,
        clock=clock,
        chunk_bytes=config.chunk_bytes,
        reading_threads=config.reading_threads or best_threads,
        lock=config.lock_host_pool,
        huge_pages=config.huge_pages,
        io_uring=config.io_uring,
        on_reading=gate.on_reading,
    )
    stack.push_async_callback(loader.close)
    ssd = await SsdTier.open(folder / "ssd", config.ssd_quota_bytes, clock, gate)
    stack.push_async_callback(ssd.close)
    options = SourceOptions(
        connect_timeout_s=config.source_connect_timeout_s,
        stall_timeout_s=config.source_stall_timeout_s,
        allow_private_redirects=config.source_allow_private_redirects,
        redirect_hosts=tuple(host for host in map(str.strip, config.source_redirect_hosts.split(",")) if host),
    )

    def open_one(url: str) -> Source:
        return open_source(url, options, BUILTIN, FolderSource, {"sllm": partial(PeerSource.from_url, system)})

    peers = [peer for peer in map(str.strip, config.peers.split(",")) if peer]
    for peer in peers:
        try:
            parse_peer_url(f"sllm://{peer}/model")
        except SourceInvalid:
            raise ConfigInvalid(f"peers: {peer!r} is not of the form NODE@HOST:PORT", param="peers") from None

    def mirrors(model_id: str) -> list[str]:
        return [f"sllm://{peer}/{model_id}" for peer in dict.fromkeys([*peers, *members()])]

    chance = random.SystemRandom().random
    cards = Cards(folder / "cards")
    tiers = Tiers(loader, ssd, cards, open_one, clock, chance, gate.pressing, mirrors, config.pull_memory_bytes)
    stack.push_async_callback(tiers.close)
    return Storage(tiers, gate)


def _profile(folder: Path) -> DeviceProfile | None:
    """Read what was measured of the data folder's disk; what can't be used is told in the log, and never fatal."""
    try:
        return read_profile(folder)
    except ConfigInvalid as error:
        log.warning("%s; 'sllm-node calibrate' measures anew", error.message)
        return None
