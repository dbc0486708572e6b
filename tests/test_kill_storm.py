"""The kill storm in small, and that it would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

STORM = "sllm_actor.testing.kill_storm"


def storm(folder: Path, *, points: int, seed: int, spoil: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a process without threads, which is what may fork; `spoil` is code that breaks the node first."""
    program = f"{spoil}\nfrom {STORM} import main\nmain()"
    arguments = [f"--points={points}", f"--seed={seed}", f"--folder={folder}"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Give a folder in memory, where there is such: what is killed has nothing to do with how fast a disk is."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


def test_kills_at_random_moments_leave_nothing_torn_lost_or_stray(folder: Path) -> None:
    ran = storm(folder, points=40, seed=2)
    assert ran.returncode == 0, ran.stderr
    assert "40 points of seed 2" in ran.stdout and ran.stdout.endswith("nothing torn or lost\n")


@pytest.mark.parametrize(
    ("spoil", "noticed"),
    [
        # A model that is visible before it is complete.
        ("""
import os
from sllm_actor.loader import ssd_files, ssd_layout
real = ssd_layout.write_record
def early(path, record, now_s):
    real(path, record, now_s)
    with open(path / "model" / record.files[0].name, "r+b") as file:
        file.write(b"torn")
ssd_layout.write_record = early
""", "torn: "),
        # Chunks that are believed although their bytes never came.
        ("""
from sllm_actor.loader import ssd_files, ssd_partial
real = ssd_partial.SsdPartial._write_and_note
def noted_first(self, place, data):
    digests = self.plan.digests(data)
    self._journal.append(place, digests)
    return real(self, place, data)
ssd_partial.SsdPartial._write_and_note = noted_first
from sllm_actor.loader import ssd_layout
ssd_layout.verified = lambda path, plan, noted, expected: dict(noted)
""", "should have"),
        # Pins that only this process knows.
        ("""
from sllm_actor.loader import ssd_files
ssd_files.mark = lambda path, present: None
""", "no longer pinned"),
        # A start that finds nothing good enough.
        ("""
from sllm_actor.errors import CheckpointInvalid
from sllm_actor.loader import ssd_layout
def refuse(path):
    raise CheckpointInvalid("not good enough")
ssd_layout._find_model = refuse
""", "lost: "),
        # A card whose record is written where it lies.
        ("""
import os
import msgspec
from sllm_actor.loader.cards import RECORD_NAME, Card
def in_place(self, model_id):
    self._record = msgspec.structs.replace(self._record, model_id=model_id)
    raw = msgspec.json.encode(self._record)
    with open(self.checkpoint.path / RECORD_NAME, "wb") as file:
        for at in range(0, len(raw), 8):
            file.write(raw[at : at + 8])
            file.flush()
            os.fsync(file.fileno())
Card._learn = in_place
""", "torn: the card of "),
        # A card that goes before its registration does.
        ("""
from sllm_actor.actors.registry import MODELS, Registry
async def remove(self, name):
    model = self._models.pop(name)
    await self._sweep()
    await self._store.delete(MODELS + name)
    self._wanted.pop(name, None)
    return model
Registry.remove = remove
""", "torn: the card of "),
        # Registrations that only this process knows.
        ("""
from sllm_actor.actors.shared_models import SharedModels
async def put(self, model):
    return
SharedModels.put = put
""", ": None, and should be "),
    ],
    ids=["torn", "unverified", "unpinned", "picky", "card-in-place", "card-first", "unstored"],
)  # fmt: skip
def test_the_storm_notices_a_node_that_is_not_crash_safe(folder: Path, spoil: str, noticed: str) -> None:
    # It ends with the first thing that it notices; threads decide when that is.
    ran = storm(folder, points=200, seed=7, spoil=spoil)
    assert ran.returncode == 1, ran.stdout
    assert "seed 7, point" in ran.stderr and noticed in ran.stderr
