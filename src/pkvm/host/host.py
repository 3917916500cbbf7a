# SPDX-License-Identifier: GPL-2.0-or-later
"""What every part of the host kernel shares: its memory, EL2, the scheduler, the CPU's vCPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pkvm.arm64.registers import hcr
from pkvm.events import Message, Recorder
from pkvm.host.el2 import El2
from pkvm.host.firmware_node import FirmwareRegion
from pkvm.host.irqfd import Irqfds
from pkvm.host.memlock import Memlock
from pkvm.host.mm import UserSpace
from pkvm.host.pages import PageAllocator
from pkvm.host.policy import POLICIES, Policy
from pkvm.host.ports import PAGE_SHIFT, Bus, BusFaults, Clock
from pkvm.host.scheduler import Scheduler
from pkvm.host.shown_cpu import ShownCpu
from pkvm.host.timer import Timers
from pkvm.hyp.abi import HostCall
from pkvm.uapi.dialects import Dialect

if TYPE_CHECKING:
    from pkvm.host.vcpu import Vcpu
    from pkvm.host.vm import Vm

IPA_BITS = 40
"""Size of every VM's IPA space; protected mode ignores the VMM's wish."""
_TRAP_WAITS = hcr("TWI", "TWE")


@dataclass(slots=True)
class Host:
    """The host kernel's state that is not a VM's. The kernel lock covers it."""

    bus: Bus
    bus_faults: BusFaults
    pages: PageAllocator
    users: UserSpace
    el2: El2
    sched: Scheduler
    recorder: Recorder
    protected_mode: bool
    firmware: FirmwareRegion | None
    timers: Timers
    irqfds: Irqfds
    dialect: Dialect
    memlock: Memlock
    clock: Clock
    entropy: Callable[[int], bytes]
    """So many random bytes, for guests that ask for them."""
    shown_cpu: ShownCpu
    tainted: bool = False
    """Whether a protected VM was made that taints the kernel (TAINT_USER)."""
    vms: set[Vm] = field(default_factory=set)
    """Every VM that has not gone."""
    loaded: Vcpu | None = field(default=None)
    """The vCPU that EL2 has loaded. It stays so until another one is to run or its VM goes."""

    optional_features: int | None = field(default=None)
    """KVM_ARM_VCPU_* features of the CPU that vCPUs may ask for, once EL2 was asked."""

    list_registers: int | None = field(default=None)
    """How many the CPU has, once EL2 was asked; 0: VMs have no interrupt controller."""

    def __post_init__(self) -> None:
        self.timers.loaded = lambda: self.loaded

    @property
    def policy(self) -> Policy:
        """The host's own part of its dialect."""
        return POLICIES[self.dialect.name]

    @property
    def firmware_size(self) -> int:
        """Bytes of guest firmware, 0 if the boot firmware left none."""
        return self.firmware.size if self.firmware else 0

    @property
    def ptrauth(self) -> int:
        """The features of pointer authentication, 0 if the CPU has it not."""
        if self.optional_features is None:
            self.optional_features = max(0, self.el2.try_call(HostCall.VCPU_FEATURES))
        return self.optional_features

    def load(self, vcpu: Vcpu) -> None:
        """Load a vCPU at EL2, in place of the one that is. Raises OSError."""
        if self.loaded is vcpu:
            return
        self.put()
        self.el2.call(HostCall.VCPU_LOAD, vcpu.vm.handle, vcpu.index, _TRAP_WAITS)
        self.loaded = vcpu

    def put(self) -> None:
        """Leave EL2 without a loaded vCPU."""
        if self.loaded is not None:
            self.el2.call(HostCall.VCPU_PUT)
            self.loaded = None

    def invalidate(self, address: int, length: int) -> None:
        """The MMU notifier: user memory goes or changes its rights, and guests that share it with
        the host lose it until they touch it again. Pages of a protected guest stay its own."""
        for vm in self.vms:
            for slot in vm.slots if vm.shared else ():
                start, end = max(slot.user, address), min(slot.user + slot.size, address + length)
                if start < end:
                    first = slot.gfn + (start - slot.user >> PAGE_SHIFT)
                    vm.unshare(first, end - start >> PAGE_SHIFT)

    def say(self, text: str) -> None:
        """printk."""
        self.recorder.record(Message("host", text))
