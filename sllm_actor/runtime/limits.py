"""The bounds of the runtime, each with its unit and default. One object of these for a system."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a system holds at most, and how long it waits."""

    # Actors.
    mailbox_messages: int = 1024
    control_messages: int = 128
    stream_credit: int = 64
    stream_window_bytes: int = 256 * 1024

    # Frames and payloads; a peer's own bounds come with its hello.
    max_frame_bytes: int = 1024 * 1024
    max_blob_bytes: int = 256 * 1024 * 1024
    max_transfers: int = 64

    # Links.
    link_buffer_bytes: int = 1024 * 1024
    link_unread_bytes: int = 32 * 1024 * 1024
    link_blob_bytes: int = 256 * 1024 * 1024
    max_calls_per_link: int = 65_536
    max_handshakes: int = 128
    max_peers: int = 4096
    max_watches: int = 65_536

    # Time.
    handshake_timeout_s: float = 5.0
    heartbeat_s: float = 0.25
    acceptable_pause_s: float = 1.25
    phi_threshold: float = 8.0
    redial_first_s: float = 0.05
    redial_last_s: float = 5.0
    down_after_s: float = 30.0

    def silent_within(self, silence_s: float) -> Limits:
        """Give the same bounds with such heartbeats that a peer which fell silent is found so within `silence_s`.

        A pause of three eighths less is borne with at any time, for instance of one that waits for its processor.
        """
        return msgspec.structs.replace(self, heartbeat_s=silence_s / 8, acceptable_pause_s=silence_s * 5 / 8)
