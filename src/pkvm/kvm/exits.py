# SPDX-License-Identifier: GPL-2.0-or-later
"""Why KVM_RUN returned (KVM API section 5, `exit_reason`), as records to `match` on.

Named tuples: immutable, matched by field name, and cheap enough for the path of
a device access, which makes one for every access.
"""

from __future__ import annotations

from typing import NamedTuple

from pkvm.uapi.kvm import ExitReason, Run
from pkvm.uapi.kvm import SystemEvent as SystemEventType


class Mmio(NamedTuple):
    """KVM_EXIT_MMIO: the guest touched an address where it has no memory."""

    address: int
    """IPA of the first byte."""
    size: int
    """Bytes: 1, 2, 4 or 8."""
    data: int
    """What a write stores, as a little-endian number; 0 for a read."""
    is_write: bool
    """False for a read, which `Vcpu.complete` answers."""


class SystemEvent(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: the guest asked for the end of the machine (PSCI)."""

    kind: str
    """"shutdown", "reset", "crash" or "suspend"; the number in decimal if it is another."""
    data: tuple[int, ...] = ()
    """The `ndata` words that came with it: flags (RESET2 and OFF2 set bit 0)."""


class Intr(NamedTuple):
    """KVM_EXIT_INTR: KVM_RUN ended with EINTR, by a kick or `immediate_exit`; run again."""


class FailEntry(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: the vCPU cannot enter the guest, such as after AArch32 state was seen
    in a protected guest."""

    reason: int
    """`hardware_entry_failure_reason`."""
    cpu: int


class InternalError(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR: the kernel could not go on with this guest."""

    suberror: int


class Unknown(NamedTuple):
    """Any other exit reason, by its number."""

    reason: int


Exit = Mmio | SystemEvent | Intr | FailEntry | InternalError | Unknown

INTR = Intr()
_EVENT_NAMES = {int(event): event.name.lower() for event in SystemEventType}


def decode(run: memoryview) -> Exit:
    """The exit that `run`, a vCPU's struct kvm_run, describes; all but KVM_EXIT_MMIO, which
    `Vcpu.run` decodes on its own."""
    reason = int.from_bytes(run[Run.EXIT_REASON : Run.EXIT_REASON + 4], "little")
    if reason == ExitReason.SYSTEM_EVENT:
        kind, count, *data = Run.SYSTEM_EVENT.unpack_from(run, Run.UNION)
        return SystemEvent(_EVENT_NAMES.get(kind, str(kind)), tuple(data[: min(count, 16)]))
    if reason == ExitReason.INTR:
        return INTR
    if reason == ExitReason.FAIL_ENTRY:
        return FailEntry(*Run.FAIL_ENTRY.unpack_from(run, Run.UNION))
    if reason == ExitReason.INTERNAL_ERROR:
        return InternalError(Run.INTERNAL_ERROR.unpack_from(run, Run.UNION)[0])
    return Unknown(reason)
