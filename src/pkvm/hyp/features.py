# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected guest gets of its CPU, and why not the rest, in words (facts §7).

The decision stands in `id_registers` and `traps`; here is its explanation, and
nothing else depends on it. What the guest gets is worked out from the same
limits that EL2 answers with.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from pkvm.arm64 import registers as r
from pkvm.hyp.id_registers import guest_id_registers
from pkvm.machine.cpu.engine import CpuEngine


class Given(Enum):
    """What becomes of a feature."""

    WHOLE = "given"
    PART = "in part"
    HIDDEN = "hidden"
    ABSENT = "not in this CPU"


class Feature(NamedTuple):
    """A field of an ID register."""

    name: str
    register: r.SysReg
    lo: int
    none: int = 0
    """The value that says that the CPU has not got it."""
    why: str = ""
    """Why a guest does not get it, or not all of it."""
    trapped: str = ""
    """What happens to a guest that uses it nevertheless."""


class Answer(NamedTuple):
    """A feature on this CPU."""

    feature: Feature
    given: Given
    hardware: int
    guest: int
    """The field's value of either."""


_UNDEFINED = "UNDEFINED"
_STATE = "its state would have to be switched and kept from the host"
_HYP = "it is for hypervisors, and a guest cannot be one"
_TRANSLATION = "stage 1 has only what EL2 knows to be safe beside its own stage 2"
_OBSERVES = "it observes what runs, and EL2 does not share it between host and guest"

