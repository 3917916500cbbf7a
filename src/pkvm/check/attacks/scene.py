# SPDX-License-Identifier: GPL-2.0-or-later
"""`Scene`: a system with a protected Linux guest that keeps a secret, and all that a host has."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

from pkvm.arm64 import ffa
from pkvm.arm64.smccc import NOT_SUPPORTED
from pkvm.arm64.smmu import STE_BYTES, TABLE_ADDRESS, Reg
from pkvm.arm64.stage2 import PAGE_SHIFT, PAGE_SIZE
from pkvm.check.attacks.accomplice import FREE_GFN, Accomplice
from pkvm.check.attacks.linux import GuestError, LinuxGuest
from pkvm.host.vm import Vm as HostVm
from pkvm.hyp.abi import PROT_RWX, ExitCode, HostCall, RunResult
from pkvm.hyp.vm import Vm
from pkvm.hyp.vmemmap import RECORD_BYTES
from pkvm.kvm import Kvm
from pkvm.machine.dma import CTRL, CTRL_START, DST, FAULT_IPA, LEN, SRC, STATUS, STATUS_FAULT
from pkvm.machine.machine import DMA_BASE
from pkvm.machine.memory import BusError
from pkvm.machine.smmu import Smmu
from pkvm.machine.stage2 import Access, Stage2Context, Stage2Fault, walk
from pkvm.system import System

WORDS = b"the guest's secret "
"""Every line of the secret begins so, and nothing else in the machine does."""
SECRET_BYTES = 256 << 10
NOISE = b"spoilt"
"""What is written over it."""
_FULL = 40
"""A page with so many lines holds nothing else."""
_KEEP = (
    'E=est; S=$(head -c 16 /dev/urandom | sha256sum); yes "the gu${E}\'s secret $S" |'
    f" head -c {SECRET_BYTES} >/tmp/secret; sha256sum /tmp/secret >/tmp/sum"
)


class Page(NamedTuple):
    """A page of the guest."""

    ipa: int
    pa: int


def host_pages(system: System) -> range:
    """PAs of the pages that are the host's before there is a guest: up to the guest firmware, and
    EL2's memory behind it."""
    firmware = system.host.firmware
    end = system.hyp.mem.carveout[0] if firmware is None else firmware.base
    return range(system.machine.memory.ram_base, end, PAGE_SIZE)


