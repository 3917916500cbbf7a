# SPDX-License-Identifier: GPL-2.0-or-later
"""`Device`: the owner of a kernel device's file descriptor, such as the interrupt controller's."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING

from pkvm.kvm.kernel import Kernel
from pkvm.kvm.scratch import Scratch
from pkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from pkvm.kvm.vm import Vm

_VALUE_BYTES = 8
"""The largest value that an attribute has; smaller ones are its low bytes."""


class Attributes:
    """A descriptor that has attributes: a device's, or a vCPU's. Methods raise OSError with the
    kernel's errno."""

    fd: int
    _kernel: Kernel
    _scratch: Scratch

    def set_attr(self, group: int, attr: int, value: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR (KVM API 4.80). Attributes that are commands ignore `value`."""
        self._attribute(uapi.Ioctl.SET_DEVICE_ATTR, group, attr, value)

    def get_attr(self, group: int, attr: int, value: int = 0) -> int:
        """KVM_GET_DEVICE_ATTR (KVM API 4.80). `value` is there for attributes that look at what
        was in the buffer."""
        return self._attribute(uapi.Ioctl.GET_DEVICE_ATTR, group, attr, value)

    def has_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR (KVM API 4.80). Raises OSError unless the kernel says yes or
        ENXIO."""
        try:
            self._attribute(uapi.Ioctl.HAS_DEVICE_ATTR, group, attr, 0)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    def _attribute(self, request: int, group: int, attr: int, value: int) -> int:
        memory = self._scratch.memory
        memory.write(0, value.to_bytes(_VALUE_BYTES, "little"))
        argument = bytearray(uapi.DEVICE_ATTR.pack(0, group, attr, memory.address))
        self._kernel.ioctl(self.fd, request, argument)
        return int.from_bytes(memory.read(0, _VALUE_BYTES), "little")


class Device(Attributes):
    """A device of a VM. Made by `Vm.create_device`."""

    def __init__(self, vm: Vm, fd: int) -> None:
        self.vm = vm
        self.fd = fd
        self._kernel = vm.kvm.kernel
        self._scratch = Scratch(self._kernel)
        self._closed = False

    def close(self) -> None:
        """Close the descriptor; the device stays with its VM. Idempotent."""
        if not self._closed:
            self._closed = True
            self._scratch.close()
            self._kernel.close(self.fd)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
