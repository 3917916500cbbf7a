# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that the host gives to protected guests (facts §10).

A device is given away in this order: the host loses its registers, its stream is
aborted, EL2 resets it, and only then is it the VM's. It reaches no memory until
the guest attaches it to a domain that the guest made. It comes back when the
VM's teardown starts, before any page of the VM is reclaimed: stream aborted,
reset, the guest's domains ended, and last the host's registers and identity
domain. So neither owner finds anything of the other's in it.

The guest knows a stream by numbers that the host chose; what it really is EL2
says (`Assignment.dma_tokens`, `mmio_token`), for firmware to compare with what it
trusts.
"""

from __future__ import annotations

from pkvm.arm64.smmu import ABORT_STE, STE2, stage2_ste
from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION_GFN_SHIFT,
    ANNOTATION_HYP,
    ANNOTATION_MMIO,
    ATTR_DEVICE_RW,
    LAST_LEVEL,
    MEMATTR_DEVICE,
    MEMATTR_NORMAL,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_SHIFT,
    TABLE_OR_PAGE,
    VALID,
    PageState,
)
from pkvm.events import Recorder, VmLife
from pkvm.hyp.abi import MAX_DOMAINS, MAX_GUEST_DOMAINS
from pkvm.hyp.bulk import leaves, missing_tables, one_run
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.host_dma import Domain
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.smmu import SmmuDriver
from pkvm.hyp.vm import Vm, VmTable

DEVICE_PAGE = ATTR_DEVICE_RW | TABLE_OR_PAGE | PageState.SHARED_BORROWED << SW_STATE_SHIFT
"""A guest's leaf for registers of its device: no page of its own, so that it is no memory to any
other call."""
_NUMBERS = 1 << 32
"""pvIOMMUs and vSIDs are below this."""


def is_device(entry: int) -> bool:
    """Whether a guest's leaf is registers of a device that it was given."""
    return entry & (VALID | MEMATTR_NORMAL) == VALID | MEMATTR_DEVICE


