# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected guest may ask of EL2 by HVC (SMCCC; facts §6.4, §6.5).

Function ids must be exactly those of the tables, 32- or 64-bit form; the SVE
hint is ignored, as are the upper half of X0 and the HVC's immediate. Which calls
there are the dialect says. Of a guest whose registers EL2 keeps everything else
is NOT_SUPPORTED: no call of its reaches the host but those that EL2 has exit to
it. Of another guest the host serves everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pkvm.arm64 import smccc
from pkvm.arm64.bits import MASK64
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS, Function
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.events import Recorder, Refusal, VmLife
from pkvm.hyp import mmio_guard
from pkvm.hyp.abi import HypRequest
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.exits import Exits
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.nonprotected import NonProtected
from pkvm.hyp.policy import Policy, Unmapped
from pkvm.hyp.psci import Call, Psci
from pkvm.hyp.pviommu import Call as DeviceCall
from pkvm.hyp.pviommu import Pviommu
from pkvm.hyp.trng import Trng
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
"""X1 of HYP_MEMINFO and MMIO_GUARD_INFO: there are calls that take a number of granules."""
UNSUPPORTED: Results = (NOT_SUPPORTED, 0, 0, 0)
"""The answer to every function id that no service has."""
_INVALID: Results = (INVALID_PARAMETER, 0, 0, 0)
_DONE: Results = (SUCCESS, 0, 0, 0)
_ARCH_FEATURES = frozenset({Function.SMCCC_VERSION, Function.SMCCC_ARCH_FEATURES})
_NUMBER_MASK = 0xFFFF


