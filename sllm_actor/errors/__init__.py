"""Every error that this project raises for the world's faults, one tree.

    SllmError
    ├── InvalidInput                 the caller must change something before trying again
    │   ├── InvalidRequest             a request field is wrong; `param` names it
    │   │   ├── UnsupportedField         known to others, not offered here
    │   │   └── RequestTimeout           it did not arrive in time
    │   ├── InvalidName                a model or node name outside the alphabet
    │   ├── ConfigInvalid              a knob is unknown, of the wrong type or out of bounds
    │   ├── SourceInvalid              a source that names nothing that can be read
    │   │   └── SourceMissing            nothing is there, or no longer
    │   ├── CheckpointInvalid          a checkpoint folder that can't be served
    │   │   ├── CheckpointMissing        no such folder
    │   │   ├── CheckpointEmpty          no weights in it
    │   │   ├── CheckpointTruncated      a file ends before its tensors do
    │   │   ├── CheckpointHeaderInvalid  a safetensors header that lies or can't be read
    │   │   ├── CheckpointConfigInvalid  config.json absent, unreadable or absurd
    │   │   ├── CheckpointChanged        the files differ from those registered
    │   │   ├── CheckpointCorrupt        bytes that differ from their digests
    │   │   ├── CheckpointUnsplittable   a tensor or model that can't be partitioned as was asked
    │   │   ├── PickleCheckpoint         weights as pickle, which is never loaded
    │   │   ├── PickleInvalid            a pickle that can't be converted: code in it, or no plain tensors
    │   │   ├── TokenizerInvalid         no usable tokenizer or chat template
    │   │   ├── AdapterInvalid           a LoRA adapter of a kind that is not served, or of another base
    │   │   └── UnsupportedArchitecture  a model class that the engine can't serve correctly
    │   ├── BackendInvalid             what a backend can't do, or one that this node does not have
    │   ├── TargetInvalid              a folder that nothing may be written to
    │   ├── MetadataInvalid            a key, value, lease or transaction that no metadata store takes
    │   └── ModelTooLarge              larger than the memory that could ever be free for it
    ├── AccessDenied                 not for who asks
    │   └── KeyInvalid                 no API key, or none that is known
    ├── NotFound
    │   ├── ModelNotFound · NodeNotFound · RequestNotFound
    │   ├── StreamNotFound             no stream that can be gone on with, or not by this key
    ├── Conflict                     true of the world now; another state would allow it
    │   ├── ModelExists · DataFolderInUse · AddressInUse · AlreadyThere
    │   ├── NodeIdInUse                another living node has this id
    │   ├── StreamTaken                somebody else has gone on with it
    │   ├── MigrationFailed            a request that can't be moved now, and goes on where it is
    │   │   └── DestinationFailed        since the place that it was to go on at could not
    │   ├── TargetExists · TargetBusy  something is there, and is not to be replaced; another process writes it
    ├── Overloaded                   nothing was run; try again after `retry_after_s`
    │   ├── MailboxFull · LinkFull · QueueFull · NoCapacity · RateLimited
    │   ├── Draining                   whoever was asked is going
    │   │   └── Preempted                an answer that was ended for a more urgent one; it is resumed
    │   ├── NoLeader                   nobody places starts just now; what runs goes on
    │   ├── RoleMissing                not what this node is there for; another one does it
    ├── DeliveryFailed               a message that brought no answer
    │   ├── NoSuchActor                not run: nobody of that name, or nobody who handles it
    │   ├── ActorDied · DeadlineExceeded · NodeUnreachable   may have run
    ├── HandlerFailed                a bug in the handler; the log of its node says more
    ├── ProtocolViolation            a peer that breaks the frame protocol
    │   ├── FrameTooLong · FrameInvalid
    │   └── HandshakeRefused           two nodes that do not talk to each other
    │       └── VersionMismatch · SecretMismatch · NodeMismatch · LinkDuplicate · NodeDown
    ├── ReadFailed                   bytes that a disk did not give
    ├── SourceError                  a place that a model is to come from, and its answer
    │   ├── SourceUnreachable          no answer, a broken one, or one that stalls; trying again may help
    │   ├── SourceRefused              credentials missing or wrong, or an address that is not allowed
    │   ├── SourceChanged              a file is no longer the one that was listed
    │   └── SourceViolation            an answer that is not what was asked for
    ├── WriteFailed                  bytes that a disk did not take; what was there before is as it was
    ├── ConversionFailed             the process that reads pickles ended; the message says how
    ├── MetadataFailed               cluster facts that could not be read or written
    │   ├── MetadataUnavailable        nobody answers in time, or too few agree; nothing was written; try again
    │   │   └── MetadataUncertain        the same of a write that may have been made, or may yet be within a minute
    │   ├── MetadataRefused            credentials or certificates that the store does not take
    │   ├── MetadataCompacted          changes that are no longer kept: list anew, and watch from there
    │   ├── LeaseLost                  the lease has ended, and what was held under it is no longer held
    │   └── Fenced                     another owner has come since: whoever gets this must stop
    ├── DeviceError                  a CUDA device or its driver
    │   ├── DeviceMissing              no driver, one too old, or no such device
    │   ├── DeviceOutOfMemory          the device does not have as much memory
    │   └── DeviceFailed               the driver refused or failed; the message has its CUresult
    └── EngineError
        ├── EngineStartFailed · EngineDied · GenerationFailed

Every class has a stable `code`, which is what crosses a process border beside the message.
"""

