# SPDX-License-Identifier: GPL-2.0-or-later
"""`VirtioBus`: the board's virtio-mmio slots, eight windows to a page.

A slot without a device reads as zero and is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pkvm.vmm import board
from pkvm.vmm.faults import Faults
from pkvm.vmm.guest_memory import GuestMemory
from pkvm.vmm.irq import Line
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.mmio import MmioDevice

if TYPE_CHECKING:
    from pkvm.vmm.vmm import Vmm

_WINDOW_SHIFT = board.VIRTIO_STRIDE.bit_length() - 1
_WINDOW_MASK = board.VIRTIO_STRIDE - 1
_PER_PAGE = board.PAGE_SIZE // board.VIRTIO_STRIDE


class VirtioPage:
    """A page of windows: a `Device` of the VMM's."""

    def __init__(self) -> None:
        self.windows: list[MmioDevice | None] = [None] * _PER_PAGE

    def read(self, offset: int, size: int) -> int:
        """A load at `offset` of the page."""
        device = self.windows[offset >> _WINDOW_SHIFT]
        return device.read(offset & _WINDOW_MASK, size) if device is not None else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A store at `offset` of the page."""
        device = self.windows[offset >> _WINDOW_SHIFT]
        if device is not None:
            device.write(offset & _WINDOW_MASK, size, value)


class VirtioBus:
    """Puts each of `backends` (by slot, 0 to 31) behind its window, on the SPI `line(spi)`; those
    that move their data by DMA reach guest memory through `dma`, the others through `memory`. The
    rest is for `MmioDevice`.

    Made anew for each life of a VM, with the same backends.
    """

    def __init__(
        self,
        backends: Mapping[int, VirtioDevice],
        memory: GuestMemory,
        line: Callable[[int], Line],
        faults: Faults,
        *,
        protected: bool,
        pool: int | None = None,
        dma: GuestMemory | None = None,
    ) -> None:
        self.devices: dict[int, MmioDevice] = {}
        """By slot."""
        self.pages: dict[int, VirtioPage] = {}
        """By page number of their IPA, for `Vmm.devices`."""
        for slot, backend in sorted(backends.items()):
            device = MmioDevice(
                backend,
                slot,
                line(board.virtio_spi(slot)),
                dma if backend.by_dma and dma is not None else memory,
                faults,
                protected=protected,
                pool=pool,
            )
            self.devices[slot] = device
            number = board.virtio_base(slot) // board.PAGE_SIZE
            page = self.pages.setdefault(number, VirtioPage())
            page.windows[slot % _PER_PAGE] = device

    def reset(self) -> None:
        """Reset every device: the VM's memory goes, and no device may hold a part of it."""
        for device in self.devices.values():
            device.reset()

    def halt(self) -> None:
        """The run ends: let no device's work keep a vCPU's thread. Any thread may."""
        for device in self.devices.values():
            device.halt()

    def close(self) -> None:
        """End the devices, their threads and files. Idempotent."""
        for device in self.devices.values():
            device.close()


def plug(backends: Mapping[int, VirtioDevice], faults: Faults) -> Callable[[Vmm], VirtioBus]:
    """What puts `backends` on a VM's board: for `Vmm(plug=...)`, once for each of its lives. The
    backends stay open at the end of a life; who made them closes them."""

    def into(vmm: Vmm) -> VirtioBus:
        memory = GuestMemory([(board.RAM_BASE, vmm.ram)])
        dma = None
        if any(backend.by_dma for backend in backends.values()):
            # Imported here: most boards have no such device.
            from pkvm.vmm.dma_memory import DmaMemory

            moved = DmaMemory(vmm.kvm.kernel, vmm.ram)
            vmm.at_close(moved.close)
            dma = GuestMemory([(board.RAM_BASE, moved)])
        pool = vmm.board.bounce_base if vmm.protected and vmm.board.bounce_bytes else None
        bus = VirtioBus(
            backends, memory, vmm.line, faults, protected=vmm.protected, pool=pool, dma=dma
        )
        vmm.devices.update(bus.pages)
        vmm.at_end(bus.halt)
        vmm.at_close(bus.reset)
        return bus

    return into
