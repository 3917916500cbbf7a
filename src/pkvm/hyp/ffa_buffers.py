# SPDX-License-Identifier: GPL-2.0-or-later
"""The message buffers of FF-A: the host's, which EL2 shares and pins, and EL2's own.

The secure world knows EL2's only. What the host writes is copied before it is
looked at, and what the secure world writes is handed on as a copy.
"""

from __future__ import annotations

from pkvm.arm64.ffa import Status
from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from pkvm.hyp.errors import Refused
from pkvm.hyp.ffa_memory import FfaRefused, invalid
from pkvm.hyp.mem_protect import MemProtect


class FfaBuffers:
    """All four, a page each. Takes EL2's two from its pool: raises Refused(ENOMEM)."""

    def __init__(self, mem: MemProtect) -> None:
        self._mem = mem
        self._memory = mem.memory
        self.tx, self.rx = mem.pool.alloc_many(2).tolist()
        self.host: tuple[int, ...] = ()
        """PAs of the host's TX and RX buffer, if it has them."""
        self.host_has_rx = False
        """The host's RX buffer holds a message that the host has not released."""

    def map(self, tx: int, rx: int, npages: int) -> None:
        """Take the host's two pages in. Raises FfaRefused, and then nothing has changed."""
        if npages != 1 or (tx | rx) & PAGE_MASK:
            raise invalid("ffa_buffers", "not two aligned buffers of one page")
        if self.host:
            raise FfaRefused(Status.DENIED, "ffa_mapped", "the host has buffers already")
        with self._mem.lock:
            self._share(tx)
            try:
                self._share(rx)
            except FfaRefused:
                self._unshare(tx)
                raise
        self.host = tx, rx
        self.host_has_rx = False

    def check_unmap(self) -> None:
        """Refuse (FfaRefused) what `unmap` cannot do: there are no buffers, or the host has made
        one of the pages something else of EL2's too."""
        for pa in self._pages():
            if self._mem.pins(pa) != 1:
                why = "EL2 uses the page for something else too"
                raise FfaRefused(Status.BUSY, "refcount", why, pa)

    def unmap(self) -> None:
        """Give the host's pages back. Raises FfaRefused as `check_unmap`."""
        with self._mem.lock:
            self.check_unmap()
            for pa in self.host:
                self._unshare(pa)
        self.host = ()
        self.host_has_rx = False

    def take(self, nbytes: int) -> bytes:
        """A copy of the first bytes of the host's TX buffer, which the host may rewrite at any
        moment. Raises FfaRefused."""
        tx, _ = self._pages()
        if nbytes > PAGE_SIZE:
            raise invalid("ffa_fragment", f"{nbytes} bytes are more than the buffer has")
        return self._memory.read(tx, nbytes)

    def send(self, data: bytes) -> None:
        """Put a message into EL2's TX buffer, for the secure world."""
        self._memory.write(self.tx, data)

    def received(self, nbytes: int) -> bytes:
        """What the secure world put into EL2's RX buffer."""
        return self._memory.read(self.rx, nbytes)

    def clear(self) -> None:
        """Forget what is in EL2's buffers: no message outlives its call."""
        for pa in (self.tx, self.rx):
            self._memory.zero(pa, PAGE_SIZE)

    def deliver(self, data: bytes) -> None:
        """Put a message into the host's RX buffer, which is then the host's to release."""
        _, rx = self._pages()
        self._mem.write_shared(rx, data)
        self.host_has_rx = True

    def _pages(self) -> tuple[int, ...]:
        if not self.host:
            raise invalid("ffa_unmapped", "the host has no buffers")
        return self.host

    def _share(self, pa: int) -> None:
        try:
            self._mem.host_share_hyp(pa >> PAGE_SHIFT)
            self._mem.pin_shared(pa)
        except Refused as refused:
            raise FfaRefused(
                Status.INVALID_PARAMETERS, refused.check, refused.why, refused.pa
            ) from refused

    def _unshare(self, pa: int) -> None:
        self._mem.unpin_shared(pa)
        self._mem.host_unshare_hyp(pa >> PAGE_SHIFT)
