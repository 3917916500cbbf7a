# SPDX-License-Identifier: GPL-2.0-or-later
"""The generic timer of the engine's CPU (Arm ARM D11): the counter and the timers' registers.

libunicorn reads the host's monotonic clock as the counter and forgets writes to
CTL and CVAL. Here the counter may come from elsewhere (virtual time), writes are
stored in the running context, and CTL shows ISTATUS. The timers raise no
interrupt themselves: the virtual one says when it will be due.

CTL and CVAL are stored as written: CTL[2] of the stored word means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from functools import partial

from pkvm.arm64 import registers as reg
from pkvm.machine.cpu.sysregs import AARCH64_KEY, SystemRegisters
from pkvm.machine.cpu.unicorn_layout import UnicornLayout

HOST_NS_PER_TICK = 16
"""The counter's frequency is 62.5 MHz."""
CTL_ENABLE = 1
CTL_IMASK = 2
CTL_ISTATUS = 4
_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1


class Timer(IntEnum):
    """The two timers that EL1 and EL0 have; values are QEMU's indices."""

    PHYSICAL = 0
    VIRTUAL = 1


def _aarch32_key(crn: int, opc1: int, crm: int, opc2: int) -> int:
    """Key of a 32-bit cp15 register in QEMU's table."""
    return 15 << 16 | 1 << 29 | crn << 11 | crm << 7 | opc1 << 3 | opc2


def _aarch32_pair_key(crm: int, opc1: int) -> int:
    """Key of a 64-bit cp15 register in QEMU's table."""
    return 15 << 16 | 1 << 29 | 1 << 15 | crm << 7 | opc1 << 3


def _keys(register: reg.SysReg, *aarch32: int) -> tuple[int, ...]:
    return (AARCH64_KEY | register.one_reg, *aarch32)


_COUNTER = {
    Timer.PHYSICAL: _keys(reg.CNTPCT_EL0, _aarch32_pair_key(14, 0)),
    Timer.VIRTUAL: _keys(reg.CNTVCT_EL0, _aarch32_pair_key(14, 1)),
}
_TVAL = {
    Timer.PHYSICAL: _keys(reg.CNTP_TVAL_EL0, _aarch32_key(14, 0, 2, 0)),
    Timer.VIRTUAL: _keys(reg.CNTV_TVAL_EL0, _aarch32_key(14, 0, 3, 0)),
}
_CTL = {
    Timer.PHYSICAL: _keys(reg.CNTP_CTL_EL0, _aarch32_key(14, 0, 2, 1)),
    Timer.VIRTUAL: _keys(reg.CNTV_CTL_EL0, _aarch32_key(14, 0, 3, 1)),
}
_CVAL = {
    Timer.PHYSICAL: _keys(reg.CNTP_CVAL_EL0, _aarch32_pair_key(14, 2)),
    Timer.VIRTUAL: _keys(reg.CNTV_CVAL_EL0, _aarch32_pair_key(14, 3)),
}


def _forget(_count: int | None) -> None:
    """Nobody wants to know."""


def host_counter() -> int:
    """The counter that libunicorn itself reads: the host's monotonic clock in ticks."""
    return time.monotonic_ns() // HOST_NS_PER_TICK


class GenericTimer:
    """Counter and timers of one engine. `words` is env as 64-bit words; `counter` gives the
    physical count, or None for the host's clock. `counter` must not raise.

    `on_deadline` is told at which physical count the running context's virtual timer is due, None
    for never: whenever it is programmed, even if that is past, and by `context_changed`.
    """

    def __init__(
        self,
        registers: SystemRegisters,
        layout: UnicornLayout,
        words: memoryview[int],
        counter: Callable[[], int] | None,
    ) -> None:
        self._words = words
        self.on_deadline: Callable[[int | None], None] = _forget
        self._count = counter or host_counter
        self._offset_word = layout.cntvoff_el2 >> 3
        self._timer_word = layout.c14_timer >> 3
        self._virtual_word = self._timer_word + 2 * Timer.VIRTUAL
        for timer in Timer:
            for key in _TVAL[timer]:
                registers.on_read(key, partial(self._read_tval, timer))
                registers.on_write(key, partial(self._write_tval, timer))
            for key in _CTL[timer]:
                registers.on_read(key, partial(self._read_ctl, timer))
                registers.on_write(key, partial(self._write, self._timer_word + 2 * timer + 1))
            for key in _CVAL[timer]:
                registers.on_write(key, partial(self._write, self._timer_word + 2 * timer))
            if counter is not None:
                for key in _COUNTER[timer]:
                    registers.on_read(key, partial(self.count, timer))

    def count(self, timer: Timer) -> int:
        """The count that `timer` compares with: CNTPCT_EL0, or CNTVCT_EL0 = CNTPCT - CNTVOFF."""
        offset = self._words[self._offset_word] if timer is Timer.VIRTUAL else 0
        return (self._count() - offset) & _MASK64

    def context_changed(self) -> None:
        """Another context runs now. A deadline of its own that is past is not told again."""
        remaining = self._remaining()
        if remaining is None or remaining <= 0:
            self.on_deadline(None)
        else:
            self.on_deadline(self._count() + remaining)

    def _write(self, word: int, value: int) -> None:
        self._words[word] = value
        if word >= self._virtual_word:
            self._programmed()

    def _programmed(self) -> None:
        """The virtual timer was."""
        remaining = self._remaining()
        self.on_deadline(None if remaining is None else self._count() + max(0, remaining))

    def _remaining(self) -> int | None:
        """Ticks until the virtual timer asserts its output: 0 or less if it does already, None if
        it is off or masked."""
        cval, ctl = self._registers(Timer.VIRTUAL)
        if ctl & (CTL_ENABLE | CTL_IMASK) != CTL_ENABLE:
            return None
        return cval - self.count(Timer.VIRTUAL)

    def _read_ctl(self, timer: Timer) -> int:
        cval, ctl = self._registers(timer)
        ctl &= CTL_ENABLE | CTL_IMASK
        if ctl & CTL_ENABLE and self.count(timer) >= cval:
            return ctl | CTL_ISTATUS
        return ctl

    def _read_tval(self, timer: Timer) -> int:
        cval, _ = self._registers(timer)
        return (cval - self.count(timer)) & _MASK32

    def _write_tval(self, timer: Timer, value: int) -> None:
        signed = (value & _MASK32 ^ 1 << 31) - (1 << 31)
        self._write(self._timer_word + 2 * timer, (self.count(timer) + signed) & _MASK64)

    def _registers(self, timer: Timer) -> tuple[int, int]:
        word = self._timer_word + 2 * timer
        return self._words[word], self._words[word + 1]
