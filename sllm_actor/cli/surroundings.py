"""What `sllm-node doctor` finds outside the node's own files: the CUDA driver, the clock, the metadata store.

Changes nothing that lasts: a lease is granted and given back, and a device's context ends with its check.
"""

from __future__ import annotations

import asyncio
from random import SystemRandom

from sllm_actor.cli.findings import Finding
from sllm_actor.config import Config
from sllm_actor.errors import DeviceMissing, SllmError
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.device import Device, count_devices
from sllm_actor.loader.libc import clock_error_s
from sllm_actor.metadata import EtcdStore, StoreLimits
from sllm_actor.node.cluster import etcd_address
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.units import format_bytes, format_seconds

MAX_CLOCK_ERROR_S = 1.0
# A store that is slower than this holds up every start, and its leases are near their ends.
SLOW_STORE_S = 0.1
LEASE_TTL_S = 5
# A person waits for the answer.
LIMITS = StoreLimits(call_timeout_s=3.0, attempt_timeout_s=1.0)


def driver(_: Config) -> Finding:
    """Look for the CUDA driver, and open each of its devices."""
    try:
        if not use_native():
            return Finding("CUDA driver", "ok", "not looked for: the portable reader knows no devices")
        names = [_device(ordinal) for ordinal in range(count_devices())]
    except DeviceMissing as error:
        # A machine without a driver is as it should be; the error's kind is the same for one that can't be used.
        if error.message.startswith("no CUDA driver"):
            return Finding("CUDA driver", "ok", f"{error.message}; models run on the processor")
        return Finding("CUDA driver", "warning", error.message, "install a driver for CUDA 11 or later")
    except SllmError as error:
        mend = "nvidia-smi says why; after an update of the driver: load its kernel module anew, or reboot"
        return Finding("CUDA driver", "warning", error.message, mend)
    if not names:
        mend = "give the container devices (docker run --gpus all), or unset CUDA_VISIBLE_DEVICES"
        return Finding("CUDA driver", "warning", "there, but without a device", mend)
    return Finding("CUDA driver", "ok", "; ".join(names))


def _device(ordinal: int) -> str:
    with Device.open(ordinal, streams=1) as device:
        facts = device.facts()
    version = f"{facts.driver_version // 1000}.{facts.driver_version % 1000 // 10}"
    free, size = format_bytes(facts.free_bytes), format_bytes(facts.total_bytes)
    return f"device {ordinal}: {facts.name}, {free} of {size} free, driver for CUDA {version}"


def clock(_: Config) -> Finding:
    """Ask the kernel whether somebody keeps its clock right."""
    mend = "timedatectl set-ntp true, or run chronyd; in a container: on its host"
    error_s = clock_error_s()
    if error_s is None:
        return Finding("clock", "warning", "nobody keeps it right, as far as the kernel knows", mend)
    found = f"kept right, within {format_seconds(error_s)}"
    return Finding("clock", "ok", found) if error_s <= MAX_CLOCK_ERROR_S else Finding("clock", "warning", found, mend)


def metadata(config: Config) -> Finding:
    """Ask the metadata store for its version and for a lease."""
    if not config.metadata:
        return Finding("metadata", "ok", "SQLite in the data folder: this node is alone")
    try:
        version, took_s = asyncio.run(_ask_store(config))
    except SllmError as error:
        mend = "start etcd there, or name another with --metadata etcd://HOST:PORT; see docs/cluster.md"
        return Finding("metadata", "error", error.message, mend)
    found = f"etcd {version} grants leases; an answer takes {format_seconds(took_s)}"
    if took_s > SLOW_STORE_S:
        return Finding("metadata", "warning", found, "give etcd a disk and a network of its own")
    return Finding("metadata", "ok", found)


async def _ask_store(config: Config) -> tuple[str, float]:
    """Give the store's version, and the seconds that granting and giving back a lease take, each."""
    time = SystemClock()
    store = EtcdStore(etcd_address(config), time, SystemRandom(), LIMITS)
    try:
        version = await store.version()
        began_s = time.monotonic_s()
        lease = await store.grant(LEASE_TTL_S)
        await store.revoke(lease.id)
        return version, (time.monotonic_s() - began_s) / 2
    finally:
        await store.close()
