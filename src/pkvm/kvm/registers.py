# SPDX-License-Identifier: GPL-2.0-or-later
"""Names for the core registers of ONE_REG (KVM API 4.68, arm64 table)."""

from __future__ import annotations

from pkvm.uapi import kvm as uapi

_IDS = {
    **{f"x{n}": uapi.reg_x(n) for n in range(31)},
    **{f"v{n}": uapi.reg_v(n) for n in range(32)},
    "sp_el0": uapi.REG_SP,
    "sp_el1": uapi.REG_SP_EL1,
    "pc": uapi.REG_PC,
    "pstate": uapi.REG_PSTATE,
    "elr_el1": uapi.REG_ELR_EL1,
    "spsr_el1": uapi.REG_SPSR_EL1,
    "fpsr": uapi.REG_FPSR,
    "fpcr": uapi.REG_FPCR,
}


def register_id(name: str) -> int:
    """ONE_REG id of a core register by its name in lower case. Raises ValueError for another."""
    try:
        return _IDS[name]
    except KeyError:
        raise ValueError(
            f"there is no register {name!r}: x0-x30, v0-v31, "
            + ", ".join(n for n in _IDS if not n[1:].isdigit())
            + " have names; others go by their ONE_REG id"
        ) from None


def register_bytes(register: int) -> int:
    """The size that a ONE_REG id carries, in bytes (1 to 256)."""
    return 1 << ((register & uapi.REG_SIZE_MASK) >> 52)
