# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for a protected VM, and the guest firmware in it (RFC 7.26.1, facts §8.1).

The host names a range of IPAs for the firmware before it donates it. A donation
of the range puts the image there and zeroes the rest; whatever the host had left
in those pages is gone. The RFC's range comes at once, and a VM whose firmware is
not in place does not run; Android's comes as the guest touches it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from pkvm.events import Recorder, VmLife
from pkvm.hyp.abi import SGLIST_ENTRY_BYTES
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.memory_policy import FirmwareRule
from pkvm.hyp.run import PhysicalCpu
from pkvm.hyp.vm import Vm
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_PINNED, HOST_SHARED_WITH_HYP
from pkvm.machine.cpu.engine import CpuEngine

Entries = npt.NDArray[np.uint64]
"""(n, 3): pfn, gfn, number of pages."""
_ENTRY_WORDS = SGLIST_ENTRY_BYTES // 8
_FIRMWARE_BYTES = Vm.index_of("firmware_bytes")


class Donation:
    """DONATE_GUEST and its kin. Called with EL2's lock held; every method raises Refused and has
    then changed nothing."""

    def __init__(
        self, mem: MemProtect, cpu: PhysicalCpu, engine: CpuEngine, recorder: Recorder
    ) -> None:
        self._mem = mem
        self._cpu = cpu
        self._engine = engine
        self._record = recorder.record
        self._by_page = mem.policy.firmware is FirmwareRule.PAGES

    @property
    def firmware_bytes(self) -> int:
        """Bytes of the guest firmware that EL2 holds, 0 if none."""
        return self._mem.firmware[1] if self._mem.firmware else 0

    def set_firmware(self, vm: Vm, ipa: int, nbytes: int) -> None:
        """The firmware shall go to the start of IPA range [ipa, ipa+nbytes), which is not donated
        yet; may be said again until it is there.

        Raises Refused: EINVAL for a VM that is not protected, a machine without firmware or a
        range that is not whole pages of the VM's space; ENOMEM if it is too small for the image;
        EBUSY when the firmware is there, or might have been asked for.
        """
        if not vm.protected:
            raise Refused(Errno.EINVAL, "vm_kind", "the VM is not protected", vm=vm.handle)
        if not self.firmware_bytes:
            why = "the boot firmware left no guest firmware"
            raise Refused(Errno.EINVAL, "firmware", why, vm=vm.handle)
        limit = 1 << self._mem.geometry.ipa_bits
        if (ipa | nbytes) & PAGE_MASK or not 0 < nbytes <= limit or ipa > limit - nbytes:
            why = f"{nbytes:#x} bytes from there are not pages of the VM's space"
            raise Refused(Errno.EINVAL, "ipa_range", why, ipa=ipa, vm=vm.handle)
        if nbytes < self.firmware_bytes:
            why = f"the image has {self.firmware_bytes:#x} bytes"
            raise Refused(Errno.ENOMEM, "firmware", why, ipa=ipa, vm=vm.handle)
        if vm.firmware_loaded:
            raise Refused(Errno.EBUSY, "firmware", "the firmware is in place", vm=vm.handle)
        if self._by_page and (any(vm.vcpus) or self._mem.has_pages(vm)):
            why = "the VM has vCPUs or memory already"
            raise Refused(Errno.EBUSY, "firmware", why, vm=vm.handle)
        vm.firmware_ipa = ipa
        vm.firmware_bytes = nbytes

    def donate(self, pfn: int, gfn: int, nr: int) -> None:
        """One range, to the VM whose vCPU is loaded. Raises Refused: EINVAL if there is none or it
        is not protected, as `MemProtect.host_donate_guest`, and where the firmware comes at once,
        EINVAL for a range that covers its only in part."""
        vm = self._cpu.loaded(protected=True).vm
        if vm.words[_FIRMWARE_BYTES] and not vm.firmware_loaded:
            entries = np.array([[pfn, gfn, nr]], np.uint64)
            if self._has_firmware(vm, entries):
                self._mem.host_donate_guest(vm, pfn, gfn, nr)
                self._load_firmware(vm, entries)
                return
        self._mem.host_donate_guest(vm, pfn, gfn, nr)

    def donate_list(self, vm: Vm, list_pa: int, nr: int) -> None:
        """Many ranges, all or none, from a list of `nr` entries in the host's memory at PA
        `list_pa`. Raises Refused as `donate`, and EINVAL or EPERM for a list that is not in
        memory of the host's own."""
        entries = self._copy_list(list_pa, nr)
        if vm.firmware_bytes and not vm.firmware_loaded and self._has_firmware(vm, entries):
            self._mem.host_donate_guest_list(vm, entries)
            self._load_firmware(vm, entries)
            return
        self._mem.host_donate_guest_list(vm, entries)

    def _copy_list(self, list_pa: int, nr: int) -> Entries:
        """EL2's own copy of the host's list. Each page of it must be owned by the host while it is
        read, so that nobody else's memory is taken for a list."""
        mem = self._mem
        memory = mem.memory
        nbytes = nr * SGLIST_ENTRY_BYTES
        if list_pa & 7 or not nr or not memory.is_ram(list_pa, nbytes):
            why = f"no list of {nr} entries can be there"
            raise Refused(Errno.EINVAL, "list_range", why, pa=list_pa)
        first = (list_pa - memory.ram_base) >> PAGE_SHIFT
        last = (list_pa + nbytes - 1 - memory.ram_base) >> PAGE_SHIFT
        with mem.lock:
            states = mem.vmemmap.states[first : last + 1]
            if not np.isin(states, (HOST_OWNED, HOST_PINNED, HOST_SHARED_WITH_HYP)).all():
                why = "the list is not in the host's own memory"
                raise Refused(Errno.EPERM, "host_state", why, pa=list_pa)
            words = memory.span(list_pa, nbytes).copy()
        return words.reshape(nr, _ENTRY_WORDS)

    def _has_firmware(self, vm: Vm, entries: Entries) -> bool:
        """Whether pages of the entries are the firmware's.

        Numbers that no range can have are left for `MemProtect` to refuse, and so are entries that
        overlap: counting pages is enough. Raises Refused(EINVAL) if part of the range is missing,
        where it comes at once.
        """
        limit = np.uint64(1 << self._mem.geometry.ipa_bits - PAGE_SHIFT)
        if (entries[:, 1:] > limit).any():
            return False
        overlap = _overlap(vm, entries)
        covered = int(overlap.sum())
        if covered and not self._by_page and covered < vm.firmware_bytes >> PAGE_SHIFT:
            why = "the firmware's range must be donated at once"
            raise Refused(Errno.EINVAL, "firmware_range", why, ipa=vm.firmware_ipa, vm=vm.handle)
        return covered > 0

    def _load_firmware(self, vm: Vm, entries: Entries) -> None:
        """Copy the image into those of its pages that were just donated, and zero the rest of its
        range."""
        assert self._mem.firmware is not None
        memory = self._mem.memory
        source, image_bytes = self._mem.firmware
        first_gfn = vm.firmware_ipa >> PAGE_SHIFT
        overlap = _overlap(vm, entries)
        for row in np.flatnonzero(overlap).tolist():
            pfn, gfn, _ = entries[row].tolist()
            skip = max(0, first_gfn - gfn)
            pa = (pfn + skip) << PAGE_SHIFT
            offset = (gfn + skip - first_gfn) << PAGE_SHIFT
            nbytes = int(overlap[row]) << PAGE_SHIFT
            image = min(nbytes, max(0, image_bytes - offset))
            if image:
                memory.span(pa, image)[:] = memory.span(source + offset, image)
                self._engine.invalidate_code(pa, image)
            if nbytes > image:
                self._mem.zero(pa + image, nbytes - image)
        vm.firmware_loaded = int(not self._by_page)
        self._record(VmLife("firmware", vm.handle))


def _overlap(vm: Vm, entries: Entries) -> npt.NDArray[np.int64]:
    """Pages of each entry that lie in the firmware's range."""
    first = vm.firmware_ipa // PAGE_SIZE
    end = first + vm.firmware_bytes // PAGE_SIZE
    starts = entries[:, 1].astype(np.int64)
    ends = starts + entries[:, 2].astype(np.int64)
    overlap: npt.NDArray[np.int64] = np.minimum(ends, end) - np.maximum(starts, first)
    return overlap.clip(0)
