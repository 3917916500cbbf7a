# SPDX-License-Identifier: GPL-2.0-or-later
"""FF-A memory management (DEN0077A chapter 5; DEN0140): the descriptors, as data.

A transaction is one run of bytes: the transaction descriptor, an array of
endpoint access descriptors, and a composite region with its constituents, each
a run of 4 KiB pages. Where the parts lie the descriptors say themselves. If
the whole does not fit into a buffer it is sent in fragments; the first one ends
behind any constituent, the others consist of constituents alone.

The layout of FF-A 1.0 and that of 1.1 differ in the first part, and an
endpoint's part has grown in 1.2. All words are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pkvm.arm64.ffa import NORMAL_WORLD, VERSION_1_0, VERSION_1_1

FFA_PAGE = 4096
"""Bytes of the page that FF-A counts in."""


class Transaction(NamedTuple):
    """The transaction descriptor's fields. In 1.0 an endpoint's descriptor has a fixed size and
    place."""

    sender: int
    attributes: int
    flags: int
    handle: int
    tag: int
    endpoint_size: int
    endpoint_count: int
    endpoint_offset: int


class Endpoint(NamedTuple):
    """An endpoint memory access descriptor, as far as it is the same in all versions."""

    receiver: int
    permissions: int
    flags: int
    composite_offset: int
    """From the transaction's first byte."""


class Composite(NamedTuple):
    """A composite memory region descriptor; the constituents follow it."""

    page_count: int
    range_count: int


class Constituent(NamedTuple):
    """A run of `page_count` pages of 4 KiB at PA `address`."""

    address: int
    page_count: int


@dataclass(frozen=True, slots=True)
class Format:
    """How a version lays the first two descriptors out."""

    header_bytes: int
    endpoint_bytes: int
    """Of each endpoint's descriptor, as a sender writes it."""
    has_endpoint_place: bool
    """The header says where the endpoints' descriptors are and how large one is."""

    @property
    def first_bytes(self) -> int:
        """Bytes of header and one endpoint: what a first fragment has at least."""
        return self.header_bytes + self.endpoint_bytes


_FORMAT_1_0 = Format(32, 16, has_endpoint_place=False)
_FORMAT_1_1 = Format(48, 16, has_endpoint_place=True)
_FORMAT_1_2 = Format(48, 32, has_endpoint_place=True)

_HEADER = struct.Struct("<HHIQQII")
_ENDPOINT_PLACE = struct.Struct("<I12x")
_ENDPOINT = struct.Struct("<HBBI")
ENDPOINT_LEAST = 16
"""Bytes that an endpoint's descriptor has in every version."""
_COMPOSITE = struct.Struct("<II8x")
_CONSTITUENT = struct.Struct("<QI4x")
COMPOSITE_BYTES = _COMPOSITE.size
CONSTITUENT_BYTES = _CONSTITUENT.size

PARTITION_INFO_1_0_BYTES = 8
"""Of each partition in PARTITION_INFO_GET's answer in FF-A 1.0; later the answer says it."""

PERMISSION_RO = 1
PERMISSION_RW = 2
"""Data access in an endpoint's permissions."""
NORMAL_WRITE_BACK = 0x2F
"""Attributes of normal memory: write-back, inner shareable."""


def format_of(version: int) -> Format:
    """The layout of a version (`ffa.VERSION_1_0`...)."""
    if version == VERSION_1_0:
        return _FORMAT_1_0
    return _FORMAT_1_1 if version == VERSION_1_1 else _FORMAT_1_2


def read_transaction(data: bytes, version: int) -> Transaction:
    """The transaction descriptor at the start of `data`. Raises ValueError if it does not fit."""
    layout = format_of(version)
    if len(data) < layout.header_bytes:
        raise ValueError(f"{len(data)} bytes are no transaction descriptor")
    sender, attributes, flags, handle, tag, word, count = _HEADER.unpack_from(data)
    if not layout.has_endpoint_place:
        return Transaction(
            sender, attributes & 0xFF, flags, handle, tag, ENDPOINT_LEAST, count, _HEADER.size
        )
    (offset,) = _ENDPOINT_PLACE.unpack_from(data, _HEADER.size)
    return Transaction(sender, attributes, flags, handle, tag, word, count, offset)


def read_endpoint(data: bytes, offset: int) -> Endpoint:
    """The endpoint's descriptor at byte `offset`. Raises ValueError if it does not fit."""
    if not 0 <= offset <= len(data) - ENDPOINT_LEAST:
        raise ValueError(f"an endpoint's descriptor at {offset:#x} is beyond the buffer")
    return Endpoint(*_ENDPOINT.unpack_from(data, offset))


def read_composite(data: bytes, offset: int) -> Composite:
    """The composite region's descriptor at byte `offset`. Raises ValueError if it does not fit."""
    if not 0 <= offset <= len(data) - COMPOSITE_BYTES:
        raise ValueError(f"a composite region at {offset:#x} is beyond the buffer")
    return Composite(*_COMPOSITE.unpack_from(data, offset))


def read_constituents(data: bytes) -> list[Constituent]:
    """All of `data` as constituents. Raises ValueError if it is not a whole number of them."""
    if len(data) % CONSTITUENT_BYTES:
        raise ValueError(f"{len(data)} bytes are no whole number of constituents")
    return [Constituent(*fields) for fields in _CONSTITUENT.iter_unpack(data)]


def write_constituents(ranges: Sequence[Constituent]) -> bytes:
    """The constituents' bytes."""
    return b"".join(_CONSTITUENT.pack(*item) for item in ranges)


def write_transaction(
    version: int,
    ranges: Sequence[Constituent],
    *,
    receivers: Sequence[int],
    sender: int = NORMAL_WORLD,
    handle: int = 0,
    tag: int = 0,
    flags: int = 0,
    permissions: int = PERMISSION_RW,
    attributes: int = NORMAL_WRITE_BACK,
) -> bytes:
    """A whole transaction in one version's layout, the composite region behind the endpoints."""
    layout = format_of(version)
    count = len(receivers)
    composite = layout.header_bytes + count * layout.endpoint_bytes
    size = layout.endpoint_bytes if layout.has_endpoint_place else 0
    parts = [_HEADER.pack(sender, attributes, flags, handle, tag, size, count)]
    if layout.has_endpoint_place:
        parts.append(_ENDPOINT_PLACE.pack(layout.header_bytes))
    for receiver in receivers:
        endpoint = _ENDPOINT.pack(receiver, permissions, 0, composite)
        parts.append(endpoint.ljust(layout.endpoint_bytes, b"\0"))
    parts.append(_COMPOSITE.pack(sum(item.page_count for item in ranges), len(ranges)))
    parts.append(write_constituents(ranges))
    return b"".join(parts)


def write_retrieval(version: int, handle: int) -> bytes:
    """A hypervisor's MEM_RETRIEVE_REQ: which transaction's descriptors it wants."""
    return write_transaction(version, [], receivers=[], handle=handle)[
        : format_of(version).header_bytes
    ]
