# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's instruction cache maintenance (Arm ARM D7.5.9): translations are the cache.

QEMU drops translations of what a guest writes by itself, and so compiles IC instructions to
nothing. libunicorn does not always: of the writes to a page through a mapping that is not
executable it may notice only the first, and Linux patches its own code through such a mapping. The
architecture asks for an IC instruction after any such write; here it does what it says.

CTR_EL0 gives a line of the instruction cache 4 KiB, so that a page takes one instruction.
"""

from __future__ import annotations

import ctypes

from pkvm.arm64.registers import CTR_EL0, SysReg
from pkvm.machine.cpu.library import Library
from pkvm.machine.cpu.selfcheck import CpuAddresses
from pkvm.machine.cpu.sysregs import AARCH64_KEY, SystemRegisters
from pkvm.machine.memory import PhysicalMemory

IC_IALLUIS = SysReg(1, 0, 7, 1, 0)
IC_IALLU = SysReg(1, 0, 7, 5, 0)
IC_IVAU = SysReg(1, 3, 7, 5, 1)
LINE_BYTES = 4096
_IMIN_LINE = 0xF
"""CTR_EL0.IminLine: log2 of the words in a line."""
_UNMAPPED = (1 << 64) - 1


class InstructionCache:
    """IC IALLU, IALLUIS and IVAU of one engine. QEMU knows the RAM of `memory` at its PA plus
    `ram_address_shift`."""

    def __init__(
        self,
        library: Library,
        addresses: CpuAddresses,
        registers: SystemRegisters,
        memory: PhysicalMemory,
        ram_address_shift: int,
    ) -> None:
        self._library = library
        self._addresses = addresses
        self._memory = memory
        self._shift = ram_address_shift
        self._attributes = ctypes.c_uint64()
        """Where QEMU puts what nobody asks for."""
        for register in (IC_IALLUIS, IC_IALLU):
            registers.implement(AARCH64_KEY | register.one_reg, self._invalidate_all)
        registers.implement(AARCH64_KEY | IC_IVAU.one_reg, self._invalidate_line)
        words = LINE_BYTES // 4
        registers.set_constant(
            CTR_EL0, registers.read(CTR_EL0) & ~_IMIN_LINE | words.bit_length() - 1
        )

    def _invalidate_all(self, _ignored: int) -> None:
        self._library.tb_flush(self._addresses.cpu)

    def _invalidate_line(self, address: int) -> None:
        """The line that holds a virtual address; all, where the walk does not tell which that is,
        as for a user's address while PAN is set."""
        page = self._library.arm_cpu_get_phys_page_attrs_debug(
            self._addresses.cpu, address, ctypes.addressof(self._attributes)
        )
        if page == _UNMAPPED:
            self._invalidate_all(address)
        elif self._memory.is_ram(page, LINE_BYTES):
            start = page + self._shift
            self._library.tb_invalidate_phys_range(self._addresses.uc, start, start + LINE_BYTES)
