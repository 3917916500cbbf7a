# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupt controller as a KVM device: its attributes (arm-vgic-v3.rst), and the errno that
Linux answers to each mistake.

CPU_SYSREGS shows what of the CPU interface the host can see: ICH_VMCR_EL2, which
EL2 leaves in the vCPU's page. The rest of it, and every change, is EL2's alone.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from pkvm.arm64 import registers as r
from pkvm.arm64.gic import CTLR_CBPR, CTLR_EOIMODE, CTLR_PRIBITS, VMCR
from pkvm.host.vgic.cpu import GicCpu
from pkvm.host.vgic.gic import Gic
from pkvm.host.vgic.registers import Frame
from pkvm.hyp.abi import HostVcpu
from pkvm.uapi.kvm import (
    VGIC_LEVEL_INFO_SHIFT,
    VGIC_LEVEL_INTID_MASK,
    VGIC_MPIDR_SHIFT,
    VgicAddr,
    VgicCtrl,
    VgicGroup,
    redist_region,
)

_U32, _U64 = 4, 8
_OFFSET_MASK = 0xFFFF_FFFF
_SYSREG_MASK = 0xFFFF
_REGION_INDEX_MASK = 0xFFF
_REGION_FLAGS = 0xF000
_REGION_BASE_MASK = 0xF_FFFF_FFFF_0000
_REGION_COUNT_SHIFT = 52
_UNDEFINED = (1 << 64) - 1
"""An address that has not been set."""
_REGISTER_GROUPS = (
    VgicGroup.DIST_REGS,
    VgicGroup.REDIST_REGS,
    VgicGroup.CPU_SYSREGS,
    VgicGroup.LEVEL_INFO,
)
_ADDRESSES = frozenset(int(attr) for attr in VgicAddr)
_COMMANDS = frozenset(int(attr) for attr in VgicCtrl)

Load = Callable[[int], bytes]
"""So many bytes of the attribute's value. Raises EFAULT."""
Store = Callable[[bytes], None]


def set_attr(gic: Gic, group: int, attr: int, load: Load) -> None:
    """KVM_SET_DEVICE_ATTR. Raises ENXIO for what there is not, EFAULT, and what the attribute
    says."""
    if group == VgicGroup.ADDR:
        _set_address(gic, attr, _number(load, _U64))
    elif group == VgicGroup.NR_IRQS:
        gic.set_nr_irqs(_number(load, _U32))
    elif group == VgicGroup.CTRL and attr == VgicCtrl.INIT:
        gic.initialise()
    elif group == VgicGroup.CTRL and attr == VgicCtrl.SAVE_PENDING_TABLES:
        _need_idle(gic)
    elif group in _REGISTER_GROUPS:
        _set_register(gic, group, attr, load)
    else:
        raise _no_attribute(group, attr)


def get_attr(gic: Gic, group: int, attr: int, load: Load, store: Store) -> None:
    """KVM_GET_DEVICE_ATTR. Errors as `set_attr`."""
    if group == VgicGroup.ADDR:
        index = _number(load, _U64) if attr == VgicAddr.REDIST_REGION else 0
        store(_address(gic, attr, index).to_bytes(_U64, "little"))
    elif group == VgicGroup.NR_IRQS:
        # Before it has been said: the private ones, as Linux has it.
        store((gic.nr_irqs or 32).to_bytes(_U32, "little"))
    elif group in _REGISTER_GROUPS:
        size = _U64 if group == VgicGroup.CPU_SYSREGS else _U32
        store(_register(gic, group, attr).to_bytes(size, "little"))
    else:
        raise _no_attribute(group, attr)


def has_attr(gic: Gic, group: int, attr: int) -> None:
    """KVM_HAS_DEVICE_ATTR. Raises ENXIO for what there is not, EINVAL for a vCPU that there is
    not."""
    if group == VgicGroup.NR_IRQS or (group == VgicGroup.ADDR and attr in _ADDRESSES):
        return
    if group == VgicGroup.CTRL and attr in _COMMANDS:
        return
    if group == VgicGroup.LEVEL_INFO:
        if (attr & _OFFSET_MASK) >> VGIC_LEVEL_INFO_SHIFT == 0:
            return
    elif group == VgicGroup.CPU_SYSREGS:
        _cpu(gic, group, attr)
        if attr & _SYSREG_MASK in _SYSREGS:
            return
    elif group in _REGISTER_GROUPS and _frame(gic, group, attr).has(attr & _OFFSET_MASK):
        return
    raise _no_attribute(group, attr)


def _number(load: Load, size: int) -> int:
    return int.from_bytes(load(size), "little")


def _no_attribute(group: int, attr: int) -> OSError:
    return OSError(errno.ENXIO, f"the GICv3 has no attribute {attr:#x} in group {group}")


# Addresses


def _set_address(gic: Gic, attr: int, value: int) -> None:
    if attr == VgicAddr.DIST:
        gic.set_distributor(value)
    elif attr == VgicAddr.REDIST:
        gic.add_region(0, value, 0)
    elif attr == VgicAddr.REDIST_REGION:
        count = value >> _REGION_COUNT_SHIFT
        if not count or value & _REGION_FLAGS:
            raise OSError(errno.EINVAL, "a region has a count and no flags")
        gic.add_region(value & _REGION_INDEX_MASK, value & _REGION_BASE_MASK, count)
    else:
        raise _no_attribute(VgicGroup.ADDR, attr)


