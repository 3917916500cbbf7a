# SPDX-License-Identifier: GPL-2.0-or-later
"""SMC Calling Convention (Arm DEN 0028): function ids, return codes, KVM's vendor calls.

The ids of the vendor-specific hypervisor range are KVM's (facts §6.5).
"""

from __future__ import annotations

from enum import IntEnum

from pkvm.arm64.bits import MASK64, Field, Layout

FUNCTION_ID = Layout(
    "SMCCC function id",
    Field("fast", 31, 31),
    Field("smc64", 30, 30),
    Field(
        "owner",
        29,
        24,
        {
            0: "arch",
            1: "cpu",
            2: "SiP",
            3: "OEM",
            4: "standard",
            5: "standard-hyp",
            6: "vendor-hyp",
        },
    ),
    Field("sve_hint", 16, 16),
    Field("number", 15, 0),
)
SVE_HINT = 1 << 16
"""Bit 16 of a function id: no live SVE state. Masked off before the id is looked at."""

SUCCESS = 0
NOT_SUPPORTED = -1 & MASK64
NOT_REQUIRED = -2 & MASK64
INVALID_PARAMETER = -3 & MASK64

VERSION_1_2 = 0x1_0002
"""SMCCC 1.2, as EL2 answers a protected guest (facts §1.6 Q4)."""


class Function(IntEnum):
    """Function ids that are not PSCI's."""

    SMCCC_VERSION = 0x8000_0000
    SMCCC_ARCH_FEATURES = 0x8000_0001
    ARCH_WORKAROUND_3 = 0x8000_3FFF
    ARCH_WORKAROUND_2 = 0x8000_7FFF
    ARCH_WORKAROUND_1 = 0x8000_8000
    TRNG_VERSION = 0x8400_0050
    TRNG_FEATURES = 0x8400_0051
    TRNG_UUID = 0x8400_0052
    TRNG_RND32 = 0x8400_0053
    TRNG_RND64 = 0xC400_0053
    PV_TIME_FEATURES = 0xC500_0020
    PV_TIME_ST = 0xC500_0021
    VENDOR_UID = 0x8600_FF01
    KVM_FEATURES = 0x8600_0000
    KVM_PTP = 0x8600_0001
    HYP_MEMINFO = 0xC600_0002
    MEM_SHARE = 0xC600_0003
    MEM_UNSHARE = 0xC600_0004
    MMIO_GUARD_INFO = 0xC600_0005
    MMIO_GUARD_ENROLL = 0xC600_0006
    MMIO_GUARD_MAP = 0xC600_0007
    MMIO_GUARD_UNMAP = 0xC600_0008
    MEM_RELINQUISH = 0xC600_0009
    MMIO_RGUARD_MAP = 0xC600_000A
    MMIO_RGUARD_UNMAP = 0xC600_000B
    DEV_REQ_DMA = 0xC600_003D
    PVIOMMU_OP = 0xC600_003E
    DEV_REQ_MMIO = 0xC600_003F


class PviommuOp(IntEnum):
    """X1 of PVIOMMU_OP; its other arguments are in X2 to X6."""

    ATTACH = 0
    """(pvIOMMU, vSID, PASID, domain) -> SUCCESS."""
    DETACH = 1
    """As ATTACH."""
    ALLOC_DOMAIN = 2
    """() -> SUCCESS and the domain in X1."""
    FREE_DOMAIN = 3
    """(domain) -> SUCCESS."""
    MAP = 4
    """(domain, IOVA, IPA, bytes, prot) -> SUCCESS and in X1 the bytes mapped, maybe not all."""
    UNMAP = 5
    """(domain, IOVA, bytes) -> SUCCESS and in X1 the bytes unmapped."""


TRNG_VERSION_1_0 = 0x1_0000
TRNG_INVALID_PARAMETERS = -2 & MASK64
TRNG_NO_ENTROPY = -3 & MASK64
"""Return codes of the TRNG interface (Arm DEN 0098), which are not SMCCC's."""
TRNG_MAX_BITS_32 = 96
TRNG_MAX_BITS_64 = 192
"""Most bits that one call of TRNG_RND32 and TRNG_RND64 returns: three registers full."""

VENDOR_HYP_UID = (0xB66F_B428, 0xE911_C52E, 0x564B_CAA9, 0x743A_004D)
"""X0-X3 of VENDOR_UID: KVM's UUID 28b46fb6-2ec5-11e9-a9ca-4b564d003a74."""


def function_name(function: int) -> str:
    """The field's own name of a function id ("MEM_SHARE", "PSCI_CPU_ON"), or its number in hex."""
    from pkvm.arm64 import psci  # the two tables name each other's ids

    function &= 0xFFFF_FFFF & ~SVE_HINT
    try:
        return Function(function).name
    except ValueError:
        try:
            return psci.Function(function).name
        except ValueError:
            return f"{function:#010x}"
