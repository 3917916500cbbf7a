# SPDX-License-Identifier: GPL-2.0-or-later
"""What can happen in a pkvm machine, as small records, and who may listen.

This module is a leaf: every layer announces here, nothing here knows a layer.
An event is a `NamedTuple` because announcing must cost next to nothing on the
path of a guest's hypercall: one tuple, one call. What a recorder does with it
(count, write JSON lines, later: answer "why") is the recorder's business; see
`pkvm.trace`.

The field names below are the JSON schema of `pkvm run --trace` (docs/events.md):
renaming or removing one means a new `SCHEMA_VERSION`; adding a record or a
field at the end does not. Addresses are byte addresses: `pa` physical, `ipa`
intermediate physical (a guest's, the host's or a device's); `vm` is the EL2
handle (0x1000 + index), 0 where no VM is concerned; `vcpu` is its index, -1
where none is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

SCHEMA_VERSION = 1
NO_ADDRESS = -1
"""In an address field: the event is not about an address of that kind."""


class Transition(NamedTuple):
    """Pages changed owner or sharing (facts §3.3): `npages` granules from `pa`."""

    op: str
    """The transition's name: "host_donate_guest", "guest_share_host", ..."""
    pa: int
    npages: int
    vm: int = 0
    ipa: int = NO_ADDRESS


class Refusal(NamedTuple):
    """Somebody was told no: which operation, which check said so, and why in words."""

    op: str
    check: str
    """Stable name of the check that refused, e.g. "host_state", "ram_range"."""
    errno: int
    """Positive errno given to the caller; 0 where an SMCCC or PSCI code was given instead."""
    why: str
    vm: int = 0
    pa: int = NO_ADDRESS
    ipa: int = NO_ADDRESS


class GuestExit(NamedTuple):
    """EL2 handed a vCPU's exit to the host (not the exceptions EL2 served itself)."""

    vm: int
    vcpu: int
    reason: str
    """Exit class: "irq", "wfx", "hvc", "sysreg", "iabt", "dabt_mmio", "dabt", "hyp_req",
    "illegal"; of non-protected guests also "smc", and "trap" for anything else."""
    esr: int
    """ESR_EL2 as the host sees it (facts §5.4), not as the guest raised it."""
    ipa: int = NO_ADDRESS


class GuestTrap(NamedTuple):
    """EL2 served an exception of a guest by itself and re-entered it."""

    vm: int
    vcpu: int
    reason: str
    """"sysreg", "undef", "smc", ..."""
    esr: int


class GuestHypercall(NamedTuple):
    """A guest called EL2 by HVC or SMC (SMCCC); `result` is X0, unsigned, 64 bits."""

    vm: int
    vcpu: int
    function: int
    result: int


class HostHypercall(NamedTuple):
    """The host called EL2 (facts §9); `result` is X1 as the host gets it, signed."""

    name: str
    result: int


class HostAbort(NamedTuple):
    """The host CPU faulted in its stage-2: mapped lazily, or refused and injected."""

    ipa: int
    access: str
    """"read", "write" or "fetch"."""
    mapped: bool


class DmaFault(NamedTuple):
    """A DMA-capable device was stopped by its stage-2."""

    device: str
    ipa: int
    access: str


class SmmuEvent(NamedTuple):
    """The SMMU aborted a transaction and reported it to its software."""

    stream: int
    """StreamID of the device."""
    event: str
    """The event's name in the SMMU's architecture: "F_TRANSLATION", "C_BAD_STE", ..."""
    ipa: int
    access: str


class Tlbi(NamedTuple):
    """EL2 invalidated TLB entries by VMID (0 is the host)."""

    vmid: int
    ipa: int = NO_ADDRESS
    """The IPA invalidated; -1 for the whole VMID."""
    bus: str = "cpu"
    """Whose TLB: "cpu" (the host's and guests'), or "smmu" (that of the DMA masters)."""


class VmLife(NamedTuple):
    """A VM or vCPU came, changed or went at EL2: "reserve", "init_vm", "init_vcpu", "primary",
    "start_teardown", "finalize", "vcpu_on", "vcpu_off", ..."""

    what: str
    vm: int
    vcpu: int = -1


class HostSmc(NamedTuple):
    """A host CPU made an SMC that EL2 trapped (facts §9.4); `result` is X0, unsigned, 64 bits."""

    cpu: int
    """Index of the host CPU."""
    function: int
    """X0 as the host gave it, unsigned, 64 bits."""
    result: int
    forwarded: bool
    """Whether EL3 got to see the call, as it was or changed by EL2."""


class CpuPower(NamedTuple):
    """A host CPU's power changed: "on", "off", "suspend" or "resume"."""

    cpu: int
    what: str


class SecureMemory(NamedTuple):
    """The secure world took memory or gave it back: "share", "lend", "donate" or "reclaim"."""

    what: str
    handle: int
    """The secure world's name for the memory."""
    npages: int


class Ioctl(NamedTuple):
    """A system call of the VMM at the Kernel seam ended: `result` is its value, or minus errno."""

    fd: int
    request: str
    result: int


class Message(NamedTuple):
    """A line that a kernel would print: `source` is "host", "el2" or a device's name."""

    source: str
    text: str


Event = (
    Transition
    | Refusal
    | GuestExit
    | GuestTrap
    | GuestHypercall
    | HostHypercall
    | HostAbort
    | DmaFault
    | SmmuEvent
    | Tlbi
    | VmLife
    | HostSmc
    | CpuPower
    | SecureMemory
    | Ioctl
    | Message
)


KINDS: dict[type[Event], str] = {
    Transition: "transition",
    Refusal: "refusal",
    GuestExit: "exit",
    GuestTrap: "trap",
    GuestHypercall: "hypercall",
    HostHypercall: "host_hypercall",
    HostAbort: "host_abort",
    DmaFault: "dma_fault",
    SmmuEvent: "smmu_event",
    Tlbi: "tlbi",
    VmLife: "life",
    HostSmc: "host_smc",
    CpuPower: "cpu_power",
    SecureMemory: "secure_memory",
    Ioctl: "ioctl",
    Message: "message",
}
"""The word for each record in JSON and in counts."""


class Recorder(Protocol):
    """Whoever wants to know. `record` is called from the thread in which the event happened,
    often with a lock of EL2's held: it must be quick, must not call back, must not raise."""

    def record(self, event: Event, /) -> None:
        """Take note of `event`."""
        ...


class NullRecorder:
    """The recorder that does nothing: for runs of which nobody asks, and what recording is
    measured against."""

    def __init__(self) -> None:
        # A queue that keeps nothing: C code, the cheapest thing that takes an event.
        self.record: Callable[[Event], None] = deque[Event](maxlen=0).append
