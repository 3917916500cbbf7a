# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's part of a dialect: what RFC, Android and upstream do differently, as data.

What a user sees of a dialect stands in `uapi`, the host's part in `host`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkvm.arm64.psci import VERSION_1_1
from pkvm.arm64.smccc import VERSION_1_2, Function
from pkvm.hyp.memory_policy import RFC_MEMORY, MemoryPolicy


@dataclass(frozen=True, slots=True)
class Policy:
    """One dialect at EL2."""

    name: str
    smccc_version: int
    """What SMCCC_VERSION tells a protected guest."""
    psci_version: int
    """What PSCI_VERSION tells a protected guest."""
    vendor_calls: frozenset[Function]
    """KVM's calls that a protected guest may make, KVM_FEATURES itself among them: exactly those
    that KVM_FEATURES reports."""
    primary_registers: int
    """How many of X0-X30, from X0 on, the primary keeps as the VMM set them; the others are 0."""
    boot_protocol: int
    """The primary's X15."""
    memory: MemoryPolicy
    """Ownership of memory."""


RFC = Policy(
    name="rfc",
    smccc_version=VERSION_1_2,
    psci_version=VERSION_1_1,
    vendor_calls=frozenset(
        {
            Function.KVM_FEATURES,
            Function.HYP_MEMINFO,
            Function.MEM_SHARE,
            Function.MEM_UNSHARE,
        }
    ),
    primary_registers=15,
    boot_protocol=0,
    memory=RFC_MEMORY,
)
