"""A model of the Hugging Face Hub, pinned to one commit.

huggingface_hub finds the commit, its files and the token; the bytes come through our own reader.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from aiohttp.abc import AbstractResolver
from yarl import URL

from sllm_actor.domain.sentence_modules import MAX_MODULES_BYTES, MODULES_NAME, pooling_name_in
from sllm_actor.errors import (
    SllmError,
    SourceChanged,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.addresses import is_private
from sllm_actor.sources.http_client import HttpClient
from sllm_actor.sources.http_reader import HttpReader
from sllm_actor.sources.http_url import parse_folder
from sllm_actor.sources.listing import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    WEIGHTS_NAME,
    how_to_convert,
    shards_in_index,
    sizes_in_manifest,
)
from sllm_actor.sources.source import MAX_FILES, MAX_SIZE_BYTES, SourceFile, SourceOptions, belongs_below

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAMED = re.compile(rf"hf:(?://)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_.][A-Za-z0-9_./-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PICKLED = re.compile(r".*\.(?:bin|pt|pth|ckpt)")
DEFAULT_REVISION = "main"
_HINT = "; the token is taken from HF_TOKEN or `hf auth login`"


class _Snapshot(NamedTuple):
    """What a commit holds: size and digest by name."""

    commit: str
    files: dict[str, tuple[int, str]]
    pickled: str


class HubSource:
    """The checkpoint at `hf://OWNER/NAME[@REVISION]`. The last two parameters are for tests."""

    def __init__(
        self,
        text: str,
        options: SourceOptions,
        *,
        resolver: AbstractResolver | None = None,
        private: Callable[[str], bool] = is_private,
    ) -> None:
        """Take the name apart; nothing is asked yet.

        Raises:
            SourceInvalid: it is no name of a model, or HF_ENDPOINT is no URL.
        """
        named = _NAMED.fullmatch(text)
        if named is None or ".." in text or "--" in named["repo"]:
            raise SourceInvalid(
                "a model of the Hub is named hf://OWNER/NAME or hf://OWNER/NAME@REVISION", param="source"
            )
        self._repo = named["repo"]
        self._revision = named["revision"] or DEFAULT_REVISION
        self._options = options
        self._endpoint = _endpoint()
        self._client = HttpClient(
            self._endpoint,
            options,
            credentials=_authorization,
            hint=_HINT,
            any_host=True,
            resolver=resolver,
            private=private,
        )
        self._reader = HttpReader(self._client, options)

    @property
    def url(self) -> str:
        """The name of the model, with the revision where it is not the default one."""
        return f"hf://{self._repo}" + (f"@{self._revision}" if self._revision != DEFAULT_REVISION else "")

    @property
    def parallel(self) -> int:
        """How many reads at once are of use."""
        return self._reader.parallel

    async def files(self) -> tuple[SourceFile, ...]:
        """List the safetensors of the revision's commit, JSON and what its tokenizer needs; of subfolders, a pooling.

        The validator of a file has the commit, and the digest that the Hub has for it: for large files, their SHA-256.

        Raises:
            SourceMissing, SourceInvalid, SourceRefused, SourceUnreachable, SourceViolation: as `Source.files` does.
        """
        found = await asyncio.get_running_loop().run_in_executor(
            None, _look_up, str(self._endpoint).rstrip("/"), self._repo, self._revision, self._options.stall_timeout_s
        )
        names = await self._chosen(found)
        if CONFIG_NAME not in names and ADAPTER_CONFIG_NAME not in names:
            raise SourceInvalid(f"{self.url} has no {CONFIG_NAME}", param="source")
        if len(names) > MAX_FILES:
            raise SourceInvalid(f"{self.url} has {len(names)} files, and {MAX_FILES} are allowed", param="source")
        return tuple(_described(found, name) for name in sorted(names))

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `file` from `offset` on, at the commit that it was listed at."""
        commit = file.validator.partition("/")[0]
        if not _COMMIT.fullmatch(commit):
            raise SourceChanged(f"{self.url}: {file.name} was listed at no commit")
        # A commit's files do not change; the ETags of the Hub and of its storage differ.
        await self._reader.read(self._url_of(commit, file.name), file.size_bytes, "", offset, into)

    async def close(self) -> None:
        """Close every connection; reads that are under way fail."""
        await self._reader.close()
        await self._client.close()

    def _url_of(self, commit: str, name: str) -> URL:
        return URL(f"{self._endpoint}{self._repo}/resolve/{commit}/{name}", encoded=True)

    async def _chosen(self, found: _Snapshot) -> set[str]:
        """Return the files of one set of weights, and what lies beside them."""
        loop = asyncio.get_running_loop()
        beside = {
            name for name in found.files if ".safetensors" not in name and "/" not in name and name != MANIFEST_NAME
        }
        if MANIFEST_NAME in found.files:
            raw = await self._content(found, MANIFEST_NAME, MAX_MANIFEST_BYTES)
            sizes = await loop.run_in_executor(None, sizes_in_manifest, raw, f"{MANIFEST_NAME} of {self.url}")
            chosen = {MANIFEST_NAME, *sizes}
            for name, size_bytes in sizes.items():
                if name in found.files and found.files[name][0] != size_bytes:
                    raise SourceInvalid(
                        f"{name} of {self.url} has {found.files[name][0]} bytes, and {MANIFEST_NAME} lists it with "
                        f"{size_bytes}",
                        param="source",
                    )
        elif INDEX_NAME in found.files:
            raw = await self._content(found, INDEX_NAME, MAX_INDEX_BYTES)
            shards = await loop.run_in_executor(None, shards_in_index, raw, f"{INDEX_NAME} of {self.url}")
            chosen = {INDEX_NAME, *shards, *beside, *await self._pooling(found)}
        elif WEIGHTS_NAME in found.files:
            chosen = {WEIGHTS_NAME, *beside, *await self._pooling(found)}
        elif ADAPTER_CONFIG_NAME in found.files:
            # What else PEFT's users put beside it is the base's.
            chosen = {ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME}
        elif found.pickled:
            raise how_to_convert(self.url, found.pickled)
        else:
            raise SourceInvalid(f"{self.url} has none of {MANIFEST_NAME}, {INDEX_NAME}, {WEIGHTS_NAME}", param="source")
        for name in sorted(chosen - found.files.keys()):
            raise SourceInvalid(f"{self.url} lists {name} and does not have it", param="source")
        return chosen

    async def _pooling(self, found: _Snapshot) -> set[str]:
        """Return the name of the pooling's file, where modules.json names one that is there."""
        size_bytes, _ = found.files.get(MODULES_NAME, (0, ""))
        if not 0 < size_bytes <= MAX_MODULES_BYTES:
            return set()
        name = pooling_name_in(await self._content(found, MODULES_NAME, MAX_MODULES_BYTES))
        return {name} & found.files.keys() if name is not None else set()

    async def _content(self, found: _Snapshot, name: str, max_bytes: int) -> bytes:
        content = await self._reader.content(self._url_of(found.commit, name), max_bytes)
        assert content is not None, "no status was declared to mean that"
        return content[0]


