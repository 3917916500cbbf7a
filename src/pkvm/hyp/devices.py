# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's DMA-capable devices, as its boot firmware told EL2, and what EL2 notes of each.

A word for each in a page of EL2's. TAINTED: a device's registers were once a
target of DMA that the host directed; nobody can say what it left in flight, so
they are the host's for ever (facts §10).
"""

from __future__ import annotations

from collections.abc import Sequence

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.hyp.pool import PagePool
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu import DmaDevice

TAINTED = 1 << 0


class DeviceTable:
    """The devices, by index. Called with EL2's lock held."""

    def __init__(
        self, memory: PhysicalMemory, pool: PagePool, devices: Sequence[DmaDevice]
    ) -> None:
        if len(devices) > PAGE_SIZE // 8:
            raise ValueError(f"EL2 has no room for {len(devices)} devices")
        self.devices = tuple(devices)
        first = (pool.alloc_aligned(1) - memory.ram_base) >> 3
        self.notes: memoryview[int] = memory.words[first : first + len(self.devices)]
        """A word for each device."""

    def at(self, pa: int, nbytes: int) -> int | None:
        """Index of the device whose registers hold all of [pa, pa+nbytes), if any."""
        for index, device in enumerate(self.devices):
            if device.base <= pa and pa + nbytes <= device.base + device.size:
                return index
        return None

    def of_stream(self, stream: int) -> int | None:
        """Index of the device with this StreamID, if any."""
        for index, device in enumerate(self.devices):
            if device.stream == stream:
                return index
        return None

    def taint(self, index: int) -> None:
        """The host has directed DMA at the device's registers."""
        self.notes[index] |= TAINTED

    def is_tainted(self, index: int) -> bool:
        """Whether it ever has."""
        return bool(self.notes[index] & TAINTED)
