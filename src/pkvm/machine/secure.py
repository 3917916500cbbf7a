# SPDX-License-Identifier: GPL-2.0-or-later
"""The secure world: a partition manager that speaks FF-A 1.2, and two partitions.

Behind EL3, out of the normal world's reach. Its own way to memory is behind no
stage-2 of EL2's: what it is told to use, it uses. It speaks with one endpoint
of the normal world, which on a machine with EL2 is EL2.

Calls: VERSION, FEATURES, ID_GET, SPM_ID_GET, RXTX_MAP and UNMAP, RX_RELEASE,
PARTITION_INFO_GET, MEM_SHARE, LEND and DONATE with fragments, MEM_RECLAIM, the
hypervisor's MEM_RETRIEVE_REQ, direct messages. All else is not supported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from pkvm.arm64 import ffa, ffa_memory
from pkvm.arm64.ffa import W_MASK, Function, Registers, Status
from pkvm.arm64.ffa_memory import FFA_PAGE
from pkvm.events import Recorder, SecureMemory
from pkvm.machine.bus import Bus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.secure_memory import FfaError, Grant, Grants
from pkvm.machine.secure_partition import SecurePartition

PARTITIONS = {
    0x8001: (0x5EC0_0001, 0x0000_4B56, 0x4D00_0000, 0x0000_0001),
    0x8002: (0x5EC0_0002, 0x0000_4B56, 0x4D00_0000, 0x0000_0002),
}
"""Endpoint ids, and the UUIDs as PARTITION_INFO_GET has them in W1 to W4."""
RECEIVES_DIRECT_REQUESTS = 1
RUNS_IN_AARCH64 = 1 << 8
"""Bits of a partition's properties."""
_INFO_1_0 = struct.Struct("<HHI")
_INFO = struct.Struct("<HHI4I")
_GRANTS = {
    Function.FFA_MEM_SHARE_32: "share",
    Function.FFA_MEM_SHARE_64: "share",
    Function.FFA_MEM_LEND_32: "lend",
    Function.FFA_MEM_LEND_64: "lend",
    Function.FFA_MEM_DONATE_32: "donate",
    Function.FFA_MEM_DONATE_64: "donate",
}
_DIRECT = {
    Function.FFA_MSG_SEND_DIRECT_REQ_32: (Function.FFA_MSG_SEND_DIRECT_RESP_32, W_MASK),
    Function.FFA_MSG_SEND_DIRECT_REQ_64: (Function.FFA_MSG_SEND_DIRECT_RESP_64, (1 << 64) - 1),
}


