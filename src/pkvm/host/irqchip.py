# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's ioctls about interrupts: CREATE_DEVICE, CREATE_IRQCHIP, IRQ_LINE, IRQFD; and the
interrupt controller's descriptor. Errors in Linux's order.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from functools import partial

from pkvm.arm64.gic import LIST_REGISTERS, VTR
from pkvm.arm64.gicv3 import FIRST_SPI, NR_PRIVATE, NR_SGIS
from pkvm.host import irqfd
from pkvm.host.argument import Argument, Handler
from pkvm.host.host import Host
from pkvm.host.vgic import device
from pkvm.host.vgic.gic import Gic
from pkvm.host.vgic.irq import Irq
from pkvm.host.vm import Vm
from pkvm.hyp.abi import HostCall
from pkvm.uapi.kvm import (
    CREATE_DEVICE,
    CREATE_DEVICE_TEST,
    DEVICE_ATTR,
    IRQ_LEVEL,
    IRQFD,
    DeviceType,
    Ioctl,
    IrqfdFlag,
    IrqType,
)

_FIQ = 1
"""Of `IrqType.CPU`; 0 is the IRQ input."""
_IRQFD_FLAGS = int(IrqfdFlag.DEASSIGN | IrqfdFlag.RESAMPLE)


def list_registers(host: Host) -> int:
    """How many list registers the CPU has; 0 if it has no virtual CPU interface."""
    if host.list_registers is None:
        vtr = host.el2.try_call(HostCall.GIC_CONFIG)
        host.list_registers = min(VTR["ListRegs"].get(vtr) + 1, LIST_REGISTERS) if vtr >= 0 else 0
    return host.list_registers


def has_gic(host: Host) -> int:
    """KVM_CAP_IRQCHIP: whether VMs can have an interrupt controller in the kernel."""
    return int(list_registers(host) > 0)


def has_irqfd(host: Host) -> int:
    """KVM_CAP_IRQFD."""
    return int(irqfd.AVAILABLE and has_gic(host))


def requests(vm: Vm, install: Callable[[GicFile], int]) -> Mapping[int, Handler]:
    """The ioctls of `vm`; `install` gives a device's file a descriptor."""
    return {
        Ioctl.CREATE_IRQCHIP: _create_irqchip,
        Ioctl.IRQ_LINE: partial(_irq_line, vm),
        Ioctl.IRQFD: partial(_irqfd, vm),
        Ioctl.CREATE_DEVICE: partial(_create_device, vm, install),
    }


class GicFile:
    """The descriptor of an interrupt controller. The device stays when it is closed."""

    def __init__(self, vm: Vm, gic: Gic) -> None:
        self._vm = vm
        self._gic = gic
        vm.get()

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """KVM_SET, GET and HAS_DEVICE_ATTR (KVM API 4.80); ENOTTY for any other."""
        users = self._vm.host.users
        if request not in (Ioctl.SET_DEVICE_ATTR, Ioctl.GET_DEVICE_ATTR, Ioctl.HAS_DEVICE_ATTR):
            raise OSError(errno.ENOTTY, f"a device has no ioctl {request:#x}")
        argument = Argument(arg, users)
        _, group, attr, address = DEVICE_ATTR.unpack(argument.read(DEVICE_ATTR.size))
        load = partial(users.copy_from_user, address)
        if request == Ioctl.SET_DEVICE_ATTR:
            device.set_attr(self._gic, group, attr, load)
        elif request == Ioctl.GET_DEVICE_ATTR:
            store = partial(users.copy_to_user, address)
            device.get_attr(self._gic, group, attr, load, store)
        else:
            device.has_attr(self._gic, group, attr)
        return 0

    def release(self) -> None:
        """The descriptor was closed."""
        self._vm.put()


def _create_irqchip(argument: Argument) -> int:
    """KVM_CREATE_IRQCHIP (KVM API 4.24) makes a GICv2, which there is not."""
    raise OSError(errno.ENODEV, "there is no GICv2: KVM_CREATE_DEVICE makes a GICv3")