from __future__ import annotations

from sllm_actor.errors.base import SllmError as SllmError
from sllm_actor.errors.engine import EngineDied as EngineDied
from sllm_actor.errors.engine import EngineError as EngineError
from sllm_actor.errors.engine import EngineStartFailed as EngineStartFailed
from sllm_actor.errors.engine import GenerationFailed as GenerationFailed
from sllm_actor.errors.metadata import Fenced as Fenced
from sllm_actor.errors.metadata import LeaseLost as LeaseLost
from sllm_actor.errors.metadata import MetadataCompacted as MetadataCompacted
from sllm_actor.errors.metadata import MetadataFailed as MetadataFailed
from sllm_actor.errors.metadata import MetadataRefused as MetadataRefused
from sllm_actor.errors.metadata import MetadataUnavailable as MetadataUnavailable
from sllm_actor.errors.metadata import MetadataUncertain as MetadataUncertain
from sllm_actor.errors.missing import ModelNotFound as ModelNotFound
from sllm_actor.errors.missing import NodeNotFound as NodeNotFound
from sllm_actor.errors.missing import NotFound as NotFound
from sllm_actor.errors.missing import RequestNotFound as RequestNotFound
from sllm_actor.errors.missing import StreamNotFound as StreamNotFound
from sllm_actor.errors.overload import Draining as Draining
from sllm_actor.errors.overload import LinkFull as LinkFull
from sllm_actor.errors.overload import MailboxFull as MailboxFull
from sllm_actor.errors.overload import NoCapacity as NoCapacity
from sllm_actor.errors.overload import NoLeader as NoLeader
from sllm_actor.errors.overload import Overloaded as Overloaded
from sllm_actor.errors.overload import Preempted as Preempted
from sllm_actor.errors.overload import QueueFull as QueueFull
from sllm_actor.errors.overload import RateLimited as RateLimited
from sllm_actor.errors.overload import RoleMissing as RoleMissing


class InvalidInput(SllmError):
    code = "invalid_input"


class InvalidRequest(InvalidInput):
    code = "invalid_request"


class UnsupportedField(InvalidRequest):
    code = "unsupported_field"


class BackendInvalid(InvalidInput):
    code = "backend_invalid"


class RequestTimeout(InvalidRequest):
    code = "request_timeout"


class InvalidName(InvalidInput):
    code = "invalid_name"


class ConfigInvalid(InvalidInput):
    code = "config_invalid"


class SourceInvalid(InvalidInput):
    code = "source_invalid"


class SourceMissing(SourceInvalid):
    code = "source_missing"


class CheckpointInvalid(InvalidInput):
    code = "checkpoint_invalid"


class CheckpointMissing(CheckpointInvalid):
    code = "checkpoint_missing"


class CheckpointEmpty(CheckpointInvalid):
    code = "checkpoint_empty"


class CheckpointTruncated(CheckpointInvalid):
    code = "checkpoint_truncated"


class CheckpointHeaderInvalid(CheckpointInvalid):
    code = "checkpoint_header_invalid"


