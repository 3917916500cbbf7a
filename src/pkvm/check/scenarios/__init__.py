# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios: what a VMM and its guest can do and meet, on the model and on a real kernel alike.

A topic is a module with a TITLE; its functions `good_*` and `bad_*` get a `bench.Bench` and record
what they see. Standard library only: an arm64 host may have neither numpy nor Unicorn.

`python -m pkvm.check.scenarios --backend /dev/kvm` runs them and prints what they saw as JSON.
"""

from __future__ import annotations

TOPICS = (
    "vm_types", "memory_slots", "vcpus", "secondary_start", "psci", "smccc", "sysregs", "one_reg",
    "events", "sharing", "host_access", "forced_reclaim", "backing", "remapping", "aliasing",
    "mmio", "no_syndrome", "fetch", "limits", "destroying",
)  # fmt: skip
"""The topics, by the names of their modules, in the order of a run."""
PREFIXES = ("good_", "bad_")
"""Scenarios of what is allowed, and of what is refused."""
