# SPDX-License-Identifier: GPL-2.0-or-later
"""Split virtqueues (section 2.7), the device's side.

Everything in the rings is the driver's word, read once and checked before it is
used: an index out of range, a loop of descriptors or a chain that lies outside
guest memory raises QueueError or GuestMemoryError, upon which the transport
asks for a reset. A chain's descriptors are copied when it is popped, so the
driver cannot change them under the device.

Nothing here locks: the device's lock covers a queue (`pkvm.vmm.virtio.device`).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pkvm.vmm.guest_memory import GuestMemory

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1

DESC_BYTES = 16
MAX_INDIRECT = 1024
"""Descriptors of an indirect table: no queue is longer, and no chain may be longer than its queue
(section 2.7.5.3)."""
MAX_CHAIN_BYTES = 1 << 32
"""Section 2.7.4: a chain has no more bytes than this."""

_descriptor = struct.Struct("<QIHH")
_used_element = struct.Struct("<II")
_u16 = struct.Struct("<H")


class QueueError(Exception):
    """The driver broke the rules of the ring: the text says how. `address` is the IPA that it is
    about, if there is one."""

    def __init__(self, what: str, address: int | None = None) -> None:
        super().__init__(what)
        self.address = address


class Segment(NamedTuple):
    """A part of a buffer: `length` bytes of guest memory at IPA `address`, not checked yet."""

    address: int
    length: int


class Chain:
    """One buffer of the driver's: segments to read, then segments to write.

    A chain that a reset has made stale reads as nothing, and what is written to it is dropped.
    """

    __slots__ = ("_life", "_queue", "head", "readable", "writable", "written")

    def __init__(
        self, queue: Queue, head: int, readable: list[Segment], writable: list[Segment]
    ) -> None:
        self._queue = queue
        self._life = queue.life
        self.head = head
        """Index of its first descriptor: its name in the used ring."""
        self.readable = readable
        """Device-readable segments, in order."""
        self.writable = writable
        """Device-writable segments, in order."""
        self.written = 0
        """Bytes that `write` has put into it."""

    @property
    def stale(self) -> bool:
        """Whether the queue was reset since the chain was popped."""
        return self._life != self._queue.life

    @property
    def readable_bytes(self) -> int:
        """How many bytes the driver gives."""
        return sum(length for _, length in self.readable)

    @property
    def writable_bytes(self) -> int:
        """How many bytes the driver has room for."""
        return sum(length for _, length in self.writable)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset+length) of what the driver gives; fewer where it ends. Raises
        GuestMemoryError."""
        if self.stale:
            return b""
        memory = self._queue.memory
        parts = []
        for address, size in self.readable:
            if length <= 0:
                break
            if offset >= size:
                offset -= size
                continue
            take = min(size - offset, length)
            parts.append(memory.read(address + offset, take))
            offset = 0
            length -= take
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._queue.bytes_read += len(data)
        return data

    def read_all(self, limit: int) -> bytes:
        """All that the driver gives. Raises QueueError if that is more than `limit` bytes,
        GuestMemoryError."""
        length = self.readable_bytes
        if length > limit:
            raise QueueError(f"a buffer of {length} bytes, where at most {limit} have a meaning")
        return self.read(0, length)

    def write(self, data: bytes) -> int:
        """Put `data` behind what was written before, as far as there is room; how many bytes found
        some. Raises GuestMemoryError."""
        done = self.write_at(self.written, data)
        self.written += done
        return done

    def write_at(self, offset: int, data: bytes) -> int:
        """Put `data` at byte `offset` of the room, without counting it as `written`; how many bytes
        found room. Raises GuestMemoryError."""
        if self.stale:
            return 0
        memory = self._queue.memory
        done, length = 0, len(data)
        for address, size in self.writable:
            if offset >= size:
                offset -= size
                continue
            if done == length:
                break
            take = min(size - offset, length - done)
            memory.write(address + offset, data[done : done + take] if take < length else data)
            offset = 0
            done += take
        self._queue.bytes_written += done
        return done


