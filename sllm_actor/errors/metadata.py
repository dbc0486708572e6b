"""What a metadata store may answer with instead; the tree is drawn with the others."""

from __future__ import annotations

from sllm_actor.errors.base import SllmError


class MetadataFailed(SllmError):
    code = "metadata_failed"


class MetadataUnavailable(MetadataFailed):
    code = "metadata_unavailable"


class MetadataUncertain(MetadataUnavailable):
    code = "metadata_uncertain"


class MetadataRefused(MetadataFailed):
    code = "metadata_refused"


class MetadataCompacted(MetadataFailed):
    code = "metadata_compacted"


class LeaseLost(MetadataFailed):
    code = "lease_lost"


class Fenced(MetadataFailed):
    code = "fenced"
