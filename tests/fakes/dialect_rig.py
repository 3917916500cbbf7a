# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected VM with the agent in it, in any dialect: what the tests of the dialects share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Unpack

from fakes.contract_rig import RAM_BYTES, RAM_IPA, RAM_SLOT, running_system
from pkvm import guests
from pkvm.guests.agent import Agent
from pkvm.kvm import Kvm, Vcpu, Vm
from pkvm.kvm.kernel import Memory
from pkvm.system import Options, System
from pkvm.trace.counting import CountingRecorder
from pkvm.uapi import kvm as uapi
from pkvm.uapi.dialects import DIALECTS, Creation, Dialect, Firmware

CODE_SLOT, CODE_IPA, CODE_BYTES = 1, 0x1_0000_0000, 2 << 20
FREE_IPA = 0x2_0000_0000
"""No memory slot is there."""


@dataclass
class Party:
    """A host that speaks a dialect, and a protected VM on it: the agent is at CODE_IPA."""

    system: System
    recorder: CountingRecorder
    dialect: Dialect
    kvm: Kvm
    vm: Vm
    ram: Memory
    code: Memory
    vcpus: list[Vcpu] = field(default_factory=list)

    def vcpu(self, index: int = 0, *, power_off: bool = False) -> Vcpu:
        """A vCPU, initialised; it starts in the agent."""
        vcpu = self.vm.create_vcpu(index)
        vcpu.init(power_off=power_off)
        vcpu.set_reg("pc", CODE_IPA)
        self.vcpus.append(vcpu)
        return vcpu

    def agent(self) -> Agent:
        """The agent in vCPU 0, waiting for a command."""
        agent = Agent(self.vcpu())
        agent.start()
        return agent


@contextmanager
def host(name: str, **options: Unpack[Options]) -> Iterator[tuple[System, Kvm]]:
    """A system of that dialect, checked at its end (`running_system`)."""
    options.setdefault("recorder", CountingRecorder())
    options["dialect"] = name
    with running_system(**options) as system, system.open() as kvm:
        yield system, kvm


@contextmanager
def party(name: str, *, protect: bool = True, **options: Unpack[Options]) -> Iterator[Party]:
    """A `Party`. With `protect` False the VM of a dialect that has ENABLE is not protected yet."""
    with host(name, **options) as (system, kvm):
        dialect = DIALECTS[name]
        kind = uapi.TYPE_PROTECTED if dialect.creation is Creation.TYPE_BIT else 0
        with kvm.create_vm(kind) as vm:
            ram, code = kvm.mmap(RAM_BYTES), kvm.mmap(CODE_BYTES)
            if dialect.firmware is not Firmware.SLOT:
                code.write(0, guests.image("agent"))
            vm.set_user_memory_region(RAM_SLOT, RAM_IPA, ram)
            vm.set_user_memory_region(CODE_SLOT, CODE_IPA, code)
            if protect and dialect.firmware is Firmware.SLOT:
                vm.protect(CODE_SLOT)
            recorder = system.recorder
            assert isinstance(recorder, CountingRecorder)
            yield Party(system, recorder, dialect, kvm, vm, ram, code)
