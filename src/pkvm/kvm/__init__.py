# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM from user space: `Kvm` -> `Vm` -> `Vcpu`, thin owners of file descriptors.

One ioctl is one method, on any `Kernel`: the built-in host or a real /dev/kvm.
Errors are the kernel's, as OSError. `Vcpu.run` returns what happened as a
record to `match` on.
"""

from pkvm.kvm.device import Device
from pkvm.kvm.exits import Exit, FailEntry, InternalError, Intr, Mmio, SystemEvent, Unknown
from pkvm.kvm.kernel import Kernel, Memory, RunPage
from pkvm.kvm.kvm import Kvm
from pkvm.kvm.vcpu import Vcpu
from pkvm.kvm.vm import ProtectedVmInfo, Vm

__all__ = [
    "Device",
    "Exit",
    "FailEntry",
    "InternalError",
    "Intr",
    "Kernel",
    "Kvm",
    "Memory",
    "Mmio",
    "ProtectedVmInfo",
    "RunPage",
    "SystemEvent",
    "Unknown",
    "Vcpu",
    "Vm",
]
