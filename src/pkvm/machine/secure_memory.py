# SPDX-License-Identifier: GPL-2.0-or-later
"""What the secure world was given: memory transactions, as its partition manager keeps them.

It takes descriptors (`arm64.ffa_memory`) from the normal world apart by itself
and trusts no offset, length or count in them. Whether the sender owns the pages
it cannot know: to the secure world all of RAM is the normal world's. That makes
it a deputy whom a host can try to confuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from pkvm.arm64 import ffa_memory
from pkvm.arm64.ffa import NORMAL_WORLD, Status
from pkvm.arm64.ffa_memory import COMPOSITE_BYTES, CONSTITUENT_BYTES, FFA_PAGE, Constituent
from pkvm.machine.memory import PhysicalMemory

MAX_TRANSACTIONS = 64
MAX_BYTES = 1 << 20
"""Of one transaction's descriptors, in all fragments."""
HANDLE_BASE = 0x5EC0_0000_0001
"""The first handle. More than 32 bits, so that nobody gets by with one register."""


class FfaError(Exception):
    """What the secure world says no with: an FF-A error code, and the reason in words."""

    def __init__(self, status: Status, why: str) -> None:
        super().__init__(f"{status.name}: {why}")
        self.status = status


@dataclass(slots=True)
class Grant:
    """A transaction: memory that the normal world gave to `receivers`."""

    handle: int
    what: str
    """"share", "lend" or "donate"."""
    receivers: tuple[int, ...]
    permissions: int
    attributes: int
    flags: int
    tag: int
    total_bytes: int
    """Of its descriptors, as the sender announced."""
    received_bytes: int
    page_count: int
    """As the sender announced; true once all fragments are there."""
    ranges: list[Constituent] = field(default_factory=list)
    retrieved: set[int] = field(default_factory=set)
    """Partitions that have mapped it."""

    @property
    def complete(self) -> bool:
        """Whether all fragments are there."""
        return self.received_bytes == self.total_bytes

    def pa(self, offset: int, length: int) -> int:
        """PA of `length` bytes at byte `offset` of the memory, which must be contiguous. Raises
        FfaError."""
        for item in self.ranges:
            size = item.page_count * FFA_PAGE
            if offset < size:
                if offset + length > size:
                    break
                return item.address + offset
            offset -= size
        raise FfaError(Status.INVALID_PARAMETERS, "the offset is beyond the memory")


