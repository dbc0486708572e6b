"""Secrets' files: who may read them beside the process that is to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sllm_actor.config.private_files import others_may_read, read_private_file
from sllm_actor.errors import ConfigInvalid

ROOT, SERVICE, GROUP = 0, 10001, 10001


def status(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 0, 0, 1, owner, GROUP, 0, 0, 0, 0))


@pytest.mark.parametrize("mode", [0o600, 0o400])
@pytest.mark.parametrize("owner", [ROOT, SERVICE])
def test_a_file_that_its_owner_alone_may_read_is_private(mode: int, owner: int) -> None:
    assert not others_may_read(status(mode, owner), SERVICE)


@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_what_root_hands_to_a_service_may_have_the_groups_bit(mode: int) -> None:
    assert not others_may_read(status(mode, ROOT), SERVICE)


@pytest.mark.parametrize("mode", [0o440, 0o640])
@pytest.mark.parametrize(("owner", "reader"), [(SERVICE, SERVICE), (ROOT, ROOT), (SERVICE, ROOT), (1, SERVICE)])
def test_the_groups_bit_on_any_other_file_is_too_much(mode: int, owner: int, reader: int) -> None:
    assert others_may_read(status(mode, owner), reader)


@pytest.mark.parametrize("mode", [0o444, 0o404, 0o460, 0o450, 0o401])
def test_what_root_hands_over_may_have_no_other_bit(mode: int) -> None:
    assert others_may_read(status(mode, ROOT), SERVICE)


def test_a_file_that_others_may_read_is_refused_by_name_and_a_private_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("of sixteen bytes")
    path.chmod(0o600)
    assert read_private_file(str(path), "knob", 100) == "of sixteen bytes"
    path.chmod(0o604)
    with pytest.raises(ConfigInvalid, match=rf"knob: others may read {path}; chmod 600 it"):
        read_private_file(str(path), "knob", 100)
