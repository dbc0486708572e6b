"""A cluster to be simulated: machines, models, where their bytes lie, and the system that serves them.

`ours` and the schedulers beside it are this program's own actors with their policies; Ray Serve is the same actors as
the paper models it: whatever is free takes a model, which comes at the speed of a stock loader, each time from afar
(but for one with a cache on its SSD), and is in no host memory behind it. KServe starts a container beside that.
"""

from __future__ import annotations

from functools import cached_property
from math import inf
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from sllm_actor.actors.shared_models import MODELS
from sllm_actor.config import Config
from sllm_actor.domain import Model, ModelName, Scaling
from sllm_actor.domain.roles import Role
from sllm_actor.errors import InvalidInput
from sllm_actor.loader.device_profile import profile_in
from sllm_actor.policy.estimator import HOST, SOURCE, SSD
from sllm_actor.runtime import Limits
from sllm_actor.testing.hardware import (
    CONTAINER_S,
    DEVICES,
    MACHINES,
    SAFETENSORS_SHARE,
    SHAPES,
    Machine,
    devices_for,
    speed_of,
)
from sllm_actor.testing.simulated_engine import Speed
from sllm_actor.testing.simulated_node import PORT, Means, model_of
from sllm_actor.testing.simulated_tiers import SimulatedCard, folder_of
from sllm_actor.units import MIB

MAX_FILE_BYTES = MIB
# The members of a cluster that nothing happens to need not look after each other often, and those of one of more nodes
# than `OFTEN` more seldom still: all together no oftener than so many.
LEASE_TTL_S, HEARTBEAT_S, REPORT_EVERY_S, OFTEN = 120, 600.0, 10.0, 160
CHUNK_BYTES = 16 * MIB
EVERYTHING = ",".join(role.value for role in Role)

Positive = Annotated[float, Meta(gt=0, le=1e18)]


