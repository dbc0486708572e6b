"""The knobs of a node. The docstring of each is its `description`; msgspec checks the bounds."""

from __future__ import annotations

import functools
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from sllm_actor.config.bounds import check
from sllm_actor.errors import ConfigInvalid
from sllm_actor.units import GIB, KIB, MIB

MIN_QUOTA_BYTES = 16 * MIB
Text = Annotated[str, Meta(max_length=4096)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that an operator can set. Flags win over `SLLM_*` variables, those over the file, that over defaults.

    However one is made, every knob in it is within its bounds, or `ConfigInvalid` names the one that is not.
    """

    # Where things are.
    data_dir: Annotated[Text, Meta(title="path", description="folder of the node's own state")] = "~/.sllm"
    node_id: Annotated[Text, Meta(title="name", description="this node's name in the cluster")] = "node-1"
    host: Annotated[Text, Meta(title="address", description="address the HTTP endpoint binds")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, title="port", description="HTTP port; 0 takes a free one")] = 8400
    api_key_file: Annotated[
        Text, Meta(title="path", description="file of API keys, or with one key; needed to bind off loopback")
    ] = ""
    listen: Annotated[
        Text,
        Meta(title="endpoint", description="where other nodes connect, such as tcp://127.0.0.1:8401; empty: nowhere"),
    ] = ""
    advertise: Annotated[
        Text, Meta(title="endpoint", description="endpoint that other nodes are told to dial; empty: that of listen")
    ] = ""
    cluster_secret_file: Annotated[
        Text, Meta(title="path", description="file with the secret that all nodes share; needed to listen off loopback")
    ] = ""

    # Many nodes.
    roles: Annotated[
        Text,
        Meta(
            pattern=r"^(gateway|controller|worker)(,(gateway|controller|worker)){0,2}\Z",
            title="roles",
            description="what the node is there for, with commas between: gateway, controller, worker",
        ),
    ] = "gateway,controller,worker"
    metadata: Annotated[
        Text,
        Meta(
            title="address",
            description="etcd of a cluster, etcd://HOST:PORT,… or etcds://… for TLS; empty: the node is alone",
        ),
    ] = ""
    metadata_user: Annotated[Text, Meta(title="name", description="user of etcd; empty: nobody in particular")] = ""
    metadata_password_file: Annotated[Text, Meta(title="path", description="file with that user's password")] = ""
    metadata_ca_file: Annotated[
        Text, Meta(title="path", description="whom to trust with etcds://; empty: the machine's own authorities")
    ] = ""
    metadata_cert_file: Annotated[
        Text, Meta(title="path", description="this node's certificate for etcd, if that asks for one")
    ] = ""
    metadata_key_file: Annotated[Text, Meta(title="path", description="key of that certificate")] = ""
    lease_ttl_s: Annotated[
        int, Meta(ge=2, le=3600, title="s", description="after so long without a sign others do without this node")
    ] = 10
    node_silence_s: Annotated[
        float, Meta(ge=0.5, le=600, title="s", description="one that answers nothing is missed so soon; streams go on")
    ] = 2.0
    report_every_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="what a node has is told the leader so often, unchanged too")
    ] = 1.0

    # Memory and bytes.
    host_pool_bytes: Annotated[
        int,
        Meta(ge=16 * MIB, le=64 * 1024 * GIB, title="bytes", description="host memory held for checkpoints"),
    ] = 2 * GIB
    chunk_bytes: Annotated[
        int,
        Meta(ge=64 * KIB, le=256 * MIB, title="bytes", description="size of one pool chunk (a power of two)"),
    ] = 16 * MIB
    lock_host_pool: Annotated[bool, Meta(description="lock the pool in memory; needs a sufficient memlock limit")] = (
        True
    )
    huge_pages: Annotated[
        bool, Meta(description="have the pool in huge pages: reserved ones, else as many as the kernel puts together")
    ] = True
    map_resident_files: Annotated[
        bool, Meta(description="map a converted checkpoint as it lies in the page cache, where that is sooner")
    ] = True
    verify_loads: Annotated[
        bool, Meta(description="compare the digests of a converted checkpoint each time it is loaded")
    ] = False
    io_uring: Annotated[bool, Meta(description="read through io_uring where it is allowed; else by pread")] = True
    reading_threads: Annotated[
        int,
        Meta(
            ge=0, le=64, title="threads",
            description="threads that read files; 0: as many as 'sllm-node calibrate' found best, else 4",
        ),
    ] = 0  # fmt: skip
    background_write_percent: Annotated[
        int,
        Meta(ge=1, le=100, title="%", description="what background writes get of the disk while a cold load reads"),
    ] = 5

    # Models.
    models: Annotated[
        Text,
        Meta(title="models", description="models that are registered at the start: NAME=SOURCE, with commas between"),
    ] = ""
    ssd_quota_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1024 * 1024 * GIB,
            title="bytes",
            description="disk held for copies of models from elsewhere: 0 for none, or 16 MiB and more",
        ),
    ] = 64 * GIB
    peers: Annotated[
        Text, Meta(title="nodes", description="nodes that may have a model, too: NODE@HOST:PORT, with commas between")
    ] = ""
    pull_memory_bytes: Annotated[
        int,
        Meta(
            ge=64 * KIB,
            le=16 * GIB,
            title="bytes",
            description="memory beside the host pool that all pulls take together; one chunk at least",
        ),
    ] = 128 * MIB
    source_stall_timeout_s: Annotated[
        float, Meta(ge=0.1, le=3600, title="s", description="longest silence of a source in the middle of an answer")
    ] = 30.0
    source_connect_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="longest wait for a connection to a source")
    ] = 10.0
    source_redirect_hosts: Annotated[
        Text, Meta(title="hosts", description="other hosts that an HTTP source may redirect to, with commas between")
    ] = ""
    source_allow_private_redirects: Annotated[bool, Meta(description="let a source redirect to a private address")] = (
        False
    )

    # Engines.
    max_instances: Annotated[
        int, Meta(ge=1, le=256, title="instances", description="model instances that may run at once")
    ] = 4
    warm_engines: Annotated[
        int, Meta(ge=1, le=32, title="processes", description="idle engine processes kept ready")
    ] = 2
    engine_threads: Annotated[
        int, Meta(ge=0, le=256, title="threads", description="compute threads per engine; 0 means all cores")
    ] = 0
    max_requests_per_instance: Annotated[
        int, Meta(ge=1, le=1024, title="requests", description="generations one instance runs at once")
    ] = 16
    kv_cache_bytes: Annotated[
        int,
        Meta(
            ge=0, le=1024 * GIB, title="bytes",
            description="keys and values one instance holds at most; 0: its share of half the memory that is free then",
        ),
    ] = 0  # fmt: skip
    prefill_chunk_tokens: Annotated[
        int,
        Meta(ge=16, le=65536, title="tokens", description="tokens of prompts computed between two of running answers"),
    ] = 256
    max_adapters_per_instance: Annotated[
        int, Meta(ge=1, le=1024, title="adapters", description="LoRA adapters that one instance has loaded at once")
    ] = 8
    max_adapter_rank: Annotated[
        int, Meta(ge=1, le=4096, title="rank", description="highest rank of a LoRA adapter that is deployed")
    ] = 256
    max_adapter_bytes: Annotated[
        int, Meta(ge=64 * KIB, le=1024 * GIB, title="bytes", description="largest LoRA adapter that is deployed")
    ] = 4 * GIB
    vllm_python: Annotated[
        Text,
        Meta(title="path", description="Python of an environment with vLLM and sllm_actor; empty: there is none"),
    ] = ""
    vllm_gpu_memory_percent: Annotated[
        int, Meta(ge=1, le=100, title="%", description="what one instance with vLLM takes of its device's memory")
    ] = 90
    vllm_eager: Annotated[bool, Meta(description="let vLLM start without compiling and without CUDA graphs")] = False
    engine_refill_delay_s: Annotated[
        float, Meta(ge=0, le=60, title="s", description="wait before a taken warm engine is replaced")
    ] = 0.5
    engine_start_timeout_s: Annotated[
        float,
        Meta(ge=1, le=3600, title="s", description="longest time of a start in which nothing of its model comes"),
    ] = 300.0
    engine_stop_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="wait for an engine to leave before it is killed")
    ] = 5.0

    # Requests.
    keep_alive_s: Annotated[
        float, Meta(ge=0, title="s", description="idle time before an instance is unloaded; inf keeps it")
    ] = 300.0
    start_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=3600,
            title="s",
            description="longest wait of a start for a place; its own time has engine_start_timeout_s",
        ),
    ] = 300.0
    max_waiting_requests: Annotated[
        int, Meta(ge=1, le=100_000, title="requests", description="requests that may wait for a start or for a slot")
    ] = 256
    max_waiting_per_model: Annotated[
        int, Meta(ge=1, le=100_000, title="requests", description="of these, those that may wait for one model")
    ] = 128
    request_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1, le=86400, title="s", description="longest time of a request, from its arrival to its answer's end"
        ),
    ] = 600.0
    max_body_bytes: Annotated[int, Meta(ge=KIB, le=GIB, title="bytes", description="largest HTTP request body")] = (
        4 * MIB
    )
    max_incoming_bytes: Annotated[
        int, Meta(ge=KIB, le=1024 * GIB, title="bytes", description="all HTTP request bodies that are being received")
    ] = 256 * MIB
    body_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="longest arrival of an HTTP request body")
    ] = 30.0
    max_connections: Annotated[
        int, Meta(ge=16, le=1_000_000, title="connections", description="HTTP connections that may be open at once")
    ] = 4096
    idle_timeout_s: Annotated[
        float, Meta(ge=0.1, le=86400, title="s", description="longest wait of an HTTP connection for a request")
    ] = 75.0
    header_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="longest arrival of the head of an HTTP request")
    ] = 10.0
    send_buffer_bytes: Annotated[
        int,
        Meta(ge=4 * KIB, le=GIB, title="bytes", description="what a client may leave unread, here and in the kernel"),
    ] = 256 * KIB
    stream_open_after_s: Annotated[
        float,
        Meta(ge=0, le=600, title="s", description="wait of a stream for its first token before its status goes out"),
    ] = 2.0
    heartbeat_interval_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="longest silence of an open stream before a comment")
    ] = 4.0
    send_timeout_s: Annotated[
        float, Meta(ge=0.1, le=3600, title="s", description="longest wait for a client to read before it is dropped")
    ] = 30.0
    text_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="longest templating and tokenizing of one prompt")
    ] = 10.0
    grammar_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="longest compilation of the form that an answer is to have")
    ] = 5.0
    grammar_memory_bytes: Annotated[
        int, Meta(ge=64 * MIB, le=64 * GIB, title="bytes", description="memory that compilations of forms may take")
    ] = GIB
    grammar_bytes: Annotated[
        int, Meta(ge=64 * KIB, le=GIB, title="bytes", description="largest compiled form of an answer")
    ] = 8 * MIB
    grammar_cache_bytes: Annotated[
        int, Meta(ge=64 * KIB, le=64 * GIB, title="bytes", description="memory of compiled forms")
    ] = 64 * MIB
    stream_log_lag_s: Annotated[
        float, Meta(ge=0.01, le=60, title="s", description="longest wait of a stream's tokens to be written down")
    ] = 0.5
    stream_kept_s: Annotated[
        float, Meta(ge=0, le=43200, title="s", description="how long a client may come back to a stream; 0: never")
    ] = 120.0
    stream_log_bytes: Annotated[
        int, Meta(ge=KIB, le=900 * KIB, title="bytes", description="what is written down of one stream at most")
    ] = 256 * KIB
    max_kept_streams: Annotated[
        int, Meta(ge=1, le=100_000, title="streams", description="streams that clients may come back to")
    ] = 4096
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=86400, title="s", description="time given to running answers when the node stops")
    ] = 30.0

    # What is told of it.
    log_format: Annotated[
        Text, Meta(pattern=r"^(text|json)\Z", title="text|json", description="lines of the log, for people or programs")
    ] = "text"
    otlp_endpoint: Annotated[
        Text, Meta(title="URL", description="where OpenTelemetry spans go, by OTLP over HTTP; empty: nowhere")
    ] = ""

    max_watchers: Annotated[
        int, Meta(ge=1, le=1000, title="pages", description="pages that may watch this node at once")
    ] = 32
    watch_interval_s: Annotated[
        float, Meta(ge=0.05, le=60, title="s", description="how often those who watch are told of changes")
    ] = 0.5

    # Other nodes.
    peer_reads: Annotated[
        int, Meta(ge=1, le=1024, title="reads", description="reads that other nodes may have under way here at once")
    ] = 16

    # The runtime.
    mailbox_messages: Annotated[
        int, Meta(ge=8, le=1_000_000, title="messages", description="bound of an actor's mailbox")
    ] = 1024
    stream_credit: Annotated[
        int, Meta(ge=1, le=65536, title="items", description="items a stream may run ahead of its reader")
    ] = 64
    max_frame_bytes: Annotated[
        int, Meta(ge=64 * KIB, le=GIB, title="bytes", description="largest frame between processes")
    ] = 16 * MIB
    ask_timeout_s: Annotated[
        float, Meta(ge=0.1, le=3600, title="s", description="deadline of a question between actors")
    ] = 10.0
    placement_policy: Annotated[
        Text,
        Meta(
            pattern=r"^(startup_time|availability|locality_wait|preempt)\Z",
            title="policy",
            description="where models start: startup_time, availability, locality_wait or preempt",
        ),
    ] = "startup_time"
    locality_wait_s: Annotated[
        float,
        Meta(ge=0, le=3600, title="s", description="of locality_wait: longest wait for the node that holds the model"),
    ] = 10.0
    switch_hold_s: Annotated[
        float, Meta(ge=0, le=60, title="s", description="how long each keeps its place of models that take turns")
    ] = 2.0
    bytes_first_s: Annotated[
        float, Meta(ge=0, title="s", description="bytes that take longer from afar come before a device; inf: never")
    ] = 3.0

    # Moving running requests.
    max_migrations: Annotated[
        int, Meta(ge=1, le=1024, title="requests", description="requests that this node moves at once")
    ] = 32
    migration_timeout_s: Annotated[
        float, Meta(ge=1, le=3600, title="s", description="longest time of a hand-over, a round of it, or a move")
    ] = 120.0
    migration_max_rounds: Annotated[
        int, Meta(ge=1, le=64, title="rounds", description="times that a destination catches up with a running answer")
    ] = 8
    migration_threshold_tokens: Annotated[
        int, Meta(ge=0, le=4096, title="tokens", description="tokens behind which a destination is near enough")
    ] = 4
    take_over_timeout_s: Annotated[
        float, Meta(ge=0.1, le=600, title="s", description="how long what was handed over is held for its gateway")
    ] = 10.0

    # What is remembered.
    decision_history: Annotated[
        int, Meta(ge=1, le=1_000_000, title="decisions", description="placements whose explanations are kept")
    ] = 10_000
    request_history: Annotated[
        int, Meta(ge=1, le=1_000_000, title="requests", description="finished requests whose timelines are kept")
    ] = 1000
    loop_lag_fault_s: Annotated[
        float, Meta(ge=0.001, le=60, title="s", description="loop delay that is counted as a fault")
    ] = 0.05

    def __post_init__(self) -> None:
        for name, annotation in _annotations().items():
            check(name, getattr(self, name), annotation)
        if self.chunk_bytes & (self.chunk_bytes - 1):
            raise ConfigInvalid(f"chunk_bytes: {self.chunk_bytes} is not a power of two", param="chunk_bytes")
        if self.chunk_bytes > self.host_pool_bytes:
            raise ConfigInvalid(
                f"host_pool_bytes: {self.host_pool_bytes} is less than one chunk of {self.chunk_bytes}",
                param="host_pool_bytes",
            )
        if 0 < self.ssd_quota_bytes < MIN_QUOTA_BYTES:
            raise ConfigInvalid(
                f"ssd_quota_bytes: {self.ssd_quota_bytes} bytes is less than 16 MiB; write a unit, such as 10GiB",
                param="ssd_quota_bytes",
            )
        if self.metadata and not self.listen:
            raise ConfigInvalid("metadata: the other nodes find this one only where listen is set", param="metadata")
        for role in ("controller", "worker"):
            if not self.metadata and role not in self.roles.split(","):
                raise ConfigInvalid(f"roles: a node that is alone is its own {role}; metadata is empty", param="roles")
        if self.models and set(self.roles.split(",")) == {"controller"}:
            raise ConfigInvalid("models: a node that only leads has nothing to try them with", param="models")
        if self.advertise and not self.listen:
            raise ConfigInvalid("advertise: there is nothing to advertise where listen is empty", param="advertise")


@functools.cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(Config, include_extras=True)
