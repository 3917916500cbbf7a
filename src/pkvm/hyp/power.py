# SPDX-License-Identifier: GPL-2.0-or-later
"""Power states of a protected VM's vCPUs, as PSCI has them (Arm DEN 0022; facts §6.3).

EL2 alone decides them: a vCPU runs only where the guest turned it on. The host
is told, so that it runs the target; if it says that it cannot, the target is
OFF again, unless it has started already.
"""

from __future__ import annotations

from pkvm.arm64.psci import (
    ALREADY_ON,
    INTERNAL_FAILURE,
    INVALID_PARAMS,
    ON_PENDING,
    SUCCESS,
    Affinity,
)
from pkvm.hyp.vcpu import Vcpu
from pkvm.hyp.vm import Vm

AFFINITY_MASK = 0xFF_00FF_FFFF
"""Aff3, Aff2, Aff1, Aff0 of an MPIDR."""
_LEVEL_MASKS = (AFFINITY_MASK, 0xFF_00FF_FF00, 0xFF_00FF_0000, 0xFF_0000_0000)


def request_on(caller: Vcpu, mpidr: int, entry: int, context: int, endian: int) -> int:
    """CPU_ON: OFF becomes ON_PENDING, and the target will start at `entry` with `context` in X0
    and `endian` in SCTLR_EL1. Returns SUCCESS, or the PSCI error; nothing has changed then."""
    target = _find(caller.vm, mpidr)
    if target is None:
        return INVALID_PARAMS
    if target.power != Affinity.OFF:
        return ON_PENDING if target.power == Affinity.ON_PENDING else ALREADY_ON
    target.power = Affinity.ON_PENDING
    target.entry_pc = entry
    target.entry_context = context
    target.entry_endian = endian
    target.on_requested_by = caller.index
    caller.on_target = target.index
    return SUCCESS


def settle_on(caller: Vcpu, host_result: int) -> int:
    """The host's answer to the caller's CPU_ON: X0 for the guest. If the host failed and the
    target has not started, it goes back to OFF."""
    target = caller.vm.vcpus[caller.on_target]
    if host_result == SUCCESS or target is None:
        return SUCCESS
    waits = target.power == Affinity.ON_PENDING and target.on_requested_by == caller.index
    if not waits:
        return SUCCESS
    target.power = Affinity.OFF
    return INTERNAL_FAILURE


def affinity_info(vm: Vm, affinity: int, level: int) -> int:
    """AFFINITY_INFO: the state of the vCPUs that `affinity` names down to `level`."""
    if level >= len(_LEVEL_MASKS) or affinity & ~AFFINITY_MASK:
        return INVALID_PARAMS
    mask = _LEVEL_MASKS[level]
    states = {
        vcpu.power for vcpu in vm.vcpus if vcpu is not None and (vcpu.mpidr ^ affinity) & mask == 0
    }
    for state in (Affinity.ON, Affinity.ON_PENDING, Affinity.OFF):
        if state in states:
            return state
    return INVALID_PARAMS


def _find(vm: Vm, mpidr: int) -> Vcpu | None:
    """The vCPU whose affinity `mpidr`, any number, is exactly."""
    if mpidr & ~AFFINITY_MASK:
        return None
    for vcpu in vm.vcpus:
        if vcpu is not None and vcpu.mpidr & AFFINITY_MASK == mpidr:
            return vcpu
    return None
