"""Which kind of source a user's words name."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import OPTIONS

from sllm_actor.errors import SourceInvalid
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.hub import HubSource
from sllm_actor.sources.open import is_local, open_source
from sllm_actor.sources.source import Source


class FolderOpened(Exception):
    """Holds the folder that was to be opened."""


def refuse(folder: Path) -> Source:
    raise FolderOpened(folder)


@pytest.mark.parametrize(
    ("text", "kind", "url"),
    [
        ("http://Host/m", HttpSource, "http://host/m/"),
        ("HTTPS://host/m/", HttpSource, "https://host/m/"),
        ("hf://org/model", HubSource, "hf://org/model"),
        ("hf:org/model@v1", HubSource, "hf://org/model@v1"),
    ],
)
async def test_a_scheme_names_its_kind_of_source(text: str, kind: type, url: str) -> None:
    source = open_source(text, OPTIONS, {}, refuse)
    assert type(source) is kind
    assert source.url == url
    assert not is_local(text)
    await source.close()


def test_paths_and_builtin_models_are_folders(tmp_path: Path) -> None:
    for text in (str(tmp_path), tmp_path.as_uri(), "builtin:demo"):
        assert is_local(text)
        with pytest.raises(FolderOpened) as opened:
            open_source(text, OPTIONS, {"demo": tmp_path}, refuse)
        assert opened.value.args == (tmp_path,)


def test_an_unknown_scheme_is_refused_with_those_known() -> None:
    with pytest.raises(
        SourceInvalid, match=r"ftp://; there are: builtin, file, hf, http, https, s3, and a path"
    ) as refused:
        open_source("ftp://user:hunter2@host/x", OPTIONS, {}, refuse)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("text", ["", " ", "a\0b", "x" * 5000, "http://", "hf:"])
def test_what_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(SourceInvalid):
        open_source(text, OPTIONS, {}, refuse)
