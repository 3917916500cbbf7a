# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory as a DMA-capable device reaches it: the VMM's own mapping is not used.

The machine's scatter-gather engine moves every byte between guest memory and a
buffer of the VMM's. So the SMMU decides, and not the host CPU's page tables,
what a device behind this can read and write.
"""

from __future__ import annotations

import errno
import threading

from pkvm.kvm.kernel import Kernel
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.kvm import DmaMove
from pkvm.vmm.errors import LoadError
from pkvm.vmm.guest_memory import SlotMemory

BUFFER_BYTES = 1 << 18


class DmaMemory:
    """`memory`, moved by DMA. Any thread may use it. Raises LoadError if the machine has no
    scatter-gather engine."""

    def __init__(self, kernel: Kernel, memory: SlotMemory) -> None:
        self._kernel = kernel
        self._memory = memory
        self.address = memory.address
        self.length = memory.length
        try:
            self._fd = kernel.open("/dev/dma-sg")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            raise LoadError("this machine has no device that moves a disk's data by DMA") from error
        self._buffer = kernel.mmap(BUFFER_BYTES)
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Load. Raises ProtectedPageError at the first byte that the SMMU kept from the device."""
        parts = []
        with self._lock:
            for at in range(offset, offset + length, BUFFER_BYTES):
                size = min(BUFFER_BYTES, offset + length - at)
                self._move(self.address + at, self._buffer.address, size, self.address + at)
                parts.append(self._buffer.read(0, size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Store. Errors as `read`; what came before has been written."""
        with self._lock:
            for at in range(0, len(data), BUFFER_BYTES):
                piece = data[at : at + BUFFER_BYTES]
                self._buffer.write(0, piece)
                target = self.address + offset + at
                self._move(self._buffer.address, target, len(piece), target)

    def close(self) -> None:
        """Give the buffer back and close the device."""
        self._buffer.close()
        self._kernel.close(self._fd)

    def _move(self, source: int, destination: int, length: int, guest: int) -> None:
        """Move bytes; `guest` is the side that is guest memory."""
        request = bytearray(
            DmaMove.HEADER.pack(1, 0) + DmaMove.PART.pack(source, destination, length)
        )
        try:
            self._kernel.ioctl(self._fd, DmaMove.MOVE, request)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _, moved = DmaMove.HEADER.unpack_from(request)
            raise ProtectedPageError(guest + moved, "DMA") from error
