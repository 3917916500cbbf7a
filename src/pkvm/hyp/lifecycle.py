# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs and vCPUs come and go (facts §5.2): init_vm, init_vcpu, start_teardown, reclaim, finalize.

The order of checks, and so of errors, is upstream's. What the host gives for a
VM or vCPU is donated first and given back, zeroed, if a later check fails.
"""

from __future__ import annotations

from contextlib import ExitStack

from pkvm.arm64.psci import Affinity
from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from pkvm.events import Recorder, Tlbi, VmLife
from pkvm.hyp.abi import HANDLE_BASE, MAX_VCPUS, VCPU_AREA_BYTES, VM_AREA_BYTES, HostVcpu, HostVm
from pkvm.hyp.area import Area
from pkvm.hyp.assignment import Assignment
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.id_registers import GUEST_FEATURES
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.policy import Policy
from pkvm.hyp.run import PhysicalCpu
from pkvm.hyp.vcpu import Vcpu
from pkvm.hyp.vm import Vm, VmTable, vmid_of

FEATURE_EL1_32BIT = 1 << 1
"""KVM_ARM_VCPU_EL1_32BIT in HostVcpu.FEATURES."""
MP_STATE_STOPPED = 5
"""KVM_MP_STATE_STOPPED in HostVcpu.MP_STATE."""
MAX_VCPU_ID = 1 << 20
"""MPIDR_EL1 has room for so many."""


class Lifecycle:
    """The calls that make and end VMs. Called with EL2's lock held; every method raises Refused
    and has then changed nothing. Addresses are PAs from the host."""

    def __init__(
        self,
        mem: MemProtect,
        table: VmTable,
        cpu: PhysicalCpu,
        recorder: Recorder,
        policy: Policy,
        assignment: Assignment | None,
        *,
        ptrauth: bool,
    ) -> None:
        self._isolation = policy.isolation
        self._assignment = assignment
        self._ptrauth = ptrauth
        self._mem = mem
        self._table = table
        self._cpu = cpu
        self._record = recorder.record

    def reserve_vm(self) -> int:
        """A handle. Raises Refused(ENOMEM) if all 255 are in use."""
        handle = self._table.reserve()
        self._record(VmLife("reserve", handle))
        return handle

    def unreserve_vm(self, handle: int) -> None:
        """Give a handle back that has not become a VM; else nothing happens."""
        if self._table.unreserve(handle):
            self._record(VmLife("unreserve", handle))

    def init_vm(self, host_pa: int, area_pa: int, pgd_pa: int) -> None:
        """Make a VM from the words of the shared page at `host_pa` (`HostVm`), in the page at
        `area_pa`, with its stage-2 root at `pgd_pa`.

        Raises Refused: EPERM if the host's page is not shared; EINVAL for its words; ENOMEM if an
        area is not aligned or not the host's to give.
        """
        mem = self._mem
        with ExitStack() as undo:
            words = self._pin(host_pa, undo)
            handle = words[HostVm.HANDLE >> 3]
            protected = words[HostVm.PROTECTED >> 3]
            created_vcpus = words[HostVm.CREATED_VCPUS >> 3]
            if not 1 <= created_vcpus <= MAX_VCPUS:
                why = f"a VM has 1 to {MAX_VCPUS} vCPUs, not {created_vcpus}"
                raise Refused(Errno.EINVAL, "created_vcpus", why)
            if handle < HANDLE_BASE:
                raise Refused(Errno.EINVAL, "handle", f"{handle:#x} is not a handle")
            if protected > (1 if mem.protected else 0):
                why = "neither 0 nor 1" if mem.protected else "protected mode is off"
                raise Refused(Errno.EINVAL, "vm_kind", why, vm=handle)
            self._donate(area_pa, VM_AREA_BYTES, PAGE_SIZE, undo)
            self._donate(pgd_pa, mem.pgd_bytes, mem.pgd_bytes, undo)
            if not self._table.is_reserved(handle):
                raise Refused(Errno.EINVAL, "handle", f"the host has not reserved {handle:#x}")
            memcache = mem.new_memcache()
            vm = Vm(
                mem.memory,
                handle=handle,
                protected=protected == 1,
                isolated=protected == 1 and self._isolation is not None,
                created_vcpus=created_vcpus,
                area_pa=area_pa,
                host_pa=host_pa,
                stage2=mem.new_guest_stage2(pgd_pa, vmid_of(handle), memcache),
                memcache=memcache,
            )
            undo.pop_all()
        self._table.insert(vm)
        self._record(VmLife("init_vm", handle))

    def init_vcpu(self, handle: int, host_pa: int, area_pa: int) -> None:
        """Make a vCPU from the words of the shared page at `host_pa` (`HostVcpu`), in the
        VCPU_AREA_BYTES at `area_pa`.

        Raises Refused: ENOMEM if the area is not aligned or not the host's to give; ENOENT if
        there is no such VM, or it dies; EBUSY if the host's page is not shared; EINVAL for its
        words: AArch32, pointer authentication that the CPU or the VM's other vCPUs have not, an
        index that is taken or beyond the VM's number, an id that is taken, a second vCPU that the
        host wants to start in the firmware.
        """
        with ExitStack() as undo:
            self._donate(area_pa, VCPU_AREA_BYTES, PAGE_SIZE, undo)
            vm = self._table.get(handle)
            if vm.dying:
                raise Refused(Errno.ENOENT, "dying", "the VM is being torn down", vm=handle)
            try:
                words = self._pin(host_pa, undo)
            except Refused as refused:
                raise Refused(Errno.EBUSY, refused.check, refused.why, pa=host_pa) from refused
            vcpu_id = words[HostVcpu.VCPU_ID >> 3]
            index = words[HostVcpu.VCPU_IDX >> 3]
            features = words[HostVcpu.FEATURES >> 3]
            if features & FEATURE_EL1_32BIT:
                why = "a vCPU has no AArch32 state at EL1"
                raise Refused(Errno.EINVAL, "features", why, vm=handle)
            self._check_features(vm, features)
            if index >= len(vm.vcpus) or vm.vcpus[index] is not None:
                why = f"vCPU {index} of {len(vm.vcpus)} cannot be made"
                raise Refused(Errno.EINVAL, "vcpu_index", why, vm=handle)
            if vcpu_id >= MAX_VCPU_ID or any(
                vcpu is not None and vcpu.vcpu_id == vcpu_id for vcpu in vm.vcpus
            ):
                why = f"vCPU id {vcpu_id:#x} is taken or too large"
                raise Refused(Errno.EINVAL, "vcpu_id", why, vm=handle)
            starts = self._is_started_by_host(vm, words[HostVcpu.MP_STATE >> 3])
            vcpu = Vcpu(self._mem.memory, vm, index, vcpu_id, area_pa, host_pa)
            undo.pop_all()
        vm.features = features & GUEST_FEATURES
        if starts:
            vcpu.power = Affinity.ON_PENDING
            vcpu.started_by_host = 1
        vm.vcpus[index] = vcpu
        self._record(VmLife("init_vcpu", handle, index))

    def _check_features(self, vm: Vm, features: int) -> None:
        """Refuse (EINVAL) pointer authentication by halves, without the hardware, or other than
        that of the VM's other vCPUs."""
        wanted = features & GUEST_FEATURES
        why = ""
        if wanted and not self._ptrauth:
            why = "this CPU has no pointer authentication"
        elif wanted not in (0, GUEST_FEATURES):
            why = "pointer authentication is of addresses and generic, or not at all"
        elif wanted != vm.features and any(vm.vcpus):
            why = "all vCPUs of a VM have pointer authentication, or none"
        if why:
            raise Refused(Errno.EINVAL, "features", why, vm=vm.handle)

    def _is_started_by_host(self, vm: Vm, mp_state: int) -> bool:
        """Whether a new vCPU runs without a CPU_ON, where INIT_VCPU decides that. Raises
        Refused(EINVAL) for a second one of a VM with firmware."""
        isolation = self._isolation
        if isolation is None or not isolation.primary_at_init or not vm.isolated:
            return False
        if mp_state == MP_STATE_STOPPED:
            return False
        if vm.firmware_bytes and any(vcpu and vcpu.power != Affinity.OFF for vcpu in vm.vcpus):
            why = "only one vCPU starts in the firmware"
            raise Refused(Errno.EINVAL, "primary", why, vm=vm.handle)
        return True

    def vcpu_features(self) -> int:
        """Features that vCPUs may ask for, all or none."""
        return GUEST_FEATURES if self._ptrauth else 0

    def start_teardown(self, handle: int) -> None:
        """From now on the VM runs no more, the devices that it had are the host's, and its pages
        may be reclaimed.

        Raises Refused(EINVAL) if there is no such VM, a vCPU is loaded or it is dying already.
        """
        vm = self._table.get(handle, Errno.EINVAL)
        if vm.users:
            raise Refused(Errno.EINVAL, "users", "a vCPU is loaded", vm=handle)
        if vm.dying:
            raise Refused(Errno.EINVAL, "dying", "the VM is dying already", vm=handle)
        vm.dying = 1
        if self._assignment is not None:
            self._assignment.release(vm)
        self._record(VmLife("start_teardown", handle))

    def reclaim_page(self, handle: int, gfn: int) -> None:
        """Give one page of a dying VM back to the host, zeroed if it was private.

        Raises Refused: EINVAL unless the VM is dying, else as
        `MemProtect.reclaim_dying_guest_page`.
        """
        self._mem.reclaim_dying_guest_page(self._dying(handle), gfn)

    def reclaim_range(self, handle: int, gfn: int, nr: int) -> int:
        """As `reclaim_page` for `nr` frames; returns the pages that were mapped."""
        return self._mem.reclaim_dying_guest_range(self._dying(handle), gfn, nr)

    def finalize_teardown(self, handle: int) -> None:
        """End a dying VM: every page that the host gave for it returns through HostVm's list.

        The VMID is flushed before it can be used again. Raises Refused: EINVAL unless the VM is
        dying; EBUSY while it has pages that the host has not reclaimed or unshared. (Upstream lets
        those be lost; but then their annotations would name whatever VM gets the handle next.)
        """
        vm = self._dying(handle)
        mem = self._mem
        if mem.has_pages(vm):
            raise Refused(Errno.EBUSY, "guest_pages", "the VM still has pages", vm=handle)
        self._cpu.forget(vm)
        self._record(Tlbi(vm.vmid))
        self._table.remove(vm)
        vm.stage2.destroy()
        head, nr = vm.memcache.drain()
        for vcpu in vm.vcpus:
            if vcpu is not None:
                head = self._return_area(vcpu, head)
                nr += vcpu.nbytes // PAGE_SIZE
                mem.unpin_shared(vcpu.host_pa)
        head = self._return_area(vm, head)
        nr += vm.nbytes // PAGE_SIZE
        mem.memory.write_u64(vm.host_pa + HostVm.TEARDOWN_HEAD, head)
        mem.memory.write_u64(vm.host_pa + HostVm.TEARDOWN_NR, nr)
        mem.unpin_shared(vm.host_pa)
        self._record(VmLife("finalize", handle))

    def _dying(self, handle: int) -> Vm:
        vm = self._table.get(handle, Errno.EINVAL)
        if not vm.dying:
            raise Refused(Errno.EINVAL, "dying", "the VM is not being torn down", vm=handle)
        return vm

    def _pin(self, pa: int, undo: ExitStack) -> memoryview[int]:
        """Pin the host's shared page at `pa`; its words. Raises Refused(EINVAL) if not aligned."""
        if pa & PAGE_MASK:
            raise Refused(Errno.EINVAL, "alignment", "the address is not that of a page", pa=pa)
        self._mem.pin_shared(pa)
        undo.callback(self._mem.unpin_shared, pa)
        memory = self._mem.memory
        first = (pa - memory.ram_base) >> 3
        return memory.words[first : first + (PAGE_SIZE >> 3)]

    def _donate(self, pa: int, nbytes: int, alignment: int, undo: ExitStack) -> None:
        """Take [pa, pa+nbytes) from the host and zero it. Raises Refused(ENOMEM)."""
        if pa % alignment:
            why = f"the area is not aligned to {alignment:#x} bytes"
            raise Refused(Errno.ENOMEM, "alignment", why, pa=pa)
        try:
            self._mem.host_donate_hyp(pa >> PAGE_SHIFT, nbytes >> PAGE_SHIFT)
        except Refused as refused:
            raise Refused(Errno.ENOMEM, refused.check, refused.why, pa=pa) from refused
        undo.callback(self._give_back, pa, nbytes)
        self._mem.zero(pa, nbytes)

    def _give_back(self, pa: int, nbytes: int) -> None:
        self._mem.zero(pa, nbytes)
        self._mem.hyp_donate_host(pa >> PAGE_SHIFT, nbytes >> PAGE_SHIFT)

    def _return_area(self, area: Area, head: int) -> int:
        """Zero an area and give its pages to the host, linked in front of the list at PA `head`.
        Returns the new head."""
        mem = self._mem
        mem.zero(area.pa, area.nbytes)
        for pa in reversed(range(area.pa, area.pa + area.nbytes, PAGE_SIZE)):
            mem.memory.write_u64(pa, head)
            head = pa
        mem.hyp_donate_host(area.pa >> PAGE_SHIFT, area.nbytes >> PAGE_SHIFT)
        return head
