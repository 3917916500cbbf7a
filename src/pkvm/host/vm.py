# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM of the host: slots, vCPUs, its counterpart at EL2, what it pins, how it goes.

EL2 gives a handle when the VM is created (facts §2.1: at most 255, then
ENOMEM). The VM itself comes into being at EL2 when it is made protected, or
with the first KVM_RUN of a non-protected one. Whatever was given to EL2 for it
is remembered here until EL2 gives it back.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from pkvm.host import dirty_log
from pkvm.host.dirty_log import DirtyLog
from pkvm.host.host import IPA_BITS, Host
from pkvm.host.memslots import Change, MemSlots
from pkvm.host.pages import BLOCK_PAGES, Hold, PageRun, Place
from pkvm.host.policy import SERVICE_OF, SERVICES
from pkvm.host.ports import PAGE_SHIFT
from pkvm.host.vcpu import Vcpu
from pkvm.host.vgic.gic import Gic
from pkvm.hyp.abi import MAX_VCPUS, VCPU_AREA_BYTES, VM_AREA_BYTES, HostCall, HostVcpu, HostVm
from pkvm.uapi.dialects import Memory, Primary, Registers, Slots

TABLES_A_MAPPING = 2
"""Table pages that one mapping can need: levels 2 and 3 (the root is at level 1)."""
_TOUCH_PAGES = {Memory.AT_ENABLE: 0, Memory.TOUCHED_BLOCKS: BLOCK_PAGES, Memory.TOUCHED_PAGES: 1}


class Lent(NamedTuple):
    """Host pages that a non-protected guest shares: one leaf of its stage-2."""

    npages: int
    run: PageRun
    hold: Hold


