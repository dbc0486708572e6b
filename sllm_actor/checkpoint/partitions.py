"""Decide which tensor goes to which file: all in one, by layers, or a slice for each tensor-parallel rank.

Pure: tensors' descriptions in, a plan out; reads no byte of a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from sllm_actor.checkpoint.layout import Described
from sllm_actor.checkpoint.manifest import MAX_PARTITIONS, Partition, PartitionKind
from sllm_actor.errors import CheckpointUnsplittable, InvalidInput

# A layer is numbered right after the name of the list that it is in; experts inside it have numbers too, later.
_LAYER = re.compile(r"(?:^|(.*?)\.)(layers|layer|h|blocks|block)\.([0-9]{1,6})\.(?:.*)")
_FIRST = re.compile(
    r"(?:.*\.)?(?:embed_tokens|embed_positions|embed_in|tok_embeddings|token_embedding|word_embeddings\w*|wte|wpe"
    r"|project_in|embeddings|embed_layer_norm|embedding|\w*embeddings_layernorm)(?:\..*)?"
)


class Runs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes of a tensor that go to one file: `count` runs of `length`, the first at `begin`, `stride` apart."""

    begin: int
    length: int
    stride: int
    count: int

    @property
    def size_bytes(self) -> int:
        """All the runs together."""
        return self.length * self.count

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Give the begin and the length of each run, within the tensor."""
        for k in range(self.count):
            yield self.begin + k * self.stride, self.length


class Piece(msgspec.Struct, frozen=True):
    """A tensor as one file stores it, and where its bytes are in the tensor that it comes from."""

    tensor: Described
    runs: Runs


class Plan(msgspec.Struct, frozen=True):
    """The pieces of each file, in the order in which the original had them."""

    partition: Partition
    files: tuple[tuple[Piece, ...], ...]


def whole(tensor: Described) -> Piece:
    """Take all of a tensor."""
    return Piece(tensor, Runs(0, tensor.size_bytes, tensor.size_bytes, 1))


def in_one_file(tensors: Sequence[Described]) -> Plan:
    """Put every tensor into one file."""
    return Plan(Partition(), (tuple(map(whole, tensors)),))


def by_layers(tensors: Sequence[Described], count: int) -> Plan:
    """Cut between layers into `count` files, the largest of which is as small as possible.

    Embeddings go with the first layer, everything else outside the layers with the last.

    Raises:
        CheckpointUnsplittable: there are fewer layers than files.
        InvalidInput: `count` is out of bounds.
    """
    check_count(count)
    if count == 1:
        return in_one_file(tensors)
    placed = {tensor.name: layer_of(tensor.name) for tensor in tensors}
    layers = sorted({layer for layer in placed.values() if layer is not None}, key=lambda layer: layer)
    if len(layers) < count:
        raise CheckpointUnsplittable(f"{len(layers)} layers can't be spread over {count} files")
    position = {layer: k for k, layer in enumerate(layers)}

    def place(name: str) -> int:
        layer = placed[name]
        if layer is not None:
            return position[layer]
        return 0 if _FIRST.fullmatch(name) else len(layers) - 1

    sizes_bytes = [0] * len(layers)
    for tensor in tensors:
        sizes_bytes[place(tensor.name)] += tensor.size_bytes
    group_of = balance(sizes_bytes, count)
    files: list[list[Piece]] = [[] for _ in range(count)]
    for tensor in tensors:
        files[group_of[place(tensor.name)]].append(whole(tensor))
    return Plan(Partition(PartitionKind.LAYERS, count), tuple(map(tuple, files)))


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack and number of the layer that a tensor belongs to, None for one outside all layers."""
    found = _LAYER.fullmatch(name)
    return (f"{found[1] or ''}.{found[2]}", int(found[3])) if found else None


def balance(sizes_bytes: Sequence[int], count: int) -> list[int]:
    """Assign consecutive items to `count` groups, none empty, so that the largest group is as small as can be."""
    assert 0 < count <= len(sizes_bytes), "every group needs an item"
    low, high = max(sizes_bytes), sum(sizes_bytes)
    while low < high:
        middle = (low + high) // 2
        if _fill(sizes_bytes, count, middle)[-1] < count:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes_bytes, count, low)


def _fill(sizes_bytes: Sequence[int], count: int, room_bytes: int) -> list[int]:
    """Fill one group after the other, leaving an item for each that is still empty."""
    groups, group, filled_bytes = [], 0, 0
    for k, size_bytes in enumerate(sizes_bytes):
        items_left, empty_groups = len(sizes_bytes) - k, count - 1 - group
        if k and (filled_bytes + size_bytes > room_bytes or items_left <= empty_groups):
            group, filled_bytes = group + 1, 0
        filled_bytes += size_bytes
        groups.append(group)
    return groups


def slices(tensor: Described, dimension: int, ranks: int) -> tuple[Piece, ...]:
    """Cut a tensor into equal slices along a dimension, one for each rank.

    Raises:
        CheckpointUnsplittable: the dimension is not there, does not divide, or would cut through a byte.
    """
    if dimension >= len(tensor.shape) or tensor.shape[dimension] % ranks:
        raise CheckpointUnsplittable(
            f"tensor {tensor.name!r} {list(tensor.shape)} can't be cut into {ranks} along dimension {dimension}"
        )
    shape = list(tensor.shape)
    outer = math.prod(shape[:dimension])
    row_bytes, broken = divmod(tensor.size_bytes, outer) if outer else (0, 0)
    length, cut = divmod(row_bytes, ranks)
    if broken or cut:
        raise CheckpointUnsplittable(f"tensor {tensor.name!r} {tensor.dtype} can't be cut between two bytes")
    shape[dimension] //= ranks
    part = msgspec.structs.replace(tensor, shape=tuple(shape), size_bytes=length * outer)
    return tuple(Piece(part, Runs(rank * length, length, row_bytes, outer)) for rank in range(ranks))


def for_ranks(tensors: Sequence[Described], dimensions: Mapping[str, int | None], ranks: int) -> Plan:
    """Give each rank its slice of every tensor that has a dimension to be split along, and all of the others."""
    check_count(ranks)
    files: list[list[Piece]] = [[] for _ in range(ranks)]
    split = {}
    for tensor in tensors:
        dimension = dimensions[tensor.name]
        if dimension is None:
            pieces: Sequence[Piece] = [whole(tensor)] * ranks
        else:
            pieces, split[tensor.name] = slices(tensor, dimension, ranks), dimension
        for file, piece in zip(files, pieces, strict=True):
            file.append(piece)
    return Plan(Partition(PartitionKind.TENSOR_PARALLEL, ranks, split), tuple(map(tuple, files)))


def check_count(count: int) -> None:
    """Refuse a number of partitions that is out of bounds.

    Raises:
        InvalidInput: it is.
    """
    if not 1 <= count <= MAX_PARTITIONS:
        raise InvalidInput(f"{count} partitions are out of bounds: 1 to {MAX_PARTITIONS}", param="partitions")
