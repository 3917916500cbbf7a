# SPDX-License-Identifier: GPL-2.0-or-later
"""True random numbers for protected guests: TRNG 1.0 (Arm DEN 0098; facts §6.4).

EL2 has no source of its own here. It checks the call, shows the host how many
bits are wanted, and gives the guest so many of the host's bits: of the host
comes the entropy and nothing else. It is only as secret as the host keeps it;
a guest that needs secrets from the host mixes in what it brought itself.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64 import smccc
from pkvm.arm64.smccc import NOT_SUPPORTED, SUCCESS, Function
from pkvm.hyp.exits import ExitClass, Exits
from pkvm.hyp.vcpu import Vcpu

UUID = (0x5C8E_6F1B, 0x4A0D_93E7, 0x9E41_B6C2, 0xD077_1A35)
"""X0-X3 of TRNG_UUID: this source, and no other one."""
_W_MASK = 0xFFFF_FFFF
FEATURES = frozenset(
    {
        Function.TRNG_VERSION, Function.TRNG_FEATURES, Function.TRNG_UUID, Function.TRNG_RND32,
        Function.TRNG_RND64,
    }
)  # fmt: skip
_MAX_BITS = {
    Function.TRNG_RND32: smccc.TRNG_MAX_BITS_32,
    Function.TRNG_RND64: smccc.TRNG_MAX_BITS_64,
}
Results = tuple[int, int, int, int]


class Trng:
    """The calls; `table` has them by function id."""

    def __init__(self, exits: Exits) -> None:
        self._exits = exits
        self.table: dict[int, Callable[[Vcpu, int, int, int], Results | None]] = {
            Function.TRNG_VERSION: self._version,
            Function.TRNG_FEATURES: self._features,
            Function.TRNG_UUID: self._uuid,
            Function.TRNG_RND32: self._rnd32,
            Function.TRNG_RND64: self._rnd64,
        }

    def _version(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return (smccc.TRNG_VERSION_1_0, 0, 0, 0)

    def _features(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return (SUCCESS if x1 & _W_MASK in FEATURES else NOT_SUPPORTED, 0, 0, 0)

    def _uuid(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return UUID

    def _rnd32(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        return self._rnd(vcpu, Function.TRNG_RND32, x1 & _W_MASK)

    def _rnd64(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        return self._rnd(vcpu, Function.TRNG_RND64, x1)

    def _rnd(self, vcpu: Vcpu, function: Function, bits: int) -> Results | None:
        if not 0 < bits <= _MAX_BITS[function]:
            return (smccc.TRNG_INVALID_PARAMETERS, 0, 0, 0)
        vcpu.exit_function = function
        self._exits.publish_call(vcpu, ExitClass.TRNG)
        return None
