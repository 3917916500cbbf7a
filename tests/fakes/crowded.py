# SPDX-License-Identifier: GPL-2.0-or-later
"""A crowded EL2: guests of every kind, and the numbers with which an adversary names their things.

`mine` is protected, with pages in every state; `other` is protected and never runs; `plain` borrows
the host's pages; `dying` is being torn down; one handle is reserved, one was given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fakes import a64
from fakes.el2_rig import FIRMWARE_IPA, MIB, PAGE, RAM_IPA, El2, Guest
from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.hyp.abi import ExitCode, HostCall, HostVcpu, HostVm
from pkvm.hyp.policy import Policy
from pkvm.machine.stage2 import Stage2Fault

SECRET = 0x5EC2_E75E_C2E7_5EC2
MMIO = 0x900_0000
"""Of the machine's devices, and where guests expect one."""
CALL_IPA = RAM_IPA + 8
"""Where each guest has `hvc #0; wfi`."""
PAGES = 8
GFN = RAM_IPA >> PAGE_SHIFT
CODE, SHARED, TAKEN, PRIVATE = range(4)
"""Pages of `mine`; what follows is private too, but for the last, which was given up if there is a
call for that."""


@dataclass
class Crowd:
    """Make it, then let the adversary loose."""

    policy: Policy
    loaded: str | None = None
    """Which guest's vCPU 0 is loaded."""
    secrets: list[int] = field(default_factory=list)
    """PAs of private pages; the first word of each is SECRET."""

    def __post_init__(self) -> None:
        self.el2 = el2 = El2(ram_bytes=16 * MIB, policy=self.policy)
        loop = [a64.WFI, 0x17FF_FFFF, a64.HVC, a64.WFI, 0x17FF_FFFE]
        self.mine = self._guest(loop, vcpus=2)
        self.other = self._guest(loop)
        self.plain = self._guest(loop, protected=False)
        self.dying = self._guest(loop)
        self.guests = (self.mine, self.other, self.plain, self.dying)
        assert self.mine.run() == ExitCode.TRAP
        mem = el2.hyp.mem
        for guest in (self.mine, self.other, self.dying):
            for page in range(PRIVATE, PAGES - 1):
                el2.machine.memory.write_u64(guest.ram + page * PAGE, SECRET)
                self.secrets.append(guest.ram + page * PAGE)
        mem.guest_share_host(self.mine.vm, RAM_IPA + SHARED * PAGE, 1)
        if self.policy.memory.force_reclaim:
            el2.call(HostCall.FORCE_RECLAIM_GUEST_PAGE, self.mine.ram + TAKEN * PAGE)
        mem.guest_relinquish_host(self.mine.vm, RAM_IPA + (PAGES - 1) * PAGE)
        el2.call(HostCall.START_TEARDOWN_VM, self.dying.handle)
        self.reserved = el2.call(HostCall.RESERVE_VM)
        self.returned = el2.call(HostCall.RESERVE_VM)
        el2.call(HostCall.UNRESERVE_VM, self.returned)
        self.free = el2.pages(16, align=16 * PAGE)
        free = self.free >> 12
        self.lists = [
            el2.list_page((free, GFN + 100, 2), (self.other.ram >> 12, GFN + 103, 1)),
            el2.list_page((free, GFN + 100, 2), (free + 1, GFN + 200, 1)),
            el2.list_page((free, GFN + 100, 2), (free + 2, GFN + 101, 1)),
            el2.list_page((free, GFN + 100, 1), (free + 2, GFN + PRIVATE, 1)),
            el2.list_page((free, GFN + 100, 1), ((1 << 64) - 1, GFN, (1 << 64) - 1)),
            el2.list_page((free, GFN + 100, 2), (free + 4, GFN + 400, 2)),
        ]
        """What a host may write into a donation list; the last one is good."""
        self.chain = el2.link([self.free + page * PAGE for page in (9, 11, 10)])
        """The head of a list of three pages."""
        self.new_vm = el2.shared_page(
            {HostVm.HANDLE: self.reserved, HostVm.PROTECTED: 1, HostVm.CREATED_VCPUS: 2}
        )
        self.new_vcpu = el2.shared_page({HostVcpu.VCPU_ID: 2, HostVcpu.VCPU_IDX: 2})
        """The host's pages for what INIT_VM and INIT_VCPU may make."""
        if self.loaded is not None:
            guest = getattr(self, self.loaded)
            assert isinstance(guest, Guest)
            guest.load()
        el2.sound()

    def _guest(self, code: list[int], *, protected: bool = True, vcpus: int = 1) -> Guest:
        return Guest(
            self.el2, code, protected=protected, vcpus=vcpus, created_vcpus=3, ram_pages=PAGES
        )

    def close(self) -> None:
        self.el2.machine.close()

    # The adversary's numbers

    def frames(self) -> list[int]:
        """PFNs: of the guests' pages in every state, of EL2's and of what the host shares with it,
        of devices and of nothing."""
        carveout, nbytes = self.el2.hyp.mem.carveout
        addresses = [
            *(self.mine.ram + page * PAGE for page in range(PAGES)),
            *(guest.ram + PRIVATE * PAGE for guest in self.guests),
            *(at for guest in self.guests[:3] for at in (guest.area, guest.root, guest.page)),
            *self.mine.vcpus, *self.mine.areas, self.mine.tables[0],
            carveout, carveout + nbytes - PAGE, self.el2.firmware_pa,
            self.free, self.free + 7 * PAGE, *self.lists, self.chain,
            0, MMIO, self.el2.machine.memory.ram_base - PAGE, self.el2.machine.memory.ram_end,
        ]  # fmt: skip
        return [*(pa >> PAGE_SHIFT for pa in addresses), *_HUGE]

    def addresses(self) -> list[int]:
        """PAs: those frames, and places within."""
        frames = self.frames()
        return [
            *((pfn << PAGE_SHIFT) & (1 << 64) - 1 for pfn in frames),
            (frames[0] << PAGE_SHIFT) + 8, (frames[-8] << PAGE_SHIFT) + 1, self.free + 8,
        ]  # fmt: skip

    def gfns(self) -> list[int]:
        """Guest frames: of every state, without memory, beyond the IPA space."""
        return [
            *(GFN + page for page in (-1, *range(PAGES), PAGES, 512)), FIRMWARE_IPA >> PAGE_SHIFT,
            MMIO >> PAGE_SHIFT, 0, (1 << 28) - 1, 1 << 28, *_HUGE,
        ]  # fmt: skip

    def handles(self) -> list[int]:
        """Handles of VMs of every kind, and what is none."""
        live = [guest.handle for guest in self.guests]
        return [
            *live, self.reserved, self.returned, live[0] | 1 << 32, 0, 0xFFF, 0x10FE, 0x10FF,
            *_HUGE,
        ]  # fmt: skip

    def numbers(self) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
        """By kind of argument: numbers with which a call gets somewhere, and all the others."""
        live = [guest.handle for guest in self.guests]
        free = [(self.free >> PAGE_SHIFT) + page for page in range(4)]
        lent = [GFN, GFN + PAGES - 1, GFN + 100, GFN + 512, GFN + PRIVATE]
        pages = [self.free, self.free + 4 * PAGE, self.chain, self.lists[-1]]
        pages += [self.new_vm, self.new_vcpu]
        return {
            "pfn": (free, self.frames()),
            "gfn": (lent, self.gfns()),
            "count": ((1, 1, 2, 512), COUNTS),
            "handle": (live, self.handles()),
            "pa": (pages, self.addresses()),
            "word": ((0, 1, 5, 7), WORDS),
            "domain": ((1, 1, 2), WORDS),
            "stream": ((1,), WORDS),
            "bytes": ((PAGE, 3 * PAGE), BYTES),
        }

    def readable_secrets(self) -> set[int]:
        """PAs of pages in which the host can read a guest's secret."""
        found = set()
        for pa in self.secrets:
            try:
                if self.el2.bus.read_u64(pa) == SECRET:
                    found.add(pa)
            except Stage2Fault:
                continue
        return found


_HUGE = (1 << 40, (1 << 52) - 1, 1 << 52, 1 << 63, (1 << 64) - 1)
COUNTS = (0, 1, 2, 3, 7, 8, 9, 511, 512, 513, 1 << 20, 1 << 28, (1 << 28) + 1, *_HUGE)
BYTES = (0, 1, PAGE, PAGE + 1, 600 * PAGE, *_HUGE)
WORDS = (*range(9), 16, 63, 64, 255, *_HUGE)
