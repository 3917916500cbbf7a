# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's FF-A driver: memory for the secure world, and messages to its partitions.

It makes its calls by SMC as if nobody stood between it and the firmware; under
protected KVM that is EL2, which lets through what is the host's to give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pkvm.arm64 import ffa, ffa_memory
from pkvm.arm64.ffa import W_MASK, Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.host.ports import PAGE_SIZE, Bus

Smc = Callable[[Registers], Registers]
"""SMC #0 on a host CPU: X0-X17 before and after."""


class FfaCallError(Exception):
    """An FF-A call came back with an error."""

    def __init__(self, call: str, status: Status) -> None:
        super().__init__(f"{call} was answered with {status.name}")
        self.status = status


class Partition(NamedTuple):
    """What the secure world says of a partition."""

    endpoint: int
    properties: int


class FfaDriver:
    """FF-A on one host. `tx` and `rx` are the PAs of a page each, for messages; `bus` is the
    host's. `version` is the one that was agreed on. Raises FfaCallError if there is no FF-A."""

    def __init__(
        self, smc: Smc, bus: Bus, tx: int, rx: int, version: int = ffa.VERSION_1_2
    ) -> None:
        self._smc = smc
        self._bus = bus
        self.tx, self.rx = tx, rx
        answer = smc(ffa.registers(Function.FFA_VERSION, version))[0] & W_MASK
        if answer == ffa.VERSION_NOT_SUPPORTED:
            raise FfaCallError("FFA_VERSION", Status.NOT_SUPPORTED)
        self.version = min(version, answer)

    def call(self, function: Function, *arguments: int) -> Registers:
        """One call: X0-X17 afterwards. Raises FfaCallError."""
        answer = self._smc(ffa.registers(function, *arguments))
        status = ffa.status_of(answer)
        if status is not None:
            raise FfaCallError(function.name, status)
        return answer

    def map_buffers(self) -> None:
        """RXTX_MAP. Raises FfaCallError."""
        self.call(Function.FFA_RXTX_MAP_64, self.tx, self.rx, 1)

    def unmap_buffers(self) -> None:
        """RXTX_UNMAP. Raises FfaCallError."""
        self.call(Function.FFA_RXTX_UNMAP)

    def partitions(self) -> list[Partition]:
        """Every secure partition. Raises FfaCallError."""
        answer = self.call(Function.FFA_PARTITION_INFO_GET)
        count, size = answer[2] & W_MASK, answer[3] & W_MASK
        size = size or 8  # FF-A 1.0 does not say it
        data = self._bus.read(self.rx, count * size)
        self.call(Function.FFA_RX_RELEASE)
        return [
            Partition(
                int.from_bytes(data[at : at + 2], "little"),
                int.from_bytes(data[at + 4 : at + 8], "little"),
            )
            for at in range(0, count * size, size)
        ]

    def give(
        self,
        ranges: Sequence[tuple[int, int]],
        receiver: int,
        function: Function = Function.FFA_MEM_SHARE_64,
        fragment: int = PAGE_SIZE,
    ) -> int:
        """Share or lend `ranges` of (PA, number of pages); the handle. At most `fragment` bytes
        of descriptors go at a time. Raises FfaCallError."""
        constituents = [Constituent(*item) for item in ranges]
        data = ffa_memory.write_transaction(self.version, constituents, receivers=[receiver])
        return self.send(data, function, fragment)

    def send(self, data: bytes, function: Function, fragment: int = PAGE_SIZE) -> int:
        """Send a transaction's descriptors as they are, in fragments; the handle. Raises
        FfaCallError."""
        part = data[:fragment]
        self._bus.write(self.tx, part)
        answer = self.call(function, len(data), len(part))
        while answer[0] & W_MASK == Function.FFA_MEM_FRAG_RX:
            offset = answer[3] & W_MASK
            part = data[offset : offset + fragment]
            self._bus.write(self.tx, part)
            answer = self.call(Function.FFA_MEM_FRAG_TX, answer[1], answer[2], len(part))
        return ffa.handle_of(answer[2], answer[3])

    def reclaim(self, handle: int) -> None:
        """Take memory back. Raises FfaCallError."""
        self.call(Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle), 0)

    def message(self, receiver: int, *words: int) -> tuple[int, ...]:
        """A direct request with `words` in X3 on: X3-X7 of the answer. Raises FfaCallError."""
        answer = self.call(Function.FFA_MSG_SEND_DIRECT_REQ_64, receiver, 0, *words)
        return answer[3:8]
