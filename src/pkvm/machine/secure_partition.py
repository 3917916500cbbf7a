# SPDX-License-Identifier: GPL-2.0-or-later
"""A secure partition: a small trusted application that does with memory what it is asked to.

It answers direct messages (FFA_MSG_SEND_DIRECT_REQ). X3 is a command, X4 on its
arguments; the answer has 0 or an FF-A error code in X3 and a value in X4.

========== == =================================================================
PING       0  X4 -> X4 + 1
RETRIEVE   1  handle -> bytes: map what the normal world gave
READ       2  handle, byte offset -> the 64-bit word there
WRITE      3  handle, byte offset, value: store a 64-bit word
RELINQUISH 4  handle: unmap it, so that the owner can have it back
========== == =================================================================
"""

from __future__ import annotations

from enum import IntEnum

from pkvm.arm64.bits import MASK64
from pkvm.arm64.ffa import Status
from pkvm.arm64.ffa_memory import FFA_PAGE
from pkvm.machine.bus import Bus
from pkvm.machine.secure_memory import FfaError, Grant, Grants


class Command(IntEnum):
    """X3 of a message to a partition."""

    PING = 0
    RETRIEVE = 1
    READ = 2
    WRITE = 3
    RELINQUISH = 4


class SecurePartition:
    """One partition. `bus` is the secure world's way to memory: nothing restricts it."""

    def __init__(self, endpoint: int, uuid: tuple[int, int, int, int], bus: Bus) -> None:
        self.endpoint = endpoint
        self.uuid = uuid
        self._bus = bus

    def message(self, grants: Grants, command: int, arguments: tuple[int, ...]) -> int:
        """Serve a direct request: the value for X4. Raises FfaError."""
        first, second, third = arguments[:3]
        if command == Command.PING:
            return first + 1 & MASK64
        if command == Command.RETRIEVE:
            grant = grants.find(first)
            if self.endpoint not in grant.receivers:
                raise FfaError(Status.DENIED, "the memory is for another partition")
            grant.retrieved.add(self.endpoint)
            return grant.page_count * FFA_PAGE
        if command == Command.READ:
            return self._bus.read_u64(self._mapped(grants, first).pa(second, 8))
        if command == Command.WRITE:
            self._bus.write_u64(self._mapped(grants, first).pa(second, 8), third)
            return 0
        if command == Command.RELINQUISH:
            self._mapped(grants, first).retrieved.discard(self.endpoint)
            return 0
        raise FfaError(Status.NOT_SUPPORTED, f"there is no command {command:#x}")

    def _mapped(self, grants: Grants, handle: int) -> Grant:
        grant = grants.find(handle)
        if self.endpoint not in grant.retrieved:
            raise FfaError(Status.DENIED, "the partition has not mapped the memory")
        return grant
