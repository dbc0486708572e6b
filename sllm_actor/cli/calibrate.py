"""`sllm-node calibrate`: measure the disk of the data folder, and keep what was found there for the node."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import typer
from rich.markup import escape

from sllm_actor.cli.exit_codes import ExitCode
from sllm_actor.cli.show import err, out, print_json, table
from sllm_actor.config import Config
from sllm_actor.loader.calibration import STEPS, OnStep, Options, calibrate
from sllm_actor.loader.device_profile import DeviceProfile, write_profile
from sllm_actor.node.data_folder import DataFolder
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.units import format_bytes, format_rate


def run(config: Config, size_bytes: int, seconds: float, *, as_json: bool) -> None:
    """Measure, store and print a profile. SIGTERM and Ctrl-C end it, and then nothing is stored."""
    options = Options(size_bytes, seconds, config.chunk_bytes, config.huge_pages, config.io_uring)
    # A running node would disturb the measurements, and they its loads.
    folder = DataFolder.open(Path(config.data_dir).expanduser().absolute())
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _progress(shown=not as_json) as on_step:
            profile = calibrate(folder.path, options, SystemClock(), on_step)
        path = write_profile(folder.path, profile)
    except KeyboardInterrupt:
        err.print("stopped: nothing was stored")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        folder.close()
    if as_json:
        print_json({"path": str(path), "profile": msgspec.to_builtins(profile)})
    else:
        _print(path, profile)


@contextmanager
def _progress(*, shown: bool) -> Iterator[OnStep]:
    """Show the measurement that is under way, and how many are left, on the terminal's error stream."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # How long it takes is known from all the measurements so far: each is about as long.
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left  {task.description}"))
    with Progress(*columns, console=err, transient=True, disable=not shown, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=STEPS)

        def on_step(label: str, done: int, of: int) -> None:
            progress.update(task, description=label, completed=done, total=of)

        yield on_step


def _print(path: Path, profile: DeviceProfile) -> None:
    device = profile.device
    size = f", {format_bytes(device.size_bytes)}" if device.size_bytes else ""
    out.print(f"[bold]{escape(device.source)}[/bold] ({escape(device.kind)}{size}), read by {profile.reader}")
    if not profile.direct:
        out.print("this file system has no direct reads and writes: what follows is what its buffered ones gave")
    writes = {row.threads: row.bytes_per_s for row in profile.writes}
    table(
        ("THREADS", "READ", "WRITE"),
        [(str(row.threads), _rate(row.bytes_per_s), _rate(writes.get(row.threads, 0.0))) for row in profile.reads],
    )
    out.print()
    table(
        ("READING", "BESIDE WRITING", "READ", "WRITE", "WRITES' SHARE"),
        [
            (
                str(row.reading_threads), str(row.writing_threads), _rate(row.read_bytes_per_s),
                _rate(row.write_bytes_per_s), f"{row.write_share:.0%}",
            )
            for row in profile.together
        ],
    )  # fmt: skip
    out.print()
    best = f"reading threads that are best: {profile.reading_threads}"
    out.print(f"{best}; stored in {escape(str(path))} for the node's next start")


def _rate(bytes_per_s: float) -> str:
    return format_rate(bytes_per_s, 1.0)