def _create_device(vm: Vm, install: Callable[[GicFile], int], argument: Argument) -> int:
    """KVM_CREATE_DEVICE (KVM API 4.79): a GICv3.

    Raises ENODEV for any other type, EBUSY while a vCPU is in an ioctl or after one has run,
    EEXIST for a second one.
    """
    kind, _, flags = CREATE_DEVICE.unpack(argument.read(CREATE_DEVICE.size))
    nr_lrs = list_registers(vm.host)
    if kind != DeviceType.ARM_VGIC_V3 or not nr_lrs:
        raise OSError(errno.ENODEV, f"there is no device of type {kind}")
    if flags & CREATE_DEVICE_TEST:
        return 0
    if any(vcpu.mutex.locked() for vcpu in vm.vcpus.values()):
        raise OSError(errno.EBUSY, "a vCPU runs")
    if vm.gic is not None:
        raise OSError(errno.EEXIST, "the VM has an interrupt controller")
    if vm.ran:
        raise OSError(errno.EBUSY, "a vCPU has run")
    gic = vm.gic = Gic(vm, nr_lrs)
    try:
        fd = install(GicFile(vm, gic))
    except OSError:
        gic.close()
        vm.gic = None
        raise
    argument.write(CREATE_DEVICE.pack(kind, fd, flags))
    return 0


def _irq_line(vm: Vm, argument: Argument) -> int:
    """KVM_IRQ_LINE (KVM API 4.25).

    Raises ENXIO for an SPI or PPI of a VM without an interrupt controller, EBUSY while that is
    not initialised, EINVAL for what there is not. A vCPU's own inputs (`IrqType.CPU`) are not
    for the host to drive: ENXIO with an interrupt controller, EINVAL without; where Linux would
    take them for a protected VM nothing comes of it, there as here.
    """
    number, level = IRQ_LEVEL.unpack(argument.read(IRQ_LEVEL.size))
    kind, intid = number >> 24 & 0xF, number & 0xFFFF
    vcpu = vm.vcpus.get((number >> 28) << 8 | number >> 16 & 0xFF)
    gic = vm.gic
    if kind == IrqType.CPU and gic is None and vm.protected and vm.host.policy.shows_cpu:
        if vcpu is None or intid > _FIQ:
            raise OSError(errno.EINVAL, f"input {number:#x} is none of a vCPU's")
        return 0
    if kind not in (IrqType.SPI, IrqType.PPI) and (gic is None or kind != IrqType.CPU):
        raise OSError(errno.EINVAL, f"interrupt {number:#x} is neither an SPI nor a PPI")
    if gic is None or kind == IrqType.CPU:
        raise OSError(errno.ENXIO, "the VM has no interrupt controller, or a vCPU's input is meant")
    if kind == IrqType.SPI:
        if intid < FIRST_SPI:
            raise OSError(errno.EINVAL, f"INTID {intid} is no SPI")
        gic.inject(None, intid, bool(level))
        return 0
    if vcpu is None or not NR_SGIS <= intid < NR_PRIVATE:
        raise OSError(errno.EINVAL, f"interrupt {number:#x} is no PPI of a vCPU")
    gic.inject(vcpu.gic, intid, bool(level))
    return 0


def _irqfd(vm: Vm, argument: Argument) -> int:
    """KVM_IRQFD (KVM API 4.75). A signal is a rising and a falling edge; with RESAMPLE the line
    goes up, and down when the guest has handled the interrupt.

    Raises EINVAL for flags that there are not, EAGAIN before the interrupt controller is
    initialised, EBADF, EINVAL for a descriptor that is no eventfd, EBUSY if it is bound.
    """
    fd, gsi, flags, resample_fd = IRQFD.unpack(argument.read(IRQFD.size))
    if flags & ~_IRQFD_FLAGS:
        raise OSError(errno.EINVAL, f"flags {flags:#x}")
    irqfds = vm.host.irqfds
    if flags & IrqfdFlag.DEASSIGN:
        irqfds.deassign(vm, fd, gsi)
        return 0
    gic = vm.gic
    if gic is None or not gic.initialised:
        raise OSError(errno.EAGAIN, "the VM has no interrupt controller that is initialised")
    intid = FIRST_SPI + gsi
    irq = gic.irq(None, intid)
    if not flags & IrqfdFlag.RESAMPLE:
        irqfds.assign(vm, fd, gsi, partial(_pulse, gic, irq))
        return 0
    notify = irqfd.duplicate(resample_fd)
    try:
        irqfds.assign(vm, fd, gsi, partial(_raise, gic, irq), partial(_end_resample, irq, notify))
    except OSError:
        os.close(notify)
        raise
    if irq is not None:
        irq.lowered = partial(irqfd.signal, notify)
    return 0


def _pulse(gic: Gic, irq: Irq | None) -> None:
    """An edge on an interrupt; SPIs that do not exist hear nothing."""
    if irq is not None:
        gic.inject(None, irq.intid, True)
        gic.inject(None, irq.intid, False)


def _raise(gic: Gic, irq: Irq | None) -> None:
    if irq is not None:
        gic.inject(None, irq.intid, True)


def _end_resample(irq: Irq | None, notify: int) -> None:
    if irq is not None:
        irq.lowered = None
    os.close(notify)
