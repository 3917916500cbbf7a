# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving a DMA-capable device to a protected VM, by an ioctl of its driver.

EL2 takes the device from the host, resets it and blocks its DMA; the guest finds
its registers where the VMM says, and attaches it by pvIOMMU calls (facts §10).
It comes back when the VM goes. The driver has lost it till then: its ioctls
give EFAULT. The interface is `uapi.kvm.DeviceAssign`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from pkvm.host.host import IPA_BITS
from pkvm.host.ports import PAGE_MASK, PAGE_SHIFT
from pkvm.host.vm import Vm
from pkvm.hyp.abi import HostCall
from pkvm.uapi.kvm import DeviceAssign

_TABLES = 3
"""The most that one page of an IPA space of three levels can need."""


class Assignment:
    """For the device with its registers, one page, at PA `base`. `find_vm` gives the VM of a
    descriptor, or raises EBADF. The kernel lock covers it."""

    def __init__(self, base: int, find_vm: Callable[[int], Vm]) -> None:
        self._base = base
        self._find_vm = find_vm

    def assign(self, argument: bytes, let_go: Callable[[], object] = lambda: None) -> None:
        """DeviceAssign.ASSIGN; `let_go` is called just before EL2 takes the device.

        Raises EBADF for what is no VM, EINVAL for one that is not protected or has not run, and for
        an IPA that is no page or in a memory slot; ENOSYS where the dialect has no devices for
        guests; EL2's errno.
        """
        fd, vsid, ipa = DeviceAssign.ARGS.unpack(argument)
        vm = self._find_vm(fd)
        if not vm.protected or not vm.at_el2:
            raise OSError(errno.EINVAL, "a device is for a protected VM that has run")
        if ipa & PAGE_MASK or ipa >> IPA_BITS or vm.slots.at(ipa) is not None:
            raise OSError(errno.EINVAL, f"IPA {ipa:#x} is no page without memory")
        el2, registers = vm.host.el2, (vm.handle, self._base, ipa >> PAGE_SHIFT)
        # Nobody maps a device that he has not: whether EL2 knows the call is all that this tells.
        if el2.try_call(HostCall.MAP_DEVICE_GUEST, *registers) == -errno.ENOSYS:
            raise OSError(errno.ENOSYS, "this dialect has no devices for guests")
        vm.topup(_TABLES)
        let_go()
        el2.call(HostCall.ASSIGN_DEVICE, vm.handle, self._base, DeviceAssign.PVIOMMU, vsid)
        el2.call(HostCall.MAP_DEVICE_GUEST, *registers)
