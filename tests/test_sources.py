"""Sources: which words of a user name a local folder, and which don't."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm_actor.errors import SourceInvalid
from sllm_actor.sources.folder import resolve


def test_a_path_a_file_url_and_a_builtin_name_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    for source in (str(folder), folder.as_uri(), f"file://localhost{folder}", "builtin:demo"):
        assert resolve(source, {"demo": folder}) == folder


def test_a_home_a_relative_path_and_a_link_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("~/link", "link", "./link/../link"):
        assert resolve(source, {}) == tmp_path / "real"


def test_a_folder_that_does_not_exist_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    assert resolve(str(tmp_path / "nowhere"), {}) == tmp_path / "nowhere"


@pytest.mark.parametrize("source", ["http://x/y", "hf://org/name", "s3://bucket/key", "HTTPS://x"])
def test_any_other_scheme_is_refused_as_not_yet_supported(source: str) -> None:
    with pytest.raises(SourceInvalid, match="only folders are supported") as refused:
        resolve(source, {})
    assert refused.value.param == "source"


@pytest.mark.parametrize("source", ["", "  ", "a\0b", "a\nb", "\x7f", "file:///a%00b", "x" * 4097])
def test_a_source_that_is_no_text_for_a_path_is_refused(source: str) -> None:
    with pytest.raises(SourceInvalid):
        resolve(source, {})


@pytest.mark.parametrize("source", ["file://host/a", "file://", "file:///a?b=c", "file:///a#b"])
def test_a_file_url_that_is_not_a_local_path_is_refused(source: str) -> None:
    with pytest.raises(SourceInvalid, match="form file:///"):
        resolve(source, {})


def test_an_unknown_builtin_is_refused_with_those_known(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match="'other'; there are: demo"):
        resolve("builtin:other", {"demo": tmp_path})


def test_a_home_of_nobody_and_a_loop_of_links_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid):
        resolve("~no-such-user-here/x", {})
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceInvalid):
        resolve(str(tmp_path / "loop"), {})
