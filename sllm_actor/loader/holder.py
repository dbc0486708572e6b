"""Who holds what a tier has, and since when: each lease has one, so that people can be told."""

from __future__ import annotations

import msgspec

# Who a lease is for, as long as no instance has it.
LOAD, COPY, DOWNLOAD, OTHER_NODE = "a load", "a copy to the SSD", "a download", "another node"


class Holder(msgspec.Struct, eq=False):
    """One lease's. `who` may change: a load's lease becomes an instance's. `since_s` is monotonic."""

    who: str
    since_s: float
