# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's DMA-capable devices, as its boot firmware told EL2, and what EL2 notes of each.

Four words for each in a page of EL2's. TAINTED: a device's registers were once a
target of DMA that the host directed; nobody can say what it left in flight, so
they are the host's for ever (facts §10). A device that was given to a VM has that
VM's handle, and the numbers by which the VM knows its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.hyp.errors import HypBug
from pkvm.hyp.pool import PagePool
from pkvm.machine import dma, scatter
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu import DmaDevice

TAINTED = 1 << 0
_WORDS = 4
_NOTE, _OWNER, _PVIOMMU, _VSID = range(_WORDS)


class Reset(NamedTuple):
    """How a device is reset: offsets of its registers of 8 bytes, and what they say."""

    control: int
    """Written with `reset`, when `status` does not say `busy`."""
    reset: int
    status: int
    busy: int


RESETS = {
    "dma-copy": Reset(dma.CTRL, dma.CTRL_RESET, dma.STATUS, dma.STATUS_BUSY),
    "dma-sg": Reset(scatter.CTRL, dma.CTRL_RESET, scatter.STATUS, dma.STATUS_BUSY),
}
"""EL2's reset handlers, by the device's name. Only such a device can be given to a guest."""
_POLLS = 1000
"""Reads of a status before a device counts as dead."""


class DeviceTable:
    """The devices, by index. Called with EL2's lock held."""

    def __init__(
        self, memory: PhysicalMemory, pool: PagePool, devices: Sequence[DmaDevice]
    ) -> None:
        if len(devices) > PAGE_SIZE // (8 * _WORDS):
            raise ValueError(f"EL2 has no room for {len(devices)} devices")
        self.devices = tuple(devices)
        self._memory = memory
        first = (pool.alloc_aligned(1) - memory.ram_base) >> 3
        self.notes: memoryview[int] = memory.words[first : first + _WORDS * len(self.devices)]
        """`_WORDS` for each device."""

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
        self.notes[_WORDS * index + _NOTE] |= TAINTED

    def is_tainted(self, index: int) -> bool:
        """Whether it ever has."""
        return bool(self.notes[_WORDS * index + _NOTE] & TAINTED)

    def owner(self, index: int) -> int:
        """Handle of the VM that has the device; 0: the host has it."""
        return self.notes[_WORDS * index + _OWNER]

    def give(self, index: int, handle: int, pviommu: int, vsid: int) -> None:
        """The device is this VM's, which knows its stream by (pviommu, vsid); or, all 0, it is the
        host's again."""
        first = _WORDS * index
        self.notes[first + _OWNER] = handle
        self.notes[first + _PVIOMMU] = pviommu
        self.notes[first + _VSID] = vsid

    def of_vm(self, handle: int) -> list[int]:
        """Indices of the devices that a VM has."""
        return [index for index in range(len(self.devices)) if self.owner(index) == handle]

    def named(self, handle: int, pviommu: int, vsid: int) -> int | None:
        """Index of the VM's device whose stream it knows by these numbers, if any."""
        for index in self.of_vm(handle):
            first = _WORDS * index
            if self.notes[first + _PVIOMMU] == pviommu and self.notes[first + _VSID] == vsid:
                return index
        return None

    def can_reset(self, index: int) -> bool:
        """Whether EL2 has a reset handler for the device."""
        return self.devices[index].name in RESETS

    def reset(self, index: int) -> None:
        """Reset the device: nothing of what it was told is left, and nothing is under way. Its DMA
        is blocked and nobody else has its registers, so that what is under way ends."""
        base, how = self.devices[index].base, RESETS[self.devices[index].name]
        for _ in range(_POLLS):
            if int.from_bytes(self._memory.read(base + how.status, 8), "little") != how.busy:
                self._memory.write(base + how.control, how.reset.to_bytes(8, "little"))
                return
        raise HypBug(f"the device at {base:#x} does not stop")
