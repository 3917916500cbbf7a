# SPDX-License-Identifier: GPL-2.0-or-later
"""Why the model and a Linux 7.3 kernel may differ: data for `pkvm.check.comparison`.

An explanation that no longer explains anything is an error, and all of them together may speak for
no more than one observation in twenty.
"""

from __future__ import annotations

from pkvm.check.comparison import Explanation

EXPLANATIONS: tuple[Explanation, ...] = (
    Explanation(
        topic="sharing",
        scenario="bad_arguments",
        call="guest HVC",
        arguments="0xc6000003, 0x10000000000",
        model="x0=0xfffffffffffffffd *",
        kernel="guest exception, ESR=0x96000010 *",
        reason="the guest's address space ends at 2^40 here and at 2^44 on a Cortex-A72: there the "
        "address is one without memory",
        source="Arm ARM, ID_AA64MMFR0_EL1.PARange; KVM API 4.2, the IPA size in protected mode",
    ),
    Explanation(
        topic="fetch",
        scenario="bad_unaligned",
        call="guest branch",
        arguments="ram+*",
        model="guest exception, ESR=0x2000000 *",
        kernel="guest exception, ESR=0x8a000000 *",
        reason="libunicorn does not check the PC's alignment; it executes what it finds there",
        source="Arm ARM D1.3.6, PC alignment checking",
    ),
)
"""What is known. The first one that fits counts."""
