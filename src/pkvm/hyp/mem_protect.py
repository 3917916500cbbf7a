# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns which page: EL2's memory side, all transitions behind one lock (facts §3)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pkvm.events import Recorder
from pkvm.hyp.memcache import Memcache
from pkvm.hyp.pgtable import Stage2
from pkvm.machine.memory import PhysicalMemory


class GuestMemory(Protocol):
    """What a VM must have for its memory to change hands."""

    @property
    def handle(self) -> int: ...
    @property
    def stage2(self) -> Stage2: ...
    @property
    def memcache(self) -> Memcache: ...


def carveout_bytes(ram_bytes: int) -> int:
    """Bytes that EL2 needs of a machine with `ram_bytes` of RAM; a multiple of 2 MiB."""
    raise NotImplementedError


class MemProtect:
    """EL2's ownership of memory. Every transition raises `Refused` and then has changed nothing."""

    lock: threading.RLock  # type: ignore[valid-type]
    vtcr: int

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        host_bus: Any,
        dma_bus: Any,
        guest_tlbi: Callable[[], None],
        invalidate_code: Callable[[int, int], None],
        recorder: Recorder,
        carveout: tuple[int, int],
        firmware: tuple[int, int] | None = None,
        protected: bool = True,
        ipa_bits: int = 40,
        parange: int = 2,
    ) -> None: ...

    def initialise(self) -> None:
        """Build the ownership records, the host's and the DMA masters' stage-2."""

    def finalise(self) -> None:
        """Attach the buses to their stage-2: from here on the host is de-privileged."""

    # For D: making and ending a VM's memory

    @property
    def pgd_bytes(self) -> int:
        """Bytes of a guest's stage-2 root, which is also its alignment (PGD_INFO)."""
        raise NotImplementedError

    def new_memcache(self) -> Memcache:
        """An empty memcache for a new VM."""
        raise NotImplementedError

    def new_guest_stage2(self, root_pa: int, vmid: int, memcache: Memcache) -> Stage2:
        """An empty stage-2 tree on the `pgd_bytes` at `root_pa`, which EL2 already owns (donated
        by host_donate_hyp); zeroes them. Raises Refused EINVAL if unaligned, EPERM if not owned by
        EL2, EBUSY if in use. `stage2.destroy()` then `memcache.drain()` give all back."""
        raise NotImplementedError

    def zero(self, pa: int, nbytes: int) -> None:
        """Zero RAM that EL2 owns and forget code translated from it."""

    # Host and EL2

    def host_share_hyp(self, pfn: int) -> None: ...
    def host_unshare_hyp(self, pfn: int) -> None: ...
    def host_donate_hyp(self, pfn: int, nr: int) -> None: ...
    def hyp_donate_host(self, pfn: int, nr: int) -> None:
        """The caller has zeroed the pages."""

    def pin_shared(self, pa: int) -> None:
        """Keep the shared page that holds PA from being unshared. Refused EPERM if not shared with
        EL2 (or not RAM), EBUSY if the count is exhausted."""

    def unpin_shared(self, pa: int) -> None:
        """Undo one pin_shared."""

    # Host to guest

    def host_donate_guest(self, vm: GuestMemory, pfn: int, gfn: int, nr: int) -> None: ...
    def host_donate_guest_list(self, vm: GuestMemory, entries: npt.NDArray[np.uint64]) -> None:
        """Entries (n, 3) of pfn, gfn, nr; EL2's own copy. All or none."""

    def host_share_guest(self, vm: GuestMemory, pfn: int, gfn: int, nr: int, prot: int) -> None: ...
    def host_unshare_guest(self, vm: GuestMemory, gfn: int, nr: int) -> None: ...

    # Guest to host

    def guest_share_host(self, vm: GuestMemory, ipa: int, nr: int) -> int:
        """Pages shared: min(nr, 256). Refused: EINVAL (unaligned, nr 0, wrap), ERANGE (beyond the
        IPA space), EFAULT (page not mapped; `.ipa` is which), EPERM (other state), ENOMEM with
        pages_needed (a block must be split). All or none of the pages it looks at."""
        raise NotImplementedError

    def guest_unshare_host(self, vm: GuestMemory, ipa: int, nr: int) -> int:
        """Mirror of guest_share_host."""
        raise NotImplementedError

    # Teardown

    def reclaim_dying_guest_range(self, vm: GuestMemory, gfn: int, nr: int) -> int:
        """Pages reclaimed; unmapped gfns are passed over. The caller has checked that vm is dying.
        Refused: EINVAL (range), EPERM (a borrowed page: use host_unshare_guest), ENOMEM with
        pages_needed (the range cuts a block)."""
        raise NotImplementedError

    def host_abort(self, ipa: int, access: Any, fsc: int) -> bool:
        """The host CPU's stage-2 fault; True: mapped, retry. Given to the host bus by finalise."""
        raise NotImplementedError
