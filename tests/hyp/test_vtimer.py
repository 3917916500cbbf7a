# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual timers: one bit for the host, an interrupt at the deadline, whoever is on the CPU."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, PAGE, RAM_IPA, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.hyp.abi import ExitCode, HostCall
from pkvm.machine.clock import NS_PER_TICK

ENABLE, IMASK = 1, 2
WAIT = [a64.WFI, 0x17FF_FFFF]
NEVER = (1 << 64) - 1


class Rig(El2):
    """An EL2 whose host counts timer interrupts."""

    def __init__(self, *, virtual_clock: bool = True) -> None:
        super().__init__(virtual_clock=virtual_clock)
        self.interrupts = 0
        self.machine.on_interrupt = self._interrupt

    def _interrupt(self) -> bool:
        self.interrupts += 1
        return False

    @property
    def ticks(self) -> int:
        return self.machine.clock.now_ns() // NS_PER_TICK

    def timer(self, guest: Guest, index: int = 0) -> int:
        return self.call(HostCall.VCPU_TIMER, guest.handle, index)


@pytest.fixture
def el2() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.machine.close()


def program(ticks: int, ctl: int = ENABLE) -> list[int]:
    """Deadline at CNTVCT + X9, which is `ticks`."""
    return [
        *a64.mov(9, ticks), a64.mrs(1, r.CNTVCT_EL0), 0x8B09_0021,  # ADD X1, X1, X9
        a64.msr(r.CNTV_CVAL_EL0, 1), *a64.mov(0, ctl), a64.msr(r.CNTV_CTL_EL0, 0),
    ]  # fmt: skip


SPIN = [a64.LOOP]


def test_running_guest_is_left_at_the_very_block(el2: Rig) -> None:
    guest = Guest(el2, [*program(1000), *SPIN])
    assert guest.run() == ExitCode.IRQ
    assert el2.engine.x[1] == el2.ticks
    assert (el2.timer(guest), el2.interrupts) == (1, 1)
    assert guest.shown[2:] == (0,) * 6


def test_guest_is_not_left_twice_for_one_deadline(el2: Rig) -> None:
    guest = Guest(el2, [*program(1000), *SPIN])
    guest.run()
    el2.engine.set_slice(100_000)
    before = el2.ticks
    assert guest.run() == ExitCode.IRQ
    assert el2.ticks - before == 100_000
    assert el2.interrupts == 1


def test_guest_that_waits_is_announced_by_a_jump(el2: Rig) -> None:
    guest = Guest(el2, [*program(1_000_000), *WAIT])
    assert guest.run() == ExitCode.TRAP
    assert el2.timer(guest) == 0
    assert el2.machine.alarms.jump()
    assert el2.ticks == el2.engine.x[1]
    assert (el2.timer(guest), el2.interrupts) == (1, 1)
    assert not el2.machine.alarms.jump()
    assert guest.run(flags=INCREMENT_PC) == ExitCode.TRAP


@pytest.mark.parametrize("ctl", [0, IMASK, ENABLE | IMASK])
def test_disabled_or_masked_timer_is_silent(el2: Rig, ctl: int) -> None:
    guest = Guest(el2, [*program(100, ctl), *WAIT])
    assert guest.run() == ExitCode.TRAP
    assert not el2.machine.alarms.jump()
    other = Guest(el2, WAIT)
    assert other.run() == ExitCode.TRAP
    assert not el2.machine.alarms.jump()
    assert (el2.timer(guest), el2.interrupts) == (0, 0)


def test_deadline_in_the_past_is_due_at_once(el2: Rig) -> None:
    guest = Guest(el2, [*a64.mov(0, 1), a64.msr(r.CNTV_CTL_EL0, 0), *SPIN])
    assert guest.run() == ExitCode.IRQ
    assert (el2.timer(guest), el2.interrupts) == (1, 1)


def test_masking_takes_the_output_back(el2: Rig) -> None:
    mask = [*a64.mov(0, ENABLE | IMASK), a64.msr(r.CNTV_CTL_EL0, 0)]
    guest = Guest(el2, [*program(1), a64.NOP, 0x1400_0001, *mask, *WAIT])
    assert guest.run() == ExitCode.IRQ
    assert el2.timer(guest) == 1
    assert guest.run() == ExitCode.TRAP
    assert el2.timer(guest) == 0


def test_tval_counts_from_now(el2: Rig) -> None:
    words = [*a64.mov(0, 500), a64.msr(r.CNTV_TVAL_EL0, 0), a64.mrs(2, r.CNTV_CVAL_EL0)]
    guest = Guest(el2, [*words, *a64.mov(0, 1), a64.msr(r.CNTV_CTL_EL0, 0), *SPIN])
    assert guest.run() == ExitCode.IRQ
    assert el2.ticks == el2.engine.x[2]


# World switch


def test_timer_goes_off_while_another_vm_runs(el2: Rig) -> None:
    first = Guest(el2, [*program(50_000), *WAIT])
    other = Guest(el2, SPIN)
    assert first.run() == ExitCode.TRAP
    due = el2.engine.x[1]
    assert other.run() == ExitCode.IRQ
    assert el2.ticks == due
    assert (el2.timer(first), el2.timer(other), el2.interrupts) == (1, 0, 1)
    assert first.run(flags=INCREMENT_PC) == ExitCode.TRAP
    assert (el2.timer(first), el2.interrupts) == (1, 1)


