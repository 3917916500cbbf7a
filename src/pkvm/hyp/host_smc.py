# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's SMCs (facts §9.4): what EL2 lets through to the firmware.

Once the host is behind stage-2 every SMC of its comes here (HCR_EL2.TSC).
Firmware ignores what it does not need of a function id, so a call that is not
in its canonical form is refused: a non-zero immediate, a set bit in the upper
half of X0, a set bit that should be zero in an id of the standard services.
Then PSCI goes to the relay, FF-A to the proxy, everything else to EL3 unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pkvm.arm64 import ffa, psci
from pkvm.arm64.ffa import Registers
from pkvm.arm64.smccc import NOT_SUPPORTED, SVE_HINT
from pkvm.events import HostSmc, Recorder
from pkvm.hyp.ffa import FfaProxy
from pkvm.hyp.host_psci import PsciRelay
from pkvm.hyp.mem_protect import MemProtect
from pkvm.machine.host_cpus import HostCpu, HostCpus

_STANDARD = 0x8400_0000
_TYPE_AND_OWNER = 0xBF00_0000
_SHOULD_BE_ZERO = 0x00FE_0000
"""Bits 23 to 17 of a fast call's function id; 16 is the SVE hint."""


def is_canonical(x0: int, immediate: int) -> bool:
    """Whether X0 of SMC #`immediate` is a function id as SMCCC writes it."""
    if immediate or x0 >> 32:
        return False
    return x0 & _TYPE_AND_OWNER != _STANDARD or not x0 & _SHOULD_BE_ZERO


class HostSmcs:
    """The way of the host's SMCs. `el3` is EL3's vector."""

    def __init__(
        self,
        mem: MemProtect,
        cpus: HostCpus,
        el3: Callable[[HostCpu, Registers], Registers],
        recorder: Recorder,
    ) -> None:
        self._el3 = el3
        self._record = recorder.record
        self._lock = threading.RLock()
        self._forwarded = False
        self.psci = PsciRelay(mem, cpus, self._firmware, recorder)
        self.ffa = FfaProxy(mem, self._firmware, recorder)

    def call(self, cpu: HostCpu, registers: Registers, immediate: int) -> Registers:
        """SMC #`immediate` of `cpu` with these X0-X17: what the host gets in them, none if the
        call does not return. Takes any 64-bit numbers, raises nothing for any of them."""
        with self._lock:
            self._forwarded = False
            results = self._answer(cpu, registers, immediate)
            x0 = results[0] if results else 0
            self._record(HostSmc(cpu.index, registers[0], x0, self._forwarded))
            return results

    def _answer(self, cpu: HostCpu, registers: Registers, immediate: int) -> Registers:
        if not is_canonical(registers[0], immediate):
            return (NOT_SUPPORTED, *registers[1:])
        function = registers[0] & ~SVE_HINT
        if psci.is_psci(function):
            return self.psci.call(cpu, function, registers)
        if ffa.is_ffa(function):
            return self.ffa.call(cpu, function, registers)
        return self._firmware(cpu, registers)

    def _firmware(self, cpu: HostCpu, registers: Registers) -> Registers:
        self._forwarded = True
        return self._el3(cpu, registers)
