# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected guest may ask of EL2 by HVC (SMCCC; facts §6.4, §6.5).

Function ids must be exactly those of the tables, 32- or 64-bit form; the SVE
hint is ignored, as are the upper half of X0 and the HVC's immediate. Everything
else is NOT_SUPPORTED: no call of a protected guest's reaches the host but those
of PSCI that exit to it.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64 import smccc
from pkvm.arm64.bits import MASK64
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS, Function
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.events import Recorder, Refusal
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.exits import Exits
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.policy import Policy
from pkvm.hyp.psci import Call, Psci
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

Results = tuple[int, int, int, int]
"""X0-X3."""
Service = Callable[[Vcpu, int, int, int], Results | None]
"""(vcpu, X1, X2, X3) -> X0-X3; None: the vCPU exited to the host."""

FUNCTION_MASK = 0xFFFF_FFFF & ~smccc.SVE_HINT
"""What counts of X0."""
_W_MASK = 0xFFFF_FFFF
_BITMAP_BITS = 32
_HAS_RANGE = 1
"""HYP_MEMINFO's X1: MEM_SHARE and MEM_UNSHARE take a number of granules."""
UNSUPPORTED: Results = (NOT_SUPPORTED, 0, 0, 0)
"""The answer to every function id that no service has."""
_INVALID: Results = (INVALID_PARAMETER, 0, 0, 0)
_ARCH_FEATURES = frozenset({Function.SMCCC_VERSION, Function.SMCCC_ARCH_FEATURES})
_NUMBER_MASK = 0xFFFF


class GuestCalls:
    """The services of one CPU's guests, by function id; `vector` calls them."""

    def __init__(
        self,
        engine: CpuEngine,
        mem: MemProtect,
        exits: Exits,
        recorder: Recorder,
        policy: Policy,
    ) -> None:
        self._engine = engine
        self._mem = mem
        self._exits = exits
        self._record = recorder.record
        self._policy = policy
        vendor: dict[int, Service] = {
            Function.KVM_FEATURES: self._kvm_features,
            Function.HYP_MEMINFO: self._hyp_meminfo,
            Function.MEM_SHARE: self._mem_share,
            Function.MEM_UNSHARE: self._mem_unshare,
        }
        psci = Psci(engine, exits, recorder, policy)
        self.services: dict[int, Service] = {
            Function.SMCCC_VERSION: self._smccc_version,
            Function.SMCCC_ARCH_FEATURES: self._arch_features,
            Function.VENDOR_UID: self._vendor_uid,
        }
        for function in policy.vendor_calls:
            self.services[function] = vendor[function]
        for number, call in psci.table.items():
            self.services[number] = _as_service(call)

    def _smccc_version(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return (self._policy.smccc_version, 0, 0, 0)

    def _arch_features(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return (SUCCESS if x1 & _W_MASK in _ARCH_FEATURES else NOT_SUPPORTED, 0, 0, 0)

    def _vendor_uid(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return smccc.VENDOR_HYP_UID

    def _kvm_features(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        bitmap = sum(1 << (function & _NUMBER_MASK) for function in self._policy.vendor_calls)
        word = (1 << _BITMAP_BITS) - 1
        return (
            bitmap & word,
            bitmap >> _BITMAP_BITS & word,
            bitmap >> 2 * _BITMAP_BITS & word,
            bitmap >> 3 * _BITMAP_BITS & word,
        )

    def _hyp_meminfo(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        if x1 or x2 or x3:
            return _INVALID
        return (PAGE_SIZE, _HAS_RANGE, 0, 0)

    def _mem_share(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        return self._change("mem_share", self._mem.guest_share_host, vcpu, x1, x2, x3)

    def _mem_unshare(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        return self._change("mem_unshare", self._mem.guest_unshare_host, vcpu, x1, x2, x3)

    def _change(
        self,
        op: str,
        transition: Callable[[GuestMemory, int, int], int],
        vcpu: Vcpu,
        ipa: int,
        granules: int,
        reserved: int,
    ) -> Results | None:
        """MEM_SHARE or MEM_UNSHARE of `granules` from `ipa` (0 means 1). X1 is how many were done,
        maybe not all; on an error none was. Without table pages to split a block, the host is
        asked for some and the HVC is executed again."""
        if reserved:
            return _INVALID
        try:
            done = transition(vcpu.vm, ipa, granules or 1)
        except Refused as refused:
            if refused.errno == Errno.ENOMEM:
                self._engine.pc = (self._engine.pc - 4) & MASK64
                self._exits.request_table_pages(vcpu, refused.pages_needed)
                return None
            self._record(
                Refusal(op, refused.check, 0, refused.why, vcpu.handle, refused.pa, refused.ipa)
            )
            return _INVALID
        return (SUCCESS, done, 0, 0)


def _as_service(call: Call) -> Service:
    """A PSCI call as a service: X1-X3 are 0 on return."""

    def service(vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        result = call(vcpu, x1, x2, x3)
        return None if result is None else (result, 0, 0, 0)

    return service