class Scene:
    """`guest` has booted on `system`. Raises GuestError if it cannot keep a secret."""

    def __init__(self, system: System, guest: LinuxGuest) -> None:
        self.system = system
        self.guest = guest
        self.machine = system.machine
        self.kernel = system.host
        """The host's kernel."""
        self.host_bus = system.machine.host_bus
        """The host's CPU at EL1: loads and stores by physical address."""
        guest.shell(_KEEP)
        self.pages = self._find()
        """Where the secret lies: whole pages of it, private to the guest."""
        self.secret = self.pages[0]
        self.sound = True
        """Whether nothing has got through EL2 so far, or harmed it."""

    @property
    def vm(self) -> Vm:
        """The guest at EL2."""
        return self.system.hyp.vms()[0]

    @cached_property
    def accomplice(self) -> Accomplice:
        """A VM of the attacker's, not protected, with the agent in it."""
        return Accomplice(Kvm(self.kernel))

    def el2(self, call: HostCall, *args: int) -> int:
        """A host hypercall, past everything that the host's KVM would check. Raises OSError with
        EL2's errno."""
        with self.kernel.inside() as host:
            return host.el2.call(call, *args)

    def el2_with(self, vm: HostVm, call: HostCall, *args: int) -> int:
        """The same while the first vCPU of one of the host's VMs is loaded."""
        with self.kernel.inside() as host:
            host.load(next(iter(vm.vcpus.values())))
            return host.el2.call(call, *args)

    def dma(self, source: int, target: int, length: int) -> None:
        """Let the copy engine move `length` bytes between PAs. Raises OSError (EIO) where its
        stage-2 stops it."""
        with self.kernel.inside() as host:
            for offset, value in ((SRC, source), (DST, target), (LEN, length), (CTRL, CTRL_START)):
                host.bus.write_u64(DMA_BASE + offset, value)
            if host.bus.read_u64(DMA_BASE + STATUS) == STATUS_FAULT:
                at = host.bus.read_u64(DMA_BASE + FAULT_IPA)
                raise OSError(errno.EIO, f"the copy engine was stopped at PA {at:#x}")

    def smc(self, function: int, *arguments: int) -> ffa.Registers:
        """What firmware answers an SMC of the host's. Raises OSError (ENOSYS) for NOT_SUPPORTED."""
        answer = self.kernel.smc(ffa.registers(function, *arguments))
        if answer[0] == NOT_SUPPORTED:
            raise OSError(errno.ENOSYS, "the SMC was answered with NOT_SUPPORTED")
        return answer

    def lend(self, pfn: int, gfn: int) -> None:
        """HOST_SHARE_GUEST of a page to the accomplice, at a frame. Raises OSError."""
        with self.kernel.inside() as host:
            vm = next(vm for vm in host.vms if not vm.protected)
        self.el2_with(vm, HostCall.HOST_SHARE_GUEST, pfn, gfn, 1, PROT_RWX)

    def donate(self, *pages: tuple[int, int]) -> None:
        """DONATE_GUEST_SGLIST of pages (PFN, guest frame) to the guest. Raises OSError."""
        self.feed_tables()
        listed = self.new_pages()
        entries = (struct.pack("<3Q", pfn, gfn, 1) for pfn, gfn in pages)
        self.host_bus.write(listed, b"".join(entries))
        self.el2(HostCall.DONATE_GUEST_SGLIST, self.vm.handle, listed, len(pages))

    def start_teardown(self) -> None:
        """Stop the guest, and START_TEARDOWN_VM. Raises OSError."""
        self.guest.stop()
        with self.kernel.inside() as host:
            host.put()
        self.el2(HostCall.START_TEARDOWN_VM, self.vm.handle)

    def feed_tables(self) -> None:
        """Give EL2 pages for the guest's tables, which a donation may need."""
        with self.kernel.inside() as host:
            host.el2.topup(self.vm.handle, 4)

    def own_domain(self, stream: int) -> None:
        """Make DMA domain 1 with room for tables, and put a device into it."""
        size = self.el2(HostCall.PGD_INFO)
        root = self.new_pages(size // PAGE_SIZE, align=size // PAGE_SIZE)
        self.el2(HostCall.IOMMU_ALLOC_DOMAIN, 1, root)
        pages = [self.new_pages() for _ in range(2)]
        for page, following in zip(pages, [*pages[1:], 0], strict=True):
            self.host_bus.write_u64(page, following)
        self.el2(HostCall.IOMMU_TOPUP, 1, pages[0], len(pages))
        self.el2(HostCall.IOMMU_ATTACH, 1, stream)

    def end_domain(self, stream: int) -> None:
        """Undo `own_domain`; its pages stay the attacker's."""
        self.el2(HostCall.IOMMU_DETACH, 1, stream)
        self.el2(HostCall.IOMMU_FREE_DOMAIN, 1)

    @property
    def hosts_vm(self) -> HostVm:
        """The guest as the host's KVM knows it."""
        with self.kernel.inside() as host:
            return next(vm for vm in host.vms if vm.handle == self.vm.handle)

    @property
    def vcpu_page(self) -> int:
        """PA of the page that the host shares with EL2 for the guest's vCPU."""
        return next(iter(self.hosts_vm.vcpus.values())).page

    @property
    def free_gfn(self) -> int:
        """A guest frame where the guest has nothing."""
        return (max(self.system.private_to_guests()) >> PAGE_SHIFT) + 1

    def record_of(self, pa: int) -> int:
        """PA of the record that EL2 keeps of a page."""
        vmemmap = self.system.hyp.mem.vmemmap
        return vmemmap.base + (pa - self.machine.memory.ram_base) // PAGE_SIZE * RECORD_BYTES

    @property
    def smmu(self) -> Smmu:
        """What is between devices and memory. Raises OSError (ENODEV) without one."""
        if self.machine.smmu is None:
            raise OSError(errno.ENODEV, "the machine has no SMMU")
        return self.machine.smmu

    def stream_entry(self, stream: int) -> int:
        """PA of the SMMU's entry for a stream. Raises OSError (ENODEV) without an SMMU."""
        base = self.smmu.window.read(Reg.STRTAB_BASE, 8) & TABLE_ADDRESS
        return base + stream * STE_BYTES

    @contextmanager
    def lying(self, lie: Callable[[int, int, int], tuple[int, int]]) -> Iterator[None]:
        """Change how the host answers exits: `lie` gets the syndrome of the last exit and the flags
        and X0 that the host wants to give, and returns others."""
        last = 0

        with self.kernel.inside() as host:
            el2, run = host.el2, host.el2.run

        def weird(flags: int, x0: int, nr_lrs: int) -> tuple[int, ...]:
            nonlocal last
            result = run(*lie(last, flags, x0), nr_lrs)
            last = result[RunResult.ESR] if result[RunResult.CODE] == ExitCode.TRAP else 0
            return result

        el2.run = weird
        try:
            yield
        finally:
            el2.run = run

    def new_pages(self, count: int = 1, *, align: int = 1) -> int:
        """PA of free pages of the host's. Raises ENOMEM."""
        with self.kernel.inside() as host:
            return host.pages.alloc(count, align=align)

    def secret_at(self, pa: int) -> str | None:
        """What the host's CPU finds at a page."""
        return self.reveals(self.host_bus.read(pa, PAGE_SIZE))

    def secret_by_dma(self) -> str | None:
        """What the copy engine finds at the secret. Raises OSError."""
        target = self.new_pages()
        self.dma(self.secret.pa, target, PAGE_SIZE)
        return self.secret_at(target)

    def secret_lent(self) -> str | None:
        """What the accomplice finds at the secret, lent to it. Raises OSError, AgentExitError."""
        accomplice = self.accomplice
        self.lend(self.secret.pa >> PAGE_SHIFT, FREE_GFN)
        return self.reveals(accomplice.look(FREE_GFN))

    def spoil(self, write: Callable[[Page], object]) -> str | None:
        """Let `write` loose on every page of the secret; what it came to. Raises what `write`
        raised if no page was reached."""
        refused = 0
        error: Exception | None = None
        for page in self.pages:
            try:
                write(page)
            except (OSError, Stage2Fault, BusError) as failure:
                refused, error = refused + 1, failure
        if error is not None and refused == len(self.pages):
            raise error
        return f"it wrote to {len(self.pages) - refused} of {len(self.pages)} pages"

    def reveals(self, data: bytes) -> str | None:
        """What `data` tells of the secret, in words; None if it has nothing of it."""
        found = re.search(re.escape(WORDS) + rb"[0-9a-f]{0,16}", data)
        return None if found is None else f"it read: {found[0].decode()}..."

    def is_whole(self) -> bool:
        """Whether the guest lives and finds its secret as it left it."""
        try:
            return "OK" in self.guest.shell("sha256sum -c /tmp/sum")
        except GuestError:
            return False

    def _find(self) -> list[Page]:
        """By who sees everything: physical memory and the guest's stage-2."""
        memory = self.machine.memory
        data = memory.read(memory.ram_base, memory.ram_bytes)
        frames = set()
        at = data.find(WORDS)
        while at >= 0:
            start = at & -PAGE_SIZE
            if data.count(WORDS, start, start + PAGE_SIZE) >= _FULL:
                frames.add(memory.ram_base + start)
            at = data.find(WORDS, start + PAGE_SIZE)
        context = Stage2Context(self.vm.stage2.vttbr, self.vm.stage2.vtcr)
        pages = [
            Page(ipa, pa)
            for ipa in sorted(self.system.private_to_guests())
            if (pa := walk(memory, context, ipa, Access.READ).pa) in frames
        ]
        if not pages:
            raise GuestError("the guest's secret is nowhere in its memory")
        return pages
