"""docs/checkpoint_format.md against the code: its worked example is made anew and compared byte by byte."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import msgspec
import pytest
from converted import Described, stock_folder

from sllm_actor.checkpoint import manifest as manifests
from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.layout import DATA_ALIGNMENT_BYTES, TENSOR_ALIGNMENT_BYTES
from sllm_actor.checkpoint.manifest import Manifest

PAGE = (Path(__file__).parent.parent / "docs/checkpoint_format.md").read_text()
# In the order in which the page says that the original has them.
EXAMPLE: dict[str, Described] = {
    "bias": ("U8", [3], bytes([1, 2, 3])),
    "weight": ("F32", [4, 4], bytes(range(64))),
    "scale": ("BF16", [2], bytes([0x80, 0x3F, 0x00, 0x40])),
}


def block(language: str, number: int = 0) -> str:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return found[number]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("example")
    source = stock_folder(place / "original", EXAMPLE, config={"model_type": "opt"})
    return convert(source, place / "target", chunk_bytes=4096).path


def test_the_bytes_on_the_page_are_those_of_the_file(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    shown = bytearray(len(raw))
    seen = 0
    for line in block("hex").splitlines():
        at, *values = line.split("|")[0].split()
        for k, value in enumerate(values):
            shown[int(at, 16) + k] = int(value, 16)
            seen += 1
    header = block("header").rstrip("\n").encode()
    shown[8 : 8 + len(header)] = header
    shown[8 + len(header) : 4096] = b" " * (4096 - 8 - len(header))
    assert bytes(shown) == raw
    assert seen == 8 + len(raw) - 4096


def test_the_manifest_on_the_page_is_that_of_the_folder(folder: Path) -> None:
    assert block("json") == (folder / "sllm.json").read_text()


def test_the_model_id_is_computed_as_the_page_says(folder: Path) -> None:
    scope: dict[str, object] = {}
    program = compile(block("python"), "page", "exec")
    text = (folder / "sllm.json").read_text()
    exec(program, {"json": json, "hashlib": hashlib, "text": text}, scope)
    assert scope["model_id"] == json.loads(text)["model_id"]


def test_every_field_and_bound_is_on_the_page() -> None:
    structs = (Manifest, manifests.FileRecord, manifests.OtherRecord, manifests.Partition, manifests.Origin)
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            assert f"`{field.name}`" in PAGE, f"{struct.__name__}.{field.name}"
    for kind in (*manifests.PartitionKind, *manifests.OriginFormat):
        assert f"`{kind.value}`" in PAGE
    for bound in (
        DATA_ALIGNMENT_BYTES, TENSOR_ALIGNMENT_BYTES, manifests.MAX_PARTITIONS, manifests.MAX_MANIFEST_BYTES,
        manifests.MAX_DIGESTS, manifests.MAX_OTHER_FILES, manifests.MIN_CHUNK_BYTES, manifests.MAX_CHUNK_BYTES,
        manifests.DEFAULT_CHUNK_BYTES,
    ):  # fmt: skip
        assert f"{bound:,}" in PAGE, bound
