# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests' timers as the host sees them, and waiting for an interrupt.

The *virtual* timer is EL2's: compare and control value never leave it. The host
asks for its output (VCPU_TIMER) whenever that may have changed: at an exit for
an interrupt, when a vCPU waits, when an alarm ends the wait, when the guest has
handled the timer's interrupt. The *physical* timer the host emulates, from
trapped accesses to CNTP_*_EL0.

An alarm that is due is a physical interrupt. With the real clock it comes in a
thread of the machine's; `interrupt` then takes the kernel lock as any thread
does, if a vCPU waits that it may be for. With the virtual clock it comes while a
guest runs, which it stops, or while time jumps because every vCPU waits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pkvm.host.el2 import El2
from pkvm.host.ports import NS_PER_TICK, Alarm, Alarms, Clock
from pkvm.host.scheduler import Scheduler
from pkvm.hyp.abi import HostCall

if TYPE_CHECKING:
    from pkvm.host.vcpu import Vcpu
    from pkvm.host.vgic.cpu import GicCpu

CTL_ENABLE = 1
CTL_IMASK = 2
CTL_ISTATUS = 4
_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_FAR_NS = 1 << 62
"""No alarm is set for a time from here on (146 years)."""


class PhysicalTimer:
    """CNTP_CTL_EL0, CNTP_CVAL_EL0 and CNTP_TVAL_EL0 of one vCPU (Arm ARM D11.2.4).

    `count` gives CNTPCT_EL0; `alarm` is set while the timer will expire.
    """

    def __init__(self, count: Callable[[], int], alarm: Alarm, changed: Callable[[], None]) -> None:
        self._count = count
        self._alarm = alarm
        self._changed = changed
        self._control = 0
        self._compare = 0
        self.armed = False
        """An alarm is set."""

    @property
    def output(self) -> bool:
        """Whether the timer asserts its interrupt."""
        return self._control == CTL_ENABLE and self._count() >= self._compare

    @property
    def control(self) -> int:
        """CNTP_CTL_EL0. ISTATUS, which is unknown while the timer is off, is as Linux shows it."""
        if self._count() >= self._compare:
            return self._control | CTL_ISTATUS
        return self._control

    @control.setter
    def control(self, value: int) -> None:
        self._control = value & (CTL_ENABLE | CTL_IMASK)
        self._set_up()

    @property
    def compare(self) -> int:
        """CNTP_CVAL_EL0."""
        return self._compare

    @compare.setter
    def compare(self, value: int) -> None:
        self._compare = value & _MASK64
        self._set_up()

    @property
    def value(self) -> int:
        """CNTP_TVAL_EL0: what is left, 32 bits."""
        return self._compare - self._count() & _MASK32

    @value.setter
    def value(self, value: int) -> None:
        signed = (value & _MASK32 ^ 1 << 31) - (1 << 31)
        self.compare = self._count() + signed

    def reset(self) -> None:
        """The vCPU was reset or is off."""
        self._compare = 0
        self.control = 0

    def close(self) -> None:
        """The vCPU goes."""
        self.armed = False
        self._alarm.close()

    def _set_up(self) -> None:
        deadline = self._compare * NS_PER_TICK
        self.armed = (
            self._control == CTL_ENABLE and self._count() < self._compare and deadline < _FAR_NS
        )
        if self.armed:
            self._alarm.set(deadline)
        else:
            self._alarm.cancel()
        self._changed()