class Grants:
    """All transactions, by handle. `partitions` are the endpoints that may receive."""

    def __init__(self, memory: PhysicalMemory, partitions: frozenset[int]) -> None:
        self._memory = memory
        self._partitions = partitions
        self._next = HANDLE_BASE
        self.by_handle: dict[int, Grant] = {}

    def pages(self) -> frozenset[int]:
        """PFNs of all that the secure world was given, complete or not."""
        return frozenset(
            pfn
            for grant in self.by_handle.values()
            for item in grant.ranges
            for pfn in range(item.address >> 12, (item.address >> 12) + item.page_count)
        )

    def find(self, handle: int) -> Grant:
        """The complete transaction of this handle. Raises FfaError."""
        grant = self.by_handle.get(handle)
        if grant is None or not grant.complete:
            raise FfaError(Status.INVALID_PARAMETERS, f"there is no memory {handle:#x}")
        return grant

    def begin(self, what: str, data: bytes, total_bytes: int, version: int) -> Grant:
        """A first fragment. Raises FfaError, and then nothing is kept."""
        if len(self.by_handle) >= MAX_TRANSACTIONS or total_bytes > MAX_BYTES:
            raise FfaError(Status.NO_MEMORY, "no room for another transaction")
        try:
            header = ffa_memory.read_transaction(data, version)
            if header.sender != NORMAL_WORLD or header.handle:
                raise ValueError("the sender is not the caller, or there is a handle already")
            least = ffa_memory.ENDPOINT_LEAST
            if not 0 < header.endpoint_count <= len(self._partitions) or (
                header.endpoint_size < least or header.endpoint_size % least
            ):
                raise ValueError(f"{header.endpoint_count} receivers")
            endpoints = [
                ffa_memory.read_endpoint(data, header.endpoint_offset + at * header.endpoint_size)
                for at in range(header.endpoint_count)
            ]
            receivers = tuple(endpoint.receiver for endpoint in endpoints)
            start = endpoints[0].composite_offset
            composite = ffa_memory.read_composite(data, start)
            if not composite.range_count:
                raise ValueError("a transaction of no memory")
            start += COMPOSITE_BYTES
            ranges = ffa_memory.read_constituents(data[start:])
        except ValueError as error:
            raise FfaError(Status.INVALID_PARAMETERS, str(error)) from error
        if len(set(receivers)) != len(receivers) or not self._partitions.issuperset(receivers):
            raise FfaError(Status.INVALID_PARAMETERS, f"no such receivers: {receivers}")
        if what == "donate" and len(receivers) > 1:
            raise FfaError(Status.INVALID_PARAMETERS, "memory can be donated to one receiver only")
        if start + composite.range_count * CONSTITUENT_BYTES != total_bytes:
            raise FfaError(Status.INVALID_PARAMETERS, "the length and the number of ranges differ")
        grant = Grant(
            self._next,
            what,
            receivers,
            endpoints[0].permissions,
            header.attributes,
            header.flags,
            header.tag,
            total_bytes,
            len(data),
            composite.page_count,
        )
        self._take(grant, ranges)
        self._next += 1
        self.by_handle[grant.handle] = grant
        return grant

    def add(self, handle: int, data: bytes) -> Grant:
        """Another fragment. Raises FfaError; then the transaction is over, unless there is none
        that waits for a fragment."""
        grant = self.by_handle.get(handle)
        if grant is None or grant.complete:
            raise FfaError(Status.INVALID_PARAMETERS, f"no fragment of {handle:#x} is missing")
        try:
            if not data or len(data) > grant.total_bytes - grant.received_bytes:
                raise FfaError(Status.INVALID_PARAMETERS, "a fragment of the wrong length")
            try:
                ranges = ffa_memory.read_constituents(data)
            except ValueError as error:
                raise FfaError(Status.INVALID_PARAMETERS, str(error)) from error
            grant.received_bytes += len(data)
            self._take(grant, ranges)
        except FfaError:
            del self.by_handle[handle]
            raise
        return grant

    def drop(self, handle: int) -> Grant:
        """MEM_RECLAIM: the sender takes its memory back, or gives a transaction up whose fragments
        it has not all sent. Raises FfaError: DENIED while a partition has it mapped."""
        grant = self.by_handle.get(handle)
        if grant is None:
            raise FfaError(Status.INVALID_PARAMETERS, f"there is no memory {handle:#x}")
        if grant.retrieved or (grant.what == "donate" and grant.complete):
            raise FfaError(Status.DENIED, f"memory {handle:#x} is in use")
        return self.by_handle.pop(handle)

    def describe(self, grant: Grant, version: int) -> bytes:
        """A transaction's descriptors, as RETRIEVE_RESP has them."""
        return ffa_memory.write_transaction(
            version,
            grant.ranges,
            receivers=grant.receivers,
            handle=grant.handle,
            tag=grant.tag,
            flags=grant.flags,
            permissions=grant.permissions,
            attributes=grant.attributes,
        )

    def _take(self, grant: Grant, ranges: list[Constituent]) -> None:
        """Add ranges to a transaction. Raises FfaError and has then added none."""
        for item in ranges:
            if item.address % FFA_PAGE or not item.page_count:
                raise FfaError(Status.INVALID_PARAMETERS, f"{item} is no run of pages")
            if not self._memory.is_ram(item.address, item.page_count * FFA_PAGE):
                raise FfaError(Status.DENIED, f"{item} is not RAM")
        pages = sum(item.page_count for item in (*grant.ranges, *ranges))
        if pages > grant.page_count or (grant.complete and pages != grant.page_count):
            raise FfaError(Status.INVALID_PARAMETERS, "the number of pages is not that announced")
        taken = [
            item for other in self.by_handle.values() if other is not grant for item in other.ranges
        ]
        runs = sorted([*taken, *grant.ranges, *ranges])
        for item, following in pairwise(runs):
            if item.address + item.page_count * FFA_PAGE > following.address:
                raise FfaError(Status.DENIED, f"{following} was given already")
        grant.ranges += ranges