def test_switching_to_and_fro_announces_once(el2: Rig) -> None:
    first = Guest(el2, [*program(10_000), *WAIT])
    other = Guest(el2, [*program(30_000), *WAIT])
    first.run()
    other.run()
    for _ in range(3):
        first.run(flags=INCREMENT_PC)
        other.run(flags=INCREMENT_PC)
    assert (el2.timer(first), el2.timer(other)) == (0, 0)
    assert el2.machine.alarms.jump()
    assert (el2.timer(first), el2.timer(other), el2.interrupts) == (1, 0, 1)
    for _ in range(3):
        first.run(flags=INCREMENT_PC)
        other.run(flags=INCREMENT_PC)
    assert el2.interrupts == 1
    assert el2.machine.alarms.jump()
    assert (el2.timer(other), el2.interrupts) == (1, 2)
    assert not el2.machine.alarms.jump()


def test_each_vm_finds_its_own_timer(el2: Rig) -> None:
    look = [a64.mrs(3, r.CNTV_CVAL_EL0), a64.mrs(4, r.CNTV_CTL_EL0)]
    first = Guest(el2, [*program(10_000_000), a64.WFI, *look, *WAIT])
    other = Guest(el2, [*look, *WAIT])
    first.run()
    cval = el2.engine.x[1]
    other.run()
    assert (el2.engine.x[3], el2.engine.x[4]) == (0, 0)
    first.run(flags=INCREMENT_PC)
    assert (el2.engine.x[3], el2.engine.x[4]) == (cval, ENABLE)


def test_end_of_a_vm_ends_its_alarm(el2: Rig) -> None:
    for other in (None, Guest(el2, WAIT)):
        guest = Guest(el2, [*program(10_000), *WAIT])
        guest.run()
        if other is not None:
            other.run()
        guest.end()
        assert not el2.machine.alarms.jump()
    assert el2.interrupts == 0


def test_runs_repeat_exactly() -> None:
    found = []
    for _ in range(2):
        el2 = Rig()
        first = Guest(el2, [*program(777), *SPIN])
        other = Guest(el2, [*program(1234), *SPIN])
        seen = []
        for guest in (first, other, first, other, other):
            el2.engine.set_slice(300)
            guest.run()
            seen.append((el2.ticks, el2.engine.pc, el2.timer(first), el2.timer(other)))
        found.append(seen)
        el2.machine.close()
    assert found[0] == found[1]


# What the host learns


def test_of_what_is_not_there(el2: Rig) -> None:
    guest = Guest(el2, WAIT)
    el2.assert_refused(errno.ENOENT, HostCall.VCPU_TIMER, guest.handle, 1)
    el2.assert_refused(errno.ENOENT, HostCall.VCPU_TIMER, guest.handle, NEVER)
    el2.assert_refused(errno.ENOENT, HostCall.VCPU_TIMER, guest.handle + 1, 0)
    assert el2.timer(guest) == 0


def test_compare_value_stays_with_el2(el2: Rig) -> None:
    secret = 0x5EC2_E700_0000
    words = [*a64.mov(0, secret), a64.msr(r.CNTV_CVAL_EL0, 0), *a64.mov(0, 1),
             a64.msr(r.CNTV_CTL_EL0, 0), *a64.mov(0, 0), a64.mrs(1, r.CNTP_CTL_EL0)]  # fmt: skip
    guest = Guest(el2, [*words, *WAIT])
    assert guest.run() == ExitCode.TRAP
    assert secret not in guest.shown
    other = Guest(el2, WAIT)
    other.run()
    assert secret in guest.vcpu().words.tolist()
    needle = secret.to_bytes(8, "little")
    for pa in guest.vcpus + other.vcpus + [guest.page]:
        assert needle not in el2.bus.read(pa, PAGE)
    with pytest.raises(Exception, match="refused by stage 2"):
        el2.bus.read(guest.areas[0] + 0x3000, 8)
    guest.end()
    for pa in guest.areas:
        assert el2.bus.read(pa + 8, PAGE - 8) == bytes(PAGE - 8)


@pytest.mark.parametrize("register", [r.CNTP_CTL_EL0, r.CNTP_CVAL_EL0, r.CNTP_TVAL_EL0])
@pytest.mark.parametrize("make", [a64.mrs, lambda rt, register: a64.msr(register, rt)])
def test_physical_timer_is_the_hosts(
    el2: Rig, register: r.SysReg, make: Callable[[int, r.SysReg], int]
) -> None:
    guest = Guest(el2, [make(3, register), *WAIT])
    assert guest.run() == ExitCode.TRAP
    assert (guest.ec(), guest.esr() & 0x3F_FC1E) == (0x18, register.iss)
    assert guest.run(flags=INCREMENT_PC) == ExitCode.TRAP
    assert guest.ec() == 1


def test_secondary_starts_with_its_timer_off(el2: Rig) -> None:
    guest = Guest(el2, WAIT, protected=False, vcpus=2)
    el2.bus.write(guest.ram, a64.code([*program(10_000), *WAIT]))
    guest.run(0)
    el2.bus.write(guest.ram + 0x400, a64.code([a64.mrs(4, r.CNTV_CTL_EL0), *WAIT]))
    guest.set(0x100, RAM_IPA + 0x400, 1)
    guest.run(1)
    assert el2.engine.x[4] == 0
    assert (el2.timer(guest, 0), el2.timer(guest, 1)) == (0, 0)


# The real clock


def test_real_deadline_leaves_the_guest_and_is_not_early() -> None:
    el2 = Rig(virtual_clock=False)
    guest = Guest(el2, [*program(62_500), *SPIN])
    other = Guest(el2, SPIN)
    assert guest.run() == ExitCode.IRQ
    assert el2.ticks >= el2.engine.x[1]
    assert el2.timer(guest) == 1
    waits = Guest(el2, [*program(3_125_000), *WAIT])
    assert waits.run() == ExitCode.TRAP
    due = el2.engine.x[1]
    assert other.run() == ExitCode.IRQ
    assert el2.ticks >= due
    assert el2.timer(waits) == 1
    el2.machine.close()
    assert el2.interrupts == 2
