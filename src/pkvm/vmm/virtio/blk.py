# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-blk (section 5.2): a disk over a raw file.

Requests are served in the vCPU's thread, when the driver notifies. What goes
wrong with one is an I/O error in the guest and a line in the report; only a
request whose parts cannot be told apart stops the device.
"""

from __future__ import annotations

import struct

from pkvm.vmm.guest_memory import GuestMemoryError
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.disk import SECTOR, Disk
from pkvm.vmm.virtio.queue import Chain, Queue, QueueError

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_DISCARD, F_WRITE_ZEROES = (
    1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10, 1 << 13, 1 << 14,
)  # fmt: skip
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
UNMAP = 1
"""Flag of a segment of WRITE_ZEROES."""

ID_BYTES = 20
SEG_MAX = 254
"""Segments of a request's data: with header and status they fill a queue."""
PHYSICAL_BLOCK = 4096
OPTIMAL_BYTES = 1 << 20
"""Preferred size of a request: fewer requests cost fewer exits. Linux reads ahead twice that."""
MAX_ZERO_SEGMENTS = 16
MAX_ZERO_SECTORS = (1 << 30) // SECTOR
PIECE = 1 << 20
"""Bytes moved at a time."""

_header = struct.Struct("<IIQ")
_zero_segment = struct.Struct("<QII")
_config = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")


class Block(VirtioDevice):
    """The device. `identity` is what GET_ID answers, 20 bytes at most; `by_dma`: the rings and the
    data move by DMA through the SMMU."""

    name = "virtio-blk"
    device_id = 2
    queue_names = ("requests",)

    def __init__(self, disk: Disk, identity: str = "", *, by_dma: bool = False) -> None:
        self.disk = disk
        self.by_dma = by_dma
        self.name = f"virtio-blk {disk.path}"
        self._id = identity.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.device_features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        self.device_features |= F_RO if disk.read_only else F_DISCARD | F_WRITE_ZEROES
        whole_blocks = disk.size % PHYSICAL_BLOCK == 0
        self._config = _config.pack(
            disk.size // SECTOR,
            0,  # size_max
            SEG_MAX,
            *(0, 0, 0),  # geometry
            SECTOR,
            *((3, 0, 8) if whole_blocks else (0, 0, 1)),  # physical block, alignment, min_io_size
            OPTIMAL_BYTES // SECTOR,
            *(1, 0, 1),  # writeback, unused, num_queues
            *(MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, 8 if whole_blocks else 1),  # discard
            *(MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, 1),  # write zeroes, may unmap
        )

    def read_config(self) -> bytes:
        """struct virtio_blk_config (section 5.2.4), as far as the features go."""
        return self._config

    def process(self, queue: Queue) -> None:
        """Serve every request that is available."""
        while (chain := queue.pop()) is not None:
            room = chain.writable_bytes
            if not room:
                raise QueueError("a request has no room for its status")
            header = chain.read(0, _header.size)
            if len(header) < _header.size:
                raise QueueError(f"a request's header has {len(header)} bytes")
            kind, _, sector = _header.unpack(header)
            status = self._serve(chain, kind, sector, room - 1)
            chain.write_at(room - 1, bytes((status,)))
            queue.push(chain, room if chain.written == room - 1 else chain.written)

    def close(self) -> None:
        """Close the disk."""
        self.disk.close()

    def _serve(self, chain: Chain, kind: int, sector: int, room: int) -> int:
        """Do one request with `room` bytes to write data into; its status."""
        try:
            if kind == T_IN:
                return self._read(chain, sector, room)
            if kind == T_GET_ID:
                chain.write(self._id[:room])
                return S_OK
            if kind == T_FLUSH:
                self.disk.flush()
                return S_OK
            if kind not in (T_OUT, T_DISCARD, T_WRITE_ZEROES):
                return S_UNSUPP
            if self.disk.read_only:
                return self._refuse("a write to a read-only disk")
            if kind == T_OUT:
                return self._write(chain, sector)
            return self._clear(chain, kind)
        except GuestMemoryError as error:
            # The request fails; the queue itself is sound.
            self.port.fault(error.why, error.advice, queue=0, address=error.ipa)
        except OSError as error:
            self.port.fault(
                f"the disk failed: {error.strerror}", "the guest got an I/O error", queue=0
            )
        return S_IOERR

    def _read(self, chain: Chain, sector: int, length: int) -> int:
        if not self._holds(sector, length):
            return self._refuse("a read of what is not whole sectors of the disk")
        offset = sector * SECTOR
        while length:
            take = min(length, PIECE)
            chain.write(self.disk.read(offset, take))
            offset += take
            length -= take
        return S_OK

    def _write(self, chain: Chain, sector: int) -> int:
        length = chain.readable_bytes - _header.size
        if not self._holds(sector, length):
            return self._refuse("a write of what is not whole sectors of the disk")
        at, offset = _header.size, sector * SECTOR
        while length:
            take = min(length, PIECE)
            self.disk.write(offset, chain.read(at, take))
            at += take
            offset += take
            length -= take
        if not self.port.features & F_FLUSH:
            # A driver that cannot flush relies on a cache that writes through (section 5.2.6.2).
            self.disk.flush()
        return S_OK

    def _clear(self, chain: Chain, kind: int) -> int:
        """DISCARD or WRITE_ZEROES: everything is checked before anything is done."""
        length = chain.readable_bytes - _header.size
        if length % _zero_segment.size or not 0 < length <= MAX_ZERO_SEGMENTS * _zero_segment.size:
            return self._refuse("a discard or write-zeroes request of a wrong size")
        segments = list(_zero_segment.iter_unpack(chain.read(_header.size, length)))
        for sector, count, flags in segments:
            if flags & ~UNMAP or (kind == T_DISCARD and flags):
                return S_UNSUPP
            if count > MAX_ZERO_SECTORS or not self._holds(sector, count * SECTOR):
                return self._refuse("a discard or write-zeroes request beyond the disk")
        for sector, count, flags in segments:
            if kind == T_DISCARD:
                self.disk.discard(sector * SECTOR, count * SECTOR)
            else:
                self.disk.zero(sector * SECTOR, count * SECTOR, unmap=bool(flags & UNMAP))
        return S_OK

    def _holds(self, sector: int, length: int) -> bool:
        """Whether [sector, +length bytes) are whole sectors of the disk."""
        return length >= 0 and not length % SECTOR and sector * SECTOR + length <= self.disk.size

    def _refuse(self, what: str) -> int:
        self.port.fault(what, "the guest got an I/O error", queue=0)
        return S_IOERR
