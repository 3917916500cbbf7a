# SPDX-License-Identifier: GPL-2.0-or-later
"""`Vm`: the owner of a VM's file descriptor."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from pkvm.kvm.device import Device
from pkvm.kvm.kernel import Memory
from pkvm.kvm.scratch import SCRATCH_BYTES, Scratch
from pkvm.kvm.vcpu import Vcpu
from pkvm.uapi import kvm as uapi
from pkvm.uapi.dialects import ANDROID

if TYPE_CHECKING:
    from pkvm.kvm.kvm import Kvm


class ProtectedVmInfo(NamedTuple):
    """struct kvm_protected_vm_info, as far as it was asked for."""

    firmware_size: int
    """Bytes of guest firmware that the host's firmware left; 0 if it left none."""
    known_size: int
    """Bytes of the structure that the kernel knows; 0 if the caller gave no size, or one too
    small for this word, or the kernel does not report it."""


class Vm:
    """One VM. Made by `Kvm.create_vm`. Every method raises OSError with the kernel's errno."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        self.kvm = kvm
        self.fd = fd
        self._kernel = kvm.kernel
        self._scratch = Scratch(self._kernel)
        self._closed = False

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION (KVM API 4.4), for this VM."""
        return self._kernel.ioctl(self.fd, uapi.Ioctl.CHECK_EXTENSION, int(cap))

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU (KVM API 4.7)."""
        mmap_size = self.kvm.vcpu_mmap_size()
        fd = self._kernel.ioctl(self.fd, uapi.Ioctl.CREATE_VCPU, vcpu_id)
        return Vcpu(self, vcpu_id, fd, mmap_size)

    def set_user_memory_region(
        self,
        slot: int,
        ipa: int,
        memory: Memory | None,
        *,
        flags: int = 0,
        offset: int = 0,
        size: int | None = None,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION (KVM API 4.35): put `size` bytes (default: all) of `memory`
        from byte `offset` at IPA `ipa`. Without memory the slot is deleted."""
        if memory is None:
            address, size = 0, 0
        else:
            address = memory.address + offset
            size = memory.length - offset if size is None else size
        buffer = bytearray(uapi.MEMORY_REGION.pack(slot, flags, ipa, size, address))
        self._kernel.ioctl(self.fd, uapi.Ioctl.SET_USER_MEMORY_REGION, buffer)

    def enable_cap(self, cap: int, flags: int = 0, args: tuple[int, ...] = ()) -> int:
        """KVM_ENABLE_CAP (KVM API 4.37) with up to four arguments."""
        words = (*args, 0, 0, 0, 0)[:4]
        buffer = bytearray(uapi.ENABLE_CAP.pack(cap, flags, *words))
        return self._kernel.ioctl(self.fd, uapi.Ioctl.ENABLE_CAP, buffer)

    def preferred_target(self) -> int:
        """KVM_ARM_PREFERRED_TARGET (KVM API 4.83): the target for KVM_ARM_VCPU_INIT."""
        buffer = bytearray(uapi.VCPU_INIT.size)
        self._kernel.ioctl(self.fd, uapi.Ioctl.ARM_PREFERRED_TARGET, buffer)
        target: int = uapi.VCPU_INIT.unpack(buffer)[0]
        return target

    def protect(self, firmware_slot: int) -> None:
        """KVM_ENABLE_CAP(ARM_PROTECTED_VM) with flags ENABLE (RFC 7.26): the VM becomes protected.
        The host loses every memory slot at once; `firmware_slot` holds the guest firmware, where
        the first vCPU to run starts."""
        self.enable_cap(uapi.Cap.ARM_PROTECTED_VM, uapi.ProtectedVm.ENABLE, (firmware_slot,))

    def set_firmware_address(self, ipa: int) -> None:
        """KVM_ENABLE_CAP(ARM_PROTECTED_VM) with Android's flags SET_FW_IPA: the guest firmware is
        to appear at `ipa`, where the VM has memory. Before the first run."""
        self.enable_cap(ANDROID.capability or 0, ANDROID.flags["SET_FW_IPA"], (ipa,))

    def protected_vm_info(
        self, size: int | None = None, *, cap: int = uapi.Cap.ARM_PROTECTED_VM
    ) -> ProtectedVmInfo:
        """KVM_ENABLE_CAP(ARM_PROTECTED_VM) with flags INFO (RFC 7.26); `cap` is its number in
        another dialect.

        Without `size` this is the RFC's plain call, which writes 64 bytes; with it the kernel
        writes that many bytes (8 to 4096) and says how many it knows. Raises ValueError for a
        size outside that range.
        """
        if size is not None and not 8 <= size <= SCRATCH_BYTES:
            raise ValueError(f"size {size} is not between 8 and {SCRATCH_BYTES}")
        memory = self._scratch.memory
        memory.write(0, bytes(uapi.PROTECTED_VM_INFO.size))
        args = (memory.address, size or 0)
        self.enable_cap(cap, uapi.ProtectedVm.INFO, args)
        words = uapi.PROTECTED_VM_INFO.unpack(memory.read(0, uapi.PROTECTED_VM_INFO.size))
        return ProtectedVmInfo(words[0], words[1])

    def create_device(self, kind: int) -> Device:
        """KVM_CREATE_DEVICE (KVM API 4.79): a device of the kernel's, by `uapi.DeviceType`."""
        argument = bytearray(uapi.CREATE_DEVICE.pack(kind, 0, 0))
        self._kernel.ioctl(self.fd, uapi.Ioctl.CREATE_DEVICE, argument)
        return Device(self, uapi.CREATE_DEVICE.unpack(argument)[1])

    def has_device(self, kind: int) -> bool:
        """KVM_CREATE_DEVICE with the flag TEST: whether the kernel could make such a device."""
        argument = bytearray(uapi.CREATE_DEVICE.pack(kind, 0, uapi.CREATE_DEVICE_TEST))
        try:
            self._kernel.ioctl(self.fd, uapi.Ioctl.CREATE_DEVICE, argument)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    def irq_line(self, irq: int, level: bool) -> None:
        """KVM_IRQ_LINE (KVM API 4.25): set the level of an input of the interrupt controller, or a
        rising edge. `irq` is a `uapi.irq_number`. From any thread."""
        argument = bytearray(uapi.IRQ_LEVEL.pack(irq, int(level)))
        self._kernel.ioctl(self.fd, uapi.Ioctl.IRQ_LINE, argument)

    def irqfd(self, fd: int, spi: int, *, resample_fd: int | None = None) -> None:
        """KVM_IRQFD (KVM API 4.75): each signal of the eventfd `fd` is an interrupt on `spi`, SPI
        0 being INTID 32. With `resample_fd` the line stays high until the guest has handled it;
        then the kernel lowers it and signals that eventfd."""
        flags = 0 if resample_fd is None else uapi.IrqfdFlag.RESAMPLE
        argument = bytearray(uapi.IRQFD.pack(fd, spi, flags, resample_fd or 0))
        self._kernel.ioctl(self.fd, uapi.Ioctl.IRQFD, argument)

    def deassign_irqfd(self, fd: int, spi: int) -> None:
        """KVM_IRQFD with the flag DEASSIGN: undo `irqfd`. The eventfd must still be open."""
        argument = bytearray(uapi.IRQFD.pack(fd, spi, uapi.IrqfdFlag.DEASSIGN, 0))
        self._kernel.ioctl(self.fd, uapi.Ioctl.IRQFD, argument)

    def close(self) -> None:
        """Close the descriptor; the VM lives until its vCPUs' are closed too. Idempotent."""
        if not self._closed:
            self._closed = True
            self._scratch.close()
            self._kernel.close(self.fd)

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