def _described(found: _Snapshot, name: str) -> SourceFile:
    size_bytes, digest = found.files[name]
    # What is not stored with LFS has the id of its Git blob.
    return SourceFile(name, size_bytes, f"{found.commit}/{digest}", digest if _SHA256.fullmatch(digest) else "")


def _endpoint() -> URL:
    try:
        return parse_folder(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    except SourceInvalid as wrong:
        raise SourceInvalid(f"HF_ENDPOINT can't be used: {wrong.message}", param="source") from None


async def _authorization() -> str:
    return await asyncio.get_running_loop().run_in_executor(None, _bearer)


def _bearer() -> str:
    """Return the token that huggingface_hub would send; runs on a thread."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # It is documented there.

    try:
        return build_hf_headers().get("authorization", "")
    except (OSError, ValueError):
        raise SourceRefused("huggingface_hub has a token that it can't use") from None


def _look_up(endpoint: str, repo: str, revision: str, timeout_s: float) -> _Snapshot:
    """Ask the Hub what a revision is and holds; runs on a thread, as the import and the request take their time."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # Theirs, whatever client they use.

    place = f"hf://{repo}@{revision}"
    try:
        found = HfApi(endpoint=endpoint).model_info(repo, revision=revision, timeout=timeout_s, files_metadata=True)
        return _snapshot(place, found.sha, found.siblings or [])
    except (HTTPError, OSError) as wrong:
        raise _refusal(place, wrong) from None
    except (ValueError, TypeError, KeyError, AttributeError) as wrong:
        raise SourceViolation(f"{place}: the Hub's answer can't be read: {type(wrong).__name__}") from None


def _snapshot(place: str, commit: object, siblings: Iterable[Any]) -> _Snapshot:
    files: dict[str, tuple[int, str]] = {}
    pickled = ""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise SourceViolation(f"{place}: the Hub names no commit")
    for sibling in siblings:
        name = sibling.rfilename
        if not isinstance(name, str) or not belongs_below(name):
            pickled = pickled or (name if isinstance(name, str) and _PICKLED.fullmatch(name) else "")
            continue
        size_bytes, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if type(size_bytes) is not int or not 0 <= size_bytes <= MAX_SIZE_BYTES:
            raise SourceViolation(f"{place}: the Hub tells no size of {name}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise SourceViolation(f"{place}: the Hub tells no digest of {name}")
        files[name] = (size_bytes, digest)
    return _Snapshot(commit, files, pickled)


def _refusal(place: str, wrong: Exception) -> SllmError:
    from huggingface_hub import errors as theirs

    if isinstance(wrong, theirs.OfflineModeIsEnabled):
        return SourceRefused(f"{place} is not asked for: HF_HUB_OFFLINE is set")
    if isinstance(wrong, theirs.GatedRepoError):
        return SourceRefused(f"{place} is gated: ask for access on its page{_HINT}")
    if isinstance(wrong, theirs.DisabledRepoError):
        return SourceRefused(f"{place} is disabled on the Hub")
    if isinstance(wrong, theirs.RevisionNotFoundError):
        return SourceMissing(f"{place}: there is no such revision", param="source")
    status = wrong.response.status_code if isinstance(wrong, theirs.HfHubHTTPError) else 0
    if status in (401, 403):
        return SourceRefused(f"{place} does not exist, or is not for this token (status {status}){_HINT}")
    if status in (404, 410):
        return SourceMissing(f"{place} is not there (status {status})", param="source")
    if status == 0 or status in (408, 429) or status >= 500:
        how = f"answers with status {status}" if status else f"does not answer: {type(wrong).__name__}"
        return SourceUnreachable(f"{place}: the Hub {how}")
    return SourceViolation(f"{place}: the Hub answers with status {status}")