class Vm:
    """struct kvm. The kernel lock covers everything."""

    def __init__(self, host: Host, *, protected: bool = False) -> None:
        self.host = host
        self.handle = host.el2.call(HostCall.RESERVE_VM)
        """EL2's handle; 0 when EL2 has none for this VM (after a failed ENABLE)."""
        try:
            self.page = host.pages.alloc(1)
        except OSError:
            host.el2.call(HostCall.UNRESERVE_VM, self.handle)
            raise
        """PA of the page that is shared with EL2 once `at_el2`."""
        self.slots = MemSlots(IPA_BITS)
        self.vcpus: dict[int, Vcpu] = {}
        """By vCPU id, in the order of their index."""
        self.protected = False
        self.isolated = False
        """Protected, and EL2 keeps the vCPUs' registers."""
        self.elects_primary = False
        """The first vCPU to enter becomes `primary`."""
        self.touch_pages = 0
        """Most pages that the guest gets at the first touch of one; 0: it has them all."""
        self.vcpu_features: int | None = None
        """KVM_ARM_VCPU_* features of its vCPUs but POWER_OFF, once one is initialised."""
        self.services = dict(SERVICES)
        """KVM_REG_ARM_*_BMAP: which of KVM's services its guests have."""
        self.psci_version = host.policy.psci_versions[-1]
        """What the host tells those guests whose PSCI it is."""
        self.firmware_ipa: int | None = None
        """Where the guest firmware is to go, if user space named an address."""
        self.ran = False
        """Whether a KVM_RUN was issued on an initialised vCPU."""
        self.at_el2 = False
        self.gic: Gic | None = None
        """The interrupt controller, if user space made one."""
        self.gic_start = self.gic_end = 0
        """The IPA range that all of its frames lie in, while they answer."""
        self.primary: Vcpu | None = None
        """The first vCPU of a protected VM that entered the guest."""
        self.shared: dict[int, Lent] = {}
        """Non-protected: gfn -> the mapping in the guest's stage-2 that starts there."""
        self.dirty_logs: dict[int, DirtyLog] = {}
        """Non-protected: slot number -> its log, of those that have one."""
        self.manual_dirty_log = 0
        """KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)'s argument."""
        self.donated: dict[int, int] = {}
        """Protected, given at the first touch: gfn -> pages that were given there at once."""
        self._donated: set[int] = set()
        """PAs of the pages that EL2 keeps for this VM."""
        self._pins: dict[PageRun, Hold] = {}
        """Protected: the user pages that the guest has had, until the VM goes."""
        self._lost: set[int] = set()
        """PAs of shared pages that EL2 did not let go."""
        self._users = 1
        host.vms.add(self)
        if protected:
            self.become_protected()

    def become_protected(self) -> None:
        """What the dialect makes of a protected VM holds from now on."""
        dialect = self.host.dialect
        self.protected = True
        self.isolated = dialect.registers is Registers.HIDDEN
        self.elects_primary = dialect.primary is Primary.FIRST_TO_ENTER
        self.touch_pages = _TOUCH_PAGES[dialect.memory]

    def has_service(self, function: int) -> bool:
        """Whether the VMM left the guest the service that a function id belongs to."""
        bitmap, bit = SERVICE_OF.get(function, (0, 0))
        return not bit or bool(self.services[bitmap] & bit)

    def get(self) -> None:
        """One more user: a vCPU's descriptor."""
        self._users += 1

    def put(self) -> None:
        """One user less; with the last one the VM goes."""
        self._users -= 1
        if not self._users:
            self.destroy()

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU (KVM API 4.7). Raises EINVAL for an id out of range, EEXIST, ENOMEM, and
        EBUSY once the interrupt controller is initialised."""
        if not 0 <= vcpu_id < MAX_VCPUS:
            raise OSError(errno.EINVAL, f"vCPU id {vcpu_id} is not below {MAX_VCPUS}")
        if vcpu_id in self.vcpus:
            raise OSError(errno.EEXIST, f"vCPU {vcpu_id} exists")
        if self.gic is not None and self.gic.initialised:
            raise OSError(errno.EBUSY, "the VM's interrupt controller is initialised")
        vcpu = Vcpu(self, vcpu_id, len(self.vcpus))
        if self.gic is not None:
            try:
                self.gic.add_cpu(vcpu)
            except OSError:
                self.host.pages.free(vcpu.page)
                raise
        self.vcpus[vcpu_id] = vcpu
        self.get()
        return vcpu

    def forget_vcpu(self, vcpu: Vcpu) -> None:
        """Undo `create_vcpu` for the last vCPU, which got no descriptor."""
        del self.vcpus[vcpu.id]
        if self.gic is not None:
            self.gic.forget_cpu(vcpu)
        self.host.pages.free(vcpu.page)
        self.put()

    def set_memory_region(self, region: bytes) -> None:
        """KVM_SET_USER_MEMORY_REGION (KVM API 4.35). Raises EPERM for what a protected VM refuses
        (`uapi.dialects.Slots`), else as `MemSlots.plan`."""
        if self.protected and self.host.dialect.slots is Slots.ALL_AFTER_ENABLE:
            raise OSError(
                errno.EPERM, "the memory slots of a protected VM can no longer be configured"
            )
        plan = self.slots.plan(region)
        gone = plan.change in (Change.DELETE, Change.MOVE)
        if self.protected and plan.change is not Change.NOTHING:
            if gone and self.at_el2:
                raise OSError(errno.EPERM, "a protected VM that has run keeps its memory slots")
            if plan.new is not None and plan.new.flags:
                raise OSError(
                    errno.EPERM, "a memory slot of a protected VM is writable, and has no dirty log"
                )
        elif gone and plan.old is not None:
            self.unshare(plan.old.gfn, plan.old.npages)
        self.slots.apply(plan)
        dirty_log.follow(self, plan)

    def pin(self, run: PageRun, first: int, npages: int) -> None:
        """Keep `npages` user pages from number `first` of `run` alive, which a protected guest has,
        whatever becomes of their mapping."""
        hold = self._pins.get(run)
        if hold is None:
            hold = self._pins[run] = run.hold()
        hold.append((first, npages))

    def relinquished(self, ipa: int, pa: int) -> None:
        """The guest gave up the page at `ipa`, which it had at `pa`: it counts no longer, and gets
        a page there again as if it never had one."""
        gfn, pfn = ipa >> PAGE_SHIFT, pa >> PAGE_SHIFT
        block = gfn & -BLOCK_PAGES
        if self.donated.get(block, 1) > 1:
            del self.donated[block]
            self.donated.update(dict.fromkeys(range(block, block + BLOCK_PAGES), 1))
        if self.donated.pop(gfn, 0):
            self.host.memlock.release(1)
        for run, hold in self._pins.items():
            if 0 <= pfn - run.pfn < run.npages:
                run.give_up(hold, pfn - run.pfn)

    def has_pinned(self, pa: int) -> bool:
        """Whether the page at `pa` is among the user pages that the protected guest has had."""
        pfn = pa >> PAGE_SHIFT
        return any(
            first <= pfn - run.pfn < first + npages
            for run, hold in self._pins.items()
            for first, npages in hold
        )

    def share(self, gfn: int, place: Place) -> None:
        """Note what a non-protected guest shares from `gfn` on, and keep it alive."""
        run, first, npages = place
        self.shared[gfn] = Lent(npages, run, run.hold((first, npages)))

    def lent_at(self, gfn: int) -> int | None:
        """The first gfn of the mapping that has `gfn`, of what a non-protected guest shares."""
        if gfn in self.shared:
            return gfn
        first = gfn & -BLOCK_PAGES
        around = self.shared.get(first)
        return first if around is not None and around.npages == BLOCK_PAGES else None

    def unshare(self, gfn: int, npages: int) -> None:
        """Take back what a non-protected guest shares in [gfn, gfn+npages), whole leaves."""
        end = gfn + npages
        gone: dict[PageRun, list[Hold]] = {}
        try:
            for first in [
                first
                for first, one in self.shared.items()
                if first < end and first + one.npages > gfn
            ]:
                nr, run, hold = self.shared[first]
                self.host.el2.call(HostCall.HOST_UNSHARE_GUEST, self.handle, first, nr)
                del self.shared[first]
                gone.setdefault(run, []).append(hold)
        finally:
            for run, holds in gone.items():
                run.release(*holds)

    # EL2's counterpart

    def init_at_el2(self, protected: bool, created_vcpus: int) -> None:
        """INIT_VM. Raises OSError; nothing has changed then."""
        host = self.host
        el2 = host.el2
        if not self.handle:
            self.handle = el2.call(HostCall.RESERVE_VM)
        el2.call(HostCall.HOST_SHARE_HYP, self.page >> PAGE_SHIFT)
        areas: list[int] = []
        try:
            for offset, value in (
                (HostVm.HANDLE, self.handle),
                (HostVm.PROTECTED, int(protected)),
                (HostVm.CREATED_VCPUS, created_vcpus),
            ):
                host.bus.write_u64(self.page + offset, value)
            area = el2.alloc_area(VM_AREA_BYTES)
            areas += area
            root = el2.alloc_area(el2.call(HostCall.PGD_INFO))
            areas += root
            el2.call(HostCall.INIT_VM, self.page, area[0], root[0])
        except OSError:
            el2.free_all(areas)
            self._unshare_page(self.page)
            raise
        self._donated.update(areas)
        self.at_el2 = True

    def init_vcpus_at_el2(self) -> None:
        """INIT_VCPU for every vCPU that has been initialised, in the order of their index, so that
        the guest may turn them on. Errors stay with the vCPU: its KVM_RUN meets them again."""
        for vcpu in self.vcpus.values():
            if vcpu.initialised and not vcpu.at_el2:
                try:
                    self.init_vcpu_at_el2(vcpu)
                except OSError as error:
                    self.host.say(f"vCPU {vcpu.id} cannot be made at EL2: {error.strerror}")

    def init_vcpu_at_el2(self, vcpu: Vcpu) -> None:
        """INIT_VCPU. Raises OSError; nothing has changed then."""
        el2 = self.host.el2
        vcpu.set_word(HostVcpu.MP_STATE, vcpu.mp_state)
        el2.call(HostCall.HOST_SHARE_HYP, vcpu.page >> PAGE_SHIFT)
        area: list[int] = []
        try:
            area = el2.alloc_area(VCPU_AREA_BYTES)
            el2.call(HostCall.INIT_VCPU, self.handle, vcpu.page, area[0])
        except OSError:
            el2.free_all(area)
            self._unshare_page(vcpu.page)
            raise
        self._donated.update(area)
        vcpu.at_el2 = True

    def topup(self, npages: int) -> None:
        """Give EL2 `npages` pages for tables. Raises OSError."""
        if npages > 0:
            self._donated |= self.host.el2.topup(self.handle, npages)

    def leave_el2(self) -> None:
        """Tear the VM down at EL2 and free what comes back; every guest page is the host's again.

        What EL2 does not give back is lost, with a message: nothing can be done about it.
        """
        host = self.host
        if host.loaded is not None and host.loaded.vm is self:
            host.put()
        if not self.at_el2:
            if self.handle:
                host.el2.call(HostCall.UNRESERVE_VM, self.handle)
                self.handle = 0
            return
        if self.shared:
            self.unshare(0, 1 << IPA_BITS - PAGE_SHIFT)
        host.el2.call(HostCall.START_TEARDOWN_VM, self.handle)
        for slot in self.slots if self.protected else ():
            host.el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, self.handle, slot.gfn, slot.npages)
        host.el2.call(HostCall.FINALIZE_TEARDOWN_VM, self.handle)
        self.handle = 0
        self.at_el2 = False
        head = host.bus.read_u64(self.page + HostVm.TEARDOWN_HEAD)
        nr = host.bus.read_u64(self.page + HostVm.TEARDOWN_NR)
        host.el2.collect(head, nr, self._donated)
        self._donated = set()
        host.memlock.release(sum(self.donated.values()))
        self.donated.clear()
        self._unshare_page(self.page)
        for vcpu in self.vcpus.values():
            if vcpu.at_el2:
                vcpu.at_el2 = False
                self._unshare_page(vcpu.page)

    def destroy(self) -> None:
        """The last user is gone: tear down at EL2, then free everything."""
        host = self.host
        host.vms.discard(self)
        host.irqfds.release(self)
        if self.gic is not None:
            self.gic.close()
        try:
            self.leave_el2()
        except OSError as error:
            host.say(f"a VM's pages are lost: its teardown failed: {error.strerror}")
            return
        for run, hold in self._pins.items():
            run.release(hold)
        self._pins.clear()
        for page in (self.page, *(vcpu.page for vcpu in self.vcpus.values())):
            if page not in self._lost:
                host.pages.free(page)

    def _unshare_page(self, page: int) -> None:
        """Take a page back that EL2 shared. If EL2 still holds it, it is never used again."""
        call = HostCall.HOST_UNSHARE_HYP
        if self.host.el2.try_call(call, page >> PAGE_SHIFT) < 0:
            self.host.say(f"EL2 keeps the shared page at PA {page:#x}: lost")
            self._lost.add(page)
