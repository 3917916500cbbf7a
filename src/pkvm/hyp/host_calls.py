# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's hypercalls (facts §9): numbers in, a number or a refusal out.

`TABLE` has for each call its arity and its handler. Arguments are registers:
missing ones are 0, more than the call has are not looked at, each has 64 bits.
The table of vCPUs and VMs is locked during every call but the time in which
VCPU_RUN runs the guest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64.gic import VTR_VALUE
from pkvm.events import HostHypercall
from pkvm.hyp.abi import HostCall
from pkvm.hyp.assignment import Assignment
from pkvm.hyp.donation import Donation
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.iommu import Iommu
from pkvm.hyp.lifecycle import Lifecycle
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.memory_policy import FirmwareRule
from pkvm.hyp.run import PhysicalCpu
from pkvm.hyp.vm import Vm, VmTable


class Entry(NamedTuple):
    """A host call: its name in the record, how many arguments it has, who serves it."""

    name: str
    arity: int
    handler: Callable[..., int | None]
    """Raises Refused; None is 0."""
    done: HostHypercall
    """The event of a call that was served and gave 0, which most are."""


class HostCalls:
    """The calls of one machine's host; `table` has them by number."""

    def __init__(
        self,
        mem: MemProtect,
        vms: VmTable,
        cpu: PhysicalCpu,
        life: Lifecycle,
        donation: Donation,
        iommu: Iommu | None,
        assignment: Assignment | None,
    ) -> None:
        self._mem = mem
        self._vms = vms
        self._cpu = cpu
        self._donation = donation
        absent = {
            call
            for call, there in (
                (HostCall.FORCE_RECLAIM_GUEST_PAGE, mem.policy.force_reclaim),
                (HostCall.SPLIT_GUEST, mem.policy.split_call),
                (HostCall.SET_FIRMWARE, mem.policy.firmware is not FirmwareRule.NONE),
            )
            if not there
        }
        self.table: dict[int, Entry] = {
            int(call): Entry(call.name, arity, handler, HostHypercall(call.name, 0))
            for call, arity, handler in (
                (HostCall.GIC_CONFIG, 0, lambda: VTR_VALUE),
                (HostCall.HOST_SHARE_HYP, 1, mem.host_share_hyp),
                (HostCall.HOST_UNSHARE_HYP, 1, mem.host_unshare_hyp),
                (HostCall.HOST_DONATE_GUEST, 3, donation.donate),
                (HostCall.HOST_SHARE_GUEST, 4, self._share_guest),
                (HostCall.HOST_UNSHARE_GUEST, 3, self._unshare_guest),
                (HostCall.RELAX_PERMS_GUEST, 2, self._relax_perms),
                (HostCall.WRPROTECT_GUEST, 3, self._wrprotect),
                (HostCall.TEST_CLEAR_YOUNG_GUEST, 4, self._test_clear_young),
                (HostCall.MKYOUNG_GUEST, 1, self._mkyoung),
                (HostCall.RESERVE_VM, 0, life.reserve_vm),
                (HostCall.UNRESERVE_VM, 1, life.unreserve_vm),
                (HostCall.INIT_VM, 3, life.init_vm),
                (HostCall.INIT_VCPU, 3, life.init_vcpu),
                (HostCall.VCPU_IN_POISON_FAULT, 0, self._in_poison_fault),
                (HostCall.FORCE_RECLAIM_GUEST_PAGE, 1, self._force_reclaim),
                (HostCall.RECLAIM_DYING_GUEST_PAGE, 2, life.reclaim_page),
                (HostCall.START_TEARDOWN_VM, 1, life.start_teardown),
                (HostCall.FINALIZE_TEARDOWN_VM, 1, life.finalize_teardown),
                (HostCall.VCPU_LOAD, 3, cpu.load),
                (HostCall.VCPU_PUT, 0, cpu.put),
                (HostCall.VCPU_SYNC_STATE, 0, cpu.sync_state),
                (HostCall.TLB_FLUSH_VMID, 1, self._flush),
                (HostCall.TOPUP_MEMCACHE, 3, self._topup_memcache),
                (HostCall.SET_FIRMWARE, 3, self._set_firmware),
                (HostCall.DONATE_GUEST_SGLIST, 3, self._donate_list),
                (HostCall.RECLAIM_DYING_GUEST_RANGE, 3, life.reclaim_range),
                (HostCall.PGD_INFO, 0, self._pgd_info),
                (HostCall.FIRMWARE_INFO, 0, self._firmware_info),
                (HostCall.VCPU_TIMER, 2, cpu.timer_output),
                (HostCall.SPLIT_GUEST, 2, self._split),
                (HostCall.VCPU_FEATURES, 0, life.vcpu_features),
            )
            if call not in absent
        }
        if iommu is not None:
            self.table |= _iommu_calls(mem, iommu)
        if assignment is not None:
            for call, arity, handler in (
                (HostCall.ASSIGN_DEVICE, 4, assignment.assign),
                (HostCall.MAP_DEVICE_GUEST, 3, assignment.map_page),
            ):
                self.table[call] = Entry(call.name, arity, handler, HostHypercall(call.name, 0))

    def _share_guest(self, pfn: int, gfn: int, nr: int, prot: int) -> None:
        self._mem.host_share_guest(self._cpu.loaded(protected=False).vm, pfn, gfn, nr, prot)

    def _unshare_guest(self, handle: int, gfn: int, nr: int) -> None:
        self._mem.host_unshare_guest(self._vm(handle, protected=False), gfn, nr)

    def _relax_perms(self, gfn: int, prot: int) -> None:
        self._mem.host_relax_perms_guest(self._cpu.loaded(protected=False).vm, gfn, prot)

    def _wrprotect(self, handle: int, gfn: int, nr: int) -> None:
        self._mem.host_wrprotect_guest(self._vm(handle, protected=False), gfn, nr)

    def _test_clear_young(self, handle: int, gfn: int, nr: int, make_old: int) -> int:
        vm = self._vm(handle, protected=False)
        return self._mem.host_test_clear_young_guest(vm, gfn, nr, make_old=make_old != 0)

    def _mkyoung(self, gfn: int) -> None:
        self._mem.host_mkyoung_guest(self._cpu.loaded(protected=False).vm, gfn)

    def _split(self, gfn: int, nr: int) -> None:
        self._mem.host_split_guest(self._cpu.loaded().vm, gfn, nr)

    def _flush(self, handle: int) -> None:
        self._mem.host_flush_guest(self._vm(handle, protected=False))

    def _in_poison_fault(self) -> int:
        vcpu = self._cpu.loaded(protected=True)
        return self._mem.is_poisoned(vcpu.vm, self._cpu.fault_ipa(vcpu))

    def _force_reclaim(self, pa: int) -> None:
        self._mem.host_force_reclaim_page_guest(pa, self._vms.find)

    def _topup_memcache(self, handle: int, head_pa: int, nr: int) -> int:
        return self._alive(handle).memcache.topup(head_pa, nr)

    def _set_firmware(self, handle: int, ipa: int, nbytes: int) -> None:
        self._donation.set_firmware(self._alive(handle), ipa, nbytes)

    def _donate_list(self, handle: int, list_pa: int, nr: int) -> None:
        vm = self._vm(handle, protected=True)
        self._check_alive(vm)
        self._donation.donate_list(vm, list_pa, nr)

    def _pgd_info(self) -> int:
        return self._mem.pgd_bytes

    def _firmware_info(self) -> int:
        return self._donation.firmware_bytes

    def _alive(self, handle: int) -> Vm:
        vm = self._vms.get(handle)
        self._check_alive(vm)
        return vm

    def _check_alive(self, vm: Vm) -> None:
        if vm.dying:
            raise Refused(Errno.ENOENT, "dying", "the VM is being torn down", vm=vm.handle)

    def _vm(self, handle: int, *, protected: bool) -> Vm:
        vm = self._vms.get(handle)
        if vm.protected != protected:
            kind = "protected" if vm.protected else "not protected"
            raise Refused(Errno.EINVAL, "vm_kind", f"the VM is {kind}", vm=handle)
        return vm


def _iommu_calls(mem: MemProtect, iommu: Iommu) -> dict[int, Entry]:
    """The calls about DMA. A guest may be running, and change what it shares or maps for DMA: each
    of them has the lock of memory, too."""

    def locked(handler: Callable[..., int | None]) -> Callable[..., int | None]:
        def call(*numbers: int) -> int | None:
            with mem.lock:
                return handler(*numbers)

        return call

    return {
        call: Entry(call.name, arity, locked(handler), HostHypercall(call.name, 0))
        for call, arity, handler in (
            (HostCall.IOMMU_ALLOC_DOMAIN, 2, iommu.alloc_domain),
            (HostCall.IOMMU_FREE_DOMAIN, 1, iommu.free_domain),
            (HostCall.IOMMU_TOPUP, 3, iommu.topup),
            (HostCall.IOMMU_ATTACH, 2, iommu.attach),
            (HostCall.IOMMU_DETACH, 2, iommu.detach),
            (HostCall.IOMMU_MAP, 5, iommu.map),
            (HostCall.IOMMU_UNMAP, 3, iommu.unmap),
            (HostCall.IOMMU_EVENTS, 1, iommu.take_events),
        )
    }
