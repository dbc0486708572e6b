"""S3 as a source, against a real S3 API: Ceph's gateway. Nightly: `scripts/test --nightly`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from radosgw import running_radosgw
from reading import WEIGHTS, refused, weights_of, whole
from test_s3_source import BUCKET, make_bucket, put, source_at
from test_s3_source import settings_of_s3 as settings_of_s3
from test_s3_source import (
    test_a_bucket_without_a_prefix_is_a_source_too as test_a_bucket_without_a_prefix_is_a_source_too,
)
from test_s3_source import test_an_object_that_has_changed_is_not_read as test_an_object_that_has_changed_is_not_read
from test_s3_source import (
    test_many_failures_leave_no_task_and_no_descriptor as test_many_failures_leave_no_task_and_no_descriptor,
)
from test_s3_source import test_reads_may_run_side_by_side as test_reads_may_run_side_by_side
from test_s3_source import (
    test_what_is_listed_under_a_prefix_is_read_byte_by_byte as test_what_is_listed_under_a_prefix_is_read_byte_by_byte,
)

from sllm_actor.errors import SourceRefused

pytestmark = pytest.mark.skipif("SLLM_NIGHTLY" not in os.environ, reason="scripts/test --nightly runs it")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The gateway for all tests of this module, with an empty bucket."""
    with running_radosgw(tmp_path_factory.mktemp("ceph")) as url:
        make_bucket(url, BUCKET)
        yield url


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
async def test_wrong_credentials_are_refused(server: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    put(server, f"private/{WEIGHTS}", b"content")
    async with source_at(server, f"s3://{BUCKET}/private", monkeypatch) as source:
        file = await weights_of(source)
        assert await whole(source, file) == b"content"
    monkeypatch.setenv(variable, "another")
    async with source_at(server, f"s3://{BUCKET}/private", monkeypatch) as source:
        await refused(SourceRefused, source.files())
        await refused(SourceRefused, whole(source, file))
