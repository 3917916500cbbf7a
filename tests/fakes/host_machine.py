# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM on the scripted EL2 of `host_fakes`, and the exits that its guests make."""

from __future__ import annotations

from fakes.host_fakes import BLOCK, PAGE, Guest, Rig
from pkvm.arm64.esr import EC, EC_SHIFT, IL, ISV, SAS_SHIFT, WNR
from pkvm.host.firmware_node import FirmwareRegion
from pkvm.uapi import kvm as uapi

RAM_IPA = 0x4000_0000
DEVICE = 0x0900_0000
TIMEOUT_S = 20


class Machine:
    """A VM with RAM at RAM_IPA; `guests` are its vCPUs' programs."""

    def __init__(
        self, *guests: Guest, protected: bool = True, off: bool = True, virtual: bool = False
    ) -> None:
        self.rig = Rig(firmware=FirmwareRegion(0x9000_0000, PAGE), virtual=virtual)
        self.free = self.rig.kernel.free_pages
        rig = self.rig
        self.vm = rig.vm()
        self.ram = rig.kernel.mmap(2 * BLOCK)
        self.fw = rig.kernel.mmap(PAGE)
        rig.slot(self.vm, 0, RAM_IPA, 2 * BLOCK, self.ram.address)
        rig.slot(self.vm, 1, 0, PAGE, self.fw.address)
        self.vcpus = [
            rig.vcpu(self.vm, index, *([uapi.VcpuFeature.POWER_OFF] if index and off else []))
            for index in range(len(guests))
        ]
        self.pages = [rig.kernel.mmap_vcpu(fd, uapi.VCPU_MMAP_SIZE) for fd in self.vcpus]
        if protected:
            rig.cap(self.vm, uapi.ProtectedVm.ENABLE, 1)
        rig.el2.guests.update(enumerate(guests))

    def run(self, index: int = 0) -> int:
        """KVM_RUN; the exit reason."""
        assert self.rig.run(self.vcpus[index]) == 0
        return self.reason(index)

    def reason(self, index: int = 0) -> int:
        return int.from_bytes(self.pages[index].view[8:12], "little")

    def mmio(self, index: int = 0) -> tuple[int, bytes, int, int]:
        address, data, size, is_write = uapi.Run.MMIO.unpack_from(self.pages[index].view, 32)
        return address, data.to_bytes(8, "little"), size, is_write

    def answer(self, data: bytes) -> None:
        self.pages[0].view[40 : 40 + len(data)] = data

    def close(self) -> None:
        for page in self.pages:
            page.close()
        for fd in (self.vm, *self.vcpus):
            self.rig.kernel.close(fd)
        self.ram.close()
        self.fw.close()
        assert self.rig.kernel.free_pages == self.free
        assert not self.rig.bus.lost
        assert not self.rig.el2.vms


def dabt(
    ipa: int, size: int = 2, *, write: bool = False, isv: bool = True, more: int = 0
) -> dict[str, int]:
    esr = EC.DABT_LOW << EC_SHIFT | IL | 0x07 | more
    if isv:
        esr |= ISV | size << SAS_SHIFT
    if write:
        esr |= WNR
    return {"esr": esr, "far": ipa & 0xFFF, "hpfar": ipa >> 12 << 4}
