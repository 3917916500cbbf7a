# SPDX-License-Identifier: GPL-2.0-or-later
"""Power State Coordination Interface (Arm DEN 0022): function ids and return codes."""

from __future__ import annotations

from enum import IntEnum

from pkvm.arm64.bits import MASK64

VERSION_0_2 = 0x0_0002
VERSION_1_0 = 0x1_0000
VERSION_1_1 = 0x1_0001
VERSION_1_2 = 0x1_0002
VERSION_1_3 = 0x1_0003


class Function(IntEnum):
    """PSCI function ids; those with a 64-bit form have a member each."""

    PSCI_VERSION = 0x8400_0000
    CPU_SUSPEND_32 = 0x8400_0001
    CPU_OFF = 0x8400_0002
    CPU_ON_32 = 0x8400_0003
    AFFINITY_INFO_32 = 0x8400_0004
    MIGRATE_32 = 0x8400_0005
    MIGRATE_INFO_TYPE = 0x8400_0006
    MIGRATE_INFO_UP_CPU_32 = 0x8400_0007
    SYSTEM_OFF = 0x8400_0008
    SYSTEM_RESET = 0x8400_0009
    PSCI_FEATURES = 0x8400_000A
    SYSTEM_SUSPEND_32 = 0x8400_000E
    SET_SUSPEND_MODE = 0x8400_000F
    SYSTEM_RESET2_32 = 0x8400_0012
    MEM_PROTECT = 0x8400_0013
    MEM_PROTECT_CHECK_RANGE_32 = 0x8400_0014
    SYSTEM_OFF2_32 = 0x8400_0015
    CPU_SUSPEND_64 = 0xC400_0001
    CPU_ON_64 = 0xC400_0003
    AFFINITY_INFO_64 = 0xC400_0004
    MIGRATE_64 = 0xC400_0005
    MIGRATE_INFO_UP_CPU_64 = 0xC400_0007
    SYSTEM_SUSPEND_64 = 0xC400_000E
    SYSTEM_RESET2_64 = 0xC400_0012
    MEM_PROTECT_CHECK_RANGE_64 = 0xC400_0014
    SYSTEM_OFF2_64 = 0xC400_0015


class Function01(IntEnum):
    """KVM's function ids of PSCI 0.1, which the architecture left to the implementation."""

    CPU_SUSPEND = 0x95C1_BA5E
    CPU_OFF = 0x95C1_BA5F
    CPU_ON = 0x95C1_BA60
    MIGRATE = 0x95C1_BA61


SUCCESS = 0
NOT_SUPPORTED = -1 & MASK64
INVALID_PARAMS = -2 & MASK64
DENIED = -3 & MASK64
ALREADY_ON = -4 & MASK64
ON_PENDING = -5 & MASK64
INTERNAL_FAILURE = -6 & MASK64
NOT_PRESENT = -7 & MASK64
DISABLED = -8 & MASK64
INVALID_ADDRESS = -9 & MASK64


class Affinity(IntEnum):
    """AFFINITY_INFO's answers, and the power states EL2 keeps for a vCPU."""

    ON = 0
    OFF = 1
    ON_PENDING = 2


def is_psci(function: int) -> bool:
    """Whether a 32-bit function id lies in PSCI's part of the standard service range."""
    return function & 0xBFFF_FFE0 == 0x8400_0000


def function_name(function: int) -> str:
    """The id's own name in lower case ("cpu_on_64"), or its number in hex: for the record."""
    try:
        return Function(function).name.lower()
    except ValueError:
        return f"{function:#010x}"