class SecureWorld:
    """The secure world of one machine; `invalidate_code` is told what its stores overwrite."""

    def __init__(
        self,
        memory: PhysicalMemory,
        recorder: Recorder,
        invalidate_code: Callable[[int, int], None] | None = None,
    ) -> None:
        self.bus = Bus(memory, "secure")
        self.bus.on_write = invalidate_code
        self.partitions = {
            endpoint: SecurePartition(endpoint, uuid, self.bus)
            for endpoint, uuid in PARTITIONS.items()
        }
        self.grants = Grants(memory, frozenset(self.partitions))
        self.version = ffa.VERSION_1_2
        """What the normal world speaks; descriptors are laid out by it."""
        self._memory = memory
        self._record = recorder.record
        self._tx = self._rx = 0
        """PAs of the normal world's buffers, 0 if there are none."""
        self._rx_full = False
        self._calls: dict[int, Callable[[Registers], Registers]] = {
            Function.FFA_VERSION: self._version,
            Function.FFA_FEATURES: self._features,
            Function.FFA_ID_GET: lambda x: ffa.success(ffa.NORMAL_WORLD),
            Function.FFA_SPM_ID_GET: lambda x: ffa.success(ffa.SPMC),
            Function.FFA_RXTX_MAP_32: self._rxtx_map,
            Function.FFA_RXTX_MAP_64: self._rxtx_map,
            Function.FFA_RXTX_UNMAP: self._rxtx_unmap,
            Function.FFA_RX_RELEASE: self._rx_release,
            Function.FFA_PARTITION_INFO_GET: self._partition_info,
            Function.FFA_MEM_FRAG_TX: self._next_fragment,
            Function.FFA_MEM_RETRIEVE_REQ_32: self._retrieve,
            Function.FFA_MEM_RETRIEVE_REQ_64: self._retrieve,
            Function.FFA_MEM_FRAG_RX: self._more,
            Function.FFA_MEM_RECLAIM: self._reclaim,
            **dict.fromkeys(_GRANTS, self._give),
            **dict.fromkeys(_DIRECT, self._direct),
        }

    def call(self, registers: Registers) -> Registers:
        """An FF-A call of the normal world's: X0-X17 afterwards. Takes any 64-bit numbers."""
        handler = self._calls.get(registers[0] & W_MASK)
        if handler is None:
            return ffa.error(Status.NOT_SUPPORTED)
        try:
            return handler(registers)
        except FfaError as error:
            return ffa.error(error.status)

    def _version(self, x: Registers) -> Registers:
        asked = x[1] & W_MASK
        fields = ffa.VERSION.decode(asked)
        in_use = self._tx != 0 or bool(self.grants.by_handle)
        if fields["mbz"] or fields["major"] != 1 or (in_use and asked != self.version):
            return ffa.registers(ffa.VERSION_NOT_SUPPORTED)
        self.version = min(asked, ffa.VERSION_1_2)
        return ffa.registers(ffa.VERSION_1_2)

    def _features(self, x: Registers) -> Registers:
        if x[1] & W_MASK not in self._calls:
            raise FfaError(Status.NOT_SUPPORTED, "no such function")
        return ffa.success()

    def _rxtx_map(self, x: Registers) -> Registers:
        tx, rx, pages = x[1], x[2], x[3] & 0x3F
        if (tx | rx) % FFA_PAGE or pages != 1 or tx == rx:
            raise FfaError(Status.INVALID_PARAMETERS, "not two buffers of a page")
        if not (self._memory.is_ram(tx, FFA_PAGE) and self._memory.is_ram(rx, FFA_PAGE)):
            raise FfaError(Status.INVALID_PARAMETERS, "the buffers are not RAM")
        if self._tx:
            raise FfaError(Status.DENIED, "there are buffers already")
        self._tx, self._rx, self._rx_full = tx, rx, False
        return ffa.success()

    def _rxtx_unmap(self, x: Registers) -> Registers:
        self._buffers()
        if x[1] & W_MASK:
            raise FfaError(Status.INVALID_PARAMETERS, "another endpoint's buffers")
        self._tx = self._rx = 0
        return ffa.success()

    def _rx_release(self, x: Registers) -> Registers:
        if not self._rx_full:
            raise FfaError(Status.DENIED, "the buffer is not the caller's")
        self._rx_full = False
        return ffa.success()

    def _partition_info(self, x: Registers) -> Registers:
        wanted = tuple(word & W_MASK for word in x[1:5])
        found = [it for it in self.partitions.values() if wanted in ((0,) * 4, it.uuid)]
        if not found:
            raise FfaError(Status.INVALID_PARAMETERS, "no partition has this UUID")
        if x[5] & ffa.COUNT_ONLY and self.version > ffa.VERSION_1_0:
            return ffa.success(len(found))
        properties = RECEIVES_DIRECT_REQUESTS
        if self.version == ffa.VERSION_1_0:
            data = b"".join(_INFO_1_0.pack(it.endpoint, 1, properties) for it in found)
            self._fill_rx(data)
            return ffa.success(len(found))
        properties |= RUNS_IN_AARCH64
        data = b"".join(_INFO.pack(it.endpoint, 1, properties, *it.uuid) for it in found)
        self._fill_rx(data)
        return ffa.success(len(found), _INFO.size)

    def _give(self, x: Registers) -> Registers:
        what = _GRANTS[Function(x[0] & W_MASK)]
        total, length = x[1] & W_MASK, x[2] & W_MASK
        if x[3] or x[4] & W_MASK:
            raise FfaError(Status.INVALID_PARAMETERS, "descriptors lie in the TX buffer only")
        data = self._read_tx(length)
        if length > total:
            raise FfaError(Status.INVALID_PARAMETERS, "a fragment is longer than the whole")
        return self._received(self.grants.begin(what, data, total, self.version))

    def _next_fragment(self, x: Registers) -> Registers:
        handle = ffa.handle_of(x[1], x[2])
        if x[4] & W_MASK:
            raise FfaError(Status.INVALID_PARAMETERS, "another endpoint's fragment")
        return self._received(self.grants.add(handle, self._read_tx(x[3] & W_MASK)))

    def _received(self, grant: Grant) -> Registers:
        """The answer to a fragment: the handle, or a request for the next one."""
        words = ffa.handle_words(grant.handle)
        if not grant.complete:
            return ffa.registers(Function.FFA_MEM_FRAG_RX, *words, grant.received_bytes)
        self._record(SecureMemory(grant.what, grant.handle, grant.page_count))
        return ffa.success(*words)

    def _retrieve(self, x: Registers) -> Registers:
        """The hypervisor asks for the descriptors of what its host gave."""
        data = self._read_tx(x[2] & W_MASK)
        try:
            header = ffa_memory.read_transaction(data, self.version)
        except ValueError as error:
            raise FfaError(Status.INVALID_PARAMETERS, str(error)) from error
        if header.sender != ffa.NORMAL_WORLD or header.endpoint_count:
            raise FfaError(Status.DENIED, "the normal world borrows nothing")
        whole = self.grants.describe(self.grants.find(header.handle), self.version)
        self._fill_rx(whole[:FFA_PAGE])
        first = min(len(whole), FFA_PAGE)
        return ffa.registers(Function.FFA_MEM_RETRIEVE_RESP, len(whole), first)

    def _more(self, x: Registers) -> Registers:
        """The next part of what `_retrieve` began with."""
        handle, offset = ffa.handle_of(x[1], x[2]), x[3] & W_MASK
        part = self.grants.describe(self.grants.find(handle), self.version)[offset:][:FFA_PAGE]
        if not part or not offset:
            raise FfaError(Status.INVALID_PARAMETERS, "there is nothing at this offset")
        self._fill_rx(part)
        return ffa.registers(Function.FFA_MEM_FRAG_TX, x[1] & W_MASK, x[2] & W_MASK, len(part))

    def _reclaim(self, x: Registers) -> Registers:
        grant = self.grants.drop(ffa.handle_of(x[1], x[2]))
        self._record(SecureMemory("reclaim", grant.handle, grant.page_count))
        return ffa.success()

    def _direct(self, x: Registers) -> Registers:
        answer, mask = _DIRECT[Function(x[0] & W_MASK)]
        source, target = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        partition = self.partitions.get(target)
        if source != ffa.NORMAL_WORLD or partition is None:
            raise FfaError(Status.INVALID_PARAMETERS, "there is no such partition")
        command, *arguments = (number & mask for number in x[3:8])
        status, value = 0, 0
        try:
            value = partition.message(self.grants, command, tuple(arguments))
        except FfaError as error:
            status = error.status & W_MASK
        return ffa.registers(answer, target << 16 | source, 0, status, value & mask)

    def _buffers(self) -> tuple[int, int]:
        if not self._tx:
            raise FfaError(Status.INVALID_PARAMETERS, "there are no buffers")
        return self._tx, self._rx

    def _read_tx(self, length: int) -> bytes:
        """The caller's message of `length` bytes."""
        tx, _ = self._buffers()
        if length > FFA_PAGE:
            raise FfaError(Status.INVALID_PARAMETERS, "more than the buffer has")
        return self.bus.read(tx, length)

    def _fill_rx(self, data: bytes) -> None:
        """Put a message into the caller's RX buffer, which is then the caller's to release."""
        _, rx = self._buffers()
        if self._rx_full:
            raise FfaError(Status.BUSY, "the RX buffer was not released")
        self.bus.write(rx, data)
        self._rx_full = True
