# SPDX-License-Identifier: GPL-2.0-or-later
"""Device, and a VM's interrupt lines: one ioctl a method, the right bytes."""

from __future__ import annotations

import errno
from collections.abc import Callable

from fakes.fake_kernel import FakeKernel, FakeVm
from fakes.fake_kernel import error as kernel_error
from fakes.host_fakes import errno_of
from pkvm.kvm import Kvm
from pkvm.uapi import kvm as uapi


class DeviceKernel(FakeKernel):
    """A kernel that makes a device whose attributes are words."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[tuple[int, int], int] = {}
        self.refuse = 0

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        if self.fds.get(fd) == "device" or isinstance(self.fds.get(fd), FakeVm):
            serve: Callable[[bytearray], int] | None = getattr(
                self, f"_on_{uapi.Ioctl(request).name.lower()}", None
            )
            if serve is not None:
                assert isinstance(arg, bytearray)
                self.log.append((uapi.Ioctl(request).name, bytes(arg)))
                if self.refuse:
                    raise kernel_error(self.refuse)
                return serve(arg)
        return super().ioctl(fd, request, arg)

    def _on_create_device(self, arg: bytearray) -> int:
        kind, _, flags = uapi.CREATE_DEVICE.unpack(arg)
        if not flags:
            arg[:] = uapi.CREATE_DEVICE.pack(kind, self._new_fd("device"), flags)
        return 0

    def _on_set_device_attr(self, arg: bytearray) -> int:
        flags, group, attr, address = uapi.DEVICE_ATTR.unpack(arg)
        assert not flags
        memory, offset = self.at(address)
        self.words[group, attr] = int.from_bytes(memory.read(offset, 8), "little")
        return 0

    def _on_get_device_attr(self, arg: bytearray) -> int:
        _, group, attr, address = uapi.DEVICE_ATTR.unpack(arg)
        memory, offset = self.at(address)
        # An attribute of 32 bits.
        memory.write(offset, self.words[group, attr].to_bytes(8, "little")[:4])
        return 0

    def _on_has_device_attr(self, arg: bytearray) -> int:
        _, group, attr, _ = uapi.DEVICE_ATTR.unpack(arg)
        if (group, attr) not in self.words:
            raise kernel_error(errno.ENXIO)
        return 0

    def _on_irq_line(self, arg: bytearray) -> int:
        return 0

    def _on_irqfd(self, arg: bytearray) -> int:
        return 0


def test_attributes() -> None:
    kernel = DeviceKernel()
    vm = Kvm(kernel).create_vm()
    with vm.create_device(uapi.DeviceType.ARM_VGIC_V3) as device:
        assert kernel.log[-1] == ("CREATE_DEVICE", uapi.CREATE_DEVICE.pack(7, 0, 0))
        device.set_attr(0, 2, 0x1234_5678_9ABC)
        assert kernel.words == {(0, 2): 0x1234_5678_9ABC}
        assert device.get_attr(0, 2, 0xFF << 32) == 0xFF_5678_9ABC
        device.set_attr(4, 0)
        assert kernel.words[4, 0] == 0
        assert device.has_attr(0, 2)
        assert not device.has_attr(0, 3)
        kernel.refuse = errno.EBUSY
        for call in (device.set_attr, device.get_attr, device.has_attr):
            assert errno_of(call, 0, 2) == errno.EBUSY
        fd = device.fd
        assert fd in kernel.fds
        device.close()
    assert fd not in kernel.fds


def test_whether_there_is_such_a_device() -> None:
    kernel = DeviceKernel()
    vm = Kvm(kernel).create_vm()
    assert vm.has_device(uapi.DeviceType.ARM_VGIC_V3)
    assert kernel.log[-1] == ("CREATE_DEVICE", uapi.CREATE_DEVICE.pack(7, 0, 1))
    kernel.refuse = errno.ENODEV
    assert not vm.has_device(uapi.DeviceType.ARM_VGIC_V2)
    kernel.refuse = errno.EINVAL
    assert errno_of(vm.has_device, uapi.DeviceType.ARM_VGIC_V2) == errno.EINVAL


def test_interrupt_lines() -> None:
    kernel = DeviceKernel()
    vm = Kvm(kernel).create_vm()
    vm.irq_line(uapi.irq_number(uapi.IrqType.SPI, 33), True)
    vm.irqfd(5, 1)
    vm.irqfd(5, 1, resample_fd=6)
    vm.deassign_irqfd(5, 1)
    assert kernel.log[-4:] == [
        ("IRQ_LINE", uapi.IRQ_LEVEL.pack(0x0100_0021, 1)),
        ("IRQFD", uapi.IRQFD.pack(5, 1, 0, 0)),
        ("IRQFD", uapi.IRQFD.pack(5, 1, 2, 6)),
        ("IRQFD", uapi.IRQFD.pack(5, 1, 1, 0)),
    ]
