# SPDX-License-Identifier: GPL-2.0-or-later
"""The generic timer: virtual counter, stored timers, ISTATUS (Arm ARM D11)."""

from __future__ import annotations

import pytest

from fakes.cpu_fixtures import MakeGuest
from fakes.cpu_guest import CODE, Guest, hvc, mov, mrs, msr
from pkvm.arm64 import registers as reg

ENABLE, IMASK, ISTATUS = 1, 2, 4


class Time:
    now = 1000

    def __call__(self) -> int:
        return self.now


def test_counter_callback_replaces_both_counters(make_guest: MakeGuest) -> None:
    time = Time()
    guest = make_guest(counter=time)
    guest.engine.write_sysreg(reg.CNTVOFF_EL2, 300)
    guest.run(mrs(0, reg.CNTPCT_EL0), mrs(1, reg.CNTVCT_EL0), hvc(0))
    assert (guest.engine.x[0], guest.engine.x[1]) == (1000, 700)
    time.now = 5000
    guest.engine.pc = CODE
    guest.engine.run()
    assert (guest.engine.x[0], guest.engine.x[1]) == (5000, 4700)
    assert guest.engine.read_sysreg(reg.CNTPCT_EL0) == 5000


def test_counter_below_the_offset_wraps(make_guest: MakeGuest) -> None:
    guest = make_guest(counter=Time())
    guest.engine.write_sysreg(reg.CNTVOFF_EL2, 1001)
    guest.run(mrs(1, reg.CNTVCT_EL0), hvc(0))
    assert guest.engine.x[1] == (1 << 64) - 1


@pytest.mark.parametrize(
    ("ctl", "cval", "tval", "offset"),
    [
        (reg.CNTV_CTL_EL0, reg.CNTV_CVAL_EL0, reg.CNTV_TVAL_EL0, 300),
        (reg.CNTP_CTL_EL0, reg.CNTP_CVAL_EL0, reg.CNTP_TVAL_EL0, 0),
    ],
)
def test_timer_registers(
    make_guest: MakeGuest, ctl: reg.SysReg, cval: reg.SysReg, tval: reg.SysReg, offset: int
) -> None:
    time = Time()
    guest = make_guest(counter=time)
    x = guest.engine.x
    guest.engine.write_sysreg(reg.CNTVOFF_EL2, 300)
    guest.run(*mov(0, 2000), msr(cval, 0), *mov(1, ENABLE | IMASK | ISTATUS), msr(ctl, 1), hvc(0))
    read = [mrs(2, cval), mrs(3, ctl), mrs(4, tval), hvc(0)]
    guest.run(*read)
    assert (x[2], x[3], x[4]) == (2000, ENABLE | IMASK, 1000 + offset)
    time.now = 2000 + offset
    guest.run(*read)
    assert (x[3], x[4]) == (ENABLE | IMASK | ISTATUS, 0)
    time.now += 5
    guest.run(*read)
    assert x[4] == (1 << 32) - 5
    guest.run(*mov(0, 50), msr(tval, 0), hvc(0))
    assert guest.engine.read_sysreg(cval) == 2055
    guest.run(*mov(0, (1 << 32) - 10), msr(tval, 0), *mov(1, 0), msr(ctl, 1), hvc(0))
    assert guest.engine.read_sysreg(cval) == 1995
    assert guest.engine.read_sysreg(ctl) == 0


def test_timers_belong_to_the_context(make_guest: MakeGuest) -> None:
    guest = make_guest(counter=Time())
    engine = guest.engine
    guest.run(*mov(0, 77), msr(reg.CNTV_CVAL_EL0, 0), hvc(0))
    engine.save_context(0x8020_0000)
    engine.reset_context()
    assert engine.read_sysreg(reg.CNTV_CVAL_EL0) == 0
    engine.load_context(0x8020_0000)
    assert engine.read_sysreg(reg.CNTV_CVAL_EL0) == 77


def test_exception_in_the_counter_comes_out_of_run(make_guest: MakeGuest) -> None:
    def counter() -> int:
        raise ZeroDivisionError("no time")

    guest = make_guest(counter=counter)
    guest.write(CODE, mrs(0, reg.CNTVCT_EL0), mrs(1, reg.CNTVCT_EL0))
    guest.engine.pc = CODE
    with pytest.raises(ZeroDivisionError, match="no time"):
        guest.engine.run()


def test_timer_of_the_host_clock_expires(guest: Guest) -> None:
    guest.run(*mov(0, 1), msr(reg.CNTV_CTL_EL0, 0), mrs(1, reg.CNTV_CTL_EL0), hvc(0))
    assert guest.engine.x[1] == ENABLE | ISTATUS
    guest.run(*mov(0, (1 << 63)), msr(reg.CNTV_CVAL_EL0, 0), mrs(1, reg.CNTV_CTL_EL0), hvc(0))
    assert guest.engine.x[1] == ENABLE


def test_frequency(guest: Guest) -> None:
    guest.run(mrs(0, reg.CNTFRQ_EL0), hvc(0))
    assert guest.engine.x[0] == 62_500_000