def _address(gic: Gic, attr: int, index: int) -> int:
    if attr == VgicAddr.DIST:
        return _UNDEFINED if gic.distributor is None else gic.distributor
    if attr == VgicAddr.REDIST:
        return gic.regions[0].base if gic.regions else _UNDEFINED
    if attr != VgicAddr.REDIST_REGION:
        raise _no_attribute(VgicGroup.ADDR, attr)
    index &= _REGION_INDEX_MASK
    for region in gic.regions:
        if region.number == index:
            return redist_region(index, region.base, region.room)
    raise OSError(errno.ENOENT, f"there is no redistributor region {index}")


# Registers


def _set_register(gic: Gic, group: int, attr: int, load: Load) -> None:
    cpu = _cpu(gic, group, attr)
    value = 0
    if group != VgicGroup.CPU_SYSREGS:
        value = _number(load, _U32)
    _need_idle(gic)
    if group == VgicGroup.CPU_SYSREGS:
        _set_sysreg(cpu, attr, _number(load, _U64))
    elif group == VgicGroup.LEVEL_INFO:
        for number, intid in enumerate(_levels(attr)):
            irq = gic.irq(cpu, intid)
            if irq is not None:
                gic.set_level(irq, bool(value >> number & 1))
    else:
        frame = _existing(gic, group, attr)
        frame.user_write(attr & _OFFSET_MASK, value)


def _register(gic: Gic, group: int, attr: int) -> int:
    cpu = _cpu(gic, group, attr)
    _need_idle(gic)
    if group == VgicGroup.CPU_SYSREGS:
        return _sysreg(cpu, attr)
    if group == VgicGroup.LEVEL_INFO:
        irqs = enumerate(gic.irq(cpu, intid) for intid in _levels(attr))
        return sum(irq.level << number for number, irq in irqs if irq is not None)
    return _existing(gic, group, attr).read(attr & _OFFSET_MASK, _U32, user=True)


def _need_idle(gic: Gic) -> None:
    """Raises EBUSY before the GIC is initialised, and while a vCPU is in an ioctl."""
    if not gic.initialised:
        raise OSError(errno.EBUSY, "the GIC is not initialised")
    if any(cpu.vcpu.mutex.locked() for cpu in gic.cpus):
        raise OSError(errno.EBUSY, "a vCPU runs")


def _cpu(gic: Gic, group: int, attr: int) -> GicCpu:
    """The vCPU that an attribute is of; the distributor's are nobody's, so of the first. Raises
    EINVAL."""
    if group == VgicGroup.DIST_REGS:
        cpu = gic.cpus[0] if gic.cpus else None
    else:
        cpu = gic.cpu_at(attr >> VGIC_MPIDR_SHIFT)
    if cpu is None:
        raise OSError(errno.EINVAL, f"no vCPU has affinity {attr >> VGIC_MPIDR_SHIFT:#x}")
    return cpu


def _frame(gic: Gic, group: int, attr: int) -> Frame:
    cpu = _cpu(gic, group, attr)
    return Frame(gic, None if group == VgicGroup.DIST_REGS else cpu)


def _existing(gic: Gic, group: int, attr: int) -> Frame:
    frame = _frame(gic, group, attr)
    if not frame.has(attr & _OFFSET_MASK):
        raise _no_attribute(group, attr)
    return frame


def _levels(attr: int) -> range:
    """The 32 interrupts of a LEVEL_INFO attribute. Raises EINVAL."""
    if (attr & _OFFSET_MASK) >> VGIC_LEVEL_INFO_SHIFT:
        raise OSError(errno.EINVAL, "the only level information is the line's level, 0")
    intid = attr & VGIC_LEVEL_INTID_MASK
    if intid % 32:
        raise OSError(errno.EINVAL, f"INTID {intid} is no multiple of 32")
    return range(intid, intid + 32)


# The CPU interface


def _control(vmcr: int) -> int:
    value = CTLR_PRIBITS
    if vmcr & VMCR["VCBPR"].mask:
        value |= CTLR_CBPR
    if vmcr & VMCR["VEOIM"].mask:
        value |= CTLR_EOIMODE
    return value


_SYSREGS: Mapping[int, Callable[[int], int]] = {
    r.ICC_PMR_EL1.one_reg: VMCR["VPMR"].get,
    r.ICC_BPR0_EL1.one_reg: VMCR["VBPR0"].get,
    r.ICC_BPR1_EL1.one_reg: VMCR["VBPR1"].get,
    r.ICC_CTLR_EL1.one_reg: _control,
    r.ICC_SRE_EL1.one_reg: lambda vmcr: 7,
    r.ICC_IGRPEN0_EL1.one_reg: VMCR["VENG0"].get,
    r.ICC_IGRPEN1_EL1.one_reg: VMCR["VENG1"].get,
}
"""ONE_REG encoding -> the register's value, from ICH_VMCR_EL2."""


def _sysreg(cpu: GicCpu, attr: int) -> int:
    """Raises ENXIO for a register that the host cannot see."""
    show = _SYSREGS.get(attr & _SYSREG_MASK)
    if show is None:
        raise _no_attribute(VgicGroup.CPU_SYSREGS, attr)
    return show(cpu.vcpu.word(HostVcpu.VGIC_VMCR))


def _set_sysreg(cpu: GicCpu, attr: int, value: int) -> None:
    """A register's own value may be written. Raises ENXIO, EINVAL."""
    if value != _sysreg(cpu, attr):
        raise OSError(errno.EINVAL, "the CPU interface's state is EL2's: it cannot be changed")