class Timers:
    """The timers of every VM that has an interrupt controller. The kernel lock covers everything
    but `interrupt`."""

    def __init__(self, sched: Scheduler, el2: El2, clock: Clock, alarms: Alarms | None) -> None:
        self._sched = sched
        self._el2 = el2
        self._clock = clock
        self._alarms: Alarms = alarms or _NoAlarms()
        self._physical: dict[GicCpu, PhysicalTimer] = {}
        self._waiting: dict[GicCpu, None] = {}
        """vCPUs that an alarm may be for, about to sleep or asleep, in the order in which they
        began to."""
        self.loaded: Callable[[], Vcpu | None] = lambda: None
        """The vCPU that the CPU has (`Host.loaded`)."""
        self._due = False
        """With the virtual clock: an alarm was due, and nobody has looked at the timers yet."""
        sched.idle = self._jump

    def attach(self, cpu: GicCpu) -> None:
        """A vCPU has an interrupt controller now."""
        vcpu = cpu.vcpu
        cpu.vtimer.sample = partial(self._output, vcpu)
        timer = PhysicalTimer(
            self._count, self._alarms.new(self.interrupt), lambda: self._follow(cpu)
        )
        cpu.ptimer.sample = lambda: timer.output
        self._physical[cpu] = timer

    def detach(self, cpu: GicCpu) -> None:
        """The vCPU goes."""
        timer = self._physical.pop(cpu, None)
        if timer is not None:
            timer.close()

    def physical(self, vcpu: Vcpu) -> PhysicalTimer:
        """The vCPU's physical timer; without an interrupt controller nobody hears of it."""
        if vcpu.gic is not None:
            return self._physical[vcpu.gic]
        if vcpu.lone_timer is None:
            vcpu.lone_timer = PhysicalTimer(self._count, _NoAlarm(), lambda: None)
        return vcpu.lone_timer

    def stop(self, vcpu: Vcpu) -> None:
        """The vCPU was reset or is off."""
        timer = vcpu.lone_timer if vcpu.gic is None else self._physical.get(vcpu.gic)
        if timer is not None:
            timer.reset()

    def interrupted(self, cpu: GicCpu) -> None:
        """The vCPU's guest was left for an interrupt: maybe its timer's."""
        if self._due:
            self._look()
        self._sample(cpu)

    def wait(self, vcpu: Vcpu) -> None:
        """Sleep until an interrupt is for the vCPU; without an interrupt controller, until it is
        woken. May end early. Called and left with the kernel lock held, which is released
        meanwhile. Raises KickedError."""
        cpu = vcpu.gic
        if cpu is None:
            self._sched.sleep(vcpu.runner)
            return
        # First the set, then a look at the timer: an alarm after that look finds the vCPU.
        self._waiting[cpu] = None
        try:
            self._sample(cpu)
            if not cpu.deliverable():
                cpu.waiting = True
                self._sched.sleep(vcpu.runner)
        finally:
            cpu.waiting = False
            self._waiting.pop(cpu, None)

    def woken(self, cpu: GicCpu) -> None:
        """The vCPU waits no more, though its thread has not noticed yet."""
        self._waiting.pop(cpu, None)

    def interrupt(self) -> bool:
        """A physical interrupt that is nobody's but the timers'. From any thread; with the real
        clock without the kernel lock. True if the CPU need not leave its guest for it: whoever
        has the kernel lock knows that no guest runs."""
        if self._clock.virtual:
            self._due = True
            return False
        if self._sched.in_guest and not self._waiting and not self._armed():
            return False
        lock = self._sched.lock
        lock.enter()
        try:
            self._look()
        finally:
            lock.leave()
        return True

    def _armed(self) -> bool:
        return any(timer.armed for timer in [*self._physical.values()])

    def _look(self) -> None:
        """Look at every timer that may have expired: those that alarms are set for, those of
        vCPUs that wait, and the CPU's own. Other vCPUs' are looked at when they are loaded."""
        self._due = False
        for cpu, timer in self._physical.items():
            if timer.armed:
                self._follow(cpu)
        for cpu in list(self._waiting):
            self._sample(cpu)
        loaded = self.loaded()
        if loaded is not None and loaded.gic is not None:
            self._sample(loaded.gic)

    def _sample(self, cpu: GicCpu) -> None:
        """Take over the virtual timer's output, unless it is known to be high: then it is asked
        for at the next entry or when the guest has handled the interrupt."""
        irq = cpu.vtimer
        if not irq.level:
            cpu.gic.set_level(irq, self._output(cpu.vcpu))

    def _output(self, vcpu: Vcpu) -> bool:
        """The virtual timer's output; low for a vCPU that EL2 does not know (yet, or any more)."""
        return self._el2.try_call(HostCall.VCPU_TIMER, vcpu.vm.handle, vcpu.index) == 1

    def _follow(self, cpu: GicCpu) -> None:
        """Take over the physical timer's output."""
        timer = self._physical.get(cpu)
        if timer is None:
            return
        output = timer.output
        if output:
            timer.armed = False
        cpu.gic.set_level(cpu.ptimer, output)

    def _jump(self) -> bool:
        """Every vCPU waits: let virtual time jump to the next alarm. False if there is none."""
        if not self._alarms.jump():
            return False
        self._look()
        return True

    def _count(self) -> int:
        """CNTPCT_EL0."""
        return self._clock.now_ns() // NS_PER_TICK & _MASK64


class _NoAlarm:
    """An alarm that never comes."""

    def set(self, deadline_ns: int) -> None:
        """Nothing."""

    def cancel(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _NoAlarms:
    """A machine without alarms."""

    def new(self, callback: Callable[[], bool], /) -> Alarm:
        """One that never comes."""
        return _NoAlarm()

    def jump(self) -> bool:
        """There is nothing to jump to."""
        return False
