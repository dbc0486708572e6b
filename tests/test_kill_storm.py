"""The kill storm in small, and that it would notice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STORM = "sllm_actor.testing.kill_storm"


def storm(folder: Path, *, points: int, seed: int, spoil: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a process without threads, which is what may fork; `spoil` is code that breaks the node first."""
    program = f"{spoil}\nfrom {STORM} import main\nmain()"
    arguments = [f"--points={points}", f"--seed={seed}", f"--folder={folder}"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_kills_at_random_moments_leave_nothing_torn_lost_or_stray(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    ran = storm(memory if os.access(memory, os.W_OK) else tmp_path, points=40, seed=2)
    assert ran.returncode == 0, ran.stderr
    assert "40 points of seed 2" in ran.stdout and ran.stdout.endswith("nothing torn or lost\n")


@pytest.mark.parametrize(
    ("spoil", "noticed", "seed"),
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
""", "torn: ", 3),
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
""", "should have|torn: |has an invalid safetensors header", 3),
        # Pins that only this process knows.
        ("""
from sllm_actor.loader import ssd_files
ssd_files.mark = lambda path, present: None
""", "no longer pinned", 3),
        # A start that finds nothing good enough.
        ("""
from sllm_actor.errors import CheckpointInvalid
from sllm_actor.loader import ssd_layout
def refuse(path):
    raise CheckpointInvalid("not good enough")
ssd_layout._find_model = refuse
""", "lost: ", 3),
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
""", "torn: the card of ", 3),
        # A card that goes a moment before its registration does.
        ("""
import asyncio
from sllm_actor.actors.registry import MODELS, Registry
async def remove(self, name):
    model = self._models.pop(name)
    self._look_again()
    await self._sweep()
    await asyncio.sleep(0.02)
    await self._store.delete(MODELS + name)
    self._wanted.pop(name, None)
    return model
Registry.remove = remove
""", "torn: the card of ", 5),
        # Registrations that only this process knows.
        ("""
from sllm_actor.actors.shared_models import SharedModels
async def put(self, model):
    return
SharedModels.put = put
""", ": None, and should be ", 3),
    ],
    ids=["torn", "unverified", "unpinned", "picky", "card-in-place", "card-first", "unstored"],
)  # fmt: skip
def test_the_storm_notices_a_node_that_is_not_crash_safe(tmp_path: Path, spoil: str, noticed: str, seed: int) -> None:
    # It ends with the first thing that it notices; threads decide when that is, and the seed.
    ran = storm(tmp_path, points=200, seed=seed, spoil=spoil)
    assert ran.returncode == 1, ran.stdout
    assert f"seed {seed}, point" in ran.stderr and re.search(noticed, ran.stderr)
