# SPDX-License-Identifier: GPL-2.0-or-later
"""Accesses to devices by instructions that the syndrome does not describe (ESR_EL2.ISV is 0).

Nobody can emulate them from the syndrome alone; a protected guest's memory cannot be read for the
instruction either.
"""

from __future__ import annotations

from pkvm.check.scenarios.bench import DEVICE, FREE, PAGE, RAM, Bench, Guest
from pkvm.check.scenarios.handling import skip
from pkvm.guests.agent import AgentExitError
from pkvm.guests.protocol import Op

TITLE = "MMIO without a syndrome"
_OPERATIONS = (
    Op.LDP,
    Op.STP,
    Op.LDR_POST,
    Op.STR_POST,
    Op.LDR_Q0,
    Op.STR_Q0,
    Op.LDXR,
    Op.STXR,
    Op.DC_ZVA,
    Op.DC_CIVAC,
    Op.DC_IVAC,
)
_WORDS = {
    "ldr x1, [x0, #8]!": 0xF840_8C01,
    "str x1, [x0, #-8]!": 0xF81F_8C01,
    "ldrb w1, [x0], #1": 0x3840_1401,
    "ldpsw x1, x2, [x0]": 0x6940_0801,
    "ldnp x1, x2, [x0]": 0xA840_0801,
    "ldaxr x1, [x0]": 0xC85F_FC01,
    "ldxrb w1, [x0]": 0x085F_7C01,
    "ldxp x1, x2, [x0]": 0xC87F_0801,
    "ld1 {v0.16b}, [x0]": 0x4C40_7000,
    "st1 {v0.16b}, [x0]": 0x4C00_7000,
    "ldr d0, [x0]": 0xFD40_0000,
    "ldr s0, [x0]": 0xBD40_0000,
    "ldp q0, q1, [x0]": 0xAD40_0400,
    "ldadd x1, x2, [x0]": 0xF821_0002,
    "swp x1, x2, [x0]": 0xF821_8002,
    "cas x1, x2, [x0]": 0xC8A1_7C02,
    "prfm pldl1keep, [x0]": 0xF980_0000,
    "dc cvac, x0": 0xD50B_7A20,
    "dc cvau, x0": 0xD50B_7B20,
    "ic ivau, x0": 0xD50B_7520,
    "at s1e1r, x0; mrs x0, par_el1": 0xD508_7800,
}
"""Instructions that the agent has no operation for, and their encodings (Arm ARM C6.2)."""


def _all(bench: Bench, *, protected: bool) -> None:
    guest = bench.vm(protected=protected).agent()
    for operation in _OPERATIONS:
        guest.op(operation, DEVICE, 0x55, show=1)
        skip(guest)
        _finish(guest)


def bad_operations_protected(bench: Bench) -> None:
    """Pairs, writeback, SIMD, exclusives and cache maintenance, in a protected guest."""
    _all(bench, protected=True)


def bad_operations_not_protected(bench: Bench) -> None:
    """The same in one that is not protected."""
    _all(bench, protected=False)


def _finish(guest: Guest) -> None:
    """If the access came out as MMIO after all, let it end. Not recorded: the exit was."""
    if isinstance(guest.bench.error, AgentExitError):
        guest.agent.resume()


def _encoded(bench: Bench, *, protected: bool) -> None:
    guest = bench.vm(protected=protected).agent()
    for text, word in _WORDS.items():
        words = (word, 0xD538_7400) if text.endswith("par_el1") else (word,)
        guest.execute(*words, x=(DEVICE + 64, 0x55), says=text)
        skip(guest)
        _finish(guest)


def bad_encoded_protected(bench: Bench) -> None:
    """More such instructions; some of them touch nothing, some this CPU does not have."""
    _encoded(bench, protected=True)


def bad_encoded_not_protected(bench: Bench) -> None:
    """The same in a guest that is not protected."""
    _encoded(bench, protected=False)


def good_in_memory(bench: Bench) -> None:
    """In memory they do what they do: a missing page is not MMIO."""
    vm = bench.vm()
    guest = vm.agent()
    for page, operation in enumerate(_OPERATIONS):
        guest.op(operation, RAM + page * PAGE, 0x55, show=1)
    vm.load(0)


def bad_afterwards(bench: Bench) -> None:
    """The guest lives on after such an abort, and the next access is as any other."""
    guest = bench.vm().agent()
    guest.op(Op.LDP, FREE, show=1)
    guest.load(DEVICE)
    guest.answer(7)
    guest.resume(show=2)
    guest.op(Op.STP, DEVICE, 1, 2, show=1)
    guest.store(RAM, 9)
    guest.load(RAM)
