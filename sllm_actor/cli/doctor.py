"""`sllm-node doctor`: what this machine offers a node, what is wrong, and how to mend it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from rich.text import Text

from sllm_actor.cli import running, surroundings
from sllm_actor.cli.exit_codes import ExitCode
from sllm_actor.cli.findings import Finding
from sllm_actor.cli.fitting import Column
from sllm_actor.cli.show import out, print_json, table
from sllm_actor.config import Config, Resolved
from sllm_actor.config.load import knobs
from sllm_actor.errors import SllmError
from sllm_actor.frontend.server import bind
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.device_profile import read_profile
from sllm_actor.loader.libc import huge_page_refusal, io_uring_refusal
from sllm_actor.loader.memory import available_bytes, reserved_bytes
from sllm_actor.node.data_folder import DataFolder
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.units import GIB, KIB, MIB, format_bytes, format_rate

MIN_OPEN_FILES = 4096
HUGE_PAGE_BYTES = 2 * MIB
CALIBRATE = "sllm-node calibrate, with the node stopped"
COLORS = {"ok": "green", "warning": "yellow", "error": "red"}
# From the best to the worst.
BY_LEVEL = {"ok": ExitCode.DONE, "warning": ExitCode.WARNINGS, "error": ExitCode.REFUSED}


def _python(_: Config) -> Finding:
    found = f"{platform.python_version()} on {platform.machine()}"
    if sys.platform != "linux":
        return Finding("python", "error", f"{found}, {sys.platform}", "use Linux")
    return Finding("python", "ok", found)


def _packages(_: Config) -> Finding:
    try:
        found = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "transformers", "uvloop"))
    except PackageNotFoundError as error:
        return Finding("packages", "error", f"{error.name} is missing", "pip install sllm_actor")
    return Finding("packages", "ok", found)


def _native(_: Config) -> Finding:
    try:
        native = use_native()
    except SllmError as error:
        return Finding("native loader", "error", error.message, "install with a C++ compiler at hand")
    if native:
        return Finding("native loader", "ok", "built")
    return Finding(
        "native loader", "warning", "not in use: the portable reader loads", "install without SLLM_NO_NATIVE"
    )


def _memory(config: Config) -> Finding:
    available = available_bytes()
    found = f"{format_bytes(config.host_pool_bytes)} wanted for the host pool, {format_bytes(available)} free"
    if config.host_pool_bytes > available:
        return Finding("host memory", "error", found, "lower host_pool_bytes, or free memory")
    return Finding("host memory", "ok", found)


def _memlock(config: Config) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not config.lock_host_pool or soft == resource.RLIM_INFINITY or soft >= config.host_pool_bytes:
        return Finding("memory locking", "ok", "the pool can be locked" if config.lock_host_pool else "not wanted")
    return Finding(
        "memory locking", "warning", f"the limit is {format_bytes(soft)}: the pool may be swapped out",
        "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service unit",
    )  # fmt: skip


def _huge_pages(config: Config) -> Finding:
    if not config.huge_pages:
        return Finding("huge pages", "ok", "not wanted")
    needed, free = -(-config.host_pool_bytes // HUGE_PAGE_BYTES), reserved_bytes() // HUGE_PAGE_BYTES
    if free >= needed:
        return Finding("huge pages", "ok", f"{free} are reserved and free; the pool takes {needed}")
    refused = huge_page_refusal()
    if not refused:
        return Finding("huge pages", "ok", "the kernel puts them together")
    return Finding(
        "huge pages", "warning", f"{free} are reserved and free of {needed}, and the kernel makes none: {refused}",
        f"a kernel of 6.1 or later, or sysctl vm.nr_hugepages={needed}",
    )  # fmt: skip


def _io_uring(config: Config) -> Finding:
    if not config.io_uring:
        return Finding("io_uring", "ok", "not wanted")
    refused = io_uring_refusal()
    if not refused:
        return Finding("io_uring", "ok", "allowed")
    return Finding(
        "io_uring", "warning", f"{refused}: files are read by pread, which takes more processor time",
        "sysctl kernel.io_uring_disabled=0, and a seccomp profile of the container that allows it",
    )  # fmt: skip


def _open_files(_: Config) -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard >= MIN_OPEN_FILES or hard == resource.RLIM_INFINITY:
        return Finding("open files", "ok", f"limit {hard}")
    return Finding("open files", "warning", f"limit {hard}", f"ulimit -Hn {MIN_OPEN_FILES} or more")


def _port(config: Config) -> Finding:
    try:
        bind(config.host, config.port, has_key=bool(config.api_key_file)).close()
    except SllmError as error:
        return Finding("port", "error", error.message, "choose another with --port, or --host 127.0.0.1")
    return Finding("port", "ok", f"{config.host}:{config.port} is free")


def _data_folder(config: Config) -> Finding:
    path = Path(config.data_dir).expanduser().absolute()
    try:
        DataFolder.open(path).close()
    except SllmError as error:
        return Finding("data folder", "error", error.message, "choose another with --data-dir")
    return Finding("data folder", "ok", str(path))


def _copies(config: Config) -> Finding:
    path = Path(config.data_dir).expanduser().absolute()
    disk = os.statvfs(next(folder for folder in (path, *path.parents) if folder.exists()))
    free_bytes = disk.f_bavail * disk.f_frsize
    held_bytes = sum(file.stat().st_blocks * 512 for file in (path / "ssd").rglob("*") if file.is_file())
    quota, free, held = map(format_bytes, (config.ssd_quota_bytes, free_bytes, held_bytes))
    found = f"a quota of {quota}; {held} are used, {free} free"
    if config.ssd_quota_bytes > free_bytes + held_bytes:
        return Finding("disk for copies", "warning", found, "lower ssd_quota_bytes, or free the disk")
    return Finding("disk for copies", "ok", found)


def _direct_io(config: Config) -> Finding:
    path = Path(config.data_dir).expanduser() / "doctor.probe"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError as error:
        # What has no O_DIRECT refuses it after it has made the file.
        with suppress(OSError):
            path.unlink()
        return Finding("direct reads", "warning", f"refused: {error.strerror}", "put models on ext4 or xfs")
    path.unlink(missing_ok=True)
    os.close(fd)
    return Finding("direct reads", "ok", "O_DIRECT works where the data folder lies")


def _disk_profile(config: Config) -> Finding:
    try:
        profile = read_profile(Path(config.data_dir).expanduser().absolute())
    except SllmError as error:
        return Finding("disk profile", "warning", f"not used: {error.message}", CALIBRATE)
    if profile is None:
        found = "none: how many threads read this disk best, and what it writes, is assumed"
        return Finding("disk profile", "warning", found, CALIBRATE)
    days = int(profile.age_s(SystemClock().wall_s()) // 86400)
    age = "less than a day old" if days == 0 else f"{days} day{'s' * (days > 1)} old"
    rates = f"reads {format_rate(profile.read_bytes_per_s, 1)}, writes {format_rate(profile.write_bytes_per_s, 1)}"
    threads = f"{profile.reading_threads} reading threads are best"
    chosen = f", and {config.reading_threads} are set" if config.reading_threads else ""
    return Finding("disk profile", "ok", f"{age}: {rates}; {threads}{chosen}")


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    _python, _packages, _native, _memory, _memlock, _huge_pages, _io_uring, _open_files, _port, _data_folder,
    _copies, _direct_io, _disk_profile, surroundings.driver, surroundings.clock, surroundings.metadata,
)  # fmt: skip


def _findings(config: Config) -> list[Finding]:
    holder = running.serving_on(config)
    findings = [running.running(holder), *(check(config) for check in CHECKS)]
    return findings if holder is None else [running.beside(holder, finding, config) for finding in findings]


def report(resolved: Resolved, *, as_json: bool) -> ExitCode:
    """Run every check, print the findings and the knobs, and give what the worst finding amounts to."""
    findings = _findings(resolved.config)
    worst = max((BY_LEVEL[finding.level] for finding in findings), key=list(BY_LEVEL.values()).index)
    values = [
        (
            knob.name,
            getattr(resolved.config, knob.name),
            knob.unit,
            resolved.origin[knob.name],
            knob.description,
        )
        for knob in knobs()
    ]
    if as_json:
        keys = ("name", "value", "unit", "origin", "description")
        shown = [dict(zip(keys, value, strict=True)) for value in values]
        for knob in shown:
            if knob["value"] == float("inf"):
                knob["value"] = "forever"
        print_json(
            {
                "healthy": worst is not ExitCode.REFUSED,
                "checks": [finding._asdict() for finding in findings],
                "knobs": shown,
            }
        )
        return worst
    table(
        (Column("CHECK"), Column(""), "FOUND", "TO MEND IT"),
        [
            (finding.check, Text(finding.level, COLORS[finding.level]), finding.found, finding.mend)
            for finding in findings
        ],
    )
    out.print()
    table(
        (Column("KNOB"), Column("VALUE"), Column("UNIT", 1), "FROM", Column("WHAT", 2, wraps=True)),
        [(name, _shown(value, unit), unit, origin, description) for name, value, unit, origin, description in values],
    )
    return worst


def _shown(value: object, unit: str) -> str:
    """Write a value as `--set` takes it, bytes with a unit where that is exact."""
    if unit == "bytes" and isinstance(value, int) and value:
        for factor, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
            if value % factor == 0:
                return f"{value // factor}{name}"
    return str(value)
