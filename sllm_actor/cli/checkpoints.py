"""The verbs that work on checkpoint folders without a node: `convert` and `verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sllm_actor.cli.show import err, out, print_json
from sllm_actor.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from sllm_actor.checkpoint.convert import Conversion
    from sllm_actor.checkpoint.verify import Verification

OnProgress = Callable[[int, int], None]


@contextmanager
def progress_bar(label: str, *, shown: bool) -> Iterator[OnProgress]:
    """Show bytes, rate and time left on the terminal's error stream; nothing where `shown` is false."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not shown or not err.is_terminal) as progress:
        task = progress.add_task(label, total=None)

        def report(done_bytes: int, total_bytes: int) -> None:
            progress.update(task, completed=done_bytes, total=total_bytes)

        yield report


def chunk_size(text: str) -> int:
    """Read `--chunk-bytes`.

    Raises:
        typer.BadParameter: it is no size.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def run_convert(
    source: Path, target: Path, partitions: int, tensor_parallel: int, chunk_bytes: int, *, replace: bool, as_json: bool
) -> None:
    """Convert and say what was made."""
    from sllm_actor.checkpoint.convert import convert

    with progress_bar("converting", shown=not as_json) as on_progress:
        made = convert(
            source, target, partitions=partitions, tensor_parallel=tensor_parallel, replace=replace,
            chunk_bytes=chunk_bytes, on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        print_json(_conversion(made))
        return
    partition = made.manifest.partition
    files = f"{partition.count} files by {partition.kind}" if partition.count > 1 else "one file"
    facts = f"{made.tensors} tensors, {format_bytes(made.size_bytes)}, {files}"
    out.print(f"converted to [bold]{escape(str(made.path))}[/bold]: {facts}")
    out.print(f"model id {made.manifest.model_id}")


def run_verify(folder: Path, *, as_json: bool) -> None:
    """Verify and say what was checked."""
    from sllm_actor.checkpoint.verify import verify

    with progress_bar("verifying", shown=not as_json) as on_progress:
        found = verify(folder, on_progress)
    if as_json:
        print_json(_verification(found))
    elif found.model_id is None:
        out.print(
            f"{escape(str(found.path))}: headers and index are in order; there are no digests to compare "
            f"{format_bytes(found.size_bytes)} with ('sllm-node convert' adds them)"
        )
    else:
        out.print(
            f"{escape(str(found.path))}: every byte of {format_bytes(found.size_bytes)} in {found.files} files "
            "is as it was written"
        )
        out.print(f"model id {found.model_id}")


def _conversion(made: Conversion) -> dict[str, Any]:
    manifest = made.manifest
    return {
        "path": str(made.path),
        "model_id": manifest.model_id,
        "size_bytes": made.size_bytes,
        "chunk_bytes": manifest.chunk_bytes,
        "files": [file.name for file in manifest.files],
        "partition": {"kind": manifest.partition.kind.value, "count": manifest.partition.count},
        "tensors": made.tensors,
        "pads": made.pads,
        "aliases": len(manifest.aliases),
        "origin": {"format": manifest.origin.format.value, "generation": manifest.origin.generation},
    }


def _verification(found: Verification) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "digests_checked": found.digests,
        "model_id": found.model_id,
        "files": found.files,
        "size_bytes": found.size_bytes,
    }


DEFAULT_CHUNK = "4MiB"
Source = Annotated[Path, typer.Argument(help="A folder with safetensors, .bin or .pt files, or sllm-store's.")]
Target = Annotated[Path, typer.Argument(help="The folder to make.")]
Partitions = Annotated[int, typer.Option("--partitions", min=1, help="Files to spread the layers over.")]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel", min=1, help="Ranks to slice tensors for.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace what an earlier conversion has put there.")]
ChunkBytes = Annotated[str, typer.Option("--chunk-bytes", help="Bytes for each digest: a power of two.")]