class CheckpointConfigInvalid(CheckpointInvalid):
    code = "checkpoint_config_invalid"


class CheckpointChanged(CheckpointInvalid):
    code = "checkpoint_changed"


class CheckpointCorrupt(CheckpointInvalid):
    code = "checkpoint_corrupt"


class CheckpointUnsplittable(CheckpointInvalid):
    code = "checkpoint_unsplittable"


class PickleCheckpoint(CheckpointInvalid):
    code = "pickle_checkpoint"


class PickleInvalid(CheckpointInvalid):
    code = "pickle_invalid"


class TokenizerInvalid(CheckpointInvalid):
    code = "tokenizer_invalid"


class UnsupportedArchitecture(CheckpointInvalid):
    code = "unsupported_architecture"


class AdapterInvalid(CheckpointInvalid):
    code = "adapter_invalid"


class TargetInvalid(InvalidInput):
    code = "target_invalid"


class MetadataInvalid(InvalidInput):
    code = "metadata_invalid"


class ModelTooLarge(InvalidInput):
    code = "model_too_large"


class AccessDenied(SllmError):
    code = "access_denied"


class KeyInvalid(AccessDenied):
    code = "invalid_api_key"


class Conflict(SllmError):
    code = "conflict"


class StreamTaken(Conflict):
    code = "stream_taken"


class ModelExists(Conflict):
    code = "model_exists"


class DataFolderInUse(Conflict):
    code = "data_folder_in_use"


class AddressInUse(Conflict):
    code = "address_in_use"


class NodeIdInUse(Conflict):
    code = "node_id_in_use"


class AlreadyThere(Conflict):
    code = "already_there"


class MigrationFailed(Conflict):
    code = "migration_failed"


class DestinationFailed(MigrationFailed):
    code = "destination_failed"


class TargetExists(Conflict):
    code = "target_exists"


class TargetBusy(Conflict):
    code = "target_busy"


class DeliveryFailed(SllmError):
    code = "delivery_failed"


class NoSuchActor(DeliveryFailed):
    code = "no_such_actor"


class ActorDied(DeliveryFailed):
    code = "actor_died"


class DeadlineExceeded(DeliveryFailed):
    code = "deadline_exceeded"


class NodeUnreachable(DeliveryFailed):
    code = "node_unreachable"


class HandlerFailed(SllmError):
    code = "handler_failed"


class ProtocolViolation(SllmError):
    code = "protocol_violation"


class FrameTooLong(ProtocolViolation):
    code = "frame_too_long"


class FrameInvalid(ProtocolViolation):
    code = "frame_invalid"


class HandshakeRefused(ProtocolViolation):
    code = "handshake_refused"


class VersionMismatch(HandshakeRefused):
    code = "version_mismatch"


class SecretMismatch(HandshakeRefused):
    code = "secret_mismatch"


class NodeMismatch(HandshakeRefused):
    code = "node_mismatch"


class LinkDuplicate(HandshakeRefused):
    code = "link_duplicate"


class NodeDown(HandshakeRefused):
    code = "node_down"


class ReadFailed(SllmError):
    code = "read_failed"


class SourceError(SllmError):
    """A source did not give what was asked for.

    `came_bytes` of it had come, from its beginning on, of the version that was asked for; whoever asks again may go on
    behind them.
    """

    code = "source_failed"
    came_bytes = 0


class SourceUnreachable(SourceError):
    code = "source_unreachable"


class SourceRefused(SourceError):
    code = "source_refused"


class SourceChanged(SourceError):
    code = "source_changed"


class SourceViolation(SourceError):
    code = "source_violation"


class WriteFailed(SllmError):
    code = "write_failed"


class ConversionFailed(SllmError):
    code = "conversion_failed"


class DeviceError(SllmError):
    code = "device_error"


class DeviceMissing(DeviceError):
    code = "device_missing"


class DeviceOutOfMemory(DeviceError):
    code = "device_out_of_memory"


class DeviceFailed(DeviceError):
    code = "device_failed"


def _tree(root: type[SllmError]) -> dict[str, type[SllmError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[SllmError]] = _tree(SllmError)


def from_code(code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> SllmError:
    """Rebuild the error that another process described; an unknown code becomes the base class."""
    return BY_CODE.get(code, SllmError)(message, param=param, retry_after_s=retry_after_s)
