# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions that EL2 gives a guest at EL1 (facts §5.4, §7.2).

They are taken from where the guest is: ELR_EL1 becomes the engine's PC, which
is the instruction that trapped or faulted.
"""

from __future__ import annotations

from pkvm.arm64.esr import EC, EC_SHIFT, FSC_EXTERNAL, IL
from pkvm.arm64.registers import PSTATE_MODE_MASK
from pkvm.machine.cpu.engine import CpuEngine

_EL0 = 0
_ABORTS = {EC.IABT_LOW: EC.IABT_CUR, EC.DABT_LOW: EC.DABT_CUR}


def undefined(engine: CpuEngine) -> None:
    """The instruction is undefined: EC 0."""
    engine.take_exception_to_el1(EC.UNKNOWN << EC_SHIFT | IL, None)


def reflect(engine: CpuEngine, esr: int) -> None:
    """The trap that came to EL2, at EL1."""
    engine.take_exception_to_el1(esr, None)


def external_abort(engine: CpuEngine, esr: int, far: int) -> None:
    """A synchronous external abort for the instruction or data abort that came to EL2 with `esr`,
    at virtual address `far`."""
    ec = EC(esr >> EC_SHIFT)
    if engine.pstate & PSTATE_MODE_MASK != _EL0:
        ec = _ABORTS[ec]
    engine.take_exception_to_el1(ec << EC_SHIFT | IL | FSC_EXTERNAL, far)
