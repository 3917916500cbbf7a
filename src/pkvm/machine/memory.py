# SPDX-License-Identifier: GPL-2.0-or-later
"""Physical memory: one address space of bytes, RAM and device windows.

RAM is one anonymous mapping of the process, handed to the CPU engine as one
region (docs: a region per page is slow, and thousands corrupt the engine).
This is the memory system behind every stage-2: no check of ownership happens
here. Only the hardware (walker, engine, buses) and EL2 hold a `PhysicalMemory`;
the host and devices reach it through a `Bus`.

`words` and `u64` are two views of all RAM for those who touch single entries
(a memoryview item costs 40 ns) and for those who touch whole tables (numpy).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAGE_SIZE = 4096
_DISCARD_BYTES = 1 << 20 if sys.platform == "linux" else sys.maxsize
"""Ranges that `PhysicalMemory.zero` discards: only Linux promises zeroes after MADV_DONTNEED."""


class BusError(Exception):
    """Nothing answers at this physical address (an external abort on hardware)."""

    def __init__(self, pa: int, length: int) -> None:
        super().__init__(f"nothing answers at PA {pa:#x} (+{length:#x})")
        self.pa = pa


@dataclass(frozen=True, slots=True)
class DeviceWindow:
    """A device's registers in the physical address space.

    `read(offset, size)` and `write(offset, size, value)` get 1, 2, 4 or 8 byte accesses and end
    with the access. What a write sets going beyond that (DMA) is done in `work`, which the bus
    calls after each access, when nothing is held any more: a device is a bus master of its own.
    """

    name: str
    base: int
    size: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    work: Callable[[], None] | None = None


class PhysicalMemory:
    """`ram_bytes` of RAM from PA `ram_base` (both page-aligned), and device windows.

    Raises ValueError for an unaligned or empty RAM, MemoryError if the process cannot have it.
    """

    def __init__(self, ram_base: int, ram_bytes: int) -> None:
        if ram_base % PAGE_SIZE or ram_bytes % PAGE_SIZE or ram_bytes <= 0:
            raise ValueError(f"RAM at {ram_base:#x} of {ram_bytes:#x} bytes is not page-aligned")
        self.ram_base = ram_base
        self.ram_bytes = ram_bytes
        self.ram_end = ram_base + ram_bytes
        try:
            self._map = mmap.mmap(-1, ram_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"cannot reserve {ram_bytes >> 20} MiB of RAM: {error}") from error
        self._bytes = memoryview(self._map)
        self.words: memoryview[int] = self._bytes.cast("Q")
        """All RAM as unsigned 64-bit words; index (pa - ram_base) >> 3."""
        self.u64: npt.NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        """The same words as a numpy array."""
        self._windows: list[DeviceWindow] = []

    @property
    def host_address(self) -> int:
        """Address of RAM's first byte in this process, for the CPU engine."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def is_ram(self, pa: int, length: int = 1) -> bool:
        """Whether [pa, pa+length) lies wholly in RAM; length in bytes."""
        return self.ram_base <= pa and length >= 0 and pa + length <= self.ram_end

    def add_window(self, window: DeviceWindow) -> None:
        """Put a device on the bus. Raises ValueError if it overlaps RAM or another device."""
        end = window.base + window.size
        if window.base < self.ram_end and end > self.ram_base:
            raise ValueError(f"{window.name} at {window.base:#x} overlaps RAM")
        for other in self._windows:
            if window.base < other.base + other.size and end > other.base:
                raise ValueError(f"{window.name} at {window.base:#x} overlaps {other.name}")
        self._windows.append(window)

    @property
    def windows(self) -> tuple[DeviceWindow, ...]:
        """The device windows, in the order they were added."""
        return tuple(self._windows)

    def window_at(self, pa: int, length: int) -> DeviceWindow:
        """The device that answers an access of `length` bytes (1, 2, 4 or 8) at PA `pa`.

        Raises BusError if there is none, or if the access leaves its window.
        """
        for window in self._windows:
            if window.base <= pa and pa + length <= window.base + window.size:
                if length in (1, 2, 4, 8):
                    return window
                break
        raise BusError(pa, length)

    def read_ram(self, pa: int, length: int) -> bytes:
        """`length` bytes of RAM at PA `pa`, or none if that is not wholly RAM."""
        start = pa - self.ram_base
        if start < 0 or pa + length > self.ram_end:
            return b""
        return self._bytes[start : start + length].tobytes()

    def read(self, pa: int, length: int) -> bytes:
        """`length` bytes at PA `pa`. A device is read by 1, 2, 4 or 8 bytes. Raises BusError."""
        if self.is_ram(pa, length):
            offset = pa - self.ram_base
            return bytes(self._bytes[offset : offset + length])
        window = self.window_at(pa, length)
        value = window.read(pa - window.base, length)
        if window.work is not None:
            window.work()
        return value.to_bytes(length, "little")

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at PA `pa`. Raises BusError. Does not invalidate translated code: see
        `CpuEngine.invalidate_code`."""
        length = len(data)
        if self.is_ram(pa, length):
            offset = pa - self.ram_base
            self._bytes[offset : offset + length] = data
            return
        window = self.window_at(pa, length)
        window.write(pa - window.base, length, int.from_bytes(data, "little"))
        if window.work is not None:
            window.work()

    def read_u64(self, pa: int) -> int:
        """The aligned 64-bit word at PA `pa` of RAM. Raises BusError."""
        if pa & 7 or not self.is_ram(pa, 8):
            raise BusError(pa, 8)
        return self.words[(pa - self.ram_base) >> 3]

    def write_u64(self, pa: int, value: int) -> None:
        """Store an aligned 64-bit word in RAM. Raises BusError."""
        if pa & 7 or not self.is_ram(pa, 8):
            raise BusError(pa, 8)
        self.words[(pa - self.ram_base) >> 3] = value

    def table(self, pa: int) -> npt.NDArray[np.uint64]:
        """The 512 words of the page at PA `pa`, as a view. Raises BusError."""
        return self.span(pa, PAGE_SIZE)

    def span(self, pa: int, length: int) -> npt.NDArray[np.uint64]:
        """RAM [pa, pa+length) as a numpy view of 64-bit words; both multiples of 8."""
        if (pa | length) & 7 or not self.is_ram(pa, length):
            raise BusError(pa, length)
        start = (pa - self.ram_base) >> 3
        return self.u64[start : start + (length >> 3)]

    def zero(self, pa: int, length: int) -> None:
        """Zero RAM [pa, pa+length); multiples of 8 bytes. Raises BusError.

        A large range is handed back to the operating system instead, which gives zeroes when it
        is touched again: memory that a guest never touched costs nothing to wipe.
        """
        span = self.span(pa, length)
        if length >= _DISCARD_BYTES and (pa | length) % mmap.PAGESIZE == 0:
            self._map.madvise(mmap.MADV_DONTNEED, pa - self.ram_base, length)
        else:
            span.fill(0)
