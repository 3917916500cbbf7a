# SPDX-License-Identifier: GPL-2.0-or-later
"""Stolen time: how long a vCPU waited for the CPU, told to its guest (Arm DEN 0057; KVM's
Documentation/virt/kvm/devices/vcpu.rst, group KVM_ARM_VCPU_PVTIME_CTRL).

The VMM names for each vCPU an IPA, in memory of the guest's, where the structure
is to be; the guest asks by PV_TIME_ST where it is. From then on the host adds to it,
each time the vCPU gets the CPU back, what the vCPU has waited for its turn. The
host writes as the VMM would: in a protected guest's private page nothing arrives.
"""

from __future__ import annotations

import errno

from pkvm.arm64.pvtime import STOLEN_NS, STOLEN_TIME
from pkvm.arm64.smccc import NOT_SUPPORTED, SUCCESS, Function
from pkvm.host import dirty_log
from pkvm.host.argument import Argument
from pkvm.host.vcpu import Vcpu
from pkvm.uapi.kvm import DEVICE_ATTR, PVTIME_CTRL, PVTIME_IPA, Ioctl

_IPA_BYTES = 8


def attribute(vcpu: Vcpu, request: int, argument: Argument) -> int:
    """KVM_SET, GET or HAS_DEVICE_ATTR of a vCPU: this is all the attributes there are. Raises
    ENXIO for others, EFAULT; of SET EINVAL for an IPA that is not aligned to 64 bytes or not
    writable memory of the VM's, EEXIST for a second one."""
    _, group, attr, address = DEVICE_ATTR.unpack(argument.read(DEVICE_ATTR.size))
    host = vcpu.vm.host
    if group != PVTIME_CTRL or attr != PVTIME_IPA or not host.policy.services:
        raise OSError(errno.ENXIO, f"a vCPU has no attribute {attr:#x} in group {group}")
    if request == Ioctl.GET_DEVICE_ATTR:
        host.users.copy_to_user(address, vcpu.stolen_ipa.to_bytes(_IPA_BYTES, "little"))
    elif request == Ioctl.SET_DEVICE_ATTR:
        value = host.users.copy_from_user(address, _IPA_BYTES)
        _set(vcpu, int.from_bytes(value, "little"))
    return 0


def _set(vcpu: Vcpu, ipa: int) -> None:
    if ipa % STOLEN_TIME.size:
        raise OSError(errno.EINVAL, f"IPA {ipa:#x} is not aligned to {STOLEN_TIME.size} bytes")
    if vcpu.has_stolen_time:
        raise OSError(errno.EEXIST, f"the structure is at IPA {vcpu.stolen_ipa:#x}")
    if _user(vcpu, ipa) is None:
        raise OSError(errno.EINVAL, f"IPA {ipa:#x} is not in memory that the guest can write")
    vcpu.stolen_ipa = ipa


def call(vcpu: Vcpu, function: int, argument: int) -> int | None:
    """X0 of PV_TIME_FEATURES and PV_TIME_ST; None for any other function."""
    if function == Function.PV_TIME_FEATURES:
        known = argument in (Function.PV_TIME_FEATURES, Function.PV_TIME_ST)
        return SUCCESS if known and vcpu.has_stolen_time else NOT_SUPPORTED
    if function != Function.PV_TIME_ST:
        return None
    if not vcpu.has_stolen_time:
        return NOT_SUPPORTED
    vcpu.stolen_seen_ns = vcpu.runner.waited_ns
    _write(vcpu, 0, STOLEN_TIME.pack(0, 0, 0))
    return vcpu.stolen_ipa


def record(vcpu: Vcpu) -> None:
    """The vCPU has the CPU again: add what it waited since it was last told. Nothing happens while
    the memory is not the host's to write."""
    user = _user(vcpu, vcpu.stolen_ipa)
    if user is None:
        return
    users = vcpu.vm.host.users
    try:
        before = int.from_bytes(users.copy_from_user(user + STOLEN_NS, 8), "little")
    except OSError:
        return
    waited = vcpu.runner.waited_ns
    stolen = before + waited - vcpu.stolen_seen_ns & (1 << 64) - 1
    vcpu.stolen_seen_ns = waited
    _write(vcpu, STOLEN_NS, stolen.to_bytes(8, "little"))


def _write(vcpu: Vcpu, offset: int, data: bytes) -> None:
    """Write to the structure, if it is the host's to write."""
    user = _user(vcpu, vcpu.stolen_ipa)
    if user is None:
        return
    try:
        vcpu.vm.host.users.copy_to_user(user + offset, data)
        dirty_log.mark(vcpu.vm, vcpu.stolen_ipa)
    except OSError:
        # The guest has not shared the page, or the VMM has unmapped it: it goes without.
        return


def _user(vcpu: Vcpu, ipa: int) -> int | None:
    """The user address of an IPA in memory that the guest can write."""
    slot = vcpu.vm.slots.at(ipa)
    if slot is None or slot.readonly:
        return None
    return slot.user_of(ipa)
