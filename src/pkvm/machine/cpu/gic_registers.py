# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupt controller's system registers, which libunicorn's CPU models lack.

They are added to QEMU's register table while the engine is made: those that
`VirtualCpuInterface` serves, and those that trap to EL2 whenever it owns
interrupts (HCR_EL2.IMO and FMO): SGIs, and ICC_SRE_EL1 (ICC_SRE_EL2.Enable is
0). ID_AA64PFR0_EL1 says that they are there.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

from pkvm.arm64 import registers as r
from pkvm.machine.cpu.library import ACCESS_CHECK, READ_REGISTER, WRITE_REGISTER, Library
from pkvm.machine.cpu.unicorn_layout import UnicornLayout
from pkvm.machine.gic import GuestRegister

TRAPPED = (r.ICC_SGI0R_EL1, r.ICC_SGI1R_EL1, r.ICC_ASGI1R_EL1, r.ICC_SRE_EL1)
PFR0_GIC = 1 << 24
"""ID_AA64PFR0_EL1.GIC: system registers of GICv3."""
_EL1_READ, _EL1_WRITE = 0xA8, 0x54
"""Access from EL1, EL2 and EL3, none from EL0."""
_STATE_AARCH64 = 1
_TYPE = 0x40 | 0x80
"""Input and output; no raw access."""
_TRAP_TO_EL2 = 3
"""CP_ACCESS_TRAP_EL2."""
_HEAD = struct.Struct("<Q6B2xiii")
"""Name, cp, crn, crm, opc0, opc1, opc2, state, type, access."""


def define(
    library: Library, layout: UnicornLayout, cpu: int, registers: Sequence[GuestRegister]
) -> list[Any]:
    """Add `registers` and those that trap to the table of the ARMCPU at address `cpu`. Returns what
    must live as long as that."""
    access = ACCESS_CHECK(lambda _env, _info, _is_read: _TRAP_TO_EL2)
    kept: list[Any] = [access]
    trapped = [GuestRegister(register, None, _ignore) for register in TRAPPED[:-1]]
    trapped.append(GuestRegister(TRAPPED[-1], _nothing, _ignore))
    for register, read, write in (*registers, *trapped):
        name = ctypes.create_string_buffer(register.name.encode())
        info = ctypes.create_string_buffer(layout.ri_bytes)
        op0, op1, crn, crm, op2 = register
        permitted = (_EL1_READ if read else 0) | (_EL1_WRITE if write else 0)
        address = ctypes.addressof(name)
        _HEAD.pack_into(
            info, 0, address, 0, crn, crm, op0, op1, op2, _STATE_AARCH64, _TYPE, permitted
        )
        for field, callback in (
            (layout.ri_accessfn, access if register in TRAPPED else None),
            (layout.ri_readfn, _reader(read)),
            (layout.ri_writefn, _writer(write)),
        ):
            if callback is not None:
                kept.append(callback)
                pointer = ctypes.cast(callback, ctypes.c_void_p).value or 0
                struct.pack_into("<Q", info, field, pointer)
        kept += [name, info]
        library.define_one_arm_cp_reg_with_opaque(cpu, ctypes.addressof(info), None)
    return kept


def show_in_pfr0(address: int) -> None:
    """Set GIC in the ID_AA64PFR0_EL1 at `address`."""
    ctypes.c_uint64.from_address(address).value |= PFR0_GIC


def _reader(read: Callable[[], int] | None) -> Any:
    return None if read is None else READ_REGISTER(lambda _env, _info: read())


def _writer(write: Callable[[int], None] | None) -> Any:
    return None if write is None else WRITE_REGISTER(lambda _env, _info, value: write(value))


def _nothing() -> int:
    return 0


def _ignore(_value: int) -> None:
    return
