# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's part of a dialect, beside what its users see (`pkvm.uapi.dialects`): what KVM answers
to a guest whose calls come to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pkvm.arm64 import psci
from pkvm.uapi import dialects


@dataclass(frozen=True, slots=True)
class Policy:
    """One dialect's KVM."""

    psci_versions: tuple[int, ...]
    """What KVM_REG_ARM_PSCI_VERSION may be; the last one is the default."""
    features: int
    """KVM_FEATURES of a non-protected guest."""
    services: bool
    """Whether there are TRNG, PTP and stolen time."""


_PSCI = (
    psci.VERSION_0_2,
    psci.VERSION_1_0,
    psci.VERSION_1_1,
    psci.VERSION_1_2,
    psci.VERSION_1_3,
)

POLICIES: Mapping[str, Policy] = {
    dialects.RFC.name: Policy((psci.VERSION_1_1,), features=1, services=False),
    dialects.ANDROID.name: Policy(_PSCI[:3], features=3, services=True),
    dialects.UPSTREAM.name: Policy(_PSCI, features=3, services=True),
}
"""By the dialect's name."""
