"""Machines that a simulation can be made of, and how long models take on them: published figures, and what is assumed.

A step of decoding reads every weight once, so it takes bytes / memory bandwidth; a prompt's token costs two operations
a weight. Neither is ever reached in full: DECODE_SHARE and PREFILL_SHARE are what is assumed of both.
"""

from __future__ import annotations

import msgspec

from sllm_actor.testing.simulated_engine import Speed
from sllm_actor.units import GIB

# Of the memory's bandwidth while decoding one request, and of the dense 16-bit operations while prompts are read.
DECODE_SHARE, PREFILL_SHARE = 0.6, 0.5
# What the others leave of a disk's or a network's bandwidth. Safetensors reads 3.6 to 4.7 times slower than
# ServerlessLLM's loader on one disk (OSDI '24), which uses all of it.
SAFETENSORS_SHARE = 1 / 4
# A pod until its server's libraries are imported. Assumed: a cold import of torch and transformers takes 8.6 s on the
# machine where this was written, and a pod takes some seconds to be scheduled.
CONTAINER_S = 12.0
# An engine's other work at a start: its context is warm, its skeleton is there.
ATTACH_S = 0.1


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator: its memory, how fast that is, 16-bit operations a second (dense), and how fast it is filled."""

    memory_bytes: int
    memory_bytes_per_s: float
    flops: float
    copy_bytes_per_s: float


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A server with so many `devices`; an SSD and a network that are read at these rates."""

    device: str
    devices: int
    host_pool_bytes: int
    ssd_bytes: int
    ssd_bytes_per_s: float
    remote_bytes_per_s: float


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A model's size: parameters, and bytes of its checkpoint."""

    parameters: int
    size_bytes: int


# Memory and its bandwidth, operations: NVIDIA's data sheets of RTX A5000, A40, H100 SXM and H200 SXM (dense, without
# sparsity). Copies from pinned host memory: 25 GB/s of PCIe 4.0 x16's 31.5, 55 of PCIe 5.0 x16's 63, as is usual.
DEVICES = {
    "a5000": Device(memory_bytes=24 * GIB, memory_bytes_per_s=768e9, flops=111e12, copy_bytes_per_s=25e9),
    "a40": Device(memory_bytes=48 * GIB, memory_bytes_per_s=696e9, flops=149.7e12, copy_bytes_per_s=25e9),
    "h100": Device(memory_bytes=80 * GIB, memory_bytes_per_s=3.35e12, flops=989e12, copy_bytes_per_s=55e9),
    "h200": Device(memory_bytes=141 * GIB, memory_bytes_per_s=4.8e12, flops=989e12, copy_bytes_per_s=55e9),
}
# A usual server of eight, four disks of 6 GB/s as RAID 0, 100 Gbit/s.
_LARGE = Machine(
    device="h100", devices=8, host_pool_bytes=1536 * 10**9, ssd_bytes=15 * 10**12, ssd_bytes_per_s=24e9,
    remote_bytes_per_s=12.5e9,
)  # fmt: skip
# The paper's two testbeds (OSDI '24, section 7.1): one server with 8 A5000, 1 TB of memory and two PCIe 4.0 NVMe disks
# as RAID 0 (12 GB/s), 1 Gbit/s to where models are stored; and four servers with 4 A40 each, 512 GB of
# memory, a 2 TB PCIe 4.0 NVMe disk (taken as half of that RAID), 10 Gbit/s. A quarter of memory is left to everything
# else.
MACHINES = {
    "a5000": Machine(
        device="a5000", devices=8, host_pool_bytes=768 * 10**9, ssd_bytes=4 * 10**12, ssd_bytes_per_s=12e9,
        remote_bytes_per_s=0.125e9,
    ),
    "a40": Machine(
        device="a40", devices=4, host_pool_bytes=384 * 10**9, ssd_bytes=2 * 10**12, ssd_bytes_per_s=6e9,
        remote_bytes_per_s=1.25e9,
    ),
    "h100": _LARGE,
    "h200": msgspec.structs.replace(_LARGE, device="h200"),
}  # fmt: skip
# Parameters as the published configurations give them, two bytes each.
SHAPES = {
    name: Shape(parameters=parameters, size_bytes=2 * parameters)
    for name, parameters in {
        "opt-1.3b": 1_315_758_080,
        "opt-2.7b": 2_651_596_800,
        "opt-6.7b": 6_658_473_984,
        "opt-13b": 12_853_473_280,
        "opt-30b": 29_974_540_288,
        "opt-66b": 65_719_701_504,
        "llama-2-7b": 6_738_415_616,
        "llama-2-13b": 13_015_864_320,
    }.items()
}


def devices_for(shape: Shape, device: Device) -> int:
    """Count the devices that a model needs: nine tenths of their memory are for weights, the rest for its answers."""
    return -(-shape.size_bytes * 10 // (device.memory_bytes * 9))


def speed_of(shape: Shape, device: Device, devices: int, tokens_a_turn: int) -> Speed:
    """Tell how fast a model computes on so many devices, and how long its weights take to come there."""
    return Speed(
        attach_s=ATTACH_S,
        copy_s=shape.size_bytes / (device.copy_bytes_per_s * devices),
        prefill_s_per_token=2 * shape.parameters / (device.flops * PREFILL_SHARE * devices),
        step_s=shape.size_bytes / (device.memory_bytes_per_s * DECODE_SHARE * devices),
        row_s=0.0,
        tokens_a_turn=tokens_a_turn,
    )
