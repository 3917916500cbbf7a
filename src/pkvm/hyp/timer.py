# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPUs' virtual timers: EL2 keeps compare and control value, the host learns one bit.

The resident vCPU's timer is the CPU's own. That of any other is two words of
its area and an alarm of EL2's; CNTVOFF_EL2 is 0 for every guest, so it compares
with CNTPCT_EL0. When an alarm is due the host gets an interrupt, without a word
about whose it is.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64.registers import CNTPCT_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0
from pkvm.hyp.vcpu import Vcpu
from pkvm.hyp.vm import Vm
from pkvm.machine.alarms import Alarm
from pkvm.machine.clock import NS_PER_TICK
from pkvm.machine.cpu.engine import CpuEngine

# CNTV_CTL_EL0
_ENABLE, _IMASK, _ISTATUS = 1, 2, 4
_OUTPUT_BITS = _ENABLE | _IMASK | _ISTATUS
_ASSERTED = _ENABLE | _ISTATUS


class Timers:
    """The virtual timers of all vCPUs of one physical CPU. `new_timer` makes an alarm that
    interrupts the host."""

    def __init__(self, engine: CpuEngine, new_timer: Callable[[], Alarm]) -> None:
        self._engine = engine
        self._new_timer = new_timer
        self._alarms: dict[int, Alarm] = {}
        """By PA of the vCPU's area."""

    def output(self, vcpu: Vcpu, resident: bool) -> int:
        """1 if the vCPU's virtual timer asserts its interrupt now, else 0."""
        engine = self._engine
        if resident:
            return int(engine.read_sysreg(CNTV_CTL_EL0) & _OUTPUT_BITS == _ASSERTED)
        if vcpu.vtimer_ctl != _ENABLE:
            return 0
        return int(engine.read_sysreg(CNTPCT_EL0) >= vcpu.vtimer_cval)

    def save(self, vcpu: Vcpu) -> None:
        """The vCPU leaves the CPU; a deadline to come is EL2's business. One that is past has been
        announced by the CPU's own timer, or will be at once."""
        engine = self._engine
        ctl, cval = engine.read_sysreg(CNTV_CTL_EL0), engine.read_sysreg(CNTV_CVAL_EL0)
        vcpu.vtimer_ctl, vcpu.vtimer_cval = ctl & (_ENABLE | _IMASK), cval
        if ctl & _OUTPUT_BITS != _ENABLE:
            return
        alarm = self._alarms.get(vcpu.pa)
        if alarm is None:
            alarm = self._alarms[vcpu.pa] = self._new_timer()
        alarm.set(cval * NS_PER_TICK)

    def restore(self, vcpu: Vcpu) -> None:
        """The vCPU comes to the CPU: its timer is the CPU's."""
        alarm = self._alarms.get(vcpu.pa)
        if alarm is not None:
            alarm.cancel()

    def forget(self, vm: Vm) -> None:
        """The VM is over."""
        for vcpu in vm.vcpus:
            alarm = self._alarms.pop(vcpu.pa, None) if vcpu is not None else None
            if alarm is not None:
                alarm.close()