class Assignment:
    """The calls of host and guest about it. Every method raises Refused and has then changed
    nothing; numbers are the caller's. The host's calls come with EL2's lock held."""

    def __init__(
        self, mem: MemProtect, smmu: SmmuDriver, table: VmTable, recorder: Recorder
    ) -> None:
        self.mem = mem
        self._smmu = smmu
        self._table = table
        self._record = recorder.record

    # The host's

    def assign(self, handle: int, pa: int, pviommu: int, vsid: int) -> None:
        """ASSIGN_DEVICE. Raises Refused: ENOENT (no such VM, or it dies; no device's registers
        start at `pa`), EINVAL (the VM is not protected; numbers), EBUSY (a VM has the device, or it
        is in a domain of the host's), EPERM (tainted), EEXIST (the VM knows another stream by these
        numbers), ENODEV (EL2 cannot reset it)."""
        mem = self.mem
        with mem.lock:
            vm = self._alive(handle)
            devices = mem.devices
            index = next((n for n, one in enumerate(devices.devices) if one.base == pa), None)
            if index is None:
                raise Refused(Errno.ENOENT, "device", "no device has its registers there", pa=pa)
            if pviommu >= _NUMBERS or vsid >= _NUMBERS:
                why = f"pvIOMMU {pviommu:#x} and vSID {vsid:#x} have 32 bits"
                raise Refused(Errno.EINVAL, "vsid", why, vm=handle)
            if devices.owner(index):
                raise Refused(Errno.EBUSY, "device", "a VM has the device", pa=pa)
            if devices.is_tainted(index):
                why = "its registers were a target of DMA: it is the host's for ever"
                raise Refused(Errno.EPERM, "tainted", why, pa=pa)
            if not devices.can_reset(index):
                raise Refused(Errno.ENODEV, "reset", "EL2 cannot reset the device", pa=pa)
            device = devices.devices[index]
            identity = mem.host.identity
            if identity is None or self._smmu.ste(device.stream) != identity.ste:
                why = "its stream is not in the identity domain"
                raise Refused(Errno.EBUSY, "attached", why, pa=pa)
            if devices.named(handle, pviommu, vsid) is not None:
                why = f"the VM has a stream {vsid:#x} of pvIOMMU {pviommu:#x}"
                raise Refused(Errno.EEXIST, "vsid", why, vm=handle)
            mem.host.take_device(device.base, device.size)
            self._smmu.configure(device.stream, ABORT_STE)
            devices.reset(index)
            devices.give(index, vm.handle, pviommu, vsid)
            self._record(VmLife("assign_device", vm.handle))

    def map_page(self, handle: int, pa: int, gfn: int) -> None:
        """MAP_DEVICE_GUEST. Raises Refused: ENOENT (no such VM, or it dies), EINVAL (numbers),
        EPERM (no register page of a device that the VM has), EEXIST (the page is mapped already,
        or something is at `gfn`), ENOMEM with `pages_needed`."""
        mem = self.mem
        with mem.lock:
            vm = self._alive(handle)
            ipa = gfn << PAGE_SHIFT
            if pa & PAGE_MASK or ipa >> vm.stage2.ipa_bits:
                why = "that is no page of the VM's space, or not the address of one"
                raise Refused(Errno.EINVAL, "gfn_range", why, pa=pa, vm=handle)
            index = mem.devices.at(pa, PAGE_SIZE)
            if index is None or mem.devices.owner(index) != vm.handle:
                raise Refused(Errno.EPERM, "device", "the VM has no such device", pa=pa, vm=handle)
            if mem.host.stage2.leaf(pa)[0] != ANNOTATION_HYP:
                raise Refused(Errno.EEXIST, "device", "the VM has it mapped", pa=pa, vm=handle)
            if vm.stage2.leaf(ipa)[0] not in (0, ANNOTATION_MMIO):
                why = "the VM has something there"
                raise Refused(Errno.EEXIST, "guest_state", why, ipa=ipa, vm=handle)
            missing = missing_tables(vm.stage2, [(LAST_LEVEL, one_run(gfn, 1))])
            missing -= vm.memcache.available
            if missing > 0:
                why = f"{missing} more table pages are needed"
                raise Refused(Errno.ENOMEM, "memcache", why, vm=handle, pages_needed=missing)
            mem.host.pass_device_page(pa, vm.annotation | gfn << ANNOTATION_GFN_SHIFT)
            vm.stage2.put(ipa, pa | DEVICE_PAGE)

    def release(self, vm: Vm) -> None:
        """The VM's teardown starts, no vCPU of it is loaded: end its domains, and give its devices
        back to the host, reset."""
        mem = self.mem
        with mem.lock:
            given = mem.devices.of_vm(vm.handle)
            for index in given:
                self._smmu.configure(mem.devices.devices[index].stream, ABORT_STE)
                mem.devices.reset(index)
            for number in [n for n, domain in mem.domains.items() if domain.vm == vm.handle]:
                mem.end_guest_domain(vm, mem.domains.pop(number))
            if given:
                self._unmap_registers(vm)
            identity = mem.host.identity
            for index in given:
                if identity is None:
                    raise HypBug("a device was given away without an SMMU")
                device = mem.devices.devices[index]
                mem.host.give_device(device.base, device.size)
                self._smmu.configure(device.stream, identity.ste)
                mem.devices.give(index, 0, 0, 0)
                self._record(VmLife("release_device", vm.handle))

    # The guest's

    def mmio_token(self, vm: Vm, ipa: int) -> int:
        """DEV_REQ_MMIO: PA of the registers that the guest has at page `ipa`. Raises Refused:
        EINVAL, EFAULT (nothing is there), EPERM (it is something else)."""
        if ipa & PAGE_MASK or ipa >> vm.stage2.ipa_bits:
            raise Refused(Errno.EINVAL, "ipa_range", "that is no page", ipa=ipa, vm=vm.handle)
        with self.mem.lock:
            entry, _ = vm.stage2.leaf(ipa)
            if is_device(entry):
                return entry & ADDRESS_MASK
            if entry in (0, ANNOTATION_MMIO):
                errno = self.mem.policy.unmapped
                raise Refused(errno, "guest_state", "nothing is there", ipa=ipa, vm=vm.handle)
            raise Refused(Errno.EPERM, "guest_state", "that is no device", ipa=ipa, vm=vm.handle)

    def dma_tokens(self, vm: Vm, pviommu: int, vsid: int) -> tuple[int, int]:
        """DEV_REQ_DMA: PA of the registers of the IOMMU, and the stream, that these numbers stand
        for. Raises Refused(ENOENT)."""
        with self.mem.lock:
            return self._smmu.window.base, self._stream(vm, pviommu, vsid)

    def alloc_domain(self, vm: Vm) -> int:
        """A new domain; the guest's number of it. Raises Refused: EBUSY (it has 8), ENOMEM with
        `pages_needed`."""
        mem = self.mem
        with mem.lock:
            for number in range(1, MAX_GUEST_DOMAINS + 1):
                vmid = _vmid(vm, number)
                if vmid not in mem.domains:
                    mem.domains[vmid] = mem.new_guest_domain(vm, vmid)
                    return number
            raise Refused(Errno.EBUSY, "domain", "the VM has all its domains", vm=vm.handle)

    def free_domain(self, vm: Vm, number: int) -> None:
        """End a domain and all its mappings. Raises Refused: ENOENT, EBUSY (it is attached)."""
        mem = self.mem
        with mem.lock:
            domain = self._domain(vm, number)
            for device in mem.devices.devices:
                if self._domain_of(device.stream) == domain.number:
                    raise Refused(Errno.EBUSY, "attached", "a stream follows it", vm=vm.handle)
            del mem.domains[domain.number]
            mem.end_guest_domain(vm, domain)

    def attach(self, vm: Vm, pviommu: int, vsid: int, pasid: int, number: int) -> None:
        """Have a stream of the guest's follow a domain. Raises Refused: ENOENT, EINVAL (a PASID),
        EBUSY (it follows one already)."""
        with self.mem.lock:
            stream = self._stream_of(vm, pviommu, vsid, pasid)
            domain = self._domain(vm, number)
            if self._domain_of(stream):
                raise Refused(Errno.EBUSY, "attached", "the stream is attached", vm=vm.handle)
            stage2 = domain.stage2
            self._smmu.configure(stream, stage2_ste(stage2.vttbr, stage2.vtcr, records=False))

    def detach(self, vm: Vm, pviommu: int, vsid: int, pasid: int, number: int) -> None:
        """Have a stream follow nothing. Raises Refused: ENOENT, EINVAL (a PASID; it does not follow
        that domain)."""
        with self.mem.lock:
            stream = self._stream_of(vm, pviommu, vsid, pasid)
            if self._domain_of(stream) != self._domain(vm, number).number:
                why = "the stream does not follow this domain"
                raise Refused(Errno.EINVAL, "attached", why, vm=vm.handle)
            self._smmu.configure(stream, ABORT_STE)

    def map(self, vm: Vm, number: int, iova: int, ipa: int, nbytes: int, prot: int) -> int:
        """`MemProtect.guest_map_dma`; ENOENT for a domain that is not there."""
        with self.mem.lock:
            return self.mem.guest_map_dma(vm, self._domain(vm, number), iova, ipa, nbytes, prot)

    def unmap(self, vm: Vm, number: int, iova: int, nbytes: int) -> int:
        """`MemProtect.guest_unmap_dma`; ENOENT for a domain that is not there."""
        with self.mem.lock:
            return self.mem.guest_unmap_dma(vm, self._domain(vm, number), iova, nbytes)

    # Looking up

    def _alive(self, handle: int) -> Vm:
        vm = self._table.get(handle)
        if vm.dying:
            raise Refused(Errno.ENOENT, "dying", "the VM is being torn down", vm=handle)
        if not vm.protected:
            raise Refused(Errno.EINVAL, "vm_kind", "the VM is not protected", vm=handle)
        return vm

    def _domain(self, vm: Vm, number: int) -> Domain:
        domain = None
        if 0 < number <= MAX_GUEST_DOMAINS:
            domain = self.mem.domains.get(_vmid(vm, number))
        if domain is None:
            raise Refused(Errno.ENOENT, "domain", f"there is no domain {number:#x}", vm=vm.handle)
        return domain

    def _stream_of(self, vm: Vm, pviommu: int, vsid: int, pasid: int) -> int:
        if pasid:
            raise Refused(Errno.EINVAL, "pasid", "streams have no PASIDs", vm=vm.handle)
        return self._stream(vm, pviommu, vsid)

    def _stream(self, vm: Vm, pviommu: int, vsid: int) -> int:
        index = self.mem.devices.named(vm.handle, pviommu, vsid)
        if index is None:
            why = f"the VM has no stream {vsid:#x} of pvIOMMU {pviommu:#x}"
            raise Refused(Errno.ENOENT, "vsid", why, vm=vm.handle)
        return self.mem.devices.devices[index].stream

    def _domain_of(self, stream: int) -> int:
        """VMID of what a known stream follows; 0: the identity domain, or nothing."""
        return STE2["S2VMID"].get(self._smmu.ste(stream)[2])

    def _unmap_registers(self, vm: Vm) -> None:
        """Take every register page out of the guest's stage-2."""
        stage2 = vm.stage2
        found = leaves(stage2, 0, 1 << stage2.ipa_bits - PAGE_SHIFT)
        for frame, entry in zip(found.frames.tolist(), found.entries.tolist(), strict=True):
            if is_device(entry):
                stage2.put(frame << PAGE_SHIFT, 0)
                stage2.invalidate(frame << PAGE_SHIFT)


def _vmid(vm: Vm, number: int) -> int:
    """VMID in the SMMU of a guest's domain: no other VM's, and no domain of the host's."""
    return MAX_DOMAINS + (vm.vmid - 1) * MAX_GUEST_DOMAINS + number
