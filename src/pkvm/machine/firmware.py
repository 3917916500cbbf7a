# SPDX-License-Identifier: GPL-2.0-or-later
"""EL3: the firmware behind the machine's SMC instruction.

Of X0 it looks at what tells calls apart, the rest it ignores: the upper half,
the hint, the bits that should be zero. It trusts whoever calls from the normal
world, as firmware does: on a machine with EL2 that is EL2, which filters what the
host asks.

* PSCI 1.1 (Arm DEN 0022) for the host's CPUs, in `firmware_psci`.
* FF-A goes to the secure world (`secure`).
* SMCCC_VERSION, and a silicon provider's call that says what it was given, which
  stands for all that EL2 does not know and lets through.
"""

from __future__ import annotations

from pkvm.arm64 import ffa, psci
from pkvm.arm64.bits import MASK64
from pkvm.arm64.ffa import Registers
from pkvm.arm64.smccc import NOT_SUPPORTED, VERSION_1_2, Function
from pkvm.machine.firmware_psci import PsciFirmware
from pkvm.machine.host_cpus import HostCpu, HostCpus
from pkvm.machine.secure import SecureWorld

SIP_ECHO = 0xC200_0001
"""A call of the SiP range: X1 is X1 + 1, the other registers stay."""
_CALL = 0xFF00_FFFF
"""Type, convention, owner and number of a function id."""


class Firmware:
    """EL3 of one machine."""

    def __init__(self, cpus: HostCpus, secure: SecureWorld) -> None:
        self.secure = secure
        self.psci = PsciFirmware(cpus)

    def call(self, cpu: HostCpu, registers: Registers) -> Registers:
        """An SMC from the normal world on `cpu`: X0-X17 afterwards, none if it does not return.
        Takes any 64-bit numbers."""
        function = registers[0] & _CALL
        if ffa.is_ffa(function):
            return self.secure.call((function, *registers[1:]))
        if psci.is_psci(function):
            result = self.psci.call(cpu, function, *registers[1:4])
            return () if result is None else ffa.registers(result)
        if function == Function.SMCCC_VERSION:
            return (VERSION_1_2, *registers[1:])
        if function == SIP_ECHO:
            return (0, registers[1] + 1 & MASK64, *registers[2:])
        return (NOT_SUPPORTED, *registers[1:])
