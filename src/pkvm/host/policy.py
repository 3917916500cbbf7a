# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's part of a dialect, beside what its users see (`pkvm.uapi.dialects`): what KVM answers
to a guest whose calls come to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pkvm.arm64 import psci
from pkvm.arm64.smccc import Function
from pkvm.uapi import dialects
from pkvm.uapi import kvm as uapi
from pkvm.uapi.kvm import VcpuFeature


@dataclass(frozen=True, slots=True)
class Policy:
    """One dialect's KVM."""

    psci_versions: tuple[int, ...]
    """What KVM_REG_ARM_PSCI_VERSION may be; the last one is the default."""
    features: int
    """KVM_FEATURES of a non-protected guest."""
    services: bool
    """Whether there are TRNG, PTP and stolen time."""
    shows_cpu: bool
    """Whether ID registers, debug registers and the bitmaps of KVM's services are there for
    ONE_REG, and the host's answer to a non-protected guest that reads them."""
    unknown_register: int
    """What KVM_ARM_VCPU_INIT puts where the architecture promises no reset value."""
    vcpu_features: int
    """KVM_ARM_VCPU_* features that may be asked for beside pointer authentication, whatever the
    CPU has: a vCPU that has no use for them does not run, or goes without."""


_PSCI = (
    psci.VERSION_0_2,
    psci.VERSION_1_0,
    psci.VERSION_1_1,
    psci.VERSION_1_2,
    psci.VERSION_1_3,
)

_BASIC = 1 << VcpuFeature.POWER_OFF | 1 << VcpuFeature.PSCI_0_2
_PMU = 1 << VcpuFeature.PMU_V3
_E2H0 = 1 << VcpuFeature.HAS_EL2_E2H0

SERVICES: Mapping[int, int] = {
    uapi.REG_STD_BMAP: 1,
    uapi.REG_STD_HYP_BMAP: 1,
    uapi.REG_VENDOR_HYP_BMAP: 3,
    uapi.REG_VENDOR_HYP_BMAP_2: 0,
}
"""KVM_REG_ARM_*_BMAP of a new VM: random numbers; stolen time; the vendor's own functions, the time
of day; none."""

SERVICE_OF: Mapping[int, tuple[int, int]] = {
    **dict.fromkeys(
        (
            Function.TRNG_VERSION, Function.TRNG_FEATURES, Function.TRNG_UUID, Function.TRNG_RND32,
            Function.TRNG_RND64,
        ),
        (uapi.REG_STD_BMAP, 1),
    ),
    Function.PV_TIME_FEATURES: (uapi.REG_STD_HYP_BMAP, 1),
    Function.PV_TIME_ST: (uapi.REG_STD_HYP_BMAP, 1),
    Function.VENDOR_UID: (uapi.REG_VENDOR_HYP_BMAP, 1),
    Function.KVM_FEATURES: (uapi.REG_VENDOR_HYP_BMAP, 1),
    Function.KVM_PTP: (uapi.REG_VENDOR_HYP_BMAP, 2),
}  # fmt: skip
"""Function id -> the bitmap and the bit of its service."""

POLICIES: Mapping[str, Policy] = {
    dialects.RFC.name: Policy(
        (psci.VERSION_1_1,),
        features=1,
        services=False,
        shows_cpu=False,
        unknown_register=0,
        vcpu_features=_BASIC,
    ),
    dialects.ANDROID.name: Policy(
        _PSCI[:3],
        features=3,
        services=True,
        shows_cpu=False,
        unknown_register=0,
        vcpu_features=_BASIC,
    ),
    dialects.UPSTREAM.name: Policy(
        _PSCI,
        features=3,
        services=True,
        shows_cpu=True,
        unknown_register=0x1DE7_EC7E_DBAD_C0DE,
        vcpu_features=_BASIC | _PMU | _E2H0,
    ),
}
"""By the dialect's name."""
