# SPDX-License-Identifier: GPL-2.0-or-later
"""Services of KVM for guests whose calls come to the host: random numbers and the time of day
(TRNG, Arm DEN 0098; PTP, Documentation/virt/kvm/arm/ptp_kvm.rst).
"""

from __future__ import annotations

import time

from pkvm.arm64 import smccc
from pkvm.arm64.smccc import NOT_SUPPORTED, SUCCESS, Function
from pkvm.host.host import Host
from pkvm.host.ports import NS_PER_TICK
from pkvm.hyp.abi import HostVcpu

Results = tuple[int, int, int, int]
"""X0 to X3."""

_TRNG_UUID = (0x00E0_210D, 0xEB11_8443, 0x4452_7080, 0x4C5A_4E55)
"""KVM's: 0d21e000-4384-11eb-8070-5244554e5a4c."""
_TRNG = (
    Function.TRNG_VERSION, Function.TRNG_FEATURES, Function.TRNG_UUID, Function.TRNG_RND32,
    Function.TRNG_RND64,
)  # fmt: skip
_PTP_COUNTERS = (0, 1)
"""KVM_PTP's argument: the virtual or the physical counter, which are the same here."""
_MASK32 = (1 << 32) - 1
_ENTROPY_BYTES = 24


def answer(host: Host, function: int, x1: int) -> Results | None:
    """X0 to X3 of a call of these services; None if it is none of them."""
    if function == Function.KVM_PTP:
        return _time_of_day(host) if x1 in _PTP_COUNTERS else _alone(NOT_SUPPORTED)
    if function == Function.TRNG_VERSION:
        return _alone(smccc.TRNG_VERSION_1_0)
    if function == Function.TRNG_FEATURES:
        return _alone(SUCCESS if x1 & _MASK32 in _TRNG else NOT_SUPPORTED)
    if function == Function.TRNG_UUID:
        return _TRNG_UUID
    if function == Function.TRNG_RND32:
        return _random(host, x1 & _MASK32, smccc.TRNG_MAX_BITS_32)
    if function == Function.TRNG_RND64:
        return _random(host, x1, smccc.TRNG_MAX_BITS_64)
    return None


def entropy_for_el2(host: Host, page: int) -> None:
    """Put random words where EL2 takes them from, in the page of a vCPU at PA `page`."""
    host.bus.write(page + HostVcpu.ENTROPY, host.entropy(_ENTROPY_BYTES))


def _alone(x0: int) -> Results:
    return x0, 0, 0, 0


def _random(host: Host, bits: int, most: int) -> Results:
    """`bits` random bits, the lowest in X3; a register holds a third of `most`."""
    if bits > most:
        return _alone(smccc.TRNG_INVALID_PARAMETERS)
    width = most // 3
    mask = (1 << width) - 1
    number = int.from_bytes(host.entropy(_ENTROPY_BYTES), "little") & (1 << bits) - 1
    return SUCCESS, number >> 2 * width, number >> width & mask, number & mask


def _time_of_day(host: Host) -> Results:
    """Nanoseconds since the Epoch and the counter at the same moment, high words first. With the
    virtual clock the machine starts at the Epoch."""
    now = host.clock.now_ns()
    wall = now if host.clock.virtual else time.time_ns()
    count = now // NS_PER_TICK
    return wall >> 32 & _MASK32, wall & _MASK32, count >> 32 & _MASK32, count & _MASK32
