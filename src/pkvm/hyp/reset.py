# SPDX-License-Identifier: GPL-2.0-or-later
"""How a protected vCPU starts: the primary in the firmware, secondaries where the guest said.

The engine's reset is facts §6.1's; here is what the RFC and PSCI put on top.
"""

from __future__ import annotations

from pkvm.arm64.psci import Affinity
from pkvm.arm64.registers import SCTLR_EL1, SCTLR_EL1_RESET
from pkvm.hyp.abi import HostVcpu
from pkvm.hyp.exits import ExitClass
from pkvm.hyp.policy import Isolation
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

_X0, _PC = HostVcpu.X >> 3, HostVcpu.PC >> 3
_BOOT_PROTOCOL_REGISTER = 15


def reset(engine: CpuEngine, vcpu: Vcpu) -> None:
    """The reset state of EL1; nothing that was left in the CPU or in the vCPU survives."""
    engine.reset_context()
    engine.flush_tlb()
    engine.gic.load_context(0, 0, 0)
    vcpu.started = 1
    vcpu.exit_class = ExitClass.IRQ


def start_primary(engine: CpuEngine, vcpu: Vcpu, isolation: Isolation) -> None:
    """A vCPU that starts because the host runs it. With firmware (RFC 7.26.1): at the start of the
    firmware's range, SP_EL1 at its end or 0, the first registers as the VMM set them, X15 the boot
    protocol's version. Without: at the host's PC, with the host's X0 alone."""
    vm, page = vcpu.vm, vcpu.page
    reset(engine, vcpu)
    if vm.firmware_bytes:
        for number in range(isolation.primary_registers):
            engine.x[number] = page[_X0 + number]
        engine.x[_BOOT_PROTOCOL_REGISTER] = isolation.boot_protocol
        engine.pc = vm.firmware_ipa
        if isolation.stack_at_end:
            engine.set_sp(1, vm.firmware_ipa + vm.firmware_bytes)
        if isolation.firmware_enrolls:
            vm.mmio_guard = 1
    else:
        engine.x[0] = page[_X0]
        engine.pc = page[_PC]
    vcpu.power = Affinity.ON
    vcpu.started_by_host = 0
    vm.entered = 1


def start_secondary(engine: CpuEngine, vcpu: Vcpu) -> None:
    """A vCPU that CPU_ON turned on: entry point, context id, and the caller's endianness."""
    reset(engine, vcpu)
    engine.x[0] = vcpu.entry_context
    engine.pc = vcpu.entry_pc
    engine.write_sysreg(SCTLR_EL1, SCTLR_EL1_RESET | vcpu.entry_endian)
    vcpu.power = Affinity.ON
