# SPDX-License-Identifier: GPL-2.0-or-later
"""How a protected vCPU starts: the primary in the firmware, secondaries where the guest said.

The engine's reset is facts §6.1's; here is what the RFC and PSCI put on top.
"""

from __future__ import annotations

from pkvm.arm64.psci import Affinity
from pkvm.arm64.registers import SCTLR_EL1, SCTLR_EL1_RESET
from pkvm.hyp.abi import HostVcpu
from pkvm.hyp.exits import ExitClass
from pkvm.hyp.policy import Policy
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

_X0 = HostVcpu.X >> 3
_BOOT_PROTOCOL_REGISTER = 15


def reset(engine: CpuEngine, vcpu: Vcpu) -> None:
    """The reset state of EL1; nothing that was left in the CPU or in the vCPU survives."""
    engine.reset_context()
    engine.flush_tlb()
    engine.gic.load_context(0, 0, 0)
    vcpu.started = 1
    vcpu.exit_class = ExitClass.IRQ


def start_primary(engine: CpuEngine, vcpu: Vcpu, policy: Policy) -> None:
    """The first vCPU to enter (RFC 7.26.1): at the start of the firmware's range, SP_EL1 at its
    end, the first registers as the VMM set them, X15 the boot protocol's version."""
    vm = vcpu.vm
    reset(engine, vcpu)
    for number in range(policy.primary_registers):
        engine.x[number] = vcpu.page[_X0 + number]
    engine.x[_BOOT_PROTOCOL_REGISTER] = policy.boot_protocol
    engine.pc = vm.firmware_ipa
    engine.set_sp(1, vm.firmware_ipa + vm.firmware_bytes)
    vcpu.power = Affinity.ON
    vm.entered = 1


def start_secondary(engine: CpuEngine, vcpu: Vcpu) -> None:
    """A vCPU that CPU_ON turned on: entry point, context id, and the caller's endianness."""
    reset(engine, vcpu)
    engine.x[0] = vcpu.entry_context
    engine.pc = vcpu.entry_pc
    engine.write_sysreg(SCTLR_EL1, SCTLR_EL1_RESET | vcpu.entry_endian)
    vcpu.power = Affinity.ON
