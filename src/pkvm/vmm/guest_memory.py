# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory as a device reaches it: by the guest's addresses, through the host's own view.

There is no other way to it: what the VMM may not touch, no device of its can
read or write. Addresses come from the guest and are checked here, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from pkvm.uapi.errors import ProtectedPageError

SHARE_IT = (
    "the guest must share it with the host first (MEM_SHARE): a Linux guest does so with "
    "CONFIG_ARM_PKVM_GUEST and a restricted-dma-pool (CONFIG_DMA_RESTRICTED_POOL)"
)
"""What a guest does about a buffer in a private page."""


class GuestMemoryError(Exception):
    """A device cannot reach [ipa, ipa+length) of guest memory; `why` in words, `advice` says what
    the guest must do."""

    def __init__(self, ipa: int, length: int, why: str, advice: str) -> None:
        super().__init__(f"guest memory at {ipa:#x} (+{length:#x}): {why}: {advice}")
        self.ipa = ipa
        self.length = length
        self.why = why
        self.advice = advice


class PrivatePageError(GuestMemoryError):
    """The byte at `ipa` is in a page that belongs to the protected guest alone."""

    def __init__(self, ipa: int, length: int) -> None:
        super().__init__(ipa, length, "the page is private to the guest", SHARE_IT)


class SlotMemory(Protocol):
    """What a memory slot is made of, as far as devices need it (`pkvm.kvm.Memory`)."""

    @property
    def address(self) -> int:
        """User address of the first byte."""
        ...

    @property
    def length(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Load. Raises ProtectedPageError."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Store. Raises ProtectedPageError."""
        ...


class GuestMemory:
    """The memory slots of a VM: (IPA of the first byte, memory). Any thread may use it."""

    def __init__(self, slots: Iterable[tuple[int, SlotMemory]]) -> None:
        self._slots = tuple((ipa, ipa + memory.length, memory) for ipa, memory in slots)

    def read(self, ipa: int, length: int) -> bytes:
        """Load `length` bytes at IPA `ipa`. Raises GuestMemoryError where that is not wholly in one
        slot, PrivatePageError where a page is the guest's alone."""
        for base, end, memory in self._slots:
            if base <= ipa and ipa + length <= end:
                try:
                    return memory.read(ipa - base, length)
                except ProtectedPageError as error:
                    raise PrivatePageError(base + error.address - memory.address, length) from error
        raise _outside(ipa, length)

    def write(self, ipa: int, data: bytes) -> None:
        """Store `data` at IPA `ipa`. Errors as `read`; pages before a private one have been
        written."""
        length = len(data)
        for base, end, memory in self._slots:
            if base <= ipa and ipa + length <= end:
                try:
                    memory.write(ipa - base, data)
                except ProtectedPageError as error:
                    raise PrivatePageError(base + error.address - memory.address, length) from error
                return
        raise _outside(ipa, length)


def _outside(ipa: int, length: int) -> GuestMemoryError:
    return GuestMemoryError(
        ipa, length, "that is not memory of the guest's", "the driver must use addresses in its RAM"
    )
