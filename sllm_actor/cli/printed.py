"""What every verb prints with `--json`: one object, or one a line. The manual's page is written from this.

Fields are added in later versions; none is renamed, removed or given another meaning within a major version.
"""

from __future__ import annotations

from typing import Any

from sllm_actor.cli.printed_parts import (
    AskedNode,
    Decision,
    Instance,
    Model,
    ModelStatus,
    Node,
    Printed,
    Tiers,
    Timeline,
    TopInstance,
    TopModel,
    TopTiers,
)
from sllm_actor.loader.device_profile import DeviceProfile


class Failure(Printed):
    """What went wrong; `hint` says what to do next, `param` which input was wrong. Both may be empty."""

    message: str
    code: str
    param: str | None
    hint: str


class Failed(Printed):
    """Of every verb, in the place of what it would print, with exit code 1, 2 or 3."""

    error: Failure


class Started(Printed):
    """One line, once the node serves; `address` is where other nodes connect, empty where none may."""

    ready: bool
    url: str
    pid: int
    node: str
    address: str


class Version(Printed):
    """The installed version."""

    version: str


class Check(Printed):
    """One finding: `level` is ok, warning or error; `mend` says how to change it."""

    check: str
    level: str
    found: str
    mend: str


class Knob(Printed):
    """One setting, and where its value is from."""

    name: str
    value: bool | int | float | str
    unit: str
    origin: str
    description: str


class Doctor(Printed):
    """`healthy`: a node would start."""

    healthy: bool
    checks: list[Check]
    knobs: list[Knob]


class Calibration(Printed):
    """What was measured, and the file that it is kept in."""

    path: str
    profile: DeviceProfile


class Deployed(Printed):
    """What was registered. `adapters` and `warnings` are there with `--config` alone."""

    model: Model
    adapters: tuple[Model, ...] = ()
    warnings: tuple[str, ...] = ()


class Registered(Printed, tag_field="status", tag="registered"):
    """The first line of a pull."""

    model: Model


class Pulling(Printed, tag_field="status", tag="pulling"):
    """So many bytes of so many are on the SSD; a line for each step."""

    completed: int
    total: int


class Pulled(Printed, tag_field="status", tag="success"):
    """The last line of a pull."""


class Models(Printed):
    """All that are registered."""

    models: list[ModelStatus]


class Removed(Printed):
    """The model that was forgotten."""

    removed: str


class Processes(Printed):
    """The cluster's running instances, and the asked node's tiers."""

    instances: list[Instance]
    tiers: Tiers


class Stopped(Printed):
    """How many instances were stopped, and starts ended."""

    stopped: int
    ended_starts: int


class Answer(Printed):
    """One answer; of a chat one a line. `usage` is as OpenAI has it."""

    model: str
    text: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    timeline: Timeline | None


class Partition(Printed):
    """How a checkpoint is spread over files."""

    kind: str
    count: int


class Origin(Printed):
    """What was converted."""

    format: str
    generation: str


class Converted(Printed):
    """What was made."""

    path: str
    model_id: str
    size_bytes: int
    chunk_bytes: int
    files: list[str]
    partition: Partition
    tensors: int
    pads: int
    aliases: int
    origin: Origin


class Verified(Printed):
    """What was compared; of a folder without digests no more than headers and index."""

    path: str
    digests_checked: int
    model_id: str | None
    files: int
    size_bytes: int


class Pinned(Printed):
    """In which tiers it now stays."""

    pinned: str
    tiers: list[str]


class Unpinned(Printed):
    """In which tiers it may make room again."""

    unpinned: str
    tiers: list[str]


class Evicted(Printed):
    """Which tiers have given it up."""

    evicted: str
    tiers: list[str]


class Explained(Printed):
    """How a request came to its instance; `decision` is null where that ran already."""

    kind: str
    request_id: str
    model: str
    text: str
    instance_id: str
    node: str
    beside: int
    start_of: str
    decision: Decision | None


class Nodes(Printed):
    """The members of the cluster."""

    nodes: list[Node]


class Cordoned(Printed):
    """The node on which nothing is started any more."""

    cordoned: str


class Uncordoned(Printed):
    """The node on which models are started again."""

    uncordoned: str


class Drained(Printed):
    """The node, and how many instances have stopped there."""

    drained: str
    stopped: int


class Noticed(Printed):
    """What became of the answers and instances of a node that will be gone."""

    node: str
    moved: int
    stopped: int
    left: int


class Migrated(Printed):
    """Where a request goes on."""

    request_id: str
    node: str
    instance_id: str
    rounds: int
    tokens: int
    bytes_moved: int
    recomputed_s: float


class Rates(Printed):
    """Tokens a second in the last `over_s`; 0 there: since the first token of each stream."""

    over_s: float
    tokens_per_s: float
    instances: dict[str, float]
    requests: dict[str, float]


class Look(Printed):
    """One look; a line each `--interval` without `--once`. The parts are those of the page's events (docs/page.md)."""

    node: AskedNode
    nodes: list[Node]
    models: list[TopModel]
    instances: list[TopInstance]
    requests: list[Timeline]
    tiers: TopTiers | None
    problems: dict[str, str]
    monotonic_s: float
    trouble: str
    rates: Rates


class Simulated(Printed):
    """What a system came to; seconds and shares are null where nothing was answered.

    The mean wait is the sum of four: for a device, for bytes and engine, for a slot of an instance, for the prompt.
    """

    requests: int
    failed: int
    wait_mean_s: float | None
    over_least: float | None
    over_first_come: float | None
    over_on_demand: float | None
    wait_p50_s: float | None
    wait_p95_s: float | None
    wait_p99_s: float | None
    wait_place_s: float | None
    wait_load_s: float | None
    wait_slot_s: float | None
    wait_prompt_s: float | None
    end_mean_s: float | None
    end_p99_s: float | None
    warm: float
    starts: int
    start_mean_s: float | None
    start_over_least: float | None
    migrations: int
    devices_held: float
    devices_busy: float
    tiers: dict[str, int]


class MadeKey(Printed):
    """A new key, shown this once."""

    name: str
    key: str


class Revoked(Printed):
    """The key that is no more."""

    revoked: str


class ListedKey(Printed):
    """A key, with the beginning of its hash; a bound that it has not is not there."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    min_priority: int | None = None
    models: list[str] | None = None
    admin: bool = False


class Keys(Printed):
    """The keys of the file."""

    keys: list[ListedKey]


# By verb; several are lines of one output, and of `simulate` it is one for each system's name.
PRINTED: dict[str, Any] = {
    "start": Started, "version": Version, "doctor": Doctor, "calibrate": Calibration, "deploy": Deployed,
    "pull": Registered | Pulling | Pulled, "ls": Models, "rm": Removed, "ps": Processes, "stop": Stopped,
    "run": Answer, "convert": Converted, "verify": Verified, "pin": Pinned, "unpin": Unpinned, "evict": Evicted,
    "explain": Explained, "status": Nodes, "cordon": Cordoned, "uncordon": Uncordoned, "drain": Drained,
    "notice": Noticed, "migrate": Migrated, "top": Look, "simulate": dict[str, Simulated], "keys create": MadeKey,
    "keys list": Keys, "keys revoke": Revoked,
}  # fmt: skip