class Models(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So many models of one shape."""

    shape: str
    count: Annotated[int, Meta(ge=1, le=100_000)]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is simulated. `copies` of each model lie on SSDs in the beginning, dealt to the nodes in turn, one on each
    at most: so each of four has all models, as in ServerlessLLM's evaluation.

    An instance answers `concurrency` requests at once, and stays for `keep_alive_s` behind the last, or for as long as
    its bytes take from the SSD, as in the paper, where that is "load". Clients ask the first so many nodes
    (`gateways`), which may lead, too; the others only run instances. `turn_tokens` of an answer come at once, so that
    long answers do not take long to be simulated. Who waits longer than `timeout_s` for a first token fails. What is
    not said of a machine is as in the preset of its name.
    """

    machine: str = "a40"
    nodes: Annotated[int, Meta(ge=1, le=10_000)] = 4
    devices: Annotated[int, Meta(ge=1, le=64)] | None = None
    host_pool_bytes: Positive | None = None
    ssd_bytes: Positive | None = None
    ssd_bytes_per_s: Positive | None = None
    remote_bytes_per_s: Positive | None = None
    models: Annotated[tuple[Models, ...], Meta(min_length=1, max_length=100)] = (Models(shape="opt-6.7b", count=32),)
    copies: Annotated[int, Meta(ge=0, le=10_000)] = 4
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 1
    gateways: Annotated[int, Meta(ge=1, le=10_000)] = 16
    turn_tokens: Annotated[int, Meta(ge=1, le=4096)] = 16
    keep_alive_s: Annotated[float, Meta(ge=0, le=1e6)] | Literal["load"] = "load"
    timeout_s: Annotated[float, Meta(ge=1, le=3600)] = 300.0

    def __post_init__(self) -> None:
        if self.machine not in MACHINES:
            raise ValueError(f"there is no machine {self.machine!r}; there are {', '.join(MACHINES)}")
        for models in self.models:
            if models.shape not in SHAPES:
                raise ValueError(f"there is no shape {models.shape!r}; there are {', '.join(SHAPES)}")

    @property
    def hardware(self) -> Machine:
        """The machine of each node."""
        own = {name: getattr(self, name) for name in Machine.__struct_fields__ if hasattr(self, name)}
        preset = MACHINES[self.machine]
        return msgspec.structs.replace(preset, **{name: value for name, value in own.items() if value is not None})


class System(NamedTuple):
    """Who serves: a placement policy, what share of a disk's bandwidth is used, and which tiers are kept.

    Each start begins with a container where that takes time (`container_s`). Bytes from afar that take longer than
    `bytes_first_s` come before a device, which nobody's but this program's do.
    """

    policy: str
    share: float = 1.0
    host: bool = True
    ssd: bool = True
    container_s: float = 0.0
    bytes_first_s: float = 3.0


SYSTEMS = {
    "ours": System("startup_time"),
    "availability": System("availability"),
    "locality_wait": System("locality_wait"),
    "preempt": System("preempt"),
    "ray_serve": System("availability", SAFETENSORS_SHARE, host=False, ssd=False, bytes_first_s=inf),
    "ray_serve_cache": System("availability", SAFETENSORS_SHARE, host=False, bytes_first_s=inf),
    "kserve": System(
        "availability", SAFETENSORS_SHARE, host=False, ssd=False, container_s=CONTAINER_S, bytes_first_s=inf
    ),
}


class World:
    """A description, and everything that follows from it for one system."""

    def __init__(self, description: Description, system: System) -> None:
        self.description = description
        self.system = system
        self.machine = machine = description.hardware
        device = DEVICES[machine.device]
        self.names = [f"n{number:04}" for number in range(1, description.nodes + 1)]
        self.devices_each = max(devices_for(SHAPES[models.shape], device) for models in description.models)
        if self.devices_each > machine.devices:
            raise InvalidInput(f"a model needs {self.devices_each} devices, and a node has {machine.devices}")
        self.models: list[Model] = []
        self._speeds: dict[str, Speed] = {"": Speed()}
        self._bare_speeds: list[Speed] = []
        for models in description.models:
            shape = SHAPES[models.shape]
            if shape.size_bytes > machine.host_pool_bytes:
                raise InvalidInput(f"{models.shape} has more bytes than the host memory of a node")
            keep_alive_s = description.keep_alive_s
            if keep_alive_s == "load":
                keep_alive_s = shape.size_bytes / machine.ssd_bytes_per_s
            for number in range(models.count):
                model = model_of(f"{models.shape}-{number:05}", shape.size_bytes, keep_alive_s)
                scaling = Scaling(max_instances=description.nodes * self.instances)
                self.models.append(msgspec.structs.replace(model, scaling=scaling))
                path, bare = (
                    str(folder_of(model.name)),
                    speed_of(shape, device, self.devices_each, description.turn_tokens),
                )
                attach_s = bare.attach_s + system.container_s
                self._bare_speeds.append(bare)
                self._speeds[path] = msgspec.structs.replace(bare, attach_s=attach_s)
        # How many times as seldom its nodes look after each other.
        self._calm = min(30.0, max(1.0, description.nodes / OFTEN))
        self.cards = {model.card: SimulatedCard(model.card, model.size_bytes) for model in self.models}

        # Each registration is read once, and not by each node.
        self._registered = {MODELS + model.name: model for model in self.models}

    @property
    def gateways(self) -> list[str]:
        """The nodes that clients ask."""
        return self.names[: self.description.gateways]

    @property
    def instances(self) -> int:
        """How many instances a node has devices for."""
        return self.machine.devices // self.devices_each

    @property
    def best_bytes_per_s(self) -> float:
        """How fast a model that nobody has loaded yet can come at best: from an SSD where one has it."""
        machine = self.machine
        return max(machine.ssd_bytes_per_s if self.is_on_ssd else 0.0, machine.remote_bytes_per_s)

    @property
    def is_on_ssd(self) -> bool:
        """Tell whether each model is on an SSD from the beginning."""
        return self.description.copies > 0

    def speed(self, model: int) -> Speed:
        """Tell how fast the how many-th model computes on a device of its own, started by this program."""
        return self._bare_speeds[model]

    def least_start_s(self, model: ModelName, tier: str) -> float:
        """Tell what a start takes at least from a tier that has the bytes, which fill a device as they come."""
        machine, number = self.machine, self._numbers[model]
        speed, size_bytes = self.speed(number), self.models[number].size_bytes
        rates = {HOST: inf, SSD: machine.ssd_bytes_per_s, SOURCE: machine.remote_bytes_per_s}
        return max(size_bytes / rates[tier], speed.copy_s) + speed.attach_s

    def stored(self, name: str) -> list[str]:
        """List what lies on a node's SSD in the beginning, if the system uses that."""
        return self.dealt[name] if self.system.ssd else []

    @cached_property
    def _numbers(self) -> dict[ModelName, int]:
        return {model.name: number for number, model in enumerate(self.models)}

    @cached_property
    def dealt(self) -> dict[str, list[str]]:
        """The models' copies, dealt to the nodes in turn, whether the system uses SSDs or not."""
        dealt: dict[str, list[str]] = {name: [] for name in self.names}
        copies = min(self.description.copies, len(self.names))
        for number, model in enumerate(self.models):
            for copy in range(copies):
                dealt[self.names[(number * copies + copy) % len(self.names)]].append(model.card)
        return dealt

    def means(self) -> Means:
        """Say what the nodes are made of."""
        machine, system = self.machine, self.system
        return Means(
            config_of=self._config_of,
            limits=Limits(
                heartbeat_s=HEARTBEAT_S * self._calm,
                acceptable_pause_s=4 * HEARTBEAT_S * self._calm,
                down_after_s=600.0,
            ),
            ssd_bytes_per_s=machine.ssd_bytes_per_s * system.share,
            remote_bytes_per_s=machine.remote_bytes_per_s,
            ssd_quota_bytes=machine.ssd_bytes if system.ssd else 0.0,
            keeps_host=system.host,
            speed_of=self._speeds.__getitem__,
            decode=lambda fact: self._registered[fact.key],
        )

    def _config_of(self, name: str) -> Config:
        described = self.description
        return Config(
            node_id=name,
            listen=f"tcp://{name}:{PORT}",
            metadata="etcd://store:2379",
            lease_ttl_s=round(LEASE_TTL_S * self._calm),
            host_pool_bytes=int(self.machine.host_pool_bytes),
            chunk_bytes=CHUNK_BYTES,
            max_instances=self.instances,
            max_requests_per_instance=described.concurrency,
            kv_cache_bytes=MIB,
            warm_engines=min(self.instances, 4),
            start_timeout_s=described.timeout_s,
            engine_start_timeout_s=3600.0,
            max_waiting_requests=100_000,
            max_waiting_per_model=100_000,
            placement_policy=self.system.policy,
            bytes_first_s=self.system.bytes_first_s,
            request_history=1_000,
            roles=EVERYTHING if name in self.gateways else Role.WORKER.value,
            report_every_s=REPORT_EVERY_S * self._calm,
        )


def read_description(path: Path) -> Description:
    """Read the description of a cluster from a TOML file.

    Raises:
        InvalidInput: it can't be read, or is wrong; the message says where.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise InvalidInput(f"{path} has {len(raw):,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        return msgspec.toml.decode(raw, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: {error}") from None


def calibrated(description: Description, path: Path) -> Description:
    """Give what is described with the SSD that `sllm-node calibrate` has measured, whose profile is in a file.

    Raises:
        InvalidInput: there is no such file.
        ConfigInvalid: it is no profile that this package reads.
    """
    profile = profile_in(path)
    if profile is None:
        raise InvalidInput(f"{path}: No such file or directory")
    return msgspec.structs.replace(description, ssd_bytes_per_s=profile.read_bytes_per_s)


def changed(description: Description, changes: str) -> Description:
    """Give what is described with changes such as `nodes=+2,ssd_bytes=4e12,copies=2`.

    Raises:
        InvalidInput: there is no such field, or its value is wrong.
    """
    values = msgspec.to_builtins(description)
    for change in filter(None, map(str.strip, changes.split(","))):
        name, equals, text = change.partition("=")
        if not equals or name not in values or name == "models":
            raise InvalidInput(
                f"{change!r}: it is NAME=VALUE with one of {', '.join(n for n in values if n != 'models')}"
            )
        try:
            value = msgspec.json.decode(text.removeprefix("+").encode())
        except msgspec.DecodeError:
            value = text
        if text.startswith("+"):
            before = getattr(description.hardware, name, values[name])
            value = before + value if isinstance(before, int | float) and isinstance(value, int | float) else value
        values[name] = value
    try:
        return msgspec.convert(values, Description)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{changes}: {error}") from None