class Queue:
    """One virtqueue. The transport sets it up; the device pops, serves and pushes chains.

    `index`, `name` and `max_size` are fixed; the rest is the driver's choice.
    """

    def __init__(self, memory: GuestMemory, index: int, name: str, max_size: int) -> None:
        self.memory = memory
        self.index = index
        self.name = name
        self.max_size = max_size
        self.life = 0
        """Counts resets."""
        self.chains = 0
        """Chains popped in all lives, for statistics."""
        self.bytes_read = 0
        """Bytes read from chains in all lives."""
        self.bytes_written = 0
        """Bytes written into chains in all lives."""
        self.reset()

    def reset(self) -> None:
        """Back to the state after a device reset (section 2.4). Held chains become stale."""
        self.event_idx = False
        """VIRTIO_F_EVENT_IDX was negotiated."""
        self.indirect = False
        """VIRTIO_F_INDIRECT_DESC was negotiated."""
        self.stop()

    def stop(self) -> None:
        """The driver cleared QueueReady: forget the queue, not the features that were agreed on.
        Held chains become stale."""
        self.life += 1
        self.size = self.max_size
        """Descriptors (QueueNum)."""
        self.descriptors = 0
        """IPA of the descriptor table, as the driver gave it; not checked before it is used."""
        self.driver_ring = 0
        """IPA of the available ring."""
        self.device_ring = 0
        """IPA of the used ring."""
        self.ready = False
        """QueueReady."""
        self.live = False
        """Ready, and the device is running: only then anything is popped or pushed."""
        self._next_available = 0
        self._available = 0
        self._event_written: int | None = None
        self._used = 0
        self._signalled: int | None = None
        self._staged: list[bytes] = []

    def check(self) -> None:
        """Raise QueueError if size or alignment cannot be (section 2.7), GuestMemoryError if a part
        is not memory that the VMM can reach. For the transport, when the driver sets QueueReady."""
        size = self.size
        if not 0 < size <= self.max_size or size & size - 1:
            raise QueueError(
                f"a queue of {size} descriptors: a power of 2 of at most {self.max_size} can be"
            )
        for what, address, align, length in (
            ("descriptor table", self.descriptors, 16, DESC_BYTES * size),
            ("available ring", self.driver_ring, 2, 6 + 2 * size),
            ("used ring", self.device_ring, 4, 6 + 8 * size),
        ):
            if address % align:
                raise QueueError(f"the {what} is not aligned to {align} bytes", address)
            self.memory.read(address, length)

    def pop(self) -> Chain | None:
        """The next chain that the driver made available; None if there is none (then the driver
        will notify when there is one). Raises QueueError, GuestMemoryError."""
        if not self.live:
            return None
        if self._next_available == self._available and not self._look():
            return None
        slot = self._next_available % self.size
        head = self._read_u16(self.driver_ring + 4 + 2 * slot)
        chain = self._chain(head)
        self._next_available = self._next_available + 1 & 0xFFFF
        self.chains += 1
        return chain

    def push(self, chain: Chain, written: int | None = None) -> None:
        """Give a chain back, of which the device wrote the first `written` bytes (default: what
        `chain.write` counted). The driver sees it at the next `publish`."""
        if self.live and not chain.stale:
            if written is None:
                written = chain.written
            self._staged.append(_used_element.pack(chain.head, written))

    def publish(self) -> None:
        """Let the driver see the chains pushed since the last time, all at once. The transport
        does this at the end of `process` and `serving`. Raises GuestMemoryError."""
        staged = self._staged
        if not staged:
            return
        self._staged = []
        size, ring = self.size, self.device_ring + 4
        at = self._used % size
        first = min(len(staged), size - at)
        self.memory.write(ring + 8 * at, b"".join(staged[:first]))
        if first < len(staged):
            self.memory.write(ring, b"".join(staged[first:]))
        self._used = self._used + len(staged) & 0xFFFF
        self.memory.write(self.device_ring + 2, _u16.pack(self._used))

    def notify_needed(self) -> bool:
        """Whether the driver wants an interrupt for what was published since this was last asked
        (section 2.7.7). Raises GuestMemoryError."""
        before, now = self._signalled, self._used
        if before == now or (before is None and not now):
            return False
        self._signalled = now
        if not self.event_idx:
            return not self._read_u16(self.driver_ring) & AVAIL_NO_INTERRUPT
        if before is None:
            return True
        event = self._read_u16(self.driver_ring + 4 + 2 * self.size)
        return (now - event - 1) & 0xFFFF < (now - before) & 0xFFFF

    def want_notifications(self, wanted: bool) -> None:
        """Without EVENT_IDX: ask the driver not to notify, or to notify again (a hint). With it
        `pop` does what is needed. Raises GuestMemoryError."""
        if self.live and not self.event_idx:
            flags = 0 if wanted else USED_NO_NOTIFY
            self.memory.write(self.device_ring, _u16.pack(flags))

    def _look(self) -> bool:
        """Whether the driver made more available; otherwise ask for a notification."""
        while True:
            available = self._read_u16(self.driver_ring + 2)
            waiting = available - self._next_available & 0xFFFF
            if waiting > self.size:
                raise QueueError(
                    f"{waiting} chains are available in a ring of {self.size}", self.driver_ring + 2
                )
            self._available = available
            if waiting:
                return True
            if not self.event_idx or self._event_written == available:
                return False
            # The driver may add one between the look and the wish: look once more.
            self.memory.write(self.device_ring + 4 + 8 * self.size, _u16.pack(self._next_available))
            self._event_written = available

    def _chain(self, head: int) -> Chain:
        size = self.size
        if head >= size:
            raise QueueError(f"descriptor {head} of {size} is available", self.descriptors)
        address, length, flags, _ = _descriptor.unpack(
            self.memory.read(self.descriptors + DESC_BYTES * head, DESC_BYTES)
        )
        if flags & DESC_INDIRECT:
            if not self.indirect:
                raise QueueError("an indirect descriptor, which was not negotiated", address)
            if flags & DESC_NEXT:
                raise QueueError("an indirect descriptor has a next one", address)
            if length % DESC_BYTES or not 0 < length <= DESC_BYTES * MAX_INDIRECT:
                raise QueueError(f"an indirect table of {length} bytes", address)
            table, base, count, at = self.memory.read(address, length), address, length >> 4, 0
        elif flags & DESC_NEXT:
            base, count, at = self.descriptors, size, head
            table = self.memory.read(base, DESC_BYTES * size)
        else:
            segment = [Segment(address, length)]
            return Chain(self, head, *(([], segment) if flags & DESC_WRITE else (segment, [])))
        return self._walk(head, table, base, count, at)

    def _walk(self, head: int, table: bytes, base: int, count: int, at: int) -> Chain:
        """The chain that starts at descriptor `at` of `count` in `table`, read at IPA `base`."""
        readable: list[Segment] = []
        writable: list[Segment] = []
        total = 0
        for _ in range(count):
            address, length, flags, following = _descriptor.unpack_from(table, DESC_BYTES * at)
            if flags & DESC_INDIRECT:
                raise QueueError("an indirect descriptor within a chain", base + DESC_BYTES * at)
            if flags & DESC_WRITE:
                writable.append(Segment(address, length))
            elif writable:
                raise QueueError("a buffer to read after one to write", base + DESC_BYTES * at)
            else:
                readable.append(Segment(address, length))
            total += length
            if total > MAX_CHAIN_BYTES:
                raise QueueError(f"a chain of more than {MAX_CHAIN_BYTES} bytes", base)
            if not flags & DESC_NEXT:
                return Chain(self, head, readable, writable)
            at = following
            if at >= count:
                raise QueueError(f"a chain goes on at descriptor {at} of {count}", base)
        raise QueueError(f"a chain of {count} descriptors does not end", base)

    def _read_u16(self, ipa: int) -> int:
        return int.from_bytes(self.memory.read(ipa, 2), "little")
