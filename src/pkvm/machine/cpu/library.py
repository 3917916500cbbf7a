# SPDX-License-Identifier: GPL-2.0-or-later
"""libunicorn's functions, with their C types.

Public functions come under their own names. The wheel also exports the
functions of the QEMU code inside, with the suffix `_aarch64`; the ones used
here are the architecture itself: taking an exception, flushing the TLB,
forgetting translations, looking up a system register.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import uclib

from pkvm.machine.cpu.errors import EngineError

CTL_WRITE_ONE = uc.UC_CTL_IO_WRITE << 30 | 1 << 26
"""Code of a `uc_ctl` that sets one value; the control's number is added."""

READ_REGISTER = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_void_p)
"""C type of a system register's read function: (env, reginfo) -> value."""
WRITE_REGISTER = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_uint64)
"""C type of a system register's write function: (env, reginfo, value)."""
ACCESS_CHECK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, ctypes.c_bool)
"""C type of a system register's access check: (env, reginfo, is read) -> CPAccessResult."""
VECTOR_ENTRY = ctypes.CFUNCTYPE(c_int)
"""Called for an exception to EL2, without arguments; not 0: stop emulation."""
START = ctypes.CFUNCTYPE(c_int)
"""Starts emulation at PC; the status of `uc_emu_start`."""
INTERRUPT_HOOK = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
"""UC_HOOK_INTR: (uc, exception number, user data)."""
MMIO_READ = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_uint64, c_uint32, c_void_p)
"""A region's read: (uc, offset, bytes, user data) -> value."""
MMIO_WRITE = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_uint64, c_void_p)
"""A region's write: (uc, offset, bytes, value, user data)."""
BLOCK_HOOK = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_void_p)
"""UC_HOOK_BLOCK: (uc, address, bytes, user data)."""

_PUBLIC: dict[str, tuple[Any, list[Any]]] = {
    "uc_version": (c_uint32, [c_void_p, c_void_p]),
    "uc_open": (c_int, [c_int, c_int, POINTER(c_void_p)]),
    "uc_close": (c_int, [c_void_p]),
    "uc_ctl": (c_int, [c_void_p, c_int32]),
    "uc_reg_read": (c_int, [c_void_p, c_int, c_void_p]),
    "uc_reg_write": (c_int, [c_void_p, c_int, c_void_p]),
    "uc_mem_map_ptr": (c_int, [c_void_p, c_uint64, c_size_t, c_uint32, c_void_p]),
    "uc_mmio_map": (
        c_int,
        [c_void_p, c_uint64, c_size_t, MMIO_READ, c_void_p, MMIO_WRITE, c_void_p],
    ),
    "uc_hook_add": (
        c_int,
        [c_void_p, POINTER(c_size_t), c_int, c_void_p, c_void_p, c_uint64, c_uint64],
    ),
    "uc_hook_del": (c_int, [c_void_p, c_size_t]),
    "uc_emu_start": (c_int, [c_void_p, c_uint64, c_uint64, c_uint64, c_size_t]),
    "uc_emu_stop": (c_int, [c_void_p]),
    "uc_strerror": (ctypes.c_char_p, [c_int]),
}
_INTERNAL: dict[str, tuple[Any, list[Any]]] = {
    "arm_cpu_do_interrupt": (None, [c_void_p]),
    "arm_cpu_get_phys_page_attrs_debug": (c_uint64, [c_void_p, c_uint64, c_void_p]),
    "arm_cpu_update_virq": (None, [c_void_p]),
    "arm_cpu_update_vfiq": (None, [c_void_p]),
    "arm_rebuild_hflags": (None, [c_void_p]),
    "aarch64_sync_32_to_64": (None, [c_void_p]),
    "aarch64_sync_64_to_32": (None, [c_void_p]),
    "cpsr_read": (c_uint32, [c_void_p]),
    "cpsr_write": (None, [c_void_p, c_uint32, c_uint32, c_int]),
    "define_one_arm_cp_reg_with_opaque": (None, [c_void_p, c_void_p, c_void_p]),
    "get_arm_cp_reginfo": (c_void_p, [c_void_p, c_uint32]),
    "qemu_ram_addr_from_host": (c_uint64, [c_void_p, c_void_p]),
    "tb_flush": (None, [c_void_p]),
    "tb_invalidate_phys_range": (None, [c_void_p, c_uint64, c_uint64]),
    "tlb_flush": (None, [c_void_p]),
}


class Library:
    """One libunicorn: `uc_*` functions and the internal ones, by name, ready to call.

    `path` names another library than the one the `unicorn` package loaded. Raises EngineError if
    it lacks a function.
    """

    uc_version: Any
    uc_open: Any
    uc_close: Any
    uc_ctl: Any
    uc_reg_read: Any
    uc_reg_write: Any
    uc_mem_map_ptr: Any
    uc_mmio_map: Any
    uc_hook_add: Any
    uc_hook_del: Any
    uc_emu_start: Any
    uc_emu_stop: Any
    uc_strerror: Any
    arm_cpu_do_interrupt: Any
    arm_cpu_get_phys_page_attrs_debug: Any
    arm_cpu_update_virq: Any
    arm_cpu_update_vfiq: Any
    arm_rebuild_hflags: Any
    aarch64_sync_32_to_64: Any
    aarch64_sync_64_to_32: Any
    cpsr_read: Any
    cpsr_write: Any
    define_one_arm_cp_reg_with_opaque: Any
    get_arm_cp_reginfo: Any
    qemu_ram_addr_from_host: Any
    tb_flush: Any
    tb_invalidate_phys_range: Any
    tlb_flush: Any

    def __init__(self, path: str | None = None) -> None:
        self.path = path or str(uclib._name)
        dll = ctypes.CDLL(self.path)
        for suffix, functions in (("", _PUBLIC), ("_aarch64", _INTERNAL)):
            for name, (result, arguments) in functions.items():
                try:
                    function = dll[name + suffix]
                except AttributeError:
                    raise EngineError(f"{self.path} does not export {name + suffix}") from None
                function.restype = result
                function.argtypes = arguments
                setattr(self, name, function)

    def address_of(self, name: str) -> int:
        """The address of function `name` in this process."""
        return ctypes.cast(getattr(self, name), c_void_p).value or 0

    def version(self) -> tuple[int, int, int]:
        """Major, minor and patch number that the library gives of itself."""
        word = int(self.uc_version(None, None))
        return word >> 24 & 0xFF, word >> 16 & 0xFF, word >> 8 & 0xFF

    def check(self, status: int, what: str) -> None:
        """Raise EngineError if a `uc_*` function returned an error; `what` says what was tried."""
        if status:
            reason = self.uc_strerror(status).decode("ascii", "replace")
            raise EngineError(f"unicorn could not {what}: {reason}")
