# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPUs' virtual timers: EL2 keeps compare and control value, the host learns one bit.

The resident vCPU's timer is the CPU's own. That of any other is two words of
its area; CNTVOFF_EL2 is 0 for every guest, so they compare with CNTPCT_EL0.
"""

from __future__ import annotations

from pkvm.arm64.registers import CNTPCT_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

_ENABLE, _IMASK = 1, 2


class Timers:
    """The virtual timers of all vCPUs of one physical CPU."""

    def __init__(self, engine: CpuEngine) -> None:
        self._engine = engine

    def output(self, vcpu: Vcpu, resident: bool) -> int:
        """1 if the vCPU's virtual timer asserts its interrupt now, else 0."""
        engine = self._engine
        if resident:
            ctl, cval = engine.read_sysreg(CNTV_CTL_EL0), engine.read_sysreg(CNTV_CVAL_EL0)
        else:
            ctl, cval = vcpu.vtimer_ctl, vcpu.vtimer_cval
        if ctl & (_ENABLE | _IMASK) != _ENABLE:
            return 0
        return int(engine.read_sysreg(CNTPCT_EL0) >= cval)

    def keep(self, vcpu: Vcpu) -> None:
        """The vCPU, resident until now, leaves the CPU."""
        engine = self._engine
        vcpu.vtimer_ctl = engine.read_sysreg(CNTV_CTL_EL0) & (_ENABLE | _IMASK)
        vcpu.vtimer_cval = engine.read_sysreg(CNTV_CVAL_EL0)
