# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads and stores with writeback have no valid syndrome (Arm ARM, ISS of a data abort: ISV).

The QEMU in libunicorn says otherwise: ESR_EL2.ISV is 1 after an abort of LDR X1, [X0], #8 too, and
whoever emulates the access by the syndrome alone forgets the writeback. So the instruction is
looked at before EL2 sees the syndrome. Where it is in RAM is remembered by its PC and the tables
that translate it, until a TLB invalidation.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from pkvm.arm64.esr import EC, EC_SHIFT, IL, ISV
from pkvm.machine.cpu.library import Library
from pkvm.machine.cpu.selfcheck import CpuAddresses
from pkvm.machine.cpu.unicorn_layout import LAYOUT
from pkvm.machine.memory import PhysicalMemory

_WRITEBACK_MASK, _WRITEBACK = 0x3B20_0400, 0x3800_0400
"""Load/store register, immediate, pre- or post-indexed (Arm ARM C4.1)."""
_DESCRIBED = int(EC.DABT_LOW) << EC_SHIFT | IL | ISV
_ACCESS_BITS = 0x7FF << 14
"""ISV, SAS, SSE, SRT, SF and AR: what is valid with ISV alone."""
_MOST = 4096
_UNMAPPED = (1 << 64) - 1
_PAGE_MASK = 0xFFF
_WHERE = (
    LAYOUT.pc, LAYOUT.sctlr_el + 8, LAYOUT.ttbr0_el1, LAYOUT.ttbr1_el1, LAYOUT.vttbr_el2
)  # fmt: skip
"""By what an instruction is found, in the order of the CPU's state: PC, SCTLR_EL1, TTBR0_EL1,
TTBR1_EL1, VTTBR_EL2."""


Pattern = tuple[int, int, int]
"""A word of RAM, by index, and what it is like, by mask, if there is a load or store with writeback
in it."""
_NOWHERE: Pattern = (0, 0, 1)
"""Of no word."""
Settle = Callable[[], None]
"""Called with ESR_EL2 as libunicorn has it: takes from it what it must not say."""
Forget = Callable[[], None]
"""Translations may have changed."""


def corrector(
    library: Library,
    addresses: CpuAddresses,
    memory: PhysicalMemory,
    words: memoryview[int],
    esr_el2: int,
) -> tuple[Settle, Forget]:
    """The functions that correct one engine's syndromes. `words` is the CPU's state, `esr_el2` an
    index in it. Every device access comes by `settle`, so all that it needs is local to it."""
    known: dict[tuple[int, ...], Pattern] = {}
    attributes = ctypes.c_uint64()
    code, ram_base = memory.words, memory.ram_base
    gaps = "".join(f"{after - at - 8}xQ" for at, after in pairwise(_WHERE))
    where = partial(struct.Struct(f"<Q{gaps}").unpack_from, words, _WHERE[0])

    def settle() -> None:
        esr = words[esr_el2]
        if esr & _DESCRIBED != _DESCRIBED:
            return
        key = where()
        pattern = known.get(key)
        if pattern is None:
            pattern = known[key] = find(key[0])
        index, mask, writeback = pattern
        if code[index] & mask == writeback:
            words[esr_el2] = esr & ~_ACCESS_BITS

    def find(pc: int) -> Pattern:
        """Where in `code` the instruction at `pc` is; `_NOWHERE` if the walk does not tell, as for
        a user's address while PAN is set."""
        if len(known) >= _MOST:
            known.clear()
        page: int = library.arm_cpu_get_phys_page_attrs_debug(
            addresses.cpu, pc, ctypes.addressof(attributes)
        )
        pa = (page & ~_PAGE_MASK) + (pc & _PAGE_MASK & ~3)
        if page == _UNMAPPED or not memory.is_ram(pa, 4):
            return _NOWHERE
        offset = pa - ram_base
        shift = (offset & 4) * 8
        return offset >> 3, _WRITEBACK_MASK << shift, _WRITEBACK << shift

    return settle, known.clear
