# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's part of a dialect: what RFC, Android and upstream do differently, as data (facts §2).

What a user sees of a dialect stands in `uapi`, the host's part in `host`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pkvm.arm64.psci import VERSION_1_1
from pkvm.arm64.smccc import VERSION_1_2, Function
from pkvm.hyp.memory_policy import ANDROID_MEMORY, RFC_MEMORY, UPSTREAM_MEMORY, MemoryPolicy


class Unmapped(Enum):
    """What becomes of MEM_SHARE of a frame that has no page (facts §6.5)."""

    REFUSED = "refused"
    """INVALID_PARAMETER: the guest has all its memory from the start."""
    FAULT = "fault"
    """The host sees a stage-2 fault there, and the HVC is executed again."""
    REQUEST = "request"
    """The host is asked for the page (`HypRequest.MAP`), and the HVC is executed again."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """How a dialect keeps a protected vCPU's registers from the host: EL2 resets it, answers its
    SMCCC and PSCI calls, and publishes only what `exits.RULES` lets."""

    smccc_version: int
    """What SMCCC_VERSION tells a protected guest."""
    psci_version: int
    """What PSCI_VERSION tells a protected guest."""
    trng: bool
    """TRNG 1.0, with the host's entropy."""
    needs_firmware: bool
    """A VM without guest firmware does not run. Else its primary starts at the host's PC."""
    primary_registers: int
    """How many of X0-X30, from X0 on, the primary keeps as the VMM set them; the others are 0.
    Without firmware it keeps X0 alone."""
    primary_at_init: bool
    """INIT_VCPU decides by the host's MP state who starts without a CPU_ON: of a VM with firmware
    one vCPU. Else it is the first to enter."""
    boot_protocol: int
    """The primary's X15."""
    stack_at_end: bool
    """The primary's SP_EL1 is the end of the firmware's range, not 0."""
    firmware_enrolls: bool
    """A VM with firmware has the MMIO guard from the start."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One dialect at EL2."""

    name: str
    isolation: Isolation | None
    """None: the host reads and writes a protected vCPU's registers and serves its calls; memory
    alone is protected."""
    vendor_calls: frozenset[Function]
    """KVM's calls that EL2 serves to a protected guest, KVM_FEATURES itself among them: exactly
    those that KVM_FEATURES reports."""
    device_calls: frozenset[Function]
    """KVM's calls about devices that the guest was given, which KVM_FEATURES does not report. None:
    the host gives no devices away."""
    has_range: bool
    """MEM_SHARE and MEM_UNSHARE take a number of granules; else one, and X2 must be 0."""
    unmapped_share: Unmapped
    memory: MemoryPolicy
    """Ownership of memory."""


_BASIC_CALLS = frozenset(
    {Function.KVM_FEATURES, Function.HYP_MEMINFO, Function.MEM_SHARE, Function.MEM_UNSHARE}
)

RFC = Policy(
    name="rfc",
    isolation=Isolation(
        smccc_version=VERSION_1_2,
        psci_version=VERSION_1_1,
        trng=True,
        needs_firmware=True,
        primary_registers=15,
        primary_at_init=False,
        boot_protocol=0,
        stack_at_end=True,
        firmware_enrolls=False,
    ),
    vendor_calls=_BASIC_CALLS,
    device_calls=frozenset(),
    has_range=True,
    unmapped_share=Unmapped.REFUSED,
    memory=RFC_MEMORY,
)
"""The mail names no hypercall: these are what a guest cannot do without."""

ANDROID = Policy(
    name="android",
    isolation=Isolation(
        smccc_version=VERSION_1_2,
        psci_version=VERSION_1_1,
        trng=True,
        needs_firmware=False,
        primary_registers=15,
        primary_at_init=True,
        boot_protocol=0,
        stack_at_end=False,
        firmware_enrolls=True,
    ),
    vendor_calls=_BASIC_CALLS
    | {
        Function.MMIO_GUARD_INFO,
        Function.MMIO_GUARD_ENROLL,
        Function.MMIO_GUARD_MAP,
        Function.MMIO_GUARD_UNMAP,
        Function.MEM_RELINQUISH,
        Function.MMIO_RGUARD_MAP,
        Function.MMIO_RGUARD_UNMAP,
    },
    device_calls=frozenset({Function.DEV_REQ_DMA, Function.PVIOMMU_OP, Function.DEV_REQ_MMIO}),
    has_range=True,
    unmapped_share=Unmapped.REQUEST,
    memory=ANDROID_MEMORY,
)

UPSTREAM = Policy(
    name="upstream",
    isolation=None,
    vendor_calls=_BASIC_CALLS,
    device_calls=frozenset(),
    has_range=False,
    unmapped_share=Unmapped.FAULT,
    memory=UPSTREAM_MEMORY,
)

POLICIES = {policy.name: policy for policy in (RFC, ANDROID, UPSTREAM)}
"""By name."""
