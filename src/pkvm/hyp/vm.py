# SPDX-License-Identifier: GPL-2.0-or-later
"""`Vm`: EL2's own VM, and the table of all VMs (facts §5.1).

The VM's numbers lie in the page that the host donated for it. A handle is
0x1000 + index in the table of 255; index + 1 is the VMID (0 is the host's).
"""

from __future__ import annotations

from pkvm.arm64.stage2 import guest_annotation
from pkvm.hyp.abi import HANDLE_BASE, MAX_VMS, VM_AREA_BYTES
from pkvm.hyp.area import Area, Word
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.memcache import Memcache
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.memory import PhysicalMemory


class Vm(Area):
    """A VM with room for `created_vcpus` vCPUs, in the zeroed area at PA `area_pa`."""

    dying = Word(0x00)
    """1 from START_TEARDOWN_VM on: no vCPU is loaded any more, pages may be reclaimed."""
    users = Word(0x08)
    """Number of loaded vCPUs; a VM in use is not torn down."""
    entered = Word(0x10)
    """Protected: 1 once a vCPU, the primary, has entered."""
    firmware_ipa = Word(0x18)
    firmware_bytes = Word(0x20)
    """Where the guest firmware goes (IPA range); no bytes: nowhere."""
    firmware_loaded = Word(0x28)
    """1 once the firmware is there; where it comes page by page, once no more of it comes."""
    mmio_guard = Word(0x30)
    """1 once the VM has the MMIO guard: devices are only where the guest says."""
    features = Word(0x38)
    """Features of all its vCPUs (`id_registers.GUEST_FEATURES`), once one is made."""

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        handle: int,
        protected: bool,
        isolated: bool,
        created_vcpus: int,
        area_pa: int,
        host_pa: int,
        stage2: Stage2,
        memcache: Memcache,
    ) -> None:
        super().__init__(memory, area_pa, VM_AREA_BYTES)
        self.handle = handle
        self.annotation = guest_annotation(handle, 0)
        self.protected = protected
        self.isolated = isolated
        """Protected, and EL2 keeps the vCPUs' registers (`policy.Isolation`)."""
        self.host_pa = host_pa
        self.stage2 = stage2
        self.memcache = memcache
        self.vcpus: list[Vcpu | None] = [None] * created_vcpus

    @property
    def vmid(self) -> int:
        """The VMID of its stage-2."""
        return vmid_of(self.handle)

    def is_firmware(self, ipa: int) -> bool:
        """Whether an IPA lies in the firmware's range."""
        return 0 <= ipa - self.firmware_ipa < self.firmware_bytes


def vmid_of(handle: int) -> int:
    """The VMID of the VM with this handle: index + 1."""
    return handle - HANDLE_BASE + 1


class VmTable:
    """255 entries, each empty, reserved by the host, or a VM."""

    def __init__(self) -> None:
        self._vms: list[Vm | None] = [None] * MAX_VMS
        self._reserved = [False] * MAX_VMS

    def reserve(self) -> int:
        """The handle of an entry that was empty. Raises Refused(ENOMEM) if none is."""
        for index in range(MAX_VMS):
            if not self._reserved[index] and self._vms[index] is None:
                self._reserved[index] = True
                return HANDLE_BASE + index
        raise Refused(Errno.ENOMEM, "vm_table", f"there are {MAX_VMS} VMs already")

    def unreserve(self, handle: int) -> bool:
        """Empty a reserved entry; nothing happens, and False, if it is not one."""
        if not self.is_reserved(handle):
            return False
        self._reserved[handle - HANDLE_BASE] = False
        return True

    def is_reserved(self, handle: int) -> bool:
        """Whether `handle`, any number, names a reserved entry."""
        return 0 <= handle - HANDLE_BASE < MAX_VMS and self._reserved[handle - HANDLE_BASE]

    def insert(self, vm: Vm) -> None:
        """Put a VM into its reserved entry. From here on it can be found."""
        if not self.is_reserved(vm.handle):
            raise HypBug(f"VM {vm.handle:#x} has no reserved entry")
        self._vms[vm.handle - HANDLE_BASE] = vm
        self._reserved[vm.handle - HANDLE_BASE] = False

    def remove(self, vm: Vm) -> None:
        """Empty the VM's entry, which may be reserved again at once."""
        self._vms[vm.handle - HANDLE_BASE] = None

    def find(self, handle: int) -> Vm | None:
        """The VM with this handle, any number; None for an entry that is empty or reserved."""
        index = handle - HANDLE_BASE
        return self._vms[index] if 0 <= index < MAX_VMS else None

    def get(self, handle: int, errno: Errno = Errno.ENOENT) -> Vm:
        """The VM with this handle, any number. Raises Refused(errno) if there is none."""
        vm = self.find(handle)
        if vm is None:
            raise Refused(errno, "handle", f"there is no VM {handle:#x}")
        return vm

    def vms(self) -> list[Vm]:
        """Every VM, dying ones too."""
        return [vm for vm in self._vms if vm is not None]