class GuestCalls:
    """The services of one CPU's guests, by function id; `vector` calls them."""

    def __init__(
        self,
        engine: CpuEngine,
        mem: MemProtect,
        exits: Exits,
        nonprotected: NonProtected,
        recorder: Recorder,
        policy: Policy,
        pviommu: Pviommu | None,
    ) -> None:
        self._engine = engine
        self._mem = mem
        self._exits = exits
        self._nonprotected = nonprotected
        self._record = recorder.record
        self._policy = policy
        self._has_range = policy.has_range
        self._meminfo: Results = (PAGE_SIZE, _HAS_RANGE if policy.has_range else 0, 0, 0)
        vendor: dict[int, Service] = {
            Function.KVM_FEATURES: self._kvm_features,
            Function.HYP_MEMINFO: self._hyp_meminfo,
            Function.MEM_SHARE: self._changes("mem_share", mem.guest_share_host),
            Function.MEM_UNSHARE: self._changes("mem_unshare", mem.guest_unshare_host),
            Function.MMIO_GUARD_INFO: self._mmio_guard_info,
            Function.MMIO_GUARD_ENROLL: self._mmio_guard_enroll,
            Function.MMIO_GUARD_MAP: self._mmio_guard_map,
            Function.MMIO_GUARD_UNMAP: self._mmio_guard_unmap,
            Function.MEM_RELINQUISH: self._mem_relinquish,
            Function.MMIO_RGUARD_MAP: self._mmio_rguard_map,
            Function.MMIO_RGUARD_UNMAP: self._mmio_rguard_unmap,
        }
        self.services: dict[int, Service] = {}
        if policy.isolation is not None:
            version = policy.isolation.smccc_version
            self.services[Function.SMCCC_VERSION] = partial(_constant, (version, 0, 0, 0))
            self.services[Function.SMCCC_ARCH_FEATURES] = self._arch_features
            self.services[Function.VENDOR_UID] = partial(_constant, smccc.VENDOR_HYP_UID)
            psci = Psci(engine, exits, recorder, policy.isolation.psci_version)
            for number, call in psci.table.items():
                self.services[number] = _as_service(call)
            if policy.isolation.trng:
                self.services |= Trng(exits).table
        for function in policy.vendor_calls:
            self.services[function] = vendor[function]
        if pviommu is not None:
            for function in policy.device_calls:
                self.services[function] = self._about_devices(function, pviommu.table[function])

    def _arch_features(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        there = x1 & _W_MASK in _ARCH_FEATURES
        return (SUCCESS if there else NOT_SUPPORTED, 0, 0, 0)

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
        return self._meminfo

    def _mem_relinquish(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        """The page is the host's again, zeroed, and the host is told; where there is none, nothing
        happens. Who gives up a page of the firmware has done with it: what comes there later is not
        filled with it."""
        if x2 or x3:
            return _INVALID
        vm = vcpu.vm
        try:
            given = self._mem.guest_relinquish_host(vm, x1)
        except Refused as refused:
            return self._refused("mem_relinquish", vcpu, refused)
        if given is None:
            return _DONE
        if vm.is_firmware(x1):
            vm.firmware_loaded = 1
        self._exits.publish_relinquished(vcpu, given)
        return None

    def _mmio_guard_info(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        if x1 or x2 or x3:
            return _INVALID
        return (PAGE_SIZE, _HAS_RANGE, 0, 0)

    def _mmio_guard_enroll(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        if not vcpu.vm.mmio_guard:
            vcpu.vm.mmio_guard = 1
            self._exits.forget_aborts()
            self._record(VmLife("mmio_guard", vcpu.handle, vcpu.index))
        return _DONE

    def _mmio_guard_map(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        """One frame; older guests leave something in X2 and X3."""
        done = self._mark(vcpu, x1, 1)
        return done and (done[0], 0, 0, 0)

    def _mmio_rguard_map(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        return _INVALID if x3 else self._mark(vcpu, x1, x2)

    def _mmio_guard_unmap(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        """Nothing: what was a device stays one."""
        return _DONE if vcpu.vm.mmio_guard else _INVALID

    def _mmio_rguard_unmap(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
        return _INVALID if x3 or not vcpu.vm.mmio_guard else (SUCCESS, x2, 0, 0)

    def _mark(self, vcpu: Vcpu, ipa: int, nr: int) -> Results | None:
        """X1 is how many frames were marked, maybe not all; on an error none was."""
        try:
            done = mmio_guard.mark(self._mem, vcpu.vm, ipa, nr)
        except Refused as refused:
            return self._refused("mmio_guard_map", vcpu, refused)
        self._exits.forget_aborts()
        return (SUCCESS, done, 0, 0)

    def _changes(self, op: str, transition: Callable[[GuestMemory, int, int], int]) -> Service:
        """MEM_SHARE or MEM_UNSHARE of X2 granules from X1 (0 means 1). X1 is how many were done,
        maybe not all; on an error none was. Without ranges it is one, and X1 says nothing."""
        has_range = self._has_range

        def service(vcpu: Vcpu, ipa: int, granules: int, reserved: int) -> Results | None:
            if reserved or (granules and not has_range):
                return _INVALID
            try:
                done = transition(vcpu.vm, ipa, granules or 1)
            except Refused as refused:
                if op == "mem_share" and refused.errno == self._policy.memory.unmapped:
                    return self._unmapped(op, vcpu, refused)
                return self._refused(op, vcpu, refused)
            return (SUCCESS, done, 0, 0) if has_range else _DONE

        return service

    def _about_devices(self, function: Function, call: DeviceCall) -> Service:
        """What the guest maps for DMA, or asks about, is there first."""
        op = function.name.lower()

        def service(vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
            try:
                return call(vcpu.vm, x1, x2, x3)
            except Refused as refused:
                if refused.errno == self._policy.memory.unmapped:
                    return self._unmapped(op, vcpu, refused)
                return self._refused(op, vcpu, refused)

        return service

    def _unmapped(self, op: str, vcpu: Vcpu, refused: Refused) -> Results | None:
        """A call about a frame without a page. Where the guest expects a device there will be
        none."""
        wish = self._policy.unmapped_share
        if wish is Unmapped.REFUSED or vcpu.vm.stage2.leaf(refused.ipa)[0]:
            return self._refused(op, vcpu, refused)
        self._again()
        if wish is Unmapped.REQUEST:
            self._ask(vcpu, HypRequest.MAP, 1, refused.ipa)
        else:
            self._nonprotected.exit_fault(vcpu, refused.ipa)
        return None

    def _refused(self, op: str, vcpu: Vcpu, refused: Refused) -> Results | None:
        """Without table pages the host is asked for some and the HVC executed again; else the
        guest learns that it was refused, and nothing more."""
        if refused.errno == Errno.ENOMEM:
            self._again()
            self._ask(vcpu, HypRequest.MEMCACHE, refused.pages_needed, 0)
            return None
        self._record(
            Refusal(op, refused.check, 0, refused.why, vcpu.handle, refused.pa, refused.ipa)
        )
        return _INVALID

    def _again(self) -> None:
        self._engine.pc = (self._engine.pc - 4) & MASK64

    def _ask(self, vcpu: Vcpu, kind: HypRequest, npages: int, ipa: int) -> None:
        outlet = self._exits if vcpu.vm.isolated else self._nonprotected
        outlet.request(vcpu, kind, npages, ipa)


def _constant(results: Results, vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results:
    return results


def _as_service(call: Call) -> Service:
    """A PSCI call as a service: X1-X3 are 0 on return."""

    def service(vcpu: Vcpu, x1: int, x2: int, x3: int) -> Results | None:
        result = call(vcpu, x1, x2, x3)
        return None if result is None else (result, 0, 0, 0)

    return service
