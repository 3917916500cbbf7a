# SPDX-License-Identifier: GPL-2.0-or-later
"""What the contract's tests share: a system whose guest firmware is the agent, and a VM on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Unpack

from pkvm import guests
from pkvm.check.invariants import check_hyp
from pkvm.guests.agent import Agent
from pkvm.kvm import Kvm, Vcpu, Vm
from pkvm.kvm.kernel import Memory
from pkvm.system import Options, System
from pkvm.uapi import kvm as uapi

RAM_SLOT, FIRMWARE_SLOT = 0, 1
RAM_IPA = 0x4000_0000
RAM_BYTES = 4 << 20
FIRMWARE_IPA = 0x1_0000_0000
"""Not 0, so that PC and SP cannot be right by accident."""
FIRMWARE_BYTES = 2 << 20
PAGE = 4096
MACHINE_BYTES = 64 << 20


@dataclass
class Rig:
    """A VM with RAM and a firmware slot; not yet protected."""

    system: System
    kvm: Kvm
    vm: Vm
    ram: Memory
    firmware: Memory

    def vcpus(self, count: int = 1, *, power_off: bool = True) -> list[Vcpu]:
        """`count` vCPUs, initialised; secondaries with POWER_OFF or without."""
        made = [self.vm.create_vcpu(index) for index in range(count)]
        for index, vcpu in enumerate(made):
            vcpu.init(power_off=power_off and index > 0)
        return made

    def agent(self, vcpu: Vcpu, cpu: int = 0) -> Agent:
        """The agent that `vcpu` runs, started."""
        driver = Agent(vcpu, cpu)
        driver.start()
        return driver

    def protected_agent(self) -> Agent:
        """Protect the VM and start the agent in its firmware slot on vCPU 0."""
        self.vm.protect(FIRMWARE_SLOT)
        return self.agent(self.vcpus()[0])

    def check(self) -> None:
        """EL2's invariants hold."""
        assert check_hyp(self.system.hyp) == []


@contextmanager
def running_system(**options: Unpack[Options]) -> Iterator[System]:
    """A system that is checked at its end: invariants hold and every page is the host's again."""
    options.setdefault("memory", MACHINE_BYTES)
    options.setdefault("firmware", guests.image("agent"))
    with System(**options) as system:
        before = system.census()
        free = system.host.free_pages
        yield system
        assert check_hyp(system.hyp) == []
        system.host.shutdown()
        assert system.census() == before
        assert system.host.free_pages == free
        assert check_hyp(system.hyp) == []


@contextmanager
def rig(**options: Unpack[Options]) -> Iterator[Rig]:
    """A `Rig` on a system of its own."""
    with running_system(**options) as system, ExitStack() as stack:
        kvm = stack.enter_context(system.open())
        vm = stack.enter_context(kvm.create_vm())
        ram, firmware = kvm.mmap(RAM_BYTES), kvm.mmap(FIRMWARE_BYTES)
        vm.set_user_memory_region(RAM_SLOT, RAM_IPA, ram)
        vm.set_user_memory_region(FIRMWARE_SLOT, FIRMWARE_IPA, firmware)
        yield Rig(system, kvm, vm, ram, firmware)


def errno_of(call: object, *args: object, **kwargs: object) -> int:
    """The errno that `call` raises, 0 if it does not."""
    assert callable(call)
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno or 0
    return 0


def enable_cap(vm: Vm, flags: int, args: Sequence[int] = ()) -> int:
    """The errno of KVM_ENABLE_CAP(ARM_PROTECTED_VM), 0 for success."""
    return errno_of(vm.enable_cap, uapi.Cap.ARM_PROTECTED_VM, flags, tuple(args))
