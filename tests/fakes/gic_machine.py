# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM with an interrupt controller on the scripted EL2, and short forms of what it takes."""

from __future__ import annotations

from fakes.host_fakes import PAGE, FakeVcpu, Guest
from fakes.host_machine import Machine, dabt
from pkvm.arm64.esr import EC, EC_SHIFT, IL, SYS64_READ, WFX_TI_WFE
from pkvm.arm64.gic import VMCR
from pkvm.arm64.registers import SysReg
from pkvm.uapi import kvm as uapi

GICD = 0x0800_0000
GICR = 0x080A_0000
FRAMES = 0x2_0000
OPEN_VMCR = VMCR.encode(VENG0=1, VENG1=1, VPMR=0xF8)
"""Both groups enabled, every priority let through but the lowest."""

Group = uapi.VgicGroup


def create_device(machine: Machine, kind: int = uapi.DeviceType.ARM_VGIC_V3, flags: int = 0) -> int:
    """KVM_CREATE_DEVICE; the descriptor."""
    argument = bytearray(uapi.CREATE_DEVICE.pack(kind, 0, flags))
    machine.rig.kernel.ioctl(machine.vm, uapi.Ioctl.CREATE_DEVICE, argument)
    return int(uapi.CREATE_DEVICE.unpack(argument)[1])


class GicMachine(Machine):
    """`Machine`, its GIC made and, unless told otherwise, initialised."""

    def __init__(
        self,
        *guests: Guest,
        protected: bool = True,
        off: bool = True,
        virtual: bool = False,
        start: bool = True,
        nr_irqs: int = 128,
    ) -> None:
        super().__init__(*guests, protected=protected, off=off, virtual=virtual)
        self.device = create_device(self)
        if start:
            self.attr(Group.ADDR, uapi.VgicAddr.DIST, GICD)
            self.attr(Group.ADDR, uapi.VgicAddr.REDIST, GICR)
            self.attr(Group.NR_IRQS, 0, nr_irqs)
            self.attr(Group.CTRL, uapi.VgicCtrl.INIT)

    def _attr(self, request: int, group: int, attr: int, value: int) -> int:
        memory = self.rig.kernel.mmap(PAGE)
        try:
            memory.write(0, value.to_bytes(8, "little"))
            argument = bytearray(uapi.DEVICE_ATTR.pack(0, group, attr, memory.address))
            self.rig.kernel.ioctl(self.device, request, argument)
            return int.from_bytes(memory.read(0, 8), "little")
        finally:
            memory.close()

    def attr(self, group: int, attr: int, value: int = 0) -> None:
        self._attr(uapi.Ioctl.SET_DEVICE_ATTR, group, attr, value)

    def get(self, group: int, attr: int, value: int = 0) -> int:
        return self._attr(uapi.Ioctl.GET_DEVICE_ATTR, group, attr, value)

    def has(self, group: int, attr: int) -> None:
        self._attr(uapi.Ioctl.HAS_DEVICE_ATTR, group, attr, 0)

    def enable(self, *intids: int, vcpu: int = 0) -> None:
        """Both groups and these interrupts, as a VMM that restores state would."""
        self.attr(Group.DIST_REGS, 0, 3)
        for intid in intids:
            word, bit = 0x100 + intid // 32 * 4, 1 << intid % 32
            if intid < 32:
                self.attr(Group.REDIST_REGS, vcpu << 32 | 0x1_0000 + word, bit)
            else:
                self.attr(Group.DIST_REGS, word, bit)

    def by_level(self, *intids: int) -> None:
        """These SPIs follow their lines, all others of their word too; at reset none does."""
        for intid in intids:
            self.attr(Group.DIST_REGS, 0xC00 + intid // 16 * 4, 0)

    def line(self, number: int, level: int) -> None:
        """KVM_IRQ_LINE of a `kvm_irq_level.irq`."""
        argument = bytearray(uapi.IRQ_LEVEL.pack(number, level))
        self.rig.kernel.ioctl(self.vm, uapi.Ioctl.IRQ_LINE, argument)

    def spi(self, intid: int, level: int) -> None:
        self.line(uapi.irq_number(uapi.IrqType.SPI, intid), level)

    def close(self) -> None:
        self.rig.kernel.close(self.device)
        super().close()


def store(vcpu: FakeVcpu, ipa: int, value: int, size: int = 2) -> int:
    """The guest stores 1 << size bytes."""
    return vcpu.publish(x0=value, **dabt(ipa, size, write=True))


def load(vcpu: FakeVcpu, ipa: int, size: int = 2) -> int:
    """The guest loads; afterwards the value is `vcpu.x0`."""
    return vcpu.publish(x0=0, **dabt(ipa, size))


def write_sysreg(vcpu: FakeVcpu, register: SysReg, value: int) -> int:
    return vcpu.publish(esr=EC.SYS64 << EC_SHIFT | IL | register.iss, x0=value)


def read_sysreg(vcpu: FakeVcpu, register: SysReg) -> int:
    return vcpu.publish(esr=EC.SYS64 << EC_SHIFT | IL | register.iss | SYS64_READ)


def wfi(vcpu: FakeVcpu, *, wfe: bool = False) -> int:
    return vcpu.publish(esr=EC.WFX << EC_SHIFT | IL | (WFX_TI_WFE if wfe else 0))


def hvc(vcpu: FakeVcpu, function: int, x1: int = 0) -> int:
    return vcpu.publish(esr=EC.HVC64 << EC_SHIFT | IL, x0=function, x1=x1)


def off(vcpu: FakeVcpu) -> int:
    """SYSTEM_OFF: KVM_RUN returns."""
    return hvc(vcpu, 0x8400_0008)
