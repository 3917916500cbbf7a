# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's system registers: looking them up, reading, writing, replacing their functions.

QEMU describes each register by an ARMCPRegInfo: where it is stored, or which C
functions read and write it. Reads and writes here do what MRS and MSR do, side
effects included (a write of SCTLR_EL1 flushes the TLB), without the access
checks, since EL2 is the one who asks. A register that the CPU shows differently
to EL1 (MIDR_EL1, MPIDR_EL1) reads as EL1 would see it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from pkvm.arm64.registers import SysReg
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.library import READ_REGISTER, WRITE_REGISTER, Library
from pkvm.machine.cpu.unicorn_layout import UnicornLayout

AARCH64_KEY = 1 << 28 | 0x13 << 16
"""Marks an AArch64 register in the key of QEMU's register table."""


class _Register(NamedTuple):
    """One register's ARMCPRegInfo, taken apart."""

    info: int
    constant: int | None
    offset: int
    """In env; 0 if the register is not stored."""
    read: Any
    """C function or None."""
    write: Any


class SystemRegisters:
    """The system registers of one engine's CPU."""

    def __init__(self, library: Library, layout: UnicornLayout, env: int) -> None:
        self._library = library
        self._layout = layout
        self._env = env
        self._table = _u64(env + layout.cp_regs)
        self._known: dict[SysReg, _Register] = {}
        self._kept: list[Any] = []

    def read(self, register: SysReg) -> int:
        """The register's value. Raises KeyError if the CPU has no such register."""
        found = self._known.get(register) or self._find(register)
        if found.constant is not None:
            return found.constant
        if found.read is not None:
            return int(found.read(self._env, found.info))
        return _u64(self._env + found.offset)

    def write(self, register: SysReg, value: int) -> None:
        """Write the register. Raises KeyError if the CPU has no such register, EngineError if it
        cannot be written."""
        found = self._known.get(register) or self._find(register)
        if found.constant is not None or not (found.write or found.offset):
            raise EngineError(f"{register.name} is read-only")
        if found.write is not None:
            found.write(self._env, found.info, value)
        else:
            ctypes.c_uint64.from_address(self._env + found.offset).value = value
        self._library.arm_rebuild_hflags(self._env)

    def info(self, key: int) -> int | None:
        """Address of the ARMCPRegInfo with this key in QEMU's table, if there is one."""
        address: int | None = self._library.get_arm_cp_reginfo(self._table, key)
        return address

    def on_read(self, key: int, function: Callable[[], int]) -> None:
        """Let `function` give the value that a guest reads. It must not raise."""
        callback = READ_REGISTER(lambda _env, _info: function())
        self._replace(key, self._layout.ri_readfn, callback)

    def on_write(self, key: int, function: Callable[[int], None]) -> None:
        """Let `function` take the value that a guest writes. It must not raise."""
        callback = WRITE_REGISTER(lambda _env, _info, value: function(value))
        self._replace(key, self._layout.ri_writefn, callback)

    def implement(self, key: int, function: Callable[[int], None]) -> None:
        """Let `function` do what an instruction does that QEMU compiles to nothing: it gets the
        register's value. It must not raise."""
        self.on_write(key, function)
        kind = ctypes.c_uint32.from_address((self.info(key) or 0) + self._layout.ri_type)
        kind.value = kind.value & ~self._layout.type_nop | self._layout.type_no_raw

    def set_constant(self, register: SysReg, value: int) -> None:
        """Change what a constant register reads as. Raises KeyError if the CPU has none such."""
        found = self._find(register)
        if found.constant is None:
            raise KeyError(register.name)
        address = found.info + self._layout.ri_resetvalue
        ctypes.c_uint64.from_address(address).value = value
        self._known.clear()

    def store_writes(self, key: int) -> None:
        """Let a guest's write store the value and do nothing else. No effect on a register that
        the CPU does not have."""
        info = self.info(key)
        if info is None:
            return
        raw = _u64(info + self._layout.ri_raw_writefn)
        ctypes.c_uint64.from_address(info + self._layout.ri_writefn).value = raw

    def _replace(self, key: int, field: int, callback: Any) -> None:
        info = self.info(key)
        if info is None:
            raise EngineError(f"this CPU model lacks the system register with key {key:#x}")
        self._kept.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        ctypes.c_uint64.from_address(info + field).value = address or 0
        self._known.clear()

    def _find(self, register: SysReg) -> _Register:
        layout = self._layout
        info = self.info(AARCH64_KEY | register.one_reg)
        if info is None:
            raise KeyError(register.name)
        kind = ctypes.c_uint32.from_address(info + layout.ri_type).value
        if kind & layout.type_special:
            raise KeyError(register.name)
        offset = _u64(info + layout.ri_fieldoffset)
        read = _u64(info + layout.ri_readfn) or _u64(info + layout.ri_raw_readfn)
        write = _u64(info + layout.ri_writefn) or _u64(info + layout.ri_raw_writefn)
        constant = _u64(info + layout.ri_resetvalue) if kind & layout.type_const else None
        if constant is None and not read and not offset:
            raise KeyError(register.name)
        found = _Register(
            info,
            constant,
            offset,
            READ_REGISTER(read) if read else None,
            WRITE_REGISTER(write) if write else None,
        )
        self._known[register] = found
        return found


def _u64(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
