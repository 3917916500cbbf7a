# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's side of virtio, for tests: RAM that knows who may touch what, and a small driver.

`Driver` behaves well; `VirtqueueWriter` writes any ring, so that a test can behave badly with it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pkvm.uapi.errors import ProtectedPageError
from pkvm.vmm.faults import Faults
from pkvm.vmm.guest_memory import GuestMemory
from pkvm.vmm.virtio import mmio
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.mmio import MmioDevice

PAGE = 4096
RAM_BASE = 0x4000_0000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Ram:
    """RAM as a VMM sees it (`pkvm.kvm.Memory`, as far as devices need it), with private pages."""

    def __init__(self, length: int) -> None:
        self.address = 0x7000_0000_0000
        self.length = length
        self.bytes = bytearray(length)
        self.private: set[int] = set()
        """Numbers of pages that the VMM may not touch."""
        self.written: list[tuple[int, int]] = []
        """(offset, length) of every store that was let through."""

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length, "load")
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        try:
            self._check(offset, len(data), "store")
        except ProtectedPageError as error:
            # As the bus does: the pages before the refused one are written.
            self._store(offset, data[: error.address - self.address - offset])
            raise
        self._store(offset, data)

    def _store(self, offset: int, data: bytes) -> None:
        self.written.append((offset, len(data)))
        self.bytes[offset : offset + len(data)] = data

    def _check(self, offset: int, length: int, access: str) -> None:
        assert offset >= 0
        assert offset + length <= self.length
        for page in range(offset // PAGE, (offset + length - 1) // PAGE + 1):
            if page in self.private:
                raise ProtectedPageError(self.address + max(page * PAGE, offset), access)


class Wire:
    """An interrupt line that remembers."""

    def __init__(self) -> None:
        self.level = False
        self.raised = 0
        """How often it went up."""

    def set(self, level: bool) -> None:
        self.raised += level and not self.level
        self.level = level


class Window(Protocol):
    """A device's registers."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class Rig:
    """A device behind its transport, RAM, a wire, and the report."""

    def __init__(
        self, backend: VirtioDevice, *, ram_bytes: int = 1 << 20, protected: bool = True
    ) -> None:
        self.ram = Ram(ram_bytes)
        self.wire = Wire()
        self.faults = Faults()
        self.memory = GuestMemory([(RAM_BASE, self.ram)])
        self.backend = backend
        self.device = MmioDevice(
            backend, 0, self.wire, self.memory, self.faults, protected=protected
        )

    @property
    def status(self) -> int:
        return self.device.read(mmio.STATUS, 4)

    @property
    def needs_reset(self) -> bool:
        return bool(self.status & mmio.NEEDS_RESET)

    def report(self) -> str:
        return "\n".join(self.faults.lines())


class Descriptor(NamedTuple):
    address: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", *self)


class VirtqueueWriter:
    """The driver's side of a split ring of `size` descriptors at `ram` offset `at`, a page-aligned
    place with room for `bytes_for(size)`."""

    def __init__(self, ram: Ram, at: int, size: int) -> None:
        self.ram = ram
        self.size = size
        self.descriptors = RAM_BASE + at
        self.driver_ring = self.descriptors + 16 * size
        self.device_ring = -(-(self.driver_ring + 6 + 2 * size) // 4) * 4
        self.end = self.device_ring + 6 + 8 * size
        self.available = 0
        self.seen = 0

    def put(self, ipa: int, data: bytes) -> None:
        offset = ipa - RAM_BASE
        self.ram.bytes[offset : offset + len(data)] = data

    def get(self, ipa: int, length: int) -> bytes:
        offset = ipa - RAM_BASE
        return bytes(self.ram.bytes[offset : offset + length])

    def word(self, ipa: int) -> int:
        return int.from_bytes(self.get(ipa, 2), "little")

    def describe(self, index: int, descriptor: Descriptor) -> None:
        self.put(self.descriptors + 16 * index, descriptor.pack())

    def make_available(self, *heads: int) -> None:
        for head in heads:
            slot = self.available % self.size
            self.put(self.driver_ring + 4 + 2 * slot, head.to_bytes(2, "little"))
            self.available = self.available + 1 & 0xFFFF
        self.put(self.driver_ring + 2, self.available.to_bytes(2, "little"))

    def set_flags(self, flags: int) -> None:
        self.put(self.driver_ring, flags.to_bytes(2, "little"))

    def set_used_event(self, index: int) -> None:
        self.put(self.driver_ring + 4 + 2 * self.size, index.to_bytes(2, "little"))

    @property
    def avail_event(self) -> int:
        return self.word(self.device_ring + 4 + 8 * self.size)

    @property
    def used_index(self) -> int:
        return self.word(self.device_ring + 2)

    def used(self) -> list[tuple[int, int]]:
        """(head, length) of what came back since the last time."""
        found = []
        while self.seen != self.used_index:
            at = self.device_ring + 4 + 8 * (self.seen % self.size)
            head, length = struct.unpack("<II", self.get(at, 8))
            found.append((head, length))
            self.seen = self.seen + 1 & 0xFFFF
        return found


class Used(NamedTuple):
    """A buffer that came back: how many bytes the device wrote, and the whole room."""

    length: int
    data: bytes


class Driver:
    """A driver that follows the rules. Uses the RAM of `rig` from its start on."""

    def __init__(
        self,
        rig: Rig,
        *,
        features: int = -1,
        size: int = 16,
        indirect: bool = False,
        start: bool = True,
    ) -> None:
        self.rig = rig
        self.device = rig.device
        self.indirect = indirect
        self.free_at = 0
        self.queues: list[VirtqueueWriter] = []
        self._next = 0
        self._buffers: dict[tuple[int, int], list[tuple[int, int]]] = {}
        write = self.write
        write(mmio.STATUS, 0)
        write(mmio.STATUS, mmio.ACKNOWLEDGE)
        write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER)
        self.features = self.offered() & features
        for sel in (0, 1):
            write(mmio.DRIVER_FEATURES_SEL, sel)
            write(mmio.DRIVER_FEATURES, self.features >> 32 * sel & 0xFFFF_FFFF)
        write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK)
        for index in range(len(rig.backend.queue_names)):
            self.queues.append(self.set_up(index, size))
        if start:
            self.start()

    def write(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value)

    def read(self, offset: int) -> int:
        return self.device.read(offset, 4)

    def offered(self) -> int:
        words = []
        for sel in (0, 1):
            self.write(mmio.DEVICE_FEATURES_SEL, sel)
            words.append(self.read(mmio.DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def set_up(self, index: int, size: int) -> VirtqueueWriter:
        queue = VirtqueueWriter(self.rig.ram, self.take(0), size)
        self.free_at = queue.end - RAM_BASE
        start = queue.descriptors - RAM_BASE
        self.rig.ram.bytes[start : self.free_at] = bytes(self.free_at - start)
        self.write(mmio.QUEUE_SEL, index)
        self.write(mmio.QUEUE_NUM, size)
        for register, address in (
            (mmio.QUEUE_DESC_LOW, queue.descriptors),
            (mmio.QUEUE_DRIVER_LOW, queue.driver_ring),
            (mmio.QUEUE_DEVICE_LOW, queue.device_ring),
        ):
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(mmio.QUEUE_READY, 1)
        return queue

    def start(self) -> None:
        self.write(mmio.STATUS, self.read(mmio.STATUS) | mmio.DRIVER_OK)

    def take(self, length: int) -> int:
        """Offset of `length` bytes of RAM that nobody uses, from a page of their own."""
        at = -(-self.free_at // PAGE) * PAGE
        self.free_at = at + length
        assert self.free_at <= self.rig.ram.length, "the driver's RAM is used up"
        return at

    def add(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), queue: int = 0
    ) -> int:
        """Make a buffer available; its head."""
        ring = self.queues[queue]
        parts = []
        rooms = []
        for data in readable:
            at = self.take(len(data))
            self.rig.ram.bytes[at : at + len(data)] = data
            parts.append(Descriptor(RAM_BASE + at, len(data)))
        for length in writable:
            at = self.take(length)
            self.rig.ram.bytes[at : at + length] = bytes(length)
            rooms.append((at, length))
            parts.append(Descriptor(RAM_BASE + at, length, WRITE))
        head = self._next
        count = 1 if self.indirect else len(parts)
        assert count <= ring.size
        if head + count > ring.size:
            head = 0
        self._next = head + count
        first = 0 if self.indirect else head
        chain = [
            part._replace(flags=part.flags | NEXT, next=first + n + 1)
            for n, part in enumerate(parts[:-1])
        ] + parts[-1:]
        if self.indirect:
            table = b"".join(part.pack() for part in chain)
            at = self.take(len(table))
            self.rig.ram.bytes[at : at + len(table)] = table
            ring.describe(head, Descriptor(RAM_BASE + at, len(table), INDIRECT))
        else:
            for n, part in enumerate(chain):
                ring.describe(head + n, part)
        self._buffers[queue, head] = rooms
        ring.make_available(head)
        return head

    def notify(self, queue: int = 0) -> None:
        self.write(mmio.QUEUE_NOTIFY, queue)

    def acknowledge(self) -> int:
        """What an interrupt handler does; the causes."""
        causes = self.read(mmio.INTERRUPT_STATUS)
        self.write(mmio.INTERRUPT_ACK, causes)
        return causes

    def collect(self, queue: int = 0) -> list[Used]:
        """The buffers that came back."""
        back = []
        for head, length in self.queues[queue].used():
            rooms = self._buffers.pop((queue, head))
            ram = self.rig.ram.bytes
            back.append(Used(length, b"".join(bytes(ram[at : at + n]) for at, n in rooms)))
        return back

    def request(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), queue: int = 0
    ) -> Used:
        """One buffer there and back. Its RAM is free again afterwards."""
        mark = self.free_at
        self.add(readable, writable, queue)
        self.notify(queue)
        (used,) = self.collect(queue)
        self.free_at = mark
        return used