FEATURES: tuple[Feature, ...] = (
    Feature("floating point", r.ID_AA64PFR0_EL1, 16, 0xF),
    Feature("Advanced SIMD", r.ID_AA64PFR0_EL1, 20, 0xF),
    Feature("GIC system registers", r.ID_AA64PFR0_EL1, 24),
    Feature("RAS", r.ID_AA64PFR0_EL1, 28),
    Feature("SVE", r.ID_AA64PFR0_EL1, 32, 0, _STATE, _UNDEFINED),
    Feature("secure EL2", r.ID_AA64PFR0_EL1, 36, 0, _HYP),
    Feature("MPAM", r.ID_AA64PFR0_EL1, 40, 0, _OBSERVES, _UNDEFINED),
    Feature("activity monitors", r.ID_AA64PFR0_EL1, 44, 0, _OBSERVES, _UNDEFINED),
    Feature("DIT", r.ID_AA64PFR0_EL1, 48),
    Feature("BTI", r.ID_AA64PFR1_EL1, 0),
    Feature("SSBS", r.ID_AA64PFR1_EL1, 4),
    Feature("MTE", r.ID_AA64PFR1_EL1, 8, 0, "tags of a page would outlive its owner", _UNDEFINED),
    Feature("AES", r.ID_AA64ISAR0_EL1, 4),
    Feature("SHA1", r.ID_AA64ISAR0_EL1, 8),
    Feature("SHA2", r.ID_AA64ISAR0_EL1, 12),
    Feature("CRC32", r.ID_AA64ISAR0_EL1, 16),
    Feature("atomics (LSE)", r.ID_AA64ISAR0_EL1, 20),
    Feature("RDM", r.ID_AA64ISAR0_EL1, 28),
    Feature("SHA3", r.ID_AA64ISAR0_EL1, 32),
    Feature("SM3", r.ID_AA64ISAR0_EL1, 36),
    Feature("SM4", r.ID_AA64ISAR0_EL1, 40),
    Feature("dot product", r.ID_AA64ISAR0_EL1, 44),
    Feature("FHM", r.ID_AA64ISAR0_EL1, 48),
    Feature("flag manipulation", r.ID_AA64ISAR0_EL1, 52),
    Feature("TLB ranges", r.ID_AA64ISAR0_EL1, 56),
    Feature("random numbers (RNDR)", r.ID_AA64ISAR0_EL1, 60),
    Feature("DC CVAP", r.ID_AA64ISAR1_EL1, 0),
    Feature(
        "pointer authentication", r.ID_AA64ISAR1_EL1, 4, 0,
        "no vCPU asked for it (KVM_ARM_VCPU_PTRAUTH_ADDRESS and _GENERIC)", _UNDEFINED,
    ),
    Feature(
        "generic authentication", r.ID_AA64ISAR1_EL1, 24, 0,
        "no vCPU asked for it (KVM_ARM_VCPU_PTRAUTH_ADDRESS and _GENERIC)", _UNDEFINED,
    ),
    Feature("JSCVT", r.ID_AA64ISAR1_EL1, 12),
    Feature("complex numbers (FCMA)", r.ID_AA64ISAR1_EL1, 16),
    Feature("LRCPC", r.ID_AA64ISAR1_EL1, 20),
    Feature("FRINTTS", r.ID_AA64ISAR1_EL1, 32),
    Feature("SB", r.ID_AA64ISAR1_EL1, 36),
    Feature("prediction restriction", r.ID_AA64ISAR1_EL1, 40),
    Feature("BF16", r.ID_AA64ISAR1_EL1, 44),
    Feature("I8MM", r.ID_AA64ISAR1_EL1, 52),
    Feature(
        "physical addresses", r.ID_AA64MMFR0_EL1, 0, -1, "a VM's IPA space has 40 bits",
        "an abort beyond them",
    ),
    Feature("16-bit ASIDs", r.ID_AA64MMFR0_EL1, 4),
    Feature("big-endian data", r.ID_AA64MMFR0_EL1, 8),
    Feature("hardware access and dirty flags", r.ID_AA64MMFR1_EL1, 0),
    Feature("virtualization host extensions", r.ID_AA64MMFR1_EL1, 8, 0, _HYP, _UNDEFINED),
    Feature("hierarchical permission disables", r.ID_AA64MMFR1_EL1, 12),
    Feature(
        "limited ordering regions", r.ID_AA64MMFR1_EL1, 16, 0,
        "their registers hold physical addresses", _UNDEFINED,
    ),
    Feature("PAN", r.ID_AA64MMFR1_EL1, 20),
    Feature("stage-2 execute-never by level", r.ID_AA64MMFR1_EL1, 28, 0, _HYP),
    Feature("common not private translations", r.ID_AA64MMFR2_EL1, 0),
    Feature("UAO", r.ID_AA64MMFR2_EL1, 4),
    Feature("load/store multiple atomicity", r.ID_AA64MMFR2_EL1, 8, 0, _TRANSLATION),
    Feature("large virtual addresses", r.ID_AA64MMFR2_EL1, 16, 0, _TRANSLATION),
    Feature("nested virtualization", r.ID_AA64MMFR2_EL1, 24, 0, _HYP, _UNDEFINED),
    Feature("small translation tables", r.ID_AA64MMFR2_EL1, 28, 0, _TRANSLATION),
    Feature("unaligned atomics (AT)", r.ID_AA64MMFR2_EL1, 32),
    Feature("ID space traps", r.ID_AA64MMFR2_EL1, 36),
    Feature("stage-2 forced write-back", r.ID_AA64MMFR2_EL1, 40, 0, _HYP),
    Feature("TTL hints", r.ID_AA64MMFR2_EL1, 48),
    Feature("BBM levels", r.ID_AA64MMFR2_EL1, 52),
    Feature("E0PD", r.ID_AA64MMFR2_EL1, 60),
    Feature(
        "AArch32 at EL0", r.ID_AA64PFR0_EL1, 0, 1,
        "EL2 runs guests in AArch64 state alone", "the vCPU never runs again",
    ),
    Feature(
        "debug registers", r.ID_AA64DFR0_EL1, 0, 0, _OBSERVES,
        "breakpoint 0 and the locks read as zero; others are UNDEFINED",
    ),
    Feature("trace", r.ID_AA64DFR0_EL1, 4, 0, _OBSERVES, _UNDEFINED),
    Feature("performance monitors (PMU)", r.ID_AA64DFR0_EL1, 8, 0, _OBSERVES, _UNDEFINED),
    Feature("statistical profiling (SPE)", r.ID_AA64DFR0_EL1, 32, 0, _OBSERVES, _UNDEFINED),
    Feature("self-hosted trace filter", r.ID_AA64DFR0_EL1, 40, 0, _OBSERVES, _UNDEFINED),
)  # fmt: skip


def explain(engine: CpuEngine, *, ptrauth: bool = False) -> list[Answer]:
    """Every feature on this CPU, for a guest with or without pointer authentication."""
    values = guest_id_registers(engine, ptrauth=ptrauth)
    return [_answer(engine, feature, values.get(feature.register, 0)) for feature in FEATURES]


def _answer(engine: CpuEngine, feature: Feature, guest: int) -> Answer:
    try:
        hardware = engine.read_sysreg(feature.register) >> feature.lo & 0xF
    except KeyError:
        hardware = feature.none
    guest = guest >> feature.lo & 0xF
    if hardware == feature.none:
        given = Given.ABSENT
    elif guest == hardware:
        given = Given.WHOLE
    elif guest == feature.none or not guest:
        given = Given.HIDDEN
    else:
        given = Given.PART
    return Answer(feature, given, hardware, guest)
