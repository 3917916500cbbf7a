# SPDX-License-Identifier: GPL-2.0-or-later
"""`Vcpu`: EL2's own vCPU, in the pages that the host donated for it.

The first part of the area is the CPU context while another vCPU is on the CPU;
the last part is what EL2 keeps beside it. The host's page of the vCPU (shared
with EL2 and pinned as long as the vCPU lives) is `page`: every word of it may
change at any moment, so EL2 reads a word once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkvm.arm64.psci import Affinity
from pkvm.arm64.registers import mpidr_of_vcpu_id
from pkvm.hyp.abi import VCPU_AREA_BYTES
from pkvm.hyp.area import Area, Word
from pkvm.machine.memory import PAGE_SIZE, PhysicalMemory

if TYPE_CHECKING:
    from pkvm.hyp.vm import Vm

CONTEXT_LIMIT = 0x3C00
"""Bytes of the area for the CPU context; the rest is EL2's words."""


class Vcpu(Area):
    """vCPU `index` of `vm`, in the zeroed area at PA `area_pa`.

    Invariants: `on_requested_by` means something only while `power` is ON_PENDING. Once
    `exit_class` is ILLEGAL it stays so, and the vCPU never runs again.
    """

    loaded = Word(0x3C00)
    """1 from VCPU_LOAD to VCPU_PUT; counts in the VM's `users` too."""
    wait_traps = Word(0x3C08)
    """HCR_EL2.TWI and TWE as the last VCPU_LOAD gave them."""
    started = Word(0x3C10)
    """1 once the vCPU has been reset, so that there is a context."""
    exit_class = Word(0x3C18)
    """`exits.ExitClass` of the last exit: what the host's answer may be about."""
    exit_function = Word(0x3C30)
    """SMCCC function id of an exit for a call."""
    page_is_current = Word(0x3C38)
    """Not isolated: how much of the vCPU's state the host's page holds (`nonprotected`)."""
    power = Word(0x3C40)
    """`psci.Affinity`, of a protected vCPU."""
    entry_pc = Word(0x3C48)
    """Where CPU_ON wants the vCPU to start (a guest address)."""
    entry_context = Word(0x3C50)
    """X0 of that start."""
    entry_endian = Word(0x3C58)
    """SCTLR_EL1.EE of that start, in place."""
    on_requested_by = Word(0x3C60)
    """Index of the vCPU whose CPU_ON waits for this one."""
    on_target = Word(0x3C68)
    """Index of the vCPU that the CPU_ON of this one's last exit is about."""
    vtimer_ctl = Word(0x3C70)
    """CNTV_CTL_EL0 while another vCPU is on the CPU: ENABLE and IMASK."""
    vtimer_cval = Word(0x3C78)
    """CNTV_CVAL_EL0 while another vCPU is on the CPU."""
    vgic_vmcr = Word(0x3C80)
    """ICH_VMCR_EL2 while another vCPU is on the CPU; 0 is as reset."""
    vgic_ap0r = Word(0x3C88)
    """ICH_AP0R0_EL2."""
    vgic_ap1r = Word(0x3C90)
    """ICH_AP1R0_EL2."""
    started_by_host = Word(0x3CA0)
    """1 if ON_PENDING is for the host's wish at INIT_VCPU, not for a CPU_ON."""

    def __init__(
        self, memory: PhysicalMemory, vm: Vm, index: int, vcpu_id: int, area_pa: int, host_pa: int
    ) -> None:
        super().__init__(memory, area_pa, VCPU_AREA_BYTES)
        self.vm = vm
        self.handle = vm.handle
        self.index = index
        self.vcpu_id = vcpu_id
        self.mpidr = mpidr_of_vcpu_id(vcpu_id)
        self.host_pa = host_pa
        first = (host_pa - memory.ram_base) >> 3
        self.page: memoryview[int] = memory.words[first : first + (PAGE_SIZE >> 3)]
        self.power = Affinity.OFF
