"""Everything of ours that a later release must still read, as this one writes it.

`tests/golden/VERSION` has what that release wrote; it is never written anew once the release is out. Before that,
`PYTHONPATH=tests python tests/golden_files.py tests/golden/VERSION` writes it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import golden_frames
import msgspec
from converted import Described, stock_folder

from sllm_actor.checkpoint import manifest
from sllm_actor.checkpoint.convert import convert
from sllm_actor.loader import device_profile, native, ssd_record
from sllm_actor.loader.ssd_record import PlannedFile
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.messages.between_nodes import BETWEEN_NODES
from sllm_actor.metadata import SqliteStore, sqlite
from sllm_actor.runtime import SystemClock, handshake
from sllm_actor.sources.peer_messages import PEER_MESSAGES
from sllm_actor.units import MIB

GOLDEN = Path(__file__).parent / "golden"
QUOTA_BYTES = 64 * MIB
SSD_KEY = "https://models.example.org/golden/"
FACTS = {"models/demo": b'{"name": "demo"}', "models/\u00e9": bytes(range(256)), "cordons/node-2": b""}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 4,
}  # fmt: skip
# Of a schema: what is said of it, and what follows from the rest.
PROSE = {"title", "description", "additionalProperties", "required"}
KINDS: dict[str, dict[str, Any]] = {"none": {}, "layers": {"partitions": 2}, "tensor_parallel": {"tensor_parallel": 2}}


def versions() -> dict[str, int]:
    """Give the number of each format that this program writes."""
    return {
        "protocol": handshake.VERSION_MAX,
        "checkpoint": manifest.FORMAT_VERSION,
        "ssd_tier": ssd_record.FORMAT_VERSION,
        "metadata": sqlite.LAYOUT,
        "disk_profile": device_profile.FORMAT_VERSION,
        "native_library": native.ABI_VERSION,
    }


def tensors() -> dict[str, Described]:
    """Give a llama of two layers: BF16, F32 where it is a norm, bytes that tell where they were."""
    shapes = {"model.embed_tokens.weight": [4, 4]}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [4, 4] for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": [4, 4] for name in ("gate", "up", "down")}
        shapes |= {f"{at}.{name}_layernorm.weight": [4] for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": [4], "lm_head.weight": [4, 4]}
    made: dict[str, Described] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        dtype, width = ("F32", 4) if "norm" in name else ("BF16", 2)
        size = width * shape[0] * (shape[1] if len(shape) > 1 else 1)
        made[name] = (dtype, shape, bytes((number * 17 + k * 7) % 251 for k in range(size)))
    return made


def messages() -> str:
    """Give what messages between nodes consist of, without what is said of them."""
    _, schemas = msgspec.json.schema_components(
        (*BETWEEN_NODES, *PEER_MESSAGES), schema_hook=lambda kind: {"type": kind.__name__}
    )
    lines = (
        f'"{name}":{json.dumps(_bare(schemas[name]), sort_keys=True, separators=(",", ":"))}'
        for name in sorted(schemas)
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _bare(value: Any) -> Any:
    """Leave out what is prose, and shorten what only names a type."""
    if isinstance(value, dict) and len(value) == 1 and {"type", "$ref"} & value.keys():
        (kind,) = value.values()
        return kind.rpartition("/")[2] if isinstance(kind, str) else kind
    if isinstance(value, dict):
        return {name: _bare(part) for name, part in value.items() if name not in PROSE}
    return [_bare(part) for part in value] if isinstance(value, list) else value


def write_checkpoints(folder: Path) -> None:
    """Convert the llama in each of the ways that there are."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as place:
        source = stock_folder(Path(place) / "original", tensors(), config=CONFIG)
        for kind, options in KINDS.items():
            convert(source, folder / kind, chunk_bytes=4096, **options)


async def write_ssd(folder: Path, source: Path) -> None:
    """Bring a converted folder into an SSD tier, as a pull does, and leave what is there when it is closed."""
    tier = await SsdTier.open(folder, QUOTA_BYTES, SystemClock())
    raw = (source / "model.safetensors").read_bytes()
    smalls = {name: (source / name).read_bytes() for name in ("config.json", "sllm.json")}
    partial = await tier.begin(SSD_KEY, [PlannedFile("model.safetensors", len(raw), "v1")], smalls, 4096)
    for place in list(partial.missing()):
        await partial.write(*place, memoryview(raw)[place.chunk * 4096 :][:4096])
    entry = await partial.publish()
    await tier.pin(entry.model_id)
    await tier.close()


async def write_metadata(path: Path) -> None:
    """Write the facts with the store of this program, and keep the file as SQL: text, whole, with its marks."""
    with tempfile.TemporaryDirectory() as place:
        store = await SqliteStore.open(Path(place) / "m.db")
        for key, value in FACTS.items():
            await store.put(key, value)
        await store.close()
        with closing(sqlite3.connect(Path(place) / "m.db")) as file:
            marks = [f"PRAGMA {name}={file.execute(f'PRAGMA {name}').fetchone()[0]};" for name in MARKS]
            path.write_text("\n".join([*marks, *file.iterdump()]) + "\n")


MARKS = ("application_id", "user_version")


def write(folder: Path) -> None:
    """Write all that this program writes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    (folder / "frames.json").write_text(golden_frames.written())
    (folder / "messages.json").write_text(messages())
    write_checkpoints(folder / "checkpoints")
    asyncio.run(write_ssd(folder / "ssd", folder / "checkpoints/none"))
    asyncio.run(write_metadata(folder / "metadata.sql"))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
